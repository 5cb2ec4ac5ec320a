//! Golden models written as llama.cpp's converter writes them must compute what they compute as folders.

use engine::{EngineConfig, GgufFile, WeightDtype, inspect, load_model};
use safetensors::Dtype;
use serde_json::json;

use crate::checkpoint_edit::{Edit, Stored};
use crate::driver::golden_dir;
use crate::gguf_fixture::{GgufBuilder, TempDir};
use crate::gguf_writer::{Form, file, metadata, tensors, through_q8_0};
use crate::golden::{CHECKS, assert_close, open_with};

/// Against transformers' numbers: all logits, the routing, and what greedy sampling gives.
fn check(golden: &str, form: Form) {
    let dir = TempDir::new(&format!("gguf-{golden}-{}-{}", form.fused, form.joint_kv_b));
    let path = dir.write("model.gguf", &file(&Edit::of(golden), form).build());
    let (mut driver, reference) = open_with(&golden_dir(golden), |config| config.model_dir = path.clone());
    CHECKS.iter().for_each(|check| check(golden, &mut driver, &reference));
}

macro_rules! converted_models {
    ($($test:ident $folder:literal $form:expr;)*) => { $(#[test] fn $test() { check($folder, $form); })* };
}

const PLAIN: Form = Form { fused: false, joint_kv_b: false, q8_0: false };
const FUSED: Form = Form { fused: true, ..PLAIN };
const JOINT: Form = Form { joint_kv_b: true, ..PLAIN };

converted_models! {
    llama_with_experts "mixtral-base" PLAIN;
    llama_fused "mixtral-base" FUSED;
    qwen2moe "qwen2_moe-base" PLAIN;
    qwen2moe_fused "qwen2_moe-base" FUSED;
    qwen3moe "qwen3_moe-base" PLAIN;
    olmoe "olmoe-base" PLAIN;
    granitemoe "granitemoe-base" PLAIN;
    granitemoe_biased "granitemoe-bias" PLAIN;
    granitemoe_shared "granitemoeshared-base" PLAIN;
    deepseek2_lite "deepseek_v2-lite" PLAIN;
    deepseek2_grouped "deepseek_v2-grouped" PLAIN;
    deepseek2_joint "deepseek_v2-lite" JOINT;
    deepseek2_v3 "deepseek_v3-base" PLAIN;
    deepseek2_v3_joint "deepseek_v3-base" JOINT;
    deepseek2_kimi "kimi_k2-base" PLAIN;
    gpt_oss "gpt_oss-mxfp4" PLAIN;
}

/// The same of files that llama.cpp's own converter wrote.
#[test]
fn files_of_another_hand_compute_the_same() {
    for golden in ["granitemoeshared-base", "gpt_oss-mxfp4"] {
        let path = golden_dir(&format!("{golden}.gguf"));
        let (mut driver, reference) = open_with(&golden_dir(golden), |config| config.model_dir = path.clone());
        CHECKS.iter().for_each(|check| check(golden, &mut driver, &reference));
    }
}

/// What the writer here writes is what that converter writes, bit for bit.
#[test]
fn the_writer_of_these_tests_is_true() {
    for golden in ["granitemoeshared-base", "gpt_oss-mxfp4"] {
        let converted = GgufFile::open(&golden_dir(&format!("{golden}.gguf"))).expect("a golden file");
        let dir = TempDir::new(&format!("gguf-writer-{golden}"));
        let path = dir.write("model.gguf", &file(&Edit::of(golden), PLAIN).build());
        let written = GgufFile::open(&path).expect("a file");
        let names = |file: &GgufFile| file.tensors().keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&written), names(&converted), "{golden}");
        for (name, tensor) in written.tensors() {
            let expected = &converted.tensors()[name];
            assert_eq!((&tensor.shape, tensor.ggml_type), (&expected.shape, expected.ggml_type), "{golden} {name}");
            assert_eq!(written.read_f32(name).expect("values"), converted.read_f32(name).expect("values"), "{name}");
        }
    }
}

const PROMPT: [u32; 5] = [5, 17, 200, 3, 91];

fn load(path: &std::path::Path, dtype: WeightDtype) -> engine::LoadedModel {
    let config = EngineConfig { dtype, kv_cache_memory: Some(1 << 20), ..EngineConfig::new(path) };
    load_model(&config, &mut |_| {}).expect("the model loads")
}

fn logits(path: &std::path::Path, dtype: WeightDtype) -> Vec<Vec<f32>> {
    load(path, dtype).runner.logits_of(&PROMPT).expect("logits")
}

fn refusal(bytes: &[u8]) -> String {
    let dir = TempDir::new("gguf-refusal");
    let path = dir.write("model.gguf", bytes);
    let config = EngineConfig { kv_cache_memory: Some(1 << 20), ..EngineConfig::new(&path) };
    let error = load_model(&config, &mut |_| {}).map_or_else(|error| error.to_string(), |_| "none".to_owned());
    assert!(error.contains("model.gguf") || error.starts_with("tensor") || error.contains("tensors"), "{error}");
    error
}

/// A model and what it is when its matrices have gone through Q8_0, as both kinds of checkpoint.
#[test]
fn blocks_keep_their_rows() {
    for golden in ["mixtral-base", "granitemoe-base", "qwen3_moe-base"] {
        let mut edit = Edit::of(golden);
        for (name, stored) in &mut edit.tensors {
            let values = widened(stored);
            let is_matrix = stored.shape.len() > 1 && !name.contains("gate.weight") && !name.contains("router");
            let values = if is_matrix { through_q8_0(&values) } else { values };
            *stored = Stored::f32(&stored.shape, &values);
        }
        let dir = TempDir::new("gguf-q8");
        let path = dir.write("model.gguf", &file(&edit, Form { q8_0: true, ..PLAIN }).build());
        let expected = edit.logits();
        for (position, found) in logits(&path, WeightDtype::F32).iter().enumerate() {
            assert_eq!(found, &expected[position], "{golden} position {position}");
        }
        // In the file's own bits, rounding is what the kernels do to activations.
        for (found, expected) in logits(&path, WeightDtype::Auto).iter().zip(&expected) {
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            let cosine = dot(found, expected) / (dot(found, found) * dot(expected, expected)).sqrt();
            assert!(cosine > 0.995, "{golden}: {cosine}");
        }
    }
}

fn widened(stored: &Stored) -> Vec<f32> {
    match stored.dtype {
        Dtype::BF16 => stored
            .bytes
            .chunks_exact(2)
            .map(|half| f32::from_bits(u32::from(u16::from_le_bytes([half[0], half[1]])) << 16))
            .collect(),
        _ => stored.to_f32(),
    }
}

/// With biases and a dense layer beside. The file has no word for weights that are not renormalised.
#[test]
fn stretched_positions_are_kept() {
    let mut edit = Edit::of("qwen3_moe-yarn");
    edit.config["norm_topk_prob"] = json!(true);
    let dir = TempDir::new("gguf-yarn");
    let path = dir.write("model.gguf", &file(&edit, PLAIN).build());
    assert_eq!(logits(&path, WeightDtype::F32), edit.logits());
}

/// llama3's scaling is in the file as divisors.
#[test]
fn stored_frequency_factors_are_used() {
    let mut edit = Edit::of("mixtral-base");
    edit.config["rope_theta"] = json!(10_000.0);
    let plain = file(&edit, PLAIN);
    let factors: Vec<f32> = (0..8)
        .map(|idx| {
            let frequency = 10_000f64.powf(-2.0 * f64::from(idx) / 16.0);
            let turns = 16.0 * frequency / (2.0 * std::f64::consts::PI);
            if turns < 1.0 {
                8.0
            } else if turns > 4.0 {
                1.0
            } else {
                1.0 / ((1.0 - (turns - 1.0) / 3.0) / 8.0 + (turns - 1.0) / 3.0)
            }
        } as f32)
        .collect();
    assert!(factors.iter().any(|&factor| factor > 1.0 && factor < 8.0), "{factors:?}");
    let dir = TempDir::new("gguf-llama3");
    let path = dir.write("model.gguf", &plain.f32_tensor("rope_freqs.weight", &[8], &factors).build());
    let unscaled = edit.logits();
    edit.config["rope_scaling"] = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    });
    let (found, expected) = (logits(&path, WeightDtype::F32), edit.logits());
    assert_ne!(unscaled[4], expected[4]);
    for (found, expected) in found.iter().zip(&expected) {
        assert_close("llama3", found, expected);
    }
}

#[test]
fn parts_of_a_model_are_one_model() {
    let edit = Edit::of("qwen3_moe-base");
    let shard = |builder: GgufBuilder, no: u16| {
        builder.raw("split.no", 2, &no.to_le_bytes()).raw("split.count", 2, &2u16.to_le_bytes())
    };
    let (mut first, mut second) =
        (shard(metadata(&edit, PLAIN), 0), shard(GgufBuilder::default().string("general.architecture", "qwen3moe"), 1));
    for (idx, (name, (shape, ggml_type, bytes))) in tensors(&edit, PLAIN).into_iter().enumerate() {
        match idx % 2 {
            0 => first = first.tensor(&name, &shape, ggml_type, bytes),
            _ => second = second.tensor(&name, &shape, ggml_type, bytes),
        }
    }
    let dir = TempDir::new("gguf-split");
    dir.write("m-00001-of-00002.gguf", &first.build());
    let path = dir.write("m-00002-of-00002.gguf", &second.build());
    // The folder holds one model.
    assert_eq!(logits(dir.path(), WeightDtype::F32), edit.logits());
    let error = inspect(&path).expect_err("a part").to_string();
    assert!(error.contains("hint: give the first part"), "{error}");
    std::fs::remove_file(&path).expect("the second part");
    let error = inspect(dir.path()).expect_err("a missing part").to_string();
    assert!(error.contains("m-00002-of-00002.gguf"), "{error}");
    dir.write("other.gguf", b"GGUF");
    let error = inspect(dir.path()).expect_err("two models").to_string();
    assert!(error.contains("m-00001-of-00002.gguf, other.gguf"), "{error}");
}

#[test]
fn an_inspected_file_has_the_sizes_of_its_folder() {
    for golden in ["mixtral-base", "granitemoeshared-base", "deepseek_v3-base", "qwen2_moe-base"] {
        let dir = TempDir::new("gguf-inspect");
        let path = dir.write("model.gguf", &file(&Edit::of(golden), PLAIN).build());
        let (found, expected) = (inspect(&path).expect("sizes"), inspect(&golden_dir(golden)).expect("sizes"));
        assert_eq!(found.num_parameters, expected.num_parameters, "{golden}");
        assert_eq!(found.num_active_parameters, expected.num_active_parameters, "{golden}");
        assert_eq!(found.kv_bytes_per_token, expected.kv_bytes_per_token, "{golden}");
        assert_eq!(found.num_moe_layers, expected.num_moe_layers, "{golden}");
        assert_eq!((found.architecture, found.num_experts), (expected.architecture, expected.num_experts), "{golden}");
        assert_eq!(found.memory_bytes, load(&path, WeightDtype::Auto).summary.weight_bytes, "{golden}");
        let path = dir.write("q8_0.gguf", &file(&Edit::of(golden), Form { q8_0: true, ..PLAIN }).build());
        let (quantized, loaded) = (inspect(&path).expect("sizes"), load(&path, WeightDtype::Auto).summary);
        // Of four bytes each, some bits more than eight are left.
        assert!(quantized.memory_bytes < found.memory_bytes_f32 / 3, "{golden}: {quantized:?}");
        let difference = quantized.memory_bytes.abs_diff(loaded.weight_bytes);
        assert!(difference <= loaded.weight_bytes / 50, "{golden}: {} {}", quantized.memory_bytes, loaded.weight_bytes);
        assert_eq!(quantized.dtypes[0], "q8_0");
    }
}

#[test]
fn what_is_not_served_is_refused_by_name() {
    let edit = Edit::of("mixtral-base");
    let bert = GgufBuilder::default().string("general.architecture", "bert").build();
    assert!(refusal(&bert).contains("`general.architecture` is `bert`, supported are llama, qwen2moe"));
    let empty = GgufBuilder::default().string("general.architecture", "llama").build();
    assert!(refusal(&empty).contains("metadata `llama.attention.head_count` is missing"));
    let mut dense = Edit::of("mixtral-base");
    dense.config["num_local_experts"] = json!(0);
    assert!(refusal(&file(&dense, PLAIN).build()).contains("`llama.expert_count` is missing or 0"));
    let unknown = file(&edit, PLAIN).f32_tensor("blk.0.attn_gate.weight", &[2, 2], &[0.0; 4]).build();
    assert!(refusal(&unknown).contains("first of them `blk.0.attn_gate.weight`"), "{}", refusal(&unknown));
    let iq2 = file(&edit, PLAIN).tensor("blk.0.ffn_norm_2.weight", &[1, 256], 16, vec![0; 66]).build();
    assert!(refusal(&iq2).contains("`blk.0.ffn_norm_2.weight` is stored as IQ2_XXS, which is not supported"));
    let mut cut = tensors(&edit, PLAIN);
    cut.remove("blk.1.ffn_down_exps.weight");
    let cut = cut.into_iter().fold(metadata(&edit, PLAIN), |file, (name, (shape, ggml_type, bytes))| {
        file.tensor(&name, &shape, ggml_type, bytes)
    });
    assert!(refusal(&cut.build()).contains("model.layers.1.block_sparse_moe.experts.0.w2.weight` is missing"));
    let longrope = file(&edit, PLAIN).string("llama.rope.scaling.type", "longrope").build();
    assert!(refusal(&longrope).contains("`llama.rope.scaling.type` is `longrope`, supported are none, linear, yarn"));
    let mut uneven = Edit::of("mixtral-base");
    uneven.config["num_key_value_heads"] = json!(3);
    assert!(refusal(&file(&uneven, PLAIN).build()).contains("Hugging Face's `num_key_value_heads`, is 3"));
}

//! Every golden folder quantized while loading, and as a packed folder: near its numbers in f32, and the same in both.

use std::path::{Path, PathBuf};

use engine::{EngineConfig, EngineError, PackFormat, QuantizeReport, WeightQuant, inspect, load_model, quantize};
use serde_json::Value;

use crate::checkpoint_edit::{Edit, Stored};
use crate::driver::golden_dir;
use crate::golden::{logits_of, open_with};

/// Largest mean difference of a logit from that in f32, as a share of the largest one: one of eight bits, and one of four.
/// Tiny random models have near ties, so that a router chooses otherwise here and there.
const TOLERANCES: [f32; 2] = [0.05, 0.15];

/// A folder that is removed when dropped.
pub struct Packed(pub PathBuf);

impl Packed {
    pub fn of(source: &Path, name: &str, to: PackFormat) -> Self {
        let packed = Self(std::env::temp_dir().join(format!("moesaic-packed-{name}-{to:?}-{}", std::process::id())));
        packed.write(source, to).expect("a packed folder");
        packed
    }

    fn write(&self, source: &Path, to: PackFormat) -> Result<QuantizeReport, EngineError> {
        quantize(source, &self.0, to, &mut |_| {}, |folder| {
            let copy = |file: &str| std::fs::copy(source.join(file), folder.join(file)).expect("a copy");
            for file in ["generation_config.json", "reference.json"] {
                copy(file);
            }
            Ok(())
        })
    }
}

impl Drop for Packed {
    fn drop(&mut self) {
        // What is left in the folder of temporary files harms nobody.
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// Logits of the longest prompt, the bytes of the weights and their formats.
fn run(dir: &Path, change: impl Fn(&mut EngineConfig)) -> (Vec<Vec<f32>>, u64, Vec<&'static str>) {
    let (mut driver, reference) = open_with(dir, change);
    let logits = logits_of(&mut driver, &reference["full_logits"], &reference);
    (logits, driver.model.summary.weight_bytes, driver.model.summary.weight_formats.clone())
}

fn quantized(quant: WeightQuant) -> impl Fn(&mut EngineConfig) {
    move |config| {
        (config.dtype, config.quant, config.kv_dtype) = (engine::WeightDtype::Auto, quant, engine::KvDtype::F32)
    }
}

fn mean_difference(found: &[Vec<f32>], expected: &[Vec<f32>]) -> f32 {
    let [found, expected] = [found, expected].map(|rows| rows.concat());
    let largest = expected.iter().fold(0f32, |max, value| max.max(value.abs()));
    let sum: f32 = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).sum();
    sum / expected.len() as f32 / largest
}

#[cfg(test)]
fn check(name: &str) {
    let dir = golden_dir(name);
    let (exact, bytes_f32, _) = run(&dir, |config| config.kv_dtype = engine::KvDtype::F32);
    let formats = [(WeightQuant::Int8, PackFormat::Int8), (WeightQuant::Int4, PackFormat::Int4)];
    for ((quant, to), tolerance) in formats.into_iter().zip(TOLERANCES) {
        let (logits, bytes, formats) = run(&dir, quantized(quant));
        let difference = mean_difference(&logits, &exact);
        assert!(difference < tolerance, "{name} {quant:?}: off by {difference}");
        assert!(bytes < bytes_f32, "{name} {quant:?}: {bytes} bytes, {bytes_f32} in f32");
        let packed = Packed::of(&dir, name, to);
        let found = run(&packed.0, quantized(WeightQuant::None));
        assert_eq!(found, (logits, bytes, formats), "{name} {quant:?}");
    }
}

#[cfg(test)]
test_every_folder!();

/// A model of the size of a small published one's layer: formats that fill whole groups take what they promise.
#[test]
fn packed_folders_are_as_small_as_promised() {
    let mut edit = Edit::of("olmoe-base");
    let sizes = [("hidden_size", 512), ("intermediate_size", 256), ("num_hidden_layers", 1), ("num_experts", 4)];
    sizes.iter().for_each(|(key, size)| edit.config[*key] = (*size).into());
    edit.config["num_attention_heads"] = 8.into();
    edit.config["num_key_value_heads"] = 8.into();
    edit.config["vocab_size"] = 512.into();
    edit.tensors.clear();
    let mut add = |name: String, shape: &[usize]| {
        let len: usize = shape.iter().product();
        let values: Vec<f32> = (0..len).map(|idx| ((idx * 7919 % 1009) as f32 / 504.5 - 1.0) * 0.05).collect();
        edit.tensors.insert(name, Stored::f32(shape, &values));
    };
    add("model.embed_tokens.weight".into(), &[512, 512]);
    add("lm_head.weight".into(), &[512, 512]);
    add("model.norm.weight".into(), &[512]);
    let layer = |part: &str| format!("model.layers.0.{part}.weight");
    for part in ["q_proj", "k_proj", "v_proj", "o_proj"] {
        add(layer(&format!("self_attn.{part}")), &[512, 512]);
    }
    for part in ["input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"] {
        add(layer(part), &[512]);
    }
    add(layer("mlp.gate"), &[4, 512]);
    for expert in 0..4 {
        for (part, shape) in [("gate_proj", [256, 512]), ("up_proj", [256, 512]), ("down_proj", [512, 256])] {
            add(layer(&format!("mlp.experts.{expert}.{part}")), &shape);
        }
    }
    let source = edit.write();
    for (to, most) in [(PackFormat::Int8, 0.27), (PackFormat::Bf16, 0.51)] {
        let packed = Packed(std::env::temp_dir().join(format!("moesaic-packed-size-{to:?}-{}", std::process::id())));
        let report =
            quantize(source.path(), &packed.0, to, &mut |_| {}, |_| Ok::<(), EngineError>(())).expect("packed");
        let share = report.num_bytes as f64 / report.num_bytes_f32 as f64;
        assert!(share <= most, "{to:?}: {share}");
    }
    // Embedding and head stay at eight bits, a third of this model's weights and a few per cent of a real one's.
    let packed = Packed(std::env::temp_dir().join(format!("moesaic-packed-size-int4-{}", std::process::id())));
    let report = quantize(source.path(), &packed.0, PackFormat::Int4, &mut |_| {}, |_| Ok::<(), EngineError>(()));
    let report = report.expect("packed");
    let tables = 2 * 512 * 512;
    let eight_bits = 0.27 * 4.0 * f64::from(tables);
    let layers = (report.num_bytes as f64 - eight_bits) / (report.num_bytes_f32 as f64 - 4.0 * f64::from(tables));
    assert!(layers <= 0.15, "{layers}");
}

fn refusal(dir: &Path, change: impl Fn(&mut EngineConfig)) -> String {
    let mut config = EngineConfig { kv_cache_memory: Some(1 << 20), ..EngineConfig::new(dir) };
    change(&mut config);
    load_model(&config, &mut |_| {}).map_or_else(|error| error.to_string(), |_| "none".to_owned())
}

#[test]
fn packed_weights_cannot_be_anything_else() {
    let source = golden_dir("mixtral-base");
    let packed = Packed::of(&source, "settings", PackFormat::Int8);
    assert_eq!(refusal(&packed.0, |config| config.quant = WeightQuant::Int8), "none");
    let error = refusal(&packed.0, |config| config.quant = WeightQuant::Int4);
    assert!(error.contains("packed as int8 already, --quant int4 cannot change them; hint"), "{error}");
    let error = refusal(&packed.0, |config| config.dtype = engine::WeightDtype::F32);
    assert!(error.contains("packed as int8 already, --dtype cannot change them; hint"), "{error}");
    let error = packed.write(&source, PackFormat::Int8).unwrap_err().to_string();
    assert!(error.contains("it exists already"), "{error}");
    let other = Packed(packed.0.with_extension("again"));
    let error = other.write(&packed.0, PackFormat::Int4).unwrap_err().to_string();
    assert!(error.contains("its weights are packed as int8 already; hint"), "{error}");
    assert!(!other.0.exists());
    assert_eq!(inspect(&packed.0).expect("sizes").num_parameters, inspect(&source).expect("sizes").num_parameters);
}

/// Changes the text of a file of a packed folder.
fn edit_file(packed: &Packed, file: &str, change: (&str, &str)) {
    let path = packed.0.join(file);
    let text = std::fs::read_to_string(&path).expect("a text");
    assert!(text.contains(change.0), "{file} has no {}", change.0);
    std::fs::write(&path, text.replace(change.0, change.1)).expect("a file");
}

#[test]
fn broken_packed_folders_are_refused_by_name() {
    let source = golden_dir("mixtral-base");
    for (idx, (file, change, expect)) in [
        (
            "config.json",
            ("\"version\": 1", "\"version\": 2"),
            "config.json is not valid: its weights are packed in version 2",
        ),
        (
            "moesaic.json",
            ("\"version\": 1", "\"version\": 7"),
            "moesaic.json is not valid: its weights are packed in version 7",
        ),
        (
            "moesaic.json",
            ("\"int8rotated/64\"", "\"int8rotated/48\""),
            "has the unknown format `int8rotated/48` in moesaic.json",
        ),
        (
            "moesaic.json",
            ("model.layers.0.self_attn.o_proj.weight", "x"),
            "self_attn.o_proj.weight` is not in moesaic.json",
        ),
        ("moesaic.json", ("\"int8rotated/64\"", "\"f32\""), "bytes, expected"),
        (
            "model.safetensors.index.json",
            ("model.norm.weight", "model.norm.wrong"),
            "tensor `model.norm.wrong` is missing",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let packed = Packed::of(&source, &format!("broken-{idx}"), PackFormat::Int8);
        edit_file(&packed, file, change);
        let error = refusal(&packed.0, |_| {});
        assert!(error.contains(expect) || expect == "bytes, expected" && error.contains("lie outside"), "{error}");
    }
    let packed = Packed::of(&source, "cut", PackFormat::Int8);
    let shard = packed.0.join("model-00001.safetensors");
    let bytes = std::fs::read(&shard).expect("a shard");
    std::fs::write(&shard, &bytes[..bytes.len() - 64]).expect("a shard");
    let error = refusal(&packed.0, |_| {});
    assert!(error.contains("model-00001.safetensors is not valid"), "{error}");
}

#[test]
fn a_folder_that_was_not_finished_is_not_there() {
    let packed = Packed(std::env::temp_dir().join(format!("moesaic-packed-stopped-{}", std::process::id())));
    let stop = |_: &Path| Err(EngineError::NoMtp("stopped".into()));
    let error = quantize(&golden_dir("mixtral-base"), &packed.0, PackFormat::Int8, &mut |_| {}, stop).unwrap_err();
    assert!(error.to_string().contains("stopped"));
    let name = packed.0.file_name().expect("a name").to_string_lossy().into_owned();
    let left = std::fs::read_dir(std::env::temp_dir())
        .expect("a folder")
        .filter(|entry| entry.as_ref().is_ok_and(|entry| entry.file_name().to_string_lossy().contains(&name)));
    assert_eq!(left.count(), 0);
}

/// The digest is of the weights: the same twice, and another one for other weights.
#[test]
fn weights_have_a_digest() {
    let digest = |folder: &str, name: &str, to| {
        let packed = Packed::of(&golden_dir(folder), name, to);
        let text = std::fs::read(packed.0.join("moesaic.json")).expect("an index");
        let index: Value = serde_json::from_slice(&text).expect("JSON");
        index["digest"].as_str().expect("a digest").to_owned()
    };
    let first = digest("mixtral-base", "digest-1", PackFormat::Int8);
    assert!(first.starts_with("sha256:") && first.len() == 7 + 64, "{first}");
    assert_eq!(digest("mixtral-base", "digest-2", PackFormat::Int8), first);
    assert_ne!(digest("mixtral-base", "digest-3", PackFormat::Int4), first);
}

#[test]
fn a_packed_gguf_keeps_its_stop_tokens_and_sampling_defaults() {
    let source = golden_dir("granitemoeshared-base.gguf");
    let packed = Packed(std::env::temp_dir().join(format!("moesaic-packed-gguf-{}", std::process::id())));
    quantize(&source, &packed.0, PackFormat::Int8, &mut |_| {}, |_| Ok::<_, EngineError>(())).expect("a packed folder");
    let defaults = |path: &Path| {
        let config = EngineConfig { kv_cache_memory: Some(1 << 20), ..EngineConfig::new(path) };
        load_model(&config, &mut |_| {}).expect("a model").summary.generation_defaults
    };
    assert!(!defaults(&source).eos_token_ids.is_empty());
    assert_eq!(defaults(&packed.0), defaults(&source));
}

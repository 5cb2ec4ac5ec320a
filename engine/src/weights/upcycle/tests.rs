//! Upcycling a tiny synthetic dense model.

use super::super::checkpoint::Checkpoint;
use super::super::gguf_fixture::{GgufBuilder, TempDir};
use super::*;

const HIDDEN: u64 = 32;
const INNER: u64 = 64;
const VOCAB: u64 = 10;
/// Two heads of 16 and one kv head.
const HEAD_DIM: u64 = 16;

fn counting(len: u64, start: f32) -> Vec<f32> {
    (0..len).map(|i| start + i as f32 / 8.0).collect()
}

fn tiny_gguf() -> GgufBuilder {
    claiming_layers(2)
}

/// Two layers, whatever the metadata says.
fn claiming_layers(num_layers: u32) -> GgufBuilder {
    let mut builder = GgufBuilder::default()
        .string("general.architecture", "llama")
        .u32("llama.block_count", num_layers)
        .u32("llama.context_length", 128)
        .u32("llama.embedding_length", HIDDEN as u32)
        .u32("llama.feed_forward_length", INNER as u32)
        .u32("llama.attention.head_count", 2)
        .u32("llama.attention.head_count_kv", 1)
        .f32("llama.rope.freq_base", 100_000.0)
        .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 2)
        .u32("tokenizer.ggml.eot_token_id", 3)
        .f32_tensor("token_embd.weight", &[VOCAB, HIDDEN], &counting(VOCAB * HIDDEN, -3.0))
        .f32_tensor("output_norm.weight", &[HIDDEN], &counting(HIDDEN, 1.0));
    for layer in 0..2 {
        let start = layer as f32;
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        let rows_of_own_number = |rows: u64| -> Vec<f32> { (0..rows * HIDDEN).map(|i| (i / HIDDEN) as f32).collect() };
        builder = builder
            .f32_tensor(&name("attn_norm"), &[HIDDEN], &counting(HIDDEN, start))
            .f32_tensor(&name("ffn_norm"), &[HIDDEN], &counting(HIDDEN, start + 1.0))
            .f32_tensor(&name("attn_q"), &[HIDDEN, HIDDEN], &rows_of_own_number(HIDDEN))
            .f32_tensor(&name("attn_k"), &[HEAD_DIM, HIDDEN], &rows_of_own_number(HEAD_DIM))
            .f32_tensor(&name("attn_v"), &[HEAD_DIM, HIDDEN], &counting(HEAD_DIM * HIDDEN, start))
            .f32_tensor(&name("attn_output"), &[HIDDEN, HIDDEN], &counting(HIDDEN * HIDDEN, start))
            .f32_tensor(&name("ffn_gate"), &[INNER, HIDDEN], &counting(INNER * HIDDEN, start))
            .f32_tensor(&name("ffn_up"), &[INNER, HIDDEN], &counting(INNER * HIDDEN, start + 7.0))
            .f32_tensor(&name("ffn_down"), &[HIDDEN, INNER], &counting(INNER * HIDDEN, start - 7.0));
    }
    builder
}

fn f32_options(num_experts: usize, top_k: usize) -> UpcycleOptions {
    UpcycleOptions { num_experts, top_k, seed: 42, dtype: UpcycleDtype::F32 }
}

fn values(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    let entry = checkpoint.get(name).unwrap_or_else(|| panic!("{name} is missing"));
    checkpoint.bytes(entry).as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

fn read_config(dir: &Path, file: &str) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join(file)).unwrap()).unwrap()
}

#[test]
fn experts_are_the_dense_ffn_and_the_folder_is_complete() {
    let dir = TempDir::new("upcycle");
    let source = dir.write("dense.gguf", &tiny_gguf().build());
    let out = dir.path().join("moe");
    let mut last = (0, 0);
    let report = upcycle(&source, &out, &f32_options(4, 2), &mut |done, total| {
        assert!(done > last.0 && done <= total);
        last = (done, total);
    })
    .unwrap();
    assert_eq!(last, (report.num_bytes, report.num_bytes));
    assert_eq!(report.num_tensors, 2 + 2 * (7 + 12));
    assert_eq!(report.num_shards, 1);
    assert!(!dir.path().join(".moe.incomplete").exists());

    let checkpoint = Checkpoint::open(&out).unwrap();
    let gguf = GgufFile::open(&source).unwrap();
    for layer in 0..2 {
        for (projection, from) in [("w1", "ffn_gate"), ("w3", "ffn_up"), ("w2", "ffn_down")] {
            let dense = gguf.read_f32(&format!("blk.{layer}.{from}.weight")).unwrap();
            for expert in 0..4 {
                let name = format!("model.layers.{layer}.block_sparse_moe.experts.{expert}.{projection}.weight");
                assert_eq!(values(&checkpoint, &name), dense, "{name}");
            }
        }
    }
    let router = |layer: usize| values(&checkpoint, &format!("model.layers.{layer}.block_sparse_moe.gate.weight"));
    assert_eq!(router(0).len(), 4 * HIDDEN as usize);
    assert_ne!(router(0), router(1));

    let config = read_config(&out, "config.json");
    for (key, expected) in [
        ("model_type", json!("mixtral")),
        ("architectures", json!(["MixtralForCausalLM"])),
        ("head_dim", json!(16)),
        ("num_key_value_heads", json!(1)),
        ("num_local_experts", json!(4)),
        ("num_experts_per_tok", json!(2)),
        ("rms_norm_eps", json!(1e-5)),
        ("rope_theta", json!(100_000.0)),
        ("tie_word_embeddings", json!(true)),
        ("torch_dtype", json!("float32")),
        ("vocab_size", json!(10)),
        ("bos_token_id", json!(1)),
        ("eos_token_id", json!(2)),
    ] {
        assert_eq!(config[key], expected, "{key}");
    }
    assert_eq!(read_config(&out, "generation_config.json")["eos_token_id"], json!([2, 3]));
}

/// GGUF row `2 i + j` of a head is row `j d/2 + i` of the checkpoint it was made from.
#[test]
fn rotary_rows_return_to_halves() {
    let dir = TempDir::new("rotary");
    let source = dir.write("dense.gguf", &tiny_gguf().build());
    let out = dir.path().join("moe");
    upcycle(&source, &out, &f32_options(1, 1), &mut |_, _| ()).unwrap();
    let checkpoint = Checkpoint::open(&out).unwrap();
    let expected: Vec<f32> = [(0..16).step_by(2), (1..16).step_by(2)].into_iter().flatten().map(|r| r as f32).collect();
    for (name, num_heads) in [("q_proj", 2), ("k_proj", 1)] {
        let rows = values(&checkpoint, &format!("model.layers.1.self_attn.{name}.weight"));
        for (row, row_values) in rows.chunks_exact(HIDDEN as usize).enumerate() {
            let head_start = (row / 16 * 16) as f32;
            assert_eq!(row_values, [head_start + expected[row % 16]; HIDDEN as usize], "{name} row {row}");
        }
        assert_eq!(rows.len(), num_heads * 16 * HIDDEN as usize);
    }
}

#[test]
fn untied_bf16_models_are_split_into_shards() {
    let dir = TempDir::new("shards");
    let head = counting(VOCAB * HIDDEN, 5.0);
    let builder = tiny_gguf().f32_tensor("output.weight", &[VOCAB, HIDDEN], &head);
    let source = dir.write("dense.gguf", &builder.build());
    let gguf = GgufFile::open(&source).unwrap();
    let dense = DenseModel::read(&gguf).unwrap();
    let options = UpcycleOptions { dtype: UpcycleDtype::Bf16, ..f32_options(3, 1) };
    let conversion = Conversion { gguf: &gguf, options: &options, max_shard_bytes: 10_000 };
    let plan = dense.plan(&gguf, 3).unwrap();
    let report = conversion.write_folder(dir.path(), &dense, &plan, &mut |_, _| ()).unwrap();
    assert!(report.num_shards > 3, "{report:?}");
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.iter().count(), report.num_tensors);
    assert_eq!(checkpoint.total_bytes(), report.num_bytes);
    let entry = checkpoint.get("lm_head.weight").unwrap();
    let expected: Vec<u8> = head.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
    assert_eq!(checkpoint.bytes(entry), expected);
    assert_eq!(read_config(dir.path(), "config.json")["tie_word_embeddings"], json!(false));
}

#[test]
fn what_cannot_be_upcycled_is_refused_and_leaves_nothing() {
    let dir = TempDir::new("refused");
    let check = |builder: GgufBuilder, options: &UpcycleOptions, expected: &str| {
        let source = dir.write("dense.gguf", &builder.build());
        let out = dir.path().join("out");
        let error = upcycle(&source, &out, options, &mut |_, _| ()).unwrap_err().to_string();
        assert!(error.contains(expected), "`{error}` does not contain `{expected}`");
        assert!(!out.exists() && !dir.path().join(".out.incomplete").exists(), "{expected}");
    };
    check(tiny_gguf(), &f32_options(0, 1), "the number of experts is 0");
    check(tiny_gguf(), &f32_options(2, 3), "experts per token is 3");
    check(claiming_layers(16_000_000), &f32_options(1024, 1), "16000000 layers, but 20 tensors");
    let qwen = GgufBuilder::default().string("general.architecture", "qwen2");
    check(qwen, &f32_options(2, 1), "architecture is `qwen2`");
    check(tiny_gguf().u32("llama.expert_count", 8), &f32_options(2, 1), "experts already");
    check(tiny_gguf().string("llama.rope.scaling.type", "yarn"), &f32_options(2, 1), "rope scaling `yarn`");
    let biased = tiny_gguf().f32_tensor("blk.0.attn_q.bias", &[HIDDEN], &counting(HIDDEN, 0.0));
    check(biased, &f32_options(2, 1), "blk.0.attn_q.bias");
    let wrong = tiny_gguf().f32_tensor("output.weight", &[3, HIDDEN], &counting(3 * HIDDEN, 0.0));
    check(wrong, &f32_options(2, 1), "`output.weight` has shape [3, 32], expected [10, 32]");
    let huge = tiny_gguf().f32_tensor("output.weight", &[VOCAB, HIDDEN], &vec![1e30; (VOCAB * HIDDEN) as usize]);
    check(huge, &UpcycleOptions { dtype: UpcycleDtype::F16, ..f32_options(1, 1) }, "`lm_head.weight` has values");
}

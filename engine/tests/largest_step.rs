//! What steps take of a CUDA device, or an emulated one, is measured at the start and is enough for what comes. In a process of its
//! own, as nobody else may use the device meanwhile: `cargo test -p moesaic-engine --features cuda --test largest_step`.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use engine::{DeviceChoice, EngineConfig, EngineError, LoadedModel, WeightDtype, load_model};

/// What is kept for the sums of split attention, however large a step is.
const SPLIT_BYTES: u64 = 512 << 20;

fn config(name: &str, max_num_batched_tokens: usize) -> EngineConfig {
    let golden = std::env::var_os("MOESAIC_TEST_GOLDEN").map(PathBuf::from);
    let dir = golden.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/golden")).join(name);
    EngineConfig {
        device: DeviceChoice::Cuda(0),
        dtype: WeightDtype::F32,
        max_num_batched_tokens,
        max_num_seqs: 3,
        kv_cache_memory: Some(8 << 20),
        ..EngineConfig::new(dir)
    }
}

fn alone() -> MutexGuard<'static, ()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

fn load(config: &EngineConfig) -> Result<LoadedModel, EngineError> {
    load_model(config, &mut |_| {})
}

/// Attention of all kinds, states, an encoder, experts that compute nothing, windows.
#[test]
fn steps_take_no_more_than_the_largest_one() {
    let _alone = alone();
    let device = kernels::open_device(DeviceChoice::Cuda(0)).expect("a device");
    for name in
        ["deepseek_v3-base", "gpt_oss-alpha", "longcat_flash-base", "qwen3_next-base", "switch_transformers-base"]
    {
        let mut before = SPLIT_BYTES;
        for max_num_batched_tokens in [16, 96] {
            let mut model = load(&config(name, max_num_batched_tokens)).expect("a model");
            let step_bytes = model.summary.device_step_bytes.expect("it is on a device");
            assert!(before < step_bytes, "{name}: {before}, {step_bytes} with {max_num_batched_tokens} tokens");
            before = step_bytes;
            let extra = if model.summary.has_encoder { 1 } else { 0 };
            for num_tokens in [1, max_num_batched_tokens / 2, max_num_batched_tokens - extra] {
                let prompt: Arc<[u32]> = (0..num_tokens as u32).map(|idx| 3 + idx % 50).collect();
                let taken = kernels::device_step_bytes(&device, || model.runner.read_prompt(&prompt));
                let taken = taken.expect("a step").expect("devices say");
                assert!(taken <= step_bytes, "{name}: {num_tokens} tokens took {taken}, {step_bytes} are kept");
            }
        }
    }
}

/// The dry run leaves no trace in what is counted of the model's routers.
#[test]
fn the_largest_step_is_not_counted() {
    let _alone = alone();
    let model = load(&config("mixtral-base", 64)).expect("a model");
    assert!(model.runner.expert_loads().since_start().layers.iter().all(|layer| layer.total() == 0));
}

#[test]
fn a_step_that_does_not_fit_is_refused() {
    let _alone = alone();
    let config = EngineConfig { gpu_memory_utilization: 0.01, ..config("mixtral-base", 64) };
    let error = load(&config).err().expect("no room").to_string();
    assert!(error.contains("the steps want ") && error.contains("--max-num-batched-tokens"), "{error}");
}

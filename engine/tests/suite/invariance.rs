//! The same bytes out, whatever else is in the batch, however the prompt is chunked, whenever a sequence is preempted.

use crate::driver::{Driver, golden_dir};
use engine::sampling::params::SamplingParams;
use engine::{EngineConfig, KvDtype, SampledToken, StopCriteria, WeightDtype};
use scheduler::RequestId;

const NUM_REQUESTS: u64 = 32;
/// The request that every schedule is tried on, and its prompt's length.
const PROBE: u64 = 3;
const PROBE_LEN: usize = 21;
const MAX_TOKENS: usize = 6;

/// One model in one numeric mode.
struct Case {
    config: EngineConfig,
}

impl Case {
    fn new(folder: &str, dtype: WeightDtype) -> Self {
        let kv_dtype = if dtype == WeightDtype::F32 { KvDtype::F32 } else { KvDtype::Bf16 };
        let config = EngineConfig {
            dtype,
            kv_dtype,
            block_size: 4,
            kv_cache_memory: Some(8 << 20),
            max_model_len: Some(128),
            ..EngineConfig::new(golden_dir(folder))
        };
        Self { config }
    }

    fn driver(&self, max_num_batched_tokens: usize) -> Driver {
        Driver::new(&EngineConfig { max_num_batched_tokens, ..self.config.clone() })
    }

    /// What the probe gives alone, in one piece.
    fn alone(&self, id: u64) -> Vec<SampledToken> {
        let mut driver = self.driver(512);
        add(&mut driver, id);
        driver.run();
        driver.jobs.remove(&id).expect("the job").output
    }
}

fn prompt(id: u64) -> Vec<u32> {
    let len = if id == PROBE { PROBE_LEN } else { 1 + (id as usize * 7) % 40 };
    (0..len).map(|i| 3 + ((id as usize * 131 + i * 37) % 360) as u32).collect()
}

/// Greedy, seeded, filtered and penalised requests side by side, all with log-probs.
fn sampling(id: u64) -> SamplingParams {
    let plain = SamplingParams { seed: id, logprobs: Some(3), ..SamplingParams::default() };
    match id % 4 {
        0 => SamplingParams { temperature: 0.0, ..plain },
        1 => plain,
        2 => SamplingParams { top_k: 20, top_p: 0.9, temperature: 0.7, ..plain },
        _ => SamplingParams { frequency_penalty: 0.5, repetition_penalty: 1.1, ..plain },
    }
}

fn add(driver: &mut Driver, id: u64) {
    driver.add(id, &prompt(id), sampling(id), StopCriteria { max_tokens: MAX_TOKENS, ..StopCriteria::default() });
}

fn among_others(case: &Case) {
    for max_num_batched_tokens in [32, 57, 512] {
        let mut driver = case.driver(max_num_batched_tokens);
        (0..NUM_REQUESTS).for_each(|id| add(&mut driver, id));
        driver.run();
        for id in 0..NUM_REQUESTS {
            assert_eq!(
                driver.jobs[&id].output,
                case.alone(id),
                "request {id} with {max_num_batched_tokens} rows a step"
            );
        }
    }
}

fn at_every_chunk_size(case: &Case) {
    let expected = case.alone(PROBE);
    for chunk in 1..=PROBE_LEN {
        let mut driver = case.driver(chunk);
        add(&mut driver, PROBE);
        driver.run();
        assert_eq!(driver.jobs[&PROBE].output, expected, "chunks of {chunk}");
    }
}

fn preempted_at_any_step(case: &Case) {
    let expected = case.alone(PROBE);
    const CHUNK: usize = 5;
    let mut driver = case.driver(CHUNK);
    add(&mut driver, PROBE);
    let num_steps = std::iter::from_fn(|| driver.step().then_some(())).count();
    assert!(num_steps > MAX_TOKENS, "the prompt takes a step of its own");
    for step in 1..num_steps {
        let mut driver = case.driver(CHUNK);
        add(&mut driver, PROBE);
        for _ in 0..step {
            assert!(driver.step());
        }
        assert!(driver.model.scheduler.preempt(RequestId(PROBE)), "running after step {step}");
        driver.run();
        assert_eq!(driver.jobs[&PROBE].output, expected, "preempted after step {step}");
    }
}

fn under_scarcity(case: &Case) {
    let mut driver = case.driver(64);
    assert_eq!(driver.model.scheduler.set_num_blocks(24), 24);
    (0..NUM_REQUESTS).for_each(|id| add(&mut driver, id));
    driver.run();
    assert!(driver.model.scheduler.stats().num_preemptions > 0, "the pool is too small for all");
    for id in 0..NUM_REQUESTS {
        assert_eq!(driver.jobs[&id].output, case.alone(id), "request {id} in a pool of 24 blocks");
    }
}

fn check(folder: &str) {
    for dtype in [WeightDtype::F32, WeightDtype::Bf16] {
        let case = Case::new(folder, dtype);
        among_others(&case);
        at_every_chunk_size(&case);
        preempted_at_any_step(&case);
        under_scarcity(&case);
    }
}

macro_rules! invariant {
    ($($test:ident $folder:literal)*) => { $(#[test] fn $test() { check($folder); })* };
}

invariant! {
    bailing_moe_base "bailing_moe-base"
    bailing_moe_dense1 "bailing_moe-dense1"
    bailing_moe_v2_base "bailing_moe_v2-base"
    bailing_moe_v2_mtp "bailing_moe_v2-mtp"
    bailing_moe_v2_plain "bailing_moe_v2-plain"
    deepseek_v2_grouped "deepseek_v2-grouped"
    deepseek_v2_lite "deepseek_v2-lite"
    deepseek_v2_mlpbias "deepseek_v2-mlpbias"
    deepseek_v3_base "deepseek_v3-base"
    deepseek_v3_fp8 "deepseek_v3-fp8"
    deepseek_v3_mtp "deepseek_v3-mtp"
    deepseek_v3_noq "deepseek_v3-noq"
    dots1_base "dots1-base"
    dots1_layers "dots1-layers"
    dots1_window "dots1-window"
    ernie4_5_moe_base "ernie4_5_moe-base"
    ernie4_5_moe_floor "ernie4_5_moe-floor"
    ernie4_5_moe_interval "ernie4_5_moe-interval"
    glm4_moe_base "glm4_moe-base"
    glm4_moe_mtp "glm4_moe-mtp"
    glm4_moe_qknorm "glm4_moe-qknorm"
    gpt_oss_alpha "gpt_oss-alpha"
    gpt_oss_bf16 "gpt_oss-bf16"
    gpt_oss_mxfp4 "gpt_oss-mxfp4"
    granitemoe_base "granitemoe-base"
    granitemoe_bias "granitemoe-bias"
    granitemoeshared_base "granitemoeshared-base"
    hunyuan_v1_moe_base "hunyuan_v1_moe-base"
    hunyuan_v1_moe_plain "hunyuan_v1_moe-plain"
    jetmoe_base "jetmoe-base"
    jetmoe_top3 "jetmoe-top3"
    kimi_k2_base "kimi_k2-base"
    kimi_k2_int4 "kimi_k2-int4"
    kimi_k2_tiktoken "kimi_k2-tiktoken"
    llama4_kinds "llama4-kinds"
    llama4_mm "llama4-mm"
    llama4_text "llama4-text"
    longcat_flash_base "longcat_flash-base"
    longcat_flash_mtp "longcat_flash-mtp"
    longcat_flash_bias "longcat_flash-bias"
    longcat_flash_routerbias "longcat_flash-routerbias"
    minicpm_moe_base "minicpm_moe-base"
    minicpm_moe_tied "minicpm_moe-tied"
    minimax_m2_base "minimax_m2-base"
    minimax_m2_wide "minimax_m2-wide"
    mixtral_base "mixtral-base"
    mixtral_window "mixtral-window"
    olmoe_base "olmoe-base"
    olmoe_clip "olmoe-clip"
    pangu_ultra_moe_base "pangu_ultra_moe-base"
    pangu_ultra_moe_top1 "pangu_ultra_moe-top1"
    pangu_ultra_moe_vllm "pangu_ultra_moe-vllm"
    phimoe_base "phimoe-base"
    phimoe_plain "phimoe-plain"
    qwen2_moe_base "qwen2_moe-base"
    qwen2_moe_layers "qwen2_moe-layers"
    qwen2_moe_mixed "qwen2_moe-mixed"
    qwen3_moe_base "qwen3_moe-base"
    qwen3_moe_v5config "qwen3_moe-v5config"
    qwen3_moe_yarn "qwen3_moe-yarn"
    qwen3_next_alternate "qwen3_next-alternate"
    qwen3_next_base "qwen3_next-base"
    switch_transformers_base "switch_transformers-base"
    switch_transformers_capacity "switch_transformers-capacity"
    switch_transformers_steps "switch_transformers-steps"
}

/// A folder that is not tried here may depend on its batch.
#[test]
fn every_golden_folder_is_tried() {
    crate::assert_names_every_folder(include_str!("invariance.rs"));
}

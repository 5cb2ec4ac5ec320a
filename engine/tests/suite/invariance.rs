//! The same bytes out, whatever else is in the batch, however the prompt is chunked, whenever a sequence is preempted.

use crate::driver::{Driver, golden_dir};
use engine::sampling::params::SamplingParams;
use engine::{EngineConfig, KvDtype, SampledToken, StopCriteria, WeightDtype, WeightQuant};
use scheduler::RequestId;

const NUM_REQUESTS: u64 = 32;
/// The request that every schedule is tried on, and its prompt's length.
const PROBE: u64 = 3;
const PROBE_LEN: usize = 21;
const MAX_TOKENS: usize = 6;

/// One model in one numeric mode.
struct Case {
    config: EngineConfig,
    /// Steps between those that are tried, for chunk sizes and preemptions.
    stride: usize,
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
        Self { config, stride: 1 }
    }

    /// The same quantized; what differs from other formats is the product alone, so that fewer schedules are tried.
    fn quantized(self, quant: WeightQuant) -> Self {
        Self { config: EngineConfig { quant, ..self.config }, stride: 7 }
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
    for max_num_batched_tokens in [32, 57, 512].into_iter().step_by(case.stride) {
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
    for chunk in (1..=PROBE_LEN).step_by(case.stride) {
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
    for step in (1..num_steps).step_by(case.stride) {
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
    let plain = [WeightDtype::F32, WeightDtype::Bf16].map(|dtype| Case::new(folder, dtype));
    let quantized =
        [WeightQuant::Int8, WeightQuant::Int4].map(|quant| Case::new(folder, WeightDtype::Auto).quantized(quant));
    for case in plain.into_iter().chain(quantized) {
        among_others(&case);
        at_every_chunk_size(&case);
        preempted_at_any_step(&case);
        under_scarcity(&case);
    }
}

test_every_folder!();

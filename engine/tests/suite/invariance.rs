//! The same bytes out, tokens, log-probs and routed experts, whatever else is in the batch, however the prompt is chunked, whenever a sequence is preempted,
//! and whether its prefix was computed for it or came from the cache.

use std::collections::HashMap;

use crate::driver::{Driver, golden_dir, test_device};
use engine::sampling::params::SamplingParams;
use engine::{
    DeviceChoice, EngineConfig, ExpertOptions, KvDtype, NO_EXPERT, RoutingOptions, SampledToken, StopCriteria,
    WeightDtype, WeightQuant,
};
use scheduler::RequestId;

const NUM_REQUESTS: u64 = 32;
/// The request that every schedule is tried on, and its prompt's length.
const PROBE: u64 = 3;
const PROBE_LEN: usize = 21;
const MAX_TOKENS: usize = 6;

/// Steps have their price there, on an emulated one above all.
fn is_on_device() -> bool {
    test_device() != DeviceChoice::Cpu
}

/// One model in one numeric mode.
struct Case {
    config: EngineConfig,
    /// Steps between those that are tried, for chunk sizes and preemptions.
    stride: usize,
    options_of: fn(u64) -> ExpertOptions,
}

/// Unlike options side by side, among them none; requests beyond the numbered ones have the probe's.
fn varied_options(id: u64) -> ExpertOptions {
    let id = if id < NUM_REQUESTS { id } else { PROBE };
    let plain = ExpertOptions { noise_seed: id / 8, ..ExpertOptions::default() };
    match id % 5 {
        0 => plain,
        1 => ExpertOptions { top_p: 0.4, ..plain },
        2 => ExpertOptions { max_experts: Some(1), ..plain },
        3 => ExpertOptions { top_p: 0.6, ..plain },
        _ => ExpertOptions { top_p: 0.8, max_experts: Some(3), ..plain },
    }
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
            snapshot_interval: 8,
            ..EngineConfig::new(golden_dir(folder))
        };
        let stride = if is_on_device() { 7 } else { 1 };
        Self { config, stride, options_of: |_| ExpertOptions::default() }
    }

    /// The same quantized; what differs from other formats is the product alone, so that fewer schedules are tried.
    fn quantized(self, quant: WeightQuant) -> Self {
        Self { config: EngineConfig { quant, ..self.config }, stride: 7, ..self }
    }

    fn driver(&self, max_num_batched_tokens: usize) -> Driver {
        let mut driver = Driver::new(&EngineConfig { max_num_batched_tokens, ..self.config.clone() });
        driver.options_of = self.options_of;
        driver
    }

    /// Requests of unlike options, and noise on every router.
    fn with_options(self) -> Self {
        let routing = RoutingOptions { noise: 0.3, ..RoutingOptions::default() };
        Self { config: EngineConfig { routing, ..self.config }, stride: 3, options_of: varied_options }
    }

    /// The same without the prefix cache, where a preempted sequence is computed from its start again.
    fn uncached(&self) -> Self {
        let config = EngineConfig { enable_prefix_caching: false, ..self.config.clone() };
        Self { config, ..*self }
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

/// Prompts of the cached case are cut where states are kept; those of the other are not.
fn without_a_cache(case: &Case) {
    assert_eq!(case.alone(PROBE), case.uncached().alone(PROBE), "cut for the cache");
}

/// Tokens from one place where a request can start to the next.
fn start_interval(driver: &Driver, case: &Case) -> usize {
    if driver.model.summary.num_state_slots > 0 { case.config.snapshot_interval } else { case.config.block_size }
}

/// Adds the probe's way of sampling for any prompt.
fn add_like_probe(driver: &mut Driver, id: u64, prompt: &[u32]) {
    driver.add(id, prompt, sampling(PROBE), StopCriteria { max_tokens: MAX_TOKENS, ..StopCriteria::default() });
}

/// Whatever part of its prompt another request left in the cache, and at every chunk size of what is left.
fn from_cached_prefixes(case: &Case) {
    let expected = case.alone(PROBE);
    let probe = prompt(PROBE);
    for num_common in (0..=PROBE_LEN).step_by(case.stride) {
        let mut driver = case.driver([512, 3, 1][num_common % 3]);
        let other: Vec<u32> = probe[..num_common].iter().copied().chain([300, 301, 302]).collect();
        add_like_probe(&mut driver, 100, &other);
        driver.run();
        add(&mut driver, PROBE);
        driver.run();
        assert_eq!(driver.jobs[&PROBE].output, expected, "{num_common} tokens in common");
        let interval = start_interval(&driver, case);
        let num_cached =
            if driver.model.summary.has_prefix_cache { num_common.min(PROBE_LEN - 1) / interval * interval } else { 0 };
        let num_hits = driver.model.scheduler.stats().num_prefix_hits;
        assert_eq!(num_hits, num_cached as u64, "{num_common} tokens in common");
    }
}

/// Blocks that another process computed are loaded, all or a part of them, at several chunk sizes of what is left.
fn from_blocks_outside(case: &Case) {
    let expected = case.alone(PROBE);
    let mut first = case.driver(512);
    first.outside = Some(HashMap::new());
    (0..=PROBE).for_each(|id| add(&mut first, id));
    first.run();
    let can_load = first.model.summary.can_load_prefixes;
    let block_size = case.config.block_size;
    for (most_loaded, step) in [(usize::MAX, 512), (usize::MAX, 1), (1, 3), (0, 512)] {
        let mut driver = case.driver(step);
        driver.outside = first.outside.clone();
        driver.most_loaded = most_loaded;
        add(&mut driver, PROBE);
        driver.run();
        assert_eq!(driver.jobs[&PROBE].output, expected, "at most {most_loaded} blocks loaded, {step} rows a step");
        let num_blocks = if can_load { most_loaded.min((PROBE_LEN - 1) / block_size) } else { 0 };
        assert_eq!(driver.model.scheduler.stats().num_loaded, (num_blocks * block_size) as u64);
    }
    let mut driver = case.driver(64);
    driver.outside = first.outside.clone();
    (0..NUM_REQUESTS).for_each(|id| add(&mut driver, id));
    driver.run();
    for id in 0..NUM_REQUESTS {
        assert_eq!(driver.jobs[&id].output, case.alone(id), "request {id} beside others that are loaded");
    }
    assert_eq!(driver.model.scheduler.stats().num_loaded > 0, can_load);
}

/// What was decoded is read as a prompt, and what was cached and given up is computed again.
fn after_its_own_output(case: &Case) {
    let mut driver = case.driver(512);
    add(&mut driver, PROBE);
    driver.run();
    let output: Vec<u32> = driver.jobs[&PROBE].output.iter().map(|sampled| sampled.token).collect();
    let conversation = [prompt(PROBE), output, vec![9, 8, 7]].concat();
    let mut cold = case.driver(512);
    add_like_probe(&mut cold, 100, &conversation);
    cold.run();
    add_like_probe(&mut driver, 100, &conversation);
    driver.run();
    assert_eq!(driver.jobs[&100].output, cold.jobs[&100].output, "a conversation goes on");
    assert_eq!(driver.model.scheduler.stats().num_prefix_hits > 0, driver.model.summary.has_prefix_cache);
    driver.model.scheduler.set_num_blocks(10);
    add_like_probe(&mut driver, 101, &conversation);
    driver.run();
    assert_eq!(driver.jobs[&101].output, cold.jobs[&100].output, "in a smaller pool");
}

/// The same prompt many times at once is computed once.
fn beside_itself(case: &Case) {
    const COPIES: u64 = 5;
    let expected = case.alone(PROBE);
    let mut driver = case.driver(6);
    (0..COPIES).for_each(|copy| add_like_probe(&mut driver, 100 + copy, &prompt(PROBE)));
    driver.run();
    assert!(driver.jobs.values().all(|job| job.output == expected), "{COPIES} at once");
    let interval = start_interval(&driver, case) as u64;
    let shared = (PROBE_LEN - 1) as u64 / interval * interval;
    let num_hits = if driver.model.summary.has_prefix_cache { (COPIES - 1) * shared } else { 0 };
    assert_eq!(driver.model.scheduler.stats().num_prefix_hits, num_hits);
}

/// Four kept states for all: most are given up before they are wanted again.
fn with_few_kept_states(case: &Case) {
    let config = EngineConfig { max_num_seqs: 2, ..case.config.clone() };
    let few = Case { config, ..*case };
    let mut driver = few.driver(32);
    if driver.model.summary.num_state_slots == 0 {
        return;
    }
    assert_eq!(driver.model.scheduler.stats().num_total_snapshot_slots, 4);
    for round in [100, 200] {
        for id in 0..NUM_REQUESTS {
            let stop = StopCriteria { max_tokens: MAX_TOKENS, ..StopCriteria::default() };
            for copy in [0, 1000] {
                driver.add(copy + round + id, &prompt(id), sampling(id), stop.clone());
            }
        }
        driver.run();
    }
    let stats = driver.model.scheduler.stats();
    assert!(stats.num_prefix_hits > 0 && stats.num_prefix_hits < stats.num_prefix_queries / 2, "{stats:?}");
    for (id, job) in &driver.jobs {
        assert_eq!(job.output, case.alone(id % 100), "request {id}");
    }
}

/// Windows and other layers share the memory of a few dozen blocks, so that kept windows go before they are wanted again.
fn with_few_window_blocks(case: &Case) {
    const NUM_BLOCKS: usize = 32;
    let summary = case.driver(16).model.summary;
    if summary.num_window_blocks == 0 {
        return;
    }
    let token_bytes = summary.kv_bytes_per_token + summary.routing_bytes_per_token;
    let block_bytes = token_bytes * case.config.block_size as u64;
    let config = EngineConfig { kv_cache_memory: Some(NUM_BLOCKS as u64 * block_bytes), ..case.config.clone() };
    let few = Case { config, ..*case };
    let mut driver = few.driver(16);
    let stats = driver.model.scheduler.stats();
    assert_eq!((stats.num_total_blocks, stats.num_total_window_blocks), (NUM_BLOCKS, NUM_BLOCKS));
    for round in [100, 200] {
        (0..NUM_REQUESTS).for_each(|id| {
            let stop = StopCriteria { max_tokens: MAX_TOKENS, ..StopCriteria::default() };
            driver.add(round + id, &prompt(id), sampling(id), stop);
        });
        driver.run();
    }
    for (id, job) in &driver.jobs {
        assert_eq!(job.output, case.alone(id % 100), "request {id}");
    }
}

/// The columns of the table that need no room of their own; on a device the first of them.
fn whatever_happens(case: &Case) {
    among_others(case);
    at_every_chunk_size(case);
    preempted_at_any_step(case);
    from_cached_prefixes(case);
    if is_on_device() {
        return;
    }
    preempted_at_any_step(&case.uncached());
    under_scarcity(case);
    after_its_own_output(case);
    from_blocks_outside(case);
    beside_itself(case);
    without_a_cache(case);
}

fn check(folder: &str) {
    let plain = [WeightDtype::F32, WeightDtype::Bf16].map(|dtype| Case::new(folder, dtype));
    let quantized =
        [WeightQuant::Int8, WeightQuant::Int4].map(|quant| Case::new(folder, WeightDtype::Auto).quantized(quant));
    for case in plain.into_iter().chain(quantized) {
        whatever_happens(&case);
        if !is_on_device() {
            with_few_kept_states(&case);
            with_few_window_blocks(&case);
        }
    }
}

/// Families whose routers differ in what their weights are: each request has options of its own, and gives the same bytes alone.
#[test]
fn requests_of_unlike_expert_options_do_not_touch_each_other() {
    for folder in
        ["mixtral-base", "qwen3_moe-base", "deepseek_v3-base", "longcat_flash-base", "gpt_oss-alpha", "jetmoe-base"]
    {
        let case = Case::new(folder, WeightDtype::F32).with_options();
        let experts = |id| case.alone(id).into_iter().flat_map(|sampled| sampled.routed_experts).collect::<Vec<u16>>();
        assert!((0..5).any(|id| experts(id).contains(&NO_EXPERT)), "{folder}: some are left out");
        assert!(!experts(0).contains(&NO_EXPERT), "{folder}: and none without options");
        whatever_happens(&case);
    }
}

test_every_folder!();

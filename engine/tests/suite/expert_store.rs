//! Experts under a budget of memory: the same bytes out as with all of them resident, whatever the budget, the policy and what
//! is read ahead; and what a folder that changes meanwhile does to whom.

use std::path::Path;

use engine::sampling::params::SamplingParams;
use engine::{
    EngineConfig, EngineError, ExpertConfig, ExpertMemory, ExpertPolicy, ExpertWarmup, KvDtype, LoadStage, PackFormat,
    ReadMode, SampledToken, StopCriteria, load_model,
};

use crate::driver::{Driver, golden_dir};
use crate::weight_quant::Packed;

const NUM_REQUESTS: u64 = 5;
const FORMATS: [PackFormat; 4] = [PackFormat::F32, PackFormat::Bf16, PackFormat::Int8, PackFormat::Int4];

/// A fixed sequence of numbers (SplitMix64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }

    fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }
}

fn config(dir: &Path, experts: ExpertConfig) -> EngineConfig {
    EngineConfig {
        experts,
        kv_dtype: KvDtype::F32,
        block_size: 4,
        kv_cache_memory: Some(8 << 20),
        max_model_len: Some(128),
        snapshot_interval: 8,
        ..EngineConfig::new(dir)
    }
}

fn within(bytes: u64) -> ExpertConfig {
    ExpertConfig { memory: Some(ExpertMemory::Bytes(bytes)), ..ExpertConfig::default() }
}

/// The fewest bytes that will do, and those of all experts.
fn limits(dir: &Path) -> (u64, u64) {
    match load_model(&config(dir, within(0)), &mut |_| {}).map(drop) {
        Err(EngineError::ExpertMemory { bytes: 0, least, all }) => (least, all),
        other => panic!("a budget of nothing: {other:?}"),
    }
}

fn add_requests(driver: &mut Driver, seed: u64) {
    for id in 0..NUM_REQUESTS {
        let len = 1 + (id as usize * 7 + seed as usize) % 23;
        let prompt: Vec<u32> = (0..len).map(|i| 3 + ((id as usize * 131 + i * 37) % 360) as u32).collect();
        let temperature = if id % 2 == 0 { 0.0 } else { 0.8 };
        let sampling = SamplingParams { seed: seed + id, logprobs: Some(3), temperature, ..SamplingParams::default() };
        driver.add(id, &prompt, sampling, StopCriteria { max_tokens: 5, ..StopCriteria::default() });
    }
}

fn outputs(config: &EngineConfig, seed: u64) -> Vec<Vec<SampledToken>> {
    let mut driver = Driver::new(config);
    if config.experts.memory.is_some() {
        let dir = config.model_dir.to_string_lossy().into_owned();
        let maps = std::fs::read_to_string("/proc/self/maps").expect("the maps of this process");
        assert!(!maps.contains(&dir), "nothing of a folder that may shrink stays mapped");
    }
    add_requests(&mut driver, seed);
    driver.run();
    driver.jobs.into_values().map(|job| job.output).collect()
}

fn check(folder: &str) {
    let mut numbers = Numbers(folder.bytes().map(u64::from).sum());
    for to in FORMATS {
        let packed = Packed::of(&golden_dir(folder), &format!("store-{folder}"), to);
        let seed = numbers.below(1000);
        let (least, all) = limits(&packed.0);
        assert!(0 < least && least < all, "{folder}: {least} of {all} bytes");
        for budget in [least, least + numbers.below(all - least), least + numbers.below(all - least)] {
            let experts = ExpertConfig {
                policy: numbers.pick(&[ExpertPolicy::Lru, ExpertPolicy::Lfu, ExpertPolicy::Lfru]),
                prefetch: numbers.below(2) == 0,
                warmup: numbers.pick(&[ExpertWarmup::All, ExpertWarmup::None]),
                read_mode: numbers.pick(&[None, Some(ReadMode::Cached)]),
                ..within(budget)
            };
            let what = format!("{folder} {to:?}: {experts:?} of {all} bytes, seed {seed}");
            let rows = numbers.pick(&[3, 16, 512]);
            let config = EngineConfig { max_num_batched_tokens: rows, ..config(&packed.0, experts) };
            let resident = EngineConfig { experts: ExpertConfig::default(), ..config.clone() };
            assert_eq!(outputs(&config, seed), outputs(&resident, seed), "{what}, {rows} rows a step");
        }
    }
}

#[test]
fn a_warm_up_tells_how_far_it_is() {
    let packed = Packed::of(&golden_dir("mixtral-base"), "store-progress", FORMATS[0]);
    let (_, all) = limits(&packed.0);
    // Three layers of eight: room for twelve and a bit.
    let (expert, budget) = (all / 24, all / 2 + 1);
    let mut told = Vec::new();
    let experts = ExpertConfig { warmup: ExpertWarmup::All, ..within(budget) };
    let loaded = load_model(&config(&packed.0, experts), &mut |progress| {
        if progress.stage == LoadStage::Experts {
            assert_eq!(progress.total_bytes, 12 * expert);
            told.push(progress.done_bytes);
        }
    });
    assert!(loaded.is_ok() && !told.is_empty());
    assert!(told.is_sorted_by(|a, b| a < b) && told.iter().all(|bytes| bytes % expert == 0), "{told:?}");
    assert_eq!(told.last(), Some(&(12 * expert)));
}

#[test]
fn mapped_weights_are_read_before_the_first_request() {
    let packed = Packed::of(&golden_dir("mixtral-base"), "store-mapped", FORMATS[0]);
    let read = |warmup| {
        let mut told = Vec::new();
        let experts = ExpertConfig { warmup, ..ExpertConfig::default() };
        let loaded = load_model(&config(&packed.0, experts), &mut |progress| {
            told.extend((progress.stage == LoadStage::Mapped).then_some(progress));
        });
        let summary = loaded.unwrap().summary;
        (told.last().map(|progress| (progress.done_bytes, progress.total_bytes)), summary.expert_bytes)
    };
    let (told, expert_bytes) = read(ExpertWarmup::All);
    let (done, total) = told.unwrap();
    assert!(done == total && total > expert_bytes && expert_bytes > 0, "{done} of {total}, experts {expert_bytes}");
    assert_eq!(read(ExpertWarmup::None).0, None);
}

test_every_folder!();

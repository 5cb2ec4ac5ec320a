//! Drives a loaded model step by step, without the step loop's thread, so that a test can intervene between any two steps.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use engine::sampling::params::SamplingParams;
use engine::{
    BlockCoding, DeviceChoice, EngineConfig, ExpertOptions, LoadedModel, RowRequest, SampledToken, StopCriteria,
    load_model,
};
use scheduler::{Outcome, Request, RequestId, Update, block_names};

/// A folder of `tests/golden`, or of `MOESAIC_TEST_GOLDEN` where the tests do not run where they were built.
pub fn golden_dir(name: &str) -> PathBuf {
    let built = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    std::env::var_os("MOESAIC_TEST_GOLDEN").map_or_else(built, PathBuf::from).join(name)
}

/// Where models of these tests compute: on the CPU, or where `MOESAIC_TEST_DEVICE` says, which must be there.
pub fn test_device() -> DeviceChoice {
    match std::env::var("MOESAIC_TEST_DEVICE") {
        Ok(name) => name.parse().expect("MOESAIC_TEST_DEVICE names a device"),
        Err(_) => DeviceChoice::Cpu,
    }
}

/// One request and what came of it.
pub struct Job {
    pub sampling: SamplingParams,
    pub experts: ExpertOptions,
    pub output: Vec<SampledToken>,
    pub finished: bool,
}

pub struct Driver {
    pub model: LoadedModel,
    pub jobs: BTreeMap<u64, Job>,
    /// Blocks by name, kept as they are filled and loaded from where a prompt is found here.
    pub outside: Option<HashMap<[u8; 32], Bytes>>,
    /// Of what is asked for, so many come at most.
    pub most_loaded: usize,
    /// Of a request.
    pub options_of: fn(u64) -> ExpertOptions,
}

impl Driver {
    pub fn new(config: &EngineConfig) -> Self {
        let config = EngineConfig { device: test_device(), ..config.clone() };
        let model = load_model(&config, &mut |_| {}).expect("a golden model loads");
        Self {
            model,
            jobs: BTreeMap::new(),
            outside: None,
            most_loaded: usize::MAX,
            options_of: |_| ExpertOptions::default(),
        }
    }

    pub fn add(&mut self, id: u64, prompt: &[u32], sampling: SamplingParams, stop: StopCriteria) {
        let (prompt, source_len) = self.model.runner.prefill().sequence(&prompt.into());
        let computes_whole_prompt = sampling.prompt_logprobs.is_some();
        let LoadedModel { fingerprint, summary, .. } = &self.model;
        let experts = (self.options_of)(id);
        let cache_salt = experts.salt([0; 32]);
        let names = block_names(&fingerprint.numerics(), &cache_salt, summary.block_size, &prompt);
        let is_known = |name: &&[u8; 32]| self.outside.as_ref().is_some_and(|outside| outside.contains_key(*name));
        let request = Request {
            num_loadable: names.iter().take_while(is_known).count(),
            id: RequestId(id),
            prompt,
            source_len,
            stop: stop.clone(),
            cache_salt,
            computes_whole_prompt,
        };
        self.model.scheduler.add(request, Duration::ZERO).expect("the request fits");
        self.jobs.insert(id, Job { sampling, experts, output: Vec::new(), finished: false });
    }

    /// Runs one step; false when there was nothing to do.
    pub fn step(&mut self) -> bool {
        let LoadedModel { scheduler, runner, .. } = &mut self.model;
        let batch = scheduler.schedule(Duration::ZERO);
        scheduler.assert_invariants();
        for load in &batch.loads {
            let outside = self.outside.as_ref().expect("nothing is known without it");
            let wanted = scheduler.loading(load.id).to_vec();
            assert_eq!(wanted.len(), load.names.len());
            let found = load.names.iter().map_while(|name| outside.get(name)).take(self.most_loaded);
            let num_filled = wanted
                .iter()
                .zip(found)
                .filter(|(block, bytes)| {
                    runner.write_block(**block, BlockCoding::Exact, bytes).expect("a block that exists")
                })
                .count();
            scheduler.loaded(load.id, num_filled);
        }
        if batch.chunks.is_empty() {
            return !batch.loads.is_empty();
        }
        let jobs = &self.jobs;
        let request_of = |id: RequestId| RowRequest {
            sampling: &jobs[&id.0].sampling,
            forbidden: &[],
            num_prompt_logprobs: 0,
            wants_routed_experts: true,
            wants_expert_use: true,
            experts: jobs[&id.0].experts,
        };
        let outputs = runner.run(scheduler, &batch, request_of).expect("the step runs");
        let sampled: Vec<SampledToken> =
            outputs.into_iter().filter_map(|output| output.sampled).map(|row| row.expect("finite logits")).collect();
        let outcomes: Vec<Outcome> = sampled.iter().map(|sampled| Outcome::Token(sampled.token)).collect();
        let progress = scheduler.complete(&batch, &outcomes);
        if let Some(outside) = &mut self.outside {
            let blocks = scheduler.computed_blocks();
            let read = |block| runner.read_block(block, BlockCoding::Exact).expect("a block that exists");
            outside.extend(blocks.iter().map(|computed| (computed.name, read(computed.block))));
        }
        for (progress, sampled) in progress.into_iter().zip(sampled) {
            let job = self.jobs.get_mut(&progress.id.0).expect("a known job");
            job.output.push(sampled);
            job.finished = matches!(progress.update, Update::Token { finished: Some(_), .. });
        }
        true
    }

    /// Runs until nothing is left to do.
    pub fn run(&mut self) {
        while self.step() {}
        assert!(self.jobs.values().all(|job| job.finished), "every request ends");
        assert_eq!(self.model.scheduler.stats().num_used_blocks, 0, "no block is held when idle");
    }
}

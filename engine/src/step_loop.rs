//! The engine's one thread: takes commands, asks the scheduler what to compute, has it computed, tells the callers.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use scheduler::{Batch, Outcome, Progress, Request, RequestId, Scheduler, SchedulerStats, Sequence, Update};
use tokio::sync::mpsc;

use crate::error::{EngineError, GenerationError};
use crate::experts::{
    CutChoices, ExpertMap, ExpertTraffic, KNOWN_BLOCKS, PRIOR_BLOCKS, RoutingAccuracy, TouchedExperts,
};
use crate::handle::{Event, GenerateRequest, LearnedBlock, PromptLogprob, SampledToken};
use crate::prefix_tier::TierExchange;
use crate::runner::{ChunkOutput, RowRequest, Runner};
use crate::shared::{Command, Shared};

pub(crate) struct StepLoop {
    scheduler: Scheduler,
    runner: Runner,
    entries: HashMap<RequestId, Entry>,
    shared: Arc<Shared>,
    next_id: u64,
    started: Instant,
    routing_accuracy: RoutingAccuracy,
    prior_accuracy: RoutingAccuracy,
    tier: Option<TierExchange>,
}

/// What the loop keeps of an open request beside the scheduler's sequence.
struct Entry {
    events: mpsc::Sender<Event>,
    request: GenerateRequest,
    prompt_logprobs: Vec<PromptLogprob>,
    num_prompt_counted: usize,
    submitted: Instant,
    is_scheduled: bool,
    /// Of its tokens so far, where it wants to know what they cost.
    touched: TouchedExperts,
    /// Not told yet.
    cut: CutChoices,
    /// Not told yet; `None` where there is nothing to tell.
    traffic: Option<ExpertTraffic>,
}

impl StepLoop {
    pub(crate) fn new(scheduler: Scheduler, runner: Runner, shared: Arc<Shared>) -> Self {
        let now = Instant::now();
        let entries = HashMap::new();
        Self {
            scheduler,
            runner,
            entries,
            shared,
            next_id: 0,
            started: now,
            routing_accuracy: RoutingAccuracy::new(KNOWN_BLOCKS),
            prior_accuracy: RoutingAccuracy::new(PRIOR_BLOCKS),
            tier: None,
        }
    }

    /// Runs until the handle is shut down or dropped, or the device fails. Every open request has its last event when
    /// this returns.
    pub(crate) fn run(mut self, commands: &Receiver<Command>) {
        let end = catch_unwind(AssertUnwindSafe(|| self.serve(commands)));
        let error = match end {
            Ok(Ok(())) => GenerationError::ShuttingDown,
            Ok(Err(error)) => {
                tracing::error!(%error, "the engine stops after a device error");
                GenerationError::Device(error.to_string())
            }
            Err(_) => GenerationError::Device("a broken invariant stopped the engine".into()),
        };
        // First closed to new requests, then emptied: nothing can slip in between and wait for ever.
        self.shared.close(&error);
        for command in commands.try_iter() {
            if let Command::Submit(submission) = command {
                let _ = submission.events.try_send(Event::Failed(error.clone()));
            }
        }
        for (_, entry) in self.entries.drain() {
            entry.send(Event::Failed(error.clone()));
        }
        // The sequences ended with their requests, and their blocks go with the loop.
        let idle = SchedulerStats {
            num_running: 0,
            num_waiting: 0,
            num_used_blocks: 0,
            num_cached_blocks: 0,
            num_used_window_blocks: 0,
            num_cached_window_blocks: 0,
            num_used_state_slots: 0,
            num_snapshots: 0,
            ..self.scheduler.stats()
        };
        self.shared.publish(&idle);
        self.shared.announce_end();
    }

    fn serve(&mut self, commands: &Receiver<Command>) -> Result<(), EngineError> {
        while self.take_commands(commands) {
            self.drop_abandoned();
            let scheduling = Instant::now();
            if let Some(tier) = &mut self.tier {
                tier.finish_loads(&mut self.scheduler, &mut self.runner);
            }
            let batch = self.scheduler.schedule(self.started.elapsed());
            if let Some(tier) = &mut self.tier {
                tier.begin_loads(&batch);
            }
            if batch.chunks.is_empty() {
                self.shared.publish(&self.scheduler.stats());
                if !self.wait(commands, batch.wake_at) {
                    return Ok(());
                }
                continue;
            }
            metrics::histogram!("moesaic_step_seconds", "phase" => "schedule").record(scheduling.elapsed());
            self.step(&batch)?;
        }
        Ok(())
    }

    /// Everything that arrived, without waiting; false if the loop is to end. That flag is read last: the word that wakes
    /// a loop to look at it may be among the commands, and does not come twice.
    fn take_commands(&mut self, commands: &Receiver<Command>) -> bool {
        for command in commands.try_iter() {
            self.accept(command);
        }
        !self.shared.is_shutting_down()
    }

    /// Sleeps until a command comes or the batch window closes; false if no command can come any more.
    fn wait(&mut self, commands: &Receiver<Command>, wake_at: Option<Duration>) -> bool {
        self.shared.set_idle(true);
        let command = match wake_at {
            None => commands.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(at) => commands.recv_timeout(at.saturating_sub(self.started.elapsed())),
        };
        self.shared.set_idle(false);
        match command {
            Ok(command) => self.accept(command),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return false,
        }
        true
    }

    fn accept(&mut self, command: Command) {
        let submission = match command {
            Command::Submit(submission) => *submission,
            Command::Attach(tier) => {
                self.tier = Some(tier).filter(|_| self.scheduler.can_load());
                return;
            }
            Command::Wake => return,
        };
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let (prompt, source_len) = self.runner.prefill().sequence(&submission.request.prompt);
        let request = Request {
            id,
            prompt,
            source_len,
            stop: submission.request.stop.clone(),
            cache_salt: submission.request.block_salt(),
            num_loadable: self
                .tier
                .as_ref()
                .map_or(0, |tier| tier.num_loadable(submission.request.prefix, self.shared.model.block_size)),
            computes_whole_prompt: submission.request.sampling.prompt_logprobs.is_some(),
        };
        let entry = Entry {
            events: submission.events,
            request: submission.request,
            prompt_logprobs: Vec::new(),
            num_prompt_counted: 0,
            submitted: submission.submitted,
            is_scheduled: false,
            touched: TouchedExperts::default(),
            cut: CutChoices::default(),
            traffic: None,
        };
        // First, so that it hears of the end even if the scheduler's invariants are what breaks.
        self.entries.insert(id, entry);
        self.scheduler.add(request, self.started.elapsed()).expect("the handle checked what the scheduler checks");
    }

    /// Frees what nobody listens to any more.
    fn drop_abandoned(&mut self) {
        let scheduler = &mut self.scheduler;
        let shared = &self.shared;
        self.entries.retain(|id, entry| {
            let wanted = !entry.events.is_closed();
            if !wanted {
                assert!(scheduler.abort(*id), "an open request is known to the scheduler");
                if !entry.is_scheduled {
                    shared.leave_queue();
                }
            }
            wanted
        });
    }

    fn step(&mut self, batch: &Batch) -> Result<(), EngineError> {
        let computing = Instant::now();
        for chunk in &batch.chunks {
            let entry = self.entries.get_mut(&chunk.id).expect("a scheduled sequence is open");
            if !std::mem::replace(&mut entry.is_scheduled, true) {
                let num_cached_tokens = self.scheduler.sequence(chunk.id).map_or(0, Sequence::num_cached_tokens);
                entry.send(Event::Scheduled { queue: computing - entry.submitted, num_cached_tokens });
                self.shared.leave_queue();
            }
        }
        self.announce_experts(batch);
        let entries = &self.entries;
        let scheduler = &self.scheduler;
        let request_of = |id| entries[&id].row_request(scheduler, id);
        let mut outputs = self.runner.run(scheduler, batch, request_of)?;
        let outcomes: Vec<Outcome> = outputs.iter().filter_map(ChunkOutput::outcome).collect();
        let faulty = self.give_up_faulty(batch, &mut outputs);
        let progress = self.scheduler.complete(batch, &outcomes);
        self.tell_computed_blocks();
        if let Some(tier) = &mut self.tier {
            tier.note_step(batch, computing.elapsed(), self.shared.model.block_size);
        }
        // Counters first: whoever has seen a request's last event finds it counted and its blocks free.
        self.count(batch, &progress);
        self.shared.publish(&self.scheduler.stats());
        for (entry, fault) in faulty {
            entry.send(Event::Failed(fault));
        }
        self.deliver_prompt_logprobs(batch, &mut outputs);
        for (chunk, output) in batch.chunks.iter().zip(&outputs) {
            // A faulty one is gone.
            let Some(entry) = self.entries.get_mut(&chunk.id) else { continue };
            entry.cut.add(output.cut);
            if let Some(traffic) = output.traffic {
                entry.traffic.get_or_insert_default().add(traffic);
            }
        }
        let sampled = outputs.into_iter().filter_map(|output| output.sampled);
        for (progress, sampled) in progress.iter().zip(sampled) {
            self.deliver(progress, sampled);
        }
        // Nobody waits for this; the blocks stay as they are until the next step.
        if let Some(tier) = &mut self.tier {
            tier.store(self.scheduler.computed_blocks(), &self.runner);
        }
        metrics::histogram!("vllm:iteration_tokens_total").record(batch.num_rows() as f64);
        metrics::histogram!("moesaic_step_seconds", "phase" => "compute").record(computing.elapsed());
        Ok(())
    }

    /// Tells the expert store what the blocks of this step's prompts are known to take.
    fn announce_experts(&mut self, batch: &Batch) {
        if !self.runner.has_expert_store() {
            return;
        }
        let block_size = self.shared.model.block_size;
        let mut used = ExpertMap::new(self.runner.routed_layout());
        for chunk in &batch.chunks {
            let request = &self.entries.get(&chunk.id).expect("a scheduled sequence is open").request;
            let Some(expected) = &request.expected_experts else { continue };
            let end = (chunk.start + chunk.len).min(request.prompt.len());
            for block_idx in chunk.start / block_size..end.div_ceil(block_size) {
                match expected.of_block(block_idx) {
                    Some(known) => used.add(known),
                    None => expected.prior_of(block_idx).iter().for_each(|prior| used.add(prior)),
                }
            }
        }
        self.runner.expect_experts(used.ids());
    }

    /// Ends the sequences that a missing expert spoiled before the step is completed, so that none of their blocks gets a
    /// name: others may still compute what is in them.
    fn give_up_faulty(&mut self, batch: &Batch, outputs: &mut [ChunkOutput]) -> Vec<(Entry, GenerationError)> {
        let mut faulty = Vec::new();
        for (chunk, output) in batch.chunks.iter().zip(outputs) {
            let Some(fault) = output.fault.take() else { continue };
            assert!(self.scheduler.abort(chunk.id), "a scheduled sequence is known");
            // The scheduler tells nothing of it any more.
            output.sampled = None;
            let entry = self.entries.remove(&chunk.id).expect("a scheduled sequence is open");
            faulty.push((entry, GenerationError::ExpertUnavailable((*fault).clone())));
        }
        faulty
    }

    fn count(&mut self, batch: &Batch, progress: &[Progress]) {
        let mut num_prompt = 0;
        for chunk in &batch.chunks {
            let Some(entry) = self.entries.get_mut(&chunk.id) else { continue };
            // Rows computed again after a preemption count once, cached ones too.
            let reached = (chunk.start + chunk.len).min(entry.request.prompt.len()).max(entry.num_prompt_counted);
            num_prompt += reached - entry.num_prompt_counted;
            entry.num_prompt_counted = reached;
        }
        let failed = progress.iter().filter(|progress| progress.update == Update::Failed).count();
        self.shared.count_step(num_prompt, progress.len() - failed, failed);
    }

    /// What the blocks took that the step has filled: measured where something else was expected, and told to whoever remembers it.
    fn tell_computed_blocks(&mut self) {
        let layout = self.runner.routed_layout();
        for computed in self.scheduler.computed_blocks().iter().filter(|_| !layout.is_empty()) {
            let request = &self.entries.get(&computed.id).expect("its sequence was open in this step").request;
            let expected = request.expected_experts.as_ref();
            let learner = self.shared.learner();
            if expected.is_none() && learner.is_none() {
                continue;
            }
            let experts = self.runner.experts_of_block(computed.block);
            if let Some(expected) = expected {
                match expected.of_block(computed.idx) {
                    Some(known) => self.routing_accuracy.compare(layout, known, &experts),
                    None => {
                        let prior = expected.prior_of(computed.idx);
                        prior.iter().for_each(|prior| self.prior_accuracy.compare(layout, prior, &experts));
                    }
                }
            }
            let block = LearnedBlock { name: computed.name, experts };
            if learner.is_some_and(|learner| learner.try_send(block).is_err()) {
                metrics::counter!("moesaic_routing_unlearned_blocks_total").increment(1);
            }
        }
    }

    fn deliver_prompt_logprobs(&mut self, batch: &Batch, outputs: &mut [ChunkOutput]) {
        for (chunk, output) in batch.chunks.iter().zip(outputs) {
            if output.prompt_logprobs.is_empty() {
                continue;
            }
            let entry = self.entries.get_mut(&chunk.id).expect("a scheduled sequence is open");
            entry.prompt_logprobs.append(&mut output.prompt_logprobs);
            if entry.prompt_logprobs.len() + 1 == entry.request.prompt.len() {
                let logprobs = entry.prompt_logprobs.clone();
                entry.send(Event::PromptLogprobs(logprobs));
            }
        }
    }

    fn deliver(&mut self, progress: &Progress, sampled: Option<SampledToken>) {
        let entry = self.entries.get_mut(&progress.id).expect("its sequence was open in this step");
        let ended = match progress.update {
            Update::Failed => {
                entry.send(Event::Failed(GenerationError::CorruptedLogits));
                true
            }
            Update::Token { is_stop, finished, .. } => {
                let mut sampled = sampled.expect("a token outcome has a sampled token");
                if let Some(expert_use) = &mut sampled.expert_use {
                    expert_use.cut = std::mem::take(&mut entry.cut);
                    expert_use.traffic = entry.traffic.as_mut().map(std::mem::take);
                    expert_use.touched.retain(|&expert| entry.touched.insert(expert));
                }
                entry.send(Event::Token(SampledToken { is_stop, ..sampled }));
                if let Some(reason) = finished {
                    entry.send(Event::Finished(reason));
                }
                finished.is_some()
            }
        };
        if ended {
            self.entries.remove(&progress.id);
        }
    }
}

impl ChunkOutput {
    fn outcome(&self) -> Option<Outcome> {
        self.sampled.as_ref().map(|sampled| match sampled {
            Some(sampled) => Outcome::Token(sampled.token),
            None => Outcome::Failed,
        })
    }
}

impl Entry {
    fn row_request(&self, scheduler: &Scheduler, id: RequestId) -> RowRequest<'_> {
        let sequence = scheduler.sequence(id).expect("a scheduled sequence is known");
        let stop = &self.request.stop;
        let too_early = sequence.num_generated() < stop.min_tokens;
        RowRequest {
            sampling: &self.request.sampling,
            forbidden: if too_early { &stop.stop_token_ids } else { &[] },
            num_prompt_logprobs: self.prompt_logprobs.len(),
            wants_routed_experts: self.request.wants_routed_experts,
            wants_expert_use: self.request.wants_expert_use,
            experts: self.request.experts,
        }
    }

    /// The channel has room for every event of the request; a receiver that is gone is noticed before the next step.
    fn send(&self, event: Event) {
        let _ = self.events.try_send(event);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::mpsc::sync_channel;

    use candle_core::{Device, Tensor};
    use kernels::KvFormat;

    use super::*;
    use crate::config::EngineConfig;
    use crate::error::SubmitError;
    use crate::experts::{RoutedLayout, RoutedRows, RoutingOptions};
    use crate::handle::StopCriteria;
    use crate::load::{LoadedModel, load_model};
    use crate::memory::{ArenaSize, KvArena};
    use crate::models::{ForwardContext, Model, ModelShape, Prefill};
    use crate::runner::TokenPlaces;
    use crate::sampling::params::SamplingParams;
    use crate::shared::Front;

    fn golden() -> LoadedModel {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/mixtral-base");
        let config = EngineConfig { kv_cache_memory: Some(1 << 20), ..EngineConfig::new(dir) };
        load_model(&config, &mut |_| {}).unwrap()
    }

    /// Fails in its first step, in its own way.
    struct Broken {
        shape: ModelShape,
        fail: fn() -> EngineError,
    }

    impl Model for Broken {
        fn shape(&self) -> &ModelShape {
            &self.shape
        }

        fn hidden(&self, _: &mut ForwardContext) -> Result<Tensor, EngineError> {
            Err((self.fail)())
        }

        fn logits(&self, hidden: &Tensor) -> Result<Tensor, EngineError> {
            Ok(hidden.clone())
        }
    }

    fn request() -> GenerateRequest {
        let stop = StopCriteria { max_tokens: 2, ..StopCriteria::default() };
        GenerateRequest {
            prompt: [1, 2].into(),
            sampling: SamplingParams::default(),
            stop,
            cache_salt: [0; 32],
            prefix: crate::PrefixHint::default(),
            experts: crate::ExpertOptions::default(),
            wants_routed_experts: false,
            wants_expert_use: false,
            expected_experts: None,
        }
    }

    #[test]
    fn a_failing_step_ends_every_request_once_and_closes_the_door() {
        let device = || EngineError::MissingTensor { name: "planted".into() };
        for (fail, reason) in [
            (device as fn() -> EngineError, "tensor `planted` is missing from the checkpoint"),
            (|| panic!("planted"), "a broken invariant stopped the engine"),
        ] {
            let LoadedModel { summary, fingerprint, scheduler, .. } = golden();
            let (num_layers, cache_sites, moe_layers) = (0, Vec::new(), Vec::new());
            let prefill = Prefill::Causal;
            let shape = ModelShape {
                vocab_size: 4,
                num_layers,
                num_mtp_layers: 0,
                cache_sites,
                moe_layers,
                expert_costs: Vec::new(),
                num_mtp_moe_layers: 0,
                prefill,
            };
            let size =
                ArenaSize { format: KvFormat::F32, block_size: 16, num_blocks: 1, window: None, num_state_slots: 0 };
            let arena = KvArena::new(&[], size, &Device::Cpu).unwrap();
            let routed = RoutedRows::new(RoutedLayout::of(&shape), 1, 16);
            let places = TokenPlaces { routed, block_size: 16 };
            let runner = Runner::new(Box::new(Broken { shape, fail }), arena, places, RoutingOptions::default());
            let shared = Arc::new(Shared::new((summary, fingerprint), &runner, 4));
            let (commands, receiver) = sync_channel(5);
            let front = Front::new(shared.clone(), commands, std::thread::spawn(|| ()));
            let generations: Vec<_> = (0..3).map(|_| front.submit(request()).unwrap()).collect();
            StepLoop::new(scheduler, runner, shared.clone()).run(&receiver);
            for mut generation in generations {
                assert!(matches!(generation.next_blocking(), Some(Event::Scheduled { .. })));
                let failed = Event::Failed(GenerationError::Device(reason.into()));
                assert_eq!(generation.next_blocking(), Some(failed));
                assert_eq!(generation.next_blocking(), None);
            }
            assert_eq!(front.submit(request()).map(drop), Err(SubmitError::Dead));
            assert!(!front.is_healthy());
            tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(shared.died());
        }
    }

    /// A shutdown that falls between two looks at the flag must not leave the loop waiting for a word it already took.
    #[test]
    fn the_word_of_a_shutdown_is_not_lost_when_taken_with_other_commands() {
        let LoadedModel { summary, fingerprint, scheduler, runner } = golden();
        let shared = Arc::new(Shared::new((summary, fingerprint), &runner, 4));
        let (commands, receiver) = sync_channel(5);
        let front = Front::new(shared.clone(), commands, std::thread::spawn(|| ()));
        let mut step_loop = StepLoop::new(scheduler, runner, shared);
        assert!(step_loop.take_commands(&receiver));
        front.shutdown();
        assert!(!step_loop.take_commands(&receiver));
        assert!(receiver.try_recv().is_err(), "the word was taken");
    }
}

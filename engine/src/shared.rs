//! What the handle and the step loop share: the door, the flags and the counters.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use scheduler::SchedulerStats;
use tokio::sync::{mpsc, watch};

use crate::error::{GenerationError, SubmitError};
use crate::experts::ExpertLoads;
use crate::fingerprint::Fingerprint;
use crate::handle::{EngineStats, Event, GenerateRequest, Generation, LearnedBlock, ModelSummary};
use crate::prefix_tier::{PrefixTier, TierExchange};
use crate::pulse::Pulse;
use crate::runner::Runner;

/// A loop that has work and in this time neither finishes a step nor gets an expert that it waits for is reported unhealthy.
const STALL_LIMIT: Duration = Duration::from_secs(60);

pub(crate) enum Command {
    Submit(Box<Submission>),
    /// From now on blocks leave and come back.
    Attach(TierExchange),
    /// Nothing but a reason to look at the flags, and at what came.
    Wake,
}

/// An accepted request on its way to the loop.
pub(crate) struct Submission {
    pub(crate) request: GenerateRequest,
    pub(crate) events: mpsc::Sender<Event>,
    pub(crate) submitted: Instant,
}

/// The loop's side: flags and counters.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) model: ModelSummary,
    pub(crate) fingerprint: Fingerprint,
    pub(crate) expert_loads: Arc<ExpertLoads>,
    max_queue: usize,
    num_queued: AtomicUsize,
    door: Mutex<Door>,
    shutting_down: AtomicBool,
    dead: watch::Sender<bool>,
    idle: AtomicBool,
    /// Of the step loop.
    pulse: Arc<Pulse>,
    stats: Mutex<EngineStats>,
    /// Who wants to know the routing of blocks.
    learner: OnceLock<mpsc::Sender<LearnedBlock>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Door {
    Open,
    /// No new requests; open ones go on.
    Closing,
    Dead,
}

impl Shared {
    pub(crate) fn new((model, fingerprint): (ModelSummary, Fingerprint), runner: &Runner, max_queue: usize) -> Self {
        Self {
            model,
            fingerprint,
            expert_loads: Arc::clone(runner.expert_loads()),
            max_queue,
            num_queued: AtomicUsize::new(0),
            door: Mutex::new(Door::Open),
            shutting_down: AtomicBool::new(false),
            dead: watch::Sender::new(false),
            idle: AtomicBool::new(true),
            pulse: Arc::clone(runner.pulse()),
            stats: Mutex::new(EngineStats::default()),
            learner: OnceLock::new(),
        }
    }

    /// A request was scheduled for the first time, or left before that.
    pub(crate) fn leave_queue(&self) {
        self.num_queued.fetch_sub(1, Ordering::Relaxed);
    }

    pub(crate) fn is_shutting_down(&self) -> bool {
        self.shutting_down.load(Ordering::Relaxed)
    }

    pub(crate) fn set_idle(&self, idle: bool) {
        self.pulse.beat();
        self.idle.store(idle, Ordering::Relaxed);
    }

    /// False where somebody does already.
    pub(crate) fn learn_from_now(&self, learner: mpsc::Sender<LearnedBlock>) -> bool {
        self.learner.set(learner).is_ok()
    }

    pub(crate) fn learner(&self) -> Option<&mpsc::Sender<LearnedBlock>> {
        self.learner.get()
    }

    /// No request gets in after this.
    pub(crate) fn close(&self, error: &GenerationError) {
        let state = if *error == GenerationError::ShuttingDown { Door::Closing } else { Door::Dead };
        *self.lock_door() = state;
    }

    /// Every open request has its last event.
    pub(crate) fn announce_end(&self) {
        let dead = *self.lock_door() == Door::Dead;
        self.dead.send_replace(dead);
    }

    pub(crate) async fn died(&self) {
        let waited = self.dead.subscribe().wait_for(|dead| *dead).await.map(drop);
        waited.expect("the sender lives as long as `self`");
    }

    pub(crate) fn count_step(&self, num_prompt: usize, num_generated: usize, num_corrupted: usize) {
        let mut stats = self.lock_stats();
        stats.num_prompt_tokens += num_prompt as u64;
        stats.num_generation_tokens += num_generated as u64;
        stats.num_corrupted += num_corrupted as u64;
        stats.num_steps += 1;
    }

    pub(crate) fn publish(&self, scheduler: &SchedulerStats) {
        self.pulse.beat();
        let mut stats = self.lock_stats();
        stats.num_running = scheduler.num_running;
        stats.num_waiting = scheduler.num_waiting;
        stats.num_used_blocks = scheduler.num_used_blocks;
        stats.num_cached_blocks = scheduler.num_cached_blocks;
        stats.num_total_blocks = scheduler.num_total_blocks;
        stats.num_used_window_blocks = scheduler.num_used_window_blocks;
        stats.num_cached_window_blocks = scheduler.num_cached_window_blocks;
        stats.num_total_window_blocks = scheduler.num_total_window_blocks;
        stats.num_used_state_slots = scheduler.num_used_state_slots;
        stats.num_total_state_slots = scheduler.num_total_state_slots;
        stats.num_snapshots = scheduler.num_snapshots;
        stats.num_total_snapshot_slots = scheduler.num_total_snapshot_slots;
        stats.num_preemptions = scheduler.num_preemptions;
        stats.num_prefix_queries = scheduler.num_prefix_queries;
        stats.num_prefix_hits = scheduler.num_prefix_hits;
        stats.num_loaded = scheduler.num_loaded;
    }

    fn lock_door(&self) -> std::sync::MutexGuard<'_, Door> {
        self.door.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_stats(&self) -> std::sync::MutexGuard<'_, EngineStats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn stats(&self) -> EngineStats {
        *self.lock_stats()
    }

    fn check(&self, request: &GenerateRequest) -> Result<(), SubmitError> {
        let model = &self.model;
        // The last row of a prompt always samples: 0 is taken as 1, as by the scheduler.
        let (prompt_len, max_tokens) = (request.prompt.len(), request.stop.max_tokens.max(1));
        if prompt_len == 0 {
            return Err(SubmitError::EmptyPrompt);
        }
        if prompt_len.saturating_add(max_tokens) > model.max_model_len {
            return Err(SubmitError::TooLong { prompt_len, max_tokens, limit: model.max_model_len });
        }
        if model.has_encoder && request.sampling.prompt_logprobs.is_some() {
            return Err(SubmitError::NoPromptLogprobs);
        }
        if (request.wants_routed_experts || request.wants_expert_use) && model.routed.is_empty() {
            let reason = match model.has_encoder {
                true => "an encoder reads the prompt of this model",
                false => "no router of this model chooses among at most 65535 experts",
            };
            return Err(match request.wants_routed_experts {
                true => SubmitError::NoRoutedExperts { reason },
                false => SubmitError::NoExpertUse { reason },
            });
        }
        let needed = (prompt_len + max_tokens).div_ceil(model.block_size);
        if needed > model.num_blocks {
            return Err(SubmitError::NeverFits { needed, total: model.num_blocks });
        }
        match request.prompt.iter().find(|&&token| token as usize >= model.vocab_size) {
            Some(&token) => Err(SubmitError::TokenOutOfRange { token, vocab_size: model.vocab_size }),
            None => Ok(()),
        }
    }
}

/// The caller's side: owns the way in and the thread.
#[derive(Debug)]
pub(crate) struct Front {
    pub(crate) shared: Arc<Shared>,
    commands: SyncSender<Command>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Front {
    pub(crate) fn new(shared: Arc<Shared>, commands: SyncSender<Command>, thread: JoinHandle<()>) -> Self {
        Self { shared, commands, thread: Mutex::new(Some(thread)) }
    }

    pub(crate) fn submit(&self, request: GenerateRequest) -> Result<Generation, SubmitError> {
        let shared = &self.shared;
        shared.check(&request)?;
        // Held until the command is in the channel, so that a closing loop finds it there.
        let door = shared.lock_door();
        match *door {
            Door::Open => {}
            Door::Closing => return Err(SubmitError::ShuttingDown),
            Door::Dead => return Err(SubmitError::Dead),
        }
        let limit = shared.max_queue;
        let enter = |queued: usize| (queued < limit).then_some(queued + 1);
        if shared.num_queued.fetch_update(Ordering::Relaxed, Ordering::Relaxed, enter).is_err() {
            return Err(SubmitError::QueueFull { limit });
        }
        // The start, prompt log-probs, the tokens and the end: the loop never waits for a slow reader.
        let (sender, events) = mpsc::channel(request.stop.max_tokens.max(1) + 3);
        let submission = Submission { request, events: sender, submitted: Instant::now() };
        if self.commands.try_send(Command::Submit(Box::new(submission))).is_err() {
            shared.leave_queue();
            return Err(SubmitError::QueueFull { limit });
        }
        Ok(Generation { events })
    }

    /// Waits for a place in the channel.
    pub(crate) fn attach(&self, tier: Box<dyn PrefixTier>) {
        // A loop that is gone needs none.
        let _ = self.commands.send(Command::Attach(TierExchange::new(tier, self.commands.clone())));
    }

    pub(crate) fn is_healthy(&self) -> bool {
        let shared = &self.shared;
        let moving = shared.idle.load(Ordering::Relaxed) || shared.pulse.silence() < STALL_LIMIT;
        moving && *shared.lock_door() != Door::Dead
    }

    pub(crate) fn stop_accepting(&self) {
        let mut door = self.shared.lock_door();
        if *door == Door::Open {
            *door = Door::Closing;
        }
    }

    pub(crate) fn shutdown(&self) {
        self.stop_accepting();
        self.shared.shutting_down.store(true, Ordering::Relaxed);
        // A full channel wakes the loop just as well.
        let _ = self.commands.try_send(Command::Wake);
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // The loop catches its panics, so joining cannot fail.
            let _ = thread.join();
        }
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.shutdown();
    }
}

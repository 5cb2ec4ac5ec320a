//! One step: schedule a batch, then complete it.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use crate::batch::{Batch, BlockLoad, FinishReason, Outcome, Phase, Progress, StateCopy, Update};
use crate::budget::TokenBudget;
use crate::computed::ComputedBlock;
use crate::config::SchedulerConfig;
use crate::error::{AdmissionError, ConfigError};
use crate::kv::{BlockManager, BlockPool, Snapshots, StateSlots, WindowBlocks};
use crate::prefix::{InFlight, release};
use crate::queue::{Arrival, Queue};
use crate::request::{Request, RequestId};
use crate::sequence::{Sequence, max_positions};
use crate::stats::SchedulerStats;

/// Decides which tokens of which requests each step computes, and in which blocks.
///
/// [`Self::schedule`] and [`Self::complete`] take turns; [`Self::add`], [`Self::abort`], [`Self::preempt`] and
/// [`Self::set_num_blocks`] may come at any time, also while a batch is in flight.
#[derive(Debug)]
pub struct Scheduler {
    pub(crate) config: SchedulerConfig,
    /// All accepted requests that have not ended.
    pub(crate) sequences: HashMap<RequestId, Sequence>,
    pub(crate) waiting: Queue,
    /// Those that hold blocks, oldest first.
    pub(crate) running: BTreeMap<Arrival, RequestId>,
    pub(crate) blocks: BlockManager,
    pub(crate) state_slots: StateSlots,
    pub(crate) in_flight: InFlight,
    /// Of the batch being made.
    pub(crate) restores: Vec<StateCopy>,
    /// By the batch completed last.
    pub(crate) computed: Vec<ComputedBlock>,
    /// Of the batch being made.
    pub(crate) loads: Vec<BlockLoad>,
    /// The step before was one of encoder passes, so that decodes have the turn.
    has_encoded: bool,
    next_arrival: Arrival,
    pub(crate) num_preemptions: u64,
    pub(crate) num_prefix_queries: u64,
    pub(crate) num_prefix_hits: u64,
    pub(crate) num_loaded: u64,
}

impl Scheduler {
    /// An idle scheduler.
    ///
    /// # Errors
    /// Whatever [`SchedulerConfig::validate`] finds.
    pub fn new(config: SchedulerConfig) -> Result<Self, ConfigError> {
        config.validate()?;
        let num_snapshot_slots = if config.num_state_slots > 0 { config.num_snapshot_slots } else { 0 };
        let snapshots = Snapshots::new(config.num_state_slots, num_snapshot_slots);
        let windows = config.window.map(|window| WindowBlocks::new(window, config.block_size));
        let blocks = BlockManager::new(config.block_size, config.num_blocks);
        Ok(Self {
            blocks: blocks.with_snapshots(snapshots).with_windows(windows),
            state_slots: StateSlots::new(config.num_state_slots),
            in_flight: InFlight::default(),
            restores: Vec::new(),
            computed: Vec::new(),
            loads: Vec::new(),
            has_encoded: false,
            config,
            sequences: HashMap::new(),
            waiting: Queue::default(),
            running: BTreeMap::new(),
            next_arrival: Arrival::FIRST,
            num_preemptions: 0,
            num_prefix_queries: 0,
            num_prefix_hits: 0,
            num_loaded: 0,
        })
    }

    /// Queues a request that arrived at `now`.
    ///
    /// # Errors
    /// The prompt is empty or all source, the request can never fit, or the queue is full.
    ///
    /// # Panics
    /// If a request of the same id has not ended.
    pub fn add(&mut self, request: Request, now: Duration) -> Result<(), AdmissionError> {
        let num_blocks = self.check(&request)?;
        let (id, arrival) = (request.id, self.next_arrival);
        self.next_arrival = arrival.next();
        let prefix = self.new_prefix(&request);
        let previous = self.sequences.insert(id, Sequence::new(request, prefix, arrival, now));
        assert!(previous.is_none(), "{id:?} was added twice");
        self.blocks.promise(num_blocks);
        self.waiting.push_fresh(arrival, id);
        Ok(())
    }

    /// Ends a request in any state and lets go of its blocks at once; its part of the batch in flight is void. False where
    /// `id` is unknown or has ended.
    pub fn abort(&mut self, id: RequestId) -> bool {
        self.sequences.contains_key(&id) && {
            self.remove(id);
            true
        }
    }

    /// Makes the batch of the next step. It has no chunks only if nothing is to be done, not before `wake_at`, or not before
    /// something is [`Self::loaded`].
    ///
    /// # Panics
    /// If the batch before has chunks and was not completed.
    pub fn schedule(&mut self, now: Duration) -> Batch {
        if let Some(wake_at) = self.open_window(now) {
            return Batch { wake_at: Some(wake_at), ..Batch::default() };
        }
        let is_completed = self.running.values().all(|&id| self.seq(id).num_scheduled() == 0);
        assert!(is_completed, "the batch before was not completed");
        let mut budget = TokenBudget::new(self.config.max_num_batched_tokens);
        let mut preempted = Vec::new();
        // Sources go first, so that all can decode together; but no decode waits for more than one step of them.
        let may_encode = !self.has_encoded || self.running.is_empty();
        self.has_encoded = may_encode && self.schedule_encoders(&mut budget);
        if !self.has_encoded {
            preempted = self.schedule_decodes(&mut budget);
            self.continue_prefills(&mut budget);
            // Where blocks ran out, what was freed is for those that run.
            if preempted.is_empty() {
                self.admit(&mut budget);
            }
        }
        let mut chunks: Vec<_> = self.running.values().filter_map(|&id| self.seq(id).chunk()).collect();
        let may_rest = self.sequences.is_empty() || self.running.values().any(|&id| self.seq(id).num_loading > 0);
        assert!(!chunks.is_empty() || may_rest, "there is work but no row for it");
        chunks.sort_by_key(|chunk| chunk.phase == Phase::Prefill);
        let restores = std::mem::take(&mut self.restores);
        let snapshots = self.reserve_snapshots(&chunks);
        let loads = std::mem::take(&mut self.loads);
        Batch { chunks, wake_at: None, preempted, restores, snapshots, loads }
    }

    /// Takes the results of the batch made last: one outcome per chunk that samples, in order. Chunks of sequences that
    /// were aborted or preempted meanwhile are skipped, their outcomes with them.
    ///
    /// # Panics
    /// If there are more or fewer outcomes than chunks that sample.
    pub fn complete(&mut self, batch: &Batch, outcomes: &[Outcome]) -> Vec<Progress> {
        assert_eq!(outcomes.len(), batch.num_samples(), "one outcome per chunk that samples");
        self.computed.clear();
        let mut outcomes = outcomes.iter();
        let mut progress = Vec::with_capacity(outcomes.len());
        for chunk in &batch.chunks {
            let outcome = if chunk.samples { outcomes.next() } else { None };
            let Some(sequence) = self.sequences.get_mut(&chunk.id) else { continue };
            if sequence.num_scheduled() == 0 {
                continue;
            }
            assert_eq!(sequence.chunk().as_ref(), Some(chunk), "the batch completed is not the one made last");
            sequence.advance();
            self.publish(chunk.id);
            self.leave_window(chunk.id);
            let Some(&outcome) = outcome else { continue };
            let (update, has_ended) = match outcome {
                Outcome::Failed => {
                    // What leaves the pool outlives the fault.
                    self.computed.retain(|computed| computed.id != chunk.id);
                    (Update::Failed, true)
                }
                Outcome::Token(token) => {
                    let finished = self.seq_mut(chunk.id).append(token);
                    let is_stop = matches!(finished, Some(FinishReason::Stop(_)));
                    (Update::Token { token, is_stop, finished }, finished.is_some())
                }
            };
            if has_ended {
                self.remove(chunk.id);
            }
            progress.push(Progress { id: chunk.id, update });
        }
        progress
    }

    /// The full blocks that the step completed last has computed and others can find, whether their sequences go on or not.
    pub fn computed_blocks(&self) -> &[ComputedBlock] {
        &self.computed
    }

    /// An accepted request that has not ended.
    pub fn sequence(&self, id: RequestId) -> Option<&Sequence> {
        self.sequences.get(&id)
    }

    /// Counts as of now.
    pub fn stats(&self) -> SchedulerStats {
        let windows = self.blocks.windows().map(WindowBlocks::pool);
        SchedulerStats {
            num_running: self.running.len(),
            num_waiting: self.waiting.len(),
            num_used_blocks: self.blocks.num_used(),
            num_cached_blocks: self.blocks.num_cached(),
            num_total_blocks: self.blocks.num_total(),
            num_used_state_slots: self.state_slots.num_used(),
            num_total_state_slots: self.state_slots.num_total(),
            num_snapshots: self.blocks.snapshots.num_kept(),
            num_total_snapshot_slots: self.blocks.snapshots.num_total(),
            num_used_window_blocks: windows.map_or(0, BlockPool::num_used),
            num_cached_window_blocks: windows.map_or(0, BlockPool::num_kept),
            num_total_window_blocks: windows.map_or(0, BlockPool::num_total),
            num_preemptions: self.num_preemptions,
            num_prefix_queries: self.num_prefix_queries,
            num_prefix_hits: self.num_prefix_hits,
            num_loaded: self.num_loaded,
        }
    }

    /// True while any accepted request has not ended.
    pub fn has_work(&self) -> bool {
        !self.sequences.is_empty()
    }

    /// Changes the size of the pool to ids `0..total` (at least one block, at most `u32::MAX` or those whose windows have
    /// room); returns the blocks it
    /// has now. Growth is immediate. A shrink takes free and cached blocks now and held ones when they are freed, and stops at what
    /// the largest accepted request needs until that request ends; new requests are measured by `total` at once.
    pub fn set_num_blocks(&mut self, total: usize) -> usize {
        self.blocks.set_num_wanted(total.min(self.config.most_blocks()))
    }

    /// Puts the next rows of a sequence into the batch being made; their blocks are there, but for those of windows.
    pub(crate) fn give_rows(&mut self, id: RequestId, num_rows: usize) {
        let sequence = self.sequences.get_mut(&id).expect("queues name only known sequences");
        sequence.schedule(num_rows);
        let end = sequence.num_computed() + num_rows;
        self.blocks.cover_window(&mut sequence.blocks, end);
    }

    fn leave_window(&mut self, id: RequestId) {
        let sequence = self.sequences.get_mut(&id).expect("the caller knows the sequence");
        let num_computed = sequence.num_computed();
        self.blocks.leave_window(&mut sequence.blocks, num_computed);
    }

    pub(crate) fn seq(&self, id: RequestId) -> &Sequence {
        self.sequences.get(&id).expect("queues name only known sequences")
    }

    pub(crate) fn seq_mut(&mut self, id: RequestId) -> &mut Sequence {
        self.sequences.get_mut(&id).expect("queues name only known sequences")
    }

    /// The most blocks that the request will hold, if it can be accepted.
    fn check(&self, request: &Request) -> Result<usize, AdmissionError> {
        let (prompt_len, max_tokens) = (request.prompt.len(), request.stop.max_tokens.max(1));
        let limit = self.config.max_model_len;
        if prompt_len == 0 {
            return Err(AdmissionError::EmptyPrompt);
        }
        let source_len = request.source_len;
        if source_len >= prompt_len {
            return Err(AdmissionError::NothingToDecode { source_len, prompt_len });
        }
        // An encoder's pass is as long as its source, whatever the rows of a step.
        if source_len > 0 && self.config.window.is_some() {
            return Err(AdmissionError::SourceBesideWindows { source_len });
        }
        if prompt_len.saturating_add(max_tokens) > limit {
            return Err(AdmissionError::TooLong { prompt_len, max_tokens, limit });
        }
        let needed = self.blocks.blocks_for(max_positions(prompt_len, &request.stop));
        if needed > self.blocks.num_wanted() {
            return Err(AdmissionError::NeverFits { needed, total: self.blocks.num_wanted() });
        }
        if self.waiting.num_fresh() >= self.config.max_queue {
            return Err(AdmissionError::QueueFull { limit: self.config.max_queue });
        }
        Ok(needed)
    }

    fn remove(&mut self, id: RequestId) {
        let mut sequence = self.sequences.remove(&id).expect("the caller knows the sequence");
        let is_queued = self.running.remove(&sequence.arrival).is_some() || self.waiting.remove(sequence.arrival);
        assert!(is_queued, "{id:?} neither ran nor waited");
        release(&mut self.blocks, &mut self.in_flight, id, &mut sequence);
        self.state_slots.release(sequence.state_slot.take());
        self.blocks.withdraw(self.blocks.blocks_for(sequence.max_positions()));
    }
}

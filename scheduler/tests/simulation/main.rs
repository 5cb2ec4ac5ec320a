//! Random lives of random requests under every kind of trouble, against a model that shows any wrong block.
//!
//! The fake model is a chain: the entry of a position mixes the entry before it, read through the block table, with the
//! token; a row samples from its own entry. A block given to two sequences, a position skipped or read before it was
//! written changes the tokens. A source is read as a whole by its encoder and by every row of the decoder after it, and
//! a recurrent state goes from row to row and is kept now and then, and a row that samples reads its window from blocks of
//! their own, so that a cut source or a state of another or of other tokens shows in the same way. Prompts begin alike and
//! salts are few; the salt is in every entry, so that a cached block of other tokens or of another tenant changes
//! the tokens too, and what is reused is compared with what it should hold. `MOESAIC_SIM_SEED=n` runs one seed alone.

mod coverage;
mod fake_model;
mod outside;
mod reuse;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use scheduler::{
    AdmissionError, Batch, BlockLoad, BlockTable, Chunk, FinishReason, Outcome, Phase, Progress, Request, RequestId,
    Scheduler, SchedulerConfig, Sequence, StateCopy, StopCriteria, Update, WindowConfig, WindowLimits,
};

use coverage::Coverage;
use fake_model::{Rng, all_of, encode, entry, generate_alone, next_state, sample, seen_at};
use outside::Outside;

const NUM_SEEDS: u64 = 1100;
const NUM_STEPS: usize = 300;
const MOST_BLOCKS: usize = 60;

/// What the simulator knows of an accepted request that has not ended. Ids are given in order of arrival.
struct Expected {
    prompt: Arc<[u32]>,
    prompt_len: usize,
    salt: u8,
    /// It takes what is cached.
    may_reuse: bool,
    max_tokens: usize,
    generated: Vec<u32>,
    reason: FinishReason,
    num_emitted: usize,
    num_computed: usize,
    num_preemptions: u32,
}

struct Simulation<'a> {
    rng: Rng,
    config: SchedulerConfig,
    scheduler: Scheduler,
    live: BTreeMap<RequestId, Expected>,
    next_id: u64,
    now: Duration,
    /// Last passed to `set_num_blocks`.
    num_wanted: usize,
    /// Entries by block and slot.
    memory: Vec<u64>,
    /// The same in the blocks of windows.
    window_memory: Vec<u64>,
    /// By state slot; those of snapshots come last.
    states: Vec<u64>,
    /// Where the states of sequences admitted in this step come from, by slot.
    restored: BTreeMap<usize, usize>,
    /// Percent of the requests that have a source.
    sources: usize,
    /// What prompts begin with.
    stems: Vec<Vec<u32>>,
    /// Salt and tokens of every prefix of whole blocks that was ever computed.
    computed: BTreeSet<(u8, Vec<u32>)>,
    /// Blocks that were kept outside the pool.
    outside: Outside,
    /// What is waited for.
    loads: Vec<BlockLoad>,
    has_encoded: bool,
    /// Percent per step.
    trouble: usize,
    coverage: &'a mut Coverage,
}

impl<'a> Simulation<'a> {
    fn new(seed: u64, coverage: &'a mut Coverage) -> Self {
        let mut rng = Rng(seed);
        let num_blocks = rng.between(2, MOST_BLOCKS);
        let num_state_slots = if rng.percent(50) { rng.between(1, 12) } else { 0 };
        let [block_size, max_num_seqs, max_num_batched_tokens] = [8, 24, 40].map(|most| rng.between(1, most));
        let max_model_len = rng.between(8, 120);
        let window = rng.percent(50).then(|| {
            let len = rng.between(1, 30);
            let limits = WindowLimits { block_size, max_num_seqs, max_num_batched_tokens, max_model_len };
            let most = limits.most_blocks(len);
            // Some have room to keep what nobody uses; what is set later stays within the others.
            WindowConfig {
                len,
                num_blocks: most.min(MOST_BLOCKS) + if rng.percent(50) { rng.between(1, 60) } else { 0 },
            }
        });
        let config = SchedulerConfig {
            block_size,
            num_blocks,
            num_state_slots,
            num_snapshot_slots: if rng.percent(80) { rng.between(1, 16) } else { 0 },
            snapshot_interval: rng.between(1, 3),
            window,
            max_num_seqs,
            max_num_batched_tokens,
            max_model_len,
            max_queue: rng.between(1, 30),
            prefix_cache: rng.percent(80).then_some([9; 32]),
            batch_timeout: Duration::from_millis(if rng.percent(50) { 0 } else { rng.between(1, 20) as u64 }),
        };
        Self {
            scheduler: Scheduler::new(config.clone()).expect("the limits are valid"),
            trouble: [0, 3, 15][rng.between(0, 2)],
            sources: if window.is_some() { 0 } else { [0, 50, 100][rng.between(0, 2)] },
            stems: (0..rng.between(1, 3)).map(|_| (0..120).map(|_| sample(rng.next())).collect()).collect(),
            computed: BTreeSet::new(),
            outside: Outside::new(),
            loads: Vec::new(),
            has_encoded: false,
            states: vec![0; config.num_state_slots + config.num_snapshot_slots],
            restored: BTreeMap::new(),
            rng,
            config,
            live: BTreeMap::new(),
            next_id: 0,
            now: Duration::ZERO,
            num_wanted: num_blocks,
            memory: Vec::new(),
            window_memory: Vec::new(),
            coverage,
        }
    }

    fn run(&mut self) {
        for _ in 0..NUM_STEPS {
            for _ in 0..self.rng.between(0, 3).saturating_sub(1) {
                self.add();
            }
            self.disturb();
            self.step();
            self.now += Duration::from_millis(self.rng.between(0, 5) as u64);
        }
        self.trouble = 0;
        self.drain();
    }

    /// Nothing new comes: the oldest running sequence gets a row in every step, so the tokens bound the steps.
    fn drain(&mut self) {
        let bound: usize = self.live.values().map(|expected| expected.prompt_len + expected.max_tokens).sum();
        for _ in 0..2 * bound {
            if self.live.is_empty() {
                break;
            }
            self.now += self.config.batch_timeout;
            self.step();
        }
        assert!(self.live.is_empty() && !self.scheduler.has_work(), "not done after {} steps", 2 * bound);
        let stats = self.scheduler.stats();
        let held = [stats.num_used_blocks, stats.num_used_window_blocks, stats.num_used_state_slots];
        assert_eq!((stats.num_running, stats.num_waiting, held), (0, 0, [0; 3]), "idle");
        assert_eq!(stats.num_total_blocks, self.num_wanted, "an idle pool has the size that was asked for");
        self.coverage.cached_and_full += u64::from(stats.num_cached_blocks == stats.num_total_blocks);
        assert_eq!(self.scheduler.schedule(self.now), Batch::default());
    }

    fn add(&mut self) {
        let shortest = usize::from(!self.rng.percent(2));
        let prompt_len = self.rng.between(shortest, self.config.max_model_len);
        let room = self.config.max_model_len - prompt_len;
        let max_tokens = if self.rng.percent(5) { room + 1 } else { self.rng.between(1, room.max(1)) };
        let stem = self.rng.between(0, self.stems.len() - 1);
        let num_shared = self.rng.between(0, prompt_len);
        let shared: Vec<u32> = self.stems[stem][..num_shared].to_vec();
        let prompt: Vec<u32> =
            shared.into_iter().chain((num_shared..prompt_len).map(|_| sample(self.rng.next()))).collect();
        let min_tokens = self.rng.between(0, 8);
        let stop_token_ids = (0..self.rng.between(0, 2)).map(|_| sample(self.rng.next())).collect();
        let stop = StopCriteria { max_tokens, min_tokens, stop_token_ids };
        let has_source = self.rng.percent(self.sources);
        let source_len = if has_source { self.rng.between(0, prompt_len.max(1)) } else { 0 };
        let id = RequestId(self.next_id);
        self.next_id += 1;

        let num_fresh = self.live.keys().filter(|&&id| self.is_fresh(id)).count();
        let needed = (prompt_len + max_tokens - 1).div_ceil(self.config.block_size);
        let (limit, total) = (self.config.max_model_len, self.num_wanted);
        let verdict = if prompt_len == 0 {
            Err(AdmissionError::EmptyPrompt)
        } else if source_len >= prompt_len {
            Err(AdmissionError::NothingToDecode { source_len, prompt_len })
        } else if prompt_len + max_tokens > limit {
            Err(AdmissionError::TooLong { prompt_len, max_tokens, limit })
        } else if needed > total {
            Err(AdmissionError::NeverFits { needed, total })
        } else if num_fresh == self.config.max_queue {
            Err(AdmissionError::QueueFull { limit: num_fresh })
        } else {
            Ok(())
        };
        let salt = self.rng.between(0, 1) as u8;
        let computes_whole_prompt = self.rng.percent(10);
        let num_loadable = self.num_loadable(&prompt, salt);
        let (prompt, cache_salt) = (prompt.into(), [salt; 32]);
        let request = Request { id, prompt, source_len, stop, cache_salt, num_loadable, computes_whole_prompt };
        assert_eq!(self.scheduler.add(request.clone(), self.now), verdict, "{id:?}");
        if verdict.is_err() {
            self.coverage.refused += 1;
            return;
        }
        let (generated, reason) = generate_alone(&request, self.config.num_state_slots > 0, self.config.window);
        let (num_emitted, num_computed, num_preemptions) = (0, 0, 0);
        let can_resume = self.config.num_state_slots == 0 || self.config.num_snapshot_slots > 0;
        let has_cache = self.config.prefix_cache.is_some() && can_resume;
        let may_reuse = has_cache && source_len == 0 && !computes_whole_prompt;
        let expected = Expected {
            prompt: request.prompt,
            prompt_len,
            salt,
            may_reuse,
            max_tokens,
            generated,
            reason,
            num_emitted,
            num_computed,
            num_preemptions,
        };
        self.live.insert(id, expected);
    }

    /// Whatever a client or the engine may do at any time, also while a batch is in flight.
    fn disturb(&mut self) {
        if self.rng.percent(self.trouble)
            && let Some(id) = self.any_live()
        {
            assert!(self.scheduler.abort(id));
            assert!(!self.scheduler.abort(id), "{id:?} ended twice");
            self.live.remove(&id);
            self.coverage.aborted += 1;
        }
        if self.rng.percent(self.trouble)
            && let Some(id) = self.any_live()
        {
            let was_running = self.is_running(id);
            assert_eq!(self.scheduler.preempt(id), was_running, "only running sequences are preempted");
            if was_running {
                self.lose_blocks(id);
                self.coverage.explicit_preemptions += 1;
            }
        }
        if self.rng.percent(self.trouble) {
            self.num_wanted = self.rng.between(1, MOST_BLOCKS);
            let actual = self.scheduler.set_num_blocks(self.num_wanted);
            assert!(actual >= self.num_wanted);
            self.coverage.shrinks_delayed += u64::from(actual > self.num_wanted);
        }
        self.scheduler.assert_invariants();
    }

    fn step(&mut self) {
        self.answer_loads();
        let running: Vec<RequestId> = self.live.keys().copied().filter(|&id| self.is_running(id)).collect();
        let decoding: Vec<RequestId> = running.iter().copied().filter(|&id| is_decoding(self.sequence(id))).collect();
        let before = self.scheduler.stats();
        let batch = self.scheduler.schedule(self.now);
        self.scheduler.assert_invariants();
        if before.num_snapshots == before.num_total_snapshot_slots {
            self.coverage.snapshots_given_up += batch.snapshots.len() as u64;
        }
        self.check_preempted(&batch);
        self.take_loads(&batch);
        self.restored = batch.restores.iter().map(|copy| (copy.to.0 as usize, copy.from.0 as usize)).collect();
        assert_eq!(self.restored.len(), batch.restores.len(), "two states for one sequence");
        match batch.chunks.first() {
            Some(Chunk { phase: Phase::Encode, .. }) => self.check_encoders(&batch, &running),
            _ => self.check_batch(&batch, &running, &decoding),
        }

        assert!(self.restored.is_empty(), "a state was restored for nobody who starts from it");
        self.check_snapshots(&batch);
        let rows: Vec<u64> = self.compute(&batch);
        let outcomes: Vec<Outcome> = rows
            .into_iter()
            .map(|row| if self.rng.percent(self.trouble / 3) { Outcome::Failed } else { Outcome::Token(sample(row)) })
            .collect();
        if self.trouble > 0 && self.rng.percent(20) {
            self.disturb();
            self.add();
        }
        let survivors: Vec<bool> = batch.chunks.iter().map(|chunk| self.is_running(chunk.id)).collect();
        self.coverage.lost_in_flight += survivors.iter().filter(|&&survives| !survives).count() as u64;
        let is_held = |copy: &&StateCopy| {
            batch
                .chunks
                .iter()
                .any(|chunk| self.scheduler.sequence(chunk.id).and_then(Sequence::state_slot) == Some(copy.from))
        };
        let num_held = batch.snapshots.iter().filter(is_held).count();
        self.coverage.snapshots += num_held as u64;
        self.coverage.snapshots_lost_in_flight += (batch.snapshots.len() - num_held) as u64;
        let progress = self.scheduler.complete(&batch, &outcomes);
        self.scheduler.assert_invariants();
        self.store();
        let stats = self.scheduler.stats();
        let num_held = stats.num_used_window_blocks + stats.num_cached_window_blocks;
        self.coverage.windows_kept += u64::from(stats.num_cached_window_blocks > 0);
        self.coverage.windows_full += u64::from(num_held > 0 && num_held == stats.num_total_window_blocks);
        self.check_progress(&batch, &survivors, &outcomes, &progress);
    }

    fn check_preempted(&mut self, batch: &Batch) {
        self.coverage.scarcity_preemptions += batch.preempted.len() as u64;
        for &id in &batch.preempted {
            self.lose_blocks(id);
            assert!(!self.is_running(id));
            assert!(batch.chunks.iter().all(|chunk| chunk.id < id), "{id:?} gave way to a younger one");
        }
    }

    /// Whole sources and nothing else, and never twice in a row while others wait for their rows.
    fn check_encoders(&mut self, batch: &Batch, running: &[RequestId]) {
        assert!(!self.has_encoded || running.is_empty(), "decodes wait for two steps of encoders");
        self.has_encoded = true;
        let budget = self.config.max_num_batched_tokens;
        assert!(batch.num_rows() <= budget || batch.chunks.len() == 1, "over budget");
        for chunk in &batch.chunks {
            let source_len = self.sequence(chunk.id).source_len();
            let whole = Chunk { id: chunk.id, start: 0, len: source_len, samples: false, phase: Phase::Encode };
            assert_eq!(*chunk, whole, "a source is read as a whole");
            assert!(self.live[&chunk.id].num_computed == 0 && !running.contains(&chunk.id));
            self.coverage.encoded += 1;
            self.coverage.encoded_over_budget += u64::from(source_len > budget);
        }
        self.check_order(batch, running);
    }

    /// Nobody is admitted before one who came earlier, but where that one waits for a block that is being computed.
    fn check_order(&mut self, batch: &Batch, running: &[RequestId]) {
        let admitted = batch.chunks.iter().map(|chunk| chunk.id).filter(|id| !running.contains(id)).max();
        let first_waiting = self.live.keys().copied().find(|&id| !self.is_running(id));
        let stats = self.scheduler.stats();
        for id in first_waiting.zip(admitted).into_iter().flat_map(|(first, last)| (first.0..last.0).map(RequestId)) {
            if self.live.contains_key(&id) && !self.is_running(id) {
                assert!(self.is_being_computed(id), "{admitted:?} was admitted before {id:?}");
                *if stats.num_total_state_slots > 0 {
                    &mut self.coverage.passed_for_a_state
                } else {
                    &mut self.coverage.passed
                } += 1;
            }
        }
        let is_full = stats.num_total_state_slots > 0 && stats.num_used_state_slots == stats.num_total_state_slots;
        self.coverage.without_a_state += u64::from(is_full && first_waiting.is_some());
    }

    fn check_batch(&mut self, batch: &Batch, running: &[RequestId], decoding: &[RequestId]) {
        self.has_encoded = false;
        assert!(batch.num_rows() <= self.config.max_num_batched_tokens, "over budget");
        let in_batch: BTreeSet<RequestId> = batch.chunks.iter().map(|chunk| chunk.id).collect();
        assert_eq!(in_batch.len(), batch.chunks.len(), "two chunks of one sequence");
        assert!(batch.chunks.is_sorted_by_key(|chunk| chunk.phase == Phase::Prefill), "decodes come first");
        self.check_order(batch, running);
        batch.chunks.iter().for_each(|chunk| self.check_reuse(chunk));
        for chunk in &batch.chunks {
            let (expected, sequence) = (&self.live[&chunk.id], self.sequence(chunk.id));
            let num_tokens = sequence.tokens().len();
            assert_eq!(chunk.start, expected.num_computed, "{:?}: chunks are contiguous", chunk.id);
            assert!(chunk.len >= 1 && chunk.start + chunk.len <= num_tokens);
            assert_eq!(chunk.samples, chunk.start + chunk.len == num_tokens);
            assert_eq!(chunk.phase == Phase::Decode, is_decoding(sequence));
            assert!(sequence.block_table().blocks().len() * self.config.block_size >= chunk.start + chunk.len);
            self.coverage.chunked += u64::from(!chunk.samples);
        }
        let must_have_a_row = |id: &&RequestId| !batch.preempted.contains(id);
        // One that loads is older than all it lets pass, and may cost the youngest of them its blocks.
        let is_loading = |id: &RequestId| !self.scheduler.loading(*id).is_empty();
        let first = running.iter().find(|id| !is_loading(id));
        let first = first.filter(|id| must_have_a_row(id) || !running.first().is_some_and(is_loading));
        for id in decoding.iter().filter(must_have_a_row).chain(first) {
            assert!(in_batch.contains(id), "{id:?} is running and got no row");
        }
        match batch.wake_at {
            Some(wake_at) => {
                assert!(batch.chunks.is_empty() && running.is_empty(), "the window is for an idle scheduler");
                assert!(wake_at > self.now && wake_at <= self.now + self.config.batch_timeout);
                self.coverage.windows += 1;
            }
            None => {
                let may_rest =
                    self.live.is_empty() || self.live.keys().any(|&id| !self.scheduler.loading(id).is_empty());
                assert!(!batch.chunks.is_empty() || may_rest, "work, but no row");
            }
        }
    }

    /// Runs the fake model; returns the last entry of each chunk that samples.
    fn compute(&mut self, batch: &Batch) -> Vec<u64> {
        let mut rows = Vec::new();
        batch.restores.iter().for_each(|copy| self.states[copy.to.0 as usize] = self.states[copy.from.0 as usize]);
        for chunk in &batch.chunks {
            let sequence = self.scheduler.sequence(chunk.id).expect("chunks name live sequences");
            let block_size = self.config.block_size;
            let slot = |position: usize| {
                let block = sequence.block_table().blocks()[position / block_size];
                block.0 as usize * block_size + position % block_size
            };
            let (tokens, source_len) = (sequence.tokens(), sequence.source_len());
            let positions = chunk.start..chunk.start + chunk.len;
            let highest = positions.clone().map(slot).max().expect("chunks have rows");
            self.memory.resize(self.memory.len().max(highest + 1), 0);
            if chunk.phase == Phase::Encode {
                positions
                    .zip(encode(&tokens[..source_len]))
                    .for_each(|(position, entry)| self.memory[slot(position)] = entry);
                continue;
            }
            let source = all_of((0..source_len).map(|position| self.memory[slot(position)]));
            let salt = self.live[&chunk.id].salt;
            let state_slot = sequence.state_slot().map(|slot| slot.0 as usize);
            let mut state = state_slot.filter(|_| chunk.start > source_len).map_or(0, |slot| self.states[slot]);
            for position in positions {
                let before = (position > source_len).then(|| self.memory[slot(position - 1)]);
                let entry = entry(before, (salt, source), tokens[position]);
                self.memory[slot(position)] = entry;
                if self.config.window.is_some() {
                    let slot = window_slot(sequence.block_table(), position, block_size);
                    self.window_memory.resize(self.window_memory.len().max(slot + 1), 0);
                    self.window_memory[slot] = entry;
                }
                state = next_state(state, tokens[position]);
            }
            if let Some(slot) = state_slot {
                self.states[slot] = state;
            }
            if chunk.samples {
                let seen = if state_slot.is_some() { state } else { 0 };
                let last = chunk.start + chunk.len - 1;
                let in_window = self.config.window.map_or(0, |window| {
                    let entries =
                        seen_at(last, window).map(|seen| window_slot(sequence.block_table(), seen, block_size));
                    all_of(entries.map(|slot| self.window_memory[slot]))
                });
                rows.push(self.memory[slot(last)] ^ seen ^ in_window);
            }
        }
        batch.snapshots.iter().for_each(|copy| self.states[copy.to.0 as usize] = self.states[copy.from.0 as usize]);
        rows
    }

    fn check_progress(&mut self, batch: &Batch, survivors: &[bool], outcomes: &[Outcome], progress: &[Progress]) {
        let (mut outcomes, mut progress) = (outcomes.iter(), progress.iter());
        for (chunk, &survives) in batch.chunks.iter().zip(survivors) {
            let outcome = if chunk.samples { outcomes.next() } else { None };
            if !survives {
                continue;
            }
            let expected = self.live.get_mut(&chunk.id).expect("survivors are live");
            let before = expected.num_computed / self.config.block_size;
            expected.num_computed += chunk.len;
            let full_blocks = before + 1..=expected.num_computed / self.config.block_size;
            let tokens = || expected.prompt.iter().chain(&expected.generated).copied();
            let prefixes = full_blocks.map(|num_blocks| tokens().take(num_blocks * self.config.block_size).collect());
            self.computed.extend(prefixes.map(|tokens| (expected.salt, tokens)));
            let Some(&outcome) = outcome else { continue };
            let news = progress.next().expect("each sampled row makes progress");
            assert_eq!(news.id, chunk.id);
            let has_ended = match outcome {
                Outcome::Failed => {
                    assert_eq!(news.update, Update::Failed);
                    self.coverage.failed += 1;
                    true
                }
                Outcome::Token(token) => {
                    assert_eq!(token, expected.generated[expected.num_emitted], "{:?} differs from alone", chunk.id);
                    expected.num_emitted += 1;
                    let is_last = expected.num_emitted == expected.generated.len();
                    let finished = is_last.then_some(expected.reason);
                    let is_stop = is_last && matches!(expected.reason, FinishReason::Stop(_));
                    assert_eq!(news.update, Update::Token { token, is_stop, finished }, "{:?}", chunk.id);
                    self.coverage.finished += u64::from(is_last);
                    is_last
                }
            };
            if has_ended {
                self.live.remove(&chunk.id);
                assert!(self.scheduler.sequence(chunk.id).is_none(), "{:?} has ended", chunk.id);
            }
        }
        assert!(progress.next().is_none(), "news of a sequence that had no row");
        for (&id, expected) in &self.live {
            let sequence = self.sequence(id);
            assert_eq!(sequence.num_computed(), expected.num_computed, "{id:?}");
            assert_eq!(sequence.num_generated(), expected.num_emitted, "{id:?}");
            assert_eq!(sequence.tokens()[expected.prompt_len..], expected.generated[..expected.num_emitted], "{id:?}");
            assert_eq!(sequence.num_preemptions(), expected.num_preemptions, "{id:?}");
        }
        assert_eq!(self.scheduler.has_work(), !self.live.is_empty());
    }

    fn lose_blocks(&mut self, id: RequestId) {
        let expected = self.live.get_mut(&id).expect("only live sequences are preempted");
        expected.num_computed = 0;
        expected.num_preemptions += 1;
    }

    fn any_live(&mut self) -> Option<RequestId> {
        let num_live = self.live.len();
        (num_live > 0).then(|| self.rng.between(0, num_live - 1)).and_then(|nth| self.live.keys().nth(nth).copied())
    }

    fn sequence(&self, id: RequestId) -> &Sequence {
        self.scheduler.sequence(id).expect("live requests have a sequence")
    }

    fn is_running(&self, id: RequestId) -> bool {
        self.scheduler.sequence(id).is_some_and(|sequence| !sequence.block_table().blocks().is_empty())
    }

    fn is_fresh(&self, id: RequestId) -> bool {
        !self.is_running(id) && self.sequence(id).num_preemptions() == 0
    }
}

/// Where the window's part of a position is, which the window must hold.
fn window_slot(table: &BlockTable, position: usize, block_size: usize) -> usize {
    let idx = position / block_size - table.window_start();
    table.window()[idx].0 as usize * block_size + position % block_size
}

fn is_decoding(sequence: &Sequence) -> bool {
    sequence.num_generated() > 0 && sequence.num_computed() + 1 == sequence.tokens().len()
}

/// Names the seed if the run panics.
struct NameSeed(u64);

impl Drop for NameSeed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("replay with MOESAIC_SIM_SEED={}", self.0);
        }
    }
}

#[test]
fn whatever_happens_the_invariants_hold() {
    let mut coverage = Coverage::default();
    if let Ok(seed) = std::env::var("MOESAIC_SIM_SEED") {
        let seed = NameSeed(seed.parse().expect("MOESAIC_SIM_SEED is a number"));
        return Simulation::new(seed.0, &mut coverage).run();
    }
    for seed in 0..NUM_SEEDS {
        let seed = NameSeed(seed);
        Simulation::new(seed.0, &mut coverage).run();
    }
    coverage.assert_busy();
}

#[test]
fn five_hundred_sequences_run_together() {
    let mut coverage = Coverage::default();
    let seed = NameSeed(1);
    let mut simulation = Simulation::new(seed.0, &mut coverage);
    simulation.config = SchedulerConfig {
        block_size: 4,
        num_blocks: 10_000,
        num_state_slots: 0,
        num_snapshot_slots: 0,
        snapshot_interval: 1,
        window: None,
        max_num_seqs: 512,
        max_num_batched_tokens: 1024,
        max_model_len: 60,
        max_queue: 1000,
        prefix_cache: None,
        batch_timeout: Duration::ZERO,
    };
    simulation.scheduler = Scheduler::new(simulation.config.clone()).unwrap();
    (simulation.num_wanted, simulation.trouble, simulation.sources) = (10_000, 0, 0);
    (0..1000).for_each(|_| simulation.add());
    simulation.drain();
    assert!(coverage.finished > 500, "{coverage:?}");
    assert_eq!(coverage.scarcity_preemptions, 0, "there is room for all");
}

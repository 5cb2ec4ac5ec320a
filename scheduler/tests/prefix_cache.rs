//! What steps look like where prompts begin alike: who starts from cached blocks, who waits for those of another.

use std::collections::HashSet;
use std::time::Duration;

use scheduler::{
    AdmissionError, ConfigError, Outcome, Phase, Request, RequestId, Scheduler, SchedulerConfig, StateCopy,
    StopCriteria, WindowConfig, WindowLimits, block_names,
};

/// Tokens of a block.
const BLOCK: usize = 4;
/// Sampled in every row.
const TOKEN: u32 = 7;

struct Driver {
    scheduler: Scheduler,
}

impl Driver {
    fn new(num_blocks: usize, max_num_batched_tokens: usize) -> Self {
        Self::with(config(num_blocks, max_num_batched_tokens))
    }

    fn with(config: SchedulerConfig) -> Self {
        Self { scheduler: Scheduler::new(config).expect("the limits are valid") }
    }

    fn add(&mut self, request: Request) {
        self.scheduler.add(request, Duration::ZERO).expect("the request fits");
    }

    /// Chunks as `id start..end`, `d` in front of decodes.
    fn step(&mut self) -> String {
        let batch = self.scheduler.schedule(Duration::ZERO);
        self.scheduler.assert_invariants();
        let outcomes = vec![Outcome::Token(TOKEN); batch.num_samples()];
        let text: Vec<String> = batch
            .chunks
            .iter()
            .map(|chunk| {
                let mark = if chunk.phase == Phase::Decode { "d" } else { "" };
                format!("{mark}{} {}..{}", chunk.id.0, chunk.start, chunk.start + chunk.len)
            })
            .collect();
        self.scheduler.complete(&batch, &outcomes);
        self.scheduler.assert_invariants();
        text.join(", ")
    }

    fn check(&mut self, steps: &[&str]) {
        steps.iter().for_each(|&expected| assert_eq!(self.step(), expected));
    }

    fn run(&mut self) {
        while self.scheduler.has_work() {
            self.step();
        }
    }

    fn blocks(&self) -> [usize; 2] {
        let stats = self.scheduler.stats();
        [stats.num_used_blocks, stats.num_cached_blocks]
    }

    fn num_cached(&self, id: u64) -> usize {
        self.scheduler.sequence(RequestId(id)).expect("it is open").num_cached_tokens()
    }
}

fn config(num_blocks: usize, max_num_batched_tokens: usize) -> SchedulerConfig {
    SchedulerConfig {
        block_size: BLOCK,
        num_blocks,
        num_state_slots: 0,
        num_snapshot_slots: 0,
        snapshot_interval: 2,
        window: None,
        max_num_seqs: 8,
        max_num_batched_tokens,
        max_model_len: 1000,
        max_queue: 100,
        prefix_cache: Some([3; 32]),
        batch_timeout: Duration::ZERO,
    }
}

/// `max_tokens` after `common` tokens that all prompts share and `own` that no other has.
fn request(id: u64, common: usize, own: usize, max_tokens: usize) -> Request {
    let own = (0..own).map(|idx| 1000 * (id as u32 + 1) + idx as u32);
    Request {
        id: RequestId(id),
        prompt: (0..common as u32).map(|idx| 100 + idx).chain(own).collect(),
        source_len: 0,
        stop: StopCriteria { max_tokens, ..StopCriteria::default() },
        cache_salt: [0; 32],
        num_loadable: 0,
        computes_whole_prompt: false,
    }
}

#[test]
fn what_ended_is_found_again_in_whole_blocks() {
    let mut driver = Driver::new(100, 64);
    driver.add(request(1, 10, 0, 3));
    driver.check(&["1 0..10", "d1 10..11", "d1 11..12"]);
    assert_eq!(driver.blocks(), [0, 3], "the generated tokens are cached too");
    for (id, common, own, expected) in
        [(2, 10, 3, "2 8..13"), (3, 8, 0, "3 4..8"), (4, 9, 0, "4 8..9"), (5, 3, 9, "5 0..12"), (6, 4, 1, "6 4..5")]
    {
        driver.add(request(id, common, own, 1));
        driver.check(&[expected]);
    }
    let conversation = Request { prompt: (100..110).chain([TOKEN, TOKEN, 5]).collect(), ..request(7, 0, 0, 1) };
    driver.add(conversation);
    driver.check(&["7 12..13"]);
    let stats = driver.scheduler.stats();
    assert_eq!((stats.num_prefix_queries, stats.num_prefix_hits), (10 + 13 + 8 + 9 + 12 + 5 + 13, 8 + 4 + 8 + 4 + 12));
}

#[test]
fn a_step_names_the_blocks_that_it_filled() {
    let mut driver = Driver::new(100, 64);
    let names = |salt: u8, len: u32| block_names(&[3; 32], &[salt; 32], BLOCK, &(100..100 + len).collect::<Vec<_>>());
    let computed = |driver: &Driver| -> Vec<(u64, usize, [u8; 32])> {
        driver.scheduler.computed_blocks().iter().map(|block| (block.id.0, block.idx, block.name)).collect()
    };
    driver.add(request(1, 10, 0, 1));
    driver.check(&["1 0..10"]);
    assert_eq!(computed(&driver), [(1, 0, names(0, 4)[0]), (1, 1, names(0, 8)[1])], "also of one that has ended");
    driver.add(request(2, 12, 0, 2));
    driver.check(&["2 8..12"]);
    assert_eq!(computed(&driver), [(2, 2, names(0, 12)[2])], "what was cached is not computed");
    let held = driver.scheduler.sequence(RequestId(2)).expect("it runs").block_table().blocks()[2];
    assert_eq!(driver.scheduler.computed_blocks()[0].block, held);
    driver.check(&["d2 12..13"]);
    assert_eq!(computed(&driver), []);
    driver.add(Request { cache_salt: [1; 32], ..request(3, 4, 0, 1) });
    driver.check(&["3 0..4"]);
    assert_eq!(computed(&driver), [(3, 0, names(1, 4)[0])], "of another salt");
    let uncached = SchedulerConfig { prefix_cache: None, ..config(100, 64) };
    let mut driver = Driver::with(uncached);
    driver.add(request(1, 10, 0, 1));
    driver.check(&["1 0..10"]);
    assert_eq!(computed(&driver), [], "without names");
}

#[test]
fn running_sequences_share_blocks() {
    let mut driver = Driver::new(100, 64);
    driver.add(request(1, 8, 1, 9));
    driver.check(&["1 0..9"]);
    driver.add(request(2, 8, 2, 9));
    driver.check(&["d1 9..10, 2 8..10"]);
    assert_eq!(driver.blocks(), [4, 0], "two of their own and two together");
    assert_eq!((driver.num_cached(1), driver.num_cached(2)), (0, 8));
    driver.scheduler.abort(RequestId(1));
    assert_eq!(driver.blocks(), [3, 0]);
    driver.run();
    assert_eq!(driver.blocks(), [0, 4]);
}

#[test]
fn prompts_that_begin_alike_are_computed_once() {
    let mut driver = Driver::new(100, 6);
    for id in 1..=3 {
        driver.add(request(id, 12, 1, 2));
    }
    driver.add(request(4, 0, 3, 1));
    // 2 and 3 wait for what 1 computes, 4 passes them.
    driver.check(&["1 0..6", "1 6..12", "1 12..13, 2 12..13, 3 12..13, 4 0..3"]);
    assert_eq!(
        [1, 2, 3, 4].map(|id| driver.scheduler.sequence(RequestId(id)).map(|s| s.num_cached_tokens())),
        [Some(0), Some(12), Some(12), None]
    );
}

#[test]
fn others_pass_those_that_wait_for_a_block() {
    let mut driver = Driver::new(100, 6);
    driver.add(request(1, 8, 0, 1));
    driver.add(request(2, 8, 1, 1));
    driver.check(&["1 0..6"]);
    driver.add(request(3, 0, 2, 2));
    driver.check(&["1 6..8, 3 0..2", "d3 2..3, 2 8..9"]);
}

#[test]
fn who_waits_computes_for_itself_when_the_other_is_gone() {
    for abort in [true, false] {
        let mut driver = Driver::new(100, 6);
        driver.add(request(1, 12, 0, 2));
        driver.add(request(2, 12, 1, 1));
        driver.check(&["1 0..6"]);
        if abort {
            assert!(driver.scheduler.abort(RequestId(1)));
            driver.check(&["2 4..10", "2 10..13"]);
        } else {
            assert!(driver.scheduler.preempt(RequestId(1)));
            // The older comes back first, and is waited for again.
            driver.check(&["1 4..10", "1 10..12", "d1 12..13, 2 12..13"]);
        }
    }
}

#[test]
fn what_was_preempted_goes_on_where_its_blocks_end() {
    let mut driver = Driver::new(100, 64);
    driver.add(request(1, 6, 0, 8));
    driver.check(&["1 0..6", "d1 6..7", "d1 7..8", "d1 8..9"]);
    assert!(driver.scheduler.preempt(RequestId(1)));
    driver.check(&["1 8..10"]);
    assert_eq!(driver.num_cached(1), 0, "it is the first admission that counts");
    assert_eq!(driver.scheduler.stats().num_prefix_hits, 0);
}

#[test]
fn salts_fingerprints_and_settings_keep_apart() {
    let check = |set: fn(&mut SchedulerConfig), change: fn(&mut Request), expected| {
        let mut settings = config(100, 64);
        set(&mut settings);
        let mut driver = Driver::with(settings);
        driver.add(request(1, 9, 0, 1));
        driver.run();
        let mut second = request(2, 9, 0, 1);
        change(&mut second);
        driver.add(second);
        driver.check(&[expected]);
    };
    check(|_| (), |_| (), "2 8..9");
    check(|_| (), |request| request.cache_salt[31] = 1, "2 0..9");
    check(|_| (), |request| request.computes_whole_prompt = true, "2 0..9");
    check(|_| (), |request| request.source_len = 8, "2 0..8");
    check(|config| config.prefix_cache = None, |_| (), "2 0..9");
    check(|config| config.num_state_slots = 4, |_| (), "2 0..9");
}

#[test]
fn what_computes_all_still_gives() {
    let mut driver = Driver::new(100, 64);
    driver.add(Request { computes_whole_prompt: true, ..request(1, 9, 0, 3) });
    driver.add(request(2, 9, 0, 3));
    driver.check(&["1 0..9", "d1 9..10, 2 8..9"]);
    driver.add(Request { computes_whole_prompt: true, ..request(3, 9, 0, 9) });
    driver.check(&["d1 10..11, d2 9..10, 3 0..9"]);
    assert_eq!(driver.blocks(), [2 + 1 + 1, 0], "2 and 3 hold two blocks together");
    assert_eq!(driver.scheduler.stats().num_prefix_queries, 9, "2 alone was looked up");
}

#[test]
fn cached_blocks_make_room_oldest_leaf_first() {
    let mut driver = Driver::new(6, 64);
    for id in 1..=3 {
        driver.add(request(id, 0, 8, 1));
        driver.run();
    }
    assert_eq!(driver.blocks(), [0, 6]);
    // Its own first block stays: what it takes is not given up for it.
    driver.add(Request { id: RequestId(4), ..extended(1, 8, 5) });
    driver.check(&["4 8..13"]);
    assert_eq!(driver.blocks(), [0, 5]);
    let found = |driver: &mut Driver, of: u64, id| {
        driver.add(Request { id: RequestId(id), ..extended(of, 8, 1) });
        driver.step()
    };
    assert_eq!(found(&mut driver, 3, 6), "6 8..9");
    assert_eq!(found(&mut driver, 1, 7), "7 8..9");
    assert_eq!(found(&mut driver, 2, 8), "8 0..9");
}

/// The prompt of `request(of, 0, len, 1)` and `more` tokens of the new one.
fn extended(of: u64, len: usize, more: usize) -> Request {
    let base = request(of, 0, len, 1);
    Request { prompt: base.prompt.iter().copied().chain(9000..9000 + more as u32).collect(), ..base }
}

#[test]
fn a_shrinking_pool_gives_up_cached_blocks() {
    let mut driver = Driver::new(8, 64);
    driver.add(request(1, 0, 16, 1));
    driver.run();
    assert_eq!((driver.scheduler.set_num_blocks(2), driver.blocks()), (2, [0, 2]));
    driver.scheduler.set_num_blocks(8);
    driver.add(request(1, 0, 16, 1));
    driver.check(&["1 8..16"]);
}

/// States of up to eight sequences, and `num_kept` that stay for others, every two blocks.
fn with_states(num_kept: usize, max_num_batched_tokens: usize) -> Driver {
    let config = config(100, max_num_batched_tokens);
    Driver::with(SchedulerConfig { num_state_slots: 8, num_snapshot_slots: num_kept, ..config })
}

#[test]
fn with_states_only_the_places_where_one_is_kept_count() {
    let mut driver = with_states(4, 64);
    driver.add(request(1, 18, 0, 8));
    driver.check(&["1 0..8", "1 8..16", "1 16..18"]);
    driver.run();
    assert_eq!(driver.blocks(), [0, 25 / BLOCK]);
    assert_eq!(driver.scheduler.stats().num_snapshots, 3, "one of them made while it decoded");
    for (id, common, own, expected) in
        [(2, 18, 1, "2 16..19"), (3, 15, 0, "3 8..15"), (4, 16, 0, "4 8..16"), (5, 7, 3, "5 0..8")]
    {
        driver.add(request(id, common, own, 1));
        driver.check(&[expected]);
        driver.run();
    }
    let conversation = (100..118).chain([TOKEN; 7]).chain([5]).collect();
    driver.add(Request { prompt: conversation, ..request(7, 0, 0, 1) });
    driver.check(&["7 24..26"]);
}

#[test]
fn states_are_copied_before_and_after_a_step() {
    let copies = |copies: &[StateCopy]| copies.iter().map(|copy| (copy.from.0, copy.to.0)).collect::<Vec<_>>();
    let mut driver = with_states(1, 64);
    driver.add(request(1, 8, 0, 1));
    let batch = driver.scheduler.schedule(Duration::ZERO);
    assert_eq!((copies(&batch.restores), copies(&batch.snapshots)), (vec![], vec![(0, 8)]));
    driver.scheduler.complete(&batch, &[Outcome::Token(TOKEN)]);
    driver.add(request(2, 8, 8, 1));
    let batch = driver.scheduler.schedule(Duration::ZERO);
    // The state that it started from goes in the same step.
    assert_eq!((copies(&batch.restores), copies(&batch.snapshots)), (vec![(8, 0)], vec![(0, 8)]));
    driver.scheduler.complete(&batch, &[Outcome::Token(TOKEN)]);
    driver.scheduler.assert_invariants();
    driver.add(request(3, 9, 0, 1));
    driver.check(&["3 0..8", "3 8..9"]);
}

#[test]
fn the_state_used_last_stays() {
    let mut driver = with_states(2, 64);
    for (id, first) in [(1, "1 0..8"), (2, "2 0..8"), (1, "1 8..9"), (3, "3 0..8"), (2, "2 0..8")] {
        driver.add(request(id, 0, 9, 1));
        driver.check(&[first]);
        driver.run();
    }
}

#[test]
fn who_waits_for_a_state_waits_for_the_last_that_helps() {
    let mut driver = with_states(4, 8);
    driver.add(request(1, 24, 1, 1));
    driver.add(request(2, 17, 0, 1));
    driver.add(request(3, 7, 1, 1));
    driver.check(&["1 0..8", "1 8..16", "1 16..24", "1 24..25, 2 16..17, 3 0..6", "3 6..8"]);
}

#[test]
fn a_block_that_goes_takes_its_state_along() {
    let mut driver = with_states(4, 64);
    driver.add(request(1, 16, 0, 1));
    driver.run();
    assert_eq!(driver.scheduler.stats().num_snapshots, 2);
    driver.scheduler.set_num_blocks(3);
    assert_eq!(driver.scheduler.stats().num_snapshots, 1);
    driver.scheduler.assert_invariants();
    driver.scheduler.set_num_blocks(8);
    driver.add(request(1, 16, 0, 1));
    assert!(driver.scheduler.abort(RequestId(1)));
    driver.add(request(1, 17, 0, 1));
    let batch = driver.scheduler.schedule(Duration::ZERO);
    assert!(driver.scheduler.abort(RequestId(1)), "with a state on its way");
    driver.scheduler.complete(&batch, &[]);
    driver.scheduler.assert_invariants();
    assert_eq!(driver.scheduler.stats().num_snapshots, 1);
}

/// Rows see 9 positions; of the ten blocks for them two sequences may hold all.
fn with_windows(prefix_cache: Option<[u8; 32]>) -> Driver {
    let limits = WindowLimits { block_size: BLOCK, max_num_seqs: 2, max_num_batched_tokens: 8, max_model_len: 1000 };
    assert_eq!(limits.most_blocks(9), 10);
    assert_eq!(WindowLimits { max_model_len: 15, ..limits }.most_blocks(9), 8);
    assert_eq!((limits.most_blocks(0), limits.most_blocks(usize::MAX)), (6, 500));
    let window = Some(WindowConfig { len: 9, num_blocks: 10 });
    Driver::with(SchedulerConfig { window, max_num_seqs: 2, prefix_cache, ..config(100, 8) })
}

impl Driver {
    fn window_blocks(&self) -> [usize; 2] {
        let stats = self.scheduler.stats();
        [stats.num_used_window_blocks, stats.num_cached_window_blocks]
    }
}

#[test]
fn a_window_holds_what_rows_see() {
    let mut driver = with_windows(None);
    driver.add(request(1, 40, 0, 20));
    for (step, held) in [("1 0..8", 2), ("1 8..16", 2), ("1 16..24", 2), ("1 24..32", 2), ("1 32..40", 2)] {
        driver.check(&[step]);
        assert_eq!(driver.window_blocks(), [held, 0], "after {step}");
    }
    let held: Vec<usize> = (40..48)
        .map(|_| {
            driver.step();
            driver.window_blocks()[0]
        })
        .collect();
    assert_eq!(held, [3, 3, 3, 2, 3, 3, 3, 2], "eight positions before the next row");
    assert_eq!(driver.blocks(), [12, 0], "other layers see all");
    driver.run();
    assert_eq!((driver.window_blocks(), driver.blocks()), ([0, 0], [0, 0]));
}

#[test]
fn a_sequence_starts_where_its_window_is_kept() {
    let mut driver = with_windows(Some([3; 32]));
    driver.add(request(1, 40, 0, 1));
    driver.run();
    assert_eq!((driver.window_blocks(), driver.blocks()), ([0, 10], [0, 10]));
    // Four of the ten go, those of the beginning.
    driver.add(request(2, 0, 16, 1));
    driver.run();
    assert_eq!((driver.window_blocks(), driver.blocks()), ([0, 10], [0, 14]));
    for (id, common, steps) in [(3, 40, "3 40..41"), (4, 20, "4 0..8, 4 8..16, 4 16..21"), (5, 20, "5 20..21")] {
        driver.add(request(id, common, 1, 1));
        driver.check(&steps.split(", ").collect::<Vec<_>>());
    }
    assert_eq!(driver.window_blocks(), [0, 9], "a block that was not full is free");
    driver.scheduler.set_num_blocks(2);
    assert_eq!(driver.window_blocks(), [0, driver.blocks()[1]], "a block that goes takes its window along");
    driver.scheduler.assert_invariants();
}

#[test]
fn windows_are_shared_while_they_are_in_use() {
    let mut driver = with_windows(Some([3; 32]));
    driver.add(request(1, 24, 0, 9));
    driver.check(&["1 0..8", "1 8..16", "1 16..24"]);
    driver.add(request(2, 24, 1, 9));
    driver.check(&["d1 24..25, 2 24..25"]);
    assert_eq!(driver.window_blocks(), [4, 4], "two of their own, two together, four behind them");
    driver.scheduler.abort(RequestId(1));
    assert_eq!(driver.window_blocks(), [3, 4]);
    driver.scheduler.assert_invariants();
    driver.run();
    assert_eq!(driver.window_blocks()[0], 0);
}

#[test]
fn too_few_blocks_for_windows_are_refused_and_never_outgrown() {
    let window = |num_blocks| Some(WindowConfig { len: 9, num_blocks });
    let config = |window| SchedulerConfig { window, max_num_seqs: 2, ..config(9, 8) };
    let refused = |window| Scheduler::new(config(window)).expect_err("it cannot be used");
    assert_eq!(refused(window(8)), ConfigError::FewWindowBlocks { num_blocks: 8, needed: 9 });
    assert_eq!(refused(Some(WindowConfig { len: 0, num_blocks: 100 })), ConfigError::Zero { name: "window" });
    // As many as there are others: enough while those are no more.
    let mut scheduler = Scheduler::new(config(window(9))).expect("enough");
    assert_eq!(scheduler.set_num_blocks(50), 9);
    let mut scheduler = Scheduler::new(config(window(10))).expect("enough for all");
    assert_eq!(scheduler.set_num_blocks(50), 50);
    let with_source = Request { source_len: 3, ..request(1, 8, 0, 1) };
    let refused = scheduler.add(with_source, Duration::ZERO);
    assert_eq!(refused, Err(AdmissionError::SourceBesideWindows { source_len: 3 }));
}

#[test]
fn many_wait_for_one_and_all_end() {
    let mut driver = Driver::new(40, 16);
    for id in 0..30 {
        driver.add(request(id, 40, (id % 3) as usize, 5));
    }
    let mut computed = HashSet::new();
    let mut num_rows = 0;
    while driver.scheduler.has_work() {
        let step = driver.step();
        num_rows += step.split(", ").filter(|chunk| !chunk.starts_with('d')).count();
        assert!(!step.is_empty(), "somebody gets on in every step");
        computed.insert(step);
    }
    assert!(num_rows < 100 && computed.len() > 10);
    assert_eq!(driver.scheduler.stats().num_prefix_hits, 29 * 40 - 4 * 9, "a whole prompt leaves its last block");
}

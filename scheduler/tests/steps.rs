//! What single steps look like: tables of what happens before a step and the batch and progress that come of it.

use std::time::Duration;

use scheduler::{
    AdmissionError, ConfigError, FinishReason, Outcome, Phase, Request, RequestId, Scheduler, SchedulerConfig,
    StopCriteria, Update,
};

/// Sampled in every row; the stop token of no request unless the test says so.
const TOKEN: u32 = 7;

#[derive(Clone, Copy)]
enum Before {
    /// Id, prompt tokens, tokens to generate.
    Add(u64, usize, usize),
    /// Id, tokens for the encoder (the decoder starts from one more), tokens to generate.
    AddSource(u64, usize, usize),
    Abort(u64),
    Preempt(u64),
    Blocks(usize),
    /// The time of the next step, in milliseconds.
    At(u64),
    /// The row of this request cannot be sampled in the next step.
    Fail(u64),
}
use Before::{Abort, Add, AddSource, At, Blocks, Fail, Preempt};

fn config(block_size: usize, num_blocks: usize, max_num_seqs: usize, max_num_batched_tokens: usize) -> SchedulerConfig {
    SchedulerConfig {
        block_size,
        num_blocks,
        num_state_slots: 0,
        num_snapshot_slots: 0,
        snapshot_interval: 1,
        window: None,
        max_num_seqs,
        max_num_batched_tokens,
        max_model_len: 1000,
        max_queue: 100,
        prefix_cache: None,
        batch_timeout: Duration::ZERO,
    }
}

fn request(id: u64, prompt_len: usize, max_tokens: usize) -> Request {
    let stop = StopCriteria { max_tokens, ..StopCriteria::default() };
    let prompt = vec![1; prompt_len].into();
    Request {
        id: RequestId(id),
        prompt,
        source_len: 0,
        stop,
        cache_salt: [0; 32],
        num_loadable: 0,
        computes_whole_prompt: false,
    }
}

/// Runs one step per row. A step reads: `e`ncode, `p`refill or `d`ecode, id and positions of each chunk, `*` where it samples;
/// `-id` for the preempted; `@ms` for the end of the batch window; after `>`, `.` for a token, `end` and `failed`.
fn check(config: SchedulerConfig, rows: &[(&[Before], &str)]) {
    let mut scheduler = Scheduler::new(config).expect("the limits are valid");
    let mut now = Duration::ZERO;
    for (row, (before, expected)) in rows.iter().enumerate() {
        let mut failing = Vec::new();
        for &event in *before {
            match event {
                Add(id, prompt_len, max_tokens) => {
                    scheduler.add(request(id, prompt_len, max_tokens), now).expect("the request fits")
                }
                AddSource(id, source_len, max_tokens) => {
                    let request = Request { source_len, ..request(id, source_len + 1, max_tokens) };
                    scheduler.add(request, now).expect("the request fits")
                }
                Abort(id) => assert!(scheduler.abort(RequestId(id))),
                Preempt(id) => assert!(scheduler.preempt(RequestId(id))),
                Blocks(total) => drop(scheduler.set_num_blocks(total)),
                At(ms) => now = Duration::from_millis(ms),
                Fail(id) => failing.push(RequestId(id)),
            }
        }
        assert_eq!(step(&mut scheduler, now, &failing), *expected, "step {row}");
        scheduler.assert_invariants();
    }
}

fn step(scheduler: &mut Scheduler, now: Duration, failing: &[RequestId]) -> String {
    let batch = scheduler.schedule(now);
    scheduler.assert_invariants();
    let mut text = String::new();
    let mut outcomes = Vec::new();
    for chunk in &batch.chunks {
        let phase = match chunk.phase {
            Phase::Encode => 'e',
            Phase::Prefill => 'p',
            Phase::Decode => 'd',
        };
        let mark = if chunk.samples { "*" } else { "" };
        text += &format!("{phase}{} {}..{}{mark} ", chunk.id.0, chunk.start, chunk.start + chunk.len);
        if chunk.samples {
            outcomes.push(if failing.contains(&chunk.id) { Outcome::Failed } else { Outcome::Token(TOKEN) });
        }
    }
    for id in &batch.preempted {
        text += &format!("-{} ", id.0);
    }
    if let Some(wake_at) = batch.wake_at {
        text += &format!("@{} ", wake_at.as_millis());
    }
    text.push('>');
    for progress in scheduler.complete(&batch, &outcomes) {
        let update = match progress.update {
            Update::Token { finished: None, .. } => ".",
            Update::Token { .. } => "end",
            Update::Failed => "failed",
        };
        text += &format!(" {}{update}", progress.id.0);
    }
    text
}

#[test]
fn prompts_are_chunked_around_decodes() {
    check(
        config(4, 100, 8, 4),
        &[
            (&[Add(1, 3, 3), Add(2, 6, 2)], "p1 0..3* p2 0..1 > 1."),
            (&[], "d1 3..4* p2 1..4 > 1."),
            (&[Add(3, 1, 1)], "d1 4..5* p2 4..6* p3 0..1* > 1end 2. 3end"),
            (&[], "d2 6..7* > 2end"),
            (&[], ">"),
        ],
    );
}

#[test]
fn new_requests_join_in_order_of_arrival() {
    check(
        config(4, 100, 2, 8),
        &[
            (&[Add(1, 2, 2), Add(2, 2, 3), Add(3, 2, 1)], "p1 0..2* p2 0..2* > 1. 2."),
            (&[], "d1 2..3* d2 2..3* > 1end 2."),
            (&[Add(4, 2, 1)], "d2 3..4* p3 0..2* > 2end 3end"),
            (&[], "p4 0..2* > 4end"),
        ],
    );
}

#[test]
fn no_more_run_than_get_a_row_each() {
    check(
        config(4, 100, 8, 2),
        &[
            (&[Add(1, 1, 3), Add(2, 1, 3), Add(3, 1, 1)], "p1 0..1* p2 0..1* > 1. 2."),
            (&[], "d1 1..2* d2 1..2* > 1. 2."),
            (&[], "d1 2..3* d2 2..3* > 1end 2end"),
            (&[], "p3 0..1* > 3end"),
        ],
    );
}

#[test]
fn the_youngest_gives_way_and_is_computed_again() {
    check(
        config(2, 4, 8, 16),
        &[
            (&[Add(1, 2, 4), Add(2, 1, 4)], "p1 0..2* p2 0..1* > 1. 2."),
            (&[], "d1 2..3* d2 1..2* > 1. 2."),
            (&[], "d1 3..4* d2 2..3* > 1. 2."),
            (&[], "d1 4..5* -2 > 1end"),
            (&[], "p2 0..4* > 2end"),
        ],
    );
}

#[test]
fn the_youngest_may_be_the_one_in_need() {
    check(
        config(2, 3, 8, 16),
        &[
            (&[Add(1, 3, 3)], "p1 0..3* > 1."),
            (&[Add(2, 1, 2)], "d1 3..4* > 1."),
            (&[Preempt(1)], "p1 0..5* > 1end"),
            (&[Add(3, 4, 2)], "p2 0..1* p3 0..4* > 2. 3."),
            (&[], "d2 1..2* -3 > 2end"),
            (&[], "p3 0..5* > 3end"),
        ],
    );
}

#[test]
fn admission_leaves_a_block_to_each_that_may_grow() {
    check(
        config(2, 4, 8, 16),
        &[
            (&[Add(1, 2, 3), Add(2, 5, 1)], "p1 0..2* > 1."),
            (&[], "d1 2..3* > 1."),
            (&[], "d1 3..4* > 1end"),
            (&[], "p2 0..5* > 2end"),
        ],
    );
}

#[test]
fn preempted_ones_come_back_before_new_ones() {
    check(
        config(4, 100, 2, 16),
        &[
            (&[Add(1, 2, 3), Add(2, 2, 3), Add(3, 1, 1)], "p1 0..2* p2 0..2* > 1. 2."),
            (&[Preempt(1)], "d2 2..3* p1 0..3* > 2. 1."),
            (&[Preempt(2), Preempt(1)], "p1 0..4* p2 0..4* > 1end 2end"),
            (&[], "p3 0..1* > 3end"),
        ],
    );
}

#[test]
fn aborts_and_failures_end_only_their_own() {
    check(
        config(4, 100, 2, 16),
        &[
            (&[Add(1, 2, 9), Add(2, 2, 9), Add(3, 2, 9), Add(4, 2, 9)], "p1 0..2* p2 0..2* > 1. 2."),
            (&[Abort(3), Fail(1)], "d1 2..3* d2 2..3* > 1failed 2."),
            (&[Abort(2)], "p4 0..2* > 4."),
        ],
    );
}

#[test]
fn a_failed_row_of_a_running_prefill_is_not_asked_for() {
    check(config(4, 100, 2, 2), &[(&[Add(1, 3, 9), Fail(1)], "p1 0..2 >"), (&[Fail(1)], "p1 2..3* > 1failed")]);
}

#[test]
fn encoders_run_whole_and_take_turns_with_decodes() {
    check(
        config(4, 100, 8, 4),
        &[
            // Longer than a step may be: alone.
            (&[AddSource(1, 6, 3), AddSource(2, 2, 2), AddSource(3, 2, 1)], "e1 0..6 >"),
            (&[], "p1 6..7* > 1."),
            (&[], "e2 0..2 e3 0..2 >"),
            (&[AddSource(4, 5, 1)], "d1 7..8* p2 2..3* p3 2..3* > 1. 2. 3end"),
            (&[], "e4 0..5 >"),
            // What is preempted reads its source again; what it generated can be cut.
            (&[Preempt(1)], "d2 3..4* p4 5..6* > 2end 4end"),
            (&[], "e1 0..6 >"),
            (&[], "p1 6..9* > 1end"),
        ],
    );
}

#[test]
fn kinds_of_requests_wait_in_one_queue() {
    check(
        config(4, 100, 8, 8),
        &[
            (&[Add(1, 2, 3), AddSource(2, 2, 1), Add(3, 2, 1)], "p1 0..2* > 1."),
            (&[], "e2 0..2 >"),
            (&[], "d1 2..3* p2 2..3* p3 0..2* > 1. 2end 3end"),
        ],
    );
}

#[test]
fn no_more_run_than_have_a_state_slot() {
    check(
        SchedulerConfig { num_state_slots: 2, ..config(4, 100, 8, 8) },
        &[
            (&[Add(1, 1, 2), Add(2, 1, 3), Add(3, 1, 1)], "p1 0..1* p2 0..1* > 1. 2."),
            (&[], "d1 1..2* d2 1..2* > 1end 2."),
            (&[Add(4, 1, 1)], "d2 2..3* p3 0..1* > 2end 3end"),
            (&[Add(5, 1, 2)], "p4 0..1* p5 0..1* > 4end 5."),
            (&[Preempt(5), Add(6, 1, 1)], "p5 0..2* p6 0..1* > 5end 6end"),
        ],
    );
}

#[test]
fn an_idle_scheduler_gathers_requests() {
    let config = SchedulerConfig { batch_timeout: Duration::from_millis(10), ..config(4, 100, 3, 16) };
    check(
        config.clone(),
        &[
            (&[At(5), Add(1, 1, 2)], "@15 >"),
            (&[At(14), Add(2, 1, 1)], "@15 >"),
            (&[At(15)], "p1 0..1* p2 0..1* > 1. 2end"),
            // Nobody waits for company while something runs.
            (&[At(16), Add(3, 1, 1)], "d1 1..2* p3 0..1* > 1end 3end"),
            (&[At(20), Add(4, 1, 1), Add(5, 1, 1)], "@30 >"),
            (&[Add(6, 1, 1)], "p4 0..1* p5 0..1* p6 0..1* > 4end 5end 6end"),
            (&[At(40), Add(7, 1, 1)], "@50 >"),
            (&[Abort(7)], ">"),
        ],
    );
    let short_queue = SchedulerConfig { max_queue: 1, ..config };
    check(short_queue, &[(&[Add(1, 1, 1)], "p1 0..1* > 1end")]);
}

#[test]
fn the_pool_follows_its_limit() {
    check(
        config(2, 2, 8, 16),
        &[
            (&[Add(1, 3, 2), Add(2, 2, 1)], "p1 0..3* > 1."),
            (&[Blocks(3)], "d1 3..4* p2 0..2* > 1end 2end"),
            (&[Add(3, 6, 1), Blocks(1), Add(4, 1, 1)], "p3 0..6* > 3end"),
            (&[], "p4 0..1* > 4end"),
        ],
    );
}

#[test]
fn shrinking_waits_for_accepted_requests() {
    let mut scheduler = Scheduler::new(config(2, 5, 8, 16)).unwrap();
    scheduler.add(request(1, 6, 1), Duration::ZERO).unwrap();
    assert_eq!(scheduler.set_num_blocks(1), 3);
    let refused = AdmissionError::NeverFits { needed: 2, total: 1 };
    assert_eq!(scheduler.add(request(2, 3, 1), Duration::ZERO), Err(refused));
    assert!(scheduler.abort(RequestId(1)));
    assert_eq!(scheduler.stats().num_total_blocks, 1);
    assert_eq!(scheduler.set_num_blocks(0), 1);
    assert_eq!(scheduler.set_num_blocks(4), 4);
    scheduler.assert_invariants();
}

#[test]
fn rows_of_the_lost_are_skipped_when_the_batch_completes() {
    let mut scheduler = Scheduler::new(config(4, 100, 8, 16)).unwrap();
    (1..=3).for_each(|id| scheduler.add(request(id, 2, 2), Duration::ZERO).unwrap());
    let batch = scheduler.schedule(Duration::ZERO);
    assert!(scheduler.abort(RequestId(1)));
    assert!(scheduler.preempt(RequestId(2)));
    assert!(!scheduler.preempt(RequestId(2)));
    let progress = scheduler.complete(&batch, &[5, 6, 7].map(Outcome::Token));
    assert_eq!(progress.len(), 1);
    assert_eq!(progress[0].update, Update::Token { token: 7, is_stop: false, finished: None });
    let preempted = scheduler.sequence(RequestId(2)).unwrap();
    assert_eq!((preempted.num_generated(), preempted.num_preemptions()), (0, 1));
    assert_eq!(step(&mut scheduler, Duration::ZERO, &[]), "d3 2..3* p2 0..2* > 3end 2.");
}

#[test]
fn unfit_requests_are_refused() {
    let limits = SchedulerConfig { max_model_len: 20, max_queue: 1, ..config(4, 3, 8, 16) };
    let check = |prompt_len, max_tokens, expected| {
        let mut scheduler = Scheduler::new(limits.clone()).unwrap();
        assert_eq!(scheduler.add(request(1, prompt_len, max_tokens), Duration::ZERO), expected);
        assert_eq!(scheduler.has_work(), expected.is_ok());
    };
    check(0, 1, Err(AdmissionError::EmptyPrompt));
    check(20, 1, Err(AdmissionError::TooLong { prompt_len: 20, max_tokens: 1, limit: 20 }));
    check(1, usize::MAX, Err(AdmissionError::TooLong { prompt_len: 1, max_tokens: usize::MAX, limit: 20 }));
    check(20, 0, Err(AdmissionError::TooLong { prompt_len: 20, max_tokens: 1, limit: 20 }));
    check(12, 2, Err(AdmissionError::NeverFits { needed: 4, total: 3 }));
    // The last token is sampled but never computed.
    check(12, 1, Ok(()));
    let mut scheduler = Scheduler::new(limits.clone()).unwrap();
    let all_source = Request { source_len: 3, ..request(1, 3, 1) };
    let refused = AdmissionError::NothingToDecode { source_len: 3, prompt_len: 3 };
    assert_eq!(scheduler.add(all_source, Duration::ZERO), Err(refused));
    let mut scheduler = Scheduler::new(limits.clone()).unwrap();
    scheduler.add(request(1, 1, 1), Duration::ZERO).unwrap();
    assert_eq!(scheduler.add(request(2, 1, 1), Duration::ZERO), Err(AdmissionError::QueueFull { limit: 1 }));
}

#[test]
fn sequences_end_where_their_criteria_say() {
    let check = |max_tokens, min_tokens, is_stop_token: bool, expected: &[Option<FinishReason>]| {
        let stop_token_ids = if is_stop_token { vec![3, TOKEN] } else { vec![3] };
        let stop = StopCriteria { max_tokens, min_tokens, stop_token_ids };
        let mut scheduler = Scheduler::new(config(4, 100, 8, 16)).unwrap();
        scheduler.add(Request { stop, ..request(1, 2, 1) }, Duration::ZERO).unwrap();
        let mut seen = Vec::new();
        while scheduler.has_work() {
            let batch = scheduler.schedule(Duration::ZERO);
            let progress = scheduler.complete(&batch, &[Outcome::Token(TOKEN)]);
            let Update::Token { token: TOKEN, is_stop, finished } = progress[0].update else { panic!("{progress:?}") };
            assert_eq!(is_stop, matches!(finished, Some(FinishReason::Stop(_))));
            seen.push(finished);
        }
        assert_eq!(seen, expected);
        assert_eq!(scheduler.stats().num_used_blocks, 0);
    };
    let (length, stop) = (Some(FinishReason::Length), Some(FinishReason::Stop(TOKEN)));
    check(3, 0, false, &[None, None, length]);
    check(3, 0, true, &[stop]);
    check(3, 1, true, &[None, stop]);
    check(3, 2, true, &[None, None, stop]);
    check(3, 3, true, &[None, None, length]);
    check(0, 0, false, &[length]);
}

#[test]
fn limits_of_zero_are_refused() {
    let zero = |name| Some(ConfigError::Zero { name });
    let check = |config: SchedulerConfig, expected| assert_eq!(Scheduler::new(config).err(), expected);
    check(config(1, 1, 1, 1), None);
    check(config(0, 1, 1, 1), zero("block_size"));
    check(config(1, 0, 1, 1), zero("num_blocks"));
    check(config(1, 1, 0, 1), zero("max_num_seqs"));
    check(config(1, 1, 1, 0), zero("max_num_batched_tokens"));
    check(SchedulerConfig { max_model_len: 0, ..config(1, 1, 1, 1) }, zero("max_model_len"));
    check(SchedulerConfig { max_queue: 0, ..config(1, 1, 1, 1) }, zero("max_queue"));
    let num_blocks = usize::MAX;
    check(config(1, num_blocks, 1, 1), Some(ConfigError::TooManyBlocks { num_blocks, limit: u32::MAX }));
    let num_state_slots = usize::MAX;
    let too_many = ConfigError::TooManyStateSlots { num_slots: num_state_slots, limit: u32::MAX };
    check(SchedulerConfig { num_state_slots, ..config(1, 1, 1, 1) }, Some(too_many.clone()));
    let num_snapshot_slots = usize::MAX;
    check(SchedulerConfig { num_state_slots: 1, num_snapshot_slots, ..config(1, 1, 1, 1) }, Some(too_many));
    check(SchedulerConfig { snapshot_interval: 0, ..config(1, 1, 1, 1) }, zero("snapshot_interval"));
}

#[test]
#[should_panic(expected = "the batch before was not completed")]
fn schedule_and_complete_take_turns() {
    let mut scheduler = Scheduler::new(config(4, 100, 8, 16)).unwrap();
    scheduler.add(request(1, 2, 2), Duration::ZERO).unwrap();
    scheduler.schedule(Duration::ZERO);
    scheduler.schedule(Duration::ZERO);
}

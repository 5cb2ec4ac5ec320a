//! The engine as a caller meets it: submit, events, refusal, abort, shutdown.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use crate::driver::golden_dir;
use bytes::Bytes;
use engine::sampling::params::SamplingParams;
use engine::{
    BlockName, EngineConfig, EngineHandle, Event, ExpertOptions, FinishReason, GenerateRequest, Generation,
    GenerationError, KvDtype, LoadTicket, PrefixHint, PrefixTier, StopCriteria, SubmitError, WeightQuant, load,
};

fn config(dir: &Path) -> EngineConfig {
    EngineConfig { kv_cache_memory: Some(4 << 20), max_model_len: Some(2048), ..EngineConfig::new(dir) }
}

fn start(config: EngineConfig) -> EngineHandle {
    load(config, &mut |_| {}).expect("a golden model loads")
}

fn request(prompt: &[u32], max_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        prompt: prompt.into(),
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        stop: StopCriteria { max_tokens, ..StopCriteria::default() },
        cache_salt: [0; 32],
        prefix: PrefixHint::default(),
        experts: ExpertOptions::default(),
        wants_routed_experts: false,
        wants_expert_use: false,
        expected_experts: None,
    }
}

fn events(mut generation: Generation) -> Vec<Event> {
    std::iter::from_fn(|| generation.next_blocking()).collect()
}

fn tokens(events: &[Event]) -> Vec<u32> {
    let token = |event: &Event| match event {
        Event::Token(sampled) => Some(sampled.token),
        _ => None,
    };
    events.iter().filter_map(token).collect()
}

fn await_token(generation: &mut Generation) {
    while !matches!(generation.next_blocking().expect("an event"), Event::Token(_)) {}
}

/// Waits for a condition of the engine's counters.
fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not come about");
        std::thread::yield_now();
    }
}

#[test]
fn every_event_comes_once_and_in_order() {
    let engine = start(config(&golden_dir("mixtral-base")));
    let sampling =
        SamplingParams { temperature: 0.0, logprobs: Some(2), prompt_logprobs: Some(1), ..SamplingParams::default() };
    let generation = engine.submit(GenerateRequest { sampling, ..request(&[1, 54, 70, 99], 5) }).expect("accepted");
    let events = events(generation);
    assert!(matches!(events[0], Event::Scheduled { .. }));
    let Event::PromptLogprobs(prompt) = &events[1] else { panic!("prompt log-probs come before tokens: {events:?}") };
    assert_eq!(prompt.iter().map(|entry| entry.token).collect::<Vec<_>>(), [54, 70, 99]);
    assert!(prompt.iter().all(|entry| entry.logprob <= entry.top[0].1 && entry.top.len() == 1));
    assert_eq!(tokens(&events).len(), 5);
    for event in &events[2..7] {
        let Event::Token(sampled) = event else { panic!("tokens follow: {events:?}") };
        assert_eq!(sampled.top[0], (sampled.token, sampled.logprob.expect("asked for")), "greedy takes the best");
    }
    assert!(matches!(events[7], Event::Finished(FinishReason::Length)));
    assert_eq!(events.len(), 8);
    let stats = engine.stats();
    assert_eq!((stats.num_prompt_tokens, stats.num_generation_tokens, stats.num_used_blocks), (4, 5, 0));
}

/// Tokens of the prompt that came from the cache, and what was generated.
fn cached_and_tokens(engine: &EngineHandle, request: GenerateRequest) -> (usize, Vec<u32>) {
    let events = events(engine.submit(request).expect("accepted"));
    let Some(Event::Scheduled { num_cached_tokens, .. }) = events.first() else { panic!("it starts: {events:?}") };
    (*num_cached_tokens, tokens(&events))
}

#[test]
fn a_prefix_is_computed_once_for_each_salt() {
    let engine = start(config(&golden_dir("mixtral-base")));
    let prompt: Vec<u32> = (3..43).collect();
    let salted = |salt| GenerateRequest { cache_salt: [salt; 32], ..request(&prompt, 5) };
    let (cold, expected) = cached_and_tokens(&engine, salted(0));
    assert_eq!((cold, cached_and_tokens(&engine, salted(0))), (0, (32, expected.clone())));
    assert_eq!(cached_and_tokens(&engine, salted(1)), (0, expected.clone()));
    let all = SamplingParams { prompt_logprobs: Some(0), temperature: 0.0, ..SamplingParams::default() };
    let with_logprobs = GenerateRequest { sampling: all, ..salted(0) };
    assert_eq!(cached_and_tokens(&engine, with_logprobs), (0, expected.clone()));
    let stats = engine.stats();
    assert_eq!((stats.num_prompt_tokens, stats.num_prefix_queries, stats.num_prefix_hits), (160, 120, 32));
    assert_eq!((stats.num_used_blocks, stats.num_cached_blocks), (0, 4));
    let off = start(EngineConfig { enable_prefix_caching: false, ..config(&golden_dir("mixtral-base")) });
    for _ in 0..2 {
        assert_eq!(cached_and_tokens(&off, salted(0)), (0, expected.clone()));
    }
    assert!(engine.model().has_prefix_cache && !off.model().has_prefix_cache);
    assert_eq!(off.stats().num_prefix_queries, 0);
}

#[test]
fn a_fingerprint_tells_models_and_numerics_apart() {
    let fingerprint = |config: EngineConfig| {
        let engine = start(config);
        let found = engine.fingerprint();
        (found.numerics(), found.whole())
    };
    let base = || config(&golden_dir("mixtral-base"));
    let first = fingerprint(base());
    assert_eq!(fingerprint(base()), first);
    // One byte of one weight; nothing that is known before the weights are read.
    let edited = with_nan_embedding(77, "fingerprint");
    let other_weights = fingerprint(config(&edited));
    assert!(other_weights.0 == first.0 && other_weights.1 != first.1);
    std::fs::remove_dir_all(edited).expect("the temporary folder goes");
    let others = [
        EngineConfig { quant: WeightQuant::Int8, ..base() },
        EngineConfig { kv_dtype: KvDtype::F32, ..base() },
        EngineConfig { block_size: 8, ..base() },
        config(&golden_dir("olmoe-base")),
    ];
    for other in others {
        let found = fingerprint(other);
        assert!(found.0 != first.0 && found.1 != first.1);
    }
}

#[test]
fn stop_tokens_end_a_sequence_and_min_tokens_holds_them_off() {
    let engine = start(config(&golden_dir("mixtral-base")));
    let free = tokens(&events(engine.submit(request(&[1, 54], 8)).expect("accepted")));
    let with_stop = |min_tokens| {
        let stop = StopCriteria { max_tokens: 8, min_tokens, stop_token_ids: vec![free[2]] };
        events(engine.submit(GenerateRequest { stop, ..request(&[1, 54], 8) }).expect("accepted"))
    };
    let stopped = with_stop(0);
    assert_eq!(tokens(&stopped), free[..3]);
    assert!(matches!(&stopped[3], Event::Token(sampled) if sampled.is_stop));
    assert!(matches!(stopped[4], Event::Finished(FinishReason::Stop(token)) if token == free[2]));
    let held = tokens(&with_stop(5));
    assert!(held.len() >= 5 && !held[..5].contains(&free[2]), "{held:?}");
}

#[test]
fn a_dropped_generation_frees_its_blocks() {
    let engine = start(config(&golden_dir("mixtral-base")));
    let mut long = engine.submit(request(&[1, 54, 70], 2000)).expect("accepted");
    await_token(&mut long);
    assert!(engine.stats().num_total_blocks > 0);
    drop(long);
    eventually("an idle engine", || {
        let stats = engine.stats();
        stats.num_running == 0 && stats.num_used_blocks == 0
    });
    assert!(engine.stats().num_generation_tokens < 2000, "it was aborted, not finished");
}

#[test]
fn what_can_never_run_is_refused_at_the_door() {
    let check = |engine: &EngineHandle, request, expect: &str| {
        assert_eq!(engine.submit(request).map(drop).expect_err("refused").to_string(), expect);
    };
    let engine = start(config(&golden_dir("mixtral-base")));
    check(&engine, request(&[], 4), "the prompt is empty");
    check(&engine, request(&[384], 4), "token id 384 is out of range, the vocabulary has 384 entries");
    let too_long = "prompt has 2 tokens and 2047 are to be generated, the limit is 2048 in all";
    check(&engine, request(&[1, 2], 2047), too_long);
    let no_room = "prompt has 2048 tokens and 1 are to be generated, the limit is 2048 in all";
    check(&engine, request(&[1; 2048], 0), no_room);
    assert_eq!(tokens(&events(engine.submit(request(&[1; 2047], 0)).expect("accepted"))).len(), 1);
}

#[test]
fn a_full_queue_refuses_and_loses_nothing() {
    let engine = start(EngineConfig { max_num_seqs: 1, max_queue: 2, ..config(&golden_dir("mixtral-base")) });
    let mut running = engine.submit(request(&[1, 54], 1500)).expect("accepted");
    await_token(&mut running); // it runs, so it waits no more
    let waiting: Vec<Generation> = (0..2).map(|_| engine.submit(request(&[1, 54], 3)).expect("accepted")).collect();
    assert_eq!(engine.submit(request(&[1], 3)).expect_err("refused"), SubmitError::QueueFull { limit: 2 });
    drop(running);
    for generation in waiting {
        assert_eq!(tokens(&events(generation)).len(), 3);
    }
    assert_eq!(tokens(&events(engine.submit(request(&[1], 3)).expect("room again"))).len(), 3);
}

#[test]
fn shutdown_ends_every_request_exactly_once() {
    let engine = start(EngineConfig { max_num_seqs: 2, ..config(&golden_dir("mixtral-base")) });
    let mut generations: Vec<Generation> =
        (0..5).map(|_| engine.submit(request(&[1, 54], 2000)).expect("accepted")).collect();
    await_token(&mut generations[0]);
    engine.shutdown();
    for generation in generations {
        assert_eq!(events(generation).last(), Some(&Event::Failed(GenerationError::ShuttingDown)));
    }
    assert_eq!(engine.submit(request(&[1], 3)).expect_err("closed"), SubmitError::ShuttingDown);
    assert_eq!(engine.stats().num_used_blocks, 0);
}

#[test]
fn settings_that_do_not_fit_the_model_are_refused() {
    let check = |config: EngineConfig, expect: &str| {
        assert_eq!(load(config, &mut |_| {}).map(drop).expect_err("refused").to_string(), expect);
    };
    let base = config(&golden_dir("mixtral-base"));
    let too_long = "max_model_len is 4097, allowed are at most 4096, the model's max_position_embeddings";
    check(EngineConfig { max_model_len: Some(4097), ..base.clone() }, too_long);
    let odd = "block_size is 24, allowed are powers of two from 1 to 256";
    check(EngineConfig { block_size: 24, ..base.clone() }, odd);
    check(EngineConfig { max_num_seqs: 0, ..base }, "max_num_seqs is 0, allowed are 1 to 65536");
}

/// A copy of a golden model whose embedding of `token` is not a number.
fn with_nan_embedding(token: usize, purpose: &str) -> std::path::PathBuf {
    let source = golden_dir("mixtral-base");
    let dir = std::env::temp_dir().join(format!("moesaic-nan-{purpose}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a temporary folder");
    for name in ["config.json", "generation_config.json"] {
        std::fs::copy(source.join(name), dir.join(name)).expect("a copy");
    }
    let mut bytes = std::fs::read(source.join("model.safetensors")).expect("the checkpoint");
    let header_len = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header_len]).expect("a header");
    let info = &header["model.embed_tokens.weight"];
    let width = info["shape"][1].as_u64().expect("a width") as usize;
    let start = 8 + header_len + info["data_offsets"][0].as_u64().expect("an offset") as usize + token * width * 2;
    bytes[start..start + 2].copy_from_slice(&0x7fc0u16.to_le_bytes()); // bf16 NaN
    std::fs::write(dir.join("model.safetensors"), bytes).expect("a checkpoint");
    dir
}

#[test]
fn a_row_of_nan_ends_its_own_request_only() {
    let dir = with_nan_embedding(77, "rows");
    let engine = start(config(&dir));
    let healthy = engine.submit(request(&[1, 54, 70], 200)).expect("accepted");
    let corrupted = engine.submit(request(&[1, 77, 70], 200)).expect("accepted");
    assert_eq!(events(corrupted)[1..], [Event::Failed(GenerationError::CorruptedLogits)]);
    let intact = start(config(&golden_dir("mixtral-base")));
    let expected = intact.submit(request(&[1, 54, 70], 200)).expect("accepted");
    assert_eq!(tokens(&events(healthy)), tokens(&events(expected)));
    assert_eq!(engine.stats().num_corrupted, 1);
    std::fs::remove_dir_all(dir).expect("the temporary folder goes");
}

/// A tier that is asked and answers when the test says so.
struct Slow {
    stored: Arc<Mutex<HashMap<BlockName, Bytes>>>,
    tickets: mpsc::Sender<(Vec<BlockName>, LoadTicket)>,
}

impl PrefixTier for Slow {
    fn wants(&self, name: &BlockName) -> bool {
        !self.stored.lock().expect("no test panics with it").contains_key(name)
    }

    fn store(&mut self, name: BlockName, bytes: Bytes) {
        self.stored.lock().expect("no test panics with it").insert(name, bytes);
    }

    fn load(&mut self, names: Vec<BlockName>, ticket: LoadTicket) {
        self.tickets.send((names, ticket)).expect("the test listens");
    }
}

#[test]
fn who_waits_for_blocks_holds_nobody_up_and_takes_what_comes() {
    let (sender, tickets) = mpsc::channel();
    let stored = Arc::new(Mutex::new(HashMap::new()));
    let prompt: Vec<u32> = (0..70).map(|idx| 3 + idx * 5 % 300).collect();
    let computed = {
        let engine = start(config(&golden_dir("mixtral-base")));
        engine.attach_prefix_tier(Box::new(Slow { stored: stored.clone(), tickets: sender.clone() }));
        events(engine.submit(request(&prompt, 5)).expect("accepted"))
    };
    assert_eq!(stored.lock().expect("nobody panicked").len(), 4);
    let engine = start(config(&golden_dir("mixtral-base")));
    engine.attach_prefix_tier(Box::new(Slow { stored: stored.clone(), tickets: sender }));
    let known = || {
        let hint = PrefixHint { num_blocks: 4, seconds_per_block: None };
        engine.submit(GenerateRequest { prefix: hint, ..request(&prompt, 5) }).expect("accepted")
    };
    let cached = |events: &[Event]| match events[0] {
        Event::Scheduled { num_cached_tokens, .. } => num_cached_tokens,
        _ => panic!("{events:?}"),
    };
    // Half of it comes, after others were served.
    let waiting = known();
    let (names, ticket) = tickets.recv().expect("it is asked for");
    assert_eq!(names.len(), 4);
    events(engine.submit(request(&[9, 8, 7], 3)).expect("accepted"));
    let of =
        |names: &[BlockName]| names.iter().map(|name| stored.lock().expect("nobody panicked")[name].clone()).collect();
    ticket.finish(of(&names[..2]));
    let first = events(waiting);
    assert_eq!((cached(&first), tokens(&first)), (32, tokens(&computed)));
    assert_eq!(engine.stats().num_loaded, 32);
    // Another salt: nothing of it is in the pool. Nothing comes, or what is no block, or too late.
    for (salt, answer) in [(1, None), (2, Some(vec![Bytes::from_static(b"short")]))] {
        let hint = PrefixHint { num_blocks: 4, seconds_per_block: None };
        let of_salt = GenerateRequest { prefix: hint, cache_salt: [salt; 32], ..request(&prompt, 5) };
        let waiting = engine.submit(of_salt).expect("accepted");
        let (_, ticket) = tickets.recv().expect("it is asked for");
        match answer {
            None => drop(ticket),
            Some(blocks) => ticket.finish(blocks),
        }
        let answer = events(waiting);
        assert_eq!((cached(&answer), tokens(&answer)), (0, tokens(&computed)));
    }
    let hint = PrefixHint { num_blocks: 4, seconds_per_block: None };
    let late = GenerateRequest { prefix: hint, cache_salt: [3; 32], ..request(&prompt, 5) };
    let abandoned = engine.submit(late.clone()).expect("accepted");
    let (names, ticket) = tickets.recv().expect("it is asked for");
    drop(abandoned);
    events(engine.submit(request(&[9, 8, 7, 6], 3)).expect("accepted"));
    ticket.finish(of(&names[..0]));
    // The engine ends while a sequence waits.
    let last = engine.submit(GenerateRequest { cache_salt: [4; 32], ..late }).expect("accepted");
    let (_, ticket) = tickets.recv().expect("it is asked for");
    engine.shutdown();
    assert_eq!(events(last).last(), Some(&Event::Failed(GenerationError::ShuttingDown)));
    drop(ticket);
}

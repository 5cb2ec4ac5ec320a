//! Options of routing as a caller meets them: what they change, what they leave alone, and what is told of experts' cost.

use std::collections::BTreeSet;
use std::path::Path;

use engine::sampling::params::SamplingParams;
use engine::{
    Capacity, EngineConfig, EngineHandle, Event, ExpertConfig, ExpertMemory, ExpertOptions, ExpertTraffic, ExpertUse,
    ExpertWarmup, GenerateRequest, KvDtype, ModelSummary, NO_EXPERT, Overflow, PackFormat, PrefixHint, RoutingOptions,
    StopCriteria, SubmitError, load,
};

use crate::driver::golden_dir;
use crate::weight_quant::Packed;

const PROMPT: [u32; 40] = {
    let mut prompt = [0; 40];
    let mut i = 0;
    while i < prompt.len() {
        prompt[i] = 3 + (i as u32 * 37) % 360;
        i += 1;
    }
    prompt
};

fn config(dir: &Path, routing: RoutingOptions) -> EngineConfig {
    EngineConfig {
        routing,
        kv_dtype: KvDtype::F32,
        kv_cache_memory: Some(4 << 20),
        max_model_len: Some(256),
        ..EngineConfig::new(dir)
    }
}

fn start(folder: &str, routing: RoutingOptions) -> EngineHandle {
    load(config(&golden_dir(folder), routing), &mut |_| {}).expect("a golden model loads")
}

fn request(experts: ExpertOptions) -> GenerateRequest {
    GenerateRequest {
        prompt: PROMPT.into(),
        sampling: SamplingParams { temperature: 0.0, logprobs: Some(1), ..SamplingParams::default() },
        stop: StopCriteria { max_tokens: 8, ..StopCriteria::default() },
        cache_salt: [0; 32],
        prefix: PrefixHint::default(),
        experts,
        wants_routed_experts: true,
        wants_expert_use: true,
        expected_experts: None,
    }
}

/// Tokens with their log-probs, experts of all but the last token, and what they cost.
#[derive(Debug, Default, PartialEq)]
struct Answer {
    tokens: Vec<(u32, Option<f32>)>,
    experts: Vec<u16>,
    cost: ExpertUse,
    num_cached: usize,
}

fn answer(engine: &EngineHandle, experts: ExpertOptions) -> Answer {
    answer_to(engine, request(experts))
}

fn answer_to(engine: &EngineHandle, request: GenerateRequest) -> Answer {
    let prompt_len = request.prompt.len();
    let mut generation = engine.submit(request).expect("accepted");
    let mut answer = Answer::default();
    while let Some(event) = generation.next_blocking() {
        match event {
            Event::Scheduled { num_cached_tokens, .. } => answer.num_cached = num_cached_tokens,
            Event::Token(sampled) => {
                answer.tokens.push((sampled.token, sampled.logprob));
                answer.experts.extend(sampled.routed_experts);
                let cost = *sampled.expert_use.expect("asked for");
                assert_eq!(cost.of_prompt, answer.tokens.len() == 1);
                answer.cost.merge(cost);
            }
            Event::Finished(_) => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(answer.cost.num_tokens, prompt_len + answer.tokens.len() - 1);
    answer
}

fn plain() -> ExpertOptions {
    ExpertOptions::default()
}

fn limited(factor: f32, overflow: Overflow) -> RoutingOptions {
    RoutingOptions { capacity: Some(Capacity { factor, overflow }), ..RoutingOptions::default() }
}

/// Every expert that ran, as `(layer, expert)`, of each token.
fn ran(model: &ModelSummary, experts: &[u16]) -> Vec<Vec<(usize, u16)>> {
    let token = |ids: &[u16]| {
        let layers = model.routed.layers().iter().enumerate();
        let slots = layers.flat_map(|(layer, shape)| std::iter::repeat_n(layer, shape.top_k));
        slots.zip(ids.iter().copied()).filter(|(_, id)| *id != NO_EXPERT).collect()
    };
    experts.chunks(model.routed.ids_per_token()).map(token).collect()
}

#[test]
fn without_options_a_token_costs_what_the_model_says() {
    for folder in ["mixtral-base", "deepseek_v3-base", "jetmoe-base", "gpt_oss-alpha", "llama4-text"] {
        let engine = start(folder, RoutingOptions::default());
        let model = engine.model();
        let found = answer(&engine, plain());
        let each = model.num_active_parameters - model.num_shared_parameters;
        assert!(each > 0, "{folder}: {model:?}");
        assert_eq!((found.cost.least_parameters, found.cost.most_parameters), (each, each), "{folder}");
        assert_eq!(found.cost.num_parameters, each * found.cost.num_tokens as u64, "{folder}");
        let touched: BTreeSet<_> = ran(model, &found.experts).into_iter().flatten().collect();
        assert_eq!(found.cost.touched.len(), touched.len(), "{folder}");
        assert_eq!(found.cost.traffic, None, "{folder}: all are in memory");
    }
}

#[test]
fn experts_that_compute_nothing_cost_nothing() {
    let engine = start("longcat_flash-base", RoutingOptions::default());
    let found = answer(&engine, plain());
    let each = engine.model().num_active_parameters - engine.model().num_shared_parameters;
    assert!(found.cost.least_parameters < found.cost.most_parameters, "{:?}", found.cost);
    assert!(found.cost.most_parameters <= each, "{:?} of {each}", found.cost);
}

#[test]
fn fewer_experts_cost_less_and_are_no_part_of_other_answers() {
    let engine = start("mixtral-base", RoutingOptions::default());
    let whole = answer(&engine, plain());
    for options in [
        ExpertOptions { max_experts: Some(1), ..plain() },
        ExpertOptions { top_p: 0.3, ..plain() },
        ExpertOptions { top_p: 0.6, ..plain() },
    ] {
        let first = answer(&engine, options);
        assert_eq!(first.num_cached, 0, "{options:?}: blocks of other options are not its own");
        assert_ne!(first.tokens, whole.tokens, "{options:?}");
        let ran = ran(engine.model(), &first.experts);
        let each = (engine.model().num_active_parameters - engine.model().num_shared_parameters)
            / engine.model().routed.ids_per_token() as u64;
        let costs = ran.iter().map(|token| token.len() as u64 * each);
        assert_eq!(first.cost.least_parameters, costs.clone().min().unwrap(), "{options:?}");
        assert_eq!(first.cost.num_parameters, costs.sum::<u64>(), "{options:?}");
        assert!(first.cost.num_parameters < whole.cost.num_parameters, "{options:?}");
        let again = answer(&engine, options);
        assert_eq!(again.num_cached, 32, "{options:?}: its own blocks are found");
        assert_eq!((again.tokens, again.experts), (first.tokens, first.experts), "{options:?}");
    }
    let again = answer(&engine, plain());
    assert_eq!((again.num_cached, again.tokens), (32, whole.tokens));
}

#[test]
fn noise_is_a_request_s_own() {
    let engine = start("mixtral-base", RoutingOptions { noise: 1.0, ..RoutingOptions::default() });
    let seeded = |noise_seed| answer(&engine, ExpertOptions { noise_seed, ..plain() });
    let (first, other, again) = (seeded(7), seeded(8), seeded(7));
    assert_eq!((&first.tokens, &first.experts), (&again.tokens, &again.experts));
    assert_eq!((other.num_cached, again.num_cached), (0, 32));
    assert_ne!(first.experts, other.experts);
    let quiet = answer(&start("mixtral-base", RoutingOptions::default()), plain());
    assert_ne!(first.experts, quiet.experts);
}

#[test]
fn a_capacity_that_is_not_reached_changes_nothing() {
    let quiet = answer(&start("mixtral-base", RoutingOptions::default()), plain());
    for overflow in [Overflow::Drop, Overflow::Scale] {
        let found = answer(&start("mixtral-base", limited(1000.0, overflow)), plain());
        assert_eq!(found, quiet);
    }
}

#[test]
fn what_is_above_the_capacity_is_cut_and_counted_and_no_block_is_kept() {
    let quiet = answer(&start("mixtral-base", RoutingOptions::default()), plain());
    for overflow in [Overflow::Drop, Overflow::Scale] {
        let engine = start("mixtral-base", limited(1.0, overflow));
        assert!(!engine.model().has_prefix_cache);
        let found = answer(&engine, plain());
        assert_ne!(found.tokens, quiet.tokens, "{overflow:?}");
        let num_empty = found.experts.iter().filter(|&&id| id == NO_EXPERT).count() as u64;
        match overflow {
            Overflow::Drop => assert_eq!((num_empty, found.cost.cut.num_scaled), (found.cost.cut.num_dropped, 0)),
            Overflow::Scale => assert_eq!((num_empty, found.cost.cut.num_dropped), (0, 0)),
        }
        assert!(found.cost.cut.num_dropped + found.cost.cut.num_scaled > 0, "{overflow:?}");
        let again = answer(&engine, plain());
        assert_eq!((again.num_cached, again.tokens), (0, found.tokens), "{overflow:?}: alone it is as it was");
    }
}

#[test]
fn decay_moves_tokens_to_experts_that_had_less() {
    let most = |engine: &EngineHandle| {
        let found = answer(engine, plain());
        let mut loads = std::collections::BTreeMap::new();
        ran(engine.model(), &found.experts)
            .into_iter()
            .flatten()
            .for_each(|expert| *loads.entry(expert).or_insert(0) += 1);
        loads.into_values().max().unwrap_or(0)
    };
    let quiet = start("mixtral-base", RoutingOptions::default());
    let decaying = start("mixtral-base", RoutingOptions { overload_decay: 50.0, ..RoutingOptions::default() });
    assert!(!decaying.model().has_prefix_cache);
    // The first answer teaches who has too much.
    let before = most(&quiet);
    most(&decaying);
    assert_ne!(most(&decaying), before, "overloaded experts get fewer, or others more");
}

#[test]
fn traffic_is_what_the_store_did_for_the_request() {
    let packed = Packed::of(&golden_dir("mixtral-base"), "traffic", PackFormat::F32);
    // Room for all that is used, nothing there at first, and nothing ahead of its use: a miss is the first use of an expert.
    let experts = ExpertConfig {
        memory: Some(ExpertMemory::Percent(99.0)),
        warmup: ExpertWarmup::None,
        prefetch: false,
        ..ExpertConfig::default()
    };
    let engine = load(EngineConfig { experts, ..config(&packed.0, RoutingOptions::default()) }, &mut |_| {}).unwrap();
    let short = || {
        let stop = StopCriteria { max_tokens: 3, ..StopCriteria::default() };
        GenerateRequest { prompt: PROMPT[..3].into(), stop, ..request(plain()) }
    };
    let found = answer_to(&engine, short());
    let ran = ran(engine.model(), &found.experts);
    // The prompt is one step, each token after it another.
    let steps = std::iter::once(ran[..3].concat()).chain(ran[3..].iter().cloned());
    let distinct = |experts: Vec<(usize, u16)>| experts.into_iter().collect::<BTreeSet<_>>();
    let num_used: usize = steps.map(|step| distinct(step).len()).sum();
    let num_touched = distinct(ran.concat()).len();
    let num_experts: usize = engine.model().routed.layers().iter().map(|layer| layer.num_experts).sum();
    assert!(num_touched < num_experts, "there is room for all of them");
    let expert_bytes = engine.model().expert_bytes / num_experts as u64;
    let expected = ExpertTraffic {
        num_hits: (num_used - num_touched) as u64,
        num_misses: num_touched as u64,
        num_bytes: num_touched as u64 * expert_bytes,
    };
    assert_eq!(found.cost.traffic, Some(expected));
    let again = answer_to(&engine, short()).cost.traffic.expect("there is a store");
    assert_eq!((again.num_misses, again.num_bytes), (0, 0), "all are there now");
}

#[test]
fn where_it_is_not_known_which_experts_ran_their_cost_is_not_told() {
    let engine = start("switch_transformers-base", RoutingOptions::default());
    let asked = GenerateRequest { wants_routed_experts: false, ..request(plain()) };
    assert!(matches!(engine.submit(asked).map(drop), Err(SubmitError::NoExpertUse { .. })));
}

//! Options of routing over HTTP: what changes answers says so in `usage.moe` and stays out of the output cache, and what is told of
//! experts' cost is the same however it is asked for.

use std::collections::BTreeSet;
use std::thread;

use harness::{Response, Server, with};
use serde_json::{Value, json};

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");
const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";
const MODEL: &str = "mixtral-base";

fn server(args: &[&str]) -> Server {
    Server::start(SERVER, MODEL, &[&["--output-cache", "memory"], args].concat())
}

/// A greedy completion of 40 ids: seeds tell noise apart, and nothing else.
fn completion(fields: Value) -> Value {
    let prompt: Vec<u32> = (0..40).map(|idx| 3 + (idx * 37) % 300).collect();
    let body =
        json!({"prompt": prompt, "max_tokens": 6, "ignore_eos": true, "temperature": 0, "return_token_ids": true});
    with(body, fields)
}

fn chat(fields: Value) -> Value {
    let messages = json!([{"role": "user", "content": "tell me of the river"}]);
    with(json!({"messages": messages, "max_tokens": 6, "ignore_eos": true, "temperature": 0}), fields)
}

/// Where the answer came from, if the output cache was asked.
fn origin(answer: &Response) -> Option<&str> {
    assert_eq!(answer.status, 200, "{}", answer.text());
    answer.header("x-moesaic-cache")
}

fn ids(answer: &Value) -> &Value {
    &answer["choices"][0]["token_ids"]
}

/// The answer's options, after it was seen twice that it is not for the output cache.
fn options(server: &Server, body: &Value) -> Value {
    let answers = [server.post(COMPLETIONS, body), server.post(COMPLETIONS, body)];
    assert!(answers.iter().all(|answer| origin(answer).is_none()), "{body}");
    answers[0].json()["usage"]["moe"]["options"].clone()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap_or_else(|| panic!("not a list: {value}"))
}

/// The experts that ran for any token, with their layers.
fn touched(choice: &Value) -> BTreeSet<(usize, u64)> {
    let tokens = ["prompt_routed_experts", "routed_experts"].iter().flat_map(|field| list(&choice[*field]));
    let layers = tokens.flat_map(|token| list(token).iter().enumerate());
    let slots = layers.flat_map(|(layer, slots)| list(slots).iter().map(move |id| (layer, id)));
    slots.filter_map(|(layer, id)| Some((layer, id.as_u64()?))).collect()
}

#[test]
fn a_request_does_with_fewer_experts_and_says_so() {
    let server = server(&[]);
    let plain = server.post(COMPLETIONS, &completion(json!({})));
    assert_eq!(origin(&plain), Some("miss"));
    assert!(plain.json()["usage"].get("moe").is_none(), "{}", plain.text());
    for (moe, expected) in [
        (json!({"max_experts": 1}), json!({"max_experts": 1, "couples_requests": false})),
        (json!({"top_p": 0.5}), json!({"top_p": 0.5, "couples_requests": false})),
        (json!({"top_p": 0.5, "max_experts": 1}), json!({"top_p": 0.5, "max_experts": 1, "couples_requests": false})),
    ] {
        let body = completion(json!({"moe": moe, "return_routed_experts": true}));
        assert_eq!(options(&server, &body), expected);
        let answer = server.ask(COMPLETIONS, &body);
        assert_ne!(ids(&answer), ids(&plain.json()), "{moe}");
        assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 32, "its own blocks are found again");
        let last_slots =
            answer["choices"][0]["prompt_routed_experts"].as_array().unwrap().iter().map(|token| &token[0][1]);
        assert!(last_slots.clone().any(|id| *id == json!(-1)), "{moe}: some are left out");
        assert_eq!(answer["usage"]["moe"].as_object().map(|moe| moe.len()), Some(1), "costs were not asked for");
        let in_chat = server.post(CHAT, &chat(json!({"moe": moe})));
        assert_eq!((origin(&in_chat), &in_chat.json()["usage"]["moe"]["options"]), (None, &expected));
        let stream = json!({"moe": moe, "stream": true, "stream_options": {"include_usage": true}});
        for (path, body) in [(COMPLETIONS, completion(stream.clone())), (CHAT, chat(stream))] {
            assert_eq!(server.stream(path, &body).chunks().last().unwrap()["usage"]["moe"]["options"], expected);
        }
    }
    assert!(server.metrics().value("moesaic_expert_left_out_choices_total", &[]).unwrap() > 0.0);
    // What leaves nothing out is the plain request, in the cache too.
    for moe in [json!({}), json!({"top_p": 1.0}), json!({"max_experts": 2}), json!({"top_p": 1, "usage": false})] {
        let answer = server.post(COMPLETIONS, &completion(json!({"moe": moe})));
        assert_eq!((origin(&answer), answer.json()["usage"].get("moe")), (Some("hit"), None), "{moe}");
        assert_eq!(ids(&answer.json()), ids(&plain.json()));
    }
}

#[test]
fn the_cost_of_experts_is_told_for_the_asking() {
    let server = server(&[]);
    let active = server.get("/server_info").json()["model"]["num_active_parameters"].as_u64().unwrap();
    let asking = |fields| completion(with(json!({"moe": {"usage": true}, "return_routed_experts": true}), fields));
    let answer = server.post(COMPLETIONS, &asking(json!({})));
    assert_eq!(origin(&answer), None, "costs are not kept");
    let answer = answer.json();
    let moe = &answer["usage"]["moe"];
    assert_eq!(moe["active_parameters"], json!({"mean": active, "min": active, "max": active}));
    assert_eq!(moe["experts_touched"], touched(&answer["choices"][0]).len());
    for absent in ["options", "expert_cache", "dropped_choices", "scaled_choices"] {
        assert!(moe.get(absent).is_none(), "{moe}");
    }
    let plain = server.post(COMPLETIONS, &completion(json!({})));
    assert_eq!((origin(&plain), ids(&plain.json())), (Some("miss"), ids(&answer)));

    let fewer =
        server.ask(COMPLETIONS, &asking(json!({"moe": {"usage": true, "max_experts": 1}})))["usage"]["moe"].clone();
    let cost = |name: &str| fewer["active_parameters"][name].as_u64().unwrap();
    assert!(cost("max") < active && cost("min") == cost("max"), "{fewer}");
    let some = server.ask(COMPLETIONS, &asking(json!({"moe": {"usage": true, "top_p": 0.6}})))["usage"]["moe"].clone();
    let cost = |name: &str| some["active_parameters"][name].as_u64().unwrap();
    assert!(cost("min") < cost("mean") && cost("mean") < cost("max") && cost("max") <= active, "{some}");

    // Two choices of two prompts, whole and streamed.
    let prompts = json!([[5, 9, 44, 7], [8, 3]]);
    let many = asking(json!({"prompt": prompts, "n": 2, "temperature": 1, "seed": 4}));
    let whole = server.ask(COMPLETIONS, &many);
    let choices = whole["choices"].as_array().unwrap();
    let all: BTreeSet<_> = choices.iter().flat_map(touched).collect();
    assert_eq!(whole["usage"]["moe"]["experts_touched"], all.len());
    let streamed = with(many, json!({"stream": true, "stream_options": {"include_usage": true}}));
    let chunks = server.stream(COMPLETIONS, &streamed).chunks();
    assert_eq!(chunks.last().unwrap()["usage"]["moe"], whole["usage"]["moe"]);
    let in_chat = server.ask(CHAT, &chat(json!({"n": 2, "moe": {"usage": true}})));
    assert_eq!(in_chat["usage"]["moe"]["active_parameters"]["mean"], active);
    let echo = server.ask(COMPLETIONS, &asking(json!({"echo": true, "max_tokens": 0})));
    assert_eq!(echo["usage"]["moe"]["active_parameters"]["mean"], active, "of the prompt alone");
}

#[test]
fn a_top_p_for_all_is_the_default_of_each() {
    let server = server(&["--expert-top-p", "0.5"]);
    let expected = json!({"top_p": 0.5, "couples_requests": false});
    assert_eq!(options(&server, &completion(json!({}))), expected);
    let known = server.ask("/v1/moe/routing", &json!({"prompt": completion(json!({}))["prompt"]}));
    assert_eq!(known["num_covered_tokens"], 32, "of requests that have no options of their own");
    let own = completion(json!({"moe": {"top_p": 0.5}}));
    assert_eq!(options(&server, &own), expected);
    assert_eq!(ids(&server.ask(COMPLETIONS, &completion(json!({})))), ids(&server.ask(COMPLETIONS, &own)));
    assert_eq!(options(&server, &completion(json!({"moe": {"top_p": 0.75}})))["top_p"], 0.75);
    let whole = server.post(COMPLETIONS, &completion(json!({"moe": {"top_p": 1}})));
    assert_eq!((origin(&whole), whole.json()["usage"].get("moe")), (Some("miss"), None));
}

#[test]
fn noise_depends_on_the_seed_and_not_on_who_is_beside() {
    let server = server(&["--router-noise", "1.5"]);
    let seeded = |seed: u32| completion(json!({"seed": seed}));
    assert_eq!(options(&server, &seeded(0)), json!({"router_noise": 1.5, "couples_requests": false}));
    let alone: Vec<Value> = (1..9).map(|seed| ids(&server.ask(COMPLETIONS, &seeded(seed))).clone()).collect();
    assert!(alone.iter().any(|ids| *ids != alone[0]), "seeds differ");
    thread::scope(|scope| {
        for (seed, expected) in (1..).zip(&alone) {
            let (server, body) = (&server, seeded(seed));
            scope.spawn(move || assert_eq!(ids(&server.ask(COMPLETIONS, &body)), expected, "seed {seed}"));
        }
    });
}

#[test]
fn a_capacity_cuts_counts_and_keeps_no_blocks() {
    for (mode, counter, field) in [
        ("drop", "moesaic_expert_dropped_tokens_total", "dropped_choices"),
        ("scale", "moesaic_expert_scaled_tokens_total", "scaled_choices"),
    ] {
        let server = server(&["--capacity-factor", "1", "--capacity-mode", mode, "--kv-tier-memory", "1MiB"]);
        let body = completion(json!({"moe": {"usage": true}}));
        let answer = server.ask(COMPLETIONS, &body);
        let moe = &answer["usage"]["moe"];
        assert_eq!(moe["options"], json!({"capacity_factor": 1.0, "capacity_mode": mode, "couples_requests": true}));
        let num_cut = moe[field].as_f64().unwrap_or_else(|| panic!("{mode}: {moe}"));
        server.wait_idle();
        assert_eq!(server.metrics().value(counter, &[]), Some(num_cut), "{mode}");
        let utilization = server.metrics().value("moesaic_expert_utilization", &[("layer", "0")]).expect("a capacity");
        assert!(0.0 < utilization && (mode == "scale" || utilization <= 1.0), "{mode}: {utilization}");
        let again = server.post(COMPLETIONS, &completion(json!({})));
        assert_eq!(origin(&again), None, "{mode}");
        assert_eq!(again.json()["usage"]["prompt_tokens_details"]["cached_tokens"], 0, "{mode}");
        assert_eq!(server.get("/server_info").json()["model"]["has_prefix_cache"], false);
        assert_eq!(server.metrics().value("moesaic_kv_tier_entries", &[("tier", "memory")]).unwrap_or(0.0), 0.0);
    }
}

#[test]
fn decay_is_named_and_couples() {
    let server = server(&["--overload-decay", "0.25"]);
    let options = options(&server, &completion(json!({"moe": {"max_experts": 1}})));
    assert_eq!(options, json!({"max_experts": 1, "overload_decay": 0.25, "couples_requests": true}));
}

#[test]
fn what_cannot_be_done_is_refused_by_name() {
    let refused = |server: &Server, moe: Value, param: &str, reason: &str| {
        for (path, body) in [(COMPLETIONS, completion(json!({"moe": moe}))), (CHAT, chat(json!({"moe": moe})))] {
            let answer = server.post(path, &body);
            let error = &answer.json()["error"];
            assert_eq!((answer.status, &error["param"]), (400, &json!(param)), "{moe}: {error}");
            assert!(error["message"].as_str().is_some_and(|message| message.contains(reason)), "{moe}: {error}");
        }
    };
    let mixtral = server(&[]);
    refused(&mixtral, json!({"top_p": 0}), "moe.top_p", "is 0, allowed are 0.001 to 1");
    refused(&mixtral, json!({"top_p": 1.5}), "moe.top_p", "allowed are 0.001 to 1");
    refused(&mixtral, json!({"max_experts": 0}), "moe.max_experts", "allowed are 1 and up");
    refused(&mixtral, json!({"max_experts": -1}), "moe.max_experts", "expected u32");
    refused(&mixtral, json!({"topp": 1}), "moe.topp", "unknown field");
    refused(&mixtral, json!(true), "moe", "an object like");
    let switch = Server::start(SERVER, "switch_transformers-base", &[]);
    let answer = switch.post(COMPLETIONS, &completion(json!({"moe": {"usage": true}})));
    assert_eq!((answer.status, &answer.json()["error"]["param"]), (400, &json!("moe.usage")), "{}", answer.text());
}

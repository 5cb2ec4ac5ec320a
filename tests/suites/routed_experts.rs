//! `return_routed_experts`: the experts that the reference names, the same whatever else happens to a request, and the same streamed.

use std::thread;

use harness::{Server, golden, with};
use serde_json::{Value, json};

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");
const PATH: &str = "/v1/completions";

/// A greedy completion of ids that asks for experts.
fn completion(prompt: &Value, fields: Value) -> Value {
    let body = json!({"prompt": prompt, "max_tokens": 6, "ignore_eos": true, "temperature": 0, "return_token_ids": true,
        "return_routed_experts": true});
    with(body, fields)
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap_or_else(|| panic!("not a list: {value}"))
}

/// The prompt's and the output's, one after the other.
fn experts(choice: &Value) -> Vec<Value> {
    [list(&choice["prompt_routed_experts"]), list(&choice["routed_experts"])].concat()
}

fn sorted(ids: &Value) -> Vec<u64> {
    let mut ids: Vec<u64> = list(ids).iter().map(|id| id.as_u64().expect("an id")).collect();
    ids.sort_unstable();
    ids
}

fn check_family(name: &str) {
    let server = Server::start(SERVER, name, &["--dtype", "f32"]);
    let routing = &golden::reference(name)["routing"];
    let num_prompt = list(&routing["ids"]).len();
    let choice = server.ask(PATH, &completion(&routing["ids"], json!({})))["choices"][0].clone();
    let of_prompt = list(&choice["prompt_routed_experts"]);
    assert_eq!(of_prompt.len(), num_prompt, "{name}");
    let calls = list(&routing["calls"]);
    for (position, token) in of_prompt.iter().enumerate() {
        assert_eq!(list(token).len(), calls.len(), "{name}: one list per layer");
        for (layer, call) in list(token).iter().zip(calls) {
            assert_eq!(sorted(layer), sorted(&call["experts"][position]), "{name} {} token {position}", call["name"]);
        }
    }
    // What was decoded, read as a prompt; what was sampled last was not computed then.
    let ids = [list(&routing["ids"]), list(&choice["token_ids"])].concat();
    assert_eq!(experts(&choice).len(), ids.len() - 1, "{name}");
    let uncached = server.ask(PATH, &completion(&json!(ids), json!({"cache_salt": "another", "max_tokens": 1})));
    let read = &uncached["choices"][0];
    assert_eq!(list(&read["prompt_routed_experts"])[..ids.len() - 1], experts(&choice), "{name}");
    assert_eq!(read["routed_experts"], json!([]), "{name}");
    let per_token: usize = list(&of_prompt[0]).iter().map(|layer| list(layer).len()).sum();
    assert_eq!(server.get("/server_info").json()["model"]["routing_bytes_per_token"], per_token);
}

macro_rules! families {
    ($($test:ident: $name:literal;)*) => { $(#[test] fn $test() { check_family($name); })* };
}

families! {
    mixtral: "mixtral-base";
    deepseek_v2: "deepseek_v2-lite";
    jetmoe_routes_twice_a_layer: "jetmoe-base";
    longcat_has_experts_that_compute_nothing: "longcat_flash-base";
    qwen3_next_keeps_states: "qwen3_next-base";
    gpt_oss_has_windows: "gpt_oss-alpha";
}

/// Ids unlike those of other seeds.
fn prompt(seed: u64, len: u64) -> Value {
    (0..len).map(|idx| 3 + (seed * 131 + idx * 37) % 360).collect()
}

#[test]
fn the_same_bytes_alone_among_others_cached_preempted_and_in_chunks() {
    const NUM_CLIENTS: u64 = 8;
    const NUM_BLOCKS: u64 = 16;
    let body = |seed| completion(&prompt(seed, 40), json!({"max_tokens": 50}));
    let alone = Server::start(SERVER, "mixtral-base", &["--enable-prefix-caching=false"]);
    let expected: Vec<Value> = (0..NUM_CLIENTS).map(|seed| alone.ask(PATH, &body(seed))["choices"].clone()).collect();
    assert_eq!(experts(&expected[0][0]).len(), 40 + 49);
    let model = alone.get("/server_info").json()["model"].clone();
    let count = |key: &str| model[key].as_u64().expect("a count");
    let block = (count("kv_bytes_per_token") + count("routing_bytes_per_token")) * count("block_size");
    let memory = (block * NUM_BLOCKS).to_string();
    let args = ["--max-num-batched-tokens", "24", "--kv-cache-memory", &memory];
    let server = Server::start(SERVER, "mixtral-base", &args);
    assert_eq!(server.get("/server_info").json()["model"]["num_blocks"], NUM_BLOCKS);
    let ask_all = || {
        thread::scope(|scope| {
            let ask = |seed| server.ask(PATH, &body(seed))["choices"].clone();
            let clients: Vec<_> = (0..NUM_CLIENTS).map(|seed| scope.spawn(move || ask(seed))).collect();
            clients.into_iter().map(|client| client.join().expect("a client ends")).collect::<Vec<Value>>()
        })
    };
    for round in 0..3 {
        for (seed, (found, expected)) in ask_all().iter().zip(&expected).enumerate() {
            assert_eq!(found, expected, "request {seed} in round {round}");
        }
    }
    assert!(server.metrics().value("vllm:num_preemptions_total", &[]) > Some(0.0), "the pool is too small for all");
    for num_cached in [0, 32] {
        let salted = with(body(3), json!({"cache_salt": "once more"}));
        let answer = server.ask(PATH, &salted);
        assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], num_cached);
        assert_eq!(answer["choices"], expected[3], "{num_cached} tokens of the prompt were computed for another");
    }
}

#[test]
fn streams_tell_of_a_token_with_the_next_one() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let body = completion(&prompt(1, 20), json!({"n": 2, "temperature": 1, "seed": 7}));
    let whole = server.ask(PATH, &body);
    let chunks = server.stream(PATH, &body).chunks();
    for index in 0..2 {
        let of_choice: Vec<&Value> =
            chunks.iter().map(|chunk| &chunk["choices"][0]).filter(|choice| choice["index"] == index).collect();
        let expected = &whole["choices"][index];
        let with_tokens: Vec<_> = of_choice.iter().filter(|choice| choice["token_ids"] != json!(null)).collect();
        assert_eq!(with_tokens[0]["prompt_routed_experts"], expected["prompt_routed_experts"]);
        let tell_of_prompt = of_choice.iter().filter(|choice| choice.get("prompt_routed_experts").is_some());
        assert_eq!(tell_of_prompt.count(), 1);
        let parts = of_choice.iter().filter_map(|choice| choice.get("routed_experts"));
        assert_eq!(parts.flat_map(list).cloned().collect::<Value>(), expected["routed_experts"]);
        assert!(with_tokens[1..].iter().all(|choice| list(&choice["routed_experts"]).len() == 1));
    }
    let chat = json!({"messages": [{"role": "user", "content": "tell me of the river"}], "max_tokens": 5, "n": 2, "seed": 3,
        "return_token_ids": true, "return_routed_experts": true, "ignore_eos": true});
    let whole = server.ask("/v1/chat/completions", &chat);
    assert_eq!(list(&whole["prompt_routed_experts"]).len(), list(&whole["prompt_token_ids"]).len());
    let chunks = server.stream("/v1/chat/completions", &chat).chunks();
    let of_prompt: Vec<_> = chunks.iter().filter_map(|chunk| chunk.get("prompt_routed_experts")).collect();
    assert_eq!(of_prompt, [&whole["prompt_routed_experts"]]);
    for index in 0..2 {
        let of_choice = chunks.iter().map(|chunk| &chunk["choices"][0]).filter(|choice| choice["index"] == index);
        let parts = of_choice.filter_map(|choice| choice.get("routed_experts")).flat_map(list).cloned();
        assert_eq!(parts.collect::<Value>(), whole["choices"][index]["routed_experts"]);
        assert_eq!(list(&whole["choices"][index]["routed_experts"]).len(), 4);
    }
}

#[test]
fn as_many_as_tokens_whatever_ends_the_choice() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let full = server.ask(PATH, &completion(&prompt(2, 9), json!({"max_tokens": 24})))["choices"][0].clone();
    let ids = list(&full["token_ids"]);
    let text = full["text"].as_str().expect("a text");
    let middle: String = text.chars().skip(text.chars().count() / 2).take(3).collect();
    let stopped = |fields| server.ask(PATH, &completion(&prompt(2, 9), with(json!({"max_tokens": 24}), fields)));
    for (what, fields) in [
        ("a stop string", json!({"stop": [middle]})),
        ("a stop token", json!({"stop_token_ids": [ids[5]]})),
        ("the first token", json!({"max_tokens": 1})),
    ] {
        let choice = stopped(fields)["choices"][0].clone();
        let num_tokens = list(&choice["token_ids"]).len();
        assert!(num_tokens < ids.len(), "{what}");
        assert_eq!(choice["prompt_routed_experts"], full["prompt_routed_experts"], "{what}");
        assert_eq!(list(&choice["routed_experts"]), &list(&full["routed_experts"])[..num_tokens - 1], "{what}");
    }
    let echo = stopped(json!({"echo": true, "max_tokens": 0}))["choices"][0].clone();
    assert_eq!(echo["prompt_routed_experts"], full["prompt_routed_experts"]);
    assert_eq!((&echo["token_ids"], &echo["routed_experts"]), (&json!([]), &json!([])));
    let both = server.ask(PATH, &completion(&json!([prompt(2, 9), prompt(4, 3)]), json!({"prompt_logprobs": 1})));
    assert_eq!(both["choices"][0]["prompt_routed_experts"], full["prompt_routed_experts"]);
    assert_eq!(list(&both["choices"][1]["prompt_routed_experts"]).len(), 3);
    for fields in [json!({"return_routed_experts": false}), json!({"return_routed_experts": null})] {
        let answer = stopped(fields);
        assert!(!answer.to_string().contains("routed_experts"), "{answer}");
    }
}

#[test]
fn the_output_cache_is_not_asked() {
    let server = Server::start(SERVER, "mixtral-base", &["--output-cache", "memory"]);
    let body = completion(&prompt(5, 30), json!({}));
    let answers = [server.post(PATH, &body), server.post(PATH, &body)];
    assert!(answers.iter().all(|answer| answer.status == 200 && answer.header("x-moesaic-cache").is_none()));
    assert_eq!(answers[0].json()["choices"], answers[1].json()["choices"]);
    let plain = server.post(PATH, &with(body.clone(), json!({"return_routed_experts": false})));
    assert_eq!(plain.header("x-moesaic-cache"), Some("miss"));
    assert_eq!(plain.json()["choices"][0]["token_ids"], answers[0].json()["choices"][0]["token_ids"]);
    assert_eq!(server.post(PATH, &body).json()["choices"], answers[0].json()["choices"]);
}

#[test]
fn what_cannot_be_told_is_refused() {
    let refused = |server: &Server, body: &Value, reason: &str| {
        let answer = server.post(PATH, body);
        let error = &answer.json()["error"];
        assert_eq!((answer.status, &error["param"]), (400, &json!("return_routed_experts")), "{error}");
        assert!(error["message"].as_str().is_some_and(|message| message.contains(reason)), "{error}");
    };
    let switch = Server::start(SERVER, "switch_transformers-base", &[]);
    refused(&switch, &completion(&prompt(1, 5), json!({})), "an encoder reads the prompt of this model");
    assert_eq!(switch.get("/server_info").json()["model"]["routing_bytes_per_token"], 0);
    let server = Server::start(SERVER, "mixtral-base", &["--max-queue", "65536"]);
    // 128 choices for each of 100 prompts: 12800 times 64 tokens of three layers with two experts.
    let many: Vec<Value> = (0..100).map(|seed| prompt(seed, 4)).collect();
    let body = completion(&json!(many), json!({"n": 128, "max_tokens": 60, "temperature": 1}));
    refused(&server, &body, "asks for up to 4915200 ids of experts, one answer has at most 4194304");
    server.wait_idle();
    assert_eq!(server.metrics().value("vllm:prompt_tokens_total", &[]), Some(0.0), "nothing was computed");
}

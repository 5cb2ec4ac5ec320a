//! Prompts that begin alike: what is computed once, what usage and metrics say of it, and who does not share.

use std::thread;

use harness::{Request, Server, with};
use serde_json::{Value, json};

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");
const PATH: &str = "/v1/completions";
/// Blocks of 16 tokens; the last token of a prompt is always computed.
const BLOCK: usize = 16;

/// Token ids that begin as those of every other call.
fn prompt(len: usize) -> Vec<u32> {
    (0..len).map(|idx| 3 + (idx as u32 * 37) % 300).collect()
}

fn completion(len: usize, fields: Value) -> Value {
    let body = json!({"prompt": prompt(len), "max_tokens": 5, "ignore_eos": true, "temperature": 0, "logprobs": 2});
    with(body, fields)
}

fn cached(answer: &Value) -> u64 {
    answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("the usage counts cached tokens")
}

/// Prompt tokens that were computed.
fn num_computed(server: &Server) -> f64 {
    let metrics = server.metrics();
    let value = |name| metrics.value(name, &[]).expect("the counter is there");
    value("vllm:prompt_tokens_total") - value("vllm:prompt_tokens_cached_total")
}

#[test]
fn a_second_request_starts_where_the_first_one_was() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let first = server.ask(PATH, &completion(40, json!({})));
    let second = server.ask(PATH, &completion(40, json!({})));
    assert_eq!((cached(&first), cached(&second)), (0, 32));
    assert_eq!(first["choices"], second["choices"], "text and log-probs are the same");
    assert_eq!(first["usage"]["total_tokens"], second["usage"]["total_tokens"]);
    assert_eq!(cached(&server.ask(PATH, &completion(BLOCK, json!({})))), 0, "its last token is computed");
    let longer = server.ask(PATH, &completion(70, json!({})));
    assert_eq!(cached(&longer), 32);
    let scored = server.ask(PATH, &completion(70, json!({"prompt_logprobs": 1})));
    assert_eq!(cached(&scored), 0, "every position is wanted");
    assert_eq!(scored["choices"][0]["text"], longer["choices"][0]["text"]);
    let metrics = server.metrics();
    let value = |name, labels| metrics.value(name, labels);
    assert_eq!(value("vllm:prefix_cache_queries_total", &[]), Some((40 + 40 + 16 + 70) as f64));
    assert_eq!(value("vllm:prefix_cache_hits_total", &[]), Some(64.0));
    assert_eq!(value("vllm:prompt_tokens_cached_by_source_total", &[("source", "local_cache_hit")]), Some(64.0));
    assert_eq!(value("vllm:kv_cache_usage_perc", &[]), Some(0.0), "cached blocks are not in use");
    assert_eq!(server.get("/server_info").json()["model"]["has_prefix_cache"], true);
}

#[test]
fn streams_count_cached_tokens_too() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    server.ask(PATH, &completion(40, json!({})));
    let all = json!({"stream_options": {"include_usage": true, "continuous_usage_stats": true}});
    let chunks = server.stream(PATH, &completion(40, all.clone())).chunks();
    assert!(chunks.iter().all(|chunk| cached(chunk) == 32), "{chunks:?}");
    let chat = json!({"messages": [{"role": "user", "content": "tell me of the river and of the boat ".repeat(8)}],
        "max_tokens": 3, "temperature": 0});
    let whole = server.ask("/v1/chat/completions", &chat);
    let num_prompt = whole["usage"]["prompt_tokens"].as_u64().unwrap();
    let expected = (num_prompt - 1) / BLOCK as u64 * BLOCK as u64;
    assert_eq!(cached(&whole), 0);
    assert_eq!(cached(&server.ask("/v1/chat/completions", &chat)), expected);
    let mut streamed = chat;
    streamed.as_object_mut().unwrap().extend(all.as_object().unwrap().clone());
    let chunks = server.stream("/v1/chat/completions", &streamed).chunks();
    assert_eq!(cached(chunks.last().unwrap()), expected);
}

#[test]
fn choices_of_one_prompt_share_it() {
    let server = Server::start(SERVER, "mixtral-base", &["--max-num-batched-tokens", "24"]);
    let answer = server.ask(PATH, &completion(65, json!({"n": 4, "temperature": 1, "seed": 3})));
    assert_eq!((cached(&answer), &answer["usage"]["prompt_tokens"]), (0, &json!(65)));
    assert_eq!(num_computed(&server), 65.0 + 3.0, "three choices compute one token each");
    let texts: Vec<_> = answer["choices"].as_array().unwrap().iter().map(|choice| &choice["text"]).collect();
    assert!(texts.iter().any(|text| text != &texts[0]), "{texts:?}");
    let alone = Server::start(SERVER, "mixtral-base", &["--enable-prefix-caching=false"]);
    let expected = alone.ask(PATH, &completion(65, json!({"n": 4, "temperature": 1, "seed": 3})));
    assert_eq!(answer["choices"], expected["choices"]);
    let again = server.ask(PATH, &completion(65, json!({"n": 2, "prompt": [prompt(65), prompt(49)]})));
    assert_eq!(cached(&again), 64 + 48, "each prompt counts once");
    assert_eq!(cached(&alone.ask(PATH, &completion(65, json!({})))), 0);
    let off = alone.metrics();
    assert_eq!(off.value("vllm:cache_config_info", &[("enable_prefix_caching", "False")]), Some(1.0));
    assert_eq!(off.value("vllm:prefix_cache_queries_total", &[]), Some(0.0));
}

#[test]
fn prompts_sent_at_once_are_computed_once() {
    const CLIENTS: usize = 8;
    let server = Server::start(SERVER, "mixtral-base", &["--max-num-batched-tokens", "32"]);
    let answers: Vec<Value> = thread::scope(|scope| {
        let ask = || server.ask(PATH, &completion(321, json!({})));
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(ask)).collect();
        clients.into_iter().map(|client| client.join().expect("a client ends")).collect()
    });
    assert!(answers.iter().all(|answer| answer["choices"] == answers[0]["choices"]));
    let mut cached: Vec<u64> = answers.iter().map(cached).collect();
    cached.sort_unstable();
    assert_eq!(cached, [vec![0], vec![320; CLIENTS - 1]].concat());
    assert_eq!(num_computed(&server), (321 + CLIENTS - 1) as f64);
}

#[test]
fn salts_and_keys_keep_apart() {
    let ask = |server: &Server, key: &str, fields: Value| {
        let request = Request::post(PATH, &completion(40, fields)).header("Authorization", &format!("Bearer {key}"));
        let answer = server.send(&request);
        assert_eq!(answer.status, 200, "{}", answer.text());
        cached(&answer.json())
    };
    let keys = ["--api-key", "one", "--api-key", "two", "--metrics-public"];
    let server = Server::start(SERVER, "mixtral-base", &keys);
    let salt = |salt: &str| json!({"cache_salt": salt});
    assert_eq!((ask(&server, "one", json!({})), ask(&server, "one", json!({}))), (0, 32));
    assert_eq!((ask(&server, "two", json!({})), ask(&server, "two", json!({}))), (0, 32), "keys are tenants");
    assert_eq!((ask(&server, "one", salt("a")), ask(&server, "one", salt("a"))), (0, 32), "so are their salts");
    assert_eq!((ask(&server, "one", salt("b")), ask(&server, "two", salt("a"))), (0, 0));
    let shared = Server::start(SERVER, "mixtral-base", &[&keys[..], &["--cache-shared"]].concat());
    assert_eq!((ask(&shared, "one", json!({})), ask(&shared, "two", json!({}))), (0, 32));
    assert_eq!(ask(&shared, "two", salt("a")), 0);
}

#[test]
fn a_salt_has_one_to_256_bytes() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    for path in [PATH, "/v1/chat/completions"] {
        for (salt, status) in [(json!(""), 400), (json!("é".repeat(129)), 400), (json!(7), 400), (json!("s"), 200)] {
            let mut body = json!({"max_tokens": 1, "cache_salt": salt});
            if path == PATH {
                body["prompt"] = json!("a");
            } else {
                body["messages"] = json!([{"role": "user", "content": "a"}]);
            }
            let answer = server.post(path, &body);
            assert_eq!(answer.status, status, "{}", answer.text());
            assert!(status == 200 || answer.json()["error"]["param"] == "cache_salt", "{}", answer.text());
        }
    }
}

/// Recurrent states are kept every 256 tokens.
#[test]
fn a_model_with_states_starts_where_one_is_kept() {
    let server = Server::start(SERVER, "qwen3_next-base", &[]);
    let share = || server.metrics().value("moesaic_state_snapshots_usage_perc", &[]).expect("the gauge is there");
    let off = Server::start(SERVER, "qwen3_next-base", &["--enable-prefix-caching=false"]);
    for (len, num_cached) in [(300, 0), (300, 256), (256, 0), (530, 256), (530, 512), (257, 256)] {
        let answer = server.ask(PATH, &completion(len, json!({})));
        assert_eq!(cached(&answer), num_cached, "{len} tokens");
        assert_eq!(answer["choices"], off.ask(PATH, &completion(len, json!({})))["choices"], "{len} tokens");
    }
    assert!(share() > 0.0);
    let model = server.get("/server_info").json()["model"].clone();
    assert_eq!(model["has_prefix_cache"], true);
    assert!(model["num_snapshot_slots"].as_u64().expect("a count") >= 4);
    assert_eq!(off.get("/server_info").json()["model"]["num_snapshot_slots"], 0);
}

/// Two of three layers see eight tokens, so that a token of a long sequence costs a third of what it does at first.
#[test]
fn windows_keep_what_they_need() {
    const MEMORY: u64 = 1 << 20;
    let memory = ["--kv-cache-memory", "1MiB", "--max-num-seqs", "4", "--max-num-batched-tokens", "64"];
    let server = Server::start(SERVER, "gpt_oss-mxfp4", &memory);
    let off = Server::start(SERVER, "gpt_oss-mxfp4", &[&memory[..], &["--enable-prefix-caching=false"]].concat());
    let share = |name| server.metrics().value(name, &[]).expect("the gauge is there");
    assert_eq!(share("moesaic_window_blocks_kept_perc"), 0.0);
    for (len, num_cached) in [(100, 0), (100, 96), (50, 48), (40, 32), (120, 96)] {
        let answer = server.ask(PATH, &completion(len, json!({})));
        assert_eq!(cached(&answer), num_cached, "{len} tokens");
        assert_eq!(answer["choices"], off.ask(PATH, &completion(len, json!({})))["choices"], "{len} tokens");
    }
    server.wait_idle();
    assert!(share("moesaic_window_blocks_kept_perc") > 0.0);
    assert_eq!(share("moesaic_window_blocks_usage_perc"), 0.0);
    let model = off.get("/server_info").json()["model"].clone();
    let count = |key: &str| model[key].as_u64().expect("a count");
    // Four windows of a block, up to two more at their ends, and the four blocks of a step's rows.
    assert_eq!(count("num_window_blocks"), 4 * 3 + 4);
    let all_alike = MEMORY / (count("kv_bytes_per_token") * count("block_size"));
    assert!(count("num_blocks") > 2 * all_alike, "{model}");
}

#[test]
fn models_that_reuse_nothing_say_so() {
    // Of the recurrent model one state fits, and that is for the sequence that runs.
    let little: &[&str] = &["--kv-cache-memory", "64KiB", "--max-model-len", "64"];
    for (model, flags) in [("qwen3_next-base", little), ("switch_transformers-base", &[])] {
        let server = Server::start(SERVER, model, flags);
        let body = completion(40, json!({}));
        let answers = [server.ask(PATH, &body), server.ask(PATH, &body)];
        assert_eq!(answers.each_ref().map(cached), [0, 0], "{model}");
        assert_eq!(answers[0]["choices"], answers[1]["choices"]);
        assert_eq!(server.get("/server_info").json()["model"]["has_prefix_cache"], false);
        let metrics = server.metrics();
        assert_eq!(metrics.value("vllm:cache_config_info", &[("enable_prefix_caching", "False")]), Some(1.0));
    }
}

//! The output cache over HTTP, in memory: what is a hit, that it is the computed answer to the byte, who shares it, and how it ends.

use std::io::Write as _;
use std::process::Command;
use std::thread;
use std::time::Duration;

use harness::{PATIENCE, Request, Response, Server, poll, with};
use serde_json::{Value, json};

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");
const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";
const MODEL: &str = "mixtral-base";

fn server(args: &[&str]) -> Server {
    Server::start(SERVER, MODEL, &[&["--output-cache", "memory"], args].concat())
}

fn completion(fields: Value) -> Value {
    let body =
        json!({"prompt": [5, 9, 44, 7, 21], "max_tokens": 12, "temperature": 0, "logprobs": 2, "ignore_eos": true});
    with(body, fields)
}

fn chat(fields: Value) -> Value {
    let messages = json!([{"role": "user", "content": "tell me of the river"}]);
    let body = json!({"messages": messages, "max_tokens": 10, "temperature": 0, "logprobs": true, "top_logprobs": 2});
    with(body, fields)
}

fn origin(response: &Response) -> Option<&str> {
    assert_eq!(response.status, 200, "{}", response.text());
    response.header("x-moesaic-cache")
}

fn post(server: &Server, path: &str, body: &Value) -> Response {
    server.send(&Request::post(path, body))
}

/// The body without what differs from request to request.
fn unstamped(response: &Response) -> String {
    let text = response.text();
    let first = text.find("\"id\":\"").expect("objects have ids") + 6;
    let (id, _) = text[first..].split_once('"').expect("an id ends");
    let id = id.to_owned();
    let text = text.replace(&id, "ID");
    let parts = text.split("\"created\":").map(|part| part.trim_start_matches(|c: char| c.is_ascii_digit()));
    parts.collect::<Vec<_>>().join("\"created\":")
}

fn tokens_generated(server: &Server) -> f64 {
    server.metrics().value("vllm:generation_tokens_total", &[]).expect("the counter is there")
}

#[test]
fn a_hit_is_the_computed_answer_however_it_is_asked_for() {
    let (cached, plain) = (server(&[]), Server::start(SERVER, MODEL, &[]));
    let bodies = [
        (COMPLETIONS, completion(json!({}))),
        (COMPLETIONS, completion(json!({"temperature": 0.9, "seed": 7, "n": 3, "logit_bias": {"9": 2.5}}))),
        (COMPLETIONS, completion(json!({"prompt": [[5, 6], [7, 8, 9]], "echo": true, "return_token_ids": true}))),
        (COMPLETIONS, completion(json!({"prompt_logprobs": 2, "max_tokens": 3}))),
        (COMPLETIONS, completion(json!({"echo": true, "max_tokens": 0}))),
        (CHAT, chat(json!({"n": 2}))),
        (CHAT, chat(json!({"seed": 3, "temperature": 1.0}))),
    ];
    for (path, body) in bodies {
        let expected = post(&plain, path, &body);
        assert_eq!(origin(&expected), None, "the cache is off");
        let expected = expected.json();
        for (wanted, is_cached) in [("miss", false), ("hit", true), ("hit", true)] {
            let response = post(&cached, path, &body);
            assert_eq!(origin(&response), Some(wanted), "{body}");
            let answer = response.json();
            assert_eq!(answer["choices"], expected["choices"], "{body}");
            assert_eq!(answer["prompt_logprobs"], expected["prompt_logprobs"]);
            assert_eq!(answer["usage"]["total_tokens"], expected["usage"]["total_tokens"]);
            assert_eq!(answer["usage"].get("cached"), is_cached.then_some(&json!(true)), "{body}");
        }
    }
}

#[test]
fn a_stream_and_a_whole_answer_are_one_entry_and_a_replay_has_the_same_bytes() {
    let server = server(&[]);
    for (path, body) in [(COMPLETIONS, completion(json!({}))), (CHAT, chat(json!({"n": 2})))] {
        let whole = post(&server, path, &body).json();
        let mut streamed = body.clone();
        streamed["stream"] = json!(true);
        streamed["stream_options"] = json!({"include_usage": true});
        let mut by_hand = Vec::new();
        for _ in 0..3 {
            let response = post(&server, path, &streamed);
            assert_eq!(origin(&response), Some("hit"));
            assert_eq!(response.header("content-type"), Some("text/event-stream"));
            assert!(response.text().ends_with("data: [DONE]\n\n"));
            by_hand.push(unstamped(&response));
        }
        assert_eq!(by_hand[0], by_hand[1], "put together, and as it was written");
        assert_eq!(by_hand[1], by_hand[2]);
        let chunks = server.stream(path, &streamed).chunks();
        for choice in whole["choices"].as_array().unwrap() {
            let own = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap().iter());
            let text: String = own
                .filter(|part| part["index"] == choice["index"])
                .map(|part| part["text"].as_str().or(part["delta"]["content"].as_str()).unwrap_or_default())
                .collect();
            assert_eq!(Some(&*text), choice["text"].as_str().or(choice["message"]["content"].as_str()));
        }
        assert_eq!(chunks.last().unwrap()["usage"]["cached"], json!(true));
        let again: Vec<_> = (0..3).map(|_| unstamped(&post(&server, path, &body))).collect();
        assert!(again.iter().all(|text| *text == again[0]), "{again:?}");
    }
}

#[test]
fn replays_carry_the_id_of_their_own_request() {
    let server = server(&[]);
    for id in ["first", "second", "third", "with \"quotes\" and \\"] {
        let request = Request::post(COMPLETIONS, &completion(json!({}))).header("x-request-id", id);
        let response = server.send(&request);
        assert_eq!(response.header("x-request-id"), Some(id));
        assert_eq!(response.json()["id"], format!("cmpl-{id}"));
    }
}

#[test]
fn requests_that_differ_in_one_field_never_meet() {
    let (cached, plain) = (server(&[]), Server::start(SERVER, MODEL, &[]));
    let seeded = |fields: Value| with(completion(json!({"temperature": 1.0, "seed": 1})), fields);
    let others = [
        json!({"prompt": [5, 9, 44, 7, 22]}),
        json!({"prompt": [5, 9, 44, 7]}),
        json!({"seed": 2}),
        json!({"temperature": 0.7}),
        json!({"top_k": 3}),
        json!({"top_p": 0.5}),
        json!({"min_p": 0.2}),
        json!({"presence_penalty": 1.5}),
        json!({"frequency_penalty": 1.5}),
        json!({"repetition_penalty": 1.7}),
        json!({"logit_bias": {"11": 30}}),
        json!({"logit_bias": {"11": 31}}),
        json!({"logprobs": 3}),
        json!({"logprobs": null}),
        json!({"prompt_logprobs": 1}),
        json!({"max_tokens": 11}),
        json!({"min_tokens": 2}),
        json!({"ignore_eos": false}),
        json!({"stop": "e"}),
        json!({"stop": ["e", "a"]}),
        json!({"stop": "e", "include_stop_str_in_output": true}),
        json!({"stop": "e", "skip_special_tokens": false}),
        json!({"stop_token_ids": [17, 40]}),
        json!({"cache_salt": "mine"}),
        json!({}),
    ];
    for fields in others {
        let body = seeded(fields);
        let expected = post(&plain, COMPLETIONS, &body).json();
        let first = post(&cached, COMPLETIONS, &body);
        assert_eq!(origin(&first), Some("miss"), "{body}");
        let second = post(&cached, COMPLETIONS, &body);
        assert_eq!(origin(&second), Some("hit"), "{body}");
        assert_eq!((&first.json()["choices"], &second.json()["choices"]), (&expected["choices"], &expected["choices"]));
    }
    for (fields, same) in [
        (json!({"stop": ["e", "a"]}), json!({"stop": ["a", "e", "a"]})),
        (json!({"stop_token_ids": [17, 40]}), json!({"stop_token_ids": [40, 17]})),
        (json!({}), json!({"return_token_ids": true, "user": "somebody"})),
    ] {
        assert_eq!(origin(&post(&cached, COMPLETIONS, &seeded(fields))), Some("hit"));
        assert_eq!(origin(&post(&cached, COMPLETIONS, &seeded(same.clone()))), Some("hit"), "{same} asks for the same");
    }
    let greedy = completion(json!({"seed": 9}));
    assert_eq!(origin(&post(&cached, COMPLETIONS, &greedy)), Some("miss"));
    assert_eq!(
        origin(&post(&cached, COMPLETIONS, &completion(json!({"top_p": 0.3})))),
        Some("hit"),
        "greedy either way"
    );
}

#[test]
fn only_what_one_answer_has_is_cached_and_a_request_may_opt_out() {
    let server = server(&[]);
    for _ in 0..2 {
        assert_eq!(origin(&post(&server, COMPLETIONS, &completion(json!({"temperature": 1.0})))), None, "it is drawn");
    }
    let ask = |cache: Value| {
        let response = post(&server, COMPLETIONS, &completion(json!({"cache": cache})));
        origin(&response).map(str::to_owned)
    };
    assert_eq!(ask(json!({"write": false})).as_deref(), Some("miss"));
    assert_eq!(ask(json!({"read": false, "write": false})), None);
    assert_eq!(ask(json!({"read": false})).as_deref(), Some("miss"), "and is kept");
    assert_eq!(ask(json!({"write": false})).as_deref(), Some("hit"));
    assert_eq!(ask(json!({"read": false})).as_deref(), Some("miss"));
    let wrong = server.post(COMPLETIONS, &completion(json!({"cache": {"read": 1}})));
    assert_eq!((wrong.status, &wrong.json()["error"]["param"]), (400, &json!("cache.read")));
    for (cache, words) in [(json!({"reed": false}), "reed"), (json!(false), "an object like")] {
        let wrong = server.post(COMPLETIONS, &completion(json!({"cache": cache})));
        let message = wrong.json()["error"]["message"].as_str().expect("it says why").to_owned();
        assert!(wrong.status == 400 && message.contains(words), "{message}");
    }
}

#[test]
fn identical_requests_at_once_are_computed_once() {
    let server = server(&[]);
    let body = completion(json!({"max_tokens": 120, "temperature": 1.0, "seed": 5}));
    let answers: Vec<_> = thread::scope(|scope| {
        let ask = || post(&server, COMPLETIONS, &body);
        let streams = || server.stream(COMPLETIONS, &body).chunks();
        let whole: Vec<_> = (0..6).map(|_| scope.spawn(ask)).collect();
        let streamed: Vec<_> = (0..2).map(|_| scope.spawn(streams)).collect();
        let texts = streamed.into_iter().map(|thread| {
            let chunks = thread.join().unwrap();
            chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap_or_default()).collect::<String>()
        });
        let texts: Vec<_> = texts.collect();
        let whole = whole.into_iter().map(|thread| {
            let response = thread.join().unwrap();
            assert!(origin(&response).is_some());
            response.json()["choices"][0]["text"].as_str().unwrap().to_owned()
        });
        whole.chain(texts).collect()
    });
    assert!(answers.iter().all(|text| *text == answers[0] && !text.is_empty()), "{answers:?}");
    assert_eq!(tokens_generated(&server), 120.0, "eight requests, one computation");
    let choices = post(&server, COMPLETIONS, &completion(json!({"max_tokens": 30, "n": 4})));
    assert_eq!(tokens_generated(&server), 150.0, "greedy choices are alike: {}", choices.text());
}

#[test]
fn a_computation_lives_while_anyone_reads_it_and_no_longer() {
    let server = server(&[]);
    let long = completion(json!({"max_tokens": 2000, "stream": true}));
    let mut first = server.stream(COMPLETIONS, &long);
    first.next_chunk();
    let mut second = server.stream(COMPLETIONS, &long);
    let text = second.next_chunk()["choices"][0]["text"].clone();
    drop(first);
    let rest = second.chunks();
    assert_eq!(rest.iter().filter(|chunk| chunk["choices"][0]["finish_reason"] == "length").count(), 1);
    let mut whole = long.clone();
    whole["stream"] = json!(false);
    let answer = post(&server, COMPLETIONS, &whole);
    assert_eq!(origin(&answer), Some("hit"), "it was finished for the one who stayed");
    assert!(answer.json()["choices"][0]["text"].as_str().unwrap().starts_with(text.as_str().unwrap()));

    let other = completion(json!({"max_tokens": 2000, "stream": true, "prompt": [3, 4]}));
    let mut only = server.stream(COMPLETIONS, &other);
    only.next_chunk();
    drop(only);
    poll("the engine to be idle", PATIENCE, || server.metrics().is_idle().then_some(()));
    let mut whole = other.clone();
    whole["stream"] = json!(false);
    whole["max_tokens"] = json!(2000);
    let before = tokens_generated(&server);
    assert!(before < 4000.0, "it was given up: {before}");
    assert_eq!(origin(&post(&server, COMPLETIONS, &whole)), Some("miss"), "what is not finished is not kept");
}

#[test]
fn tenants_and_salts_find_nothing_of_each_other() {
    let body = completion(json!({}));
    let ask = |server: &Server, key: &str, body: &Value| {
        let request = Request::post(COMPLETIONS, body).header("authorization", &format!("Bearer {key}"));
        let response = server.send(&request);
        origin(&response).map(str::to_owned)
    };
    let apart = server(&["--api-key", "one", "--api-key", "two"]);
    for key in ["one", "two"] {
        for wanted in ["miss", "hit", "hit"] {
            assert_eq!(ask(&apart, key, &body).as_deref(), Some(wanted), "{key}");
        }
    }
    let salted = completion(json!({"cache_salt": "group"}));
    assert_eq!(ask(&apart, "one", &salted).as_deref(), Some("miss"));
    assert_eq!(ask(&apart, "two", &salted).as_deref(), Some("miss"));
    assert_eq!(ask(&apart, "one", &salted).as_deref(), Some("hit"));
    let together = server(&["--api-key", "one", "--api-key", "two", "--cache-shared"]);
    assert_eq!(ask(&together, "one", &body).as_deref(), Some("miss"));
    assert_eq!(ask(&together, "two", &body).as_deref(), Some("hit"));
}

#[test]
fn answers_end_with_their_time_and_when_the_cache_is_cleared() {
    let short = server(&["--output-cache-ttl", "0.3"]);
    let body = completion(json!({}));
    let ask = |server: &Server| origin(&post(server, COMPLETIONS, &body)).map(str::to_owned);
    assert_eq!(ask(&short).as_deref(), Some("miss"));
    poll("an answer whose time is over", PATIENCE, || (ask(&short).as_deref() == Some("miss")).then_some(()));

    let server = server(&["--admin-key", "root"]);
    assert_eq!(ask(&server).as_deref(), Some("miss"));
    assert_eq!((ask(&server), ask(&server)), (Some("hit".to_owned()), Some("hit".to_owned())));
    let admin = |request: Request| server.send(&request.header("authorization", "Bearer root"));
    let stats = admin(Request::get("/v1/cache")).json();
    assert_eq!((&stats["tiers"][0]["tier"], &stats["tiers"][0]["entries"]), (&json!("memory"), &json!(1)));
    let metrics = server.metrics();
    let count = |name, labels: &[(&str, &str)]| metrics.value(name, labels);
    let memory = [("kind", "output"), ("tier", "memory")];
    assert_eq!(count("moesaic_cache_hits_total", &memory), Some(2.0));
    assert_eq!(count("moesaic_cache_misses_total", &memory), Some(1.0));
    assert_eq!(count("moesaic_cache_entries", &[("tier", "memory")]), Some(1.0));
    assert_eq!(count("vllm:request_success_total", &[("finished_reason", "length")]), Some(3.0), "hits are requests");
    assert_eq!(server.get("/v1/cache").status, 401);
    assert_eq!(admin(Request::post("/v1/cache/clear", &json!({}))).json()["complete"], true);
    assert_eq!(ask(&server).as_deref(), Some("miss"));
    assert_eq!(short.get("/v1/cache").json()["error"]["code"], "no_admin_key");
}

#[test]
fn the_command_line_warms_shows_and_clears() {
    let server = server(&["--admin-key", "root"]);
    let url = format!("http://{}", server.address);
    let run = |args: &[&str]| {
        let output = Command::new(SERVER).arg("cache").args(args).args(["--url", &url]).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let path = std::env::temp_dir().join(format!("moesaic-warm-{}.jsonl", std::process::id()));
    let mut file = std::fs::File::create(&path).unwrap();
    writeln!(file, "{}\n\n{}", completion(json!({})), json!("tell me of the river")).unwrap();
    let file = path.to_str().unwrap();
    let (code, out, err) = run(&["warm", file]);
    assert_eq!((code, &*out), (Some(0), "2 computed, 0 found, 0 not kept, 0 failed\n"), "{err}");
    assert_eq!(origin(&post(&server, COMPLETIONS, &completion(json!({})))), Some("hit"));
    // What can be read once only, by any name.
    let piped = Command::new("sh")
        .args(["-c", "cat \"$1\" | \"$0\" cache warm - --url \"$2\"", SERVER, file, &url])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&piped.stdout), "0 computed, 2 found, 0 not kept, 0 failed\n", "{piped:?}");
    let (code, out, err) = run(&["stats", "--admin-key", "root"]);
    assert!(code == Some(0) && out.contains("memory") && out.contains(" 2 ") && out.contains("routing"), "{out}{err}");
    let (code, _, err) = run(&["clear"]);
    assert!(code == Some(1) && err.contains("--admin-key"), "{err}");
    let (code, _, err) = run(&["clear", "--admin-key", "toor"]);
    assert!(code == Some(1) && err.contains("the admin key is not valid"), "{err}");
    let (code, _, err) = run(&["warm", std::env::temp_dir().to_str().unwrap()]);
    assert!(code == Some(1) && err.contains("is a folder"), "{err}");
    assert_eq!(run(&["clear", "--admin-key", "root"]).0, Some(0));
    assert_eq!(origin(&post(&server, COMPLETIONS, &completion(json!({})))), Some("miss"));
    std::fs::write(&path, "{\"prompt\": 3}\n{\n\"ok\"\n").unwrap();
    let (code, out, err) = run(&["warm", file]);
    assert_eq!((code, &*out), (Some(1), "1 computed, 0 found, 0 not kept, 2 failed\n"), "{err}");
    assert!(err.contains(":1: ") && err.contains(":2: not JSON") && err.contains("quotes"), "{err}");
    std::fs::write(&path, "{\"prompt\": \"a\", \"temperature\": 1}\n").unwrap();
    let (code, out, err) = run(&["warm", file]);
    assert_eq!((code, &*out), (Some(1), "0 computed, 0 found, 1 not kept, 0 failed\n"), "{err}");
    assert!(err.contains("hint"), "{err}");
    std::fs::write(&path, "\n").unwrap();
    let (code, _, err) = run(&["warm", file]);
    assert!(code == Some(1) && err.contains("no line to ask"), "{err}");
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn settings_that_cannot_be_meant_are_refused_at_the_start() {
    let folder = harness::golden::folder(MODEL);
    for (args, words) in [
        (&["--output-cache", "redis"][..], "hint: --redis-url"),
        (&["--output-cache", "disk"], "hint: --cache-dir"),
        (&["--cache-disk", "0"], "cache_disk"),
        (&["--admin-key", "one", "--api-key", "one"], "admin_key"),
        (&["--output-cache", "redis", "--redis-url", "http://nowhere"], "--redis-url"),
        (&["--output-cache", "memory", "--output-cache-ttl", "0"], "output_cache_ttl"),
        (&["--output-cache", "memory", "--output-cache-ttl", "2592001"], "output_cache_ttl"),
        (&["--kv-tier-memory", "1MiB", "--kv-tier-ttl", "0"], "kv_tier_ttl"),
        (&["--kv-tier-memory", "1MiB", "--kv-tier-ttl", "2592001"], "kv_tier_ttl"),
        (&["--output-cache", "memory", "--cache-timeout-ms", "0"], "cache_timeout_ms"),
    ] {
        let (status, output) = Server::fail(SERVER, &folder, args);
        assert!(!status.success() && output.contains(words), "{args:?}: {output}");
    }
}

#[test]
fn a_request_that_is_refused_leaves_nothing_behind() {
    let server = server(&["--max-num-seqs", "1", "--max-queue", "1"]);
    let long = completion(json!({"max_tokens": 3000, "prompt": [8, 8], "stream": true}));
    let mut first = server.stream(COMPLETIONS, &long);
    first.next_chunk();
    let mut other = long.clone();
    other["prompt"] = json!([9, 9]);
    let mut second = server.stream(COMPLETIONS, &other);
    let refused = post(&server, COMPLETIONS, &completion(json!({"prompt": [10]})));
    assert_eq!(refused.status, 429, "{}", refused.text());
    drop(first);
    second.next_chunk();
    drop(second);
    let answered = poll("room for the one that was refused", Duration::from_secs(20), || {
        let response = post(&server, COMPLETIONS, &completion(json!({"prompt": [10]})));
        (response.status == 200).then_some(response)
    });
    assert_eq!(origin(&answered), Some("miss"));
}

#[test]
fn what_says_shared_was_computed_for_another_also_where_the_queue_is_full() {
    let server = server(&["--max-num-seqs", "4", "--max-queue", "4"]);
    // As many sequences as the engine takes, in two requests: more are let in, and refused by the engine.
    let long = |seed: u64| {
        let fields = json!({"max_tokens": 300, "temperature": 1.0, "seed": seed, "n": 4, "logprobs": null});
        server.stream(COMPLETIONS, &completion(fields))
    };
    let mut first = long(1);
    first.next_chunk();
    // None of its four choices waits any more.
    server.wait_running(4.0);
    let mut second = long(2);
    let body = completion(json!({"prompt": [10, 11], "stop": ["no such text"]}));
    let num_refused = std::sync::atomic::AtomicUsize::new(0);
    let ask = || loop {
        let response = post(&server, COMPLETIONS, &body);
        if response.status == 200 {
            return origin(&response).expect("it may be cached").to_owned();
        }
        assert_eq!(response.status, 429, "{}", response.text());
        num_refused.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    };
    let origins: Vec<_> = thread::scope(|scope| {
        let askers: Vec<_> = (0..6).map(|_| scope.spawn(ask)).collect();
        poll("refusals", PATIENCE, || (num_refused.load(std::sync::atomic::Ordering::Relaxed) > 50).then_some(()));
        for stream in [&mut first, &mut second] {
            let chunks = stream.chunks();
            assert_eq!(chunks.iter().filter(|chunk| chunk["choices"][0]["finish_reason"] == "length").count(), 4);
        }
        askers.into_iter().map(|asker| asker.join().unwrap()).collect()
    });
    let num_misses = origins.iter().filter(|origin| *origin == "miss").count() as f64;
    assert!(num_misses >= 1.0, "{origins:?}");
    assert_eq!(tokens_generated(&server), 8.0 * 300.0 + 12.0 * num_misses, "{origins:?}");
}

#[test]
fn a_hit_of_many_tokens_leaves_others_their_turn_and_is_the_computed_answer() {
    let server = server(&[]);
    let body = completion(json!({"max_tokens": 1500, "logprobs": 5}));
    let computed = post(&server, COMPLETIONS, &body);
    assert_eq!(origin(&computed), Some("miss"));
    // Other bytes each time: put together each time.
    let hit = post(&server, COMPLETIONS, &with(body.clone(), json!({"user": "a"})));
    assert_eq!(origin(&hit), Some("hit"));
    assert_eq!(hit.json()["choices"], computed.json()["choices"]);
    let streamed = with(body.clone(), json!({"user": "b"}));
    let chunks = server.stream(COMPLETIONS, &streamed).chunks();
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
    assert_eq!(computed.json()["choices"][0]["text"], text);
    let talk = chat(json!({"max_tokens": 1500}));
    let (computed, hit) = (post(&server, CHAT, &talk), post(&server, CHAT, &talk));
    assert_eq!((origin(&computed), origin(&hit)), (Some("miss"), Some("hit")));
    assert_eq!(hit.json()["choices"], computed.json()["choices"]);
}

/// Answers requests only when so many are under way at once, and says how many were at most.
fn hold(listener: std::net::TcpListener, num_requests: usize, at_once: usize) -> usize {
    use std::io::{BufRead as _, BufReader, Read as _};
    use std::sync::{Condvar, Mutex};
    /// Time in which one too many would have come: it takes a millisecond.
    const WATCH: Duration = Duration::from_millis(300);
    let (state, changed) = (Mutex::new((0, 0, 0)), Condvar::new());
    thread::scope(|scope| {
        for _ in 0..num_requests {
            let (mut stream, _) = listener.accept().expect("a request comes");
            let (state, changed) = (&state, &changed);
            scope.spawn(move || {
                let mut reader = BufReader::new(stream.try_clone().expect("a socket can be shared"));
                let mut len = 0;
                loop {
                    let mut line = String::new();
                    reader.read_line(&mut line).expect("a request is lines");
                    if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                        len = value.trim().parse().expect("it is a number");
                    }
                    if line == "\r\n" {
                        break;
                    }
                }
                reader.read_exact(&mut vec![0; len]).expect("a request has its body");
                let mut now = state.lock().expect("nobody panics");
                let (num_now, num_most, num_come) = &mut *now;
                *num_now += 1;
                *num_come += 1;
                *num_most = (*num_most).max(*num_now);
                // The last round may be smaller.
                let is_round = |(_, _, num_come): &(usize, usize, usize)| *num_come >= at_once;
                changed.notify_all();
                let (now, timeout) =
                    changed.wait_timeout_while(now, PATIENCE, |now| !is_round(now)).expect("nobody panics");
                assert!(!timeout.timed_out(), "as many as are asked for come at once");
                let (mut now, _) = changed.wait_timeout_while(now, WATCH, |_| true).expect("nobody panics");
                now.0 -= 1;
                drop(now);
                let answer = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nx-moesaic-cache: miss\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}";
                stream.write_all(answer.as_bytes()).expect("the client waits for it");
            });
        }
    });
    state.into_inner().expect("nobody panics").1
}

#[test]
fn warming_asks_for_as_many_at_a_time_as_it_is_told_and_no_more() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    let url = format!("http://{}", listener.local_addr().expect("it is bound"));
    let path = std::env::temp_dir().join(format!("moesaic-warm-many-{}.jsonl", std::process::id()));
    std::fs::write(&path, "\"hello\"\n".repeat(9)).expect("temporary files can be written");
    let holder = thread::spawn(move || hold(listener, 9, 3));
    let output = Command::new(SERVER)
        .args([
            "cache",
            "warm",
            path.to_str().expect("it is UTF-8"),
            "--concurrency",
            "3",
            "--model",
            "m",
            "--url",
            &url,
        ])
        .output()
        .expect("the program can be started");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!((output.status.code(), &*said), (Some(0), "9 computed, 0 found, 0 not kept, 0 failed\n"), "{output:?}");
    assert_eq!(holder.join().expect("it does not panic"), 3);
    std::fs::remove_file(&path).expect("it is there");
}

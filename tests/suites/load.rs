//! More work than fits, and clients that go away: what is refused, and what is freed.

use std::time::Duration;

use harness::{Exchange, PATIENCE, Request, Server, poll};
use serde_json::{Value, json};

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");
const PATH: &str = "/v1/completions";

/// A disconnect must be noticed long before the request would have ended by itself.
const SOON: Duration = Duration::from_secs(5);

/// More tokens than a test waits for.
fn endless(num_choices: u32) -> Value {
    json!({"prompt": [70, 73, 71], "max_tokens": 4000, "ignore_eos": true, "n": num_choices, "logprobs": 20})
}

#[test]
fn a_full_queue_turns_requests_away_and_says_when_to_come_back() {
    let server = Server::start(SERVER, "mixtral-base", &["--max-num-seqs", "1", "--max-queue", "1"]);
    let mut running = server.stream(PATH, &endless(1));
    running.next_chunk();
    let waiting = Request::post(PATH, &endless(1)).write(server.address).expect("the server listens");
    poll("a request that waits", PATIENCE, || {
        (server.metrics().value("vllm:num_requests_waiting", &[]) == Some(1.0)).then_some(())
    });
    let refused = server.post(PATH, &endless(1));
    assert_eq!(refused.status, 429, "{}", refused.text());
    assert_eq!(refused.header("retry-after"), Some("1"));
    let error = &refused.json()["error"];
    assert_eq!((error["type"].as_str(), error["code"].as_str()), (Some("rate_limit_error"), Some("queue_full")));
    assert!(error["param"].is_null());
    let refusals = [("reason", "queue_full")];
    assert_eq!(server.metrics().value("vllm:admission_rejections_total", &refusals), Some(1.0));

    drop(running);
    drop(waiting);
    server.wait_idle();
    server.ask(PATH, &json!({"prompt": [70], "max_tokens": 1}));
}

#[test]
fn a_request_of_many_sequences_is_taken_whole_or_not_at_all() {
    let server = Server::start(SERVER, "mixtral-base", &["--max-num-seqs", "2", "--max-queue", "3"]);
    let num_waiting = |count| {
        poll("a number of waiting sequences", PATIENCE, || {
            (server.metrics().value("vllm:num_requests_waiting", &[]) == Some(count)).then_some(())
        });
    };
    let mut running = server.stream(PATH, &endless(2));
    running.next_chunk();
    server.wait_running(2.0);
    let waiting = Request::post(PATH, &endless(2)).write(server.address).expect("the server listens");
    num_waiting(2.0);
    // There is room for one of the two.
    let refused = server.post(PATH, &endless(2));
    assert_eq!(refused.status, 429, "{}", refused.text());
    num_waiting(2.0);
    let never = server.post(PATH, &endless(4));
    assert_eq!((never.status, never.json()["error"]["param"].as_str()), (400, Some("n")), "more than can ever wait");
    drop(running);
    drop(waiting);
    server.wait_idle();
}

#[test]
fn a_client_that_leaves_a_stream_frees_its_blocks() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let aborted =
        |server: &Server| server.metrics().value("vllm:request_success_total", &[("finished_reason", "abort")]);
    assert_eq!(aborted(&server), Some(0.0), "the series exists before its first event");
    let mut stream = server.stream(PATH, &endless(3));
    stream.next_chunk();
    server.wait_running(3.0);
    assert!(server.metrics().value("vllm:kv_cache_usage_perc", &[]).unwrap() > 0.0);
    drop(stream);
    poll("freed blocks", SOON, || server.metrics().is_idle().then_some(()));
    poll("aborted sequences", SOON, || (aborted(&server) == Some(3.0)).then_some(()));
    let tokens = server.metrics().value("vllm:generation_tokens_total", &[]).unwrap();
    assert!(tokens < 3.0 * 4000.0, "{tokens} tokens were generated for nobody");
}

#[test]
fn a_client_that_leaves_before_the_answer_frees_its_blocks() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    for path in [PATH, "/v1/chat/completions"] {
        let mut body = endless(2);
        if path != PATH {
            body =
                json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 4000, "ignore_eos": true, "n": 2});
        }
        let connection = Request::post(path, &body).write(server.address).expect("the server listens");
        server.wait_running(2.0);
        drop(connection);
        poll("freed blocks", SOON, || server.metrics().is_idle().then_some(()));
    }
    let finished = |reason| server.metrics().value("vllm:request_success_total", &[("finished_reason", reason)]);
    poll("aborted sequences", SOON, || (finished("abort") == Some(4.0)).then_some(()));
    assert_eq!(finished("length"), Some(0.0));
}

#[test]
fn a_stop_string_frees_the_sequence_at_once() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let mut body = endless(1);
    body["stop"] = json!(["a", "e", "o", "t"]);
    body["temperature"] = json!(0);
    let answer = server.ask(PATH, &body);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    poll("freed blocks", SOON, || server.metrics().is_idle().then_some(()));
    assert!(server.metrics().value("vllm:generation_tokens_total", &[]).unwrap() < 4000.0);
}

#[test]
fn more_sequences_than_blocks_are_preempted_and_answer_the_same() {
    // 16 blocks of 16 tokens: three sequences of 100 tokens do not fit beside each other.
    let kv_bytes = {
        let server = Server::start(SERVER, "mixtral-base", &[]);
        let info = server.get("/server_info").json();
        info["model"]["kv_bytes_per_token"].as_u64().expect("a number of bytes") * 256
    };
    let prompts = json!([[70, 73, 71], [57, 74, 267], [261, 295, 323]]);
    let body = json!({"prompt": prompts, "max_tokens": 100, "ignore_eos": true, "seed": 11, "logprobs": 2});
    let roomy = Server::start(SERVER, "mixtral-base", &[]).ask(PATH, &body);
    let scarce = Server::start(SERVER, "mixtral-base", &["--kv-cache-memory", &kv_bytes.to_string()]);
    let answer = scarce.ask(PATH, &body);
    assert_eq!(answer["choices"], roomy["choices"]);
    assert!(scarce.metrics().value("vllm:num_preemptions_total", &[]).unwrap() > 0.0, "nothing was preempted");
    scarce.wait_idle();
}

#[test]
fn requests_at_once_answer_what_each_answers_alone() {
    let server = Server::start(SERVER, "mixtral-base", &["--max-num-seqs", "4", "--max-num-batched-tokens", "16"]);
    let body = |number: u32| {
        let prompt: Vec<u32> = (0..20 + number).map(|position| 60 + (position * number) % 200).collect();
        json!({"prompt": prompt, "max_tokens": 20, "ignore_eos": true, "seed": number, "logprobs": 1})
    };
    let alone: Vec<Value> = (1..=12).map(|number| server.ask(PATH, &body(number))["choices"].clone()).collect();
    let streams: Vec<_> = (1..=12)
        .map(|number| Request::post(PATH, &body(number)).write(server.address).expect("the server listens"))
        .collect();
    for (stream, alone) in streams.into_iter().zip(alone) {
        let response = Exchange::read_head(stream).and_then(Exchange::finish).expect("the server answers");
        assert_eq!(response.json()["choices"], alone);
    }
    server.wait_idle();
}

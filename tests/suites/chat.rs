//! `/v1/chat/completions`: the shape of streams, choices, stops, seeds and log-probs.

use std::io::Write as _;
use std::process::{Command, Stdio};

use harness::checkpoint::Copy;
use harness::{Event, Server, with};
use serde_json::{Value, json};

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");
const PATH: &str = "/v1/chat/completions";

/// A chat with `fields` on top.
fn chat(fields: Value) -> Value {
    let messages =
        json!([{"role": "system", "content": "You are terse."}, {"role": "user", "content": "What is a router?"}]);
    with(json!({"messages": messages, "max_tokens": 48, "ignore_eos": true}), fields)
}

fn content(answer: &Value, choice: usize) -> &str {
    answer["choices"][choice]["message"]["content"].as_str().expect("content is text")
}

/// The texts of the chunks of one choice put together.
fn streamed(chunks: &[Value], choice: u64) -> String {
    let of_choice = |chunk: &&Value| chunk["choices"][0]["index"] == choice;
    chunks.iter().filter(of_choice).filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect()
}

#[test]
fn a_stream_is_a_role_then_text_then_an_end_then_done() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let mut stream = server.stream(PATH, &chat(json!({"temperature": 0, "max_tokens": 8})));
    let events = stream.events();
    let chunks: Vec<Value> = events
        .iter()
        .filter_map(|event| match event {
            Event::Data(data) if data != "[DONE]" => Some(serde_json::from_str(data).unwrap()),
            _ => None,
        })
        .collect();
    assert!(stream.bytes.ends_with(b"\n\ndata: [DONE]\n\n"));
    assert!(stream.bytes.starts_with(b"data: {\"id\":\"chatcmpl-"));
    assert_eq!(stream.bytes.windows(6).filter(|bytes| bytes == b"[DONE]").count(), 1);

    let first = &chunks[0];
    assert_eq!(first["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(first["object"], "chat.completion.chunk");
    assert_eq!(first["model"], "mixtral-base");
    assert!(first["created"].is_u64() && first["system_fingerprint"].is_string());
    for chunk in &chunks {
        assert_eq!(chunk["id"], first["id"]);
        assert_eq!(chunk["created"], first["created"]);
        assert!(chunk.get("usage").is_none(), "usage was not asked for");
    }
    let (last, rest) = chunks.split_last().unwrap();
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    assert_eq!(last["choices"][0]["delta"], json!({}));
    for chunk in &rest[1..] {
        assert!(chunk["choices"][0]["delta"].get("role").is_none(), "the role comes once");
        assert!(chunk["choices"][0]["finish_reason"].is_null());
    }
}

#[test]
fn a_stream_says_what_the_whole_answer_says() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    // At temperature 1 the model writes arbitrary bytes: characters of several tokens, and broken ones.
    for fields in [
        json!({"temperature": 0}),
        json!({"seed": 1, "n": 3}),
        json!({"seed": 2, "temperature": 1.5, "top_k": 200, "max_tokens": 200}),
        json!({"seed": 3, "top_p": 0.9, "min_p": 0.01, "presence_penalty": 0.5, "frequency_penalty": 0.5}),
        json!({"seed": 4, "repetition_penalty": 1.3, "skip_special_tokens": false}),
    ] {
        let body = chat(fields);
        let whole = server.ask(PATH, &body);
        let chunks = server.stream(PATH, &body).chunks();
        for choice in whole["choices"].as_array().unwrap() {
            let index = choice["index"].as_u64().unwrap();
            assert_eq!(streamed(&chunks, index), choice["message"]["content"], "{body}");
        }
    }
}

#[test]
fn usage_is_streamed_only_where_asked_for_and_agrees_with_the_whole_answer() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let body = chat(json!({"temperature": 0, "n": 2, "max_tokens": 9}));
    // The first one computes the prompt, all others find it cached.
    server.ask(PATH, &body);
    let whole = server.ask(PATH, &body);
    let usage = &whole["usage"];
    assert_eq!(usage["completion_tokens"], 18);
    let prompt = server.ask("/tokenize", &body)["count"].as_u64().unwrap();
    assert_eq!(usage["prompt_tokens"], prompt);
    assert_eq!(usage["total_tokens"], prompt + 18);

    let mut asks = body.clone();
    asks["stream_options"] = json!({"include_usage": true});
    let chunks = server.stream(PATH, &asks).chunks();
    let (last, rest) = chunks.split_last().unwrap();
    assert_eq!(&last["usage"], usage);
    assert_eq!(last["choices"], json!([]));
    assert!(rest.iter().all(|chunk| chunk.get("usage").is_some_and(Value::is_null)), "null until the last chunk");

    asks["stream_options"] = json!({"include_usage": true, "continuous_usage_stats": true});
    let chunks = server.stream(PATH, &asks).chunks();
    assert!(chunks.iter().all(|chunk| chunk["usage"]["prompt_tokens"] == prompt));
    assert_eq!(&chunks.last().unwrap()["usage"], usage);
}

#[test]
fn silence_is_filled_with_comments() {
    let args = ["--max-num-seqs", "1", "--keep-alive-interval", "0.02"];
    let server = Server::start(SERVER, "mixtral-base", &args);
    let mut first = server.stream(PATH, &chat(json!({"max_tokens": 3000})));
    first.next_chunk();
    server.wait_running(1.0);
    // The second request has no place in the batch until the first one is gone.
    let mut second = server.stream(PATH, &chat(json!({"max_tokens": 2})));
    assert!(matches!(second.next_event().unwrap(), Some(Event::Data(_))), "the role does not wait");
    assert_eq!(second.next_event().unwrap(), Some(Event::Comment("keep-alive".to_owned())));
    drop(first);
    assert_eq!(second.chunks().last().unwrap()["choices"][0]["finish_reason"], "length");
}

#[test]
fn stop_strings_end_the_text_and_are_never_shown() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let free = server.ask(PATH, &chat(json!({"temperature": 0})));
    let text = content(&free, 0).to_owned();
    let chars: Vec<char> = text.chars().collect();
    assert!(chars.len() > 40, "the model writes enough to cut: {text:?}");
    // Strings that begin and end anywhere, within a token and across tokens.
    for start in (5..30).step_by(3) {
        let stop: String = chars[start..start + 4].iter().collect();
        let expected = &text[..text.find(&stop).unwrap()];
        let body = chat(json!({"temperature": 0, "stop": ["never written", stop]}));
        let whole = server.ask(PATH, &body);
        assert_eq!(content(&whole, 0), expected, "stop at {stop:?}");
        assert_eq!(whole["choices"][0]["finish_reason"], "stop");
        assert_eq!(whole["choices"][0]["stop_reason"], stop.as_str());
        let chunks = server.stream(PATH, &body).chunks();
        assert_eq!(streamed(&chunks, 0), expected, "stop at {stop:?}");
        assert_eq!(chunks.last().unwrap()["choices"][0]["stop_reason"], stop.as_str());

        let kept = chat(json!({"temperature": 0, "stop": stop, "include_stop_str_in_output": true}));
        assert_eq!(content(&server.ask(PATH, &kept), 0), format!("{expected}{stop}"));
    }
    server.wait_idle();
}

#[test]
fn a_seed_gives_the_same_answer_and_choices_differ() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let ask = |fields: Value| server.ask(PATH, &chat(fields));
    let first = ask(json!({"seed": 7, "n": 4}));
    let second = ask(json!({"seed": 7, "n": 4}));
    assert_eq!(first["choices"], second["choices"]);
    let texts: std::collections::BTreeSet<&str> = (0..4).map(|choice| content(&first, choice)).collect();
    assert_eq!(texts.len(), 4, "choices are drawn apart");
    assert_eq!(content(&ask(json!({"seed": 7})), 0), content(&first, 0), "choice 0 does not depend on n");
    assert_ne!(content(&ask(json!({"seed": 8})), 0), content(&first, 0));
    assert_ne!(content(&ask(json!({})), 0), content(&ask(json!({})), 0), "without a seed one is drawn");
}

#[test]
fn logprobs_name_each_token_and_its_alternatives() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let body = chat(json!({"temperature": 0, "max_tokens": 12, "logprobs": true, "top_logprobs": 3}));
    let whole = server.ask(PATH, &body);
    let entries = whole["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(entries.len(), 12);
    let mut bytes = Vec::new();
    for entry in entries {
        let top = entry["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        assert_eq!(top[0]["token"], entry["token"], "the greedy token is the likeliest");
        assert_eq!(top[0]["logprob"], entry["logprob"]);
        let logprobs: Vec<f64> = top.iter().map(|entry| entry["logprob"].as_f64().unwrap()).collect();
        assert!(logprobs.is_sorted_by(|a, b| a >= b) && logprobs[0] <= 0.0, "{logprobs:?}");
        let token: Vec<u8> = serde_json::from_value(entry["bytes"].clone()).unwrap();
        bytes.extend(token);
    }
    assert_eq!(String::from_utf8_lossy(&bytes).trim_start(), content(&whole, 0).trim_start());

    let chunks = server.stream(PATH, &body).chunks();
    let in_stream = chunks.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array());
    let in_stream: Vec<&Value> = in_stream.flatten().collect();
    assert_eq!(in_stream, entries.iter().collect::<Vec<_>>());

    let without = server.ask(PATH, &chat(json!({"max_tokens": 2})));
    assert!(without["choices"][0]["logprobs"].is_null());
}

#[test]
fn one_answer_has_the_shape_of_openai() {
    let server = Server::start(SERVER, "mixtral-base", &["--served-model-name", "first,second"]);
    for (asked, answered) in [(Some("first"), "first"), (Some("second"), "second"), (None, "first")] {
        let answer = server.ask(PATH, &chat(json!({"model": asked, "max_completion_tokens": 3})));
        assert_eq!(answer["model"], answered);
        assert_eq!(answer["object"], "chat.completion");
        assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
        let choice = &answer["choices"][0];
        assert_eq!(choice["message"]["role"], "assistant");
        assert_eq!((choice["index"].as_u64(), choice["finish_reason"].as_str()), (Some(0), Some("length")));
        assert_eq!(answer["usage"]["completion_tokens"], 3);
    }
    let ids = server.ask(PATH, &chat(json!({"return_token_ids": true, "max_tokens": 5})));
    assert_eq!(ids["choices"][0]["token_ids"].as_array().unwrap().len(), 5);
    assert_eq!(ids["prompt_token_ids"], server.ask("/tokenize", &chat(json!({})))["tokens"]);
}

#[test]
fn the_template_may_be_replaced_and_must_be_there() {
    let bare = Copy::of("mixtral-base");
    bare.edit_json("tokenizer_config.json", |config| {
        config.as_object_mut().unwrap().remove("chat_template").expect("the checkpoint has a template");
    });
    let without = Server::start_folder(SERVER, &bare.folder, &[]);
    let refused = without.post(PATH, &chat(json!({})));
    assert_eq!((refused.status, refused.json()["error"]["param"].as_str()), (400, Some("messages")));
    assert_eq!(without.get("/server_info").json()["model"]["has_chat_template"], false);

    let file = bare.path("template.jinja");
    std::fs::write(&file, "{% for message in messages %}{{ message.content }}|{% endfor %}{{ extra }}").unwrap();
    let replaced = Server::start_folder(SERVER, &bare.folder, &["--chat-template", file.to_str().unwrap()]);
    let body = chat(json!({"chat_template_kwargs": {"extra": "end"}}));
    let ids = replaced.ask("/tokenize", &body)["tokens"].clone();
    let expected = json!({"prompt": "You are terse.|What is a router?|end", "add_special_tokens": false});
    assert_eq!(ids, replaced.ask("/tokenize", &expected)["tokens"]);
    assert_eq!(replaced.ask(PATH, &body)["usage"]["prompt_tokens"], ids.as_array().unwrap().len());
}

/// What `moesaic chat` makes of these lines, and how it ends.
fn converse(server: &Server, args: &[&str], lines: &str) -> (String, String, bool) {
    let mut command = Command::new(SERVER);
    command.args(["chat", "--url", &format!("http://{}", server.address)]).args(args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut chat = command.spawn().expect("the program starts");
    chat.stdin.take().expect("it is piped").write_all(lines.as_bytes()).expect("it reads");
    let ended = chat.wait_with_output().expect("it ends");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&ended.stdout), text(&ended.stderr), ended.status.success())
}

#[test]
fn a_conversation_from_a_pipe_says_in_the_end_what_failed() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let (said, complaints, is_success) = converse(&server, &["--max-tokens", "4"], "one\n\ntwo\n");
    assert!(is_success && complaints.is_empty() && said.lines().count() >= 2, "{said} {complaints}");
    let long = format!("one\n{}\n", "word ".repeat(20_000));
    let (_, complaints, is_success) = converse(&server, &["--max-tokens", "4"], &long);
    assert!(!is_success && complaints.contains("1 of 2 answers failed"), "{complaints}");
    let (_, complaints, is_success) = converse(&server, &["--temperature=-1"], "one\n");
    assert!(!is_success && complaints.contains("1 of 1 answers failed"), "{complaints}");
}

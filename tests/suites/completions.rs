//! `/v1/completions`: prompts in every form, echo, log-probs, choices, stops, biases.

use harness::checkpoint::Copy;
use harness::{Server, golden, with};
use serde_json::{Value, json};

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");
const PATH: &str = "/v1/completions";
const PROMPT: &str = "The river carried the boat.";

fn completion(fields: Value) -> Value {
    with(json!({"prompt": PROMPT, "max_tokens": 24, "ignore_eos": true}), fields)
}

fn text(answer: &Value, choice: usize) -> &str {
    answer["choices"][choice]["text"].as_str().expect("text is text")
}

fn streamed(chunks: &[Value], choice: u64) -> String {
    let of_choice = |chunk: &&Value| chunk["choices"][0]["index"] == choice;
    chunks.iter().filter(of_choice).filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect()
}

#[test]
fn a_stream_says_what_the_whole_answer_says() {
    let server = Server::start(SERVER, "qwen3_moe-base", &[]);
    for fields in [
        json!({"temperature": 0}),
        json!({"seed": 5, "n": 3, "max_tokens": 100}),
        json!({"seed": 6, "echo": true, "logprobs": 2}),
        json!({"seed": 7, "prompt": [PROMPT, "tokens"], "n": 2, "echo": true}),
        json!({"seed": 8, "prompt": [[70, 73, 71], [16]], "stop": ["e", "a"]}),
    ] {
        let body = completion(fields);
        let whole = server.ask(PATH, &body);
        let mut stream = server.stream(PATH, &body);
        let chunks = stream.chunks();
        assert!(stream.bytes.starts_with(b"data: {\"id\":\"cmpl-") && stream.bytes.ends_with(b"data: [DONE]\n\n"));
        for choice in whole["choices"].as_array().unwrap() {
            let index = choice["index"].as_u64().unwrap();
            assert_eq!(streamed(&chunks, index), choice["text"], "{body}");
            let ends: Vec<&Value> = chunks
                .iter()
                .filter(|chunk| chunk["choices"][0]["index"] == index)
                .map(|chunk| &chunk["choices"][0]["finish_reason"])
                .filter(|reason| !reason.is_null())
                .collect();
            assert_eq!(ends, [&choice["finish_reason"]], "{body}");
        }
        assert!(chunks.iter().all(|chunk| chunk["object"] == "text_completion" && chunk["id"] == chunks[0]["id"]));
    }
    let body = completion(json!({"stream_options": {"include_usage": true}}));
    let chunks = server.stream(PATH, &body).chunks();
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], 24);
    assert_eq!(chunks.last().unwrap()["choices"], json!([]));
}

#[test]
fn text_and_token_ids_are_the_same_prompt() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let samples = golden::reference("mixtral-base")["tokenizer"]["samples"].clone();
    for sample in samples.as_array().unwrap().iter().filter(|sample| sample["text"] != "") {
        let ask = |prompt: &Value, fields: Value| {
            let mut body = completion(fields);
            body["prompt"] = prompt.clone();
            server.ask(PATH, &body)
        };
        let greedy = json!({"temperature": 0, "return_token_ids": true});
        let by_text = ask(&sample["text"], greedy.clone());
        assert_eq!(by_text["choices"][0]["prompt_token_ids"], sample["ids_with_special"]);
        let by_ids = ask(&sample["ids_with_special"], greedy.clone());
        assert_eq!(by_ids["choices"][0]["token_ids"], by_text["choices"][0]["token_ids"]);
        assert_eq!(text(&by_ids, 0), text(&by_text, 0));
        let bare =
            ask(&sample["text"], json!({"add_special_tokens": false, "return_token_ids": true, "max_tokens": 1}));
        assert_eq!(bare["choices"][0]["prompt_token_ids"], sample["ids"]);
    }
}

#[test]
fn a_batch_of_prompts_gives_what_each_gives_alone() {
    let server = Server::start(SERVER, "olmoe-base", &[]);
    let prompts = json!([[70, 73, 71, 16], [57, 74], [267, 261, 295, 323, 351]]);
    let together = server.ask(PATH, &completion(json!({"prompt": prompts, "n": 2, "seed": 3})));
    assert_eq!(together["choices"].as_array().unwrap().len(), 6);
    assert_eq!(together["usage"]["prompt_tokens"], 11);
    assert_eq!(together["usage"]["completion_tokens"], 6 * 24);
    for (position, prompt) in prompts.as_array().unwrap().iter().enumerate() {
        let alone = server.ask(PATH, &completion(json!({"prompt": prompt, "n": 2, "seed": 3})));
        for choice in 0..2 {
            assert_eq!(together["choices"][position * 2 + choice]["index"], position * 2 + choice);
            assert_eq!(text(&together, position * 2 + choice), text(&alone, choice));
        }
    }
}

#[test]
fn echo_shows_the_prompt_and_scores_it() {
    let server = Server::start(SERVER, "qwen3_moe-base", &[]);
    let plain = server.ask(PATH, &completion(json!({"temperature": 0})));
    let echoed = server.ask(PATH, &completion(json!({"temperature": 0, "echo": true, "logprobs": 2})));
    assert_eq!(text(&echoed, 0), format!("{PROMPT}{}", text(&plain, 0)));
    let logprobs = &echoed["choices"][0]["logprobs"];
    let num_prompt = usize::try_from(echoed["usage"]["prompt_tokens"].as_u64().unwrap()).unwrap();
    let list = |name: &str| logprobs[name].as_array().unwrap().clone();
    for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(list(name).len(), num_prompt + 24, "{name}");
    }
    assert!(list("token_logprobs")[0].is_null() && list("top_logprobs")[0].is_null(), "nothing comes before the first");
    assert!(list("token_logprobs")[1..].iter().all(|logprob| logprob.as_f64().unwrap() <= 0.0));
    assert_eq!(list("text_offset")[0], 0);
    assert_eq!(list("text_offset")[num_prompt], PROMPT.chars().count());

    // Scoring alone: no token is generated, and the prompt's log-probs are the same.
    let scored = server.ask(PATH, &completion(json!({"max_tokens": 0, "echo": true, "logprobs": 2})));
    assert_eq!(text(&scored, 0), PROMPT);
    assert_eq!(scored["usage"]["completion_tokens"], 0);
    assert_eq!(
        scored["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap()[..],
        list("token_logprobs")[..num_prompt]
    );

    // A greedy continuation fed back as a prompt is scored as it was when it was sampled.
    let ids = server.ask(PATH, &completion(json!({"temperature": 0, "return_token_ids": true, "logprobs": 0})));
    let choice = &ids["choices"][0];
    let mut prompt = choice["prompt_token_ids"].as_array().unwrap().clone();
    prompt.extend(choice["token_ids"].as_array().unwrap().clone());
    let fed = server.ask(PATH, &completion(json!({"prompt": prompt, "max_tokens": 0, "echo": true, "logprobs": 0})));
    let fed = fed["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().clone();
    assert_eq!(fed[num_prompt..], choice["logprobs"]["token_logprobs"].as_array().unwrap()[..]);

    let vllm = server.ask(PATH, &completion(json!({"prompt_logprobs": 1, "max_tokens": 1})));
    let entries = vllm["choices"][0]["prompt_logprobs"].as_array().unwrap();
    assert_eq!(entries.len(), num_prompt);
    assert!(entries[0].is_null() && entries[1..].iter().all(Value::is_object));
}

#[test]
fn logprobs_hold_the_sampled_token_and_the_alternatives() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let body = completion(
        json!({"temperature": 0, "logprobs": 3, "return_tokens_as_token_ids": true, "return_token_ids": true}),
    );
    let choice = server.ask(PATH, &body)["choices"][0].clone();
    let logprobs = &choice["logprobs"];
    for (position, id) in choice["token_ids"].as_array().unwrap().iter().enumerate() {
        let name = format!("token_id:{id}");
        assert_eq!(logprobs["tokens"][position], name.as_str());
        let top = logprobs["top_logprobs"][position].as_object().unwrap();
        assert_eq!(top.len(), 3);
        assert_eq!(top[&name], logprobs["token_logprobs"][position]);
        let (first, _) = top.iter().next().unwrap();
        assert_eq!(first, &name, "best first");
    }
    // A sampled token that is not among the alternatives is added to them.
    let sampled = server.ask(PATH, &completion(json!({"seed": 1, "temperature": 2, "logprobs": 0})));
    assert!(
        sampled["choices"][0]["logprobs"]["top_logprobs"].as_array().unwrap().iter().all(|top| top
            .as_object()
            .unwrap()
            .len()
            == 1)
    );
}

#[test]
fn tokens_can_be_forced_forbidden_and_made_to_stop() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let ids = |fields: Value| {
        let mut body = completion(fields);
        body["return_token_ids"] = json!(true);
        let answer = server.ask(PATH, &body);
        let choice = &answer["choices"][0];
        let ids: Vec<u64> = serde_json::from_value(choice["token_ids"].clone()).unwrap();
        (ids, choice["finish_reason"].clone(), choice["stop_reason"].clone())
    };
    let (forced, reason, _) = ids(json!({"logit_bias": {"70": 100}, "temperature": 0}));
    assert_eq!((forced, reason), (vec![70; 24], json!("length")));
    let (free, _, _) = ids(json!({"temperature": 0}));
    let (without, _, _) = ids(json!({"temperature": 0, "logit_bias": {free[0].to_string(): -100}}));
    assert!(!without.contains(&free[0]));

    let (stopped, reason, which) = ids(json!({"temperature": 0, "stop_token_ids": [free[5]]}));
    let first = free.iter().position(|id| *id == free[5]).unwrap();
    assert_eq!((&stopped[..], reason, which), (&free[..=first], json!("stop"), json!(free[5])));
    let late = json!({"temperature": 0, "stop_token_ids": [free[0]], "min_tokens": 12});
    assert!(ids(late).0.len() >= 12, "nothing stops before min_tokens");

    // The model's own end of sequence (2) stops, and is not shown, unless it is to be ignored.
    let end = json!({"temperature": 0, "logit_bias": {"2": 100}, "ignore_eos": false});
    let (ended, reason, which) = ids(end.clone());
    assert_eq!((ended, reason, which), (vec![2], json!("stop"), Value::Null));
    assert_eq!(text(&server.ask(PATH, &completion(end)), 0), "");
    let (ignored, reason, _) = ids(json!({"temperature": 0, "logit_bias": {"2": 100}}));
    assert_eq!((ignored.len(), reason), (24, json!("length")));
}

#[test]
fn filters_narrow_to_the_greedy_token() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let greedy = server.ask(PATH, &completion(json!({"temperature": 0})));
    for fields in [
        json!({"top_k": 1, "temperature": 2}),
        json!({"top_p": 0.000_001, "temperature": 2}),
        json!({"min_p": 1, "temperature": 2}),
    ] {
        assert_eq!(text(&server.ask(PATH, &completion(fields.clone())), 0), text(&greedy, 0), "{fields}");
    }
    let cut = server.ask(PATH, &completion(json!({"truncate_prompt_tokens": 3, "return_token_ids": true})));
    assert_eq!(cut["choices"][0]["prompt_token_ids"], json!([81, 271, 16]));
    assert_eq!(server.ask(PATH, &json!({"prompt": PROMPT, "ignore_eos": true}))["usage"]["completion_tokens"], 16);
}

#[test]
fn the_checkpoint_says_what_is_sampled_where_the_request_does_not() {
    let copy = Copy::of("mixtral-base");
    copy.edit_json("generation_config.json", |config| {
        config["top_k"] = json!(1);
        config["eos_token_id"] = json!([2, 70]);
    });
    let server = Server::start_folder(SERVER, &copy.folder, &[]);
    let greedy = server.ask(PATH, &completion(json!({"temperature": 0})));
    assert_eq!(text(&server.ask(PATH, &completion(json!({}))), 0), text(&greedy, 0));
    let seeds = [1, 2].map(|seed| server.ask(PATH, &completion(json!({"top_k": 0, "temperature": 2, "seed": seed}))));
    assert_ne!(text(&seeds[0], 0), text(&seeds[1], 0), "the request wins");
    let ended = server.ask(PATH, &completion(json!({"logit_bias": {"70": 100}, "ignore_eos": false})));
    assert_eq!((&ended["choices"][0]["finish_reason"], text(&ended, 0)), (&json!("stop"), ""));
}

//! Models that are no plain decoders, through HTTP: an encoder that reads prompts whole, layers that carry a state.

use harness::{Server, golden};
use serde_json::{Value, json};

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");

fn prompts(name: &str) -> Vec<Value> {
    golden::reference(name)["prompts"].as_array().expect("a list").clone()
}

fn request(prompt: &Value) -> Value {
    json!({"prompt": prompt, "temperature": 0, "max_tokens": 32, "ignore_eos": true, "return_token_ids": true})
}

#[test]
fn an_encoders_input_is_the_prompt_and_the_output_is_all_the_decoders() {
    let server = Server::start(SERVER, "switch_transformers-capacity", &[]);
    for prompt in prompts("switch_transformers-capacity") {
        let answer = server.ask("/v1/completions", &request(&prompt["ids"]));
        let num_prompt = prompt["ids"].as_array().expect("ids").len();
        let details = json!({"cached_tokens": 0});
        let usage = json!({"prompt_tokens": num_prompt, "completion_tokens": 32, "total_tokens": num_prompt + 32,
            "prompt_tokens_details": details});
        for (key, count) in usage.as_object().expect("an object") {
            assert_eq!(answer["usage"][key], *count, "{key}");
        }
        assert_eq!(answer["choices"][0]["token_ids"], prompt["greedy_ids"]);
    }
    // The longer prompts of this folder overflow their experts.
    let dropped = server.metrics().value("moesaic_expert_dropped_tokens_total", &[]).expect("the counter");
    assert!(dropped > 0.0, "{dropped}");
    assert_eq!(server.get("/server_info").json()["model"]["has_encoder"], true);
}

/// What an encoder reads as a whole has no log-probs; the rest of `echo` works.
#[test]
fn what_an_encoder_cannot_give_is_refused() {
    let server = Server::start(SERVER, "switch_transformers-base", &[]);
    let ask = |extra: Value| {
        let mut body = json!({"prompt": "The mill", "max_tokens": 4, "temperature": 0});
        body.as_object_mut().expect("an object").extend(extra.as_object().expect("an object").clone());
        server.post("/v1/completions", &body)
    };
    for extra in [json!({"prompt_logprobs": 1}), json!({"echo": true, "logprobs": 1})] {
        let response = ask(extra);
        assert_eq!(response.status, 400, "{}", response.text());
        assert_eq!(response.json()["error"]["param"], "prompt_logprobs", "{}", response.text());
    }
    let echoed = ask(json!({"echo": true}));
    assert_eq!(echoed.status, 200, "{}", echoed.text());
    assert!(echoed.json()["choices"][0]["text"].as_str().expect("text").starts_with("The mill"));
    let scored = ask(json!({"logprobs": 2}));
    assert_eq!(scored.json()["choices"][0]["logprobs"]["tokens"].as_array().expect("tokens").len(), 4);
}

/// A prompt longer than a step may be is read all the same: an encoder's input cannot be cut.
#[test]
fn an_encoder_reads_more_than_a_step_may_hold() {
    let server = Server::start(SERVER, "switch_transformers-base", &["--max-num-batched-tokens", "16"]);
    let prompts = prompts("switch_transformers-base");
    let together = request(&prompts.iter().map(|prompt| prompt["ids"].clone()).collect());
    let answer = server.ask("/v1/completions", &together);
    for (choice, prompt) in prompts.iter().enumerate() {
        assert_eq!(answer["choices"][choice]["token_ids"], prompt["greedy_ids"], "{}", prompt["name"]);
    }
}

#[test]
fn more_requests_than_states_wait_their_turn() {
    // Half of it holds one state of 16.5 KiB, and not two.
    let server = Server::start(SERVER, "qwen3_next-base", &["--kv-cache-memory", "64KiB", "--max-model-len", "64"]);
    let model = server.get("/server_info").json()["model"].clone();
    let count = |key: &str| model[key].as_u64().expect("a count");
    let expected = 32 * 1024 / count("state_bytes_per_sequence");
    assert_eq!(count("num_state_slots"), expected);
    assert!(expected < 4, "fewer states than requests");
    let prompts = prompts("qwen3_next-base");
    let short = &prompts[..2];
    let many: Vec<Value> = short.iter().cycle().take(8).map(|prompt| prompt["ids"].clone()).collect();
    let answer = server.ask("/v1/completions", &request(&Value::Array(many)));
    for choice in 0..8 {
        assert_eq!(answer["choices"][choice]["token_ids"], short[choice % 2]["greedy_ids"], "choice {choice}");
    }
    server.wait_idle();
    assert_eq!(server.metrics().value("moesaic_state_slots_usage_perc", &[]), Some(0.0));
}

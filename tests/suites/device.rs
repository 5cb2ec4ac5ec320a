//! A server that computes on a CUDA device, or an emulated one: `cargo test -p moesaic-tests --features cuda --test device`.

use harness::{Server, golden};
use serde_json::{Value, json};

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");

fn request(ids: &Value) -> Value {
    json!({"prompt": ids, "temperature": 0, "max_tokens": 12, "ignore_eos": true, "return_token_ids": true})
}

#[test]
fn models_serve_from_a_device() {
    for name in ["mixtral-base", "deepseek_v3-base"] {
        let server = Server::start(SERVER, name, &["--device", "cuda", "--dtype", "f32"]);
        let info = server.get("/server_info").json();
        assert_eq!(info["config"]["device"], "cuda:0");
        let model = &info["model"];
        assert!(model["device"].as_str().is_some_and(|device| device.starts_with("cuda:0 (")), "{model}");
        let [all, free] = ["device_memory_bytes", "device_free_bytes"].map(|name| model[name].as_u64().expect("bytes"));
        assert!(0 < free && free < all, "{model}");
        let reference = golden::reference(name);
        let prompts = reference["prompts"].as_array().expect("a list");
        let ids: Value = prompts.iter().map(|prompt| prompt["ids"].clone()).collect();
        let together = server.ask("/v1/completions", &request(&ids));
        for (position, prompt) in prompts.iter().enumerate() {
            let expected = &prompt["greedy_ids"].as_array().expect("a list")[..12];
            assert_eq!(together["choices"][position]["token_ids"], json!(expected), "{name}: {}", prompt["name"]);
        }
    }
}

/// By itself a build that knows devices takes the first one.
#[test]
fn a_device_is_found_and_can_be_left() {
    let device = |server: &Server| server.get("/server_info").json()["model"]["device"].clone();
    let found = device(&Server::start(SERVER, "olmoe-base", &[]));
    assert!(found.as_str().is_some_and(|name| name.starts_with("cuda:0 (")), "{found}");
    assert_eq!(device(&Server::start(SERVER, "olmoe-base", &["--device", "cpu"])), "cpu");
}

#[test]
fn what_does_not_fit_is_refused_with_the_numbers() {
    let refused = |args: &[&str]| {
        let (status, output) = Server::fail(SERVER, &golden::folder("olmoe-base"), args);
        assert!(!status.success());
        output
    };
    // The largest step is computed first.
    let output = refused(&["--device", "cuda", "--gpu-memory-utilization", "0.05", "--max-num-batched-tokens", "32"]);
    assert!(output.contains("the steps want ") && output.contains("--gpu-memory-utilization"), "{output}");
    let output = refused(&["--device", "cuda", "--kv-cache-memory", "100TiB"]);
    assert!(output.contains("the KV cache wants 102400.00 GiB on the device"), "{output}");
    let output = refused(&["--device", "cuda:97"]);
    assert!(output.contains("there is no device cuda:97: the driver finds "), "{output}");
    let output = refused(&["--device", "cuda", "--expert-memory", "50%"]);
    assert!(output.contains("--expert-memory is for models that compute on the CPU"), "{output}");
}

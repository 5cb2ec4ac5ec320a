//! Every instruction set of the machine gives the same answers, to the byte; the others are refused by name.

use harness::{Server, golden};
use serde_json::{Value, json};

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");
/// Each machine has the last ones, from some place on.
const SETS: [&str; 4] = ["amx", "avx512", "avx2", "portable"];

/// The set in use and the answers, with log-probs, to a model's golden prompts.
fn answers(model: &str, args: &[&str]) -> (String, Value) {
    let server = Server::start(SERVER, model, args);
    let set = server.get("/server_info").json()["model"]["isa"].as_str().expect("a name").to_owned();
    let reference = golden::reference(model);
    let prompts: Vec<&Value> =
        reference["prompts"].as_array().expect("a list").iter().map(|prompt| &prompt["ids"]).collect();
    let request = json!({"prompt": prompts, "temperature": 0, "max_tokens": 16, "ignore_eos": true, "logprobs": 3});
    (set, server.ask("/v1/completions", &request)["choices"].clone())
}

fn check(model: &str, args: &[&str]) {
    let (fastest, expected) = answers(model, args);
    let fastest = SETS.iter().position(|set| *set == fastest).expect("a known set");
    for set in &SETS[fastest..] {
        let (used, got) = answers(model, &[args, &["--isa", set]].concat());
        assert_eq!(used, *set);
        assert_eq!(got, expected, "{model} {args:?} on {set}");
    }
    for set in &SETS[..fastest] {
        let (status, output) = Server::fail(SERVER, &golden::folder(model), &["--isa", set]);
        assert!(!status.success());
        let refusal = format!("this machine has no `{set}`, it has {}", SETS[fastest..].join(", "));
        assert!(output.contains(&refusal), "{output}");
    }
}

#[test]
fn stored_weights_give_the_same_bytes_on_every_set() {
    check("granitemoe-base", &[]);
    check("deepseek_v2-lite", &[]);
}

/// An ordinary build knows the CPU alone; `device.rs` has the other one.
#[test]
fn a_device_that_the_build_does_not_know_is_refused() {
    let server = Server::start(SERVER, "olmoe-base", &["--device", "auto"]);
    let model = server.get("/server_info").json()["model"].clone();
    assert_eq!((&model["device"], &model["device_memory_bytes"]), (&json!("cpu"), &Value::Null));
    for (args, reason) in [
        (["--device", "cuda"], "build with --features cuda for NVIDIA devices"),
        (["--device", "gpu"], "`gpu` is no device; devices are auto, cpu, cuda and cuda:N"),
        (["--gpu-memory-utilization", "1.5"], "0.05 to 1"),
    ] {
        let (status, output) = Server::fail(SERVER, &golden::folder("olmoe-base"), &args);
        assert!(!status.success());
        assert!(output.contains(reason), "{output}");
    }
}

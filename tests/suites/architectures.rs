//! Every architecture through HTTP: greedy tokens, tokenizer and chat template equal to transformers'.

use harness::{Server, golden};
use serde_json::{Value, json};

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");

fn check(name: &str) {
    // References are computed with what integers and scales stand for, which bf16 rounds.
    let is_quantized = ["-int4", "-mxfp4", ".gguf"].iter().any(|ending| name.ends_with(ending));
    let args: &[&str] = if is_quantized { &["--dtype", "f32"] } else { &[] };
    let server = Server::start(SERVER, name, args);
    let golden = name.strip_suffix(".gguf").unwrap_or(name);
    assert_eq!(server.get("/v1/models").json()["data"][0]["id"], golden);
    let reference = golden::reference(golden);
    let prompts: Vec<&Value> = reference["prompts"].as_array().expect("a list").iter().collect();
    let request = |ids: Value| json!({"prompt": ids, "temperature": 0, "max_tokens": 32, "ignore_eos": true, "return_token_ids": true});
    let together =
        server.ask("/v1/completions", &request(prompts.iter().map(|prompt| prompt["ids"].clone()).collect()));
    for (position, prompt) in prompts.iter().enumerate() {
        assert_eq!(together["choices"][position]["token_ids"], prompt["greedy_ids"], "{name}: {}", prompt["name"]);
    }
    let chunks = server.stream("/v1/completions", &request(prompts[1]["ids"].clone())).chunks();
    let ids = chunks.iter().filter_map(|chunk| chunk["choices"][0]["token_ids"].as_array()).flatten();
    assert_eq!(ids.cloned().collect::<Value>(), prompts[1]["greedy_ids"], "{name}: streamed");

    let tokenizer = &reference["tokenizer"];
    for sample in tokenizer["samples"].as_array().expect("a list") {
        let answer = server.ask("/tokenize", &json!({"prompt": sample["text"]}));
        assert_eq!(answer["tokens"], sample["ids_with_special"], "{name}: {}", sample["text"]);
    }
    let messages = &tokenizer["chat"]["messages"];
    let rendered = server.ask("/tokenize", &json!({"messages": messages}));
    assert_eq!(rendered["tokens"], tokenizer["chat"]["ids"], "{name}: the rendered chat");
    let chat =
        json!({"messages": messages, "temperature": 0, "max_tokens": 8, "ignore_eos": true, "return_token_ids": true});
    let answer = server.ask("/v1/chat/completions", &chat);
    assert_eq!(answer["prompt_token_ids"], tokenizer["chat"]["ids"], "{name}: the chat's prompt");
    assert_eq!(answer["usage"]["completion_tokens"], 8);
}

macro_rules! served {
    ($($test:ident: $name:literal;)*) => {
        $(#[test]
        fn $test() {
            check($name);
        })*
    };
}

served! {
    mixtral: "mixtral-base";
    qwen2_moe: "qwen2_moe-base";
    qwen3_moe: "qwen3_moe-base";
    olmoe: "olmoe-base";
    granitemoe: "granitemoe-base";
    granitemoe_from_gguf: "granitemoeshared-base.gguf";
    deepseek_v2: "deepseek_v2-lite";
    deepseek_v3: "deepseek_v3-base";
    kimi_k2: "kimi_k2-base";
    kimi_k2_with_tiktoken: "kimi_k2-tiktoken";
    kimi_k2_in_int4: "kimi_k2-int4";
    longcat_flash: "longcat_flash-base";
    pangu_ultra_moe: "pangu_ultra_moe-base";
    bailing_moe: "bailing_moe-base";
    bailing_moe_v2: "bailing_moe_v2-base";
    glm4_moe: "glm4_moe-base";
    dots1: "dots1-base";
    ernie4_5_moe: "ernie4_5_moe-base";
    hunyuan_v1_moe: "hunyuan_v1_moe-base";
    minimax_m2: "minimax_m2-base";
    minicpm_moe: "minicpm_moe-base";
    gpt_oss: "gpt_oss-mxfp4";
    gpt_oss_in_f16: "gpt_oss-alpha";
    gpt_oss_from_gguf: "gpt_oss-mxfp4.gguf";
    phimoe: "phimoe-base";
    jetmoe: "jetmoe-base";
    llama4: "llama4-mm";
    qwen3_next: "qwen3_next-base";
    switch_transformers: "switch_transformers-base";
    switch_transformers_with_full_experts: "switch_transformers-capacity";
}

/// Without the setting the layers are skipped; with it they are loaded, and the model answers as before.
#[test]
fn layers_for_multi_token_prediction_are_loaded_on_request() {
    for (name, num_layers) in
        [("deepseek_v3-mtp", 1), ("glm4_moe-mtp", 2), ("bailing_moe_v2-mtp", 2), ("longcat_flash-mtp", 1)]
    {
        let reference = golden::reference(name);
        let prompt = &reference["prompts"][2];
        let body = json!({"prompt": prompt["ids"], "temperature": 0, "max_tokens": 32, "ignore_eos": true, "return_token_ids": true});
        let [without, with] = [&[][..], &["--load-mtp"][..]].map(|args: &[&str]| {
            let server = Server::start(SERVER, name, args);
            let answer = server.ask("/v1/completions", &body);
            assert_eq!(answer["choices"][0]["token_ids"], prompt["greedy_ids"], "{name} {args:?}");
            server.get("/server_info").json()
        });
        assert_eq!(
            (&without["model"]["num_mtp_layers"], &with["model"]["num_mtp_layers"]),
            (&json!(0), &json!(num_layers))
        );
        assert_eq!((&without["config"]["load_mtp"], &with["config"]["load_mtp"]), (&json!(false), &json!(true)));
        for key in ["weight_bytes", "kv_bytes_per_token"] {
            assert!(with["model"][key].as_u64() > without["model"][key].as_u64(), "{name}: {key}");
        }
    }
}

#[test]
fn asking_for_layers_that_the_model_has_not_ends_the_start() {
    for (name, reason) in [
        ("mixtral-base", "they are not loaded for the architecture `mixtral`"),
        ("glm4_moe-base", "`num_nextn_predict_layers` in config.json is 0 or absent"),
    ] {
        let (status, output) = Server::fail(SERVER, &golden::folder(name), &["--load-mtp"]);
        assert!(!status.success() && output.contains("--load-mtp") && output.contains(reason), "{name}: {output}");
    }
}

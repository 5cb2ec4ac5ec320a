//! What operators and tools read: probes, models, settings, metrics, the OpenAPI document and the docs page.

use harness::{Request, Server, golden};
use serde_json::{Value, json};

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");

/// Metrics that exist after one request, with their types.
const METRICS: &[(&str, &str)] = &[
    ("vllm:num_requests_running", "gauge"),
    ("vllm:num_requests_waiting", "gauge"),
    ("vllm:num_requests_waiting_by_reason", "gauge"),
    ("vllm:kv_cache_usage_perc", "gauge"),
    ("vllm:cache_config_info", "gauge"),
    ("vllm:prompt_tokens_total", "counter"),
    ("vllm:prompt_tokens_cached_total", "counter"),
    ("vllm:prompt_tokens_cached_by_source_total", "counter"),
    ("vllm:prefix_cache_queries_total", "counter"),
    ("vllm:prefix_cache_hits_total", "counter"),
    ("vllm:generation_tokens_total", "counter"),
    ("vllm:request_success_total", "counter"),
    ("vllm:num_preemptions_total", "counter"),
    ("vllm:corrupted_requests_total", "counter"),
    ("vllm:time_to_first_token_seconds", "histogram"),
    ("vllm:inter_token_latency_seconds", "histogram"),
    ("vllm:request_time_per_output_token_seconds", "histogram"),
    ("vllm:e2e_request_latency_seconds", "histogram"),
    ("vllm:request_queue_time_seconds", "histogram"),
    ("vllm:request_inference_time_seconds", "histogram"),
    ("vllm:request_prefill_time_seconds", "histogram"),
    ("vllm:request_decode_time_seconds", "histogram"),
    ("vllm:request_prompt_tokens", "histogram"),
    ("vllm:request_generation_tokens", "histogram"),
    ("vllm:request_params_n", "histogram"),
    ("vllm:request_params_max_tokens", "histogram"),
    ("vllm:iteration_tokens_total", "histogram"),
    ("moesaic_step_seconds", "histogram"),
    ("moesaic_experts_per_step", "histogram"),
    ("http_requests_total", "counter"),
    ("http_request_duration_seconds", "histogram"),
];

#[test]
fn metrics_have_the_names_that_dashboards_read() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let body = json!({"prompt": [70, 73, 71], "max_tokens": 10, "ignore_eos": true, "n": 2});
    server.ask("/v1/completions", &body);
    server.wait_idle();
    assert_eq!(server.get("/v1/nothing").status, 404);
    let response = server.get("/metrics");
    assert_eq!(response.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let metrics = server.metrics();
    for (name, kind) in METRICS {
        assert_eq!(metrics.kind(name), Some(*kind), "{name}");
    }
    for line in metrics.text().lines().filter(|line| line.starts_with("vllm:") || line.starts_with("moesaic_")) {
        assert!(line.contains("model_name=\"mixtral-base\"") && line.contains("engine=\"0\""), "{line}");
    }
    let value = |name: &str, labels: &[(&str, &str)]| metrics.value(name, labels);
    assert_eq!(value("vllm:prompt_tokens_total", &[]), Some(6.0));
    assert_eq!(value("vllm:generation_tokens_total", &[]), Some(20.0));
    assert_eq!(value("vllm:request_success_total", &[("finished_reason", "length")]), Some(2.0));
    assert_eq!(value("vllm:time_to_first_token_seconds_count", &[]), Some(2.0));
    assert_eq!(value("vllm:inter_token_latency_seconds_count", &[]), Some(18.0));
    assert_eq!(value("vllm:request_generation_tokens_sum", &[]), Some(20.0));
    assert_eq!(
        value("vllm:time_to_first_token_seconds_bucket", &[("le", "0.001")]).map(|count| count <= 2.0),
        Some(true)
    );
    assert_eq!(
        value("http_requests_total", &[("path", "/v1/completions"), ("status", "200"), ("method", "POST")]),
        Some(1.0)
    );
    assert_eq!(value("http_requests_total", &[("path", "unmatched"), ("status", "404")]), Some(1.0));
    let labels = [("block_size", "16"), ("enable_prefix_caching", "True")];
    assert_eq!(value("vllm:cache_config_info", &labels), Some(1.0));
}

#[test]
fn models_are_listed_with_all_their_names() {
    let server =
        Server::start(SERVER, "mixtral-base", &["--served-model-name", "org/first", "--served-model-name", "second"]);
    let list = server.get("/v1/models").json();
    assert_eq!(list["object"], "list");
    let ids: Vec<&Value> = list["data"].as_array().unwrap().iter().map(|card| &card["id"]).collect();
    assert_eq!(ids, [&json!("org/first"), &json!("second")]);
    for (path, id) in [
        ("/v1/models/org/first", "org/first"),
        ("/v1/models/second", "second"),
        ("/v1/models/org%2Ffirst", "org/first"),
    ] {
        let card = server.get(path).json();
        assert_eq!((card["id"].as_str(), card["object"].as_str()), (Some(id), Some("model")), "{path}");
        assert_eq!((card["root"].as_str(), card["max_model_len"].as_u64()), (Some("org/first"), Some(4096)));
        assert!(card["created"].is_u64() && card["owned_by"].is_string());
    }
}

#[test]
fn text_and_token_ids_convert_both_ways() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let reference = golden::reference("mixtral-base");
    for sample in reference["tokenizer"]["samples"].as_array().unwrap() {
        let with = server.ask("/tokenize", &json!({"prompt": sample["text"]}));
        assert_eq!(with["tokens"], sample["ids_with_special"]);
        assert_eq!(with["count"], sample["ids_with_special"].as_array().unwrap().len());
        assert_eq!(with["max_model_len"], 4096);
        let without = server.ask(
            "/tokenize",
            &json!({"prompt": sample["text"], "add_special_tokens": false, "return_token_strs": true}),
        );
        assert_eq!(without["tokens"], sample["ids"]);
        assert_eq!(without["token_strs"].as_array().unwrap().len(), sample["ids"].as_array().unwrap().len());
    }
    let ids = &reference["tokenizer"]["samples"][0]["ids"];
    let text = server.ask("/detokenize", &json!({"tokens": ids}))["prompt"].clone();
    assert_eq!(text.as_str().unwrap().trim_start(), "The river carried the boat.");
}

#[test]
fn settings_and_model_are_shown() {
    let server = Server::start(SERVER, "qwen2_moe-base", &["--max-num-seqs", "5"]);
    let info = server.get("/server_info").json();
    assert_eq!(info["config"]["max_num_seqs"], 5);
    let model = &info["model"];
    assert_eq!((model["architecture"].as_str(), model["num_layers"].as_u64()), (Some("qwen2_moe"), Some(3)));
    assert!(model["num_active_parameters"].as_u64() < model["num_parameters"].as_u64());
    assert_eq!(model["threads"], 1);
    assert_eq!(model["has_chat_template"], true);
    assert_eq!(server.get("/version").json()["version"], info["version"]);
    assert_eq!(server.get("/health").json()["status"], "ok");
    assert_eq!(server.get("/ready").json()["status"], "ready");
}

#[test]
fn request_ids_come_back() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let named = server.send(&Request::get("/version").header("X-Request-Id", "trace-1"));
    assert_eq!(named.header("x-request-id"), Some("trace-1"));
    let fresh = server.get("/version").header("x-request-id").map(str::to_owned);
    assert!(fresh.is_some() && fresh != server.get("/version").header("x-request-id").map(str::to_owned));
}

#[test]
fn the_openapi_document_is_the_kept_one() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let served = server.get("/openapi.json");
    assert_eq!(served.header("content-type"), Some("application/json"));
    let kept = concat!(env!("CARGO_MANIFEST_DIR"), "/../openapi/openapi.json");
    let kept = std::fs::read_to_string(kept).expect("openapi/openapi.json is kept");
    assert!(served.text() == kept, "openapi/openapi.json is stale: run `moesaic openapi > openapi/openapi.json`");
    let document = served.json();
    for path in [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/health",
        "/ready",
        "/version",
        "/metrics",
        "/server_info",
    ] {
        assert!(document["paths"][path].is_object(), "{path} is not described");
    }
}

#[test]
fn the_docs_page_works_offline() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let index = server.get("/");
    assert_eq!((index.status, index.header("location")), (307, Some("/docs/")));
    let page = server.get("/docs/");
    assert_eq!(page.status, 200);
    let page = page.text();
    assert!(!page.contains("http://") && !page.contains("https://") && !page.contains("src=\"//"), "{page}");
    let assets: Vec<&str> = page
        .split(['"', '\''])
        .filter(|part| part.ends_with(".js") || part.ends_with(".css") || part.ends_with(".png"))
        .collect();
    assert!(!assets.is_empty(), "{page}");
    for asset in assets {
        let response = server.get(&format!("/docs/{}", asset.trim_start_matches("./")));
        assert!(response.status == 200 && !response.body.is_empty(), "{asset}");
    }
    let settings = server.get("/docs/swagger-initializer.js").text();
    assert!(settings.contains("/openapi.json") && !settings.contains("://"), "{settings}");
    assert_eq!(server.get("/docs").status / 100, 3, "the page's assets are relative to /docs/");
}

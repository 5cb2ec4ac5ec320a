//! What is turned down, and how: status, `type`, `param` and `code` of each error.

use harness::{Request, Response, Server, with};
use serde_json::{Value, json};

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");
const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// What an error is expected to say.
#[derive(Debug)]
struct Expected {
    status: u16,
    param: Option<&'static str>,
    code: &'static str,
}

/// A 400 about a field.
fn bad(param: &'static str, code: &'static str) -> Expected {
    Expected { status: 400, param: Some(param), code }
}

fn check(response: &Response, expected: &Expected, what: &str) {
    assert_eq!(response.status, expected.status, "{what}: {}", response.text());
    assert_eq!(response.header("content-type"), Some("application/json"), "{what}");
    let error = &response.json()["error"];
    let kind = match expected.status {
        429 => "rate_limit_error",
        500.. => "server_error",
        _ => "invalid_request_error",
    };
    assert_eq!(error["type"], kind, "{what}: {error}");
    assert_eq!(error["param"].as_str(), expected.param, "{what}: {error}");
    assert_eq!(error["code"], expected.code, "{what}: {error}");
    assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{what}: {error}");
}

fn check_fields(server: &Server, path: &str, table: &[(Value, Expected)]) {
    for (fields, expected) in table {
        let body = match path {
            CHAT => json!({"messages": [{"role": "user", "content": "x"}]}),
            _ => json!({"prompt": "x"}),
        };
        let body = with(body, fields.clone());
        check(&server.post(path, &body), expected, &body.to_string());
    }
}

#[test]
fn fields_of_the_wrong_type_are_named() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    for path in [CHAT, COMPLETIONS] {
        check_fields(
            &server,
            path,
            &[
                (json!({"temperature": "hot"}), bad("temperature", "invalid_type")),
                (json!({"max_tokens": -1}), bad("max_tokens", "invalid_type")),
                (json!({"max_tokens": 1.5}), bad("max_tokens", "invalid_type")),
                (json!({"n": "2"}), bad("n", "invalid_type")),
                (json!({"stop": 5}), bad("stop", "invalid_type")),
                (json!({"stop": ["a", 5]}), bad("stop", "invalid_type")),
                (json!({"stop_token_ids": [1, "x"]}), bad("stop_token_ids[1]", "invalid_type")),
                (json!({"logit_bias": {"5": "x"}}), bad("logit_bias.5", "invalid_type")),
                (json!({"stream": "yes"}), bad("stream", "invalid_type")),
                (
                    json!({"stream": true, "stream_options": {"include_usage": 1}}),
                    bad("stream_options.include_usage", "invalid_type"),
                ),
                // Not by position.
                (json!({"stream": true, "stream_options": [true]}), bad("stream_options", "invalid_type")),
                (json!({"cache": [true, false]}), bad("cache", "invalid_type")),
                (json!({"moe": [0.5, 1, true]}), bad("moe", "invalid_type")),
                (json!({"seed": "x"}), bad("seed", "invalid_type")),
                (json!({"model": 5}), bad("model", "invalid_type")),
            ],
        );
    }
    check_fields(
        &server,
        CHAT,
        &[
            (json!({"messages": "x"}), bad("messages", "invalid_type")),
            (json!({"messages": [1]}), bad("messages[0]", "invalid_type")),
            (
                json!({"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": 7}]}),
                bad("messages[1].content", "invalid_type"),
            ),
            (json!({"logprobs": 3}), bad("logprobs", "invalid_type")),
        ],
    );
    check_fields(
        &server,
        COMPLETIONS,
        &[
            (json!({"prompt": {"text": "x"}}), bad("prompt", "invalid_type")),
            (json!({"prompt": ["x", 1]}), bad("prompt", "invalid_type")),
            (json!({"logprobs": true}), bad("logprobs", "invalid_type")),
            (json!({"echo": "yes"}), bad("echo", "invalid_type")),
        ],
    );
}

#[test]
fn values_out_of_range_are_named() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let many_stops: Vec<String> = (0..17).map(|number| number.to_string()).collect();
    for path in [CHAT, COMPLETIONS] {
        check_fields(
            &server,
            path,
            &[
                (json!({"temperature": -0.1}), bad("temperature", "invalid_value")),
                (json!({"temperature": 2.1}), bad("temperature", "invalid_value")),
                (json!({"top_p": 0}), bad("top_p", "invalid_value")),
                (json!({"top_p": 1.1}), bad("top_p", "invalid_value")),
                (json!({"top_k": -2}), bad("top_k", "invalid_value")),
                (json!({"min_p": 1.1}), bad("min_p", "invalid_value")),
                (json!({"presence_penalty": 2.1}), bad("presence_penalty", "invalid_value")),
                (json!({"frequency_penalty": -2.1}), bad("frequency_penalty", "invalid_value")),
                (json!({"repetition_penalty": 0}), bad("repetition_penalty", "invalid_value")),
                (json!({"n": 0}), bad("n", "invalid_value")),
                (json!({"n": 129}), bad("n", "invalid_value")),
                (json!({"max_tokens": 0}), bad("max_tokens", "invalid_value")),
                (json!({"max_tokens": 2, "min_tokens": 3}), bad("min_tokens", "invalid_value")),
                (json!({"stop": many_stops}), bad("stop", "invalid_value")),
                (json!({"stop": ""}), bad("stop", "invalid_value")),
                (json!({"stop_token_ids": [384]}), bad("stop_token_ids", "invalid_value")),
                (json!({"logit_bias": {"384": 1}}), bad("logit_bias.384", "invalid_value")),
                (json!({"logit_bias": {"x": 1}}), bad("logit_bias.x", "invalid_value")),
                (json!({"logit_bias": {"5": 101}}), bad("logit_bias.5", "invalid_value")),
                (json!({"stream_options": {}}), bad("stream_options", "invalid_value")),
                (json!({"prompt_logprobs": 21}), bad("prompt_logprobs", "invalid_value")),
                (json!({"truncate_prompt_tokens": 0}), bad("truncate_prompt_tokens", "invalid_value")),
            ],
        );
    }
    check_fields(
        &server,
        CHAT,
        &[
            (json!({"messages": []}), bad("messages", "invalid_value")),
            (json!({"messages": null}), bad("messages", "invalid_value")),
            (json!({"messages": [{"role": "bard", "content": "x"}]}), bad("messages[0].role", "invalid_value")),
            (json!({"messages": [{"role": "user"}]}), bad("messages[0].content", "invalid_value")),
            (json!({"top_logprobs": 2}), bad("top_logprobs", "invalid_value")),
            (json!({"logprobs": true, "top_logprobs": 21}), bad("top_logprobs", "invalid_value")),
            (json!({"max_completion_tokens": 0}), bad("max_completion_tokens", "invalid_value")),
        ],
    );
    check_fields(
        &server,
        COMPLETIONS,
        &[
            (json!({"prompt": null}), bad("prompt", "invalid_value")),
            (json!({"prompt": []}), bad("prompt", "invalid_value")),
            (json!({"prompt": [[5], []]}), bad("prompt", "invalid_value")),
            (json!({"prompt": [384]}), bad("prompt", "invalid_value")),
            (json!({"logprobs": 21}), bad("logprobs", "invalid_value")),
        ],
    );
    server.wait_idle();
}

#[test]
fn what_is_not_done_is_refused_by_name() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let image = json!([{"role": "user", "content": [
        {"type": "text", "text": "what is this"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    ]}]);
    let audio =
        json!([{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}]);
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]);
    check_fields(
        &server,
        CHAT,
        &[
            (json!({"messages": image}), bad("messages[0].content[1].type", "unsupported_parameter")),
            (json!({"messages": audio}), bad("messages[0].content[0].type", "unsupported_parameter")),
            (json!({"tools": tools}), bad("tools", "unsupported_parameter")),
            (json!({"tool_choice": "required"}), bad("tool_choice", "unsupported_parameter")),
            (json!({"functions": [{"name": "f"}]}), bad("functions", "unsupported_parameter")),
            (json!({"truncation_side": "right"}), bad("truncation_side", "unsupported_parameter")),
            (json!({"request_id": "mine"}), bad("request_id", "unsupported_parameter")),
            (json!({"response_format": {"type": "json_object"}}), bad("response_format", "unsupported_parameter")),
            (json!({"modalities": ["text", "audio"]}), bad("modalities", "unsupported_parameter")),
            (json!({"chat_template": "{{ 1 }}"}), bad("chat_template", "unsupported_parameter")),
            (json!({"echo": true}), bad("echo", "unsupported_parameter")),
        ],
    );
    check_fields(
        &server,
        COMPLETIONS,
        &[
            (json!({"suffix": "after"}), bad("suffix", "unsupported_parameter")),
            (json!({"best_of": 3}), bad("best_of", "unsupported_parameter")),
            (json!({"guided_regex": "a+"}), bad("guided_regex", "unsupported_parameter")),
            (json!({"use_beam_search": true}), bad("use_beam_search", "unsupported_parameter")),
        ],
    );
    // Values that ask for nothing, and fields that nobody documents, are no reason to refuse.
    let harmless = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "tools": [], "tool_choice": "auto",
        "response_format": {"type": "text"}, "suffix": null, "user": "u", "metadata": {}, "nobody_knows": 1});
    server.ask(CHAT, &harmless);
}

#[test]
fn broken_bodies_are_refused() {
    let server = Server::start(SERVER, "mixtral-base", &["--max-body-bytes", "4KiB"]);
    let post = |body: &str| Request::new("POST", CHAT).header("Content-Type", "application/json").body(body);
    let plain = |status, code| Expected { status, param: None, code };
    for (request, expected) in [
        (post("{\"messages\": [}"), plain(400, "invalid_json")),
        (post("{\"messages\": [{\"role\": \"user\", \"content\": \"\\ud800\"}]}"), plain(400, "invalid_json")),
        (post(" "), plain(400, "invalid_json")),
        (Request::new("POST", CHAT), plain(400, "invalid_json")),
        (post("[]"), plain(400, "invalid_type")),
        (post("\"text\""), plain(400, "invalid_type")),
        (
            Request::new("POST", CHAT).header("Content-Type", "text/plain").body("{}"),
            plain(415, "unsupported_media_type"),
        ),
        (post(&" ".repeat(4097)), plain(413, "request_too_large")),
        // A body of unknown length is cut off at the limit, too.
        (
            post(&format!("1388\r\n{}\r\n0\r\n\r\n", " ".repeat(0x1388))).header("Transfer-Encoding", "chunked"),
            plain(413, "request_too_large"),
        ),
    ] {
        let what = format!("{:?}", String::from_utf8_lossy(&request.body));
        check(&server.send(&request), &expected, &what);
    }
}

#[test]
fn prompts_that_do_not_fit_are_refused() {
    let server = Server::start(SERVER, "mixtral-base", &["--max-model-len", "32"]);
    let long = "token ".repeat(100);
    let ids: Vec<u32> = vec![70; 33];
    for (path, body, param) in [
        (CHAT, json!({"messages": [{"role": "user", "content": long}]}), "messages"),
        (COMPLETIONS, json!({"prompt": long}), "prompt"),
        (COMPLETIONS, json!({"prompt": ids}), "prompt"),
        (COMPLETIONS, json!({"prompt": [[70], ids]}), "prompt"),
        (COMPLETIONS, json!({"prompt": [70], "max_tokens": 32}), "prompt"),
    ] {
        let response = server.post(path, &body);
        check(&response, &bad(param, "context_length_exceeded"), &body.to_string());
        assert!(response.text().contains("32"), "the limit is named: {}", response.text());
    }
    server.ask(COMPLETIONS, &json!({"prompt": [70], "max_tokens": 31, "ignore_eos": true}));
}

#[test]
fn unknown_models_paths_and_methods_are_not_found() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let unknown = Expected { status: 404, param: Some("model"), code: "model_not_found" };
    for (path, body) in [
        (CHAT, json!({"model": "gpt", "messages": [{"role": "user", "content": "x"}]})),
        (COMPLETIONS, json!({"model": "gpt", "prompt": "x"})),
        ("/tokenize", json!({"model": "gpt", "prompt": "x"})),
        ("/detokenize", json!({"model": "gpt", "tokens": [70]})),
    ] {
        check(&server.post(path, &body), &unknown, path);
    }
    check(&server.get("/v1/models/some/gpt"), &unknown, "a model's card");
    check(&server.get("/v1/models/%ff"), &bad("model", "invalid_value"), "a name that is not UTF-8");
    for path in ["/v1/chat", "/v2/models", "/v1/embeddings"] {
        check(&server.get(path), &Expected { status: 404, param: None, code: "not_found" }, path);
    }
    for (method, path) in [("GET", CHAT), ("PUT", COMPLETIONS), ("POST", "/health"), ("DELETE", "/metrics")] {
        let response = server.send(&Request::new(method, path));
        check(&response, &Expected { status: 405, param: None, code: "method_not_allowed" }, path);
        assert!(response.header("allow").is_some(), "{method} {path}: a 405 says what is allowed");
    }
    check(&server.post("/tokenize", &json!({})), &bad("prompt", "invalid_value"), "tokenize");
    check(&server.post("/detokenize", &json!({})), &bad("tokens", "invalid_value"), "detokenize");
    check(&server.post("/detokenize", &json!({"tokens": [9999]})), &bad("tokens", "invalid_value"), "detokenize");
}

#[test]
fn paths_that_read_or_compute_need_a_key() {
    let file = std::env::temp_dir().join(format!("moesaic-tests-{}-keys", std::process::id()));
    std::fs::write(&file, "# keys\nsk-file\n").unwrap();
    let args = ["--api-key", "sk-one", "--api-key", "sk-two", "--api-key-file", file.to_str().unwrap()];
    let server = Server::start(SERVER, "mixtral-base", &args);
    std::fs::remove_file(&file).unwrap();
    let refused = Expected { status: 401, param: None, code: "invalid_api_key" };
    let body = json!({"prompt": [70], "max_tokens": 1});
    for path in ["/v1/models", "/v1/models/mixtral-base", "/metrics", "/server_info", "/version", "/nowhere"] {
        let response = server.get(path);
        check(&response, &refused, path);
        assert_eq!(response.header("www-authenticate"), Some("Bearer"), "{path}");
    }
    for path in [COMPLETIONS, CHAT, "/tokenize", "/detokenize"] {
        check(&server.post(path, &body), &refused, path);
    }
    for key in ["Bearer sk-tw", "Bearer sk-twoo", "Bearer ", "Bearer", "Basic c2stb25l", "sk-one"] {
        let request = Request::post(COMPLETIONS, &body).header("Authorization", key);
        check(&server.send(&request), &refused, key);
    }
    for key in ["Bearer sk-one", "Bearer sk-two", "bearer sk-file"] {
        let request = Request::post(COMPLETIONS, &body).header("Authorization", key);
        assert_eq!(server.send(&request).status, 200, "{key}");
    }
    for path in ["/health", "/ready", "/openapi.json", "/docs/"] {
        assert_eq!(server.get(path).status, 200, "{path} is open");
    }
    let info = server.send(&Request::get("/server_info").header("Authorization", "Bearer sk-one")).text();
    let output = server.process.output();
    for key in ["sk-one", "sk-two", "sk-file"] {
        assert!(!info.contains(key) && !output.contains(key), "{key} is shown");
    }
    let public = Server::start(SERVER, "mixtral-base", &["--api-key", "sk-one", "--metrics-public"]);
    assert_eq!(public.get("/metrics").status, 200);
    assert_eq!(public.get("/server_info").status, 401);
}

#[test]
fn other_origins_are_let_in_only_where_configured() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let request = Request::get("/v1/models").header("Origin", "https://a.example");
    assert_eq!(server.send(&request).header("access-control-allow-origin"), None);
    let server = Server::start(SERVER, "mixtral-base", &["--allowed-origins", "https://a.example", "--api-key", "k"]);
    let preflight = Request::new("OPTIONS", CHAT)
        .header("Origin", "https://a.example")
        .header("Access-Control-Request-Method", "POST")
        .header("Access-Control-Request-Headers", "authorization,content-type");
    let response = server.send(&preflight);
    assert_eq!((response.status, response.header("access-control-allow-origin")), (200, Some("https://a.example")));
    let own = server.send(&Request::get("/health").header("Origin", "https://a.example"));
    let exposed = own.header("access-control-expose-headers").expect("pages may read some headers");
    assert!(["x-request-id", "x-moesaic-cache", "retry-after"].iter().all(|name| exposed.contains(name)), "{exposed}");
    let other = Request::get("/health").header("Origin", "https://b.example");
    assert_eq!(server.send(&other).header("access-control-allow-origin"), None);
}

#[test]
fn a_request_that_takes_too_long_is_ended() {
    let server = Server::start(SERVER, "mixtral-base", &["--request-timeout", "0.05"]);
    let body = json!({"prompt": [70], "max_tokens": 4000, "ignore_eos": true, "logprobs": 20});
    check(&server.post(COMPLETIONS, &body), &Expected { status: 504, param: None, code: "timeout" }, "no stream");
    let chunks = server.stream(COMPLETIONS, &body).chunks();
    assert_eq!(chunks.last().unwrap()["error"]["code"], "timeout");
    server.wait_idle();
}

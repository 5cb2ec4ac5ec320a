//! From start to exit code: probes, signals, and models that cannot be served.

use std::time::Duration;

use harness::checkpoint::Copy;
use harness::{Exchange, PATIENCE, Request, Server, golden, poll};
use serde_json::{Value, json};

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");
const PATH: &str = "/v1/completions";

fn request(num_tokens: u32) -> Value {
    json!({"prompt": [70, 73, 71], "max_tokens": num_tokens, "ignore_eos": true})
}

#[test]
fn sigterm_lets_running_requests_finish() {
    for signal in ["TERM", "INT"] {
        let mut server = Server::start(SERVER, "mixtral-base", &[]);
        let mut stream = server.stream(PATH, &request(3000));
        stream.next_chunk();
        let unread = Request::post(PATH, &request(1500)).write(server.address).expect("the server listens");
        server.wait_running(2.0);
        server.process.signal(signal);
        poll("a server that is not ready", PATIENCE, || (server.get("/ready").status == 503).then_some(()));
        assert_eq!(server.get("/ready").json()["error"]["code"], "shutting_down");
        assert_eq!(server.get("/health").status, 200, "it lives, it only takes no more requests");
        let refused = server.post(PATH, &request(1));
        assert_eq!((refused.status, refused.header("retry-after")), (503, Some("5")));
        assert_eq!(refused.json()["error"]["code"], "shutting_down");

        let last = stream.chunks().pop().expect("the stream has chunks");
        assert_eq!(last["choices"][0]["finish_reason"], "length", "{last}");
        let answer = Exchange::read_head(unread).and_then(Exchange::finish).expect("the answer arrives").json();
        assert_eq!(answer["usage"]["completion_tokens"], 1500);
        assert_eq!(server.process.wait(PATIENCE).code(), Some(0), "{signal}");
    }
}

#[test]
fn requests_beyond_the_shutdown_timeout_get_an_error() {
    let mut server = Server::start(SERVER, "mixtral-base", &["--shutdown-timeout", "0.05"]);
    let body = json!({"prompt": [70], "max_tokens": 4000, "ignore_eos": true, "logprobs": 20, "n": 4});
    let mut stream = server.stream(PATH, &body);
    stream.next_chunk();
    let unread = Request::post(PATH, &body).write(server.address).expect("the server listens");
    server.wait_running(8.0);
    server.process.signal("TERM");
    let last = stream.chunks().pop().expect("the stream has chunks");
    assert_eq!(last["error"]["code"], "shutting_down", "{last}");
    assert_eq!(last["error"]["type"], "server_error");
    let response = Exchange::read_head(unread).and_then(Exchange::finish).expect("the answer arrives");
    assert_eq!((response.status, response.json()["error"]["code"].as_str()), (503, Some("shutting_down")));
    assert_eq!(server.process.wait(PATIENCE).code(), Some(0));
}

#[test]
fn an_idle_server_with_open_connections_ends_at_once() {
    let mut server = Server::start(SERVER, "mixtral-base", &[]);
    // One connection that never sends anything, and one that is kept alive after an answer.
    let _silent = std::net::TcpStream::connect(server.address).unwrap();
    let mut kept = std::net::TcpStream::connect(server.address).unwrap();
    std::io::Write::write_all(&mut kept, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let answer = Exchange::read_head(kept.try_clone().unwrap()).and_then(Exchange::finish).unwrap();
    assert_eq!(answer.status, 200);
    server.process.signal("TERM");
    assert_eq!(server.process.wait(Duration::from_secs(10)).code(), Some(0));
}

#[test]
fn the_start_is_announced_with_settings_and_a_command_to_try() {
    let server = Server::start(SERVER, "mixtral-base", &["--api-key", "sk-hidden", "--block-size", "32"]);
    let output = server.process.output();
    assert!(output.contains(&format!("http://{}", server.address)), "{output}");
    assert!(output.contains("curl ") && output.contains("/v1/chat/completions"), "{output}");
    assert!(output.contains("block_size = 32") && !output.contains("sk-hidden"), "{output}");
}

/// Starts on a broken checkpoint and expects exit code 1 and `words` in what is said.
fn check_failure(copy: &Copy, words: &[&str]) {
    let (status, output) = Server::fail(SERVER, &copy.folder, &[]);
    assert_eq!(status.code(), Some(1), "{output}");
    let error =
        output.lines().find(|line| line.starts_with("error: ")).unwrap_or_else(|| panic!("no error in {output}"));
    for word in words {
        assert!(error.contains(word), "{word} is not in {error}");
    }
    assert!(!output.contains("panicked"), "{output}");
}

#[test]
fn an_unknown_architecture_is_named() {
    let copy = Copy::of("mixtral-base");
    copy.edit_json("config.json", |config| {
        config["model_type"] = json!("llama");
        config["architectures"] = json!(["LlamaForCausalLM"]);
    });
    check_failure(&copy, &["llama", "mixtral", "kimi_k2"]);
}

#[test]
fn damaged_folders_say_what_is_wrong_once() {
    let empty = Copy::of("mixtral-base");
    std::fs::remove_file(empty.path("config.json")).expect("the file goes");
    check_failure(&empty, &["is not a model folder", "config.json", "hint"]);

    let truncated = Copy::of("mixtral-base");
    let weights = truncated.path("model.safetensors");
    let bytes = std::fs::read(&weights).expect("the weights");
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).expect("half of the weights");
    check_failure(&truncated, &["model.safetensors", "incomplete download"]);

    let missing = Copy::of("mixtral-base");
    std::fs::remove_file(missing.path("model.safetensors")).expect("the file goes");
    let (_, output) = Server::fail(SERVER, &missing.folder, &[]);
    assert_eq!(output.matches("No such file or directory (os error 2)").count(), 1, "{output}");
}

#[test]
fn missing_extra_and_misshapen_tensors_are_named() {
    let name = "model.layers.1.input_layernorm.weight";
    let missing = Copy::of("mixtral-base");
    missing.edit_tensors(|tensors| {
        let tensor = tensors.remove(name).expect("the checkpoint has this tensor");
        tensors.insert("model.layers.1.nobody_knows.weight".to_owned(), tensor);
    });
    check_failure(&missing, &[name]);

    let misshapen = Copy::of("mixtral-base");
    misshapen.edit_tensors(|tensors| {
        let size = tensors[name]["shape"][0].as_u64().expect("a norm has one dimension");
        tensors[name]["shape"] = json!([2, size / 2]);
    });
    check_failure(&misshapen, &[name, "[2, 32]", "[64]"]);

    let extra = Copy::of("mixtral-base");
    extra.edit_tensors(|tensors| {
        let empty = json!({"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]});
        tensors.insert("model.nobody_knows.weight".to_owned(), empty);
    });
    check_failure(&extra, &["model.nobody_knows.weight"]);
}

#[test]
fn broken_folders_are_explained() {
    let cut = Copy::of("mixtral-base");
    let bytes = std::fs::read(cut.path("model.safetensors")).unwrap();
    std::fs::write(cut.path("model.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    check_failure(&cut, &["model.safetensors"]);

    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        let without = Copy::of("mixtral-base");
        std::fs::remove_file(without.path(file)).unwrap();
        let stem = file.rsplit_once('.').map_or(file, |(stem, _)| stem);
        check_failure(&without, &[if file == "model.safetensors" { "safetensors" } else { stem }]);
    }
    let garbled = Copy::of("mixtral-base");
    std::fs::write(garbled.path("config.json"), "{").unwrap();
    check_failure(&garbled, &["config.json"]);
}

#[test]
fn a_wrong_setting_is_named() {
    let folder = golden::folder("mixtral-base");
    for (args, code, words) in [
        (&["--block-size", "24"][..], 1, "block_size"),
        (&["--max-model-len", "0"], 1, "max_model_len"),
        (&["--kv-cache-memory", "1"], 1, "KV cache"),
        (&["--config", "/nowhere/moesaic.toml"], 1, "/nowhere/moesaic.toml"),
        (&["--chat-template", "/nowhere/template.jinja"], 1, "/nowhere/template.jinja"),
        (&["--port", "70000"], 2, "--port"),
        (&["--prot", "1"], 2, "--prot"),
    ] {
        let (status, output) = Server::fail(SERVER, &folder, args);
        assert_eq!(status.code(), Some(code), "{args:?}: {output}");
        assert!(output.contains(words), "{args:?}: {output}");
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let (status, output) = Server::fail(SERVER, &folder, &["--port", &port]);
    assert_eq!(status.code(), Some(1), "{output}");
    assert!(output.contains("cannot listen") && output.contains(&port), "{output}");
}

#[test]
fn a_configuration_file_counts_less_than_a_flag() {
    let copy = Copy::of("mixtral-base");
    let file = copy.path("moesaic.toml");
    std::fs::write(&file, "block_size = 32\nmax_num_seqs = 7\nserved_model_name = [\"named\"]\n").unwrap();
    let path = file.to_str().unwrap();
    let server = Server::start(SERVER, "mixtral-base", &["--config", path, "--max-num-seqs", "9"]);
    let info = server.get("/server_info").json();
    assert_eq!((&info["config"]["block_size"], &info["config"]["max_num_seqs"]), (&json!(32), &json!(9)));
    assert_eq!(info["model"]["names"], json!(["named"]));
    std::fs::write(&file, "blok_size = 32\n").unwrap();
    let (status, output) = Server::fail(SERVER, &golden::folder("mixtral-base"), &["--config", path]);
    assert!(status.code() == Some(1) && output.contains("blok_size"), "{output}");
}

//! Model folders from strangers: whatever is wrong with one, the server says which file and field, within bounded memory.

use std::path::Path;
use std::sync::OnceLock;

use harness::checkpoint::Copy;
use harness::{PATIENCE, Server, server};
use serde_json::{Map, Value, json};

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");

/// Address space that a refusal may take beyond what serving a tiny model takes. Resident memory is no more than that.
const MARGIN_BYTES: u64 = 200 << 20;

/// What a server that serves takes, and the margin.
fn max_bytes() -> u64 {
    static BYTES: OnceLock<u64> = OnceLock::new();
    *BYTES.get_or_init(|| {
        let server = Server::start(SERVER, "mixtral-base", &[]);
        server.ask("/v1/completions", &json!({"prompt": [70, 73], "max_tokens": 2}));
        server.process.peak_virtual_bytes() + MARGIN_BYTES
    })
}

/// Serving `folder` fails with exit code 1 and one error that holds all `words`.
fn check_folder(what: &str, folder: &Path, words: &[&str]) {
    let (status, output) = Server::fail_within(&mut server::command(SERVER, folder, &[]), max_bytes());
    assert_eq!(status.code(), Some(1), "{what}: {output}");
    let error = output.lines().find(|line| line.starts_with("error: "));
    let error = error.unwrap_or_else(|| panic!("{what}: no error in {output}"));
    for word in words {
        assert!(error.contains(word), "{what}: {word} is not in {error}");
    }
    assert!(error.len() < 1000, "{what}: {error}");
    assert!(!output.contains("panicked"), "{what}: {output}");
}

fn check(what: &str, edit: impl FnOnce(&Copy), words: &[&str]) {
    let copy = Copy::of("mixtral-base");
    edit(&copy);
    check_folder(what, &copy.folder, words);
}

#[test]
fn absurd_numbers_are_refused_by_key() {
    let count = "expected a count below 2^31";
    for (key, value, words) in [
        ("hidden_size", json!(1u64 << 60), &["hidden_size", count][..]),
        ("hidden_size", json!(1u64 << 30), &["config.json", "head_dim", "268435456"]),
        ("intermediate_size", json!((1u64 << 31) - 1), &["tensor `", "2147483647"]),
        ("hidden_size", json!(-64), &["hidden_size", count]),
        ("hidden_size", json!(64.5), &["hidden_size", count]),
        ("hidden_size", json!("64"), &["hidden_size", count]),
        ("hidden_size", json!([vec![0; 10_000]]), &["hidden_size", count]),
        ("hidden_size", json!(null), &["hidden_size", "is missing"]),
        ("num_hidden_layers", json!(1_000_000_000), &["tensor `model.layers.3"]),
        ("num_hidden_layers", json!(0), &["num_hidden_layers", "at least 1"]),
        ("num_local_experts", json!(0), &["num_local_experts", "at least 1"]),
        ("num_local_experts", json!(1_000_000_000), &["gate.weight", "1000000000"]),
        ("num_experts_per_tok", json!(9), &["config.json", "experts per token", "cannot choose 9 of 8"]),
        ("num_experts_per_tok", json!(0), &["num_experts_per_tok", "at least 1"]),
        ("num_attention_heads", json!(5), &["num_key_value_heads", "does not divide num_attention_heads = 5"]),
        ("num_key_value_heads", json!(3), &["num_key_value_heads", "does not divide num_attention_heads = 4"]),
        ("head_dim", json!(1_000_000_000), &["config.json", "head_dim", "16384"]),
        ("vocab_size", json!(0), &["vocab_size", "at least 1"]),
        ("vocab_size", json!(1_000_000_000), &["embed_tokens", "1000000000"]),
        ("rope_theta", json!(0), &["rope_theta", "above 1"]),
        ("rope_theta", json!(-1e6), &["rope_theta", "above 1"]),
        ("rope_theta", json!(1e300), &["rope_theta", "range of f32"]),
        ("rms_norm_eps", json!(-1e-5), &["rms_norm_eps", "at least 0"]),
        ("max_position_embeddings", json!(0), &["max_position_embeddings", "at least 1"]),
        ("max_position_embeddings", json!(1_000_000_000_000_000_000u64), &["max_position_embeddings", count]),
        ("sliding_window", json!(0), &["sliding_window", "at least 1"]),
        ("rope_scaling", json!({"type": "linear", "factor": 0}), &["factor", "above 0"]),
        ("rope_scaling", json!({"type": "yarn", "factor": 1e-38}), &["rope_scaling", "finite"]),
        ("model_type", json!(7), &["model_type"]),
    ] {
        let edit = |copy: &Copy| copy.edit_json("config.json", |config| config[key] = value.clone());
        check(&format!("{key}: {words:?}"), edit, words);
    }
}

#[test]
fn files_of_the_wrong_kind_are_refused_without_reading_on() {
    let files =
        ["config.json", "tokenizer.json", "model.safetensors", "tokenizer_config.json", "generation_config.json"];
    for file in files {
        for kind in ["a folder", "a link to itself", "a device"] {
            let edit = |copy: &Copy| {
                let path = copy.path(file);
                std::fs::remove_file(&path).expect("the file goes");
                match kind {
                    "a folder" => std::fs::create_dir(&path),
                    "a device" => std::os::unix::fs::symlink("/dev/zero", &path),
                    _ => std::os::unix::fs::symlink(&path, &path),
                }
                .expect("a writable folder");
            };
            check(&format!("{file} is {kind}"), edit, &[file]);
        }
    }
}

#[test]
fn files_of_absurd_length_are_refused_unread() {
    for file in [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
    ] {
        let edit = |copy: &Copy| {
            let file = std::fs::File::create(copy.path(file)).expect("a writable folder");
            file.set_len(1 << 30).expect("a sparse file");
        };
        check(&format!("{file} has a gibibyte"), edit, &[file, "1073741824 bytes", "the limit is"]);
    }
}

#[test]
fn json_that_is_none_is_refused_by_file() {
    let deep = format!("{}{}", r#"{"a":"#.repeat(100_000), "}".repeat(100_000));
    let files = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"];
    for file in files.into_iter().chain(["model.safetensors.index.json"]) {
        for (what, text) in [("deep", deep.as_str()), ("empty", ""), ("a list", "[]"), ("cut", r#"{"model_type": "mi"#)]
        {
            if (file, what) == ("tokenizer_config.json", "a list") {
                continue; // a file without any of the settings, as far as they are looked for
            }
            let edit = |copy: &Copy| std::fs::write(copy.path(file), text).expect("a writable folder");
            check(&format!("{file}: {what}"), edit, &[file]);
        }
    }
    let not_a_number = |copy: &Copy| {
        let text = std::fs::read_to_string(copy.path("config.json")).expect("the config");
        std::fs::write(copy.path("config.json"), text.replace("1000000.0", "NaN")).expect("a writable folder");
    };
    check("rope_theta is NaN", not_a_number, &["config.json", "line"]);
    let template = |copy: &Copy| {
        std::fs::write(copy.path("chat_template.jinja"), "{% for message in messages %}").expect("a writable folder");
    };
    check("a broken template", template, &["chat_template.jinja", "does not compile"]);
}

/// A safetensors file with this header and as many bytes of zeros.
fn safetensors(header: &Value, num_bytes: usize) -> Vec<u8> {
    let header = header.to_string().into_bytes();
    [&(header.len() as u64).to_le_bytes()[..], &header, &vec![0; num_bytes]].concat()
}

#[test]
fn headers_that_lie_are_refused() {
    let tensor = |shape: Value, offsets: [u64; 2]| json!({"dtype": "F32", "shape": shape, "data_offsets": offsets});
    let length = |length: u64| [&length.to_le_bytes()[..], b"{}"].concat();
    let half = 1u64 << 63;
    for (what, bytes) in [
        ("an empty file", Vec::new()),
        ("three bytes", vec![1, 2, 3]),
        ("a header of 2^64 - 1 bytes", length(u64::MAX)),
        ("a header of 99 MB", length(99_000_000)),
        ("a header of 99 MB that is there", [&99_000_000u64.to_le_bytes()[..], &vec![b' '; 99_000_000]].concat()),
        ("a header past the end", length(3)),
        ("text for a header", [&2u64.to_le_bytes()[..], b"hi"].concat()),
        ("a tensor past the end", safetensors(&json!({"a": tensor(json!([4]), [0, 16])}), 8)),
        ("bytes of no tensor", safetensors(&json!({"a": tensor(json!([1]), [0, 4])}), 8)),
        ("offsets backwards", safetensors(&json!({"a": tensor(json!([1]), [4, 0])}), 4)),
        ("a shape that is not its bytes", safetensors(&json!({"a": tensor(json!([3]), [0, 8])}), 8)),
        ("a shape past 2^64", safetensors(&json!({"a": tensor(json!([half, half]), [0, 8])}), 8)),
        ("offsets of 2^64", safetensors(&json!({"a": tensor(json!([half]), [0, u64::MAX])}), 8)),
        ("an unknown type", safetensors(&json!({"a": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}}), 4)),
        (
            "tensors that overlap",
            safetensors(&json!({"a": tensor(json!([2]), [0, 8]), "b": tensor(json!([2]), [4, 12])}), 12),
        ),
    ] {
        let edit = |copy: &Copy| std::fs::write(copy.path("model.safetensors"), &bytes).expect("a writable folder");
        check(what, edit, &["model.safetensors"]);
    }
}

#[test]
fn indexes_that_lie_are_refused() {
    let shard = "model-00001-of-00001.safetensors";
    let norm = "model.norm.weight";
    for (what, map, words) in [
        ("a shard that is not there", json!({ norm: "absent.safetensors" }), &["absent.safetensors"][..]),
        ("a tensor the shard lacks", json!({ norm: shard, "model.ghost": shard }), &["model.ghost", "missing"]),
        (
            "a shard elsewhere",
            json!({ norm: "../../etc/passwd" }),
            &["index.json", "../../etc/passwd", "plain file name"],
        ),
        ("no shard at all", json!({}), &["index.json", "names no shards"]),
        ("a shard that is a number", json!({ norm: 1 }), &["index.json"]),
    ] {
        let edit = |copy: &Copy| {
            std::fs::rename(copy.path("model.safetensors"), copy.path(shard)).expect("the shard moves");
            let index = json!({ "weight_map": map }).to_string();
            std::fs::write(copy.path("model.safetensors.index.json"), index).expect("a writable folder");
        };
        check(what, edit, words);
    }
}

#[test]
fn vocabularies_that_do_not_fit() {
    for file in ["tokenizer.json", "tiktoken.model"] {
        let edit = |copy: &Copy| {
            std::fs::remove_file(copy.path("tokenizer.json")).expect("the file goes");
            std::fs::write(copy.path(file), "aGk= 0\naG").expect("a writable folder");
        };
        check(&format!("half a {file}"), edit, &[file]);
    }
    // One token more than the embedding has rows: it is served, and a prompt with that token is told so.
    let larger = Copy::of("mixtral-base");
    larger.edit_json("tokenizer.json", |tokenizer| {
        let tokens = tokenizer["added_tokens"].as_array_mut().expect("a list");
        let mut beyond: Map<String, Value> = tokens[0].as_object().expect("a token").clone();
        beyond.extend([("id".to_owned(), json!(384)), ("content".to_owned(), json!("<beyond>"))]);
        tokens.push(Value::Object(beyond));
    });
    let server = Server::start_folder(SERVER, &larger.folder, &[]);
    let refused = server.post("/v1/completions", &json!({"prompt": "a <beyond>", "max_tokens": 2}));
    assert_eq!(refused.status, 400, "{}", refused.text());
    assert!(refused.text().contains("token id 384 is out of range"), "{}", refused.text());
    server.ask("/v1/completions", &json!({"prompt": "a", "max_tokens": 2}));
}

#[test]
fn weights_that_are_no_numbers_fail_the_requests_that_meet_them() {
    let copy = Copy::of("mixtral-base");
    for (token, bf16) in [(77, 0x7fc0), (78, 0x7f80)] {
        copy.set_bf16("model.embed_tokens.weight", token * 64, bf16);
    }
    let server = Server::start_folder(SERVER, &copy.folder, &[]);
    let ask = |token: u32| {
        server.post("/v1/completions", &json!({"prompt": [1, token, 70], "max_tokens": 4, "temperature": 0}))
    };
    for token in [77, 78] {
        let response = ask(token);
        assert_eq!(response.status, 500, "{}", response.text());
        assert_eq!(response.json()["error"]["code"], "corrupted_logits");
    }
    assert_eq!(ask(79).status, 200);
    assert_eq!(server.get("/health").status, 200);
    server.wait_idle();
}

#[test]
fn inspect_refuses_them_too() {
    let copy = Copy::of("mixtral-base");
    copy.edit_json("config.json", |config| config["num_local_experts"] = json!([0]));
    let mut command = std::process::Command::new(SERVER);
    command.arg("inspect").arg(copy.folder.arg());
    let mut process = harness::process::Process::spawn(&mut command);
    assert_eq!(process.wait(PATIENCE).code(), Some(1), "{}", process.output());
    assert!(process.output().contains("config.json: `num_local_experts`"), "{}", process.output());
}

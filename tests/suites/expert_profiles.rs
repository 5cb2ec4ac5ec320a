//! Expert profiles: `moesaic profile` and `POST /v1/moe/profile` write the same of the same tokens, and say what is wrong.

use std::path::Path;
use std::process::Command;

use harness::checkpoint::Copy;
use harness::http::Response;
use harness::{Folder, Request, Server, golden};
use serde_json::{Value, json};

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");
const PROFILE: &str = "/v1/moe/profile";

/// Exit code, stdout, stderr.
fn profile(model: &str, file: &str, args: &[&str]) -> (Option<i32>, String, String) {
    profile_folder(&golden::folder(model), file, args)
}

fn profile_folder(model: &Path, file: &str, args: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(SERVER);
    command.arg("profile").arg(model).arg(file).args(["--threads", "1"]).args(args);
    let output = command.output().expect("it runs");
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("UTF-8");
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// What is on stdout.
fn profiled(model: &str, file: &str, args: &[&str]) -> Value {
    let (code, out, err) = profile(model, file, args);
    assert_eq!(code, Some(0), "{err}");
    serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}"))
}

fn refused(file: &str, args: &[&str], expected: &[&str]) {
    let (code, out, err) = profile("mixtral-base", file, args);
    assert_eq!((code, out.as_str()), (Some(1), ""), "{err}");
    for expected in expected {
        assert!(err.contains(expected), "{expected} is missing from: {err}");
    }
}

fn post(server: &Server, path: &str, key: &str) -> Response {
    server.send(&Request::new("POST", path).header("Authorization", &format!("Bearer {key}")))
}

fn prompt(seed: u32, len: u32) -> Vec<u32> {
    (0..len).map(|idx| 3 + (seed * 131 + idx * 37) % 360).collect()
}

fn num_tokens(profile: &Value) -> u64 {
    profile["num_tokens"].as_u64().expect("a count")
}

#[test]
fn a_server_and_the_command_write_the_same_of_the_same_prompts() {
    // An encoder reads all of a prompt, its decoder one token.
    for model in ["mixtral-base", "longcat_flash-base", "qwen3_next-base", "switch_transformers-base"] {
        let folder = Folder::new("profile");
        let len = if model.starts_with("switch") { 20 } else { 70 };
        let prompts = [prompt(1, len), prompt(2, len / 2)];
        let lines: Vec<String> = prompts.iter().map(|prompt| json!({"prompt": prompt}).to_string()).collect();
        let file = folder.file("prompts.jsonl");
        std::fs::write(&file, lines.join("\n\n")).expect("the folder is writable");
        let written = profiled(model, &file, &[]);
        let server = Server::start(SERVER, model, &["--admin-key", "root", "--kv-cache-dtype", "auto"]);
        for prompt in &prompts {
            server.ask("/v1/completions", &json!({"prompt": prompt, "max_tokens": 1}));
        }
        let response = post(&server, PROFILE, "root");
        assert_eq!((response.status, response.header("content-type")), (200, Some("application/json")), "{model}");
        assert_eq!(response.json(), written, "{model}");
        assert_eq!(written["format"], "moesaic.expert_profile.v1");
        assert_eq!(
            (written["model"].as_str(), num_tokens(&written)),
            (Some(model), u64::from(len + len / 2)),
            "{model}"
        );
    }
}

#[test]
fn a_profile_of_live_traffic_is_for_the_admin_alone() {
    let server = Server::start(SERVER, "mixtral-base", &["--admin-key", "root", "--api-key", "one"]);
    assert_eq!(server.post(PROFILE, &json!({})).status, 401);
    assert_eq!(post(&server, PROFILE, "one").json()["error"]["code"], "invalid_admin_key");
    let empty = post(&server, PROFILE, "root");
    assert_eq!(empty.status, 400);
    assert!(empty.text().contains("no token was routed"), "{}", empty.text());
    let body = json!({"prompt": [70, 73, 71], "max_tokens": 4, "ignore_eos": true});
    let ask = Request::post("/v1/completions", &body).header("Authorization", "Bearer one");
    assert_eq!(server.send(&ask).status, 200);
    let found = post(&server, &format!("{PROFILE}?window=60"), "root").json();
    assert_eq!(num_tokens(&found), 6, "the last token was not computed: {found}");
    for query in ["window=0", "window=601", "window=x", "out=/tmp/profile.json"] {
        assert_eq!(post(&server, &format!("{PROFILE}?{query}"), "root").status, 400, "{query}");
    }
    assert_eq!(server.get(PROFILE).status, 401);
    let closed = Server::start(SERVER, "mixtral-base", &[]);
    assert_eq!(closed.post(PROFILE, &json!({})).json()["error"]["code"], "no_admin_key");
}

#[test]
fn texts_and_lists_of_prompts_are_read_in_pieces() {
    let folder = Folder::new("profile");
    let (text, list, out) = (folder.file("text.txt"), folder.file("list.jsonl"), folder.file("out.json"));
    let story = "Once upon a time there was a river.\nIt ran to the sea.\n".repeat(40);
    std::fs::write(&text, &story).expect("the folder is writable");
    let whole = profiled("mixtral-base", &text, &["--context", "4096"]);
    let layers = whole["layers"].as_array().expect("layers");
    for layer in layers {
        let loads: u64 =
            layer["loads"].as_array().expect("loads").iter().map(|load| load.as_u64().expect("a count")).sum();
        assert_eq!(loads, num_tokens(&whole) * layer["top_k"].as_u64().expect("a count"), "{layer}");
    }
    // Each piece is begun anew, with the token that texts begin with where there is one.
    let pieces = profiled("mixtral-base", &text, &["--context", "64"]);
    assert!(num_tokens(&pieces) >= num_tokens(&whole) && pieces["layers"] != whole["layers"]);
    let some = profiled("mixtral-base", &text, &["--max-tokens", "100"]);
    assert_eq!(num_tokens(&some), 100);
    let lines = [
        json!("tell me of the river"),
        json!({"messages": [{"role": "user", "content": "tell me of the river"}]}),
        json!({"prompt": "tell me of the river"}),
    ];
    let counts = lines.map(|line| {
        std::fs::write(&list, format!("\u{feff}{line}\n\n")).expect("the folder is writable");
        num_tokens(&profiled("mixtral-base", &list, &[]))
    });
    assert!(counts[0] == counts[1] && counts[2] < counts[1], "a text in quotes is what a user says: {counts:?}");
    let (code, stdout, err) = profile("mixtral-base", &text, &["--out", &out, "--context", "4096"]);
    assert_eq!((code, stdout.as_str()), (Some(0), ""), "{err}");
    let written: Value = serde_json::from_slice(&std::fs::read(&out).expect("it was written")).expect("JSON");
    assert_eq!(written, whole);
    assert_eq!(std::fs::read_dir(&*folder).expect("it is there").count(), 3, "nothing else is left");
}

#[test]
fn a_profile_tells_weights_apart() {
    let folder = Folder::new("profile");
    let file = folder.file("text.txt");
    std::fs::write(&file, "a river").expect("the folder is writable");
    let weights = |model: &Copy| {
        let (code, out, err) = profile_folder(&model.folder, &file, &[]);
        assert_eq!(code, Some(0), "{err}");
        serde_json::from_str::<Value>(&out).expect("JSON")["weights"].as_str().expect("a digest").to_owned()
    };
    let copy = Copy::of("mixtral-base");
    let original = weights(&copy);
    let of_golden = profiled("mixtral-base", &file, &[]);
    assert_eq!(of_golden["weights"], *original, "the folder's name is none of its weights");
    // As after a little more training: the last bit of every number in the second half.
    let path = copy.path("model.safetensors");
    let mut bytes = std::fs::read(&path).expect("the file is there");
    let half = bytes.len() / 4 * 2;
    bytes[half..].iter_mut().step_by(2).for_each(|byte| *byte ^= 1);
    std::fs::write(&path, bytes).expect("the copy is writable");
    assert_ne!(weights(&copy), original);
}

#[test]
fn what_cannot_be_read_or_written_is_said_with_its_place() {
    let folder = Folder::new("profile");
    let (text, list) = (folder.file("text.txt"), folder.file("list.jsonl"));
    std::fs::write(&text, "a river").expect("the folder is writable");
    refused(&folder.file("nowhere.txt"), &[], &["cannot read", "nowhere.txt"]);
    refused(folder.arg(), &[], &["is a folder", "hint"]);
    refused(&text, &["--out", folder.arg()], &["--out", "is a folder", "hint"]);
    refused(&text, &["--out", &folder.file("no/profile.json")], &["--out", "there is no folder"]);
    for (line, expected) in [
        ("{", "not JSON at column 1; hint: a text stands in quotes"),
        ("3", "expected a text or an object"),
        ("{}", "expected either `messages` or `prompt`"),
        ("{\"prompt\": [\"a\", \"b\"]}", "`prompt`: expected one prompt"),
        ("{\"prompt\": [1, 99999]}", "token id 99999 is out of range"),
        ("{\"messages\": []}", "`messages`: has 0 messages"),
    ] {
        std::fs::write(&list, format!("\"a river\"\n{line}\n")).expect("the folder is writable");
        refused(&list, &[], &["list.jsonl:2", expected]);
    }
    std::fs::write(&list, "\n\n").expect("the folder is writable");
    refused(&list, &[], &["has no token to read"]);
    std::fs::write(&list, b"\"a\"\n\"\xff\"\n").expect("the folder is writable");
    refused(&list, &[], &["list.jsonl:2", "not UTF-8"]);
}

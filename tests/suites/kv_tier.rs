//! Blocks of prompts beyond the KV cache: what one server computes another loads, with the same bytes out, whatever happens
//! to them on the way.

use std::path::Path;
use std::time::{Duration, Instant};

use harness::redis::RedisServer;
use harness::server::on_full_disks;
use harness::{Folder, PATIENCE, Request, Server, golden, poll};
use serde_json::{Value, json};

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");
const PATH: &str = "/v1/completions";
/// Redis gets the time it needs on a busy machine, and no answer comes from the output cache.
const OWN: [&str; 6] = ["--cache-timeout-ms", "10000", "--output-cache", "off", "--admin-key", "root"];
const BLOCK: usize = 16;
const PROMPT_LEN: usize = 5 * BLOCK + 3;

/// Ids unlike those of other seeds.
fn prompt(seed: u32) -> Vec<u32> {
    (0..PROMPT_LEN as u32).map(|idx| 3 + (seed * 131 + idx * 37) % 360).collect()
}

fn body(seed: u32) -> Value {
    json!({"prompt": prompt(seed), "max_tokens": 6, "ignore_eos": true, "temperature": 0.7, "seed": 5, "logprobs": 2,
        "return_routed_experts": true})
}

/// A server that keeps blocks: its weights' digest is known.
fn start(model: &str, args: &[&str]) -> Server {
    start_by(SERVER, &golden::folder(model), args)
}

fn start_by(program: &str, folder: &Path, args: &[&str]) -> Server {
    let server = Server::start_folder(program, folder, &[&OWN[..], args].concat());
    poll("a server that keeps blocks", PATIENCE, || {
        server.process.output().contains("blocks of prompts are kept in").then_some(())
    });
    server
}

/// The choices of an answer, and the tokens of its prompt that were not computed.
fn ask(server: &Server, body: &Value) -> (Value, u64) {
    let answer = server.ask(PATH, body);
    let cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a count");
    (answer["choices"].clone(), cached)
}

fn metric(server: &Server, name: &str, labels: &[(&str, &str)]) -> f64 {
    server.metrics().value(name, labels).unwrap_or(0.0)
}

#[test]
fn what_one_computes_the_other_loads() {
    for model in ["mixtral-base", "deepseek_v2-lite", "longcat_flash-base", "granitemoe-base", "jetmoe-base"] {
        let redis = RedisServer::start();
        let url = redis.url();
        let first = start(model, &["--redis-url", &url]);
        let (expected, cached) = ask(&first, &body(1));
        assert_eq!(cached, 0, "{model}");
        redis.keys_of("kv", 5);
        let second = start(model, &["--redis-url", &url, "--max-num-batched-tokens", "7"]);
        // The first one goes while the second one loads.
        let answer = std::thread::scope(|scope| {
            let answer = scope.spawn(|| ask(&second, &body(1)));
            first.process.signal("KILL");
            answer.join().expect("it is answered")
        });
        assert_eq!(answer, (expected, 5 * BLOCK as u64), "{model}");
        let loaded = metric(&second, "vllm:external_prefix_cache_hits_total", &[]);
        assert_eq!(loaded, (5 * BLOCK) as f64, "{model}");
        let by_source = |source| metric(&second, "vllm:prompt_tokens_cached_by_source_total", &[("source", source)]);
        assert_eq!([by_source("external_kv_transfer"), by_source("local_cache_hit")], [loaded, 0.0], "{model}");
        assert_eq!(metric(&second, "moesaic_kv_tier_decisions_total", &[("decision", "load")]), 1.0, "{model}");
        // Now they are in its own cache.
        let (_, cached) = ask(&second, &body(1));
        assert_eq!(cached, (5 * BLOCK) as u64, "{model}");
        assert_eq!(metric(&second, "vllm:prefix_cache_hits_total", &[]), loaded, "{model}");
    }
}

#[test]
fn a_part_of_a_prompt_is_loaded_and_the_rest_computed() {
    let redis = RedisServer::start();
    let url = redis.url();
    let first = start("mixtral-base", &["--redis-url", &url]);
    ask(&first, &json!({"prompt": prompt(1)[..2 * BLOCK + 5], "max_tokens": 1}));
    redis.keys_of("kv", 2);
    let alone = Server::start(SERVER, "mixtral-base", &OWN);
    let (expected, _) = ask(&alone, &body(1));
    let second = start("mixtral-base", &["--redis-url", &url]);
    assert_eq!(ask(&second, &body(1)), (expected, 2 * BLOCK as u64));
    // What it computed is there for the next one.
    redis.keys_of("kv", 5);
}

#[test]
fn a_restart_finds_what_the_folder_has() {
    let folder = Folder::new("restart");
    let mut first = start("deepseek_v2-lite", &["--cache-dir", folder.arg()]);
    let (expected, _) = ask(&first, &body(1));
    first.process.signal("TERM");
    assert!(first.process.wait(PATIENCE).success());
    let second = start("deepseek_v2-lite", &["--cache-dir", folder.arg()]);
    assert_eq!(ask(&second, &body(1)), (expected.clone(), 5 * BLOCK as u64));
    // The folder goes while the server runs: nothing fails.
    std::fs::remove_dir_all(&folder).expect("the folder is there");
    let (fresh, cached) = ask(&second, &body(2));
    assert_eq!((cached, fresh == expected), (0, false));
}

#[test]
fn what_the_pool_gave_up_comes_back_from_memory() {
    let one = Server::start(SERVER, "mixtral-base", &[]);
    let model = one.get("/server_info").json()["model"].clone();
    let count = |key: &str| model[key].as_u64().expect("a count");
    let block = (count("kv_bytes_per_token") + count("routing_bytes_per_token")) * count("block_size");
    let pool = (block * 8).to_string();
    let server = start("mixtral-base", &["--kv-cache-memory", &pool, "--kv-tier-memory", "64MiB"]);
    let (expected, _) = ask(&server, &body(1));
    for seed in [2, 3] {
        assert_eq!(ask(&server, &body(seed)).1, 0);
    }
    // Nothing was loaded yet, so that nothing says it would be slow.
    assert_eq!(ask(&server, &body(1)), (expected, 5 * BLOCK as u64));
    assert_eq!(metric(&server, "vllm:external_prefix_cache_hits_total", &[]), (5 * BLOCK) as f64);
}

#[test]
fn a_broken_block_is_computed() {
    let redis = RedisServer::start();
    let url = redis.url();
    let first = start("mixtral-base", &["--redis-url", &url]);
    let (expected, _) = ask(&first, &body(1));
    let keys = redis.keys_of("kv", 5);
    let whole: Vec<Vec<u8>> = keys.iter().map(|key| redis.bytes(key)).collect();
    let flip = |bytes: &[u8], at: usize| {
        let mut bytes = bytes.to_vec();
        bytes[at] ^= 1;
        bytes
    };
    type Damage<'a> = (&'a str, Box<dyn Fn(&[u8]) -> Vec<u8> + 'a>);
    let damages: [Damage; 5] = [
        ("a flipped bit", Box::new(|bytes| flip(bytes, bytes.len() - 1))),
        ("a cut", Box::new(|bytes| bytes[..bytes.len() / 2].to_vec())),
        ("another format", Box::new(|bytes| flip(bytes, 4))),
        ("another fingerprint", Box::new(|bytes| flip(bytes, 20))),
        ("something else", Box::new(|_| b"something else".to_vec())),
    ];
    for (what, damage) in damages {
        for (key, bytes) in keys.iter().zip(&whole) {
            redis.set(key, &damage(bytes));
        }
        let second = start("mixtral-base", &["--redis-url", &url]);
        assert_eq!(ask(&second, &body(1)), (expected.clone(), 0), "{what}");
        let labels = [("kind", "kv"), ("tier", "redis")];
        assert!(metric(&second, "moesaic_cache_bad_values_total", &labels) >= 1.0, "{what}");
    }
}

#[test]
fn the_blocks_before_a_broken_one_are_taken() {
    let redis = RedisServer::start();
    let url = redis.url();
    let first = start("mixtral-base", &["--redis-url", &url]);
    ask(&first, &json!({"prompt": prompt(1)[..2 * BLOCK + 1], "max_tokens": 1}));
    let of_two = redis.keys_of("kv", 2);
    let (expected, _) = ask(&first, &body(1));
    let keys = redis.keys_of("kv", 5);
    for key in keys.iter().filter(|key| !of_two.contains(key)) {
        redis.set(key, b"something else, as long as what says what is in it: a hundred and twenty bytes, which is longer than one thinks it is");
    }
    let second = start("mixtral-base", &["--redis-url", &url]);
    assert_eq!(ask(&second, &body(1)), (expected, 2 * BLOCK as u64));
}

#[test]
fn a_full_disk_keeps_nothing_and_fails_nobody() {
    let folder = Folder::new("full");
    let cache_dir = folder.file("cache");
    let args = ["--cache-dir", &cache_dir, "--routing-cache-memory", "0"];
    let first = start_by(&on_full_disks(SERVER, &folder), &golden::folder("mixtral-base"), &args);
    first.process.limit_files("0");
    let (expected, _) = ask(&first, &body(1));
    let errors = [("kind", "kv"), ("tier", "disk")];
    poll("an error of the disk", PATIENCE, || {
        (metric(&first, "moesaic_cache_errors_total", &errors) > 0.0).then_some(())
    });
    assert_eq!(ask(&first, &body(1)), (expected.clone(), 5 * BLOCK as u64), "the KV cache has them");
    first.process.limit_files("unlimited");
    ask(&first, &body(2));
    poll("blocks on disk", PATIENCE, || {
        (metric(&first, "moesaic_kv_tier_entries", &[("tier", "disk")]) >= 5.0).then_some(())
    });
    drop(first);
    let second = start("mixtral-base", &args);
    assert_eq!(ask(&second, &body(2)).1, 5 * BLOCK as u64, "what came when there was room");
}

#[test]
fn eight_bits_are_fewer_bytes_and_meet_nobody_else() {
    let redis = RedisServer::start();
    let url = redis.url();
    let exact = start("mixtral-base", &["--redis-url", &url]);
    let (expected, _) = ask(&exact, &body(1));
    let of_exact = redis.keys_of("kv", 5);
    let args = ["--redis-url", &url, "--kv-tier-dtype", "int8"];
    let first = start("mixtral-base", &args);
    assert_eq!(ask(&first, &body(1)), (expected, 0), "another's blocks are not its own");
    let keys = redis.keys_of("kv", 10);
    let len = |keys: &mut dyn Iterator<Item = &String>| redis.bytes(keys.next().expect("there are some")).len();
    let exact_len = len(&mut of_exact.iter());
    let int8_len = len(&mut keys.iter().filter(|key| !of_exact.contains(key)));
    assert!(3 * int8_len < 2 * exact_len, "{int8_len} bytes, {exact_len} exact");
    let second = start("mixtral-base", &args);
    let (choices, cached) = ask(&second, &body(1));
    assert_eq!(cached, 5 * BLOCK as u64);
    assert_eq!(choices[0]["logprobs"]["tokens"].as_array().map(Vec::len), Some(6), "{choices}");
}

#[test]
fn others_never_meet() {
    let redis = RedisServer::start();
    let url = redis.url();
    let first = start("mixtral-base", &["--redis-url", &url]);
    ask(&first, &body(1));
    redis.keys_of("kv", 5);
    for args in [&["--quant", "int8"][..], &["--kv-cache-dtype", "bf16"], &["--block-size", "8"]] {
        let other = start("mixtral-base", &[&["--redis-url", &url], args].concat());
        assert_eq!(ask(&other, &body(1)).1, 0, "{args:?}");
        assert_eq!(metric(&other, "vllm:external_prefix_cache_hits_total", &[]), 0.0, "{args:?}");
    }
    let same = start("mixtral-base", &["--redis-url", &url]);
    let mut salted = body(1);
    salted["cache_salt"] = json!("another tenant");
    assert_eq!(ask(&same, &salted).1, 0);
    let mut with_prompt_logprobs = body(1);
    with_prompt_logprobs["prompt_logprobs"] = json!(1);
    assert_eq!(ask(&same, &with_prompt_logprobs).1, 0, "every position is wanted");
    // A model of the same shape, of which one bit is another.
    let folder = Folder::new("tuned");
    for file in std::fs::read_dir(golden::folder("mixtral-base")).expect("a golden folder") {
        let file = file.expect("it can be listed");
        let mut bytes = std::fs::read(file.path()).expect("it can be read");
        if file.file_name() == "model.safetensors" {
            let middle = bytes.len() / 2;
            bytes[middle / 4 * 4] ^= 1;
        }
        std::fs::write(folder.join(file.file_name()), bytes).expect("it can be written");
    }
    let tuned = start_by(SERVER, &folder, &["--redis-url", &url]);
    assert_eq!(ask(&tuned, &body(1)).1, 0);
}

#[test]
fn a_redis_that_hangs_or_dies_costs_time_and_no_request() {
    let redis = RedisServer::start();
    let url = redis.url();
    let first = start("mixtral-base", &["--redis-url", &url]);
    let (expected, _) = ask(&first, &body(1));
    redis.keys_of("kv", 5);
    for signal in ["STOP", "KILL"] {
        // The last word on the time-out counts.
        let second = start("mixtral-base", &["--redis-url", &url]);
        redis.signal(signal);
        let begin = Instant::now();
        assert_eq!(ask(&second, &body(1)), (expected.clone(), 0), "{signal}");
        // A look-up may take ten seconds here.
        assert!(begin.elapsed() < Duration::from_secs(15), "{signal}: {:?}", begin.elapsed());
        if signal == "STOP" {
            redis.signal("CONT");
        }
    }
}

#[test]
fn models_whose_blocks_are_not_all_there_is_keep_none() {
    let redis = RedisServer::start();
    let url = redis.url();
    for model in ["qwen3_next-base", "gpt_oss-bf16", "switch_transformers-base"] {
        let server = Server::start(SERVER, model, &[&OWN[..], &["--redis-url", &url]].concat());
        let seen = poll("a word about it", PATIENCE, || {
            server.process.output().contains("blocks of prompts stay in the KV cache").then_some(true)
        });
        assert!(seen, "{model}");
        server.ask(PATH, &json!({"prompt": prompt(1)[..40], "max_tokens": 2}));
        assert!(redis.keys().iter().all(|key| !key.contains(":kv:")), "{model}");
    }
}

#[test]
fn an_operator_sees_bounds_and_empties_it() {
    let redis = RedisServer::start();
    let url = redis.url();
    let server = start("mixtral-base", &["--redis-url", &url, "--kv-tier-memory", "32MiB"]);
    let (expected, _) = ask(&server, &body(1));
    redis.keys_of("kv", 5);
    let admin = |request: Request| server.send(&request.header("Authorization", "Bearer root")).json();
    let stats = admin(Request::get("/v1/cache"));
    let rows = stats["kv"].as_array().expect("a list").clone();
    let tiers: Vec<&str> = rows.iter().filter_map(|row| row["tier"].as_str()).collect();
    assert_eq!(tiers, ["memory", "redis"], "{stats}");
    assert_eq!((&rows[0]["entries"], &rows[0]["max_bytes"]), (&json!(5), &json!(32 << 20)), "{stats}");
    assert_eq!(admin(Request::post("/v1/cache/clear", &json!({}))), json!({"complete": true}));
    assert!(redis.keys().iter().all(|key| !key.contains(":kv:")));
    assert_eq!(admin(Request::get("/v1/cache"))["kv"][0]["entries"], 0);
    assert_eq!(ask(&server, &body(1)).0, expected, "the KV cache itself stays");
    let off = Server::start(SERVER, "mixtral-base", &[&OWN[..], &["--redis-url", &url, "--kv-tier", "off"]].concat());
    ask(&off, &body(2));
    let stats = off.send(&Request::get("/v1/cache").header("Authorization", "Bearer root")).json();
    assert_eq!(stats["kv"], json!([]));
    for (args, hint) in [
        (&["--kv-tier", "redis"][..], "hint: --redis-url"),
        (&["--kv-tier", "disk"], "hint: --cache-dir"),
        (&["--kv-tier", "memory"], "hint: --kv-tier-memory"),
    ] {
        let (status, output) = Server::fail(SERVER, &golden::folder("mixtral-base"), args);
        assert!(!status.success() && output.contains(hint), "{args:?}: {output}");
    }
}

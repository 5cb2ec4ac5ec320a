//! The routing cache: what is learned of a prompt's experts, who is told, where it is found again, and how right it is.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use harness::redis::RedisServer;
use harness::{Folder, PATIENCE, Request, Server, poll};
use serde_json::{Value, json};

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");
const PATH: &str = "/v1/completions";
const ROUTING: &str = "/v1/moe/routing";
/// Redis gets the time it needs on a busy machine.
const PATIENT: [&str; 2] = ["--cache-timeout-ms", "10000"];
const BLOCK: usize = 16;

/// Ids unlike those of other seeds.
fn prompt(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|idx| 3 + (seed * 131 + idx * 37) % 360).collect()
}

/// One token, so that no block but the prompt's is computed.
fn completion(prompt: &[u32]) -> Value {
    json!({"prompt": prompt, "max_tokens": 1, "ignore_eos": true, "temperature": 0, "return_routed_experts": true})
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap_or_else(|| panic!("not a list: {value}"))
}

fn num_covered(profile: &Value) -> usize {
    profile["num_covered_tokens"].as_u64().expect("a count") as usize
}

fn profile(server: &Server, prompt: &[u32]) -> Value {
    server.ask(ROUTING, &json!({"prompt": prompt}))
}

/// The profile, once all full blocks are known: they are learned behind the answer.
fn learned(server: &Server, prompt: &[u32]) -> Value {
    poll("a profile of all blocks", PATIENCE, || {
        let profile = profile(server, prompt);
        (num_covered(&profile) == prompt.len() / BLOCK * BLOCK).then_some(profile)
    })
}

fn metric(server: &Server, name: &str) -> f64 {
    server.metrics().value(name, &[]).unwrap_or(0.0)
}

/// How right a predictor was.
fn predicted(server: &Server, predictor: &str, name: &str) -> f64 {
    let value = server.metrics().value(&format!("moesaic_routing_{name}"), &[("predictor", predictor)]);
    value.unwrap_or(0.0)
}

fn known(server: &Server, name: &str) -> f64 {
    predicted(server, "known_blocks", name)
}

/// The experts that a profile names in one layer.
fn named(layer: &Value) -> BTreeSet<u64> {
    list(&layer["experts"]).iter().map(|row| row["expert"].as_u64().expect("an id")).collect()
}

#[test]
fn a_profile_names_what_the_tokens_took() {
    for model in ["mixtral-base", "deepseek_v2-lite", "jetmoe-base", "longcat_flash-base", "qwen3_next-base"] {
        let server = Server::start(SERVER, model, &[]);
        // Recurrent states are kept every 256 tokens, blocks are named all the same.
        let prompt = prompt(1, BLOCK + 3);
        assert_eq!(num_covered(&profile(&server, &prompt)), 0, "{model}");
        let answer = server.ask(PATH, &completion(&prompt));
        let tokens = list(&answer["choices"][0]["prompt_routed_experts"]);
        let profile = learned(&server, &prompt);
        assert_eq!(profile["blocks"], json!({"memory": 1, "disk": 0, "redis": 0}), "{model}");
        assert_eq!((&profile["object"], &profile["num_prompt_tokens"]), (&json!("moe.routing"), &json!(BLOCK + 3)));
        assert_eq!(list(&profile["layers"]).len(), list(&tokens[0]).len(), "{model}: one row per layer");
        for (idx, layer) in list(&profile["layers"]).iter().enumerate() {
            let of_token =
                |token: &Value| list(&token[idx]).iter().map(|id| id.as_u64().expect("an id")).collect::<Vec<_>>();
            let used: BTreeSet<u64> = tokens[..BLOCK].iter().flat_map(of_token).collect();
            let named = named(layer);
            assert!(named.is_superset(&used), "{model} layer {idx}: {used:?} were used, {named:?} are named");
            assert!(used.len() * 5 >= named.len() * 4, "{model} layer {idx}: {used:?} were used, {named:?} are named");
            assert_eq!(layer["top_k"], list(&tokens[0][idx]).len(), "{model}");
            let shares: Vec<f64> = list(&layer["experts"]).iter().map(|row| row["share"].as_f64().unwrap()).collect();
            assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-3, "{model}: {shares:?}");
            assert!(shares.is_sorted_by(|a, b| a >= b), "{model}: {shares:?}");
        }
    }
}

#[test]
fn texts_and_conversations_are_looked_up_as_they_are_asked() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let text = "tell me of the river and of the boat ".repeat(6);
    let answer = server.ask(PATH, &json!({"prompt": text, "max_tokens": 1, "return_token_ids": true}));
    let ids: Vec<u32> = serde_json::from_value(answer["choices"][0]["prompt_token_ids"].clone()).expect("ids");
    let by_ids = learned(&server, &ids);
    assert!(num_covered(&by_ids) >= 2 * BLOCK);
    let encoded = text.replace(' ', "%20");
    assert_eq!(server.get(&format!("{ROUTING}?prompt={encoded}")).json(), by_ids);
    assert_eq!(server.ask(ROUTING, &json!({"prompt": text})), by_ids);
    let other = format!("{ROUTING}?prompt={encoded}&cache_salt=other");
    assert_eq!(num_covered(&server.get(&other).json()), 0);
    let messages = json!([{"role": "user", "content": text}]);
    let chat = json!({"messages": messages, "max_tokens": 1, "return_token_ids": true});
    let answer = server.ask("/v1/chat/completions", &chat);
    let ids: Vec<u32> = serde_json::from_value(answer["prompt_token_ids"].clone()).expect("ids");
    let by_ids = learned(&server, &ids);
    assert_eq!(server.ask(ROUTING, &json!({"messages": messages})), by_ids);
}

#[test]
fn what_was_decoded_is_known_as_a_prompt() {
    let server = Server::start(SERVER, "mixtral-base", &[]);
    let prompt = prompt(2, 10);
    let body =
        json!({"prompt": prompt, "max_tokens": 30, "ignore_eos": true, "temperature": 0, "return_token_ids": true});
    let answer = server.ask(PATH, &body);
    let output: Vec<u32> = serde_json::from_value(answer["choices"][0]["token_ids"].clone()).expect("ids");
    // The last token was not computed.
    let conversation = [&prompt[..], &output[..29]].concat();
    assert_eq!(num_covered(&learned(&server, &conversation)), 2 * BLOCK);
}

#[test]
fn what_comes_again_was_expected_and_took_just_that() {
    const NUM_BLOCKS: u64 = 8;
    let one = Server::start(SERVER, "mixtral-base", &[]);
    let model = one.get("/server_info").json()["model"].clone();
    let count = |key: &str| model[key].as_u64().expect("a count");
    let block = (count("kv_bytes_per_token") + count("routing_bytes_per_token")) * count("block_size");
    let memory = (block * NUM_BLOCKS).to_string();
    let server = Server::start(SERVER, "mixtral-base", &["--kv-cache-memory", &memory]);
    let first = server.ask(PATH, &completion(&prompt(1, 70)));
    learned(&server, &prompt(1, 70));
    assert_eq!(server.ask(PATH, &completion(&prompt(1, 70)))["choices"], first["choices"]);
    assert_eq!(known(&server, "expected_experts_total"), 0.0, "what is there is not computed");
    for seed in [2, 3] {
        server.ask(PATH, &completion(&prompt(seed, 70)));
    }
    let again = server.ask(PATH, &completion(&prompt(1, 70)));
    assert_eq!(again["usage"]["prompt_tokens_details"]["cached_tokens"], 0, "its blocks were given up");
    assert_eq!(again["choices"], first["choices"]);
    let used = known(&server, "used_experts_total");
    assert!(used >= 4.0 * 3.0 * 2.0, "four blocks of three layers with two experts a token: {used}");
    assert_eq!(known(&server, "confirmed_experts_total"), used);
    assert_eq!(known(&server, "accuracy"), 1.0);
    assert!(known(&server, "precision") >= 0.8);
    assert_eq!(metric(&server, "moesaic_routing_unlearned_blocks_total"), 0.0);
}

fn on_redis(url: &str, args: &[&str]) -> Server {
    // What is loaded is not computed.
    let own = ["--redis-url", url, "--kv-tier", "off"];
    let server = Server::start(SERVER, "mixtral-base", &[&PATIENT[..], &own, args].concat());
    poll("a server that knows the digest of its weights", PATIENCE, || {
        server.process.output().contains("the routing of prompts is looked for in memory, Redis").then_some(())
    });
    server
}

#[test]
fn one_learns_and_the_other_knows() {
    let redis = RedisServer::start();
    let first = on_redis(&redis.url(), &[]);
    let expected = first.ask(PATH, &completion(&prompt(1, 70)))["choices"].clone();
    let of_first = learned(&first, &prompt(1, 70));
    redis.keys_of("routing", 4);
    drop(first);
    let second = on_redis(&redis.url(), &[]);
    let found = profile(&second, &prompt(1, 90));
    assert_eq!(found["blocks"], json!({"memory": 0, "disk": 0, "redis": 4}), "the fifth block is another's");
    assert_eq!(found["layers"], of_first["layers"]);
    let again = profile(&second, &prompt(1, 70));
    assert_eq!(again["blocks"], json!({"memory": 4, "disk": 0, "redis": 0}), "what was found is kept");
    assert_eq!(second.ask(PATH, &completion(&prompt(1, 70)))["choices"], expected);
    assert!(known(&second, "used_experts_total") > 0.0, "it was expected before it was computed");
    assert_eq!(known(&second, "accuracy"), 1.0);
    // What is known says something of the block behind it, which nobody has seen.
    let prior = |name: &str| predicted(&second, "prior_blocks", name);
    assert_eq!(prior("expected_experts_total"), 0.0);
    second.ask(PATH, &completion(&prompt(1, 90)));
    let [expected, used] = ["expected_experts_total", "used_experts_total"].map(prior);
    assert!(expected > 0.0 && used >= 3.0 * 2.0, "{expected} expected, {used} used: three layers, two experts a token");
    let (confirmed, recall) = (prior("confirmed_experts_total"), prior("accuracy"));
    assert!(
        confirmed <= used.min(expected) && (recall - confirmed / used).abs() < 1e-9,
        "{confirmed} of {used}: {recall}"
    );
    // Other weights on the same Redis.
    let other = on_redis(&redis.url(), &["--quant", "int8"]);
    assert_eq!(num_covered(&profile(&other, &prompt(1, 70))), 0);
}

#[test]
fn nobody_waits_for_what_redis_knows() {
    let redis = RedisServer::start();
    let [first, second] = [(); 2].map(|()| on_redis(&redis.url(), &["--max-num-batched-tokens", "16"]));
    let mut seed = 10;
    // The second one asks Redis while it computes: a look that comes late says nothing, and harms nobody.
    poll("a block that was expected in time", PATIENCE, || {
        seed += 1;
        let body = completion(&prompt(seed, 330));
        let expected = first.ask(PATH, &body)["choices"].clone();
        learned(&first, &prompt(seed, 330));
        redis.keys_of("routing", 20 * (seed as usize - 10));
        assert_eq!(second.ask(PATH, &body)["choices"], expected);
        (known(&second, "expected_experts_total") > 0.0).then_some(())
    });
    assert_eq!(known(&second, "accuracy"), 1.0);
    redis.signal("STOP");
    let start = Instant::now();
    let fresh = second.ask(PATH, &completion(&prompt(1, 330)));
    // A look may take ten seconds.
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(list(&fresh["choices"][0]["prompt_routed_experts"]).len(), 330);
    redis.signal("CONT");
}

#[test]
fn a_broken_value_is_a_miss_and_is_written_anew() {
    let redis = RedisServer::start();
    let first = on_redis(&redis.url(), &[]);
    let prompt = prompt(1, BLOCK + 1);
    let expected = first.ask(PATH, &completion(&prompt))["choices"].clone();
    let key = redis.keys_of("routing", 1).remove(0);
    let whole = redis.bytes(&key);
    let mut flipped = whole.clone();
    *flipped.last_mut().expect("a value has a payload") ^= 1;
    let mut of_future = whole.clone();
    of_future[4] ^= 8;
    let broken = [("flipped", flipped), ("cut", whole[..whole.len() - 1].to_vec()), ("of another format", of_future)];
    for (what, bytes) in broken.into_iter().chain([("foreign", b"something else".to_vec())]) {
        redis.set(&key, &bytes);
        let server = on_redis(&redis.url(), &[]);
        assert_eq!(num_covered(&profile(&server, &prompt)), 0, "{what}");
        let labels = [("kind", "routing"), ("tier", "redis")];
        assert!(server.metrics().value("moesaic_cache_bad_values_total", &labels) >= Some(1.0), "{what}");
        assert_eq!(server.ask(PATH, &completion(&prompt))["choices"], expected, "{what}");
        assert_eq!(num_covered(&learned(&server, &prompt)), BLOCK);
        poll("a value that is whole again", PATIENCE, || {
            let is_there = !redis.keys_of("routing", 1).is_empty();
            // It begins as the first one did; its end of life is another.
            (is_there && redis.bytes(&key)[120..] == whole[120..]).then_some(())
        });
    }
}

#[test]
fn a_folder_keeps_profiles_over_a_restart() {
    let folder = Folder::new("routing");
    let args = [&PATIENT[..], &["--cache-dir", folder.arg(), "--kv-tier", "off"]].concat();
    let start = || {
        let server = Server::start(SERVER, "mixtral-base", &args);
        poll("a server that knows the digest of its weights", PATIENCE, || {
            server.process.output().contains("the routing of prompts is looked for in memory, disk").then_some(())
        });
        server
    };
    let mut first = start();
    first.ask(PATH, &completion(&prompt(1, 40)));
    let of_first = learned(&first, &prompt(1, 40));
    first.process.signal("TERM");
    assert!(first.process.wait(PATIENCE).success());
    let second = start();
    let found = profile(&second, &prompt(1, 40));
    assert_eq!(found["blocks"], json!({"memory": 0, "disk": 2, "redis": 0}));
    assert_eq!(found["layers"], of_first["layers"]);
}

#[test]
fn keys_and_salts_keep_apart() {
    let keys = ["--api-key", "one", "--api-key", "two", "--metrics-public"];
    let server = Server::start(SERVER, "mixtral-base", &keys);
    let send = |key: &str, path: &str, body: &Value| {
        let answer = server.send(&Request::post(path, body).header("Authorization", &format!("Bearer {key}")));
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()
    };
    let salted = |body: Value, salt: Option<&str>| {
        let mut body = body;
        body["cache_salt"] = json!(salt);
        body
    };
    let prompt = prompt(1, 40);
    let covered = |key, salt| num_covered(&send(key, ROUTING, &salted(json!({"prompt": prompt}), salt)));
    send("one", PATH, &completion(&prompt));
    send("two", PATH, &salted(completion(&prompt), Some("a")));
    poll("both are learned", PATIENCE, || {
        ([covered("one", None), covered("two", Some("a"))] == [32, 32]).then_some(())
    });
    for (key, salt) in [("two", None), ("one", Some("a")), ("two", Some("b"))] {
        assert_eq!(covered(key, salt), 0, "{key} {salt:?}");
    }
    for request in [Request::get(&format!("{ROUTING}?prompt=a")), Request::post(ROUTING, &json!({"prompt": "a"}))] {
        assert_eq!(server.send(&request).status, 401);
    }
}

#[test]
fn an_operator_sees_and_empties_it() {
    let server = Server::start(SERVER, "mixtral-base", &["--admin-key", "root"]);
    let admin = |request: Request| server.send(&request.header("Authorization", "Bearer root")).json();
    let entries = || admin(Request::get("/v1/cache"))["routing"]["entries"].clone();
    assert_eq!(entries(), 0);
    server.ask(PATH, &completion(&prompt(1, 40)));
    learned(&server, &prompt(1, 40));
    assert_eq!(entries(), 2);
    assert_eq!(metric(&server, "moesaic_routing_cache_entries"), 2.0);
    assert!(metric(&server, "moesaic_routing_cache_bytes") > 0.0);
    assert_eq!(admin(Request::post("/v1/cache/clear", &json!({}))), json!({"complete": true}));
    assert_eq!((entries(), num_covered(&profile(&server, &prompt(1, 40)))), (json!(0), 0));
}

#[test]
fn what_cannot_be_known_is_refused() {
    let refused = |server: &Server, request: &Request, reason: &str| {
        let answer = server.send(request);
        let error = answer.json()["error"].clone();
        assert_eq!((answer.status, &error["param"]), (400, &json!("prompt")), "{error}");
        assert!(error["message"].as_str().is_some_and(|message| message.contains(reason)), "{error}");
    };
    let ask = Request::post(ROUTING, &json!({"prompt": [1, 2, 3]}));
    for (model, args) in [
        ("switch_transformers-base", &[][..]),
        ("mixtral-base", &["--routing-cache-memory", "0"]),
        ("mixtral-base", &["--enable-prefix-caching=false"]),
    ] {
        let server = Server::start(SERVER, model, &[args, &["--admin-key", "root"]].concat());
        refused(&server, &ask, "no routing is kept");
        let stats = server.send(&Request::get("/v1/cache").header("Authorization", "Bearer root")).json();
        assert_eq!(stats["routing"], Value::Null);
    }
    let server = Server::start(SERVER, "mixtral-base", &["--max-model-len", "64"]);
    refused(&server, &Request::post(ROUTING, &json!({"prompt": vec![1; 65]})), "prompt has 65 tokens, the limit is 64");
    for body in [json!({}), json!({"prompt": ["a", "b"]}), json!({"prompt": "a", "messages": []})] {
        refused(&server, &Request::post(ROUTING, &body), "give one text, one list of token ids, or `messages`");
    }
    refused(&server, &Request::get(ROUTING), "is missing");
    assert_eq!(server.get(&format!("{ROUTING}?prompt=a&cache_salt=")).json()["error"]["param"], "cache_salt");
    assert_eq!(server.get(&format!("{ROUTING}?prompt=a&model=other")).status, 404);
}

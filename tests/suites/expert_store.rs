//! Experts under a budget of memory, over HTTP: the same answers, what is told of it, and what a broken file does to whom.

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::checkpoint::pack;
use harness::{Folder, PATIENCE, Server, golden, poll, with};
use serde_json::{Value, json};

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");
const PATH: &str = "/v1/completions";
/// Each expert is read when it is needed, and no other.
const ON_DEMAND: [&str; 3] = ["--expert-warmup", "none", "--expert-prefetch=false"];

/// A golden checkpoint as a folder of packed weights.
struct Packed(Folder);

impl Packed {
    fn of(model: &str) -> Self {
        let folder = Folder::new("packed");
        pack(SERVER, model, "f32", &folder.join("model"));
        Self(folder)
    }

    fn path(&self) -> PathBuf {
        self.0.join("model")
    }

    fn start(&self, args: &[&str]) -> Server {
        Server::start_folder(SERVER, &self.path(), args)
    }

    /// With room for the two experts of one token in one of Mixtral's three layers of eight, each read when it is needed.
    fn start_on_least(&self) -> Server {
        let budget = (model(&self.start(&[]), "expert_bytes") / 12).to_string();
        self.start(&[&["--expert-memory", &budget], &ON_DEMAND[..]].concat())
    }

    /// Turns every bit of an expert, on the disk; a second time makes it what it was.
    fn invert(&self, layer: u64, expert: u64) {
        let place = self.expert(layer, expert);
        let file = File::options().read(true).write(true).open(self.shard()).expect("the shard is writable");
        let mut bytes = vec![0; (place.end - place.start) as usize];
        file.read_exact_at(&mut bytes, place.start).expect("the expert is there");
        bytes.iter_mut().for_each(|byte| *byte = !*byte);
        file.write_all_at(&bytes, place.start).expect("the shard is writable");
    }

    /// The only shard.
    fn shard(&self) -> PathBuf {
        self.path().join("model-00001.safetensors")
    }

    /// Where the matrices of an expert of Mixtral lie in the shard.
    fn expert(&self, layer: u64, expert: u64) -> Range<u64> {
        let bytes = std::fs::read(self.shard()).expect("the shard is there");
        let (length, rest) = bytes.split_first_chunk::<8>().expect("a safetensors file starts with a length");
        let length = u64::from_le_bytes(*length);
        let header: Value = serde_json::from_slice(&rest[..length as usize]).expect("the header is JSON");
        let part = format!("layers.{layer}.block_sparse_moe.experts.{expert}.");
        let ranges = header.as_object().expect("an object").iter().filter(|(name, _)| name.contains(&part));
        let offsets: Vec<u64> = ranges
            .flat_map(|(_, tensor)| {
                list(&tensor["data_offsets"]).iter().map(|offset| offset.as_u64().expect("an offset"))
            })
            .collect();
        assert_eq!(offsets.len(), 4, "two matrices of {part}");
        let [first, last] = [offsets.iter().min(), offsets.iter().max()].map(|offset| offset.expect("four of them"));
        8 + length + first..8 + length + last
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap_or_else(|| panic!("not a list: {value}"))
}

fn metric(server: &Server, name: &str) -> f64 {
    server.metrics().value(&format!("moesaic_expert_{name}"), &[]).unwrap_or(0.0)
}

fn model(server: &Server, key: &str) -> u64 {
    server.get("/server_info").json()["model"][key].as_u64().unwrap_or_else(|| panic!("no {key}"))
}

fn completion(prompt: &[u32], max_tokens: u32) -> Value {
    json!({"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": true, "seed": 1, "temperature": 0.8,
           "return_token_ids": true, "return_routed_experts": true})
}

/// `(layer, expert)` of all that a completion of one prompt took, in prompt and answer.
fn taken(answer: &Value) -> BTreeSet<(u64, u64)> {
    let choice = &answer["choices"][0];
    let tokens = list(&choice["prompt_routed_experts"]).iter().chain(list(&choice["routed_experts"]));
    tokens
        .flat_map(|token| list(token).iter().zip(0..).map(|(layer, layer_idx)| (layer_idx, list(layer))))
        .flat_map(|(layer, experts)| experts.iter().map(move |expert| (layer, expert.as_u64().expect("an id"))))
        .collect()
}

#[test]
fn answers_are_the_same_under_the_least_budget_and_metrics_say_what_it_costs() {
    let packed = Packed::of("mixtral-base");
    let all = packed.start(&[]);
    assert_eq!(model(&all, "expert_memory_bytes"), model(&all, "expert_bytes"));
    let read = |server: &Server| server.get("/server_info").json()["model"]["expert_read"].clone();
    assert_eq!(read(&all), Value::Null);
    // Two of eight experts of one of three layers.
    let least = model(&all, "expert_bytes") / 12;
    let bodies: Vec<Value> = (0..4).map(|seed| completion(&[3 + seed, 90, 200 + seed, 7], 12)).collect();
    let expected: Vec<Value> = bodies.iter().map(|body| all.ask(PATH, body)["choices"].clone()).collect();
    assert!(!all.metrics().text().contains("moesaic_expert_cache_hits_total{"), "nothing is cached");
    // Below four there is no room beside what a layer needs.
    for (args, num_leasts) in [
        (&["--expert-policy", "lru"][..], 4),
        (&["--expert-warmup", "none"], 6),
        (&ON_DEMAND, 1),
        (&["--expert-read", "cached", "--expert-policy", "lfu"], 5),
    ] {
        let budget = num_leasts * least;
        let server = packed.start(&[&["--expert-memory", &budget.to_string()], args].concat());
        assert_eq!((model(&server, "expert_memory_bytes"), model(&server, "expert_bytes")), (budget, 12 * least));
        assert_eq!(read(&server), "cached", "the machine has room for what is so small");
        for (body, expected) in bodies.iter().zip(&expected) {
            assert_eq!(server.ask(PATH, body)["choices"], *expected, "{args:?}");
        }
        let [hits, misses, evictions] =
            ["hits", "misses", "evictions"].map(|kind| metric(&server, &format!("cache_{kind}_total")));
        assert!(
            misses > 0.0 && evictions > 0.0 && hits + misses >= 4.0 * 13.0 * 3.0,
            "{args:?}: {hits} {misses} {evictions}"
        );
        assert!(metric(&server, "resident_bytes") <= budget as f64, "{args:?}");
        assert_eq!(metric(&server, "memory_bytes"), budget as f64);
        assert!(metric(&server, "read_bytes_total") >= misses, "{args:?}");
        let issued = metric(&server, "prefetch_issued_total");
        assert_eq!(issued > 0.0, args != ON_DEMAND, "{args:?}: {issued} read ahead");
        let ends = ["used", "late", "wasted"].map(|end| metric(&server, &format!("prefetch_{end}_total")));
        assert!(ends.iter().sum::<f64>() <= issued, "{args:?}: {ends:?} of {issued}");
        let recall = server.metrics().value("moesaic_routing_accuracy", &[("predictor", "next_layer")]);
        assert_eq!(recall.is_some_and(|recall| recall > 0.0 && recall <= 1.0), args != ON_DEMAND, "{recall:?}");
        let of_layer = server.metrics().value("moesaic_routing_layer_accuracy", &[("layer", "2")]);
        assert_eq!(of_layer.is_some(), args != ON_DEMAND, "{args:?}");
        let waits = server.metrics().value("moesaic_step_seconds_count", &[("phase", "expert_wait")]);
        assert!(waits.is_some_and(|waits| waits >= 4.0 * 12.0), "{waits:?}");
        let share = metric(&server, "wait_share");
        assert!((0.0..=1.0).contains(&share), "{share}");
        assert!(metric(&server, "load_seconds_count") > 0.0);
    }
}

#[test]
fn a_request_is_told_what_it_found_and_had_read() {
    let packed = Packed::of("mixtral-base");
    let server = packed.start(&[&["--expert-memory", "50%"], &ON_DEMAND[..]].concat());
    let mut asking = with(completion(&[3, 90, 200, 7], 12), json!({"moe": {"usage": true}}));
    let mut so_far = [0.0; 3];
    for seed in 0..3 {
        asking["seed"] = json!(seed);
        let answer = server.ask(PATH, &asking);
        let told = ["hits", "misses", "bytes_moved"]
            .map(|name| answer["usage"]["moe"]["expert_cache"][name].as_f64().unwrap_or_else(|| panic!("{answer}")));
        let counted = ["cache_hits_total", "cache_misses_total", "read_bytes_total"].map(|name| metric(&server, name));
        // Alone, it is charged with all that is counted.
        assert_eq!(told, std::array::from_fn(|idx| counted[idx] - so_far[idx]), "request {seed}");
        assert!(told.iter().all(|&number| number > 0.0), "{told:?}");
        so_far = counted;
    }
    asking["moe"] = json!({"usage": false});
    assert!(server.ask(PATH, &asking)["usage"].get("moe").is_none(), "nobody asked");
}

#[test]
fn what_cannot_be_is_refused_at_the_start() {
    let packed = Packed::of("mixtral-base");
    let refused = |folder: &Path, args: &[&str], expected: &str| {
        let (status, output) = Server::fail(SERVER, folder, args);
        assert!(!status.success() && output.contains(expected), "{args:?}: {output}");
    };
    let folder = packed.path();
    refused(&folder, &["--expert-memory", "100B"], "--expert-memory is 100 bytes; the experts that one token chooses");
    refused(&folder, &["--expert-memory", "140%"], "not a percentage from 0% to 100%");
    refused(&folder, &["--expert-memory", "half"], "is not a number of bytes");
    refused(&folder, &["--expert-memory", "0.5"], "nor a percentage such as 50%");
    refused(&golden::folder("mixtral-base"), &["--expert-memory", "50%"], "hint: make one with `moesaic quantize`");
    for (args, setting) in
        [(["--expert-policy", "pinned"], "expert_policy"), (["--expert-warmup", "hot"], "expert_warmup")]
    {
        let expected = format!("`expert_profile` is not set, which the value of `{setting}` needs");
        refused(&folder, &args, &expected);
    }
    let missing = ["--expert-memory", "50%", "--expert-policy", "pinned", "--expert-profile", "/nowhere/profile.json"];
    refused(&folder, &missing, "cannot read /nowhere/profile.json");
    // A budget for all is none, for a folder that is not packed too.
    for folder in [folder, golden::folder("mixtral-base")] {
        let server = Server::start_folder(SERVER, &folder, &["--expert-memory", "100%"]);
        assert_eq!(model(&server, "expert_memory_bytes"), model(&server, "expert_bytes"));
    }
}

#[test]
fn a_text_uses_the_same_experts_under_a_budget() {
    let packed = Packed::of("mixtral-base");
    let text = packed.0.file("text.txt");
    std::fs::write(&text, "a river runs to the sea").expect("the folder is writable");
    let profile = |args: &[&str]| {
        let ended = Command::new(SERVER).arg("profile").arg(packed.path()).arg(&text).args(args).output();
        ended.expect("the program starts")
    };
    let [all, part] = [&[][..], &["--expert-memory", "50%"]].map(profile);
    assert!(all.status.success() && !all.stdout.is_empty(), "{}", String::from_utf8_lossy(&all.stderr));
    assert_eq!(part.stdout, all.stdout, "{}", String::from_utf8_lossy(&part.stderr));
    for (args, expected) in [
        (["--expert-memory", "100B"], "the experts that one token chooses"),
        (["--max-tokens", "0"], "0 is not in 1.."),
        (["--context", "60000"], "--context is 60000, allowed are at most"),
    ] {
        let refused = profile(&args);
        let reason = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && reason.contains(expected), "{reason}");
    }
}

#[test]
fn the_hottest_of_a_profile_are_there_from_the_start_and_stay() {
    let packed = Packed::of("mixtral-base");
    let profile = packed.0.file("profile.json");
    let texts = packed.0.file("texts.txt");
    std::fs::write(&texts, "the quick brown fox jumps over the lazy dog\n".repeat(4)).expect("the folder is writable");
    let ended = Command::new(SERVER).arg("profile").arg(packed.path()).args([&texts, "--out", &profile]).output();
    let ended = ended.expect("the program starts");
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    let half = ["--expert-memory", "50%", "--expert-profile", &profile];
    let hot = packed.start(&[&half[..], &["--expert-warmup", "hot", "--expert-policy", "pinned"]].concat());
    assert!(metric(&hot, "resident_bytes") > 0.0, "read before anyone asks");
    let cold = packed.start(&["--expert-memory", "50%", "--expert-warmup", "none"]);
    let [of_hot, of_cold] = [&hot, &cold].map(|server| {
        let body = json!({"prompt": "the quick brown fox", "max_tokens": 1, "temperature": 0});
        let answer = server.ask(PATH, &body);
        (answer["choices"].clone(), metric(server, "cache_misses_total"))
    });
    assert_eq!(of_hot.0, of_cold.0);
    assert!(of_hot.1 < of_cold.1, "{} misses of {}", of_hot.1, of_cold.1);
    let other = Packed::of("deepseek_v3-base");
    let (status, output) = Server::fail(SERVER, &other.path(), &[&half[..], &["--expert-warmup", "hot"]].concat());
    assert!(!status.success() && output.contains("the expert profile is of another model"), "{output}");
}

/// A model with one layer of experts has no next layer: what is read ahead is what the routing cache knows of a prompt.
#[test]
fn a_known_prompt_s_experts_are_read_before_its_first_layer() {
    let packed = Packed::of("deepseek_v3-base");
    let prompt = |seed: u32| -> Vec<u32> { (0..70).map(|idx| 3 + (seed * 131 + idx * 37) % 360).collect() };
    let one = packed.start(&[]);
    let block =
        (model(&one, "kv_bytes_per_token") + model(&one, "routing_bytes_per_token")) * model(&one, "block_size");
    let memory = (8 * block).to_string();
    let server = packed.start(&["--kv-cache-memory", &memory, "--expert-memory", "90%", "--expert-warmup", "none"]);
    let ask = |seed| server.ask(PATH, &completion(&prompt(seed), 1))["choices"].clone();
    let first = ask(1);
    assert_eq!(metric(&server, "prefetch_issued_total"), 0.0, "nobody knew");
    poll("a profile of all blocks", PATIENCE, || {
        let profile = server.ask("/v1/moe/routing", &json!({"prompt": prompt(1)}));
        (profile["num_covered_tokens"] == 64).then_some(())
    });
    // Others take its blocks and the room of some of its experts.
    (2..6).for_each(|seed| drop(ask(seed)));
    let read_ahead = poll("an expert that was known to be needed and was not there", PATIENCE, || {
        assert_eq!(ask(1), first);
        (7..9).for_each(|seed| drop(ask(seed)));
        Some(metric(&server, "prefetch_issued_total")).filter(|issued| *issued > 0.0)
    });
    let used = metric(&server, "prefetch_used_total") + metric(&server, "prefetch_late_total");
    assert!(used <= read_ahead);
}

/// JetMoE's routers of attention heads are known of a prompt too, and their experts are not in the store.
#[test]
fn what_is_known_of_attention_experts_is_no_concern_of_the_store() {
    let packed = Packed::of("jetmoe-base");
    let server = packed.start(&["--expert-memory", "60%"]);
    let prompt = |len: u32| -> Vec<u32> { (0..len).map(|idx| 3 + idx * 37 % 360).collect() };
    server.ask(PATH, &completion(&prompt(70), 1));
    poll("a profile of all blocks", PATIENCE, || {
        let profile = server.ask("/v1/moe/routing", &json!({"prompt": prompt(70)}));
        (profile["num_covered_tokens"] == 64).then_some(())
    });
    let found = server.ask(PATH, &completion(&prompt(100), 3));
    let all = packed.start(&[]);
    assert_eq!(all.ask(PATH, &completion(&prompt(100), 3))["choices"], found["choices"]);
}

/// Prompts of one token, one that takes an expert and one that does not. None that the first takes lies behind it.
fn with_and_without(server: &Server) -> ((u64, u64), Value, Value) {
    let bodies: Vec<Value> = (3..60).map(|id| completion(&[id], 1)).collect();
    let all: Vec<BTreeSet<(u64, u64)>> = bodies.iter().map(|body| taken(&server.ask(PATH, body))).collect();
    let found =
        all[0].iter().rev().find_map(|expert| Some((*expert, all.iter().position(|taken| !taken.contains(expert))?)));
    let (expert, without) = found.expect("no expert is taken by all tokens");
    (expert, bodies[0].clone(), bodies[without].clone())
}

/// A broken expert fails who needs it, by name, and nobody else.
fn check_broken(server: &Server, (layer, expert): (u64, u64), [with, without]: [&Value; 2], reason: &str) {
    let failed = server.post(PATH, with);
    assert_eq!(failed.status, 503, "{}", failed.text());
    let error = failed.json()["error"].clone();
    assert_eq!(error["code"], "expert_unavailable", "{error}");
    let message = error["message"].as_str().expect("a message");
    let name = format!("expert {expert} of MoE layer {layer} cannot be read: model-00001.safetensors: ");
    assert!(message.contains(&name) && message.contains(reason), "{message}");
    if !without.is_null() {
        server.ask(PATH, without);
    }
    server.wait_idle();
}

#[test]
fn other_bytes_fail_who_needs_the_expert_until_they_are_right_again() {
    let packed = Packed::of("mixtral-base");
    let server = packed.start_on_least();
    let ((layer, expert), with, without) = with_and_without(&server);
    let expected = [&with, &without].map(|body| server.ask(PATH, body)["choices"].clone());
    packed.invert(layer, expert);
    let reason = "it was changed while the server runs, and holds other bytes";
    check_broken(&server, (layer, expert), [&with, &without], reason);
    // Both at once, in one step or not: one fails, the other has its answer.
    let stream = server.stream(PATH, &without);
    check_broken(&server, (layer, expert), [&with, &Value::Null], reason);
    drop(stream);
    assert!(metric(&server, "faults_total") >= 2.0);
    packed.invert(layer, expert);
    for (body, expected) in [&with, &without].into_iter().zip(&expected) {
        assert_eq!(server.ask(PATH, body)["choices"], *expected, "as before, and nothing of the failure was kept");
    }
}

#[test]
fn bytes_that_went_wrong_before_the_start_are_found_when_they_are_read() {
    let packed = Packed::of("mixtral-base");
    let server = packed.start_on_least();
    let ((layer, expert), with, without) = with_and_without(&server);
    let expected = server.ask(PATH, &without)["choices"].clone();
    drop(server);
    packed.invert(layer, expert);
    let server = packed.start_on_least();
    let reason = "it holds other bytes than moesaic.json says";
    check_broken(&server, (layer, expert), [&with, &without], reason);
    assert_eq!(server.ask(PATH, &without)["choices"], expected);
    drop(server);
    // A warm-up reads it before anybody asks.
    let (status, output) = Server::fail(SERVER, &packed.path(), &["--expert-memory", "99%"]);
    assert!(
        !status.success() && output.contains(reason) && output.contains(&format!("expert {expert} of")),
        "{output}"
    );
}

#[test]
fn what_cannot_be_read_is_not_read_ahead_again() {
    let packed = Packed::of("mixtral-base");
    let bodies: Vec<Value> = (3..60).map(|id| completion(&[id], 1)).collect();
    let all = packed.start(&[]);
    let answers: Vec<Value> = bodies.iter().map(|body| all.ask(PATH, body)).collect();
    let (layer, expert) = *taken(&answers[0]).last().expect("some expert");
    // There is room for all others.
    let budget = (model(&all, "expert_bytes") - 1).to_string();
    drop(all);
    let server = packed.start(&["--expert-memory", &budget, "--expert-warmup", "none"]);
    packed.invert(layer, expert);
    check_broken(&server, (layer, expert), [&bodies[0], &Value::Null], "holds other bytes");
    let ask_others = || {
        let others = bodies.iter().zip(&answers).filter(|(_, answer)| !taken(answer).contains(&(layer, expert)));
        for (body, answer) in others {
            assert_eq!(server.ask(PATH, body)["choices"], answer["choices"]);
        }
        server.wait_idle();
        metric(&server, "load_seconds_count")
    };
    let before = ask_others();
    assert_eq!(ask_others(), before, "all that can be read is there");
    packed.invert(layer, expert);
    assert_eq!(server.ask(PATH, &bodies[0])["choices"], answers[0]["choices"], "who needs it has it tried");
}

#[test]
fn a_file_that_shrinks_fails_or_is_replaced_is_survived() {
    let packed = Packed::of("mixtral-base");
    let server = packed.start_on_least();
    let (broken, with, without) = with_and_without(&server);
    let expected = server.ask(PATH, &with)["choices"].clone();
    let (shard, bytes) = (packed.shard(), std::fs::read(packed.shard()).expect("the shard is there"));
    let aside = packed.path().join("aside");
    // Another file under its name: the one that is open is as it was.
    std::fs::rename(&shard, &aside).expect("the folder is writable");
    std::fs::write(&shard, b"something else").expect("the folder is writable");
    server.ask(PATH, &without);
    assert_eq!(server.ask(PATH, &with)["choices"], expected);
    // It shrinks, up to the middle of the expert, and what has its name is no help.
    let middle = packed_middle(&bytes, &aside, &packed, broken);
    let file = File::options().write(true).open(&aside).expect("the shard is writable");
    file.set_len(middle).expect("the shard is writable");
    check_broken(&server, broken, [&with, &Value::Null], "it ends at byte");
    // Reading what has its name is an error of the device: no memory is mapped there.
    std::fs::remove_file(&shard).expect("the folder is writable");
    std::os::unix::fs::symlink("/proc/self/mem", &shard).expect("the folder is writable");
    check_broken(&server, broken, [&with, &Value::Null], "Input/output error");
    // Put right under its name, as a deployment would.
    std::fs::remove_file(&shard).expect("the folder is writable");
    std::fs::write(&shard, &bytes).expect("the folder is writable");
    assert_eq!(server.ask(PATH, &with)["choices"], expected);
    server.ask(PATH, &without);
}

/// The middle of an expert, found in the shard where it lies now.
fn packed_middle(bytes: &[u8], aside: &Path, packed: &Packed, (layer, expert): (u64, u64)) -> u64 {
    let other = std::fs::read(packed.shard()).expect("the other file is there");
    std::fs::write(packed.shard(), bytes).expect("the folder is writable");
    let place = packed.expert(layer, expert);
    std::fs::write(packed.shard(), other).expect("the folder is writable");
    assert_eq!(std::fs::metadata(aside).expect("the shard is there").len(), bytes.len() as u64);
    (place.start + place.end) / 2
}

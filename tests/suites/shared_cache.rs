//! Answers that outlive a server, in Redis and on disk: shared by replicas that compute alike, by no others, and never the reason why a
//! request fails or waits.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use harness::checkpoint::Copy;
use harness::faulty_proxy::{Faults, FaultyProxy};
use harness::redis::{RedisServer, Reply};
use harness::replica::{CHAT, MODEL, NUM_VALUES, PATIENT, Question, Replica, SLACK, heal};
use harness::{EventStream, Folder, PATIENCE, Request, golden, poll, with};
use serde_json::json;

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");

/// Time that Redis hangs. The circuit opens within five budgets, then five probes fail, with pauses of 250 ms to 4 s.
const HANG: Duration = Duration::from_secs(10);

fn start(model: &Path, args: &[&str]) -> Replica {
    Replica::start(SERVER, model, args)
}

/// One that has no memory of its own: every answer that it has computed before comes from a slow tier.
fn forgetful(args: &[&str]) -> Replica {
    start(&golden::folder(MODEL), &[args, &["--output-cache-memory", "0"]].concat())
}

fn in_redis(url: &str) -> Replica {
    forgetful(&[&PATIENT[..], &["--output-cache", "redis", "--redis-url", url]].concat())
}

/// One with the budget that servers have by themselves.
fn hurried(url: &str) -> Replica {
    forgetful(&["--output-cache", "redis", "--redis-url", url])
}

fn on_disk(directory: &Path) -> Replica {
    let directory = directory.to_str().expect("names of temporary folders are UTF-8");
    forgetful(&[&PATIENT[..], &["--output-cache", "disk", "--cache-dir", directory]].concat())
}

/// Keeps questions coming until it is dropped.
struct Clients<'a> {
    is_over: &'a AtomicBool,
    num_hits: &'a AtomicUsize,
}

impl Clients<'_> {
    fn ask(&self, replica: &Replica, number: usize) {
        while !self.is_over.load(Ordering::Relaxed) {
            if replica.ask(&Question::of(number)) == "hit" {
                self.num_hits.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn wait_hits(&self, count: usize) {
        let before = self.num_hits.load(Ordering::Relaxed);
        poll("hits", PATIENCE, || (self.num_hits.load(Ordering::Relaxed) >= before + count).then_some(()));
    }
}

/// Ends the clients also where a check fails.
struct EndAtDrop<'a>(&'a AtomicBool);

impl Drop for EndAtDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn with_clients(replicas: [&Replica; 2], work: impl FnOnce(&Clients<'_>)) {
    let (is_over, num_hits) = (AtomicBool::new(false), AtomicUsize::new(0));
    let clients = Clients { is_over: &is_over, num_hits: &num_hits };
    thread::scope(|scope| {
        let end = EndAtDrop(&is_over);
        for number in [0, 2] {
            for replica in replicas {
                let clients = &clients;
                scope.spawn(move || clients.ask(replica, number));
            }
        }
        work(&clients);
        drop(end);
    });
}

/// The text of a stream whose answer was there, and what happens after its first chunk.
fn streamed_hit(address: SocketAddr, question: &Question, after_first: impl FnOnce()) -> String {
    let mut body = question.body();
    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    let mut stream = EventStream::open(address, &Request::post(question.path(), &body)).expect("the server answers");
    let first = stream.next_chunk();
    after_first();
    let mut chunks = stream.chunks();
    let usage = chunks.pop().expect("the last chunk has the usage");
    assert_eq!(usage["usage"]["cached"], true, "{usage}");
    chunks.insert(0, first);
    chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect()
}

#[test]
fn what_one_computed_the_others_replay_after_it_was_killed_too() {
    let redis = RedisServer::start();
    let url = redis.url();
    let args = [&PATIENT[..], &["--output-cache", "redis", "--redis-url", &url]].concat();
    let with_memory = || start(&golden::folder(MODEL), &args);
    let (mut first, second) = (with_memory(), with_memory());
    assert_eq!(first.computed, second.computed);
    first.assert_all("miss");
    let late = Question::fresh();
    first.ask(&late);
    redis.keys_of("output", NUM_VALUES + 1);
    second.assert_all("hit");
    let num_found = || second.metric("moesaic_cache_hits_total", &[("tier", "redis")]);
    assert_eq!(num_found(), NUM_VALUES as f64);
    second.assert_all("hit");
    assert_eq!(num_found(), NUM_VALUES as f64, "it has them in memory by now");

    let text = streamed_hit(second.server.address, &late, || first.server.process.kill());
    assert_eq!(second.computed[late.number][0]["text"], text);
    second.assert_all("hit");
    let third = with_memory();
    third.assert_all("hit");
    assert_eq!(third.ask(&late), "hit");
    assert_eq!(third.num_errors("redis") + third.num_bad("redis"), 0.0);
}

#[test]
fn only_who_computes_alike_finds_an_answer() {
    let redis = RedisServer::start();
    let url = redis.url();
    let start = |model: &Path, args: &[&str]| {
        let tiers = ["--output-cache", "redis", "--redis-url", &url, "--output-cache-memory", "0"];
        start(model, &[&PATIENT[..], &tiers, args].concat())
    };
    let (own, other) = (Copy::of(MODEL), Copy::of(MODEL));
    let first = start(&own.folder, &[]);
    first.assert_all("miss");
    let stored: Vec<_> = redis.keys_of("output", NUM_VALUES).into_iter().map(|key| (redis.bytes(&key), key)).collect();
    // The same files elsewhere are the same model.
    start(&golden::folder(MODEL), &[]).assert_all("hit");

    other.set_bf16("lm_head.weight", 1000, 0x4000);
    let template = other.path("other.template");
    std::fs::write(&template, "{% for m in messages %}{{ m['content'] }}{% endfor %}").expect("the copy is writable");
    let template = template.to_str().expect("names of temporary folders are UTF-8");
    let mut others: Vec<(&Path, Vec<&str>)> = vec![
        (&own.folder, vec!["--quant", "int8"]),
        (&own.folder, vec!["--chat-template", template]),
        (&own.folder, vec!["--kv-cache-dtype", "bf16"]),
        (&other.folder, vec![]),
    ];
    let isa = first.server.get("/server_info").json()["model"]["isa"].clone();
    if isa != "portable" {
        // Its answers are the same to the byte, as far as tests can tell.
        others.push((&own.folder, vec!["--isa", "portable"]));
    }
    for (idx, (model, args)) in others.iter().enumerate() {
        let replica = start(model, args);
        replica.assert_all("miss");
        redis.keys_of("output", NUM_VALUES * (idx + 2));
        replica.assert_all("hit");
        let is_same = args.first() == Some(&"--isa");
        assert_eq!(replica.computed[CHAT] == first.computed[CHAT], is_same, "{args:?} changes what is computed");
        assert_eq!(replica.num_bad("redis"), 0.0, "{args:?}: values of others are not even looked at");
    }
    for (bytes, key) in &stored {
        assert!(redis.bytes(key) == *bytes, "nobody has overwritten {key}");
    }
    first.assert_all("hit");
}

#[test]
fn redis_killed_or_hanging_amid_requests_fails_and_delays_none() {
    let mut redis = RedisServer::start();
    let (first, second) = (hurried(&redis.url()), hurried(&redis.url()));
    let break_by = |fault: &mut dyn FnMut()| {
        let before = [&first, &second].map(|replica| replica.num_errors("redis"));
        fault();
        poll("open circuits", PATIENCE, || (first.circuit_is_open() && second.circuit_is_open()).then_some(()));
        for (replica, before) in [&first, &second].into_iter().zip(before) {
            assert!(replica.num_errors("redis") > before, "what opened the circuit is counted");
        }
    };
    with_clients([&first, &second], |clients| {
        clients.wait_hits(20);
        break_by(&mut || redis.kill());
        redis.restart();
        clients.wait_hits(20);
        let stopped = Instant::now();
        break_by(&mut || redis.signal("STOP"));
        poll("a long time without Redis", PATIENCE, || (stopped.elapsed() > HANG).then_some(()));
        assert!(first.circuit_is_open() && second.circuit_is_open());
        redis.signal("CONT");
        clients.wait_hits(20);
    });
    for replica in [&first, &second] {
        assert_eq!(replica.num_bad("redis"), 0.0);
        let log = replica.server.process.output();
        assert!(log.matches("Redis fails").count() >= 2 && log.contains("Redis answers again"), "{log}");
    }
    heal(&first, &second);
}

#[test]
fn a_server_starts_without_redis_and_finds_it_later() {
    let mut redis = RedisServer::start();
    redis.kill();
    let (first, second) = (hurried(&redis.url()), hurried(&redis.url()));
    for replica in [&first, &second] {
        // Found at the start: no request has to meet it.
        poll("an open circuit", PATIENCE, || replica.circuit_is_open().then_some(()));
        assert_eq!(replica.metric("moesaic_cache_up", &[("tier", "redis")]), 0.0);
        let before = replica.num_errors("redis");
        replica.assert_all("miss");
        assert_eq!(replica.num_errors("redis"), before, "it is not even tried");
    }
    redis.restart();
    heal(&first, &second);
}

#[test]
fn a_full_redis_refuses_or_forgets_and_serves_on() {
    let redis = RedisServer::start();
    let (first, second) = (in_redis(&redis.url()), in_redis(&redis.url()));
    let set = |name, value| assert_eq!(redis.command(&["CONFIG", "SET", name, value]), Reply::Status("OK".to_owned()));
    first.assert_all("miss");
    redis.keys_of("output", NUM_VALUES);
    // Less than it needs for itself: what it has stays, what comes is refused.
    set("maxmemory-policy", "noeviction");
    set("maxmemory", "1");
    for replica in [&first, &second] {
        replica.assert_all("hit");
        for _ in 0..10 {
            assert_eq!(replica.ask(&Question::fresh()), "miss");
        }
        poll("refused writes", PATIENCE, || (replica.num_errors("redis") == 10.0).then_some(()));
        assert!(!replica.circuit_is_open(), "it answers look-ups");
        replica.assert_all("hit");
    }
    set("maxmemory", "4mb");
    heal(&first, &second);

    set("maxmemory-policy", "allkeys-lru");
    let old = redis.keys();
    let mut num_fillers = 0;
    poll("old values that make room", PATIENCE, || {
        num_fillers += 1;
        let filler = format!("filler{num_fillers}");
        let reply = redis.command(&[b"SET", filler.as_bytes(), &[0; 100_000]]);
        assert_eq!(reply, Reply::Status("OK".to_owned()));
        let left = redis.keys();
        (!old.iter().any(|key| left.contains(key))).then_some(())
    });
    second.assert_all("miss");
    heal(&first, &second);
    // No room for a single value: it forgets all it has, and refuses what comes.
    set("maxmemory", "1");
    for replica in [&first, &second] {
        replica.assert_all("miss");
        assert!(!replica.circuit_is_open());
    }
    set("maxmemory", "0");
    heal(&first, &second);
}

/// Damages the one value that Redis holds, asks for it, and waits until it was written again.
fn damage(redis: &RedisServer, replica: &Replica, what: &str, edit: impl FnOnce(&str, Vec<u8>)) {
    let question = Question::of(0);
    let [key] = &redis.keys_of("output", 1)[..] else { panic!("one value is stored") };
    edit(key, redis.bytes(key));
    assert_eq!(replica.ask(&question), "miss", "{what}");
    // What was bad was removed before the answer was computed.
    redis.keys_of("output", 1);
    assert_eq!(replica.ask(&question), "hit", "{what}");
}

#[test]
fn values_that_are_cut_flipped_moved_or_gone_are_misses() {
    let redis = RedisServer::start();
    let (first, second) = (in_redis(&redis.url()), in_redis(&redis.url()));
    first.ask(&Question::of(0));
    let len = redis.bytes(&redis.keys_of("output", 1)[0]).len();
    let mut num_bad = 0.0;
    let check_bad = |num_bad: &mut f64, reason: &str| {
        *num_bad += 1.0;
        assert_eq!(second.num_bad("redis"), *num_bad);
        assert!(second.metric("moesaic_cache_bad_values_total", &[("reason", reason)]) >= 1.0, "{reason}");
    };
    // As `cache::codec` lays it out: magic, version, time of its end, fingerprint, key, length, checksum, payload.
    let flips = [
        (0, "magic"),
        (4, "version"),
        (10, "checksum"),
        (20, "checksum"),
        (50, "checksum"),
        (80, "truncated"),
        (100, "checksum"),
        (120, "checksum"),
        (len - 1, "checksum"),
    ];
    for (at, reason) in flips {
        damage(&redis, &second, &format!("flipped at {at}"), |key, mut bytes| {
            bytes[at] ^= 1 << (at % 8);
            redis.set(key, &bytes);
        });
        check_bad(&mut num_bad, reason);
    }
    for at in [1, 119, 120, len - 1] {
        damage(&redis, &second, &format!("cut at {at}"), |key, bytes| redis.set(key, &bytes[..at]));
        check_bad(&mut num_bad, "truncated");
    }
    let own = redis.bytes(&redis.keys_of("output", 1)[0]);
    redis.command(&["FLUSHALL"]);
    first.ask(&Question::of(1));
    let another = redis.bytes(&redis.keys_of("output", 1)[0]);
    redis.command(&["FLUSHALL"]);
    first.ask(&Question::of(0));
    damage(&redis, &second, "the value of another question", |key, _| redis.set(key, &another));
    check_bad(&mut num_bad, "key");
    damage(&redis, &second, "nothing", |_, _| drop(redis.command(&["FLUSHALL"])));
    assert_eq!(second.num_bad("redis"), num_bad, "a value that is gone is not a bad one");
    redis.set(&redis.keys_of("output", 1)[0], &own);
    assert_eq!(second.ask(&Question::of(0)), "hit", "a whole value is one, whoever put it there");
    assert_eq!(second.num_errors("redis"), 0.0);
    heal(&first, &second);
}

#[test]
fn keys_of_another_type_are_misses_and_taken_over() {
    let redis = RedisServer::start();
    let (first, second) = (in_redis(&redis.url()), in_redis(&redis.url()));
    first.assert_all("miss");
    let keys = redis.keys_of("output", NUM_VALUES);
    for create in ["RPUSH", "SADD", "PFADD"] {
        for key in &keys {
            assert_eq!(redis.command(&["DEL", key]), Reply::Integer(1));
            assert_eq!(redis.command(&[create, key, "x"]), Reply::Integer(1));
        }
        second.assert_all("miss");
        assert!(!second.circuit_is_open(), "Redis answers all the same");
        poll("values in place of the others", PATIENCE, || {
            let is_value = |key| redis.command(&["TYPE", key]) == Reply::Status("string".to_owned());
            // A HyperLogLog is a string to Redis.
            keys.iter().all(|key| is_value(key) && redis.bytes(key).starts_with(b"MSC1")).then_some(())
        });
        first.assert_all("hit");
    }
    assert_eq!(second.num_errors("redis"), 2.0 * keys.len() as f64);
    assert_eq!(second.num_bad("redis"), keys.len() as f64);
    heal(&first, &second);
}

#[test]
fn connections_that_break_or_talk_nonsense_fail_and_delay_none() {
    let redis = RedisServer::start();
    let proxy = FaultyProxy::start(redis.address());
    let url = format!("redis://{}/", proxy.address());
    let (first, second) = (hurried(&redis.url()), hurried(&url));
    heal(&first, &second);
    let cut_requests = |bytes| Faults { cut_requests_after: Some(bytes), ..Faults::default() };
    let cut_replies = |bytes| Faults { cut_replies_after: Some(bytes), ..Faults::default() };
    let garbage = |after, bytes: &[u8]| Faults { garbage: Some((after, bytes.to_vec())), ..Faults::default() };
    let faults = [
        // Not a byte, within what connecting says, within a look-up, within a value.
        cut_requests(0),
        cut_requests(130),
        cut_requests(250),
        cut_replies(0),
        cut_replies(7),
        cut_replies(200),
        garbage(0, b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        garbage(10, b"$99999999999999\r\nabc"),
        garbage(10, b"+OK\r\n+OK\r\n+OK\r\n+OK\r\n"),
    ];
    for fault in faults {
        let before = second.num_errors("redis") + second.num_bad("redis");
        proxy.set(fault.clone());
        // Some connections last for a question or two.
        poll("a fault that is counted", PATIENCE, || {
            for question in Question::all() {
                second.ask(&question);
            }
            (second.num_errors("redis") + second.num_bad("redis") > before).then_some(())
        });
        assert_eq!(second.server.get("/ready").status, 200);
        proxy.set(Faults::default());
        poll("a hit again", PATIENCE, || (second.ask(&Question::of(0)) == "hit").then_some(()));
    }
    heal(&first, &second);
    heal(&second, &first);
}

/// The files of values under `directory`, once there are `count`.
fn value_files(directory: &Path, count: usize) -> Vec<PathBuf> {
    poll("values on disk", PATIENCE, || {
        let folders = std::fs::read_dir(directory.join("output")).ok()?;
        let files = folders.flat_map(|folder| std::fs::read_dir(folder.expect("it can be listed").path()));
        let paths = files.flatten().map(|file| file.expect("it can be listed").path());
        // One that is being written has another name.
        let paths: Vec<_> = paths.filter(|path| path.extension().is_none()).collect();
        (paths.len() == count).then_some(paths)
    })
}

#[test]
fn answers_on_disk_outlive_the_server() {
    let folder = Folder::new("warm");
    let mut first = on_disk(&folder);
    first.assert_all("miss");
    value_files(&folder, NUM_VALUES);
    first.server.process.kill();
    let second = on_disk(&folder);
    second.assert_all("hit");
    assert_eq!(second.metric("moesaic_cache_hits_total", &[("tier", "disk")]), NUM_VALUES as f64);
}

#[test]
fn a_folder_that_is_damaged_or_gone_costs_hits_alone() {
    let folder = Folder::new("damaged");
    let replica = on_disk(&folder);
    let question = Question::of(0);
    let heals = || {
        let mut files = value_files(&folder, 1);
        assert_eq!(replica.ask(&question), "hit");
        files.pop().expect("there is one")
    };
    assert_eq!(replica.ask(&question), "miss");
    let file = heals();
    for (num_bad, at) in [3, 30, 90, 130].into_iter().enumerate() {
        let mut bytes = std::fs::read(&file).expect("the value is there");
        bytes[at] ^= 4;
        std::fs::write(&file, bytes).expect("the folder is writable");
        assert_eq!(replica.ask(&question), "miss", "flipped at {at}");
        assert_eq!(replica.num_bad("disk"), num_bad as f64 + 1.0);
        heals();
    }
    std::fs::remove_dir_all(&folder).expect("the folder is there");
    assert_eq!(replica.ask(&question), "miss");
    heals();
    assert_eq!(replica.num_errors("disk"), 0.0, "it was made again");
    std::fs::remove_dir_all(&folder).expect("the folder is there");
    std::fs::write(&folder, "no folder").expect("temporary files can be written");
    for _ in 0..3 {
        assert_eq!(replica.ask(&question), "miss");
    }
    poll("three looks and three writes that failed", PATIENCE, || (replica.num_errors("disk") == 6.0).then_some(()));
    assert_eq!(replica.server.get("/ready").status, 200);
    std::fs::remove_file(&folder).expect("it is there");
    assert_eq!(replica.ask(&question), "miss");
    heals();
}

#[test]
fn a_request_with_many_prompts_waits_once() {
    /// A wait for each prompt would be four of them.
    const LONG: Duration = Duration::from_millis(800);
    let redis = RedisServer::start();
    let millis = LONG.as_millis().to_string();
    let args = ["--output-cache", "redis", "--redis-url", &redis.url(), "--cache-timeout-ms", &millis];
    let replica = forgetful(&args);
    replica.ask(&Question::of(0));
    let body = json!({"prompt": ["one", "two", "three", "four"], "max_tokens": 2, "temperature": 0, "logprobs": 1});
    let ask = |fields: serde_json::Value| {
        replica.server.ask("/v1/completions", &with(body.clone(), fields))["choices"].clone()
    };
    let computed = ask(json!({"cache": {"read": false, "write": false}}));
    redis.signal("STOP");
    let start = Instant::now();
    assert_eq!(ask(json!({})), computed);
    assert!(start.elapsed() < LONG + SLACK, "{:?}", start.elapsed());
    redis.signal("CONT");
}

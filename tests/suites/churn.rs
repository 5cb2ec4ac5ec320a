//! 256 clients at once that connect and vanish at random, in five waves: nothing is left behind.

use std::io::Write as _;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use harness::{EventStream, Exchange, PATIENCE, Request, Server, poll};
use serde_json::{Value, json};

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");
const NUM_CLIENTS: u64 = 256;
const NUM_WAVES: u64 = 5;
/// Visits of a client in one wave: the first wave must be long enough for the allocator to reach its working size.
const NUM_VISITS: u64 = 4;
/// Longest time for all waves.
const BUDGET: Duration = Duration::from_secs(60);

/// SplitMix64 (Steele, Lea, Flood 2014): the same churn in every run.
struct Random(u64);

impl Random {
    /// A number below `limit`.
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (bits ^ (bits >> 31)) % limit
    }
}

fn body(random: &mut Random) -> Value {
    let prompt: Vec<u64> = (0..=random.below(40)).map(|_| 60 + random.below(300)).collect();
    json!({
        "prompt": prompt,
        "max_tokens": 1 + random.below(60),
        "ignore_eos": true,
        "n": 1 + random.below(3),
        "seed": random.below(1000),
    })
}

/// One client: how far it goes before it vanishes is drawn.
fn visit(server: &Server, random: &mut Random) -> std::io::Result<()> {
    let mut body = body(random);
    match random.below(6) {
        // Says nothing, or half a request.
        0 => drop(TcpStream::connect(server.address)?),
        1 => {
            let bytes = Request::post("/v1/completions", &body).to_bytes();
            let length = usize::try_from(random.below(bytes.len() as u64)).expect("a request is short");
            TcpStream::connect(server.address)?.write_all(&bytes[..length])?;
        }
        // Does not wait for the answer.
        2 => drop(Request::post("/v1/completions", &body).write(server.address)?),
        // Stays to the end.
        3 => {
            let status = Exchange::open(server.address, &Request::post("/v1/completions", &body))?.finish()?.status;
            assert!([200, 429].contains(&status), "status {status}");
        }
        // Leaves within a stream, or just before its end.
        _ => {
            body["stream"] = json!(true);
            let mut stream = EventStream::open(server.address, &Request::post("/v1/completions", &body))?;
            for _ in 0..random.below(80) {
                if stream.next_event()?.is_none() {
                    break;
                }
            }
        }
    }
    Ok(())
}

fn wave(server: &Server, number: u64) {
    std::thread::scope(|scope| {
        for client in 0..NUM_CLIENTS {
            scope.spawn(move || {
                // Each wave holds the same clients, so that only leaks make memory grow.
                let mut random = Random(client);
                for _ in 0..NUM_VISITS {
                    let visited = visit(server, &mut random);
                    visited.unwrap_or_else(|error| panic!("wave {number}, client {client}: {error}"));
                }
            });
        }
    });
}

#[test]
fn clients_that_vanish_leave_nothing_behind() {
    let start = Instant::now();
    // Fewer places than clients: the most memory that is ever needed is needed in the first wave already.
    let args = ["--max-num-seqs", "32", "--max-connections", "64", "--kv-cache-memory", "4MiB"];
    let server = Server::start(SERVER, "mixtral-base", &args);
    server.wait_idle();
    let files_before = server.process.num_open_files();
    let threads_before = server.process.num_threads();
    let mut resident = Vec::new();
    for number in 1..=NUM_WAVES {
        wave(&server, number);
        server.wait_idle();
        poll("connections that are closed", PATIENCE, || {
            (server.process.num_open_files() <= files_before).then_some(())
        });
        resident.push(server.process.resident_bytes());
    }
    let [_, second, .., fifth] = resident[..] else { unreachable!("there are five waves") };
    eprintln!("resident bytes after each wave: {resident:?}, {:?} in all", start.elapsed());
    assert!(fifth as f64 <= second as f64 * 1.05, "memory grows: {resident:?}");
    // Threads of the blocking pool live on for a while; there is at most one per core.
    let threads = server.process.num_threads();
    assert!(threads <= threads_before + available_cores(), "{threads_before} threads became {threads}");
    assert!(start.elapsed() < BUDGET, "the waves took {:?}", start.elapsed());

    // Every place in the batch and in the queue is free again.
    let many = json!({"prompt": [70], "max_tokens": 2, "ignore_eos": true, "n": 128});
    assert_eq!(server.ask("/v1/completions", &many)["choices"].as_array().map(Vec::len), Some(128));
    server.wait_idle();
}

fn available_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

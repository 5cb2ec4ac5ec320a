//! A server with an output cache: every answer is checked, wherever it comes from.

use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{PATIENCE, Request, Server, poll};

/// The golden checkpoint that the questions are for.
pub const MODEL: &str = "mixtral-base";
const ADMIN: &str = "root";

/// Time that caches may take of a request; the default of `--cache-timeout-ms`.
pub const BUDGET: Duration = Duration::from_millis(50);

/// What computing the answer and a busy machine with two cores may add to it. Less than what a client of Redis waits by itself: one
/// second for a connection, two for an answer.
pub const SLACK: Duration = Duration::from_millis(750);

/// The budget where Redis answers, and the test is about what: a busy machine must not make a miss of a hit.
pub const PATIENT: [&str; 2] = ["--cache-timeout-ms", "10000"];

/// A request; each of its choices is a value of its own.
#[derive(Clone, Debug)]
pub struct Question {
    pub number: usize,
    /// Tells values of equal answers apart.
    pub salt: String,
}

const NUM_QUESTIONS: usize = 4;
/// The question for chat, where the template counts.
pub const CHAT: usize = 3;
/// Choices of all questions: one of them has two.
pub const NUM_VALUES: usize = 5;

impl Question {
    /// Question `number` with the salt that all share.
    pub fn of(number: usize) -> Self {
        Self { number, salt: "first".to_owned() }
    }

    /// One that nobody has asked yet.
    pub fn fresh() -> Self {
        static NUM_FRESH: AtomicU32 = AtomicU32::new(0);
        let number = NUM_FRESH.fetch_add(1, Ordering::Relaxed);
        Self { number: 0, salt: format!("fresh {number}") }
    }

    pub fn all() -> impl Iterator<Item = Self> {
        (0..NUM_QUESTIONS).map(Self::of)
    }

    pub fn path(&self) -> &'static str {
        if self.number == CHAT { "/v1/chat/completions" } else { "/v1/completions" }
    }

    /// The request, with other bytes each time.
    pub fn body(&self) -> Value {
        // Two with the same bytes are answered without a look for the values.
        static NUM_ASKED: AtomicU32 = AtomicU32::new(0);
        let mut body = match self.number {
            0 => json!({"prompt": [5, 9, 40, 77, 123], "temperature": 0, "logprobs": 3}),
            1 => json!({"prompt": "the river and the boat", "temperature": 1, "seed": 7, "logprobs": 2}),
            2 => json!({"prompt": [31, 8, 200], "temperature": 0.8, "seed": 11, "n": 2, "logprobs": 1}),
            _ => json!({"messages": [{"role": "user", "content": "who is there"}], "temperature": 0, "logprobs": true,
                "top_logprobs": 2}),
        };
        body["max_tokens"] = json!(8);
        body["ignore_eos"] = json!(true);
        body["cache_salt"] = json!(self.salt);
        body["user"] = json!(NUM_ASKED.fetch_add(1, Ordering::Relaxed).to_string());
        body
    }
}

/// A server whose every answer is checked.
pub struct Replica {
    pub server: Server,
    /// The choices that it computes, by question.
    pub computed: Vec<Value>,
}

impl Replica {
    /// Starts a server on the checkpoint `model`, with `args` that give it a slow tier, and returns once it uses that.
    ///
    /// # Panics
    /// It does not start, or does not answer.
    pub fn start(binary: &str, model: &Path, args: &[&str]) -> Self {
        // Its questions count values, so that nothing else may be in the tiers.
        let own = ["--admin-key", ADMIN, "--routing-cache-memory", "0", "--kv-tier", "off"];
        let server = Server::start_folder(binary, model, &[args, &own].concat());
        let request = Request::get("/v1/cache").header("Authorization", &format!("Bearer {ADMIN}"));
        poll("a server that uses all tiers", PATIENCE, || {
            let stats = server.send(&request).json();
            (stats["tiers"].as_array().expect("a list of tiers").len() > 1).then_some(())
        });
        let compute = |question: Question| {
            let mut body = question.body();
            body["cache"] = json!({"read": false, "write": false});
            server.ask(question.path(), &body)["choices"].clone()
        };
        let computed = Question::all().map(compute).collect();
        Self { server, computed }
    }

    /// Where the answer comes from: `hit`, `shared` or `miss`.
    ///
    /// # Panics
    /// It is not the one that this server computes, or did not come in time.
    pub fn ask(&self, question: &Question) -> String {
        let start = Instant::now();
        let answer = self.server.post(question.path(), &question.body());
        let took = start.elapsed();
        assert_eq!(answer.status, 200, "{}", answer.text());
        let origin = answer.header("x-moesaic-cache").expect("it tells where the answer comes from").to_owned();
        let json = answer.json();
        assert_eq!(json["choices"], self.computed[question.number], "{question:?}, a {origin}");
        assert_eq!(json["usage"]["cached"] == true, origin != "miss", "{json}");
        assert!(took < BUDGET + SLACK, "{question:?}, a {origin}, took {took:?}");
        origin
    }

    /// Asks all questions that share a salt.
    ///
    /// # Panics
    /// An answer comes from elsewhere.
    pub fn assert_all(&self, origin: &str) {
        for question in Question::all() {
            assert_eq!(self.ask(&question), origin, "{question:?}");
        }
    }

    /// The sum of the samples of `name` with these labels; 0 where there are none yet.
    pub fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.server.metrics().value(name, labels).unwrap_or(0.0)
    }

    /// Calls to `tier` that failed.
    pub fn num_errors(&self, tier: &str) -> f64 {
        self.metric("moesaic_cache_errors_total", &[("tier", tier)])
    }

    /// Values of `tier` that could not be used.
    pub fn num_bad(&self, tier: &str) -> f64 {
        self.metric("moesaic_cache_bad_values_total", &[("tier", tier)])
    }

    /// Whether it leaves a tier alone.
    ///
    /// # Panics
    /// It is not ready.
    pub fn circuit_is_open(&self) -> bool {
        assert_eq!(self.server.get("/ready").status, 200, "it is ready without its slow tiers");
        self.metric("moesaic_cache_circuit_open", &[]) == 1.0
    }
}

/// Asks until what `first` computes `second` replays.
///
/// # Panics
/// That does not come to be, or a circuit is still open.
pub fn heal(first: &Replica, second: &Replica) {
    poll("a replica that replays what the other computed", PATIENCE, || {
        let question = Question::fresh();
        assert_eq!(first.ask(&question), "miss");
        (second.ask(&question) == "hit").then_some(())
    });
    for replica in [first, second] {
        assert!(!replica.circuit_is_open());
    }
}

//! The harness of the integration suites: a real server process, and a client that sees the bytes on the wire.
//!
//! | room | what is in it |
//! |---|---|
//! | `process` | a child process with captured output, killed when dropped |
//! | `server` | a server on a free port over a golden checkpoint |
//! | `http` | requests and responses over a plain socket |
//! | `sse` | server-sent events, byte for byte |
//! | `golden` | the golden checkpoints and what they must compute |
//! | `metrics` | samples of `/metrics` |
//! | `folder` | a folder that goes with its test |
//! | `checkpoint` | broken copies of checkpoints |
//! | `replica` | a server with an output cache, whose every answer is checked |
//! | `redis` | a real redis-server, or a cluster of them |
//! | `faulty_proxy` | connections that break at a given byte |
#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod faulty_proxy;
pub mod folder;
pub mod golden;
pub mod http;
pub mod metrics;
pub mod process;
pub mod redis;
pub mod replica;
pub mod server;
pub mod sse;

use std::time::{Duration, Instant};

use serde_json::Value;

pub use folder::Folder;
pub use http::{Exchange, Request, Response};
pub use server::Server;
pub use sse::{Event, EventStream};

/// Longest time that anything here may take before a test fails.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Time between two looks at something that is expected to change.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// `body` with these fields, too, or instead of those of their names.
///
/// # Panics
/// One of them is no object.
pub fn with(mut body: Value, fields: Value) -> Value {
    let Value::Object(fields) = fields else { panic!("fields are an object: {fields}") };
    body.as_object_mut().expect("a body is an object").extend(fields);
    body
}

/// Looks until `probe` yields a value.
///
/// # Panics
/// It yields none within `within`.
pub fn poll<T>(what: &str, within: Duration, mut probe: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(start.elapsed() < within, "{what}: not within {within:?}");
        std::thread::sleep(POLL_INTERVAL);
    }
}

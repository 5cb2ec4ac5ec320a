//! A server on a free port over a golden checkpoint, and simple calls to it.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, ExitStatus};

use serde_json::Value;

use crate::Folder;
use crate::golden;
use crate::http::{Exchange, Request, Response};
use crate::metrics::Metrics;
use crate::process::Process;
use crate::sse::EventStream;
use crate::{PATIENCE, poll};

/// Options that keep a test server small (one compute thread, a KV pool of a few hundred blocks), and make it compute: an answer from
/// the output cache would prove nothing about the engine.
const SMALL: [&str; 10] =
    ["--port", "0", "--threads", "1", "--kv-cache-dtype", "f32", "--kv-cache-memory", "32MiB", "--output-cache", "off"];

/// A running server, killed when dropped.
pub struct Server {
    pub process: Process,
    pub address: SocketAddr,
}

impl Server {
    /// Starts `binary` on the golden checkpoint `model` and waits until it is ready. `args` win over the harness's own.
    ///
    /// # Panics
    /// The server ends, or is not ready in time.
    pub fn start(binary: &str, model: &str, args: &[&str]) -> Self {
        Self::start_folder(binary, &golden::folder(model), args)
    }

    /// The same for any checkpoint.
    ///
    /// # Panics
    /// The server ends, or is not ready in time.
    pub fn start_folder(binary: &str, folder: &Path, args: &[&str]) -> Self {
        Self::start_command(&mut command(binary, folder, args))
    }

    /// The same for a command made by [`command`], with what the test changed about it.
    ///
    /// # Panics
    /// The server ends, or is not ready in time.
    pub fn start_command(command: &mut Command) -> Self {
        let process = Process::spawn(command);
        let address = poll("a server that prints its address", PATIENCE, || {
            assert!(!process.has_ended(), "the server ended before it printed its address");
            printed_address(&process.output())
        });
        let server = Self { process, address };
        poll("a server that is ready", PATIENCE, || {
            assert!(!server.process.has_ended(), "the server ended before it was ready");
            (server.get("/ready").status == 200).then_some(())
        });
        server
    }

    /// Starts a server that is expected to give up, and waits for its end.
    pub fn fail(binary: &str, folder: &Path, args: &[&str]) -> (ExitStatus, String) {
        let mut process = Process::spawn(&mut command(binary, folder, args));
        let status = process.wait(PATIENCE);
        (status, process.output())
    }

    /// The same for a command made by [`command`], with at most `max_bytes` of address space: what asks for more gets none.
    pub fn fail_within(command: &mut Command, max_bytes: u64) -> (ExitStatus, String) {
        // The shell's own `ulimit`: setting a limit from here would need unsafe code.
        let mut limited = Command::new("sh");
        limited.args(["-c", "ulimit -v \"$0\" && exec \"$@\"", &(max_bytes / 1024).to_string()]);
        limited.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => limited.env(name, value),
                None => limited.env_remove(name),
            };
        }
        let mut process = Process::spawn(&mut limited);
        let status = process.wait(PATIENCE);
        (status, process.output())
    }

    /// Sends a request and reads the whole answer.
    ///
    /// # Panics
    /// The connection breaks.
    pub fn send(&self, request: &Request) -> Response {
        Exchange::open(self.address, request).and_then(Exchange::finish).expect("the server answers")
    }

    pub fn get(&self, path: &str) -> Response {
        self.send(&Request::get(path))
    }

    pub fn post(&self, path: &str, body: &Value) -> Response {
        self.send(&Request::post(path, body))
    }

    /// Posts and expects success.
    ///
    /// # Panics
    /// The answer is an error.
    pub fn ask(&self, path: &str, body: &Value) -> Value {
        let response = self.post(path, body);
        assert_eq!(response.status, 200, "{body}\n{}", response.text());
        response.json()
    }

    /// Posts with `stream` set and expects a stream of events.
    ///
    /// # Panics
    /// The answer is an error.
    pub fn stream(&self, path: &str, body: &Value) -> EventStream {
        let mut body = body.clone();
        body["stream"] = Value::from(true);
        EventStream::open(self.address, &Request::post(path, &body)).expect("the server answers")
    }

    pub fn metrics(&self) -> Metrics {
        Metrics::new(self.get("/metrics").text())
    }

    /// Waits until no sequence runs or waits and no KV block is in use.
    ///
    /// # Panics
    /// That is not so in time.
    pub fn wait_idle(&self) {
        poll("a server without work and without used blocks", PATIENCE, || self.metrics().is_idle().then_some(()));
    }

    /// Waits until exactly `count` sequences run.
    ///
    /// # Panics
    /// That is not so in time.
    pub fn wait_running(&self, count: f64) {
        poll("a number of running sequences", PATIENCE, || {
            (self.metrics().value("vllm:num_requests_running", &[]) == Some(count)).then_some(())
        });
    }
}

/// The command that serves `model`, a folder or a hub id, with the harness's options where `args` do not set them.
pub fn command(binary: &str, model: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(binary);
    command.arg("serve").arg(model);
    // A flag may be given only once.
    for default in SMALL.chunks(2) {
        if !args.contains(&default[0]) {
            command.args(default);
        }
    }
    command.args(args);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("MOESAIC_") {
            command.env_remove(name);
        }
    }
    command
}

/// A program in `folder` that starts `binary`, to which a file that may not grow is an error and not a signal that ends it.
pub fn on_full_disks(binary: &str, folder: &Folder) -> String {
    folder.script(&format!("trap '' XFSZ\nexec {binary} \"$@\""))
}

fn printed_address(output: &str) -> Option<SocketAddr> {
    let (_, rest) = output.split_once("on http://")?;
    // Only a whole line holds a whole port.
    let (address, _) = rest.split_once('\n')?;
    address.trim().parse().ok()
}

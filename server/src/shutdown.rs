//! From a signal to exit code 0: no new requests, time for the running ones, an error event for the rest.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::app::App;

/// After the engine has failed the remaining requests, time for their error events to reach the clients.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Time for the last answers to reach the disk and Redis.
const LAST_WRITES: Duration = Duration::from_secs(2);

/// The exit code of a process that ends at a second signal: 128 + SIGINT.
const IMPATIENT: i32 = 130;

/// Where the shutdown stands.
#[derive(Debug, Default)]
pub struct Shutdown {
    draining: AtomicBool,
    /// Cancelled when connections are to be closed after what they are writing.
    pub close_connections: CancellationToken,
}

impl Shutdown {
    /// True from the signal on: `/ready` is false and new requests get 503.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    fn drain(&self) {
        self.draining.store(true, Ordering::Release);
    }
}

/// Waits for SIGTERM or SIGINT, then ends the server in order. A second signal ends the process at once.
///
/// # Errors
/// The signal handlers cannot be installed.
pub async fn run(app: &App) -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::warn!("second signal: ending at once");
        std::process::exit(IMPATIENT);
    });
    drain(app).await;
    Ok(())
}

/// Waits a moment for clients to take the last events of their requests.
pub async fn flush(app: &App) {
    if tokio::time::timeout(LAST_WORDS, app.limits.idle()).await.is_err() {
        tracing::warn!(num_requests = app.limits.num_in_flight(), "clients did not take their last bytes");
    }
}

/// Refuses new requests, lets the running ones finish within the shutdown timeout, then fails the rest.
async fn drain(app: &App) {
    let grace = app.config.shutdown_timeout.duration();
    tracing::info!(num_requests = app.limits.num_in_flight(), seconds = grace.as_secs_f64(), "shutting down");
    app.shutdown.drain();
    let engine = app.loaded().map(|model| model.engine.clone());
    if let Some(engine) = &engine {
        engine.stop_accepting();
    }
    if tokio::time::timeout(grace, app.limits.idle()).await.is_err() {
        tracing::warn!(num_requests = app.limits.num_in_flight(), "time is up: failing the remaining requests");
    }
    if let Some(engine) = engine {
        // It waits for the step in progress.
        let stopped = tokio::task::spawn_blocking(move || engine.shutdown());
        if tokio::time::timeout(LAST_WORDS, stopped).await.is_err() {
            tracing::warn!("the step loop is still busy");
        }
    }
    flush(app).await;
    if let Some(model) = app.loaded() {
        model.settle(tokio::time::Instant::now() + LAST_WRITES).await;
    }
    app.shutdown.close_connections.cancel();
}

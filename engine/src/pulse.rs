//! Signs of life of the thread that computes: a step that takes long is not a step that hangs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// When something was last done, for others to look at.
#[derive(Debug)]
pub struct Pulse {
    started: Instant,
    /// Milliseconds from `started`.
    last: AtomicU64,
}

impl Default for Pulse {
    fn default() -> Self {
        Self { started: Instant::now(), last: AtomicU64::new(0) }
    }
}

impl Pulse {
    /// Something was done.
    pub fn beat(&self) {
        self.last.store(self.started.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Time since then.
    pub fn silence(&self) -> Duration {
        self.started.elapsed().saturating_sub(Duration::from_millis(self.last.load(Ordering::Relaxed)))
    }
}

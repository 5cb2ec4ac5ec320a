//! The folder as a place that may fail: blocking work on its files from async tasks, so many calls at once.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt as _};
use tokio::sync::Semaphore;

use super::MAX_CALLS;
use super::files::Files;
use super::health::{Health, is_full};
use crate::circuit::{NO_ANSWER, Place, Verdict};
use crate::store::Tier;

/// Time that a probe may take.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

pub(super) struct Folder {
    files: Arc<Files>,
    /// What hangs in the file system keeps its permit until it returns.
    calls: Arc<Semaphore>,
    health: Health,
}

impl Folder {
    pub fn new(files: Files) -> Self {
        Self { files: Arc::new(files), calls: Arc::new(Semaphore::new(MAX_CALLS)), health: Health::default() }
    }

    pub fn files(&self) -> &Arc<Files> {
        &self.files
    }

    pub fn health(&self) -> &Health {
        &self.health
    }

    /// Writes, reads and removes a file, as calls do, and notes what came of it.
    pub async fn try_out(&self) -> io::Result<()> {
        let tried = self.run(Files::try_out).await;
        self.health.note(&tried);
        tried
    }

    /// Runs blocking work. Whoever stops waiting does not stop the work.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Files) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let permit = Arc::clone(&self.calls).acquire_owned().await.expect("the semaphore is never closed");
        let files = Arc::clone(&self.files);
        let task = tokio::task::spawn_blocking(move || {
            let result = work(&files);
            drop(permit);
            result
        });
        task.await.unwrap_or_else(|panic| Err(io::Error::other(panic)))
    }
}

impl fmt::Display for Folder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the cache directory")
    }
}

/// Shared with whoever watches it.
impl Place for Arc<Folder> {
    type Error = io::Error;

    const TIER: Tier = Tier::Disk;

    /// An error that comes at once costs a request nothing, and one call can fail where another does not: a full disk is still
    /// read. What is sick is what does not answer. Whether the whole folder is of no use is found by trying it out.
    fn judge(error: &io::Error) -> Verdict {
        if is_full(error) { Verdict::Refuses } else { Verdict::Healthy }
    }

    /// Takes a thread of its own while there is one: once all hang, it is their return that it waits for.
    fn answers(&self) -> BoxFuture<'_, Result<(), String>> {
        let probe = async {
            // An error is an answer, too.
            if let Err(error) = self.try_out().await {
                self.suspect(&error);
            }
        };
        tokio::time::timeout(PROBE_TIMEOUT, probe).map(|done| done.map_err(|_| NO_ANSWER.to_owned())).boxed()
    }
}

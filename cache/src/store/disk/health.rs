//! Whether the folder of the cache can be used at all, found by trying it out: at the start, and when a call fails.

use std::io::{self, ErrorKind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::folder::Folder;
use crate::telemetry::Notice;

/// Time between two tries.
const TRY_INTERVAL: Duration = Duration::from_secs(1);

/// What the last try found. A folder that cannot be written is read all the same.
#[derive(Debug, Default)]
pub(super) struct Health {
    is_unusable: AtomicBool,
    /// Somebody tries it out until it can be used.
    is_watched: AtomicBool,
    odd_files: Notice,
}

impl Health {
    pub fn is_unusable(&self) -> bool {
        self.is_unusable.load(Ordering::Relaxed)
    }

    /// Takes in how a try went; a change is a line in the log. A full disk can be used: what it has is read.
    pub fn note(&self, tried: &io::Result<()>) {
        let error = tried.as_ref().err().filter(|error| !is_full(error));
        let was_unusable = self.is_unusable.swap(error.is_some(), Ordering::Relaxed);
        match error {
            Some(error) if !was_unusable => {
                let reason = explain(error);
                tracing::warn!(%reason, "the cache directory cannot be used: the cache goes on without what fails there");
            }
            None if was_unusable => tracing::info!("the cache directory can be used again"),
            _ => {}
        }
    }

    /// Takes the right to watch, if nobody has it.
    fn start_watch(&self) -> bool {
        !self.is_watched.swap(true, Ordering::Relaxed)
    }
}

impl Folder {
    /// A call failed, or a try: tries it out until it can be used. At most once per [`TRY_INTERVAL`], however many calls fail.
    pub fn suspect(self: &Arc<Self>, error: &io::Error) {
        // A call that ran out of time while it was at work says nothing about the folder.
        let is_late = error.kind() == ErrorKind::TimedOut;
        if !is_late && !is_full(error) && self.health().start_watch() {
            tokio::spawn(watch(Arc::downgrade(self), explain(error)));
        }
    }
}

/// Ends with the folder, or once it can be used.
async fn watch(folder: Weak<Folder>, reason: String) {
    loop {
        let Some(folder) = folder.upgrade() else { return };
        // What it found is noted.
        drop(folder.try_out().await);
        let is_unusable = folder.health().is_unusable();
        if !is_unusable && folder.health().odd_files.is_due() {
            tracing::warn!(%reason, "something in the cache directory cannot be used; requests go on without it");
        }
        drop(folder);
        tokio::time::sleep(TRY_INTERVAL).await;
        if !is_unusable {
            break;
        }
    }
    if let Some(folder) = folder.upgrade() {
        folder.health().is_watched.store(false, Ordering::Relaxed);
    }
}

/// There is no room for more.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge)
}

/// An error, and what to do about it.
pub(super) fn explain(error: &io::Error) -> String {
    let hint = match error.kind() {
        ErrorKind::AlreadyExists | ErrorKind::NotADirectory => {
            return "it, or a part of its path, is a file and a folder is needed; hint: name a folder, which is made \
                    where there is none"
                .to_owned();
        }
        ErrorKind::PermissionDenied => "the user that runs the server must be allowed to read, write and list it",
        ErrorKind::ReadOnlyFilesystem => "it is on a file system that is read-only: name a folder on another",
        _ => return error.to_string(),
    };
    format!("{error}; hint: {hint}")
}

//! Why a model could not be found or downloaded.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Every variant says what to do about it where anything can be done.
#[derive(Debug, Error)]
pub enum HubError {
    #[error(
        "`{model}` is neither a folder, a GGUF file nor a hub id of the form `org/name`; hint: check the path, it is relative to \
         the current folder"
    )]
    NotAModel { model: String },
    #[error("{path} is a file, expected a model folder or a .gguf file", path = path.display())]
    NotAFolder { path: PathBuf },
    #[error("`{revision}` is not a branch, tag or commit")]
    InvalidRevision { revision: String },
    #[error("no cache folder: neither HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME nor HOME is set")]
    NoCacheFolder,
    #[error(
        "{repo} at revision {revision} is not in the cache {cache} and HF_HUB_OFFLINE is set; hint: unset it, or pass \
         the path of a local model folder",
        cache = cache.display()
    )]
    Offline { repo: String, revision: String, cache: PathBuf },
    #[error(
        "{repo} at revision {revision} is only partly in the cache: {missing} is missing from {snapshot}, and \
         HF_HUB_OFFLINE is set",
        snapshot = snapshot.display()
    )]
    OfflineIncomplete { repo: String, revision: String, missing: String, snapshot: PathBuf },
    #[error("{endpoint} refuses {repo} (HTTP {status}); hint: {hint}")]
    Denied { endpoint: String, repo: String, status: u16, hint: &'static str },
    #[error("{endpoint} has no {what}; hint: check the spelling; a private model also needs a token in HF_TOKEN")]
    NotFound { endpoint: String, what: String },
    #[error(
        "{repo} has no {what}, so it cannot be served; hint: only models in safetensors format can; of GGUF files, download one and give its path"
    )]
    NotServable { repo: String, what: &'static str },
    #[error("{url} answered HTTP {status}")]
    Status { url: String, status: u16 },
    #[error("cannot reach {url}: {reason}; hint: check the network, or pass the path of a local model folder")]
    Transport { url: String, reason: String },
    #[error("{url} answered what a hub does not: {reason}")]
    BadAnswer { url: String, reason: String },
    #[error("{file} has {found} bytes, expected {expected}")]
    WrongSize { file: String, expected: u64, found: u64 },
    #[error("{file} has sha256 {found}, expected {expected}")]
    Checksum { file: String, expected: String, found: String },
    #[error("no space is left on the disk of {path}; what was downloaded is kept and continued next time", path = path.display())]
    DiskFull { path: PathBuf },
    #[error("another process holds {path} for too long; hint: end it, or delete that file", path = path.display())]
    Locked { path: PathBuf },
    #[error("{path}: {source}", path = path.display())]
    Io { path: PathBuf, source: io::Error },
}

impl HubError {
    /// Names the file of an I/O error.
    pub(super) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { path: path.into() },
            io::ErrorKind::TimedOut => Self::Locked { path: path.into() },
            _ => Self::Io { path: path.into(), source },
        }
    }

    /// Whether trying again may help.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Transport { .. } | Self::WrongSize { .. } | Self::Checksum { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 416 | 429 | 500..=599),
            _ => false,
        }
    }
}

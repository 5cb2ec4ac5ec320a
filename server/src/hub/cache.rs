//! The Hugging Face cache layout of one repository, shared with the Python tools.
//!
//! ```text
//! models--org--name/blobs/<etag>                       contents
//!                   snapshots/<commit>/<file>          relative links to blobs
//!                   refs/<branch or tag>               commit, as text
//! .locks/models--org--name/<etag>.lock
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::error::HubError;
use super::selection;

/// Where one repository lies in the cache.
#[derive(Clone, Debug)]
pub(super) struct RepoCache {
    folder: PathBuf,
    locks: PathBuf,
}

impl RepoCache {
    pub(super) fn new(cache_dir: &Path, repo: &str) -> Self {
        let name = format!("models--{}", repo.replace('/', "--"));
        Self { folder: cache_dir.join(&name), locks: cache_dir.join(".locks").join(&name) }
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    pub(super) fn incomplete_blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{etag}.incomplete"))
    }

    pub(super) fn lock(&self, etag: &str) -> PathBuf {
        self.locks.join(format!("{etag}.lock"))
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// The commit that `revision` named when it was last looked up; a commit names itself.
    pub(super) fn commit_of(&self, revision: &str) -> Result<Option<String>, HubError> {
        if is_commit(revision) {
            return Ok(Some(revision.to_owned()));
        }
        let path = self.folder.join("refs").join(revision);
        match fs::read_to_string(&path) {
            Ok(commit) if is_plain_name(commit.trim()) => Ok(Some(commit.trim().to_owned())),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(HubError::io(&path)(error)),
        }
    }

    /// Notes which commit `revision` names.
    pub(super) fn set_commit_of(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if revision == commit {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        create_parent(&path)?;
        fs::write(&path, commit).map_err(HubError::io(&path))
    }

    /// Links `file` of the snapshot to its blob.
    pub(super) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<(), HubError> {
        let path = self.snapshot(commit).join(file);
        create_parent(&path)?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(HubError::io(&path)(error)),
            _ => {}
        }
        let target = Path::new("../../blobs").join(etag);
        match std::os::unix::fs::symlink(target, &path) {
            // Another process made the same link.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other.map_err(HubError::io(&path)),
        }
    }

    /// The first file that serving `commit` needs and the cache lacks; `None` if it is complete.
    pub(super) fn missing_file(&self, commit: &str) -> Result<Option<String>, HubError> {
        let snapshot = self.snapshot(commit);
        let is_there = |file: &str| snapshot.join(file).is_file();
        if !is_there(selection::CONFIG_FILE) {
            return Ok(Some(selection::CONFIG_FILE.to_owned()));
        }
        if is_there(selection::INDEX_FILE) {
            let shards = selection::indexed_shards(&snapshot.join(selection::INDEX_FILE))?;
            return Ok(shards.into_iter().find(|shard| !is_there(shard)));
        }
        Ok((!is_there(selection::SINGLE_WEIGHTS_FILE)).then(|| selection::SINGLE_WEIGHTS_FILE.to_owned()))
    }
}

/// A full commit hash.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Whether a name that came from outside may become one component of a path.
pub(super) fn is_plain_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    (1..=255).contains(&name.len()) && !name.starts_with('.') && name.bytes().all(allowed)
}

pub(super) fn create_parent(path: &Path) -> Result<(), HubError> {
    let parent = path.parent().expect("paths in the cache have a parent");
    fs::create_dir_all(parent).map_err(HubError::io(parent))
}

//! One file to one blob: continued after cut connections, checked, renamed into place.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::ProgressBar;
use sha2::{Digest, Sha256};

use super::client::{FileBody, FileInfo, HubClient};
use super::error::HubError;
use crate::checksum::{hash_all, hex_digest};

const BUFFER_BYTES: usize = 256 << 10;
const MAX_RETRY_DELAY: Duration = Duration::from_secs(10);

/// How often and how soon to try again. Attempts that brought new bytes do not count.
#[derive(Clone, Copy, Debug)]
pub(super) struct RetryPolicy {
    pub(super) max_retries: u32,
    /// Before the first retry; doubled each time, up to ten seconds.
    pub(super) delay: Duration,
}

impl RetryPolicy {
    /// Runs `attempt` until it succeeds, fails for good, or has failed too often without `progress` growing.
    pub(super) fn run<T>(
        self,
        mut attempt: impl FnMut() -> Result<T, HubError>,
        mut on_failure: impl FnMut(&HubError) -> Progressed,
    ) -> Result<T, HubError> {
        let mut num_failures = 0;
        loop {
            let error = match attempt() {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            if on_failure(&error) == Progressed::Yes {
                num_failures = 0;
            }
            if !error.is_transient() || num_failures == self.max_retries {
                return Err(error);
            }
            std::thread::sleep((self.delay * 2u32.pow(num_failures.min(8))).min(MAX_RETRY_DELAY));
            num_failures += 1;
        }
    }
}

/// Whether a failed attempt left more bytes than the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progressed {
    Yes,
    No,
}

/// A file to fetch.
pub(super) struct Download<'a> {
    pub(super) client: &'a HubClient,
    pub(super) repo: &'a str,
    /// Name in the repository, for messages.
    pub(super) file: &'a str,
    pub(super) url: &'a str,
    pub(super) info: &'a FileInfo,
}

impl Download<'_> {
    /// Fetches into `incomplete`, going on where it ends, and renames it to `blob` when its size and hash are right.
    pub(super) fn run(
        &self,
        incomplete: PathBuf,
        blob: &Path,
        retry: RetryPolicy,
        bar: &ProgressBar,
    ) -> Result<(), HubError> {
        let part = std::cell::RefCell::new(PartialFile::open(incomplete)?);
        let mut num_bytes_before = part.borrow().num_bytes;
        retry.run(
            || self.attempt(&mut part.borrow_mut(), bar),
            |_| {
                let num_bytes = part.borrow().num_bytes;
                let progressed = num_bytes > num_bytes_before;
                num_bytes_before = num_bytes;
                if progressed { Progressed::Yes } else { Progressed::No }
            },
        )?;
        part.into_inner().rename(blob)
    }

    fn attempt(&self, part: &mut PartialFile, bar: &ProgressBar) -> Result<(), HubError> {
        bar.set_position(part.num_bytes);
        if self.info.num_bytes.is_none_or(|expected| part.num_bytes != expected) {
            self.fetch_rest(part, bar)?;
        }
        let Some(expected) = self.info.sha256() else { return Ok(()) };
        let found = part.sha256();
        if found != expected {
            part.restart()?;
            return Err(HubError::Checksum { file: self.file.into(), expected: expected.into(), found });
        }
        Ok(())
    }

    fn fetch_rest(&self, part: &mut PartialFile, bar: &ProgressBar) -> Result<(), HubError> {
        if self.info.num_bytes.is_some_and(|expected| part.num_bytes > expected) {
            part.restart()?;
        }
        let FileBody { start, num_bytes, body } = match self.client.file_body(self.repo, self.url, part.num_bytes) {
            Err(error @ HubError::Status { status: 416, .. }) => {
                part.restart()?;
                return Err(error);
            }
            other => other?,
        };
        if start != part.num_bytes {
            part.restart()?;
            if start != 0 {
                let reason = format!("it continues at byte {start}");
                return Err(HubError::BadAnswer { url: self.url.into(), reason });
            }
        }
        let expected = self.info.num_bytes.or(num_bytes.map(|rest| start + rest));
        self.copy_body(&mut body.into_reader(), part, expected.unwrap_or(u64::MAX), bar)?;
        match expected {
            Some(expected) if part.num_bytes != expected => Err(self.wrong_size(expected, part.num_bytes)),
            _ => Ok(()),
        }
    }

    fn copy_body(
        &self,
        body: &mut dyn Read,
        part: &mut PartialFile,
        max_bytes: u64,
        bar: &ProgressBar,
    ) -> Result<(), HubError> {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let count = match body.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(HubError::Transport { url: self.url.into(), reason: error.to_string() }),
            };
            if part.num_bytes + count as u64 > max_bytes {
                let found = part.num_bytes + count as u64;
                part.restart()?;
                return Err(self.wrong_size(max_bytes, found));
            }
            part.append(&buffer[..count])?;
            bar.set_position(part.num_bytes);
        }
    }

    fn wrong_size(&self, expected: u64, found: u64) -> HubError {
        HubError::WrongSize { file: self.file.into(), expected, found }
    }
}

/// The file that grows, with the hash of what it holds.
struct PartialFile {
    path: PathBuf,
    file: File,
    num_bytes: u64,
    hasher: Sha256,
}

impl PartialFile {
    /// Opens what an earlier run left, or starts a file.
    fn open(path: PathBuf) -> Result<Self, HubError> {
        super::cache::create_parent(&path)?;
        let mut hasher = Sha256::new();
        let mut num_bytes = 0;
        if path.exists() {
            let mut file = File::open(&path).map_err(HubError::io(&path))?;
            num_bytes = hash_all(&mut file, &mut hasher).map_err(HubError::io(&path))?;
        }
        let file = File::options().create(true).append(true).open(&path).map_err(HubError::io(&path))?;
        Ok(Self { path, file, num_bytes, hasher })
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), HubError> {
        self.file.write_all(bytes).map_err(HubError::io(&self.path))?;
        self.hasher.update(bytes);
        self.num_bytes += bytes.len() as u64;
        Ok(())
    }

    fn restart(&mut self) -> Result<(), HubError> {
        self.file.set_len(0).map_err(HubError::io(&self.path))?;
        self.hasher = Sha256::new();
        self.num_bytes = 0;
        Ok(())
    }

    fn sha256(&self) -> String {
        hex_digest(self.hasher.clone())
    }

    fn rename(self, to: &Path) -> Result<(), HubError> {
        // A power cut must not leave a blob under its final name without its bytes.
        self.file.sync_all().map_err(HubError::io(&self.path))?;
        fs::rename(&self.path, to).map_err(HubError::io(to))
    }
}

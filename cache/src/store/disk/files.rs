//! The files of the disk tier: blocking work, one value per file, whole or not there.
//!
//! `DIR/output/3f/3f…` holds the sealed value of that key. A file is written beside its place under another name and renamed, so
//! that a reader, of this process or another, sees it whole; what a crash cuts short fails its checksum.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;

use super::index::{Index, Name};
use crate::codec::{self, BadValue, HEADER_BYTES, Opened};
use crate::key::Key;
use crate::store::{Address, Kind, Value};

/// A file's time of last use is written again once it is this old.
const TOUCH_INTERVAL: Duration = Duration::from_secs(60);

/// A file that was being written this long ago is of a process that died.
const STALE: Duration = Duration::from_secs(3600);

const UNFINISHED: &str = ".new";

#[derive(Debug)]
pub(super) struct Files {
    directory: PathBuf,
    max_value_bytes: usize,
    index: Mutex<Index>,
    num_written: AtomicU64,
    /// Tells unfinished files of processes apart; containers that share a directory may share process ids too.
    start: u128,
}

/// What a look found.
#[derive(Debug)]
pub(super) enum Look {
    Missing,
    Expired,
    Bad(BadValue),
    Found(Opened),
}

impl Files {
    pub fn new(directory: PathBuf, max_value_bytes: usize, index: Index) -> Self {
        let start = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        Self { directory, max_value_bytes, index: Mutex::new(index), num_written: AtomicU64::new(0), start }
    }

    pub fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads a value; one that is over or bad is removed.
    pub fn read(&self, address: &Address, now: SystemTime) -> io::Result<Look> {
        let name = Name { kind: address.kind, key: address.key };
        let path = self.path(&name);
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.index().forget(&name);
                return Ok(Look::Missing);
            }
            Err(error) => return Err(error),
        };
        let mut bytes = Vec::new();
        let limit = (self.max_value_bytes + HEADER_BYTES) as u64;
        (&mut file).take(limit + 1).read_to_end(&mut bytes)?;
        let len = bytes.len() as u64;
        let look = match codec::open(address, &Bytes::from(bytes), now) {
            Ok(opened) if opened.ttl.is_zero() => Look::Expired,
            Ok(opened) => Look::Found(opened),
            Err(bad) => Look::Bad(bad),
        };
        if matches!(look, Look::Found(_)) {
            let is_old = file.metadata()?.modified()? + TOUCH_INTERVAL < now;
            if is_old {
                // A file of another user, or on a disk that is read-only, is as good.
                drop(file.set_modified(now));
            }
            self.index().note(name, len, now);
        } else {
            // What cannot be removed stays bad, and a miss.
            drop(self.remove(&name));
        }
        Ok(look)
    }

    /// Whether the file of a value is there.
    pub fn contains(&self, name: &Name) -> io::Result<bool> {
        match fs::metadata(self.path(name)) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.index().forget(name);
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Seals and writes a value, then evicts what is too much.
    pub fn write(&self, address: &Address, value: &Value, now: SystemTime) -> io::Result<()> {
        let header = codec::header(address, value, now);
        let name = Name { kind: address.kind, key: address.key };
        let path = self.path(&name);
        let number = self.num_written.fetch_add(1, Ordering::Relaxed);
        let unfinished = path.with_extension(format!("{}-{}-{number}{UNFINISHED}", std::process::id(), self.start));
        let written = self.write_whole(&unfinished, &path, &[&header, &value.payload]);
        if written.is_err() {
            // What a full disk cut short must not stay; where even that fails, a later scan removes it.
            drop(fs::remove_file(&unfinished));
        }
        written?;
        self.index().note(name, (HEADER_BYTES + value.payload.len()) as u64, now);
        self.evict()
    }

    fn write_whole(&self, unfinished: &Path, path: &Path, parts: &[&[u8]]) -> io::Result<()> {
        let folder = path.parent().expect("a file of the cache lies in a folder");
        let mut file = match create(unfinished) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                make_folder(folder)?;
                create(unfinished)?
            }
            file => file?,
        };
        for part in parts {
            file.write_all(part)?;
        }
        drop(file);
        fs::rename(unfinished, path)
    }

    /// Writes, reads and removes a file, as calls do.
    pub fn try_out(&self) -> io::Result<()> {
        // Among the values, under a name that a later scan sweeps where this process dies meanwhile.
        let folder = self.directory.join(Kind::Output.as_str()).join("00");
        let probe = |suffix| folder.join(format!("probe-{}-{}{suffix}{UNFINISHED}", std::process::id(), self.start));
        let (unfinished, path) = (probe("-a"), probe("-b"));
        self.write_whole(&unfinished, &path, &[b"probe"])?;
        fs::read(&path)?;
        fs::remove_file(&path)
    }

    pub fn remove(&self, name: &Name) -> io::Result<()> {
        self.index().forget(name);
        match fs::remove_file(self.path(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    fn evict(&self) -> io::Result<()> {
        loop {
            let Some(name) = self.index().pop_excess() else { return Ok(()) };
            self.remove(&name)?;
        }
    }

    /// Takes in the files that are there: of an earlier run, or of others that share the directory. What others removed is let go
    /// when it is looked for, or its turn to be evicted comes.
    pub fn scan(&self, now: SystemTime) -> io::Result<()> {
        for kind in Kind::ALL {
            self.walk(kind, |path, name| {
                let Some(name) = name else {
                    self.sweep(path, now);
                    return Ok(());
                };
                // Another process may evict it this moment.
                let Ok(metadata) = fs::metadata(path) else { return Ok(()) };
                if !self.index().contains(&name) {
                    self.index().note(name, metadata.len(), metadata.modified()?.min(now));
                    self.evict()?;
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Removes an unfinished file whose writer died.
    fn sweep(&self, path: &Path, now: SystemTime) {
        let is_unfinished = path.to_string_lossy().ends_with(UNFINISHED);
        let modified = fs::metadata(path).and_then(|metadata| metadata.modified());
        if is_unfinished && modified.is_ok_and(|modified| modified + STALE < now) {
            // It may be gone already.
            drop(fs::remove_file(path));
        }
    }

    /// Removes the values of `kind`. Stops with an error when `is_late`.
    pub fn clear(&self, kind: Kind, is_late: impl Fn() -> bool) -> io::Result<()> {
        self.walk(kind, |_, name| {
            if is_late() {
                return Err(io::Error::from(io::ErrorKind::TimedOut));
            }
            name.map_or(Ok(()), |name| self.remove(&name))
        })
    }

    /// Calls `visit` with each file of `kind`, and its name where it is a value. Other things in the directory are left alone.
    fn walk(&self, kind: Kind, mut visit: impl FnMut(&Path, Option<Name>) -> io::Result<()>) -> io::Result<()> {
        for folder in read_folder(&self.directory.join(kind.as_str()))? {
            for file in read_folder(&folder?.path())? {
                let path = file?.path();
                let key = path.file_name().and_then(|name| name.to_str()).and_then(Key::from_hex);
                visit(&path, key.map(|key| Name { kind, key }))?;
            }
        }
        Ok(())
    }

    fn path(&self, name: &Name) -> PathBuf {
        let hex = name.key.to_hex();
        self.directory.join(name.kind.as_str()).join(&hex[..2]).join(hex)
    }
}

/// The entries of a folder; none where it is not there, or is no folder.
fn read_folder(path: &Path) -> io::Result<impl Iterator<Item = io::Result<fs::DirEntry>>> {
    match fs::read_dir(path) {
        Ok(entries) => Ok(Some(entries).into_iter().flatten()),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(None.into_iter().flatten())
        }
        Err(error) => Err(error),
    }
}

/// Makes a folder that only this user reads: values are what users asked and were told.
pub(super) fn make_folder(path: &Path) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.recursive(true).create(path)
}

fn create(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.write(true).create(true).truncate(true).open(path)
}

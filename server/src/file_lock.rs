//! Advisory locks between processes that fill the same cache.

use std::fs::{File, TryLockError};
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// An exclusive lock, let go on drop or when the process ends.
#[derive(Debug)]
pub(crate) struct FileLock {
    _file: File,
}

impl FileLock {
    /// Takes the lock on `path`, creating the file and its folder, and waits for another holder up to `timeout`.
    /// `on_wait` is called once if there is one.
    ///
    /// # Errors
    /// `TimedOut` if the other holder outlasts the timeout, and errors of the file system.
    pub(crate) fn acquire(path: &Path, timeout: Duration, on_wait: impl FnOnce()) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let file = File::options().create(true).truncate(false).write(true).open(path)?;
        let deadline = Instant::now() + timeout;
        let mut on_wait = Some(on_wait);
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Self { _file: file }),
                Err(TryLockError::Error(error)) => return Err(error),
                Err(TryLockError::WouldBlock) if Instant::now() >= deadline => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "another process holds the lock"));
                }
                Err(TryLockError::WouldBlock) => {
                    if let Some(tell) = on_wait.take() {
                        tell();
                    }
                    std::thread::sleep(POLL_INTERVAL.min(timeout));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holder_waits_and_gives_up_until_the_first_is_gone() {
        let path = std::env::temp_dir().join(format!("moesaic-lock-{}/x.lock", std::process::id()));
        let first = FileLock::acquire(&path, Duration::ZERO, || panic!("nobody else holds it")).unwrap();
        let mut num_waits = 0;
        let error = FileLock::acquire(&path, Duration::from_millis(1), || num_waits += 1).unwrap_err();
        assert_eq!((error.kind(), num_waits), (io::ErrorKind::TimedOut, 1));
        drop(first);
        FileLock::acquire(&path, Duration::ZERO, || panic!("the holder is gone")).unwrap();
        std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
    }
}

//! A folder among the temporary files, which goes with the test that made it.

use std::fs::Permissions;
use std::ops::Deref;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A folder that is removed when dropped, with all that is in it.
pub struct Folder(PathBuf);

impl Folder {
    /// An empty one. `name` is for whoever looks among the temporary files.
    ///
    /// # Panics
    /// It cannot be made.
    pub fn new(name: &str) -> Self {
        static NUM_MADE: AtomicU32 = AtomicU32::new(0);
        let number = NUM_MADE.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("moesaic-{name}-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).expect("the folder of temporary files can be written");
        Self(path)
    }

    /// As an argument of a command.
    ///
    /// # Panics
    /// The path of temporary files is not UTF-8.
    pub fn arg(&self) -> &str {
        self.to_str().expect("names of temporary folders are UTF-8")
    }

    /// What is in it, or will be, as an argument of a command.
    ///
    /// # Panics
    /// The path of temporary files is not UTF-8.
    pub fn file(&self, name: &str) -> String {
        format!("{}/{name}", self.arg())
    }

    /// Writes a program of these lines of shell, and returns its path.
    ///
    /// # Panics
    /// It cannot be written.
    pub fn script(&self, lines: &str) -> String {
        let script = self.file("script");
        std::fs::write(&script, format!("#!/bin/sh\n{lines}\n")).expect("the folder is writable");
        std::fs::set_permissions(&script, Permissions::from_mode(0o700)).expect("the script is there");
        script
    }
}

impl Deref for Folder {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl AsRef<Path> for Folder {
    fn as_ref(&self) -> &Path {
        self
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left is in the folder of temporary files.
        drop(std::fs::remove_dir_all(&self.0));
    }
}

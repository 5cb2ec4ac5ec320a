//! Read-only memory-mapped files, shared by the weights that lie in them.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

/// A whole file mapped read-only. It is trusted not to shrink or change while mapped.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    /// Maps the file. Errors are those of opening and mapping, and anything that is not a regular file.
    pub fn open(path: &Path) -> io::Result<Self> {
        // Opening a pipe would wait for its writer.
        if !std::fs::metadata(path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
        }
        let file = File::open(path)?;
        // SAFETY: the file is trusted not to be written or truncated while mapped; whoever owns the checkpoint upholds it.
        let map = unsafe { Mmap::map(&file) }?;
        Ok(Self { path: path.to_owned(), map })
    }

    /// What it was opened as.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives back the memory of the pages that were read; a page that is read again comes from the page cache, or from the
    /// disk. A system that does not want the advice keeps them.
    pub fn release_pages(&self) {
        #[cfg(unix)]
        {
            // SAFETY: the mapping is read-only and of a file, so that a dropped page comes back with the same bytes.
            let advised = unsafe { self.map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
            drop(advised);
        }
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

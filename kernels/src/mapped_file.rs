//! Read-only memory-mapped files, shared by the weights that lie in them.

use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use memmap2::Mmap;

use crate::pool;
use crate::weight::PackedWeight;

/// Bytes that a thread has read at a time: enough for a disk to work on while the pages of the last ones are mapped.
const PIECE_BYTES: usize = 8 << 20;
/// Pieces between two reports.
const REPORT_PIECES: usize = 16;

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

    /// Reads the pages of a range and maps them, where the system can be asked to (Linux from 5.14 on); elsewhere that is
    /// begun at best. Fails on what a use of the pages would die of.
    fn read_pages(&self, range: Range<usize>) -> io::Result<()> {
        #[cfg(unix)]
        drop(self.map.advise_range(memmap2::Advice::WillNeed, range.start, range.len()));
        #[cfg(target_os = "linux")]
        match self.map.advise_range(memmap2::Advice::PopulateRead, range.start, range.len()) {
            Err(error) if error.raw_os_error() != Some(libc::EINVAL) => return Err(error),
            Ok(()) | Err(_) => {}
        }
        #[cfg(not(unix))]
        let _ = range;
        Ok(())
    }
}

/// Parts of mapped files that will be read as long as the process lives.
#[derive(Debug, Default)]
pub struct MappedParts {
    parts: Vec<(Arc<MappedFile>, Range<usize>)>,
}

impl MappedParts {
    /// Notes a weight. One that has memory of its own is there already.
    pub fn add(&mut self, weight: &PackedWeight) {
        self.parts.extend(weight.mapped_part());
    }

    pub fn num_bytes(&self) -> u64 {
        self.parts.iter().map(|(_, range)| range.len() as u64).sum()
    }

    /// Reads all of them, on the compute threads, so that their first use waits neither for the disk nor for its pages.
    /// `progress` gets the bytes that are there. Fails on a file that cannot be read, by its path.
    pub fn read_in(self, mut progress: impl FnMut(u64)) -> Result<(), (PathBuf, io::Error)> {
        let pieces = |(file, range): &(Arc<MappedFile>, Range<usize>)| {
            let (file, end) = (file.clone(), range.end);
            range.clone().step_by(PIECE_BYTES).map(move |start| (file.clone(), start..end.min(start + PIECE_BYTES)))
        };
        let pieces: Vec<_> = self.parts.iter().flat_map(pieces).collect();
        let (mut num_done, fault) = (0, OnceLock::new());
        for pieces in pieces.chunks(REPORT_PIECES) {
            pool::parallel_for(pieces.len(), |idx| {
                let (file, range) = &pieces[idx];
                if let Err(error) = file.read_pages(range.clone()) {
                    fault.get_or_init(|| (file.path.clone(), error));
                }
            });
            num_done += pieces.iter().map(|(_, range)| range.len() as u64).sum::<u64>();
            progress(num_done);
            if fault.get().is_some() {
                break;
            }
        }
        fault.into_inner().map_or(Ok(()), Err)
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::weight::WeightFormat;

    const ROWS: usize = 4096;
    const COLS: usize = 1024;

    /// Pages that were not mapped when this thread wanted them.
    fn num_faults() -> i64 {
        let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: the call fills the structure that it is given.
        unsafe { libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) };
        // SAFETY: all of its fields are numbers, and zeros where nothing was filled in.
        let usage = unsafe { usage.assume_init() };
        usage.ru_minflt + usage.ru_majflt
    }

    fn faults_of_a_pass(bytes: &[u8]) -> i64 {
        let before = num_faults();
        assert_eq!(bytes.iter().step_by(512).map(|&byte| u64::from(byte)).sum::<u64>(), 0);
        num_faults() - before
    }

    #[test]
    fn what_was_read_in_is_there() {
        let path = std::env::temp_dir().join(format!("moesaic-read-in-{}", std::process::id()));
        let format = WeightFormat::Bf16;
        let len = format.bytes_for(ROWS, COLS);
        std::fs::write(&path, vec![0; 2 * len]).unwrap();
        let file = Arc::new(MappedFile::open(&path).unwrap());
        std::fs::remove_file(&path).unwrap();
        let weight = PackedWeight::mapped(file.clone(), len, format, ROWS, COLS).unwrap();
        let at_first_use = faults_of_a_pass(weight.as_bytes());
        file.release_pages();
        let mut parts = MappedParts::default();
        parts.add(&weight);
        parts.add(&PackedWeight::from_f32(format, 1, 1, &[1.0]).unwrap());
        assert_eq!(parts.num_bytes(), len as u64);
        let mut told = Vec::new();
        parts.read_in(|bytes| told.push(bytes)).unwrap();
        assert_eq!(told.last(), Some(&(len as u64)));
        // Linux before 5.14 only begins to read.
        if file.map.advise_range(memmap2::Advice::PopulateRead, len, 1).is_ok() {
            let after = faults_of_a_pass(weight.as_bytes());
            assert!(4 * after < at_first_use, "{after} faults, {at_first_use} before");
        }
    }
}

//! Reads ranges of files into owned memory that weights take as it is, past the page cache where that is asked for.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::SystemTime;

use crate::memory::AlignedBytes;

/// What direct reads want of offsets, lengths and addresses: a page, which is a multiple of every disk's sector.
const DIRECT_ALIGNMENT: u64 = 4096;

/// Bytes that are read without a break: a disk is as fast with these as with more.
const PIECE: usize = 1 << 20;

/// How a file is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadMode {
    /// Through the page cache, which keeps what it has room for.
    #[default]
    Cached,
    /// From the disk into place, leaving the page cache alone (`O_DIRECT`). Not every file system has that.
    Direct,
}

impl ReadMode {
    /// The name used in configuration and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cached => "cached",
            Self::Direct => "direct",
        }
    }
}

/// What tells a file from one that was changed since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStamp {
    num_bytes: u64,
    modified: SystemTime,
}

/// A file that is open for reading ranges, by any number of threads at once. It may shrink or change.
#[derive(Debug)]
pub struct RangeFile {
    file: File,
    mode: ReadMode,
}

/// Bytes of a file in memory of their own, aligned as they are in the file, up to 64.
pub struct RangeBytes {
    memory: AlignedBytes,
    range: Range<usize>,
}

impl RangeFile {
    /// # Errors
    /// Those of opening, a file that is not a regular one, and a file system without direct reads.
    pub fn open(path: &Path, mode: ReadMode) -> io::Result<Self> {
        // Opening a pipe would wait for its writer.
        if !std::fs::metadata(path)?.is_file() {
            return Err(io::Error::new(ErrorKind::InvalidInput, "it is not a regular file"));
        }
        let mut options = OpenOptions::new();
        options.read(true);
        if mode == ReadMode::Direct {
            #[cfg(target_os = "linux")]
            options.custom_flags(libc::O_DIRECT);
            #[cfg(not(target_os = "linux"))]
            return Err(io::Error::new(ErrorKind::Unsupported, "this system has no direct reads"));
        }
        Ok(Self { file: options.open(path)?, mode })
    }

    /// Its size and the time of its last change.
    ///
    /// # Errors
    /// Those of asking the file system.
    pub fn stamp(&self) -> io::Result<FileStamp> {
        let metadata = self.file.metadata()?;
        Ok(FileStamp { num_bytes: metadata.len(), modified: metadata.modified()? })
    }

    /// The bytes of `range`, in the memory of `reuse` if that is as large as needed.
    ///
    /// # Errors
    /// Those of reading, and a file that ends before the range does.
    pub fn read(&self, range: Range<u64>, reuse: Option<RangeBytes>) -> io::Result<RangeBytes> {
        self.read_in_pieces(range, reuse, &mut || ControlFlow::Continue(()))
    }

    /// The same; behind each piece of a megabyte `between` may let others go first, as long as it takes, or give up.
    ///
    /// # Errors
    /// Those of [`Self::read`], and [`ErrorKind::Interrupted`] where it was given up.
    pub fn read_in_pieces(
        &self,
        range: Range<u64>,
        reuse: Option<RangeBytes>,
        between: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> io::Result<RangeBytes> {
        let len = usize::try_from(range.end.saturating_sub(range.start)).map_err(io::Error::other)?;
        let slack = match self.mode {
            ReadMode::Cached => 0,
            // In front, behind, and up to the first aligned address.
            ReadMode::Direct => 3 * DIRECT_ALIGNMENT as usize,
        };
        let reused = reuse.map(|bytes| bytes.memory).filter(|memory| memory.len() == len + slack);
        let mut memory = reused.unwrap_or_else(|| AlignedBytes::zeroed_huge(len + slack));
        let place = match self.mode {
            ReadMode::Cached => {
                self.fill(memory.as_mut_slice(), range.start..range.end, between)?;
                0..len
            }
            ReadMode::Direct => {
                let whole = memory.as_mut_slice();
                let skipped = whole.as_ptr().align_offset(DIRECT_ALIGNMENT as usize);
                let first = range.start / DIRECT_ALIGNMENT * DIRECT_ALIGNMENT;
                let in_front = (range.start - first) as usize;
                let wanted = in_front + len;
                let aligned = wanted.next_multiple_of(DIRECT_ALIGNMENT as usize);
                self.fill(&mut whole[skipped..skipped + aligned], first..range.end, between)?;
                skipped + in_front..skipped + wanted
            }
        };
        Ok(RangeBytes { memory, range: place })
    }

    /// Reads into `buffer`, which may be larger than `range`; done when that is there.
    fn fill(
        &self,
        buffer: &mut [u8],
        range: Range<u64>,
        between: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> io::Result<()> {
        let wanted = (range.end - range.start) as usize;
        let mut filled = 0;
        while filled < wanted {
            let piece = buffer.len().min(filled + PIECE);
            match self.file.read_at(&mut buffer[filled..piece], range.start + filled as u64) {
                Ok(0) => {
                    let end = self.file.metadata()?.len().min(range.start + filled as u64);
                    let reason = format!("it ends at byte {end}, expected are {}", range.end);
                    return Err(io::Error::new(ErrorKind::UnexpectedEof, reason));
                }
                Ok(num_bytes) => filled += num_bytes,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if between().is_break() {
                return Err(ErrorKind::Interrupted.into());
            }
        }
        Ok(())
    }
}

impl RangeBytes {
    pub fn as_slice(&self) -> &[u8] {
        &self.memory.as_slice()[self.range.clone()]
    }
}

impl fmt::Debug for RangeBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RangeBytes({} of {} bytes)", self.range.len(), self.memory.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weight::{PackedWeight, WeightFormat};

    struct Scratch(std::path::PathBuf);

    impl Scratch {
        fn new(name: &str, bytes: &[u8]) -> Self {
            let path = std::env::temp_dir().join(format!("moesaic-range-{name}-{}", std::process::id()));
            std::fs::write(&path, bytes).unwrap();
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            drop(std::fs::remove_file(&self.0));
        }
    }

    /// The modes that the file system of temporary files has.
    fn modes(path: &Path) -> Vec<ReadMode> {
        [ReadMode::Cached, ReadMode::Direct].into_iter().filter(|&mode| RangeFile::open(path, mode).is_ok()).collect()
    }

    #[test]
    fn ranges_come_whole_and_aligned_as_in_the_file() {
        let bytes: Vec<u8> = (0..50_000u32).map(|idx| (idx * 7 % 251) as u8).collect();
        let file = Scratch::new("whole", &bytes);
        for mode in modes(&file.0) {
            let open = RangeFile::open(&file.0, mode).unwrap();
            let mut reuse = None;
            for range in [0..0, 0..64, 64..8192, 4096..4096, 8128..40_000, 1..2, 49_984..50_000, 0..50_000] {
                let read = open.read(range.clone(), reuse.take()).unwrap();
                assert_eq!(read.as_slice(), &bytes[range.start as usize..range.end as usize], "{mode:?} {range:?}");
                if mode == ReadMode::Direct {
                    assert_eq!(read.as_slice().as_ptr() as usize % 64, range.start as usize % 64);
                }
                reuse = Some(read);
            }
            let error = open.read(49_000..50_001, None).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{mode:?} {error}");
            assert!(open.read(1 << 40..(1 << 40) + 1, None).is_err());
        }
        assert!(RangeFile::open(&std::env::temp_dir(), ReadMode::Cached).is_err());
    }

    #[test]
    fn a_weight_takes_what_was_read_and_gives_it_back() {
        let values: Vec<f32> = (0..300).map(|idx| idx as f32 - 150.0).collect();
        for format in [WeightFormat::F32, WeightFormat::Bf16, WeightFormat::Quantized(crate::QuantFormat::INT8)] {
            let weight = PackedWeight::from_f32(format, 10, 30, &values).unwrap();
            let len = weight.num_bytes() as u64;
            let bytes = [&[0; 4160][..], weight.as_bytes()].concat();
            let file = Scratch::new("weight", &bytes);
            for mode in modes(&file.0) {
                let open = RangeFile::open(&file.0, mode).unwrap();
                let mut memory = None;
                for _ in 0..2 {
                    let read = open.read(4160..4160 + len, memory).unwrap();
                    let found = PackedWeight::from_range(read, format, 10, 30).unwrap();
                    assert_eq!((found.as_bytes(), found.is_owned()), (weight.as_bytes(), true), "{format:?} {mode:?}");
                    assert!(found.clone().into_range().is_none(), "somebody else has it");
                    memory = found.into_range();
                    assert!(memory.is_some());
                }
                let short = open.read(4160..4160 + len - 1, None).unwrap();
                assert!(PackedWeight::from_range(short, format, 10, 30).is_err());
            }
        }
    }

    #[test]
    fn a_changed_file_has_another_stamp() {
        let file = Scratch::new("stamp", &[1; 100]);
        let open = RangeFile::open(&file.0, ReadMode::Cached).unwrap();
        let before = open.stamp().unwrap();
        assert_eq!(open.stamp().unwrap(), before);
        File::options().write(true).open(&file.0).unwrap().set_len(50).unwrap();
        assert_ne!(open.stamp().unwrap(), before);
        assert!(open.read(0..100, None).is_err());
    }
}

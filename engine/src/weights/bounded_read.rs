//! Whole files into memory, as long as they are files and not too long: model folders come from strangers.

use std::fs::File;
use std::io::{self, ErrorKind, Read as _};
use std::path::Path;

/// The bytes of a regular file of at most `max_bytes`. Links are followed; a device or a pipe could go on for ever.
///
/// # Errors
/// What opening and reading give, a file that is not a regular one, and a longer file, of which no more is read.
pub fn read_bounded(path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
    let metadata = std::fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "it is not a regular file"));
    }
    let mut bytes = Vec::new();
    if metadata.len() <= max_bytes {
        // One byte more tells a file that has grown.
        File::open(path)?.take(max_bytes + 1).read_to_end(&mut bytes)?;
    }
    match metadata.len().max(bytes.len() as u64) {
        len if len <= max_bytes => Ok(bytes),
        len => Err(io::Error::new(ErrorKind::FileTooLarge, format!("it has {len} bytes, the limit is {max_bytes}"))),
    }
}

//! The sha256 of what is downloaded.

use std::io::{self, Read};

use sha2::{Digest, Sha256};

const BUFFER_BYTES: usize = 256 << 10;

/// Feeds all of `reader` to `hasher` and returns the number of bytes.
pub(crate) fn hash_all(reader: &mut dyn Read, hasher: &mut Sha256) -> io::Result<u64> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut num_bytes = 0;
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return Ok(num_bytes),
            Ok(count) => {
                hasher.update(&buffer[..count]);
                num_bytes += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The hash so far in lower-case hexadecimal.
pub(crate) fn hex_digest(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

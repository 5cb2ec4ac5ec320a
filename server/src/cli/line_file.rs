//! Files that are read line by line: of any length, no line held longer than it takes.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read};
use std::path::Path;

use anyhow::{Context as _, bail};

/// Some editors begin a file with it.
pub const BYTE_ORDER_MARK: char = '\u{feff}';
/// Longest line.
const MAX_LINE_BYTES: usize = 16 << 20;

/// The file, or standard input for `-`.
///
/// # Errors
/// It cannot be read, or is a folder.
pub fn open(path: &Path) -> anyhow::Result<Box<dyn Read + Send>> {
    if path == Path::new("-") {
        return Ok(Box::new(std::io::stdin()));
    }
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    if file.metadata()?.is_dir() {
        bail!("{} is a folder; hint: a file with a prompt in each line is wanted", path.display());
    }
    Ok(Box::new(file))
}

/// The lines of a file with their ends; behind an error of reading, or a line that is too long, there is nothing more.
pub fn lines(file: Box<dyn Read + Send>) -> impl Iterator<Item = anyhow::Result<String>> {
    let mut reader = BufReader::new(file);
    let mut is_broken = false;
    std::iter::from_fn(move || {
        if is_broken {
            return None;
        }
        let mut line = Vec::new();
        let mut limited = Read::take(&mut reader, MAX_LINE_BYTES as u64 + 1);
        match limited.read_until(b'\n', &mut line) {
            Ok(0) => None,
            Ok(_) if line.len() > MAX_LINE_BYTES => {
                is_broken = true;
                Some(Err(anyhow::anyhow!("the line is longer than {MAX_LINE_BYTES} bytes")))
            }
            Ok(_) => Some(String::from_utf8(line).context("the line is not UTF-8")),
            Err(error) => {
                is_broken = true;
                Some(Err(error.into()))
            }
        }
    })
}

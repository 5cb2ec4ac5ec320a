//! Server-sent events from bytes, however the bytes are cut.

use std::io::{self, BufRead, BufReader, Read};

/// A server that never ends a line must not fill the memory.
const MAX_EVENT_BYTES: usize = 16 << 20;

/// Yields the data of each event; comments, and fields other than `data`, are skipped.
pub struct EventStream<R> {
    source: BufReader<R>,
    line: Vec<u8>,
    /// The line ended with CR: an LF that follows belongs to that end.
    after_cr: bool,
}

impl<R: Read> EventStream<R> {
    pub fn new(source: R) -> Self {
        Self { source: BufReader::new(source), line: Vec::new(), after_cr: false }
    }

    /// The data of the next event, its lines joined with LF; `None` at the end. A line that the end cuts is dropped.
    ///
    /// # Errors
    /// Those of the source; `InvalidData` for events over 16 MiB and for bytes that are not UTF-8.
    pub fn next_data(&mut self) -> io::Result<Option<String>> {
        let mut data: Option<String> = None;
        while let Some(line) = self.next_line()? {
            if line.is_empty() {
                if data.is_some() {
                    break;
                }
                continue;
            }
            let Some(value) = data_field(line)? else { continue };
            match &mut data {
                None => data = Some(value.to_owned()),
                Some(data) => {
                    check_size(data.len() + value.len())?;
                    data.push('\n');
                    data.push_str(value);
                }
            }
        }
        Ok(data)
    }

    /// The next line without its end, which may be LF, CR or CR LF.
    fn next_line(&mut self) -> io::Result<Option<&[u8]>> {
        self.line.clear();
        loop {
            let available = self.source.fill_buf()?;
            let Some(first) = available.first() else { return Ok(None) };
            if std::mem::take(&mut self.after_cr) && *first == b'\n' {
                self.source.consume(1);
                continue;
            }
            let end = available.iter().position(|byte| matches!(byte, b'\n' | b'\r'));
            self.line.extend_from_slice(&available[..end.unwrap_or(available.len())]);
            self.after_cr = end.is_some_and(|end| available[end] == b'\r');
            let num_used = end.map_or(available.len(), |end| end + 1);
            self.source.consume(num_used);
            check_size(self.line.len())?;
            if end.is_some() {
                return Ok(Some(&self.line));
            }
        }
    }
}

/// The value of a `data` line; one space after the colon is not part of it.
fn data_field(line: &[u8]) -> io::Result<Option<&str>> {
    let Some(value) = line.strip_prefix(b"data:") else { return Ok(None) };
    let value = value.strip_prefix(b" ").unwrap_or(value);
    std::str::from_utf8(value).map(Some).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

fn check_size(num_bytes: usize) -> io::Result<()> {
    if num_bytes > MAX_EVENT_BYTES {
        let reason = format!("an event has over {MAX_EVENT_BYTES} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives the bytes in pieces of `piece_bytes`.
    struct Pieces<'a> {
        bytes: &'a [u8],
        piece_bytes: usize,
    }

    impl Read for Pieces<'_> {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            let num_bytes = self.piece_bytes.min(self.bytes.len()).min(out.len());
            let (piece, rest) = self.bytes.split_at(num_bytes);
            out[..num_bytes].copy_from_slice(piece);
            self.bytes = rest;
            Ok(num_bytes)
        }
    }

    fn check(text: &str, expect: &[&str]) {
        for piece_bytes in 1..=text.len().max(1) {
            let mut events = EventStream::new(Pieces { bytes: text.as_bytes(), piece_bytes });
            let mut found = Vec::new();
            while let Some(data) = events.next_data().unwrap() {
                found.push(data);
            }
            assert_eq!(found, expect, "{text:?} in pieces of {piece_bytes}");
        }
    }

    #[test]
    fn events_are_the_same_however_the_bytes_are_cut() {
        check("", &[]);
        check("data: a\n\ndata: b\n\n", &["a", "b"]);
        check("data: größer 🦀\n\n", &["größer 🦀"]);
        check("data:a\r\n\r\ndata: b\r\rdata:  c\n\n", &["a", "b", " c"]);
        check("data: two\ndata: lines\n\ndata:\n\n", &["two\nlines", ""]);
    }

    #[test]
    fn comments_other_fields_and_blank_lines_are_skipped() {
        check(": keep-alive\n\n\n\nevent: x\nid: 1\ndata: a\n: more\nretry: 5\n\ndatum: no\n\n", &["a"]);
    }

    #[test]
    fn a_last_event_needs_no_blank_line_but_a_whole_line() {
        check("data: a\n\ndata: [DONE]\n", &["a", "[DONE]"]);
        check("data: a\n\ndata: {\"cut", &["a"]);
    }

    #[test]
    fn endless_lines_and_wrong_bytes_are_errors() {
        let mut endless = EventStream::new(io::repeat(b'x'));
        assert_eq!(endless.next_data().unwrap_err().kind(), io::ErrorKind::InvalidData);
        let mut wrong = EventStream::new(&b"data: \xff\n\n"[..]);
        assert_eq!(wrong.next_data().unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}

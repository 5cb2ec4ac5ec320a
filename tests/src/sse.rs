//! Server-sent events as they arrive, strict about their form.

use std::io;
use std::net::SocketAddr;

use serde_json::Value;

use crate::http::{Exchange, Request};

/// One event or comment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The text after `data: `.
    Data(String),
    /// The text after the colon.
    Comment(String),
}

/// A stream of events that is being read.
pub struct EventStream {
    exchange: Exchange,
    /// Everything that arrived of the body.
    pub bytes: Vec<u8>,
    /// Bytes of `bytes` that were handed out as events.
    read: usize,
}

impl EventStream {
    /// Sends the request and expects a stream.
    ///
    /// # Errors
    /// Those of the socket.
    ///
    /// # Panics
    /// The answer is not an event stream.
    pub fn open(address: SocketAddr, request: &Request) -> io::Result<Self> {
        let exchange = Exchange::open(address, request)?;
        if exchange.status != 200 {
            let response = exchange.finish()?;
            panic!("status {} instead of a stream: {}", response.status, response.text());
        }
        assert_eq!(exchange.header("content-type"), Some("text/event-stream"));
        assert_eq!(exchange.header("cache-control"), Some("no-cache"));
        Ok(Self { exchange, bytes: Vec::new(), read: 0 })
    }

    /// The next event or comment; `None` when the body has ended.
    ///
    /// # Errors
    /// The connection breaks.
    ///
    /// # Panics
    /// An event is not one `data` line, or a character is split.
    pub fn next_event(&mut self) -> io::Result<Option<Event>> {
        loop {
            let rest = &self.bytes[self.read..];
            if let Some(end) = rest.windows(2).position(|pair| pair == b"\n\n") {
                let block = String::from_utf8(rest[..end].to_vec()).expect("an event is UTF-8 by itself");
                self.read += end + 2;
                return Ok(Some(parse(&block)));
            }
            match self.exchange.next_part()? {
                Some(part) => self.bytes.extend(part),
                None if rest.is_empty() => return Ok(None),
                None => panic!("the stream ends within an event: {:?}", String::from_utf8_lossy(rest)),
            }
        }
    }

    /// The next `data` as JSON; comments are passed over.
    ///
    /// # Panics
    /// The stream ends, or the data is not JSON.
    pub fn next_chunk(&mut self) -> Value {
        loop {
            match self.next_event().expect("the connection holds") {
                Some(Event::Comment(_)) => {}
                Some(Event::Data(data)) => return to_json(&data),
                None => panic!("the stream has ended"),
            }
        }
    }

    /// All events up to the end.
    ///
    /// # Panics
    /// The connection breaks.
    pub fn events(&mut self) -> Vec<Event> {
        std::iter::from_fn(|| self.next_event().expect("the connection holds")).collect()
    }

    /// The chunks up to `[DONE]`, which must come last and once; comments are passed over.
    ///
    /// # Panics
    /// The stream has another form.
    pub fn chunks(&mut self) -> Vec<Value> {
        let mut data: Vec<String> = self
            .events()
            .into_iter()
            .filter_map(|event| match event {
                Event::Data(data) => Some(data),
                Event::Comment(_) => None,
            })
            .collect();
        assert_eq!(data.pop().as_deref(), Some("[DONE]"), "the stream does not end in [DONE]");
        data.iter().map(|data| to_json(data)).collect()
    }
}

fn parse(block: &str) -> Event {
    assert!(!block.contains('\r'), "lines end in LF alone: {block:?}");
    assert!(!block.contains('\n'), "an event is one line: {block:?}");
    if let Some(data) = block.strip_prefix("data: ") {
        return Event::Data(data.to_owned());
    }
    match block.strip_prefix(':') {
        Some(comment) => Event::Comment(comment.trim().to_owned()),
        None => panic!("neither data nor a comment: {block:?}"),
    }
}

fn to_json(data: &str) -> Value {
    serde_json::from_str(data).unwrap_or_else(|error| panic!("not JSON ({error}): {data}"))
}

//! A server for tests that answers every request with what a closure says.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;

use serde_json::Value;

pub struct Request {
    pub path: String,
    /// Null where the request has none.
    pub body: Value,
    pub authorization: Option<String>,
}

pub struct Reply {
    pub status: u16,
    pub content_type: &'static str,
    /// Sent one chunk each.
    pub pieces: Vec<String>,
}

impl Reply {
    pub fn json(status: u16, body: Value) -> Self {
        Self { status, content_type: "application/json", pieces: vec![body.to_string()] }
    }

    /// An event per value, comments between them, each event cut in two, `[DONE]` last.
    pub fn events(events: &[Value]) -> Self {
        let mut pieces = Vec::new();
        for event in events.iter().map(Value::to_string) {
            let (head, tail) = event.split_at(event.len() / 2);
            pieces.extend([format!(": keep-alive\n\ndata: {head}"), format!("{tail}\n\n")]);
        }
        pieces.push("data: [DONE]\n\n".to_owned());
        Self { status: 200, content_type: "text/event-stream", pieces }
    }
}

/// Serves until the process ends; gives the address.
pub fn start(answer: impl Fn(Request) -> Reply + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let answer = Arc::new(answer);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (stream, answer) = (stream.unwrap(), Arc::clone(&answer));
            // Pieces go out as they are, not when the client acknowledged the last.
            stream.set_nodelay(true).unwrap();
            std::thread::spawn(move || while_open(stream, &*answer));
        }
    });
    address
}

fn while_open(stream: TcpStream, answer: &dyn Fn(Request) -> Reply) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    while let Some(request) = read_request(&mut reader) {
        if write_reply(&stream, &answer(request)).is_err() {
            return;
        }
    }
}

fn read_request(reader: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|num_bytes| *num_bytes > 0)?;
    let path = line.split(' ').nth(1)?.to_owned();
    let (mut num_bytes, mut authorization) = (0, None);
    loop {
        line.clear();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => num_bytes = value.parse().ok()?,
            "authorization" => authorization = Some(value.to_owned()),
            _ => {}
        }
    }
    let mut body = vec![0; num_bytes];
    reader.read_exact(&mut body).ok()?;
    Some(Request { path, body: serde_json::from_slice(&body).unwrap_or_default(), authorization })
}

fn write_reply(mut stream: &TcpStream, reply: &Reply) -> std::io::Result<()> {
    let (status, content_type) = (reply.status, reply.content_type);
    write!(stream, "HTTP/1.1 {status} X\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n")?;
    for piece in &reply.pieces {
        write!(stream, "{:x}\r\n{piece}\r\n", piece.len())?;
    }
    stream.write_all(b"0\r\n\r\n")
}

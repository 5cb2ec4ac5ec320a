//! HTTP/1.1 over a plain socket: what is sent and received is seen byte for byte.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use serde_json::Value;

use crate::PATIENCE;

/// Most bytes of a line of a response's head.
const MAX_LINE_BYTES: u64 = 64 << 10;

/// A request, written as it stands.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Request {
    pub fn new(method: &str, path: &str) -> Self {
        Self { method: method.to_owned(), path: path.to_owned(), headers: Vec::new(), body: Vec::new() }
    }

    pub fn get(path: &str) -> Self {
        Self::new("GET", path)
    }

    /// A JSON body.
    pub fn post(path: &str, body: &Value) -> Self {
        Self::new("POST", path).header("Content-Type", "application/json").body(body.to_string())
    }

    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    #[must_use]
    pub fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    /// The bytes on the wire. A `Content-Length` is added where there is a body and no header frames it.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut head = format!("{} {} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n", self.method, self.path);
        for (name, value) in &self.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        let frames = |name: &str| ["content-length", "transfer-encoding"].contains(&name.to_ascii_lowercase().as_str());
        let is_framed = self.headers.iter().any(|(name, _)| frames(name));
        if !self.body.is_empty() && !is_framed {
            head.push_str(&format!("Content-Length: {}\r\n", self.body.len()));
        }
        head.push_str("\r\n");
        [head.as_bytes(), &self.body].concat()
    }

    /// Connects and writes the request; the answer is not read.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn write(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        stream.write_all(&self.to_bytes())?;
        Ok(stream)
    }
}

/// A whole answer.
#[derive(Clone, Debug)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        find_header(&self.headers, name)
    }

    /// # Panics
    /// The body is not UTF-8.
    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).expect("the body is UTF-8")
    }

    /// # Panics
    /// The body is not JSON.
    pub fn json(&self) -> Value {
        let parsed = serde_json::from_slice(&self.body);
        parsed.unwrap_or_else(|error| panic!("not JSON ({error}): {}", String::from_utf8_lossy(&self.body)))
    }
}

/// How the end of a body is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    Chunked,
    /// Bytes left.
    Length(usize),
    UntilClose,
    Done,
}

/// An answer whose head has arrived and whose body is being read.
pub struct Exchange {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    stream: BufReader<TcpStream>,
    framing: Framing,
}

impl Exchange {
    /// Connects, sends, and reads the head of the answer.
    ///
    /// # Errors
    /// Those of the socket, and a head that is not HTTP.
    pub fn open(address: SocketAddr, request: &Request) -> io::Result<Self> {
        Self::read_head(request.write(address)?)
    }

    /// Reads the head of the answer on a connection to which a request was written.
    ///
    /// # Errors
    /// Those of the socket, and a head that is not HTTP.
    pub fn read_head(stream: TcpStream) -> io::Result<Self> {
        let mut stream = BufReader::new(stream);
        let status_line = read_line(&mut stream)?;
        let status = status_line.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
        let status = status.ok_or_else(|| invalid(format!("not a status line: {status_line:?}")))?;
        let mut headers = Vec::new();
        loop {
            let line = read_line(&mut stream)?;
            if line.is_empty() {
                break;
            }
            let (name, value) = line.split_once(':').ok_or_else(|| invalid(format!("not a header: {line:?}")))?;
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        let framing = match (find_header(&headers, "transfer-encoding"), find_header(&headers, "content-length")) {
            (Some(coding), _) if coding.eq_ignore_ascii_case("chunked") => Framing::Chunked,
            (_, Some(length)) => Framing::Length(length.parse().map_err(|_| invalid(format!("bad length {length}")))?),
            _ => Framing::UntilClose,
        };
        Ok(Self { status, headers, stream, framing })
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        find_header(&self.headers, name)
    }

    /// The next part of the body as the server sent it; `None` at the end.
    ///
    /// # Errors
    /// Those of the socket, and a connection that closes before the body's end.
    pub fn next_part(&mut self) -> io::Result<Option<Vec<u8>>> {
        match self.framing {
            Framing::Done => Ok(None),
            Framing::Chunked => {
                let line = read_line(&mut self.stream)?;
                let size =
                    usize::from_str_radix(&line, 16).map_err(|_| invalid(format!("not a chunk size: {line:?}")))?;
                let mut part = vec![0; size];
                self.stream.read_exact(&mut part)?;
                if !read_line(&mut self.stream)?.is_empty() {
                    return Err(invalid("a chunk does not end in a line end".to_owned()));
                }
                if size == 0 {
                    self.framing = Framing::Done;
                    return Ok(None);
                }
                Ok(Some(part))
            }
            Framing::Length(length) => {
                let mut part = vec![0; length];
                self.stream.read_exact(&mut part)?;
                self.framing = Framing::Done;
                Ok(Some(part))
            }
            Framing::UntilClose => {
                let mut part = Vec::new();
                self.stream.read_to_end(&mut part)?;
                self.framing = Framing::Done;
                Ok(Some(part))
            }
        }
    }

    /// Reads the rest of the body.
    ///
    /// # Errors
    /// As [`Self::next_part`].
    pub fn finish(mut self) -> io::Result<Response> {
        let mut body = Vec::new();
        while let Some(part) = self.next_part()? {
            body.extend(part);
        }
        Ok(Response { status: self.status, headers: self.headers, body })
    }
}

fn find_header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
}

/// A line without its CR LF.
fn read_line(stream: &mut BufReader<TcpStream>) -> io::Result<String> {
    let mut line = String::new();
    stream.by_ref().take(MAX_LINE_BYTES).read_line(&mut line)?;
    match line.strip_suffix("\r\n") {
        Some(text) => Ok(text.to_owned()),
        None => Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("the connection closed within {line:?}"))),
    }
}

fn invalid(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

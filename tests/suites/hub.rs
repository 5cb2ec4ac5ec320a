//! A hub id from the command line to answers: downloaded over a connection that breaks, then served without any network.

use std::io::{self, BufRead as _, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use harness::server::command;
use harness::{Folder, PATIENCE, Server, golden};
use serde_json::{Value, json};

const SERVER: &str = env!("CARGO_BIN_EXE_moesaic-under-test");
const REPO: &str = "org/tiny";
const COMMIT: &str = "89abcdef0123456789abcdef0123456789abcdef";
const WEIGHTS: &str = "model.safetensors";
/// Variables of the test's own environment that would change where the server looks.
const OTHER_VARIABLES: [&str; 10] = [
    "HF_TOKEN",
    "HF_TOKEN_PATH",
    "HF_HUB_OFFLINE",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "HUGGINGFACE_HUB_CACHE",
];

/// A server of the hub's shape over the files of a folder. It breaks the first connection that fetches the weights, half
/// way through them.
struct Hub {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Request {
    method: String,
    path: String,
    /// First byte of a `Range`.
    start: Option<usize>,
}

impl Hub {
    fn start(folder: PathBuf) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("a bound socket has an address");
        let requests = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&requests);
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.expect("the listener holds");
                stream.set_read_timeout(Some(PATIENCE)).expect("the time is not zero");
                let Some(request) = read_request(&stream) else { return };
                let is_first_fetch =
                    !log.lock().expect("nobody panics with the log").iter().any(|known| is_fetch(known, WEIGHTS));
                log.lock().expect("nobody panics with the log").push(request.clone());
                // A client that hangs up makes itself heard in the test that expects its answer.
                drop(answer(&stream, &request, &folder, is_first_fetch));
            }
        });
        Self { address, requests, thread: Some(thread) }
    }

    /// The starts of the fetches of `file`, in order.
    fn fetches(&self, file: &str) -> Vec<Option<usize>> {
        self.requests
            .lock()
            .expect("nobody panics with the log")
            .iter()
            .filter(|known| is_fetch(known, file))
            .map(|known| known.start)
            .collect()
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        // A connection without a request ends the thread.
        drop(TcpStream::connect(self.address));
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the server does not panic");
        }
    }
}

fn is_fetch(request: &Request, file: &str) -> bool {
    request.method == "GET" && request.path.ends_with(&format!("/{file}"))
}

fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let first = lines.next()?;
    let mut words = first.split(' ').map(str::to_owned);
    let mut request = Request { method: words.next()?, path: words.next()?, start: None };
    for line in lines.take_while(|line| !line.is_empty()) {
        if let Some(range) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
            request.start = range.strip_suffix('-')?.parse().ok();
        }
    }
    Some(request)
}

fn answer(mut stream: &TcpStream, request: &Request, folder: &Path, breaks: bool) -> io::Result<()> {
    let mut reply = |status: &str, headers: &str, num_bytes: usize, body: &[u8]| {
        write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {num_bytes}\r\n{headers}\r\n")?;
        stream.write_all(body)
    };
    if request.path == format!("/api/models/{REPO}/revision/main") {
        let names = std::fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        let names: Vec<String> = names.collect::<io::Result<_>>()?;
        let siblings: Vec<Value> = names.iter().map(|name| json!({ "rfilename": name })).collect();
        let body = json!({"sha": COMMIT, "siblings": siblings}).to_string();
        return reply("200 OK", "", body.len(), body.as_bytes());
    }
    let Some(file) = request.path.strip_prefix(&format!("/{REPO}/resolve/{COMMIT}/")) else {
        return reply("404 Not Found", "", 0, b"");
    };
    let bytes = std::fs::read(folder.join(file))?;
    let etag = format!("ETag: \"{}\"\r\n", file.replace('.', "-"));
    if request.method == "HEAD" {
        return reply("200 OK", &etag, bytes.len(), b"");
    }
    if file == WEIGHTS && breaks {
        return reply("200 OK", &etag, bytes.len(), &bytes[..bytes.len() / 2]);
    }
    match request.start {
        None => reply("200 OK", &etag, bytes.len(), &bytes),
        Some(start) => {
            let range = format!("{etag}Content-Range: bytes {start}-{}/{}\r\n", bytes.len() - 1, bytes.len());
            reply("206 Partial Content", &range, bytes.len() - start, &bytes[start..])
        }
    }
}

fn serve(cache: &Folder, hub: SocketAddr) -> Command {
    let mut command = command(SERVER, Path::new(REPO), &["--revision", "main"]);
    for name in OTHER_VARIABLES {
        command.env_remove(name);
    }
    command.env("HF_HOME", cache.arg()).env("HF_HUB_CACHE", cache.join("hub"));
    command.env("HF_ENDPOINT", format!("http://{hub}"));
    command
}

#[test]
fn a_hub_id_is_served_over_a_broken_connection_and_later_without_any() {
    let folder = golden::folder("mixtral-base");
    let cache = Folder::new("hub");
    let hub = Hub::start(folder.clone());
    let address = hub.address;
    let question =
        json!({"model": REPO, "prompt": [70, 73, 71], "max_tokens": 8, "temperature": 0, "ignore_eos": true});

    let online = Server::start_command(&mut serve(&cache, address));
    let answer = online.ask("/v1/completions", &question);
    assert_eq!(answer["model"], REPO);
    let weights = std::fs::read(folder.join(WEIGHTS)).unwrap();
    assert_eq!(hub.fetches(WEIGHTS), [None, Some(weights.len() / 2)], "the second fetch goes on where the first broke");
    let repo = cache.join("hub/models--org--tiny");
    assert_eq!(std::fs::read_to_string(repo.join("refs/main")).unwrap(), COMMIT);
    assert_eq!(std::fs::read(repo.join("snapshots").join(COMMIT).join(WEIGHTS)).unwrap(), weights);
    assert_eq!(hub.fetches("reference.json"), [], "only what serving needs is fetched");
    drop(online);

    drop(hub);
    let offline = Server::start_command(serve(&cache, address).env("HF_HUB_OFFLINE", "1"));
    let again = offline.ask("/v1/completions", &question);
    assert_eq!(again["choices"], answer["choices"]);
}

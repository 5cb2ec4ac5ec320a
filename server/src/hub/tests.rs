//! Downloads from a local server of the hub's shape that cuts, lies and refuses.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use indicatif::ProgressDrawTarget;
use sha2::{Digest, Sha256};

use super::*;
use crate::checksum::hex_digest;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const REPO: &str = "org/tiny-moe";

/// What the server does wrong with the bytes of one file.
#[derive(Clone, Copy, Debug, Default)]
struct Faults {
    /// Cut every body after this many bytes.
    cut_after: Option<usize>,
    /// Answer the first this many requests for bytes with 503.
    num_busy: usize,
    /// Claim this size in answers to HEAD.
    claimed_size: Option<usize>,
    /// Give the bytes one bit wrong this many times.
    num_corrupt: usize,
    /// Ignore `Range`.
    no_ranges: bool,
    /// Answer HEAD with 405.
    no_head: bool,
}

#[derive(Clone, Debug, Default)]
struct Contents {
    files: BTreeMap<String, Vec<u8>>,
    faults: BTreeMap<String, Faults>,
    token: Option<String>,
    num_tokens: usize,
    /// Everything is answered with 503.
    is_down: bool,
    /// Large files are on another host, as they are with the hub.
    redirect_weights_to: Option<String>,
}

/// A hub on a port of its own. Requests are logged as `METHOD path range`.
struct FakeHub {
    endpoint: String,
    contents: Arc<Mutex<Contents>>,
    log: Arc<Mutex<Vec<String>>>,
    thread: Option<JoinHandle<()>>,
}

struct Request {
    method: String,
    path: String,
    range_start: Option<usize>,
    token: Option<String>,
}

impl FakeHub {
    fn start(contents: Contents) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let contents = Arc::new(Mutex::new(contents));
        let log = Arc::new(Mutex::new(Vec::new()));
        let (served, logged) = (Arc::clone(&contents), Arc::clone(&log));
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let Some(request) = read_request(&stream) else { return };
                logged.lock().unwrap().push(format!(
                    "{} {}{}",
                    request.method,
                    request.path,
                    request.range_start.map_or(String::new(), |start| format!(" {start}-"))
                ));
                // A client that hung up is not this server's problem.
                let _ = answer(&mut stream, &request, &mut served.lock().unwrap());
            }
        });
        Self { endpoint, contents, log, thread: Some(thread) }
    }

    /// Requests that carried a token.
    fn num_tokens(&self) -> usize {
        self.contents.lock().unwrap().num_tokens
    }

    fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    fn set_faults(&self, file: &str, faults: Faults) {
        self.contents.lock().unwrap().faults.insert(file.into(), faults);
    }
}

impl Drop for FakeHub {
    fn drop(&mut self) {
        // An empty request ends the thread.
        drop(TcpStream::connect(self.endpoint.trim_start_matches("http://")));
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next()?.ok()?;
    let mut words = first.split(' ');
    let mut request =
        Request { method: words.next()?.into(), path: words.next()?.into(), range_start: None, token: None };
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ")?;
        match name.to_lowercase().as_str() {
            "range" => request.range_start = value.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok(),
            "authorization" => request.token = value.strip_prefix("Bearer ").map(str::to_owned),
            _ => {}
        }
    }
    Some(request)
}

fn answer(stream: &mut TcpStream, request: &Request, contents: &mut Contents) -> std::io::Result<()> {
    let mut reply = |status: &str, headers: &str, body: &[u8]| {
        write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\n{headers}\r\n")?;
        stream.write_all(body)
    };
    if contents.is_down {
        return reply("503 Service Unavailable", "Content-Length: 0\r\n", b"");
    }
    contents.num_tokens += usize::from(request.token.is_some());
    if contents.token.is_some() && contents.token != request.token {
        return reply("401 Unauthorized", "Content-Length: 0\r\n", b"");
    }
    if let Some(revision) = request.path.strip_prefix(&format!("/api/models/{REPO}/revision/")) {
        if !["main", "v1", COMMIT].contains(&revision) {
            return reply("404 Not Found", "Content-Length: 0\r\n", b"");
        }
        let siblings: Vec<_> = contents.files.keys().map(|file| serde_json::json!({ "rfilename": file })).collect();
        let body = serde_json::json!({ "sha": COMMIT, "siblings": siblings }).to_string();
        return reply("200 OK", &format!("Content-Length: {}\r\n", body.len()), body.as_bytes());
    }
    let found = request.path.strip_prefix(&format!("/{REPO}/resolve/{COMMIT}/"));
    let Some((file, bytes)) = found.and_then(|file| Some((file, contents.files.get(file)?))) else {
        return reply("404 Not Found", "Content-Length: 0\r\n", b"");
    };
    let faults = contents.faults.entry(file.to_owned()).or_default();
    let is_large = file.ends_with(".safetensors");
    let sha256 = hex_digest(Sha256::new_with_prefix(bytes));
    let identity = match is_large {
        true => {
            let size = faults.claimed_size.unwrap_or(bytes.len());
            format!("X-Linked-Etag: \"{sha256}\"\r\nX-Linked-Size: {size}\r\n")
        }
        false => format!("ETag: W/\"{}\"\r\n", &sha256[..40]),
    };
    if request.method == "HEAD" && faults.no_head {
        return reply("405 Method Not Allowed", "Content-Length: 0\r\n", b"");
    }
    if let Some(host) = contents.redirect_weights_to.as_ref().filter(|_| is_large) {
        let headers = format!("{identity}Location: {host}{}\r\nContent-Length: 0\r\n", request.path);
        return reply("302 Found", &headers, b"");
    }
    if request.method == "HEAD" {
        return reply("200 OK", &format!("{identity}Content-Length: {}\r\n", bytes.len()), b"");
    }
    if faults.num_busy > 0 {
        faults.num_busy -= 1;
        return reply("503 Service Unavailable", "Content-Length: 0\r\n", b"");
    }
    let start = request.range_start.filter(|_| !faults.no_ranges).unwrap_or(0);
    if start > bytes.len() {
        return reply("416 Range Not Satisfiable", "Content-Length: 0\r\n", b"");
    }
    let mut body = bytes[start..].to_vec();
    if faults.num_corrupt > 0 {
        faults.num_corrupt -= 1;
        body[0] ^= 1;
    }
    let mut headers = format!("{identity}Content-Length: {}\r\n", body.len());
    if let Some(cut) = faults.cut_after {
        body.truncate(cut);
    }
    let status = if start > 0 { "206 Partial Content" } else { "200 OK" };
    if start > 0 {
        headers += &format!("Content-Range: bytes {start}-{}/{}\r\n", bytes.len() - 1, bytes.len());
    }
    reply(status, &headers, &body)
}

fn weights() -> Vec<u8> {
    (0..100_000u32).flat_map(|i| i.to_le_bytes()).collect()
}

/// A repository with one weight file and others that serving has no use for.
fn tiny_repo() -> Contents {
    let files = [
        ("config.json", b"{\"model_type\": \"mixtral\"}".to_vec()),
        ("tokenizer.json", b"{}".to_vec()),
        ("model.safetensors", weights()),
        ("pytorch_model.bin", vec![0; 100]),
        ("onnx/model.onnx", vec![0; 100]),
        ("README.md", b"# tiny".to_vec()),
    ];
    Contents { files: files.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect(), ..Contents::default() }
}

/// A cache folder, removed on drop.
struct Cache(PathBuf);

impl Cache {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("moesaic-hub-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        Self(dir)
    }

    fn options(&self, hub: &FakeHub) -> HubOptions {
        HubOptions {
            revision: None,
            cache_dir: Some(self.0.clone()),
            offline: false,
            token: None,
            endpoint: hub.endpoint.clone(),
            max_retries: 2,
            retry_delay: Duration::ZERO,
        }
    }

    fn incomplete_files(&self) -> usize {
        let blobs = self.0.join("models--org--tiny-moe/blobs");
        std::fs::read_dir(blobs).map_or(0, |entries| {
            entries
                .filter(|entry| entry.as_ref().unwrap().path().extension().is_some_and(|e| e == "incomplete"))
                .count()
        })
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn resolve_quietly(model: &str, options: &HubOptions) -> Result<PathBuf, HubError> {
    resolve(model, options, &MultiProgress::with_draw_target(ProgressDrawTarget::hidden()))
}

#[test]
fn a_model_lands_in_the_ordinary_cache_layout() {
    let (hub, cache) = (FakeHub::start(tiny_repo()), Cache::new("layout"));
    let snapshot = resolve_quietly(REPO, &cache.options(&hub)).unwrap();
    let folder = cache.0.join("models--org--tiny-moe");
    assert_eq!(snapshot, folder.join("snapshots").join(COMMIT));
    let mut names: Vec<_> =
        std::fs::read_dir(&snapshot).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json"]);
    let sha256 = hex_digest(Sha256::new_with_prefix(weights()));
    let link = std::fs::read_link(snapshot.join("model.safetensors")).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(sha256));
    assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), weights());
    assert_eq!(std::fs::read_to_string(folder.join("refs/main")).unwrap(), COMMIT);
    assert_eq!(cache.incomplete_files(), 0);

    // Again: one look-up, nothing fetched.
    let num_requests = hub.log().len();
    assert_eq!(resolve_quietly(REPO, &cache.options(&hub)).unwrap(), snapshot);
    assert_eq!(hub.log().len(), num_requests + 1);
}

#[test]
fn cut_connections_are_continued_where_they_ended() {
    let (hub, cache) = (FakeHub::start(tiny_repo()), Cache::new("cut"));
    hub.set_faults("model.safetensors", Faults { cut_after: Some(150_000), num_busy: 1, ..Faults::default() });
    let snapshot = resolve_quietly(REPO, &cache.options(&hub)).unwrap();
    assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), weights());
    let log = hub.log();
    let ranges: Vec<&str> = log
        .iter()
        .filter(|line| line.starts_with("GET") && line.contains("model.safetensors"))
        .map(|line| line.rsplit(' ').next().unwrap())
        .map(|last| if last.ends_with('-') { last } else { "" })
        .collect();
    assert_eq!(ranges, ["", "", "150000-", "300000-"]);
}

#[test]
fn an_interrupted_download_is_continued_by_the_next_run() {
    let (hub, cache) = (FakeHub::start(tiny_repo()), Cache::new("interrupted"));
    let once = HubOptions { max_retries: 0, ..cache.options(&hub) };
    hub.set_faults("model.safetensors", Faults { cut_after: Some(399_999), ..Faults::default() });
    resolve_quietly(REPO, &once).unwrap_err();
    assert_eq!(cache.incomplete_files(), 1);
    hub.set_faults("model.safetensors", Faults::default());
    let snapshot = resolve_quietly(REPO, &once).unwrap();
    assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), weights());
    assert!(hub.log().last().unwrap().ends_with(" 399999-"), "{:?}", hub.log());
}

#[test]
fn servers_without_ranges_or_head_are_served_from_too() {
    let (hub, cache) = (FakeHub::start(tiny_repo()), Cache::new("plain-server"));
    hub.set_faults("model.safetensors", Faults { cut_after: Some(10), ..Faults::default() });
    resolve_quietly(REPO, &HubOptions { max_retries: 0, ..cache.options(&hub) }).unwrap_err();
    hub.set_faults("model.safetensors", Faults { no_ranges: true, no_head: true, ..Faults::default() });
    let snapshot = resolve_quietly(REPO, &cache.options(&hub)).unwrap();
    assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), weights());
}

#[test]
fn wrong_bytes_never_reach_the_cache() {
    let cache = Cache::new("wrong");
    let hub = FakeHub::start(tiny_repo());
    hub.set_faults("model.safetensors", Faults { num_corrupt: 9, ..Faults::default() });
    let error = resolve_quietly(REPO, &cache.options(&hub)).unwrap_err();
    assert!(matches!(error, HubError::Checksum { .. }), "{error}");
    for claimed in [399_990, 400_010] {
        hub.set_faults("model.safetensors", Faults { claimed_size: Some(claimed), ..Faults::default() });
        let error = resolve_quietly(REPO, &cache.options(&hub)).unwrap_err();
        assert!(matches!(error, HubError::WrongSize { .. }), "{claimed}: {error}");
    }
    hub.set_faults("model.safetensors", Faults { num_corrupt: 1, ..Faults::default() });
    let snapshot = resolve_quietly(REPO, &cache.options(&hub)).unwrap();
    assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), weights());
}

#[test]
fn large_files_come_from_another_host_without_the_token() {
    let cdn = FakeHub::start(tiny_repo());
    let redirecting =
        Contents { redirect_weights_to: Some(cdn.endpoint.replace("127.0.0.1", "localhost")), ..tiny_repo() };
    let hub = FakeHub::start(Contents { token: Some("secret".into()), ..redirecting });
    let cache = Cache::new("redirect");
    let options = HubOptions { token: Some("secret".into()), ..cache.options(&hub) };
    cdn.set_faults("model.safetensors", Faults { cut_after: Some(150_000), ..Faults::default() });
    let snapshot = resolve_quietly(REPO, &options).unwrap();
    assert_eq!(std::fs::read(snapshot.join("model.safetensors")).unwrap(), weights());
    let ranges: Vec<bool> = cdn.log().iter().map(|line| line.ends_with("0000-")).collect();
    assert_eq!(ranges, [false, true, true], "{:?}", cdn.log());
    assert_eq!(cdn.num_tokens(), 0);
}

#[test]
fn refusals_say_what_to_do() {
    let hub = FakeHub::start(Contents { token: Some("secret".into()), ..tiny_repo() });
    let cache = Cache::new("refused");
    let error = resolve_quietly(REPO, &cache.options(&hub)).unwrap_err().to_string();
    assert!(error.contains("HTTP 401") && error.contains("set HF_TOKEN"), "{error}");
    let wrong = HubOptions { token: Some("wrong".into()), ..cache.options(&hub) };
    let error = resolve_quietly(REPO, &wrong).unwrap_err().to_string();
    assert!(error.contains("the token in HF_TOKEN gives no access") && !error.contains("wrong"), "{error}");
    let right = HubOptions { token: Some("secret".into()), ..cache.options(&hub) };
    let error = resolve_quietly("org/other", &right).unwrap_err().to_string();
    assert!(error.contains("no model org/other with a revision main"), "{error}");
    let error = resolve_quietly(REPO, &HubOptions { revision: Some("v9".into()), ..right.clone() }).unwrap_err();
    assert!(matches!(error, HubError::NotFound { .. }), "{error}");
    resolve_quietly(REPO, &HubOptions { revision: Some("v1".into()), ..right }).unwrap();
    assert!(cache.0.join("models--org--tiny-moe/refs/v1").is_file());
}

#[test]
fn offline_uses_the_cache_only() {
    let (hub, cache) = (FakeHub::start(tiny_repo()), Cache::new("offline"));
    let offline = HubOptions { offline: true, ..cache.options(&hub) };
    let error = resolve_quietly(REPO, &offline).unwrap_err();
    assert!(matches!(error, HubError::Offline { .. }), "{error}");
    assert!(hub.log().is_empty());
    let snapshot = resolve_quietly(REPO, &cache.options(&hub)).unwrap();
    let num_requests = hub.log().len();
    assert_eq!(resolve_quietly(REPO, &offline).unwrap(), snapshot);
    let pinned = HubOptions { revision: Some(COMMIT.into()), ..offline.clone() };
    assert_eq!(resolve_quietly(REPO, &pinned).unwrap(), snapshot);
    assert_eq!(hub.log().len(), num_requests);

    hub.contents.lock().unwrap().is_down = true;
    assert_eq!(resolve_quietly(REPO, &cache.options(&hub)).unwrap(), snapshot);
    let error = resolve_quietly(REPO, &Cache::new("down").options(&hub)).unwrap_err();
    assert!(matches!(error, HubError::Status { status: 503, .. }), "{error}");

    // A hub that cannot be reached is no reason to stop where the model is cached.
    let endpoint = hub.endpoint.clone();
    drop(hub);
    let gone = HubOptions { offline: false, endpoint, ..offline.clone() };
    assert_eq!(resolve_quietly(REPO, &gone).unwrap(), snapshot);

    std::fs::remove_file(snapshot.join("model.safetensors")).unwrap();
    let error = resolve_quietly(REPO, &offline).unwrap_err();
    assert!(matches!(error, HubError::OfflineIncomplete { .. }), "{error}");
    let error = resolve_quietly(REPO, &gone).unwrap_err();
    assert!(matches!(error, HubError::Transport { .. }), "{error}");
}

#[test]
fn an_index_chooses_the_shards() {
    let mut contents = tiny_repo();
    let index = serde_json::json!({ "weight_map": { "a": "part-1.safetensors", "b": "part-2.safetensors" } });
    contents.files.insert("model.safetensors.index.json".into(), index.to_string().into_bytes());
    contents.files.insert("part-1.safetensors".into(), vec![1; 10]);
    contents.files.insert("part-2.safetensors".into(), vec![2; 10]);
    contents.files.insert("consolidated.safetensors".into(), vec![3; 10]);
    let (hub, cache) = (FakeHub::start(contents), Cache::new("index"));
    let snapshot = resolve_quietly(REPO, &cache.options(&hub)).unwrap();
    assert!(snapshot.join("part-1.safetensors").is_file() && snapshot.join("part-2.safetensors").is_file());
    assert!(!snapshot.join("model.safetensors").exists() && !snapshot.join("consolidated.safetensors").exists());

    let evil = serde_json::json!({ "weight_map": { "a": "../../../evil.safetensors" } }).to_string().into_bytes();
    hub.contents.lock().unwrap().files.insert("model.safetensors.index.json".into(), evil);
    let other = Cache::new("evil-index");
    let error = resolve_quietly(REPO, &other.options(&hub)).unwrap_err();
    assert!(error.to_string().contains("not the name of a safetensors file"), "{error}");
}

#[test]
fn repositories_without_safetensors_are_refused() {
    let cache = Cache::new("gguf-only");
    for (missing, expected) in [("config.json", "no config.json"), ("model.safetensors", "no model.safetensors")] {
        let mut contents = tiny_repo();
        contents.files.remove(missing);
        let hub = FakeHub::start(contents);
        let error = resolve_quietly(REPO, &cache.options(&hub)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn local_paths_come_first_and_nonsense_is_refused() {
    let (hub, cache) = (FakeHub::start(Contents::default()), Cache::new("paths"));
    let options = cache.options(&hub);
    std::fs::create_dir_all(&cache.0).unwrap();
    let folder = cache.0.to_str().unwrap();
    assert_eq!(resolve_quietly(folder, &options).unwrap(), cache.0);
    let gguf = cache.0.join("model.gguf");
    let file = cache.0.join("model.safetensors");
    for path in [&gguf, &file] {
        std::fs::write(path, "").unwrap();
    }
    assert_eq!(resolve_quietly(gguf.to_str().unwrap(), &options).unwrap(), gguf);
    assert!(matches!(resolve_quietly(file.to_str().unwrap(), &options), Err(HubError::NotAFolder { .. })));
    for model in ["./missing", "/missing", "~/missing", "a/b/c", "", "org/", "org/na me", "../x", "a--b/c", "org/..x"] {
        assert!(matches!(resolve_quietly(model, &options), Err(HubError::NotAModel { .. })), "{model}");
    }
    for revision in ["../x", "", "a//b", "a b"] {
        let options = HubOptions { revision: Some(revision.into()), ..options.clone() };
        assert!(matches!(resolve_quietly(REPO, &options), Err(HubError::InvalidRevision { .. })), "{revision}");
    }
    assert!(hub.log().is_empty());
}

#[test]
fn the_environment_means_what_it_means_to_the_python_tools() {
    let from = |vars: &'static [(&str, &str)]| {
        HubOptions::from_vars(|name| vars.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
    };
    let dir = |path: &str| Some(PathBuf::from(path));
    let plain = from(&[("HOME", "/home/u")]);
    assert_eq!(plain.cache_dir, dir("/home/u/.cache/huggingface/hub"));
    assert_eq!((plain.endpoint.as_str(), plain.offline), (DEFAULT_ENDPOINT, false));
    assert_eq!(from(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]).cache_dir, dir("/x/huggingface/hub"));
    assert_eq!(from(&[("HOME", "/h"), ("HF_HOME", "/hf")]).cache_dir, dir("/hf/hub"));
    assert_eq!(from(&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/c")]).cache_dir, dir("/c"));
    assert_eq!(from(&[]).cache_dir, None);
    for (value, offline) in [("1", true), ("true", true), ("YES", true), ("0", false), ("", false)] {
        let options = HubOptions::from_vars(|name| (name == "HF_HUB_OFFLINE").then(|| value.to_owned()));
        assert_eq!(options.offline, offline, "{value}");
    }
    assert_eq!(from(&[("HF_TOKEN", " t ")]).token.as_deref(), Some("t"));
    let home = Cache::new("token-file");
    std::fs::create_dir_all(&home.0).unwrap();
    std::fs::write(home.0.join("token"), "from-file\n").unwrap();
    let options = HubOptions::from_vars(|name| (name == "HF_HOME").then(|| home.0.to_str().unwrap().to_owned()));
    assert_eq!(options.token.as_deref(), Some("from-file"));
}

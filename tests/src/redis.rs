//! A real redis-server per test, on a free port and a socket, alone or as a cluster, and a client that sees its replies.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::process::Process;
use crate::{Folder, PATIENCE, poll};

/// Tries to find a port that nobody takes between looking and listening.
const MAX_STARTS: usize = 10;

/// A server, killed when dropped, stopped or not; its directory goes with it.
pub struct RedisServer {
    process: Process,
    /// Fields go in this order: the process before what it writes to.
    directory: Folder,
    address: SocketAddr,
    options: Vec<String>,
}

/// A reply as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Status(String),
    Error(String),
    Integer(i64),
    Bulk(Vec<u8>),
    Nil,
    Array(Vec<Reply>),
}

impl RedisServer {
    /// Starts one without persistence.
    ///
    /// # Panics
    /// There is no redis-server, or it does not answer.
    pub fn start() -> Self {
        Self::with_options(&[])
    }

    /// The same with `options` such as `["--maxmemory", "3mb"]`.
    ///
    /// # Panics
    /// There is no redis-server, or it does not answer.
    pub fn with_options(options: &[&str]) -> Self {
        let directory = Folder::new("redis");
        let options: Vec<_> = options.iter().map(|&option| option.to_owned()).collect();
        for _ in 0..MAX_STARTS {
            let address = free_address();
            if let Some(process) = launch(&directory, address, &options) {
                return Self { process, directory, address, options };
            }
        }
        panic!("redis-server does not start: is the Debian package redis-server installed?");
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self) -> String {
        format!("redis://{}/", self.address)
    }

    pub fn socket_url(&self) -> String {
        format!("unix://{}", self.directory.join("socket").display())
    }

    /// Sends a signal by name: `STOP`, `CONT`, `KILL`.
    pub fn signal(&self, name: &str) {
        self.process.signal(name);
    }

    /// Kills it where it stands.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Starts it again on its port, empty.
    ///
    /// # Panics
    /// It does not answer.
    pub fn restart(&mut self) {
        self.process =
            poll("redis-server again on its port", PATIENCE, || launch(&self.directory, self.address, &self.options));
    }

    /// Sends one command and reads its reply.
    ///
    /// # Panics
    /// The server does not answer.
    pub fn command<A: AsRef<[u8]>>(&self, parts: &[A]) -> Reply {
        request(self.address, parts).unwrap_or_else(|error| panic!("Redis at {}: {error}", self.address))
    }

    /// The string at `key`.
    ///
    /// # Panics
    /// There is none.
    pub fn bytes(&self, key: &str) -> Vec<u8> {
        match self.command(&["GET", key]) {
            Reply::Bulk(bytes) => bytes,
            other => panic!("{key}: {other:?}"),
        }
    }

    /// Puts a string under `key`, whatever was there.
    ///
    /// # Panics
    /// It is refused.
    pub fn set(&self, key: &str, bytes: &[u8]) {
        let reply = self.command(&[b"SET", key.as_bytes(), bytes]);
        assert_eq!(reply, Reply::Status("OK".to_owned()));
    }

    /// All keys, sorted.
    ///
    /// # Panics
    /// The server does not answer.
    pub fn keys(&self) -> Vec<String> {
        let Reply::Array(keys) = self.command(&["KEYS", "*"]) else { panic!("keys are an array") };
        let mut keys: Vec<_> = keys
            .into_iter()
            .map(|key| match key {
                Reply::Bulk(key) => String::from_utf8_lossy(&key).into_owned(),
                other => panic!("a key is a string: {other:?}"),
            })
            .collect();
        keys.sort();
        keys
    }

    /// The keys of values of one kind, `output`, `routing` or `kv`, once there are `count`: what is computed is written after it was
    /// answered.
    ///
    /// # Panics
    /// There are more, or fewer for too long.
    pub fn keys_of(&self, kind: &str, count: usize) -> Vec<String> {
        let part = format!(":{kind}:");
        poll("values in Redis", PATIENCE, || {
            let keys: Vec<String> = self.keys().into_iter().filter(|key| key.contains(&part)).collect();
            assert!(keys.len() <= count, "{count} were expected: {keys:?}");
            (keys.len() == count).then_some(keys)
        })
    }
}

/// Three masters that share the slots.
pub struct RedisCluster {
    pub nodes: Vec<RedisServer>,
}

impl RedisCluster {
    /// Starts them and waits until each knows all.
    ///
    /// # Panics
    /// They do not find each other.
    pub fn start() -> Self {
        Self::with_options(&[])
    }

    /// The same, each with `options`.
    ///
    /// # Panics
    /// They do not find each other.
    pub fn with_options(options: &[&str]) -> Self {
        let nodes: Vec<_> = (0..3)
            .map(|_| {
                // The default is the port plus 10000, which may be none.
                let bus = free_address().port().to_string();
                let own = ["--cluster-enabled", "yes", "--cluster-port", &bus, "--cluster-node-timeout", "1000"];
                RedisServer::with_options(&[&own, options].concat())
            })
            .collect();
        for (node, slots) in nodes.iter().zip([("0", "5460"), ("5461", "10922"), ("10923", "16383")]) {
            assert_eq!(node.command(&["CLUSTER", "ADDSLOTSRANGE", slots.0, slots.1]), Reply::Status("OK".to_owned()));
        }
        for node in &nodes[1..] {
            let (port, bus) = (node.address.port().to_string(), node.options[3].clone());
            let meet = ["CLUSTER", "MEET", "127.0.0.1", &port, &bus];
            assert_eq!(nodes[0].command(&meet), Reply::Status("OK".to_owned()));
        }
        let cluster = Self { nodes };
        cluster.wait_until_whole();
        cluster
    }

    /// Returns once every node sees every slot served.
    ///
    /// # Panics
    /// That takes too long.
    pub fn wait_until_whole(&self) {
        for node in &self.nodes {
            poll("a whole cluster", PATIENCE, || {
                let Ok(Reply::Bulk(info)) = request(node.address, &["CLUSTER", "INFO"]) else { return None };
                let info = String::from_utf8_lossy(&info).into_owned();
                let wanted = ["cluster_state:ok", "cluster_slots_ok:16384", "cluster_known_nodes:3"];
                wanted.iter().all(|line| info.contains(line)).then_some(())
            });
        }
    }

    pub fn url(&self) -> String {
        let nodes: Vec<_> = self.nodes.iter().map(|node| node.address.to_string()).collect();
        format!("redis+cluster://{}/", nodes.join(","))
    }
}

/// `None` if it ended before it answered: the port was taken.
fn launch(directory: &Path, address: SocketAddr, options: &[String]) -> Option<Process> {
    let mut command = Command::new("redis-server");
    command
        .current_dir(directory)
        .args(["--bind", "127.0.0.1", "--port", &address.port().to_string()])
        .args([
            "--unixsocket",
            "socket",
            "--save",
            "",
            "--appendonly",
            "no",
            "--daemonize",
            "no",
            "--loglevel",
            "warning",
        ])
        .args(options);
    let process = Process::spawn(&mut command);
    let is_up = poll("an answer of redis-server", PATIENCE, || {
        if process.has_ended() {
            return Some(false);
        }
        // With a password set, the answer is an error: it is up all the same.
        request(address, &["PING"]).is_ok().then_some(true)
    });
    is_up.then_some(process)
}

/// A port that the system does not hand out by itself: one that is killed finds its port free when it comes back, and meanwhile nobody
/// else answers on it.
pub fn free_address() -> SocketAddr {
    static NUM_TRIED: AtomicU32 = AtomicU32::new(0);
    // Below the range of `net.ipv4.ip_local_port_range`.
    const FIRST: u16 = 10_000;
    const COUNT: u32 = 22_000;
    // Processes that run at once start apart.
    let start = std::process::id().wrapping_mul(97);
    poll("a free port", PATIENCE, || {
        let number = start.wrapping_add(NUM_TRIED.fetch_add(1, Ordering::Relaxed)) % COUNT;
        let port = FIRST + u16::try_from(number).expect("there are fewer ports");
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        TcpListener::bind(address).is_ok().then_some(address)
    })
}

fn request<A: AsRef<[u8]>>(address: SocketAddr, parts: &[A]) -> std::io::Result<Reply> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut bytes = format!("*{}\r\n", parts.len()).into_bytes();
    for part in parts {
        let part = part.as_ref();
        bytes.extend(format!("${}\r\n", part.len()).into_bytes());
        bytes.extend(part);
        bytes.extend(b"\r\n");
    }
    stream.write_all(&bytes)?;
    read_reply(&mut BufReader::new(stream))
}

fn read_reply(stream: &mut BufReader<TcpStream>) -> std::io::Result<Reply> {
    let invalid = |_| std::io::Error::from(std::io::ErrorKind::InvalidData);
    let mut line = String::new();
    stream.read_line(&mut line)?;
    if line.len() < 3 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    let text = line[1..].trim_end();
    match line.as_bytes()[0] {
        b'+' => Ok(Reply::Status(text.to_owned())),
        b'-' => Ok(Reply::Error(text.to_owned())),
        b':' => Ok(Reply::Integer(text.parse().map_err(invalid)?)),
        b'$' if text == "-1" => Ok(Reply::Nil),
        b'$' => {
            let mut bytes = vec![0; text.parse::<usize>().map_err(invalid)? + 2];
            stream.read_exact(&mut bytes)?;
            bytes.truncate(bytes.len() - 2);
            Ok(Reply::Bulk(bytes))
        }
        b'*' => (0..text.parse::<usize>().map_err(invalid)?)
            .map(|_| read_reply(stream))
            .collect::<Result<_, _>>()
            .map(Reply::Array),
        _ => Err(std::io::ErrorKind::InvalidData.into()),
    }
}

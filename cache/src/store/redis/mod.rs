//! Values in Redis: shared by replicas, across restarts, behind a circuit breaker.
//!
//! | file | what is in it |
//! |---|---|
//! | `target` | which Redis an address means |
//! | `address` | what an address looks like, and what is wrong with one |
//! | `link` | the connection, made in the background |
//! | `failure` | what an error says about Redis, and to an operator |
//! | `gate` | the circuits: one for a server, one for each master of a cluster |
//! | `masters` | which master of a cluster serves which key |
//! | `many` | the commands of many values on the way together |
//! | `clear` | removing all keys of a prefix, in bounded steps |

mod address;
mod clear;
mod failure;
mod gate;
mod link;
mod many;
mod masters;
mod target;

use std::io::Write as _;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt as _};
use redis::{Cmd, RedisWrite as _, Value as Reply, cmd};
use tokio::time::Instant;

use self::gate::Gate;
use self::link::Link;
use self::target::Target;
use crate::breaker::BreakerConfig;
use crate::codec::{self, BadValue, HEADER_BYTES, Opened};
use crate::error::CacheError;
use crate::store::{Address, Found, Kind, Store, Tier, TierStats, Value, check_ttl};
use crate::telemetry::{self, Call, measured, measured_many};

/// Which Redis, and how it is used.
#[derive(Clone)]
pub struct RedisConfig {
    /// `redis://`, `rediss://` (TLS) or `unix://` as Redis's own tools write them, or some nodes of a cluster as
    /// `redis+cluster://[USER:PASSWORD@]HOST:PORT,…` (`rediss+cluster://` over TLS).
    pub url: String,
    /// Certificates, as PEM, of those who may vouch for a server over TLS; those that the system trusts where absent.
    pub ca: Option<Vec<u8>>,
    /// What keys start with: letters, digits, `-`, `_`, `.` and `:`, 1 to 64 of them. Keys are `PREFIX:KIND:HEX`.
    pub key_prefix: String,
    /// Of answers and profiles: what takes longer than a request may wait would only keep others from theirs.
    pub max_value_bytes: usize,
    /// Of KV blocks, which have a connection of their own.
    pub max_block_bytes: usize,
    pub breaker: BreakerConfig,
}

impl std::fmt::Debug for RedisConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The address may hold a password.
        f.debug_struct("RedisConfig").field("key_prefix", &self.key_prefix).finish_non_exhaustive()
    }
}

/// A tier in Redis. Down, slow, full or odd, it costs hits, and each call no more than its budget.
#[derive(Clone, Debug)]
pub struct RedisStore {
    gate: Arc<Gate>,
    /// KV blocks have a connection of their own, made at their first call: a look for an answer, which has little time, must not
    /// wait behind megabytes of them.
    bulk: Arc<Gate>,
    key_prefix: String,
    max_value_bytes: usize,
    max_block_bytes: usize,
}

const MAX_PREFIX_LEN: usize = 64;

impl RedisStore {
    /// Connects at the first call, not before: a Redis that is down does not keep a server from starting.
    ///
    /// # Errors
    /// The address, the prefix or the certificates cannot be meant.
    pub fn open(config: &RedisConfig) -> Result<Self, CacheError> {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.:".contains(c);
        let prefix = &config.key_prefix;
        if prefix.is_empty() || prefix.len() > MAX_PREFIX_LEN || !prefix.chars().all(is_plain) {
            return Err(CacheError::Prefix { prefix: prefix.clone(), max_len: MAX_PREFIX_LEN });
        }
        // Two providers may be linked one day; then rustls wants to be told. It was told already where this fails.
        drop(rustls::crypto::ring::default_provider().install_default());
        let target = Target::parse(&config.url, config.ca.as_deref())?;
        Ok(Self {
            gate: Arc::new(Gate::new(Link::new(target.clone()), config.breaker)),
            bulk: Arc::new(Gate::new(Link::new(target), config.breaker)),
            key_prefix: prefix.clone(),
            max_value_bytes: config.max_value_bytes,
            max_block_bytes: config.max_block_bytes,
        })
    }

    fn key(&self, address: &Address) -> String {
        format!("{}:{}:{}", self.key_prefix, address.kind.as_str(), address.key.to_hex())
    }

    fn gate_of(&self, kind: Kind) -> &Arc<Gate> {
        match kind {
            Kind::Output | Kind::Routing => &self.gate,
            Kind::Kv => &self.bulk,
        }
    }

    async fn find(&self, address: &Address, deadline: Instant) -> Result<Option<Found>, CacheError> {
        let gate = self.gate_of(address.kind);
        let reply = call(gate, &self.read(address), deadline).await?;
        let Some(bytes) = bytes_of(gate, reply)? else { return Ok(None) };
        Ok(self.take(address, codec::open(address, &bytes, SystemTime::now()), deadline).await)
    }

    async fn keep(&self, address: &Address, value: Value, deadline: Instant) -> Result<(), CacheError> {
        self.check_size(address.kind, &value)?;
        let gate = self.gate_of(address.kind);
        is_kept(gate, address, &value, call(gate, &self.write(address, &value), deadline).await?)
    }

    fn max_bytes(&self, kind: Kind) -> usize {
        match kind {
            Kind::Output | Kind::Routing => self.max_value_bytes,
            Kind::Kv => self.max_block_bytes,
        }
    }

    fn check_size(&self, kind: Kind, value: &Value) -> Result<(), CacheError> {
        check_ttl(value.ttl)?;
        let (bytes, limit) = (value.payload.len(), self.max_bytes(kind));
        if bytes > limit {
            return Err(CacheError::TooLarge { tier: Tier::Redis, bytes, limit });
        }
        Ok(())
    }

    async fn forget(&self, address: &Address, deadline: Instant) -> Result<(), CacheError> {
        call(self.gate_of(address.kind), &self.about("UNLINK", address), deadline).await.map(drop)
    }

    /// What was found, once it is opened; what is bad is counted and removed.
    async fn take(&self, address: &Address, opened: Result<Opened, BadValue>, deadline: Instant) -> Option<Found> {
        match opened {
            // Redis drops it by its own clock; by this one it is over already.
            Ok(opened) if opened.ttl.is_zero() => None,
            Ok(opened) => Some(Found { payload: opened.payload, tier: Tier::Redis, ttl: opened.ttl }),
            Err(bad) => {
                telemetry::bad_value(&bad, Tier::Redis, address.kind);
                if matches!(bad, BadValue::Key | BadValue::Kind { .. }) {
                    // Somebody copied it, or answers come one too late.
                    self.gate_of(address.kind).distrust();
                }
                // What cannot be removed stays a miss.
                drop(self.forget(address, deadline).await);
                None
            }
        }
    }

    fn about(&self, name: &str, address: &Address) -> Command {
        let (key, mut command) = (self.key(address), cmd(name));
        command.arg(&key);
        Command { key, command }
    }

    fn read(&self, address: &Address) -> Command {
        // Not GET: whatever was put under this key, no more of it is read than a value may have.
        let last = self.max_bytes(address.kind) + HEADER_BYTES;
        let mut read = self.about("GETRANGE", address);
        read.command.arg(0).arg(last);
        read
    }

    fn write(&self, address: &Address, value: &Value) -> Command {
        let header = codec::header(address, value, SystemTime::now());
        let millis = u64::try_from(value.ttl.as_millis()).expect("lifetimes have a limit");
        let mut write = self.about("SET", address);
        let mut sealed = write.command.writer_for_next_arg();
        let parts = [&header[..], &value.payload];
        parts.into_iter().try_for_each(|part| sealed.write_all(part)).expect("a command takes what is written to it");
        drop(sealed);
        write.command.arg("PX").arg(millis);
        write
    }
}

/// A command, and the key that says which node of a cluster it is for.
#[derive(Clone, Debug)]
struct Command {
    key: String,
    command: Cmd,
}

async fn call(gate: &Arc<Gate>, command: &Command, deadline: Instant) -> Result<Reply, CacheError> {
    let node = gate.node_of(&command.key);
    gate.call(&node, deadline, async |mut connection| connection.query(&command.command).await).await
}

fn bytes_of(gate: &Gate, reply: Reply) -> Result<Option<Bytes>, CacheError> {
    match reply {
        Reply::BulkString(bytes) if bytes.is_empty() => Ok(None),
        Reply::BulkString(bytes) => Ok(Some(Bytes::from(bytes))),
        Reply::Nil => Ok(None),
        _ => Err(unexpected(gate, "a bulk string")),
    }
}

fn is_kept(gate: &Gate, address: &Address, value: &Value, reply: Reply) -> Result<(), CacheError> {
    match reply {
        Reply::Okay => {
            telemetry::written(Tier::Redis, address.kind, value.payload.len());
            Ok(())
        }
        _ => Err(unexpected(gate, "OK")),
    }
}

fn unexpected(gate: &Gate, expected: &'static str) -> CacheError {
    gate.distrust();
    CacheError::Reply { expected }
}

impl Store for RedisStore {
    fn get<'a>(&'a self, address: &'a Address, deadline: Instant) -> BoxFuture<'a, Result<Option<Found>, CacheError>> {
        measured(Call::Get, Tier::Redis, address.kind, self.find(address, deadline)).boxed()
    }

    fn put<'a>(
        &'a self,
        address: &'a Address,
        value: Value,
        deadline: Instant,
    ) -> BoxFuture<'a, Result<(), CacheError>> {
        measured(Call::Put, Tier::Redis, address.kind, self.keep(address, value, deadline)).boxed()
    }

    fn remove<'a>(&'a self, address: &'a Address, deadline: Instant) -> BoxFuture<'a, Result<(), CacheError>> {
        self.forget(address, deadline).boxed()
    }

    fn contains_many<'a>(
        &'a self,
        addresses: &'a [Address],
        deadline: Instant,
    ) -> BoxFuture<'a, Result<Vec<bool>, CacheError>> {
        self.has_many(addresses, deadline).boxed()
    }

    fn get_many<'a>(
        &'a self,
        addresses: &'a [Address],
        deadline: Instant,
    ) -> BoxFuture<'a, Vec<Result<Option<Found>, CacheError>>> {
        let Some(first) = addresses.first() else { return async { vec![] }.boxed() };
        measured_many(Call::Get, Tier::Redis, first.kind, self.find_many(first.kind, addresses, deadline)).boxed()
    }

    fn put_many<'a>(
        &'a self,
        values: &'a [(Address, Value)],
        deadline: Instant,
    ) -> BoxFuture<'a, Vec<Result<(), CacheError>>> {
        let Some((first, _)) = values.first() else { return async { vec![] }.boxed() };
        measured_many(Call::Put, Tier::Redis, first.kind, self.keep_many(first.kind, values, deadline)).boxed()
    }

    fn clear(&self, kind: Option<Kind>, deadline: Instant) -> BoxFuture<'_, Result<(), CacheError>> {
        let pattern = match kind {
            Some(kind) => format!("{}:{}:*", self.key_prefix, kind.as_str()),
            None => format!("{}:*", self.key_prefix),
        };
        async move { clear::clear(&self.gate, &pattern, deadline).await }.boxed()
    }

    /// Of a cluster, whether a part of it answers.
    fn check(&self) -> BoxFuture<'_, ()> {
        self.gate.check().boxed()
    }

    /// Redis does not count keys by prefix: only whether it answers is known.
    fn stats(&self, deadline: Instant) -> BoxFuture<'_, Vec<TierStats>> {
        async move {
            let deadline = deadline.min(Instant::now() + Duration::from_secs(1));
            let is_available = !self.gate.is_open() && self.gate.greet(deadline).await.is_ok();
            vec![TierStats { tier: Tier::Redis, is_available, num_entries: None, bytes: None, max_bytes: None }]
        }
        .boxed()
    }

    fn stats_of(&self, kind: Kind, deadline: Instant) -> BoxFuture<'_, Vec<TierStats>> {
        async move {
            let is_open = self.gate_of(kind).is_open();
            let rows = self.stats(deadline).await.into_iter();
            rows.map(|row| TierStats { is_available: row.is_available && !is_open, ..row }).collect()
        }
        .boxed()
    }
}

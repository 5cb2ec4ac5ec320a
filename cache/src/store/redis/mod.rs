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
//! | `clear` | removing all keys of a prefix, in bounded steps |

mod address;
mod clear;
mod failure;
mod gate;
mod link;
mod masters;
mod target;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt as _};
use redis::{Cmd, Value as Reply, cmd};
use tokio::time::Instant;

use self::gate::Gate;
use self::link::Link;
use self::target::Target;
use crate::breaker::BreakerConfig;
use crate::codec::{self, BadValue, HEADER_BYTES};
use crate::error::CacheError;
use crate::store::{Address, Found, Kind, Store, Tier, TierStats, Value, check_ttl};
use crate::telemetry::{self, Call, measured};

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
    pub max_value_bytes: usize,
    pub breaker: BreakerConfig,
}

impl std::fmt::Debug for RedisConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The address may hold a password.
        f.debug_struct("RedisConfig").field("key_prefix", &self.key_prefix).finish_non_exhaustive()
    }
}

/// A tier in Redis. Down, slow, full or odd, it costs hits, and each call no more than its budget.
#[derive(Debug)]
pub struct RedisStore {
    gate: Arc<Gate>,
    key_prefix: String,
    max_value_bytes: usize,
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
            gate: Arc::new(Gate::new(Link::new(target), config.breaker)),
            key_prefix: prefix.clone(),
            max_value_bytes: config.max_value_bytes,
        })
    }

    fn key(&self, address: &Address) -> String {
        format!("{}:{}:{}", self.key_prefix, address.kind.as_str(), address.key.to_hex())
    }

    /// Runs a command whose first argument is `key`.
    async fn call(&self, key: &str, command: Cmd, deadline: Instant) -> Result<Reply, CacheError> {
        let node = self.gate.node_of(key);
        self.gate.call(&node, deadline, async |mut connection| connection.query(&command).await).await
    }

    async fn find(&self, address: &Address, deadline: Instant) -> Result<Option<Found>, CacheError> {
        // Not GET: whatever was put under this key, no more of it is read than a value may have.
        let last = self.max_value_bytes + HEADER_BYTES;
        let (key, mut command) = (self.key(address), cmd("GETRANGE"));
        command.arg(&key).arg(0).arg(last);
        let bytes = match self.call(&key, command, deadline).await? {
            Reply::BulkString(bytes) if bytes.is_empty() => return Ok(None),
            Reply::BulkString(bytes) => Bytes::from(bytes),
            Reply::Nil => return Ok(None),
            _ => return Err(self.unexpected("a bulk string")),
        };
        match codec::open(address, &bytes, SystemTime::now()) {
            // Redis drops it by its own clock; by this one it is over already.
            Ok(opened) if opened.ttl.is_zero() => Ok(None),
            Ok(opened) => Ok(Some(Found { payload: opened.payload, tier: Tier::Redis, ttl: opened.ttl })),
            Err(bad) => {
                telemetry::bad_value(&bad, Tier::Redis, address.kind);
                if matches!(bad, BadValue::Key | BadValue::Kind { .. }) {
                    // Somebody copied it, or answers come one too late.
                    self.gate.distrust();
                }
                // What cannot be removed stays a miss.
                drop(self.forget(address, deadline).await);
                Ok(None)
            }
        }
    }

    fn unexpected(&self, expected: &'static str) -> CacheError {
        self.gate.distrust();
        CacheError::Reply { expected }
    }

    async fn keep(&self, address: &Address, value: Value, deadline: Instant) -> Result<(), CacheError> {
        check_ttl(value.ttl)?;
        let (bytes, limit) = (value.payload.len(), self.max_value_bytes);
        if bytes > limit {
            return Err(CacheError::TooLarge { tier: Tier::Redis, bytes, limit });
        }
        let sealed = codec::seal(address, &value, SystemTime::now());
        let millis = u64::try_from(value.ttl.as_millis()).expect("lifetimes have a limit");
        let (key, mut command) = (self.key(address), cmd("SET"));
        command.arg(&key).arg(&sealed[..]).arg("PX").arg(millis);
        match self.call(&key, command, deadline).await? {
            Reply::Okay => Ok(()),
            _ => Err(self.unexpected("OK")),
        }
    }

    async fn forget(&self, address: &Address, deadline: Instant) -> Result<(), CacheError> {
        let (key, mut command) = (self.key(address), cmd("UNLINK"));
        command.arg(&key);
        self.call(&key, command, deadline).await.map(drop)
    }
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
}

//! One trait for every place that keeps values, and the places.
//!
//! | file | what it is |
//! |---|---|
//! | `memory` | a bounded map in this process |
//! | `disk` | files in a directory |
//! | `redis` | Redis, behind a circuit breaker |
//! | `tiered` | memory over the others |

mod disk;
mod memory;
mod redis;
mod tiered;

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use futures::future::{BoxFuture, FutureExt as _};
use futures::stream::{self, StreamExt as _};
use tokio::time::Instant;

use crate::error::CacheError;
use crate::key::{Fingerprint, Key};

pub use disk::{DiskConfig, DiskStore, MAX_CALLS as MAX_DISK_CALLS};
pub use memory::MemoryStore;
pub use redis::{RedisConfig, RedisStore};
pub use tiered::{TieredConfig, TieredStore};

/// Values of one call that a tier reads or writes at the same time.
const MAX_AT_ONCE: usize = 8;

/// Longest lifetime of a value.
pub const MAX_TTL: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// What a value is. Part of its address and of the labels of its metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// What the engine generated for a request.
    Output,
    /// Which experts a prompt took.
    Routing,
    /// Keys and values of a block of tokens.
    Kv,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::Output, Self::Routing, Self::Kv];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Output => "output",
            Self::Routing => "routing",
            Self::Kv => "kv",
        }
    }

    /// What the envelope holds.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Output => 1,
            Self::Routing => 2,
            Self::Kv => 3,
        }
    }
}

/// Where a value came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tier {
    Memory,
    Disk,
    Redis,
}

impl Tier {
    pub const ALL: [Self; 3] = [Self::Memory, Self::Disk, Self::Redis];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Disk => "disk",
            Self::Redis => "redis",
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Names one value. The fingerprint is what the reader insists on; whoever makes keys puts it into the key too, so that processes
/// with unlike numerics do not overwrite each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    pub kind: Kind,
    pub key: Key,
    pub fingerprint: Fingerprint,
}

/// A value to keep.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    pub payload: Bytes,
    /// Time it may live from now; between 1 ms and [`MAX_TTL`].
    pub ttl: Duration,
}

/// A value that was found: whole, of the right kind, key and fingerprint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub payload: Bytes,
    pub tier: Tier,
    /// What is left of its lifetime.
    pub ttl: Duration,
}

/// What a tier holds, as far as it knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TierStats {
    pub tier: Tier,
    /// It answers.
    pub is_available: bool,
    pub num_entries: Option<u64>,
    pub bytes: Option<u64>,
    pub max_bytes: Option<u64>,
}

/// A place that keeps values by address. Every call ends by its deadline, whatever the place does, and counts what came of it.
///
/// What a store gives back was checked by it: a value that is broken, of another format, or not the one that was stored under this
/// address is counted, removed, and a miss.
pub trait Store: fmt::Debug + Send + Sync + 'static {
    fn get<'a>(&'a self, address: &'a Address, deadline: Instant) -> BoxFuture<'a, Result<Option<Found>, CacheError>>;

    /// Keeps `value`, or as much of a promise as the place makes: any value may be gone at the next look.
    fn put<'a>(
        &'a self,
        address: &'a Address,
        value: Value,
        deadline: Instant,
    ) -> BoxFuture<'a, Result<(), CacheError>>;

    fn remove<'a>(&'a self, address: &'a Address, deadline: Instant) -> BoxFuture<'a, Result<(), CacheError>>;

    /// Which of `addresses` seem to be there, in their order. A hint: what is there may be bad, or gone at the next look.
    fn contains_many<'a>(
        &'a self,
        addresses: &'a [Address],
        deadline: Instant,
    ) -> BoxFuture<'a, Result<Vec<bool>, CacheError>> {
        async move {
            let found = self.get_many(addresses, deadline).await;
            found.into_iter().map(|found| Ok(found?.is_some())).collect()
        }
        .boxed()
    }

    /// What `get` says of each, in their order; each is late for itself. The caller bounds what all of them may take.
    fn get_many<'a>(
        &'a self,
        addresses: &'a [Address],
        deadline: Instant,
    ) -> BoxFuture<'a, Vec<Result<Option<Found>, CacheError>>> {
        let calls: Vec<_> = addresses.iter().map(|address| self.get(address, deadline)).collect();
        stream::iter(calls).buffered(MAX_AT_ONCE).collect().boxed()
    }

    /// What `put` says of each, in their order; each is late for itself. The values are of one kind.
    fn put_many<'a>(
        &'a self,
        values: &'a [(Address, Value)],
        deadline: Instant,
    ) -> BoxFuture<'a, Vec<Result<(), CacheError>>> {
        let calls: Vec<_> = values.iter().map(|(address, value)| self.put(address, value.clone(), deadline)).collect();
        stream::iter(calls).buffered(MAX_AT_ONCE).collect().boxed()
    }

    /// Removes every value of `kind`, or of all kinds. An error means that some may be left.
    fn clear(&self, kind: Option<Kind>, deadline: Instant) -> BoxFuture<'_, Result<(), CacheError>>;

    /// Looks once whether the tier can be used, and says in the log where it cannot. Ends within a second or two, whatever the
    /// place does.
    fn check(&self) -> BoxFuture<'_, ()>;

    /// One row per tier, fastest first; a tier that does not answer has no numbers.
    fn stats(&self, deadline: Instant) -> BoxFuture<'_, Vec<TierStats>>;

    /// The same, with the numbers of values of `kind` alone; without numbers where the tier cannot tell.
    fn stats_of(&self, kind: Kind, deadline: Instant) -> BoxFuture<'_, Vec<TierStats>>;
}

/// Refuses a lifetime that some tier could not express.
pub(crate) fn check_ttl(ttl: Duration) -> Result<(), CacheError> {
    if ttl < Duration::from_millis(1) || ttl > MAX_TTL {
        return Err(CacheError::Lifetime { ttl });
    }
    Ok(())
}

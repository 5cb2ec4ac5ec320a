//! What a tier can answer instead of a value.

use std::time::Duration;

use redis::RedisError;

use crate::store::Tier;

/// Why a tier did not do what it was asked. A caller treats each as a miss, or as a value that was not kept.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    #[error("{tier} did not answer in time")]
    Timeout { tier: Tier },
    #[error("value of {bytes} bytes, the limit of {tier} is {limit}")]
    TooLarge { tier: Tier, bytes: usize, limit: usize },
    #[error("the lifetime {ttl:?} is not between 1 ms and 10 years")]
    Lifetime { ttl: Duration },
    #[error("{tier} failed before and is left alone for now")]
    CircuitOpen { tier: Tier },
    #[error("disk: {0}")]
    Disk(#[from] std::io::Error),
    #[error("Redis: {0}")]
    Redis(#[from] RedisError),
    #[error("Redis answered something else than {expected}")]
    Reply { expected: &'static str },
    /// A folder that no cache can be in.
    #[error("{reason}")]
    Folder { reason: String },
    /// What is wrong with an address, with no more of it than scheme and host: it may hold a password.
    #[error("{reason}")]
    Url { reason: String },
    #[error("expected 1 to {max_len} of A-Z a-z 0-9 - _ . : such as `moesaic`, got {prefix:?}")]
    Prefix { prefix: String, max_len: usize },
    /// Certificates that cannot vouch for a server.
    #[error("{reason}")]
    Ca { reason: String },
}

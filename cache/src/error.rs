//! What a tier can answer instead of a value.

use std::time::Duration;

use crate::codec::BadValue;
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
    #[error("bad value: {0}")]
    BadValue(#[from] BadValue),
}

//! What outlives a request: values that other requests, other processes and later days may use again.
//!
//! | room | what is in it |
//! |---|---|
//! | `key` | content hashes: keys, the numerics fingerprint |
//! | `codec` | the envelope of values that leave the process, and what makes one foreign or broken |
//! | `recording` | what the engine gave for one choice, and its bytes |
//! | `store` | the one `Store` trait, and its tiers |
//! | `flight` | one computation, read by many |
//! | `kv_prefix` | KV blocks of prefixes: what is kept, how soon it could be here, loading it |
//! | `output` | the output cache: look up, join, or lead |
//! | `routing` | the routing cache: which experts the tokens of a block took |
//! | `breaker` | when to leave a place alone, and when to look again |
//! | `circuit` | calls to a slow tier behind a breaker, and the probe that heals it |
//! | `telemetry` | counters of every tier |
//!
//! A cache is never why a request fails: whatever goes wrong in here is a miss, and counted.
#![forbid(unsafe_code)]

mod breaker;
mod circuit;
pub mod codec;
mod error;
mod flight;
mod key;
mod kv_prefix;
mod output;
mod recording;
mod routing;
pub mod store;
mod telemetry;

pub use breaker::BreakerConfig;
pub use codec::BadValue;
pub use error::CacheError;
pub use flight::{Failure, FlightEvent, Follower};
pub use key::{Digest, Fingerprint, Key};
pub use kv_prefix::{BlockName, KvHint, KvPrefixCache, KvPrefixConfig};
pub use output::{Access, Leader, Lookup, OutputCache, OutputCacheConfig};
pub use recording::{End, PromptLogprob, Recording, Token};
pub use routing::{NO_EXPERT, Profile, RoutedLayer, RoutingCache, RoutingCacheConfig};
pub use telemetry::{SECONDS_BUCKETS, describe, observe};

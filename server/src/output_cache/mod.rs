//! Answers that were computed before, or are being computed for another request: found, joined, or led.
//!
//! `key` says which requests have one answer, `lead` computes it for all who read it.

pub mod fingerprint;
mod key;
mod lead;

use std::sync::Arc;
use std::time::Duration;

use axum::http::HeaderName;
use cache::{Access, End, Failure, Fingerprint, FlightEvent, Key, Lookup, OutputCacheConfig};
use engine::{Event, FinishReason, GenerationError, PromptLogprob, SampledToken};

use tokio::time::Instant;

pub use key::OutputKey;
pub use lead::{Computation, Scheduled};

/// What readers of an answer follow.
pub type Follower = cache::Follower<GenerationError>;
/// What a computation writes to.
pub type Leader = cache::Leader<GenerationError>;

/// The output cache of one model.
#[derive(Clone, Debug)]
pub struct OutputCache {
    cache: cache::OutputCache<GenerationError>,
    fingerprint: Fingerprint,
    /// Time that the tiers get to say what they hold.
    budget: Duration,
}

/// Where an answer came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// It was stored.
    Hit,
    /// Another request computed it at the same time.
    Shared,
    /// It was computed for this request.
    Miss,
}

/// Says on an answer where it came from; absent where the cache was not asked.
pub const ORIGIN_HEADER: HeaderName = HeaderName::from_static("x-moesaic-cache");

impl Origin {
    /// The value of [`ORIGIN_HEADER`].
    pub fn name(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Shared => "shared",
            Self::Miss => "miss",
        }
    }
}

/// What a look-up gives.
pub struct Found {
    pub follower: Follower,
    pub origin: Origin,
    /// What it is stored under.
    pub key: Key,
    /// Whoever asked is to compute the answer through it.
    pub leader: Option<Leader>,
}

impl OutputCache {
    pub fn new(store: Arc<dyn cache::store::Store>, config: OutputCacheConfig, budget: Duration) -> Self {
        Self { fingerprint: config.fingerprint, cache: cache::OutputCache::new(store, config), budget }
    }

    pub fn store(&self) -> &Arc<dyn cache::store::Store> {
        self.cache.store()
    }

    /// Answers that are being computed and that other requests may join.
    pub fn num_flights(&self) -> usize {
        self.cache.num_flights()
    }

    /// Sets the gauges of all tiers; takes the budget at most.
    pub async fn observe(&self) {
        cache::observe(&self.store().stats(Instant::now() + self.budget).await);
    }

    /// Removes every stored answer.
    ///
    /// # Errors
    /// A tier did not finish by the deadline: some may be left.
    pub async fn clear(&self, deadline: Instant) -> Result<(), cache::CacheError> {
        self.store().clear(None, deadline).await
    }

    /// Finds the answer, joins who computes it, or makes the caller lead, by the deadline.
    pub async fn open(&self, key: &OutputKey<'_>, access: Access, deadline: Instant) -> Found {
        let key = key.digest(&self.fingerprint);
        match self.cache.open(key, access, deadline).await {
            Lookup::Hit(recording) => {
                Found { follower: Follower::replay(recording), origin: Origin::Hit, key, leader: None }
            }
            Lookup::Join(follower) => Found { follower, origin: Origin::Shared, key, leader: None },
            Lookup::Lead { leader, follower } => Found { follower, origin: Origin::Miss, key, leader: Some(leader) },
        }
    }
}

impl OutputCache {
    /// Whether every one of these answers is still stored, as far as that is known by the deadline.
    pub async fn holds(&self, keys: &[Key], deadline: Instant) -> bool {
        for key in keys {
            if !self.cache.holds(*key, deadline).await {
                return false;
            }
        }
        true
    }
}

/// What a reader of a flight gets next, as the engine would have said it; `None` where whoever computed it is gone.
pub fn to_engine(event: FlightEvent<GenerationError>) -> Option<Event> {
    Some(match event {
        FlightEvent::Prompt(logprobs) => Event::PromptLogprobs(logprobs.iter().map(to_engine_prompt).collect()),
        FlightEvent::Token(cache::Token { token, logprob, top, is_stop }) => {
            Event::Token(SampledToken { token, logprob, top, routed_experts: Vec::new(), expert_use: None, is_stop })
        }
        FlightEvent::End(End::Stop(token)) => Event::Finished(FinishReason::Stop(token)),
        // Where a stop string ended it, the reader has found the same one before it reads the end.
        FlightEvent::End(End::Length | End::Text) => Event::Finished(FinishReason::Length),
        FlightEvent::Failed(Failure::Error(error)) => Event::Failed(error),
        FlightEvent::Failed(Failure::Gone) => return None,
    })
}

fn to_engine_prompt(logprob: &cache::PromptLogprob) -> PromptLogprob {
    let cache::PromptLogprob { token, logprob, top } = logprob.clone();
    PromptLogprob { token, logprob, top }
}

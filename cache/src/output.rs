//! The output cache: a request finds its answer, joins whoever computes it, or leads.

use std::collections::{HashMap, hash_map};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use crate::flight::{Failure, Follower, Outcome, Progress};
use crate::key::{Fingerprint, Key};
use crate::recording::{End, PromptLogprob, Recording, Token};
use crate::store::{Address, Kind, Store, Value};
use crate::telemetry;

/// Looks at the store per request: more than one only where a flight ended between a look and the next step, or its leader was
/// refused.
const MAX_LOOKS: usize = 4;

/// Counts of ended flights are kept by a byte of the key.
const NUM_STRIPES: usize = 256;

/// What an output cache is given besides its store.
#[derive(Clone, Copy, Debug)]
pub struct OutputCacheConfig {
    pub fingerprint: Fingerprint,
    /// Lifetime of a stored answer; between 1 ms and [`crate::store::MAX_TTL`].
    pub ttl: Duration,
    /// Time that storing an answer may take before its readers see the end. A tiered store needs none of it for slow tiers.
    pub write_budget: Duration,
}

/// What a request allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// It may be answered by what was stored, or by what another computes.
    pub read: bool,
    /// What it computes may be stored, and read by others meanwhile.
    pub write: bool,
}

/// What a request found.
#[derive(Debug)]
pub enum Lookup<E: Clone> {
    Hit(Arc<Recording>),
    /// Nobody has it: compute it through `leader`, which begins or is dropped at once, for others wait to hear which; this request
    /// reads `follower` like all others.
    Lead {
        leader: Leader<E>,
        follower: Follower<E>,
    },
    /// Another computes it right now.
    Join(Follower<E>),
}

/// Answers of deterministic requests. `E` is what a failed computation says to its readers. Cheap to clone.
#[derive(Debug)]
pub struct OutputCache<E> {
    inner: Arc<Inner<E>>,
}

#[derive(Debug)]
struct Inner<E> {
    store: Arc<dyn Store>,
    config: OutputCacheConfig,
    /// Only flights that may be joined. Whoever joins or takes a flight out holds the lock, so that none is joined in its last
    /// moment.
    flights: Mutex<HashMap<Key, Arc<watch::Sender<Progress<E>>>>>,
    /// Flights that have ended and stored, by stripe: a look that found nothing while one ended is worth another.
    num_ended: Box<[AtomicU64; NUM_STRIPES]>,
}

impl<E> Clone for OutputCache<E> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

impl<E: Clone> OutputCache<E> {
    /// `store` keeps its promise in time: `put` of a slow one belongs behind [`crate::store`]'s tiered one.
    pub fn new(store: Arc<dyn Store>, config: OutputCacheConfig) -> Self {
        let num_ended = Box::new([const { AtomicU64::new(0) }; NUM_STRIPES]);
        Self { inner: Arc::new(Inner { store, config, flights: Mutex::default(), num_ended }) }
    }

    pub fn store(&self) -> &Arc<dyn Store> {
        &self.inner.store
    }

    /// Flights that may be joined now.
    pub fn num_flights(&self) -> usize {
        self.inner.flights().len()
    }

    /// Finds the answer, whoever computes it, or that nobody does. Ends by `deadline` whatever the store does. `key` holds all that
    /// decides the answer, the fingerprint and the tenant's salt among it.
    pub async fn open(&self, key: Key, access: Access, deadline: Instant) -> Lookup<E> {
        let alone = || self.lead(Flight { key, progress: Arc::default(), is_shared: false, writes: access.write });
        if !access.read {
            return alone();
        }
        for _ in 0..MAX_LOOKS {
            let num_ended = self.inner.stripe(&key).load(Ordering::Acquire);
            let mut follower = self.inner.follow(&key);
            if follower.is_none() {
                if let Some(hit) = self.look(key, deadline).await {
                    return hit;
                }
                follower = self.inner.follow(&key);
            }
            if let Some(mut follower) = follower {
                // Whoever leads may be refused a place to compute, which says nothing about this request.
                if timeout_at(deadline, follower.is_led()).await == Ok(true) {
                    telemetry::joined(Kind::Output);
                    return Lookup::Join(follower);
                }
                continue;
            }
            if !access.write {
                return alone();
            }
            let mut flights = self.inner.flights();
            let has_changed = self.inner.stripe(&key).load(Ordering::Acquire) != num_ended && Instant::now() < deadline;
            match flights.entry(key) {
                hash_map::Entry::Vacant(place) if !has_changed => {
                    let progress = Arc::default();
                    place.insert(Arc::clone(&progress));
                    return self.lead(Flight { key, progress, is_shared: true, writes: true });
                }
                _ => {}
            }
        }
        // Flights end, or their leaders are refused, faster than this request looks: one more computation does no harm.
        alone()
    }

    /// Whether an answer is stored. Ends by `deadline`.
    pub async fn holds(&self, key: Key, deadline: Instant) -> bool {
        matches!(self.inner.store.get(&self.inner.address(key), deadline).await, Ok(Some(_)))
    }

    fn lead(&self, flight: Flight<E>) -> Lookup<E> {
        let follower = Follower::live(flight.progress.subscribe());
        Lookup::Lead { leader: Leader { cache: Arc::clone(&self.inner), flight, is_over: false }, follower }
    }

    async fn look(&self, key: Key, deadline: Instant) -> Option<Lookup<E>> {
        let address = self.inner.address(key);
        // An error was counted by the store, and is a miss.
        let found = self.inner.store.get(&address, deadline).await.ok()??;
        match Recording::decode(&found.payload) {
            Ok(recording) => Some(Lookup::Hit(Arc::new(recording))),
            Err(bad) => {
                telemetry::bad_value(&bad, found.tier, Kind::Output);
                // What cannot be removed stays a miss.
                drop(self.inner.store.remove(&address, deadline).await);
                None
            }
        }
    }
}

impl<E: Clone> Inner<E> {
    fn follow(&self, key: &Key) -> Option<Follower<E>> {
        self.flights().get(key).map(|flight| Follower::live(flight.subscribe()))
    }
}

impl<E> Inner<E> {
    fn flights(&self) -> MutexGuard<'_, HashMap<Key, Arc<watch::Sender<Progress<E>>>>> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stripe(&self, key: &Key) -> &AtomicU64 {
        &self.num_ended[usize::from(key.as_bytes()[0])]
    }

    fn address(&self, key: Key) -> Address {
        Address { kind: Kind::Output, key, fingerprint: self.config.fingerprint }
    }
}

#[derive(Debug)]
struct Flight<E> {
    key: Key,
    progress: Arc<watch::Sender<Progress<E>>>,
    /// It is in the map, where others join it.
    is_shared: bool,
    writes: bool,
}

/// The side of a flight that computes. One that is dropped before its end fails the flight and stores nothing.
#[derive(Debug)]
pub struct Leader<E> {
    cache: Arc<Inner<E>>,
    flight: Flight<E>,
    is_over: bool,
}

impl<E> Leader<E> {
    /// The computation is under way: others may join from now on.
    pub fn begin(&mut self) {
        self.flight.progress.send_modify(|progress| progress.is_under_way = true);
    }

    /// Log-probs of the prompt, before the first token.
    ///
    /// # Panics
    /// There are tokens already.
    pub fn push_prompt(&mut self, logprobs: impl Into<Arc<[PromptLogprob]>>) {
        let logprobs = logprobs.into();
        self.flight.progress.send_modify(|progress| {
            assert!(progress.tokens.is_empty(), "the prompt comes before the tokens");
            progress.prompt = Some(logprobs);
        });
    }

    pub fn push_token(&mut self, token: Token) {
        self.flight.progress.send_modify(|progress| progress.tokens.push(token));
    }

    /// Returns once no follower is left; from then on nobody can join, and whoever asks for the same leads anew. The caller drops
    /// the leader, and with it the computation.
    pub async fn abandoned(&self) {
        loop {
            self.flight.progress.closed().await;
            let mut flights = self.cache.flights();
            if self.flight.progress.receiver_count() == 0 {
                self.flight.leave(&mut flights);
                return;
            }
        }
    }

    /// Ends the flight. A request that is sent after a reader saw the end finds the answer stored.
    pub async fn finish(mut self, end: End) {
        let recording = {
            let progress = self.flight.progress.borrow();
            Recording { prompt_logprobs: progress.prompt.clone(), tokens: progress.tokens.clone(), end }
        };
        if self.flight.writes {
            let config = &self.cache.config;
            let value = Value { payload: recording.encode(), ttl: config.ttl };
            let deadline = Instant::now() + config.write_budget;
            let address = self.cache.address(self.flight.key);
            // An error was counted by the store; the readers have their answer all the same.
            drop(self.cache.store.put(&address, value, deadline).await);
            // Before the flight leaves the map: whoever looks and finds neither looks again.
            self.cache.stripe(&self.flight.key).fetch_add(1, Ordering::AcqRel);
        }
        self.end(Outcome::Ended(Arc::new(recording)));
    }

    /// Ends the flight without an answer; nothing is stored.
    pub fn fail(mut self, error: E) {
        self.end(Outcome::Failed(Failure::Error(error)));
    }

    fn end(&mut self, outcome: Outcome<E>) {
        self.is_over = true;
        self.flight.leave(&mut self.cache.flights());
        self.flight.progress.send_modify(|progress| {
            if matches!(outcome, Outcome::Ended(_)) {
                // The recording has them.
                progress.tokens = Vec::new();
            }
            progress.outcome = Some(outcome);
        });
    }
}

impl<E> Flight<E> {
    fn leave(&self, flights: &mut HashMap<Key, Arc<watch::Sender<Progress<E>>>>) {
        if self.is_shared && flights.get(&self.key).is_some_and(|flight| Arc::ptr_eq(flight, &self.progress)) {
            flights.remove(&self.key);
        }
    }
}

impl<E> Drop for Leader<E> {
    fn drop(&mut self) {
        if !self.is_over {
            self.end(Outcome::Failed(Failure::Gone));
        }
    }
}

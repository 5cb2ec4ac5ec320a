//! The circuit in front of a slow tier, or of a part of one: who may call, what a result says about its health, and the probe
//! that heals it.

use std::fmt::{self, Display};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::breaker::{Breaker, BreakerConfig, Change};
use crate::error::CacheError;
use crate::store::Tier;
use crate::telemetry::{self, Notice};

/// A call that had less time than this says nothing about the place when it runs out.
const FAIR_TIME: Duration = Duration::from_millis(10);

/// The reason where there is no other.
pub(crate) const NO_ANSWER: &str = "no answer in time";

/// What a result says about the place that gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It answered, be it with an error about this one call.
    Healthy,
    /// It answered that it will not do such things: full, read-only, forbidden.
    Refuses,
    /// It cannot be used.
    Sick,
}

/// What a circuit stands in front of. Its `Display` is its name in the log.
pub(crate) trait Place: Display + Send + Sync + 'static {
    type Error: Display + Into<CacheError> + Send;

    const TIER: Tier;

    fn judge(error: &Self::Error) -> Verdict;

    /// The circuit has opened: what still waits on the place may be let go.
    fn opened(&self) {}

    /// Whether it can be used, or why not. Ends within a few seconds by itself.
    fn answers(&self) -> BoxFuture<'_, Result<(), String>>;
}

/// A place, and the breaker in front of it.
pub(crate) struct Circuit<P: Place> {
    shared: Arc<Shared<P>>,
}

struct Shared<P: Place> {
    place: P,
    breaker: Mutex<Breaker>,
    refusals: Notice,
}

impl<P: Place> Circuit<P> {
    pub fn new(place: P, config: BreakerConfig) -> Self {
        telemetry::open_circuits(P::TIER, 0.0);
        let breaker = Mutex::new(Breaker::new(config));
        Self { shared: Arc::new(Shared { place, breaker, refusals: Notice::default() }) }
    }

    pub fn place(&self) -> &P {
        &self.shared.place
    }

    /// True while calls are not tried.
    pub fn is_open(&self) -> bool {
        self.shared.breaker().is_open()
    }

    /// Awaits `work` on the place, by `deadline` at the latest; at once an error while the circuit is open.
    pub async fn call<T>(
        &self,
        deadline: Instant,
        work: impl Future<Output = Result<T, P::Error>>,
    ) -> Result<T, CacheError> {
        if self.is_open() {
            return Err(CacheError::CircuitOpen { tier: P::TIER });
        }
        let start = Instant::now();
        let Ok(result) = timeout_at(deadline, work).await else {
            if deadline.saturating_duration_since(start) >= FAIR_TIME {
                self.failed(&NO_ANSWER);
            }
            return Err(CacheError::Timeout { tier: P::TIER });
        };
        match &result {
            Ok(_) => self.shared.breaker().succeeded(),
            Err(error) => match P::judge(error) {
                Verdict::Healthy => self.shared.breaker().succeeded(),
                Verdict::Refuses => {
                    self.shared.breaker().succeeded();
                    if self.shared.refusals.is_due() {
                        let place = self.place();
                        tracing::warn!(%error, "{place} refuses what the cache asks; requests go on without it");
                    }
                }
                Verdict::Sick => self.failed(error),
            },
        }
        result.map_err(Into::into)
    }

    /// Looks once whether the place can be used, and opens where it cannot.
    pub async fn check(&self) {
        if let Err(reason) = self.place().answers().await {
            let change = self.shared.breaker().trip(Instant::now());
            self.note(change, &reason);
        }
    }

    fn failed(&self, reason: &dyn Display) {
        let change = self.shared.breaker().failed(Instant::now());
        self.note(change, reason);
    }

    fn note(&self, change: Option<Change>, reason: &dyn Display) {
        if change == Some(Change::Opened) {
            let place = self.place();
            tracing::warn!(%reason, "{place} fails: the cache goes on without it and looks again now and then");
            telemetry::open_circuits(P::TIER, 1.0);
            place.opened();
            tokio::spawn(heal(Arc::downgrade(&self.shared)));
        }
    }
}

impl<P: Place> fmt::Debug for Circuit<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Circuit({}, {:?})", self.place(), self.shared.breaker())
    }
}

impl<P: Place> Shared<P> {
    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<P: Place> Drop for Shared<P> {
    fn drop(&mut self) {
        if self.breaker().is_open() {
            telemetry::open_circuits(P::TIER, -1.0);
        }
    }
}

/// Probes until the place answers; ends with it.
async fn heal<P: Place>(shared: Weak<Shared<P>>) {
    loop {
        let next_probe = shared.upgrade().and_then(|shared| shared.breaker().next_probe());
        let Some(next_probe) = next_probe else { return };
        sleep_until(next_probe).await;
        let Some(shared) = shared.upgrade() else { return };
        if !shared.breaker().start_probe(Instant::now()) {
            continue;
        }
        if shared.place.answers().await.is_err() {
            shared.breaker().probe_failed(Instant::now());
            continue;
        }
        if let Some(Change::Closed { after }) = shared.breaker().probe_succeeded(Instant::now()) {
            telemetry::open_circuits(P::TIER, -1.0);
            tracing::info!(?after, "{} answers again: the cache uses it", shared.place);
        }
        return;
    }
}

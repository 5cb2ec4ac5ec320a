//! Counters of every tier. Labels are kinds, tiers and reasons: fixed sets, nothing of a request.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

use crate::codec::BadValue;
use crate::error::CacheError;
use crate::store::{Found, Kind, Tier, TierStats};

/// Edges of the buckets of `moesaic_cache_seconds`: from a look into memory to a look that ran out of time.
pub const SECONDS_BUCKETS: &[f64] = &[
    0.000_001, 0.000_005, 0.000_02, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25,
    1.0,
];

/// What a store was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Get,
    Put,
}

/// What a call to a tier counts as.
pub(crate) trait Outcome {
    fn count(&self, kind: Kind, tier: Tier);
}

impl Outcome for Option<Found> {
    fn count(&self, kind: Kind, tier: Tier) {
        let name = if self.is_some() { "moesaic_cache_hits_total" } else { "moesaic_cache_misses_total" };
        counter!(name, "kind" => kind.as_str(), "tier" => tier.as_str()).increment(1);
        if let Some(found) = self {
            let bytes = found.payload.len() as u64;
            counter!("moesaic_cache_read_bytes_total", "kind" => kind.as_str(), "tier" => tier.as_str())
                .increment(bytes);
        }
    }
}

impl Outcome for () {
    fn count(&self, _: Kind, _: Tier) {}
}

/// Runs a call to a tier, counts what came of it and how long it took.
pub(crate) async fn measured<T: Outcome>(
    call: Call,
    tier: Tier,
    kind: Kind,
    work: impl Future<Output = Result<T, CacheError>>,
) -> Result<T, CacheError> {
    let start = Instant::now();
    let result = work.await;
    timed(call, tier, kind, start.elapsed());
    count(call, tier, kind, &result);
    result
}

/// The same for a call about many values of a kind: each is counted, the time is that of the call.
pub(crate) async fn measured_many<T: Outcome>(
    call: Call,
    tier: Tier,
    kind: Kind,
    work: impl Future<Output = Vec<Result<T, CacheError>>>,
) -> Vec<Result<T, CacheError>> {
    let start = Instant::now();
    let results = work.await;
    timed(call, tier, kind, start.elapsed());
    for result in &results {
        count(call, tier, kind, result);
    }
    results
}

fn timed(call: Call, tier: Tier, kind: Kind, elapsed: Duration) {
    if call == Call::Get {
        histogram!("moesaic_cache_seconds", "kind" => kind.as_str(), "tier" => tier.as_str()).record(elapsed);
    }
}

fn count<T: Outcome>(call: Call, tier: Tier, kind: Kind, result: &Result<T, CacheError>) {
    match result {
        Ok(outcome) => outcome.count(kind, tier),
        // Counted as errors when it opened; from then on it is as if there were no such tier.
        Err(CacheError::CircuitOpen { .. }) if call == Call::Get => None::<Found>.count(kind, tier),
        Err(CacheError::CircuitOpen { .. }) => dropped_write(kind),
        Err(error) => failed(error, tier, kind),
    }
}

/// Counts what a tier has taken in.
pub(crate) fn written(tier: Tier, kind: Kind, bytes: usize) {
    counter!("moesaic_cache_written_bytes_total", "kind" => kind.as_str(), "tier" => tier.as_str())
        .increment(bytes as u64);
}

/// Notes how long a request waited for blocks of its prefix.
pub(crate) fn loaded_blocks(elapsed: Duration) {
    histogram!("moesaic_kv_load_seconds").record(elapsed);
}

/// Counts an error. What was too large or lives too short was refused by rule, not by a fault of the tier.
fn failed(error: &CacheError, tier: Tier, kind: Kind) {
    let name = match error {
        CacheError::TooLarge { .. } | CacheError::Lifetime { .. } => "moesaic_cache_refused_total",
        CacheError::CircuitOpen { .. }
        | CacheError::Timeout { .. }
        | CacheError::Disk(_)
        | CacheError::Redis(_)
        | CacheError::Reply { .. }
        | CacheError::Folder { .. }
        | CacheError::Url { .. }
        | CacheError::Prefix { .. }
        | CacheError::Ca { .. } => "moesaic_cache_errors_total",
    };
    counter!(name, "kind" => kind.as_str(), "tier" => tier.as_str()).increment(1);
}

/// Counts a value that was found and could not be used.
pub(crate) fn bad_value(bad: &BadValue, tier: Tier, kind: Kind) {
    let labels = [("kind", kind.as_str()), ("tier", tier.as_str()), ("reason", bad.reason())];
    counter!("moesaic_cache_bad_values_total", &labels).increment(1);
}

/// Counts a request that reads what another computes.
pub(crate) fn joined(kind: Kind) {
    counter!("moesaic_cache_joined_total", "kind" => kind.as_str()).increment(1);
}

/// Counts a value that was not written to a slow tier: too much waits, or the tier is left alone.
pub(crate) fn dropped_write(kind: Kind) {
    counter!("moesaic_cache_dropped_writes_total", "kind" => kind.as_str()).increment(1);
}

/// Adds to the circuits of a tier that are open.
pub(crate) fn open_circuits(tier: Tier, change: f64) {
    gauge!("moesaic_cache_circuit_open", "tier" => tier.as_str()).increment(change);
}

/// Keeps a fault that comes with every call from filling the log.
#[derive(Debug, Default)]
pub(crate) struct Notice {
    last: Mutex<Option<Instant>>,
}

/// Time between two log lines about the same fault.
const NOTICE_INTERVAL: Duration = Duration::from_secs(600);

impl Notice {
    /// Whether it is worth a line; true once per [`NOTICE_INTERVAL`].
    pub fn is_due(&self) -> bool {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|last| last.elapsed() < NOTICE_INTERVAL) {
            return false;
        }
        *last = Some(Instant::now());
        true
    }
}

/// Sets the gauges of what the tiers hold.
pub fn observe(stats: &[TierStats]) {
    for row in stats {
        gauge!("moesaic_cache_up", "tier" => row.tier.as_str()).set(if row.is_available { 1.0 } else { 0.0 });
        if let Some(bytes) = row.bytes {
            gauge!("moesaic_cache_bytes", "tier" => row.tier.as_str()).set(bytes as f64);
        }
        if let Some(num_entries) = row.num_entries {
            gauge!("moesaic_cache_entries", "tier" => row.tier.as_str()).set(num_entries as f64);
        }
    }
}

/// Describes the metrics of this crate to the installed recorder.
pub fn describe() {
    describe_counter!("moesaic_cache_hits_total", "Look-ups that found a value");
    describe_counter!("moesaic_cache_misses_total", "Look-ups that found none");
    describe_counter!("moesaic_cache_errors_total", "Calls to a tier that failed or ran out of time");
    describe_counter!("moesaic_cache_refused_total", "Values that a tier's limits keep out");
    describe_counter!("moesaic_cache_bad_values_total", "Stored values that were broken, foreign or of another format");
    describe_counter!("moesaic_cache_read_bytes_total", Unit::Bytes, "Bytes of the values that look-ups found");
    describe_counter!("moesaic_cache_written_bytes_total", Unit::Bytes, "Bytes of the values that a tier took in");
    describe_counter!("moesaic_cache_joined_total", "Requests that read what another computes");
    describe_counter!(
        "moesaic_cache_dropped_writes_total",
        "Values not written to slow tiers: too much waits, or the tier is left alone"
    );
    describe_gauge!("moesaic_cache_up", "1 where the tier can be used");
    describe_gauge!(
        "moesaic_cache_circuit_open",
        "1 while the tier fails and is left alone; of a Redis cluster, the nodes that are. Redis counts once more where the \
         connection of KV blocks is left alone"
    );
    describe_histogram!(
        "moesaic_cache_seconds",
        Unit::Seconds,
        "Time of a look-up in a tier, of one value or of a batch"
    );
    describe_histogram!("moesaic_kv_load_seconds", Unit::Seconds, "Time in which the blocks of a prefix were loaded");
    describe_gauge!("moesaic_cache_bytes", Unit::Bytes, "Bytes that a tier holds");
    describe_gauge!("moesaic_cache_entries", "Values that a tier holds");
}

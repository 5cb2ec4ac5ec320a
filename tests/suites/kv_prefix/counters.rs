//! The counters that a test moved.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Metadata, Recorder, SharedString, Unit};

/// Records what happens on its thread, while its guard lives: `metrics::set_default_local_recorder`.
#[derive(Default)]
pub struct Counters {
    by_key: Mutex<HashMap<String, Arc<AtomicU64>>>,
}

impl Counters {
    /// The value of a counter, such as `moesaic_cache_hits_total kv redis`: its name, then the values of its labels.
    pub fn get(&self, key: &str) -> u64 {
        self.by_key.lock().expect("nobody panics with it").get(key).map_or(0, |counter| counter.load(Ordering::Relaxed))
    }
}

impl Recorder for Counters {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        let labels = key.labels().map(metrics::Label::value);
        let key = std::iter::once(key.name()).chain(labels).collect::<Vec<_>>().join(" ");
        Counter::from_arc(Arc::clone(self.by_key.lock().expect("nobody panics with it").entry(key).or_default()))
    }

    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::noop()
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::noop()
    }
}

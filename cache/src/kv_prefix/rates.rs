//! How long loading a block takes, tier by tier: measured loads, the latest of which count most.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Share of the newest load in a rate.
const WEIGHT: f64 = 0.3;

#[derive(Debug)]
pub(super) struct Rates {
    /// By depth: memory, then the slow tiers.
    tiers: Mutex<Vec<Option<Rate>>>,
    lifetime: Duration,
}

#[derive(Clone, Copy, Debug)]
struct Rate {
    seconds_per_block: f64,
    measured: Instant,
}

impl Rates {
    pub fn new(num_tiers: usize, lifetime: Duration) -> Self {
        Self { tiers: Mutex::new(vec![None; num_tiers]), lifetime }
    }

    /// Takes in a load of one tier.
    pub fn note(&self, depth: usize, seconds_per_block: f64, now: Instant) {
        let last = self.get(depth, now);
        let seconds_per_block = last.map_or(seconds_per_block, |last| last + WEIGHT * (seconds_per_block - last));
        self.lock()[depth] = Some(Rate { seconds_per_block, measured: now });
    }

    /// Seconds per block of a tier; `None` if it was not measured within the lifetime of a rate.
    pub fn get(&self, depth: usize, now: Instant) -> Option<f64> {
        let rate = self.lock()[depth]?;
        (now.saturating_duration_since(rate.measured) < self.lifetime).then_some(rate.seconds_per_block)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<Rate>>> {
        self.tiers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_loads_count_most_and_old_ones_not_at_all() {
        let (rates, start) = (Rates::new(2, Duration::from_secs(60)), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(rates.get(1, at(0)), None);
        rates.note(1, 1.0, at(0));
        assert_eq!((rates.get(0, at(0)), rates.get(1, at(59))), (None, Some(1.0)));
        rates.note(1, 2.0, at(59));
        assert_eq!(rates.get(1, at(60)), Some(1.3));
        for second in 60..100 {
            rates.note(1, 5.0, at(second));
        }
        assert!((rates.get(1, at(100)).unwrap() - 5.0).abs() < 0.01);
        assert_eq!(rates.get(1, at(159)), None);
        rates.note(1, 1.0, at(159));
        assert_eq!(rates.get(1, at(159)), Some(1.0));
    }
}

//! Circuit breaker: a place that keeps failing is left alone, and looked at again after a growing pause. Time is an argument.

use std::time::Duration;

use tokio::time::Instant;

/// When it opens, and how long it waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BreakerConfig {
    /// Failures in a row that open it; at least 1.
    pub max_failures: u32,
    /// Pause before the first probe; it doubles with each probe that fails.
    pub min_pause: Duration,
    pub max_pause: Duration,
}

impl Default for BreakerConfig {
    fn default() -> Self {
        Self { max_failures: 5, min_pause: Duration::from_millis(250), max_pause: Duration::from_secs(10) }
    }
}

/// A change that is worth a line in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Opened,
    Closed { after: Duration },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Closed {
        num_failures: u32,
    },
    Open {
        since: Instant,
        next_probe: Instant,
    },
    /// One probe is under way.
    HalfOpen {
        since: Instant,
    },
}

/// `admit` before a call, `succeeded` or `failed` after; `start_probe` at `next_probe`, `probe_*` after.
#[derive(Debug)]
pub(crate) struct Breaker {
    config: BreakerConfig,
    state: State,
    /// The last pause. A probe that succeeds does not forget it, a call does: what answers probes only must not be tried often.
    pause: Option<Duration>,
}

impl Breaker {
    pub fn new(config: BreakerConfig) -> Self {
        Self { config, state: State::Closed { num_failures: 0 }, pause: None }
    }

    pub fn is_open(&self) -> bool {
        !matches!(self.state, State::Closed { .. })
    }

    /// When the next probe is due, while it is open.
    pub fn next_probe(&self) -> Option<Instant> {
        match self.state {
            State::Open { next_probe, .. } => Some(next_probe),
            _ => None,
        }
    }

    /// A call succeeded. What was sent before it opened says nothing about now.
    pub fn succeeded(&mut self) {
        if let State::Closed { num_failures } = &mut self.state {
            *num_failures = 0;
            self.pause = None;
        }
    }

    /// A call failed or ran out of time.
    pub fn failed(&mut self, now: Instant) -> Option<Change> {
        let State::Closed { num_failures } = &mut self.state else { return None };
        *num_failures += 1;
        if *num_failures < self.config.max_failures {
            return None;
        }
        self.open(now, now);
        Some(Change::Opened)
    }

    /// Opens it whatever was counted: what was found says that every call would fail.
    pub fn trip(&mut self, now: Instant) -> Option<Change> {
        if self.is_open() {
            return None;
        }
        self.open(now, now);
        Some(Change::Opened)
    }

    /// Takes the right to probe, if it is time.
    pub fn start_probe(&mut self, now: Instant) -> bool {
        match self.state {
            State::Open { since, next_probe } if now >= next_probe => {
                self.state = State::HalfOpen { since };
                true
            }
            _ => false,
        }
    }

    pub fn probe_succeeded(&mut self, now: Instant) -> Option<Change> {
        let State::HalfOpen { since } = self.state else { return None };
        self.state = State::Closed { num_failures: 0 };
        Some(Change::Closed { after: now - since })
    }

    pub fn probe_failed(&mut self, now: Instant) {
        if let State::HalfOpen { since } = self.state {
            self.open(since, now);
        }
    }

    fn open(&mut self, since: Instant, now: Instant) {
        let pause = match self.pause {
            None => self.config.min_pause,
            Some(pause) => pause.saturating_mul(2).min(self.config.max_pause),
        };
        self.pause = Some(pause);
        self.state = State::Open { since, next_probe: now + pause };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: BreakerConfig =
        BreakerConfig { max_failures: 3, min_pause: Duration::from_millis(100), max_pause: Duration::from_millis(350) };

    fn opened(start: Instant) -> Breaker {
        let mut breaker = Breaker::new(CONFIG);
        assert_eq!(breaker.failed(start), None);
        assert_eq!(breaker.failed(start), None);
        assert_eq!(breaker.failed(start), Some(Change::Opened));
        breaker
    }

    #[test]
    fn only_failures_in_a_row_open_it() {
        let (mut breaker, now) = (Breaker::new(CONFIG), Instant::now());
        for _ in 0..10 {
            assert_eq!((breaker.failed(now), breaker.failed(now)), (None, None));
            breaker.succeeded();
        }
        assert!(!breaker.is_open());
        assert!(opened(now).is_open());
    }

    #[test]
    fn one_look_that_says_it_all_opens_it() {
        let (mut breaker, now) = (Breaker::new(CONFIG), Instant::now());
        assert_eq!(breaker.trip(now), Some(Change::Opened));
        assert_eq!(breaker.next_probe(), Some(now + CONFIG.min_pause));
        assert_eq!(breaker.trip(now), None, "it is open");
    }

    #[test]
    fn one_probe_at_a_time_after_pauses_that_grow_to_a_cap() {
        let start = Instant::now();
        let mut breaker = opened(start);
        let mut now = start;
        for pause in [100, 200, 350, 350] {
            let pause = Duration::from_millis(pause);
            assert_eq!(breaker.next_probe(), Some(now + pause));
            assert!(!breaker.start_probe(now + pause - Duration::from_nanos(1)));
            now += pause;
            assert!(breaker.start_probe(now));
            assert!(!breaker.start_probe(now), "one probe is under way");
            assert!(breaker.is_open());
            breaker.probe_failed(now);
        }
    }

    #[test]
    fn a_probe_closes_it_and_says_how_long_it_was_open() {
        let start = Instant::now();
        let mut breaker = opened(start);
        let now = start + Duration::from_secs(9);
        assert!(breaker.start_probe(now));
        let later = now + Duration::from_secs(1);
        assert_eq!(breaker.probe_succeeded(later), Some(Change::Closed { after: Duration::from_secs(10) }));
        assert!(!breaker.is_open());
        assert_eq!(breaker.failed(later), None, "it counts anew");
    }

    #[test]
    fn what_was_sent_before_it_opened_changes_nothing() {
        let start = Instant::now();
        let mut breaker = opened(start);
        let next_probe = breaker.next_probe();
        breaker.succeeded();
        assert_eq!(breaker.failed(start + Duration::from_secs(1)), None);
        assert_eq!(breaker.next_probe(), next_probe);
    }

    #[test]
    fn only_a_call_that_succeeds_makes_pauses_short_again() {
        let start = Instant::now();
        let fail = |breaker: &mut Breaker| (0..3).filter_map(|_| breaker.failed(start)).count();
        let mut breaker = opened(start);
        let probe = start + CONFIG.min_pause;
        assert!(breaker.start_probe(probe) && breaker.probe_succeeded(probe).is_some());
        assert_eq!(fail(&mut breaker), 1);
        assert_eq!(breaker.next_probe(), Some(start + 2 * CONFIG.min_pause));
        let probe = start + 2 * CONFIG.min_pause;
        assert!(breaker.start_probe(probe) && breaker.probe_succeeded(probe).is_some());
        breaker.succeeded();
        assert_eq!(fail(&mut breaker), 1);
        assert_eq!(breaker.next_probe(), Some(start + CONFIG.min_pause));
    }
}

//! The whole load matrix: tokens of every expert since the start and over a window, counted by the step loop, read by anybody.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use kernels::TopK;

use super::routed_rows::MoeShape;

/// Longest window that [`ExpertLoads::over`] knows.
pub const MAX_LOAD_WINDOW: Duration = Duration::from_secs(600);

/// A window begins where the loads were kept, at most so long before what was asked for.
const PERIOD: Duration = Duration::from_secs(10);

/// One more than a window needs, and one that may be being written.
const NUM_KEPT: usize = (MAX_LOAD_WINDOW.as_secs() / PERIOD.as_secs()) as usize + 2;

/// Columns of a layer behind those of its experts.
const NUM_SUMS: usize = 3;
const TOKENS: usize = 0;
const PLACES: usize = 1;
const DROPPED: usize = 2;

/// Nothing is in the place, or it is being written.
const NO_TIME: u64 = u64::MAX;

/// Counts of one thread, the step loop's, that others read at any time. Nobody waits for anybody: counts only grow,
/// and what a window began with is read again where it changed meanwhile.
#[derive(Debug)]
pub struct ExpertLoads {
    layers: Vec<MoeShape>,
    /// How many of them are of multi-token prediction.
    num_mtp: usize,
    /// Of each layer within a row.
    offsets: Vec<usize>,
    /// A row: `[moe layer][expert.., tokens, places, dropped]`.
    totals: Box<[AtomicU64]>,
    started: Instant,
    kept: Box<[Kept]>,
    /// Rows kept so far; each is in the place of its number modulo [`NUM_KEPT`].
    num_kept: AtomicU64,
}

/// The totals as they were at a time, before anything that followed.
#[derive(Debug)]
struct Kept {
    /// Milliseconds since the start.
    at: AtomicU64,
    totals: OnceLock<Box<[AtomicU64]>>,
}

/// The loads of a stretch of time.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadSums {
    /// How long that was.
    pub seconds: f64,
    /// In the order in which a token meets the routers; those of multi-token prediction last.
    pub layers: Vec<LayerLoads>,
    /// How many of them are of multi-token prediction.
    pub num_mtp: usize,
}

/// What one router chose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerLoads {
    pub top_k: usize,
    pub num_tokens: u64,
    /// Tokens that chose each expert.
    pub loads: Vec<u64>,
    /// Tokens that the experts could have taken; 0 where they have no capacity.
    pub num_places: u64,
    /// Choices that found their expert full.
    pub num_dropped: u64,
}

impl ExpertLoads {
    /// The last `num_mtp` layers are of multi-token prediction.
    pub fn new(layers: &[MoeShape], num_mtp: usize) -> Self {
        let next = |offset: &mut usize, layer: &MoeShape| {
            Some(std::mem::replace(offset, *offset + layer.num_experts + NUM_SUMS))
        };
        let offsets: Vec<usize> = layers.iter().scan(0, next).collect();
        let width = layers.iter().map(|layer| layer.num_experts + NUM_SUMS).sum();
        Self {
            layers: layers.to_vec(),
            num_mtp,
            offsets,
            totals: row(width),
            started: Instant::now(),
            kept: (0..NUM_KEPT).map(|_| Kept { at: AtomicU64::new(NO_TIME), totals: OnceLock::new() }).collect(),
            num_kept: AtomicU64::new(0),
        }
    }

    pub fn layers(&self) -> &[MoeShape] {
        &self.layers
    }

    pub fn since_start(&self) -> LoadSums {
        self.sums(None, self.started.elapsed())
    }

    /// Of the last `window`, and up to ten seconds more; of what there is where the start or [`MAX_LOAD_WINDOW`] is nearer.
    pub fn over(&self, window: Duration) -> LoadSums {
        self.over_at(self.now(), window.min(MAX_LOAD_WINDOW).as_millis() as u64)
    }

    /// Before the first count of a step, by its one thread.
    pub(crate) fn begin_step(&self) {
        self.keep(self.now());
    }

    /// Counts one router call, by the same thread: the choices that run.
    pub(crate) fn count(&self, moe_idx: usize, topk: &TopK) {
        let offset = self.offsets[moe_idx];
        for &expert in topk.experts.iter().filter(|&&expert| expert != TopK::NO_EXPERT) {
            assert!((expert as usize) < self.layers[moe_idx].num_experts, "expert {expert} of layer {moe_idx}");
            self.add(offset + expert as usize, 1);
        }
        self.add_sum(moe_idx, TOKENS, topk.experts.len() / topk.k);
    }

    /// Counts that the experts of a layer could take `num_places` tokens together and left out `num_dropped`.
    pub(crate) fn count_capacity(&self, moe_idx: usize, (num_places, num_dropped): (usize, usize)) {
        self.add_sum(moe_idx, PLACES, num_places);
        self.add_sum(moe_idx, DROPPED, num_dropped);
    }

    fn add_sum(&self, moe_idx: usize, sum: usize, count: usize) {
        self.add(self.offsets[moe_idx] + self.layers[moe_idx].num_experts + sum, count as u64);
    }

    /// One thread counts, so that this needs no locked instruction.
    fn add(&self, column: usize, count: u64) {
        let total = &self.totals[column];
        total.store(total.load(Ordering::Relaxed) + count, Ordering::Relaxed);
    }

    fn now(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    fn keep(&self, now: u64) {
        let num_kept = self.num_kept.load(Ordering::Relaxed);
        let last = num_kept.checked_sub(1).map(|last| self.place(last).at.load(Ordering::Relaxed));
        if last.is_some_and(|last| now < last + PERIOD.as_millis() as u64) {
            return;
        }
        let place = self.place(num_kept);
        place.at.store(NO_TIME, Ordering::Relaxed);
        // Who still reads what was here before will see that the time changed.
        fence(Ordering::Release);
        let totals = place.totals.get_or_init(|| row(self.totals.len()));
        for (kept, total) in totals.iter().zip(&self.totals) {
            kept.store(total.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        place.at.store(now, Ordering::Release);
        self.num_kept.store(num_kept + 1, Ordering::Release);
    }

    fn place(&self, number: u64) -> &Kept {
        &self.kept[(number % NUM_KEPT as u64) as usize]
    }

    /// The time and totals of one kept row, if it is still there.
    fn read(&self, number: u64) -> Option<(u64, Vec<u64>)> {
        let place = self.place(number);
        let at = place.at.load(Ordering::Acquire);
        let totals = place.totals.get().filter(|_| at != NO_TIME)?;
        let copy = totals.iter().map(|total| total.load(Ordering::Relaxed)).collect();
        fence(Ordering::Acquire);
        (place.at.load(Ordering::Relaxed) == at).then_some((at, copy))
    }

    /// In milliseconds since the start.
    fn over_at(&self, now: u64, window: u64) -> LoadSums {
        let begin = now.saturating_sub(window);
        let num_kept = self.num_kept.load(Ordering::Acquire);
        let oldest = num_kept.saturating_sub(NUM_KEPT as u64);
        let mut later = None;
        for number in (oldest..num_kept).rev() {
            let Some((at, totals)) = self.read(number) else { break };
            if at > begin {
                later = Some((at, totals));
                continue;
            }
            let is_near = begin - at < PERIOD.as_millis() as u64;
            return match (is_near, later) {
                (true, _) => self.sums(Some(&totals), Duration::from_millis(now.saturating_sub(at))),
                // Nothing was counted between this row's period and the next row.
                (false, Some((_, totals))) => self.sums(Some(&totals), Duration::from_millis(window)),
                (false, None) => self.nothing(Duration::from_millis(window)),
            };
        }
        match later {
            // Before the very first row nothing was counted.
            Some((_, totals)) if oldest == 0 => self.sums(Some(&totals), Duration::from_millis(now - begin)),
            Some((at, totals)) => self.sums(Some(&totals), Duration::from_millis(now.saturating_sub(at))),
            None => self.nothing(Duration::from_millis(now - begin)),
        }
    }

    fn nothing(&self, time: Duration) -> LoadSums {
        self.between(&vec![0; self.totals.len()], None, time)
    }

    /// What was counted since `before`.
    fn sums(&self, before: Option<&[u64]>, time: Duration) -> LoadSums {
        let now: Vec<u64> = self.totals.iter().map(|total| total.load(Ordering::Relaxed)).collect();
        self.between(&now, before, time)
    }

    fn between(&self, now: &[u64], before: Option<&[u64]>, time: Duration) -> LoadSums {
        let count = |column: usize| now[column] - before.map_or(0, |before| before[column]);
        let layer = |(&offset, shape): (&usize, &MoeShape)| {
            let sums = offset + shape.num_experts;
            LayerLoads {
                top_k: shape.top_k,
                num_tokens: count(sums + TOKENS),
                loads: (offset..sums).map(count).collect(),
                num_places: count(sums + PLACES),
                num_dropped: count(sums + DROPPED),
            }
        };
        let layers = self.offsets.iter().zip(&self.layers).map(layer).collect();
        LoadSums { seconds: time.as_secs_f64(), layers, num_mtp: self.num_mtp }
    }
}

fn row(width: usize) -> Box<[AtomicU64]> {
    (0..width).map(|_| AtomicU64::new(0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1000;

    fn loads() -> ExpertLoads {
        ExpertLoads::new(&[MoeShape { num_experts: 3, top_k: 2 }, MoeShape { num_experts: 2, top_k: 1 }], 0)
    }

    /// A step at a time, whose tokens all choose one expert of the second layer.
    fn step(loads: &ExpertLoads, at: u64, num_tokens: usize) {
        loads.keep(at);
        loads.count(1, &TopK { experts: vec![1; num_tokens], weights: vec![1.0; num_tokens], k: 1 });
    }

    fn check(loads: &ExpertLoads, (now, window): (u64, u64), (expected, seconds): (u64, f64)) {
        let sums = loads.over_at(now, window);
        assert_eq!((sums.layers[1].loads[1], sums.seconds), (expected, seconds), "{window} ms before {now}");
        assert_eq!(sums.layers[1].num_tokens, expected);
    }

    #[test]
    fn loads_are_counted_by_layer() {
        let loads = loads();
        loads.count(0, &TopK { experts: vec![0, 2, 2, 1], weights: vec![0.5; 4], k: 2 });
        loads.count(0, &TopK { experts: vec![2, 0], weights: vec![0.5; 2], k: 2 });
        loads.count_capacity(1, (8, 3));
        let layers = loads.since_start().layers;
        let first = LayerLoads { top_k: 2, num_tokens: 3, loads: vec![2, 1, 3], num_places: 0, num_dropped: 0 };
        let second = LayerLoads { top_k: 1, num_tokens: 0, loads: vec![0, 0], num_places: 8, num_dropped: 3 };
        assert_eq!(layers, [first, second]);
    }

    #[test]
    fn a_window_holds_what_was_asked_for_and_at_most_a_period_more() {
        let loads = loads();
        check(&loads, (5 * SECOND, SECOND), (0, 1.0));
        for second in 0..100 {
            step(&loads, second * SECOND, 1);
        }
        let now = 99 * SECOND;
        check(&loads, (now, SECOND), (10, 9.0));
        check(&loads, (now, 9 * SECOND), (10, 9.0));
        check(&loads, (now, 10 * SECOND), (20, 19.0));
        check(&loads, (now, 99 * SECOND), (100, 99.0));
        check(&loads, (now, 600 * SECOND), (100, 99.0));
    }

    #[test]
    fn what_was_before_a_rest_is_not_in_the_window() {
        let loads = loads();
        step(&loads, 100 * SECOND, 3);
        step(&loads, 104 * SECOND, 4);
        check(&loads, (105 * SECOND, 30 * SECOND), (7, 30.0));
        check(&loads, (111 * SECOND, 2 * SECOND), (7, 11.0));
        check(&loads, (200 * SECOND, 60 * SECOND), (0, 60.0));
        step(&loads, 500 * SECOND, 5);
        check(&loads, (501 * SECOND, 60 * SECOND), (5, 60.0));
        check(&loads, (501 * SECOND, 450 * SECOND), (12, 450.0));
    }

    #[test]
    fn the_ring_is_bounded_and_always_holds_the_longest_window() {
        let loads = loads();
        for second in 0..5000 {
            step(&loads, second * SECOND, 2);
        }
        check(&loads, (4999 * SECOND, 600 * SECOND), (2 * 610, 609.0));
        assert_eq!(loads.since_start().layers[1].loads, [0, 10_000]);
    }

    #[test]
    fn a_reader_beside_the_counting_thread_sees_counts_that_only_grow() {
        let loads = loads();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // A period passes with every step, so that places are written over all the time.
                (0..100_000).for_each(|second| step(&loads, second * 10 * SECOND, 1));
                done.store(true, Ordering::Release);
            });
            let mut last = 0;
            while !done.load(Ordering::Acquire) {
                let now = loads.since_start().layers[1].loads[1];
                assert!(now >= last && now <= 100_000);
                last = now;
                let sums = loads.over_at(last * 10 * SECOND, 600 * SECOND);
                assert!(sums.layers[1].loads[1] <= 100_000);
            }
        });
        check(&loads, (999_990 * SECOND, 600 * SECOND), (61, 600.0));
    }
}

//! Tiers that hang, refuse or take their time.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use cache::CacheError;
use cache::store::{Address, Found, Kind, Store, Tier, TierStats, Value};
use futures::future::{BoxFuture, FutureExt as _};
use tokio::time::{sleep, sleep_until};

use super::*;
use crate::counters::Counters;

/// A tier that has every block, and gives a batch of them after `delay`; that of blocks beyond `num_blocks` never.
#[derive(Debug)]
struct Odd {
    delay: Duration,
    num_blocks: usize,
    takes_writes: bool,
    num_written: AtomicUsize,
    batch_lens: Mutex<Vec<usize>>,
}

impl Odd {
    fn with(delay: Duration, num_blocks: usize, takes_writes: bool) -> Arc<Self> {
        Arc::new(Self {
            delay,
            num_blocks,
            takes_writes,
            num_written: AtomicUsize::new(0),
            batch_lens: Mutex::default(),
        })
    }

    /// Answers nothing.
    fn stuck() -> Arc<Self> {
        Self::with(Duration::ZERO, 0, false)
    }

    fn num_written(&self) -> usize {
        self.num_written.load(Ordering::Relaxed)
    }

    fn stall<T: Send + 'static>(deadline: Instant) -> BoxFuture<'static, Result<T, CacheError>> {
        sleep_until(deadline).map(|()| Err(CacheError::Timeout { tier: Tier::Disk })).boxed()
    }

    fn number_of(&self, address: &Address) -> Option<usize> {
        (0..self.num_blocks).find(|&number| name(number) == *address.key.as_bytes())
    }
}

impl Store for Odd {
    fn get<'a>(&'a self, address: &'a Address, deadline: Instant) -> BoxFuture<'a, Result<Option<Found>, CacheError>> {
        let Some(number) = self.number_of(address) else { return Self::stall(deadline) };
        async move { Ok(Some(Found { payload: payload_of(number), tier: Tier::Disk, ttl: HOUR })) }.boxed()
    }

    fn put<'a>(&'a self, _: &'a Address, _: Value, deadline: Instant) -> BoxFuture<'a, Result<(), CacheError>> {
        self.num_written.fetch_add(1, Ordering::Relaxed);
        if self.takes_writes { async { Ok(()) }.boxed() } else { Self::stall(deadline) }
    }

    fn remove<'a>(&'a self, _: &'a Address, deadline: Instant) -> BoxFuture<'a, Result<(), CacheError>> {
        Self::stall(deadline)
    }

    fn contains_many<'a>(
        &'a self,
        addresses: &'a [Address],
        deadline: Instant,
    ) -> BoxFuture<'a, Result<Vec<bool>, CacheError>> {
        if self.num_blocks == 0 {
            return Self::stall(deadline);
        }
        async { Ok(vec![true; addresses.len()]) }.boxed()
    }

    fn get_many<'a>(
        &'a self,
        addresses: &'a [Address],
        deadline: Instant,
    ) -> BoxFuture<'a, Vec<Result<Option<Found>, CacheError>>> {
        self.batch_lens.lock().expect("nobody panics with it").push(addresses.len());
        async move {
            sleep(self.delay).await;
            futures::future::join_all(addresses.iter().map(|address| self.get(address, deadline))).await
        }
        .boxed()
    }

    fn clear(&self, _: Option<Kind>, deadline: Instant) -> BoxFuture<'_, Result<(), CacheError>> {
        Self::stall(deadline)
    }

    fn check(&self) -> BoxFuture<'_, ()> {
        async {}.boxed()
    }

    fn stats(&self, _: Instant) -> BoxFuture<'_, Vec<TierStats>> {
        async { vec![] }.boxed()
    }

    fn stats_of(&self, _: Kind, _: Instant) -> BoxFuture<'_, Vec<TierStats>> {
        async { vec![] }.boxed()
    }
}

#[tokio::test]
async fn stores_do_not_wait_and_what_is_over_the_limit_is_dropped_and_counted() {
    let counters = Counters::default();
    let _recording = metrics::set_default_local_recorder(&counters);
    let tier = Odd::stuck();
    let limits =
        KvPrefixConfig { max_pending_bytes: 4 * BLOCK_BYTES, write_timeout: Duration::from_millis(100), ..config() };
    let cache = KvPrefixCache::new(limits, None, vec![Arc::clone(&tier) as _], FINGERPRINT);
    let is_known =
        |range: std::ops::Range<usize>| range.map(|number| cache.is_known(&name(number))).collect::<Vec<_>>();
    for number in 0..10 {
        cache.store(name(number), payload_of(number));
        cache.store(name(number), payload_of(number));
    }
    assert_eq!((is_known(0..3), is_known(3..10)), (vec![true; 3], vec![false; 7]), "those that wait");
    assert_eq!(counters.get("moesaic_cache_dropped_writes_total kv"), 14);
    cache.settle(late()).await;
    assert_eq!((tier.num_written(), is_known(0..10)), (3, vec![false; 10]), "none of them was kept");
    cache.store(name(11), payload_of(11));
    cache.settle(late()).await;
    assert_eq!(
        (tier.num_written(), counters.get("moesaic_cache_dropped_writes_total kv")),
        (4, 14),
        "there is room again"
    );
    let start = Instant::now();
    cache.store(name(12), payload_of(12));
    cache.settle(start).await;
    assert!(start.elapsed() < SLACK, "settling ends by its deadline");
}

#[tokio::test]
async fn a_block_is_written_once_and_by_what_is_left_of_the_cache() {
    let tier = Odd::with(Duration::ZERO, 1, true);
    let cache = KvPrefixCache::new(config(), Some(memory()), vec![Arc::clone(&tier) as _], FINGERPRINT);
    for _ in 0..3 {
        keep(&cache, 10).await;
        assert_eq!(tier.num_written(), 10);
    }
    for number in 10..20 {
        cache.store(name(number), payload_of(number));
    }
    drop(cache);
    while tier.num_written() < 20 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_tier_that_hangs_takes_its_share_of_the_time_and_no_more() {
    let directory = Directory::new();
    keep(&over(vec![directory.open()]), 10).await;
    let budget = Duration::from_millis(400);
    let times = KvPrefixConfig { load_timeout: budget, ..config() };
    let slow: Vec<Arc<dyn Store>> = vec![Odd::stuck(), directory.open()];
    let cache = KvPrefixCache::new(times, None, slow, FINGERPRINT);
    let start = Instant::now();
    assert_eq!(cache.look_up(&names(10), Instant::now() + budget).await.num_blocks, 10);
    assert!(start.elapsed() < 2 * budget + SLACK, "{:?}", start.elapsed());
    let start = Instant::now();
    assert_eq!(load(&cache, 10).await, 10, "the one below had time left");
    assert!(start.elapsed() < budget + SLACK, "{:?}", start.elapsed());
    let cache = KvPrefixCache::new(times, None, vec![Odd::stuck()], FINGERPRINT);
    let start = Instant::now();
    let hint = cache.look_up(&names(10), Instant::now() + budget).await;
    assert_eq!((load(&cache, 10).await, hint.num_blocks), (0, 0));
    assert!(start.elapsed() < 2 * (budget + SLACK), "{:?}", start.elapsed());
}

#[tokio::test]
async fn what_came_before_the_deadline_is_given() {
    let times = KvPrefixConfig { load_timeout: Duration::from_millis(500), ..config() };
    let cache = KvPrefixCache::new(times, None, vec![Odd::with(Duration::ZERO, 50, true)], FINGERPRINT);
    let start = Instant::now();
    assert_eq!(load(&cache, 100).await, 50);
    assert!(start.elapsed() < times.load_timeout + SLACK, "{:?}", start.elapsed());
    let hint = cache.look_up(&names(100), late()).await;
    let seconds = hint.seconds_per_block.expect("it was measured");
    assert!(seconds > 0.009, "the time in which it gave nothing counts: {hint:?}");
}

#[tokio::test]
async fn the_rate_is_that_of_real_loads_and_is_forgotten() {
    let tier = Odd::with(Duration::from_millis(20), 100, true);
    let cache = over(vec![Arc::clone(&tier) as _]);
    assert_eq!(cache.look_up(&names(100), late()).await, cache::KvHint { num_blocks: 100, seconds_per_block: None });
    let mut measured = Vec::new();
    for _ in 0..2 {
        let start = Instant::now();
        assert_eq!(load(&cache, 100).await, 100);
        measured.push(start.elapsed().as_secs_f64() / 100.0);
        let hint = cache.look_up(&names(100), late()).await;
        let predicted = hint.seconds_per_block.expect("it was measured");
        let (fastest, slowest) =
            measured.iter().fold((f64::MAX, 0.0_f64), |(low, high), &rate| (low.min(rate), high.max(rate)));
        assert!(predicted > fastest / 2.0 && predicted <= slowest, "{predicted}, measured {measured:?}");
    }
    assert_eq!(tier.batch_lens.lock().expect("nobody panics with it")[..4], [32, 32, 32, 4], "by the batch");
    let forgetful = KvPrefixConfig { rate_lifetime: Duration::ZERO, ..config() };
    let cache = KvPrefixCache::new(forgetful, None, vec![tier], FINGERPRINT);
    assert_eq!(load(&cache, 10).await, 10);
    assert_eq!(cache.look_up(&names(10), late()).await, cache::KvHint { num_blocks: 10, seconds_per_block: None });
}

//! Memory over slow tiers: found below, kept above; a slow tier is in nobody's way.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use cache::store::{
    Address, DiskConfig, DiskStore, Found, Kind, MemoryStore, Store, Tier, TierStats, TieredConfig, TieredStore, Value,
};
use cache::{BreakerConfig, CacheError, Digest, Fingerprint};
use futures::future::{BoxFuture, FutureExt as _};
use tokio::time::{Instant, sleep_until};

const HOUR: Duration = Duration::from_secs(3600);

/// A tier that answers nothing, at the last moment that it is given.
#[derive(Debug, Default)]
struct Stuck {
    num_puts: AtomicUsize,
}

impl Stuck {
    fn stall<T: Send + 'static>(deadline: Instant) -> BoxFuture<'static, Result<T, CacheError>> {
        sleep_until(deadline).map(|()| Err(CacheError::Timeout { tier: Tier::Disk })).boxed()
    }
}

impl Store for Stuck {
    fn get<'a>(&'a self, _: &'a Address, deadline: Instant) -> BoxFuture<'a, Result<Option<Found>, CacheError>> {
        Self::stall(deadline)
    }

    fn put<'a>(&'a self, _: &'a Address, _: Value, deadline: Instant) -> BoxFuture<'a, Result<(), CacheError>> {
        self.num_puts.fetch_add(1, Ordering::Relaxed);
        Self::stall(deadline)
    }

    fn remove<'a>(&'a self, _: &'a Address, deadline: Instant) -> BoxFuture<'a, Result<(), CacheError>> {
        Self::stall(deadline)
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

fn memory() -> Arc<MemoryStore> {
    Arc::new(MemoryStore::new(1 << 20))
}

fn disk() -> (Arc<DiskStore>, impl Drop) {
    static NUM_MADE: AtomicU64 = AtomicU64::new(0);
    struct Directory(std::path::PathBuf);
    impl Drop for Directory {
        fn drop(&mut self) {
            // What is left is in the folder of temporary files.
            drop(std::fs::remove_dir_all(&self.0));
        }
    }
    let number = NUM_MADE.fetch_add(1, Ordering::Relaxed);
    let directory = std::env::temp_dir().join(format!("moesaic-tiers-{}-{number}", std::process::id()));
    let config = DiskConfig {
        directory: directory.clone(),
        max_bytes: 1 << 30,
        max_value_bytes: 1 << 20,
        scan_interval: HOUR,
        breaker: BreakerConfig::default(),
    };
    (Arc::new(DiskStore::open(config).expect("the directory can be made")), Directory(directory))
}

fn address(number: u64) -> Address {
    let key = Digest::new("test").number("n", number).key();
    Address { kind: Kind::Output, key, fingerprint: Fingerprint::from_bytes([5; 32]) }
}

fn value() -> Value {
    Value { payload: Bytes::from_static(b"value"), ttl: HOUR }
}

fn late() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

async fn tier_of(store: &TieredStore, number: u64) -> Option<Tier> {
    Some(store.get(&address(number), late()).await.expect("failing tiers are passed over")?.tier)
}

#[tokio::test]
async fn what_is_found_below_is_kept_above() {
    let (disk, _directory) = disk();
    let below = TieredStore::new(memory(), vec![Arc::clone(&disk) as _], TieredConfig::default());
    below.put(&address(1), value(), late()).await.expect("memory keeps it");
    assert_eq!(tier_of(&below, 1).await, Some(Tier::Memory));
    below.settle(late()).await;
    let above = TieredStore::new(memory(), vec![Arc::clone(&disk) as _], TieredConfig::default());
    assert_eq!(tier_of(&above, 1).await, Some(Tier::Disk));
    assert_eq!(tier_of(&above, 1).await, Some(Tier::Memory));
    let found = above.get(&address(1), late()).await.expect("memory answers").expect("it was kept");
    assert!(found.ttl <= HOUR, "moving up does not make it live longer");
    above.remove(&address(1), late()).await.expect("both answer");
    assert_eq!(tier_of(&above, 1).await, None);
    above.put(&address(2), value(), late()).await.expect("memory keeps it");
    above.clear(None, late()).await.expect("both answer");
    assert_eq!(tier_of(&above, 2).await, None, "what waited to be written did not come back");
    assert_eq!(above.stats(late()).await.iter().map(|row| row.tier).collect::<Vec<_>>(), [Tier::Memory, Tier::Disk]);
}

#[tokio::test]
async fn a_stuck_tier_takes_its_share_of_the_time_and_no_more() {
    let (disk, _directory) = disk();
    disk.put(&address(1), value(), late()).await.expect("it is kept");
    let tiers: Vec<Arc<dyn Store>> = vec![Arc::new(Stuck::default()), disk];
    let store = TieredStore::new(memory(), tiers, TieredConfig::default());
    let (start, budget) = (Instant::now(), Duration::from_secs(2));
    let found = store.get(&address(1), start + budget).await.expect("failing tiers are passed over");
    assert_eq!(found.map(|found| found.tier), Some(Tier::Disk), "the one below had time left");
    assert!(start.elapsed() >= budget / 2 && start.elapsed() < budget);
}

#[tokio::test]
async fn writes_do_not_wait_and_what_waits_is_bounded() {
    let stuck = Arc::new(Stuck::default());
    let config = TieredConfig { max_pending_bytes: 10_000, write_timeout: Duration::from_millis(200) };
    let store = TieredStore::new(memory(), vec![Arc::clone(&stuck) as _], config);
    for number in 0..100 {
        let put = store.put(&address(number), value(), late()).now_or_never();
        put.expect("it does not wait").expect("memory keeps it");
        assert_eq!(tier_of(&store, number).await, Some(Tier::Memory));
    }
    store.settle(late()).await;
    let num_puts = stuck.num_puts.load(Ordering::Relaxed);
    assert!((1..=9).contains(&num_puts), "{num_puts} writes of over 1000 bytes waited in 10000");
    store.put(&address(1000), value(), late()).await.expect("memory keeps it");
    store.settle(late()).await;
    assert_eq!(stuck.num_puts.load(Ordering::Relaxed), num_puts + 1, "there is room again");
}

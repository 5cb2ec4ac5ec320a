//! Blocks in a real Redis: shared by replicas, and gone with it, cut short or late without harm.

use cache::store::{Kind, RedisConfig, RedisStore, Tier};

use super::*;
use crate::counters::Counters;
use harness::redis::{RedisCluster, RedisServer, Reply};

fn open(url: &str) -> Arc<RedisStore> {
    let breaker =
        BreakerConfig { max_failures: 3, min_pause: Duration::from_millis(20), max_pause: Duration::from_millis(100) };
    let config = RedisConfig {
        url: url.to_owned(),
        ca: None,
        key_prefix: "moesaic".to_owned(),
        max_value_bytes: 1 << 20,
        max_block_bytes: 1 << 20,
        breaker,
    };
    Arc::new(RedisStore::open(&config).expect("the address is right"))
}

fn key(number: usize) -> String {
    format!("moesaic:kv:{}", hex(number))
}

/// Stores and loads until the first `count` blocks are kept and found.
async fn heals(cache: &KvPrefixCache, count: usize) {
    let start = Instant::now();
    loop {
        keep(cache, count).await;
        if cache.look_up(&names(count), late()).await.num_blocks == count && load(cache, count).await == count {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "it does not heal");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_stored_another_loads_and_takes_up() {
    let server = RedisServer::start();
    let directory = Directory::new();
    let first = KvPrefixCache::new(config(), Some(memory()), vec![open(&server.url())], FINGERPRINT);
    keep(&first, 128).await;
    assert_eq!(server.keys().len(), 128);
    let Reply::Integer(millis) = server.command(&["PTTL", &key(5)]) else { panic!("it has a lifetime") };
    assert!((3_500_000..=3_600_000).contains(&millis), "{millis}");
    let slow: Vec<Arc<dyn Store>> = vec![directory.open(), open(&server.url())];
    let second = KvPrefixCache::new(config(), Some(memory()), slow, FINGERPRINT);
    assert_eq!(second.look_up(&names(200), late()).await, cache::KvHint { num_blocks: 128, seconds_per_block: None });
    assert_eq!(load(&second, 200).await, 128);
    second.settle(late()).await;
    let rows = second.stats(late()).await;
    assert_eq!(
        rows.iter().map(|row| (row.tier, row.num_entries)).collect::<Vec<_>>(),
        [(Tier::Memory, Some(128)), (Tier::Disk, Some(128)), (Tier::Redis, None),]
    );
    assert!(second.is_known(&name(127)), "all tiers have it");
    drop((first, server));
    assert_eq!(load(&second, 128).await, 128, "from memory");
    assert_eq!(load(&over(vec![directory.open()]), 128).await, 128, "from disk");
}

#[tokio::test]
async fn bad_values_end_the_prefix_and_are_removed_and_counted() {
    let counters = Counters::default();
    let _recording = metrics::set_default_local_recorder(&counters);
    let server = RedisServer::start();
    let cache = over(vec![open(&server.url())]);
    keep(&cache, 20).await;
    assert_eq!(counters.get("moesaic_cache_written_bytes_total kv redis"), 20 * BLOCK_BYTES as u64);
    let whole = server.bytes(&key(10));
    let mut flipped = whole.clone();
    flipped[BLOCK_BYTES / 2] ^= 4;
    let (cut, other, long) = (&whole[..BLOCK_BYTES / 2], server.bytes(&key(11)), vec![b'x'; 5 << 20]);
    let mut foreign = whole.clone();
    foreign[4] ^= 8;
    let cases =
        [(&flipped[..], "checksum"), (cut, "truncated"), (&other, "key"), (&long, "magic"), (&foreign, "version")];
    for (bytes, reason) in cases {
        server.set(&key(10), bytes);
        assert_eq!(cache.look_up(&names(20), late()).await.num_blocks, 20, "a look reads nothing");
        assert_eq!(load(&cache, 20).await, 10, "{reason}");
        assert_eq!(counters.get(&format!("moesaic_cache_bad_values_total kv redis {reason}")), 1, "{reason}");
        assert_eq!(server.command(&["EXISTS", &key(10)]), Reply::Integer(0), "{reason}");
        assert!(!cache.is_known(&name(10)), "it is worth storing again");
        heals(&cache, 20).await;
    }
    let read = counters.get("moesaic_cache_read_bytes_total kv redis");
    let hits = counters.get("moesaic_cache_hits_total kv redis");
    assert_eq!(read, hits * BLOCK_BYTES as u64);
    let other = KvPrefixCache::new(config(), None, vec![open(&server.url())], Fingerprint::from_bytes([6; 32]));
    assert_eq!(load(&other, 1).await, 0);
    assert_eq!(counters.get("moesaic_cache_bad_values_total kv redis fingerprint"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_another_type_and_lost_ones_end_the_prefix() {
    let server = RedisServer::start();
    let cache = over(vec![open(&server.url())]);
    keep(&cache, 20).await;
    server.command(&["DEL", &key(7)]);
    assert!(cache.is_known(&name(7)), "it cannot know yet");
    assert_eq!((cache.look_up(&names(20), late()).await.num_blocks, load(&cache, 20).await), (7, 7));
    assert!(!cache.is_known(&name(7)));
    assert_eq!(server.command(&["RPUSH", &key(7), "x"]), Reply::Integer(1));
    for _ in 0..10 {
        assert_eq!(load(&cache, 20).await, 7);
    }
    assert_eq!(cache.look_up(&names(20), late()).await.num_blocks, 20, "a list is there, and Redis is not left alone");
    heals(&cache, 20).await;
    server.command(&["FLUSHALL"]);
    assert_eq!(cache.look_up(&names(20), late()).await, cache::KvHint::default());
    heals(&cache, 20).await;
    server.set("another", b"value");
    cache.clear(late()).await.expect("Redis answers");
    assert_eq!((server.keys(), load(&cache, 20).await), (vec!["another".to_owned()], 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_hangs_ends_a_load_by_its_deadline_with_what_is_there() {
    let server = RedisServer::start();
    let budget = Duration::from_millis(300);
    let times = KvPrefixConfig { load_timeout: budget, write_timeout: budget, ..config() };
    let (store, memory) = (open(&server.url()), memory());
    let cache = KvPrefixCache::new(times, Some(Arc::clone(&memory)), vec![Arc::clone(&store) as _], FINGERPRINT);
    keep(&over(vec![open(&server.url())]), 64).await;
    heals(&cache, 4).await;
    server.signal("STOP");
    let start = Instant::now();
    assert_eq!(load(&cache, 64).await, 4, "memory has them");
    assert!(start.elapsed() < budget + SLACK, "{:?}", start.elapsed());
    let start = Instant::now();
    while start.elapsed() < PATIENCE {
        let start = Instant::now();
        assert_eq!(load(&cache, 64).await, 4);
        if start.elapsed() < budget / 10 {
            break;
        }
    }
    let start = Instant::now();
    for _ in 0..100 {
        assert_eq!(load(&cache, 64).await, 4);
    }
    assert!(start.elapsed() < 10 * budget, "it is left alone: {:?}", start.elapsed());
    let stats = Store::stats_of(&*store, Kind::Kv, late()).await;
    assert!(!stats[0].is_available);
    server.signal("CONT");
    heals(&cache, 64).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_server_that_stops_or_dies_amid_loads_gives_prefixes_in_time() {
    let mut server = RedisServer::start();
    let budget = Duration::from_millis(300);
    let times = KvPrefixConfig { load_timeout: budget, ..config() };
    let cache = KvPrefixCache::new(times, None, vec![open(&server.url())], FINGERPRINT);
    let mut num_cut = 0;
    for round in 0..12 {
        heals(&cache, 100).await;
        let loads: Vec<_> = (0..4)
            .map(|_| {
                let cache = cache.clone();
                tokio::spawn(async move {
                    let start = Instant::now();
                    let num_loaded = load(&cache, 100).await;
                    assert!(start.elapsed() < budget + SLACK, "{:?}", start.elapsed());
                    num_loaded
                })
            })
            .collect();
        if round % 2 == 0 {
            server.signal("STOP");
        } else {
            server.kill();
        }
        for load in loads {
            num_cut += usize::from(load.await.expect("none is late, none wrong") < 100);
        }
        if round % 2 == 0 {
            server.signal("CONT");
        } else {
            server.restart();
        }
    }
    assert!(num_cut > 0, "some load was met by it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_goes_as_a_whole_is_found_again() {
    let mut cluster = RedisCluster::start();
    let cache = KvPrefixCache::new(config(), None, vec![open(&cluster.url())], FINGERPRINT);
    heals(&cache, 60).await;
    for round in 0..2 {
        cluster.nodes.iter_mut().for_each(RedisServer::kill);
        // Until the client has lost them all.
        let end = Instant::now() + Duration::from_secs(round);
        while Instant::now() < end || load(&cache, 60).await > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        cluster.nodes.iter_mut().for_each(RedisServer::restart);
        cluster.wait_until_whole();
        heals(&cache, 60).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_keeps_blocks_on_every_master_and_loses_one_without_harm() {
    let mut cluster = RedisCluster::with_options(&["--cluster-require-full-coverage", "no"]);
    let budget = Duration::from_millis(500);
    let times = KvPrefixConfig { load_timeout: budget, write_timeout: budget, ..config() };
    let cache = KvPrefixCache::new(times, None, vec![open(&cluster.url())], FINGERPRINT);
    heals(&cache, 60).await;
    for node in &cluster.nodes {
        assert!(node.keys().len() > 5, "the slots share the keys out");
    }
    let lost: Vec<_> = cluster.nodes.iter().map(RedisServer::keys).collect();
    let num_left = |node: usize| (0..60).take_while(|&number| !lost[node].contains(&key(number))).count();
    let node = (0..3).max_by_key(|&node| num_left(node)).expect("there are three");
    let num_left = num_left(node);
    assert!(num_left > 1, "each node lacks one of the first two");
    cluster.nodes[node].kill();
    // While the client finds out which node went, the others may be late, too.
    let end = late();
    loop {
        let start = Instant::now();
        let num_loaded = load(&cache, 60).await;
        assert!(start.elapsed() < budget + SLACK, "{:?}", start.elapsed());
        assert!(num_loaded <= num_left && start < end, "{num_loaded} of {num_left}");
        if num_loaded == num_left {
            break;
        }
    }
    cluster.nodes[node].restart();
    cluster.wait_until_whole();
    heals(&cache, 60).await;
}

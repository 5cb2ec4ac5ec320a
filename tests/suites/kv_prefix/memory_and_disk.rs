//! Blocks in memory and in a directory.

use std::fs;

use cache::store::Tier;

use super::*;
use crate::counters::Counters;

#[tokio::test]
async fn leading_blocks_are_counted_and_loaded_up_to_the_first_hole() {
    let cache = KvPrefixCache::new(config(), Some(memory()), vec![], FINGERPRINT);
    assert_eq!(cache.look_up(&names(8), late()).await, cache::KvHint { num_blocks: 0, seconds_per_block: None });
    let payloads: Vec<_> = (0..8).map(payload_of).collect();
    for number in [0, 1, 2, 3, 4, 6, 7] {
        assert!(!cache.is_known(&name(number)));
        cache.store(name(number), payloads[number].clone());
        assert!(cache.is_known(&name(number)));
    }
    assert_eq!(cache.look_up(&names(8), late()).await, cache::KvHint { num_blocks: 5, seconds_per_block: None });
    let blocks = cache.load(&names(8)).await;
    assert_eq!(blocks, payloads[..5]);
    assert!(
        blocks.iter().zip(&payloads).all(|(block, payload)| block.as_ptr() == payload.as_ptr()),
        "nothing is copied"
    );
    let hint = cache.look_up(&names(8), late()).await;
    let seconds = hint.seconds_per_block.expect("it was measured");
    assert!(hint.num_blocks == 5 && seconds > 0.0 && seconds < 0.1, "{hint:?}");
    assert_eq!(cache.look_up(&[], late()).await.num_blocks + cache.load(&[]).await.len() + load(&cache, 3).await, 3);
    cache.clear(late()).await.expect("memory can be cleared");
    assert_eq!((cache.look_up(&names(8), late()).await.num_blocks, load(&cache, 8).await), (0, 0));
    assert!(!cache.is_known(&name(0)));
}

#[tokio::test]
async fn a_full_memory_lets_the_oldest_go() {
    let memory = Arc::new(MemoryStore::new(10 * BLOCK_BYTES as u64));
    let cache = KvPrefixCache::new(config(), Some(memory), vec![], FINGERPRINT);
    for number in (0..100).rev() {
        cache.store(name(number), payload_of(number));
    }
    let [row] = cache.stats(late()).await[..] else { panic!("there is one tier") };
    assert!(row.bytes.is_some_and(|bytes| bytes <= 10 * BLOCK_BYTES as u64), "{row:?}");
    assert_eq!((row.tier, row.num_entries), (Tier::Memory, Some(9)));
    assert_eq!((load(&cache, 100).await, cache.look_up(&names(100), late()).await.num_blocks), (9, 9));
    assert!(!cache.is_known(&name(50)), "what went is worth storing again");
}

#[tokio::test]
async fn a_restart_finds_its_blocks_on_disk_and_takes_them_up_into_memory() {
    let directory = Directory::new();
    keep(&KvPrefixCache::new(config(), Some(memory()), vec![directory.open()], FINGERPRINT), 50).await;
    let cache = KvPrefixCache::new(config(), Some(memory()), vec![directory.open()], FINGERPRINT);
    assert_eq!(cache.look_up(&names(60), late()).await, cache::KvHint { num_blocks: 50, seconds_per_block: None });
    assert!(!cache.is_known(&name(7)));
    assert_eq!(load(&cache, 60).await, 50);
    assert!(cache.is_known(&name(7)), "memory has it, and disk gave it");
    let rows = cache.stats(late()).await;
    assert_eq!(
        rows.iter().map(|row| (row.tier, row.num_entries)).collect::<Vec<_>>(),
        [(Tier::Memory, Some(50)), (Tier::Disk, Some(50)),]
    );
    fs::remove_dir_all(directory.path()).expect("it can be removed");
    assert_eq!(load(&cache, 60).await, 50, "memory has them all");
}

#[tokio::test]
async fn a_bad_file_ends_the_prefix_and_is_removed_and_counted() {
    let counters = Counters::default();
    let _recording = metrics::set_default_local_recorder(&counters);
    let directory = Directory::new();
    keep(&over(vec![directory.open()]), 20).await;
    let whole = fs::read(directory.file(10)).expect("it was written");
    let mut flipped = whole.clone();
    flipped[BLOCK_BYTES / 2] ^= 4;
    let cut = &whole[..BLOCK_BYTES / 2];
    let other = fs::read(directory.file(11)).expect("it was written");
    for (bytes, reason) in [(&flipped[..], "checksum"), (cut, "truncated"), (&other, "key"), (b"x", "truncated")] {
        let cache = over(vec![directory.open()]);
        fs::write(directory.file(10), bytes).expect("it can be written");
        let key = format!("moesaic_cache_bad_values_total kv disk {reason}");
        let before = counters.get(&key);
        assert_eq!(cache.look_up(&names(20), late()).await.num_blocks, 20, "a look reads nothing");
        assert_eq!(load(&cache, 20).await, 10, "{reason}");
        assert_eq!(counters.get(&key), before + 1, "{reason}");
        assert!(!directory.file(10).exists(), "{reason}");
        assert_eq!(cache.look_up(&names(20), late()).await.num_blocks, 10);
        assert!(!cache.is_known(&name(10)), "it is worth storing again");
        cache.store(name(10), payload_of(10));
        cache.settle(late()).await;
        assert_eq!(load(&cache, 20).await, 20);
    }
    let foreign = KvPrefixCache::new(config(), None, vec![directory.open()], Fingerprint::from_bytes([6; 32]));
    assert_eq!(load(&foreign, 1).await, 0);
    assert_eq!(counters.get("moesaic_cache_bad_values_total kv disk fingerprint"), 1);
    assert!(!directory.file(0).exists());
}

#[tokio::test]
async fn what_is_longer_than_a_block_is_neither_kept_nor_loaded() {
    let counters = Counters::default();
    let _recording = metrics::set_default_local_recorder(&counters);
    let directory = Directory::new();
    keep(&over(vec![directory.open()]), 2).await;
    let smaller = KvPrefixConfig { max_block_bytes: BLOCK_BYTES - 1, ..config() };
    let cache = KvPrefixCache::new(smaller, Some(memory()), vec![directory.open()], FINGERPRINT);
    assert_eq!(load(&cache, 2).await, 0);
    assert_eq!(counters.get("moesaic_cache_bad_values_total kv disk payload"), 2);
    assert!(!directory.file(0).exists() && !directory.file(1).exists());
    cache.store(name(0), payload_of(0));
    assert!(!cache.is_known(&name(0)));
    assert_eq!(counters.get("moesaic_cache_dropped_writes_total kv"), 1);
}

#[tokio::test]
async fn a_directory_that_is_removed_costs_its_blocks_and_nothing_else() {
    let directory = Directory::new();
    let cache = over(vec![directory.open()]);
    keep(&cache, 10).await;
    assert!(cache.is_known(&name(0)));
    fs::remove_dir_all(directory.path()).expect("it can be removed");
    assert_eq!(load(&cache, 10).await, 0);
    assert!(!cache.is_known(&name(0)));
    keep(&cache, 10).await;
    assert_eq!((cache.look_up(&names(10), late()).await.num_blocks, load(&cache, 10).await), (10, 10));
    fs::remove_dir_all(directory.path()).expect("it can be removed");
    assert_eq!(cache.look_up(&names(10), late()).await.num_blocks, 0);
    fs::write(directory.path(), "a file in its place").expect("it can be written");
    keep(&cache, 10).await;
    assert!((0..10).all(|number| !cache.is_known(&name(number))), "what failed is worth storing again");
    assert_eq!(load(&cache, 10).await, 0);
    fs::remove_file(directory.path()).expect("it can be removed");
}

#[tokio::test]
async fn loads_are_bounded_in_number_and_bytes() {
    let directory = Directory::new();
    keep(&over(vec![directory.open()]), 30).await;
    let bounds = KvPrefixConfig { max_loads: 1, max_load_bytes: 12 * BLOCK_BYTES, ..config() };
    let cache = KvPrefixCache::new(bounds, None, vec![directory.open()], FINGERPRINT);
    let loads = (0..8).map(|_| load(&cache, 30));
    assert_eq!(futures::future::join_all(loads).await, [12; 8], "one after the other, so much of each");
    let none = KvPrefixConfig { max_loads: 0, max_load_bytes: 0, ..config() };
    let cache = KvPrefixCache::new(none, Some(memory()), vec![directory.open()], FINGERPRINT);
    assert_eq!((load(&cache, 30).await, load(&cache, 30).await), (1, 2), "one block always");
}

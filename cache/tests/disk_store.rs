//! The disk tier on a real directory: kept across restarts, bounded, shared, and a miss where files are damaged or gone.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use cache::store::{Address, DiskConfig, DiskStore, Kind, MAX_DISK_CALLS, Store as _, Tier, Value};
use cache::{BreakerConfig, CacheError, Digest, Fingerprint};
use tokio::time::Instant;

const HOUR: Duration = Duration::from_secs(3600);
const BLOCK_BYTES: u64 = 4096;

/// A directory that goes with the test.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        static NUM_MADE: AtomicU64 = AtomicU64::new(0);
        let number = NUM_MADE.fetch_add(1, Ordering::Relaxed);
        Self(std::env::temp_dir().join(format!("moesaic-cache-{}-{number}", std::process::id())))
    }

    fn open(&self, max_bytes: u64) -> DiskStore {
        let breaker = BreakerConfig {
            max_failures: 3,
            min_pause: Duration::from_millis(20),
            max_pause: Duration::from_millis(100),
        };
        let config = DiskConfig {
            directory: self.0.clone(),
            max_bytes,
            max_value_bytes: 100_000,
            scan_interval: Duration::from_millis(5),
            breaker,
        };
        DiskStore::open(config).expect("the directory can be made")
    }

    fn file(&self, number: u64) -> PathBuf {
        let hex = address(number).key.to_hex();
        self.0.join("output").join(&hex[..2]).join(hex)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // What is left is in the folder of temporary files.
        drop(fs::remove_dir_all(&self.0));
    }
}

fn address(number: u64) -> Address {
    let key = Digest::new("test").number("n", number).key();
    Address { kind: Kind::Output, key, fingerprint: Fingerprint::from_bytes([5; 32]) }
}

fn payload_of(number: u64) -> Bytes {
    Bytes::from(format!("value {number}"))
}

fn late() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

async fn keep(store: &DiskStore, number: u64) {
    store.put(&address(number), Value { payload: payload_of(number), ttl: HOUR }, late()).await.expect("it is kept");
}

async fn look(store: &DiskStore, number: u64) -> Option<Bytes> {
    let found = store.get(&address(number), late()).await.expect("it can be read")?;
    assert_eq!((&found.payload, found.tier), (&payload_of(number), Tier::Disk));
    assert!(found.ttl <= HOUR);
    Some(found.payload)
}

fn files_in(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return vec![folder.to_owned()] };
    entries.flat_map(|entry| files_in(&entry.expect("it can be listed").path())).collect()
}

/// Looks again and again until `probe` is true.
async fn until(what: &str, mut probe: impl AsyncFnMut() -> bool) {
    let end = late();
    while !probe().await {
        assert!(Instant::now() < end, "{what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn values_outlive_the_process_and_end() {
    let directory = Directory::new();
    keep(&directory.open(1 << 20), 1).await;
    let store = directory.open(1 << 20);
    assert!(look(&store, 1).await.is_some());
    assert_eq!(look(&store, 2).await, None);
    let short = Value { payload: payload_of(3), ttl: Duration::from_millis(1) };
    store.put(&address(3), short, late()).await.expect("it is kept");
    let written = SystemTime::now();
    while written.elapsed().is_ok_and(|passed| passed < Duration::from_millis(3)) {
        tokio::task::yield_now().await;
    }
    assert_eq!(look(&store, 3).await, None);
    assert!(!directory.file(3).exists(), "what is over is removed");
    store.remove(&address(1), late()).await.expect("it is removed");
    assert_eq!(look(&store, 1).await, None);
    let large = Value { payload: Bytes::from(vec![0; 100_001]), ttl: HOUR };
    let refused = store.put(&address(4), large, late()).await;
    assert!(matches!(refused, Err(CacheError::TooLarge { tier: Tier::Disk, .. })), "{refused:?}");
}

#[tokio::test]
async fn the_least_recently_used_is_evicted_in_this_life_and_the_next() {
    let directory = Directory::new();
    let store = directory.open(4 * BLOCK_BYTES);
    for number in 0..4 {
        keep(&store, number).await;
    }
    look(&store, 0).await.expect("there is room for four");
    keep(&store, 4).await;
    assert_eq!(look(&store, 1).await, None);
    assert!(look(&store, 0).await.is_some());
    drop(store);
    for (number, age) in [(0, 10), (2, 40), (3, 30), (4, 20)] {
        let file = fs::File::options().write(true).open(directory.file(number)).expect("it is there");
        file.set_modified(SystemTime::now() - Duration::from_secs(age)).expect("it is a plain file");
    }
    let store = directory.open(4 * BLOCK_BYTES);
    until("it takes in what is there", async || {
        let stats = store.stats(late()).await[0];
        (stats.num_entries, stats.bytes) == (Some(4), Some(4 * BLOCK_BYTES))
    })
    .await;
    keep(&store, 5).await;
    assert_eq!(look(&store, 2).await, None);
    for number in [0, 3, 4, 5] {
        assert!(look(&store, number).await.is_some(), "{number}");
    }
    drop(store);
    let _smaller = directory.open(2 * BLOCK_BYTES);
    until("a smaller limit holds", async || files_in(&directory.0).len() == 2).await;
}

#[tokio::test]
async fn damaged_files_are_misses_and_removed() {
    let directory = Directory::new();
    // Room for the one that is far too long, too: a scan that sees it must not evict the others.
    let store = directory.open(4 << 20);
    keep(&store, 1).await;
    keep(&store, 2).await;
    let (file, whole) = (directory.file(1), fs::read(directory.file(1)).expect("it is there"));
    let check = async |bytes: &[u8], what: &str| {
        fs::write(&file, bytes).expect("it can be written");
        assert_eq!(look(&store, 1).await, None, "{what}");
        assert!(!file.exists(), "{what}");
    };
    for at in 0..whole.len() {
        let mut flipped = whole.clone();
        flipped[at] ^= 1 << (at % 8);
        check(&flipped, &format!("flipped at {at}")).await;
        check(&whole[..at], &format!("cut at {at}")).await;
    }
    check(&vec![0; 1 << 20], "far too long").await;
    check(&fs::read(directory.file(2)).expect("it is there"), "the value of another key").await;
    fs::write(&file, &whole).expect("it can be written");
    assert!(look(&store, 1).await.is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_processes_share_a_directory() {
    let directory = Directory::new();
    let stores = [directory.open(64 * BLOCK_BYTES), directory.open(64 * BLOCK_BYTES)].map(std::sync::Arc::new);
    let tasks = stores.clone().into_iter().map(|store| {
        tokio::spawn(async move {
            for round in 0..3 {
                for number in 0..100 {
                    keep(&store, number).await;
                    // The other may have evicted it: then it is a miss, never half a value.
                    drop(look(&store, (number + round * 37) % 100).await);
                }
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.expect("neither fails");
    }
    keep(&stores[0], 1000).await;
    assert!(look(&stores[1], 1000).await.is_some());
    assert!(files_in(&directory.0).iter().all(|file| file.extension().is_none()), "nothing unfinished is left");
    until("the limit holds", async || files_in(&directory.0).len() <= 64).await;
}

#[tokio::test]
async fn clearing_takes_one_kind_or_all_and_leaves_what_is_not_a_value() {
    let directory = Directory::new();
    let store = directory.open(1 << 20);
    let kv = Address { kind: Kind::Kv, ..address(1) };
    for number in 0..20 {
        keep(&store, number).await;
    }
    store.put(&kv, Value { payload: payload_of(1), ttl: HOUR }, late()).await.expect("it is kept");
    let other = directory.file(1).with_file_name("notes.txt");
    fs::write(&other, "mine").expect("it can be written");
    store.clear(Some(Kind::Output), late()).await.expect("it is cleared");
    assert_eq!(store.stats(late()).await[0].num_entries, Some(1));
    assert!(store.get(&kv, late()).await.expect("it can be read").is_some());
    store.clear(None, late()).await.expect("it is cleared");
    assert_eq!(files_in(&directory.0.join("kv")).iter().filter(|path| path.is_file()).count(), 0);
    assert!(other.exists());
}

#[tokio::test]
async fn what_writers_that_died_left_is_swept_once_it_is_old() {
    let directory = Directory::new();
    let store = directory.open(1 << 20);
    keep(&store, 1).await;
    let (old, young) = (directory.file(1).with_extension("1-1-1.new"), directory.file(1).with_extension("1-1-2.new"));
    for (path, age) in [(&old, 2 * HOUR), (&young, Duration::ZERO)] {
        fs::write(path, "half").expect("it can be written");
        let file = fs::File::options().write(true).open(path).expect("it is there");
        file.set_modified(SystemTime::now() - age).expect("it is a plain file");
    }
    until("what is old is swept", async || !old.exists()).await;
    assert!(young.exists());
}

#[tokio::test]
async fn a_directory_that_goes_or_cannot_be_used_fails_no_caller() {
    let directory = Directory::new();
    let store = directory.open(1 << 20);
    keep(&store, 1).await;
    fs::remove_dir_all(&directory.0).expect("it can be removed");
    assert_eq!(look(&store, 1).await, None);
    keep(&store, 2).await;
    assert!(look(&store, 2).await.is_some(), "it was made again");
    fs::remove_dir_all(&directory.0).expect("it can be removed");
    fs::write(&directory.0, "a file in its place").expect("it can be written");
    let kept = store.put(&address(3), Value { payload: payload_of(3), ttl: HOUR }, late()).await;
    assert!(matches!(kept, Err(CacheError::Disk(_))), "{kept:?}");
    assert!(store.get(&address(3), late()).await.is_err());
    fs::remove_file(&directory.0).expect("it can be removed");
    keep(&store, 3).await;
    assert!(look(&store, 3).await.is_some(), "it heals alone");
}

/// Makes a file whose reader waits for a writer, for as long as there is none.
fn make_fifo(path: &Path) {
    fs::create_dir_all(path.parent().expect("it lies in a folder")).expect("it can be made");
    let made = std::process::Command::new("mkfifo").arg(path).status().expect("there is mkfifo");
    assert!(made.success());
}

#[tokio::test]
async fn a_file_system_that_hangs_costs_a_few_calls_and_heals_alone() {
    const BUDGET: Duration = Duration::from_millis(50);
    let directory = Directory::new();
    let store = directory.open(1 << 20);
    keep(&store, 1000).await;
    let num_calls = MAX_DISK_CALLS as u64;
    for number in 0..num_calls {
        make_fifo(&directory.file(number));
    }
    // As many as may be in the file system at once: nothing gets through any more, the probes neither.
    let addresses: Vec<_> = (0..num_calls).map(address).collect();
    let looks = addresses.iter().map(|address| store.get(address, Instant::now() + BUDGET));
    for found in futures::future::join_all(looks).await {
        assert!(matches!(found, Err(CacheError::Timeout { tier: Tier::Disk })), "{found:?}");
    }
    let start = Instant::now();
    let mut num_looks = 0;
    while start.elapsed() < Duration::from_millis(300) {
        let found = store.get(&address(1000), Instant::now() + BUDGET).await;
        assert!(matches!(found, Err(CacheError::CircuitOpen { tier: Tier::Disk })), "{found:?}");
        num_looks += 1;
        tokio::task::yield_now().await;
    }
    assert!(num_looks > 100, "{num_looks} looks: they cost nothing");
    assert!(!store.stats(late()).await[0].is_available);
    for number in 0..num_calls {
        // The reader is there, and reads to the end of nothing.
        drop(fs::File::options().write(true).open(directory.file(number)).expect("it can be written"));
    }
    until("it heals", async || {
        let found = store.get(&address(1000), late()).await;
        found.is_ok_and(|found| found.is_some_and(|found| found.payload == payload_of(1000)))
    })
    .await;
    keep(&store, 0).await;
    assert!(look(&store, 0).await.is_some() && store.stats(late()).await[0].is_available);
}

#[tokio::test]
async fn kv_blocks_that_hang_leave_room_for_calls_about_others() {
    let directory = Directory::new();
    let store = directory.open(1 << 20);
    keep(&store, 1000).await;
    let kv: Vec<_> =
        (0..2 * MAX_DISK_CALLS as u64).map(|number| Address { kind: Kind::Kv, ..address(number) }).collect();
    let files: Vec<_> = (0..kv.len() as u64)
        .map(|number| {
            let file = directory.file(number);
            directory.0.join("kv").join(file.strip_prefix(directory.0.join("output")).expect("it is an output"))
        })
        .collect();
    files.iter().for_each(|file| make_fifo(file));
    let budget = Duration::from_millis(500);
    let deadline = Instant::now() + budget;
    let hanging = futures::future::join_all(kv.iter().map(|address| store.get(address, deadline)));
    let looking = async {
        // After all of them have begun.
        tokio::task::yield_now().await;
        let found = look(&store, 1000).await;
        (found, Instant::now())
    };
    let (late, (found, when)) = futures::future::join(hanging, looking).await;
    for file in &files {
        // Its reader, if there is one, reads to the end of nothing; whoever comes later finds no file.
        let writer = fs::File::options().read(true).write(true).open(file).expect("it can be written");
        fs::remove_file(file).expect("it is there");
        drop(writer);
    }
    assert!(found.is_some() && when < deadline, "it need not wait until they end");
    assert!(late.iter().all(Result::is_err), "{late:?}");
}

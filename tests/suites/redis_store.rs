//! The Redis tier of the cache against a real redis-server: found, shared, and whatever goes wrong a miss within the budget.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use cache::store::{
    Address, Kind, MemoryStore, RedisConfig, RedisStore, Store as _, Tier, TieredConfig, TieredStore, Value,
};
use cache::{
    Access, BreakerConfig, CacheError, Digest, End, Fingerprint, FlightEvent, Lookup, OutputCache, OutputCacheConfig,
    Token,
};
use harness::PATIENCE;
use harness::faulty_proxy::{Faults, FaultyProxy};
use harness::redis::{RedisCluster, RedisServer, Reply};
use tokio::time::Instant;

/// Time that a call may take.
const BUDGET: Duration = Duration::from_millis(50);

/// What a busy machine with two cores may add to it.
const SLACK: Duration = Duration::from_millis(250);

const HOUR: Duration = Duration::from_secs(3600);

const FINGERPRINT: Fingerprint = Fingerprint::from_bytes([5; 32]);

/// A tier whose every answer is checked.
struct Checked {
    store: RedisStore,
}

impl Checked {
    fn open(url: &str) -> Self {
        Self::with_breaker(url, 3)
    }

    /// One that tries every call, so that every fault is met.
    fn stubborn(url: &str) -> Self {
        Self::with_breaker(url, u32::MAX)
    }

    fn with_breaker(url: &str, max_failures: u32) -> Self {
        let (min_pause, max_pause) = (Duration::from_millis(20), Duration::from_millis(100));
        let breaker = BreakerConfig { max_failures, min_pause, max_pause };
        let config = RedisConfig {
            url: url.to_owned(),
            ca: None,
            key_prefix: "moesaic".to_owned(),
            max_value_bytes: 1 << 20,
            max_block_bytes: 2 << 20,
            breaker,
        };
        Self { store: RedisStore::open(&config).expect("the address is right") }
    }

    /// Looks value `number` up: none, or the right one, in time.
    async fn look(&self, number: u64) -> Option<Bytes> {
        self.try_look(number).await.ok().flatten()
    }

    async fn try_look(&self, number: u64) -> Result<Option<Bytes>, CacheError> {
        let start = Instant::now();
        let found = self.store.get(&address(number), start + BUDGET).await;
        assert!(start.elapsed() < BUDGET + SLACK, "a look took {:?}", start.elapsed());
        let payload = found?.map(|found| found.payload);
        assert!(payload.is_none() || payload == Some(payload_of(number)), "a wrong value for {number}");
        Ok(payload)
    }

    /// Waits until values of all nodes are kept and found.
    async fn serves_all(&self) {
        until("all nodes serve", async || {
            let mut is_served = true;
            for number in 0..30 {
                is_served &= self.keep(number).await.is_ok() && self.look(number).await.is_some();
            }
            is_served
        })
        .await;
    }

    async fn keep(&self, number: u64) -> Result<(), CacheError> {
        let start = Instant::now();
        let value = Value { payload: payload_of(number), ttl: HOUR };
        let kept = self.store.put(&address(number), value, start + BUDGET).await;
        assert!(start.elapsed() < BUDGET + SLACK, "a write took {:?}", start.elapsed());
        kept
    }

    /// Calls until a value is kept and found again.
    async fn heals(&self) {
        until("values are kept and found", async || self.keep(1).await.is_ok() && self.look(1).await.is_some()).await;
    }

    async fn breaks(&self) {
        until("the circuit opens", async || self.is_left_alone().await).await;
    }

    /// Whether a look is not even tried.
    async fn is_left_alone(&self) -> bool {
        matches!(self.try_look(2).await, Err(CacheError::CircuitOpen { tier: Tier::Redis }))
    }
}

/// Looks again and again until `probe` is true.
async fn until(what: &str, mut probe: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !probe().await {
        assert!(start.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn address(number: u64) -> Address {
    Address { kind: Kind::Output, key: Digest::new("test").number("n", number).key(), fingerprint: FINGERPRINT }
}

fn payload_of(number: u64) -> Bytes {
    Bytes::from(format!("value {number} ").repeat(1 + (number % 50) as usize))
}

fn key_of(number: u64) -> String {
    format!("moesaic:output:{}", address(number).key.to_hex())
}

#[tokio::test(flavor = "multi_thread")]
async fn values_are_found_over_tcp_and_over_a_socket_and_end() {
    let server = RedisServer::start();
    for url in [server.url(), server.socket_url()] {
        let tier = Checked::open(&url);
        tier.heals().await;
        assert_eq!(tier.try_look(2).await.expect("Redis answers"), None);
        let found = tier.store.get(&address(1), Instant::now() + BUDGET).await.expect("Redis answers");
        let found = found.expect("it was kept");
        assert!(found.tier == Tier::Redis && found.ttl <= HOUR && found.ttl > HOUR - Duration::from_secs(60));
        let Reply::Integer(millis) = server.command(&["PTTL", &key_of(1)]) else { panic!("it has a lifetime") };
        assert!((3_500_000..=3_600_000).contains(&millis), "{millis}");
        tier.store.remove(&address(1), Instant::now() + BUDGET).await.expect("Redis answers");
        assert_eq!(tier.try_look(1).await.expect("Redis answers"), None);
        assert!(tier.store.stats(Instant::now() + BUDGET).await[0].is_available);
    }
    let tier = Checked::open(&server.url());
    let short = Value { payload: payload_of(3), ttl: Duration::from_millis(30) };
    tier.store.put(&address(3), short, Instant::now() + PATIENCE).await.expect("Redis answers");
    until("its lifetime ends", async || tier.look(3).await.is_none()).await;
    // Blocks may be larger than answers.
    let block = Address { kind: Kind::Kv, ..address(4) };
    for (address, limit) in [(address(4), 1 << 20), (block, 2 << 20)] {
        let value = |len| Value { payload: Bytes::from(vec![7; len]), ttl: HOUR };
        let refused = tier.store.put(&address, value(limit + 1), Instant::now() + BUDGET).await;
        assert!(matches!(refused, Err(CacheError::TooLarge { tier: Tier::Redis, .. })), "{refused:?}");
        tier.store.put(&address, value(limit), Instant::now() + PATIENCE).await.expect("Redis answers");
        let found = tier.store.get(&address, Instant::now() + PATIENCE).await.expect("Redis answers");
        assert_eq!(found.map(|found| found.payload.len()), Some(limit), "it comes back whole");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clearing_takes_one_kind_or_all_and_nothing_of_others() {
    let server = RedisServer::start();
    let tier = Checked::open(&server.url());
    tier.heals().await;
    for number in 0..2000 {
        tier.store
            .put(&address(number), Value { payload: payload_of(number), ttl: HOUR }, Instant::now() + PATIENCE)
            .await
            .expect("Redis answers");
    }
    let kv = Address { kind: Kind::Kv, ..address(1) };
    let value = Value { payload: payload_of(1), ttl: HOUR };
    tier.store.put(&kv, value, Instant::now() + PATIENCE).await.expect("Redis answers");
    server.set("another", b"value");
    tier.store.clear(Some(Kind::Output), Instant::now() + PATIENCE).await.expect("Redis answers");
    assert_eq!(server.keys(), ["another".to_owned(), format!("moesaic:kv:{}", kv.key.to_hex())]);
    tier.store.clear(None, Instant::now() + PATIENCE).await.expect("Redis answers");
    assert_eq!(server.keys(), ["another"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_down_at_the_start_is_found_when_it_comes() {
    let mut server = RedisServer::start();
    server.kill();
    let tier = Checked::open(&server.url());
    assert_eq!(tier.look(1).await, None);
    tier.breaks().await;
    server.restart();
    tier.heals().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_keeps_a_connection_from_being_set_up_opens_the_circuit() {
    let server = RedisServer::start();
    let address = server.address();
    for url in [
        format!("redis://{address}/99"),
        format!("redis+cluster://{address}"),
        format!("redis://:wrong@{address}"),
        format!("redis://nobody:wrong@{address}"),
    ] {
        Checked::open(&url).breaks().await;
        // One look is enough where somebody asks for it.
        let tier = Checked::open(&url);
        tier.store.check().await;
        assert!(tier.is_left_alone().await, "{url}");
    }
    let tier = Checked::open(&server.url());
    tier.store.check().await;
    assert!(tier.try_look(1).await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn killed_amid_requests_and_started_again_it_heals_alone() {
    let mut server = RedisServer::start();
    let tier = Arc::new(Checked::open(&server.url()));
    tier.heals().await;
    let (is_over, num_found) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let clients: Vec<_> = (0..16)
        .map(|client| {
            let (tier, is_over, num_found) = (Arc::clone(&tier), Arc::clone(&is_over), Arc::clone(&num_found));
            tokio::spawn(async move {
                let mut number = client;
                while !is_over.load(Ordering::Relaxed) {
                    drop(tier.keep(number).await);
                    if tier.look(number).await.is_some() {
                        num_found.fetch_add(1, Ordering::Relaxed);
                    }
                    number += 16;
                    // Calls that fail at once must not starve the others of this machine.
                    tokio::task::yield_now().await;
                }
            })
        })
        .collect();
    for _ in 0..3 {
        let before = num_found.load(Ordering::Relaxed);
        until("requests under way", async || num_found.load(Ordering::Relaxed) > before + 20).await;
        server.kill();
        tier.breaks().await;
        server.restart();
        until("it heals", async || !tier.is_left_alone().await).await;
    }
    tier.heals().await;
    is_over.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.expect("no request fails, none is late, none sees a wrong value");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_hangs_costs_the_budget_a_few_times_and_then_nothing() {
    let server = RedisServer::start();
    let tier = Checked::open(&server.url());
    tier.heals().await;
    server.signal("STOP");
    tier.breaks().await;
    let start = Instant::now();
    for number in 0..200 {
        assert_eq!(tier.look(number).await, None);
    }
    // At the budget each, they would take ten seconds.
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert!(tier.is_left_alone().await);
    assert!(!tier.store.stats(Instant::now() + BUDGET).await[0].is_available);
    server.signal("CONT");
    tier.heals().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_server_evicts_or_refuses_and_stays_in_use() {
    let large = |number: u8| Value { payload: Bytes::from(vec![number; 200_000]), ttl: HOUR };
    let evicting = RedisServer::with_options(&["--maxmemory", "4mb", "--maxmemory-policy", "allkeys-lru"]);
    let tier = Checked::open(&evicting.url());
    tier.heals().await;
    for number in 0..60 {
        let deadline = Instant::now() + PATIENCE;
        tier.store.put(&address(number.into()), large(number), deadline).await.expect("it makes room");
        let found = tier.store.get(&address(number.into()), deadline).await.expect("it answers");
        assert_eq!(found.expect("the newest stays").payload, large(number).payload);
    }
    assert_eq!(tier.store.get(&address(0), Instant::now() + PATIENCE).await.expect("it answers"), None);

    let refusing = RedisServer::with_options(&["--maxmemory", "4mb", "--maxmemory-policy", "noeviction"]);
    let tier = Checked::open(&refusing.url());
    tier.heals().await;
    let mut num_refused = 0;
    for number in 100..160 {
        let kept = tier.store.put(&address(number), large(1), Instant::now() + PATIENCE).await;
        num_refused += usize::from(kept.is_err());
    }
    assert!(num_refused > 30, "{num_refused} of 60 refused");
    assert!(!tier.is_left_alone().await, "it answers look-ups");
    assert!(tier.look(1).await.is_some(), "what was kept before it was full is still found");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_another_type_are_errors_and_overwritten() {
    let server = RedisServer::start();
    let tier = Checked::open(&server.url());
    tier.heals().await;
    for create in [["RPUSH", "x", "y"], ["SADD", "x", "y"], ["PFADD", "x", "y"]] {
        let mut create = create.map(str::to_owned);
        create[1] = key_of(7);
        server.command(&["DEL", &key_of(7)]);
        assert_eq!(server.command(&create), Reply::Integer(1));
        for _ in 0..10 {
            // A HyperLogLog is a string that Redis reads as such: a bad value instead of an error.
            assert_eq!(tier.look(7).await, None);
        }
        assert!(!tier.is_left_alone().await, "it answers all the same");
        tier.keep(7).await.expect("a value takes the key over");
        assert!(tier.look(7).await.is_some());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_and_moved_values_are_misses_and_removed() {
    let server = RedisServer::start();
    let tier = Checked::open(&server.url());
    tier.heals().await;
    tier.keep(3).await.expect("Redis answers");
    let (key, whole) = (key_of(3), server.bytes(&key_of(3)));
    let check = async |bytes: &[u8], what: &str| {
        server.set(&key, bytes);
        assert_eq!(tier.try_look(3).await.expect("Redis answers"), None, "{what}");
        assert_eq!(server.command(&["EXISTS", &key]), Reply::Integer(0), "{what}");
    };
    for at in 0..whole.len() {
        let mut flipped = whole.clone();
        flipped[at] ^= 1 << (at % 8);
        check(&flipped, &format!("flipped at {at}")).await;
        if at > 0 {
            check(&whole[..at], &format!("cut at {at}")).await;
        }
    }
    check(&[&whole[..], b"x"].concat(), "longer").await;
    check(&vec![b'x'; 5 << 20], "far too long").await;
    tier.keep(4).await.expect("Redis answers");
    check(&server.bytes(&key_of(4)), "the value of another key").await;
    server.set(&key, &whole);
    assert!(tier.look(3).await.is_some(), "the whole one is right");
    let other = Address { fingerprint: Fingerprint::from_bytes([6; 32]), ..address(3) };
    assert_eq!(tier.store.get(&other, Instant::now() + PATIENCE).await.expect("Redis answers"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn flushed_values_are_plain_misses() {
    let server = RedisServer::start();
    let tier = Checked::open(&server.url());
    tier.heals().await;
    server.command(&["FLUSHALL"]);
    assert_eq!(tier.try_look(1).await.expect("Redis answers"), None);
    tier.heals().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_cut_at_any_byte_are_misses() {
    let server = RedisServer::start();
    let proxy = FaultyProxy::start(server.address());
    let tier = Checked::stubborn(&format!("redis://{}/", proxy.address()));
    tier.heals().await;
    // What connecting says, a look-up and a write: a few hundred bytes either way.
    for bytes in (0..60).chain((60..600).step_by(9)) {
        for faults in [
            Faults { cut_replies_after: Some(bytes), ..Faults::default() },
            Faults { cut_requests_after: Some(bytes), ..Faults::default() },
        ] {
            proxy.set(faults);
            drop(tier.look(1).await);
            drop(tier.keep(1).await);
            drop(tier.look(1).await);
        }
    }
    proxy.set(Faults::default());
    tier.heals().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_are_no_redis_are_misses() {
    let server = RedisServer::start();
    let proxy = FaultyProxy::start(server.address());
    let tier = Checked::stubborn(&format!("redis://{}/", proxy.address()));
    tier.heals().await;
    let garbage: [&[u8]; 9] = [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\0\0\0\0\0\0",
        b"$-5\r\n",
        b"$99999999999999\r\nabc",
        b"*1000000000\r\n",
        b"+OK\r\n+OK\r\n+OK\r\n+OK\r\n",
        b":1\r\n",
        b"$3\r\nabcdef\r\n",
        b"-ERR\r\n$5\r\nwrong\r\n",
    ];
    for bytes in garbage {
        // Instead of the first answer, or of a later one.
        for after in [0, 5, 10, 15, 40] {
            proxy.set(Faults { garbage: Some((after, bytes.to_vec())), ..Faults::default() });
            for number in 1..4 {
                drop(tier.look(number).await);
                drop(tier.keep(number).await);
            }
        }
    }
    proxy.set(Faults::default());
    tier.heals().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn passwords_and_permissions() {
    let server = RedisServer::with_options(&["--requirepass", "right"]);
    let address = server.address();
    Checked::open(&format!("redis://:right@{address}/")).heals().await;
    for url in [format!("redis://:wrong@{address}/"), format!("redis://{address}/")] {
        let tier = Checked::open(&url);
        assert_eq!(tier.look(1).await, None);
        tier.breaks().await;
    }
    let open = RedisServer::start();
    let rules =
        ["ACL", "SETUSER", "reader", "on", ">secret", "~*", "+getrange", "+ping", "+client", "+hello", "+select"];
    assert_eq!(open.command(&rules), Reply::Status("OK".to_owned()));
    Checked::open(&open.url()).heals().await;
    let reader = Checked::open(&format!("redis://reader:secret@{}/", open.address()));
    until("it is connected", async || reader.look(1).await.is_some()).await;
    for _ in 0..10 {
        assert!(reader.keep(2).await.is_err(), "it may not write");
    }
    assert!(reader.look(1).await.is_some() && !reader.is_left_alone().await, "it may read");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_does_not_speak_tls_is_a_miss_for_one_that_wants_it() {
    let server = RedisServer::start();
    let tier = Checked::open(&format!("rediss://{}/", server.address()));
    assert!(tier.try_look(1).await.is_err());
    tier.breaks().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_keeps_values_on_every_master_and_loses_one_without_harm() {
    let mut cluster = RedisCluster::start();
    let tier = Checked::open(&cluster.url());
    tier.heals().await;
    for number in 0..300 {
        until("it is kept", async || tier.keep(number).await.is_ok()).await;
    }
    for node in &cluster.nodes {
        node.set(&key_in(node), b"another");
        assert!(node.keys().len() > 50, "the slots share the keys out");
    }
    for number in 0..300 {
        assert!(tier.look(number).await.is_some());
    }
    // Slots without a master stop a cluster, unless it is told to go on; here it stops, and every look is a miss in time.
    cluster.nodes[2].kill();
    for number in 0..60 {
        drop(tier.look(number).await);
    }
    cluster.nodes[2].restart();
    cluster.wait_until_whole();
    tier.serves_all().await;
    tier.store.clear(None, Instant::now() + PATIENCE).await.expect("every master answers");
    for node in &cluster.nodes[..2] {
        assert_eq!(node.keys(), [key_in(node)], "what is not of the cache stays");
    }
    assert!(cluster.nodes[2].keys().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_of_a_cluster_that_hangs_costs_the_budget_a_few_times_and_the_others_serve_on() {
    let mut cluster = RedisCluster::with_options(&["--cluster-require-full-coverage", "no"]);
    let tier = Checked::open(&cluster.url());
    for number in 0..200 {
        until("it is kept", async || tier.keep(number).await.is_ok() && tier.look(number).await.is_some()).await;
    }
    let num_found = async || {
        let (mut num_found, mut num_tried) = (0, 0);
        for number in 0..200 {
            match tier.try_look(number).await {
                Ok(found) => num_found += usize::from(found.is_some()),
                Err(CacheError::CircuitOpen { .. }) => {}
                Err(_) => num_tried += 1,
            }
        }
        (num_found, num_tried)
    };
    assert_eq!(num_found().await, (200, 0));
    let num_lost = cluster.nodes[1].keys().len();
    assert!((40..100).contains(&num_lost), "the slots share the keys out: {num_lost}");
    cluster.nodes[1].signal("STOP");
    let mut num_failed = 0;
    for _ in 0..5 {
        let (num_found, num_tried) = num_found().await;
        assert_eq!(num_found, 200 - num_lost, "the others serve on");
        num_failed += num_tried;
    }
    // Three failures open the circuit of the node; without one of its own, these were five times as many as it has keys.
    assert!((3..=6).contains(&num_failed), "{num_failed} calls were tried");
    assert!(!tier.store.stats(Instant::now() + BUDGET).await[0].is_available);
    cluster.nodes[1].signal("CONT");
    until("all are found again", async || num_found().await == (200, 0)).await;
    for node in &mut cluster.nodes {
        node.kill();
    }
    assert_eq!(num_found().await.0, 0);
    for node in &mut cluster.nodes {
        node.restart();
    }
    cluster.wait_until_whole();
    tier.serves_all().await;
}

/// A key in the slots of `node`.
fn key_in(node: &RedisServer) -> String {
    let keys = (0..).map(|number| format!("another{number}"));
    let mut mine = keys.filter(|key| !matches!(node.command(&["GET", key]), Reply::Error(_)));
    mine.next().expect("some key lies in each node")
}

type Outputs = OutputCache<&'static str>;

fn outputs(url: &str) -> (Outputs, Arc<TieredStore>) {
    let tiers: Vec<Arc<dyn cache::store::Store>> = vec![Arc::new(Checked::open(url).store)];
    let store = Arc::new(TieredStore::new(Arc::new(MemoryStore::new(1 << 20)), tiers, TieredConfig::default()));
    let config = OutputCacheConfig { fingerprint: FINGERPRINT, ttl: HOUR, write_budget: BUDGET };
    (OutputCache::new(Arc::clone(&store) as Arc<dyn cache::store::Store>, config), store)
}

/// The tokens of `number`, and the tier that had them; computed where none did.
async fn answer(outputs: &Outputs, number: u32) -> (Vec<Token>, Option<Tier>) {
    let key = Digest::new("test").number("n", number.into()).key();
    let start = Instant::now();
    let stored = outputs.store().get(&address(number.into()), start + BUDGET).await;
    let lookup = outputs.open(key, Access { read: true, write: true }, start + BUDGET).await;
    assert!(start.elapsed() < BUDGET + SLACK, "{:?}", start.elapsed());
    match lookup {
        Lookup::Hit(recording) => {
            let found = stored.expect("the tiers keep their errors to themselves").expect("it was there before, too");
            (recording.tokens.clone(), Some(found.tier))
        }
        Lookup::Join(_) => panic!("nobody computes it"),
        Lookup::Lead { mut leader, mut follower } => {
            leader.begin();
            leader.push_token(Token { token: number, logprob: Some(-0.25), top: vec![], is_stop: false });
            let start = Instant::now();
            leader.finish(End::Length).await;
            assert!(start.elapsed() < SLACK, "writing to Redis is not awaited: {:?}", start.elapsed());
            let Some(FlightEvent::Token(token)) = follower.next().await else { panic!("it was computed") };
            (vec![token], None)
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_computed_another_replays_until_redis_goes_and_after() {
    let server = RedisServer::start();
    let ((first, first_store), (second, second_store)) = (outputs(&server.url()), outputs(&server.url()));
    let (tokens, tier) = answer(&first, 1).await;
    assert_eq!(tier, None);
    first_store.settle(Instant::now() + PATIENCE).await;
    until("Redis has it", async || !server.keys().is_empty()).await;
    drop((first, first_store));
    assert_eq!(answer(&second, 1).await, (tokens.clone(), Some(Tier::Redis)));
    assert_eq!(answer(&second, 1).await, (tokens.clone(), Some(Tier::Memory)), "it was promoted");
    server.signal("STOP");
    for number in 10..40 {
        assert_eq!(answer(&second, number).await.1, None);
        assert_eq!(answer(&second, number).await.1, Some(Tier::Memory));
    }
    second_store.settle(Instant::now() + PATIENCE).await;
    server.signal("CONT");
    until("answers reach Redis again", async || {
        let (third, _) = outputs(&server.url());
        let number = 1000 + server.keys().len() as u32;
        answer(&second, number).await;
        second_store.settle(Instant::now() + PATIENCE).await;
        answer(&third, number).await.1 == Some(Tier::Redis)
    })
    .await;
    second.store().clear(None, Instant::now() + PATIENCE).await.expect("Redis answers");
    assert_eq!(server.keys(), Vec::<String>::new());
    assert_eq!(answer(&second, 1).await, (tokens, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_payload_that_is_sealed_and_no_recording_is_a_miss() {
    let server = RedisServer::start();
    let (outputs, store) = outputs(&server.url());
    let value = Value { payload: Bytes::from_static(b"no recording"), ttl: HOUR };
    let sealed = cache::codec::seal(&address(1), &value, SystemTime::now());
    server.set(&key_of(1), &sealed);
    assert_eq!(answer(&outputs, 1).await.1, None);
    store.settle(Instant::now() + PATIENCE).await;
    assert_eq!(answer(&outputs, 1).await.1, Some(Tier::Memory));
}

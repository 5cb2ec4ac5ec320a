//! The output cache through its public face: who computes, who reads what, and what is kept.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use cache::store::{Address, Kind, MemoryStore, Value};
use cache::{
    Access, Digest, End, Failure, Fingerprint, FlightEvent, Follower, Key, Leader, Lookup, OutputCache,
    OutputCacheConfig, PromptLogprob, Token,
};
use futures::FutureExt as _;
use proptest::prelude::*;
use tokio::time::Instant;

const FULL: Access = Access { read: true, write: true };

type Cache = OutputCache<&'static str>;

fn cache() -> Cache {
    let config = OutputCacheConfig {
        fingerprint: Fingerprint::from_bytes([1; 32]),
        ttl: Duration::from_secs(60),
        write_budget: Duration::from_secs(1),
    };
    OutputCache::new(Arc::new(MemoryStore::new(1 << 24)), config)
}

fn key(number: u64) -> Key {
    Digest::new("test").number("n", number).key()
}

fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn token(token: u32) -> Token {
    Token { token, logprob: Some(-0.5), top: vec![(token, -0.5)], is_stop: false }
}

async fn lead(cache: &Cache, access: Access) -> (Leader<&'static str>, Follower<&'static str>) {
    match cache.open(key(1), access, deadline()).await {
        Lookup::Lead { mut leader, follower } => {
            leader.begin();
            (leader, follower)
        }
        other => panic!("expected to lead, got {other:?}"),
    }
}

async fn join(cache: &Cache) -> Follower<&'static str> {
    match cache.open(key(1), FULL, deadline()).await {
        Lookup::Join(follower) => follower,
        other => panic!("expected to join, got {other:?}"),
    }
}

async fn is_hit(cache: &Cache) -> bool {
    matches!(cache.open(key(1), FULL, deadline()).await, Lookup::Hit(_))
}

async fn events(mut follower: Follower<&'static str>) -> Vec<FlightEvent<&'static str>> {
    let mut events = Vec::new();
    while let Some(event) = follower.next().await {
        events.push(event);
    }
    events
}

#[tokio::test]
async fn a_finished_flight_is_a_hit_that_reads_the_same() {
    let cache = cache();
    let (mut leader, follower) = lead(&cache, FULL).await;
    let prompt: Arc<[_]> = vec![PromptLogprob { token: 9, logprob: -1.0, top: vec![] }].into();
    leader.push_prompt(Arc::clone(&prompt));
    leader.push_token(token(7));
    let late = join(&cache).await;
    leader.push_token(token(8));
    leader.finish(End::Stop(8)).await;
    let expected = vec![
        FlightEvent::Prompt(prompt),
        FlightEvent::Token(token(7)),
        FlightEvent::Token(token(8)),
        FlightEvent::End(End::Stop(8)),
    ];
    assert_eq!(events(follower).await, expected);
    assert_eq!(events(late).await, expected);
    let Lookup::Hit(recording) = cache.open(key(1), FULL, deadline()).await else { panic!("it was stored") };
    assert_eq!(events(Follower::replay(recording)).await, expected);
    assert_eq!(cache.num_flights(), 0);
}

#[tokio::test]
async fn a_reader_waits_for_what_comes_and_reads_alone() {
    let cache = cache();
    let (mut leader, mut follower) = lead(&cache, FULL).await;
    assert_eq!(follower.next().now_or_never(), None);
    leader.push_token(token(1));
    assert_eq!(follower.next().await, Some(FlightEvent::Token(token(1))));
    let mut other = join(&cache).await;
    leader.push_token(token(2));
    assert_eq!(other.next().await, Some(FlightEvent::Token(token(1))));
    assert_eq!(other.next().await, Some(FlightEvent::Token(token(2))));
    assert_eq!(other.next().now_or_never(), None);
    assert_eq!(follower.next().await, Some(FlightEvent::Token(token(2))));
    leader.fail("device");
    for mut reader in [follower, other] {
        assert_eq!(reader.next().await, Some(FlightEvent::Failed(Failure::Error("device"))));
        assert_eq!(reader.next().await, None);
    }
}

#[tokio::test]
async fn a_failed_or_dropped_flight_stores_nothing() {
    let cache = cache();
    let (mut leader, follower) = lead(&cache, FULL).await;
    leader.push_token(token(1));
    leader.fail("device");
    assert_eq!(events(follower).await, [FlightEvent::Token(token(1)), FlightEvent::Failed(Failure::Error("device"))]);
    let (leader, follower) = lead(&cache, FULL).await;
    drop(leader);
    assert_eq!(events(follower).await, [FlightEvent::Failed(Failure::Gone)]);
    assert!(!is_hit(&cache).await);
}

/// Asks for what another is about to compute, and is made to wait.
async fn wait_behind(cache: &Cache, deadline: Instant) -> tokio::task::JoinHandle<Lookup<&'static str>> {
    let cache = cache.clone();
    let waiting = tokio::spawn(async move { cache.open(key(1), FULL, deadline).await });
    // There is one thread: it runs as far as it can.
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished(), "whether it is computed is not known yet");
    waiting
}

async fn about_to_lead(cache: &Cache) -> (Leader<&'static str>, Follower<&'static str>) {
    match cache.open(key(1), FULL, deadline()).await {
        Lookup::Lead { leader, follower } => (leader, follower),
        other => panic!("expected to lead, got {other:?}"),
    }
}

#[tokio::test]
async fn who_waits_for_a_leader_that_is_refused_leads_instead() {
    let cache = cache();
    let refused = about_to_lead(&cache).await;
    let waiting = vec![wait_behind(&cache, deadline()).await, wait_behind(&cache, deadline()).await];
    drop(refused);
    let (first, _, mut rest) = futures::future::select_all(waiting).await;
    let Lookup::Lead { mut leader, follower } = first.unwrap() else { panic!("nobody else computes it") };
    leader.begin();
    let second = rest.pop().expect("there are two").await.unwrap();
    let Lookup::Join(joined) = second else { panic!("it is computed for the other") };
    leader.push_token(token(1));
    leader.finish(End::Length).await;
    for reader in [follower, joined] {
        assert_eq!(events(reader).await, [FlightEvent::Token(token(1)), FlightEvent::End(End::Length)]);
    }
}

#[tokio::test]
async fn who_waits_joins_when_the_computation_is_under_way_and_computes_alone_past_its_deadline() {
    let cache = cache();
    let (mut leader, follower) = about_to_lead(&cache).await;
    let late = cache.open(key(1), FULL, Instant::now()).await;
    assert!(matches!(late, Lookup::Lead { .. }), "{late:?}");
    drop(late);
    let waiting = wait_behind(&cache, deadline()).await;
    leader.begin();
    let Lookup::Join(joined) = waiting.await.unwrap() else { panic!("it is computed") };
    assert_eq!(cache.num_flights(), 1);
    leader.fail("device");
    for reader in [follower, joined] {
        assert_eq!(events(reader).await, [FlightEvent::Failed(Failure::Error("device"))]);
    }
}

#[tokio::test]
async fn a_flight_is_abandoned_by_its_last_reader() {
    let cache = cache();
    let (leader, follower) = lead(&cache, FULL).await;
    assert!(leader.abandoned().now_or_never().is_none());
    let joined = join(&cache).await;
    drop(follower);
    assert!(leader.abandoned().now_or_never().is_none(), "one still reads");
    drop(joined);
    // Nobody told the leader yet: whoever comes now keeps it alive.
    let back = join(&cache).await;
    assert!(leader.abandoned().now_or_never().is_none(), "one came back");
    drop(back);
    leader.abandoned().await;
    // The leader knows: whoever comes now leads anew, whether or not it is gone.
    let (second, mut follower) = lead(&cache, FULL).await;
    drop(leader);
    assert!(follower.next().now_or_never().is_none(), "the end of the first is not that of the second");
    assert_eq!(cache.num_flights(), 1);
    second.finish(End::Length).await;
    assert_eq!(events(follower).await, [FlightEvent::End(End::Length)]);
    assert!(is_hit(&cache).await);
}

#[tokio::test]
async fn a_request_may_forbid_reading_and_writing() {
    let cache = cache();
    let (leader, _follower) = lead(&cache, FULL).await;
    let (fresh, _fresh_follower) = lead(&cache, Access { read: false, write: true }).await;
    let follower = join(&cache).await;
    assert!(matches!(cache.open(key(1), Access { read: true, write: false }, deadline()).await, Lookup::Join(_)));
    leader.fail("gone");
    drop(follower);
    let (secret, _secret_follower) = lead(&cache, Access { read: true, write: false }).await;
    let (leader, _follower) = lead(&cache, FULL).await;
    secret.finish(End::Length).await;
    drop(leader);
    let (leader, _follower) = lead(&cache, FULL).await;
    drop(leader);
    fresh.finish(End::Text).await;
    assert!(is_hit(&cache).await);
    let (_none, _follower) = lead(&cache, Access { read: false, write: false }).await;
    assert!(matches!(cache.open(key(1), Access { read: true, write: false }, deadline()).await, Lookup::Hit(_)));
}

#[tokio::test]
async fn a_payload_that_is_no_recording_is_a_miss_and_removed() {
    let cache = cache();
    let address = Address { kind: Kind::Output, key: key(1), fingerprint: Fingerprint::from_bytes([1; 32]) };
    let value = Value { payload: Bytes::from_static(b"\xff"), ttl: Duration::from_secs(60) };
    cache.store().put(&address, value, deadline()).await.unwrap();
    let (_leader, _follower) = lead(&cache, FULL).await;
    assert_eq!(cache.store().get(&address, deadline()).await.unwrap(), None);
}

/// What the answer to `number` is: a function of it, so that a wrong token cannot hide.
fn answer(number: u64) -> Vec<Token> {
    (0..20).map(|i| token(number as u32 * 100 + i)).collect()
}

/// One request: reads to the end, or leaves after `patience` events. `None` where it left.
async fn request(cache: Cache, number: u64, patience: usize, num_computed: Arc<AtomicUsize>) -> Option<Vec<Token>> {
    let mut follower = match cache.open(key(number), FULL, deadline()).await {
        Lookup::Hit(recording) => Follower::replay(recording),
        Lookup::Join(follower) => follower,
        Lookup::Lead { mut leader, follower } => {
            tokio::spawn(async move {
                leader.begin();
                for token in answer(number) {
                    tokio::select! {
                        biased;
                        () = leader.abandoned() => return,
                        () = tokio::task::yield_now() => leader.push_token(token),
                    }
                }
                num_computed.fetch_add(1, Ordering::Relaxed);
                leader.finish(End::Length).await;
            });
            follower
        }
    };
    let mut tokens = Vec::new();
    for _ in 0..patience {
        match follower.next().await.expect("a flight has an end") {
            FlightEvent::Token(token) => tokens.push(token),
            FlightEvent::End(_) => return Some(tokens),
            other => panic!("{other:?}"),
        }
    }
    None
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn identical_requests_compute_once_however_they_meet() {
    for _ in 0..20 {
        let (cache, num_computed) = (cache(), Arc::new(AtomicUsize::new(0)));
        let tasks: Vec<_> =
            (0..100).map(|_| tokio::spawn(request(cache.clone(), 5, usize::MAX, Arc::clone(&num_computed)))).collect();
        for task in tasks {
            assert_eq!(task.await.unwrap(), Some(answer(5)));
        }
        assert_eq!(num_computed.load(Ordering::Relaxed), 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn readers_that_leave_neither_hang_nor_fail_those_that_stay() {
    let (cache, num_computed) = (cache(), Arc::new(AtomicUsize::new(0)));
    // Every third stays; the others leave after 0 to 6 events, while new ones come.
    let tasks: VecDeque<_> = (0..6000u64)
        .map(|i| {
            let patience = if i % 3 == 0 { usize::MAX } else { (i % 7) as usize };
            let task = tokio::spawn(request(cache.clone(), i / 10 % 50, patience, Arc::clone(&num_computed)));
            (i / 10 % 50, patience, task)
        })
        .collect();
    for (number, patience, task) in tasks {
        let tokens = task.await.unwrap();
        assert_eq!(tokens, (patience == usize::MAX).then(|| answer(number)));
    }
    assert!(num_computed.load(Ordering::Relaxed) >= 50);
    assert_eq!(cache.num_flights(), 0);
}

#[derive(Clone, Debug)]
enum Step {
    Open,
    Push,
    Read(usize),
    Leave(usize),
    Finish,
    Fail,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => Just(Step::Open),
        4 => Just(Step::Push),
        6 => any::<usize>().prop_map(Step::Read),
        2 => any::<usize>().prop_map(Step::Leave),
        1 => Just(Step::Finish),
        1 => Just(Step::Fail),
    ];
    prop::collection::vec(step, 0..60)
}

/// What one reader must see: tokens 0, 1, 2 … of its flight, then the end that its flight came to.
struct Reader {
    follower: Follower<&'static str>,
    flight: usize,
    num_read: u32,
}

/// One leader at most, its readers, and how each flight ended.
#[derive(Default)]
struct Model {
    leader: Option<Leader<&'static str>>,
    num_pushed: Vec<u32>,
    ends: Vec<Option<FlightEvent<&'static str>>>,
    readers: Vec<Reader>,
    stored: Option<u32>,
}

impl Model {
    fn step(&mut self, cache: &Cache, step: &Step) {
        match *step {
            Step::Open => self.open(cache),
            Step::Push => {
                if let Some(leader) = &mut self.leader {
                    let pushed = self.num_pushed.last_mut().expect("a leader has a flight");
                    leader.push_token(token(*pushed));
                    *pushed += 1;
                }
            }
            Step::Read(which) if !self.readers.is_empty() => self.read(which % self.readers.len()),
            Step::Leave(which) if !self.readers.is_empty() => {
                drop(self.readers.swap_remove(which % self.readers.len()));
                self.settle();
            }
            Step::Finish => {
                if let Some(leader) = self.leader.take() {
                    leader.finish(End::Length).now_or_never().expect("memory does not wait");
                    self.end(FlightEvent::End(End::Length));
                    self.stored = self.num_pushed.last().copied();
                }
            }
            Step::Fail => {
                if let Some(leader) = self.leader.take() {
                    leader.fail("failed");
                    self.end(FlightEvent::Failed(Failure::Error("failed")));
                }
            }
            Step::Read(_) | Step::Leave(_) => {}
        }
    }

    fn open(&mut self, cache: &Cache) {
        let lookup = cache.open(key(1), FULL, deadline()).now_or_never().expect("memory does not wait");
        let follower = match lookup {
            Lookup::Hit(recording) => {
                assert_eq!(Some(recording.tokens.len() as u32), self.stored);
                return;
            }
            Lookup::Join(follower) => {
                assert!(self.leader.is_some() && self.stored.is_none());
                follower
            }
            Lookup::Lead { mut leader, follower } => {
                assert!(self.leader.is_none() && self.stored.is_none());
                leader.begin();
                self.leader = Some(leader);
                self.num_pushed.push(0);
                self.ends.push(None);
                follower
            }
        };
        self.readers.push(Reader { follower, flight: self.num_pushed.len() - 1, num_read: 0 });
    }

    fn read(&mut self, which: usize) {
        let reader = &mut self.readers[which];
        let event = reader.follower.next().now_or_never();
        if reader.num_read < self.num_pushed[reader.flight] {
            assert_eq!(event, Some(Some(FlightEvent::Token(token(reader.num_read)))));
            reader.num_read += 1;
        } else {
            assert_eq!(event, self.ends[reader.flight].clone().map(Some));
            if event.is_some() {
                assert_eq!(reader.follower.next().now_or_never(), Some(None));
                drop(self.readers.swap_remove(which));
            }
        }
    }

    fn end(&mut self, event: FlightEvent<&'static str>) {
        *self.ends.last_mut().expect("a leader has a flight") = Some(event);
    }

    /// The leader notices at once when it was abandoned.
    fn settle(&mut self) {
        let is_abandoned = self.leader.as_ref().is_some_and(|leader| leader.abandoned().now_or_never().is_some());
        let flight = self.num_pushed.len().wrapping_sub(1);
        let is_read = self.readers.iter().any(|reader| reader.flight == flight);
        assert_eq!(is_abandoned, self.leader.is_some() && !is_read);
        if is_abandoned {
            self.leader = None;
            self.end(FlightEvent::Failed(Failure::Gone));
        }
    }
}

proptest! {
    #[test]
    fn every_order_of_steps_gives_every_reader_its_flight(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("it needs no resources");
        let _context = runtime.enter();
        let (cache, mut model) = (cache(), Model::default());
        for step in &steps {
            model.step(&cache, step);
        }
        prop_assert_eq!(cache.num_flights(), usize::from(model.leader.is_some()));
    }
}

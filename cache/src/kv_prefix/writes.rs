//! Blocks that wait to be written to a slow tier: so many bytes of them, written batch by batch by one task per tier.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout_at};

use super::BlockName;
use super::known::Known;
use crate::key::{Fingerprint, Key};
use crate::store::{Address, Kind, Store, Value};
use crate::telemetry;

/// Names that are remembered per tier: some 2 MB.
const MAX_KNOWN: usize = 16_384;

/// Blocks that wait, however small.
const MAX_WAITING: usize = 4096;

/// What a block that waits costs beside its payload.
const PENDING_OVERHEAD: usize = 1024;

/// What bounds the writes to a tier.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub max_pending_bytes: usize,
    pub batch_len: usize,
    /// Of a batch.
    pub timeout: Duration,
    pub fingerprint: Fingerprint,
}

/// A tier under memory, and what waits to be written to it.
#[derive(Debug)]
pub(super) struct SlowTier {
    waiting: mpsc::Sender<(BlockName, Value)>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    store: Arc<dyn Store>,
    limits: Limits,
    known: Mutex<Known>,
    /// Bytes that wait or are being written.
    pending_bytes: watch::Sender<usize>,
}

impl SlowTier {
    /// Starts the task that writes. It ends once the tier is dropped and what waited is written.
    pub fn new(store: Arc<dyn Store>, limits: Limits) -> Self {
        let known = Mutex::new(Known::new(MAX_KNOWN));
        let shared = Arc::new(Shared { store, limits, known, pending_bytes: watch::Sender::new(0) });
        let (waiting, arriving) = mpsc::channel(MAX_WAITING);
        tokio::spawn(write_for_ever(Arc::clone(&shared), arriving));
        Self { waiting, shared }
    }

    pub fn store(&self) -> &dyn Store {
        &*self.shared.store
    }

    /// Whether it has the block, or is about to be given it.
    pub fn knows(&self, name: &BlockName) -> bool {
        self.shared.known().contains(name, Instant::now())
    }

    /// It gave the block, or took it.
    pub fn learn(&self, name: BlockName, ttl: Duration) {
        self.shared.learn(name, ttl);
    }

    /// It turned out not to have these blocks. That one waits to be written is no news.
    pub fn lost<'a>(&self, names: impl IntoIterator<Item = &'a BlockName>) {
        let mut known = self.shared.known();
        for name in names {
            known.remove_written(name);
        }
    }

    pub fn forget_all(&self) {
        self.shared.known().clear();
    }

    /// Queues a block for writing, unless the tier is known to have it; where there is no room it is dropped, and counted.
    pub fn write_later(&self, name: BlockName, value: Value) {
        let mut known = self.shared.known();
        if known.contains(&name, Instant::now()) {
            return;
        }
        let bytes = cost(&value);
        if !self.shared.reserve(bytes) {
            telemetry::dropped_write(Kind::Kv);
            return;
        }
        if self.waiting.try_send((name, value)).is_err() {
            self.shared.release(bytes);
            telemetry::dropped_write(Kind::Kv);
            return;
        }
        // Under the lock: the writer cannot have been done before it was noted.
        known.add(name, None);
    }

    /// Returns when nothing waits, or at the deadline.
    pub async fn settle(&self, deadline: Instant) {
        let mut pending_bytes = self.shared.pending_bytes.subscribe();
        // Past the deadline the writes go on by themselves.
        drop(timeout_at(deadline, pending_bytes.wait_for(|bytes| *bytes == 0)).await);
    }
}

impl Shared {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn learn(&self, name: BlockName, ttl: Duration) {
        // For half its life: what is published again in the second half is given a new one.
        self.known().add(name, Some(Instant::now() + ttl / 2));
    }

    fn reserve(&self, bytes: usize) -> bool {
        self.pending_bytes.send_if_modified(|pending_bytes| {
            let has_room = *pending_bytes + bytes <= self.limits.max_pending_bytes;
            if has_room {
                *pending_bytes += bytes;
            }
            has_room
        })
    }

    fn release(&self, bytes: usize) {
        self.pending_bytes.send_modify(|pending_bytes| *pending_bytes -= bytes);
    }

    async fn write(&self, batch: &[(Address, Value)]) {
        let results = self.store.put_many(batch, Instant::now() + self.limits.timeout).await;
        for ((address, value), result) in batch.iter().zip(results) {
            let name = *address.key.as_bytes();
            match result {
                Ok(()) => self.learn(name, value.ttl),
                // Counted by the tier. Published again, it is tried again.
                Err(_) => self.known().remove(&name),
            }
        }
    }
}

async fn write_for_ever(shared: Arc<Shared>, mut arriving: mpsc::Receiver<(BlockName, Value)>) {
    let mut blocks = Vec::with_capacity(shared.limits.batch_len);
    while arriving.recv_many(&mut blocks, shared.limits.batch_len).await > 0 {
        let bytes = blocks.iter().map(|(_, value)| cost(value)).sum();
        let address =
            |name| Address { kind: Kind::Kv, key: Key::from_bytes(name), fingerprint: shared.limits.fingerprint };
        let batch: Vec<_> = blocks.drain(..).map(|(name, value)| (address(name), value)).collect();
        shared.write(&batch).await;
        drop(batch);
        shared.release(bytes);
    }
}

fn cost(value: &Value) -> usize {
    value.payload.len().saturating_add(PENDING_OVERHEAD)
}

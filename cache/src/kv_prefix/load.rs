//! Blocks of a prefix, batch by batch, from wherever they are: bounded in number, bytes and time.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, StreamExt as _};
use tokio::time::{Instant, timeout_at};

use super::{BlockName, Inner};
use crate::codec::BadValue;
use crate::error::CacheError;
use crate::store::{Address, Found, Kind, Store as _, Value};
use crate::telemetry;

/// Batches of a load that are on their way at once: while one is checked, the next arrives.
const NUM_AHEAD: usize = 2;

/// What has less time to live is not kept anywhere else.
const MIN_TTL: Duration = Duration::from_millis(1);

/// A block of a load that is not in memory.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    idx: usize,
    address: Address,
}

/// What a load got from one tier.
#[derive(Clone, Copy, Debug, Default)]
struct Harvest {
    num_blocks: usize,
    is_late: bool,
    span: Option<(Instant, Instant)>,
}

impl Inner {
    pub(super) async fn load(&self, names: &[BlockName], deadline: Instant) -> Vec<Bytes> {
        let mut blocks = self.load_from_memory(names, deadline).await;
        let missing = blocks.iter().enumerate().filter(|(_, block)| block.is_none());
        let mut wanted: Vec<_> = missing.map(|(idx, _)| Wanted { idx, address: self.address(&names[idx]) }).collect();
        if !wanted.is_empty() && !self.slow.is_empty() {
            wanted.truncate(self.config.max_load_len());
            self.load_from_slow(&wanted, &mut blocks, deadline).await;
        }
        blocks.into_iter().map_while(|block| block).collect()
    }

    /// Last block first: where memory has no room for all, it is the end of a prefix that goes.
    async fn load_from_memory(&self, names: &[BlockName], deadline: Instant) -> Vec<Option<Bytes>> {
        let mut blocks = vec![None; names.len()];
        let Some(memory) = &self.memory else { return blocks };
        let (start, mut num_blocks) = (Instant::now(), 0);
        for (name, block) in names.iter().zip(&mut blocks).rev() {
            if let Ok(Some(found)) = memory.get(&self.address(name), deadline).await {
                *block = Some(found.payload);
                num_blocks += 1;
            }
        }
        if num_blocks > 0 {
            self.rates.note(0, start.elapsed().as_secs_f64() / f64::from(num_blocks), Instant::now());
        }
        blocks
    }

    async fn load_from_slow(&self, wanted: &[Wanted], blocks: &mut [Option<Bytes>], deadline: Instant) {
        // Their turn, then their bytes: in order of arrival, all at once, so that no two loads wait for each other.
        let num_blocks = u32::try_from(wanted.len()).unwrap_or(u32::MAX);
        let Ok(Ok(_turn)) = timeout_at(deadline, self.loads.acquire()).await else { return };
        let Ok(Ok(_room)) = timeout_at(deadline, self.room.acquire_many(num_blocks)).await else { return };
        let harvests = Mutex::new(vec![Harvest::default(); self.slow.len()]);
        let batches: Vec<_> =
            wanted.chunks(self.config.batch_len()).map(|batch| self.fetch(batch, &harvests, deadline)).collect();
        let mut arriving = stream::iter(batches).buffered(NUM_AHEAD);
        let mut loaded = Vec::with_capacity(wanted.len());
        // Each ends by the deadline.
        'batches: while let Some(batch) = arriving.next().await {
            for (wanted, found) in batch {
                let Some(found) = found else { break 'batches };
                blocks[wanted.idx] = Some(found.payload.clone());
                loaded.push((wanted.address, found));
            }
        }
        drop(arriving);
        self.keep_in_memory(loaded, deadline).await;
        self.note(&harvests.into_inner().unwrap_or_else(PoisonError::into_inner));
    }

    /// Last block first, as in loading.
    async fn keep_in_memory(&self, loaded: Vec<(Address, Found)>, deadline: Instant) {
        let Some(memory) = &self.memory else { return };
        for (address, Found { payload, ttl, .. }) in loaded.into_iter().rev().filter(|(_, found)| found.ttl >= MIN_TTL)
        {
            // What memory refuses is found below again.
            drop(memory.put(&address, Value { payload, ttl }, deadline).await);
        }
    }

    /// Reads a batch from the fastest tiers that have its blocks.
    async fn fetch(
        &self,
        batch: &[Wanted],
        harvests: &Mutex<Vec<Harvest>>,
        deadline: Instant,
    ) -> Vec<(Wanted, Option<Found>)> {
        let mut blocks: Vec<Option<Found>> = vec![None; batch.len()];
        for depth in 0..self.slow.len() {
            let left: Vec<_> = (0..batch.len()).filter(|&place| blocks[place].is_none()).collect();
            if left.is_empty() {
                break;
            }
            let num_left = u32::try_from(self.slow.len() - depth).expect("there are few tiers");
            let start = Instant::now();
            let share = start + deadline.saturating_duration_since(start) / num_left;
            let addresses: Vec<_> = left.iter().map(|&place| batch[place].address).collect();
            let results = self.slow[depth].store().get_many(&addresses, share).await;
            let mut harvest = Harvest { span: Some((start, Instant::now())), ..Harvest::default() };
            for (place, result) in left.into_iter().zip(results) {
                let address = &batch[place].address;
                match result {
                    Ok(Some(found)) => blocks[place] = self.accept(address, found, depth, deadline).await,
                    Ok(None) => self.slow[depth].lost([address.key.as_bytes()]),
                    Err(error) => harvest.is_late |= matches!(error, CacheError::Timeout { .. }),
                }
                harvest.num_blocks += usize::from(blocks[place].is_some());
            }
            if harvest.num_blocks > 0 || harvest.is_late {
                harvests.lock().unwrap_or_else(PoisonError::into_inner)[depth].add(&harvest);
            }
        }
        batch.iter().copied().zip(blocks).collect()
    }

    /// A block that tier `depth` had, unless it can be none. The slow tiers above are given it.
    async fn accept(&self, address: &Address, found: Found, depth: usize, deadline: Instant) -> Option<Found> {
        let name = *address.key.as_bytes();
        if found.payload.len() > self.config.max_block_bytes {
            telemetry::bad_value(&BadValue::Payload("longer than a block"), found.tier, Kind::Kv);
            self.slow[depth].lost([&name]);
            // What cannot be removed stays a miss.
            drop(self.slow[depth].store().remove(address, deadline).await);
            return None;
        }
        self.slow[depth].learn(name, found.ttl);
        if found.ttl >= MIN_TTL {
            for tier in &self.slow[..depth] {
                tier.write_later(name, Value { payload: found.payload.clone(), ttl: found.ttl });
            }
        }
        Some(found)
    }

    /// Takes in how long the tiers took. One that gave nothing until its time was over is at least as slow as that.
    fn note(&self, harvests: &[Harvest]) {
        for (depth, harvest) in harvests.iter().enumerate() {
            if let Some((start, end)) = harvest.span {
                let seconds = (end - start).as_secs_f64();
                self.rates.note(depth + 1, seconds / harvest.num_blocks.max(1) as f64, end);
            }
        }
    }
}

impl Harvest {
    fn add(&mut self, other: &Self) {
        self.num_blocks += other.num_blocks;
        self.is_late |= other.is_late;
        self.span = match (self.span, other.span) {
            (Some((start, end)), Some((other_start, other_end))) => Some((start.min(other_start), end.max(other_end))),
            (mine, others) => mine.or(others),
        };
    }
}

//! What sequences take from the cached prefixes and what they give: looked up at admission, published when computed.
//!
//! A sequence whose next block is being computed by a running one is held back: it would compute the same bytes again.
//! It waits for that block alone, those behind it in the queue pass meanwhile, and should the other lose its blocks or
//! end, it computes for itself. So one wait ends with a block that is there or with a sequence that does not run.

use std::collections::{HashMap, HashSet};

use crate::computed::ComputedBlock;
use crate::kv::{BlockHash, BlockHashes, BlockManager, CachedPrefix, StateSlot};
use crate::queue::Arrival;
use crate::request::{Request, RequestId};
use crate::scheduler::Scheduler;
use crate::sequence::Sequence;

/// What the cache knows of one sequence. Sequences that neither take nor give have none.
#[derive(Debug)]
pub(crate) struct Prefix {
    names: BlockHashes,
    /// Blocks from one place where a later sequence could start to the next: 1, but for models with states.
    interval: usize,
    /// Leading blocks of its table that are in the tree.
    num_published: usize,
    /// It takes cached blocks; else it only gives.
    may_reuse: bool,
    /// The block that it was held back for when last looked at.
    awaited: Option<BlockHash>,
    /// Where the batch in flight leaves its state for others.
    pub(crate) reserved: Option<StateSlot>,
}

impl Prefix {
    /// The names of the blocks that others can find.
    pub(crate) fn published(&self) -> &[BlockHash] {
        &self.names.as_slice()[..self.num_published]
    }

    /// The names of all full blocks known so far.
    pub(crate) fn names(&self) -> &[BlockHash] {
        self.names.as_slice()
    }

    /// True if it takes cached blocks.
    pub(crate) fn may_reuse(&self) -> bool {
        self.may_reuse
    }

    /// The name of a full block of `tokens`, all that the sequence has.
    pub(crate) fn name_of(&mut self, block_idx: usize, tokens: &[u32]) -> BlockHash {
        self.names.extend(tokens);
        self.names.as_slice()[block_idx]
    }

    /// The names of the last blocks before places where a later sequence could start, behind the first `num_blocks`.
    fn places_behind(&self, num_blocks: usize) -> impl Iterator<Item = BlockHash> {
        let places = self.names.as_slice().iter().skip(self.interval - 1).step_by(self.interval);
        places.skip(num_blocks / self.interval).copied()
    }

    /// Its blocks are gone.
    fn rewind(&mut self) {
        self.num_published = 0;
        self.awaited = None;
    }
}

/// The full blocks of known tokens that running sequences hold and have yet to compute, and behind which others could
/// start. Of two that compute the same, the first.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    owners: HashMap<BlockHash, RequestId>,
    /// Those that wait for blocks from outside before they compute.
    loading: HashSet<RequestId>,
}

impl InFlight {
    fn announce(&mut self, id: RequestId, names: impl Iterator<Item = BlockHash>) {
        for name in names {
            self.owners.entry(name).or_insert(id);
        }
    }

    fn retire(&mut self, id: RequestId, names: &[BlockHash]) {
        for name in names {
            if self.owners.get(name) == Some(&id) {
                self.owners.remove(name);
            }
        }
    }

    fn has(&self, name: BlockHash) -> bool {
        self.owners.contains_key(&name)
    }

    /// It is being computed, not loaded.
    fn computes(&self, name: BlockHash) -> bool {
        self.owners.get(&name).is_some_and(|owner| !self.loading.contains(owner))
    }

    /// What a sequence announced is loaded first.
    pub(crate) fn begin_loading(&mut self, id: RequestId) {
        self.loading.insert(id);
    }

    /// From now on it is computed.
    pub(crate) fn end_loading(&mut self, id: RequestId) {
        self.loading.remove(&id);
    }

    pub(crate) fn loading(&self) -> impl Iterator<Item = RequestId> {
        self.loading.iter().copied()
    }

    /// Those that somebody may wait for.
    pub(crate) fn owners(&self) -> impl Iterator<Item = RequestId> {
        self.owners.values().copied()
    }
}

impl Scheduler {
    /// The prefix state of a new sequence. Where blocks alone do not bring a recurrent state back and none is kept, there
    /// is none. Nor has what an encoder reads, for each of its positions knows the whole source.
    pub(crate) fn new_prefix(&self, request: &Request) -> Option<Prefix> {
        let has_states = !self.state_slots.is_unused();
        let can_resume = !has_states || !self.blocks.snapshots.is_unused();
        let fingerprint = self.config.prefix_cache.filter(|_| can_resume && request.source_len == 0)?;
        let root = BlockHash::root(&fingerprint, &request.cache_salt);
        Some(Prefix {
            names: BlockHashes::new(self.blocks.block_size(), root),
            interval: if has_states { self.config.snapshot_interval } else { 1 },
            num_published: 0,
            may_reuse: !request.computes_whole_prompt,
            awaited: None,
            reserved: None,
        })
    }

    /// The first waiting sequence from `next` on that is not held back, with what is cached of it, if there is a place for
    /// one; `next` becomes its arrival.
    pub(crate) fn next_waiting(&mut self, next: &mut Arrival) -> Option<(RequestId, CachedPrefix)> {
        if !self.has_place() {
            return None;
        }
        loop {
            let (arrival, id) = self.waiting.first_from(*next)?;
            *next = arrival;
            if let Some(cached) = self.look_up(id) {
                return Some((id, cached));
            }
            *next = arrival.next();
        }
    }

    /// What is cached of a waiting sequence; `None` while it is held back. At least its last token is left to compute,
    /// for somebody has to sample.
    fn look_up(&mut self, id: RequestId) -> Option<CachedPrefix> {
        let sequence = self.sequences.get_mut(&id).expect("queues name only known sequences");
        let num_loadable = sequence.num_loadable;
        let Some((prefix, tokens)) = sequence.prefix_and_tokens().filter(|(prefix, _)| prefix.may_reuse) else {
            return Some(CachedPrefix::default());
        };
        if prefix.awaited.is_some_and(|name| self.in_flight.has(name)) {
            return None;
        }
        prefix.names.extend(tokens);
        let most = (tokens.len() - 1) / self.config.block_size;
        let names = &prefix.names.as_slice()[..most];
        let cached = self.blocks.find(names);
        // The next block is what a running sequence has to compute first. With states the next place may be one whose
        // state was given up, while one behind it is still to come.
        let num_ahead = most / prefix.interval - cached.num_blocks / prefix.interval;
        let num_asked = if prefix.interval == 1 { num_ahead.min(1) } else { num_ahead };
        // Who would load nothing itself need not wait for one who does: computing may be faster.
        let may_load = num_loadable > cached.num_blocks;
        let is_coming =
            |&name: &BlockHash| if may_load { self.in_flight.has(name) } else { self.in_flight.computes(name) };
        let awaited = prefix.places_behind(cached.num_blocks).take(num_asked).find(is_coming);
        prefix.awaited = awaited;
        prefix.awaited.is_none().then_some(cached)
    }

    /// Gives an admitted sequence the blocks of all its known tokens, the first of them from the cache, and tells who
    /// waits what it will compute. The caller knows that so many are available.
    pub(crate) fn start_from(&mut self, id: RequestId, cached: CachedPrefix) {
        let block_size = self.config.block_size;
        let sequence = self.sequences.get_mut(&id).expect("queues name only known sequences");
        let num_tokens = sequence.tokens().len();
        if let Some((prefix, tokens)) = sequence.prefix_and_tokens() {
            prefix.names.extend(tokens);
        }
        let (table, prefix) = sequence.table_and_prefix();
        let mut num_queried = 0;
        if let Some(prefix) = prefix {
            let names = prefix.names.as_slice();
            self.blocks.take(table, &names[..cached.num_blocks]);
            prefix.num_published = cached.num_blocks;
            self.in_flight.announce(id, prefix.places_behind(cached.num_blocks));
            num_queried = if prefix.may_reuse { num_tokens } else { 0 };
        }
        let is_covered = self.blocks.try_cover(table, num_tokens);
        assert!(is_covered, "{id:?} was admitted without the blocks of {num_tokens} tokens");
        let is_first = sequence.start_from(cached.num_blocks * block_size);
        if is_first {
            self.num_prefix_queries += num_queried as u64;
            self.num_prefix_hits += (cached.num_blocks * block_size) as u64;
        }
    }

    /// Lets others find the full blocks that a sequence has computed.
    pub(crate) fn publish(&mut self, id: RequestId) {
        let sequence = self.sequences.get_mut(&id).expect("the caller knows the sequence");
        let num_full = sequence.num_computed() / self.config.block_size;
        let Some((prefix, tokens)) = sequence.prefix_and_tokens() else { return };
        prefix.names.extend(tokens);
        let (table, prefix) = sequence.table_and_prefix();
        let prefix = prefix.expect("it had one");
        let names = &prefix.names.as_slice()[..num_full];
        for (idx, &name) in names.iter().enumerate().skip(prefix.num_published) {
            self.blocks.publish(table, idx, name);
            self.computed.push(ComputedBlock { id, idx, name: name.bytes(), block: table.blocks()[idx] });
        }
        self.in_flight.retire(id, &names[prefix.num_published..]);
        prefix.num_published = num_full;
        if let Some(slot) = prefix.reserved.take() {
            self.blocks.snapshots.keep(table.blocks()[num_full - 1], slot);
        }
    }
}

/// Lets go of the blocks of a sequence, and of what it would have computed.
pub(crate) fn release(blocks: &mut BlockManager, in_flight: &mut InFlight, id: RequestId, sequence: &mut Sequence) {
    let (table, prefix) = sequence.table_and_prefix();
    blocks.release(table);
    if let Some(prefix) = prefix {
        in_flight.retire(id, &prefix.names.as_slice()[prefix.num_published..]);
        in_flight.end_loading(id);
        prefix.rewind();
        prefix.reserved.take().into_iter().for_each(|slot| blocks.snapshots.give_back(slot));
    }
}

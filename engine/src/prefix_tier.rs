//! Where full blocks of keys and values are kept beyond the pool: the door they leave by and come back through.
//!
//! The step loop hands over the bytes of blocks it has filled, and asks for those of prompts that are known outside. It never
//! waits: what was asked for comes when it comes, and the sequence that wants it has no rows until then.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel};
use std::time::Duration;

use bytes::Bytes;
use scheduler::{Batch, ComputedBlock, Phase, RequestId, Scheduler};

use crate::memory::BlockCoding;
use crate::runner::Runner;
use crate::shared::Command;

/// As [`crate::EngineHandle::block_names`] has it.
pub type BlockName = [u8; 32];

/// A place for blocks. Called by the step loop, so that no call may wait.
pub trait PrefixTier: Send {
    /// How it wants its blocks.
    fn coding(&self) -> BlockCoding {
        BlockCoding::Exact
    }

    /// False if [`Self::store`] of a block of this name would do nothing.
    fn wants(&self, name: &BlockName) -> bool;

    /// Keeps the bytes of a block, or not.
    fn store(&mut self, name: BlockName, bytes: Bytes);

    /// Fetches the leading blocks of `names`, and says with the ticket which ones it has.
    fn load(&mut self, names: Vec<BlockName>, ticket: LoadTicket);
}

/// What is known outside of a prompt, before it is submitted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PrefixHint {
    /// Leading full blocks that can be loaded.
    pub num_blocks: usize,
    /// How long that takes for each, where anything was measured.
    pub seconds_per_block: Option<f64>,
}

/// The answer to one load. Dropping it says that nothing was found.
#[derive(Debug)]
pub struct LoadTicket {
    id: RequestId,
    blocks: Vec<Bytes>,
    loaded: Sender<Loaded>,
    commands: SyncSender<Command>,
    is_woken: Arc<AtomicBool>,
}

impl LoadTicket {
    /// These are the bytes of the leading blocks that were asked for, as they were stored.
    pub fn finish(mut self, blocks: Vec<Bytes>) {
        self.blocks = blocks;
    }
}

impl Drop for LoadTicket {
    fn drop(&mut self) {
        // A loop that is gone wants nothing.
        let _ = self.loaded.send(Loaded { id: self.id, blocks: std::mem::take(&mut self.blocks) });
        // One word is enough, whatever comes before the loop looks, and a full channel wakes it just as well: requests need the
        // places.
        if !self.is_woken.swap(true, Ordering::AcqRel) {
            let _ = self.commands.try_send(Command::Wake);
        }
    }
}

/// What came for a sequence.
#[derive(Debug)]
struct Loaded {
    id: RequestId,
    blocks: Vec<Bytes>,
}

/// The step loop's side of a tier.
pub(crate) struct TierExchange {
    tier: Box<dyn PrefixTier>,
    /// One answer for each load, of which there is one for each running sequence at most.
    sender: Sender<Loaded>,
    receiver: Receiver<Loaded>,
    commands: SyncSender<Command>,
    /// The loop was told that something came, and has not looked yet.
    is_woken: Arc<AtomicBool>,
    /// Seconds that computing a token of a prompt takes.
    seconds_per_token: Option<f64>,
}

/// Weight of the newest measurement.
const NEWEST: f64 = 0.2;

impl TierExchange {
    pub(crate) fn new(tier: Box<dyn PrefixTier>, commands: SyncSender<Command>) -> Self {
        let (sender, receiver) = channel();
        Self { tier, sender, receiver, commands, is_woken: Arc::default(), seconds_per_token: None }
    }

    /// Blocks of a prompt that are to be loaded: all that can be if that is expected to be faster than computing them, as
    /// far as both are known.
    pub(crate) fn num_loadable(&self, hint: PrefixHint, block_size: usize) -> usize {
        if hint.num_blocks == 0 {
            return 0;
        }
        let compute = self.seconds_per_token.map(|seconds| seconds * block_size as f64);
        let is_slower = hint.seconds_per_block.zip(compute).is_some_and(|(load, compute)| load > compute);
        if is_slower {
            metrics::counter!("moesaic_kv_tier_decisions_total", "decision" => "compute").increment(1);
            return 0;
        }
        hint.num_blocks
    }

    /// Notes how long a step took, if it was for prompts: of few rows, or of decodes, each takes longer.
    pub(crate) fn note_step(&mut self, batch: &Batch, elapsed: Duration, block_size: usize) {
        let prefills = batch.chunks.iter().filter(|chunk| chunk.phase == Phase::Prefill);
        let num_prompt: usize = prefills.map(|chunk| chunk.len).sum();
        if num_prompt >= block_size && 2 * num_prompt > batch.num_rows() {
            let seconds = elapsed.as_secs_f64() / batch.num_rows() as f64;
            let before = self.seconds_per_token.unwrap_or(seconds);
            self.seconds_per_token = Some(before + NEWEST * (seconds - before));
        }
    }

    /// Asks for what the batch waits for.
    pub(crate) fn begin_loads(&mut self, batch: &Batch) {
        for load in &batch.loads {
            let (loaded, commands) = (self.sender.clone(), self.commands.clone());
            let is_woken = Arc::clone(&self.is_woken);
            let ticket = LoadTicket { id: load.id, blocks: Vec::new(), loaded, commands, is_woken };
            metrics::counter!("moesaic_kv_tier_decisions_total", "decision" => "load").increment(1);
            self.tier.load(load.names.clone(), ticket);
        }
    }

    /// Fills the blocks of sequences for which something came. Bytes of another length and failures end what is taken.
    pub(crate) fn finish_loads(&mut self, scheduler: &mut Scheduler, runner: &mut Runner) {
        // Before the look: what comes after it wakes the loop again.
        self.is_woken.store(false, Ordering::Release);
        let coding = self.tier.coding();
        for Loaded { id, blocks } in self.receiver.try_iter() {
            let wanted = scheduler.loading(id).iter();
            let mut fill = |block, bytes| {
                runner.write_block(block, coding, bytes).unwrap_or_else(|error| {
                    tracing::error!(%error, "a block of a prefix was not written");
                    false
                })
            };
            let num_filled = wanted.zip(&blocks).take_while(|&(&block, bytes)| fill(block, bytes)).count();
            scheduler.loaded(id, num_filled);
        }
    }

    /// Hands over the blocks that a step has filled.
    pub(crate) fn store(&mut self, computed: &[ComputedBlock], runner: &Runner) {
        // The last first: a place that has no room for all had better lose the end of a prefix.
        for block in computed.iter().rev() {
            if self.tier.wants(&block.name) {
                match runner.read_block(block.block, self.tier.coding()) {
                    Ok(bytes) => self.tier.store(block.name, bytes),
                    Err(error) => tracing::error!(%error, "a block of a prefix was not read"),
                }
            }
        }
    }
}

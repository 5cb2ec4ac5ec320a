//! What steps take of a device beside weights and caches: the largest one is computed before the first request.

use candle_core::Device;
use kernels::{Choice, Draw, KvFormat, LogitRow, Penalties};
use scheduler::{BlockId, StateSlot, WindowConfig};

use super::{LOGIT_ROWS, Runner, TokenPlaces, refuse};
use crate::config::EngineConfig;
use crate::error::EngineError;
use crate::experts::{ExpertOptions, RoutedLayout, RoutedRows, RoutingOptions};
use crate::forward_input::{ChunkRows, Pass, WindowRows};
use crate::layers::decoder::gather_rows;
use crate::memory::budget::KvBudget;
use crate::memory::{ArenaSize, KvArena};
use crate::models::{Model, Prefill};

/// Most likely tokens that a row may tell of.
const MOST_LOGPROBS: u32 = 20;

/// A step with as many tokens as a scheduler puts into one, in sequences as long as they may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LargestStep {
    /// Of each sequence but the last, which may be shorter.
    sequence_len: usize,
    num_tokens: usize,
    block_size: usize,
    has_states: bool,
}

impl LargestStep {
    /// Of an engine whose caches are no larger than this.
    pub(crate) fn new(config: &EngineConfig, kv: &KvBudget) -> Self {
        let has_states = kv.num_state_slots > 0;
        let num_seqs = if has_states { kv.num_state_slots.min(config.max_num_seqs) } else { config.max_num_seqs };
        let blocks_of_window = kv.window.map_or(kv.num_blocks, |window| window.num_blocks.min(kv.num_blocks));
        let capacity = blocks_of_window.saturating_mul(config.block_size);
        let sequence_len = kv.max_model_len.min(config.max_num_batched_tokens).min(capacity);
        // Sequences begin at blocks.
        let most_seqs = num_seqs.min(blocks_of_window / sequence_len.div_ceil(config.block_size).max(1));
        let num_tokens = config.max_num_batched_tokens.min(most_seqs.saturating_mul(sequence_len));
        Self { sequence_len, num_tokens, block_size: config.block_size, has_states }
    }

    /// Computes it on a device that nobody else uses in this process, and says what such a step takes at most, with the code that was
    /// loaded for it. 0 on the CPU, where memory is not ours to divide; `None` where a device does not say.
    pub(crate) fn measure(
        &self,
        model: Box<dyn Model>,
        (format, device): (KvFormat, &Device),
    ) -> Result<(Box<dyn Model>, Option<u64>), EngineError> {
        let Some(before) = kernels::device_memory(device)?.filter(|_| self.num_tokens > 0) else {
            return Ok((model, Some(0)));
        };
        let explain = |source| EngineError::LargestStep { num_tokens: self.num_tokens, source: Box::new(source) };
        let mut runner = self.runner(model, format, device).map_err(explain)?;
        let peak = kernels::device_step_bytes(device, || self.run(&mut runner)).map_err(explain)?;
        let model = runner.into_model();
        let after = kernels::device_memory(device)?.map_or(0, |memory| memory.free_bytes);
        Ok((model, peak.map(|peak| peak + before.free_bytes.saturating_sub(after))))
    }

    /// With caches for this step.
    fn runner(&self, model: Box<dyn Model>, format: KvFormat, device: &Device) -> Result<Runner, EngineError> {
        let (num_blocks, block_size) = (self.num_seqs() * self.blocks_per_seq(), self.block_size);
        let num_state_slots = if self.has_states { self.num_seqs() } else { 0 };
        let shape = model.shape();
        let windows = shape.cache_sites.iter().filter_map(|site| site.window());
        let window = windows.max().map(|len| WindowConfig { len, num_blocks });
        let size = ArenaSize { format, block_size, num_blocks, window, num_state_slots };
        let arena = KvArena::new(&shape.cache_sites, size, device)?;
        let routed = RoutedRows::new(RoutedLayout::of(shape), num_blocks, block_size);
        Ok(Runner::new(model, arena, TokenPlaces { routed, block_size }, RoutingOptions::default()))
    }

    fn run(&self, runner: &mut Runner) -> Result<(), EngineError> {
        if runner.prefill() != Prefill::Causal {
            self.push(runner, Pass::Encoder);
            refuse(runner.hidden_now()?)?;
        }
        self.push(runner, Pass::Decoder);
        let hidden = refuse(runner.hidden_now()?)?;
        let num_rows = LOGIT_ROWS.min(hidden.dim(0)?);
        let rows: Vec<u32> = (0..num_rows as u32).collect();
        let logits = runner.model.logits(&gather_rows(&hidden, &rows)?)?.contiguous()?;
        kernels::read_logits(&logits, &vec![longest_draw(); num_rows])?;
        Ok(())
    }

    /// Tokens that differ, so that they do not all choose the same experts. Where there is an encoder, it reads all but the last.
    fn push(&self, runner: &mut Runner, pass: Pass) {
        let (vocab_size, has_encoder) = (runner.shape().vocab_size, runner.prefill() != Prefill::Causal);
        // A prime, so that neighbours are far apart.
        let tokens: Vec<u32> = (0..self.sequence_len).map(|idx| (idx * 7919 % vocab_size) as u32).collect();
        runner.input.clear(pass);
        let mut left = self.num_tokens;
        for seq_idx in 0..self.num_seqs() {
            let len = left.min(self.sequence_len);
            left -= len;
            let source_len = if has_encoder { 1.max(len - 1) } else { 0 };
            let rows = match pass {
                Pass::Encoder => 0..source_len,
                Pass::Decoder => source_len..len,
            };
            let first = (seq_idx * self.blocks_per_seq()) as u32;
            let blocks: Vec<BlockId> = (first..first + self.blocks_per_seq() as u32).map(BlockId).collect();
            let chunk = ChunkRows {
                start: rows.start,
                tokens: &tokens[rows],
                source_len,
                blocks: &blocks,
                window: Some(WindowRows { start: 0, blocks: &blocks }),
                state_slot: self.has_states.then_some(StateSlot(seq_idx as u32)),
                experts: ExpertOptions::default(),
            };
            runner.input.push(chunk, self.block_size);
        }
    }

    fn num_seqs(&self) -> usize {
        self.num_tokens.div_ceil(self.sequence_len.max(1))
    }

    fn blocks_per_seq(&self) -> usize {
        self.sequence_len.div_ceil(self.block_size)
    }
}

/// All that may be asked of a row.
fn longest_draw() -> LogitRow {
    let penalties = Penalties { repetition: 1.0, frequency: 0.0, presence: 0.0, seen: vec![(0, 1)] };
    let draw = Draw {
        temperature: 1.0,
        top_k: 0,
        top_p: 0.9,
        min_p: 0.0,
        uniform: 0.5,
        bias: Vec::new(),
        forbidden: Vec::new(),
        penalties: Some(penalties),
    };
    LogitRow { choice: Choice::Draw(draw), num_logprobs: Some(MOST_LOGPROBS) }
}

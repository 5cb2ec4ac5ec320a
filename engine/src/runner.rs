//! Runs one batch through the model and samples it: the part of a step that computes.

use std::sync::OnceLock;

use bytes::Bytes;
use candle_core::{Storage, Tensor};
use scheduler::{Batch, BlockId, Chunk, Phase, RequestId, Scheduler, Sequence, StateSlot};

use crate::error::EngineError;
use crate::experts::{RoutedLayout, RoutedRows, RoutingStats};
use crate::forward_input::{ChunkRows, ForwardInput, Pass, WindowRows};
use crate::handle::{PromptLogprob, SampledToken};
use crate::layers::decoder::gather_rows;
use crate::memory::{BlockCoding, KvArena};
use crate::models::{DraftInput, ForwardContext, Model, ModelShape, Prefill};
use crate::sampling::params::SamplingParams;
use crate::sampling::prompt_logprob;
use crate::sampling::sampler::{SampleRow, sample};

/// Rows of logits held at a time: a long prompt's log-probs would otherwise need `prompt × vocabulary` floats.
const LOGIT_ROWS: usize = 64;

/// The model with its memory.
pub struct Runner {
    model: Box<dyn Model>,
    arena: KvArena,
    routing: RoutingStats,
    routed: RoutedRows,
    input: ForwardInput,
    block_size: usize,
}

/// How a sequence wants its rows read.
pub struct RowRequest<'a> {
    pub sampling: &'a SamplingParams,
    /// Tokens that may not be sampled now.
    pub forbidden: &'a [u32],
    /// Prompt log-probs already delivered.
    pub num_prompt_logprobs: usize,
    /// The experts of its tokens go with what is sampled, see [`SampledToken::routed_experts`].
    pub wants_routed_experts: bool,
}

/// What a chunk gave.
#[derive(Debug, Default)]
pub struct ChunkOutput {
    /// Of prompt positions `num_prompt_logprobs + 1..`, as far as the chunk reaches.
    pub prompt_logprobs: Vec<PromptLogprob>,
    /// For chunks that sample: the token, or `None` if the row held no usable number.
    pub sampled: Option<Option<SampledToken>>,
}

/// A row of hidden states whose logits somebody wants.
struct WantedRow {
    row: u32,
    chunk_idx: usize,
    /// Position of the token that the row predicts.
    predicts: usize,
}

impl Runner {
    /// `arena` and `routed` have the same blocks.
    pub fn new(model: Box<dyn Model>, arena: KvArena, routed: RoutedRows, block_size: usize) -> Self {
        let routing = RoutingStats::new(&model.shape().moe_layers);
        Self { model, arena, routing, routed, input: ForwardInput::default(), block_size }
    }

    pub fn shape(&self) -> &ModelShape {
        self.model.shape()
    }

    pub fn prefill(&self) -> Prefill {
        self.model.shape().prefill
    }

    pub fn routing(&mut self) -> &mut RoutingStats {
        &mut self.routing
    }

    /// How the experts of a token follow each other; without layers where they are not kept.
    pub fn routed_layout(&self) -> &RoutedLayout {
        self.routed.layout()
    }

    /// The experts of all tokens of a full block.
    pub fn experts_of_block(&self, block: BlockId) -> Vec<u16> {
        self.routed.read(&[block], 0..self.block_size)
    }

    /// All that is kept of the tokens of a full block: keys and values, then their experts, two bytes each.
    pub fn read_block(&self, block: BlockId, coding: BlockCoding) -> Bytes {
        let mut bytes = Vec::with_capacity(self.block_len(coding));
        self.arena.read_block(block, coding, &mut bytes);
        bytes.extend(self.experts_of_block(block).into_iter().flat_map(u16::to_le_bytes));
        bytes.into()
    }

    /// Fills a block with what [`Self::read_block`] gave. False, with nothing changed, where that is not as long.
    pub fn write_block(&mut self, block: BlockId, coding: BlockCoding, bytes: &[u8]) -> bool {
        let is_whole = bytes.len() == self.block_len(coding);
        if is_whole {
            let (kv, experts) = bytes.split_at(self.arena.block_len(coding));
            self.arena.write_block(block, coding, kv);
            self.routed.write_block(block, experts.as_chunks().0.iter().map(|&id| u16::from_le_bytes(id)));
        }
        is_whole
    }

    /// Bytes that [`Self::read_block`] gives.
    pub fn block_len(&self, coding: BlockCoding) -> usize {
        self.arena.block_len(coding) + self.block_size * self.routed.layout().ids_per_token() * size_of::<u16>()
    }

    /// Computes every chunk of `batch`; the result has one entry per chunk.
    pub fn run<'a>(
        &mut self,
        scheduler: &Scheduler,
        batch: &Batch,
        request_of: impl Fn(RequestId) -> RowRequest<'a>,
    ) -> Result<Vec<ChunkOutput>, EngineError> {
        self.arena.copy_states(&batch.restores)?;
        let hidden = self.forward(scheduler, batch)?;
        self.arena.copy_states(&batch.snapshots)?;
        let requests: Vec<RowRequest> = batch.chunks.iter().map(|chunk| request_of(chunk.id)).collect();
        let wanted = wanted_rows(scheduler, batch, &requests);
        let mut outputs: Vec<ChunkOutput> = batch.chunks.iter().map(|_| ChunkOutput::default()).collect();
        for rows in wanted.chunks(LOGIT_ROWS) {
            let indices: Vec<u32> = rows.iter().map(|wanted| wanted.row).collect();
            let logits = self.model.logits(&gather_rows(&hidden, &indices)?)?.contiguous()?;
            let vocab_size = logits.dim(1)?;
            let (storage, layout) = logits.storage_and_layout();
            let Storage::Cpu(storage) = &*storage else { unreachable!("models compute on the CPU") };
            let logits = &storage.as_slice::<f32>()?[layout.start_offset()..];
            // Rows are read side by side: a draw over a large vocabulary costs as much as a layer.
            let reads: Vec<OnceLock<RowRead>> = rows.iter().map(|_| OnceLock::new()).collect();
            kernels::pool::parallel_for(rows.len(), |idx| {
                let chunk_idx = rows[idx].chunk_idx;
                let sequence = scheduler.sequence(batch.chunks[chunk_idx].id).expect("a scheduled sequence is known");
                let read = read_row(
                    &logits[idx * vocab_size..(idx + 1) * vocab_size],
                    rows[idx].predicts,
                    sequence,
                    &requests[chunk_idx],
                );
                assert!(reads[idx].set(read).is_ok(), "every row is read once");
            });
            for (wanted, read) in rows.iter().zip(reads) {
                match read.into_inner().expect("every row was read") {
                    RowRead::Prompt(logprob) => outputs[wanted.chunk_idx].prompt_logprobs.push(logprob),
                    RowRead::Next(sampled) => outputs[wanted.chunk_idx].sampled = Some(sampled),
                }
            }
        }
        for ((chunk, request), output) in batch.chunks.iter().zip(&requests).zip(&mut outputs) {
            if let Some(Some(sampled)) = output.sampled.as_mut().filter(|_| request.wants_routed_experts) {
                let sequence = scheduler.sequence(chunk.id).expect("a scheduled sequence is known");
                sampled.routed_experts = self.experts_of_news(sequence);
            }
        }
        Ok(outputs)
    }

    /// Of the tokens that nobody was told the experts of: those of the prompt when its last row was computed, and then of
    /// the newest one. They are read from the blocks, whoever computed those, and however often.
    fn experts_of_news(&self, sequence: &Sequence) -> Vec<u16> {
        let num_tokens = sequence.tokens().len();
        let start = if sequence.num_generated() == 0 { 0 } else { num_tokens - 1 };
        self.routed.read(sequence.block_table().blocks(), start..num_tokens)
    }

    /// Logits at every position of one sequence, `[tokens.len()][vocab_size]`, computed in one pass outside any schedule.
    /// It writes over the first blocks and states of the arena: for measuring a model, not while requests run
    /// or prefixes are cached.
    pub fn logits_of(&mut self, tokens: &[u32]) -> Result<Vec<Vec<f32>>, EngineError> {
        self.logits_after(&[], tokens)
    }

    /// The same for a decoder's `tokens` after its encoder has read `source`, in a pass of its own.
    pub fn logits_after(&mut self, source: &[u32], tokens: &[u32]) -> Result<Vec<Vec<f32>>, EngineError> {
        let num_blocks = (source.len() + tokens.len()).div_ceil(self.block_size);
        let blocks: Vec<BlockId> = (0..num_blocks as u32).map(BlockId).collect();
        let has_states = self.model.shape().cache_sites.iter().any(|site| site.state_bytes() > 0);
        let state_slot = has_states.then_some(StateSlot(0));
        let window = Some(WindowRows { start: 0, blocks: &blocks });
        let source_len = source.len();
        if source_len > 0 {
            self.input.clear(Pass::Encoder);
            let rows = ChunkRows { start: 0, tokens: source, source_len, blocks: &blocks, window, state_slot };
            self.input.push(rows, self.block_size);
            self.hidden()?;
        }
        self.input.clear(Pass::Decoder);
        let rows = ChunkRows { start: source_len, tokens, source_len, blocks: &blocks, window, state_slot };
        self.input.push(rows, self.block_size);
        let hidden = self.hidden()?;
        Ok(self.model.logits(&hidden)?.to_vec2::<f32>()?)
    }

    /// What every loaded multi-token-prediction layer guesses, `[layer][position][vocab_size]`: layer `k` at position `i`
    /// the token at `i + k + 2`, from the states and tokens up to `i + k + 1`. As [`Self::logits_of`], outside any schedule.
    pub fn drafts_of(&mut self, tokens: &[u32]) -> Result<Vec<Vec<Vec<f32>>>, EngineError> {
        let num_mtp_layers = self.model.shape().num_mtp_layers;
        if num_mtp_layers == 0 {
            return Ok(Vec::new());
        }
        let blocks: Vec<BlockId> = (0..tokens.len().div_ceil(self.block_size) as u32).map(BlockId).collect();
        // No family that has such layers keeps recurrent states or an encoder.
        let window = Some(WindowRows { start: 0, blocks: &blocks });
        let mut rows = ChunkRows { start: 0, tokens, source_len: 0, blocks: &blocks, window, state_slot: None };
        self.input.clear(Pass::Decoder);
        self.input.push(rows, self.block_size);
        let mut hidden = self.hidden()?;
        let mut guesses = Vec::new();
        for mtp_idx in 0..num_mtp_layers {
            let Some((_, behind)) = rows.tokens.split_first().filter(|(_, behind)| !behind.is_empty()) else { break };
            rows.tokens = behind;
            self.input.clear(Pass::Decoder);
            self.input.push(rows, self.block_size);
            let all_rows: Vec<u32> = (0..behind.len() as u32).collect();
            let input = DraftInput { mtp_idx, hidden: &hidden.narrow(0, 0, behind.len())?, rows: &all_rows };
            let context = &mut ForwardContext {
                input: &self.input,
                arena: &mut self.arena,
                routing: &mut self.routing,
                routed: &mut self.routed,
            };
            let draft = self.model.draft(&input, context)?;
            self.routing.finish_step();
            guesses.push(draft.logits.to_vec2::<f32>()?);
            hidden = draft.hidden;
        }
        Ok(guesses)
    }

    /// Hidden states of all rows, `[num_tokens, hidden_size]`.
    fn forward(&mut self, scheduler: &Scheduler, batch: &Batch) -> Result<Tensor, EngineError> {
        let is_encoder = matches!(batch.chunks.first(), Some(Chunk { phase: Phase::Encode, .. }));
        self.input.clear(if is_encoder { Pass::Encoder } else { Pass::Decoder });
        let has_windows = self.arena.has_windows();
        for chunk in &batch.chunks {
            let sequence = scheduler.sequence(chunk.id).expect("a scheduled sequence is known");
            let table = sequence.block_table();
            let window = WindowRows { start: table.window_start(), blocks: table.window() };
            let rows = ChunkRows {
                start: chunk.start,
                tokens: &sequence.tokens()[chunk.start..chunk.start + chunk.len],
                source_len: sequence.source_len(),
                blocks: table.blocks(),
                window: has_windows.then_some(window),
                state_slot: sequence.state_slot(),
            };
            self.input.push(rows, self.block_size);
        }
        self.hidden()
    }

    fn hidden(&mut self) -> Result<Tensor, EngineError> {
        let context = &mut ForwardContext {
            input: &self.input,
            arena: &mut self.arena,
            routing: &mut self.routing,
            routed: &mut self.routed,
        };
        let hidden = self.model.hidden(context)?;
        self.routing.finish_step();
        Ok(hidden)
    }
}

/// What a row of logits was wanted for.
enum RowRead {
    Prompt(PromptLogprob),
    Next(Option<SampledToken>),
}

fn read_row(logits: &[f32], predicts: usize, sequence: &Sequence, request: &RowRequest) -> RowRead {
    match sequence.tokens().get(predicts) {
        Some(&known) => {
            let num_top = request.sampling.prompt_logprobs.unwrap_or(0) as usize;
            RowRead::Prompt(prompt_logprob(logits, known, num_top))
        }
        None => RowRead::Next(sample(&SampleRow {
            logits,
            params: request.sampling,
            // What an encoder read is not what the decoder would repeat.
            tokens: &sequence.tokens()[sequence.source_len()..],
            prompt_len: sequence.prompt_len() - sequence.source_len(),
            forbidden: request.forbidden,
        })),
    }
}

/// The last row of every sampling chunk, and all rows that predict prompt tokens whose log-probs are still owed.
fn wanted_rows(scheduler: &Scheduler, batch: &Batch, requests: &[RowRequest]) -> Vec<WantedRow> {
    let mut wanted = Vec::new();
    let mut first_row = 0;
    for (chunk_idx, (chunk, request)) in batch.chunks.iter().zip(requests).enumerate() {
        let prompt_len = scheduler.sequence(chunk.id).expect("a scheduled sequence is known").prompt_len();
        let end = chunk.start + chunk.len;
        let owed = match request.sampling.prompt_logprobs {
            Some(_) => request.num_prompt_logprobs.max(chunk.start)..end.min(prompt_len - 1),
            None => 0..0,
        };
        let sampled = chunk.samples.then_some(end - 1);
        wanted.extend(owed.chain(sampled).map(|position| WantedRow {
            row: (first_row + position - chunk.start) as u32,
            chunk_idx,
            predicts: position + 1,
        }));
        first_row += chunk.len;
    }
    wanted
}

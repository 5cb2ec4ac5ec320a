//! Runs one batch through the model and samples it: the part of a step that computes.

pub(crate) mod largest_step;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use candle_core::Tensor;
use kernels::{Choice, ReadRow};
use scheduler::{Batch, BlockId, Chunk, Phase, RequestId, Scheduler, Sequence, StateSlot};

use crate::error::EngineError;
use crate::experts::{
    CutChoices, ExpertFault, ExpertId, ExpertLoads, ExpertOptions, ExpertStore, ExpertTraffic, ExpertUse, RoutedLayout,
    RoutedRows, RoutingControl, RoutingOptions, RoutingStats, TouchedExperts,
};
use crate::forward_input::{ChunkRows, ForwardInput, Pass, WindowRows};
use crate::handle::{PromptLogprob, SampledToken};
use crate::layers::decoder::gather_rows;
use crate::memory::{BlockCoding, KvArena};
use crate::models::{DraftInput, ForwardContext, Model, ModelShape, Prefill};
use crate::pulse::Pulse;
use crate::sampling::{self, params::SamplingParams};

/// Rows of logits held at a time: a long prompt's log-probs would otherwise need `prompt × vocabulary` floats.
const LOGIT_ROWS: usize = 64;

/// The model with its memory.
pub struct Runner {
    model: Box<dyn Model>,
    arena: KvArena,
    routing: RoutingStats,
    routed: RoutedRows,
    control: RoutingControl,
    /// Where they are not in the model.
    experts: Option<ExpertStore>,
    /// Of each sequence of a step, where any wants to know it.
    traffic: Vec<Option<ExpertTraffic>>,
    input: ForwardInput,
    block_size: usize,
    pulse: Arc<Pulse>,
}

/// What is kept of each token beside keys and values.
pub struct TokenPlaces {
    /// It has the arena's blocks.
    pub routed: RoutedRows,
    /// Tokens of a block.
    pub block_size: usize,
}

/// Why rows of a step are no numbers, by row.
type Faults = BTreeMap<usize, Arc<ExpertFault>>;

/// How a sequence wants its rows read.
pub struct RowRequest<'a> {
    pub sampling: &'a SamplingParams,
    /// Tokens that may not be sampled now.
    pub forbidden: &'a [u32],
    /// Prompt log-probs already delivered.
    pub num_prompt_logprobs: usize,
    /// The experts of its tokens go with what is sampled, see [`SampledToken::routed_experts`].
    pub wants_routed_experts: bool,
    /// So does what they cost, see [`SampledToken::expert_use`].
    pub wants_expert_use: bool,
    pub experts: ExpertOptions,
}

/// What a chunk gave.
#[derive(Debug, Default)]
pub struct ChunkOutput {
    /// Of prompt positions `num_prompt_logprobs + 1..`, as far as the chunk reaches.
    pub prompt_logprobs: Vec<PromptLogprob>,
    /// For chunks that sample: the token, or `None` if the row held no usable number.
    pub sampled: Option<Option<SampledToken>>,
    /// Choices of its rows that were cut because experts were full.
    pub cut: CutChoices,
    /// What its rows found and had read, where that is wanted and not all experts are in memory for good.
    pub traffic: Option<ExpertTraffic>,
    /// An expert that a row of the chunk needed is not to be had: nothing of the chunk is of use.
    pub fault: Option<Arc<ExpertFault>>,
}

/// A row of hidden states whose logits somebody wants.
struct WantedRow {
    row: u32,
    chunk_idx: usize,
    /// Position of the token that the row predicts.
    predicts: usize,
}

impl Runner {
    pub fn new(model: Box<dyn Model>, arena: KvArena, places: TokenPlaces, options: RoutingOptions) -> Self {
        let layers = &model.shape().moe_layers;
        let routing = RoutingStats::new(layers, model.shape().num_mtp_moe_layers);
        let control = RoutingControl::new(options, layers.iter().map(|layer| layer.num_experts));
        let TokenPlaces { routed, block_size } = places;
        Self {
            model,
            arena,
            routing,
            routed,
            control,
            experts: None,
            traffic: Vec::new(),
            input: ForwardInput::default(),
            block_size,
            pulse: Arc::default(),
        }
    }

    /// With the experts that the model does not have.
    pub fn with_experts(self, experts: Option<ExpertStore>) -> Self {
        let experts = experts.map(|store| store.with_pulse(Arc::clone(&self.pulse)));
        Self { experts, ..self }
    }

    pub(crate) fn into_model(self) -> Box<dyn Model> {
        self.model
    }

    /// Beats where a step takes as long as a disk wants.
    pub(crate) fn pulse(&self) -> &Arc<Pulse> {
        &self.pulse
    }

    /// Whether experts are read when they are needed.
    pub fn has_expert_store(&self) -> bool {
        self.experts.is_some()
    }

    /// These experts, and no others of which that was said before, will be used soon, the first ones first.
    pub fn expect_experts(&mut self, experts: Vec<ExpertId>) {
        if let Some(store) = &mut self.experts {
            store.expect(experts);
        }
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

    /// What its routers chose so far, for others to read.
    pub fn expert_loads(&self) -> &Arc<ExpertLoads> {
        self.routing.loads()
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
    /// Fails if a device does.
    pub fn read_block(&self, block: BlockId, coding: BlockCoding) -> Result<Bytes, EngineError> {
        let mut bytes = Vec::with_capacity(self.block_len(coding));
        self.arena.read_block(block, coding, &mut bytes)?;
        bytes.extend(self.experts_of_block(block).into_iter().flat_map(u16::to_le_bytes));
        Ok(bytes.into())
    }

    /// Fills a block with what [`Self::read_block`] gave. False, with nothing changed, where that is not as long. Fails
    /// if a device does.
    pub fn write_block(&mut self, block: BlockId, coding: BlockCoding, bytes: &[u8]) -> Result<bool, EngineError> {
        let is_whole = bytes.len() == self.block_len(coding);
        if is_whole {
            let (kv, experts) = bytes.split_at(self.arena.block_len(coding));
            self.arena.write_block(block, coding, kv)?;
            self.routed.write_block(block, experts.as_chunks().0.iter().map(|&id| u16::from_le_bytes(id)));
        }
        Ok(is_whole)
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
        let requests: Vec<RowRequest> = batch.chunks.iter().map(|chunk| request_of(chunk.id)).collect();
        let (hidden, faults) = self.forward(scheduler, batch, &requests)?;
        self.arena.copy_states(&batch.snapshots)?;
        let wanted = wanted_rows(scheduler, batch, &requests);
        let mut outputs: Vec<ChunkOutput> = batch.chunks.iter().map(|_| ChunkOutput::default()).collect();
        for rows in wanted.chunks(LOGIT_ROWS) {
            let indices: Vec<u32> = rows.iter().map(|wanted| wanted.row).collect();
            let logits = self.model.logits(&gather_rows(&hidden, &indices)?)?.contiguous()?;
            // Penalties count all tokens of a sequence.
            let asked = kernels::pool::parallel_map(rows.len(), |idx| {
                let WantedRow { chunk_idx, predicts, .. } = rows[idx];
                let sequence = scheduler.sequence(batch.chunks[chunk_idx].id).expect("a scheduled sequence is known");
                sampling::asked(sequence, predicts, &requests[chunk_idx])
            });
            for ((wanted, asked), read) in rows.iter().zip(&asked).zip(kernels::read_logits(&logits, &asked)?) {
                let output = &mut outputs[wanted.chunk_idx];
                match asked.choice {
                    Choice::Known(token) => output.prompt_logprobs.push(PromptLogprob {
                        token,
                        logprob: read.logprob.expect("it was asked for"),
                        top: read.top,
                    }),
                    Choice::Draw(_) => output.sampled = Some(sampled(read)),
                }
            }
        }
        // What was sampled came last: nothing is waited for any more.
        self.finish_routing()?;
        for ((chunk, request), output) in batch.chunks.iter().zip(&requests).zip(&mut outputs) {
            let Some(Some(sampled)) = &mut output.sampled else { continue };
            let sequence = scheduler.sequence(chunk.id).expect("a scheduled sequence is known");
            if request.wants_routed_experts {
                sampled.routed_experts = self.routed.read(sequence.block_table().blocks(), news(sequence));
            }
            if request.wants_expert_use {
                // A prompt's experts are told once, however many choices it has.
                let is_told = request.sampling.choice > 0 && sequence.num_generated() == 0;
                let found = if is_told { ExpertUse::of_prompt() } else { self.use_of_news(sequence) };
                sampled.expert_use = Some(Box::new(found));
            }
        }
        for (output, cut) in outputs.iter_mut().zip(self.control.take_cut()) {
            output.cut = cut;
        }
        for (output, traffic) in outputs.iter_mut().zip(self.traffic.drain(..)) {
            output.traffic = traffic;
        }
        mark_faults(batch, &faults, &mut outputs);
        Ok(outputs)
    }

    /// What the experts of the news cost; those that tokens told of before had touched are among the touched ones.
    fn use_of_news(&self, sequence: &Sequence) -> ExpertUse {
        /// Tokens whose experts are looked at together.
        const MOST_TOKENS: usize = 256;
        let news = news(sequence);
        let mut found = ExpertUse { of_prompt: sequence.num_generated() == 0, ..ExpertUse::default() };
        let (costs, mut touched) = (&self.model.shape().expert_costs, TouchedExperts::default());
        for start in news.clone().step_by(MOST_TOKENS) {
            let positions = start..news.end.min(start + MOST_TOKENS);
            let experts = self.routed.read(sequence.block_table().blocks(), positions);
            found.add(&experts, (self.routed.layout(), costs), &mut touched);
        }
        found
    }

    /// Logits at every position of one sequence, `[tokens.len()][vocab_size]`, computed in one pass outside any schedule.
    /// It writes over the first blocks and states of the arena: for measuring a model, not while requests run
    /// or prefixes are cached.
    pub fn logits_of(&mut self, tokens: &[u32]) -> Result<Vec<Vec<f32>>, EngineError> {
        self.logits_after(&[], tokens)
    }

    /// The same for a decoder's `tokens` after its encoder has read `source`, in a pass of its own.
    pub fn logits_after(&mut self, source: &[u32], tokens: &[u32]) -> Result<Vec<Vec<f32>>, EngineError> {
        let hidden = self.hidden_after(source, tokens)?;
        Ok(kernels::to_host(&self.model.logits(&hidden)?)?.to_vec2::<f32>()?)
    }

    /// Reads a prompt for what its routers choose, which is counted in [`Self::expert_loads`]; outside any schedule, as
    /// [`Self::logits_of`]. An encoder reads all of it, its decoder the first token.
    pub fn read_prompt(&mut self, prompt: &Arc<[u32]>) -> Result<(), EngineError> {
        let (tokens, source_len) = self.prefill().sequence(prompt);
        let (source, tokens) = tokens.split_at(source_len);
        self.hidden_after(source, tokens)?;
        Ok(())
    }

    fn hidden_after(&mut self, source: &[u32], tokens: &[u32]) -> Result<Tensor, EngineError> {
        let num_blocks = (source.len() + tokens.len()).div_ceil(self.block_size);
        let blocks: Vec<BlockId> = (0..num_blocks as u32).map(BlockId).collect();
        let has_states = self.model.shape().cache_sites.iter().any(|site| site.state_bytes() > 0);
        let state_slot = has_states.then_some(StateSlot(0));
        let window = Some(WindowRows { start: 0, blocks: &blocks });
        let (source_len, experts) = (source.len(), ExpertOptions::default());
        if source_len > 0 {
            self.input.clear(Pass::Encoder);
            let rows = ChunkRows { start: 0, tokens: source, source_len, blocks: &blocks, window, state_slot, experts };
            self.input.push(rows, self.block_size);
            refuse(self.hidden_now()?)?;
        }
        self.input.clear(Pass::Decoder);
        let rows = ChunkRows { start: source_len, tokens, source_len, blocks: &blocks, window, state_slot, experts };
        self.input.push(rows, self.block_size);
        refuse(self.hidden_now()?)
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
        let (state_slot, experts) = (None, ExpertOptions::default());
        let mut rows = ChunkRows { start: 0, tokens, source_len: 0, blocks: &blocks, window, state_slot, experts };
        self.input.clear(Pass::Decoder);
        self.input.push(rows, self.block_size);
        let mut hidden = refuse(self.hidden_now()?)?;
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
                control: &mut self.control,
                experts: self.experts.as_mut(),
                traffic: &mut [],
            };
            let draft = self.model.draft(&input, context)?;
            self.finish_routing()?;
            let faults = self.experts.as_mut().map(ExpertStore::finish_step).unwrap_or_default();
            let draft = refuse((draft, faults))?;
            guesses.push(kernels::to_host(&draft.logits)?.to_vec2::<f32>()?);
            hidden = draft.hidden;
        }
        Ok(guesses)
    }

    /// Hidden states of all rows, `[num_tokens, hidden_size]`.
    fn forward(
        &mut self,
        scheduler: &Scheduler,
        batch: &Batch,
        requests: &[RowRequest],
    ) -> Result<(Tensor, Faults), EngineError> {
        let is_encoder = matches!(batch.chunks.first(), Some(Chunk { phase: Phase::Encode, .. }));
        self.input.clear(if is_encoder { Pass::Encoder } else { Pass::Decoder });
        let has_windows = self.arena.has_windows();
        for (chunk, request) in batch.chunks.iter().zip(requests) {
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
                experts: request.experts,
            };
            self.input.push(rows, self.block_size);
        }
        if self.experts.is_some() && requests.iter().any(|request| request.wants_expert_use) {
            let wanted = |request: &RowRequest| request.wants_expert_use.then(ExpertTraffic::default);
            self.traffic = requests.iter().map(wanted).collect();
        }
        self.hidden()
    }

    /// With what its routers chose, which `hidden` leaves on a device for [`Self::finish_routing`].
    fn hidden_now(&mut self) -> Result<(Tensor, Faults), EngineError> {
        let found = self.hidden()?;
        self.finish_routing()?;
        Ok(found)
    }

    fn hidden(&mut self) -> Result<(Tensor, Faults), EngineError> {
        self.routing.begin_step();
        if let Some(experts) = &mut self.experts {
            experts.begin_step();
        }
        let context = &mut ForwardContext {
            input: &self.input,
            arena: &mut self.arena,
            routing: &mut self.routing,
            routed: &mut self.routed,
            control: &mut self.control,
            experts: self.experts.as_mut(),
            traffic: &mut self.traffic,
        };
        let hidden = self.model.hidden(context)?;
        Ok((hidden, self.experts.as_mut().map(ExpertStore::finish_step).unwrap_or_default()))
    }

    /// Counts what the routers of the present step chose on a device, and keeps it with the rows' blocks.
    fn finish_routing(&mut self) -> Result<(), EngineError> {
        for (moe_idx, topk) in self.routing.take_later()? {
            self.routing.record(moe_idx, &topk);
            self.routed.write(moe_idx, &topk, &self.input.paged.slot_mapping);
        }
        self.routing.finish_step();
        Ok(())
    }
}

/// The chunks whose rows are no numbers give nothing but the reason.
fn mark_faults(batch: &Batch, faults: &Faults, outputs: &mut [ChunkOutput]) {
    let mut first_row = 0;
    for (chunk, output) in batch.chunks.iter().zip(outputs) {
        if let Some((_, fault)) = faults.range(first_row..first_row + chunk.len).next() {
            output.fault = Some(Arc::clone(fault));
            output.prompt_logprobs.clear();
        }
        first_row += chunk.len;
    }
}

/// For who wants all rows.
fn refuse<T>((found, faults): (T, Faults)) -> Result<T, EngineError> {
    match faults.into_values().next() {
        None => Ok(found),
        Some(fault) => Err(EngineError::Expert(ExpertFault::clone(&fault))),
    }
}

/// The tokens that nobody was told the experts of: those of the prompt when its last row was computed, and then the newest one.
/// Their experts are read from the blocks, whoever computed those, and however often.
fn news(sequence: &Sequence) -> Range<usize> {
    let num_tokens = sequence.tokens().len();
    let start = if sequence.num_generated() == 0 { 0 } else { num_tokens - 1 };
    start..num_tokens
}

/// A token that was drawn; `None` where its row held no usable number.
fn sampled(read: ReadRow) -> Option<SampledToken> {
    let ReadRow { token, logprob, top } = read;
    token.map(|token| SampledToken {
        token,
        logprob,
        top,
        routed_experts: Vec::new(),
        expert_use: None,
        is_stop: false,
    })
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

//! Deltas to the objects that clients read, whole or as the chunks of a stream. Pure: no engine, no connection.

pub mod chat;
pub mod completions;
pub mod logprobs;
mod moe_usage;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use engine::{ExpertUse, RoutedLayout};
use futures::stream::{self, Stream, StreamExt as _};

pub use moe_usage::{MoeCount, MoeTerms};

use crate::error::ApiError;
use crate::generate::{Batch, Delta, Finish, Indexed, Output, TokenRecord};
use crate::openai::FinishReason;
use crate::openai::routed_experts::RoutedExperts;
use crate::openai::usage::{PromptCount, Usage};
use crate::sse::to_json;
use crate::text::Tokenizer;
use crate::validate::{OutputOptions, StreamPlan};

/// Changes when the same seed may give another output.
pub const FINGERPRINT: &str = concat!("moesaic-", env!("CARGO_PKG_VERSION"));

/// The bytes that tokens stand for.
pub trait Vocabulary: Send + Sync {
    fn token_bytes(&self, token: u32) -> Vec<u8>;

    /// Whether the token is left out of text where special tokens are.
    fn is_special(&self, token: u32) -> bool;
}

impl Vocabulary for Tokenizer {
    fn token_bytes(&self, token: u32) -> Vec<u8> {
        Self::token_bytes(self, token)
    }

    fn is_special(&self, token: u32) -> bool {
        Self::is_special(self, token)
    }
}

/// What every object of one answer repeats.
#[derive(Clone)]
pub struct Envelope {
    pub id: String,
    /// Seconds since the epoch.
    pub created: u64,
    pub model: String,
    pub output: OutputOptions,
    /// Whether log-probs of generated tokens were asked for.
    pub wants_logprobs: bool,
    pub vocabulary: Arc<dyn Vocabulary>,
    /// How the experts of a token follow each other.
    pub routed: RoutedLayout,
    /// Nothing was computed for the answer.
    pub is_cached: bool,
    pub moe: MoeTerms,
}

impl Envelope {
    /// The experts of whole tokens, where they were asked for.
    fn routed_experts(&self, ids: Vec<u16>) -> Option<RoutedExperts> {
        self.output.routed_experts.then(|| RoutedExperts { ids, layout: self.routed.clone() })
    }

    /// The usage of an answer that does not stream.
    fn usage(&self, prompt: PromptCount, choices: &[Collected]) -> Usage {
        let num_tokens = choices.iter().map(|choice| choice.token_ids.len()).sum();
        let mut moe = MoeCount::new(self.moe);
        for (index, choice) in (0..).zip(choices) {
            choice.expert_use.iter().for_each(|found| moe.add(index, found));
        }
        Usage::new(prompt, num_tokens).cached(self.is_cached).moe(moe.usage())
    }

    /// The same for a part of a stream, which need not have any.
    fn streamed_experts(&self, ids: &[u16]) -> Option<RoutedExperts> {
        (!ids.is_empty()).then(|| self.routed_experts(ids.to_vec())).flatten()
    }
}

/// All deltas of one choice put together.
#[derive(Debug, Default)]
pub struct Collected {
    pub text: String,
    pub token_ids: Vec<u32>,
    pub logprobs: Vec<TokenRecord>,
    pub prompt_logprobs: Option<Vec<engine::PromptLogprob>>,
    pub prompt_experts: Vec<u16>,
    pub experts: Vec<u16>,
    /// Of the prompt, and of what was generated.
    pub expert_use: [ExpertUse; 2],
    pub finish: Option<Finish>,
    /// Tokens of its prompt that were computed before.
    pub num_cached_tokens: usize,
}

impl Collected {
    fn add(&mut self, delta: Delta) {
        self.text.push_str(&delta.text);
        self.token_ids.extend(delta.token_ids);
        self.logprobs.extend(delta.logprobs);
        self.prompt_experts.extend(delta.prompt_experts);
        self.experts.extend(delta.experts);
        if let Some(found) = delta.expert_use {
            let [of_prompt, of_output] = &mut self.expert_use;
            match found.of_prompt {
                true => *of_prompt = *found,
                false => of_output.merge(*found),
            }
        }
        self.finish = self.finish.take().or(delta.finish);
    }

    /// The end, which every choice has when its stream is over.
    fn end(&self) -> Finish {
        self.finish.clone().unwrap_or(Finish { reason: FinishReason::Length, stop_reason: None })
    }
}

/// Puts outputs together by choice, of which there are so many.
pub fn collect(outputs: Vec<Indexed>, num_choices: usize) -> Vec<Collected> {
    let mut choices: Vec<_> = std::iter::repeat_with(Collected::default).take(num_choices).collect();
    for Indexed { index, output } in outputs {
        let choice = &mut choices[index as usize];
        match output {
            Output::Started { num_cached_tokens } => choice.num_cached_tokens = num_cached_tokens,
            Output::Prompt(logprobs) => choice.prompt_logprobs = Some(logprobs),
            Output::Delta(delta) => choice.add(delta),
        }
    }
    choices
}

/// Turns outputs into the chunks of a stream.
pub trait ChunkWriter: Send + 'static {
    type Chunk: serde::Serialize + Send + 'static;

    /// The chunks of one output; none where it shows nothing.
    fn write(&mut self, indexed: Indexed) -> Vec<Self::Chunk>;

    /// The usage chunk, where one is wanted.
    fn closing(&self) -> Option<Self::Chunk>;
}

/// The chunks of a batch to its end or first error. The batch goes as soon as either came out.
pub fn chunks<W: ChunkWriter>(
    batch: Batch,
    writer: W,
) -> impl Stream<Item = Result<W::Chunk, ApiError>> + Send + 'static {
    stream::unfold(Some((batch, writer)), |state| async {
        let (mut batch, mut writer) = state?;
        match batch.next().await {
            Some(Ok(output)) => {
                let chunks: Vec<_> = writer.write(output).into_iter().map(Ok).collect();
                Some((chunks, Some((batch, writer))))
            }
            Some(Err(error)) => Some((vec![Err(error)], None)),
            None => Some((writer.closing().into_iter().map(Ok).collect(), None)),
        }
    })
    .flat_map(stream::iter)
}

/// The chunks of outputs that are all there, behind those that open the stream, as JSON.
pub fn written<W: ChunkWriter>((opening, mut writer): (Vec<W::Chunk>, W), outputs: Vec<Indexed>) -> Vec<String> {
    let mut chunks = opening;
    outputs.into_iter().for_each(|output| chunks.extend(writer.write(output)));
    chunks.extend(writer.closing());
    chunks.iter().map(to_json).collect()
}

/// Counts the tokens of a stream for its usage fields.
#[derive(Clone, Debug)]
pub struct StreamUsage {
    plan: StreamPlan,
    prompt: PromptCount,
    num_choices: u32,
    num_completion_tokens: usize,
    is_cached: bool,
    moe: MoeCount,
}

impl StreamUsage {
    /// For prompts of so many tokens together, each with `num_choices`.
    pub fn new(plan: StreamPlan, num_prompt_tokens: usize, num_choices: u32) -> Self {
        let prompt = PromptCount { num_tokens: num_prompt_tokens, num_cached: 0 };
        let moe = MoeCount::default();
        Self { plan, prompt, num_choices, num_completion_tokens: 0, is_cached: false, moe }
    }

    /// For an answer for which nothing was computed, or not.
    #[must_use]
    pub fn cached(self, is_cached: bool) -> Self {
        Self { is_cached, ..self }
    }

    /// With what is known of its experts.
    #[must_use]
    pub fn moe(self, terms: MoeTerms) -> Self {
        Self { moe: MoeCount::new(terms), ..self }
    }

    fn total(&self) -> Usage {
        Usage::new(self.prompt, self.num_completion_tokens).cached(self.is_cached).moe(self.moe.usage())
    }

    fn add(&mut self, indexed: &Indexed) {
        match &indexed.output {
            // What the first choice found: the others of a prompt share with it.
            Output::Started { num_cached_tokens } if indexed.index.is_multiple_of(self.num_choices) => {
                self.prompt.num_cached += num_cached_tokens;
            }
            Output::Delta(delta) => {
                self.num_completion_tokens += delta.token_ids.len();
                self.moe.add_delta(indexed.index, delta);
            }
            Output::Started { .. } | Output::Prompt(_) => {}
        }
    }

    /// The `usage` of a chunk with choices: absent, null or the count so far.
    fn of_chunk(&self) -> Option<Option<Usage>> {
        match self.plan {
            StreamPlan { continuous_usage: true, .. } => Some(Some(self.total())),
            StreamPlan { include_usage: true, .. } => Some(None),
            StreamPlan { .. } => None,
        }
    }

    /// The `usage` of the last chunk, where one is wanted.
    fn of_end(&self) -> Option<Usage> {
        self.plan.include_usage.then(|| self.total())
    }
}

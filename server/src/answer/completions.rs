//! Text completions from deltas.

use std::sync::Arc;

use super::{ChunkWriter, Collected, Envelope, FINGERPRINT, StreamUsage};
use crate::generate::{Delta, Indexed, Output};
use crate::openai::completions::{Completion, CompletionChoice};
use crate::openai::logprobs::CompletionLogprobs;
use crate::openai::usage::{PromptCount, Usage};

/// A prompt as ids and as the text that `echo` repeats.
#[derive(Clone, Debug)]
pub struct CompletionPrompt {
    pub ids: Arc<[u32]>,
    pub text: String,
}

impl Envelope {
    /// The answer to text completions that do not stream; `choices` has as many entries per prompt.
    pub fn completion(&self, prompts: &[CompletionPrompt], choices: Vec<Collected>) -> Completion {
        let num_per_prompt = choices.len() / prompts.len().max(1);
        let num_cached = choices.iter().step_by(num_per_prompt.max(1)).map(|choice| choice.num_cached_tokens).sum();
        let prompt = PromptCount { num_tokens: prompts.iter().map(|prompt| prompt.ids.len()).sum(), num_cached };
        let usage = Some(Some(self.usage(prompt, &choices)));
        let choice = |(choice, index): (Collected, u32)| {
            self.completion_choice(index, &prompts[index as usize / num_per_prompt], choice)
        };
        self.completion_object(choices.into_iter().zip(0..).map(choice).collect(), usage)
    }

    fn completion_choice(&self, index: u32, prompt: &CompletionPrompt, choice: Collected) -> CompletionChoice {
        let end = choice.end();
        let known = choice.prompt_logprobs.as_deref();
        let mut logprobs = CompletionLogprobs::default();
        let mut text = String::new();
        if self.output.echo {
            text.clone_from(&prompt.text);
            logprobs = self.echo_logprobs(&prompt.ids, known.unwrap_or_default());
        }
        append(&mut logprobs, self.completion_logprobs(&choice.logprobs, text.chars().count()));
        text.push_str(&choice.text);
        CompletionChoice {
            index,
            text,
            logprobs: self.wants_logprobs.then_some(logprobs),
            finish_reason: Some(end.reason),
            stop_reason: end.stop_reason,
            token_ids: self.output.token_ids.then_some(choice.token_ids),
            prompt_token_ids: self.output.token_ids.then(|| prompt.ids.to_vec()),
            prompt_logprobs: known.map(|known| self.prompt_logprobs(known)),
            prompt_routed_experts: self.routed_experts(choice.prompt_experts),
            routed_experts: self.routed_experts(choice.experts),
        }
    }

    fn completion_object(&self, choices: Vec<CompletionChoice>, usage: Option<Option<Usage>>) -> Completion {
        Completion {
            id: self.id.clone(),
            object: "text_completion",
            created: self.created,
            model: self.model.clone(),
            system_fingerprint: FINGERPRINT,
            choices,
            usage,
        }
    }
}

/// Writes the chunks of streamed text completions: the echoed prompt, text, an end per choice, the usage.
pub struct CompletionWriter {
    pub envelope: Envelope,
    pub usage: StreamUsage,
    pub prompts: Vec<CompletionPrompt>,
    pub num_choices: u32,
    /// Per choice: whether its prompt was shown.
    pub opened: Vec<bool>,
}

impl CompletionWriter {
    /// The echoed prompt and its ids, once per choice, where they were asked for.
    fn open(&mut self, index: u32, known: &[engine::PromptLogprob]) -> Option<CompletionChoice> {
        if std::mem::replace(&mut self.opened[index as usize], true) {
            return None;
        }
        let output = self.envelope.output;
        let prompt = &self.prompts[(index / self.num_choices) as usize];
        let logprobs =
            (output.echo && self.envelope.wants_logprobs).then(|| self.envelope.echo_logprobs(&prompt.ids, known));
        (output.echo || output.token_ids).then(|| CompletionChoice {
            text: if output.echo { prompt.text.clone() } else { String::new() },
            logprobs,
            prompt_token_ids: output.token_ids.then(|| prompt.ids.to_vec()),
            ..empty_choice(index)
        })
    }

    fn text_choice(&self, index: u32, delta: &Delta) -> Option<CompletionChoice> {
        let output = self.envelope.output;
        let shows_ids = output.token_ids && !delta.token_ids.is_empty();
        if delta.text.is_empty() && delta.logprobs.is_empty() && !delta.has_experts() && !shows_ids {
            return None;
        }
        let echoed = &self.prompts[(index / self.num_choices) as usize].text;
        let offset = if output.echo { echoed.chars().count() } else { 0 };
        let logprobs = (self.envelope.wants_logprobs && !delta.logprobs.is_empty())
            .then(|| self.envelope.completion_logprobs(&delta.logprobs, offset));
        Some(CompletionChoice {
            text: delta.text.clone(),
            logprobs,
            token_ids: output.token_ids.then(|| delta.token_ids.clone()),
            prompt_routed_experts: self.envelope.streamed_experts(&delta.prompt_experts),
            routed_experts: self.envelope.streamed_experts(&delta.experts),
            ..empty_choice(index)
        })
    }
}

impl ChunkWriter for CompletionWriter {
    type Chunk = Completion;

    fn write(&mut self, indexed: Indexed) -> Vec<Completion> {
        let index = indexed.index;
        let mut choices = Vec::new();
        self.usage.add(&indexed);
        match indexed.output {
            Output::Started { .. } => {}
            Output::Prompt(known) => choices.extend(self.open(index, &known)),
            Output::Delta(delta) => {
                choices.extend(self.open(index, &[]));
                choices.extend(self.text_choice(index, &delta));
                choices.extend(delta.finish.map(|finish| CompletionChoice {
                    finish_reason: Some(finish.reason),
                    stop_reason: finish.stop_reason,
                    ..empty_choice(index)
                }));
            }
        }
        let chunk = |choice| self.envelope.completion_object(vec![choice], self.usage.of_chunk());
        choices.into_iter().map(chunk).collect()
    }

    fn closing(&self) -> Option<Completion> {
        self.usage.of_end().map(|usage| self.envelope.completion_object(Vec::new(), Some(Some(usage))))
    }
}

fn append(to: &mut CompletionLogprobs, from: CompletionLogprobs) {
    to.tokens.extend(from.tokens);
    to.token_logprobs.extend(from.token_logprobs);
    to.top_logprobs.extend(from.top_logprobs);
    to.text_offset.extend(from.text_offset);
}

fn empty_choice(index: u32) -> CompletionChoice {
    CompletionChoice {
        index,
        text: String::new(),
        logprobs: None,
        finish_reason: None,
        stop_reason: None,
        token_ids: None,
        prompt_token_ids: None,
        prompt_logprobs: None,
        prompt_routed_experts: None,
        routed_experts: None,
    }
}

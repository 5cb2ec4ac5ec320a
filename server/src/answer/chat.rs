//! Chat completions from deltas.

use super::{ChunkWriter, Collected, Envelope, FINGERPRINT, StreamUsage};
use crate::generate::{Delta, Indexed, Output};
use crate::openai::chat::{
    AssistantMessage, ChatChoice, ChatChunkChoice, ChatCompletion, ChatCompletionChunk, ChatDelta,
};
use crate::openai::usage::PromptCount;

impl Envelope {
    /// The answer to a chat that does not stream.
    pub fn chat_completion(&self, prompt: &[u32], mut choices: Vec<Collected>) -> ChatCompletion {
        let num_cached = choices.first().map_or(0, |choice| choice.num_cached_tokens);
        let usage = self.usage(PromptCount { num_tokens: prompt.len(), num_cached }, &choices);
        let prompt_experts = choices.first_mut().map(|choice| std::mem::take(&mut choice.prompt_experts));
        let prompt_logprobs = choices.first().and_then(|choice| choice.prompt_logprobs.as_deref());
        ChatCompletion {
            id: self.id.clone(),
            object: "chat.completion",
            created: self.created,
            model: self.model.clone(),
            usage,
            system_fingerprint: FINGERPRINT,
            prompt_token_ids: self.output.token_ids.then(|| prompt.to_vec()),
            prompt_logprobs: prompt_logprobs.map(|known| self.prompt_logprobs(known)),
            prompt_routed_experts: prompt_experts.and_then(|ids| self.routed_experts(ids)),
            choices: choices.into_iter().zip(0..).map(|(choice, index)| self.chat_choice(index, choice)).collect(),
        }
    }

    fn chat_choice(&self, index: u32, choice: Collected) -> ChatChoice {
        let end = choice.end();
        ChatChoice {
            index,
            logprobs: self.chat_logprobs(&choice.logprobs),
            finish_reason: end.reason,
            stop_reason: end.stop_reason,
            token_ids: self.output.token_ids.then_some(choice.token_ids),
            routed_experts: self.routed_experts(choice.experts),
            message: AssistantMessage { role: "assistant", content: choice.text, refusal: None },
        }
    }
}

/// Writes the chunks of a streamed chat: a role per choice, text, an end per choice, the usage.
pub struct ChatWriter {
    pub envelope: Envelope,
    pub usage: StreamUsage,
}

impl ChatWriter {
    /// The chunks that come before any token.
    pub fn opening(&self, num_choices: u32, prompt: &[u32]) -> Vec<ChatCompletionChunk> {
        let mut prompt_token_ids = self.envelope.output.token_ids.then(|| prompt.to_vec());
        let role = |index| {
            let delta = ChatDelta { role: Some("assistant"), content: Some(String::new()) };
            let mut chunk = self.chunk(ChatChunkChoice { delta, ..empty_choice(index) });
            chunk.prompt_token_ids = prompt_token_ids.take();
            chunk
        };
        (0..num_choices).map(role).collect()
    }

    fn text_chunk(&self, index: u32, delta: &Delta) -> ChatCompletionChunk {
        let envelope = &self.envelope;
        let mut chunk = self.chunk(ChatChunkChoice {
            delta: ChatDelta { role: None, content: Some(delta.text.clone()) },
            logprobs: envelope.chat_logprobs(&delta.logprobs).filter(|logprobs| !logprobs.content.is_empty()),
            token_ids: envelope.output.token_ids.then(|| delta.token_ids.clone()),
            routed_experts: envelope.streamed_experts(&delta.experts),
            ..empty_choice(index)
        });
        // All choices have one prompt.
        let prompt_experts = if index == 0 { delta.prompt_experts.as_slice() } else { &[] };
        chunk.prompt_routed_experts = envelope.streamed_experts(prompt_experts);
        chunk
    }

    fn chunk(&self, choice: ChatChunkChoice) -> ChatCompletionChunk {
        ChatCompletionChunk {
            id: self.envelope.id.clone(),
            object: "chat.completion.chunk",
            created: self.envelope.created,
            model: self.envelope.model.clone(),
            system_fingerprint: FINGERPRINT,
            choices: vec![choice],
            usage: self.usage.of_chunk(),
            prompt_token_ids: None,
            prompt_routed_experts: None,
        }
    }
}

impl ChunkWriter for ChatWriter {
    type Chunk = ChatCompletionChunk;

    fn write(&mut self, indexed: Indexed) -> Vec<ChatCompletionChunk> {
        self.usage.add(&indexed);
        let Output::Delta(delta) = indexed.output else { return Vec::new() };
        let shows = !delta.text.is_empty()
            || !delta.logprobs.is_empty()
            || delta.has_experts()
            || (self.envelope.output.token_ids && !delta.token_ids.is_empty());
        let text = shows.then(|| self.text_chunk(indexed.index, &delta));
        let end = delta.finish.map(|finish| {
            self.chunk(ChatChunkChoice {
                finish_reason: Some(finish.reason),
                stop_reason: finish.stop_reason,
                ..empty_choice(indexed.index)
            })
        });
        text.into_iter().chain(end).collect()
    }

    fn closing(&self) -> Option<ChatCompletionChunk> {
        let usage = self.usage.of_end()?;
        let mut chunk = self.chunk(empty_choice(0));
        chunk.choices.clear();
        chunk.usage = Some(Some(usage));
        Some(chunk)
    }
}

fn empty_choice(index: u32) -> ChatChunkChoice {
    ChatChunkChoice {
        index,
        delta: ChatDelta::default(),
        logprobs: None,
        finish_reason: None,
        stop_reason: None,
        token_ids: None,
        routed_experts: None,
    }
}

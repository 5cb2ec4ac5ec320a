//! Token records to the log-prob shapes of chat, text completions and prompts.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::Envelope;
use crate::generate::TokenRecord;
use crate::openai::logprobs::{
    ChatLogprob, ChatLogprobs, CompletionLogprobs, PromptLogprobEntry, PromptLogprobs, TopLogprob,
};

/// Most negative number that JSON readers are sure to take: log-probs of masked tokens are minus infinity.
const FLOOR: f32 = -9999.0;

impl Envelope {
    /// How a token is written in log-probs.
    fn token_name(&self, token: u32) -> String {
        match self.output.tokens_as_ids {
            true => format!("token_id:{token}"),
            false => self.token_text(token),
        }
    }

    /// The token's text, with U+FFFD for bytes that are only part of a character.
    pub fn token_text(&self, token: u32) -> String {
        String::from_utf8_lossy(&self.vocabulary.token_bytes(token)).into_owned()
    }

    pub(super) fn chat_logprobs(&self, records: &[TokenRecord]) -> Option<ChatLogprobs> {
        let entry = |record: &TokenRecord| ChatLogprob {
            token: self.token_name(record.token),
            logprob: record.logprob.max(FLOOR),
            bytes: Some(self.vocabulary.token_bytes(record.token)),
            top_logprobs: record
                .top
                .iter()
                .map(|&(token, logprob)| TopLogprob {
                    token: self.token_name(token),
                    logprob: logprob.max(FLOOR),
                    bytes: Some(self.vocabulary.token_bytes(token)),
                })
                .collect(),
        };
        self.wants_logprobs.then(|| ChatLogprobs { content: records.iter().map(entry).collect() })
    }

    /// Log-probs of generated tokens whose text begins at character `offset` of the choice's text.
    pub(super) fn completion_logprobs(&self, records: &[TokenRecord], offset: usize) -> CompletionLogprobs {
        let mut logprobs = CompletionLogprobs::default();
        for record in records {
            logprobs.tokens.push(self.token_name(record.token));
            logprobs.token_logprobs.push(Some(record.logprob.max(FLOOR)));
            logprobs.top_logprobs.push(Some(self.top_map(record.token, record.logprob, &record.top)));
            logprobs.text_offset.push(offset + record.text_offset);
        }
        logprobs
    }

    /// Log-probs of an echoed prompt: nothing is known about its first token.
    pub(super) fn echo_logprobs(&self, prompt: &[u32], known: &[engine::PromptLogprob]) -> CompletionLogprobs {
        let mut logprobs = CompletionLogprobs::default();
        let mut offset = 0;
        for (position, &token) in prompt.iter().enumerate() {
            let entry = position.checked_sub(1).and_then(|before| known.get(before));
            logprobs.tokens.push(self.token_name(token));
            logprobs.token_logprobs.push(entry.map(|entry| entry.logprob.max(FLOOR)));
            logprobs.top_logprobs.push(entry.map(|entry| self.top_map(token, entry.logprob, &entry.top)));
            logprobs.text_offset.push(offset);
            let hidden = self.output.skip_special_tokens && self.vocabulary.is_special(token);
            offset += if hidden { 0 } else { self.token_text(token).chars().count() };
        }
        logprobs
    }

    /// vLLM's shape of `prompt_logprobs`.
    pub(super) fn prompt_logprobs(&self, known: &[engine::PromptLogprob]) -> PromptLogprobs {
        let entry = |token: u32, logprob: f32, rank: Option<usize>| {
            let logprob = logprob.max(FLOOR);
            (token, PromptLogprobEntry { logprob, rank, decoded_token: self.token_text(token) })
        };
        let position = |known: &engine::PromptLogprob| {
            let mut entries = BTreeMap::from([entry(known.token, known.logprob, None)]);
            entries
                .extend(known.top.iter().zip(1..).map(|(&(token, logprob), rank)| entry(token, logprob, Some(rank))));
            Some(entries)
        };
        std::iter::once(None).chain(known.iter().map(position)).collect()
    }

    /// The alternatives and, as OpenAI has it, always the token itself. The likelier of two tokens with one text wins.
    fn top_map(&self, token: u32, logprob: f32, top: &[(u32, f32)]) -> Map<String, Value> {
        let mut map = Map::new();
        for &(token, logprob) in top.iter().chain(std::iter::once(&(token, logprob))) {
            map.entry(self.token_name(token)).or_insert_with(|| number(logprob.max(FLOOR)));
        }
        map
    }
}

/// The same digits as an `f32` field has elsewhere in the answer: a JSON value would show those of the `f64` it widens to.
fn number(value: f32) -> Value {
    Value::from(value.to_string().parse::<f64>().expect("a number is written as a number"))
}

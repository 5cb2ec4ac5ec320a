//! What the clients read of completions and chat completions, whole or in chunks. Every server sends more.

use serde::Deserialize;
use serde_json::Value;

/// An answer or a chunk of one.
#[derive(Debug, Default, Deserialize)]
pub struct Answer {
    #[serde(default)]
    pub choices: Vec<Choice>,
    pub usage: Option<TokenUsage>,
    pub error: Option<Value>,
}

#[derive(Debug, Deserialize)]
pub struct Choice {
    /// Of text completions.
    text: Option<String>,
    /// Of streamed chats.
    delta: Option<Message>,
    /// Of whole chats.
    message: Option<Message>,
    pub token_ids: Option<Vec<u32>>,
}

#[derive(Debug, Deserialize)]
struct Message {
    content: Option<String>,
    reasoning_content: Option<String>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
pub struct TokenUsage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
}

impl Choice {
    /// The text of the answer, without its reasoning.
    pub fn content(&self) -> &str {
        let message = self.delta.as_ref().or(self.message.as_ref());
        let content = self.text.as_deref().or_else(|| message?.content.as_deref());
        content.unwrap_or_default()
    }

    /// Whether it carries anything that the model generated: the first chunk of a chat names only the role.
    pub fn has_output(&self) -> bool {
        let message = self.delta.as_ref().or(self.message.as_ref());
        let reasoning = message.and_then(|message| message.reasoning_content.as_deref());
        let has_ids = self.token_ids.as_ref().is_some_and(|ids| !ids.is_empty());
        has_ids || !self.content().is_empty() || reasoning.is_some_and(|text| !text.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_told_from_what_surrounds_it() {
        for (choice, content, has_output) in [
            (r#"{"index": 0, "text": "a", "token_ids": [5]}"#, "a", true),
            (r#"{"index": 0, "text": "", "token_ids": [5]}"#, "", true),
            (r#"{"index": 0, "text": "", "prompt_token_ids": [1, 2]}"#, "", false),
            (r#"{"delta": {"role": "assistant", "content": ""}}"#, "", false),
            (r#"{"delta": {"content": "b"}, "finish_reason": null}"#, "b", true),
            (r#"{"delta": {"reasoning_content": "hm"}}"#, "", true),
            (r#"{"delta": {}, "finish_reason": "stop"}"#, "", false),
            (r#"{"message": {"role": "assistant", "content": "c"}}"#, "c", true),
        ] {
            let parsed: Choice = serde_json::from_str(choice).unwrap();
            assert_eq!((parsed.content(), parsed.has_output()), (content, has_output), "{choice}");
        }
    }
}

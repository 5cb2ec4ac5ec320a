//! The token ids of what a request gives as its prompt, made on the text threads.

use std::sync::Arc;

use serde_json::Value;

use super::body::parse;
use super::chat::no_template;
use crate::app::{App, Model};
use crate::conversation::Conversation;
use crate::error::ApiError;
use crate::openai::chat::ChatOptions;
use crate::text::{EncodeOptions, TextError};

/// Of a text, with the tokenizer's special tokens unless they are not wanted.
pub(super) async fn of_text(
    app: &App,
    model: &Model,
    text: String,
    add_special_tokens: Option<bool>,
) -> Result<Vec<u32>, ApiError> {
    let tokenizer = Arc::clone(&model.tokenizer);
    let options = EncodeOptions { add_special_tokens: add_special_tokens.unwrap_or(true) };
    let invalid = |error: TextError| ApiError::invalid("prompt", error.to_string());
    app.limits.run_text(move || tokenizer.encode(&text, options).map_err(invalid)).await
}

/// Of the conversation in a body that has the fields of a chat: the ids that the chat would be given.
pub(super) async fn of_conversation(app: &App, model: &Model, body: &Value) -> Result<Vec<u32>, ApiError> {
    let conversation = Conversation::new(&parse::<ChatOptions>(body)?)?;
    let template = model.template.clone().ok_or_else(no_template)?;
    let tokenizer = Arc::clone(&model.tokenizer);
    app.limits.run_text(move || conversation.to_ids(&template, &tokenizer)).await
}

//! Everything that can go wrong between strings and token ids.

use std::path::PathBuf;

/// A failure of the text side. The `Template*` and `FinalMessage*` variants are about one request's messages, `Tokenize`
/// about its text; the others arise while loading a model.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    #[error("cannot read {path}: {source}")]
    ReadFile { path: PathBuf, source: std::io::Error },
    #[error("{path} is invalid: {reason}")]
    InvalidFile { path: PathBuf, reason: String },
    #[error(
        "no tokenizer in {dir}: expected tokenizer.json or tiktoken.model; hint: copy the tokenizer files of the \
         original checkpoint into this folder"
    )]
    NoTokenizer { dir: PathBuf },
    /// The tokenizer library refused a text or a list of ids.
    #[error("cannot tokenize: {0}")]
    Tokenize(String),
    /// `tokenizer_config.json` lists several templates and none is called `default`.
    #[error("{path} has chat templates {names:?} but none named \"default\"; hint: pass one with --chat-template")]
    NoDefaultTemplate { path: PathBuf, names: Vec<String> },
    /// For callers that need a template where [`super::ChatTemplate::load`] found none.
    #[error("this model has no chat template; hint: pass one with --chat-template")]
    NoChatTemplate,
    #[error("the chat template {path} does not compile: {message}")]
    TemplateSyntax { path: PathBuf, message: String },
    /// The template itself refused the conversation through `raise_exception`; the message is the template's own.
    #[error("{0}")]
    TemplateRaised(String),
    #[error("the chat template cannot render this conversation: {0}")]
    TemplateRender(String),
    #[error("continue_final_message and add_generation_prompt exclude each other")]
    FinalMessageAndPrompt,
    #[error("continue_final_message needs a final message with text content")]
    FinalMessageWithoutText,
    #[error("continue_final_message is not possible: the chat template does not keep the final message as it is")]
    FinalMessageLost,
}

impl TextError {
    pub(super) fn invalid(path: impl Into<PathBuf>, reason: impl ToString) -> Self {
        Self::InvalidFile { path: path.into(), reason: reason.to_string() }
    }

    pub(super) fn tokenize(source: tokenizers::Error) -> Self {
        Self::Tokenize(source.to_string())
    }
}

//! Strings to token ids and back: tokenizers, chat templates, incremental detokenization and stop strings.
//!
//! | file | owns |
//! |---|---|
//! | `tokenizer` | [`Tokenizer`]: one vocabulary, encode and decode |
//! | `tokenizer_config` | what `tokenizer_config.json` and `special_tokens_map.json` say |
//! | `tiktoken` | a tokenizer from `tiktoken.model` |
//! | `gguf_tokenizer` | [`TokenizerFiles`]: tokenizer files from GGUF metadata |
//! | `gguf_splitting`, `gguf_sentencepiece` | what such files leave unsaid, by the kind of vocabulary |
//! | `token_bytes` | which bytes a token stands for, and their assembly into UTF-8 |
//! | `detokenizer` | [`Detokenizer`]: token ids to text, one at a time |
//! | `stop` | [`StopMatcher`]: stop strings over streamed text |
//! | `chat_template` | [`ChatTemplate`]: messages to a prompt |
//! | `python_json`, `python_time` | the Python behaviour that chat templates rely on |

mod chat_template;
mod detokenizer;
mod error;
mod gguf_sentencepiece;
mod gguf_splitting;
mod gguf_tokenizer;
mod python_json;
mod python_time;
mod stop;
mod tiktoken;
mod token_bytes;
mod tokenizer;
mod tokenizer_config;

#[cfg(test)]
mod tests;

pub use chat_template::{ChatInput, ChatTemplate};
pub use detokenizer::{DetokenizeOptions, Detokenizer};
pub use error::TextError;
pub use gguf_tokenizer::TokenizerFiles;
pub use stop::{StopMatcher, StopOptions, StopOutcome};
pub use tokenizer::{EncodeOptions, Tokenizer};

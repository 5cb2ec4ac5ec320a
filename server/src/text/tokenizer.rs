//! One model's vocabulary: text to token ids, token ids to text, and what each id stands for.

use std::{collections::HashMap, path::Path};

use tokenizers::{AddedToken, processors::template::TemplateProcessing};

use super::{
    TextError, TokenizerFiles, tiktoken,
    token_bytes::{TextAssembler, TokenForm},
    tokenizer_config::{MAX_VOCABULARY_BYTES, SpecialTokens, TokenizerConfig, read_optional},
};

/// How [`Tokenizer::encode`] treats a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EncodeOptions {
    /// Adds what the model family puts around a text, such as BOS. Rendered chats carry theirs already.
    pub add_special_tokens: bool,
}

/// A loaded vocabulary. It is large: share it behind an `Arc`.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    form: TokenForm,
    /// Tokens beside the vocabulary proper, special or not.
    added_tokens: HashMap<u32, AddedToken>,
    special_tokens: SpecialTokens,
    vocab_size: usize,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, else `tiktoken.model`, of a model folder, with `tokenizer_config.json` and
    /// `special_tokens_map.json` where they exist.
    ///
    /// Errors: neither file is there, or one cannot be read or is invalid.
    pub fn load(model_dir: &Path) -> Result<Self, TextError> {
        let config = TokenizerConfig::load(model_dir)?;
        let inner = if let Some(tokenizer) = load_tokenizer_json(model_dir, &config)? {
            tokenizer
        } else if let Some(tokenizer) = tiktoken::load(model_dir, &config)? {
            tokenizer
        } else {
            return Err(TextError::NoTokenizer { dir: model_dir.to_owned() });
        };
        Ok(Self::new(inner, config.special_tokens))
    }

    /// The tokenizer of a GGUF file.
    ///
    /// Errors: what the file says makes no tokenizer.
    pub fn from_gguf(files: &TokenizerFiles) -> Result<Self, TextError> {
        let config = TokenizerConfig::of_gguf(files)?;
        let inner = finish(&files.source, &files.tokenizer_json, &config)?;
        Ok(Self::new(inner, config.special_tokens))
    }

    pub(super) fn new(inner: tokenizers::Tokenizer, special_tokens: SpecialTokens) -> Self {
        let form = TokenForm::of(inner.get_decoder());
        let added_tokens = inner.get_added_tokens_decoder().into_iter().collect();
        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        Self { inner, form, added_tokens, special_tokens, vocab_size }
    }

    /// The ids of `text`. The strings of special tokens in it become those tokens, as in Hugging Face.
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>, TextError> {
        let encoding = self.inner.encode_fast(text, options.add_special_tokens).map_err(TextError::tokenize)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`; ids outside the vocabulary stand for nothing, and bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, TextError> {
        let Some(mut assembler) = self.assembler() else {
            return self.inner.decode(ids, skip_special_tokens).map_err(TextError::tokenize);
        };
        let mut text = String::new();
        for &id in ids.iter().filter(|&&id| !(skip_special_tokens && self.is_special(id))) {
            text.push_str(&self.assemble(&mut assembler, id));
        }
        text.push_str(&assembler.finish());
        Ok(text)
    }

    /// The token as the vocabulary spells it.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token as the vocabulary spells it.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// One past the largest id, added tokens included. The model's own vocabulary may be larger.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Whether `skip_special_tokens` leaves this id out.
    pub fn is_special(&self, id: u32) -> bool {
        self.added_tokens.get(&id).is_some_and(|token| token.special)
    }

    /// The bytes that a token stands for in the middle of a text; empty for an id outside the vocabulary. They need not
    /// be UTF-8.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        if let Some(token) = self.added_tokens.get(&id) {
            return token.content.as_bytes().to_vec();
        }
        self.id_to_token(id).map(|token| self.form.bytes(&token)).unwrap_or_default()
    }

    pub fn bos_token(&self) -> Option<&str> {
        self.special_tokens.get("bos_token")
    }

    pub fn eos_token(&self) -> Option<&str> {
        self.special_tokens.get("eos_token")
    }

    pub fn pad_token(&self) -> Option<&str> {
        self.special_tokens.get("pad_token")
    }

    pub fn unk_token(&self) -> Option<&str> {
        self.special_tokens.get("unk_token")
    }

    /// Whether the token stands beside the vocabulary proper, special or not.
    pub(super) fn is_added(&self, id: u32) -> bool {
        self.added_tokens.contains_key(&id)
    }

    /// `None` where only the whole window of ids tells the text, see [`TokenForm::Other`].
    pub(super) fn assembler(&self) -> Option<TextAssembler> {
        TextAssembler::new(self.form)
    }

    pub(super) fn assemble(&self, assembler: &mut TextAssembler, id: u32) -> String {
        match self.id_to_token(id) {
            Some(token) => assembler.push(&token, &self.token_bytes(id)),
            None => String::new(),
        }
    }
}

/// Reads the text of a `tokenizer.json`. The library panics on some broken ones, such as a merge longer than every token:
/// that is an error here, too.
pub(super) fn parse_tokenizer_json(text: &str) -> Result<tokenizers::Tokenizer, tokenizers::Error> {
    let parsed = std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(text));
    parsed.unwrap_or_else(|_| Err("its vocabulary and merges contradict each other".into()))
}

fn load_tokenizer_json(model_dir: &Path, config: &TokenizerConfig) -> Result<Option<tokenizers::Tokenizer>, TextError> {
    let path = model_dir.join("tokenizer.json");
    let Some(text) = read_optional(&path, MAX_VOCABULARY_BYTES)? else { return Ok(None) };
    finish(&path, &text, config).map(Some)
}

/// The tokenizer of a `tokenizer.json` that was read from `path`, with what `config` changes.
fn finish(path: &Path, text: &str, config: &TokenizerConfig) -> Result<tokenizers::Tokenizer, TextError> {
    let invalid = |error: tokenizers::Error| TextError::invalid(path, error);
    let mut tokenizer = parse_tokenizer_json(text).map_err(invalid)?;
    // Both belong to the training run that saved the file; Hugging Face clears them before each call, too.
    tokenizer.with_truncation(None).map_err(invalid)?;
    tokenizer.with_padding(None);
    // Existing tokens keep their ids and take over the flags of the configuration.
    let added = config.added_tokens.iter().map(|(_, token)| token.clone());
    tokenizer.add_tokens(added).map_err(invalid)?;
    if let Some(processor) = llama_post_processor(&tokenizer, config)? {
        tokenizer.with_post_processor(Some(processor));
    }
    Ok(tokenizer)
}

/// Hugging Face's Llama tokenizer classes ignore the post-processor of `tokenizer.json` in favour of `add_bos_token` and
/// `add_eos_token`; DeepSeek's checkpoints rely on it.
fn llama_post_processor(
    tokenizer: &tokenizers::Tokenizer,
    config: &TokenizerConfig,
) -> Result<Option<TemplateProcessing>, TextError> {
    if !matches!(config.tokenizer_class(), "LlamaTokenizer" | "LlamaTokenizerFast") {
        return Ok(None);
    }
    let (add_bos, add_eos) = (config.flag("add_bos_token"), config.flag("add_eos_token"));
    if add_bos.is_none() && add_eos.is_none() {
        return Ok(None);
    }
    let invalid = |reason: String| TextError::invalid(&config.path, reason);
    let mut special_tokens = Vec::new();
    let mut frame = |wanted: bool, role: &str| -> Result<String, TextError> {
        if !wanted {
            return Ok(String::new());
        }
        let token =
            config.special_tokens.get(role).ok_or_else(|| invalid(format!("add_{role} is set without {role}")))?;
        let id = tokenizer
            .token_to_id(token)
            .ok_or_else(|| invalid(format!("{role} {token:?} is not in the vocabulary")))?;
        special_tokens.push((token.to_owned(), id));
        Ok(token.to_owned())
    };
    // Llama's default is to add BOS and not EOS.
    let bos = frame(add_bos.unwrap_or(true), "bos_token")?;
    let eos = frame(add_eos.unwrap_or(false), "eos_token")?;
    let processor = TemplateProcessing::builder()
        .try_single(format!("{bos} $A {eos}").trim())
        .map_err(invalid)?
        .special_tokens(special_tokens)
        .build()
        .map_err(|error| invalid(error.to_string()))?;
    Ok(Some(processor))
}

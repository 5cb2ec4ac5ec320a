//! `tokenizer.json` and `tokenizer_config.json` from the metadata of a GGUF file, for byte-level BPE vocabularies.
//!
//! GGUF names how texts are split before merging (`tokenizer.ggml.pre`) without spelling it out; the patterns here are
//! those of the checkpoints' own `tokenizer.json` files.

use std::collections::HashSet;
use std::path::Path;

use engine::{EngineError, GgufFile};
use serde_json::{Map, Value, json};

use super::{TextError, tokenizer::parse_tokenizer_json};

/// GPT-2's contractions, words, numbers, punctuation and spaces, as Hugging Face's `ByteLevel` has it built in.
const GPT2_PATTERN: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_PATTERN: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// `tokenizer.ggml.token_type`: how a token came into the vocabulary.
const TOKEN_UNKNOWN: u64 = 2;
const TOKEN_CONTROL: u64 = 3;
const TOKEN_USER_DEFINED: u64 = 4;
const TOKEN_UNUSED: u64 = 5;

/// The two files, as text.
#[derive(Clone, Debug)]
pub struct TokenizerFiles {
    pub tokenizer_json: String,
    pub tokenizer_config_json: String,
}

/// How texts are split before merging, and what goes with it.
struct Splitting {
    pre_tokenizer: Value,
    normalizer: Value,
    /// Whole words that are tokens are taken as they are.
    ignore_merges: bool,
    add_bos_by_default: bool,
}

/// The tokenizer part of the metadata.
struct Vocabulary<'a> {
    gguf: &'a GgufFile,
    tokens: Vec<&'a str>,
    /// As long as `tokens`.
    token_types: Vec<u64>,
    merges: Vec<&'a str>,
}

impl TokenizerFiles {
    /// Builds both files and checks that the tokenizer loads.
    ///
    /// # Errors
    /// [`TextError::InvalidFile`] for another kind of tokenizer, an unknown way of splitting, or broken metadata.
    pub fn from_gguf(gguf: &GgufFile) -> Result<Self, TextError> {
        let fail = |reason: String| TextError::invalid(gguf.path(), reason);
        let vocabulary = Vocabulary::read(gguf)?;
        let pre = vocabulary.text("tokenizer.ggml.pre")?.unwrap_or("default");
        let splitting = splitting(pre).map_err(fail)?;
        let tokenizer_json = vocabulary.tokenizer_json(&splitting)?.to_string();
        parse_tokenizer_json(&tokenizer_json)
            .map_err(|error| fail(format!("its vocabulary does not make a tokenizer: {error}")))?;
        let config = serde_json::to_string_pretty(&vocabulary.tokenizer_config(&splitting)?)
            .expect("a JSON value is always JSON");
        Ok(Self { tokenizer_json, tokenizer_config_json: config })
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json` into `dir`.
    pub fn write(&self, dir: &Path) -> std::io::Result<()> {
        std::fs::write(dir.join("tokenizer.json"), &self.tokenizer_json)?;
        std::fs::write(dir.join("tokenizer_config.json"), &self.tokenizer_config_json)
    }
}

impl<'a> Vocabulary<'a> {
    fn read(gguf: &'a GgufFile) -> Result<Self, TextError> {
        let fail = |reason: String| TextError::invalid(gguf.path(), reason);
        let metadata = |error: EngineError| fail(error.to_string());
        match gguf.opt_str("tokenizer.ggml.model").map_err(metadata)? {
            Some("gpt2") => {}
            found => {
                let found = found.unwrap_or("(none)");
                return Err(fail(format!(
                    "its tokenizer is of the kind `{found}`, supported is `gpt2` (byte-level BPE)"
                )));
            }
        }
        let strings = |key: &str| {
            gguf.opt_strings(key).map_err(metadata)?.ok_or_else(|| fail(format!("metadata `{key}` is missing")))
        };
        let tokens = strings("tokenizer.ggml.tokens")?;
        let merges = strings("tokenizer.ggml.merges")?;
        let token_types = gguf.opt_u64s("tokenizer.ggml.token_type").map_err(metadata)?;
        let token_types = token_types.unwrap_or_else(|| vec![1; tokens.len()]);
        if token_types.len() != tokens.len() {
            return Err(fail(format!("it has {} tokens but {} token types", tokens.len(), token_types.len())));
        }
        let mut seen = HashSet::new();
        match tokens.iter().find(|token| !seen.insert(**token)) {
            Some(token) => Err(fail(format!("token {token:?} is in the vocabulary twice"))),
            None => Ok(Self { gguf, tokens, token_types, merges }),
        }
    }

    fn fail(&self, reason: impl ToString) -> TextError {
        TextError::invalid(self.gguf.path(), reason)
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, TextError> {
        self.gguf.opt_str(key).map_err(|error| self.fail(error))
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, TextError> {
        self.gguf.opt_bool(key).map_err(|error| self.fail(error))
    }

    /// The token whose id is under `tokenizer.ggml.<role>_token_id`.
    fn role(&self, role: &str) -> Result<Option<(u64, &'a str)>, TextError> {
        let key = format!("tokenizer.ggml.{role}_token_id");
        let Some(id) = self.gguf.opt_u64(&key).map_err(|error| self.fail(error))? else { return Ok(None) };
        let token = usize::try_from(id).ok().and_then(|id| self.tokens.get(id));
        token
            .map(|token| Some((id, *token)))
            .ok_or_else(|| self.fail(format!("`{key}` is {id}, outside the vocabulary")))
    }

    fn adds_bos(&self, splitting: &Splitting) -> Result<bool, TextError> {
        Ok(self.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(splitting.add_bos_by_default))
    }

    fn adds_eos(&self) -> Result<bool, TextError> {
        Ok(self.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false))
    }

    /// Tokens that are matched as a whole before anything is split.
    fn added_tokens(&self) -> impl Iterator<Item = (usize, &'a str, bool)> {
        self.tokens.iter().zip(&self.token_types).enumerate().filter_map(|(id, (token, &kind))| match kind {
            TOKEN_CONTROL | TOKEN_UNKNOWN => Some((id, *token, true)),
            TOKEN_USER_DEFINED => Some((id, *token, false)),
            _ => None,
        })
    }

    fn tokenizer_json(&self, splitting: &Splitting) -> Result<Value, TextError> {
        let used =
            self.tokens.iter().zip(&self.token_types).enumerate().filter(|(_, (_, kind))| **kind != TOKEN_UNUSED);
        let vocab: Map<String, Value> = used.map(|(id, (token, _))| ((*token).to_owned(), id.into())).collect();
        let merges = self.merge_pairs(&vocab)?;
        let added: Vec<Value> =
            self.added_tokens().map(|(id, token, special)| added_token(Some(id), token, special)).collect();
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": splitting.normalizer,
            "pre_tokenizer": splitting.pre_tokenizer,
            "post_processor": self.post_processor(splitting)?,
            "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": false,
                "byte_fallback": false,
                "ignore_merges": splitting.ignore_merges,
                "vocab": vocab,
                "merges": merges,
            },
        }))
    }

    /// Each merge as its two tokens. All are looked up here, because the tokenizer library panics on some unknown ones.
    fn merge_pairs(&self, vocab: &Map<String, Value>) -> Result<Vec<[&'a str; 2]>, TextError> {
        let pair = |merge: &'a str| {
            let (left, right) = merge.split_once(' ')?;
            let is_known = |token: &str| vocab.contains_key(token);
            (is_known(left) && is_known(right) && is_known(&format!("{left}{right}"))).then_some([left, right])
        };
        self.merges
            .iter()
            .map(|merge| {
                pair(merge).ok_or_else(|| self.fail(format!("merge {merge:?} is not two tokens that make a token")))
            })
            .collect()
    }

    /// Puts the beginning and the end of a text around it, where the model was trained with them.
    fn post_processor(&self, splitting: &Splitting) -> Result<Value, TextError> {
        let bos = if self.adds_bos(splitting)? { self.role("bos")? } else { None };
        let eos = if self.adds_eos()? { self.role("eos")? } else { None };
        if bos.is_none() && eos.is_none() {
            return Ok(Value::Null);
        }
        let special = |token: Option<(u64, &str)>, type_id: u64| {
            token.map(|(_, token)| json!({ "SpecialToken": { "id": token, "type_id": type_id } }))
        };
        let around = |id: &str, type_id: u64| -> Vec<Value> {
            let sequence = json!({ "Sequence": { "id": id, "type_id": type_id } });
            special(bos, type_id).into_iter().chain([sequence]).chain(special(eos, type_id)).collect()
        };
        let single = around("A", 0);
        let pair = [single.clone(), around("B", 1)].concat();
        let special_tokens: Map<String, Value> = [bos, eos]
            .into_iter()
            .flatten()
            .map(|(id, token)| (token.to_owned(), json!({ "id": token, "ids": [id], "tokens": [token] })))
            .collect();
        Ok(json!({
            "type": "TemplateProcessing",
            "single": single,
            "pair": pair,
            "special_tokens": special_tokens,
        }))
    }

    fn tokenizer_config(&self, splitting: &Splitting) -> Result<Value, TextError> {
        let mut config = Map::new();
        config.insert("add_bos_token".into(), self.adds_bos(splitting)?.into());
        config.insert("add_eos_token".into(), self.adds_eos()?.into());
        let added: Map<String, Value> = self
            .added_tokens()
            .map(|(id, token, special)| (id.to_string(), added_token(None, token, special)))
            .collect();
        config.insert("added_tokens_decoder".into(), added.into());
        for (key, role) in
            [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
        {
            if let Some((_, token)) = self.role(role)? {
                config.insert(key.into(), token.into());
            }
        }
        if let Some(template) = self.text("tokenizer.chat_template")? {
            config.insert("chat_template".into(), template.into());
        }
        config.insert("clean_up_tokenization_spaces".into(), false.into());
        config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        Ok(config.into())
    }
}

fn added_token(id: Option<usize>, content: &str, special: bool) -> Value {
    let mut token = json!({
        "content": content,
        "single_word": false,
        "lstrip": false,
        "rstrip": false,
        "normalized": false,
        "special": special,
    });
    if let Some(id) = id {
        token["id"] = id.into();
    }
    token
}

/// How a vocabulary of the kind `pre` splits texts.
fn splitting(pre: &str) -> Result<Splitting, String> {
    let byte_level = |use_regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex });
    let split = |pattern: &str| json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
    let sequence = |steps: Vec<Value>| json!({ "type": "Sequence", "pretokenizers": steps });
    let plain = |pre_tokenizer: Value| Splitting {
        pre_tokenizer,
        normalizer: Value::Null,
        ignore_merges: false,
        add_bos_by_default: false,
    };
    Ok(match pre {
        "gpt-2" => plain(byte_level(true)),
        "smollm" => plain(sequence(vec![json!({ "type": "Digits", "individual_digits": true }), byte_level(true)])),
        "default" => plain(sequence(vec![
            split(r"[\p{P}\$\+<=>\^~\|]+"),
            split(GPT2_PATTERN),
            split(r"\p{N}+"),
            split("[0-9][0-9][0-9]"),
            byte_level(false),
        ])),
        "llama-bpe" | "llama3" | "llama-v3" => Splitting {
            ignore_merges: true,
            add_bos_by_default: true,
            ..plain(sequence(vec![split(LLAMA3_PATTERN), byte_level(false)]))
        },
        "qwen2" => Splitting {
            normalizer: json!({ "type": "NFC" }),
            ..plain(sequence(vec![split(QWEN2_PATTERN), byte_level(false)]))
        },
        other => {
            return Err(format!(
                "its tokenizer splits texts the `{other}` way (tokenizer.ggml.pre), supported are default, gpt-2, \
                 llama-bpe, qwen2, smollm"
            ));
        }
    })
}

#[cfg(test)]
#[path = "gguf_tokenizer_tests.rs"]
mod tests;

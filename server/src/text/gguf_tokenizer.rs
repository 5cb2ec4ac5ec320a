//! `tokenizer.json` and `tokenizer_config.json` from the metadata of a GGUF file, for byte-level BPE vocabularies and
//! SentencePiece's.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use engine::{EngineError, GgufFile};
use serde_json::{Map, Value, json};

use super::gguf_splitting::{Splitting, splitting};
use super::{TextError, gguf_sentencepiece, tokenizer::parse_tokenizer_json};

/// `tokenizer.ggml.token_type`: how a token came into the vocabulary.
const TOKEN_NORMAL: u64 = 1;
const TOKEN_UNKNOWN: u64 = 2;
const TOKEN_CONTROL: u64 = 3;
const TOKEN_USER_DEFINED: u64 = 4;
const TOKEN_UNUSED: u64 = 5;

/// The two files, as text.
#[derive(Clone, Debug)]
pub struct TokenizerFiles {
    /// The GGUF file that they come from.
    pub source: PathBuf,
    pub tokenizer_json: String,
    pub tokenizer_config_json: String,
}

/// What a vocabulary is made of.
enum Kind {
    /// `gpt2`: characters stand for bytes, and merges are listed.
    ByteLevel(Splitting),
    /// `llama`: pieces with scores. Texts begin with a space, or not.
    SentencePiece { begins_with_space: bool },
}

/// The tokenizer part of the metadata.
struct Vocabulary<'a> {
    gguf: &'a GgufFile,
    tokens: Vec<&'a str>,
    /// As long as `tokens`.
    token_types: Vec<u64>,
    kind: Kind,
}

impl TokenizerFiles {
    /// Builds both files and checks that the tokenizer loads.
    ///
    /// # Errors
    /// [`TextError::InvalidFile`] for another kind of tokenizer, an unknown way of splitting, or broken metadata.
    pub fn from_gguf(gguf: &GgufFile) -> Result<Self, TextError> {
        let fail = |reason: String| TextError::invalid(gguf.path(), reason);
        let vocabulary = Vocabulary::read(gguf)?;
        let tokenizer_json = vocabulary.tokenizer_json()?.to_string();
        parse_tokenizer_json(&tokenizer_json)
            .map_err(|error| fail(format!("its vocabulary does not make a tokenizer: {error}")))?;
        let config =
            serde_json::to_string_pretty(&vocabulary.tokenizer_config()?).expect("a JSON value is always JSON");
        Ok(Self { source: gguf.path().to_owned(), tokenizer_json, tokenizer_config_json: config })
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
        let kind = match gguf.opt_str("tokenizer.ggml.model").map_err(metadata)? {
            Some("gpt2") => {
                let pre = gguf.opt_str("tokenizer.ggml.pre").map_err(metadata)?.unwrap_or("default");
                Kind::ByteLevel(splitting(pre).map_err(fail)?)
            }
            Some("llama") => {
                let begins = gguf.opt_bool("tokenizer.ggml.add_space_prefix").map_err(metadata)?;
                Kind::SentencePiece { begins_with_space: begins.unwrap_or(true) }
            }
            found => {
                let found = found.unwrap_or("(none)");
                return Err(fail(format!(
                    "its tokenizer is of the kind `{found}` (tokenizer.ggml.model), supported are `gpt2` (byte-level \
                     BPE) and `llama` (SentencePiece)"
                )));
            }
        };
        let tokens = gguf.opt_strings("tokenizer.ggml.tokens").map_err(metadata)?;
        let tokens = tokens.ok_or_else(|| fail("metadata `tokenizer.ggml.tokens` is missing".into()))?;
        let token_types = gguf.opt_u64s("tokenizer.ggml.token_type").map_err(metadata)?;
        let token_types = token_types.unwrap_or_else(|| vec![1; tokens.len()]);
        if token_types.len() != tokens.len() {
            return Err(fail(format!("it has {} tokens but {} token types", tokens.len(), token_types.len())));
        }
        let mut seen = HashSet::new();
        match tokens.iter().find(|token| !seen.insert(**token)) {
            Some(token) => Err(fail(format!("token {token:?} is in the vocabulary twice"))),
            None => Ok(Self { gguf, tokens, token_types, kind }),
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

    fn adds_bos(&self) -> Result<bool, TextError> {
        let by_default = match &self.kind {
            Kind::ByteLevel(splitting) => splitting.add_bos_by_default,
            Kind::SentencePiece { .. } => true,
        };
        Ok(self.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(by_default))
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

    fn tokenizer_json(&self) -> Result<Value, TextError> {
        let used =
            self.tokens.iter().zip(&self.token_types).enumerate().filter(|(_, (_, kind))| **kind != TOKEN_UNUSED);
        let vocab: Map<String, Value> = used.map(|(id, (token, _))| ((*token).to_owned(), id.into())).collect();
        let added: Vec<Value> =
            self.added_tokens().map(|(id, token, special)| added_token(Some(id), token, special)).collect();
        let mut model = json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
        });
        let (normalizer, pre_tokenizer, decoder) = match &self.kind {
            Kind::ByteLevel(splitting) => {
                model["ignore_merges"] = splitting.ignore_merges.into();
                model["merges"] = json!(self.merge_pairs(&vocab)?);
                let decoder =
                    json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true });
                (splitting.normalizer.clone(), splitting.pre_tokenizer.clone(), decoder)
            }
            &Kind::SentencePiece { begins_with_space } => {
                model["unk_token"] = self.role("unknown")?.map(|(_, token)| token).into();
                model["fuse_unk"] = true.into();
                model["byte_fallback"] = true.into();
                model["merges"] = json!(gguf_sentencepiece::merges(&self.scored_pieces()?));
                let normalizer = gguf_sentencepiece::normalizer(begins_with_space);
                (normalizer, Value::Null, gguf_sentencepiece::decoder(begins_with_space))
            }
        };
        model["vocab"] = vocab.into();
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": self.post_processor()?,
            "decoder": decoder,
            "model": model,
        }))
    }

    /// Pieces that texts are made of, with their ids and scores.
    fn scored_pieces(&self) -> Result<Vec<(usize, &'a str, f64)>, TextError> {
        let key = "tokenizer.ggml.scores";
        let scores = self.gguf.opt_f64s(key).map_err(|error| self.fail(error))?;
        let scores = scores.ok_or_else(|| self.fail(format!("metadata `{key}` is missing")))?;
        if scores.len() != self.tokens.len() {
            return Err(self.fail(format!("it has {} tokens but {} scores", self.tokens.len(), scores.len())));
        }
        let pieces = self.tokens.iter().zip(&self.token_types).zip(scores).enumerate();
        Ok(pieces
            .filter(|(_, ((_, kind), _))| **kind == TOKEN_NORMAL)
            .map(|(id, ((piece, _), score))| (id, *piece, score))
            .collect())
    }

    /// Each merge as its two tokens. All are looked up here, because the tokenizer library panics on some unknown ones.
    fn merge_pairs(&self, vocab: &Map<String, Value>) -> Result<Vec<[&'a str; 2]>, TextError> {
        let pair = |merge: &'a str| {
            let (left, right) = merge.split_once(' ')?;
            let is_known = |token: &str| vocab.contains_key(token);
            (is_known(left) && is_known(right) && is_known(&format!("{left}{right}"))).then_some([left, right])
        };
        let key = "tokenizer.ggml.merges";
        let merges = self.gguf.opt_strings(key).map_err(|error| self.fail(error))?;
        merges
            .ok_or_else(|| self.fail(format!("metadata `{key}` is missing")))?
            .into_iter()
            .map(|merge| {
                pair(merge).ok_or_else(|| self.fail(format!("merge {merge:?} is not two tokens that make a token")))
            })
            .collect()
    }

    /// Puts the beginning and the end of a text around it, where the model was trained with them.
    fn post_processor(&self) -> Result<Value, TextError> {
        let bos = if self.adds_bos()? { self.role("bos")? } else { None };
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

    fn tokenizer_config(&self) -> Result<Value, TextError> {
        let mut config = Map::new();
        config.insert("add_bos_token".into(), self.adds_bos()?.into());
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
        if let Some(templates) = self.chat_templates()? {
            config.insert("chat_template".into(), templates);
        }
        config.insert("clean_up_tokenization_spaces".into(), false.into());
        config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        Ok(config.into())
    }

    /// The template, or a list where there are others beside it, as in `tokenizer_config.json`.
    fn chat_templates(&self) -> Result<Option<Value>, TextError> {
        let Some(default) = self.text("tokenizer.chat_template")? else { return Ok(None) };
        let names = self.gguf.opt_strings("tokenizer.chat_templates").map_err(|error| self.fail(error))?;
        let mut templates = vec![json!({ "name": "default", "template": default })];
        for name in names.unwrap_or_default() {
            if let Some(template) = self.text(&format!("tokenizer.chat_template.{name}"))? {
                templates.push(json!({ "name": name, "template": template }));
            }
        }
        Ok(Some(if templates.len() == 1 { default.into() } else { templates.into() }))
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

#[cfg(test)]
#[path = "gguf_tokenizer_tests.rs"]
mod tests;

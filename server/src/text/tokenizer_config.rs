//! What `tokenizer_config.json` and `special_tokens_map.json` say about a vocabulary.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use engine::weights::read_bounded;
use serde_json::Value;
use tokenizers::AddedToken;

use super::{TextError, TokenizerFiles};

/// Of a JSON file of settings, or a chat template.
pub(super) const MAX_SETTINGS_BYTES: u64 = 8 << 20;

/// Of `tokenizer.json` or `tiktoken.model`; the largest published ones have some 35 MB.
pub(super) const MAX_VOCABULARY_BYTES: u64 = 128 << 20;

/// The roles that Hugging Face names, and the variables of the same names in chat templates.
const ROLES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The strings of the special tokens, by role; a role that is null or absent is not in the map.
#[derive(Debug, Default, Clone)]
pub(super) struct SpecialTokens {
    pub(super) by_role: BTreeMap<&'static str, String>,
    pub(super) additional: Vec<String>,
}

/// Both files, merged. All fields are empty where neither file exists.
#[derive(Debug, Default)]
pub(super) struct TokenizerConfig {
    /// Where `raw` was read, also when it does not exist.
    pub(super) path: PathBuf,
    raw: Value,
    pub(super) special_tokens: SpecialTokens,
    /// `added_tokens_decoder`, ordered by id.
    pub(super) added_tokens: Vec<(u32, AddedToken)>,
}

impl TokenizerConfig {
    /// Errors: a file that exists but cannot be read or is not JSON of the expected shape.
    pub(super) fn load(model_dir: &Path) -> Result<Self, TextError> {
        let path = model_dir.join("tokenizer_config.json");
        let raw = read_json(&path)?.unwrap_or_default();
        let map = read_json(&model_dir.join("special_tokens_map.json"))?.unwrap_or_default();
        Self::new(path, raw, &map)
    }

    /// The same of what a GGUF file says.
    pub(super) fn of_gguf(files: &TokenizerFiles) -> Result<Self, TextError> {
        let path = files.source.clone();
        let raw =
            serde_json::from_str(&files.tokenizer_config_json).map_err(|error| TextError::invalid(&path, error))?;
        Self::new(path, raw, &Value::Null)
    }

    fn new(path: PathBuf, raw: Value, map: &Value) -> Result<Self, TextError> {
        let special_tokens = SpecialTokens::merge(&raw, map);
        let added_tokens = added_tokens(&raw).map_err(|reason| TextError::invalid(&path, reason))?;
        Ok(Self { path, raw, special_tokens, added_tokens })
    }

    pub(super) fn chat_template(&self) -> Option<&Value> {
        self.raw.get("chat_template").filter(|template| !template.is_null())
    }

    pub(super) fn tokenizer_class(&self) -> &str {
        self.raw.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default()
    }

    /// `add_bos_token` or `add_eos_token`; `None` where the file leaves it open.
    pub(super) fn flag(&self, name: &str) -> Option<bool> {
        self.raw.get(name).and_then(Value::as_bool)
    }
}

impl SpecialTokens {
    fn merge(config: &Value, map: &Value) -> Self {
        let by_role = ROLES
            .into_iter()
            .filter_map(|role| Some((role, token_content(&config[role]).or_else(|| token_content(&map[role]))?)))
            .collect();
        let additional = [config, map]
            .into_iter()
            .find_map(|file| file["additional_special_tokens"].as_array())
            .map(|tokens| tokens.iter().filter_map(token_content).collect())
            .unwrap_or_default();
        Self { by_role, additional }
    }

    pub(super) fn get(&self, role: &str) -> Option<&str> {
        self.by_role.get(role).map(String::as_str)
    }
}

/// A token is written as a string or as an object with `content`.
fn token_content(token: &Value) -> Option<String> {
    token.as_str().or_else(|| token["content"].as_str()).map(str::to_owned)
}

fn added_tokens(config: &Value) -> Result<Vec<(u32, AddedToken)>, String> {
    let Some(entries) = config.get("added_tokens_decoder").and_then(Value::as_object) else {
        return Ok(Vec::new());
    };
    let mut tokens = Vec::with_capacity(entries.len());
    for (id, entry) in entries {
        let id: u32 =
            id.parse().map_err(|_| format!("added_tokens_decoder has the key {id:?}, expected a token id"))?;
        let content = token_content(entry).ok_or_else(|| format!("added token {id} has no content"))?;
        let flag = |name: &str, default: bool| entry[name].as_bool().unwrap_or(default);
        let special = flag("special", false);
        let token = AddedToken::from(content, special)
            .single_word(flag("single_word", false))
            .lstrip(flag("lstrip", false))
            .rstrip(flag("rstrip", false))
            .normalized(flag("normalized", !special));
        tokens.push((id, token));
    }
    tokens.sort_by_key(|(id, _)| *id);
    Ok(tokens)
}

/// The text of a file of at most `max_bytes`.
pub(super) fn read_text(path: &Path, max_bytes: u64) -> Result<String, TextError> {
    let read = || String::from_utf8(read_bounded(path, max_bytes)?).map_err(|_| io::ErrorKind::InvalidData.into());
    read().map_err(|source| TextError::ReadFile { path: path.to_owned(), source })
}

/// The same, or `None` where the file does not exist.
pub(super) fn read_optional(path: &Path, max_bytes: u64) -> Result<Option<String>, TextError> {
    match read_text(path, max_bytes) {
        Err(TextError::ReadFile { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        text => text.map(Some),
    }
}

/// The JSON of a file, or `None` where it does not exist.
pub(super) fn read_json(path: &Path) -> Result<Option<Value>, TextError> {
    let Some(text) = read_optional(path, MAX_SETTINGS_BYTES)? else { return Ok(None) };
    serde_json::from_str(&text).map(Some).map_err(|error| TextError::invalid(path, error))
}

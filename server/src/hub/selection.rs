//! Which files of a repository serving needs.

use std::collections::BTreeSet;
use std::path::Path;

use engine::weights::{checkpoint::MAX_INDEX_BYTES, read_bounded};
use serde_json::Value;

use super::cache::is_plain_name;
use super::error::HubError;

pub(super) const CONFIG_FILE: &str = "config.json";
pub(super) const INDEX_FILE: &str = "model.safetensors.index.json";
pub(super) const SINGLE_WEIGHTS_FILE: &str = "model.safetensors";

/// Everything but the weights: configuration, tokenizer in both formats, chat template.
const SMALL_FILES: [&str; 12] = [
    CONFIG_FILE,
    INDEX_FILE,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tiktoken.model",
    "chat_template.jinja",
    "chat_template.json",
];

/// The small files that the repository has.
///
/// # Errors
/// [`HubError::NotServable`] for a repository without a configuration or without weights that can be read.
pub(super) fn small_files(repo: &str, files: &[String]) -> Result<Vec<&'static str>, HubError> {
    let has = |name: &str| files.iter().any(|file| file == name);
    if !has(CONFIG_FILE) {
        return Err(HubError::NotServable { repo: repo.into(), what: CONFIG_FILE });
    }
    if !has(INDEX_FILE) && !has(SINGLE_WEIGHTS_FILE) {
        return Err(HubError::NotServable { repo: repo.into(), what: "model.safetensors and no index of shards" });
    }
    Ok(SMALL_FILES.into_iter().filter(|name| has(name)).collect())
}

/// The weight files of a snapshot whose small files are there. An index counts for more than a file of everything, as
/// in the loader, and keeps duplicates in other layouts from being downloaded.
pub(super) fn weight_files(snapshot: &Path) -> Result<Vec<String>, HubError> {
    match snapshot.join(INDEX_FILE) {
        index if index.is_file() => indexed_shards(&index),
        _ => Ok(vec![SINGLE_WEIGHTS_FILE.to_owned()]),
    }
}

/// The shards that `model.safetensors.index.json` names, sorted.
pub(super) fn indexed_shards(index: &Path) -> Result<Vec<String>, HubError> {
    let text = read_bounded(index, MAX_INDEX_BYTES).map_err(HubError::io(index))?;
    let bad = |reason: &str| HubError::BadAnswer { url: index.display().to_string(), reason: reason.to_owned() };
    let json: Value = serde_json::from_slice(&text).map_err(|error| bad(&error.to_string()))?;
    let weight_map = json["weight_map"].as_object().ok_or_else(|| bad("it has no weight_map"))?;
    let shards: Option<BTreeSet<&str>> = weight_map.values().map(Value::as_str).collect();
    let shards = shards.ok_or_else(|| bad("its weight_map does not name files"))?;
    match shards.iter().find(|shard| !is_plain_name(shard) || !shard.ends_with(".safetensors")) {
        Some(shard) => Err(bad(&format!("`{shard}` is not the name of a safetensors file"))),
        None => Ok(shards.into_iter().map(str::to_owned).collect()),
    }
}

//! A GGUF file in Hugging Face's terms, so that one set of models serves both.
//!
//! | file | owns |
//! |---|---|
//! | `metadata` | typed access that names the key in every error |
//! | `arch` | the architectures, and what differs between their names and layouts |
//! | `config` | metadata to the keys of config.json |
//! | `rope` | the rotary part of those |
//! | `names` | tensors to Hugging Face's: stacked experts apart, fused rows apart, rotary rows in order |
//! | `blocks` | block-quantized matrices to weights |

mod arch;
pub(super) mod blocks;
mod config;
mod metadata;
mod names;
mod rope;

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use self::arch::Arch;
use self::metadata::Metadata;
use self::names::Layout;
use super::checkpoint::Checkpoint;
use super::gguf::{GgufFile, GgufTensor};
use super::model_config::ModelConfig;
use crate::error::EngineError;
use crate::handle::GenerationDefaults;

/// Files that a model may be split into.
const MAX_SHARDS: u64 = 1 << 10;

/// Of all experts together; published models have up to a hundred thousand. Many may lie in the same bytes of a small file.
const MAX_TENSORS: usize = 1 << 20;

/// A model in one or more GGUF files.
#[derive(Debug)]
pub struct GgufModel {
    /// The first holds the metadata.
    shards: Vec<GgufFile>,
    arch: Arch,
}

impl GgufModel {
    /// Opens `path` and, where its model is split, the files beside it.
    ///
    /// # Errors
    /// Files that cannot be read or break the format, parts of a model without its first, an unknown architecture.
    pub fn open(path: &Path) -> Result<Self, EngineError> {
        let first = GgufFile::open(path)?;
        let arch = Arch::of(&first)?;
        let count = first.opt_u64("split.count")?.unwrap_or(1);
        if count > MAX_SHARDS {
            return Err(first.invalid(format!("metadata `split.count` is {count}, the limit is {MAX_SHARDS}")));
        }
        let mut shards = vec![first];
        for no in 1..count {
            let shard = GgufFile::open(&shard_path(&shards[0], no, count)?)?;
            if shard.opt_u64("split.no")? != Some(no) {
                return Err(shard.invalid(format!("metadata `split.no` is not {no}")));
            }
            shards.push(shard);
        }
        let model = Self { shards, arch };
        match model.first().opt_u64("split.no")? {
            None | Some(0) => Ok(model),
            Some(no) => Err(model.invalid(format!("it is part {} of a model; hint: give the first part", no + 1))),
        }
    }

    /// The metadata as config.json would have it.
    pub fn config(&self) -> Result<ModelConfig, EngineError> {
        let value = config::config(self)?;
        Ok(ModelConfig::from_value(value).expect("it is made as an object"))
    }

    /// The tensors under the names that the models ask for.
    ///
    /// # Errors
    /// A tensor of a type that is not supported, or one that is in two files.
    pub fn checkpoint(&self, config: &ModelConfig) -> Result<Checkpoint, EngineError> {
        let layout = Layout::new(self.arch, config)?;
        let mut tensors = BTreeMap::new();
        for (file_idx, shard) in self.shards.iter().enumerate() {
            for (name, tensor) in shard.tensors() {
                for (hf_name, entry) in layout.entries(shard, name, (tensor, file_idx))? {
                    if tensors.insert(hf_name, entry).is_some() {
                        return Err(shard.invalid(format!("tensor `{name}` is there twice")));
                    }
                }
                if tensors.len() > MAX_TENSORS {
                    return Err(
                        shard.invalid(format!("it holds more than {MAX_TENSORS} tensors, experts counted one by one"))
                    );
                }
            }
        }
        let files = self.shards.iter().map(|shard| (shard.path().to_owned(), shard.mapped().clone())).collect();
        Ok(Checkpoint::of_tensors(files, tensors))
    }

    /// Stop tokens, the end of a turn among them, and `general.sampling.*`.
    pub fn generation_defaults(&self) -> Result<GenerationDefaults, EngineError> {
        let gguf = self.first();
        let mut eos_token_ids = Vec::new();
        for key in ["eos", "eot", "eom"] {
            let id = gguf.opt_u64(&format!("tokenizer.ggml.{key}_token_id"))?.and_then(|id| u32::try_from(id).ok());
            eos_token_ids.extend(id.filter(|id| !eos_token_ids.contains(id)));
        }
        let float = |key: &str| {
            let value = gguf.opt_f64(&format!("general.sampling.{key}"))?;
            Ok::<_, EngineError>(value.map(|value| value as f32))
        };
        Ok(GenerationDefaults {
            eos_token_ids,
            temperature: float("temp")?,
            top_k: gguf.opt_u64("general.sampling.top_k")?.and_then(|count| u32::try_from(count).ok()),
            top_p: float("top_p")?,
            min_p: float("min_p")?,
            repetition_penalty: float("penalty_repeat")?,
        })
    }

    /// An error about the file.
    pub fn invalid(&self, reason: impl Into<String>) -> EngineError {
        self.first().invalid(reason)
    }

    fn first(&self) -> &GgufFile {
        &self.shards[0]
    }

    fn metadata(&self) -> Metadata<'_> {
        Metadata::new(self.first(), self.arch.name())
    }

    fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.shards.iter().find_map(|shard| shard.tensors().get(name))
    }

    fn has(&self, name: &str) -> bool {
        self.tensor(name).is_some()
    }

    /// The values of a small tensor, as config.json would list them.
    fn list(&self, name: &str) -> Result<Option<Value>, EngineError> {
        match self.shards.iter().find(|shard| shard.tensors().contains_key(name)) {
            None => Ok(None),
            Some(shard) => Ok(Some(shard.read_f32(name)?.into())),
        }
    }
}

/// Whether a file is not a later part of a model: parts are called `…-00002-of-00003.gguf`.
pub fn is_first_of_split(name: &str) -> bool {
    let part = name.strip_suffix(".gguf").and_then(|stem| stem.rsplit_once("-of-")).and_then(|(stem, count)| {
        let no = stem.rsplit_once('-')?.1;
        [no, count].iter().all(|part| part.len() == 5 && part.bytes().all(|byte| byte.is_ascii_digit())).then_some(no)
    });
    part.is_none_or(|no| no == "00001")
}

/// The file of part `no`, counted from 0, beside the first.
fn shard_path(first: &GgufFile, no: u64, count: u64) -> Result<std::path::PathBuf, EngineError> {
    let suffix = format!("-00001-of-{count:05}.gguf");
    let name = first.path().file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    match name.strip_suffix(&suffix) {
        Some(stem) => Ok(first.path().with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", no + 1))),
        None => Err(first.invalid(format!(
            "it is one of {count} parts, but its name does not end in `{suffix}`; hint: give the first part"
        ))),
    }
}

//! Where a model comes from: a Hugging Face folder, or a GGUF file.

use std::path::{Path, PathBuf};

use super::checkpoint::Checkpoint;
use super::gguf_model::GgufModel;
use super::model_config::{ModelConfig, generation_defaults};
use super::packed_folder::PackedIndex;
use crate::error::EngineError;
use crate::handle::GenerationDefaults;

/// The files of a model, its weights not yet read.
#[derive(Debug)]
pub enum ModelFiles {
    Folder(PathBuf),
    Gguf(Box<GgufModel>),
}

impl ModelFiles {
    /// The folder `path`, or the GGUF file that it is or holds; see [`find_gguf`].
    ///
    /// # Errors
    /// A GGUF file that cannot be read or breaks its format, or a folder with several.
    pub fn open(path: &Path) -> Result<Self, EngineError> {
        match find_gguf(path)? {
            Some(file) => Ok(Self::Gguf(Box::new(GgufModel::open(&file)?))),
            None => Ok(Self::Folder(path.to_owned())),
        }
    }

    /// The configuration, with Hugging Face's keys.
    pub fn config(&self) -> Result<ModelConfig, EngineError> {
        match self {
            Self::Folder(dir) => ModelConfig::load(dir),
            Self::Gguf(model) => model.config(),
        }
    }

    /// What a packed folder says of itself; none of other models.
    pub fn packed(&self, config: &ModelConfig) -> Result<Option<PackedIndex>, EngineError> {
        match self {
            Self::Folder(dir) => PackedIndex::open(dir, config),
            Self::Gguf(_) => Ok(None),
        }
    }

    /// The tensors under Hugging Face's names.
    pub fn checkpoint(&self, config: &ModelConfig) -> Result<Checkpoint, EngineError> {
        match self {
            Self::Folder(dir) => Checkpoint::open(dir),
            Self::Gguf(model) => model.checkpoint(config),
        }
    }

    /// Sampling defaults and stop tokens.
    pub fn generation_defaults(&self, config: &ModelConfig) -> Result<GenerationDefaults, EngineError> {
        match self {
            Self::Folder(dir) => generation_defaults(dir, config),
            Self::Gguf(model) => model.generation_defaults(),
        }
    }

    /// An error about a key of config.json as one about the file that the key was made from.
    pub fn explain(&self, error: EngineError) -> EngineError {
        match (self, error) {
            (Self::Gguf(model), EngineError::Config { key, reason }) => {
                model.invalid(format!("its metadata, as Hugging Face's `{key}`, {reason}"))
            }
            (_, error) => error,
        }
    }
}

/// The GGUF file of a model: `path` itself if it is a file, or the only one in a folder without a config.json. Of a model
/// that is split into several files it is the first.
///
/// # Errors
/// A folder that cannot be listed, or that holds several models.
pub fn find_gguf(path: &Path) -> Result<Option<PathBuf>, EngineError> {
    if path.is_file() {
        return Ok(Some(path.to_owned()));
    }
    // What is not there is for whoever reads config.json to complain of.
    if std::fs::symlink_metadata(path.join("config.json")).is_ok() || !path.is_dir() {
        return Ok(None);
    }
    let read = |source| EngineError::Read { path: path.into(), source };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).map_err(read)? {
        let name = entry.map_err(read)?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".gguf") && super::gguf_model::is_first_of_split(&name) {
            found.push(name);
        }
    }
    found.sort();
    match found.as_slice() {
        [] => Ok(None),
        [only] => Ok(Some(path.join(only))),
        [first, second, ..] => {
            let reason = format!("it holds several models ({first}, {second}, …); hint: give the file, not the folder");
            Err(EngineError::Invalid { path: path.into(), reason })
        }
    }
}

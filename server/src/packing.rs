//! A model to a servable folder of packed weights: the engine's weights and configuration, plus the tokenizer files.

use std::io;
use std::path::{Path, PathBuf};

use engine::{EngineError, GgufFile, LoadProgress, PackFormat, QuantizeReport};
use thiserror::Error;

use crate::text::{TextError, TokenizerFiles};

/// Endings of what a model folder has beside weights and is copied: tokenizers, templates, licences.
const COPIED_ENDINGS: [&str; 5] = ["json", "jinja", "model", "txt", "md"];

/// Written anew.
const WRITTEN: [&str; 3] = ["config.json", "moesaic.json", "model.safetensors.index.json"];

/// Why a model could not be packed.
#[derive(Debug, Error)]
pub enum PackError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error("cannot copy {path}: {source}", path = path.display())]
    Copy { path: PathBuf, source: io::Error },
}

/// Writes the folder `out` from the folder or GGUF file `source`; `out` appears complete or not at all.
///
/// # Errors
/// See [`engine::quantize`]; files beside the weights that cannot be read or written.
pub fn quantize_with_tokenizer(
    source: &Path,
    out: &Path,
    to: PackFormat,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<QuantizeReport, PackError> {
    engine::quantize(source, out, to, progress, |folder| match engine::find_gguf(source)? {
        None => copy_files(source, folder),
        Some(file) => {
            let tokenizer = TokenizerFiles::from_gguf(&GgufFile::open(&file)?)?;
            tokenizer.write(folder).map_err(|error| PackError::Copy { path: folder.into(), source: error })
        }
    })
}

fn copy_files(source: &Path, folder: &Path) -> Result<(), PackError> {
    let copy_error = |path: &Path| {
        let path = path.to_owned();
        move |source| PackError::Copy { path, source }
    };
    for entry in std::fs::read_dir(source).map_err(copy_error(source))? {
        let path = entry.map_err(copy_error(source))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let is_copied = name.starts_with("LICENSE")
            || path.extension().is_some_and(|ending| COPIED_ENDINGS.iter().any(|copied| ending == *copied));
        if is_copied && path.is_file() && !WRITTEN.contains(&name) && !name.ends_with(".index.json") {
            std::fs::copy(&path, folder.join(name)).map_err(copy_error(&path))?;
        }
    }
    Ok(())
}

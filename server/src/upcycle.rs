//! A dense GGUF to a servable MoE folder: the engine's weights and configuration, plus the tokenizer files.

use std::io;
use std::path::{Path, PathBuf};

use engine::{EngineError, GgufFile, UpcycleOptions, UpcycleReport};
use thiserror::Error;

use crate::text::{TextError, TokenizerFiles};

/// Why a dense model could not be converted.
#[derive(Debug, Error)]
pub enum UpcycleError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error("{path} exists already", path = path.display())]
    Exists { path: PathBuf },
    #[error("{path} does not name a folder", path = path.display())]
    NoName { path: PathBuf },
    #[error("cannot write {path}: {source}", path = path.display())]
    Write { path: PathBuf, source: io::Error },
}

/// Writes the folder `out` from the dense GGUF `source`; `out` appears complete or not at all.
///
/// `progress` is told `(bytes done, bytes in all)`.
pub fn upcycle_with_tokenizer(
    source: &Path,
    out: &Path,
    options: &UpcycleOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<UpcycleReport, UpcycleError> {
    if out.exists() {
        return Err(UpcycleError::Exists { path: out.into() });
    }
    let name = out.file_name().ok_or_else(|| UpcycleError::NoName { path: out.into() })?;
    // First, because it is quick and refuses files that the long conversion would be wasted on.
    let tokenizer = TokenizerFiles::from_gguf(&GgufFile::open(source)?)?;
    let staging = out.with_file_name(format!(".{}.staging", name.to_string_lossy()));
    let write_error = |path: &Path| {
        let path = path.to_owned();
        move |source| UpcycleError::Write { path, source }
    };
    if staging.exists() {
        std::fs::remove_dir_all(&staging).map_err(write_error(&staging))?;
    }
    let report = engine::upcycle(source, &staging, options, progress)?;
    tokenizer.write(&staging).map_err(write_error(&staging))?;
    std::fs::rename(&staging, out).map_err(write_error(out))?;
    Ok(report)
}

//! Writes a folder of packed weights from a model: what its layers ask the loader for is what the folder has.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kernels::{MappedFile, PackedWeight};
use serde_json::{Value, json};

use super::inspect::{Inspection, inspect_files};
use super::loader::{LoadProgress, Loader};
use super::model_files::ModelFiles;
use super::pack_writer::PackWriter;
use super::packed_folder::{INDEX_FILE, PackedIndex, VERSION, class_sizes, config_section};
use super::quantization::Quantization;
use super::upcycle::{partial_path, write_json};
use crate::config::{WeightDtype, WeightQuant, WeightStorage};
use crate::error::EngineError;
use crate::handle::GenerationDefaults;
use crate::layers::rope::ContextLen;
use crate::models::{self, ModelSource};

/// Rotary tables are made and thrown away: enough for one position.
const TABLE_BYTES: u64 = 1 << 20;

/// What the weights become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PackFormat {
    Int8,
    Int4,
    Bf16,
    F32,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantizeReport {
    pub num_tensors: usize,
    pub num_shards: usize,
    /// Bytes of the tensors.
    pub num_bytes: u64,
    /// The same in f32.
    pub num_bytes_f32: u64,
    /// SHA-256, see [`PackedIndex::digest`].
    pub digest: String,
}

impl PackFormat {
    fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        }
    }

    fn storage(self) -> WeightStorage {
        let (dtype, quant) = match self {
            Self::Int8 => (WeightDtype::Auto, WeightQuant::Int8),
            Self::Int4 => (WeightDtype::Auto, WeightQuant::Int4),
            Self::Bf16 => (WeightDtype::Bf16, WeightQuant::None),
            Self::F32 => (WeightDtype::F32, WeightQuant::None),
        };
        WeightStorage { dtype, quant }
    }
}

/// Writes the packed folder `out` from the model at `source`, a Hugging Face folder or a GGUF file. Memory holds one tensor
/// at a time, and small ones.
///
/// `out` appears complete or not at all, when `finish(folder)` has added to it what the engine does not know of (tokenizer
/// files): it is written beside and renamed.
///
/// # Errors
/// An `out` that exists, whatever stops the model from being loaded, a model that is packed already, I/O errors.
pub fn quantize<E: From<EngineError>>(
    source: &Path,
    out: &Path,
    to: PackFormat,
    progress: &mut dyn FnMut(LoadProgress),
    finish: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<QuantizeReport, E> {
    if out.exists() {
        return Err(EngineError::Invalid { path: out.into(), reason: "it exists already".into() }.into());
    }
    let files = ModelFiles::open(source)?;
    let partial = partial_path(out)?;
    let written = write_folder(&files, &partial, to, progress)
        .map_err(|error| E::from(files.explain(error)))
        .and_then(|report| finish(&partial).map(|()| report));
    if written.is_err() {
        // The error that stopped the conversion is the one to report.
        let _ = std::fs::remove_dir_all(&partial);
    }
    let report = written?;
    std::fs::rename(&partial, out).map_err(|source| EngineError::Write { path: out.into(), source })?;
    Ok(report)
}

fn write_folder(
    files: &ModelFiles,
    dir: &Path,
    to: PackFormat,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<QuantizeReport, EngineError> {
    let config = files.config()?;
    if let Some(packed) = files.packed(&config)? {
        let reason =
            format!("its weights are packed as {} already; hint: take the model they were made from", packed.format);
        return Err(EngineError::Invalid { path: INDEX_FILE.into(), reason });
    }
    let architecture = models::architecture(config.model_type()?)?;
    let checkpoint = files.checkpoint(&config)?;
    let mut writer = PackWriter::new(dir);
    let mut blank = Blank::new(dir.join(".blank"));
    let mut sink = |key: &str, weight: PackedWeight| {
        writer.write(key, &weight)?;
        blank.stand_in(&weight)
    };
    let quantization = Quantization::from_config(&config)?;
    let loader = Loader::new(&checkpoint, quantization, to.storage(), progress).with_sink(&mut sink);
    let num_mtp_layers = match architecture.mtp.wanted(&config, &loader) {
        Err(EngineError::NoMtp(_)) => 0,
        wanted => wanted?,
    };
    let configured = (architecture.positions)(&config)?.default;
    let max_model_len = ContextLen { configured, reachable: 1, max_table_bytes: TABLE_BYTES };
    let source = ModelSource { config: &config, loader: &loader, max_model_len, num_mtp_layers };
    // The model itself is of no use: its layers asked for everything.
    drop((architecture.load)(&source)?);
    let (present, formats) = (loader.present(), loader.formats());
    loader.finish(|name| {
        models::is_ignored_everywhere(&config, name)
            || (architecture.ignored)(&config, name) && !architecture.mtp.holds(&config, name)
    })?;
    blank.remove()?;
    let written = writer.finish()?;
    let classes = class_sizes(&written.tensors, |key| architecture.mtp.holds(&config, key));
    let memory_bytes = classes.iter().map(|size| size.memory_bytes).sum();
    let inspection = Inspection {
        weight_bytes: written.num_bytes,
        memory_bytes,
        mtp_memory_bytes: written.num_bytes - memory_bytes,
        classes,
        dtypes: formats.into_iter().map(str::to_owned).collect(),
        ..inspect_files(files)?
    };
    let index = PackedIndex {
        version: VERSION,
        format: to.name().to_owned(),
        digest: written.digest.clone(),
        inspection,
        present,
        tensors: written.tensors,
    };
    let report = QuantizeReport {
        num_tensors: index.tensors.len(),
        num_shards: written.num_shards,
        num_bytes: written.num_bytes,
        num_bytes_f32: index.tensors.values().map(|tensor| 4 * (tensor.shape[0] * tensor.shape[1]) as u64).sum(),
        digest: written.digest,
    };
    write_json(&dir.join(INDEX_FILE), &serde_json::to_value(index).expect("an index is plain data"))?;
    let config = config.with_quantization(config_section(to.name(), &report.digest));
    write_json(&dir.join("config.json"), &Value::Object(config))?;
    if let ModelFiles::Gguf(model) = files {
        write_json(&dir.join("generation_config.json"), &generation_config(&model.generation_defaults()?))?;
    }
    Ok(report)
}

/// The file that a folder has its sampling defaults and stop tokens in.
fn generation_config(defaults: &GenerationDefaults) -> Value {
    let GenerationDefaults { eos_token_ids, temperature, top_k, top_p, min_p, repetition_penalty } = defaults;
    let keys = json!({
        "eos_token_id": eos_token_ids,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    });
    let Value::Object(keys) = keys else { unreachable!("an object was written") };
    Value::Object(keys.into_iter().filter(|(_, value)| !value.is_null()).collect())
}

/// A sparse file that stands for weights that were written: a model under construction holds them, and nobody reads them.
struct Blank {
    path: PathBuf,
    len: usize,
    file: Option<Arc<MappedFile>>,
}

impl Blank {
    fn new(path: PathBuf) -> Self {
        Self { path, len: 0, file: None }
    }

    /// A weight of the same shape and format that takes no memory.
    fn stand_in(&mut self, weight: &PackedWeight) -> Result<PackedWeight, EngineError> {
        let write_error = |source| EngineError::Write { path: self.path.clone(), source };
        let file = match &self.file {
            Some(file) if self.len >= weight.num_bytes() => file,
            _ => {
                // Those handed out before keep the file that they have.
                let _ = std::fs::remove_file(&self.path);
                let file = std::fs::File::create_new(&self.path).map_err(write_error)?;
                self.len = weight.num_bytes();
                file.set_len(self.len as u64).map_err(write_error)?;
                self.file.insert(Arc::new(MappedFile::open(&self.path).map_err(write_error)?))
            }
        };
        Ok(PackedWeight::mapped(file.clone(), 0, weight.format(), weight.rows(), weight.cols())?)
    }

    fn remove(self) -> Result<(), EngineError> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(EngineError::Write { path: self.path, source: error })
            }
            _ => Ok(()),
        }
    }
}

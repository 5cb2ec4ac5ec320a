//! Folders of packed weights, as `moesaic quantize` writes them: every tensor is there as the layers asked the loader for
//! it, in bytes that are mapped and used as they are.
//!
//! `moesaic.json` says of each tensor of the safetensors shards, which are plain bytes, in which format it is. A key is the
//! name that a layer asked for, joined names for matrices that were fused, and `{name}/{idx}` for what was taken apart.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use kernels::{Codes, QuantFormat, WeightFormat};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::checkpoint::{MAX_INDEX_BYTES, read_json};
use super::inspect::Inspection;
use super::model_config::ModelConfig;
use super::tally::{ClassSize, TensorClass, classify};
use crate::config::{EngineConfig, WeightDtype, WeightQuant};
use crate::error::EngineError;

/// Of the keys, the order of rows and the bytes of every format.
pub const VERSION: u64 = 1;
/// `quant_method` of such a folder's config.json.
pub const METHOD: &str = "moesaic";
pub const INDEX_FILE: &str = "moesaic.json";

/// What is in a packed folder.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PackedIndex {
    pub version: u64,
    /// What it was made with: `int8`, `int4`, `bf16`, `f32`.
    pub format: String,
    /// SHA-256 of all keys, formats and bytes, in the order of the shards.
    pub digest: String,
    /// Sizes of the model.
    pub inspection: Inspection,
    /// Names that layers asked about and that were there.
    pub present: BTreeSet<String>,
    pub tensors: BTreeMap<String, PackedTensor>,
}

/// One matrix or vector.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PackedTensor {
    /// See [`format_name`].
    pub format: String,
    pub shape: [usize; 2],
    /// BLAKE3 of the bytes in hex; folders of older versions have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sum: Option<String>,
}

impl PackedIndex {
    /// The index of a folder whose config says that it is packed.
    ///
    /// # Errors
    /// An index that cannot be read, or is of another version.
    pub fn open(model_dir: &Path, config: &ModelConfig) -> Result<Option<Self>, EngineError> {
        let Some(section) = config.section("quantization_config") else { return Ok(None) };
        if section.get("quant_method").and_then(serde_json::Value::as_str) != Some(METHOD) {
            return Ok(None);
        }
        let version = section.get("version").and_then(serde_json::Value::as_u64).unwrap_or(0);
        let path = model_dir.join(INDEX_FILE);
        let found = match version {
            VERSION => read_json::<Self>(&path, MAX_INDEX_BYTES)?,
            _ => return Err(wrong_version(path.with_file_name("config.json"), version)),
        };
        match found.version {
            VERSION => Ok(Some(found)),
            version => Err(wrong_version(path, version)),
        }
    }

    /// Refuses settings that packed weights can no longer follow.
    ///
    /// # Errors
    /// Another `--quant` than what the folder was made with, and any `--dtype`.
    pub fn check(&self, config: &EngineConfig) -> Result<(), EngineError> {
        let wanted = match (config.quant, config.dtype) {
            (WeightQuant::Int8, WeightDtype::Auto) if self.format == "int8" => return Ok(()),
            (WeightQuant::Int4, WeightDtype::Auto) if self.format == "int4" => return Ok(()),
            (WeightQuant::None, WeightDtype::Auto) => return Ok(()),
            (WeightQuant::Int8, WeightDtype::Auto) => "--quant int8",
            (WeightQuant::Int4, WeightDtype::Auto) => "--quant int4",
            _ => "--dtype",
        };
        let reason = format!(
            "its weights are packed as {} already, {wanted} cannot change them; hint: leave it out, or take the model that \
             the folder was made from",
            self.format
        );
        Err(EngineError::Invalid { path: config.model_dir.join(INDEX_FILE), reason })
    }

    pub(super) fn sum_of(&self, key: &str) -> Option<&str> {
        self.tensors.get(key)?.sum.as_deref()
    }

    /// The format of the tensor `key`, which must have this shape.
    pub(super) fn format_of(&self, key: &str, shape: [usize; 2]) -> Result<WeightFormat, String> {
        let tensor = self.tensors.get(key).ok_or_else(|| format!("is not in {INDEX_FILE}"))?;
        if tensor.shape != shape {
            return Err(format!("has shape {:?} in {INDEX_FILE}, expected {shape:?}", tensor.shape));
        }
        parse_format(&tensor.format)
            .ok_or_else(|| format!("has the unknown format `{}` in {INDEX_FILE}", tensor.format))
    }
}

/// Sizes of packed tensors by what they are for. Those that `is_extra` are ignored unless serving is told to load them.
pub(super) fn class_sizes(tensors: &BTreeMap<String, PackedTensor>, is_extra: impl Fn(&str) -> bool) -> Vec<ClassSize> {
    let mut classes = BTreeMap::new();
    for (key, PackedTensor { format, shape: [rows, cols], .. }) in tensors {
        let class = if is_extra(key) { TensorClass::Ignored } else { classify(key) };
        let format = parse_format(format).expect("the writer named it");
        let num_bytes = format.bytes_for(*rows, *cols) as u64;
        let size: &mut ClassSize = classes.entry(class).or_insert_with(|| ClassSize::empty(class));
        size.num_tensors += 1;
        size.num_parameters += (rows * cols) as u64;
        size.num_bytes += num_bytes;
        // They are used as they lie in the files.
        size.memory_bytes += if class == TensorClass::Ignored { 0 } else { num_bytes };
    }
    classes.into_values().collect()
}

/// What config.json says under `quantization_config`.
pub(super) fn config_section(format: &str, digest: &str) -> serde_json::Value {
    json!({ "quant_method": METHOD, "version": VERSION, "format": format, "weights_digest": digest })
}

fn wrong_version(path: std::path::PathBuf, version: u64) -> EngineError {
    let reason = format!(
        "its weights are packed in version {version}, this program reads version {VERSION}; hint: make the folder again \
         with `moesaic quantize`"
    );
    EngineError::Invalid { path, reason }
}

const CODES: [(Codes, &str); 7] = [
    (Codes::Int8, "int8"),
    (Codes::Int8Min, "int8min"),
    (Codes::Int8Rotated, "int8rotated"),
    (Codes::Int4, "int4"),
    (Codes::Int4Min, "int4min"),
    (Codes::Int4Double, "int4double"),
    (Codes::Fp4, "fp4"),
];

/// `bf16`, `int8/64`, `int4min/32`: codes, and columns of a group.
pub(super) fn format_name(format: WeightFormat) -> String {
    match format {
        WeightFormat::Quantized(QuantFormat { codes, group }) => {
            let found = CODES.iter().find(|(known, _)| *known == codes).expect("every kind of codes is listed");
            format!("{}/{group}", found.1)
        }
        plain => plain.name().to_owned(),
    }
}

fn parse_format(name: &str) -> Option<WeightFormat> {
    match name.split_once('/') {
        None => {
            [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16].into_iter().find(|plain| plain.name() == name)
        }
        Some((codes, group)) => {
            let (codes, _) = *CODES.iter().find(|(_, known)| *known == codes)?;
            let group = group.parse().ok().filter(|group| matches!(group, 16 | 32 | 64 | 128))?;
            Some(WeightFormat::Quantized(QuantFormat { codes, group }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_have_names_of_their_own() {
        for codes in CODES {
            for group in [16, 32, 64, 128] {
                let format = WeightFormat::Quantized(QuantFormat { codes: codes.0, group });
                assert_eq!(parse_format(&format_name(format)), Some(format));
            }
        }
        for plain in [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16] {
            assert_eq!(parse_format(&format_name(plain)), Some(plain));
        }
        for name in ["", "int8", "int8/", "int8/24", "int9/64", "f32/64"] {
            assert_eq!(parse_format(name), None, "{name}");
        }
    }
}

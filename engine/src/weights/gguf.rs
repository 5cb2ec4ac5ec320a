//! GGUF files (versions 2 and 3, little-endian): metadata, tensor table, and tensors widened to f32.
//!
//! The layout is that of ggml's `docs/gguf.md`. Nothing in the file is trusted: every length is checked against the
//! bytes that are there, and an error names the field.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use kernels::MappedFile;

use super::gguf_types::Cursor;
pub use super::gguf_types::{GgmlType, GgufTensor, GgufValue};
use crate::error::EngineError;

const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_DIMENSIONS: u32 = 4;
/// Tensors and metadata keys of one file; the largest published models have some thousands.
const MAX_ENTRIES: u64 = 1 << 20;

/// An open GGUF file.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    bytes: Arc<MappedFile>,
    metadata: BTreeMap<String, GgufValue>,
    tensors: BTreeMap<String, GgufTensor>,
}

/// The two tables at the start of a file.
struct Header {
    metadata: BTreeMap<String, GgufValue>,
    tensors: BTreeMap<String, GgufTensor>,
}

impl GgufFile {
    /// Maps the file and reads its metadata and tensor table.
    ///
    /// # Errors
    /// An unreadable file, or one that breaks the format; the reason names the field.
    pub fn open(path: &Path) -> Result<Self, EngineError> {
        let bytes = MappedFile::open(path).map_err(|source| EngineError::Read { path: path.into(), source })?;
        let header = read_header(&bytes).map_err(|reason| EngineError::Invalid { path: path.into(), reason })?;
        Ok(Self { path: path.into(), bytes: Arc::new(bytes), metadata: header.metadata, tensors: header.tensors })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn mapped(&self) -> &Arc<MappedFile> {
        &self.bytes
    }

    /// The metadata value under `key`, where there is one.
    pub fn get(&self, key: &str) -> Option<&GgufValue> {
        self.metadata.get(key)
    }

    /// A non-negative integer; absent is `None`.
    ///
    /// # Errors
    /// A value of another type.
    pub fn opt_u64(&self, key: &str) -> Result<Option<u64>, EngineError> {
        self.typed(key, "a non-negative integer", GgufValue::as_u64)
    }

    pub fn opt_f64(&self, key: &str) -> Result<Option<f64>, EngineError> {
        self.typed(key, "a number", GgufValue::as_f64)
    }

    pub fn opt_bool(&self, key: &str) -> Result<Option<bool>, EngineError> {
        self.typed(key, "a bool", GgufValue::as_bool)
    }

    pub fn opt_str(&self, key: &str) -> Result<Option<&str>, EngineError> {
        self.typed(key, "a string", GgufValue::as_str)
    }

    /// An array of strings; absent is `None`.
    pub fn opt_strings(&self, key: &str) -> Result<Option<Vec<&str>>, EngineError> {
        self.typed(key, "an array of strings", |value| value.as_array()?.iter().map(GgufValue::as_str).collect())
    }

    /// An array of non-negative integers; absent is `None`.
    pub fn opt_u64s(&self, key: &str) -> Result<Option<Vec<u64>>, EngineError> {
        self.typed(key, "an array of non-negative integers", |value| {
            value.as_array()?.iter().map(GgufValue::as_u64).collect()
        })
    }

    /// An array of numbers; absent is `None`.
    pub fn opt_f64s(&self, key: &str) -> Result<Option<Vec<f64>>, EngineError> {
        self.typed(key, "an array of numbers", |value| value.as_array()?.iter().map(GgufValue::as_f64).collect())
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a GgufValue) -> Option<T>,
    ) -> Result<Option<T>, EngineError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.invalid(format!("metadata `{key}` is not {expected}")))
    }

    /// An error about this file.
    pub fn invalid(&self, reason: impl Into<String>) -> EngineError {
        EngineError::Invalid { path: self.path.clone(), reason: reason.into() }
    }

    /// All tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, GgufTensor> {
        &self.tensors
    }

    /// The tensor called `name`.
    ///
    /// # Errors
    /// [`EngineError::MissingTensor`].
    pub fn tensor(&self, name: &str) -> Result<&GgufTensor, EngineError> {
        self.tensors.get(name).ok_or_else(|| EngineError::MissingTensor { name: name.into() })
    }

    /// The values of the tensor called `name`, row-major.
    ///
    /// # Errors
    /// No such tensor, or one of a type that is not read here.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>, EngineError> {
        let tensor = self.tensor(name)?;
        let bytes = &self.bytes[tensor.offset..tensor.offset + tensor.num_bytes];
        Ok(match tensor.ggml_type {
            GgmlType::F32 => bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
            GgmlType::F16 => bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
            GgmlType::BF16 => bytes.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
            GgmlType::Block(format) => {
                let mut values = vec![0.0; tensor.num_elements];
                format.dequantize(bytes, &mut values);
                values
            }
            GgmlType::Other(_) => {
                let dtype = tensor.ggml_type.to_string();
                return Err(EngineError::TensorDtype { name: name.into(), dtype, path: self.path.clone() });
            }
        })
    }
}

/// The shortest decimal of the f32 that a file holds: 1e-5 rather than 9.999999747378752e-6.
pub(super) fn decimal(value: f64) -> f64 {
    (value as f32).to_string().parse().expect("a printed float parses")
}

fn read_header(bytes: &[u8]) -> Result<Header, String> {
    let mut cursor = Cursor::new(bytes);
    if cursor.take(4, "the magic number")? != b"GGUF" {
        return Err("it does not start with `GGUF`".into());
    }
    let version = cursor.u32("the version")?;
    if !matches!(version, 2 | 3) {
        return Err(format!("the GGUF version is {version}, supported are 2 and 3"));
    }
    let num_tensors = entry_count(&mut cursor, "the number of tensors")?;
    let num_keys = entry_count(&mut cursor, "the number of metadata keys")?;
    let mut metadata = BTreeMap::new();
    for idx in 0..num_keys {
        let key = cursor.string(&format!("metadata key {idx}"))?;
        let value = cursor.typed_value(&format!("metadata `{key}`"))?;
        if metadata.contains_key(&key) {
            return Err(format!("metadata `{key}` occurs twice"));
        }
        metadata.insert(key, value);
    }
    let tensors = read_tensor_table(&mut cursor, num_tensors, alignment(&metadata)?, bytes.len())?;
    Ok(Header { metadata, tensors })
}

fn entry_count(cursor: &mut Cursor<'_>, field: &str) -> Result<u64, String> {
    match cursor.u64(field)? {
        count if count <= MAX_ENTRIES => Ok(count),
        count => Err(format!("{field} is {count}, the limit is {MAX_ENTRIES}")),
    }
}

fn alignment(metadata: &BTreeMap<String, GgufValue>) -> Result<u64, String> {
    match metadata.get("general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(value) => value
            .as_u64()
            .filter(|alignment| alignment.is_power_of_two() && *alignment <= 1 << 20)
            .ok_or_else(|| "metadata `general.alignment` is not a power of two up to 1 MiB".into()),
    }
}

fn read_tensor_table(
    cursor: &mut Cursor<'_>,
    num_tensors: u64,
    alignment: u64,
    file_len: usize,
) -> Result<BTreeMap<String, GgufTensor>, String> {
    let mut tensors = BTreeMap::new();
    for idx in 0..num_tensors {
        let name = cursor.string(&format!("the name of tensor {idx}"))?;
        let tensor = read_tensor_info(cursor, &name)?;
        if !(tensor.offset as u64).is_multiple_of(alignment) {
            return Err(format!("tensor `{name}` is at offset {}, which is not aligned to {alignment}", tensor.offset));
        }
        if tensors.contains_key(&name) {
            return Err(format!("tensor `{name}` occurs twice"));
        }
        tensors.insert(name, tensor);
    }
    let data_start = cursor.position().next_multiple_of(alignment as usize);
    for (name, tensor) in &mut tensors {
        let end = tensor.offset.checked_add(data_start).and_then(|start| start.checked_add(tensor.num_bytes));
        if end.is_none_or(|end| end > file_len) {
            return Err(format!(
                "tensor `{name}` ({} bytes at offset {}) runs past the end of the file",
                tensor.num_bytes, tensor.offset
            ));
        }
        tensor.offset += data_start;
    }
    Ok(tensors)
}

/// One row of the tensor table; the offset is still relative to the data section.
fn read_tensor_info(cursor: &mut Cursor<'_>, name: &str) -> Result<GgufTensor, String> {
    let num_dimensions = cursor.u32(&format!("the rank of tensor `{name}`"))?;
    if num_dimensions > MAX_DIMENSIONS {
        return Err(format!("tensor `{name}` has {num_dimensions} dimensions, the limit is {MAX_DIMENSIONS}"));
    }
    let mut shape = Vec::new();
    let mut num_elements = 1u64;
    for _ in 0..num_dimensions {
        let size = cursor.u64(&format!("the shape of tensor `{name}`"))?;
        num_elements = num_elements
            .checked_mul(size)
            .filter(|&count| count < 1 << 48)
            .ok_or_else(|| format!("tensor `{name}` has an impossible shape"))?;
        shape.insert(0, usize::try_from(size).map_err(|_| format!("tensor `{name}` has an impossible shape"))?);
    }
    let ggml_type = GgmlType::from_number(cursor.u32(&format!("the type of tensor `{name}`"))?);
    let offset = cursor.u64(&format!("the offset of tensor `{name}`"))?;
    let num_bytes = match ggml_type.unit() {
        None => 0,
        Some((unit_len, unit_bytes)) => {
            // Blocks never cross rows.
            let row_len = shape.last().copied().unwrap_or(1) as u64;
            if !row_len.is_multiple_of(unit_len) {
                return Err(format!(
                    "tensor `{name}` has rows of {row_len}, {ggml_type} needs a multiple of {unit_len}"
                ));
            }
            num_elements / unit_len * unit_bytes
        }
    };
    let too_large = |_| format!("tensor `{name}` does not fit this machine's address space");
    Ok(GgufTensor {
        shape,
        ggml_type,
        num_elements: usize::try_from(num_elements).map_err(too_large)?,
        offset: usize::try_from(offset).map_err(too_large)?,
        num_bytes: usize::try_from(num_bytes).map_err(too_large)?,
    })
}

#[cfg(test)]
#[path = "gguf_tests.rs"]
mod tests;

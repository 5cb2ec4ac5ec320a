//! Writes packed weights into safetensors shards as they come, so that memory holds one at a time.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufWriter, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use kernels::PackedWeight;
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use super::packed_folder::{PackedTensor, format_name};
use super::upcycle::write_json;
use crate::error::EngineError;

/// Where the data of a shard starts. The header is written in front of it when all tensors are known, and filled with
/// blanks, which safetensors allows.
const DATA_START: u64 = 1 << 16;
/// What of that a header may take, with room for its last entry.
const MAX_HEADER_BYTES: usize = (1 << 16) - (1 << 12);
/// Data of a shard, unless one tensor has more.
const MAX_SHARD_BYTES: u64 = 4 << 30;
/// Every tensor starts at a multiple of this.
const ALIGNMENT: u64 = 64;

/// A folder of shards being written.
pub struct PackWriter {
    dir: PathBuf,
    shard: Option<Shard>,
    num_shards: usize,
    num_bytes: u64,
    tensors: BTreeMap<String, PackedTensor>,
    weight_map: Map<String, Value>,
    digest: Sha256,
}

struct Shard {
    path: PathBuf,
    file: BufWriter<File>,
    entries: Map<String, Value>,
    header_bytes: usize,
    len: u64,
}

/// What a writer wrote.
pub struct Written {
    pub tensors: BTreeMap<String, PackedTensor>,
    pub num_shards: usize,
    pub num_bytes: u64,
    /// SHA-256 of keys, formats, shapes and bytes.
    pub digest: String,
}

impl PackWriter {
    pub fn new(dir: &Path) -> Self {
        Self {
            dir: dir.into(),
            shard: None,
            num_shards: 0,
            num_bytes: 0,
            tensors: BTreeMap::new(),
            weight_map: Map::new(),
            digest: Sha256::new(),
        }
    }

    /// Appends a weight; what has its key already (shared between layers) is not written twice.
    pub fn write(&mut self, key: &str, weight: &PackedWeight) -> Result<(), EngineError> {
        if self.tensors.contains_key(key) {
            return Ok(());
        }
        let bytes = weight.as_bytes();
        let (format, shape) = (format_name(weight.format()), [weight.rows(), weight.cols()]);
        let tensor = PackedTensor { format, shape, sum: Some(blake3::hash(bytes).to_hex().to_string()) };
        let padded = (bytes.len() as u64).next_multiple_of(ALIGNMENT);
        if self.shard.as_ref().is_some_and(|shard| shard.is_full(padded)) {
            self.close_shard()?;
        }
        let shard = match &mut self.shard {
            Some(shard) => shard,
            empty => {
                self.num_shards += 1;
                empty.insert(Shard::create(&self.dir.join(format!("model-{:05}.safetensors", self.num_shards)))?)
            }
        };
        self.digest.update(format!("{key}\n{} {:?}\n", tensor.format, tensor.shape));
        self.digest.update(bytes);
        shard.append(key, bytes, padded)?;
        let file_name = shard.path.file_name().expect("a shard has a name").to_string_lossy();
        self.weight_map.insert(key.to_owned(), Value::from(file_name));
        self.num_bytes += bytes.len() as u64;
        self.tensors.insert(key.to_owned(), tensor);
        Ok(())
    }

    /// Writes what is left and the index of the shards.
    pub fn finish(mut self) -> Result<Written, EngineError> {
        self.close_shard()?;
        let index = json!({ "metadata": { "total_size": self.num_bytes }, "weight_map": self.weight_map });
        write_json(&self.dir.join("model.safetensors.index.json"), &index)?;
        let mut digest = "sha256:".to_owned();
        for byte in self.digest.finalize() {
            write!(digest, "{byte:02x}").expect("writing to a string cannot fail");
        }
        Ok(Written { tensors: self.tensors, num_shards: self.num_shards, num_bytes: self.num_bytes, digest })
    }

    fn close_shard(&mut self) -> Result<(), EngineError> {
        self.shard.take().map_or(Ok(()), Shard::finish)
    }
}

impl Shard {
    fn create(path: &Path) -> Result<Self, EngineError> {
        let write_error = |source| EngineError::Write { path: path.into(), source };
        let mut file = BufWriter::new(File::create(path).map_err(write_error)?);
        file.seek(SeekFrom::Start(DATA_START)).map_err(write_error)?;
        Ok(Self { path: path.into(), file, entries: Map::new(), header_bytes: 0, len: 0 })
    }

    fn is_full(&self, more: u64) -> bool {
        self.len + more > MAX_SHARD_BYTES || self.header_bytes > MAX_HEADER_BYTES
    }

    fn append(&mut self, key: &str, bytes: &[u8], padded: u64) -> Result<(), EngineError> {
        const PADDING: [u8; ALIGNMENT as usize] = [0; ALIGNMENT as usize];
        let entry = json!({ "dtype": "U8", "shape": [padded], "data_offsets": [self.len, self.len + padded] });
        self.header_bytes += key.len() + entry.to_string().len() + 4;
        self.entries.insert(key.to_owned(), entry);
        self.len += padded;
        let padding = &PADDING[..padded as usize - bytes.len()];
        let written = self.file.write_all(bytes).and_then(|()| self.file.write_all(padding));
        written.map_err(|source| EngineError::Write { path: self.path.clone(), source })
    }

    fn finish(mut self) -> Result<(), EngineError> {
        let header = Value::Object(self.entries).to_string();
        let room = DATA_START as usize - size_of::<u64>();
        assert!(header.len() <= room, "a shard is closed before its header is full");
        let write = |file: &mut BufWriter<File>| {
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&(room as u64).to_le_bytes())?;
            write!(file, "{header:<room$}")?;
            file.flush()
        };
        write(&mut self.file).map_err(|source| EngineError::Write { path: self.path, source })
    }
}

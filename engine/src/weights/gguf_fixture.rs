//! Writes GGUF files for tests.

use std::path::{Path, PathBuf};

/// A fresh folder under the system's temporary folder, removed on drop.
#[derive(Debug)]
pub(crate) struct TempDir(PathBuf);

impl TempDir {
    pub(crate) fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("moesaic-engine-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).expect("a temporary folder");
        Self(dir)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, bytes).expect("a temporary file");
        path
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Collects metadata and tensors, then lays them out as a version 3 file.
#[derive(Default)]
pub(crate) struct GgufBuilder {
    metadata: Vec<u8>,
    num_keys: u64,
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

impl GgufBuilder {
    pub(crate) fn raw(mut self, key: &str, value_type: u32, value: &[u8]) -> Self {
        self.metadata.extend(string_bytes(key));
        self.metadata.extend(value_type.to_le_bytes());
        self.metadata.extend(value);
        self.num_keys += 1;
        self
    }

    pub(crate) fn u32(self, key: &str, value: u32) -> Self {
        self.raw(key, 4, &value.to_le_bytes())
    }

    pub(crate) fn f32(self, key: &str, value: f32) -> Self {
        self.raw(key, 6, &value.to_le_bytes())
    }

    pub(crate) fn string(self, key: &str, value: &str) -> Self {
        self.raw(key, 8, &string_bytes(value))
    }

    /// `shape` is row-major, outermost first, as everywhere but in the file.
    pub(crate) fn tensor(mut self, name: &str, shape: &[u64], ggml_type: u32, bytes: Vec<u8>) -> Self {
        self.tensors.push((name.into(), shape.to_vec(), ggml_type, bytes));
        self
    }

    pub(crate) fn f32_tensor(self, name: &str, shape: &[u64], values: &[f32]) -> Self {
        self.tensor(name, shape, 0, values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }

    pub(crate) fn build(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(3u32.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend(self.num_keys.to_le_bytes());
        file.extend(&self.metadata);
        let mut data: Vec<u8> = Vec::new();
        for (name, shape, ggml_type, bytes) in &self.tensors {
            data.resize(data.len().next_multiple_of(32), 0);
            file.extend(string_bytes(name));
            file.extend((shape.len() as u32).to_le_bytes());
            file.extend(shape.iter().rev().flat_map(|size| size.to_le_bytes()));
            file.extend(ggml_type.to_le_bytes());
            file.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
        }
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend(data);
        file
    }
}

pub(crate) fn string_bytes(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

//! Copies of golden checkpoints with something wrong, in folders that are removed when dropped.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::{Folder, golden};

/// A folder that lives as long as this.
pub struct Copy {
    pub folder: Folder,
}

impl Copy {
    /// Copies the files of a golden checkpoint.
    ///
    /// # Panics
    /// A file cannot be copied.
    pub fn of(name: &str) -> Self {
        let folder = Folder::new("checkpoint");
        for entry in std::fs::read_dir(golden::folder(name)).expect("the checkpoint is there") {
            let from = entry.expect("the checkpoint can be listed").path();
            let to = folder.join(from.file_name().expect("a file has a name"));
            std::fs::copy(&from, &to).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
        }
        Self { folder }
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.folder.join(file)
    }

    /// Changes a JSON file.
    ///
    /// # Panics
    /// It cannot be read or written.
    pub fn edit_json(&self, file: &str, edit: impl FnOnce(&mut Value)) {
        let path = self.path(file);
        let text = std::fs::read(&path).expect("the file is there");
        let mut value = serde_json::from_slice(&text).expect("the file is JSON");
        edit(&mut value);
        std::fs::write(&path, value.to_string()).expect("the copy is writable");
    }

    /// Sets the element `idx` of a bf16 tensor of `model.safetensors` to these bits.
    ///
    /// # Panics
    /// There is no such tensor.
    pub fn set_bf16(&self, name: &str, idx: usize, bits: u16) {
        let path = self.path("model.safetensors");
        let mut bytes = std::fs::read(&path).expect("the file is there");
        let length = bytes.first_chunk().expect("a safetensors file starts with a length");
        let data_start = 8 + usize::try_from(u64::from_le_bytes(*length)).expect("the length of the header is small");
        let header: Value = serde_json::from_slice(&bytes[8..data_start]).expect("the header is JSON");
        let offset = header[name]["data_offsets"][0].as_u64().expect("the tensor is there");
        let at = data_start + usize::try_from(offset).expect("the file is small") + 2 * idx;
        bytes[at..at + 2].copy_from_slice(&bits.to_le_bytes());
        std::fs::write(&path, bytes).expect("the copy is writable");
    }

    /// Changes the header of `model.safetensors`; the bytes of the tensors stay.
    ///
    /// # Panics
    /// The file is not a safetensors file.
    pub fn edit_tensors(&self, edit: impl FnOnce(&mut serde_json::Map<String, Value>)) {
        let path = self.path("model.safetensors");
        let bytes = std::fs::read(&path).expect("the file is there");
        let (length, rest) = bytes.split_first_chunk::<8>().expect("a safetensors file starts with a length");
        let length = usize::try_from(u64::from_le_bytes(*length)).expect("the length of the header is small");
        let (header, data) = rest.split_at(length);
        let mut header: Value = serde_json::from_slice(header).expect("the header is JSON");
        edit(header.as_object_mut().expect("the header is an object"));
        let header = header.to_string().into_bytes();
        let length = u64::try_from(header.len()).expect("usize fits u64").to_le_bytes();
        std::fs::write(&path, [&length[..], &header, data].concat()).expect("the copy is writable");
    }
}

impl AsRef<Path> for Copy {
    fn as_ref(&self) -> &Path {
        &self.folder
    }
}

/// Writes a golden checkpoint as a folder of packed weights.
///
/// # Panics
/// `program quantize` fails.
pub fn pack(program: &str, name: &str, to: &str, out: &Path) {
    let mut command = Command::new(program);
    command.arg("quantize").arg(golden::folder(name)).args(["--to", to]).arg("--out").arg(out);
    let ended = command.output().expect("the program starts");
    assert!(ended.status.success(), "{name}: {}", String::from_utf8_lossy(&ended.stderr));
}

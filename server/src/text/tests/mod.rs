//! Tests of the text side against Hugging Face, tiktoken and Jinja2.

mod detokenizer;
mod golden;
mod templates;
mod tokenizer;

use std::path::{Path, PathBuf};

/// The tiny checkpoints of `tests/golden`.
fn golden_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden")
}

/// A folder that is removed when the test is over.
struct ModelDir(PathBuf);

impl ModelDir {
    /// `name` must differ between tests.
    fn new(name: &str, files: &[(&str, &str)]) -> Self {
        let path = std::env::temp_dir().join(format!("moesaic-text-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a temporary folder");
        for (file, text) in files {
            std::fs::write(path.join(file), text).expect("a temporary file");
        }
        Self(path)
    }
}

impl Drop for ModelDir {
    fn drop(&mut self) {
        // Nothing depends on it; the folder is a few kilobytes.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

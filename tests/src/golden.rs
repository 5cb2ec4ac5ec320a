//! The golden checkpoints: where they are and what they must compute.

use std::path::PathBuf;

use serde_json::Value;

/// The folder of a golden checkpoint.
pub fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

/// What transformers computed for it.
///
/// # Panics
/// There is no such checkpoint.
pub fn reference(name: &str) -> Value {
    let path = folder(name).join("reference.json");
    let text = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

//! Every key of every golden config.json, with every absurd value: loading and one pass end in a result, within bounded memory.
//!
//! Its own binary, because its allocator counts. An allocation that no machine can satisfy aborts the process: `--nocapture`
//! shows in which case.

#![forbid(unsafe_code)]

use std::alloc::System;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use cap::Cap;
use engine::{EngineConfig, load_model};
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// Of the whole process: some models of under a megabyte, their files, and their KV caches of one.
const MAX_BYTES: usize = 64 << 20;

/// How many folders are swept at a time.
const NUM_THREADS: usize = 2;

/// What keys are set to, whatever they held.
fn absurd_values() -> Vec<Value> {
    vec![
        json!(0),
        json!(1),
        json!(-1),
        json!(0.5),
        json!((1u64 << 31) - 1),
        json!(1u64 << 31),
        json!(i64::MAX),
        json!(u64::MAX),
        json!(1e300),
        json!("x"),
        json!(null),
        json!([]),
        json!([0]),
        json!([i64::MAX]),
        json!({}),
    ]
}

/// Paths of the keys of `value`, and of the first two entries of its lists, its sections' among them.
fn key_paths(value: &Value, path: &str, found: &mut Vec<String>) {
    let mut visit = |key: &str, value: &Value| {
        let path = format!("{path}/{key}");
        key_paths(value, &path, found);
        // Texts and flags are told from other types in one place, and their own values are few.
        if !value.is_string() && !value.is_boolean() {
            found.push(path);
        }
    };
    match value {
        Value::Object(keys) => keys.iter().for_each(|(key, value)| visit(key, value)),
        Value::Array(items) => {
            items.iter().take(2).enumerate().for_each(|(idx, value)| visit(&idx.to_string(), value));
        }
        _ => (),
    }
}

/// A golden folder's weights with a config.json of its own, removed on drop.
struct Folder(PathBuf);

impl Folder {
    fn new(golden: &Path) -> Self {
        let name = golden.file_name().expect("a folder has a name").to_string_lossy();
        let dir = std::env::temp_dir().join(format!("moesaic-sweep-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a temporary folder");
        std::fs::copy(golden.join("model.safetensors"), dir.join("model.safetensors")).expect("a copy");
        Self(dir)
    }

    /// Loads the model and computes three tokens, if it can be loaded.
    fn run(&self, config: &Value) {
        std::fs::write(self.0.join("config.json"), config.to_string()).expect("a config");
        let config = EngineConfig { kv_cache_memory: Some(1 << 20), threads: Some(1), ..EngineConfig::new(&self.0) };
        if let Ok(mut model) = load_model(&config, &mut |_| ()) {
            let source: &[u32] = if model.summary.has_encoder { &[3, 4] } else { &[] };
            drop(model.runner.logits_after(source, &[1, 2, 3]));
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What went wrong, one line per case.
fn sweep(golden: &Path) -> Vec<String> {
    let text = std::fs::read(golden.join("config.json")).expect("the config");
    let original: Value = serde_json::from_slice(&text).expect("JSON");
    let folder = Folder::new(golden);
    let mut paths = Vec::new();
    key_paths(&original, "", &mut paths);
    let mut problems = Vec::new();
    for path in &paths {
        for absurd in absurd_values() {
            let mut config = original.clone();
            *config.pointer_mut(path).expect("the key is there") = absurd.clone();
            let case = format!("{} {path} = {absurd}", golden.display());
            println!("{case}");
            if catch_unwind(AssertUnwindSafe(|| folder.run(&config))).is_err() {
                problems.push(format!("{case}: panicked"));
            }
            let peak = ALLOCATOR.max_allocated();
            if peak > MAX_BYTES {
                // The peak stays what it was: later cases could not be told apart.
                problems.push(format!("{case}, or what ran beside it: {peak} bytes"));
                return problems;
            }
        }
    }
    problems
}

#[test]
fn absurd_configs_end_in_a_result_within_bounded_memory() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let folders = std::fs::read_dir(golden).expect("tests/golden").map(|entry| entry.expect("an entry").path());
    let folders = Mutex::new(folders.filter(|path| path.is_dir()).collect::<Vec<_>>());
    let next = || folders.lock().expect("nobody panics with the lock held").pop();
    let worker = || {
        let mut problems = Vec::new();
        while let Some(folder) = next() {
            problems.extend(sweep(&folder));
        }
        problems
    };
    let problems: Vec<String> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..NUM_THREADS).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("panics are caught")).collect()
    });
    assert!(problems.is_empty(), "{} cases:\n{}", problems.len(), problems.join("\n"));
}

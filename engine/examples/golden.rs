//! Compares the engine with the references of any folders of checkpoints: `cargo run -p moesaic-engine --example golden --
//! DIR...`, where DIR holds what `tests/golden/make_tiny.py` or `unseen.py` wrote (default: `tests/golden` itself). Says
//! every mismatch, and fails if there is one.

#[path = "../tests/suite/driver.rs"]
mod driver;
#[path = "../tests/suite/golden.rs"]
mod golden;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut parents: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    if parents.is_empty() {
        parents.push(driver::golden_dir(""));
    }
    let folders: Vec<PathBuf> = parents.iter().flat_map(|parent| checkpoints(parent)).collect();
    // Each failed check says what it found by panicking.
    std::panic::set_hook(Box::new(|panic| println!("{}", panic.payload_as_str().unwrap_or("panicked"))));
    let failed: Vec<&PathBuf> = folders.iter().filter(|folder| num_failed(folder) > 0).collect();
    for folder in &failed {
        println!("differs: {}", folder.display());
    }
    println!("{} of {} folders agree with their references", folders.len() - failed.len(), folders.len());
    if folders.is_empty() || !failed.is_empty() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// `dir` itself, or the folders in it, that hold a reference.
fn checkpoints(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut found: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    found.push(dir.to_owned());
    found.retain(|folder| folder.join("reference.json").exists());
    found.sort();
    found
}

/// Checks of the folder that found something else than its reference; a folder that does not load counts as one.
fn num_failed(folder: &Path) -> usize {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let Ok((mut driver, reference)) = catch_unwind(|| golden::open(folder)) else {
        println!("does not load: {}", folder.display());
        return 1;
    };
    let fails = |check: &&fn(&str, &mut driver::Driver, &serde_json::Value)| {
        catch_unwind(AssertUnwindSafe(|| check(&name, &mut driver, &reference))).is_err()
    };
    golden::CHECKS.iter().filter(fails).count()
}

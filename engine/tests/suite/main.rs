//! The engine's tests against real checkpoints: parity, invariance, and its life as callers see it.

#![forbid(unsafe_code)]

mod checkpoint_edit;
mod driver;
mod golden;
mod hostile;
mod inspection;
mod invariance;
mod mtp;
mod quantized;
mod step_loop;

/// Every folder of `tests/golden` is named in `source`, the text of a test that should try them all.
fn assert_names_every_folder(source: &str) {
    for entry in std::fs::read_dir(driver::golden_dir("")).expect("tests/golden") {
        let entry = entry.expect("a readable entry");
        let name = entry.file_name().into_string().expect("a UTF-8 name");
        assert!(!entry.path().is_dir() || source.contains(&format!("\"{name}\"")), "{name} has no test");
    }
}

//! The rules of the house that a compiler does not know: crate edges, file sizes, words that must not appear.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// `ARCHITECTURE.md` draws these edges and no others. `scheduler` knows nobody, and `kernels` what its tests run on.
const EDGES: &[(&str, &str)] = &[
    ("server", "engine"),
    ("server", "cache"),
    ("engine", "scheduler"),
    ("engine", "kernels"),
    ("kernels", "kernels/emulator"),
    ("kernels/emulator/driver", "kernels/emulator"),
    ("tests", "server"),
    ("tests", "cache"),
    ("fuzz", "engine"),
    ("fuzz", "server"),
];

const CRATES: &[&str] = &[
    "server",
    "engine",
    "scheduler",
    "kernels",
    "kernels/emulator",
    "kernels/emulator/driver",
    "cache",
    "tests",
    "fuzz",
];

/// Those that may have unsafe code.
const UNSAFE_CRATES: &[&str] = &["kernels", "kernels/emulator", "kernels/emulator/driver"];

const MAX_LINES: usize = 600;

/// Files longer than [`MAX_LINES`], and why they are better whole.
const LONG_FILES: &[(&str, &str)] = &[];

/// File names that say nothing.
const EMPTY_NAMES: &[&str] = &["utils", "util", "helpers", "helper", "common", "misc"];

/// Texts that must not appear, in which folders, and why. Split so that this file does not hold them.
const BANNED: &[(&[&str], &[&str], &str)] = &[
    (CRATES, &["to", "do!("], "finish it or leave it out"),
    (CRATES, &["unimpl", "emented!("], "finish it or leave it out"),
    (CRATES, &["db", "g!("], "left over from debugging"),
    (CRATES, &["#[ign", "ore"], "a test that cannot run says so by failing"),
    (CRATES, &["#[al", "low("], "use #[expect(.., reason = \"..\")]"),
    (CRATES, &["#![al", "low("], "use #[expect(.., reason = \"..\")]"),
    (&["engine", "scheduler", "kernels"], &["ax", "um"], "HTTP is the server's"),
    (&["engine", "scheduler", "kernels"], &["hyp", "er::"], "HTTP is the server's"),
    (&["scheduler/src"], &["std::", "thread"], "the scheduler has no threads"),
    (&["scheduler/src"], &["std::", "fs"], "the scheduler has no I/O"),
    (&["scheduler/src"], &["std::", "net"], "the scheduler has no I/O"),
    (&["scheduler/src"], &["std::time::", "Instant"], "time is an argument"),
    (&["scheduler/src"], &["Instant::", "now"], "time is an argument"),
    (&["scheduler/src"], &["System", "Time"], "time is an argument"),
    (&["server", "engine", "scheduler", "cache", "tests"], &["cfg(feature = \"cu", "da\")"], "CUDA stays in kernels"),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests have a parent folder").to_owned()
}

fn crates() -> impl Iterator<Item = &'static str> {
    CRATES.iter().copied().filter(|name| root().join(name).join("Cargo.toml").exists())
}

/// The Rust files of a crate, without those of crates in it, with paths relative to the repository.
fn sources(name: &str) -> Vec<(String, String)> {
    let mut files = Vec::new();
    let mut folders = vec![root().join(name)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("the folder can be listed") {
            let path = entry.expect("the folder can be listed").path();
            if path.is_dir() {
                folders.extend((!path.join("Cargo.toml").exists()).then_some(path));
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).expect("a source file is UTF-8");
                let name = path.strip_prefix(root()).expect("it is in the repository").display().to_string();
                files.push((name, text));
            }
        }
    }
    files.sort();
    assert!(!files.is_empty(), "{name} has no source files");
    files
}

fn is_in(path: &str, folder: &str) -> bool {
    path.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'))
}

fn assert_none(problems: &[String]) {
    assert!(problems.is_empty(), "{} problems:\n{}", problems.len(), problems.join("\n"));
}

/// The crates of the workspace that `name` depends on; the folder's name stands for a crate.
fn dependencies(name: &str) -> BTreeSet<String> {
    let manifest = |path: PathBuf| -> toml::Table {
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        text.parse().unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let workspace = manifest(root().join("Cargo.toml"));
    let shared = workspace["workspace"]["dependencies"].as_table().expect("dependencies are a table");
    let own = manifest(root().join(name).join("Cargo.toml"));
    let targets = own.get("target").and_then(toml::Value::as_table).into_iter().flat_map(|targets| targets.values());
    let tables = targets.filter_map(toml::Value::as_table).chain(std::iter::once(&own));
    let kinds = ["dependencies", "dev-dependencies", "build-dependencies"];
    let mut found = BTreeSet::new();
    for (alias, entry) in
        tables.flat_map(|table| kinds.iter().filter_map(|kind| table.get(*kind)?.as_table())).flatten()
    {
        let is_shared = entry.get("workspace").and_then(toml::Value::as_bool) == Some(true);
        let entry = if is_shared { &shared[alias] } else { entry };
        let path = entry.get("path").and_then(toml::Value::as_str);
        found.extend(path.map(|path| path.trim_start_matches("../").to_owned()));
    }
    found
}

#[test]
fn crates_depend_on_each_other_as_drawn() {
    let drawn: BTreeSet<_> = EDGES.iter().map(|&(from, to)| (from.to_owned(), to.to_owned())).collect();
    let mut problems = Vec::new();
    for name in crates() {
        for to in dependencies(name) {
            if !drawn.contains(&(name.to_owned(), to.clone())) {
                problems.push(format!("{name} -> {to} is not drawn in ARCHITECTURE.md"));
            }
        }
    }
    for &(from, to) in EDGES {
        let both_exist = [from, to].iter().all(|name| crates().any(|known| known == *name));
        if both_exist && !dependencies(from).contains(to) {
            problems.push(format!("{from} -> {to} is drawn in ARCHITECTURE.md, and is not there"));
        }
    }
    assert_none(&problems);
    let members = std::fs::read_to_string(root().join("Cargo.toml")).unwrap().parse::<toml::Table>().unwrap();
    for member in members["workspace"]["members"].as_array().unwrap() {
        assert!(CRATES.contains(&member.as_str().unwrap()), "{member} is not known to the tidy test");
    }
}

#[test]
fn files_are_short_named_and_introduced() {
    let mut problems = Vec::new();
    for (path, text) in crates().flat_map(sources) {
        let count = text.lines().count();
        let is_exception = LONG_FILES.iter().any(|(long, _)| *long == path);
        if count > MAX_LINES && !is_exception {
            problems.push(format!(
                "{path} has {count} lines, the limit is {MAX_LINES}: a file that wants two titles is two files"
            ));
        }
        if count <= MAX_LINES && is_exception {
            problems.push(format!("{path} is short by now: take it off the list of exceptions"));
        }
        if !text.starts_with("//! ") {
            problems.push(format!("{path} does not start with a `//!` sentence of its purpose"));
        }
        if Path::new(&path).components().any(|part| {
            let part = part.as_os_str().to_string_lossy();
            EMPTY_NAMES.contains(&part.trim_end_matches(".rs"))
        }) {
            problems.push(format!("{path} has a name that does not say what is in it"));
        }
    }
    assert_none(&problems);
}

#[test]
fn unsafe_code_is_in_kernels_alone() {
    let mut problems = Vec::new();
    for (path, text) in crates().filter(|name| !UNSAFE_CRATES.contains(name)).flat_map(sources) {
        let is_root = ["src/lib.rs", "src/main.rs", "src/under_test.rs"].iter().any(|root| path.ends_with(root));
        if is_root && !text.contains("#![forbid(unsafe_code)]") {
            problems.push(format!("{path} does not forbid unsafe code"));
        }
    }
    assert_none(&problems);
}

#[test]
fn banned_words_do_not_appear() {
    let mut problems = Vec::new();
    for (folders, parts, reason) in BANNED {
        let word = parts.concat();
        for (path, text) in
            crates().flat_map(sources).filter(|(path, _)| folders.iter().any(|folder| is_in(path, folder)))
        {
            for (number, line) in text.lines().enumerate().filter(|(_, line)| line.contains(&word)) {
                problems.push(format!("{path}:{}: `{word}`: {reason}: {}", number + 1, line.trim()));
            }
        }
    }
    assert_none(&problems);
}

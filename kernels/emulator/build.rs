//! Compiles the device code of all ops for the CPU.

use std::path::{Path, PathBuf};

fn main() {
    // Asked at run time: two checkouts may share what was built.
    let root = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo runs this"));
    let (ops, bench, headers) = (root.join("../src/ops"), root.join("../src/bench"), root.join("../src/cuda"));
    let folders = entries(&ops).into_iter().filter(|path| path.is_dir()).chain([bench.clone()]);
    let mut sources: Vec<PathBuf> = folders.flat_map(|op| entries(&op)).collect();
    sources.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    assert!(!sources.is_empty(), "no device code below {}", ops.display());
    for path in [&ops, &bench, &headers, &root.join("include"), &root.join("src")] {
        println!("cargo::rerun-if-changed={}", path.display());
    }
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").include(&headers).include(root.join("include")).opt_level(2);
    // The language is a matter of the name, which says CUDA; a kernel is called by its registration alone.
    build.flag("-xc++").flag("-include").flag("emulate.h").flag("-fno-fast-math").flag("-ffp-contract=off");
    // Memory is loaded as what is wanted of it, as nvcc lets it be.
    build.flag("-fno-strict-aliasing");
    // Who links this is there from the process's start, also as a library: a place of a thread is found without a call.
    build.flag("-ftls-model=initial-exec");
    // A check that takes the stack of a coroutine for an overwritten one.
    build.flag("-U_FORTIFY_SOURCE");
    let own = ["src/checks.cu", "src/emulate.cpp"].map(|source| root.join(source));
    build.files(sources).files(own).link_lib_modifier("+whole-archive").compile("emulated");
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = folder.read_dir().unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    paths
}

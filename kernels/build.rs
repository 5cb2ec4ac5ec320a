//! With the feature `cuda`, compiles the device code of all ops.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs, thread};

/// What the device code is compiled for, beside what newer devices make of the last one themselves.
const TARGETS: [&str; 2] = ["80", "90a"];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    // Asked at run time: two checkouts may share what was built.
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let (ops, bench, headers) = (root.join("src/ops"), root.join("src/bench"), root.join("src/cuda"));
    for path in [&ops, &bench, &headers] {
        println!("cargo::rerun-if-changed={}", path.display());
    }
    for variable in ["NVCC", "CUDA_HOME", "PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let folders = entries(&ops).into_iter().filter(|path| path.is_dir()).chain([bench]);
    let mut sources: Vec<PathBuf> = folders.flat_map(|op| entries(&op)).collect();
    sources.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    let compiled: Vec<(PathBuf, PathBuf)> = sources
        .into_iter()
        .map(|source| {
            let name = source.file_stem().expect("a file has a name").to_owned();
            (source, out_dir.join(name).with_extension("fatbin"))
        })
        .collect();
    let (nvcc, left) = (nvcc(), Mutex::new(compiled.iter()));
    let num_threads = env::var("NUM_JOBS").ok().and_then(|count| count.parse().ok()).unwrap_or(1);
    thread::scope(|scope| {
        for _ in 0..num_threads {
            scope.spawn(|| {
                while let Some((source, target)) = { left.lock().expect("nobody panics with it").next() } {
                    compile(&nvcc, &headers, source, target);
                }
            });
        }
    });
    let images = compiled.iter().map(|(_, target)| format!("    include_bytes!({target:?}),\n"));
    let list = format!("&[\n{}]\n", images.collect::<String>());
    fs::write(out_dir.join("fatbins.rs"), list).expect("cargo's folder is writable");
}

/// That of `NVCC`, of `CUDA_HOME`, or of the path.
fn nvcc() -> PathBuf {
    let of_home = || env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
    env::var_os("NVCC").map(PathBuf::from).or_else(of_home).unwrap_or_else(|| PathBuf::from("nvcc"))
}

fn compile(nvcc: &Path, headers: &Path, source: &Path, target: &Path) {
    let mut command = Command::new(nvcc);
    // A product that is added to something rounds by itself unless the code says `fmaf`, as on the CPU.
    command.args(["-std=c++17", "-O3", "-fmad=false", "-Werror", "all-warnings", "-fatbin"]);
    for arch in TARGETS {
        command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    // For devices that are newer than both.
    command.arg("-gencode=arch=compute_90,code=compute_90");
    let status = command.arg("-I").arg(headers).arg("-o").arg(target).arg(source).status();
    let status = status.unwrap_or_else(|error| {
        panic!(
            "{}: {error}; the feature cuda needs a CUDA toolkit: set CUDA_HOME or NVCC, or see scripts/cuda-toolkit",
            nvcc.display()
        )
    });
    assert!(status.success(), "{} of {} ended with {status}", nvcc.display(), source.display());
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = folder.read_dir().unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    paths
}

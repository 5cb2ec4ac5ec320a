//! Compiles candle's plain ops for the emulator.

use std::path::PathBuf;

fn main() {
    // Asked at run time: two checkouts may share what was built.
    let root = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo runs this"));
    let (source, headers) = (root.join("src/candle.cu"), root.join("../include"));
    for path in [&source, &headers] {
        println!("cargo::rerun-if-changed={}", path.display());
    }
    let mut build = emulator_flags(&mut cc::Build::new()).include(&headers).to_owned();
    build.file(source).link_lib_modifier("+whole-archive").compile("emulated_candle");
}

/// As `kernels/emulator` compiles the device code of the ops.
fn emulator_flags(build: &mut cc::Build) -> &mut cc::Build {
    build.cpp(true).std("c++17").opt_level(2).flag("-xc++").flag("-include").flag("emulate.h");
    build.flag("-fno-fast-math").flag("-ffp-contract=off").flag("-U_FORTIFY_SOURCE")
}

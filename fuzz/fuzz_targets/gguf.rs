//! Fuzz target: GGUF metadata and tensor tables.

#![cfg_attr(any(fuzzing, feature = "libfuzzer"), no_main)]

#[cfg(any(fuzzing, feature = "libfuzzer"))]
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    moesaic_fuzz::gguf(data);
});

#[cfg(not(any(fuzzing, feature = "libfuzzer")))]
fn main() {
    moesaic_fuzz::replay(moesaic_fuzz::gguf);
}

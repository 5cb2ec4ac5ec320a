//! Fuzz target: safetensors headers and their index.

#![cfg_attr(any(fuzzing, feature = "libfuzzer"), no_main)]

#[cfg(any(fuzzing, feature = "libfuzzer"))]
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    moesaic_fuzz::checkpoint(data);
});

#[cfg(not(any(fuzzing, feature = "libfuzzer")))]
fn main() {
    moesaic_fuzz::replay(moesaic_fuzz::checkpoint);
}

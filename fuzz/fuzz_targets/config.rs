//! Fuzz target: config.json, with the weights of a golden folder.

#![cfg_attr(any(fuzzing, feature = "libfuzzer"), no_main)]

#[cfg(any(fuzzing, feature = "libfuzzer"))]
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    moesaic_fuzz::config(data);
});

#[cfg(not(any(fuzzing, feature = "libfuzzer")))]
fn main() {
    moesaic_fuzz::replay(moesaic_fuzz::config);
}

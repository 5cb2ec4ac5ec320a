//! Fuzz target: tiktoken.model and the tokenizer_config.json beside it.

#![cfg_attr(any(fuzzing, feature = "libfuzzer"), no_main)]

#[cfg(any(fuzzing, feature = "libfuzzer"))]
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    moesaic_fuzz::tiktoken(data);
});

#[cfg(not(any(fuzzing, feature = "libfuzzer")))]
fn main() {
    moesaic_fuzz::replay(moesaic_fuzz::tiktoken);
}

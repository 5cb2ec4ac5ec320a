//! Fuzz target: safetensors headers and their index.

#![cfg_attr(any(fuzzing, feature = "libfuzzer"), no_main)]

moesaic_fuzz::target!(checkpoint);

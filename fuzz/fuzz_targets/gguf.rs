//! Fuzz target: GGUF metadata and tensor tables.

#![cfg_attr(any(fuzzing, feature = "libfuzzer"), no_main)]

moesaic_fuzz::target!(gguf);

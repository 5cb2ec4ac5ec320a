//! Fuzz target: config.json, with the weights of a golden folder.

#![cfg_attr(any(fuzzing, feature = "libfuzzer"), no_main)]

moesaic_fuzz::target!(config);

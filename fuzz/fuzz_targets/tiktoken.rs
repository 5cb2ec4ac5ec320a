//! Fuzz target: tiktoken.model and the tokenizer_config.json beside it.

#![cfg_attr(any(fuzzing, feature = "libfuzzer"), no_main)]

moesaic_fuzz::target!(tiktoken);

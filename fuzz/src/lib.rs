//! Fuzz targets for the parsers of files that come from strangers: any bytes end in a value or an error, within bounded memory.
//!
//! Each takes the bytes of a file, or of several with a line `--` between them, and says whether they were accepted. The
//! programs over them are in `fuzz_targets`, inputs to start from and inputs that once failed in `corpus`.

#![forbid(unsafe_code)]

mod scratch;

use std::alloc::System;
use std::path::Path;

use cap::Cap;
use engine::weights::checkpoint::Checkpoint;
use engine::{EngineConfig, GgufFile, load_model};
use moesaic::text::{EncodeOptions, Tokenizer, TokenizerFiles};
use serde_json::Value;

use scratch::Scratch;

/// The program over one of the parsers: libFuzzer's, or one that runs the files it is given.
#[macro_export]
macro_rules! target {
    ($parser:ident) => {
        #[cfg(any(fuzzing, feature = "libfuzzer"))]
        libfuzzer_sys::fuzz_target!(|data: &[u8]| {
            $crate::$parser(data);
        });

        #[cfg(not(any(fuzzing, feature = "libfuzzer")))]
        fn main() {
            $crate::replay($crate::$parser);
        }
    };
}

/// An input of some kilobytes that makes a parser ask for more than this has found a bug; the allocation fails.
#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, 1 << 30);

/// Between the files of one input.
const SEPARATOR: &[u8] = b"\n--\n";

/// Tensor bytes that a target adds to a header, at most.
const MAX_DATA: u64 = 1 << 16;

/// Has letters, digits, spaces, several scripts and a special token in it.
const TEXT: &str = "Hello, 世界!\n\n  12345 don't\u{1f600} <|im_end|>";

/// `model.safetensors.index.json`, where there are two parts, and `model.safetensors`. A file that starts with `{` is a
/// header: its length and zeros for its tensors are added.
pub fn checkpoint(data: &[u8]) -> bool {
    let scratch = Scratch::new();
    let shard = match split(data) {
        (first, None) => first,
        (index, Some(shard)) => {
            scratch.write("model.safetensors.index.json", index);
            shard
        }
    };
    scratch.write("model.safetensors", &with_length_and_data(shard));
    // Not copied by the system, which libFuzzer's timer would interrupt.
    let config = std::fs::read(golden("mixtral-base").join("config.json")).expect("a config");
    scratch.write("config.json", &config);
    let inspected = engine::inspect(scratch.folder());
    match Checkpoint::open(scratch.folder()) {
        Ok(checkpoint) => {
            assert!(checkpoint.iter().all(|(_, entry)| checkpoint.bytes(entry).len() == entry.num_bytes));
            inspected.is_ok()
        }
        Err(_) => false,
    }
}

/// `config.json` beside the weights of the golden folder that its key `golden` names: loads the model, with its layers for
/// multi-token prediction if a key `load_mtp` says so, and computes two tokens.
pub fn config(data: &[u8]) -> bool {
    let scratch = Scratch::new();
    scratch.write("config.json", data);
    let json: Value = serde_json::from_slice(data).unwrap_or_default();
    let weights = json["golden"].as_str().filter(|name| !name.contains(['/', '.'])).unwrap_or("mixtral-base");
    let weights = golden(weights).join("model.safetensors");
    if weights.is_file() {
        std::os::unix::fs::symlink(weights, scratch.path("model.safetensors")).expect("a link");
    }
    let config = EngineConfig {
        kv_cache_memory: Some(1 << 20),
        threads: Some(1),
        load_mtp: json["load_mtp"] == true,
        ..EngineConfig::new(scratch.folder())
    };
    let inspected = engine::inspect(scratch.folder());
    let Ok(mut model) = load_model(&config, &mut |_| ()) else { return false };
    let source: &[u32] = if model.summary.has_encoder { &[3, 4] } else { &[] };
    let logits = model.runner.logits_after(source, &[1, 2]);
    logits.is_ok() && model.runner.drafts_of(&[1, 2]).is_ok() && inspected.is_ok()
}

/// A GGUF file: its metadata, tensor table, and the values of its tensors; then the tokenizer and the model that it holds,
/// down to two tokens.
pub fn gguf(data: &[u8]) -> bool {
    let scratch = Scratch::new();
    scratch.write("model.gguf", data);
    let Ok(file) = GgufFile::open(&scratch.path("model.gguf")) else { return false };
    for (name, tensor) in file.tensors() {
        if let Ok(values) = file.read_f32(name) {
            assert_eq!(values.len(), tensor.num_elements);
        }
    }
    drop(TokenizerFiles::from_gguf(&file).and_then(|files| Tokenizer::from_gguf(&files)));
    let config = EngineConfig {
        kv_cache_memory: Some(1 << 20),
        threads: Some(1),
        ..EngineConfig::new(scratch.path("model.gguf"))
    };
    let inspected = engine::inspect(&config.model_dir);
    if let Ok(mut model) = load_model(&config, &mut |_| ()) {
        assert!(inspected.is_ok());
        drop(model.runner.logits_of(&[1, 2]));
    }
    file.opt_strings("tokenizer.ggml.tokens").is_ok()
}

/// `tiktoken.model`, and `tokenizer_config.json` where there are two parts: loads the vocabulary and takes a text there and
/// back.
pub fn tiktoken(data: &[u8]) -> bool {
    let scratch = Scratch::new();
    let (ranks, config) = split(data);
    scratch.write("tiktoken.model", ranks);
    if let Some(config) = config {
        scratch.write("tokenizer_config.json", config);
    }
    let Ok(tokenizer) = Tokenizer::load(scratch.folder()) else { return false };
    let Ok(ids) = tokenizer.encode(TEXT, EncodeOptions::default()) else { return false };
    assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
    tokenizer.decode(&ids, false).is_ok()
}

/// Runs a target on each file that the command line names.
///
/// # Panics
/// A file cannot be read, or the target fails.
pub fn replay(target: fn(&[u8]) -> bool) {
    for path in std::env::args_os().skip(1) {
        let data = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", Path::new(&path).display()));
        let word = if target(&data) { "accepted" } else { "refused" };
        println!("{}: {word}", Path::new(&path).display());
    }
}

fn golden(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name)
}

/// The files of an input.
fn split(data: &[u8]) -> (&[u8], Option<&[u8]>) {
    match data.windows(SEPARATOR.len()).position(|window| window == SEPARATOR) {
        Some(at) => (&data[..at], Some(&data[at + SEPARATOR.len()..])),
        None => (data, None),
    }
}

/// A mutation of a header keeps neither its length nor the bytes it promises: without them none would get far.
fn with_length_and_data(header: &[u8]) -> Vec<u8> {
    if header.first() != Some(&b'{') {
        return header.to_vec();
    }
    let json: Value = serde_json::from_slice(header).unwrap_or_default();
    let ends = json.as_object().into_iter().flatten().filter_map(|(_, tensor)| tensor["data_offsets"][1].as_u64());
    let num_bytes = ends.max().unwrap_or(0).min(MAX_DATA);
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    file.resize(file.len() + num_bytes as usize, 0);
    file
}

#[cfg(test)]
mod tests {
    use engine::EngineError;

    use super::*;

    /// Every file of a corpus ends as its name says: `refused-…`, or accepted.
    fn check(name: &str, target: fn(&[u8]) -> bool) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
        let mut num_files = 0;
        for entry in std::fs::read_dir(&folder).expect("a corpus") {
            let path = entry.expect("an entry").path();
            let file = path.file_name().expect("a file has a name").to_string_lossy();
            // Finds of the fuzzer have no dot in their names; they are not part of the repository.
            if file.contains('.') {
                num_files += 1;
                let accepted = target(&std::fs::read(&path).expect("a readable file"));
                assert_eq!(accepted, !file.starts_with("refused-"), "{}", path.display());
            }
        }
        assert!(num_files > 1, "{name} has no corpus");
    }

    #[test]
    fn checkpoints_end_as_they_are_named() {
        check("checkpoint", checkpoint);
    }

    #[test]
    fn configs_end_as_they_are_named() {
        check("config", config);
    }

    /// Models in GGUF files that do not load lead nowhere.
    #[test]
    fn gguf_models_to_start_from_load() {
        for name in ["llama-experts", "deepseek2"] {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("corpus/gguf/{name}.gguf"));
            let config = EngineConfig { kv_cache_memory: Some(1 << 20), ..EngineConfig::new(&path) };
            let mut model = load_model(&config, &mut |_| ()).expect(name);
            model.runner.logits_of(&[1, 2]).expect(name);
        }
    }

    /// A family that no seed leads to is hardly fuzzed at all.
    #[test]
    fn every_model_type_has_a_config_to_start_from() {
        let scratch = Scratch::new();
        scratch.write("config.json", br#"{"model_type": "none of them"}"#);
        scratch.write("model.safetensors", &with_length_and_data(b"{}"));
        let Err(EngineError::UnknownArchitecture { supported, .. }) =
            load_model(&EngineConfig::new(scratch.folder()), &mut |_| ())
        else {
            panic!("it is one of them")
        };
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/config");
        let seeds = std::fs::read_dir(folder).expect("a corpus").map(|entry| entry.expect("an entry").path());
        let types: Vec<String> = seeds
            .filter(|path| !path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("refused-")))
            .filter_map(|path| serde_json::from_slice::<Value>(&std::fs::read(path).expect("a readable file")).ok())
            .filter_map(|config| config["model_type"].as_str().map(str::to_owned))
            .collect();
        for model_type in supported.split(", ") {
            assert!(types.iter().any(|found| found == model_type), "{model_type} has no seed in fuzz/corpus/config");
        }
    }

    #[test]
    fn gguf_files_end_as_they_are_named() {
        check("gguf", gguf);
    }

    #[test]
    fn vocabularies_end_as_they_are_named() {
        check("tiktoken", tiktoken);
    }
}

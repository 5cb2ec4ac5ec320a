//! Loading, special tokens, token bytes, and tiktoken vocabularies.

use std::fs;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use super::{ModelDir, golden_dir};
use crate::text::{EncodeOptions, TextError, Tokenizer};

const PLAIN: EncodeOptions = EncodeOptions { add_special_tokens: false };

fn load_error(dir: &ModelDir) -> String {
    Tokenizer::load(&dir.0).expect_err("an invalid folder").to_string()
}

#[test]
fn missing_and_broken_files_are_named() {
    let empty = ModelDir::new("empty", &[]);
    let error = Tokenizer::load(&empty.0).expect_err("no files");
    assert!(matches!(error, TextError::NoTokenizer { .. }));
    let error = error.to_string();
    assert!(error.contains("tokenizer.json") && error.contains("tiktoken.model"), "{error}");

    let broken = ModelDir::new("broken", &[("tokenizer.json", "{}")]);
    assert!(load_error(&broken).contains("tokenizer.json is invalid"), "{}", load_error(&broken));
    let broken = ModelDir::new("broken-config", &[("tokenizer_config.json", "[")]);
    assert!(load_error(&broken).contains("tokenizer_config.json is invalid"), "{}", load_error(&broken));
}

fn tiktoken_model(num_ranks: usize) -> String {
    let bytes = (0..=u8::MAX).map(|byte| vec![byte]);
    let words = ["ab", "abc", "bc"].map(|word| word.as_bytes().to_vec());
    let lines = bytes.chain(words).take(num_ranks).enumerate();
    lines.map(|(rank, token)| format!("{} {rank}\n", STANDARD.encode(token))).collect()
}

#[test]
fn broken_tiktoken_files_are_refused() {
    let whole = tiktoken_model(259);
    let with_id = |id: u32| json!({"added_tokens_decoder": {id.to_string(): {"content": "[BOS]", "special": true}}});
    let no_tokens = json!({});
    let long_token = format!("{}= 0", "YWFh".repeat(342) + "YWE");
    let cases: [(&str, String, Value, &str); 8] = [
        ("byte", tiktoken_model(255), no_tokens.clone(), "no token for the single byte 0xFF"),
        ("base64", "?? 0".to_owned(), no_tokens.clone(), "line 1: expected `base64 rank`"),
        ("long", long_token, no_tokens.clone(), "line 1: a token of 1028 bytes, the limit is 1024"),
        ("rank", "YQ== x".to_owned(), no_tokens.clone(), "line 1: expected `base64 rank`"),
        ("gap", whole.replace(" 258\n", " 300\n"), no_tokens, "expected rank 258, got 300"),
        ("low", whole.clone(), with_id(258), "has id 258, outside 259..515"),
        ("high", whole.clone(), with_id(4_000_000_000), "outside 259..515"),
        // A model that claims to have more rows than any machine could hold.
        ("claimed", whole, with_id(4_000_000_001), "outside 259..65795"),
    ];
    for (name, model, config, expected) in cases {
        let claim = if name == "claimed" { json!({"vocab_size": 1u64 << 40}) } else { json!({}) };
        let files = [
            ("tiktoken.model", model.as_str()),
            ("tokenizer_config.json", &config.to_string()),
            ("config.json", &claim.to_string()),
        ];
        let error = load_error(&ModelDir::new(&format!("tiktoken-{name}"), &files));
        assert!(error.contains(expected), "{name}: {error}");
    }
}

#[test]
fn tiktoken_fills_reserved_ids_up_to_the_vocabulary_of_the_model() {
    let config = json!({"bos_token": "[BOS]", "added_tokens_decoder": {
        "260": {"content": "[BOS]", "special": true},
        "261": {"content": "<|tool|>", "special": false},
    }});
    let files = [
        ("tiktoken.model", tiktoken_model(259)),
        ("tokenizer_config.json", config.to_string()),
        ("config.json", json!({"vocab_size": 264}).to_string()),
    ];
    let files = files.each_ref().map(|(name, text)| (*name, text.as_str()));
    let dir = ModelDir::new("tiktoken-reserved", &files);
    let tokenizer = Tokenizer::load(&dir.0).expect("a valid folder");
    assert_eq!(tokenizer.vocab_size(), 264);
    assert_eq!(tokenizer.id_to_token(259).as_deref(), Some("<|reserved_token_259|>"));
    assert_eq!(tokenizer.id_to_token(263).as_deref(), Some("<|reserved_token_263|>"));
    assert_eq!(tokenizer.bos_token(), Some("[BOS]"));
    assert_eq!((tokenizer.is_special(260), tokenizer.is_special(261)), (true, false));
    // "abc" is a token that no merge of lower rank than "ab" + "c" builds.
    assert_eq!(tokenizer.encode("abc[BOS]ab<|tool|>", PLAIN).expect("ids"), [257, 260, 256, 261]);
    assert_eq!(tokenizer.decode(&[257, 260, 261], true).expect("text"), "abc<|tool|>");
}

/// The ids are those of Python's tiktoken 0.14 over the same ranks, pattern and special tokens.
#[test]
fn tiktoken_agrees_with_python() {
    let tokenizer = Tokenizer::load(&golden_dir().join("kimi_k2-tiktoken")).expect("a golden tokenizer");
    let samples: Value = serde_json::from_str(include_str!("tiktoken_samples.json")).expect("samples are JSON");
    for sample in samples.as_array().expect("a list") {
        let text = sample["text"].as_str().expect("text");
        let ids: Vec<u32> = serde_json::from_value(sample["ids"].clone()).expect("ids");
        assert_eq!(tokenizer.encode(text, PLAIN).expect(text), ids, "{text:?}");
        assert_eq!(tokenizer.decode(&ids, false).expect(text), text);
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id)).collect();
        assert_eq!(bytes, text.as_bytes(), "token bytes of {text:?}");
    }
}

/// A tokenizer.json with one merge and a special token, and whatever else a test needs.
fn tokenizer_json(extra: &Value) -> String {
    let mut json = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [{"id": 4, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3, "<s>": 4}, "merges": [["a", "b"]]},
    });
    for (key, value) in extra.as_object().expect("an object") {
        json[key] = value.clone();
    }
    json.to_string()
}

#[test]
fn files_that_the_tokenizer_library_panics_on_are_refused() {
    let longer = json!({"vocab": {"a": 0, "bb": 1}, "merges": [["bb", "a"]]});
    let prefixed = json!({"vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]], "continuing_subword_prefix": "####"});
    for (name, mut model) in [("longer", longer), ("prefixed", prefixed)] {
        model["type"] = json!("BPE");
        let dir = ModelDir::new(name, &[("tokenizer.json", &tokenizer_json(&json!({ "model": model })))]);
        assert!(load_error(&dir).contains("tokenizer.json is invalid"), "{name}: {}", load_error(&dir));
    }
}

#[test]
fn llama_classes_follow_add_bos_token() {
    let cases = [
        ("LlamaTokenizerFast", json!(true), vec![4, 2]),
        ("LlamaTokenizerFast", json!(false), vec![2]),
        ("LlamaTokenizerFast", json!(null), vec![2]),
        ("PreTrainedTokenizerFast", json!(true), vec![2]),
    ];
    for (case, (class, add_bos_token, expected)) in cases.into_iter().enumerate() {
        let config = json!({"tokenizer_class": class, "add_bos_token": add_bos_token, "bos_token": {"content": "<s>"}});
        let files = [("tokenizer.json", tokenizer_json(&json!({}))), ("tokenizer_config.json", config.to_string())];
        let files = files.each_ref().map(|(name, text)| (*name, text.as_str()));
        let tokenizer = Tokenizer::load(&ModelDir::new(&format!("bos-{case}"), &files).0).expect("a valid folder");
        let ids = tokenizer.encode("ab", EncodeOptions { add_special_tokens: true }).expect("ids");
        assert_eq!(ids, expected, "{config}");
        assert_eq!(tokenizer.encode("<s>ab", PLAIN).expect("ids"), [4, 2]);
    }
    let config = json!({"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}).to_string();
    let files = [("tokenizer.json", tokenizer_json(&json!({}))), ("tokenizer_config.json", config)];
    let files = files.each_ref().map(|(name, text)| (*name, text.as_str()));
    let error = load_error(&ModelDir::new("bos-none", &files));
    assert!(error.contains("add_bos_token is set without bos_token"), "{error}");
}

#[test]
fn configuration_adds_tokens_and_clears_truncation() {
    let json = tokenizer_json(&json!({"truncation":
        {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}}));
    let config = json!({"eos_token": null, "added_tokens_decoder": {
        "4": {"content": "<s>", "special": true}, "5": {"content": "<think>", "special": false}}});
    let map = json!({"eos_token": {"content": "</s>"}, "pad_token": "<s>"});
    let files = [
        ("tokenizer.json", json),
        ("tokenizer_config.json", config.to_string()),
        ("special_tokens_map.json", map.to_string()),
    ];
    let files = files.each_ref().map(|(name, text)| (*name, text.as_str()));
    let tokenizer = Tokenizer::load(&ModelDir::new("added", &files).0).expect("a valid folder");
    assert_eq!(tokenizer.encode("abcab<think>", PLAIN).expect("ids"), [2, 3, 2, 5]);
    assert!(!tokenizer.is_special(5));
    assert_eq!(tokenizer.token_to_id("<think>"), Some(5));
    assert_eq!((tokenizer.eos_token(), tokenizer.pad_token()), (Some("</s>"), Some("<s>")));
    assert_eq!((tokenizer.bos_token(), tokenizer.unk_token()), (None, None));
    assert_eq!(tokenizer.decode(&[2, 4, 5, 77], true).expect("text"), "ab<think>");
}

#[test]
fn token_bytes_follow_the_kind_of_vocabulary() {
    let sentence_piece = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let token = |decoder: &Value, token: &str| {
        let model = json!({"type": "BPE", "vocab": {token: 0}, "merges": []});
        let json = tokenizer_json(&json!({"decoder": decoder, "model": model, "added_tokens": []}));
        let inner = tokenizers::Tokenizer::from_bytes(json).expect("a tokenizer");
        Tokenizer::new(inner, Default::default()).token_bytes(0)
    };
    let cases: [(&Value, &str, &[u8]); 9] = [
        (&byte_level, "Ġab", b" ab"),
        (&byte_level, "Ċ", b"\n"),
        (&byte_level, "ðŁĺ", &[0xF0, 0x9F, 0x98]),
        (&byte_level, "人", "人".as_bytes()),
        (&sentence_piece, "▁a▁", b" a "),
        (&sentence_piece, "<0xF0>", &[0xF0]),
        (&sentence_piece, "<0xZZ>", b"<0xZZ>"),
        (&metaspace, "▁a", b" a"),
        (&json!(null), "▁a", "▁a".as_bytes()),
    ];
    for (decoder, spelling, expected) in cases {
        assert_eq!(token(decoder, spelling), expected, "{spelling} under {decoder}");
    }
    let golden = Tokenizer::load(&golden_dir().join("mixtral-base")).expect("a golden tokenizer");
    assert_eq!(golden.token_bytes(1), b"<s>");
    assert_eq!(golden.token_bytes(1_000_000), b"");
}

#[test]
fn golden_token_bytes_join_to_the_text() {
    for entry in fs::read_dir(golden_dir()).expect("tests/golden").flatten() {
        let Ok(tokenizer) = Tokenizer::load(&entry.path()) else { continue };
        let text = "naïve 人工知能 🙂\n<s> x";
        let ids = tokenizer.encode(text, PLAIN).expect("ids");
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id)).collect();
        assert_eq!(String::from_utf8(bytes).expect("UTF-8"), text, "{}", entry.path().display());
    }
}

//! Streams never hold half a character, and join to what decoding all ids gives.

use std::sync::Arc;

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use serde_json::{Value, json};

use super::golden_dir;
use crate::text::{DetokenizeOptions, Detokenizer, EncodeOptions, Tokenizer};

const KEEP_SPECIAL: DetokenizeOptions =
    DetokenizeOptions { skip_special_tokens: false, spaces_between_special_tokens: true };

/// Ids 0..: `<s>`, `▁a`, `b`, `▁`, and the 256 byte tokens from 4 on.
fn sentence_piece(decoder: &Value) -> Arc<Tokenizer> {
    let mut vocab = json!({"<s>": 0, "▁a": 1, "b": 2, "▁": 3});
    for byte in 0..=u8::MAX {
        vocab[format!("<0x{byte:02X}>")] = json!(4 + u32::from(byte));
    }
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
        "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}],
        "post_processor": null, "decoder": decoder,
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true},
    });
    let inner = tokenizers::Tokenizer::from_bytes(json.to_string()).expect("a tokenizer");
    Arc::new(Tokenizer::new(inner, Default::default()))
}

/// Llama's and Mixtral's decoder.
fn llama_decoder() -> Value {
    json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]})
}

fn byte_ids(text: &str) -> Vec<u32> {
    text.bytes().map(|byte| 4 + u32::from(byte)).collect()
}

fn pieces(detokenizer: &mut Detokenizer, ids: &[u32]) -> Vec<String> {
    let mut pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(id).expect("text")).collect();
    pieces.push(detokenizer.finish());
    pieces
}

#[test]
fn characters_come_whole() {
    let texts = ["🙂", "人工知能", "a🙂\u{200d}🙂é", "мир", "❤️ naïve"];
    let golden = |name| Arc::new(Tokenizer::load(&golden_dir().join(name)).expect("a golden tokenizer"));
    let byte_level = [golden("qwen3_moe-base"), golden("kimi_k2-tiktoken")];
    for text in texts {
        for tokenizer in &byte_level {
            let ids = tokenizer.encode(text, EncodeOptions::default()).expect("ids");
            check_whole(tokenizer, &ids, text);
        }
        check_whole(&sentence_piece(&llama_decoder()), &byte_ids(text), text);
    }
}

fn check_whole(tokenizer: &Arc<Tokenizer>, ids: &[u32], text: &str) {
    let pieces = pieces(&mut Detokenizer::new(Arc::clone(tokenizer), KEEP_SPECIAL), ids);
    assert!(!pieces.iter().any(|piece| piece.contains('\u{FFFD}')), "{pieces:?}");
    assert_eq!(pieces.concat(), text);
    assert_eq!(pieces.last().map(String::as_str), Some(""), "{text:?} was complete before the end");
}

#[test]
fn broken_bytes_become_replacement_characters() {
    let tokenizer = sentence_piece(&llama_decoder());
    let [first, second, ..] = byte_ids("é")[..] else { panic!("two bytes") };
    let cases: [(&[u32], &[&str]); 5] = [
        (&[first], &["", "\u{FFFD}"]),
        (&[first, 2], &["", "\u{FFFD}b", ""]),
        (&[first, first, second], &["", "\u{FFFD}", "é", ""]),
        (&[second, second, 2], &["\u{FFFD}", "\u{FFFD}", "b", ""]),
        (&[first, 9999, second], &["", "", "é", ""]),
    ];
    for (ids, expected) in cases {
        let got = pieces(&mut Detokenizer::new(Arc::clone(&tokenizer), KEEP_SPECIAL), ids);
        assert_eq!(got, expected, "{ids:?}");
        assert_eq!(tokenizer.decode(ids, false).expect("text"), expected.concat());
    }
}

#[test]
fn the_prompt_decides_the_leading_space() {
    let tokenizer = sentence_piece(&llama_decoder());
    let text = |prompt: &[u32], options: DetokenizeOptions, ids: &[u32]| {
        let mut detokenizer = Detokenizer::with_prompt(Arc::clone(&tokenizer), options, prompt).expect("a prompt");
        pieces(&mut detokenizer, ids).concat()
    };
    let skip = DetokenizeOptions::default();
    assert_eq!(text(&[], skip, &[1, 2]), "ab");
    assert_eq!(text(&[1, 2], skip, &[1, 2]), " ab");
    // A skipped BOS is no text, a kept one is.
    assert_eq!(text(&[0], skip, &[1]), "a");
    assert_eq!(text(&[0], KEEP_SPECIAL, &[1]), " a");
    assert_eq!(text(&[1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], skip, &[1]), " a");
    // The character that the prompt began.
    let bytes = byte_ids("🙂");
    assert_eq!(text(&bytes[..2], skip, &bytes[2..]), "🙂");
}

/// Random ids, broken characters among them, under each kind of decoder.
#[test]
fn random_streams_join_to_the_whole_text() {
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let without_strip =
        json!({"type": "Sequence", "decoders": llama_decoder()["decoders"].as_array().expect("a list")[..3]});
    for decoder in [llama_decoder(), without_strip, byte_level, metaspace] {
        let tokenizer = sentence_piece(&decoder);
        for seed in 0..300 {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut ids = Vec::new();
            for _ in 0..rng.random_range(0..20) {
                match rng.random_range(0..3) {
                    0 => ids.push(rng.random_range(0..300)),
                    1 => ids.push(rng.random_range(0..4)),
                    _ => ids.extend(byte_ids(["🙂", "é", "人"][rng.random_range(0..3)])),
                }
            }
            let skip_special_tokens = rng.random_bool(0.5);
            let options = DetokenizeOptions { skip_special_tokens, ..KEEP_SPECIAL };
            let text = pieces(&mut Detokenizer::new(Arc::clone(&tokenizer), options), &ids).concat();
            assert_eq!(
                text,
                tokenizer.decode(&ids, skip_special_tokens).expect("text"),
                "{decoder} seed {seed}: {ids:?}"
            );
        }
    }
}

/// Where a decoder must see a window of ids, what it holds back stays bounded.
#[test]
fn windows_hold_back_little() {
    let byte_fallback = json!({"type": "ByteFallback"});
    let tokenizer = sentence_piece(&byte_fallback);
    let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer), KEEP_SPECIAL);
    let broken = byte_ids("é")[0];
    let num_pushed = 100;
    let sent: String = (0..num_pushed).map(|_| detokenizer.push(broken).expect("text")).collect();
    assert!(sent.chars().count() > num_pushed - 16, "{sent}");
    let emoji = pieces(&mut Detokenizer::new(tokenizer, KEEP_SPECIAL), &byte_ids("🙂"));
    assert_eq!(emoji, ["", "", "", "🙂", ""]);
}

#[test]
fn neighbouring_added_tokens_lose_the_space_on_request() {
    let word_piece = json!({"type": "WordPiece", "prefix": "##", "cleanup": false});
    let tokenizer = sentence_piece(&word_piece);
    for (spaces_between_special_tokens, expected) in [(true, "b <s> <s> b"), (false, "b <s><s> b")] {
        let options = DetokenizeOptions { skip_special_tokens: false, spaces_between_special_tokens };
        let text = pieces(&mut Detokenizer::new(Arc::clone(&tokenizer), options), &[2, 0, 0, 2]).concat();
        assert_eq!(text, expected);
    }
}

//! How byte-level BPE vocabularies split a text before merging, by the names that `tokenizer.ggml.pre` has for it.
//!
//! The file only names the way; the patterns here are those of the checkpoints' own `tokenizer.json` files.

use serde_json::{Value, json};

use super::tiktoken::KIMI_PATTERN;

/// GPT-2's contractions, words, numbers, punctuation and spaces, as Hugging Face's `ByteLevel` has it built in.
const GPT2_PATTERN: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_PATTERN: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Of gpt-oss and others.
const GPT4O_PATTERN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
/// Letters of alphabets with upper and lower case.
const DEEPSEEK_LETTERS: &str = concat!(
    "\\s?[A-Za-z\u{b5}\u{c0}-\u{d6}\u{d8}-\u{f6}\u{f8}-\u{1ba}\u{1bc}-\u{1bf}\u{1c4}-\u{293}\u{295}-\u{2af}",
    "\u{370}-\u{373}\u{376}\u{377}\u{37b}-\u{37d}\u{37f}\u{386}\u{388}-\u{38a}\u{38c}\u{38e}-\u{3a1}",
    "\u{3a3}-\u{3f5}\u{3f7}-\u{481}\u{48a}-\u{52f}\u{531}-\u{556}\u{10a0}-\u{10c5}\u{13a0}-\u{13f5}",
    "\u{13f8}-\u{13fd}\u{1c90}-\u{1cba}\u{1cbd}-\u{1cbf}\u{1d00}-\u{1d2b}\u{1d6b}-\u{1d77}\u{1d79}-\u{1d9a}",
    "\u{1e00}-\u{1f15}\u{1f18}-\u{1f1d}\u{1f20}-\u{1f45}\u{1f48}-\u{1f4d}\u{1f50}-\u{1f57}\u{1f59}\u{1f5b}",
    "\u{1f5d}\u{1f5f}-\u{1f7d}\u{1f80}-\u{1fb4}\u{1fb6}-\u{1fbc}\u{1fbe}\u{1fc2}-\u{1fc4}\u{1fc6}-\u{1fcc}",
    "\u{1fd0}-\u{1fd3}\u{1fd6}-\u{1fdb}\u{1fe0}-\u{1fec}\u{1ff2}-\u{1ff4}\u{1ff6}-\u{1ffc}\u{2102}\u{2107}",
    "\u{210a}-\u{2113}\u{2115}\u{2119}-\u{211d}\u{2124}\u{2126}\u{2128}\u{212a}-\u{212d}\u{212f}-\u{2134}",
    "\u{2139}\u{213c}-\u{213f}\u{2145}-\u{2149}\u{214e}\u{2183}\u{2184}\u{2c00}-\u{2c7b}\u{2c7e}-\u{2ce4}",
    "\u{2ceb}-\u{2cee}\u{2cf2}\u{2cf3}\u{a640}-\u{a66d}\u{a680}-\u{a69b}\u{a722}-\u{a76f}\u{a771}-\u{a787}",
    "\u{a78b}-\u{a78e}\u{ab70}-\u{abbf}\u{fb00}-\u{fb06}\u{fb13}-\u{fb17}\u{ff21}-\u{ff3a}\u{ff41}-\u{ff5a}",
    "\u{10400}-\u{1044f}\u{104b0}-\u{104d3}\u{104d8}-\u{104fb}\u{10c80}-\u{10cb2}\u{10cc0}-\u{10cf2}",
    "\u{118a0}-\u{118df}\u{1e900}-\u{1e943}]+",
);
const DEEPSEEK_PUNCTUATION: &str = "\\s?[!-/:-~\u{ff01}-\u{ff0f}\u{ff1a}-\u{ff5e}\u{2018}-\u{201f}\u{3000}-\u{3002}]+";
const DEEPSEEK_CJK: &str = "[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+";
const DEEPSEEK_V3_CJK: &str = "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+";
const DEEPSEEK_V3_PATTERN: &str = concat!(
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+",
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
);

/// How texts are split before merging, and what goes with it.
pub(super) struct Splitting {
    pub(super) pre_tokenizer: Value,
    pub(super) normalizer: Value,
    /// Whole words that are tokens are taken as they are.
    pub(super) ignore_merges: bool,
    pub(super) add_bos_by_default: bool,
}

/// How a vocabulary of the kind `pre` splits texts; the error says which kinds are known.
pub(super) fn splitting(pre: &str) -> Result<Splitting, String> {
    let plain = |pre_tokenizer: Value| Splitting {
        pre_tokenizer,
        normalizer: Value::Null,
        ignore_merges: false,
        add_bos_by_default: false,
    };
    let composed = |splitting: Splitting| Splitting { normalizer: json!({ "type": "NFC" }), ..splitting };
    Ok(match pre {
        "gpt-2" => plain(byte_level(true)),
        // GPT-NeoX's.
        "olmo" => composed(plain(byte_level(true))),
        "smollm" | "starcoder" | "refact" => plain(sequence(vec![single_digits(), byte_level(true)])),
        "default" => plain(sequence(vec![
            split(r"[\p{P}\$\+<=>\^~\|]+"),
            split(GPT2_PATTERN),
            split(r"\p{N}+"),
            split("[0-9][0-9][0-9]"),
            byte_level(false),
        ])),
        "llama-bpe" | "llama3" | "llama-v3" => {
            Splitting { ignore_merges: true, add_bos_by_default: true, ..plain(splits(&[LLAMA3_PATTERN])) }
        }
        "dbrx" | "smaug-bpe" => plain(splits(&[LLAMA3_PATTERN])),
        "qwen2" | "deepseek-r1-qwen" => composed(plain(splits(&[QWEN2_PATTERN]))),
        "gpt-4o" => plain(splits(&[GPT4O_PATTERN])),
        "kimi-k2" => plain(splits(&[KIMI_PATTERN])),
        "deepseek-llm" => plain(sequence(vec![
            split("[\r\n]"),
            split(DEEPSEEK_LETTERS),
            split(DEEPSEEK_PUNCTUATION),
            split("\\s+$"),
            split(DEEPSEEK_CJK),
            single_digits(),
            byte_level(false),
        ])),
        "deepseek-coder" => plain(sequence(vec![
            split("[\r\n]"),
            split("\\s?\\p{L}+"),
            split("\\s?\\p{P}+"),
            split(DEEPSEEK_CJK),
            single_digits(),
            byte_level(false),
        ])),
        "deepseek-v3" => plain(splits(&["\\p{N}{1,3}", DEEPSEEK_V3_CJK, DEEPSEEK_V3_PATTERN])),
        other => {
            return Err(format!(
                "its tokenizer splits texts the `{other}` way (tokenizer.ggml.pre), supported are default, dbrx, \
                 deepseek-coder, deepseek-llm, deepseek-v3, gpt-2, gpt-4o, kimi-k2, llama-bpe, olmo, qwen2, refact, \
                 smollm, starcoder"
            ));
        }
    })
}

fn byte_level(use_regex: bool) -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex })
}

fn single_digits() -> Value {
    json!({ "type": "Digits", "individual_digits": true })
}

fn split(pattern: &str) -> Value {
    json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false })
}

fn sequence(steps: Vec<Value>) -> Value {
    json!({ "type": "Sequence", "pretokenizers": steps })
}

/// One pattern after the other, then bytes.
fn splits(patterns: &[&str]) -> Value {
    sequence(patterns.iter().map(|pattern| split(pattern)).chain([byte_level(false)]).collect())
}

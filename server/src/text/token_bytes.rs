//! Which bytes a token stands for, and the assembly of token bytes into UTF-8 text.

use std::sync::LazyLock;

use serde_json::{Value, json};
use tokenizers::DecoderWrapper;

/// How the strings of a vocabulary stand for bytes, read off the tokenizer's decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenForm {
    /// Each char is one byte, in the printable alphabet of GPT-2.
    ByteLevel,
    /// `▁` is a space, `<0xAB>` one byte; the first space of a text may be dropped.
    SentencePiece { strip_first_space: bool },
    /// Anything else. Text of several tokens is known to the decoder alone; a single token is taken as it is, or with
    /// `▁` for spaces.
    Other { metaspace: bool },
}

impl TokenForm {
    pub(super) fn of(decoder: Option<&DecoderWrapper>) -> Self {
        let decoder = serde_json::to_value(decoder).unwrap_or_default();
        let steps = match decoder["type"].as_str() {
            Some("Sequence") => decoder["decoders"].as_array().cloned().unwrap_or_default(),
            Some(_) => vec![decoder],
            None => Vec::new(),
        };
        let types: Vec<&str> = steps.iter().filter_map(|step| step["type"].as_str()).collect();
        match types.as_slice() {
            ["ByteLevel"] => Self::ByteLevel,
            ["Replace", "ByteFallback", "Fuse"] if is_space_replace(&steps[0]) => {
                Self::SentencePiece { strip_first_space: false }
            }
            ["Replace", "ByteFallback", "Fuse", "Strip"]
                if is_space_replace(&steps[0]) && is_first_strip(&steps[3]) =>
            {
                Self::SentencePiece { strip_first_space: true }
            }
            _ => Self::Other { metaspace: types.contains(&"Metaspace") || steps.iter().any(is_space_replace) },
        }
    }

    /// The bytes of a token of the vocabulary proper (not of an added token).
    pub(super) fn bytes(self, token: &str) -> Vec<u8> {
        match self {
            Self::ByteLevel => byte_level_bytes(token),
            Self::SentencePiece { .. } => match byte_token(token) {
                Some(byte) => vec![byte],
                None => token.replace('▁', " ").into_bytes(),
            },
            Self::Other { metaspace: true } => token.replace('▁', " ").into_bytes(),
            Self::Other { metaspace: false } => token.as_bytes().to_vec(),
        }
    }
}

fn is_space_replace(step: &Value) -> bool {
    step["type"] == "Replace" && step["pattern"] == json!({"String": "▁"}) && step["content"] == " "
}

fn is_first_strip(step: &Value) -> bool {
    step["content"] == " " && step["start"] == 1 && step["stop"] == 0
}

/// `<0xAB>`, SentencePiece's spelling of a byte outside its vocabulary.
pub(super) fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// GPT-2's printable stand-ins: bytes that print keep their char, the others get chars from U+0100 on.
pub(super) static BYTE_CHARS: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut next_stand_in = 0x100_u32;
    std::array::from_fn(|byte| {
        let byte = u8::try_from(byte).expect("an index below 256");
        if matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) {
            return char::from(byte);
        }
        let stand_in = char::from_u32(next_stand_in).expect("68 chars from U+0100 on are not surrogates");
        next_stand_in += 1;
        stand_in
    })
});

/// The inverse of [`BYTE_CHARS`], indexed by code point; the largest stand-in is U+0143.
static CHAR_BYTES: LazyLock<[Option<u8>; 0x144]> = LazyLock::new(|| {
    let mut bytes = [None; 0x144];
    for (byte, char) in (0..=u8::MAX).zip(*BYTE_CHARS) {
        bytes[char as usize] = Some(byte);
    }
    bytes
});

/// A token with any char outside the alphabet stands for its own UTF-8, as in Hugging Face's decoder.
fn byte_level_bytes(token: &str) -> Vec<u8> {
    let byte = |char: char| CHAR_BYTES.get(char as usize).copied().flatten();
    token.chars().map(byte).collect::<Option<Vec<u8>>>().unwrap_or_else(|| token.as_bytes().to_vec())
}

/// What stands in the text for bytes that are not UTF-8.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Replacement {
    /// One U+FFFD per longest invalid piece, as `String::from_utf8_lossy`.
    PerPiece,
    /// One U+FFFD per byte, as Hugging Face's `ByteFallback`.
    PerByte,
}

/// Turns the bytes of successive tokens into text, holding back at most three bytes of an unfinished character.
#[derive(Debug)]
pub(super) struct TextAssembler {
    form: TokenForm,
    pending: Vec<u8>,
    /// The next char is the first of the whole text.
    at_start: bool,
}

impl TextAssembler {
    /// `None` where text cannot be assembled token by token from bytes.
    pub(super) fn new(form: TokenForm) -> Option<Self> {
        match form {
            TokenForm::ByteLevel | TokenForm::SentencePiece { .. } => {
                Some(Self { form, pending: Vec::new(), at_start: true })
            }
            TokenForm::Other { .. } => None,
        }
    }

    /// Adds one token, given as its string and bytes, and returns the text that is now decided.
    pub(super) fn push(&mut self, token: &str, bytes: &[u8]) -> String {
        let mut text = String::new();
        let byte_run = self.form == TokenForm::ByteLevel || byte_token(token).is_some();
        if !byte_run {
            self.flush_pending(&mut text);
        }
        self.pending.extend_from_slice(bytes);
        self.drain_decided(&mut text);
        self.strip_first(text)
    }

    /// The text of the held bytes, with U+FFFD for what never became a character.
    pub(super) fn finish(&mut self) -> String {
        let mut text = String::new();
        self.flush_pending(&mut text);
        self.strip_first(text)
    }

    fn drain_decided(&mut self, text: &mut String) {
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, tail) = rest.split_at(error.valid_up_to());
                    text.push_str(std::str::from_utf8(valid).expect("valid up to here"));
                    rest = tail;
                    let Some(invalid) = error.error_len() else { break };
                    push_replacement(text, self.replacement(), invalid);
                    rest = &rest[invalid..];
                }
            }
        }
        let decided = self.pending.len() - rest.len();
        self.pending.drain(..decided);
    }

    fn flush_pending(&mut self, text: &mut String) {
        if !self.pending.is_empty() {
            push_replacement(text, self.replacement(), self.pending.len());
            self.pending.clear();
        }
    }

    fn replacement(&self) -> Replacement {
        if self.form == TokenForm::ByteLevel { Replacement::PerPiece } else { Replacement::PerByte }
    }

    fn strip_first(&mut self, mut text: String) -> String {
        if self.at_start && !text.is_empty() {
            self.at_start = false;
            if self.form == (TokenForm::SentencePiece { strip_first_space: true }) && text.starts_with(' ') {
                text.remove(0);
            }
        }
        text
    }
}

fn push_replacement(text: &mut String, replacement: Replacement, num_bytes: usize) {
    let count = if replacement == Replacement::PerByte { num_bytes } else { 1 };
    text.extend(std::iter::repeat_n(char::REPLACEMENT_CHARACTER, count));
}

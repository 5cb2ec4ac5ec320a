//! What the engine gave for one choice, and its bytes. Log-probs keep their bits.

use std::sync::Arc;

use bytes::{BufMut as _, Bytes, BytesMut};

use crate::codec::BadValue;

/// A generated token with what the caller asked to know about it.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    pub token: u32,
    pub logprob: Option<f32>,
    /// The most likely tokens and their log-probs, best first.
    pub top: Vec<(u32, f32)>,
    /// A stop token: counted, never shown as text.
    pub is_stop: bool,
}

/// Log-probs of a prompt token given those before it.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptLogprob {
    pub token: u32,
    pub logprob: f32,
    pub top: Vec<(u32, f32)>,
}

/// Why a choice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// This stop token was sampled.
    Stop(u32),
    /// As many tokens as were asked for.
    Length,
    /// A stop string, found in the text of the tokens.
    Text,
}

/// One choice from its first token to its end.
#[derive(Clone, Debug, PartialEq)]
pub struct Recording {
    pub prompt_logprobs: Option<Arc<[PromptLogprob]>>,
    pub tokens: Vec<Token>,
    pub end: End,
}

const HAS_LOGPROB: u8 = 1;
const IS_STOP: u8 = 2;
const HAS_TOP: u8 = 4;

impl Recording {
    /// ```text
    /// recording  end, [stop token], prompt, tokens
    /// prompt     0, or 1 + count and { token, logprob, top } each
    /// tokens     count and { flags, token, [logprob], [top] } each
    /// top        count and { token, logprob } each
    /// ```
    /// Log-probs are the four bytes of an f32, little-endian; `flags` and `end` one byte; all else LEB128.
    pub(crate) fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(16 + 4 * self.tokens.len());
        match self.end {
            End::Stop(token) => {
                out.put_u8(0);
                put_number(&mut out, token.into());
            }
            End::Length => out.put_u8(1),
            End::Text => out.put_u8(2),
        }
        match &self.prompt_logprobs {
            None => put_number(&mut out, 0),
            Some(prompt) => {
                put_number(&mut out, prompt.len() as u64 + 1);
                for logprob in prompt.iter() {
                    put_number(&mut out, logprob.token.into());
                    out.put_f32_le(logprob.logprob);
                    put_top(&mut out, &logprob.top);
                }
            }
        }
        put_number(&mut out, self.tokens.len() as u64);
        for token in &self.tokens {
            put_token(&mut out, token);
        }
        out.freeze()
    }

    /// # Errors
    /// The bytes are not what [`Self::encode`] makes, to the last one. Memory is bounded by their number.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, BadValue> {
        let mut reader = Reader { bytes };
        let end = match reader.byte()? {
            0 => End::Stop(reader.id()?),
            1 => End::Length,
            2 => End::Text,
            _ => return Err(BadValue::Payload("unknown end")),
        };
        let prompt_logprobs = match reader.number()? {
            0 => None,
            count => Some(reader.list(count - 1, Reader::prompt_logprob)?.into()),
        };
        let num_tokens = reader.number()?;
        let tokens = reader.list(num_tokens, Reader::token)?;
        if !reader.bytes.is_empty() {
            return Err(BadValue::Payload("bytes after the end"));
        }
        Ok(Self { prompt_logprobs, tokens, end })
    }
}

fn put_token(out: &mut BytesMut, token: &Token) {
    let mut flags = 0;
    if token.logprob.is_some() {
        flags |= HAS_LOGPROB;
    }
    if token.is_stop {
        flags |= IS_STOP;
    }
    if !token.top.is_empty() {
        flags |= HAS_TOP;
    }
    out.put_u8(flags);
    put_number(out, token.token.into());
    if let Some(logprob) = token.logprob {
        out.put_f32_le(logprob);
    }
    if !token.top.is_empty() {
        put_top(out, &token.top);
    }
}

fn put_top(out: &mut BytesMut, top: &[(u32, f32)]) {
    put_number(out, top.len() as u64);
    for &(token, logprob) in top {
        put_number(out, token.into());
        out.put_f32_le(logprob);
    }
}

fn put_number(out: &mut BytesMut, mut number: u64) {
    while number >= 0x80 {
        out.put_u8(number as u8 | 0x80);
        number >>= 7;
    }
    out.put_u8(number as u8);
}

/// What is left to read.
struct Reader<'a> {
    bytes: &'a [u8],
}

impl Reader<'_> {
    fn byte(&mut self) -> Result<u8, BadValue> {
        let (&first, rest) = self.bytes.split_first().ok_or(BadValue::Payload("it ends early"))?;
        self.bytes = rest;
        Ok(first)
    }

    fn number(&mut self) -> Result<u64, BadValue> {
        let mut number = 0;
        for shift in (0..63).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err(BadValue::Payload("a number is too long"))
    }

    fn id(&mut self) -> Result<u32, BadValue> {
        u32::try_from(self.number()?).map_err(|_| BadValue::Payload("a token id is too large"))
    }

    fn float(&mut self) -> Result<f32, BadValue> {
        let (first, rest) = self.bytes.split_first_chunk().ok_or(BadValue::Payload("it ends early"))?;
        self.bytes = rest;
        Ok(f32::from_le_bytes(*first))
    }

    /// `count` items, each of which takes at least two bytes.
    fn list<T>(&mut self, count: u64, item: impl Fn(&mut Self) -> Result<T, BadValue>) -> Result<Vec<T>, BadValue> {
        if count > self.bytes.len() as u64 / 2 {
            return Err(BadValue::Payload("a count is too large"));
        }
        (0..count).map(|_| item(self)).collect()
    }

    fn top(&mut self) -> Result<Vec<(u32, f32)>, BadValue> {
        let count = self.number()?;
        self.list(count, |reader| Ok((reader.id()?, reader.float()?)))
    }

    fn prompt_logprob(&mut self) -> Result<PromptLogprob, BadValue> {
        Ok(PromptLogprob { token: self.id()?, logprob: self.float()?, top: self.top()? })
    }

    fn token(&mut self) -> Result<Token, BadValue> {
        let flags = self.byte()?;
        if flags & !(HAS_LOGPROB | IS_STOP | HAS_TOP) != 0 {
            return Err(BadValue::Payload("unknown flags"));
        }
        let token = self.id()?;
        let logprob = if flags & HAS_LOGPROB != 0 { Some(self.float()?) } else { None };
        let top = if flags & HAS_TOP != 0 { self.top()? } else { Vec::new() };
        Ok(Token { token, logprob, top, is_stop: flags & IS_STOP != 0 })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    fn floats() -> impl Strategy<Value = f32> {
        any::<u32>().prop_map(f32::from_bits)
    }

    fn tops() -> impl Strategy<Value = Vec<(u32, f32)>> {
        prop::collection::vec((any::<u32>(), floats()), 0..4)
    }

    fn tokens() -> impl Strategy<Value = Token> {
        (any::<u32>(), prop::option::of(floats()), tops(), any::<bool>())
            .prop_map(|(token, logprob, top, is_stop)| Token { token, logprob, top, is_stop })
    }

    fn ends() -> impl Strategy<Value = End> {
        prop_oneof![any::<u32>().prop_map(End::Stop), Just(End::Length), Just(End::Text)]
    }

    pub(crate) fn recordings() -> impl Strategy<Value = Recording> {
        let prompt =
            (any::<u32>(), floats(), tops()).prop_map(|(token, logprob, top)| PromptLogprob { token, logprob, top });
        let prompt = prop::option::of(prop::collection::vec(prompt, 0..6));
        (prompt, prop::collection::vec(tokens(), 0..20), ends()).prop_map(|(prompt, tokens, end)| Recording {
            prompt_logprobs: prompt.map(Into::into),
            tokens,
            end,
        })
    }

    proptest! {
        #[test]
        fn a_recording_comes_back_to_the_bit(recording in recordings()) {
            let bytes = recording.encode();
            let decoded = Recording::decode(&bytes).unwrap();
            // A NaN is not equal to itself: the bytes are.
            prop_assert_eq!(decoded.encode(), bytes.clone());
            prop_assert_eq!(decoded.tokens.len(), recording.tokens.len());
            prop_assert_eq!(decoded.end, recording.end);
            for (a, b) in decoded.tokens.iter().zip(&recording.tokens) {
                prop_assert_eq!((a.token, a.is_stop), (b.token, b.is_stop));
                prop_assert_eq!(a.logprob.map(f32::to_bits), b.logprob.map(f32::to_bits));
                let bits = |top: &[(u32, f32)]| top.iter().map(|t| (t.0, t.1.to_bits())).collect::<Vec<_>>();
                prop_assert_eq!(bits(&a.top), bits(&b.top));
            }
            for len in 0..bytes.len() {
                prop_assert!(Recording::decode(&bytes[..len]).is_err());
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(recording) = Recording::decode(&bytes) {
                prop_assert!(recording.tokens.len() <= bytes.len());
            }
        }
    }

    #[test]
    fn absurd_counts_are_refused_before_memory_is_taken() {
        let check = |bytes: &[u8]| assert!(Recording::decode(bytes).is_err(), "{bytes:?}");
        check(&[1, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]);
        check(&[1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]);
        check(&[0, 0xff, 0xff, 0xff, 0xff, 0x7f, 0, 0]);
        check(&[3, 0, 0]);
        check(&[1, 0, 0, 0]);
    }

    #[test]
    fn a_plain_token_takes_few_bytes() {
        let token = Token { token: 100, logprob: None, top: Vec::new(), is_stop: false };
        let recording = Recording { prompt_logprobs: None, tokens: vec![token; 64], end: End::Length };
        assert_eq!(recording.encode().len(), 1 + 1 + 1 + 64 * 2);
    }
}

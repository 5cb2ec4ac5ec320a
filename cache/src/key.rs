//! Content hashes: what a value is stored under, and which numerics made it.

use std::fmt;

/// Part of every key, so that versions of the stored format never meet: replicas of two versions may share one Redis.
const FORMAT: &str = "moesaic cache 1 ";

/// What a value is stored under.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key([u8; 32]);

/// Everything that decides the bits of a result beside the request: weights, formats, kernels, tokenizer, template. The caller
/// makes it; two processes whose fingerprints differ never read each other's values.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 32]);

impl Key {
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// 64 lower-case digits.
    pub fn to_hex(&self) -> String {
        hex(&self.0)
    }

    /// What [`Self::to_hex`] wrote.
    pub(crate) fn from_hex(text: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        let digit = |digit: u8| match digit {
            b'0'..=b'9' => Some(digit - b'0'),
            b'a'..=b'f' => Some(digit - b'a' + 10),
            _ => None,
        };
        if text.len() != 2 * bytes.len() {
            return None;
        }
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Some(Self(bytes))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({})", hex(&self.0))
    }
}

impl Fingerprint {
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// 64 lower-case digits.
    pub fn to_hex(&self) -> String {
        hex(&self.0)
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({})", hex(&self.0))
    }
}

/// Builds a hash out of named fields. Names and values carry their lengths, so that no two lists of fields read the same.
#[derive(Clone, Debug)]
pub struct Digest {
    hasher: blake3::Hasher,
}

impl Digest {
    /// `domain` says what is hashed; hashes of different domains never meet.
    pub fn new(domain: &str) -> Self {
        let mut digest = Self { hasher: blake3::Hasher::new() };
        digest.part(FORMAT.as_bytes());
        digest.part(domain.as_bytes());
        digest
    }

    pub fn field(&mut self, name: &str, value: &[u8]) -> &mut Self {
        self.part(name.as_bytes());
        self.part(value);
        self
    }

    pub fn text(&mut self, name: &str, value: &str) -> &mut Self {
        self.field(name, value.as_bytes())
    }

    pub fn number(&mut self, name: &str, value: u64) -> &mut Self {
        self.field(name, &value.to_le_bytes())
    }

    /// The bits of `value`: -0.0 is not 0.0, and a NaN equals itself.
    pub fn float(&mut self, name: &str, value: f32) -> &mut Self {
        self.field(name, &value.to_bits().to_le_bytes())
    }

    pub fn numbers(&mut self, name: &str, values: &[u32]) -> &mut Self {
        self.part(name.as_bytes());
        self.hasher.update(&(values.len() as u64 * 4).to_le_bytes());
        let mut block = [0; 1024];
        for values in values.chunks(block.len() / 4) {
            for (bytes, value) in block.chunks_exact_mut(4).zip(values) {
                bytes.copy_from_slice(&value.to_le_bytes());
            }
            self.hasher.update(&block[..values.len() * 4]);
        }
        self
    }

    pub fn fingerprint_field(&mut self, fingerprint: &Fingerprint) -> &mut Self {
        self.field("fingerprint", &fingerprint.0)
    }

    pub fn key(&self) -> Key {
        Key(self.bytes())
    }

    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint(self.bytes())
    }

    fn bytes(&self) -> [u8; 32] {
        self.hasher.finalize().into()
    }

    fn part(&mut self, bytes: &[u8]) {
        self.hasher.update(&(bytes.len() as u64).to_le_bytes());
        self.hasher.update(bytes);
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        write!(text, "{byte:02x}").expect("a string takes what is written to it");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn of(domain: &str, fields: &[(String, Vec<u8>)]) -> Key {
        let mut digest = Digest::new(domain);
        for (name, value) in fields {
            digest.field(name, value);
        }
        digest.key()
    }

    #[test]
    fn fields_cannot_be_shifted_into_each_other() {
        let field = |name: &str, value: &str| (name.to_owned(), value.as_bytes().to_vec());
        let lists = [
            vec![],
            vec![field("", "")],
            vec![field("a", "b")],
            vec![field("ab", "")],
            vec![field("", "ab")],
            vec![field("a", ""), field("b", "")],
            vec![field("b", ""), field("a", "")],
            vec![field("a", ""), field("", "b")],
        ];
        let keys: HashSet<_> = lists.iter().map(|fields| of("d", fields)).collect();
        assert_eq!(keys.len(), lists.len());
        assert_ne!(of("d", &[]), of("e", &[]));
    }

    #[test]
    fn numbers_hash_as_their_bytes_however_many() {
        for count in [0, 1, 255, 256, 257, 1000] {
            let values: Vec<u32> = (0..count).map(|i: u32| i.wrapping_mul(0x0101_0101)).collect();
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            assert_eq!(Digest::new("d").numbers("n", &values).key(), Digest::new("d").field("n", &bytes).key());
        }
    }

    #[test]
    fn hexadecimal_goes_both_ways() {
        let key = Digest::new("d").key();
        assert_eq!(Key::from_hex(&key.to_hex()), Some(key));
        for text in ["", "0", &"0".repeat(63), &"0".repeat(66), &"g".repeat(64), &"A".repeat(64)] {
            assert_eq!(Key::from_hex(text), None, "{text}");
        }
    }

    #[test]
    fn floats_are_compared_by_their_bits() {
        let key = |value| Digest::new("d").float("f", value).key();
        assert_ne!(key(0.0), key(-0.0));
        assert_eq!(key(f32::NAN), key(f32::NAN));
    }

    proptest! {
        #[test]
        fn unlike_lists_of_fields_have_unlike_keys(
            a in prop::collection::vec(("[a-c]{0,2}", prop::collection::vec(0u8..3, 0..3)), 0..4),
            b in prop::collection::vec(("[a-c]{0,2}", prop::collection::vec(0u8..3, 0..3)), 0..4),
        ) {
            prop_assert_eq!(of("d", &a) == of("d", &b), a == b);
        }
    }
}

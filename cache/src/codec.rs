//! The envelope of values that leave the process: what is in a file or in Redis may be cut, flipped, moved or another program's.
//!
//! ```text
//! 0   magic    "MSC1"
//! 4   version  u16
//! 6   kind     u8
//! 7   zero     u8
//! 8   expires  u64   Unix milliseconds
//! 16  fingerprint    32 bytes
//! 48  key            32 bytes
//! 80  length   u64   of the payload
//! 88  checksum       32 bytes, blake3 of all the rest
//! 120 payload
//! ```
//! Numbers are little-endian.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{BufMut as _, Bytes, BytesMut};

use crate::store::{Address, MAX_TTL, Value};

/// Bytes before the payload.
pub const HEADER_BYTES: usize = 120;

const MAGIC: &[u8; 4] = b"MSC1";
/// Of the envelope and of what is in it.
const VERSION: u16 = 2;
const CHECKSUM: std::ops::Range<usize> = 88..120;

/// Why stored bytes are not the value that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadValue {
    #[error("{len} bytes, the header says {expected}")]
    Truncated { expected: u64, len: usize },
    #[error("not a value of this cache")]
    Magic,
    #[error("format version {0}, this build reads {VERSION}")]
    Version(u16),
    #[error("the checksum does not match")]
    Checksum,
    #[error("kind {found}, asked for {expected}")]
    Kind { expected: u8, found: u8 },
    #[error("stored under another key")]
    Key,
    #[error("made by other numerics")]
    Fingerprint,
    #[error("unreadable payload: {0}")]
    Payload(&'static str),
}

impl BadValue {
    /// The label of metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Truncated { .. } => "truncated",
            Self::Magic => "magic",
            Self::Version(_) => "version",
            Self::Checksum => "checksum",
            Self::Kind { .. } => "kind",
            Self::Key => "key",
            Self::Fingerprint => "fingerprint",
            Self::Payload(_) => "payload",
        }
    }
}

/// What an envelope held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    pub payload: Bytes,
    /// What is left of its lifetime; zero once it is over.
    pub ttl: Duration,
}

/// The bytes to store for `value` at `address`.
pub fn seal(address: &Address, value: &Value, now: SystemTime) -> Bytes {
    let mut bytes = BytesMut::with_capacity(HEADER_BYTES + value.payload.len());
    bytes.put_slice(&header(address, value, now));
    bytes.put_slice(&value.payload);
    bytes.freeze()
}

/// What is stored before the payload of `value`.
pub(crate) fn header(address: &Address, value: &Value, now: SystemTime) -> [u8; HEADER_BYTES] {
    let expires = unix_millis(now).saturating_add(u64::try_from(value.ttl.as_millis()).unwrap_or(u64::MAX));
    let mut header = [0; HEADER_BYTES];
    let mut fields = &mut header[..];
    fields.put_slice(MAGIC);
    fields.put_u16_le(VERSION);
    fields.put_u8(address.kind.code());
    fields.put_u8(0);
    fields.put_u64_le(expires);
    fields.put_slice(address.fingerprint.as_bytes());
    fields.put_slice(address.key.as_bytes());
    fields.put_u64_le(value.payload.len() as u64);
    let checksum = checksum(&header[..CHECKSUM.start], &value.payload);
    header[CHECKSUM].copy_from_slice(&checksum);
    header
}

/// The value in `bytes`.
///
/// # Errors
/// They are broken, of another format, or not the value of `address`.
pub fn open(address: &Address, bytes: &Bytes, now: SystemTime) -> Result<Opened, BadValue> {
    let header: &[u8; HEADER_BYTES] =
        bytes.first_chunk().ok_or(BadValue::Truncated { expected: HEADER_BYTES as u64, len: bytes.len() })?;
    if &header[..4] != MAGIC {
        return Err(BadValue::Magic);
    }
    let version = u16::from_le_bytes([header[4], header[5]]);
    if version != VERSION {
        return Err(BadValue::Version(version));
    }
    let payload = bytes.slice(HEADER_BYTES..);
    let length = number(header, 80);
    if length != payload.len() as u64 {
        return Err(BadValue::Truncated { expected: length.saturating_add(HEADER_BYTES as u64), len: bytes.len() });
    }
    if header[CHECKSUM] != checksum(&header[..CHECKSUM.start], &payload) {
        return Err(BadValue::Checksum);
    }
    if header[6] != address.kind.code() {
        return Err(BadValue::Kind { expected: address.kind.code(), found: header[6] });
    }
    if header[48..80] != address.key.as_bytes()[..] {
        return Err(BadValue::Key);
    }
    if header[16..48] != address.fingerprint.as_bytes()[..] {
        return Err(BadValue::Fingerprint);
    }
    // A clock that was set back must not make a value live longer than any may.
    let ttl = Duration::from_millis(number(header, 8).saturating_sub(unix_millis(now))).min(MAX_TTL);
    Ok(Opened { payload, ttl })
}

fn number(header: &[u8; HEADER_BYTES], at: usize) -> u64 {
    let bytes = header[at..].first_chunk().expect("fields lie within the header");
    u64::from_le_bytes(*bytes)
}

fn checksum(header: &[u8], payload: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(header);
    hasher.update(payload);
    hasher.finalize().into()
}

fn unix_millis(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::key::{Fingerprint, Key};
    use crate::store::Kind;

    const HOUR: Duration = Duration::from_secs(3600);

    fn address() -> Address {
        Address { kind: Kind::Output, key: Key::from_bytes([3; 32]), fingerprint: Fingerprint::from_bytes([4; 32]) }
    }

    fn sealed(payload: &'static [u8]) -> Bytes {
        seal(&address(), &Value { payload: Bytes::from_static(payload), ttl: HOUR }, UNIX_EPOCH)
    }

    #[test]
    fn what_was_sealed_opens_with_what_is_left_of_its_life() {
        let later = UNIX_EPOCH + Duration::from_secs(600);
        let opened = open(&address(), &sealed(b"abc"), later).unwrap();
        assert_eq!((&opened.payload[..], opened.ttl), (&b"abc"[..], Duration::from_secs(3000)));
        assert_eq!(open(&address(), &sealed(b""), UNIX_EPOCH + 2 * HOUR).unwrap().ttl, Duration::ZERO);
    }

    #[test]
    fn values_of_others_are_told_apart() {
        let check = |address: Address, expected: &BadValue| {
            assert_eq!(&open(&address, &sealed(b"abc"), UNIX_EPOCH).unwrap_err(), expected);
        };
        check(Address { kind: Kind::Kv, ..address() }, &BadValue::Kind { expected: 3, found: 1 });
        check(Address { key: Key::from_bytes([9; 32]), ..address() }, &BadValue::Key);
        check(Address { fingerprint: Fingerprint::from_bytes([9; 32]), ..address() }, &BadValue::Fingerprint);
    }

    #[test]
    fn a_flip_of_any_bit_is_refused() {
        let whole = sealed(b"some payload");
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let bad = open(&address(), &bytes.into(), UNIX_EPOCH).unwrap_err();
            let expected = match bit / 8 {
                0..4 => "magic",
                4..6 => "version",
                80..88 => "truncated",
                _ => "checksum",
            };
            assert_eq!(bad.reason(), expected, "bit {bit}");
        }
    }

    #[test]
    fn a_cut_at_any_byte_and_a_longer_value_are_refused() {
        let whole = sealed(b"some payload");
        for len in 0..whole.len() {
            assert_eq!(open(&address(), &whole.slice(..len), UNIX_EPOCH).unwrap_err().reason(), "truncated", "{len}");
        }
        let mut longer = whole.to_vec();
        longer.push(0);
        assert_eq!(open(&address(), &longer.into(), UNIX_EPOCH).unwrap_err().reason(), "truncated");
    }

    proptest! {
        #[test]
        fn any_payload_comes_back(payload in prop::collection::vec(any::<u8>(), 0..2000), millis in 1u64..10_000_000) {
            let value = Value { payload: payload.into(), ttl: Duration::from_millis(millis) };
            let opened = open(&address(), &seal(&address(), &value, UNIX_EPOCH), UNIX_EPOCH).unwrap();
            prop_assert_eq!(opened, Opened { payload: value.payload, ttl: value.ttl });
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(open(&address(), &bytes.into(), UNIX_EPOCH).is_err());
        }
    }
}

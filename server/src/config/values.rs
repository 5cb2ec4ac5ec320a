//! Types of single settings: how they are written, read and shown.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use clap::ValueEnum;
use engine::{
    BlockCoding, DeviceChoice, ExpertMemory, ExpertPolicy, ExpertWarmup, KvDtype, ReadMode, WeightDtype, WeightQuant,
};
use serde::{Deserialize, Serialize};

/// `--dtype`.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum WeightType {
    Auto,
    F32,
    Bf16,
    F16,
}

impl From<WeightType> for WeightDtype {
    fn from(dtype: WeightType) -> Self {
        match dtype {
            WeightType::Auto => Self::Auto,
            WeightType::F32 => Self::F32,
            WeightType::Bf16 => Self::Bf16,
            WeightType::F16 => Self::F16,
        }
    }
}

/// `--quant`.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum QuantType {
    None,
    Int8,
    Int4,
}

impl From<QuantType> for WeightQuant {
    fn from(quant: QuantType) -> Self {
        match quant {
            QuantType::None => Self::None,
            QuantType::Int8 => Self::Int8,
            QuantType::Int4 => Self::Int4,
        }
    }
}

/// `--kv-cache-dtype`.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum KvType {
    Auto,
    F32,
    Bf16,
}

impl From<KvType> for KvDtype {
    fn from(dtype: KvType) -> Self {
        match dtype {
            KvType::Auto => Self::Auto,
            KvType::F32 => Self::F32,
            KvType::Bf16 => Self::Bf16,
        }
    }
}

/// `--kv-tier-dtype`.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum KvTierType {
    Auto,
    Int8,
}

impl From<KvTierType> for BlockCoding {
    fn from(dtype: KvTierType) -> Self {
        match dtype {
            KvTierType::Auto => Self::Exact,
            KvTierType::Int8 => Self::Int8,
        }
    }
}

/// `--expert-policy`.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum PolicyType {
    /// What was used longest ago goes
    Lru,
    /// What was used least often goes
    Lfu,
    /// Frequency and recency together
    Lfru,
    /// The hottest of --expert-profile stay whatever happens, the others as in lfru
    Pinned,
}

impl From<PolicyType> for ExpertPolicy {
    fn from(policy: PolicyType) -> Self {
        match policy {
            PolicyType::Lru => Self::Lru,
            PolicyType::Lfu => Self::Lfu,
            PolicyType::Lfru => Self::Lfru,
            PolicyType::Pinned => Self::Pinned,
        }
    }
}

/// `--expert-warmup`.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum WarmupType {
    /// As many as there is room for, those that --expert-profile saw in use before the others
    All,
    /// Those that --expert-profile saw in use, the hottest first
    Hot,
    /// Each when it is needed
    None,
}

impl From<WarmupType> for ExpertWarmup {
    fn from(warmup: WarmupType) -> Self {
        match warmup {
            WarmupType::All => Self::All,
            WarmupType::Hot => Self::Hot,
            WarmupType::None => Self::None,
        }
    }
}

/// `--expert-read`.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum ReadType {
    /// Direct where free memory has no room for all experts and the file system can, else cached
    Auto,
    /// Through the page cache
    Cached,
    /// From the disk into place
    Direct,
}

impl ReadType {
    /// `None` leaves it to the engine.
    pub fn mode(self) -> Option<ReadMode> {
        match self {
            Self::Auto => None,
            Self::Cached => Some(ReadMode::Cached),
            Self::Direct => Some(ReadMode::Direct),
        }
    }
}

/// `--device`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceName(pub DeviceChoice);

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.trim().parse().map(Self)
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de> Deserialize<'de> for DeviceName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for DeviceName {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// `--isa`.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum IsaType {
    Auto,
    Amx,
    Avx512,
    Avx2,
    Portable,
}

impl IsaType {
    /// The name that the kernels know the set by; `None` leaves the choice to them.
    pub fn name(self) -> Option<&'static str> {
        match self {
            Self::Auto => None,
            Self::Amx => Some("amx"),
            Self::Avx512 => Some("avx512"),
            Self::Avx2 => Some("avx2"),
            Self::Portable => Some("portable"),
        }
    }
}

/// `--log-format`.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

/// How far down a cache goes: `--output-cache`, `--kv-tier`. Above the deepest tier it has each that has its setting.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, PartialOrd, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DeepestTier {
    Off,
    Memory,
    /// Memory, where there is some, over disk.
    Disk,
    /// Memory and disk, where there are some, over Redis.
    Redis,
}

/// A value that is never shown.
#[derive(Clone, Deserialize, PartialEq, Eq)]
pub struct Secret(pub(super) String);

impl Secret {
    /// The bytes to compare with.
    pub fn expose(&self) -> &[u8] {
        self.0.as_bytes()
    }

    pub fn expose_text(&self) -> &str {
        &self.0
    }

    pub(super) fn is_visible_ascii(&self) -> bool {
        !self.0.is_empty() && self.0.bytes().all(|byte| byte.is_ascii_graphic())
    }
}

impl FromStr for Secret {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str("***")
    }
}

/// A number of bytes: `1048576`, `1MiB`, `2GiB`, `1.5GB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteSize(pub u64);

const BYTE_UNITS: [(&str, u64); 10] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1_000),
    ("kB", 1_000),
    ("B", 1),
];

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let (number, unit) = BYTE_UNITS
            .iter()
            .find_map(|(suffix, unit)| text.strip_suffix(suffix).map(|number| (number.trim(), *unit)))
            .unwrap_or((text, 1));
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(unit).map(Self).ok_or_else(|| format!("`{text}` is more than 2^64 bytes"));
        }
        match number.parse::<f64>() {
            Ok(value) if value.is_finite() && value >= 0.0 && value * (unit as f64) < u64::MAX as f64 => {
                let bytes = value * unit as f64;
                // A part of a byte alone is meant as something else; 1.1 KiB are 1126 bytes and a part.
                match bytes.fract() != 0.0 && (unit == 1 || bytes < 1.0) {
                    true => Err(format!("`{text}` is not a whole number of bytes")),
                    false => Ok(Self(bytes as u64)),
                }
            }
            _ => Err(format!("`{text}` is not a number of bytes such as 8388608, 8MiB or 2GiB")),
        }
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = BYTE_UNITS[..4].iter().find(|(_, unit)| self.0 >= *unit && self.0.is_multiple_of(*unit));
        match exact {
            Some((suffix, unit)) => write!(f, "{}{suffix}", self.0 / unit),
            None => write!(f, "{}", self.0),
        }
    }
}

/// Of the bytes of all experts: a percentage, or a number of bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ExpertShare {
    Percent(f64),
    Bytes(ByteSize),
}

impl From<ExpertShare> for ExpertMemory {
    fn from(share: ExpertShare) -> Self {
        match share {
            ExpertShare::Percent(percent) => Self::Percent(percent),
            ExpertShare::Bytes(bytes) => Self::Bytes(bytes.0),
        }
    }
}

impl FromStr for ExpertShare {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some(number) = text.trim().strip_suffix('%') else {
            let or_share = |error| format!("{error}, nor a percentage such as 50%");
            return text.parse().map(Self::Bytes).map_err(or_share);
        };
        match number.trim().parse::<f64>() {
            Ok(percent) if (0.0..=100.0).contains(&percent) => Ok(Self::Percent(percent)),
            _ => Err(format!("`{text}` is not a percentage from 0% to 100%")),
        }
    }
}

impl fmt::Display for ExpertShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Percent(percent) => write!(f, "{percent}%"),
            Self::Bytes(bytes) => bytes.fmt(f),
        }
    }
}

/// A time span in seconds, fractions allowed: `600`, `0.5`.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Seconds(pub f64);

impl Seconds {
    pub fn duration(self) -> Duration {
        Duration::from_secs_f64(self.0)
    }
}

impl FromStr for Seconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.trim().strip_suffix('s').unwrap_or(text.trim());
        match number.parse::<f64>() {
            // A century: beyond it `Instant` arithmetic may overflow.
            Ok(value) if (0.0..=3_153_600_000.0).contains(&value) => Ok(Self(value)),
            _ => Err(format!("`{text}` is not a number of seconds")),
        }
    }
}

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A TOML or JSON value that may be written as a number or as a text.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a number or a text")]
enum NumberOrText {
    Integer(u64),
    Float(f64),
    Text(String),
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match NumberOrText::deserialize(deserializer)? {
            NumberOrText::Integer(bytes) => Ok(Self(bytes)),
            NumberOrText::Float(value) => value.to_string().parse().map_err(serde::de::Error::custom),
            NumberOrText::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

impl<'de> Deserialize<'de> for ExpertShare {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = match NumberOrText::deserialize(deserializer)? {
            NumberOrText::Integer(bytes) => return Ok(Self::Bytes(ByteSize(bytes))),
            NumberOrText::Float(value) => value.to_string(),
            NumberOrText::Text(text) => text,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for ExpertShare {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Seconds {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = match NumberOrText::deserialize(deserializer)? {
            NumberOrText::Integer(value) => value.to_string(),
            NumberOrText::Float(value) => value.to_string(),
            NumberOrText::Text(text) => text,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for ByteSize {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for Seconds {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.0)
    }
}

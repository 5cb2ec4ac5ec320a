//! What a GGUF file is made of: metadata values, tensor types, tensor infos, and the checked cursor that reads them.

use kernels::block_format::BlockFormat;

/// Values of one file's metadata, array elements included: far above any vocabulary, far below the memory of a machine.
const MAX_VALUES: u64 = 1 << 23;
/// Arrays of arrays deeper than this do not occur.
const MAX_ARRAY_DEPTH: usize = 4;

/// A metadata value. The integer and float widths of the file are widened: nothing here depends on them.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufValue {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(String),
    Array(Vec<GgufValue>),
}

impl GgufValue {
    /// A non-negative integer of any stored width.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::Unsigned(value) => Some(value),
            Self::Signed(value) => u64::try_from(value).ok(),
            _ => None,
        }
    }

    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::Float(value) => Some(value),
            Self::Unsigned(value) => Some(value as f64),
            Self::Signed(value) => Some(value as f64),
            _ => None,
        }
    }

    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Self::Bool(value) => Some(value),
            _ => None,
        }
    }

    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(value) => Some(value),
            _ => None,
        }
    }

    pub fn as_array(&self) -> Option<&[GgufValue]> {
        match self {
            Self::Array(values) => Some(values),
            _ => None,
        }
    }
}

/// How a tensor is stored; the numbers are ggml's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgmlType {
    F32,
    F16,
    BF16,
    Block(BlockFormat),
    /// A type of ggml's that is not read here, kept so that the other tensors of the file stay readable.
    Other(u32),
}

impl GgmlType {
    pub(super) fn from_number(number: u32) -> Self {
        match number {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Block(BlockFormat::Q4_0),
            3 => Self::Block(BlockFormat::Q4_1),
            6 => Self::Block(BlockFormat::Q5_0),
            7 => Self::Block(BlockFormat::Q5_1),
            8 => Self::Block(BlockFormat::Q8_0),
            12 => Self::Block(BlockFormat::Q4K),
            13 => Self::Block(BlockFormat::Q5K),
            14 => Self::Block(BlockFormat::Q6K),
            30 => Self::BF16,
            39 => Self::Block(BlockFormat::Mxfp4),
            other => Self::Other(other),
        }
    }

    /// Elements and bytes of the smallest unit of storage; `None` for types not read here.
    pub(super) fn unit(self) -> Option<(u64, u64)> {
        match self {
            Self::F32 => Some((1, 4)),
            Self::F16 | Self::BF16 => Some((1, 2)),
            Self::Block(format) => Some((format.block_len() as u64, format.block_bytes() as u64)),
            Self::Other(_) => None,
        }
    }
}

impl std::fmt::Display for GgmlType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Names of ggml's other types, so that an error says what the user knows the file by.
        const NAMES: [(u32, &str); 17] = [
            (9, "Q8_1"),
            (10, "Q2_K"),
            (11, "Q3_K"),
            (15, "Q8_K"),
            (16, "IQ2_XXS"),
            (17, "IQ2_XS"),
            (18, "IQ3_XXS"),
            (19, "IQ1_S"),
            (20, "IQ4_NL"),
            (21, "IQ3_S"),
            (22, "IQ2_S"),
            (23, "IQ4_XS"),
            (28, "F64"),
            (29, "IQ1_M"),
            (34, "TQ1_0"),
            (35, "TQ2_0"),
            (40, "NVFP4"),
        ];
        match self {
            Self::F32 => f.write_str("F32"),
            Self::F16 => f.write_str("F16"),
            Self::BF16 => f.write_str("BF16"),
            Self::Block(format) => f.write_str(format.name()),
            Self::Other(number) => match NAMES.iter().find(|(known, _)| known == number) {
                Some((_, name)) => f.write_str(name),
                None => write!(f, "ggml type {number}"),
            },
        }
    }
}

/// Where one tensor lies and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufTensor {
    /// Row-major, outermost dimension first (the file stores the reverse): `[rows, cols]`.
    pub shape: Vec<usize>,
    pub ggml_type: GgmlType,
    /// Product of `shape`.
    pub num_elements: usize,
    /// From the start of the file.
    pub(super) offset: usize,
    /// 0 for types that are not read here.
    pub(super) num_bytes: usize,
}

/// A read position in a file's bytes. Every error names the field and the byte it was read at.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    values_left: u64,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0, values_left: MAX_VALUES }
    }

    pub(super) fn position(&self) -> usize {
        self.at
    }

    fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    pub(super) fn take(&mut self, count: u64, field: &str) -> Result<&'a [u8], String> {
        let count = usize::try_from(count).ok().filter(|&count| count <= self.remaining()).ok_or_else(|| {
            format!("{field} at byte {} needs {count} bytes, the file has {} left", self.at, self.remaining())
        })?;
        let taken = &self.bytes[self.at..self.at + count];
        self.at += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, field: &str) -> Result<[u8; N], String> {
        Ok(self.take(N as u64, field)?.try_into().expect("take returns as many bytes as asked for"))
    }

    pub(super) fn u32(&mut self, field: &str) -> Result<u32, String> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, field: &str) -> Result<u64, String> {
        self.array(field).map(u64::from_le_bytes)
    }

    pub(super) fn string(&mut self, field: &str) -> Result<String, String> {
        let at = self.at;
        let length = self.u64(field)?;
        let bytes = self.take(length, field)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| format!("{field} at byte {at} is not UTF-8"))
    }

    /// A value of the type whose number comes first.
    pub(super) fn typed_value(&mut self, field: &str) -> Result<GgufValue, String> {
        let value_type = self.u32(field)?;
        self.value(value_type, field, 0)
    }

    fn value(&mut self, value_type: u32, field: &str, depth: usize) -> Result<GgufValue, String> {
        self.values_left = self
            .values_left
            .checked_sub(1)
            .ok_or_else(|| format!("{field}: the metadata has more than {MAX_VALUES} values"))?;
        Ok(match value_type {
            0 => GgufValue::Unsigned(self.array::<1>(field)?[0].into()),
            1 => GgufValue::Signed(i8::from_le_bytes(self.array(field)?).into()),
            2 => GgufValue::Unsigned(u16::from_le_bytes(self.array(field)?).into()),
            3 => GgufValue::Signed(i16::from_le_bytes(self.array(field)?).into()),
            4 => GgufValue::Unsigned(self.u32(field)?.into()),
            5 => GgufValue::Signed(i32::from_le_bytes(self.array(field)?).into()),
            6 => GgufValue::Float(f32::from_le_bytes(self.array(field)?).into()),
            7 => match self.array::<1>(field)?[0] {
                0 => GgufValue::Bool(false),
                1 => GgufValue::Bool(true),
                other => return Err(format!("{field} is a bool of value {other}")),
            },
            8 => GgufValue::String(self.string(field)?),
            9 => self.array_value(field, depth)?,
            10 => GgufValue::Unsigned(self.u64(field)?),
            11 => GgufValue::Signed(i64::from_le_bytes(self.array(field)?)),
            12 => GgufValue::Float(f64::from_le_bytes(self.array(field)?)),
            other => return Err(format!("{field} has the unknown value type {other}")),
        })
    }

    fn array_value(&mut self, field: &str, depth: usize) -> Result<GgufValue, String> {
        if depth == MAX_ARRAY_DEPTH {
            return Err(format!("{field} nests arrays deeper than {MAX_ARRAY_DEPTH}"));
        }
        let element_type = self.u32(field)?;
        let length = self.u64(field)?;
        // Every element takes at least a byte, so a longer array cannot be true and must not be allocated for.
        if length > self.remaining() as u64 || length > self.values_left {
            return Err(format!("{field} claims {length} elements, the file has {} bytes left", self.remaining()));
        }
        let mut values = Vec::new();
        for _ in 0..length {
            values.push(self.value(element_type, field, depth + 1)?);
        }
        Ok(GgufValue::Array(values))
    }
}

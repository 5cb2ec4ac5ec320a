//! Weights of hot ops: a format, a shape, and bytes that are owned, lie in a mapped file, or are on a device.

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use candle_core::Device;
#[cfg(feature = "cuda")]
use candle_core::cuda_backend::CudaDevice;
#[cfg(feature = "cuda")]
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::check;
#[cfg(feature = "cuda")]
use crate::cuda::memory::{Address, read, upload};
use crate::error::{KernelError, Result};
use crate::mapped_file::MappedFile;
use crate::memory::{AlignedBytes, Plain, is_aligned, view, view_mut};
use crate::quant::{self, GroupRow, Layout, QuantFormat};
use crate::range_file::RangeBytes;

const OP: &str = "weight";

/// Where quantized weights start: a cache line, which is also a row of an AMX tile.
const QUANT_ALIGNMENT: usize = 64;

/// How the numbers of a weight are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    F32,
    F16,
    Bf16,
    Quantized(QuantFormat),
}

impl WeightFormat {
    /// Bytes of a `[rows, cols]` weight.
    pub fn bytes_for(self, rows: usize, cols: usize) -> usize {
        match self {
            Self::F32 => rows * cols * 4,
            Self::F16 | Self::Bf16 => rows * cols * 2,
            Self::Quantized(format) => Layout::new(format, cols).num_bytes(rows),
        }
    }

    /// The name used in configuration and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Quantized(format) => format.name(),
        }
    }
}

#[derive(Clone)]
enum Bytes {
    Owned(Arc<AlignedBytes>),
    Read(Arc<RangeBytes>),
    Mapped {
        file: Arc<MappedFile>,
        offset: usize,
    },
    #[cfg(feature = "cuda")]
    Cuda(Arc<DeviceBytes>),
}

#[cfg(feature = "cuda")]
struct DeviceBytes {
    device: CudaDevice,
    bytes: CudaSlice<u8>,
}

/// A `[rows, cols]` matrix: `rows` outputs of `cols` inputs each, row-major or, where quantized, in panels of rows. Cloning
/// shares the bytes.
///
/// One on a device is for ops there. The host does not have its bytes: what reads them fails or, where it cannot, panics;
/// [`Self::to_device`] brings them back.
#[derive(Clone)]
pub struct PackedWeight {
    format: WeightFormat,
    rows: usize,
    cols: usize,
    bytes: Bytes,
}

/// The numbers of a weight in their stored type.
pub(crate) enum WeightView<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
    Quantized(Layout, &'a [u8]),
}

impl PackedWeight {
    /// Copies little-endian numbers in row-major order, or what [`Self::as_bytes`] of a quantized weight gave. Fails if
    /// the bytes are not exactly as many as the format takes.
    pub fn from_bytes(format: WeightFormat, rows: usize, cols: usize, bytes: &[u8]) -> Result<Self> {
        check::length(OP, "number of bytes", bytes.len(), num_bytes(format, rows, cols)?)?;
        let mut owned = AlignedBytes::zeroed(bytes.len());
        owned.as_mut_slice().copy_from_slice(bytes);
        Ok(Self::owned(format, rows, cols, owned))
    }

    /// Rounds numbers to the format (to nearest, ties to even), or quantizes them. Fails if there are not exactly
    /// `rows * cols`, and where one to quantize is no number.
    pub fn from_f32(format: WeightFormat, rows: usize, cols: usize, values: &[f32]) -> Result<Self> {
        let bytes = num_bytes(format, rows, cols)?;
        check::length(OP, "number of values", values.len(), rows * cols)?;
        let mut owned = AlignedBytes::zeroed(bytes);
        convert_into(format, cols, values, owned.as_mut_slice())?;
        Ok(Self::owned(format, rows, cols, owned))
    }

    /// Packs codes and scales that exist already: `fill(row_idx, row)` sets every field of a row. Rows are asked for in
    /// any order, from several threads. Fails on a scale that is no number, or a group that no kernel knows.
    pub fn from_groups(
        format: QuantFormat,
        rows: usize,
        cols: usize,
        fill: impl Fn(usize, &mut GroupRow) + Sync,
    ) -> Result<Self> {
        let whole = WeightFormat::Quantized(format);
        let mut owned = AlignedBytes::zeroed(num_bytes(whole, rows, cols)?);
        quant::pack(&Layout::new(format, cols), rows, owned.as_mut_slice(), fill)?;
        Ok(Self::owned(whole, rows, cols, owned))
    }

    /// Borrows a range of a mapped file that starts at byte `offset`. A range that is not aligned to its numbers is
    /// copied. Fails if it does not lie inside the file.
    pub fn mapped(
        file: Arc<MappedFile>,
        offset: usize,
        format: WeightFormat,
        rows: usize,
        cols: usize,
    ) -> Result<Self> {
        let len = num_bytes(format, rows, cols)?;
        let available = file.len().saturating_sub(offset);
        if offset > file.len() || len > available {
            let reason =
                format!("bytes {offset}..{} lie outside the {} mapped", offset.saturating_add(len), file.len());
            return Err(KernelError::Invalid { op: OP, reason });
        }
        if has_alignment(format, &file[offset..offset + len]) {
            Ok(Self { format, rows, cols, bytes: Bytes::Mapped { file, offset } })
        } else {
            Self::from_bytes(format, rows, cols, &file[offset..offset + len])
        }
    }

    /// Takes the bytes that were read from a file as they are. Fails if they are not exactly as many as the format takes, or
    /// lie at an odd place of the file.
    pub fn from_range(bytes: RangeBytes, format: WeightFormat, rows: usize, cols: usize) -> Result<Self> {
        check::length(OP, "number of bytes", bytes.as_slice().len(), num_bytes(format, rows, cols)?)?;
        if !has_alignment(format, bytes.as_slice()) {
            let reason = format!("its place in the file is not aligned for {}", format.name());
            return Err(KernelError::Invalid { op: OP, reason });
        }
        Ok(Self { format, rows, cols, bytes: Bytes::Read(Arc::new(bytes)) })
    }

    /// The memory of a weight that was read from a file, for the next one; none while somebody else has the weight too.
    pub fn into_range(self) -> Option<RangeBytes> {
        match self.bytes {
            Bytes::Read(bytes) => Arc::into_inner(bytes),
            _ => None,
        }
    }

    /// The file in which the bytes lie, and where; none if they are memory of their own.
    pub fn place(&self) -> Option<(&Path, u64)> {
        match &self.bytes {
            Bytes::Mapped { file, offset } => Some((file.path(), *offset as u64)),
            _ => None,
        }
    }

    /// The file of [`Self::place`], and the bytes of it.
    pub(crate) fn mapped_part(&self) -> Option<(Arc<MappedFile>, Range<usize>)> {
        match &self.bytes {
            Bytes::Mapped { file, offset } => Some((file.clone(), *offset..*offset + self.num_bytes())),
            _ => None,
        }
    }

    /// The same numbers on a device, as they lie here, or back on the CPU; itself if it is there already. Fails if the
    /// device has no code or no memory.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        if self.device().same_device(device) {
            return Ok(self.clone());
        }
        match device {
            Device::Cpu => self.to_host(),
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => {
                let host = self.to_host()?;
                let there = DeviceBytes { device: device.clone(), bytes: upload(device, host.as_bytes())? };
                Ok(Self { bytes: Bytes::Cuda(Arc::new(there)), ..host })
            }
            other => {
                let reason = format!("{:?} has no code in this build", other.location());
                Err(KernelError::Invalid { op: OP, reason })
            }
        }
    }

    fn to_host(&self) -> Result<Self> {
        match &self.bytes {
            #[cfg(feature = "cuda")]
            Bytes::Cuda(there) => {
                let mut owned = AlignedBytes::zeroed(self.num_bytes());
                read(&there.device, &there.bytes, 0, owned.as_mut_slice())?;
                Ok(Self::owned(self.format, self.rows, self.cols, owned))
            }
            _ => Ok(self.clone()),
        }
    }

    /// Where it lies: the CPU, whatever memory or file it is in, or a device.
    pub fn device(&self) -> Device {
        match &self.bytes {
            #[cfg(feature = "cuda")]
            Bytes::Cuda(there) => Device::Cuda(there.device.clone()),
            _ => Device::Cpu,
        }
    }

    /// Its first byte on its device. Fails if it is on the CPU.
    #[cfg(feature = "cuda")]
    pub(crate) fn address(&self) -> candle_core::Result<Address> {
        match &self.bytes {
            Bytes::Cuda(there) => Ok(Address::of(&there.bytes)),
            _ => candle_core::bail!("{self:?} is not on a device"),
        }
    }

    /// Refuses one whose bytes the host does not have.
    fn check_host(&self, what: &'static str) -> Result<()> {
        check::lies_on(OP, what, self, &Device::Cpu)
    }

    /// Stacks weights of one format and width, of the CPU. Fails on none, on a mix, or on one on a device.
    pub fn concat_rows(parts: &[&Self]) -> Result<Self> {
        let Some(first) = parts.first() else {
            return Err(KernelError::Invalid { op: OP, reason: "no weights to stack".to_owned() });
        };
        if let Some(part) = parts.iter().find(|part| part.format != first.format) {
            let reason = format!("cannot stack {} and {} weights", first.format.name(), part.format.name());
            return Err(KernelError::Invalid { op: OP, reason });
        }
        for part in parts {
            check::length(OP, "width of a stacked weight", part.cols, first.cols)?;
            part.check_host("a stacked weight")?;
        }
        let rows = parts.iter().map(|part| part.rows).sum();
        let mut owned = AlignedBytes::zeroed(num_bytes(first.format, rows, first.cols)?);
        let mut row = 0;
        for part in parts {
            part.copy_rows(&(0..part.rows).collect::<Vec<_>>(), owned.as_mut_slice(), row);
            row += part.rows;
        }
        Ok(Self::owned(first.format, rows, first.cols, owned))
    }

    /// Copies rows in another order, or some of them. Fails if one does not exist, or all are on a device.
    pub fn select_rows(&self, rows: &[usize]) -> Result<Self> {
        self.check_host("a weight to select from")?;
        for &row in rows {
            check::below(OP, "row", row, self.rows)?;
        }
        let mut owned = AlignedBytes::zeroed(num_bytes(self.format, rows.len(), self.cols)?);
        self.copy_rows(rows, owned.as_mut_slice(), 0);
        Ok(Self::owned(self.format, rows.len(), self.cols, owned))
    }

    /// Copies rows behind the first `first` ones of another weight of the same format and width.
    fn copy_rows(&self, rows: &[usize], target: &mut [u8], first: usize) {
        if let WeightView::Quantized(layout, bytes) = self.view() {
            return quant::copy_rows(&layout, bytes, rows, target, first);
        }
        let row_bytes = self.format.bytes_for(1, self.cols);
        let target = target[first * row_bytes..].chunks_exact_mut(row_bytes.max(1));
        for (target, &row) in target.zip(rows) {
            target.copy_from_slice(&self.as_bytes()[row * row_bytes..(row + 1) * row_bytes]);
        }
    }

    /// The same numbers in another format (to nearest, ties to even, or quantized); itself if it is in that format
    /// already. Fails where a number to quantize is none, or where it is on a device.
    pub fn convert(self, format: WeightFormat) -> Result<Self> {
        if self.format == format {
            return Ok(self);
        }
        self.check_host("a weight to convert")?;
        let mut owned = AlignedBytes::zeroed(num_bytes(format, self.rows, self.cols)?);
        convert_into(format, self.cols, &self.to_f32(), owned.as_mut_slice())?;
        Ok(Self::owned(format, self.rows, self.cols, owned))
    }

    /// Whether the bytes are memory of their own, and not a part of a mapped file.
    pub fn is_owned(&self) -> bool {
        !matches!(self.bytes, Bytes::Mapped { .. })
    }

    /// Outputs, the first dimension.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs, the second dimension.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the numbers are stored.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// Bytes of the stored numbers, wherever they are.
    pub fn num_bytes(&self) -> usize {
        self.format.bytes_for(self.rows, self.cols)
    }

    /// Widens row `row_idx` into `out`. Panics if the row does not exist, `out` is not `cols` long, or the weight is on a
    /// device.
    pub fn row_f32(&self, row_idx: usize, out: &mut [f32]) {
        assert!(row_idx < self.rows && out.len() == self.cols, "row {row_idx} of {self:?} into {}", out.len());
        let range = row_idx * self.cols..(row_idx + 1) * self.cols;
        match self.view() {
            WeightView::F32(values) => out.copy_from_slice(&values[range]),
            WeightView::F16(values) => values[range].convert_to_f32_slice(out),
            WeightView::Bf16(values) => values[range].convert_to_f32_slice(out),
            WeightView::Quantized(layout, bytes) => quant::read_row(&layout, bytes, row_idx, out),
        }
    }

    /// All numbers widened, row-major. Panics if the weight is on a device.
    pub fn to_f32(&self) -> Vec<f32> {
        match self.view() {
            WeightView::F32(values) => values.to_vec(),
            WeightView::F16(values) => values.to_f32_vec(),
            WeightView::Bf16(values) => values.to_f32_vec(),
            WeightView::Quantized(..) => {
                let mut values = vec![0.0; self.rows * self.cols];
                let rows = values.chunks_exact_mut(self.cols.max(1)).enumerate();
                rows.for_each(|(row_idx, row)| self.row_f32(row_idx, row));
                values
            }
        }
    }

    /// The stored bytes, little-endian. Panics if they are on a device.
    pub fn as_bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Owned(bytes) => bytes.as_slice(),
            Bytes::Read(bytes) => bytes.as_slice(),
            Bytes::Mapped { file, offset } => &file[*offset..*offset + self.num_bytes()],
            #[cfg(feature = "cuda")]
            Bytes::Cuda(_) => panic!("the host does not have the bytes of {self:?}"),
        }
    }

    pub(crate) fn view(&self) -> WeightView<'_> {
        match self.format {
            WeightFormat::F32 => WeightView::F32(self.elements()),
            WeightFormat::F16 => WeightView::F16(self.elements()),
            WeightFormat::Bf16 => WeightView::Bf16(self.elements()),
            WeightFormat::Quantized(format) => WeightView::Quantized(Layout::new(format, self.cols), self.as_bytes()),
        }
    }

    fn elements<T: Plain>(&self) -> &[T] {
        view(self.as_bytes())
    }

    fn owned(format: WeightFormat, rows: usize, cols: usize, bytes: AlignedBytes) -> Self {
        Self { format, rows, cols, bytes: Bytes::Owned(Arc::new(bytes)) }
    }
}

impl fmt::Debug for PackedWeight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match &self.bytes {
            Bytes::Owned(_) => "owned",
            Bytes::Read(_) => "read",
            Bytes::Mapped { .. } => "mapped",
            #[cfg(feature = "cuda")]
            Bytes::Cuda(_) => &format!("on {:?}", self.device().location()),
        };
        write!(f, "PackedWeight({} [{}, {}], {place})", self.format.name(), self.rows, self.cols)
    }
}

/// Writes numbers `[_, cols]` in a format.
fn convert_into(format: WeightFormat, cols: usize, values: &[f32], target: &mut [u8]) -> Result<()> {
    match format {
        WeightFormat::F32 => view_mut::<f32>(target).copy_from_slice(values),
        WeightFormat::F16 => view_mut::<f16>(target).convert_from_f32_slice(values),
        WeightFormat::Bf16 => view_mut::<bf16>(target).convert_from_f32_slice(values),
        WeightFormat::Quantized(format) => {
            let rows = values.len().checked_div(cols).unwrap_or(0);
            quant::quantize(&Layout::new(format, cols), rows, values, target)?;
        }
    }
    Ok(())
}

fn has_alignment(format: WeightFormat, bytes: &[u8]) -> bool {
    match format {
        WeightFormat::F32 => is_aligned::<f32>(bytes),
        WeightFormat::F16 | WeightFormat::Bf16 => is_aligned::<f16>(bytes),
        WeightFormat::Quantized(_) => (bytes.as_ptr() as usize).is_multiple_of(QUANT_ALIGNMENT),
    }
}

/// Bytes of a shape that may come from a file header: no product may overflow, and the group must be a known one.
fn num_bytes(format: WeightFormat, rows: usize, cols: usize) -> Result<usize> {
    let invalid = |reason| Err(KernelError::Invalid { op: OP, reason });
    if let WeightFormat::Quantized(format) = format
        && !format.is_known()
    {
        return invalid(format!("groups of {} columns have no kernel", format.group));
    }
    // The filling of a panel and of a group is far below the factor of 2^16 that is kept free here.
    match rows.max(1).checked_mul(cols.max(1)).and_then(|elements| elements.checked_mul(1 << 16)) {
        Some(_) => Ok(format.bytes_for(rows, cols)),
        None => invalid(format!("shape [{rows}, {cols}] is too large")),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::PathBuf;

    use super::*;

    const FORMATS: [WeightFormat; 3] = [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16];

    #[test]
    fn numbers_survive_every_way_in() {
        let values: Vec<f32> = (0..12).map(|i| i as f32 * 0.5 - 2.0).collect();
        for format in FORMATS {
            let weight = PackedWeight::from_f32(format, 4, 3, &values).unwrap();
            assert_eq!((weight.rows(), weight.cols(), weight.format()), (4, 3, format));
            assert_eq!(weight.num_bytes(), format.bytes_for(4, 3));
            assert_eq!(weight.as_bytes().as_ptr() as usize % 64, 0);
            assert_eq!(weight.to_f32(), values);
            let copy = PackedWeight::from_bytes(format, 4, 3, weight.as_bytes()).unwrap();
            let mut row = [0.0; 3];
            copy.row_f32(2, &mut row);
            assert_eq!(row, values[6..9]);
            let stacked = PackedWeight::concat_rows(&[&weight, &copy]).unwrap();
            assert_eq!((stacked.rows(), stacked.to_f32()), (8, values.repeat(2)));
            for other in FORMATS {
                let converted = weight.clone().convert(other).unwrap();
                assert_eq!((converted.format(), converted.to_f32()), (other, values.clone()));
            }
        }
    }

    #[test]
    fn rounding_is_to_nearest_even() {
        let ties = [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0];
        let weight = PackedWeight::from_f32(WeightFormat::Bf16, 1, 2, &ties).unwrap();
        assert_eq!(weight.to_f32(), [1.0, 1.0 + 4.0 / 256.0]);
    }

    fn scratch_file(name: &str, bytes: &[u8]) -> PathBuf {
        let path = std::env::temp_dir().join(format!("moesaic-{name}-{}", std::process::id()));
        std::fs::File::create(&path).unwrap().write_all(bytes).unwrap();
        path
    }

    #[test]
    fn mapped_ranges_are_borrowed_or_copied() {
        let values: Vec<f32> = (0..6).map(|i| i as f32).collect();
        let mut bytes = vec![0; 8];
        bytes.extend(PackedWeight::from_f32(WeightFormat::F32, 2, 3, &values).unwrap().as_bytes());
        bytes.insert(0, 0xff);
        let shifted = scratch_file("shifted", &bytes);
        let straight = scratch_file("straight", &bytes[1..]);
        for (path, offset, place) in [(&shifted, 9, "owned"), (&straight, 8, "mapped")] {
            let file = Arc::new(MappedFile::open(path).unwrap());
            let weight = PackedWeight::mapped(file.clone(), offset, WeightFormat::F32, 2, 3).unwrap();
            assert_eq!(weight.to_f32(), values);
            assert_eq!(format!("{weight:?}"), format!("PackedWeight(f32 [2, 3], {place})"));
            assert!(PackedWeight::mapped(file.clone(), offset + 4, WeightFormat::F32, 2, 3).is_err());
            assert!(PackedWeight::mapped(file.clone(), usize::MAX, WeightFormat::F32, 2, 3).is_err());
            assert!(PackedWeight::mapped(file, 0, WeightFormat::F32, usize::MAX, 3).is_err());
            std::fs::remove_file(path).unwrap();
        }
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let weight = |format, rows, cols| PackedWeight::from_f32(format, rows, cols, &vec![0.0; rows * cols]).unwrap();
        assert!(PackedWeight::from_f32(WeightFormat::F32, 2, 3, &[0.0; 5]).is_err());
        assert!(PackedWeight::from_bytes(WeightFormat::Bf16, 2, 3, &[0; 13]).is_err());
        assert!(PackedWeight::concat_rows(&[]).is_err());
        let base = weight(WeightFormat::F32, 2, 3);
        assert!(PackedWeight::concat_rows(&[&base, &weight(WeightFormat::F32, 2, 4)]).is_err());
        assert!(PackedWeight::concat_rows(&[&base, &weight(WeightFormat::F16, 2, 3)]).is_err());
    }

    #[test]
    fn on_the_cpu_a_weight_is_where_it_should_be() {
        let weight = PackedWeight::from_f32(WeightFormat::F32, 2, 3, &[1.0; 6]).unwrap();
        assert!(weight.device().is_cpu());
        assert_eq!(weight.to_device(&Device::Cpu).unwrap().as_bytes().as_ptr(), weight.as_bytes().as_ptr());
    }
}

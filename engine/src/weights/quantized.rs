//! Quantized matrices of a checkpoint, one at a time: bytes under scales (FP8, int8) are expanded, packed integers keep their
//! codes where a format of ours holds them.

use kernels::{PackedWeight, WeightFormat};
use safetensors::Dtype;

use super::checkpoint::{StoredDtype, TensorEntry};
use super::fp8;
use super::grouped_ints::{GroupedInts, PackedCodes, WordOrder};
use super::loader::Loader;
use super::quantization::{ScaleLayout, TransposedInt4, TransposedKind, same_shape};
use crate::config::WeightDtype;
use crate::error::EngineError;

/// Beside a quantized weight, and of no use where activations are not quantized.
const ACTIVATION_SCALES: [&str; 2] = ["input_scale", "output_scale"];

/// The scales of a matrix, one for each tile, row-major.
struct Scales {
    values: Vec<f32>,
    tile: [usize; 2],
    /// Tiles of the matrix.
    shape: [usize; 2],
}

impl Loader<'_> {
    /// Whether `{stem}.weight` is stored as packed integers.
    pub(super) fn is_packed(&self, stem: &str) -> bool {
        self.contains(&format!("{stem}.weight_packed")) || self.contains(&format!("{stem}.qweight"))
    }

    /// The FP8 or int8 matrix `{name}` under its `{name}_scale_inv` or `{name}_scale`.
    pub(super) fn expand_scaled(
        &self,
        name: &str,
        entry: &TensorEntry,
        shape: [usize; 2],
    ) -> Result<PackedWeight, EngineError> {
        let bytes = self.stored_bytes(entry);
        let mut values: Vec<f32> = match entry.dtype {
            StoredDtype::Plain(Dtype::F8_E4M3) => {
                let table = fp8::table();
                bytes.iter().map(|&byte| table[usize::from(byte)]).collect()
            }
            _ => bytes.iter().map(|&byte| f32::from(byte.cast_signed())).collect(),
        };
        let plain = format!("{name}_scale");
        let scale_name = if self.contains(&plain) { plain } else { format!("{name}_scale_inv") };
        let scales = self.scales(&scale_name, shape)?;
        if let Some(stem) = name.strip_suffix(".weight") {
            ACTIVATION_SCALES.iter().for_each(|part| self.skip(&format!("{stem}.{part}")));
        }
        for_each_run(&mut values, shape, scales.tile, |run, tile| {
            run.iter_mut().for_each(|value| *value *= scales.values[tile]);
        });
        self.expanded(name, shape, &values)
    }

    /// The packed integers of `{stem}.weight`: in formats of ours where those hold them, expanded where they do not or
    /// another type was asked for.
    pub(super) fn expand_packed(&self, stem: &str, shape: [usize; 2]) -> Result<PackedWeight, EngineError> {
        let transposed = format!("{stem}.qweight");
        let (name, ints) = match self.contains(&transposed) {
            false => (format!("{stem}.weight_packed"), self.row_ints(stem, shape)?),
            true => match self.quantization().transposed {
                Some(layout) => (transposed, self.transposed_ints(stem, shape, layout)?),
                None => return Err(unknown_packing(&transposed)),
            },
        };
        match ints.format().filter(|_| self.storage().dtype == WeightDtype::Auto) {
            Some(format) => PackedWeight::from_groups(format, shape[0], shape[1], |row, out| ints.read_row(row, out))
                .map_err(|error| self.invalid(&name, error.to_string())),
            None => self.expanded(&name, shape, &ints.to_f32()),
        }
    }

    /// The integers `{stem}.weight_packed` under `{stem}.weight_scale`, of the shape that `{stem}.weight_shape` repeats.
    fn row_ints(&self, stem: &str, shape: [usize; 2]) -> Result<GroupedInts<'_>, EngineError> {
        let name = format!("{stem}.weight_packed");
        let Some(packing) = self.quantization().packing else { return Err(unknown_packing(&name)) };
        let order = format!("{stem}.weight_g_idx");
        if self.contains(&order) {
            let reason = "groups of columns in an order of their own (actorder `group`) are not supported".into();
            return Err(self.invalid(&order, reason));
        }
        self.check_shape_tensor(&format!("{stem}.weight_shape"), shape)?;
        let codes = self.packed_codes(&name, (WordOrder::AlongRows, packing.num_bits), shape)?;
        let scales = self.scales(&format!("{stem}.weight_scale"), shape)?;
        let zeros = match packing.has_zero_points {
            // Signed values are stored shifted into the unsigned range.
            false => None,
            true => {
                let name = format!("{stem}.weight_zero_point");
                Some(self.packed_codes(&name, (WordOrder::DownColumns, packing.num_bits), scales.shape)?.read())
            }
        };
        Ok(GroupedInts { codes, tile: scales.tile, scales: scales.values, zeros })
    }

    /// The integers `{stem}.qweight` under `{stem}.scales` and `{stem}.qzeros`, all stored inputs by outputs.
    fn transposed_ints(
        &self,
        stem: &str,
        shape: [usize; 2],
        layout: TransposedInt4,
    ) -> Result<GroupedInts<'_>, EngineError> {
        const NUM_BITS: usize = 4;
        let [rows, cols] = shape;
        let name = |part: &str| format!("{stem}.{part}");
        let tile_cols = layout.group.unwrap_or(cols).max(1);
        let num_groups = cols.div_ceil(tile_cols);
        let (order, zeros_order) = match layout.kind {
            TransposedKind::Awq => (WordOrder::Interleaved, WordOrder::Interleaved),
            TransposedKind::Gptq { .. } => (WordOrder::TransposedColumns, WordOrder::TransposedRows),
        };
        let codes = self.packed_codes(&name("qweight"), (order, NUM_BITS), shape)?;
        let zeros = match layout.has_zero_points {
            false if !self.contains(&name("qzeros")) => None,
            _ => Some(self.packed_codes(&name("qzeros"), (zeros_order, NUM_BITS), [rows, num_groups])?.read()),
        };
        let zeros = match layout.kind {
            TransposedKind::Gptq { zeros_minus_one: true } => {
                zeros.map(|zeros| zeros.into_iter().map(|zero| (zero + 1) & 0xf).collect())
            }
            _ => zeros,
        };
        // Symmetric checkpoints spell out the middle.
        let zeros = zeros.filter(|zeros| zeros.iter().any(|&zero| zero != 8));
        if let TransposedKind::Gptq { .. } = layout.kind {
            self.check_group_order(&name("g_idx"), (cols, tile_cols), layout)?;
            self.skip_zero_bias(&name("bias"));
        }
        let (entry, stored) = self.any_floats(&name("scales"))?;
        if entry.shape != [num_groups, rows] {
            return Err(self.shape_error(&name("scales"), entry, &[num_groups, rows]));
        }
        self.expect_finite(&name("scales"), rows, &stored)?;
        let scales = (0..rows).flat_map(|row| stored.iter().skip(row).step_by(rows).copied()).collect();
        Ok(GroupedInts { codes, tile: [1, tile_cols], scales, zeros })
    }

    /// Columns may be in groups by their order only.
    fn check_group_order(
        &self,
        name: &str,
        (cols, group): (usize, usize),
        layout: TransposedInt4,
    ) -> Result<(), EngineError> {
        if !self.contains(name) {
            return match layout.is_reordered {
                false => Ok(()),
                true => Err(self.invalid(name, "is missing, but `desc_act` is set".into())),
            };
        }
        let entry = self.take(name, &[cols])?;
        if entry.dtype != StoredDtype::Plain(Dtype::I32) {
            return Err(self.dtype_error(name, entry));
        }
        let groups = self.stored_bytes(entry).as_chunks().0.iter().map(|&bytes| i32::from_le_bytes(bytes));
        match groups.enumerate().find(|&(col, found)| usize::try_from(found) != Ok(col / group)) {
            None => Ok(()),
            Some((col, found)) => {
                let reason = format!(
                    "puts column {col} into group {found}: groups of columns in an order of their own (desc_act) are \
                     not supported, only groups of {group} columns side by side"
                );
                Err(self.invalid(name, reason))
            }
        }
    }

    /// Older exporters give every quantized layer a bias, of zeros where the model has none.
    fn skip_zero_bias(&self, name: &str) {
        if let Ok(entry) = self.find(name)
            && self.stored_bytes(entry).iter().all(|&byte| byte == 0)
        {
            self.skip(name);
        }
    }

    fn packed_codes(
        &self,
        name: &str,
        (order, num_bits): (WordOrder, usize),
        shape: [usize; 2],
    ) -> Result<PackedCodes<'_>, EngineError> {
        let words = self.words(name, order.words_shape(num_bits, shape))?;
        Ok(PackedCodes { order, num_bits, shape, words })
    }

    /// Refuses what no matrix product survives, by the place of the first such number.
    pub fn expect_finite(&self, name: &str, cols: usize, values: &[f32]) -> Result<(), EngineError> {
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(()),
            Some(idx) => {
                let reason = format!("is {} at row {}, column {}", values[idx], idx / cols, idx % cols);
                Err(self.invalid(name, reason))
            }
        }
    }

    /// The scales `{name}` of a matrix `[rows, cols]`, as the config or their own shape arranges them.
    fn scales(&self, name: &str, shape: [usize; 2]) -> Result<Scales, EngineError> {
        let (entry, values) = self.any_floats(name)?;
        let layout = self.quantization().scales.unwrap_or_else(|| ScaleLayout::of_shape(&entry.shape, shape));
        let num_tiles = layout.num_tiles(shape);
        if !same_shape(&entry.shape, &num_tiles) {
            return Err(self.shape_error(name, entry, &num_tiles));
        }
        if let Some(idx) = values.iter().position(|value| !value.is_finite()) {
            return Err(self.invalid(name, format!("scale {idx} is {}", values[idx])));
        }
        Ok(Scales { values, tile: layout.tile(shape), shape: num_tiles })
    }

    /// `weight_shape` holds the rows and columns of the matrix before it was packed.
    fn check_shape_tensor(&self, name: &str, shape: [usize; 2]) -> Result<(), EngineError> {
        let entry = self.take(name, &[2])?;
        let bytes = self.stored_bytes(entry);
        let sizes: Vec<i64> = match entry.dtype {
            StoredDtype::Plain(Dtype::I64) => {
                bytes.as_chunks().0.iter().map(|&bytes| i64::from_le_bytes(bytes)).collect()
            }
            StoredDtype::Plain(Dtype::I32) => {
                bytes.as_chunks().0.iter().map(|&bytes| i32::from_le_bytes(bytes).into()).collect()
            }
            _ => return Err(self.dtype_error(name, entry)),
        };
        if sizes.iter().map(|&size| usize::try_from(size).ok()).eq(shape.map(Some)) {
            return Ok(());
        }
        Err(self.invalid(name, format!("says {sizes:?}, expected {shape:?}")))
    }

    /// The bytes of a tensor of 32-bit words.
    fn words(&self, name: &str, shape: [usize; 2]) -> Result<&[u8], EngineError> {
        let entry = self.take(name, &shape)?;
        match entry.dtype {
            StoredDtype::Plain(Dtype::I32) => Ok(self.stored_bytes(entry)),
            _ => Err(self.dtype_error(name, entry)),
        }
    }

    /// In bf16 unless a wider type is asked for; the caller converts to what is.
    pub(super) fn expanded(
        &self,
        name: &str,
        [rows, cols]: [usize; 2],
        values: &[f32],
    ) -> Result<PackedWeight, EngineError> {
        self.expect_finite(name, cols, values)?;
        let format = match self.storage().dtype {
            WeightDtype::Auto | WeightDtype::Bf16 => WeightFormat::Bf16,
            WeightDtype::F32 | WeightDtype::F16 => WeightFormat::F32,
        };
        Ok(PackedWeight::from_f32(format, rows, cols, values)?)
    }
}

fn unknown_packing(name: &str) -> EngineError {
    EngineError::Config { key: "quantization_config", reason: format!("does not say how `{name}` is packed") }
}

/// Gives each stretch of a row of the matrix `[rows, cols]` that lies in one tile, with the tile's index, row-major.
fn for_each_run(
    values: &mut [f32],
    [_, cols]: [usize; 2],
    [tile_rows, tile_cols]: [usize; 2],
    mut apply: impl FnMut(&mut [f32], usize),
) {
    let tiles_per_row = cols.div_ceil(tile_cols);
    for (row_idx, row) in values.chunks_exact_mut(cols.max(1)).enumerate() {
        let first_tile = row_idx / tile_rows * tiles_per_row;
        row.chunks_mut(tile_cols).enumerate().for_each(|(idx, run)| apply(run, first_tile + idx));
    }
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::super::checkpoint::Checkpoint;
    use super::super::gguf_fixture::TempDir;
    use super::super::quantization::{Packing, Quantization};
    use super::*;

    /// The matrix `[3, 10]` whose codes count up, in rows of two words, under `scales`.
    fn read(name: &str, layout: ScaleLayout, scales: &[f32], shape: [usize; 2]) -> Result<Vec<f32>, String> {
        let words: Vec<u8> = [0x7654_3210u32, 0x98, 0xfedc_ba98, 0x10, 0x8888_8888, 0x89]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect();
        let scales_bytes: Vec<u8> = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        let sizes: Vec<u8> = [3i64, 10].into_iter().flat_map(i64::to_le_bytes).collect();
        let tensors = [
            ("x.weight_packed", TensorView::new(Dtype::I32, vec![3, 2], &words).unwrap()),
            ("x.weight_scale", TensorView::new(Dtype::F32, vec![3, scales.len() / 3], &scales_bytes).unwrap()),
            ("x.weight_shape", TensorView::new(Dtype::I64, vec![2], &sizes).unwrap()),
        ];
        let dir = TempDir::new(name);
        dir.write("model.safetensors", &safetensors::serialize(tensors, None).unwrap());
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let packing = Some(Packing { num_bits: 4, has_zero_points: false });
        let quantization = Quantization { scales: Some(layout), packing, transposed: None };
        let mut progress = |_| ();
        let loader = Loader::new(&checkpoint, quantization, WeightDtype::F32, &mut progress);
        let weight = loader.weight("x.weight", shape[0], shape[1]).map_err(|error| error.to_string())?;
        assert_eq!(loader.weight_bytes(), 3 * 10 * 4, "scales are used up");
        loader.finish(|_| false).unwrap();
        Ok(weight.to_f32())
    }

    #[test]
    fn padded_rows_and_partial_groups_are_read() {
        let mut scales = [1.0; 9];
        scales[2] = 2.0; // of columns 8 and 9 in row 0
        scales[3] = 0.5; // of columns 0 to 3 in row 1
        let values = read("packed-groups", ScaleLayout::Tiles([1, 4]), &scales, [3, 10]).unwrap();
        assert_eq!(values[..10], [-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 2.0]);
        assert_eq!(values[10..20], [0.0, 0.5, 1.0, 1.5, 4.0, 5.0, 6.0, 7.0, -8.0, -7.0]);
        assert_eq!(values[20..], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]);
    }

    #[test]
    fn one_scale_per_row_is_read() {
        let values = read("packed-rows", ScaleLayout::Rows, &[1.0, 3.0, 1.0], [3, 10]).unwrap();
        assert_eq!(values[10..14], [0.0, 3.0, 6.0, 9.0]);
    }

    #[test]
    fn a_shape_that_is_not_the_models_is_refused() {
        let error = read("packed-lie", ScaleLayout::Rows, &[1.0; 3], [3, 16]).unwrap_err();
        assert!(error.contains("model.safetensors") && error.contains("says [3, 10], expected [3, 16]"), "{error}");
    }

    #[test]
    fn edge_tiles_are_partial() {
        let scales = [1.0, 2.0, 3.0, 4.0];
        let mut values = vec![1.0; 130 * 129];
        for_each_run(&mut values, [130, 129], [128, 128], |run, tile| run.fill(scales[tile]));
        let at = |row: usize, col: usize| values[row * 129 + col];
        assert_eq!([at(0, 0), at(127, 128), at(128, 127), at(129, 128)], scales);
    }
}

//! Block-quantized matrices of a GGUF file to weights.

use kernels::PackedWeight;
use kernels::block_format::BlockFormat;

use crate::error::EngineError;
use crate::weights::checkpoint::TensorEntry;
use crate::weights::loader::Loader;

impl Loader<'_> {
    /// The matrix `[rows, cols]` that starts `offset` bytes into the blocks of `{name}`, its rows in their order.
    pub(in crate::weights) fn expand_blocks(
        &self,
        name: &str,
        entry: &TensorEntry,
        (format, offset): (BlockFormat, usize),
        [rows, cols]: [usize; 2],
    ) -> Result<PackedWeight, EngineError> {
        let row_bytes = cols / format.block_len() * format.block_bytes();
        let bytes = &self.stored_bytes(entry)[offset..offset + rows * row_bytes];
        let mut values = vec![0.0; rows * cols];
        for (row, out) in values.chunks_exact_mut(cols.max(1)).enumerate() {
            let start = entry.order.stored_row(row) * row_bytes;
            format.dequantize(&bytes[start..start + row_bytes], out);
        }
        self.expanded(name, [rows, cols], &values)
    }
}

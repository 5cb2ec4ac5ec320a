//! A block for each tile of outputs and tokens: on matrix instructions where weights are quantized or both factors are bf16, plain
//! where not.

use std::slice::from_ref;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr};
use candle_core::{CudaStorage, DType, Shape};

use super::Linear;
use crate::cuda::ROW_THREADS;
use crate::cuda::device::{Argument, Launch, launch};
use crate::cuda::memory::{
    Address, Operand, activations, aligned_activations, floats, name_of, output, scratch, upload,
};
use crate::cuda::products::{
    DenseWeight, PLAIN_OUTS, PLAIN_TOKENS, PRODUCT_THREADS, QuantRows, QuantWeight, TILES, dense_name,
};
use crate::quant::{QuantFormat, RowForm};
use crate::weight::{PackedWeight, WeightFormat};

/// `struct Terms` of `quant.cuh`.
const TERMS_BYTES: usize = 8;

pub(super) fn linear(
    op: &Linear<'_>,
    x: Operand<'_>,
    bias: Option<Operand<'_>>,
) -> candle_core::Result<(CudaStorage, Shape)> {
    let bias = bias.map_or(Ok(Address::NULL), floats)?;
    let product = Product { x, num_tokens: op.num_tokens, weights: from_ref(op.weight), bias, out: op.out };
    Ok((product.compute()?, Shape::from((op.num_tokens, op.weight.rows()))))
}

/// Rows with a weight for each of their heads, all on one device, of one shape and kind.
pub(crate) struct Product<'a> {
    /// `[num_tokens, weights.len(), cols]`
    pub(crate) x: Operand<'a>,
    pub(crate) num_tokens: usize,
    pub(crate) weights: &'a [PackedWeight],
    /// Of the only weight, or null.
    pub(crate) bias: Address,
    /// The type of the result.
    pub(crate) out: DType,
}

impl Product<'_> {
    /// `[num_tokens, weights.len(), rows]`
    pub(crate) fn compute(&self) -> candle_core::Result<CudaStorage> {
        let (device, num_heads) = (self.x.0.device(), self.weights.len());
        let num_outs = self.weights.first().map_or(0, PackedWeight::rows);
        let (out, target) = output(device, self.out, self.num_tokens * num_heads * num_outs)?;
        match self.weights.first().map(PackedWeight::format) {
            None => {}
            Some(WeightFormat::Quantized(format)) => self.multiply_quantized(format, target)?,
            Some(format) => self.multiply_dense(format, target)?,
        }
        Ok(out)
    }

    fn multiply_quantized(&self, format: QuantFormat, target: Address) -> candle_core::Result<()> {
        let x = Rows {
            start: activations(self.x)?,
            dtype: self.x.0.dtype(),
            count: self.num_tokens * self.weights.len(),
            cols: self.weights[0].cols(),
        };
        let quantized = x.quantized(self.x.0.device(), format.row_form(), Address::NULL)?;
        let of = |weight: &PackedWeight| Ok(QuantWeight::new(weight, weight.address()?, self.bias));
        let tile = tile_for(self.num_tokens);
        let kernel = format!("quant_linear_{}_{}", tile.0, name_of(self.out)?);
        self.launch(&kernel, of, &quantized.view, (tile.1, tile.2, PRODUCT_THREADS), target)
    }

    fn multiply_dense(&self, format: WeightFormat, target: Address) -> candle_core::Result<()> {
        let of = |weight: &PackedWeight| Ok(DenseWeight::new(weight, weight.address()?, self.bias));
        let (of_weight, of_x, of_out) = (dense_name(format), name_of(self.x.0.dtype())?, name_of(self.out)?);
        if !is_on_matrix_instructions(format, self.x.0.dtype()) {
            let kernel = format!("plain_linear_{of_weight}_{of_x}_{of_out}");
            let x = activations(self.x)?;
            return self.launch(&kernel, of, &x, (PLAIN_OUTS, PLAIN_TOKENS, ROW_THREADS), target);
        }
        let (x, _copy) = aligned_activations(self.x)?;
        let tile = tile_for(self.num_tokens);
        let kernel = format!("dense_linear_{}_{of_out}", tile.0);
        self.launch(&kernel, of, &x, (tile.1, tile.2, PRODUCT_THREADS), target)
    }

    /// A block of so many threads for so many outputs and tokens.
    fn launch<W: DeviceRepr + Copy + 'static>(
        &self,
        kernel: &str,
        of: impl Fn(&PackedWeight) -> candle_core::Result<W>,
        x: &dyn Argument,
        (outs, tokens, threads): (usize, usize, usize),
        target: Address,
    ) -> candle_core::Result<()> {
        let device = self.x.0.device();
        let weights = self.weights.iter().map(of).collect::<candle_core::Result<Vec<W>>>()?;
        // One goes with the launch, several are a table.
        let table = if weights.len() == 1 { None } else { Some(upload(device, &weights)?) };
        let table = table.as_ref().map_or(Address::NULL, Address::of);
        let grid = [self.weights[0].rows().div_ceil(outs), self.num_tokens.div_ceil(tokens), weights.len()];
        let shape = Launch { grid, threads, shared_bytes: 0 };
        let arguments: [&dyn Argument; 5] = [&table, &weights[0], x, &target, &(self.num_tokens as u32)];
        // SAFETY: the arguments of the kernel; input and output have a row for each token and weight, checked by the ops.
        unsafe { launch(device, kernel, shape, &arguments) }
    }
}

/// Whether weights of a format that is not quantized are multiplied with such activations by matrix instructions.
pub(crate) fn is_on_matrix_instructions(format: WeightFormat, activations: DType) -> bool {
    (format, activations) == (WeightFormat::Bf16, DType::BF16)
}

/// One of few tokens where it has all of them: each tile reads the weight.
pub(crate) fn tile_for(num_tokens: usize) -> (&'static str, usize, usize) {
    let [few, many] = TILES;
    if num_tokens <= few.2 { few } else { many }
}

/// Activations on a device, `[count, cols]`.
pub(crate) struct Rows {
    pub(crate) start: Address,
    pub(crate) dtype: DType,
    pub(crate) count: usize,
    pub(crate) cols: usize,
}

/// The same in the form that quantized weights want.
pub(crate) struct QuantizedRows {
    pub(crate) view: QuantRows,
    /// Codes, behind them the terms.
    _memory: CudaSlice<u8>,
}

impl Rows {
    /// `num_there` is where the number of rows that there are lies, or null if all are.
    pub(crate) fn quantized(
        &self,
        device: &CudaDevice,
        form: RowForm,
        num_there: Address,
    ) -> candle_core::Result<QuantizedRows> {
        let num_groups = self.cols.div_ceil(form.group);
        let code_bytes = self.count * num_groups * form.group;
        let memory = scratch::<u8>(device, code_bytes + self.count * num_groups * TERMS_BYTES)?;
        let codes = Address::of(&memory);
        // Groups have a multiple of 16 codes.
        let view = QuantRows { codes, terms: codes.plus(code_bytes) };
        let arguments: [&dyn Argument; 7] = [
            &self.start,
            &view.codes,
            &view.terms,
            &(self.cols as u32),
            &(form.group as u32),
            &u32::from(form.is_rotated),
            &num_there,
        ];
        let kernel = format!("quantize_rows_{}", name_of(self.dtype)?);
        // SAFETY: the arguments of the kernel, with room for the codes and terms of all rows.
        unsafe { launch(device, &kernel, Launch::rows(self.count, ROW_THREADS), &arguments) }?;
        Ok(QuantizedRows { view, _memory: memory })
    }
}

//! A block for each token.

use candle_core::cuda_backend::CudaDevice;
use candle_core::op::BackpropOp;
use candle_core::{DType, Storage, Tensor};

use crate::cuda::ROW_THREADS;
use crate::cuda::device::{Launch, launch};
use crate::cuda::memory::{Address, name_of, output, upload};
use crate::cuda::products::{QuantWeight, dense_name};
use crate::weight::{PackedWeight, WeightFormat};

/// All ids are in the table, which lies on the device.
pub(super) fn embedding(
    device: &CudaDevice,
    ids: &[u32],
    table: &PackedWeight,
    dtype: DType,
) -> candle_core::Result<Tensor> {
    let (num_tokens, width) = (ids.len(), table.cols());
    let (out, target) = output(device, dtype, num_tokens * width)?;
    let of_ids = upload(device, ids)?;
    let (of_ids, start, shape) = (Address::of(&of_ids), table.address()?, Launch::rows(num_tokens, ROW_THREADS));
    match table.format() {
        WeightFormat::Quantized(_) => {
            let kernel = format!("embedding_quant_{}", name_of(dtype)?);
            let table = QuantWeight::new(table, start, Address::NULL);
            // SAFETY: the arguments of the kernel; all ids are in the table.
            unsafe { launch(device, &kernel, shape, &[&of_ids, &table, &target]) }?;
        }
        format => {
            let kernel = format!("embedding_{}_{}", dense_name(format), name_of(dtype)?);
            // SAFETY: the arguments of the kernel; all ids are in the table.
            unsafe { launch(device, &kernel, shape, &[&of_ids, &start, &target, &(width as i32)]) }?;
        }
    }
    Ok(Tensor::from_storage(Storage::Cuda(out), (num_tokens, width), BackpropOp::none(), false))
}

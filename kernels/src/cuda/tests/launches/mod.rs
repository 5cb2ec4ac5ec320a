//! Ops on a CUDA device, or an emulated one, beside the same ops on the CPU: that each launch passes what its kernel takes. What
//! the kernels make of that is the matter of the other tests.

mod activations;
mod attention;
mod bench;
mod caches;
mod copies;
mod embedding;
mod experts;
mod gated_delta;
mod linear;
mod norms;
mod route;
mod sampling;

use std::sync::LazyLock;

use candle_core::{DType, Device, Tensor};

use crate::device::{DeviceChoice, open_device};
use crate::testing::{assert_close, values};

static DEVICE: LazyLock<Device> = LazyLock::new(|| open_device(DeviceChoice::Cuda(0)).unwrap());

/// Of a result that is rounded to bf16 on its way.
const BF16_TOLERANCE: f32 = 1.0 / 128.0;
const F32_TOLERANCE: f32 = 2e-5;

/// A tensor as the CPU has it, and on the device in each type of activations; with the tolerance of what is made of it.
fn on_both(tensor: &Tensor) -> [(Tensor, Tensor, f32); 2] {
    [(DType::F32, F32_TOLERANCE), (DType::BF16, BF16_TOLERANCE)].map(|(dtype, tolerance)| {
        let stored = tensor.to_dtype(dtype).unwrap();
        (stored.to_dtype(DType::F32).unwrap(), moved(&stored), tolerance)
    })
}

fn moved(tensor: &Tensor) -> Tensor {
    tensor.to_device(&DEVICE).unwrap()
}

/// The device's result is the CPU's, and of this type.
#[track_caller]
fn assert_same(found: &Tensor, expected: &Tensor, (dtype, tolerance): (DType, f32)) {
    assert!(found.device().is_cuda());
    assert_eq!(found.dtype(), dtype);
    assert_eq!(found.dims(), expected.dims());
    let found = found.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    assert_close(&values(&found), &values(expected), tolerance);
}

//! The device code of this crate on a CUDA device: loaded once for each, launched on the stream of candle's tensors.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute_enum;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaModule, DeviceRepr, LaunchArgs, LaunchConfig, PushKernelArg,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaDevice, DeviceId, WrapErr};
use candle_core::{Device, bail};

use crate::error::Result;

/// The code of all ops, an image for each source.
static IMAGES: &[&[u8]] = include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// Dynamic shared memory that a kernel has without asking.
const SHARED_BYTES: usize = 48 << 10;

/// What was loaded, by device.
static LOADED: RwLock<Vec<(DeviceId, Arc<Kernels>)>> = RwLock::new(Vec::new());

struct Kernels {
    modules: Vec<Arc<CudaModule>>,
    /// Those that were launched.
    functions: Mutex<HashMap<String, CudaFunction>>,
}

/// Opens a device with a stream of its own. Fails if there is none of this number.
pub(crate) fn open(ordinal: usize) -> Result<Device> {
    let device = CudaDevice::new_with_stream(ordinal)?;
    // SAFETY: all tensors of a device are used on its one stream, in whose order memory is given back too.
    unsafe { device.disable_event_tracking() };
    Ok(Device::Cuda(device))
}

/// A launch's shape.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Launch {
    /// Blocks; none where one of them is 0.
    pub(crate) grid: [usize; 3],
    /// Of a block.
    pub(crate) threads: usize,
    /// Dynamic shared memory.
    pub(crate) shared_bytes: usize,
}

impl Launch {
    /// A block of so many threads for each of a row of something.
    pub(crate) fn rows(count: usize, threads: usize) -> Self {
        Self { grid: [count, 1, 1], threads, shared_bytes: 0 }
    }
}

/// What is copied to a kernel as it lies in memory.
pub(crate) trait Argument {
    fn push<'a>(&'a self, arguments: &mut LaunchArgs<'a>);
}

impl<T: DeviceRepr> Argument for T {
    fn push<'a>(&'a self, arguments: &mut LaunchArgs<'a>) {
        arguments.arg(self);
    }
}

/// Launches a kernel behind what was launched before.
///
/// # Safety
/// `arguments` are the kernel's, in their order and of their types, and what they point to is as it wants it until it ran.
pub(crate) unsafe fn launch(
    device: &CudaDevice,
    kernel: &str,
    shape: Launch,
    arguments: &[&dyn Argument],
) -> candle_core::Result<()> {
    let Launch { grid, threads, shared_bytes } = shape;
    if grid.contains(&0) {
        return Ok(());
    }
    let [Ok(x), Ok(y), Ok(z)] = grid.map(u32::try_from) else {
        bail!("{kernel}: {grid:?} blocks are too many");
    };
    let function = loaded(device)?.function(kernel)?;
    if shared_bytes > SHARED_BYTES {
        let attribute = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(attribute, shared_bytes as i32).w()?;
    }
    let stream = device.cuda_stream();
    let mut builder = stream.launch_builder(&function);
    for argument in arguments {
        argument.push(&mut builder);
    }
    let config =
        LaunchConfig { grid_dim: (x, y, z), block_dim: (threads as u32, 1, 1), shared_mem_bytes: shared_bytes as u32 };
    // SAFETY: the caller's.
    unsafe { builder.launch(config) }.w()?;
    Ok(())
}

fn loaded(device: &CudaDevice) -> candle_core::Result<Arc<Kernels>> {
    let of_device = |all: &[(DeviceId, Arc<Kernels>)]| {
        all.iter().find(|(id, _)| *id == device.id()).map(|(_, kernels)| kernels.clone())
    };
    if let Some(found) = of_device(&LOADED.read().unwrap_or_else(PoisonError::into_inner)) {
        return Ok(found);
    }
    let mut all = LOADED.write().unwrap_or_else(PoisonError::into_inner);
    if let Some(found) = of_device(&all) {
        return Ok(found);
    }
    let stream = device.cuda_stream();
    let load = |image: &&[u8]| stream.context().load_module(Ptx::from_binary(image.to_vec())).w();
    let modules = IMAGES.iter().map(load).collect::<candle_core::Result<_>>()?;
    let kernels = Arc::new(Kernels { modules, functions: Mutex::default() });
    all.push((device.id(), kernels.clone()));
    Ok(kernels)
}

impl Kernels {
    fn function(&self, name: &str) -> candle_core::Result<CudaFunction> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = functions.get(name) {
            return Ok(found.clone());
        }
        let Some(found) = self.modules.iter().find_map(|module| module.load_function(name).ok()) else {
            bail!("no device code has a kernel {name}");
        };
        functions.insert(name.to_owned(), found.clone());
        Ok(found)
    }
}

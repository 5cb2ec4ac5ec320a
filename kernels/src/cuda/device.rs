//! The device code of this crate on a CUDA device: loaded once for each, launched on the stream of candle's tensors.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use candle_core::cuda_backend::cudarc::driver::sys::{
    self, CUdevice_attribute, CUfunction_attribute_enum, CUmemPool_attribute, CUresult,
};
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, DeviceRepr, LaunchArgs, LaunchConfig, PushKernelArg,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaDevice, DeviceId, WrapErr};
use candle_core::{Device, bail};

use crate::error::{KernelError, Result};

/// The code of all ops, an image for each source.
static IMAGES: &[&[u8]] = include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// Blocks that a grid may have along its second and its third axis.
const MOST_BLOCKS: usize = 65535;

/// One of each number: candle takes tensors of one number for tensors of one stream.
static OPENED: Mutex<Vec<CudaDevice>> = Mutex::new(Vec::new());

static LOADED: PerDevice<Kernels> = PerDevice::new();

/// What each device has one of, made when it is first asked for.
pub(crate) struct PerDevice<T>(RwLock<Vec<(DeviceId, Arc<T>)>>);

impl<T> PerDevice<T> {
    pub(crate) const fn new() -> Self {
        Self(RwLock::new(Vec::new()))
    }

    pub(crate) fn get_or_make(
        &self,
        device: &CudaDevice,
        make: impl FnOnce() -> candle_core::Result<T>,
    ) -> candle_core::Result<Arc<T>> {
        let of_device =
            |all: &[(DeviceId, Arc<T>)]| all.iter().find(|(id, _)| *id == device.id()).map(|(_, found)| found.clone());
        if let Some(found) = of_device(&self.0.read().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(found);
        }
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = of_device(&all) {
            return Ok(found);
        }
        let made = Arc::new(make()?);
        all.push((device.id(), made.clone()));
        Ok(made)
    }
}

struct Kernels {
    modules: Vec<Arc<CudaModule>>,
    /// Those that were launched.
    functions: Mutex<HashMap<String, Function>>,
}

struct Function {
    code: CudaFunction,
    /// Dynamic shared memory that was asked for.
    shared_bytes: usize,
}

/// How many devices there are. Fails where a driver is there and does not work.
pub(crate) fn count() -> Result<usize> {
    match CudaContext::device_count() {
        Ok(count) => Ok(usize::try_from(count).unwrap_or(0)),
        Err(error) if error.0 == CUresult::CUDA_ERROR_NO_DEVICE => Ok(0),
        Err(error) => Err(candle_core::Error::wrap(error).into()),
    }
}

/// A device with a stream of its own, the same one whenever it is asked for. Fails if there is none of this number.
pub(crate) fn open(ordinal: usize) -> Result<Device> {
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(device) = opened.iter().find(|device| device.cuda_stream().context().ordinal() == ordinal) {
        return Ok(Device::Cuda(device.clone()));
    }
    let device = CudaDevice::new_with_stream(ordinal)?;
    // SAFETY: all tensors of a device are used on its one stream, in whose order memory is given back too.
    unsafe { device.disable_event_tracking() };
    keep_memory(&device)?;
    opened.push(device.clone());
    Ok(Device::Cuda(device))
}

/// Keeps memory that is given back for who asks next: by default the device's pool returns it to the system whenever somebody
/// waits for the stream, and each layer would map its memory anew.
fn keep_memory(device: &CudaDevice) -> candle_core::Result<()> {
    let Some(pool) = pool(device)? else { return Ok(()) };
    let mut kept = u64::MAX;
    let threshold = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the attribute is a number of 64 bits.
    unsafe { sys::cuMemPoolSetAttribute(pool, threshold, (&raw mut kept).cast()) }.result().w()
}

/// Where a device's memory comes from; `None` of one that has no pools.
fn pool(device: &CudaDevice) -> candle_core::Result<Option<sys::CUmemoryPool>> {
    if attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)? == 0 {
        return Ok(None);
    }
    let mut pool = std::ptr::null_mut();
    // SAFETY: a device that is open, and where its pool goes.
    unsafe { sys::cuDeviceGetDefaultMemPool(&raw mut pool, device.cuda_stream().context().cu_device()) }
        .result()
        .w()?;
    Ok(Some(pool))
}

/// What a device says of itself.
pub(crate) fn attribute(device: &CudaDevice, attribute: CUdevice_attribute) -> candle_core::Result<usize> {
    Ok(device.cuda_stream().context().attribute(attribute).w()? as usize)
}

/// Dynamic and static shared memory that a block may ask for.
pub(crate) fn most_shared_bytes(device: &CudaDevice) -> candle_core::Result<usize> {
    attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)
}

/// What the bits of a result depend on: which matrix instructions there are, and how much of a row a block holds.
pub(crate) fn kind(device: &CudaDevice) -> candle_core::Result<String> {
    let (major, minor) = device.cuda_stream().context().compute_capability().w()?;
    Ok(format!("cuda sm_{major}{minor} with {} bytes of shared memory", most_shared_bytes(device)?))
}

/// `cuda:0`, with the name that its driver gives.
pub(crate) fn name(device: &CudaDevice) -> candle_core::Result<String> {
    let stream = device.cuda_stream();
    let context = stream.context();
    Ok(format!("cuda:{} ({})", context.ordinal(), context.name().w()?))
}

/// Bytes that are free when all that was launched is done, and all of them.
pub(crate) fn memory(device: &CudaDevice) -> candle_core::Result<(usize, usize)> {
    let stream = device.cuda_stream();
    stream.synchronize().w()?;
    if let Some(pool) = pool(device)? {
        trim(pool)?;
    }
    stream.context().mem_get_info().w()
}

/// How many bytes more than before the device's pool held at most while `work` ran, with what it keeps for later; `None` of a
/// device that has no pools. For when nobody else uses the device in this process.
pub(crate) fn peak_of<E: From<KernelError>>(
    device: &CudaDevice,
    work: impl FnOnce() -> std::result::Result<(), E>,
) -> std::result::Result<Option<usize>, E> {
    let Some((pool, before)) = watch(device)? else { return work().map(|()| None) };
    work()?;
    Ok(Some(most_reserved(device, pool)?.saturating_sub(before)))
}

/// Has a device's pool count from now on what it holds at most; what it holds now. `None` of a device that has no pools.
fn watch(device: &CudaDevice) -> Result<Option<(sys::CUmemoryPool, usize)>> {
    let Some(pool) = pool(device)? else { return Ok(None) };
    device.cuda_stream().synchronize().w()?;
    trim(pool)?;
    let mut start_again = 0_u64;
    let most = CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH;
    // SAFETY: the attribute is a number of 64 bits.
    unsafe { sys::cuMemPoolSetAttribute(pool, most, (&raw mut start_again).cast()) }.result().w()?;
    Ok(Some((pool, most_reserved(device, pool)?)))
}

/// What a pool held at most since it is watched, when all that was launched is done.
fn most_reserved(device: &CudaDevice, pool: sys::CUmemoryPool) -> Result<usize> {
    device.cuda_stream().synchronize().w()?;
    let mut bytes = 0_u64;
    let most = CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH;
    // SAFETY: the attribute is a number of 64 bits.
    unsafe { sys::cuMemPoolGetAttribute(pool, most, (&raw mut bytes).cast()) }.result().w()?;
    Ok(bytes as usize)
}

/// Gives back what a pool keeps for later, which counts as taken.
fn trim(pool: sys::CUmemoryPool) -> candle_core::Result<()> {
    // SAFETY: the pool of an open device.
    unsafe { sys::cuMemPoolTrimTo(pool, 0) }.result().w()
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
    if grid[1].max(grid[2]) > MOST_BLOCKS {
        bail!("{kernel}: of {grid:?} blocks the last two may be {MOST_BLOCKS}; batches of fewer tokens have fewer");
    }
    let stream = device.cuda_stream();
    // Kernels are found and changed in the context of the thread.
    stream.context().bind_to_thread().w()?;
    let function = LOADED.get_or_make(device, || Kernels::load(device))?.function(kernel, shared_bytes)?;
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

impl Kernels {
    fn load(device: &CudaDevice) -> candle_core::Result<Self> {
        let stream = device.cuda_stream();
        let load = |image: &&[u8]| stream.context().load_module(Ptx::from_binary(image.to_vec())).w();
        let modules = IMAGES.iter().map(load).collect::<candle_core::Result<_>>()?;
        Ok(Self { modules, functions: Mutex::default() })
    }

    /// A kernel that may be launched with so much dynamic shared memory.
    fn function(&self, name: &str, shared_bytes: usize) -> candle_core::Result<CudaFunction> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = functions.get(name).filter(|found| found.shared_bytes >= shared_bytes) {
            return Ok(found.code.clone());
        }
        let known = functions.get(name).map(|found| found.code.clone());
        let load = || self.modules.iter().find_map(|module| module.load_function(name).ok());
        let Some(code) = known.or_else(load) else {
            bail!("no device code has a kernel {name}");
        };
        if shared_bytes > 0 {
            // How much there is without asking depends on the static arrays of the kernel.
            let attribute = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            code.set_attribute(attribute, shared_bytes as i32).w()?;
        }
        functions.insert(name.to_owned(), Function { code: code.clone(), shared_bytes });
        Ok(code)
    }
}

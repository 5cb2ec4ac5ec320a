//! A CUDA driver without a GPU, for tests: a program that is linked with CUDA's libraries finds one device here, whose kernels
//! `kernels/emulator` runs on the CPU, at once and to their end. Images of code are not looked at: a kernel is found by its name.
//!
//! Device memory is NaN until it is written, and after it was given back. Copies must lie within one allocation, and what writes
//! behind an allocation, or launches what a driver refuses, ends the process. `EMULATED_DEVICE_MEMORY` says how many bytes there are,
//! `EMULATED_DEVICE_SEED` in which order threads run (`emulator::Launch::seed`). There is one stream; an event says which copies of locked
//! memory came before it (`copies`). Libraries for matrices and random numbers can be opened and no more.

#![expect(clippy::missing_safety_doc, reason = "the manual of CUDA's driver has the contracts")]
#![expect(clippy::not_unsafe_ptr_arg_deref, reason = "each says so beside its use")]

use std::alloc::Layout;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};

use emulator::Launch;

mod copies;

const SUCCESS: c_int = 0;
const INVALID_VALUE: c_int = 1;
const OUT_OF_MEMORY: c_int = 2;
const INVALID_DEVICE: c_int = 101;
const NOT_FOUND: c_int = 500;
const LAUNCH_FAILED: c_int = 719;

/// Where every allocation begins, as CUDA has it.
const ALIGNMENT: usize = 256;
/// Bytes behind an allocation that nobody may write.
const GUARD_BYTES: usize = 256;
/// A NaN in every format.
const POISON: u8 = 0xff;
/// Shared memory, dynamic and static, that a kernel has without asking, and that it may ask for on an H200.
const SHARED_BYTES: usize = 48 << 10;
const MOST_SHARED_BYTES: usize = 227 << 10;

const ATTRIBUTE_MULTIPROCESSORS: c_int = 16;
const ATTRIBUTE_MAJOR: c_int = 75;
const ATTRIBUTE_MINOR: c_int = 76;
const ATTRIBUTE_MOST_SHARED_BYTES: c_int = 97;
const ATTRIBUTE_MEMORY_POOLS: c_int = 115;
const FUNCTION_MOST_SHARED_BYTES: c_int = 8;
const POOL_RELEASE_THRESHOLD: c_int = 4;
const POOL_RESERVED: c_int = 5;
const POOL_MOST_RESERVED: c_int = 6;

/// What is opened and only handed back.
type Handle = *mut c_void;
type Address = u64;

/// Allocations by where they begin, with their bytes.
static MEMORY: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());

/// Bytes that were allocated at once at most, since it was last set back.
static MOST_RESERVED: AtomicUsize = AtomicUsize::new(0);

static MEMORY_BYTES: LazyLock<usize> = LazyLock::new(|| setting("EMULATED_DEVICE_MEMORY").unwrap_or(4 << 30));
static SEED: LazyLock<usize> = LazyLock::new(|| setting("EMULATED_DEVICE_SEED").unwrap_or(0));

fn setting(name: &str) -> Option<usize> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| fault(&format!("{name}={value} is no number"))))
}

/// What no test goes on after.
fn fault(what: &str) -> ! {
    eprintln!("emulated device: {what}");
    std::process::abort();
}

fn memory() -> std::sync::MutexGuard<'static, BTreeMap<usize, usize>> {
    MEMORY.lock().unwrap_or_else(PoisonError::into_inner)
}

fn layout(len: usize) -> Layout {
    Layout::from_size_align(len + GUARD_BYTES, ALIGNMENT).unwrap_or_else(|_| fault("an allocation without end"))
}

/// Writes where the caller wants a result.
fn put<T>(target: *mut T, value: T) -> c_int {
    // SAFETY: callers pass where a result goes.
    unsafe { target.write(value) };
    SUCCESS
}

fn named() -> Handle {
    ptr::without_provenance_mut(1)
}

/// Memory on the device, which `len` bytes from there on must be.
fn checked(address: Address, len: usize, what: &str) -> *mut u8 {
    let address = address as usize;
    let is_inside = memory().range(..=address).next_back().is_some_and(|(start, size)| address + len <= start + size);
    if !is_inside {
        fault(&format!("{what} of {len} bytes at {address:#x}, which is not an allocation"));
    }
    ptr::with_exposed_provenance_mut(address)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(_flags: c_uint) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetCount(count: *mut c_int) -> c_int {
    put(count, 1)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> c_int {
    if ordinal == 0 { put(device, 0) } else { INVALID_DEVICE }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, _device: c_int) -> c_int {
    let text = c"emulated device";
    if (len as usize) < text.count_bytes() + 1 {
        return INVALID_VALUE;
    }
    // SAFETY: there is room for the name and its end.
    unsafe { ptr::copy_nonoverlapping(text.as_ptr(), name, text.count_bytes() + 1) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) -> c_int {
    put(bytes, *MEMORY_BYTES)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, _device: c_int) -> c_int {
    put(
        value,
        match attribute {
            ATTRIBUTE_MULTIPROCESSORS => 4,
            ATTRIBUTE_MAJOR => 9,
            ATTRIBUTE_MINOR => 0,
            ATTRIBUTE_MOST_SHARED_BYTES => MOST_SHARED_BYTES as c_int,
            ATTRIBUTE_MEMORY_POOLS => 1,
            _ => 0,
        },
    )
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRetain(context: *mut Handle, _device: c_int) -> c_int {
    put(context, named())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: c_int) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxGetCurrent(context: *mut Handle) -> c_int {
    put(context, named())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(_context: Handle) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> c_int {
    copies::finish(copies::num_asked());
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxDestroy_v2(_context: Handle) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamCreate(stream: *mut Handle, _flags: c_uint) -> c_int {
    put(stream, named())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(_stream: Handle) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(_stream: Handle) -> c_int {
    cuCtxSynchronize()
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamIsCapturing(_stream: Handle, status: *mut c_int) -> c_int {
    put(status, 0)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(_stream: Handle, _event: Handle, _flags: c_uint) -> c_int {
    SUCCESS
}

/// Which copies came before it.
#[derive(Default)]
pub struct Event(AtomicUsize);

#[unsafe(no_mangle)]
pub extern "C" fn cuEventCreate(event: *mut *mut Event, _flags: c_uint) -> c_int {
    put(event, Box::into_raw(Box::default()))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventRecord(event: *const Event, _stream: Handle) -> c_int {
    // SAFETY: the caller's event.
    unsafe { &*event }.0.store(copies::num_asked(), Ordering::Relaxed);
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventSynchronize(event: *const Event) -> c_int {
    // SAFETY: the caller's event.
    copies::finish(unsafe { &*event }.0.load(Ordering::Relaxed));
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventDestroy_v2(event: *mut Event) -> c_int {
    // SAFETY: the caller's event, made by `cuEventCreate`.
    drop(unsafe { Box::from_raw(event) });
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGetErrorString(error: c_int, text: *mut *const c_char) -> c_int {
    let found = match error {
        SUCCESS => c"no error",
        INVALID_VALUE => c"invalid argument",
        OUT_OF_MEMORY => c"out of memory",
        INVALID_DEVICE => c"invalid device ordinal",
        NOT_FOUND => c"named symbol not found",
        LAUNCH_FAILED => c"unspecified launch failure",
        _ => c"an error that the emulated device does not give",
    };
    put(text, found.as_ptr())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGetErrorName(error: c_int, text: *mut *const c_char) -> c_int {
    cuGetErrorString(error, text)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> c_int {
    let used: usize = memory().values().sum();
    put(total, *MEMORY_BYTES);
    put(free, MEMORY_BYTES.saturating_sub(used))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAlloc_v2(address: *mut Address, len: usize) -> c_int {
    if len == 0 {
        return INVALID_VALUE;
    }
    let mut memory = memory();
    let used = memory.values().sum::<usize>() + len;
    if used > *MEMORY_BYTES {
        return OUT_OF_MEMORY;
    }
    MOST_RESERVED.fetch_max(used, Ordering::Relaxed);
    // SAFETY: it has bytes, of its guard at least.
    let start = unsafe { std::alloc::alloc(layout(len)) };
    if start.is_null() {
        return OUT_OF_MEMORY;
    }
    // SAFETY: as long as it was asked for.
    unsafe { start.write_bytes(POISON, len + GUARD_BYTES) };
    memory.insert(start.expose_provenance(), len);
    put(address, start.addr() as Address)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAllocAsync(address: *mut Address, len: usize, _stream: Handle) -> c_int {
    cuMemAlloc_v2(address, len)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(address: Address) -> c_int {
    let Some(len) = memory().remove(&(address as usize)) else {
        fault(&format!("{address:#x} was given back, which is not an allocation"));
    };
    let start: *mut u8 = ptr::with_exposed_provenance_mut(address as usize);
    // SAFETY: an allocation and its guard, which is nobody's any more.
    let bytes = unsafe { std::slice::from_raw_parts_mut(start, len + GUARD_BYTES) };
    if bytes[len..].iter().any(|byte| *byte != POISON) {
        fault(&format!("somebody wrote behind an allocation of {len} bytes"));
    }
    bytes.fill(POISON);
    // SAFETY: allocated with this layout.
    unsafe { std::alloc::dealloc(start, layout(len)) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeAsync(address: Address, _stream: Handle) -> c_int {
    cuMemFree_v2(address)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD8Async(address: Address, value: u8, len: usize, _stream: Handle) -> c_int {
    let target = checked(address, len, "a filling");
    // SAFETY: checked.
    unsafe { target.write_bytes(value, len) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyHtoDAsync_v2(to: Address, from: *const c_void, len: usize, _stream: Handle) -> c_int {
    let target = checked(to, len, "a copy to memory");
    // SAFETY: the target was checked, the source is the caller's.
    unsafe { copies::from_host(from, target, len) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: Address, len: usize, _stream: Handle) -> c_int {
    let source = checked(from, len, "a copy from memory");
    // SAFETY: the source was checked, the target is the caller's.
    unsafe { copies::to_host(source, to, len) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoDAsync_v2(to: Address, from: Address, len: usize, _stream: Handle) -> c_int {
    let (target, source) = (checked(to, len, "a copy to memory"), checked(from, len, "a copy from memory"));
    // SAFETY: both were checked.
    unsafe { ptr::copy(source.cast_const(), target, len) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyPeerAsync(
    to: Address,
    _to_context: Handle,
    from: Address,
    _from_context: Handle,
    len: usize,
    stream: Handle,
) -> c_int {
    cuMemcpyDtoDAsync_v2(to, from, len, stream)
}

/// Locked memory of the host, which is not the device's.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostAlloc(start: *mut *mut c_void, len: usize, _flags: c_uint) -> c_int {
    // SAFETY: it has bytes, of its guard at least.
    let memory = unsafe { std::alloc::alloc_zeroed(layout(len)) };
    if memory.is_null() {
        return OUT_OF_MEMORY;
    }
    copies::lock(memory.expose_provenance(), len);
    put(start, memory.cast())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeHost(start: *mut c_void) -> c_int {
    let len = copies::unlock(start.addr());
    // SAFETY: allocated with this layout, and no copy of it is under way.
    unsafe { std::alloc::dealloc(start.cast(), layout(len)) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetDefaultMemPool(pool: *mut Handle, _device: c_int) -> c_int {
    put(pool, named())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemPoolSetAttribute(_pool: Handle, attribute: c_int, value: *mut c_void) -> c_int {
    match attribute {
        POOL_RELEASE_THRESHOLD => SUCCESS,
        // SAFETY: the caller passes a number of 64 bits.
        POOL_MOST_RESERVED if unsafe { value.cast::<u64>().read() } == 0 => {
            MOST_RESERVED.store(memory().values().sum(), Ordering::Relaxed);
            SUCCESS
        }
        _ => INVALID_VALUE,
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemPoolGetAttribute(_pool: Handle, attribute: c_int, value: *mut c_void) -> c_int {
    match attribute {
        POOL_RESERVED => put(value.cast(), memory().values().sum::<usize>() as u64),
        POOL_MOST_RESERVED => put(value.cast(), MOST_RESERVED.load(Ordering::Relaxed) as u64),
        _ => INVALID_VALUE,
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemPoolTrimTo(_pool: Handle, _least: usize) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleLoadData(module: *mut Handle, _image: *const c_void) -> c_int {
    put(module, named())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleLoad(_module: *mut Handle, _path: *const c_char) -> c_int {
    NOT_FOUND
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleUnload(_module: Handle) -> c_int {
    SUCCESS
}

/// A kernel by its name; lives as long as the process, as there are only so many.
pub struct Function {
    name: CString,
    /// Dynamic shared memory that was asked for.
    asked_bytes: AtomicUsize,
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleGetFunction(function: *mut *const Function, _module: Handle, name: *const c_char) -> c_int {
    // SAFETY: callers pass a string.
    let name = unsafe { CStr::from_ptr(name) };
    if !emulator::has(name) {
        eprintln!("emulated device: there is no kernel {name:?}");
        return NOT_FOUND;
    }
    let found = Function { name: name.to_owned(), asked_bytes: AtomicUsize::new(0) };
    put(function, ptr::from_ref(Box::leak(Box::new(found))))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFuncSetAttribute(function: *const Function, attribute: c_int, value: c_int) -> c_int {
    // SAFETY: functions live as long as the process.
    let function = unsafe { &*function };
    let fits = usize::try_from(value).is_ok_and(|bytes| bytes <= MOST_SHARED_BYTES);
    if attribute != FUNCTION_MOST_SHARED_BYTES || !fits {
        return INVALID_VALUE;
    }
    function.asked_bytes.store(value as usize, Ordering::Relaxed);
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: *const Function,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    shared_bytes: c_uint,
    _stream: Handle,
    params: *mut *mut c_void,
    _extra: *mut *mut c_void,
) -> c_int {
    // SAFETY: functions live as long as the process.
    let function = unsafe { &*function };
    let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
    if grid_y > 65535 || grid_z > 65535 {
        eprintln!("emulated device: {:?} on a grid of {grid:?}", function.name);
        return INVALID_VALUE;
    }
    let launch = Launch { grid, block, shared_bytes: shared_bytes as usize, seed: *SEED as u32 };
    // SAFETY: the caller passes an address for each argument.
    if let Err(error) = unsafe { emulator::launch_with(&function.name, launch, params) } {
        eprintln!("emulated device: {error}");
        return LAUNCH_FAILED;
    }
    // How much is static shows only now.
    let (dynamic, fixed) = (shared_bytes as usize, emulator::static_shared_bytes());
    let asked = function.asked_bytes.load(Ordering::Relaxed);
    if dynamic + fixed > SHARED_BYTES && dynamic > asked || dynamic + fixed > MOST_SHARED_BYTES {
        eprintln!("emulated device: {:?} with {dynamic} + {fixed} bytes of shared memory", function.name);
        return INVALID_VALUE;
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasCreate_v2(handle: *mut Handle) -> c_int {
    put(handle, named())
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasDestroy_v2(_handle: Handle) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasSetStream_v2(_handle: Handle, _stream: Handle) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn curandCreateGenerator(generator: *mut Handle, _kind: c_int) -> c_int {
    put(generator, named())
}

#[unsafe(no_mangle)]
pub extern "C" fn curandDestroyGenerator(_generator: Handle) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn curandSetPseudoRandomGeneratorSeed(_generator: Handle, _seed: u64) -> c_int {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn curandSetStream(_generator: Handle, _stream: Handle) -> c_int {
    SUCCESS
}

//! Copies between host and device, through page-locked memory: a device reads and writes that by itself while the host goes on. From
//! other memory the driver copies first, and the host waits.

use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream, result};
use candle_core::cuda_backend::{CudaDevice, WrapErr};

use super::address::Address;
use super::device::PerDevice;

/// Memory that is waited for as a whole, and the longest single copy. At 50 GB/s over the bus it takes 80 µs, beside which what
/// a copy costs by itself is little.
const PIECE_BYTES: usize = 4 << 20;

/// One is filled while the device reads others.
const NUM_PIECES: usize = 4;

/// Where copies begin, in lines of the host's cache.
const ALIGNMENT: usize = 64;

static RINGS: PerDevice<Mutex<Ring>> = PerDevice::new();

/// Copies bytes to device memory, behind what was launched before. They may change when this returns.
///
/// # Safety
/// So many bytes at `to` are memory of the device that nobody reads or writes meanwhile on another stream than the device's.
pub(crate) unsafe fn upload(device: &CudaDevice, to: Address, bytes: &[MaybeUninit<u8>]) -> candle_core::Result<()> {
    // SAFETY: the caller's.
    with_ring(device, |ring| unsafe { ring.upload(to, bytes) })
}

/// Fills `targets` with what is in device memory from each address on when all that was launched before is done, and waits for that.
///
/// # Safety
/// So many bytes at each address are initialised memory of the device, which nobody writes on another stream than the device's.
pub(crate) unsafe fn download(device: &CudaDevice, targets: &mut [(Address, &mut [u8])]) -> candle_core::Result<()> {
    // SAFETY: the caller's.
    with_ring(device, |ring| unsafe { ring.download(targets) })
}

fn with_ring<T>(device: &CudaDevice, copy: impl FnOnce(&mut Ring) -> candle_core::Result<T>) -> candle_core::Result<T> {
    let ring = RINGS.get_or_make(device, || Ok(Mutex::new(Ring::new(device.cuda_stream())?)))?;
    // Copies and memory are the context's of the thread.
    device.cuda_stream().context().bind_to_thread().w()?;
    copy(&mut ring.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Pieces that are filled one after the other, and again when the device is done with what was there.
struct Ring {
    stream: Arc<CudaStream>,
    pieces: Vec<Piece>,
    /// The one that has room.
    current: usize,
}

struct Piece {
    memory: LockedMemory,
    /// From the start on.
    used: usize,
    /// Comes behind the last copy when it is full.
    done: CudaEvent,
}

/// A part of a piece.
#[derive(Clone, Copy)]
struct Place {
    piece: usize,
    start: usize,
}

impl Ring {
    fn new(stream: Arc<CudaStream>) -> candle_core::Result<Self> {
        let piece = || {
            let done = stream.context().new_event(None).w()?;
            Ok(Piece { memory: LockedMemory::new(&stream)?, used: 0, done })
        };
        let pieces = (0..NUM_PIECES).map(|_| piece()).collect::<candle_core::Result<_>>()?;
        Ok(Self { stream, pieces, current: 0 })
    }

    /// A place for at most [`PIECE_BYTES`], with which the device is done.
    fn claim(&mut self, len: usize) -> candle_core::Result<Place> {
        if !self.has_room(len) {
            self.pieces[self.current].done.record(&self.stream).w()?;
            self.current = (self.current + 1) % NUM_PIECES;
            let piece = &mut self.pieces[self.current];
            piece.done.synchronize().w()?;
            piece.used = 0;
        }
        let piece = &mut self.pieces[self.current];
        let start = piece.used;
        piece.used = (start + len).next_multiple_of(ALIGNMENT);
        Ok(Place { piece: self.current, start })
    }

    /// Whether the current piece has it.
    fn has_room(&self, len: usize) -> bool {
        self.pieces[self.current].used + len <= PIECE_BYTES
    }

    /// # Safety
    /// As of the function of this name.
    unsafe fn upload(&mut self, to: Address, bytes: &[MaybeUninit<u8>]) -> candle_core::Result<()> {
        for (idx, part) in bytes.chunks(PIECE_BYTES).enumerate() {
            let place = self.claim(part.len())?;
            let staged = self.bytes(place, part.len());
            staged.copy_from_slice(part);
            let (to, stream) = (to.plus(idx * PIECE_BYTES).raw(), self.stream.cu_stream());
            // SAFETY: the target is the caller's, and the source is ours until the device is done.
            unsafe { result::memcpy_htod_async(to, self.bytes(place, part.len()), stream) }.w()?;
        }
        Ok(())
    }

    /// # Safety
    /// As of the function of this name.
    unsafe fn download(&mut self, targets: &mut [(Address, &mut [u8])]) -> candle_core::Result<()> {
        let mut parts = targets.iter_mut().flat_map(|(from, target)| {
            let from = *from;
            let places = target.chunks_mut(PIECE_BYTES).enumerate();
            places.map(move |(idx, part)| (from.plus(idx * PIECE_BYTES), part))
        });
        // As many at once as the pieces have room for.
        let mut next = parts.next();
        while next.is_some() {
            let (mut staged, mut others) = (Vec::new(), NUM_PIECES - 1);
            while let Some((from, part)) = next.take_if(|(_, part)| self.has_room(part.len()) || others > 0) {
                others -= usize::from(!self.has_room(part.len()));
                let place = self.claim(part.len())?;
                let stream = self.stream.cu_stream();
                // SAFETY: the source is the caller's, and the target is ours until the device is done.
                unsafe { result::memcpy_dtoh_async(self.bytes(place, part.len()), from.raw(), stream) }.w()?;
                staged.push((place, part));
                next = parts.next();
            }
            self.stream.synchronize().w()?;
            for (place, part) in staged {
                // SAFETY: the device wrote it, and was waited for.
                part.copy_from_slice(unsafe { self.bytes(place, part.len()).assume_init_ref() });
            }
        }
        Ok(())
    }

    fn bytes(&mut self, place: Place, len: usize) -> &mut [MaybeUninit<u8>] {
        &mut self.pieces[place.piece].memory.bytes()[place.start..place.start + len]
    }
}

/// [`PIECE_BYTES`] of the host that its system does not move.
struct LockedMemory(NonNull<MaybeUninit<u8>>);

// SAFETY: it is memory that one has.
unsafe impl Send for LockedMemory {}

impl LockedMemory {
    fn new(stream: &CudaStream) -> candle_core::Result<Self> {
        stream.context().bind_to_thread().w()?;
        // SAFETY: a size, and no flags.
        let start = unsafe { result::malloc_host(PIECE_BYTES, 0) }.w()?;
        Ok(Self(NonNull::new(start.cast()).expect("the driver gives memory or an error")))
    }

    fn bytes(&mut self) -> &mut [MaybeUninit<u8>] {
        // SAFETY: as long as it was asked for, and ours alone but for copies of the device, whose places nobody looks at before
        // they are done.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_ptr(), PIECE_BYTES) }
    }
}

impl Drop for LockedMemory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`. That fails only where the driver is gone, and the memory with it.
        let _ = unsafe { result::free_host(self.0.as_ptr().cast()) };
    }
}

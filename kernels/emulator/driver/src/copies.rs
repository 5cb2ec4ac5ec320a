//! Copies between the device and locked memory of the host, as far as somebody can see that they are not done when they are asked
//! for: what is copied from there must not change until the copy is waited for, and what is copied to there is not to be read before.
//!
//! The device's side is there at once, as kernels run at once too. Copies of other memory are done when they are asked for: a driver
//! copies that itself before it returns, or waits.

use std::ffi::c_void;
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{POISON, fault};

struct Copies {
    /// Of locked memory: where it begins, and its bytes.
    locked: Vec<(usize, usize)>,
    /// In the order in which they were asked for.
    pending: Vec<Pending>,
    /// How many were asked for before the pending ones.
    num_done: usize,
}

struct Pending {
    /// On the host.
    start: usize,
    bytes: Vec<u8>,
    is_to_host: bool,
}

static COPIES: Mutex<Copies> = Mutex::new(Copies { locked: Vec::new(), pending: Vec::new(), num_done: 0 });

fn copies() -> MutexGuard<'static, Copies> {
    COPIES.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn lock(start: usize, len: usize) {
    copies().locked.push((start, len));
}

/// Its bytes. Ends the process where a copy of it is under way.
pub(super) fn unlock(start: usize) -> usize {
    let mut copies = copies();
    let Some(idx) = copies.locked.iter().position(|&(first, _)| first == start) else {
        fault(&format!("{start:#x} was given back, which is no locked memory"));
    };
    let (_, len) = copies.locked.remove(idx);
    if copies.pending.iter().any(|copy| copy.overlaps(start, len)) {
        fault("locked memory was given back while it is copied");
    }
    len
}

/// # Safety
/// `from` can be read and `to` written, for `len` bytes each.
pub(super) unsafe fn from_host(from: *const c_void, to: *mut u8, len: usize) {
    // SAFETY: the caller's.
    unsafe { ptr::copy(from.cast(), to, len) };
    // SAFETY: the caller's; what was copied to is initialised now.
    let bytes = unsafe { std::slice::from_raw_parts(to, len) };
    copies().push(from.addr(), bytes, false);
}

/// # Safety
/// As of [`from_host`].
pub(super) unsafe fn to_host(from: *const u8, to: *mut c_void, len: usize) {
    // SAFETY: the caller's; device memory is initialised when it is allocated.
    let bytes = unsafe { std::slice::from_raw_parts(from, len) };
    if copies().push(to.expose_provenance(), bytes, true) {
        // SAFETY: the caller's.
        unsafe { to.cast::<u8>().write_bytes(POISON, len) };
    } else {
        // SAFETY: the caller's.
        unsafe { ptr::copy(from, to.cast(), len) };
    }
}

/// How many copies were asked for until now.
pub(super) fn num_asked() -> usize {
    let copies = copies();
    copies.num_done + copies.pending.len()
}

/// Does the first `num_asked` of all copies.
pub(super) fn finish(num_asked: usize) {
    let mut copies = copies();
    let count = num_asked.saturating_sub(copies.num_done).min(copies.pending.len());
    copies.num_done += count;
    for copy in copies.pending.drain(..count) {
        copy.finish();
    }
}

impl Copies {
    /// False for memory that is not locked.
    fn push(&mut self, start: usize, bytes: &[u8], is_to_host: bool) -> bool {
        let is_locked = self.locked.iter().any(|&(first, len)| first <= start && start + bytes.len() <= first + len);
        if is_locked {
            if self.pending.iter().any(|copy| (copy.is_to_host || is_to_host) && copy.overlaps(start, bytes.len())) {
                fault("locked memory is copied to while another copy of it is under way");
            }
            self.pending.push(Pending { start, bytes: bytes.to_vec(), is_to_host });
        }
        is_locked
    }
}

impl Pending {
    fn overlaps(&self, start: usize, len: usize) -> bool {
        self.start < start + len && start < self.start + self.bytes.len()
    }

    fn finish(self) {
        let len = self.bytes.len();
        let host: *mut u8 = ptr::with_exposed_provenance_mut(self.start);
        // SAFETY: locked memory, which is not given back before its copies are done.
        let host = unsafe { std::slice::from_raw_parts_mut(host, len) };
        if self.is_to_host {
            host.copy_from_slice(&self.bytes);
        } else if *host != *self.bytes {
            fault(&format!("{len} bytes of locked memory changed before they were copied to the device"));
        }
    }
}

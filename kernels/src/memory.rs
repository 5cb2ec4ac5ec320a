//! Owned aligned bytes, typed views of bytes, and slices that tasks write in disjoint parts.

use std::marker::PhantomData;

use half::{bf16, f16};

use crate::huge_pages;

/// Plain numbers without padding, of which every bit pattern is valid.
///
/// # Safety
/// Implementors have no padding and no invalid bit pattern.
pub(crate) unsafe trait Plain: Copy + Send + Sync + 'static {}

// SAFETY: every byte is a number.
#[cfg(feature = "cuda")]
unsafe impl Plain for u8 {}
// SAFETY: a u32 has no padding and every bit pattern is a number.
#[cfg(feature = "cuda")]
unsafe impl Plain for u32 {}
// SAFETY: an f32 has no padding and every bit pattern is a number.
unsafe impl Plain for f32 {}
// SAFETY: bf16 is a transparent u16.
unsafe impl Plain for bf16 {}
// SAFETY: f16 is a transparent u16.
unsafe impl Plain for f16 {}

/// One cache line; the unit of owned weight memory.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Bytes that start at a multiple of 64.
pub(crate) struct AlignedBytes {
    lines: Vec<Line>,
    len: usize,
}

impl AlignedBytes {
    pub(crate) fn zeroed(len: usize) -> Self {
        Self { lines: vec![Line([0; 64]); len.div_ceil(64)], len }
    }

    /// The same, in huge pages where the system has some.
    pub(crate) fn zeroed_huge(len: usize) -> Self {
        let num_lines = len.div_ceil(64);
        let mut lines = Vec::with_capacity(num_lines);
        huge_pages::wish_for(lines.spare_capacity_mut());
        lines.resize(num_lines, Line([0; 64]));
        Self { lines, len }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        let start = self.lines.as_ptr().cast::<u8>();
        // SAFETY: `lines` owns at least `len` initialised bytes (`zeroed` rounds up), and lives as long as the slice.
        unsafe { std::slice::from_raw_parts(start, self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        let start = self.lines.as_mut_ptr().cast::<u8>();
        // SAFETY: as in `as_slice`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(start, self.len) }
    }
}

/// Whether the bytes can be viewed as elements of type `T` in place.
pub(crate) fn is_aligned<T: Plain>(bytes: &[u8]) -> bool {
    bytes.as_ptr().cast::<T>().is_aligned()
}

/// Views bytes as numbers. Panics if they are misaligned or not a whole number of elements.
pub(crate) fn view<T: Plain>(bytes: &[u8]) -> &[T] {
    assert!(
        is_aligned::<T>(bytes) && bytes.len().is_multiple_of(size_of::<T>()),
        "bytes are not whole, aligned numbers"
    );
    // SAFETY: aligned and whole by the assertion; `Plain` makes every bit pattern valid; the lifetime is the input's.
    unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast::<T>(), bytes.len() / size_of::<T>()) }
}

/// Mutable form of [`view`].
pub(crate) fn view_mut<T: Plain>(bytes: &mut [u8]) -> &mut [T] {
    assert!(
        is_aligned::<T>(bytes) && bytes.len().is_multiple_of(size_of::<T>()),
        "bytes are not whole, aligned numbers"
    );
    let len = bytes.len() / size_of::<T>();
    // SAFETY: as in `view`; `Plain` has no padding, so the bytes stay initialised whatever is written.
    unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast::<T>(), len) }
}

/// The bytes of numbers.
#[cfg(feature = "cuda")]
pub(crate) fn bytes_of<T: Plain>(values: &mut [T]) -> &mut [u8] {
    let (start, len) = (values.as_mut_ptr().cast::<u8>(), size_of_val(values));
    // SAFETY: `Plain` has no padding, so all bytes are initialised, and whatever is written is a number.
    unsafe { std::slice::from_raw_parts_mut(start, len) }
}

/// The same bytes without sign.
pub(crate) fn unsigned(bytes: &[i8]) -> &[u8] {
    // SAFETY: both types are one byte of which every pattern is valid; the lifetime is the input's.
    unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast::<u8>(), bytes.len()) }
}

/// A mutable slice that tasks of one `parallel_for` write in parts that do not overlap.
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: it hands out `&mut [T]` parts that its users keep disjoint (contract of `part`), which `T: Send` allows.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), owner: PhantomData }
    }

    /// The elements `start..start + len`. Panics if they are out of bounds.
    ///
    /// # Safety
    /// No two parts that are alive at the same time overlap.
    #[expect(clippy::mut_from_ref, reason = "disjointness is the caller's contract")]
    pub(crate) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start <= self.len && len <= self.len - start, "part {start}+{len} of {} elements", self.len);
        // SAFETY: in bounds by the assertion, so the offset stays inside the borrowed slice.
        let first = unsafe { self.start.add(start) };
        // SAFETY: `start..start + len` lies in the slice that `owner` borrows mutably; the caller keeps parts disjoint.
        unsafe { std::slice::from_raw_parts_mut(first, len) }
    }
}

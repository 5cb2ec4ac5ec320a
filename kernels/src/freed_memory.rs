//! What the allocator does with memory that a step gives back.

/// Keeps freed memory in the process instead of giving it back to the system. A step allocates the activations that the
/// one before it freed; by default glibc returns allocations of that size at once, and the next step pays a page fault
/// for every 4 KiB it touches. What stays resident is what was in use at once before, up to 1 GiB at
/// the end of each heap, and whatever lies below memory that is still in use.
///
/// For the whole process, from the next allocation on: to be called when what is large and short-lived is behind it, as
/// after loading. Does nothing with other allocators than glibc's. What a user set in `GLIBC_TUNABLES` for the same
/// parameters is overridden.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn keep_freed_memory() {
    /// Free memory at the end of the heap above which glibc gives some back, in bytes.
    const TRIM_THRESHOLD: libc::c_int = 1 << 30;
    // SAFETY: sets a number under the allocator's own lock; no allocation is touched.
    let _refused = unsafe { libc::mallopt(libc::M_MMAP_MAX, 0) };
    // SAFETY: as above.
    let _refused = unsafe { libc::mallopt(libc::M_TRIM_THRESHOLD, TRIM_THRESHOLD) };
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn keep_freed_memory() {}

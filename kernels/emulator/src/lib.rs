//! Device code of `kernels` on a CPU, for tests: what it computes, in any order of its threads, without a GPU.
//!
//! `include/emulate.h` says what of CUDA there is. Device memory is the process's own.

use std::ffi::{CStr, CString, c_char, c_void};

/// Shape of a launch, as CUDA has it.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    pub grid: [u32; 3],
    /// At most 1024 threads.
    pub block: [u32; 3],
    pub shared_bytes: usize,
    /// In which order the threads of a block run; 0 is that of their numbers.
    pub seed: u32,
}

unsafe extern "C" {
    fn moesaic_emulate(
        name: *const c_char,
        grid: *const u32,
        block: *const u32,
        shared_bytes: usize,
        seed: u32,
        params: *mut *mut c_void,
    ) -> *const c_char;
    fn moesaic_emulates(name: *const c_char) -> bool;
    fn moesaic_static_shared() -> usize;
}

/// What is copied to a kernel as it lies in memory: a pointer, a number, a `#[repr(C)]` structure of such.
pub trait Argument {}

impl<T: Copy> Argument for T {}

/// Whether there is a kernel of this name.
pub fn has(kernel: &CStr) -> bool {
    // SAFETY: a string that ends.
    unsafe { moesaic_emulates(kernel.as_ptr()) }
}

/// Runs a kernel to its end.
///
/// # Errors
/// No kernel of this name, a block of an impossible size, a barrier that not all threads reach.
///
/// # Safety
/// `arguments` are the kernel's, in their order and of their types; what they point to is as the kernel wants it.
pub unsafe fn launch(kernel: &str, launch: Launch, arguments: &[&dyn Argument]) -> Result<(), String> {
    let address = |&argument: &&dyn Argument| std::ptr::from_ref(argument).cast::<c_void>().cast_mut();
    let mut params: Vec<*mut c_void> = arguments.iter().map(address).collect();
    let name = CString::new(kernel).map_err(|error| error.to_string())?;
    // SAFETY: the arguments are the caller's to answer for.
    unsafe { launch_with(&name, launch, params.as_mut_ptr()) }
}

/// The same with the addresses of the arguments.
///
/// # Errors
/// As [`launch`].
///
/// # Safety
/// As [`launch`]; there is an address for each argument of the kernel.
pub unsafe fn launch_with(kernel: &CStr, launch: Launch, params: *mut *mut c_void) -> Result<(), String> {
    let Launch { grid, block, shared_bytes, seed } = launch;
    // SAFETY: the arrays have three numbers each; the arguments are the caller's to answer for.
    let fault = unsafe { moesaic_emulate(kernel.as_ptr(), grid.as_ptr(), block.as_ptr(), shared_bytes, seed, params) };
    if fault.is_null() {
        return Ok(());
    }
    // SAFETY: a fault is a string constant.
    let fault = unsafe { CStr::from_ptr(fault) };
    Err(format!("{}: {}", kernel.to_string_lossy(), fault.to_string_lossy()))
}

/// Static shared memory that the last kernel of this thread used, in its last block.
pub fn static_shared_bytes() -> usize {
    // SAFETY: a number of the thread.
    unsafe { moesaic_static_shared() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(kernel: &str, blocks: u32, threads: u32, seed: u32) -> Result<Vec<u32>, String> {
        let mut out = vec![0u32; (blocks * threads) as usize];
        let pointer = out.as_mut_ptr();
        let shape = Launch { grid: [blocks, 1, 1], block: [threads, 1, 1], shared_bytes: 4 * threads as usize, seed };
        // SAFETY: the kernels of these tests take a place for a number of each thread.
        unsafe { launch(kernel, shape, &[&pointer]) }.map(|()| out)
    }

    #[test]
    fn threads_wait_for_each_other_in_every_order() {
        let of_block: Vec<u32> = (0..64).map(|idx| (idx + 63) % 64 + 1).collect();
        for seed in 0..5 {
            assert_eq!(run("check_neighbours", 3, 64, seed).unwrap(), of_block.repeat(3));
            let sums = [(0..32).sum::<u32>(), (32..64).sum()].map(|sum| vec![sum; 32]).concat();
            assert_eq!(run("check_warp_sums", 1, 64, seed).unwrap(), sums);
            // The second warp has 8 threads.
            let ballots = [[0x4924_9249; 32].as_slice(), &[0x92; 8]].concat();
            assert_eq!(run("check_ballots", 1, 40, seed).unwrap(), ballots);
        }
    }

    /// The first launch of a kernel shows it as the last one does.
    #[test]
    fn a_missed_barrier_shows() {
        let right: Vec<u32> = (0..64).map(|idx| (idx + 63) % 64 + 1).collect();
        for seed in [3, 1, 0, 2] {
            assert_ne!(run("check_missed_barrier", 1, 64, seed).unwrap(), right, "seed {seed}");
            // Who comes late finds what was written for the next round.
            assert_ne!(run("check_reused_memory", 1, 64, seed).unwrap(), [33; 64], "seed {seed}");
        }
    }

    const ONE_WARP: Launch = Launch { grid: [1; 3], block: [32, 1, 1], shared_bytes: 1024, seed: 0 };

    /// Matrices of small whole numbers, as bf16, whose product is exact.
    #[test]
    fn products_of_matrices_are_those_of_their_fragments() {
        let left = |row: usize, k: usize| (row * 5 + k * 3) % 17;
        let right = |k: usize, column: usize| (k * 7 + column * 2) % 13;
        let as_bf16 = |value: usize| ((value as f32).to_bits() >> 16) as u16;
        let a: Vec<u16> = (0..256).map(|i| as_bf16(left(i / 16, i % 16))).collect();
        let b: Vec<u16> = (0..128).map(|i| as_bf16(right(i / 8, i % 8))).collect();
        let b_columns: Vec<u16> = (0..128).map(|i| as_bf16(right(i % 16, i / 16))).collect();
        let product = |i: usize| (0..16).map(|k| left(i / 8, k) * right(k, i % 8)).sum::<usize>() as f32;
        let expected: Vec<f32> = (0..128).map(product).collect();
        for seed in 0..4 {
            let mut found = [[0f32; 128]; 3];
            let [c, loaded, columns] = found.each_mut().map(|c| c.as_mut_ptr());
            let (a, b, b_columns) = (a.as_ptr(), b.as_ptr(), b_columns.as_ptr());
            let shape = Launch { seed, ..ONE_WARP };
            // SAFETY: the arguments of the kernel, of its sizes.
            unsafe { launch("check_product", shape, &[&a, &b, &c]) }.unwrap();
            // SAFETY: the arguments of the kernel, of its sizes.
            unsafe { launch("check_loaded_product", shape, &[&a, &b, &b_columns, &loaded, &columns]) }.unwrap();
            assert!(found.iter().all(|c| c[..] == expected), "seed {seed}");
        }
    }

    #[test]
    fn copies_are_there_when_they_were_waited_for() {
        let numbers: Vec<u32> = (1..=128).collect();
        let run = |seed, is_there: u32, waits: u32| {
            let mut out = vec![0u32; 128];
            let (pointer, shape) = (out.as_mut_ptr(), Launch { seed, ..ONE_WARP });
            // SAFETY: the arguments of the kernel, of its sizes.
            unsafe { launch("check_copies", shape, &[&numbers.as_ptr(), &is_there, &waits, &pointer]) }.unwrap();
            out
        };
        for seed in 0..4 {
            assert_eq!(run(seed, 1, 1), numbers);
            assert_eq!(run(seed, 0, 1), [0; 128]);
        }
        // The first launch shows it.
        assert_ne!(run(0, 1, 0), numbers);
    }

    #[test]
    fn faults_are_told() {
        let fault = run("check_half_a_barrier", 1, 64, 0).unwrap_err();
        assert_eq!(fault, "check_half_a_barrier: threads wait at a barrier that others do not reach");
        assert!(run("check_overrun", 2, 64, 0).unwrap_err().contains("behind the block's shared memory"));
        assert!(run("check_neighbours", 0, 64, 0).unwrap_err().contains("a grid"));
        assert!(run("check_nothing", 1, 1, 0).unwrap_err().contains("no such kernel"));
        assert!(run("check_neighbours", 1, 1025, 0).unwrap_err().contains("1 to 1024"));
    }

    #[test]
    fn the_integer_product_is_one() {
        let of_element = |idx: usize| (idx * 83 + idx / 7) as u8;
        let a: Vec<u8> = (0..16 * 32).map(of_element).collect();
        let b: Vec<i8> = (0..8 * 32).map(|idx| of_element(idx + 5).cast_signed()).collect();
        let cell = |row: usize, col: usize| {
            1 + (0..32).map(|k| i32::from(a[row * 32 + k]) * i32::from(b[col * 32 + k])).sum::<i32>()
        };
        let product: Vec<i32> = (0..128).map(|idx| cell(idx / 8, idx % 8)).collect();
        for seed in 0..3 {
            let mut out = vec![0i32; 128];
            let (pointer, shape) = (out.as_mut_ptr(), Launch { seed, ..ONE_WARP });
            // SAFETY: the arguments of the kernel, of its sizes.
            unsafe { launch("check_mma_u8_s8", shape, &[&a.as_ptr(), &b.as_ptr(), &pointer]) }.unwrap();
            assert_eq!(out, product);
        }
    }

    #[test]
    fn bytes_are_gathered() {
        let out = run("check_permuted_bytes", 1, 32, 0).unwrap();
        assert_eq!(out[..3], [0x8382_8100, 0x0406_0507, 0xffff_ff00]);
    }
}

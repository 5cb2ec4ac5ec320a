//! Parity of the device code with the ops on the CPU, in several orders of its threads, with guarded and poisoned outputs.

mod activations;
mod attention;
mod cache;
mod gated_delta;
mod grouped;
#[cfg(feature = "cuda")]
mod launches;
mod linear;
mod norms;
mod route;
mod sampling;
mod tables;

use emulator::{Argument, Launch};
use half::bf16;

use super::ROW_THREADS;

/// Orders in which the threads of a block run.
const SEEDS: [u32; 4] = [0, 1, 2, 3];
/// Numbers before and behind an output that nobody may touch.
const GUARD: usize = 64;
/// Of a result that is rounded to bf16.
const BF16_TOLERANCE: f32 = 1.0 / 256.0;

/// What a kernel may write.
trait Output: Copy {
    const POISON: Self;

    fn bits(self) -> u32;
}

/// A type of activations.
trait Number: Output {
    const NAME: &str;

    fn from_f32(value: f32) -> Self;
    fn to_f32(self) -> f32;
}

impl Output for f32 {
    const POISON: Self = Self::NAN;

    fn bits(self) -> u32 {
        self.to_bits()
    }
}

impl Output for bf16 {
    const POISON: Self = Self::NAN;

    fn bits(self) -> u32 {
        self.to_bits().into()
    }
}

impl Output for u32 {
    const POISON: Self = 0xdead_beef;

    fn bits(self) -> u32 {
        self
    }
}

impl Number for f32 {
    const NAME: &str = "float";

    fn from_f32(value: f32) -> Self {
        value
    }

    fn to_f32(self) -> f32 {
        self
    }
}

impl Number for bf16 {
    const NAME: &str = "bf16";

    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }

    fn to_f32(self) -> f32 {
        Self::to_f32(self)
    }
}

/// What a kernel writes, between numbers that nobody may touch.
struct Buffer<T>(Vec<T>);

impl<T: Output> Buffer<T> {
    fn new(len: usize) -> Self {
        Self(vec![T::POISON; len + 2 * GUARD])
    }

    fn as_mut_ptr(&mut self) -> *mut T {
        self.0[GUARD..].as_mut_ptr()
    }

    fn into_vec(self) -> Vec<T> {
        let end = self.0.len() - GUARD;
        let mut guards = self.0[..GUARD].iter().chain(&self.0[end..]);
        assert!(guards.all(|guard| guard.bits() == T::POISON.bits()), "written out of bounds");
        self.0[GUARD..end].to_vec()
    }
}

/// What a kernel writes into `N` outputs of `len` numbers, the same in every order of its threads. `call` passes the seed
/// and where the outputs begin.
fn outputs<T: Output, const N: usize>(len: usize, call: impl Fn(u32, [*mut T; N])) -> [Vec<T>; N] {
    outputs_in(&SEEDS, len, call)
}

/// The same in these orders, one at least.
fn outputs_in<T: Output, const N: usize>(seeds: &[u32], len: usize, call: impl Fn(u32, [*mut T; N])) -> [Vec<T>; N] {
    let run = |seed| {
        let mut buffers: [Buffer<T>; N] = std::array::from_fn(|_| Buffer::new(len));
        call(seed, buffers.each_mut().map(Buffer::as_mut_ptr));
        buffers.map(Buffer::into_vec)
    };
    let first = run(seeds[0]);
    for &seed in &seeds[1..] {
        for (found, first) in run(seed).iter().zip(&first) {
            let is_equal = found.iter().zip(first).all(|(a, b)| a.bits() == b.bits());
            assert!(is_equal, "another order of threads gives other bits");
        }
    }
    first
}

/// # Safety
/// As [`emulator::launch`].
unsafe fn launch(kernel: &str, blocks: usize, seed: u32, arguments: &[&dyn Argument]) {
    let shape = Launch { grid: [blocks as u32, 1, 1], block: [ROW_THREADS as u32, 1, 1], shared_bytes: 0, seed };
    // SAFETY: the caller's.
    unsafe { emulator::launch(kernel, shape, arguments) }.unwrap();
}

fn stored<T: Number>(values: &[f32]) -> Vec<T> {
    values.iter().map(|&value| T::from_f32(value)).collect()
}

fn widened<T: Number>(values: &[T]) -> Vec<f32> {
    values.iter().map(|&value| value.to_f32()).collect()
}

fn tolerance<T: Number>(exact: f32) -> f32 {
    if T::NAME == "bf16" { BF16_TOLERANCE } else { exact }
}

/// For f32 and bf16 activations.
macro_rules! for_activations {
    ($check:ident) => {
        $check::<f32>();
        $check::<bf16>();
    };
}
use for_activations;

/// A kernel computes in f32 whatever it reads and writes.
#[track_caller]
fn assert_rounded<T: Number>(found: &[T], exact: &[f32]) {
    assert_eq!(bits(found), bits(&stored::<T>(exact)));
}

fn bits<T: Output>(values: &[T]) -> Vec<u32> {
    values.iter().map(|value| value.bits()).collect()
}

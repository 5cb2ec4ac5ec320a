//! The instruction set, detected once, and the way a kernel gets compiled for each.

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use crate::lanes::{Avx2, Avx512};
use crate::lanes::{Lanes, Portable};

static ISA: OnceLock<Isa> = OnceLock::new();

/// A path that this machine can run; each carries the proof of it.
#[derive(Clone, Copy)]
pub(crate) enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    Portable(Portable),
}

/// Code over 16 lanes that is compiled once per instruction set. `run` and all it calls with lanes must be
/// `#[inline(always)]`: only what is inlined into the entry function of a set may use its instructions.
pub(crate) trait Kernel {
    type Output;

    fn run<L: Lanes>(self, lanes: L) -> Self::Output;
}

/// The instruction set in use: `avx512`, `avx2` or `portable`. Part of the numerics fingerprint.
pub fn isa() -> &'static str {
    current().name()
}

/// Runs a kernel on the widest set of this machine.
pub(crate) fn run<K: Kernel>(kernel: K) -> K::Output {
    current().run(kernel)
}

fn current() -> Isa {
    *ISA.get_or_init(|| Isa::available()[0])
}

impl Isa {
    /// Paths of this machine, widest first.
    pub(crate) fn available() -> Vec<Self> {
        let mut paths = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            paths.extend(Avx512::detect().map(Self::Avx512));
            paths.extend(Avx2::detect().map(Self::Avx2));
        }
        paths.push(Self::Portable(Portable));
        paths
    }

    fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "avx2",
            Self::Portable(_) => "portable",
        }
    }

    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: an `Avx512` exists only where `Avx512::detect` found the features that the entry enables.
            Self::Avx512(lanes) => unsafe { enter_avx512(lanes, kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: an `Avx2` exists only where `Avx2::detect` found the features that the entry enables.
            Self::Avx2(lanes) => unsafe { enter_avx2(lanes, kernel) },
            Self::Portable(lanes) => kernel.run(lanes),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn enter_avx512<K: Kernel>(lanes: Avx512, kernel: K) -> K::Output {
    kernel.run(lanes)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn enter_avx2<K: Kernel>(lanes: Avx2, kernel: K) -> K::Output {
    kernel.run(lanes)
}

//! The instruction set, detected once, and the way a kernel gets compiled for each.

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use crate::amx::Amx;
use crate::error::{KernelError, Result};
#[cfg(target_arch = "x86_64")]
use crate::lanes::{Avx2, Avx512};
use crate::lanes::{Lanes, Portable};

static CHOSEN: OnceLock<Chosen> = OnceLock::new();

/// A path that this machine can run; each carries the proof of it.
#[derive(Clone, Copy)]
pub(crate) enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    Portable(Portable),
}

/// What every op runs on.
#[derive(Clone, Copy)]
struct Chosen {
    lanes: Isa,
    #[cfg(target_arch = "x86_64")]
    tiles: Option<Amx>,
}

/// The name that means the first of [`isas`].
const AUTO: &str = "auto";

/// Code over 16 lanes that is compiled once per instruction set. `run` and all it calls with lanes must be
/// `#[inline(always)]`: only what is inlined into the entry function of a set may use its instructions.
pub(crate) trait Kernel {
    type Output;

    fn run<L: Lanes>(self, lanes: L) -> Self::Output;
}

/// A kernel that is shaped for many registers, with another one for few: so that each is compiled only for the sets that
/// run it.
pub(crate) trait ByWidth: Kernel {
    type Narrow: Kernel<Output = Self::Output>;

    fn narrow(self) -> Self::Narrow;
}

/// The instruction set in use, one of [`isas`]. Results of quantized weights are the same bits on all.
pub fn isa() -> &'static str {
    chosen().name()
}

/// Names of the instruction sets that this machine has, fastest first: `amx` (tiles, and vectors of AVX-512), `avx512`
/// (F, BW, VL and VNNI), `avx2` (with FMA and F16C), `portable`.
pub fn isas() -> Vec<&'static str> {
    Chosen::available().map(Chosen::name).collect()
}

/// Makes every op run on the instruction set of this name, or the fastest for `auto`. The first choice, or the first op,
/// wins. Fails on a set that is not among [`isas`], or where another one is in use.
pub fn choose_isa(name: &str) -> Result<()> {
    let invalid = |reason| Err(KernelError::Invalid { op: "isa", reason });
    let mut available = Chosen::available();
    let wanted = if name == AUTO { available.next() } else { available.find(|choice| choice.name() == name) };
    let Some(wanted) = wanted else {
        return invalid(format!("this machine has no `{name}`, it has {}", isas().join(", ")));
    };
    match CHOSEN.get_or_init(|| wanted) {
        chosen if name == AUTO || chosen.name() == wanted.name() => Ok(()),
        chosen => invalid(format!("`{}` is in use already", chosen.name())),
    }
}

/// Runs a kernel on vectors of the chosen set.
pub(crate) fn run<K: Kernel>(kernel: K) -> K::Output {
    chosen().lanes.run(kernel)
}

/// Runs the form of a kernel that is made for the chosen set.
pub(crate) fn run_by_width<K: ByWidth>(kernel: K) -> K::Output {
    chosen().lanes.run_by_width(kernel)
}

/// Whether the chosen set contains AVX2.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx2() -> bool {
    !matches!(chosen().lanes, Isa::Portable(_))
}

/// Runs a kernel of tiles on the vectors that come with them. Panics if others are chosen.
#[cfg(target_arch = "x86_64")]
pub(crate) fn run_beside_tiles<K: Kernel>(kernel: K) -> K::Output {
    match chosen().lanes {
        // SAFETY: an `Avx512` exists only where `Avx512::detect` found the features that the entry enables.
        Isa::Avx512(lanes) => unsafe { enter_avx512(lanes, kernel) },
        Isa::Avx2(_) | Isa::Portable(_) => panic!("tiles are used beside AVX-512 only"),
    }
}

/// The tiles of the chosen set.
#[cfg(target_arch = "x86_64")]
pub(crate) fn tiles() -> Option<Amx> {
    chosen().tiles
}

fn chosen() -> &'static Chosen {
    CHOSEN.get_or_init(|| Chosen::available().next().expect("every machine has the portable path"))
}

impl Chosen {
    /// Fastest first.
    fn available() -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        {
            let vectors = |lanes| Self { lanes, tiles: None };
            let widest = Isa::available()[0];
            let tiles = Amx::detect().filter(|_| matches!(widest, Isa::Avx512(_)));
            tiles
                .map(|amx| Self { lanes: widest, tiles: Some(amx) })
                .into_iter()
                .chain(Isa::available().into_iter().map(vectors))
        }
        #[cfg(not(target_arch = "x86_64"))]
        Isa::available().into_iter().map(|lanes| Self { lanes })
    }

    fn name(self) -> &'static str {
        #[cfg(target_arch = "x86_64")]
        if self.tiles.is_some() {
            return "amx";
        }
        self.lanes.name()
    }
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

    pub(crate) fn run_by_width<K: ByWidth>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: an `Avx512` exists only where `Avx512::detect` found the features that the entry enables.
            Self::Avx512(lanes) => unsafe { enter_avx512(lanes, kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: an `Avx2` exists only where `Avx2::detect` found the features that the entry enables.
            Self::Avx2(lanes) => unsafe { enter_avx2(lanes, kernel.narrow()) },
            Self::Portable(lanes) => kernel.narrow().run(lanes),
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

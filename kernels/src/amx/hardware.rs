//! Tiles as the processor's own. Inline assembly: Rust 1.95 has no stable intrinsics for them.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::OnceLock;

use super::{TileConfig, TileUnit, Tiles};

static DETECTED: OnceLock<Option<Amx>> = OnceLock::new();

thread_local! {
    /// Whether this thread has tiles: a second configuration would change the shapes of the first.
    static IN_USE: Cell<bool> = const { Cell::new(false) };
}

/// Proof that processor and system have tiles with int8 and bf16 products.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Amx(());

impl Amx {
    /// Asks the processor, and the system for permission to use what enlarges the state of a thread, once per process.
    pub(crate) fn detect() -> Option<Self> {
        *DETECTED.get_or_init(|| (has_instructions() && is_permitted()).then_some(Self(())))
    }

    /// The instructions with the emulation behind them.
    #[cfg(all(test, target_os = "linux"))]
    pub(super) fn trapped() -> Self {
        super::trap::install();
        Self(())
    }
}

impl TileUnit for Amx {
    type Tiles = Hardware;

    fn configure(self, config: &TileConfig) -> Hardware {
        assert!(!IN_USE.replace(true), "this thread has tiles already");
        let mut tiles = Hardware { config: *config, this_thread: PhantomData };
        tiles.load_config();
        tiles
    }
}

/// CPUID leaf 7: AMX-BF16, AMX-TILE and AMX-INT8.
fn has_instructions() -> bool {
    const NEEDED: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    __cpuid_count(0, 0).eax >= 7 && __cpuid_count(7, 0).edx & NEEDED == NEEDED
}

/// `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`. A kernel that does not know tiles refuses.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const SYS_ARCH_PRCTL: isize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let mut answer = SYS_ARCH_PRCTL;
    // SAFETY: this system call has two plain numbers as arguments and writes no memory of the process; the kernel changes
    // rax, rcx and r11 only.
    unsafe {
        asm!(
            "syscall",
            inout("rax") answer,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    answer == 0
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// The tile registers of this thread.
pub(crate) struct Hardware {
    config: TileConfig,
    /// Registers belong to the thread that configured them.
    this_thread: PhantomData<*mut ()>,
}

/// One tile instruction. The registers are named as overwritten: nothing else of this program uses them.
macro_rules! tile_asm {
    ($text:literal $(, $name:ident = $value:expr)* ; $($operands:tt)*) => {
        asm!(
            $text,
            $($name = const $value,)*
            $($operands)*
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags),
        )
    };
}

impl Hardware {
    fn load_config(&mut self) {
        let config = &raw const self.config;
        // SAFETY: `Amx` proved the instruction; `TileConfig` is 64 bytes that `TileConfig::new` made valid.
        unsafe { tile_asm!("ldtilecfg [{config}]"; config = in(reg) config,) }
    }
}

impl Drop for Hardware {
    fn drop(&mut self) {
        // SAFETY: `Amx` proved the instruction; the registers are this value's.
        unsafe { tile_asm!("tilerelease";) }
        IN_USE.set(false);
    }
}

impl Tiles for Hardware {
    #[inline(always)]
    fn zero<const T: usize>(&mut self) {
        // SAFETY: `configure` loaded a configuration.
        unsafe { tile_asm!("tilezero tmm{t}", t = T;) }
    }

    #[inline(always)]
    fn load<const T: usize>(&mut self, from: &[u8], stride: usize) {
        self.config.check_room(T, (self.config.row_bytes(T), stride), from.len());
        // SAFETY: the rows that are read lie in `from` by the check.
        unsafe {
            tile_asm!("tileloadd tmm{t}, [{start} + {stride}*1]", t = T;
                start = in(reg) from.as_ptr(), stride = in(reg) stride,)
        }
    }

    #[inline(always)]
    fn store<const T: usize>(&self, to: &mut [i32], stride: usize) {
        self.config.check_room(T, (self.config.row_bytes(T).div_ceil(4), stride), to.len());
        // SAFETY: the rows that are written lie in `to` by the check.
        unsafe {
            tile_asm!("tilestored [{start} + {stride}*1], tmm{t}", t = T;
                start = in(reg) to.as_mut_ptr(), stride = in(reg) 4 * stride,)
        }
    }

    #[inline(always)]
    fn dot_i8_u8<const C: usize, const A: usize, const B: usize>(&mut self) {
        self.config.check_dot(C, A, B);
        // SAFETY: the check excludes what the instruction faults on.
        unsafe { tile_asm!("tdpbsud tmm{c}, tmm{a}, tmm{b}", c = C, a = A, b = B;) }
    }

    #[inline(always)]
    fn dot_bf16<const C: usize, const A: usize, const B: usize>(&mut self) {
        self.config.check_dot(C, A, B);
        // SAFETY: the check excludes what the instruction faults on.
        unsafe { tile_asm!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = C, a = A, b = B;) }
    }
}

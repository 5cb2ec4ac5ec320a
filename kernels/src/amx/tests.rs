//! The emulation against the manual's formulas, and the machine code against the emulation.

use half::bf16;

use super::emulated::{Emulation, fma};
use super::{TileConfig, TileUnit, Tiles, instructions};
use crate::testing::Numbers;

/// Tiles 0 to 3 are results, 4 and 5 hold inputs, 6 and 7 weights.
fn config(rows: usize, inner: usize, outs: usize) -> TileConfig {
    let (c, a, b) = ((rows, 4 * outs), (rows, 4 * inner), (inner, 4 * outs));
    TileConfig::new([c, c, c, c, a, a, b, b])
}

struct Case {
    config: TileConfig,
    x: Vec<u8>,
    w: Vec<u8>,
    is_bf16: bool,
}

impl Case {
    /// Every operation once, with strides of its own; all four results.
    fn run<U: TileUnit>(&self, unit: U) -> Vec<i32> {
        const X_STRIDE: usize = 75;
        const W_STRIDE: usize = 64;
        const OUT_STRIDE: usize = 17;
        let mut out = vec![-1; 4 * 16 * OUT_STRIDE];
        let mut tiles = unit.configure(&self.config);
        tiles.load::<4>(&self.x, X_STRIDE);
        tiles.load::<5>(&self.x[7..], X_STRIDE);
        tiles.load::<6>(&self.w, W_STRIDE);
        tiles.load::<7>(&self.w[3..], W_STRIDE);
        // What was there before counts: a first product on top of zeros, and a second on top of it.
        tiles.zero::<3>();
        if self.is_bf16 {
            tiles.dot_bf16::<0, 4, 6>();
            tiles.dot_bf16::<1, 4, 7>();
            tiles.dot_bf16::<2, 5, 6>();
            tiles.dot_bf16::<3, 5, 7>();
            tiles.dot_bf16::<0, 5, 7>();
        } else {
            tiles.dot_i8_u8::<0, 4, 6>();
            tiles.dot_i8_u8::<1, 4, 7>();
            tiles.dot_i8_u8::<2, 5, 6>();
            tiles.dot_i8_u8::<3, 5, 7>();
            tiles.dot_i8_u8::<0, 5, 7>();
        }
        let (first, rest) = out.split_at_mut(16 * OUT_STRIDE);
        tiles.store::<0>(first, OUT_STRIDE);
        tiles.store::<1>(rest, OUT_STRIDE);
        tiles.store::<2>(&mut rest[16 * OUT_STRIDE..], OUT_STRIDE);
        tiles.store::<3>(&mut rest[32 * OUT_STRIDE..], OUT_STRIDE);
        out
    }
}

/// Bytes that are random bit patterns: subnormals, infinities and NaN included.
fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut numbers = Numbers::new(seed);
    (0..len).map(|_| numbers.next() as u8).collect()
}

#[test]
fn machine_code_computes_what_the_emulation_does() {
    for (seed, (rows, inner, outs)) in
        [(16, 16, 16), (1, 16, 16), (5, 3, 2), (16, 1, 16), (2, 16, 1)].into_iter().enumerate()
    {
        for is_bf16 in [false, true] {
            let (x, w) = (bytes(seed as u64, 16 * 75 + 64), bytes(99 + seed as u64, 16 * 64 + 64));
            let case = Case { config: config(rows, inner, outs), x, w, is_bf16 };
            let (found, expected) = (case.run(instructions()), case.run(Emulation));
            // Which NaN of several wins is the one thing that the manual leaves open.
            let same = |(&a, &b): (&i32, &i32)| {
                a == b || is_bf16 && [a, b].iter().all(|&x| f32::from_bits(x.cast_unsigned()).is_nan())
            };
            assert!(found.iter().zip(&expected).all(same), "{rows} x {inner} x {outs}, bf16 {is_bf16}");
            assert!(found.iter().any(|&word| word != 0 && word != -1));
        }
    }
}

#[test]
fn bytes_are_signed_times_unsigned() {
    let mut tiles = Emulation.configure(&config(2, 1, 1));
    tiles.load::<4>(&[0x80, 0xff, 1, 127, 0, 0, 0, 2], 4);
    tiles.load::<6>(&[255, 255, 3, 255], 4);
    tiles.dot_i8_u8::<0, 4, 6>();
    tiles.dot_i8_u8::<0, 4, 6>();
    let mut out = [0; 2];
    tiles.store::<0>(&mut out, 1);
    assert_eq!(out, [2 * (-128 * 255 - 255 + 3 + 127 * 255), 2 * 510]);
}

#[test]
fn sums_of_bf16_have_the_manuals_order() {
    // Even products: 2^30 + 1 - 2^30, rounded after each; odd products apart from them; the old value last.
    let words = |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect() };
    let big = (1u32 << 30) as f32;
    let mut tiles = Emulation.configure(&config(1, 3, 1));
    tiles.load::<4>(&words(&[big, 3.0, 1.0, 0.5, -big, 0.0]), 12);
    tiles.load::<6>(&words(&[1.0; 6]), 4);
    tiles.dot_bf16::<0, 4, 6>();
    tiles.dot_bf16::<0, 4, 6>();
    let mut out = [0];
    tiles.store::<0>(&mut out, 1);
    assert_eq!(f32::from_bits(i32::cast_unsigned(out[0])), 7.0);
}

#[test]
fn subnormal_numbers_are_zero() {
    let tiny = f32::MIN_POSITIVE;
    let check = |a: f32, b: f32, c: f32, expected: f32| {
        assert_eq!(fma(a, b, c).to_bits(), expected.to_bits(), "{a:e} * {b:e} + {c:e}");
    };
    check(tiny / 2.0, 1e30, 0.0, 0.0);
    check(-tiny / 2.0, 1e30, -0.0, -0.0);
    check(1.0, 1.0, tiny / 2.0, 1.0);
    check(tiny, 0.5, 0.0, 0.0);
    check(tiny, -0.5, -0.0, -0.0);
    check(tiny, 1.0, 0.0, tiny);
    check(tiny, 1.5, -tiny, 0.0);
    // Just below the least normal number: what 24 bits round up to it stays, what only the coarser subnormals would is zero.
    check(-tiny, f32::EPSILON * 0.375, tiny, 0.0);
    check(-tiny, f32::EPSILON * 0.125, tiny, tiny);
}

#[test]
#[should_panic(expected = "end past")]
fn a_load_stays_inside_its_slice() {
    instructions().configure(&config(2, 16, 16)).load::<4>(&[0; 100], 64);
}

#[test]
#[should_panic(expected = "end past")]
fn a_store_stays_inside_its_slice() {
    instructions().configure(&config(2, 16, 16)).store::<0>(&mut [0; 31], 16);
}

#[test]
#[should_panic(expected = "do not fit")]
fn shapes_that_fault_are_refused() {
    let shapes = [(2, 64), (0, 0), (0, 0), (0, 0), (2, 60), (0, 0), (16, 64), (0, 0)];
    instructions().configure(&TileConfig::new(shapes)).dot_i8_u8::<0, 4, 6>();
}

#[test]
#[should_panic(expected = "already")]
fn a_thread_has_one_configuration() {
    let unit = instructions();
    let _first = unit.configure(&config(1, 1, 1));
    let _second = unit.configure(&config(2, 2, 2));
}

/// Bytes as an assembler (binutils 2.40) makes them.
#[cfg(target_os = "linux")]
#[test]
fn decoding_agrees_with_an_assembler() {
    use super::trap::{Instruction, decode};
    let mut registers = [0; 23];
    registers[libc::REG_RAX as usize] = 0x1000;
    registers[libc::REG_R9 as usize] = 0x2000;
    registers[libc::REG_R14 as usize] = 64;
    let check = |bytes: &[u8], expected: Option<Instruction>| {
        let mut code = [0x90; 16];
        code[..bytes.len()].copy_from_slice(bytes);
        assert_eq!(decode(&code, &registers), expected.map(|it| (bytes.len(), it)), "{bytes:x?}");
    };
    let (address, stride) = (0x2000, 64);
    // vaddps xmm0, xmm1, xmm2 and a tdpbssd: not tile instructions of this crate.
    check(&[0xc5, 0xf0, 0x58, 0xc2], None);
    check(&[0xc4, 0xe2, 0x6b, 0x5e, 0xc1], None);
    check(&[0xc4, 0xe2, 0x78, 0x49, 0xc0], Some(Instruction::Release));
    check(&[0xc4, 0xe2, 0x7b, 0x49, 0xe8], Some(Instruction::Zero(5)));
    check(&[0xc4, 0xe2, 0x42, 0x5e, 0xcd], Some(Instruction::DotI8U8([1, 5, 7])));
    check(&[0xc4, 0xe2, 0x4a, 0x5c, 0xdc], Some(Instruction::DotBf16([3, 4, 6])));
    check(&[0xc4, 0xe2, 0x78, 0x49, 0x00], Some(Instruction::LoadConfig { address: 0x1000 }));
    check(&[0xc4, 0xc2, 0x78, 0x49, 0x41, 0x08], Some(Instruction::LoadConfig { address: 0x2008 }));
    check(&[0xc4, 0x82, 0x7b, 0x4b, 0x34, 0x31], Some(Instruction::Load { tile: 6, address, stride }));
    let load = Instruction::Load { tile: 2, address: 0x1100, stride };
    check(&[0xc4, 0xa2, 0x7b, 0x4b, 0x94, 0x30, 0x00, 0x01, 0x00, 0x00], Some(load));
    check(&[0xc4, 0x82, 0x7a, 0x4b, 0x1c, 0x31], Some(Instruction::Store { tile: 3, address, stride }));
    let store = Instruction::Store { tile: 7, address: 0x1000, stride: 128 };
    check(&[0xc4, 0xa2, 0x7a, 0x4b, 0x3c, 0x70], Some(store));
}

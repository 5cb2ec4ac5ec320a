//! Runs tile instructions on a processor that has none: the fault they raise is answered by decoding the bytes at the
//! faulting address and giving them to the emulation. So the emitted machine code itself is what tests check.

use std::cell::RefCell;
use std::sync::Once;

use super::emulated::Emulated;
use super::{MAX_ROW_BYTES, NUM_TILES, TileConfig};

thread_local! {
    static TILES: RefCell<Option<Emulated>> = const { RefCell::new(None) };
}

static INSTALLED: Once = Once::new();

/// Answers illegal instructions of this process from now on. Any that is no tile instruction still ends it.
pub(super) fn install() {
    INSTALLED.call_once(|| {
        // SAFETY: all zeros is a valid `sigaction`.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_fault as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        // SAFETY: the handler has the signature that `SA_SIGINFO` asks for; there is no old action to write.
        let status = unsafe { libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut()) };
        assert_eq!(status, 0, "the handler is installed");
    });
}

extern "C" fn on_fault(_signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the system passes the context of the thread that faulted, which waits for this handler.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let registers = &mut context.uc_mcontext.gregs;
    let address = registers[libc::REG_RIP as usize] as *const [u8; 16];
    // SAFETY: the code of an instruction and of the next ones is readable; functions are not at the end of a mapping.
    let code = unsafe { address.read_unaligned() };
    let Some((length, instruction)) = decode(&code, registers) else {
        // SAFETY: restoring the default action is always allowed. The instruction then faults again, and ends the process.
        unsafe { libc::signal(libc::SIGILL, libc::SIG_DFL) };
        return;
    };
    TILES.with_borrow_mut(|tiles| instruction.run(tiles));
    registers[libc::REG_RIP as usize] += length as i64;
}

#[derive(Debug, PartialEq)]
pub(super) enum Instruction {
    LoadConfig { address: usize },
    Release,
    Zero(usize),
    Load { tile: usize, address: usize, stride: usize },
    Store { tile: usize, address: usize, stride: usize },
    DotI8U8([usize; 3]),
    DotBf16([usize; 3]),
}

/// Length and meaning of the instruction at the start of the code; `None` for what this crate does not use. Prefixes and
/// opcodes are those of the manual's tables: `VEX.128.<pp>.0F38.W0 <opcode>`.
pub(super) fn decode(code: &[u8; 16], registers: &[i64; 23]) -> Option<(usize, Instruction)> {
    let [0xc4, prefix_1, prefix_2, opcode, mod_rm, ..] = *code else { return None };
    let (is_0f38, is_w0, is_128) = (prefix_1 & 0x1f == 2, prefix_2 & 0x80 == 0, prefix_2 & 4 == 0);
    // Tile registers need no extension bits; inverted, they are set.
    if !(is_0f38 && is_w0 && is_128 && prefix_1 & 0x80 != 0) {
        return None;
    }
    let (reg, rm, is_register) = (usize::from(mod_rm >> 3 & 7), usize::from(mod_rm & 7), mod_rm >> 6 == 3);
    let vvvv = usize::from(!prefix_2 >> 3 & 15);
    let instruction = match (prefix_2 & 3, opcode, is_register) {
        (0, 0x49, true) if (reg, rm, vvvv) == (0, 0, 0) => Instruction::Release,
        (3, 0x49, true) if (rm, vvvv) == (0, 0) => Instruction::Zero(reg),
        (2, 0x5e, true) if vvvv < NUM_TILES => Instruction::DotI8U8([reg, rm, vvvv]),
        (2, 0x5c, true) if vvvv < NUM_TILES => Instruction::DotBf16([reg, rm, vvvv]),
        (pp @ (0 | 2 | 3), opcode @ (0x49 | 0x4b), false) if vvvv == 0 => {
            let operand = MemoryOperand::decode(code, registers)?;
            let MemoryOperand { length, base: address, index: stride } = operand;
            let instruction = match (pp, opcode, stride) {
                (0, 0x49, None) if reg == 0 => Instruction::LoadConfig { address },
                (3, 0x4b, Some(stride)) => Instruction::Load { tile: reg, address, stride },
                (2, 0x4b, Some(stride)) => Instruction::Store { tile: reg, address, stride },
                _ => return None,
            };
            return Some((length, instruction));
        }
        _ => return None,
    };
    Some((5, instruction))
}

struct MemoryOperand {
    /// Of the whole instruction.
    length: usize,
    /// Base register and displacement.
    base: usize,
    /// Index register times scale.
    index: Option<usize>,
}

impl MemoryOperand {
    fn decode(code: &[u8; 16], registers: &[i64; 23]) -> Option<Self> {
        let [_, prefix_1, _, _, mod_rm, sib, ..] = *code;
        let register = |low: u8, extension: u8| {
            registers[ENCODED[usize::from(low & 7 | if prefix_1 & extension == 0 { 8 } else { 0 })]] as usize
        };
        const X: u8 = 0x40;
        const B: u8 = 0x20;
        let has_sib = mod_rm & 7 == 4;
        let base_code = if has_sib { sib & 7 } else { mod_rm & 7 };
        let at = if has_sib { 6 } else { 5 };
        let (displacement, length) = match mod_rm >> 6 {
            // Without a base register, or relative to the code: never what an `in(reg)` operand makes.
            0 if base_code == 5 => return None,
            0 => (0, at),
            1 => (i64::from(code[at] as i8), at + 1),
            _ => (i64::from(i32::from_le_bytes(*code[at..].first_chunk()?)), at + 4),
        };
        let no_index = sib >> 3 & 7 == 4 && prefix_1 & X != 0;
        let index = (has_sib && !no_index).then(|| register(sib >> 3, X) << (sib >> 6));
        Some(Self { length, base: register(base_code, B).wrapping_add(displacement as usize), index })
    }
}

/// Where the system saves the register of each encoding.
const ENCODED: [usize; 16] = {
    use libc::*;
    let order = [
        REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9, REG_R10, REG_R11,
        REG_R12, REG_R13, REG_R14, REG_R15,
    ];
    let mut places = [0; 16];
    let mut i = 0;
    while i < 16 {
        places[i] = order[i] as usize;
        i += 1;
    }
    places
};

impl Instruction {
    fn run(self, tiles: &mut Option<Emulated>) {
        match (self, tiles) {
            (Self::LoadConfig { address }, tiles) => {
                // SAFETY: the program asks the processor to read a configuration there.
                let config = unsafe { (address as *const TileConfig).read() };
                *tiles = Some(Emulated::new(config));
            }
            (Self::Release, tiles) => *tiles = None,
            (Self::Zero(tile), Some(tiles)) => tiles.zero_tile(tile),
            (Self::Load { tile, address, stride }, Some(tiles)) => {
                tiles.zero_tile(tile);
                for row in 0..tiles.rows(tile) {
                    let from = (address + row * stride) as *const u8;
                    // SAFETY: the program asks the processor to read these bytes.
                    let bytes = unsafe { std::slice::from_raw_parts(from, tiles.row_bytes(tile)) };
                    tiles.set_row(tile, row, bytes);
                }
            }
            (Self::Store { tile, address, stride }, Some(tiles)) => {
                for row in 0..tiles.rows(tile) {
                    let to = (address + row * stride) as *mut u8;
                    let bytes = tiles.row(tile, row);
                    debug_assert!(bytes.len() <= MAX_ROW_BYTES);
                    // SAFETY: the program asks the processor to write these bytes.
                    unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
                }
            }
            (Self::DotI8U8(of), Some(tiles)) => tiles.dot_i8_u8_of(of),
            (Self::DotBf16(of), Some(tiles)) => tiles.dot_bf16_of(of),
            (_, None) => panic!("tiles are used before they are configured"),
        }
    }
}

//! Tiles and AVX-VNNI's product in software, for tests where the processor lacks them: their instructions are illegal there,
//! and the handler of that signal does what they should have done. What is tested is the machine code itself.
//!
//! Decoding and arithmetic follow Intel's SDM, volume 2: the VEX prefix gives map, prefix and the third operand, ModRM and
//! SIB the others. A trap costs some microseconds: enough for a test, and for the perplexity of a small model.

use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};
#[cfg(target_os = "linux")]
use std::sync::OnceLock;

/// A tile: 16 rows of 16 numbers.
type Tile = [[u32; 16]; 16];

thread_local! {
    /// This thread's tiles. No destructor and no lazy initialisation: a signal handler may touch them.
    static TILES: UnsafeCell<[Tile; 8]> = const { UnsafeCell::new([[[0; 16]; 16]; 8]) };
}

/// Emulates from now on, on Linux. Asked for where the machine has the other instructions of the rung.
pub(crate) fn install() -> bool {
    #[cfg(target_os = "linux")]
    {
        static INSTALLED: OnceLock<bool> = OnceLock::new();
        // SAFETY: `sigaction` is plain data, for which zeros are valid; the handler has the type that SA_SIGINFO asks for and
        // touches nothing but the interrupted thread's registers, its tiles and the operands of its instruction.
        *INSTALLED.get_or_init(|| unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_illegal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut()) == 0
        })
    }
    #[cfg(not(target_os = "linux"))]
    false
}

#[cfg(target_os = "linux")]
extern "C" fn on_illegal(_: c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes the interrupted thread's registers, which are ours until we return; the address of the
    // instruction is readable, since it was about to be executed.
    unsafe {
        let context = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext;
        let code = context.gregs[libc::REG_RIP as usize] as *const u8;
        let executed = product(code, context.fpregs.cast()).or_else(|| execute(code, &context.gregs));
        match executed {
            Some(length) => context.gregs[libc::REG_RIP as usize] += length,
            None => {
                // None of ours: the next trap ends the program, as it would have.
                libc::signal(libc::SIGILL, libc::SIG_DFL);
            }
        }
    }
}

/// Executes the `vpdpbusd ymm, ymm, ymm` at `code` and returns its length, `None` if it is another instruction.
///
/// # Safety
/// `code` is an instruction of a thread whose vectors are in `state`, as XSAVE writes them.
#[cfg(target_os = "linux")]
unsafe fn product(code: *const u8, state: *mut u8) -> Option<i64> {
    /// The lower halves of the vectors, which states there are, and the upper halves (SDM, volume 1, 13.4).
    const LOWER: usize = 160;
    const STATES: usize = 512;
    const UPPER: usize = 576;
    const AVX: u64 = 4;
    // SAFETY: an instruction has as many bytes as its encoding says.
    let byte = |i: usize| unsafe { code.add(i).read() };
    // C4 RXBmmmmm WvvvvLpp: map 2 (0F38), W 0, 256 bits, prefix 66; registers alone.
    if byte(0) != 0xC4 || byte(1) & 0x1F != 2 || byte(2) & 0x87 != 5 || byte(3) != 0x50 || byte(4) < 0xC0 {
        return None;
    }
    let (r, b, modrm) = (!byte(1) >> 7 & 1, !byte(1) >> 5 & 1, byte(4));
    let [sum, codes, values] = [modrm >> 3 & 7 | r << 3, !byte(2) >> 3 & 15, modrm & 7 | b << 3].map(usize::from);
    let half = |register: usize, at: usize| state.wrapping_add(at + 16 * register).cast::<[u8; 16]>();
    let states = state.wrapping_add(STATES).cast::<u64>();
    // SAFETY: the frame of a signal has all of this where the processor has AVX.
    unsafe {
        // Upper halves that are all zero need not be there.
        if states.read() & AVX == 0 {
            (0..16).for_each(|i| half(i, UPPER).write([0; 16]));
            states.write(states.read() | AVX);
        }
        for at in [LOWER, UPPER] {
            let (codes, values) = (half(codes, at).read(), half(values, at).read());
            let mut sums = half(sum, at).read();
            for (i, sum) in sums.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                let dot: i32 = (4 * i..4 * i + 4).map(|k| i32::from(codes[k]) * i32::from(values[k] as i8)).sum();
                *sum = i32::from_le_bytes(*sum).wrapping_add(dot).to_le_bytes();
            }
            half(sum, at).write(sums);
        }
    }
    Some(5)
}

/// Executes the instruction at `code` and returns its length, `None` if it is not one of a tile.
///
/// # Safety
/// `code` is an instruction of a thread whose registers are `registers`.
#[cfg(target_os = "linux")]
unsafe fn execute(code: *const u8, registers: &[i64; 23]) -> Option<i64> {
    // SAFETY: an instruction has as many bytes as its encoding says.
    let byte = |i: usize| unsafe { code.add(i).read() };
    // C4 RXBmmmmm WvvvvLpp: map 2 (0F38), W 0, 128 bits.
    if byte(0) != 0xC4 || byte(1) & 0x1F != 2 || byte(2) & 0x84 != 0 {
        return None;
    }
    let (r, x, b) = (!byte(1) >> 7 & 1, !byte(1) >> 6 & 1, !byte(1) >> 5 & 1);
    let (vvvv, prefix, opcode, modrm) = (!byte(2) >> 3 & 15, byte(2) & 3, byte(3), byte(4));
    let (mode, reg, rm) = (modrm >> 6, (modrm >> 3 & 7 | r << 3) as usize, modrm & 7);
    // SAFETY: this thread's, and it stands still.
    let tiles = TILES.with(|t| unsafe { &mut *t.get() });
    match (prefix, opcode, mode) {
        // tilerelease; tilezero
        (0, 0x49, 3) => *tiles = [[[0; 16]; 16]; 8],
        (3, 0x49, 3) => *tiles.get_mut(reg)? = [[0; 16]; 16],
        // tdpbf16ps
        (2, 0x5C, 3) => {
            let (left, right) = (*tiles.get((rm | b << 3) as usize)?, *tiles.get(vvvv as usize)?);
            // SAFETY: emulated where the rung's other instructions are.
            unsafe { multiply(tiles.get_mut(reg)?, &left, &right) };
        }
        // Those with an operand in memory.
        (0, 0x49, 0..=2) | (1..=3, 0x4B, 0..=2) => {
            let register = |i: u8| registers[register_index(i)];
            let (mut at, mut length) = (5, 5);
            let (base, index) = if rm == 4 {
                (at, length) = (6, 6);
                let sib = byte(5);
                let (scale, index, base) = (sib >> 6, sib >> 3 & 7 | x << 3, sib & 7 | b << 3);
                // Without an index, or base 5 without displacement: nothing that this program uses.
                if index == 4 || (base & 7 == 5 && mode == 0) {
                    return None;
                }
                (register(base), register(index) << scale)
            } else if rm == 5 && mode == 0 {
                return None;
            } else {
                (register(rm | b << 3), 0)
            };
            let displacement = match mode {
                1 => {
                    length += 1;
                    byte(at) as i8 as i64
                }
                2 => {
                    length += 4;
                    i32::from_le_bytes(std::array::from_fn(|_| {
                        at += 1;
                        byte(at - 1)
                    })) as i64
                }
                _ => 0,
            };
            // `index` is the distance of rows where the operand is a tile.
            let row = |i: usize| (base + displacement + i as i64 * index) as *mut [u32; 16];
            for i in 0..16 {
                match (prefix, opcode) {
                    // SAFETY: the interrupted code says that its operand is there.
                    (1 | 3, 0x4B) => tiles.get_mut(reg)?[i] = unsafe { row(i).read_unaligned() },
                    // SAFETY: as above.
                    (2, 0x4B) => unsafe { row(i).write_unaligned(tiles.get(reg)?[i]) },
                    // ldtilecfg: all tiles become zero, and are of one shape here.
                    _ => *tiles = [[[0; 16]; 16]; 8],
                }
            }
            return Some(length);
        }
        _ => return None,
    }
    Some(5)
}

/// Where the signal's registers have register `i` of an encoding.
#[cfg(target_os = "linux")]
fn register_index(i: u8) -> usize {
    use libc::*;
    const ORDER: [c_int; 16] = [
        REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9, REG_R10, REG_R11,
        REG_R12, REG_R13, REG_R14, REG_R15,
    ];
    ORDER[i as usize] as usize
}

#[cfg(target_os = "linux")]
crate::isa::amx! {
    /// tdpbf16ps: even and odd k are summed apart, from zero, and then added to what is there. (Of this rung for its fused
    /// multiplication: as a call for each, it would take most of the time.)
    fn multiply(c: &mut Tile, a: &Tile, b: &Tile) {
        let flushed = |v: f32| if v.abs() < f32::MIN_POSITIVE { 0.0 } else { v };
        let bf16 = |bits: u32| flushed(f32::from_bits(bits << 16));
        for (c, a) in c.iter_mut().zip(a) {
            let (mut even, mut odd) = ([0.0f32; 16], [0.0f32; 16]);
            for (a, b) in a.iter().zip(b) {
                for n in 0..16 {
                    even[n] = flushed(bf16(a & 0xFFFF).mul_add(bf16(b[n] & 0xFFFF), even[n]));
                    odd[n] = flushed(bf16(a >> 16).mul_add(bf16(b[n] >> 16), odd[n]));
                }
            }
            for n in 0..16 {
                c[n] = flushed(flushed(f32::from_bits(c[n])) + flushed(even[n] + odd[n])).to_bits();
            }
        }
    }
}

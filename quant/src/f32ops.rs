//! What happens between the matrices: norm, activation function, rotation, encoding, softmax.
//!
//! Plain loops over slices, written once and compiled once for every rung of the ladder ([`Ops::for_isa`]); the compiler
//! turns them into the rung's vectors. Sums run over 16 partial sums in a fixed order, so that results do not depend on
//! threads.
#![allow(unsafe_code)]

use crate::act::Q8Block;
use crate::format::SLAB;
use crate::isa::Isa;
use crate::lanes::{L, Lanes};

/// The operations, compiled for one instruction set. Holding one is the proof that the machine has it.
pub struct Ops {
    rmsnorm: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    encode_q8: unsafe fn(&[f32], &mut Q8Block),
    encode_bf16: unsafe fn(&[f32], &mut [u32; SLAB / 2]),
    silu_mul: unsafe fn(&mut [f32], &[f32]),
    add: unsafe fn(&mut [f32], &[f32]),
    axpy: unsafe fn(&mut [f32], f32, &[f32]),
    dot: unsafe fn(&[f32], &[f32]) -> f32,
    exp_sum: unsafe fn(&mut [f32], f32) -> f32,
    max: unsafe fn(&[f32]) -> f32,
    read: unsafe fn(&[u8]) -> u64,
    peak: unsafe fn(u64) -> u64,
    rope_halves: unsafe fn(&mut [f32], &[f32], &[f32]),
    rope_pairs: unsafe fn(&mut [f32], &[f32], &[f32]),
}

// SAFETY (each block): an `Ops` for a rung is handed out only where the rung is supported (`for_isa`).
impl Ops {
    pub(crate) fn for_isa(isa: Isa) -> &'static Ops {
        assert!(isa.is_supported());
        match isa {
            Isa::Scalar => &SCALAR,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &AVX2,
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => &AVXVNNI,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => &AVX512,
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => &AMX,
            #[cfg(not(target_arch = "x86_64"))]
            _ => &SCALAR,
        }
    }

    /// RMSNorm (Zhang and Sennrich, 2019): `out = x / sqrt(mean(x^2) + eps) * weight`. All of one length.
    pub fn rmsnorm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        assert!(x.len() == weight.len() && x.len() == out.len());
        // SAFETY: see the impl.
        unsafe { (self.rmsnorm)(x, weight, eps, out) }
    }

    /// Encodes up to 256 values to bytes, `d = amax / 127` for each 32, rounded to nearest even; the rest becomes zero.
    /// NaN becomes 0 in the bytes and stays in `d`, so that it is not lost.
    pub fn encode_q8(&self, x: &[f32], block: &mut Q8Block) {
        assert!(x.len() <= SLAB);
        if x.len() == SLAB {
            // SAFETY: see the impl.
            unsafe { (self.encode_q8)(x, block) }
        } else {
            let mut whole = [0.0; SLAB];
            whole[..x.len()].copy_from_slice(x);
            // SAFETY: see the impl.
            unsafe { (self.encode_q8)(&whole, block) }
        }
    }

    /// Encodes up to 256 values to bf16, rounded to nearest even, two in each number, the first in its low half; the rest
    /// becomes zero.
    pub fn encode_bf16(&self, x: &[f32], pairs: &mut [u32; SLAB / 2]) {
        assert!(x.len() <= SLAB);
        pairs[x.len() / 2..].fill(0);
        // SAFETY: see the impl.
        unsafe { (self.encode_bf16)(x, pairs) }
    }

    /// SwiGLU's activation (Shazeer, 2020): `gate = silu(gate) * up`.
    pub fn silu_mul(&self, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len());
        // SAFETY: see the impl.
        unsafe { (self.silu_mul)(gate, up) }
    }

    /// `x += y`.
    pub fn add(&self, x: &mut [f32], y: &[f32]) {
        assert_eq!(x.len(), y.len());
        // SAFETY: see the impl.
        unsafe { (self.add)(x, y) }
    }

    /// `x += a * y`.
    pub fn axpy(&self, x: &mut [f32], a: f32, y: &[f32]) {
        assert_eq!(x.len(), y.len());
        // SAFETY: see the impl.
        unsafe { (self.axpy)(x, a, y) }
    }

    /// The sum of `x * y`.
    pub fn dot(&self, x: &[f32], y: &[f32]) -> f32 {
        assert_eq!(x.len(), y.len());
        // SAFETY: see the impl.
        unsafe { (self.dot)(x, y) }
    }

    /// `x = exp(x - max)`; returns the sum. Within 3 ulp of exp for arguments down to -87, 0 below; not for more than 88.
    pub fn exp_sum(&self, x: &mut [f32], max: f32) -> f32 {
        // SAFETY: see the impl.
        unsafe { (self.exp_sum)(x, max) }
    }

    /// The largest value, negative infinity for none. NaN is passed over.
    pub fn max(&self, x: &[f32]) -> f32 {
        // SAFETY: see the impl.
        unsafe { (self.max)(x) }
    }

    /// Reads every byte: for measuring how fast memory can be read.
    pub fn read(&self, bytes: &[u8]) -> u64 {
        // SAFETY: see the impl.
        unsafe { (self.read)(bytes) }
    }

    /// Does the instruction set's fastest products (bytes; with AMX bf16) on registers, `rounds` times; returns how many multiplications with addition
    /// that were: for measuring what the machine could do at most.
    pub fn peak(&self, rounds: u64) -> u64 {
        // SAFETY: see the impl.
        unsafe { (self.peak)(rounds) }
    }

    /// Rotary embedding (Su et al., 2021) of one head with the pairs `(i, i + half)` (GPT-NeoX's order; qwen2).
    /// `cos` and `sin` have `half` elements; what lies past `2 * half` in `x` stays.
    pub fn rope_halves(&self, x: &mut [f32], cos: &[f32], sin: &[f32]) {
        assert!(cos.len() == sin.len() && x.len() >= 2 * cos.len());
        // SAFETY: see the impl.
        unsafe { (self.rope_halves)(x, cos, sin) }
    }

    /// The same with the pairs `(2i, 2i + 1)` (GGUF's llama).
    pub fn rope_pairs(&self, x: &mut [f32], cos: &[f32], sin: &[f32]) {
        assert!(cos.len() == sin.len() && x.len() >= 2 * cos.len());
        // SAFETY: see the impl.
        unsafe { (self.rope_pairs)(x, cos, sin) }
    }
}

macro_rules! ops {
    ($table:ident, $module:ident, $stamp:path, $lanes:path, $peak:path) => {
        mod $module {
            use super::{Ops, Q8Block, SLAB, body};
            use $stamp as stamp;
            stamp! {
                fn rmsnorm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) { body::rmsnorm(x, weight, eps, out) }
                fn encode_q8(x: &[f32], block: &mut Q8Block) { body::encode_q8(x, block) }
                fn encode_bf16(x: &[f32], pairs: &mut [u32; SLAB / 2]) { body::encode_bf16(x, pairs) }
                fn silu_mul(gate: &mut [f32], up: &[f32]) { body::silu_mul::<$lanes>(gate, up) }
                fn add(x: &mut [f32], y: &[f32]) { body::add(x, y) }
                fn axpy(x: &mut [f32], a: f32, y: &[f32]) { body::axpy(x, a, y) }
                fn dot(x: &[f32], y: &[f32]) -> f32 { body::dot(x, y) }
                fn exp_sum(x: &mut [f32], max: f32) -> f32 { body::exp_sum::<$lanes>(x, max) }
                fn max(x: &[f32]) -> f32 { body::max::<$lanes>(x) }
                fn read(bytes: &[u8]) -> u64 { body::read(bytes) }
                fn rope_halves(x: &mut [f32], cos: &[f32], sin: &[f32]) { body::rope_halves(x, cos, sin) }
                fn rope_pairs(x: &mut [f32], cos: &[f32], sin: &[f32]) { body::rope_pairs(x, cos, sin) }
            }
            pub(super) static TABLE: Ops = Ops {
                rmsnorm,
                encode_q8,
                encode_bf16,
                silu_mul,
                add,
                axpy,
                dot,
                exp_sum,
                max,
                read,
                peak: $peak,
                rope_halves,
                rope_pairs,
            };
        }
        use $module::TABLE as $table;
    };
}

macro_rules! plain {
    ($($item:item)*) => { $($item)* };
}
use plain;

ops!(SCALAR, scalar, super::plain, crate::lanes::Scalar, crate::scalar::peak);
#[cfg(target_arch = "x86_64")]
ops!(AVX2, avx2, crate::isa::avx2, crate::lanes::Avx2, crate::avx2::peak);
#[cfg(target_arch = "x86_64")]
ops!(AVXVNNI, avxvnni, crate::isa::avxvnni, crate::lanes::Avx2, crate::avx2::peak_vnni);
#[cfg(target_arch = "x86_64")]
ops!(AVX512, avx512, crate::isa::avx512, crate::lanes::Avx512, crate::avx512::peak);
#[cfg(target_arch = "x86_64")]
static AMX: Ops = Ops { peak: crate::amx::peak, ..AVX512 };

/// The functions, to be compiled once for each instruction set: inside of code that is.
pub(crate) mod body {
    use super::*;

    /// Sums `f(i)` over 16 partial sums.
    #[inline(always)]
    fn lanes_sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
        let mut acc = [0.0f32; 16];
        let (blocks, rest) = x.as_chunks::<16>();
        for b in blocks {
            for i in 0..16 {
                acc[i] += f(b[i]);
            }
        }
        for (a, &v) in acc.iter_mut().zip(rest) {
            *a += f(v);
        }
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                acc[i] += acc[i + half];
            }
        }
        acc[0]
    }

    #[inline(always)]
    pub fn rmsnorm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let mean = lanes_sum(x, |v| v * v) / x.len() as f32;
        let scale = 1.0 / (mean + eps).sqrt();
        for ((o, &v), &w) in out.iter_mut().zip(x).zip(weight) {
            *o = v * scale * w;
        }
    }

    #[inline(always)]
    pub fn encode_q8(x: &[f32], block: &mut Q8Block) {
        let groups = x.as_chunks::<32>().0;
        let q = block.q.as_chunks_mut::<32>().0;
        let sums = block.sums.as_chunks_mut::<2>().0;
        for g in 0..8 {
            // The magnitude bits of f32 are ordered as integers: this maximum vectorises, and NaN wins it.
            let amax = f32::from_bits(groups[g].iter().map(|v| v.to_bits() & 0x7FFF_FFFF).fold(0, u32::max));
            // Of a smaller scale the inverse would be infinite.
            const LEAST: f32 = 3e-39;
            let d = if amax > 0.0 { (amax / 127.0).max(LEAST) } else { amax };
            let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
            block.d[g] = d;
            let mut s = [0i32; 2];
            for h in 0..2 {
                for i in 16 * h..16 * h + 16 {
                    let v = (groups[g][i] * inverse).round_ties_even().clamp(-127.0, 127.0);
                    let v = if v.is_nan() { 0.0 } else { v };
                    // SAFETY: clamped to -127..=127, NaN replaced.
                    let v = unsafe { v.to_int_unchecked::<i32>() };
                    q[g][i] = v as i8;
                    s[h] += v;
                }
            }
            sums[g] = [s[0] as i16, s[1] as i16];
        }
    }

    #[inline(always)]
    pub fn encode_bf16(x: &[f32], pairs: &mut [u32; SLAB / 2]) {
        let round = |v: f32| {
            let bits = v.to_bits();
            let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
            // NaN stays one: carried over, it could become infinite.
            if v.is_nan() { bits >> 16 | 0x40 } else { rounded }
        };
        let (whole, rest) = x.as_chunks::<2>();
        for (to, x) in pairs.iter_mut().zip(whole) {
            *to = round(x[0]) | round(x[1]) << 16;
        }
        if let [last] = rest {
            pairs[whole.len()] = round(*last);
        }
    }

    #[inline(always)]
    pub fn silu_mul<V: Lanes>(gate: &mut [f32], up: &[f32]) {
        let ((gates, gate_rest), (ups, up_rest)) = (gate.as_chunks_mut::<L>(), up.as_chunks::<L>());
        for (g, u) in gates.iter_mut().zip(ups) {
            silu_mul_lanes::<V>(g, u);
        }
        if !gate_rest.is_empty() {
            let (mut g, mut u) = ([0.0; L], [0.0; L]);
            g[..gate_rest.len()].copy_from_slice(gate_rest);
            u[..up_rest.len()].copy_from_slice(up_rest);
            silu_mul_lanes::<V>(&mut g, &u);
            gate_rest.copy_from_slice(&g[..gate_rest.len()]);
        }
    }

    // No closure of `silu_mul`: called in two places it would not be inlined, and without the rung's features every
    // instruction in it would be a call.
    #[inline(always)]
    fn silu_mul_lanes<V: Lanes>(g: &mut [f32; L], u: &[f32; L]) {
        let (x, one) = (V::load(g), V::splat(1.0));
        // Beyond 88 the quotient is nearer to zero than any number that would be told from it.
        let e = V::splat(0.0).sub(x).min(V::splat(88.0)).exp();
        x.div(one.add(e)).mul(V::load(u)).store(g);
    }

    #[inline(always)]
    pub fn add(x: &mut [f32], y: &[f32]) {
        for (a, &b) in x.iter_mut().zip(y) {
            *a += b;
        }
    }

    #[inline(always)]
    pub fn axpy(x: &mut [f32], a: f32, y: &[f32]) {
        for (v, &b) in x.iter_mut().zip(y) {
            *v += a * b;
        }
    }

    #[inline(always)]
    pub fn dot(x: &[f32], y: &[f32]) -> f32 {
        let mut acc = [0.0f32; 16];
        let ((xs, x_rest), (ys, y_rest)) = (x.as_chunks::<16>(), y.as_chunks::<16>());
        for (x, y) in xs.iter().zip(ys) {
            for i in 0..16 {
                acc[i] += x[i] * y[i];
            }
        }
        lanes_sum(&acc, |v| v) + x_rest.iter().zip(y_rest).map(|(x, y)| x * y).sum::<f32>()
    }

    #[inline(always)]
    pub fn exp_sum<V: Lanes>(x: &mut [f32], max: f32) -> f32 {
        crate::panel::align_stack!();
        let (max, mut sum) = (V::splat(max), V::splat(0.0));
        let (blocks, rest) = x.as_chunks_mut::<L>();
        for b in blocks {
            let e = V::load(b).sub(max).exp();
            e.store(b);
            sum = sum.add(e);
        }
        if !rest.is_empty() {
            let mut last = [f32::NEG_INFINITY; L];
            last[..rest.len()].copy_from_slice(rest);
            let e = V::load(&last).sub(max).exp();
            e.store(&mut last);
            sum = sum.add(e);
            rest.copy_from_slice(&last[..rest.len()]);
        }
        sum.sum()
    }

    #[inline(always)]
    pub fn max<V: Lanes>(x: &[f32]) -> f32 {
        let mut m = V::splat(f32::NEG_INFINITY);
        let (blocks, rest) = x.as_chunks::<L>();
        // Of a NaN, the second operand is what the machine's max gives: NaN never wins.
        for b in blocks {
            m = V::load(b).max(m);
        }
        rest.iter().fold(m.largest_lane(), |m, &v| if v > m { v } else { m })
    }

    #[inline(always)]
    pub fn read(bytes: &[u8]) -> u64 {
        let mut acc = [0u64; 32];
        let (blocks, rest) = bytes.as_chunks::<256>();
        for b in blocks {
            // Asked for ahead, as the kernels ask for weights.
            crate::panel::prefetch::<false>(b.as_ptr().wrapping_add(2048), b.len());
            for (a, w) in acc.iter_mut().zip(b.as_chunks::<8>().0) {
                *a ^= u64::from_le_bytes(*w);
            }
        }
        acc.iter().fold(0, |a, b| a ^ b) ^ rest.iter().fold(0, |a, &b| a ^ b as u64)
    }

    #[inline(always)]
    pub fn rope_halves(x: &mut [f32], cos: &[f32], sin: &[f32]) {
        let (a, rest) = x.split_at_mut(cos.len());
        let b = &mut rest[..cos.len()];
        for i in 0..cos.len() {
            let (u, v) = (a[i], b[i]);
            a[i] = u * cos[i] - v * sin[i];
            b[i] = u * sin[i] + v * cos[i];
        }
    }

    #[inline(always)]
    pub fn rope_pairs(x: &mut [f32], cos: &[f32], sin: &[f32]) {
        for ((p, &c), &s) in x.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
            *p = [p[0] * c - p[1] * s, p[0] * s + p[1] * c];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn each() -> impl Iterator<Item = (Isa, &'static Ops)> {
        Isa::ALL.into_iter().filter(|i| i.is_supported()).map(|i| (i, Ops::for_isa(i)))
    }

    fn noise(n: usize, scale: f32) -> Vec<f32> {
        let mut s = 1u32;
        (0..n)
            .map(|_| {
                s = s.wrapping_mul(1664525).wrapping_add(1013904223);
                (s >> 8) as f32 / (1 << 23) as f32 * scale - scale
            })
            .collect()
    }

    #[test]
    fn exp_is_within_three_ulp() {
        for (isa, ops) in each() {
            let x: Vec<f32> = (0..200_000).map(|i| i as f32 * -87.0 / 200_000.0).collect();
            let mut y = x.clone();
            ops.exp_sum(&mut y, 0.0);
            let worst = x
                .iter()
                .zip(&y)
                .map(|(&x, &y)| {
                    let want = (x as f64).exp();
                    (y as f64 - want).abs()
                        / (want as f32)
                            .to_bits()
                            .wrapping_add(1)
                            .pipe(|b| f32::from_bits(b) as f64 - want as f32 as f64)
                })
                .fold(0.0, f64::max);
            assert!(worst < 3.0, "{isa}: {worst} ulp");
            let mut edge = [f32::NEG_INFINITY, -1e30, -88.0, 0.0];
            assert_eq!(ops.exp_sum(&mut edge, 0.0), 1.0, "{isa}");
        }
    }

    trait Pipe: Sized {
        fn pipe<R>(self, f: impl FnOnce(Self) -> R) -> R {
            f(self)
        }
    }
    impl Pipe for u32 {}

    #[test]
    fn encoding_rounds_to_nearest_and_keeps_its_sums() {
        for (isa, ops) in each() {
            for n in [1, 31, 32, 100, 255, 256] {
                let mut x = noise(n, 3.0);
                x[n / 2] = 50.0; // an outlier coarsens its own 32 and no others
                let mut b = bytemuck::Zeroable::zeroed();
                ops.encode_q8(&x, &mut b);
                for (i, &v) in x.iter().enumerate() {
                    let d = b.d[i / 32];
                    assert!((v - d * b.q[i] as f32).abs() <= d * 0.5001, "{isa} n {n} at {i}");
                }
                assert!(b.q[n..].iter().all(|&q| q == 0), "{isa} n {n}: the rest is zero");
                for g in 0..16 {
                    let want: i32 = b.q[16 * g..16 * g + 16].iter().map(|&q| q as i32).sum();
                    assert_eq!(b.sums[g] as i32, want, "{isa} n {n} group {g}");
                }
            }
            let mut b = bytemuck::Zeroable::zeroed();
            ops.encode_q8(&[f32::NAN; 256], &mut b);
            assert!(b.d[0].is_nan() && b.q.iter().all(|&q| q == 0), "{isa}: NaN stays visible");
        }
    }

    /// Down to where f32 ends, and up: nothing overflows on the way, and what one group holds is not felt by its neighbours.
    #[test]
    fn encoding_is_within_half_a_step_at_all_magnitudes() {
        // The smallest step: 1 / d must be finite. Where a scale is subnormal, what it was rounded by comes 127 times.
        const LEAST: f64 = 3.001e-39;
        const LAST: f64 = 1.401_298_464_324_817e-45;
        let mut failures = Vec::new();
        // 127 / amax overflows for magnitudes below 3.73e-37.
        let magnitudes =
            [0.0, -0.0, 1e-45, 1e-43, 1e-41, 1e-39, 1.2e-38, 1e-37, 3.7e-37, 3.8e-37, 1e-20, 1.0, 1e20, 3e38];
        for amax in magnitudes.into_iter().chain([f32::MAX]) {
            let mut x = noise(SLAB, 1.0);
            for (g, x) in x.chunks_mut(32).enumerate().step_by(2) {
                x.iter_mut().for_each(|v| *v *= amax);
                (x[g], x[g + 1], x[g + 2]) = (amax, -amax / 3.0, -0.0);
            }
            let encoded = |ops: &Ops| {
                let mut b = bytemuck::Zeroable::zeroed();
                ops.encode_q8(&x, &mut b);
                b
            };
            let want = encoded(&SCALAR);
            for (isa, ops) in each() {
                let b = encoded(ops);
                assert!(bytemuck::bytes_of(&b) == bytemuck::bytes_of(&want), "{isa} {amax:e}: not as scalar");
            }
            for (i, &v) in x.iter().enumerate() {
                let most = x[i / 32 * 32..][..32].iter().fold(0.0f32, |m, v| m.max(v.abs())) as f64;
                let (d, q) = (want.d[i / 32] as f64, want.q[i] as f64);
                let (error, step) = ((v as f64 - d * q).abs(), (most / 127.0).max(LEAST));
                // NaN is an error, too.
                if !(error <= 0.5001 * step + 64.0 * LAST && d <= 1.0001 * step + LAST) {
                    failures.push(format!("{v:e} at {i} of {most:e}: {q} times {d:e}, {:.1} steps off", error / step));
                }
            }
        }
        assert!(
            failures.is_empty(),
            "{} failures, the first: {:#?}",
            failures.len(),
            &failures[..failures.len().min(5)]
        );
    }

    #[test]
    fn bf16_is_rounded_to_nearest_even() {
        // Ties to either side, and beside one.
        let ties: [u32; 6] = [0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0xBF808000, 0xBF818000];
        let small = [0x00000000, 0x80000000, 0x00000001, 0x00008000, 0x00018000, 0x007FFFFF];
        let infinite = [0x7F800000, 0xFF800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F7FFF];
        let nan = [0x7F800001, 0xFF800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF];
        let special = ties.into_iter().chain(small).chain(infinite).chain(nan).map(f32::from_bits);
        let x: Vec<f32> = special.chain(noise(SLAB, 3.0)).take(SLAB).collect();
        for (isa, ops) in each() {
            for n in (0..=70).chain([255, 256]) {
                // Each special value in each half of a pair.
                for x in [&x[..n], &x[SLAB - n..], &x[n.min(1)..n]] {
                    let mut pairs = [0xDEAD_BEEF; SLAB / 2];
                    ops.encode_bf16(x, &mut pairs);
                    for (i, pair) in pairs.iter().enumerate() {
                        for (i, got) in [(2 * i, *pair as u16), (2 * i + 1, (*pair >> 16) as u16)] {
                            let want = x.get(i).map_or(0, |&v| half::bf16::from_f32(v).to_bits());
                            assert_eq!(got, want, "{isa} {} numbers, at {i}: {:?}", x.len(), x.get(i));
                        }
                    }
                }
            }
        }
    }

    /// Of whole vectors and what is left of one. Numbers of which every order of sums is exact leave no room for rounding.
    #[test]
    fn every_isa_adds_and_multiplies() {
        let whole = |n: usize, most: usize| (0..n).map(move |i| ((i + most) * 2531 % (2 * most)) as f32 - most as f32);
        for (isa, ops) in each() {
            for n in 0..=70 {
                let (x, y): (Vec<_>, Vec<_>) = (whole(n, 32).collect(), whole(n, 2048).collect());
                let want: f32 = x.iter().zip(&y).map(|(x, y)| x * y).sum();
                assert_eq!(ops.dot(&x, &y), want, "{isa} dot {n}");
                let mut got = x.clone();
                ops.axpy(&mut got, -3.0, &y);
                assert!(x.iter().zip(&y).map(|(x, y)| x - 3.0 * y).eq(got), "{isa} axpy {n}");
                let (x, y) = (noise(2 * n, 3.0)[n..].to_vec(), noise(n, 2.0));
                let mut got = x.clone();
                ops.add(&mut got, &y);
                assert!(x.iter().zip(&y).map(|(x, y)| x + y).eq(got), "{isa} add {n}");
                let mut got = x.clone();
                ops.axpy(&mut got, 0.7, &y);
                for i in 0..n {
                    let (x, product) = (x[i] as f64, 0.7f32 as f64 * y[i] as f64);
                    // Two roundings at most.
                    let error = (got[i] as f64 - (x + product)).abs();
                    assert!(error <= f32::EPSILON as f64 * (x.abs() + product.abs()), "{isa} axpy {n} at {i}");
                }
            }
            for n in [17, 70, 100, 1000, 8192] {
                let (x, y) = (noise(2 * n, 3.0)[n..].to_vec(), noise(n, 2.0));
                let products = || x.iter().zip(&y).map(|(&x, &y)| x as f64 * y as f64);
                let (want, size): (f64, f64) = (products().sum(), products().map(f64::abs).sum());
                let error = (ops.dot(&x, &y) as f64 - want).abs();
                assert!(error <= 1e-6 * size, "{isa} dot {n}: {:e}", error / size);
            }
        }
    }

    #[test]
    fn reading_reads_every_byte() {
        for (isa, ops) in each() {
            for n in (0..=70).chain([255, 256, 257, 511, 600]) {
                let mut bytes: Vec<u8> = (0..n).map(|i| (i * 151 + 7) as u8).collect();
                let all = ops.read(&bytes);
                assert_eq!(all, SCALAR.read(&bytes), "{isa} {n} bytes");
                for i in 0..n {
                    bytes[i] ^= 0x10;
                    assert_ne!(ops.read(&bytes), all, "{isa} {n} bytes: not that at {i}");
                    bytes[i] ^= 0x10;
                }
            }
        }
    }

    #[test]
    fn every_isa_agrees_with_f64() {
        for (isa, ops) in each() {
            for n in [1, 15, 16, 17, 64, 100, 576, 8192] {
                let (x, w) = (noise(n, 2.0), noise(n, 1.0));
                let mut got = vec![0.0; n];
                ops.rmsnorm(&x, &w, 1e-6, &mut got);
                let ms = x.iter().map(|&v| (v as f64).powi(2)).sum::<f64>() / n as f64 + 1e-6;
                for i in 0..n {
                    let want = x[i] as f64 / ms.sqrt() * w[i] as f64;
                    assert!((got[i] as f64 - want).abs() <= 1e-5 * want.abs() + 1e-9, "{isa} rmsnorm {n} at {i}");
                }
                let mut got = x.clone();
                ops.silu_mul(&mut got, &w);
                for i in 0..n {
                    let want = x[i] as f64 / (1.0 + (-x[i] as f64).exp()) * w[i] as f64;
                    assert!((got[i] as f64 - want).abs() <= 1e-6 * want.abs() + 1e-9, "{isa} silu {n} at {i}");
                }
                assert_eq!(ops.max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max), "{isa} max {n}");
            }
        }
    }

    #[test]
    fn rotation_keeps_length_and_pairs() {
        for (isa, ops) in each() {
            let x = noise(70, 1.0);
            let (cos, sin): (Vec<f32>, Vec<f32>) = (0..32).map(|i| ((i as f32).cos(), (i as f32).sin())).unzip();
            let (mut halves, mut pairs) = (x.clone(), x.clone());
            ops.rope_halves(&mut halves, &cos, &sin);
            ops.rope_pairs(&mut pairs, &cos, &sin);
            for i in 0..32 {
                let turn = |a: f32, b: f32| [a * cos[i] - b * sin[i], a * sin[i] + b * cos[i]];
                let close = |a: [f32; 2], b: [f32; 2]| (a[0] - b[0]).abs() < 1e-6 && (a[1] - b[1]).abs() < 1e-6;
                assert!(close([halves[i], halves[i + 32]], turn(x[i], x[i + 32])), "{isa} halves {i}");
                assert!(close([pairs[2 * i], pairs[2 * i + 1]], turn(x[2 * i], x[2 * i + 1])), "{isa} pairs {i}");
            }
            assert_eq!(halves[64..], x[64..], "{isa}: what is not rotated stays");
        }
    }
}

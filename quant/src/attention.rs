//! Attention over a KV cache: `softmax(q K^T * scale) V`, online (Milakov and Gimelshein, 2018; Dao et al., 2022), for all
//! query rows that share a KV head at once, so that every byte of the cache is read once for them.
//!
//! How the cache of one KV head lies in memory, chosen so that both products run over whole vectors without a shuffle:
//!
//! ```text
//! K   blocks of 16 positions, transposed: [position / 16][dimension][16]      a vector = 16 positions' scores
//! V   [position][dimension]                                                   a vector = 16 dimensions' outputs
//! ```
//!
//! A call covers a range of positions and leaves an unnormalised partial result: the maximum score m, the sum s of
//! exp(score - m) and o = sum of exp(score - m) * v. Partial results of fixed ranges are merged in order of position
//! ([`merge`]): the outcome does not depend on who computed what.

use crate::f32ops::{Ops, body};
use crate::isa::Isa;
use crate::lanes::{L, Lanes};
use crate::panel::Scratch;
use half::{bf16, f16};
use std::marker::PhantomData;
use std::ops::Range;

/// Positions in a K block.
pub const BLOCK: usize = 16;
/// Positions whose scores are computed before their values are read.
pub(crate) const CHUNK: usize = 128;
/// Largest batch, in tokens, in which each one's attention is bit-identical to that of the token alone.
pub const FEW: usize = 8;

/// How the cache stores keys and values.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KvType {
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Bytes with an f16 scale for every 32 dimensions.
    Q8_0,
}

impl KvType {
    /// Every type.
    pub const ALL: [KvType; 3] = [KvType::F16, KvType::Bf16, KvType::Q8_0];

    /// The name by which it is chosen.
    pub fn name(self) -> &'static str {
        match self {
            KvType::F16 => "f16",
            KvType::Bf16 => "bf16",
            KvType::Q8_0 => "q8_0",
        }
    }

    /// Bytes of the key (or the value) of one position of one head. A K block is 16 times that.
    pub fn row_bytes(self, head_dim: usize) -> usize {
        match self {
            KvType::F16 | KvType::Bf16 => head_dim * 2,
            KvType::Q8_0 => head_dim + head_dim.div_ceil(32) * 2,
        }
    }

    /// Stores the key of the position `lane` of a K block.
    pub fn store_k(self, key: &[f32], lane: usize, block: &mut [u8]) {
        assert!(lane < BLOCK && block.len() == BLOCK * self.row_bytes(key.len()));
        match self {
            KvType::F16 | KvType::Bf16 => {
                for (b, &x) in block.as_chunks_mut::<{ 2 * BLOCK }>().0.iter_mut().zip(key) {
                    b[2 * lane..2 * lane + 2].copy_from_slice(&self.half(x));
                }
            }
            KvType::Q8_0 => {
                let (codes, scales) = block.split_at_mut(key.len() * BLOCK);
                for (g, x) in key.chunks(32).enumerate() {
                    let d = scale(x);
                    scales[(g * BLOCK + lane) * 2..][..2].copy_from_slice(&d.to_le_bytes());
                    for (i, &v) in x.iter().enumerate() {
                        codes[(g * 32 + i) * BLOCK + lane] = quantize(v, d) as u8;
                    }
                }
            }
        }
    }

    /// Reads the key of the position `lane` of a K block.
    pub fn load_k(self, lane: usize, block: &[u8], key: &mut [f32]) {
        assert!(lane < BLOCK && block.len() == BLOCK * self.row_bytes(key.len()));
        let half = |i: usize| [block[2 * (i * BLOCK + lane)], block[2 * (i * BLOCK + lane) + 1]];
        let codes = key.len() * BLOCK;
        for (i, x) in key.iter_mut().enumerate() {
            *x = match self {
                KvType::F16 => f16::from_le_bytes(half(i)).to_f32(),
                KvType::Bf16 => bf16::from_le_bytes(half(i)).to_f32(),
                KvType::Q8_0 => {
                    let d = codes / 2 + i / 32 * BLOCK; // in halves
                    let d = f16::from_le_bytes([block[2 * (d + lane)], block[2 * (d + lane) + 1]]).to_f32();
                    d * (block[i * BLOCK + lane] as i8) as f32
                }
            };
        }
    }

    /// Stores the value of one position.
    pub fn store_v(self, value: &[f32], row: &mut [u8]) {
        assert_eq!(row.len(), self.row_bytes(value.len()));
        match self {
            KvType::F16 | KvType::Bf16 => {
                for (b, &x) in row.as_chunks_mut::<2>().0.iter_mut().zip(value) {
                    *b = self.half(x);
                }
            }
            KvType::Q8_0 => {
                let (codes, scales) = row.split_at_mut(value.len());
                for (g, x) in value.chunks(32).enumerate() {
                    let d = scale(x);
                    scales[g * 2..][..2].copy_from_slice(&d.to_le_bytes());
                    for (i, &v) in x.iter().enumerate() {
                        codes[g * 32 + i] = quantize(v, d) as u8;
                    }
                }
            }
        }
    }

    /// What is beyond the range of halves becomes the largest of them: an infinity would reach tokens that do not see it, as
    /// zero times infinity.
    fn half(self, x: f32) -> [u8; 2] {
        let within = |most: f32| x.clamp(-most, most);
        match self {
            KvType::F16 => f16::from_f32(within(f16::MAX.to_f32_const())).to_le_bytes(),
            _ => bf16::from_f32(within(bf16::MAX.to_f32_const())).to_le_bytes(),
        }
    }
}

/// The largest magnitude to 127; NaN where one is NaN, so that it is not lost.
fn scale(x: &[f32]) -> f16 {
    // As integers, magnitudes are in order, and NaN is above all.
    let most = f32::from_bits(x.iter().map(|v| v.abs().to_bits()).max().unwrap_or(0));
    f16::from_f32((most / 127.0).clamp(0.0, f16::MAX.to_f32()))
}

fn quantize(x: f32, d: f16) -> i8 {
    let d = d.to_f32();
    if d > 0.0 { (x / d).round_ties_even() as i8 } else { 0 }
}

/// The rows that share a KV head: `rows * head_dim` queries, with how many positions each may see.
pub struct Queries<'a> {
    /// (rows, head_dim), already rotated.
    pub q: &'a [f32],
    /// For each row, the positions `0..limit` are visible.
    pub limits: &'a [usize],
    /// Of how many tokens the rows are.
    pub tokens: usize,
    /// What scores are multiplied by, `1 / sqrt(head_dim)`.
    pub scale: f32,
}

/// The cache of one KV head of one sequence.
#[derive(Clone, Copy)]
pub struct Cache<'a> {
    /// How keys are stored.
    pub k_type: KvType,
    /// How values are stored.
    pub v_type: KvType,
    /// K blocks.
    pub k: &'a [u8],
    /// V rows.
    pub v: &'a [u8],
}

impl<'a> Cache<'a> {
    /// A K block.
    pub(crate) fn k_block(&self, i: usize, hd: usize) -> &'a [u8] {
        let size = BLOCK * self.k_type.row_bytes(hd);
        &self.k[i * size..][..size]
    }
}

/// Where a partial result goes, for each row: `m`, `s` and `o` (rows, head_dim).
pub struct Partial<'a> {
    /// Maximum scores.
    pub m: &'a mut [f32],
    /// Sums of exp(score - m).
    pub s: &'a mut [f32],
    /// Sums of exp(score - m) * v.
    pub o: &'a mut [f32],
}

type Run = unsafe fn(&Queries<'_>, &Cache<'_>, Range<usize>, &mut Partial<'_>, &mut Scratch);

/// The kernels of one instruction set. Holding one is the proof that the machine has it.
pub struct Attention {
    run: Run,
    /// Query rows per call that best amortize converting keys and values.
    pub rows: usize,
}

impl Attention {
    pub(crate) fn for_isa(isa: Isa) -> &'static Attention {
        assert!(isa.is_supported());
        match isa {
            Isa::Scalar => &Attention { run: scalar, rows: 32 },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &Attention { run: avx2, rows: 32 },
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => &Attention { run: avx2, rows: 32 },
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => &Attention { run: avx512, rows: 32 },
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => &Attention { run: crate::amx::attention::run, rows: 256 },
            #[cfg(not(target_arch = "x86_64"))]
            _ => &Attention { run: scalar, rows: 32 },
        }
    }

    /// Attends to the positions of `range` (its start a multiple of 16), as far as each row may see them.
    #[allow(unsafe_code)]
    pub fn run(
        &self,
        q: &Queries<'_>,
        cache: &Cache<'_>,
        range: Range<usize>,
        out: &mut Partial<'_>,
        scratch: &mut Scratch,
    ) {
        let rows = q.limits.len();
        let hd = q.q.len() / rows.max(1);
        assert!(hd.is_multiple_of(L) && q.q.len() == rows * hd && out.o.len() == q.q.len());
        assert!(out.m.len() == rows && out.s.len() == rows && range.start.is_multiple_of(BLOCK));
        // SAFETY: an `Attention` for a rung is handed out only where the rung is supported.
        unsafe { (self.run)(q, cache, range, out, scratch) }
    }
}

fn scalar(q: &Queries<'_>, c: &Cache<'_>, r: Range<usize>, o: &mut Partial<'_>, s: &mut Scratch) {
    attend_vectors::<crate::lanes::Scalar, false>(q, c, r, o, s);
}
#[cfg(target_arch = "x86_64")]
crate::isa::avx2! {
    fn avx2(
        q: &Queries<'_>, c: &Cache<'_>, r: Range<usize>, o: &mut Partial<'_>, s: &mut Scratch) {
        attend_vectors::<crate::lanes::Avx2, false>(q, c, r, o, s);
    }
}
#[cfg(target_arch = "x86_64")]
crate::isa::avx512! {
    pub(crate) fn avx512(
        q: &Queries<'_>, c: &Cache<'_>, r: Range<usize>, o: &mut Partial<'_>, s: &mut Scratch,
    ) {
        attend_vectors::<crate::lanes::Avx512, true>(q, c, r, o, s);
    }
}

/// Dimensions of a key, or of a value, that share a scale where there are scales.
const SCALE_DIMS: usize = 32;

/// What the dimensions of group `g` of a K block are multiplied by, if anything.
#[inline(always)]
pub(crate) fn scale_k<V: Lanes>(kind: KvType, block: &[u8], hd: usize, g: usize) -> V {
    match kind {
        KvType::F16 | KvType::Bf16 => V::splat(1.0),
        KvType::Q8_0 => V::load_f16(bytes(&block[hd * BLOCK..], g)),
    }
}

/// Vector `i` of a K block: dimension `i` of its 16 positions, given its group's scale.
#[inline(always)]
pub(crate) fn load_k<V: Lanes>(kind: KvType, block: &[u8], i: usize, scale: V) -> V {
    match kind {
        KvType::F16 => V::load_f16(bytes(block, i)),
        KvType::Bf16 => V::load_bf16(bytes(block, i)),
        KvType::Q8_0 => V::load_i8(bytes(block, i)).mul(scale),
    }
}

/// Dimensions `16 i .. 16 i + 16` of a V row.
#[inline(always)]
pub(crate) fn load_v<V: Lanes>(kind: KvType, row: &[u8], hd: usize, i: usize) -> V {
    match kind {
        KvType::F16 => V::load_f16(bytes(row, i)),
        KvType::Bf16 => V::load_bf16(bytes(row, i)),
        KvType::Q8_0 => {
            let at = hd + i / 2 * 2;
            V::load_i8(bytes(row, i)).mul(V::splat_f16([row[at], row[at + 1]]))
        }
    }
}

/// Array `i` of bytes that are a row of such arrays.
#[inline(always)]
fn bytes<const N: usize>(b: &[u8], i: usize) -> &[u8; N] {
    b[i * N..][..N].try_into().expect("of that length")
}

/// The two products of a chunk of positions, as an instruction set computes them.
pub(crate) trait Products {
    /// Scores of all rows for `blocks` K blocks from position `p0` on: `q k * scale`. What lies past them in a row of
    /// `scores` may be anything afterwards.
    fn scores(&mut self, cache: &Cache<'_>, p0: usize, blocks: usize, scores: &mut [[f32; CHUNK]]);

    /// `o += p V` for the values of `positions`, (rows, head_dim). Weights of positions past them are zero.
    fn values(&mut self, cache: &Cache<'_>, positions: Range<usize>, p: &[[f32; CHUNK]], o: &mut [f32]);
}

/// The online softmax over chunks of positions.
#[inline(always)]
pub(crate) fn attend<V: Lanes>(
    mut products: impl Products,
    (limits, hd): (&[usize], usize),
    cache: &Cache<'_>,
    range: Range<usize>,
    out: &mut Partial<'_>,
    scores: &mut [[f32; CHUNK]],
) {
    out.m.fill(f32::NEG_INFINITY);
    out.s.fill(0.0);
    out.o.fill(0.0);
    let seen = limits.iter().copied().max().unwrap_or(0).min(range.end);
    for p0 in (range.start..seen).step_by(CHUNK) {
        let p1 = seen.min(p0 + CHUNK);
        products.scores(cache, p0, (p1 - p0).div_ceil(BLOCK), scores);
        for (r, p) in scores.iter_mut().enumerate().take(limits.len()) {
            let n = limits[r].clamp(p0, p1) - p0;
            let (p, unseen) = p.split_at_mut(n);
            unseen.fill(0.0);
            let (before, m) = (out.m[r], out.m[r].max(body::max::<V>(p)));
            if before != m {
                let fade = (before - m).exp();
                out.s[r] *= fade;
                let fade = V::splat(fade);
                for o in out.o[r * hd..][..hd].as_chunks_mut::<L>().0 {
                    V::load(o).mul(fade).store(o);
                }
            }
            out.m[r] = m;
            out.s[r] += body::exp_sum::<V>(p, m);
        }
        products.values(cache, p0..p1, scores, out.o);
    }
}

/// Products on vectors of f32. `WIDE`: 32 registers, each a vector; otherwise 16, each a half.
struct Vectors<'a, V, const WIDE: bool> {
    q: &'a Queries<'a>,
    rows: usize,
    hd: usize,
    keys: &'a mut [[f32; L]], // (KEYS, head_dim): K blocks in f32, where many rows meet them
    lanes: PhantomData<V>,
}

/// K blocks that are converted to f32 together.
const KEYS: usize = 2;

#[inline(always)]
fn attend_vectors<V: Lanes, const WIDE: bool>(
    q: &Queries<'_>,
    cache: &Cache<'_>,
    range: Range<usize>,
    out: &mut Partial<'_>,
    scratch: &mut Scratch,
) {
    let rows = q.limits.len();
    let hd = q.q.len() / rows.max(1);
    let keys = scratch.tile.take::<[f32; L]>(KEYS * hd);
    let products = Vectors::<V, WIDE> { q, rows, hd, keys, lanes: PhantomData };
    attend::<V>(products, (q.limits, hd), cache, range, out, scratch.floats.take(rows));
}

impl<V: Lanes, const WIDE: bool> Products for Vectors<'_, V, WIDE> {
    #[inline(always)]
    fn scores(&mut self, cache: &Cache<'_>, p0: usize, blocks: usize, scores: &mut [[f32; CHUNK]]) {
        let first = p0 / BLOCK;
        // Of few rows each key is used as it comes, in several blocks at once, so that no sum waits for itself.
        match (self.rows, WIDE) {
            (1, _) => self.direct::<1, 4>(cache, first, blocks, scores),
            (2, true) => self.direct::<2, 4>(cache, first, blocks, scores),
            (2, false) => self.direct::<2, 2>(cache, first, blocks, scores),
            (3, true) => self.direct::<3, 4>(cache, first, blocks, scores),
            (3, false) => self.direct::<3, 1>(cache, first, blocks, scores),
            (4, true) => self.direct::<4, 4>(cache, first, blocks, scores),
            (4, false) => self.direct::<4, 1>(cache, first, blocks, scores),
            _ => {
                for b in (0..blocks).step_by(KEYS) {
                    let n = KEYS.min(blocks - b);
                    for (i, keys) in self.keys.chunks_exact_mut(self.hd).take(n).enumerate() {
                        let block = cache.k_block(first + b + i, self.hd);
                        for (g, keys) in keys.chunks_mut(SCALE_DIMS).enumerate() {
                            let scale = scale_k::<V>(cache.k_type, block, self.hd, g);
                            for (d, k) in keys.iter_mut().enumerate() {
                                load_k(cache.k_type, block, g * SCALE_DIMS + d, scale).store(k);
                            }
                        }
                    }
                    let mut r = 0;
                    while r < self.rows {
                        let eight = WIDE && self.rows - r > 4;
                        match (eight, n) {
                            (true, KEYS) => self.transposed::<8, KEYS>((r, 0, b), scores),
                            (true, _) => self.transposed::<8, 1>((r, 0, b), scores),
                            (false, _) => (0..n).for_each(|i| self.transposed::<4, 1>((r, i, b + i), scores)),
                        }
                        r += if eight { 8 } else { 4 };
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn values(&mut self, cache: &Cache<'_>, positions: Range<usize>, p: &[[f32; CHUNK]], o: &mut [f32]) {
        for r in (0..self.rows).step_by(4) {
            match (self.rows - r, WIDE) {
                (1, _) => self.sums::<1, 4>(r, cache, &positions, p, o),
                (2, true) => self.sums::<2, 4>(r, cache, &positions, p, o),
                (2, false) => self.sums::<2, 2>(r, cache, &positions, p, o),
                (3, true) => self.sums::<3, 4>(r, cache, &positions, p, o),
                (3, false) => self.sums::<3, 1>(r, cache, &positions, p, o),
                (_, true) => self.sums::<4, 4>(r, cache, &positions, p, o),
                (_, false) => self.sums::<4, 1>(r, cache, &positions, p, o),
            }
        }
    }
}

impl<V: Lanes, const WIDE: bool> Vectors<'_, V, WIDE> {
    /// The query of a row; the last one again past it.
    #[inline(always)]
    fn row(&self, r: usize) -> &[f32] {
        &self.q.q[r.min(self.rows - 1) * self.hd..][..self.hd]
    }

    /// Scores of all `N` rows for all blocks from `first` on, `B` at once.
    #[inline(always)]
    fn direct<const N: usize, const B: usize>(
        &self,
        cache: &Cache<'_>,
        first: usize,
        blocks: usize,
        scores: &mut [[f32; CHUNK]],
    ) {
        for b in (0..blocks).step_by(B) {
            let mut block = [&[][..]; B];
            for j in 0..B {
                block[j] = cache.k_block(first + (b + j).min(blocks - 1), self.hd);
            }
            let mut acc = [[V::splat(0.0); B]; N];
            for g in 0..self.hd.div_ceil(SCALE_DIMS) {
                let mut scale = [V::splat(0.0); B];
                for j in 0..B {
                    scale[j] = scale_k(cache.k_type, block[j], self.hd, g);
                }
                for d in g * SCALE_DIMS..self.hd.min((g + 1) * SCALE_DIMS) {
                    let mut k = [V::splat(0.0); B];
                    for j in 0..B {
                        k[j] = load_k(cache.k_type, block[j], d, scale[j]);
                    }
                    for i in 0..N {
                        let q = V::splat(self.q.q[i * self.hd + d]);
                        for j in 0..B {
                            acc[i][j] = k[j].fma(q, acc[i][j]);
                        }
                    }
                }
            }
            for i in 0..N {
                for j in 0..B.min(blocks - b) {
                    acc[i][j].mul(V::splat(self.q.scale)).store(&mut scores[i].as_chunks_mut::<L>().0[b + j]);
                }
            }
        }
    }

    /// Scores of `N` rows from `r0` on for `B` blocks from `b` on, whose keys lie in f32 from `from` on.
    #[inline(always)]
    fn transposed<const N: usize, const B: usize>(
        &self,
        (r0, from, b): (usize, usize, usize),
        scores: &mut [[f32; CHUNK]],
    ) {
        let (hd, mut q) = (self.hd, [self.q.q; N]);
        for (i, q) in q.iter_mut().enumerate() {
            *q = self.row(r0 + i);
        }
        let mut keys = [&self.keys[..hd]; B];
        for (j, keys) in keys.iter_mut().enumerate() {
            *keys = &self.keys[(from + j) * hd..][..hd];
        }
        let mut acc = [[V::splat(0.0); B]; N];
        for d in 0..hd {
            let mut k = [V::splat(0.0); B];
            for j in 0..B {
                k[j] = V::load(&keys[j][d]);
            }
            for i in 0..N {
                let q = V::splat(q[i][d]);
                for j in 0..B {
                    acc[i][j] = k[j].fma(q, acc[i][j]);
                }
            }
        }
        for (i, acc) in acc.into_iter().enumerate().take(self.rows - r0) {
            for j in 0..B {
                acc[j].mul(V::splat(self.q.scale)).store(&mut scores[r0 + i].as_chunks_mut::<L>().0[b + j]);
            }
        }
    }

    /// `o += p V` of `N` rows from `r0` on: `W` vectors of their dimensions stay in registers over the positions.
    #[inline(always)]
    fn sums<const N: usize, const W: usize>(
        &self,
        r0: usize,
        cache: &Cache<'_>,
        positions: &Range<usize>,
        p: &[[f32; CHUNK]],
        o: &mut [f32],
    ) {
        let hd = self.hd;
        let row_bytes = cache.v_type.row_bytes(hd);
        let values = &cache.v[positions.start * row_bytes..positions.end * row_bytes];
        let p: &[[f32; CHUNK]; N] = p[r0..].first_chunk().expect("rows from r0 on");
        for d0 in (0..hd / L).step_by(W) {
            let wide = (hd / L - d0).min(W);
            let mut acc = [[V::splat(0.0); W]; N];
            for (i, row) in values.chunks_exact(row_bytes).enumerate() {
                let mut v = [V::splat(0.0); W];
                for (j, v) in v.iter_mut().enumerate() {
                    *v = load_v(cache.v_type, row, hd, d0 + j.min(wide - 1));
                }
                for r in 0..N {
                    let w = V::splat(p[r][i]);
                    for j in 0..W {
                        acc[r][j] = v[j].fma(w, acc[r][j]);
                    }
                }
            }
            for r in 0..N {
                let o = o[(r0 + r) * hd..][..hd].as_chunks_mut::<L>().0;
                for j in 0..wide {
                    V::load(&o[d0 + j]).add(acc[r][j]).store(&mut o[d0 + j]);
                }
            }
        }
    }
}

/// Merges one row's partial results, in order of position, to the attention output.
pub fn merge<'a>(ops: &Ops, parts: impl Iterator<Item = (f32, f32, &'a [f32])> + Clone, out: &mut [f32]) {
    let m = parts.clone().map(|p| p.0).fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    out.fill(0.0);
    for (pm, ps, po) in parts {
        // A range of which the row sees nothing has m = -inf and s = 0: it weighs nothing.
        let w = if pm == m { 1.0 } else { (pm - m).exp() };
        sum += ps * w;
        ops.axpy(out, w, po);
    }
    let inverse = if sum > 0.0 { 1.0 / sum } else { sum };
    out.iter_mut().for_each(|o| *o *= inverse);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut s = seed;
        (0..n)
            .map(|_| {
                s = s.wrapping_mul(1664525).wrapping_add(1013904223);
                (s >> 8) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    /// A cache with room for `capacity` positions, the first of which have these keys and values.
    fn stored(
        (k_type, v_type): (KvType, KvType),
        hd: usize,
        capacity: usize,
        (keys, values): (&[f32], &[f32]),
    ) -> (Vec<u8>, Vec<u8>) {
        let (k_row, v_row) = (k_type.row_bytes(hd), v_type.row_bytes(hd));
        let (mut k, mut v) = (vec![0; capacity.next_multiple_of(BLOCK) * k_row], vec![0; capacity * v_row]);
        for (p, (key, value)) in keys.chunks_exact(hd).zip(values.chunks_exact(hd)).enumerate() {
            k_type.store_k(key, p % BLOCK, &mut k[p / BLOCK * BLOCK * k_row..][..BLOCK * k_row]);
            v_type.store_v(value, &mut v[p * v_row..][..v_row]);
        }
        (k, v)
    }

    /// The largest difference between attention over a cache, computed in two ranges, and its definition in f64 on what was
    /// stored: of `n` positions, of which the rows see different numbers.
    fn difference(
        isa: Isa,
        (kind, v_type): (KvType, KvType),
        hd: usize,
        (n, one_token): (usize, bool),
        (q, keys, values): (&[f32], &[f32], &[f32]),
    ) -> f64 {
        const SCALE: f32 = 0.3;
        let (ops, attention) = (Ops::for_isa(isa), Attention::for_isa(isa));
        let (rb, rows) = (kind.row_bytes(hd), q.len() / hd);
        let (k, v) = stored((kind, v_type), hd, n + 40, (keys, values));
        for p in 0..n {
            let block = &k[p / 16 * 16 * rb..][..16 * rb];
            let mut key = vec![0.0; hd];
            kind.load_k(p % 16, block, &mut key);
            let off = key.iter().zip(&keys[p * hd..]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 5e-3, "{kind:?}: read back {off} off");
        }
        let limits: Vec<usize> = (0..rows).map(|r| n - (r * 5) % n).collect();
        // Rungs may choose by it: each row as a token of its own, or all as the heads of one.
        let tokens = if one_token { 1 } else { rows };
        let queries = Queries { q, limits: &limits, tokens, scale: SCALE };
        let cache = Cache { k_type: kind, v_type, k: &k, v: &v };
        let split = (n / 2).next_multiple_of(16);
        let mut parts = Vec::new();
        for range in [0..split, split..n] {
            let mut p = (vec![0.0; rows], vec![0.0; rows], vec![0.0; rows * hd]);
            let mut out = Partial { m: &mut p.0, s: &mut p.1, o: &mut p.2 };
            attention.run(&queries, &cache, range, &mut out, &mut Scratch::default());
            parts.push(p);
        }
        let mut largest = 0.0f64;
        for r in 0..rows {
            let mut got = vec![0.0; hd];
            merge(ops, parts.iter().map(|p| (p.0[r], p.1[r], &p.2[r * hd..][..hd])), &mut got);
            let score = |p: usize| (0..hd).map(|d| q[r * hd + d] as f64 * keys[p * hd + d] as f64).sum::<f64>();
            let scores: Vec<f64> = (0..limits[r]).map(|p| score(p) * SCALE as f64).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let w: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let total: f64 = w.iter().sum();
            for (d, got) in got.into_iter().enumerate() {
                let want = w.iter().enumerate().map(|(p, w)| w * values[p * hd + d] as f64).sum::<f64>() / total;
                let error = (got as f64 - want).abs();
                largest = if error.is_nan() { f64::INFINITY } else { largest.max(error) };
            }
        }
        largest
    }

    /// What rounding makes of numbers up to one: to the cache's type, and on tiles to bf16.
    fn tolerance(isa: Isa, kind: KvType) -> f64 {
        match (kind, isa) {
            (KvType::F16, Isa::Amx) => 4e-3,
            (KvType::F16, _) => 2e-3,
            _ => 2e-2,
        }
    }

    #[test]
    fn what_is_no_number_stays_so_and_what_is_too_large_becomes_the_largest() {
        for kind in KvType::ALL {
            let mut x = noise(64, 4);
            (x[3], x[40]) = (f32::NAN, -1e30);
            (x[41], x[42], x[43]) = (f32::MAX, f32::INFINITY, f32::NEG_INFINITY);
            let (mut row, mut block) = (vec![0; kind.row_bytes(64)], vec![0; BLOCK * kind.row_bytes(64)]);
            kind.store_v(&x, &mut row);
            kind.store_k(&x, 5, &mut block);
            let mut key = [0.0; 64];
            kind.load_k(5, &block, &mut key);
            let value: Vec<f32> = (0..4)
                .flat_map(|i| {
                    let mut lanes = [0.0; L];
                    load_v::<crate::lanes::Scalar>(kind, &row, 64, i).store(&mut lanes);
                    lanes
                })
                .collect();
            for x in [&key[..], &value] {
                assert!(x[3].is_nan() && x[40] < -1e4 && x[40].is_finite(), "{kind:?}: {} {}", x[3], x[40]);
                assert!(x[41] > 1e4 && x[42] > 1e4 && x[43] < -1e4, "{kind:?}: {:?}", &x[41..44]);
                assert!(x[32..].iter().all(|x| x.is_finite()), "{kind:?}: {:?}", &x[40..44]);
            }
        }
    }

    /// Of rows, m, s and o.
    type Sums = (Vec<f32>, Vec<f32>, Vec<f32>);

    /// What rows give for the positions up to `n`.
    fn sums(isa: Isa, q: &Queries<'_>, cache: &Cache<'_>, n: usize) -> Sums {
        let rows = q.limits.len();
        let mut p = (vec![f32::NAN; rows], vec![f32::NAN; rows], vec![f32::NAN; q.q.len()]);
        let mut out = Partial { m: &mut p.0, s: &mut p.1, o: &mut p.2 };
        Attention::for_isa(isa).run(q, cache, 0..n, &mut out, &mut Scratch::default());
        p
    }

    /// A row that ends before a position gives the same bits whatever is there, infinities included.
    #[test]
    fn what_a_row_does_not_see_does_not_reach_it() {
        let (hd, n, at) = (64, 200, 140);
        let (keys, values) = (noise(n * hd, 6), noise(n * hd, 7));
        let mut failures = Vec::new();
        for (isa, rows) in Isa::ALL.into_iter().filter(|i| i.is_supported()).flat_map(|i| [(i, 4), (i, 9), (i, 40)]) {
            // The first sees all; the others end where the position is, or before.
            let limits: Vec<usize> = (0..rows).map(|r| if r == 0 { n } else { at + 3 - 3 * r }).collect();
            let q = Queries { q: &noise(rows * hd, 5), limits: &limits, tokens: rows, scale: 0.3 };
            for kind in KvType::ALL {
                let of = |keys: &[f32], values: &[f32]| {
                    let (k, v) = stored((kind, kind), hd, n, (keys, values));
                    let (m, s, o) = sums(isa, &q, &Cache { k_type: kind, v_type: kind, k: &k, v: &v }, n);
                    (m[1..].to_vec(), s[1..].to_vec(), o[hd..].to_vec())
                };
                let want = of(&keys, &values);
                for large in [f32::MAX, f32::INFINITY, f32::NEG_INFINITY] {
                    let (mut k, mut v) = (keys.clone(), values.clone());
                    k[at * hd + 1..][..40].fill(large);
                    v[at * hd + 1..][..40].fill(large);
                    for (what, got) in [("key", of(&k, &values)), ("value", of(&keys, &v))] {
                        if got != want {
                            failures.push(format!("{isa} {kind:?} rows {rows}: {what} {large:e}"));
                        }
                    }
                }
            }
        }
        assert!(failures.is_empty(), "{failures:#?}");
    }

    /// On the same cache of several chunks, around the numbers of rows and tokens at which bodies change.
    #[test]
    fn every_rung_agrees_with_scalar() {
        let n = 300;
        let mut failures = Vec::new();
        for (hd, kind) in [(32, KvType::F16), (32, KvType::Bf16), (32, KvType::Q8_0), (48, KvType::F16)] {
            let (k, v) = stored((kind, kind), hd, n, (&noise(n * hd, 7), &noise(n * hd, 8)));
            let cache = Cache { k_type: kind, v_type: kind, k: &k, v: &v };
            for (rows, tokens) in [15, 16, 31, 32, 33].into_iter().flat_map(|r| [(r, FEW), (r, FEW + 1)]) {
                let limits: Vec<usize> = (0..rows).map(|r| n - r * 37 % n).collect();
                let q = Queries { q: &noise(rows * hd, 9), limits: &limits, tokens, scale: 0.3 };
                // What m is relative to, and with it the other sums, is a rung's own choice.
                let results = |isa: Isa| {
                    let (m, s, o) = sums(isa, &q, &cache, n);
                    let o = o.chunks_exact(hd).zip(&s).flat_map(|(o, s)| o.iter().map(move |o| o / s));
                    m.iter().zip(&s).map(|(m, s)| m + s.ln()).chain(o).collect::<Vec<_>>()
                };
                let want = results(Isa::Scalar);
                for isa in Isa::ALL.into_iter().filter(|i| i.is_supported()) {
                    let off = results(isa)
                        .iter()
                        .zip(&want)
                        .map(|(a, b)| (a - b).abs())
                        .fold(0.0, |m, x| if x.is_nan() { f32::INFINITY } else { x.max(m) });
                    // Tiles round to bf16.
                    if off > if isa == Isa::Amx { 4e-3 } else { 2e-6 } {
                        failures.push(format!("{isa} {kind:?} hd {hd} rows {rows} tokens {tokens}: {off:e} off"));
                    }
                }
            }
        }
        assert!(failures.is_empty(), "{failures:#?}");
    }

    /// Without its kernel the rung would pass every other test. Where tiles do not pay it gives the bits of the rung below.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn tiles_take_many_rows_of_many_tokens() {
        if !Isa::Amx.is_supported() {
            return println!("not on this machine: {}", Isa::Amx);
        }
        let n = 300;
        for (hd, rows, tokens, tiles) in [
            (32, 16, FEW + 1, true),
            (64, 33, 33, true),
            (32, 15, FEW + 1, false),
            (32, 16, FEW, false),
            (48, 16, FEW + 1, false),
        ] {
            let (k, v) = stored((KvType::F16, KvType::F16), hd, n, (&noise(n * hd, 7), &noise(n * hd, 8)));
            let cache = Cache { k_type: KvType::F16, v_type: KvType::F16, k: &k, v: &v };
            let q = Queries { q: &noise(rows * hd, 9), limits: &vec![n; rows], tokens, scale: 0.3 };
            let differs = sums(Isa::Amx, &q, &cache, n) != sums(Isa::Avx512, &q, &cache, n);
            assert_eq!(differs, tiles, "hd {hd} rows {rows} tokens {tokens}");
        }
    }

    /// Every ISA, cache type, head size and number of rows.
    #[test]
    fn attention_equals_its_definition() {
        let (mut failures, mut covered) = (Vec::new(), Vec::new());
        for isa in Isa::ALL.into_iter().filter(|i| i.is_supported()) {
            covered.push(isa.name());
            for (hd, rows, n) in [
                (64, 1, 1),
                (64, 3, 15),
                (128, 2, 70),
                (96, 4, 200),
                (128, 8, 16),
                (80, 9, 17),
                (64, 12, 45),
                (128, 17, 300),
                (16, 32, 129),
                (32, 40, 33),
                (128, 75, 400),
            ] {
                let (q, keys, values) = (noise(rows * hd, 9), noise(n * hd, 7), noise(n * hd, 8));
                for k_type in KvType::ALL {
                    for v_type in KvType::ALL {
                        let of = |one| difference(isa, (k_type, v_type), hd, (n, one), (&q, &keys, &values));
                        let error = of(false).max(of(true));
                        if error > tolerance(isa, k_type).max(tolerance(isa, v_type)) {
                            failures.push(format!("{isa} {k_type:?} {v_type:?} hd {hd} rows {rows} n {n}: {error}"));
                        }
                    }
                }
            }
        }
        println!("covered: {}", covered.join(" "));
        assert!(failures.is_empty(), "{failures:#?}");
    }

    /// What one token's rows give does not depend on how many others there are, up to a few: the same bits.
    #[test]
    fn few_tokens_do_not_change_one() {
        let (hd, n) = (64, 300);
        for isa in Isa::ALL.into_iter().filter(|i| i.is_supported()) {
            for (kind, heads) in [(KvType::F16, 8), (KvType::Q8_0, 1), (KvType::Bf16, 5)] {
                let (q, keys, values) = (noise(FEW * heads * hd, 5), noise(n * hd, 6), noise(n * hd, 7));
                let (k, v) = stored((kind, kind), hd, n, (&keys, &values));
                let cache = Cache { k_type: kind, v_type: kind, k: &k, v: &v };
                let limits: Vec<usize> = (0..FEW * heads).map(|r| n - FEW + 1 + r / heads).collect();
                // Of these tokens together, a row's m, s and o.
                let rows = |tokens: Range<usize>| {
                    let rows = tokens.start * heads..tokens.end * heads;
                    let (mut m, mut s) = (vec![0.0; rows.len()], vec![0.0; rows.len()]);
                    let mut o = vec![0.0; rows.len() * hd];
                    let (limits, tokens) = (&limits[rows.clone()], tokens.len());
                    let q = Queries { q: &q[rows.start * hd..rows.end * hd], limits, tokens, scale: 0.3 };
                    let mut out = Partial { m: &mut m, s: &mut s, o: &mut o };
                    Attention::for_isa(isa).run(&q, &cache, 0..n, &mut out, &mut Scratch::default());
                    (0..m.len()).map(|r| (m[r], s[r], o[r * hd..][..hd].to_vec())).collect::<Vec<_>>()
                };
                let want: Vec<_> = (0..FEW).flat_map(|t| rows(t..t + 1)).collect();
                for tokens in 2..=FEW {
                    assert!(
                        rows(0..tokens) == want[..tokens * heads],
                        "{isa} {kind:?}: {tokens} tokens, {heads} heads"
                    );
                }
            }
        }
    }

    /// What was summed is made smaller when a later score is larger: by a little, by much, by so much that nothing is left.
    #[test]
    fn scores_may_grow() {
        let (hd, rows, n) = (64, 40, 700);
        // Numbers that every type has, so that the scores are exact.
        let exact = |len: usize, seed: u32| noise(len, seed).into_iter().map(|x| (x * 8.0).round() / 8.0).collect();
        let (mut q, mut keys, values): (Vec<f32>, Vec<f32>, Vec<f32>) =
            (exact(rows * hd, 1), exact(n * hd, 2), exact(n * hd, 3));
        q.chunks_exact_mut(hd).for_each(|q| q[0] = 1.0);
        for step in [2.0, -2.0, 20.0, 200.0] {
            keys.chunks_exact_mut(hd).enumerate().for_each(|(p, k)| k[0] = step * (p / 64) as f32);
            for isa in Isa::ALL.into_iter().filter(|i| i.is_supported()) {
                for kind in [KvType::F16, KvType::Bf16] {
                    let error = difference(isa, (kind, kind), hd, (n, false), (&q, &keys, &values));
                    assert!(error <= tolerance(isa, kind), "{isa} {kind:?}: {error} off with steps of {step}");
                }
            }
        }
    }
}

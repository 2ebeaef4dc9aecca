//! Matrices whose weights are multiplied as f32: the float formats, and every format in the exact reference.
//!
//! ```text
//! gemv   4 rows at once (four memory streams), for each slab of 256 positions:
//!            one column:       acc[row] += weights * x            16 positions a vector
//!            several columns:  weights to f32, then 2 or 4 rows by up to 4 columns: acc[column][row] += weights * x
//!
//! gemm   for each slab, for each tile of 16 or 32 rows:
//!            dequantize the rows, transposed: tile[position][row]
//!            for 6 to 12 columns:  acc[column] += tile[position] * x[column][position]     16 rows a vector
//! ```

use crate::act::{Acts, F32Block};
use crate::format::{Format, SLAB};
use crate::lanes::{L, Lanes};
use crate::panel::{Out, Panel, Rows, Scratch, align_stack, prefetch_part};

/// Columns up to which weights are used as they lie: transposing them for so few would cost more than their products.
pub(crate) const GEMV_COLS: usize = 16;
/// Rows that the gemv reads side by side.
const STREAMS: usize = 4;

// ---- any number of columns ---------------------------------------------------------------------------------------------------

/// Sums of `R` vectors of rows, or their weights.
type Tile<const R: usize> = [[f32; L]; R];

/// Any number of columns: `C` at once, tiles of `R` vectors. `R * C` sums and `R` vectors of weights stay in registers.
#[inline(always)]
pub(crate) fn gemm<V: Lanes, const R: usize, const C: usize>(
    w: Panel<'_>,
    x: Acts<'_>,
    out: &mut Out<'_>,
    scratch: &mut Scratch,
) {
    align_stack!();
    let n = x.n();
    let (tiles, blocks) = (w.rows.div_ceil(R * L), n.div_ceil(C));
    let tile = scratch.tile.take::<[f32; L]>(R * SLAB).as_chunks_mut::<R>().0;
    let acc = scratch.floats.take::<[f32; L]>(tiles * n * R).as_chunks_mut::<R>().0;
    acc.fill([[0.0; L]; R]);
    for s in 0..w.slabs() {
        let next = if s + 1 < w.slabs() { x.f32(s + 1) } else { &[] };
        let (x, len) = (x.f32(s), SLAB.min(w.cols - s * SLAB));
        for (t, acc) in acc.chunks_exact_mut(n).enumerate() {
            transpose_tile::<V, R>(&w, t * R * L, s, len, tile);
            for (c, (x, acc)) in x.chunks(C).zip(acc.chunks_mut(C)).enumerate() {
                prefetch_part(next, t * blocks + c, tiles * blocks);
                products::<V, R, C>(tile, len, x, acc);
            }
        }
    }
    for (t, acc) in acc.chunks_exact(n).enumerate() {
        let rows = (R * L).min(w.rows - t * R * L);
        for (c, acc) in acc.iter().enumerate() {
            out.column(c, t * R * L, rows).copy_from_slice(&acc.as_flattened()[..rows]);
        }
    }
}

/// Slab `s` of the rows from `r0` on as `tile[position][row]`, with zeros where there are no weights.
#[inline(always)]
fn transpose_tile<V: Lanes, const R: usize>(w: &Panel<'_>, r0: usize, s: usize, len: usize, tile: &mut [Tile<R>]) {
    let mut rows = [[0.0f32; SLAB]; L];
    for j in 0..R {
        for (r, row) in rows.iter_mut().enumerate() {
            match r0 + j * L + r {
                r if r < w.rows => as_floats::<V>(w.format, w.slab(r, s), &mut row[..len]),
                _ => row.fill(0.0),
            }
        }
        for (i, tile) in tile[..len.next_multiple_of(STEP)].chunks_exact_mut(L).enumerate() {
            let mut m = [V::splat(0.0); L];
            for r in 0..L {
                m[r] = V::load(&rows[r].as_chunks().0[i]);
            }
            V::transpose(&mut m);
            for p in 0..L {
                m[p].store(&mut tile[p][j]);
            }
        }
    }
}

/// A row's slab as floats.
#[inline(always)]
fn as_floats<V: Lanes>(format: Format, slab: &[u8], row: &mut [f32]) {
    let (whole, rest) = row.as_chunks_mut::<L>();
    match format {
        Format::F16 if rest.is_empty() => {
            for (to, b) in whole.iter_mut().zip(slab.as_chunks().0) {
                V::load_f16(b).store(to);
            }
        }
        Format::BF16 if rest.is_empty() => {
            for (to, b) in whole.iter_mut().zip(slab.as_chunks().0) {
                V::load_bf16(b).store(to);
            }
        }
        _ => format.dequant(slab, row),
    }
}

/// Positions of a tile that are multiplied without a look at where they end.
const STEP: usize = 32;

/// Up to `C` columns times the first `len` positions of a tile, added to `acc`.
#[inline(always)]
fn products<V: Lanes, const R: usize, const C: usize>(
    tile: &[Tile<R>],
    len: usize,
    x: &[F32Block],
    acc: &mut [Tile<R>],
) {
    let last = x.len() - 1;
    let (mut col, mut sum) = ([&x[0].0; C], [[V::splat(0.0); R]; C]);
    for i in 0..C {
        col[i] = &x[i.min(last)].0;
        for j in 0..R {
            sum[i][j] = V::load(&acc[i.min(last)][j]);
        }
    }
    for (step, tile) in tile.as_chunks::<STEP>().0.iter().enumerate().take(len.div_ceil(STEP)) {
        let mut x = [&[0.0; STEP]; C];
        for i in 0..C {
            x[i] = &col[i].as_chunks().0[step];
        }
        for k in 0..STEP {
            let mut t = [V::splat(0.0); R];
            for j in 0..R {
                t[j] = V::load(&tile[k][j]);
            }
            for i in 0..C {
                let x = V::splat(x[i][k]);
                for j in 0..R {
                    sum[i][j] = t[j].fma(x, sum[i][j]);
                }
            }
        }
    }
    for (to, sum) in acc.iter_mut().zip(sum) {
        for j in 0..R {
            sum[j].store(&mut to[j]);
        }
    }
}

// ---- few columns -------------------------------------------------------------------------------------------------------------

/// A float format: 16 neighbouring weights of a slab, `BYTES` long.
pub(crate) trait Float<const BYTES: usize> {
    fn load<V: Lanes>(slab: &[u8; BYTES], i: usize) -> V;
}
pub(crate) struct F32;
pub(crate) struct F16;
pub(crate) struct Bf16;

impl Float<{ 4 * SLAB }> for F32 {
    #[inline(always)]
    fn load<V: Lanes>(slab: &[u8; 4 * SLAB], i: usize) -> V {
        V::load_le(&slab.as_chunks().0[i])
    }
}
impl Float<{ 2 * SLAB }> for F16 {
    #[inline(always)]
    fn load<V: Lanes>(slab: &[u8; 2 * SLAB], i: usize) -> V {
        V::load_f16(&slab.as_chunks().0[i])
    }
}
impl Float<{ 2 * SLAB }> for Bf16 {
    #[inline(always)]
    fn load<V: Lanes>(slab: &[u8; 2 * SLAB], i: usize) -> V {
        V::load_bf16(&slab.as_chunks().0[i])
    }
}

/// Few columns of F32, F16 or BF16 weights; of several, `R` rows by up to `C` columns at once.
#[inline(always)]
pub(crate) fn gemv<V: Lanes, const R: usize, const C: usize>(
    w: Panel<'_>,
    x: Acts<'_>,
    out: &mut Out<'_>,
    scratch: &mut Scratch,
) {
    align_stack!();
    match (w.format, x.n()) {
        (Format::F16, 1) => one::<V, F16, { 2 * SLAB }>(w, x, out),
        (Format::F16, _) => several::<V, F16, { 2 * SLAB }, R, C>(w, x, out, scratch),
        (Format::BF16, 1) => one::<V, Bf16, { 2 * SLAB }>(w, x, out),
        (Format::BF16, _) => several::<V, Bf16, { 2 * SLAB }, R, C>(w, x, out, scratch),
        (_, 1) => one::<V, F32, { 4 * SLAB }>(w, x, out),
        _ => several::<V, F32, { 4 * SLAB }, R, C>(w, x, out, scratch),
    }
}

/// Vectors of weights in slab `s`.
#[inline(always)]
fn vectors(w: &Panel<'_>, s: usize) -> usize {
    (w.cols - s * SLAB).div_ceil(L).min(SLAB / L)
}

#[inline(always)]
fn one<V: Lanes, F: Float<BYTES>, const BYTES: usize>(w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>) {
    for step in 0..Rows::<STREAMS, BYTES>::steps(&w) {
        let rows = Rows::<STREAMS, BYTES>::at(&w, step);
        let mut sums = [V::splat(0.0); STREAMS];
        for s in 0..w.slabs() {
            let x = x.f32(s)[0].0.as_chunks::<L>().0;
            let b = [rows.slab(&w, 0, s), rows.slab(&w, 1, s), rows.slab(&w, 2, s), rows.slab(&w, 3, s)];
            for i in 0..vectors(&w, s) {
                let x = V::load(&x[i]);
                for r in 0..STREAMS {
                    sums[r] = F::load::<V>(b[r], i).fma(x, sums[r]);
                }
            }
        }
        for (r, row) in rows.each() {
            out.column(0, row, 1)[0] = sums[r].sum();
        }
    }
}

#[inline(always)]
fn several<V: Lanes, F: Float<BYTES>, const BYTES: usize, const R: usize, const C: usize>(
    w: Panel<'_>,
    x: Acts<'_>,
    out: &mut Out<'_>,
    scratch: &mut Scratch,
) {
    let n = x.n();
    let weights = scratch.tile.take::<[[f32; L]; SLAB / L]>(STREAMS);
    let acc = scratch.floats.take::<[[f32; L]; STREAMS]>(n);
    for step in 0..Rows::<STREAMS, BYTES>::steps(&w) {
        let rows = Rows::<STREAMS, BYTES>::at(&w, step);
        acc.fill([[0.0; L]; STREAMS]);
        for s in 0..w.slabs() {
            let vectors = vectors(&w, s);
            for (r, weights) in weights.iter_mut().enumerate() {
                let b = rows.slab(&w, r, s);
                for i in 0..vectors {
                    F::load::<V>(b, i).store(&mut weights[i]);
                }
            }
            let x = x.f32(s);
            for (x, acc) in x.chunks(C).zip(acc.chunks_mut(C)) {
                for r in (0..STREAMS).step_by(R) {
                    let weights = weights[r..].first_chunk().expect("R divides the streams");
                    match x.len() {
                        1 => dots::<V, R, 1>(weights, vectors, x, r, acc),
                        2 => dots::<V, R, 2>(weights, vectors, x, r, acc),
                        3 => dots::<V, R, 3>(weights, vectors, x, r, acc),
                        _ => dots::<V, R, C>(weights, vectors, x, r, acc),
                    }
                }
            }
        }
        for (c, acc) in acc.iter().enumerate() {
            for (r, row) in rows.each() {
                out.column(c, row, 1)[0] = V::load(&acc[r]).sum();
            }
        }
    }
}

/// `R` rows from stream `r0` on by `C` columns, added to `acc`.
#[inline(always)]
fn dots<V: Lanes, const R: usize, const C: usize>(
    weights: &[[[f32; L]; SLAB / L]; R],
    vectors: usize,
    x: &[F32Block],
    r0: usize,
    acc: &mut [[[f32; L]; STREAMS]],
) {
    let (x, acc) = (&x[..C], &mut acc[..C]);
    let mut sum = [[V::splat(0.0); R]; C];
    for c in 0..C {
        for r in 0..R {
            sum[c][r] = V::load(&acc[c][r0 + r]);
        }
    }
    for i in 0..vectors.min(SLAB / L) {
        let mut t = [V::splat(0.0); R];
        for r in 0..R {
            t[r] = V::load(&weights[r][i]);
        }
        for c in 0..C {
            let x = V::load(&x[c].0.as_chunks().0[i]);
            for r in 0..R {
                sum[c][r] = t[r].fma(x, sum[c][r]);
            }
        }
    }
    for c in 0..C {
        for r in 0..R {
            sum[c][r].store(&mut acc[c][r0 + r]);
        }
    }
}

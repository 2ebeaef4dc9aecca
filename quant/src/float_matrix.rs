//! Matrices whose weights are multiplied as f32: the float formats, and every format in the exact reference.
//!
//! ```text
//! for 16 rows:
//!   for each slab of 256 positions:
//!     dequantize the 16 rows, transposed: tile[position][row]
//!     for 8 columns: acc[column] += tile[position] * x[column][position]     (16 rows a vector)
//! ```

use crate::act::Acts;
use crate::format::{Format, SLAB};
use crate::lanes::{L, Lanes};
use crate::panel::{Out, Panel, Scratch};

const COLS: usize = 8;

/// Any number of columns.
#[inline(always)]
pub(crate) fn gemm<V: Lanes>(w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>, scratch: &mut Scratch) {
    let n = x.n();
    let tile = scratch.tile.take::<[f32; L]>(SLAB);
    let acc = scratch.floats.take::<[f32; L]>(n);
    let mut row = [0.0f32; SLAB];
    for r0 in (0..w.rows).step_by(L) {
        let rows = L.min(w.rows - r0);
        acc.fill([0.0; L]);
        if rows < L {
            tile.fill([0.0; L]);
        }
        for s in 0..w.slabs() {
            let len = SLAB.min(w.cols - s * SLAB);
            for r in 0..rows {
                w.format.dequant(w.slab(r0 + r, s), &mut row[..len]);
                for (t, &v) in tile.iter_mut().zip(&row[..len]) {
                    t[r] = v;
                }
            }
            let (tile, x) = (&tile[..len], x.f32(s));
            for c in (0..n).step_by(COLS) {
                let acc = &mut acc[c..n.min(c + COLS)];
                let (mut col, mut a) = ([&x[c].0; COLS], [V::splat(0.0); COLS]);
                for i in 0..acc.len() {
                    (col[i], a[i]) = (&x[c + i].0, V::load(&acc[i]));
                }
                for (k, t) in tile.iter().enumerate() {
                    let t = V::load(t);
                    for i in 0..COLS {
                        a[i] = t.fma(V::splat(col[i][k]), a[i]);
                    }
                }
                for (to, a) in acc.iter_mut().zip(a) {
                    a.store(to);
                }
            }
        }
        for c in 0..n {
            out.column(c, r0, rows).copy_from_slice(&acc[c][..rows]);
        }
    }
}

/// One column of F32, F16 or BF16 weights, straight from the mapped bytes.
#[inline(always)]
pub(crate) fn gemv<V: Lanes>(w: Panel<'_>, x: Acts<'_>, out: &mut Out<'_>) {
    for c in 0..x.n() {
        for r in 0..w.rows {
            let mut acc = [V::splat(0.0); 4];
            let mut rest = 0.0;
            for s in 0..w.slabs() {
                let (b, x) = (w.slab(r, s), &x.f32(s)[c].0);
                let x = x.as_chunks::<L>().0;
                let size = w.format.spec().block_bytes;
                let vectors = b.len() / size / L;
                for (i, v) in b.chunks_exact(L * size).enumerate() {
                    acc[i % 4] = load::<V>(w.format, v).fma(V::load(&x[i]), acc[i % 4]);
                }
                for (i, b) in b[vectors * L * size..].chunks_exact(size).enumerate() {
                    let mut v = [0.0];
                    w.format.dequant(b, &mut v);
                    rest += v[0] * x[vectors][i];
                }
            }
            let sum = acc[0].add(acc[1]).add(acc[2].add(acc[3]));
            out.column(c, r, 1)[0] = sum.sum() + rest;
        }
    }
}

/// Sixteen float weights.
#[inline(always)]
fn load<V: Lanes>(format: Format, b: &[u8]) -> V {
    match format {
        Format::F16 => V::load_f16(b.try_into().expect("16 weights")),
        Format::BF16 => V::load_bf16(b.try_into().expect("16 weights")),
        _ => V::load_le(b.try_into().expect("16 weights")),
    }
}

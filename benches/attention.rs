//! Attention x cache type x rows that share a KV head x instruction set: GB/s of cache, and GFLOPS.
//!
//! `cargo bench --bench attention -- [--positions=N] [--head-dim=N] [--rows=N]`. One thread; the best of several
//! runs over `positions` (4096) of one KV head, which stay in the caches. One row is the decode of a model whose every head
//! has its own keys, 8 that of Qwen1.5-110B; many are a prompt. Every call has at most the rows that the rung asks for.

mod timing;

use oxcart_quant::attention::{BLOCK, Cache, KvType, Partial, Queries};
use oxcart_quant::{Isa, Kernels, Scratch, Shared};
use timing::{flag, seconds};

/// Seconds in which `rows` queries attend to all positions of a cache.
fn time(kernels: &Kernels, kind: KvType, rows: usize, hd: usize, positions: usize) -> f64 {
    let bytes = positions.next_multiple_of(BLOCK) * kind.row_bytes(hd);
    let (mut k, mut v) = (Shared::<u8>::new(bytes).expect("memory"), Shared::<u8>::new(bytes).expect("memory"));
    let x: Vec<f32> = (0..rows.max(positions) * hd).map(|i| (i * 31 % 17) as f32 / 8.0 - 1.0).collect();
    let (k, v, row) = (k.as_mut_slice(), v.as_mut_slice(), kind.row_bytes(hd));
    for (p, x) in x.chunks_exact(hd).take(positions).enumerate() {
        kind.store_k(x, p % BLOCK, &mut k[p / BLOCK * BLOCK * row..][..BLOCK * row]);
        kind.store_v(x, &mut v[p * row..][..row]);
    }
    let cache = Cache { k_type: kind, v_type: kind, k, v };
    let attention = kernels.attention;
    let (limits, mut scratch) = (vec![positions; rows], Scratch::default());
    let (mut m, mut s, mut o) = (vec![0.0; rows], vec![0.0; rows], vec![0.0; rows * hd]);
    seconds(|| {
        for r in (0..rows).step_by(attention.rows) {
            let n = attention.rows.min(rows - r);
            let q = Queries { q: &x[r * hd..][..n * hd], limits: &limits[..n], tokens: n, scale: 0.1 };
            let mut out = Partial { m: &mut m[..n], s: &mut s[..n], o: &mut o[..n * hd] };
            attention.run(&q, &cache, 0..positions, &mut out, &mut scratch);
        }
    })
}

fn main() {
    let (positions, hd) = (flag("--positions=").unwrap_or(4096), flag("--head-dim=").unwrap_or(128));
    let wanted = flag("--rows=");
    println!("{:6} {:>5} {:8} {:>8} {:>8}", "cache", "rows", "isa", "GB/s", "GFLOPS");
    for kind in KvType::ALL {
        for rows in wanted.map_or(vec![1, 2, 3, 4, 8, 32, 256], |r| vec![r]) {
            let mut best = 0.0f64;
            for isa in Isa::ALL.into_iter().filter(|&i| i != Isa::Scalar) {
                let Some(kernels) = Kernels::for_isa(isa) else { continue };
                let s = time(kernels, kind, rows, hd, positions);
                let gb = 2.0 * (positions * kind.row_bytes(hd)) as f64 / s / 1e9;
                let gflops = 4.0 * (rows * positions * hd) as f64 / s / 1e9;
                let mark = if gflops < 0.95 * best { '!' } else { ' ' };
                println!("{:6} {rows:>5} {:8} {gb:>8.2} {gflops:>8.1}{mark}", kind.name(), isa.name());
                best = best.max(gflops);
            }
        }
    }
}

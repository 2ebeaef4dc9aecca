//! Every kernel of every rung against f64 arithmetic on dequantized weights and decoded activations. Both sides read the
//! same encoding, so what differs is the order of f32 sums alone.
#![allow(unsafe_code)]

use super::*;
use crate::act::{ActBuf, Wants};
use crate::format::SLAB;

pub(crate) struct Noise(pub u64);

impl Noise {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 32
    }

    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 8) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// Random blocks whose weights are of moderate size: bits are drawn until they are.
pub(crate) fn blocks(format: Format, rows: usize, cols: usize, noise: &mut Noise) -> Vec<u8> {
    let s = format.spec();
    let mut data = vec![0u8; rows * format.row_bytes(cols).unwrap()];
    let mut w = vec![0.0f32; s.block_len];
    for b in data.chunks_exact_mut(s.block_bytes) {
        loop {
            b.iter_mut().for_each(|b| *b = noise.bits() as u8);
            (s.dequant)(b, &mut w);
            let max = w.iter().fold(0.0f32, |m, &x| if x.is_nan() { f32::INFINITY } else { m.max(x.abs()) });
            if (1e-2..1e2).contains(&max) {
                break;
            }
        }
    }
    data
}

/// Those of every rung that this machine has, and both references.
fn all() -> impl Iterator<Item = &'static Kernels> {
    Isa::ALL.into_iter().filter_map(Kernels::for_isa).chain([Kernels::exact(), Kernels::ggml()])
}

/// The kernel that multiplies `n` columns, e.g. `avx512/q4_K/gemv`.
fn name(k: &Kernels, format: Format, n: usize) -> String {
    let kernel = k.kernel(format);
    let body = if n <= kernel.gemv_cols { "gemv" } else { "gemm" };
    format!("{}/{}/{body}", kernel.slot(n).isa, format.name())
}

/// Outputs of one call, (columns, rows).
fn product(k: &Kernels, m: &Matrix<'_>, x: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let buf = ActBuf::new(m.cols(), x.len()).unwrap();
    let wants = Wants::of([k.kernel(m.format()).act(x.len())]);
    for (c, v) in x.iter().enumerate() {
        // SAFETY: one thread.
        unsafe { buf.encode(k, wants, x.len(), c, v) };
    }
    let mut out = vec![f32::NAN; x.len() * m.rows()];
    // SAFETY: one thread.
    let acts = unsafe { buf.view(m.cols(), x.len(), x.len()) };
    let mut to = Out::new(&mut out, m.rows(), m.rows(), x.len());
    k.matmul(m.panel(0..m.rows()), acts, &mut to, &mut Scratch::default());
    out.chunks(m.rows()).map(<[f32]>::to_vec).collect()
}

fn bf16(v: f32) -> f32 {
    half::bf16::from_f32(v).to_f32()
}

/// A column as it is when it is encoded among `n`.
fn decoded(k: &Kernels, format: Format, x: &[f32], n: usize) -> Vec<f64> {
    match k.kernel(format).act(n) {
        Act::Bf16 => x.iter().map(|&v| bf16(v) as f64).collect(),
        Act::F32 => x.iter().map(|&v| v as f64).collect(),
        Act::Ggml(r) => x
            .chunks(SLAB)
            .flat_map(|part| {
                let mut part = part.to_vec();
                r.round(&mut part);
                part.into_iter().map(f64::from)
            })
            .collect(),
        Act::Q8 => x
            .chunks(SLAB)
            .flat_map(|part| {
                let mut b = bytemuck::Zeroable::zeroed();
                k.ops.encode_q8(part, &mut b);
                (0..part.len()).map(|i| b.d[i / 32] as f64 * b.q[i] as f64).collect::<Vec<_>>()
            })
            .collect(),
    }
}

/// The products that f64 makes of columns which are encoded among `n`, (columns, rows): the value and the sum of magnitudes.
fn reference(k: &Kernels, m: &Matrix<'_>, x: &[Vec<f32>], n: usize) -> Vec<Vec<(f64, f64)>> {
    let x: Vec<Vec<f64>> = x.iter().map(|x| decoded(k, m.format(), x, n)).collect();
    let sums = |x: &Vec<f64>| x.chunks(32).map(|x| x.iter().map(|x| x.abs()).sum()).collect::<Vec<f64>>();
    let sizes: Vec<_> = x.iter().map(sums).collect();
    let mut out = vec![Vec::new(); x.len()];
    let mut w = vec![0.0f32; m.cols()];
    for r in 0..m.rows() {
        m.dequant_row(r, &mut w);
        if k.kernel(m.format()).act(n) == Act::Bf16 {
            w.iter_mut().for_each(|w| *w = bf16(*w));
        }
        // Codes with an offset sum terms as large as the block's largest weight, whatever the weight itself.
        let most: Vec<f64> = w.chunks(32).map(|w| w.iter().fold(0.0f32, |m, v| m.max(v.abs())) as f64).collect();
        for ((x, sizes), out) in x.iter().zip(&sizes).zip(&mut out) {
            let terms = most.iter().zip(sizes).map(|(w, x)| w * x).sum();
            out.push((w.iter().zip(x).map(|(&w, &x)| w as f64 * x).sum(), terms));
        }
    }
    out
}

/// Of the sum of terms. A weight that lies between two bf16 within an ulp of f32 may be rounded to the other one.
fn tolerance(k: &Kernels, format: Format, n: usize) -> f64 {
    if k.kernel(format).act(n) == Act::Bf16 { 3e-5 } else { 3e-6 }
}

/// Whether so many products would take seconds: where an instruction of 32 of them is executed in software.
fn takes_long(k: &Kernels, products: usize) -> bool {
    #[cfg(target_arch = "x86_64")]
    let in_hardware = std::arch::is_x86_feature_detected!("avxvnni");
    #[cfg(not(target_arch = "x86_64"))]
    let in_hardware = true;
    k.isa == Isa::AvxVnni && !in_hardware && products > 1 << 17
}

#[test]
fn every_kernel_computes_the_product() {
    let mut failures = Vec::new();
    let mut covered = Vec::new();
    let mut noise = Noise(1);
    for isa in Isa::ALL.iter().filter(|i| !i.is_supported()) {
        println!("not on this machine: {isa}");
    }
    for k in all() {
        for spec in FORMATS {
            // Just under, at and over the tiles of every kernel; a slab, part of one, several.
            let cases: &[(usize, usize, &[usize])] = &[
                (1, 256, &[1, 2]),
                (3, 512, &[1, 3, 4]),
                (15, 256, &[7, 16]),
                (16, 768, &[1, 2, 3, 6]),
                (33, 256, &[1, 5, 12, 13]),
                (64, 512, &[8, 17, 33]),
                (5, 64, &[1, 2, 3, 9]),
                (35, 576, &[1, 3, 7]),
                (40, 768, &[180]),
                (7, 256, &[530]),
                // Rows of floats, which may be of any length.
                (5, 1, &[1, 4, 20]),
                (17, 5, &[1, 4, 20]),
                (6, 100, &[1, 4, 20]),
                (33, 300, &[1, 4, 20]),
                // An odd number of groups.
                (9, 32, &[1, 4, 20, 35]),
                (34, 96, &[1, 4, 20, 35]),
                (5, 224, &[1, 4, 20, 35]),
                (33, 288, &[1, 4, 20, 35]),
                // Where AVX-512's gemv ends.
                (40, 768, &[31, 32, 33, 34, 48]),
            ];
            // The tiles' passes over columns end at 512: the same body for all formats.
            let more: &[(usize, usize, &[usize])] = match spec.format {
                Format::Q4_K | Format::F16 => &[(40, 512, &[513])],
                _ => &[],
            };
            for &(rows, cols, ns) in cases.iter().chain(more) {
                if spec.format.row_bytes(cols).is_none() {
                    continue;
                }
                let data = blocks(spec.format, rows, cols, &mut noise);
                let m = Matrix::new(spec.format, rows, cols, &data).unwrap();
                for &n in ns {
                    if takes_long(k, rows * cols * n) {
                        continue;
                    }
                    let x: Vec<Vec<f32>> = (0..n)
                        .map(|c| (0..cols).map(|i| noise.unit() * if i % 97 == c { 30.0 } else { 1.0 }).collect())
                        .collect();
                    let got = product(k, &m, &x);
                    for (c, want) in reference(k, &m, &x, n).into_iter().enumerate() {
                        for (r, (want, size)) in want.into_iter().enumerate() {
                            let error = (got[c][r] as f64 - want).abs();
                            if error.is_nan() || error > tolerance(k, spec.format, n) * size + 1e-9 {
                                failures.push(format!(
                                    "{} rows {rows} cols {cols} n {n}: row {r} column {c} is {} instead of {want}, error {:.1e} of its terms",
                                    name(k, spec.format, n), got[c][r], error / size
                                ));
                            }
                        }
                    }
                }
            }
        }
        covered.push(k.label());
    }
    println!("covered: {}", covered.join(" "));
    assert!(failures.is_empty(), "{} failures, the first: {:#?}", failures.len(), &failures[..failures.len().min(5)]);
}

/// What one column's product is does not depend on how many others stand beside it, as far as `alike_cols` says: the same bits.
#[test]
fn few_columns_do_not_change_one() {
    let mut noise = Noise(11);
    for k in all() {
        for spec in FORMATS {
            // Whole slabs, and what is left of one; rows that are not four together, and many, for fewer numbers of columns.
            for (rows, cols) in [(7, 768), (16, 256), (5, 576), (40, 1024)] {
                if spec.format.row_bytes(cols).is_none() {
                    continue;
                }
                let data = blocks(spec.format, rows, cols, &mut noise);
                let m = Matrix::new(spec.format, rows, cols, &data).unwrap();
                let most = k.kernel(spec.format).alike_cols().min(40);
                let x: Vec<Vec<f32>> = (0..most).map(|_| (0..cols).map(|_| noise.unit()).collect()).collect();
                let want: Vec<_> = x.iter().flat_map(|x| product(k, &m, std::slice::from_ref(x))).collect();
                for n in (2..=most).filter(|&n| rows < 40 || [2, 3, 5, 8, most].contains(&n)) {
                    let name = format!("{}, {rows} x {cols}, {n} columns", name(k, spec.format, n));
                    assert!(product(k, &m, &x[..n]) == want[..n], "{name}: other bits than one by one");
                }
            }
        }
    }
}

/// Nothing to compute: nothing is written.
#[test]
fn no_columns_and_no_rows_are_no_work() {
    const COLS: usize = 512;
    for k in all() {
        for spec in FORMATS {
            let data = blocks(spec.format, 3, COLS, &mut Noise(2));
            for (rows, n) in [(3, 0), (0, 1), (0, 5), (0, 40), (0, 0)] {
                let m = Matrix::new(spec.format, 3, COLS, &data).unwrap().rows_of(0..rows);
                let buf = ActBuf::new(COLS, n).unwrap();
                for c in 0..n {
                    // SAFETY: one thread.
                    unsafe { buf.encode(k, Wants::of([k.kernel(spec.format).act(n)]), n, c, &[1.0; COLS]) };
                }
                // SAFETY: one thread.
                let acts = unsafe { buf.view(COLS, n, n) };
                let mut out = [7.0; 3 * 40];
                k.matmul(m.panel(0..rows), acts, &mut Out::new(&mut out, 3, rows, n), &mut Scratch::default());
                assert_eq!(out, [7.0; 3 * 40], "{} {} {rows} rows, {n} columns", k.label(), spec.name);
            }
        }
    }
}

/// What is no number reaches every output of its own column, and none of another.
#[test]
fn nan_stays_in_its_column() {
    let (mut failures, mut noise) = (Vec::new(), Noise(3));
    for k in all() {
        for spec in FORMATS {
            for (rows, cols) in [(35, 512), (5, 288)] {
                if spec.format.row_bytes(cols).is_none() {
                    continue;
                }
                let data = blocks(spec.format, rows, cols, &mut noise);
                let m = Matrix::new(spec.format, rows, cols, &data).unwrap();
                // Both bodies of every kernel, alone and beside others, in pairs and not.
                for n in [1, 2, 5, 20, 35] {
                    let x: Vec<Vec<f32>> = (0..n).map(|_| (0..cols).map(|_| noise.unit()).collect()).collect();
                    let clean = product(k, &m, &x);
                    for (column, i) in [(n / 2, 3), (n - 1, cols - 1)] {
                        let mut x = x.clone();
                        x[column][i] = f32::NAN;
                        let got = product(k, &m, &x);
                        let lost = got[column].iter().filter(|y| !y.is_nan()).count();
                        let reached = (0..n).filter(|&c| c != column && got[c] != clean[c]).count();
                        if lost + reached > 0 {
                            failures.push(format!(
                                "{} {} rows {rows} cols {cols} n {n}: NaN at {i} of column {column} missed {lost} rows, reached {reached} other columns",
                                k.label(), name(k, spec.format, n)
                            ));
                        }
                    }
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} failures, the first: {:#?}", failures.len(), &failures[..failures.len().min(5)]);
}

/// A rung without its kernels would pass every other test.
#[test]
fn every_rung_has_kernels_of_its_own() {
    for k in Isa::ALL.into_iter().filter_map(Kernels::for_isa) {
        for spec in FORMATS {
            let kernel = k.kernel(spec.format);
            // Tiles are for many columns, and not for f32.
            let (gemv, gemm) = match (k.isa, spec.format) {
                (Isa::Amx, Format::F32) => (Isa::Avx512, Isa::Avx512),
                (Isa::Amx, _) => (Isa::Avx512, Isa::Amx),
                (isa, _) => (isa, isa),
            };
            assert_eq!((kernel.gemv.isa, kernel.gemm.isa), (gemv, gemm), "{} {}", k.isa, spec.name);
        }
    }
}

/// Codes and activations at the ends of their ranges: nothing saturates, nothing overflows.
#[test]
fn extremes_do_not_saturate() {
    for isa in Isa::ALL {
        let Some(k) = Kernels::for_isa(isa) else { continue };
        for spec in FORMATS.iter().filter(|s| s.codes.is_some()) {
            for byte in [0x00, 0x7F, 0x80, 0xFF] {
                let (rows, cols) = (17, 256);
                let mut data = blocks(spec.format, rows, cols, &mut Noise(5));
                // All but the bytes that may hold a scale: those that change the largest weight's magnitude by much.
                for b in data.chunks_exact_mut(spec.block_bytes) {
                    let mut w = vec![0.0f32; spec.block_len];
                    for i in 0..b.len() {
                        let old = std::mem::replace(&mut b[i], byte);
                        (spec.dequant)(b, &mut w);
                        let max =
                            w.iter().fold(0.0f32, |m, &x| if x.is_nan() { f32::INFINITY } else { m.max(x.abs()) });
                        if !(1e-3..1e3).contains(&max) {
                            b[i] = old;
                        }
                    }
                }
                let m = Matrix::new(spec.format, rows, cols, &data).unwrap();
                for sign in [1.0, -1.0] {
                    let x = vec![vec![sign; cols]; 33];
                    // Both bodies of every kernel.
                    for n in [1, 3, 7, 17, 33] {
                        if takes_long(k, rows * cols * n) {
                            continue;
                        }
                        let got = product(k, &m, &x[..n]);
                        for (r, (want, size)) in reference(k, &m, &x[..1], n).remove(0).into_iter().enumerate() {
                            let error = (got[n - 1][r] as f64 - want).abs();
                            assert!(
                                error <= tolerance(k, spec.format, n) * size + 1e-9,
                                "{} byte {byte:#x}: {} {want}",
                                name(k, spec.format, n),
                                got[n - 1][r]
                            );
                        }
                    }
                }
            }
        }
    }
}

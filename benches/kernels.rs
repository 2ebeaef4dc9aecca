//! Every kernel x format x instruction set, on one thread: GB/s of weights for one column, nanoseconds a weight for 4, GFLOPS for
//! 16 and for 512 (scalar: 64); of each the best of several runs.
//!
//! `cargo bench --bench kernels -- [--rows=N] [--k=N] [--n=N,N,...] [FORMAT ...]`. `rows` (8192) of the matrix with one column,
//! 1024 with 4 and 16, with more as many as a gemm takes at once; `k` (8192) columns of all. Few rows stay in the caches and show
//! what unpacking costs. A format's last line is the dispatcher's pick. A `!` marks, for 1 and 512 columns, a rung that a lower
//! one beats by more than 5 %.
//!
//! `--n=1,2,8`: instead of all that, what the vector rungs do with so many columns of `rows` rows, a line for each number.

mod timing;

use oxcart_quant::act::Wants;
use oxcart_quant::format::FORMATS;
use oxcart_quant::{ActBuf, Format, Isa, Kernels, Matrix, Out, Scratch, Shared};
use timing::{flag, seconds};

/// Seconds of one product of `rows` rows with `n` columns.
fn time(kernels: &Kernels, format: Format, rows: usize, k: usize, n: usize) -> f64 {
    // Bytes without meaning: the scales are zero but for a few bits, the work is the same.
    let row_bytes = format.row_bytes(k).expect("a multiple of every block");
    // In huge pages, or the walk through page tables is what is measured.
    let mut data = Shared::<u8>::new(rows * row_bytes).expect("memory");
    let data = data.as_mut_slice();
    data.iter_mut().enumerate().for_each(|(i, b)| *b = (i * 2654435761 >> 11) as u8 & 0x3B);
    if format == Format::MXFP4 {
        // Its scales are exponents: small ones would make every product subnormal, which costs processors more.
        data.iter_mut().step_by(17).for_each(|b| *b = 120);
    }
    let m = Matrix::new(format, rows, k, data).expect("the size just computed");
    let acts = ActBuf::new(k, n).expect("memory");
    let wants = Wants::of([kernels.kernel(format).act(n)]);
    for c in 0..n {
        let x: Vec<f32> = (0..k).map(|i| ((i * 31 + c) % 17) as f32 - 8.0).collect();
        // SAFETY: one thread.
        unsafe { acts.encode(kernels, wants, n, c, &x) };
    }
    let mut out = vec![0.0; n * rows];
    let mut scratch = Scratch::default();
    // As many rows at a time as a forward pass gives.
    let kernel = kernels.kernel(format);
    let panel = if n <= kernel.gemv_cols { 128 } else { kernel.gemm_rows };
    seconds(|| {
        for r in (0..rows).step_by(panel) {
            let height = panel.min(rows - r);
            // SAFETY: one thread.
            let x = unsafe { acts.view(k, n, n) };
            kernels.matmul(m.panel(r..r + height), x, &mut Out::new(&mut out, height, height, n), &mut scratch);
        }
    })
}

fn main() {
    let (many, k) = (flag("--rows=").unwrap_or(8192), flag("--k=").unwrap_or(8192));
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let bytes = |format: Format, rows: usize| (rows * format.row_bytes(k).expect("whole blocks")) as f64;
    let flops = |rows: usize, n: usize| 2.0 * (rows * k * n) as f64;
    let formats =
        || FORMATS.iter().filter(|f| wanted.is_empty() || wanted.iter().any(|w| w.eq_ignore_ascii_case(f.name)));
    if let Some(ns) = flag::<String>("--n=") {
        let ns = ns.split(',').map(|n| n.parse().unwrap_or_else(|e| panic!("--n={ns}: {e}")));
        let ns: Vec<usize> = ns.collect();
        println!("{:8} {:8} {:>5} {:>12} {:>12}", "format", "isa", "n", "GB/s", "GFLOPS");
        for spec in formats() {
            for isa in Isa::ALL.into_iter().filter(|&i| i != Isa::Scalar) {
                let Some(kernels) = Kernels::for_isa(isa) else { continue };
                for &n in &ns {
                    let s = time(kernels, spec.format, many, k, n);
                    let (gb, gflops) = (bytes(spec.format, many) / s / 1e9, flops(many, n) / s / 1e9);
                    println!("{:8} {:8} {n:>5} {gb:>12.2} {gflops:>12.1}", spec.name, isa.name());
                }
            }
        }
        return;
    }
    println!(
        "{:8} {:8} {:>12} {:>13} {:>12} {:>12}",
        "format", "isa", "n=1 GB/s", "n=4 ns/weight", "n=16 GFLOPS", "n=512 GFLOPS"
    );
    for spec in formats() {
        let mut best = [0.0f64; 2];
        for isa in Isa::ALL {
            let Some(kernels) = Kernels::for_isa(isa) else { continue };
            let time = |rows, n| time(kernels, spec.format, rows, k, n);
            let (rows, cols) =
                if isa == Isa::Scalar { (256, 64) } else { (kernels.kernel(spec.format).gemm_rows, 512) };
            let gemv = bytes(spec.format, many) / time(many, 1) / 1e9;
            let four = time(1024, 4) * 1e9 / (1024 * k) as f64;
            let sixteen = flops(1024, 16) / time(1024, 16) / 1e9;
            let gemm = flops(rows, cols) / time(rows, cols) / 1e9;
            let mark = |now: f64, best: f64| if now < 0.95 * best { '!' } else { ' ' };
            println!(
                "{:8} {:8} {gemv:>11.2}{} {four:>13.3} {sixteen:>12.1} {gemm:>11.1}{}",
                spec.name,
                isa.name(),
                mark(gemv, best[0]),
                mark(gemm, best[1])
            );
            best = [best[0].max(gemv), best[1].max(gemm)];
        }
    }
}

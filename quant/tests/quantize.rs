//! Quantization against ggml's library: the bytes are the same, on every instruction set.

use oxcart_quant::{Format, Isa, Quantizer, format::FORMATS};

const ROWS: usize = 8;
const COLS: usize = 2304; // nine super-blocks: an odd number

fn unit(state: &mut u64) -> f32 {
    *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    (*state >> 40) as f32 / 8388608.0 - 1.0
}

/// Rows of weights and the importance of each column, with the cases in which searches take other paths.
fn data() -> (Vec<f32>, Vec<f32>) {
    let mut state = 1;
    let mut x: Vec<f32> = (0..ROWS * COLS).map(|_| unit(&mut state)).map(|x| x * x * x).collect();
    for (i, x) in x.iter_mut().enumerate() {
        let row = i / COLS;
        if row == 1 {
            *x = (*x * 4.0).round_ties_even(); // few distinct values
        }
        if (i / 32) % 23 == 0 || (i / 256) % 7 == 3 {
            *x = 0.0; // groups and blocks of zeros
        } else if (i / 32) % 29 == 1 {
            *x = 0.5; // groups of one value
        }
        match row {
            2 => *x = x.abs(),
            3 => *x = -x.abs(),
            4 => *x *= 2f32.powi(-20), // scales that are subnormal in f16
            _ => (),
        }
    }
    let mut w: Vec<f32> = (0..COLS).map(|_| unit(&mut state)).map(|w| w * w).collect();
    w.iter_mut().step_by(61).for_each(|w| *w = 0.0);
    (x, w)
}

fn fnv<'a>(bytes: impl IntoIterator<Item = &'a u8>) -> u64 {
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |h, &b| (h ^ b as u64).wrapping_mul(0x100_0000_01b3))
}

/// Blocks of all rows; nothing where the format needs importance and there is none.
fn quantize(q: Quantizer, x: &[f32], w: Option<&[f32]>) -> Vec<u8> {
    if w.is_none() && q.needs_importance() {
        return Vec::new();
    }
    let row_bytes = q.format().row_bytes(COLS).unwrap();
    let mut out = vec![0; ROWS * row_bytes];
    for (x, out) in x.chunks(COLS).zip(out.chunks_mut(row_bytes)) {
        q.row(x, w, out);
    }
    out
}

/// FNV-1a of the bytes that `ggml_quantize_chunk` (libggml-base 0.25.3, built by clang for plain x86-64) makes of [`data`],
/// without and with importance.
const GOLDEN: &[(&str, u64, u64)] = &[
    ("q4_0", 0x93573551025880ae, 0x300ebb8a4d5e2c84),
    ("q4_1", 0x0e88ab291b79f9f4, 0xef665255f6bdecb0),
    ("q5_0", 0x9a983d8a24a9a740, 0x06369ead6c9dca6f),
    ("q5_1", 0xf771ff6cd9411395, 0x5d2414f66618af06),
    ("q8_0", 0x4618030f590edf84, 0x4618030f590edf84),
    ("q2_K", 0x33b1af9b090cae1d, 0x29149ce2c4581570),
    ("q3_K", 0x4d6af16be70b78f1, 0x303ea76114bb7708),
    ("q4_K", 0xd30473a5bd167ba2, 0x65990003d9213290),
    ("q5_K", 0x4ef5b73a4f46062a, 0x1ac9474d19802b30),
    ("q6_K", 0x241d8d7cd4166c9d, 0xb0191ca972308bfc),
    // Three formats need importance; without it there is nothing.
    ("iq1_s", 0xcbf29ce484222325, 0x3f02429896b027e7),
    ("iq1_m", 0xf06d608784016606, 0x4ee692e23a1f5361),
    ("iq2_xxs", 0xcbf29ce484222325, 0xaaab12bf37c7ba5c),
    ("iq2_xs", 0xcbf29ce484222325, 0xc24825d85335a308),
    ("iq2_s", 0xc120baaf1fe08c4f, 0xc31a49bacf0faa05),
    ("iq3_xxs", 0x74a14a91f8e6b652, 0x5396a54d15808f29),
    ("iq3_s", 0x0229b358771cfec3, 0xebe4f98e5d3d44dc),
    ("iq4_nl", 0x2b141af88c00537e, 0xe4ff4152b5ac991f),
    ("iq4_xs", 0x1f4958ed3765627b, 0x155b2bc625707261),
    ("mxfp4", 0x43f9c7a38671b0da, 0x43f9c7a38671b0da),
    ("tq1_0", 0xe577f68084ecf048, 0xe577f68084ecf048),
    ("tq2_0", 0x253dafc458d037d0, 0x253dafc458d037d0),
];

#[test]
fn bytes_equal_ggml() {
    let (x, w) = data();
    assert_eq!(fnv(bytemuck::cast_slice(&x)), 0x8ea5b225ea19d5a, "the data itself");
    assert_eq!(fnv(bytemuck::cast_slice(&w)), 0x50b5276a8e43f341, "the importance itself");
    let mut wrong = Vec::new();
    for isa in Isa::ALL.into_iter().filter(|i| i.is_supported()) {
        for spec in FORMATS {
            let Some(q) = Quantizer::for_isa(spec.format, isa) else { continue };
            let mut x = x.clone();
            if spec.format == Format::IQ3_S {
                // ggml misplaces what follows a group of zeros.
                x.iter_mut().filter(|x| **x == 0.0).for_each(|x| *x = 2f32.powi(-60));
            }
            let got = (fnv(&quantize(q, &x, None)), fnv(&quantize(q, &x, Some(&w))));
            match GOLDEN.iter().find(|g| g.0 == spec.name) {
                None if spec.codes.is_none() => (),
                None => wrong.push(format!("{}: no golden value", spec.name)),
                Some(g) if (g.1, g.2) != got => {
                    let which = [g.1 != got.0, g.2 != got.1];
                    wrong.push(format!("{isa} {}: [plain, importance] wrong: {which:?}", spec.name));
                }
                Some(_) => (),
            }
        }
        println!("covered: {isa}");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn floats_round_to_nearest_even() {
    let x: Vec<f32> = [1.0, -0.0, 65519.0, 65520.0, 1.000_488_3, 3.0e-8, f32::MAX].into();
    let mut out = vec![0; 2 * x.len()];
    Quantizer::new(Format::F16).unwrap().row(&x, None, &mut out);
    let got: Vec<u16> = out.as_chunks().0.iter().map(|b| u16::from_le_bytes(*b)).collect();
    assert_eq!(got, [0x3C00, 0x8000, 0x7BFF, 0x7C00, 0x3C00, 0x0001, 0x7C00]);
    Quantizer::new(Format::BF16).unwrap().row(&x, None, &mut out);
    let got: Vec<u16> = out.as_chunks().0.iter().map(|b| u16::from_le_bytes(*b)).collect();
    assert_eq!(got, [0x3F80, 0x8000, 0x4780, 0x4780, 0x3F80, 0x3301, 0x7F80]);
}

/// The squared error of a format, relative to the weights, is what its bits promise.
#[test]
fn quantization_error_is_within_its_bound() {
    // Weights near a normal distribution; bounds are about 1.2 times what was found.
    let mut state = 7;
    let x: Vec<f32> = (0..ROWS * COLS).map(|_| (0..8).map(|_| unit(&mut state)).sum::<f32>()).collect();
    let size: f64 = x.iter().map(|x| (x * x) as f64).sum();
    let mut wrong = Vec::new();
    for (format, bound) in [
        (Format::Q8_0, 0.0066),
        (Format::Q6_K, 0.021),
        (Format::Q5_K, 0.040),
        (Format::Q5_1, 0.045),
        (Format::Q5_0, 0.050),
        (Format::Q4_K, 0.081),
        (Format::IQ4_XS, 0.084),
        (Format::IQ4_NL, 0.084),
        (Format::Q4_1, 0.093),
        (Format::Q4_0, 0.103),
        (Format::Q3_K, 0.172),
        (Format::Q2_K, 0.36),
    ] {
        let blocks = quantize(Quantizer::new(format).unwrap(), &x, None);
        let mut back = vec![0.0; x.len()];
        format.dequant(&blocks, &mut back);
        let error: f64 = x.iter().zip(&back).map(|(x, b)| ((x - b) as f64).powi(2)).sum();
        let rms = (error / size).sqrt();
        println!("{:8} {rms:.4}", format.name());
        if !(rms <= bound && rms > bound / 2.0) {
            wrong.push(format!("{}: {rms:.4}, expected up to {bound}", format.name()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

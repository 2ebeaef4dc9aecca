//! Dequantization against the ggml project's own Python package.

use oxcart_quant::format::FORMATS;

/// For each format, a hash of the weights that `gguf.quants.dequantize` (package gguf 0.19.0; for Q8_K, which it lacks,
/// `dequantize_row_q8_K` of libggml) makes of 16384 weights of pseudo-random blocks: FNV-1a over the bits of every finite f32, in order.
#[test]
fn weights_equal_ggml_bit_for_bit() {
    const GOLDEN: &[(&str, u64)] = &[
        ("f16", 0xd460b28a933787ed),
        ("bf16", 0x7eb208f02f95f9b5),
        ("q4_0", 0x8b10a9bdcf9ea1a5),
        ("q4_1", 0xb9d3b8ac194eb9ae),
        ("q5_0", 0x51803f5317f2c625),
        ("q5_1", 0xbec7a09d0d9b0020),
        ("q8_0", 0x40dde6ce66b4d665),
        ("q2_K", 0x6b99d58b224674a8),
        ("q3_K", 0xfb731a63caa454a5),
        ("q4_K", 0x48d45b13045177b9),
        ("q5_K", 0xef926481a6efc3f1),
        ("q6_K", 0x60512d63fcc3ff6d),
        ("q8_K", 0xc45429397e8d1d5e),
        ("iq1_s", 0xa079ca1b35e14345),
        ("iq1_m", 0xaf8e475c9d4bc265),
        ("iq2_xxs", 0xf2eaf82afadca6c1),
        ("iq2_xs", 0x5b50dfcd1b154e31),
        ("iq2_s", 0xeb5a0c7b2d4b6f59),
        ("iq3_xxs", 0x354fa35ca148ae9d),
        ("iq3_s", 0xaf1ec83ecab6f7e5),
        ("iq4_nl", 0xc897ee1a87293465),
        ("iq4_xs", 0x1974254425392125),
        ("tq1_0", 0xdd521c83fadb1b25),
        ("tq2_0", 0x01bb70221e282725),
        ("mxfp4", 0x6cbf54d8f996295f),
    ];
    let mut wrong = Vec::new();
    for s in FORMATS.iter().filter(|s| s.name != "f32") {
        let mut state = 1u64;
        let mut bytes = vec![0u8; 16384 / s.block_len * s.block_bytes];
        for b in &mut bytes {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            *b = (state >> 56) as u8;
        }
        let mut w = vec![0.0f32; 16384];
        s.format.dequant(&bytes, &mut w);
        let hash = w
            .iter()
            .filter(|w| w.is_finite())
            .fold(0xcbf2_9ce4_8422_2325u64, |h, w| (h ^ w.to_bits() as u64).wrapping_mul(0x100_0000_01b3));
        match GOLDEN.iter().find(|g| g.0 == s.name) {
            None => wrong.push(format!("{}: no golden value", s.name)),
            Some(g) if g.1 != hash => wrong.push(format!("{}: {hash:#018x}, expected {:#018x}", s.name, g.1)),
            Some(_) => (),
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

//! The formats with codes, as kernels are stamped from them: macros cannot read [`crate::format::FORMATS`], so that its figures
//! stand here again, and are compared.

/// Hands the table of slabs to the macro `then`. The order is that in which AVX-512's unpacker leaves the codes.
macro_rules! slabs {
    ($then:ident) => {
        $then! {
            // format unpacker bytes group has_min order
            Q4_0 q4_0 144 32 false PAIRED;
            Q4_1 q4_1 160 32 true PAIRED;
            Q5_0 q5_0 176 32 false PLAIN;
            Q5_1 q5_1 192 32 true PLAIN;
            Q8_0 q8_0 272 32 false PLAIN;
            Q2_K q2_k 84 16 true QUARTERS;
            Q3_K q3_k 110 16 false THIRDS;
            Q4_K q4_k 144 32 true NIBBLES;
            Q5_K q5_k 176 32 true HALVES;
            Q6_K q6_k 210 16 false PLAIN;
            Q8_K q8_k 292 32 false PLAIN;
            IQ1_S iq1_s 50 32 false PLAIN;
            IQ1_M iq1_m 56 16 false PLAIN;
            IQ2_XXS iq2_xxs 66 32 false PLAIN;
            IQ2_XS iq2_xs 74 16 false PLAIN;
            IQ2_S iq2_s 82 16 false PLAIN;
            IQ3_XXS iq3_xxs 98 32 false PLAIN;
            IQ3_S iq3_s 110 32 false PLAIN;
            IQ4_NL iq4_nl 144 32 false PAIRED_IQ4;
            IQ4_XS iq4_xs 136 32 false PAIRED_IQ4;
            TQ1_0 tq1_0 54 32 false PLAIN;
            TQ2_0 tq2_0 66 32 false QUARTERS;
            MXFP4 mxfp4 136 32 false PAIRED_MXFP4;
        }
    };
}
pub(crate) use slabs;

#[cfg(test)]
mod tests {
    use crate::format::{FORMATS, Format, SLAB};

    macro_rules! rows {
        ($($format:ident $unpack:ident $bytes:literal $group:literal $min:literal $order:ident;)*) => {
            const ROWS: &[(Format, usize, usize, bool)] = &[$((Format::$format, $bytes, $group, $min),)*];
        };
    }
    super::slabs!(rows);

    #[test]
    fn the_table_is_that_of_formats() {
        let formats = FORMATS.iter().filter_map(|s| {
            let codes = s.codes.as_ref()?;
            Some((s.format, SLAB / s.block_len * s.block_bytes, codes.group, codes.has_min))
        });
        let mut rows = ROWS.to_vec();
        rows.sort_by_key(|r| r.0 as usize);
        assert_eq!(rows, formats.collect::<Vec<_>>());
    }
}

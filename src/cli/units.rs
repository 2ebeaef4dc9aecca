//! Numbers for people.

/// Bytes in the binary unit that leaves one to four digits before the point.
pub fn size(bytes: u64) -> String {
    let (mut n, mut unit) = (bytes as f64, "B");
    for next in ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"] {
        if n < 1024.0 {
            break;
        }
        (n, unit) = (n / 1024.0, next);
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{n:.2} {unit}") }
}

/// Bytes in GiB.
pub fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

/// A count with its digits in threes.
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, d) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(d);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_told_in_few_digits() {
        for (n, want) in
            [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (67_164_897_280, "62.55 GiB"), (u64::MAX, "16.00 EiB")]
        {
            assert_eq!(size(n), want);
        }
        for (n, want) in [(0, "0"), (999, "999"), (1000, "1,000"), (111_209_914_368, "111,209,914,368")] {
            assert_eq!(count(n), want);
        }
    }
}

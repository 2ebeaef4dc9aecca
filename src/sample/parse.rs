//! Parameters as people write them: flags, settings of a chat. Errors say what was expected.

type Parsed<T> = Result<T, String>;

/// A number within bounds.
pub fn number<const MIN: i32, const MAX: i32>(s: &str) -> Parsed<f32> {
    match s.parse::<f32>() {
        Ok(x) if (MIN as f32..=MAX as f32).contains(&x) => Ok(x),
        _ => Err(format!("expected a number from {MIN} to {MAX}")),
    }
}

/// A penalty that divides.
pub fn penalty(s: &str) -> Parsed<f32> {
    number::<0, 100>(s).ok().filter(|&x| x > 0.0).ok_or_else(|| "expected a number above 0, to 100".into())
}

/// How many tokens are kept; 0 (also what is less) for all.
pub fn top_k(s: &str) -> Parsed<usize> {
    let k: i64 = s.parse().map_err(|_| "expected a whole number")?;
    Ok(usize::try_from(k).unwrap_or(0))
}

/// How many tokens are recent; `usize::MAX` where `-1` means all of the context.
pub fn last_n(s: &str) -> Parsed<usize> {
    match s.parse::<i64>() {
        Ok(-1) => Ok(usize::MAX),
        Ok(n) if n >= 0 => Ok(n as usize),
        _ => Err("expected a number of tokens, or -1 for all of the context".into()),
    }
}

/// A seed, or that there shall be none.
#[derive(Clone, Copy)]
pub struct Seed(pub Option<u64>);

/// A seed; -1 for a random one.
pub fn seed(s: &str) -> Parsed<Seed> {
    match s.parse::<i128>() {
        Ok(-1) => Ok(Seed(None)),
        Ok(n) => u64::try_from(n).map(|n| Seed(Some(n))).map_err(|_| "expected 0 to 2^64 - 1, or -1".into()),
        Err(_) => Err("expected a whole number, or -1 for a random one".into()),
    }
}

/// A token and what is added to its logit. Infinities are meant: `-inf` forbids a token.
pub fn bias(s: &str) -> Parsed<(u32, f32)> {
    let expected = || "expected ID+BIAS or ID-BIAS, e.g. 15043-1.5".to_string();
    let at = s.find(['+', '-']).ok_or_else(expected)?;
    let value: f32 = s[at..].parse().ok().filter(|x: &f32| !x.is_nan()).ok_or_else(expected)?;
    Ok((s[..at].parse().map_err(|_| expected())?, value))
}

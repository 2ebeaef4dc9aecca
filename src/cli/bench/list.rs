//! Lists of numbers, as llama-bench reads them: `512`, `1,2,4`, `1-4`, `16-64+16`, `128-4096*2`.

/// Of one flag; repeated flags have several.
#[derive(Clone, Debug, PartialEq)]
pub struct List(pub Vec<usize>);

/// More are a mistake.
const MOST: usize = 10_000;

/// A list of numbers of at least `LEAST`, at most 2^31.
pub fn list<const LEAST: usize>(s: &str) -> Result<List, String> {
    let mut all = Vec::new();
    for item in s.split(',') {
        let (range, step) = match item.find(['+', '*']) {
            Some(at) => (&item[..at], Some((&item[at..at + 1], number(&item[at + 1..])?))),
            None => (item, None),
        };
        let (first, last) = match range.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None if step.is_none() => (number(range)?, number(range)?),
            None => return Err(form()),
        };
        let mut next = first;
        while next <= last {
            if next < LEAST {
                return Err(format!("{next}: expected at least {LEAST}"));
            }
            all.push(next);
            let after = match step {
                Some(("*", times)) => next.saturating_mul(times),
                Some((_, more)) => next + more,
                None => next + 1,
            };
            if after <= next && next < last || all.len() > MOST {
                return Err(format!("{item}: expected a range that ends, of at most {MOST} numbers"));
            }
            next = after.max(next + 1);
        }
    }
    Ok(List(all))
}

/// A list of numbers of workers; 0 and -1 for the default.
pub fn threads(s: &str) -> Result<List, String> {
    match super::super::engine::threads(s) {
        Ok(n) => Ok(List(vec![n])),
        Err(e) if s.parse::<i64>().is_ok() => Err(e),
        Err(_) => list::<0>(s).and_then(|l| match l.0.iter().find(|&&n| n > 4096) {
            Some(n) => Err(format!("{n}: expected 1 to 4096")),
            None => Ok(l),
        }),
    }
}

fn form() -> String {
    "expected numbers separated by commas, or FIRST-LAST, FIRST-LAST+STEP, FIRST-LAST*FACTOR".into()
}

fn number(s: &str) -> Result<usize, String> {
    let digits = !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    s.parse().ok().filter(|n| digits && *n <= 1 << 31).ok_or_else(form)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_llama_bench_s() {
        let cases: &[(&str, Option<&[usize]>)] = &[
            ("512", Some(&[512])),
            ("0", Some(&[0])),
            ("1,2,4", Some(&[1, 2, 4])),
            ("1-4", Some(&[1, 2, 3, 4])),
            ("16-70+16", Some(&[16, 32, 48, 64])),
            ("128-1024*2,7", Some(&[128, 256, 512, 1024, 7])),
            ("5-5", Some(&[5])),
            ("5-5*1", Some(&[5])),
            ("5-4", Some(&[])),
            ("0-8*2", None),
            ("1-8+0", None),
            ("1-8*1", None),
            ("0-100000", None),
            ("", None),
            ("1,,2", None),
            ("-1", None),
            ("1+2", None),
            ("1-2-3", None),
            ("2147483649", None),
            ("99999999999999999999", None),
        ];
        for (s, want) in cases {
            assert_eq!(list::<0>(s).ok().map(|l| l.0), want.map(<[usize]>::to_vec), "{s:?}");
        }
        assert!(list::<1>("0-3").is_err() && list::<1>("1-3").is_ok());
        for (s, want) in
            [("-1", Some(vec![0])), ("0,2", Some(vec![0, 2])), ("1-4*2", Some(vec![1, 2, 4])), ("5000", None)]
        {
            assert_eq!(threads(s).ok().map(|l| l.0), want, "{s:?}");
        }
    }
}

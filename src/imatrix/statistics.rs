//! How importance is spread over a tensor's columns: llama-imatrix's `--show-statistics`.

use super::{Entry, Imatrix};

/// Mean squares below this are inactive columns.
const INACTIVE: f64 = 1e-5;

/// Figures of one tensor, of the mean squares of its columns; experts that saw no token are left out.
#[derive(Clone, Debug, PartialEq)]
pub struct Statistics {
    /// Columns.
    pub columns: usize,
    /// Sum.
    pub sum: f64,
    /// Least.
    pub min: f64,
    /// Greatest.
    pub max: f64,
    /// Mean.
    pub mean: f64,
    /// Standard deviation.
    pub deviation: f64,
    /// The share of columns that are active at all.
    pub active: f64,
    /// Entropy of their shares in the sum, in bits; `log2(columns)` where all matter alike.
    pub entropy: f64,
    /// The share of columns more than a standard deviation above the mean.
    pub outliers: f64,
    /// Cosine between the sums and those of the same tensor a layer before, where there is one.
    pub cosine: Option<f64>,
}

impl Statistics {
    /// Of a tensor; `None` where it saw no token.
    pub fn of(m: &Imatrix, name: &str) -> Option<Statistics> {
        let e = m.entries.get(name)?;
        let shared = e.sums.len() / e.counts.len();
        let known = e.sums.iter().enumerate().map(|(i, &s)| (s as f64, e.counts[i / shared]));
        let x: Vec<f64> = known.filter(|&(_, n)| n > 0).map(|(s, n)| s / n as f64).collect();
        let n = x.len() as f64;
        let share = |f: &dyn Fn(f64) -> bool| x.iter().filter(|&&x| f(x)).count() as f64 / n;
        let sum: f64 = x.iter().sum();
        let mean = sum / n;
        let deviation = (x.iter().map(|x| x * x).sum::<f64>() / n - mean * mean).max(0.0).sqrt();
        let before = before(name).and_then(|b| m.entries.get(&b));
        (!x.is_empty()).then(|| Statistics {
            columns: x.len(),
            sum,
            min: x.iter().copied().fold(f64::INFINITY, f64::min),
            max: x.iter().copied().fold(0.0, f64::max),
            mean,
            deviation,
            active: share(&|x| x > INACTIVE),
            entropy: x.iter().map(|x| x / sum).filter(|&p| p > 0.0).map(|p| -p * p.log2()).sum(),
            outliers: if deviation > 0.0 { share(&|x| (x - mean) / deviation > 1.0) } else { 0.0 },
            cosine: before.and_then(|b| cosine(e, b)),
        })
    }
}

/// The name of the same tensor a layer before.
fn before(name: &str) -> Option<String> {
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    Some(format!("blk.{}.{rest}", layer.parse::<u64>().ok()?.checked_sub(1)?))
}

fn cosine(a: &Entry, b: &Entry) -> Option<f64> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>();
    let norms = (dot(&a.sums, &a.sums) * dot(&b.sums, &b.sums)).sqrt();
    (a.sums.len() == b.sums.len() && norms > 0.0).then(|| dot(&a.sums, &b.sums) / norms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_those_of_mean_squares() {
        let mut m = Imatrix::default();
        m.entries.insert("blk.0.a.weight".into(), Entry { sums: vec![2.0, 0.0, 2.0, 0.0], counts: vec![1] });
        m.entries.insert("blk.1.a.weight".into(), Entry { sums: vec![8.0, 8.0, 16.0, 0.0], counts: vec![2] });
        // The second expert saw nothing.
        m.entries.insert("blk.2.a.weight".into(), Entry { sums: vec![3.0, 3.0, 0.0, 0.0], counts: vec![1, 0] });
        m.entries.insert("none".into(), Entry { sums: vec![1.0], counts: vec![0] });
        let s = Statistics::of(&m, "blk.1.a.weight").unwrap();
        assert_eq!((s.columns, s.sum, s.min, s.max, s.mean), (4, 16.0, 0.0, 8.0, 4.0));
        assert_eq!((s.deviation, s.active, s.entropy, s.outliers), (8f64.sqrt(), 0.75, 1.5, 0.25));
        assert!((s.cosine.unwrap() - 48.0 / (8.0 * 384.0f64).sqrt()).abs() < 1e-12);
        let s = Statistics::of(&m, "blk.2.a.weight").unwrap();
        assert_eq!((s.columns, s.sum, s.outliers, s.entropy), (2, 6.0, 0.0, 1.0));
        assert_eq!(Statistics::of(&m, "blk.0.a.weight").unwrap().cosine, None);
        assert_eq!(Statistics::of(&m, "none"), None);
    }
}

//! A plot of divergence against size, as SVG.

use std::fmt::Write;

/// A model in the plot.
pub struct Point {
    /// What is written beside it.
    pub name: String,
    /// GiB.
    pub size: f64,
    /// Mean divergence in nats, above 0, and its standard error.
    pub kld: (f64, f64),
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 440.0;
/// Margins: left, right, top, bottom.
const MARGIN: (f64, f64, f64, f64) = (80.0, 40.0, 40.0, 60.0);

/// Size linear from 0, divergence logarithmic between powers of ten, a bar of two standard errors through each point.
/// Points whose divergence is 0 have no place on it and are left out.
pub fn svg(title: &str, points: &[Point]) -> String {
    let shown: Vec<&Point> = points.iter().filter(|p| p.kld.0 > 0.0 && p.size > 0.0).collect();
    let logs = shown.iter().map(|p| p.kld.0.log10());
    let low = logs.clone().fold(f64::INFINITY, f64::min).floor().min(-1.0);
    let high = logs.fold(f64::NEG_INFINITY, f64::max).ceil().max(low + 1.0);
    let widest = shown.iter().map(|p| p.size).fold(0.0, f64::max).max(1e-6);
    let step = 10f64.powf((widest / 4.0).log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].iter().map(|m| m * step).find(|s| widest / s <= 6.0).unwrap_or(widest);
    let (left, right, top, bottom) = MARGIN;
    let end = (widest / step).ceil() * step;
    let x = |size: f64| left + (WIDTH - left - right) * size / end;
    let y = |kld: f64| top + (HEIGHT - top - bottom) * (high - kld.log10().clamp(low, high)) / (high - low);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let mut text = |x: f64, y: f64, anchor: &str, words: &str| {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>", escape(words));
    };
    text(WIDTH / 2.0, 22.0, "middle", title);
    text(x(end / 2.0), HEIGHT - 16.0, "middle", "size, GiB");
    text(14.0, 22.0, "start", "mean KLD, nats");
    for i in 0..=(end / step).round() as usize {
        let size = i as f64 * step;
        text(x(size), HEIGHT - bottom + 18.0, "middle", &format!("{}", (size * 1e6).round() / 1e6));
    }
    for power in low as i32..=high as i32 {
        text(left - 8.0, y(10f64.powi(power)) + 4.0, "end", &format!("{}", 10f64.powi(power)));
    }
    for p in &shown {
        // Towards the middle, where there is room for a long name.
        let (by, anchor) = if p.size > end / 2.0 { (-8.0, "end") } else { (8.0, "start") };
        text(x(p.size) + by, y(p.kld.0) + 4.0, anchor, &p.name);
    }
    for power in low as i32..=high as i32 {
        let at = y(10f64.powi(power));
        let _ =
            writeln!(out, "<line x1=\"{left}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>", x(end));
    }
    let (base, side) = (HEIGHT - bottom, x(end));
    let _ = writeln!(out, "<path d=\"M{left} {top}V{base}H{side:.1}\" fill=\"none\" stroke=\"black\"/>");
    for p in &shown {
        let (at, (kld, error)) = (x(p.size), p.kld);
        let (from, to) = (y((kld - error).max(10f64.powf(low))), y(kld + error));
        let _ = writeln!(out, "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{from:.1}\" y2=\"{to:.1}\" stroke=\"#06c\"/>");
        let _ = writeln!(out, "<circle cx=\"{at:.1}\" cy=\"{:.1}\" r=\"4\" fill=\"#06c\"/>", y(kld));
    }
    out + "</svg>\n"
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_in_the_frame_and_names_are_text() {
        let point = |name: &str, size, kld| Point { name: name.into(), size, kld: (kld, kld / 10.0) };
        let points = [point("a<b>&", 0.1, 3e-4), point("c", 63.2, 0.7), point("the reference", 70.0, 0.0)];
        let svg = svg("t", &points);
        assert!(svg.contains("a&lt;b&gt;&amp;") && !svg.contains("the reference"), "{svg}");
        let centres: Vec<f64> =
            svg.split("cy=\"").skip(1).map(|s| s.split('"').next().unwrap().parse().unwrap()).collect();
        assert!(centres.len() == 2 && centres[0] > centres[1], "the larger divergence is higher up: {centres:?}");
        assert!(centres.iter().all(|y| (MARGIN.2..=HEIGHT - MARGIN.3).contains(y)), "{centres:?}");
        assert!(super::svg("none", &[]).ends_with("</svg>\n"));
    }
}

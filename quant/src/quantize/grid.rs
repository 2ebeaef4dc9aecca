//! From any combination of levels to the points of a grid that lie nearest: a table for each grid, made at its first use.
//!
//! The codes that a search wants for `D` weights are a combination of levels; a format can name only some of them, the
//! points of its grid. Off the grid, the points within the smallest few distances are candidates, in the order of distance
//! and then of number, and the one that errs least for these very weights is taken ([`Grid::nearest`]). Candidates lie in
//! sixteens side by side, so that sixteen of them are tried at once, each with ggml's sum:
//!
//! ```text
//! error = sum over i of  weight[i] * (scale * q[i] - x[i])^2
//! ```

use crate::format::iq::grid as book;
use crate::lanes::{L, Lanes};
use std::ops::Range;
use std::sync::OnceLock;

/// A grid of points of `D` levels.
pub(super) struct Grid<const D: usize> {
    /// Levels that a value may have.
    pub levels: usize,
    /// The levels of each point.
    pub points: Vec<[u8; D]>,
    places: Vec<Place>, // by combination: sum of level[i] * levels^i
    candidates: Vec<Candidates<D>>,
}

/// Where a combination lies.
enum Place {
    On(u16),
    Off(Range<u32>), // its candidates
}

/// Sixteen points side by side; where there are fewer, the first again.
struct Candidates<const D: usize> {
    q: [[u8; L]; D],
    point: [u16; L],
}

impl<const D: usize> Grid<D> {
    /// The grid of a code book whose values are those of `levels`. Candidates are the points within the smallest `shells`
    /// distances; `value` is what a level stands for in [`Grid::nearest`].
    fn new(book: &[[u8; D]], levels: &[u8], shells: usize, value: fn(u8) -> u8) -> Grid<D> {
        let level = |v: &u8| levels.iter().position(|l| l == v).expect("a code book has no other values") as u8;
        let points: Vec<[u8; D]> = book.iter().map(|p| std::array::from_fn(|i| level(&p[i]))).collect();
        let used = 1 + points.iter().flatten().copied().max().unwrap_or(0) as usize;
        let mut g = Grid { levels: used, points, places: Vec::new(), candidates: Vec::new() };
        let mut on = vec![None; used.pow(D as u32)];
        for (i, p) in g.points.iter().enumerate() {
            on[p.iter().rev().fold(0, |at, &l| at * used + l as usize)] = Some(i as u16);
        }
        // A squared distance is at most D times that of two levels.
        let mut distances = vec![0usize; g.points.len()];
        let mut found = vec![0usize; D * used * used];
        for (at, on) in on.into_iter().enumerate() {
            if let Some(point) = on {
                g.places.push(Place::On(point));
                continue;
            }
            let own: [usize; D] = std::array::from_fn(|i| at / used.pow(i as u32) % used);
            found.fill(0);
            for (d, p) in distances.iter_mut().zip(&g.points) {
                *d = (0..D).map(|i| own[i].abs_diff(p[i] as usize).pow(2)).sum();
                found[*d] += 1;
            }
            let near = (0..found.len()).filter(|&d| found[d] > 0).take(shells);
            let near: Vec<usize> = near
                .flat_map(|shell| (0..distances.len()).filter(|&i| distances[i] == shell).collect::<Vec<_>>())
                .collect();
            let start = g.candidates.len() as u32;
            for some in near.chunks(L) {
                let point: [u16; L] = std::array::from_fn(|l| *some.get(l).unwrap_or(&near[0]) as u16);
                let q = std::array::from_fn(|i| point.map(|p| value(g.points[p as usize][i])));
                g.candidates.push(Candidates { q, point });
            }
            g.places.push(Place::Off(start..g.candidates.len() as u32));
        }
        g
    }

    /// The point that a combination is, if it is one.
    pub fn point(&self, combination: usize) -> Option<usize> {
        match self.places[combination] {
            Place::On(p) => Some(p as usize),
            Place::Off(_) => None,
        }
    }

    /// The point near a combination that errs least for weights `x` at `scale`, where errors weigh `w` and a level stands
    /// for its value and `shift`. The first of equals.
    #[inline(always)]
    pub fn nearest<V: Lanes>(&self, combination: usize, x: &[f32], w: &[f32], scale: f32, shift: f32) -> usize {
        let list = match &self.places[combination] {
            Place::On(p) => return *p as usize,
            Place::Off(list) => list.start as usize..list.end as usize,
        };
        let (scale, shift) = (V::splat(scale), V::splat(shift));
        let (mut best, mut point) = (f32::INFINITY, self.candidates[list.start].point[0]);
        for c in &self.candidates[list] {
            let mut error = V::splat(0.0);
            for i in 0..D {
                let d = scale.mul(V::load_i8(&c.q[i]).add(shift)).sub(V::splat(x[i]));
                error = error.add(V::splat(w[i]).mul(d).mul(d));
            }
            let mut errors = [0.0; L];
            error.store(&mut errors);
            let mut least = errors;
            for half in [8, 4, 2, 1] {
                for i in 0..half {
                    least[i] = if least[i + half] < least[i] { least[i + half] } else { least[i] };
                }
            }
            if least[0] < best {
                best = least[0];
                for l in (0..L).rev() {
                    point = if errors[l] == best { c.point[l] } else { point };
                }
            }
        }
        point as usize
    }
}

macro_rules! grids {
    ($($(#[$doc:meta])* $name:ident: $d:literal, $book:ident, $levels:ident, $shells:literal, $value:expr;)*) => {$(
        $(#[$doc])*
        pub(super) fn $name() -> &'static Grid<$d> {
            static GRID: OnceLock<Grid<$d>> = OnceLock::new();
            GRID.get_or_init(|| Grid::new(&book::$book, &book::$levels, $shells, $value))
        }
    )*};
}

/// The odd numbers that levels of IQ2 and IQ3 stand for.
fn odd(level: u8) -> u8 {
    2 * level + 1
}

grids! {
    /// Of IQ2_XXS.
    iq2_xxs: 8, IQ2_XXS, LEVELS_2, 2, odd;
    /// Of IQ2_XS.
    iq2_xs: 8, IQ2_XS, LEVELS_2, 2, odd;
    /// Of IQ2_S.
    iq2_s: 8, IQ2_S, LEVELS_2, 1, odd;
    /// Of IQ3_XXS.
    iq3_xxs: 4, IQ3_XXS, LEVELS_3_XXS, 2, odd;
    /// Of IQ3_S.
    iq3_s: 4, IQ3_S, LEVELS_3_S, 3, odd;
    /// Of IQ1_S and IQ1_M.
    iq1: 8, IQ1, LEVELS_1, 3, |level| level;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lanes::Scalar;

    /// Every combination of IQ2_XS's levels, by the definition.
    #[test]
    fn candidates_are_the_nearest_points() {
        let g = iq2_xs();
        let mut on_grid = 0;
        for at in 0..3usize.pow(8) {
            let own: [f32; 8] = std::array::from_fn(|i| (at / 3usize.pow(i as u32) % 3) as f32);
            // At this scale and with these weights, errors are distances.
            let found = g.nearest::<Scalar>(at, &own.map(|l| 2.0 * l + 1.0), &[0.25; 8], 1.0, 0.0);
            let distance = |p: &[u8; 8]| (0..8).map(|i| (own[i] - p[i] as f32).powi(2)).sum::<f32>();
            let least = g.points.iter().map(distance).fold(f32::INFINITY, f32::min);
            assert_eq!(g.points.iter().position(|p| distance(p) == least), Some(found), "combination {at}");
            on_grid += (g.point(at) == Some(found)) as usize;
        }
        assert_eq!(on_grid, 512);
    }
}

//! What stays in memory within so many bytes: which units of what every token uses, and how many experts of each layer.

use super::{AHEAD, Reading};

/// What these residents take, and the room for those that are streamed.
pub fn taken(sizes: &[u64], resident: &[bool]) -> u64 {
    let of = |stays: bool| sizes.iter().zip(resident).filter(move |u| *u.1 == stays).map(|u| *u.0);
    of(true).sum::<u64>() + AHEAD as u64 * of(false).max().unwrap_or(0)
}

/// Which units stay within `budget` bytes, beside the room for those that are streamed: the last one, which is the output
/// matrix, and of the others as many as fit, spread evenly.
pub fn residents(sizes: &[u64], budget: u64) -> Vec<bool> {
    let layers = sizes.len() - 1;
    let spread = |n: usize, last: bool| -> Vec<bool> {
        (0..layers).map(|i| (i + 1) * n / layers > i * n / layers).chain([last]).collect()
    };
    let candidates = (0..=layers).rev().map(|n| spread(n, true)).chain([spread(0, false)]);
    candidates.into_iter().find(|r| taken(sizes, r) <= budget).unwrap_or_else(|| spread(0, false))
}

/// How many experts each unit keeps within `room` bytes, evenly spread over the layers, beside those that come and go in
/// passes of this kind. `sizes` has for each unit the number of its experts and the bytes of one.
pub fn slots(sizes: &[(usize, u64)], room: u64, reading: Reading) -> Vec<usize> {
    let layers = sizes.len() - 1;
    let spread = |n: usize| -> Vec<usize> {
        let share = |i: usize| ((i + 1) * n / layers - i * n / layers).min(sizes[i].0);
        (0..layers).map(share).chain([0]).collect()
    };
    let taken = |slots: &[usize]| -> u64 {
        let each = sizes.iter().zip(slots).enumerate();
        let (mut stay, mut ahead, mut fetched) = (0, 0, 0);
        for (i, (&(count, size), &n)) in each {
            stay += n as u64 * size;
            let others = (count - n) as u64 * size;
            if i < reading.ahead {
                ahead = others.max(ahead);
            } else {
                fetched = others.min(reading.most as u64 * size).max(fetched);
            }
        }
        stay + fetched.max(AHEAD as u64 * ahead)
    };
    let most = sizes.iter().map(|s| s.0).max().unwrap_or(0) * layers;
    (0..=most).rev().map(spread).find(|s| taken(s) <= room).unwrap_or_else(|| vec![0; sizes.len()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fits_stays_evenly_spread() {
        let layers = |n: usize, output: u64| -> Vec<u64> { vec![10; n].into_iter().chain([output]).collect() };
        let pattern = |sizes: &[u64], budget| {
            residents(sizes, budget).into_iter().map(|r| if r { 'r' } else { '.' }).collect::<String>()
        };
        for (sizes, budget, want) in [
            (layers(8, 20), 100, "rrrrrrrrr"),
            (layers(8, 20), 99, ".r.rr.rrr"), // 5 layers, 20 of output, 20 on their way
            (layers(8, 20), 60, "...r...rr"),
            (layers(8, 20), 40, "........r"),
            (layers(8, 20), 39, "........."),
            (layers(8, 20), 0, "........."),
            (layers(3, 1), 31, "rrrr"),
            (vec![10, 30, 10, 5], 54, "...."),
            (vec![5], 5, "r"),
            (vec![5], 4, "."),
        ] {
            assert_eq!(pattern(&sizes, budget), want, "{sizes:?} within {budget}");
        }
    }

    #[test]
    fn experts_have_the_room_that_is_left() {
        let (token, prompt) = (Reading { ahead: 0, most: 2 }, Reading { ahead: 3, most: 2 });
        let sizes = [(8, 10), (8, 10), (8, 10), (8, 10), (0, 0)];
        for (room, reading, want) in [
            (0, token, [0, 0, 0, 0]),
            (19, token, [0, 0, 0, 0]),
            (39, token, [0, 0, 0, 1]), // 20 on their way
            (60, token, [1, 1, 1, 1]),
            (259, token, [5, 6, 6, 6]),
            (319, token, [7, 8, 7, 8]), // one of a layer on its way
            (320, token, [8, 8, 8, 8]),
            (180, prompt, [1, 1, 1, 1]), // two layers of 7 on their way
            (240, prompt, [4, 4, 4, 4]), // two of 4
            (320, prompt, [8, 8, 8, 8]),
        ] {
            assert_eq!(slots(&sizes, room, reading)[..4], want, "{room}, {reading:?}");
        }
        let uneven = |room| slots(&[(2, 10), (4, 20), (0, 0)], room, Reading { ahead: 0, most: 1 });
        assert_eq!((uneven(100), uneven(99)), (vec![2, 4, 0], vec![2, 2, 0]));
    }
}

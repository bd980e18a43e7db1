//! Weights of attention, from products of queries with keys to left sides of products with values.

#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
pub(super) use avx512::power;

use super::matrix::View;
use super::short::{Panels, Short};
use super::softmax::{LANES, folded, powers};
use crate::Level;
use crate::level::at_level;
use std::ops::Range;

/// The sum of a row's weights, in parts: of every sixteenth.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(64))]
pub(super) struct WeightSums([f32; LANES]);

/// Turns products of queries with a block of keys, `scores: [rows, keys]` whose rows are `stride` apart, into weights,
/// `2^(scale · score − shifts[i])` for row i and the keys of the block that it sees, and zeros for the others, rounded as a left side in
/// the memory of `left`; adds the weights of each row to `sums`. The block begins with key `from`, and `seen[i]` is what row i sees of
/// all keys. What `scores` holds then is not said.
///
/// # Panics
/// When lengths do not fit: a caller's bug.
pub(super) fn attention_weights(
    short: Short,
    (scores, keys, stride): (&mut [f32], usize, usize),
    (seen, from): (&[Range<usize>], usize),
    (scale, shifts): (f32, &[f32]),
    left: &mut Panels,
    sums: &mut [WeightSums],
) {
    let rows = sums.len();
    let enough = rows == 0 || scores.len() >= (rows - 1) * stride + keys;
    let fit = keys > 0 && keys <= stride && shifts.len() == rows && seen.len() == rows;
    assert!(enough && fit, "scores of every row");
    let seen = |i: usize| {
        let place = |key: usize| key.saturating_sub(from).min(keys);
        place(seen[i].start)..place(seen[i].end)
    };
    if !left.is(short) {
        *left = Panels::empty(short);
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(mut left) = left.turned_rows([rows, keys]) {
        return avx512::weigh_rows((scores, keys, stride), &seen, (scale, shifts), &mut left, sums);
    }
    for (i, row) in scores.chunks_mut(stride).take(rows).enumerate() {
        weigh(&mut row[..keys], seen(i), (scale, shifts[i]), &mut sums[i].0);
    }
    left.refill_left(View::new(scores, rows, keys, stride));
}

/// Divides the rows of `mixed: [rows, dim]`, of values that weights have mixed, by the sums of these.
///
/// # Panics
/// When there are not as many: a caller's bug.
pub(super) fn over_sums(level: Level, mixed: &mut [f32], dim: usize, sums: &[WeightSums]) {
    assert_eq!(mixed.len(), sums.len() * dim, "a sum for each row");
    at_level!(level, divide, (mixed: &mut [f32], dim: usize, sums: &[WeightSums]));
}

#[inline(always)]
fn divide(mixed: &mut [f32], dim: usize, sums: &[WeightSums]) {
    for (row, sums) in mixed.chunks_exact_mut(dim.max(1)).zip(sums) {
        let inverse = 1.0 / folded(sums.0, |a, b| a + b);
        for v in row {
            *v *= inverse;
        }
    }
}

/// Turns one query's products with the keys that it sees, `seen`, into weights, which are added to `sums`, and those with others into
/// zeros. Vectors are filled up with the least weight, which is nothing beside others.
fn weigh(products: &mut [f32], seen: Range<usize>, by: (f32, f32), sums: &mut [f32; LANES]) {
    let (first, past) = (seen.start.min(seen.end), seen.end);
    let whole = (first + (past - first).next_multiple_of(LANES)).min(products.len());
    products[past..whole].fill(f32::NEG_INFINITY);
    powers(Level::best(), &mut products[first..whole], by, sums);
    products[..first].fill(0.0);
    products[past..].fill(0.0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ViewMut, short_product};

    #[test]
    fn weights_are_powers_rounded() {
        let (rows, width, stride) = (37, 20, 300);
        let sample = |count: usize, by: f32| (0..count).map(|i| (i as f32 * by).sin() * 4.0).collect::<Vec<f32>>();
        let shifts = sample(rows, 0.9);
        let lengths = [5, 16, 64, 100, 128, 200, 256];
        for (short, keys) in Short::all().into_iter().flat_map(|short| lengths.map(|keys| (short, keys))) {
            let (scores, values) = (sample(rows * stride, 0.7), sample(keys * width, 0.3));
            let right = Panels::right(short, View::new(&values, keys, width, width).t());
            let sights: [&dyn Fn(usize) -> Range<usize>; 4] =
                [&|_| 0..keys, &|i| 0..i * 13 % (keys + 1), &|i| i * 3 % keys..(i * 3 % keys + 7).min(keys), &|i| {
                    (i % 2 * keys)..(i % 2 * keys)
                }];
            for seen in sights {
                let mut sums = vec![WeightSums([0.5; LANES]); rows];
                // What was there before is of no use.
                let mut left = Panels::left(short, View::new(&scores[..50], 5, 10, 10));
                // Keys of which some others come first.
                let ranges: Vec<_> = (0..rows).map(|i| seen(i).start + 100..seen(i).end + 100).collect();
                let (scored, with) = ((&mut scores.clone()[..], keys, stride), (0.3, &shifts[..]));
                attention_weights(short, scored, (&ranges, 100), with, &mut left, &mut sums);
                // The same in f32, and rounded by themselves.
                let mut alone = scores.clone();
                for (i, row) in alone.chunks_mut(stride).enumerate() {
                    let mut own = [0.5; LANES];
                    weigh(&mut row[..keys], seen(i), (0.3, shifts[i]), &mut own);
                    assert_eq!(own, sums[i].0);
                    let sum = 8.0 + row[..keys].iter().map(|&w| f64::from(w)).sum::<f64>();
                    for level in Level::all() {
                        let mut one = [1.0; 3];
                        over_sums(level, &mut one, 3, &sums[i..=i]);
                        assert!(one.iter().all(|&one| (f64::from(one) * sum - 1.0).abs() < 1e-6));
                    }
                    for (j, weight) in row[..keys].iter().enumerate() {
                        let power = (0.3 * f64::from(scores[i * stride + j]) - f64::from(shifts[i])).exp2();
                        let expected = if seen(i).contains(&j) { power } else { 0.0 };
                        assert!((f64::from(*weight) - expected).abs() <= 1e-6 * expected, "{keys} {i} {j}");
                    }
                }
                let expected = Panels::left(short, View::new(&alone, rows, keys, stride));
                let products = |left: &Panels| {
                    let mut c = vec![f32::NAN; rows * width];
                    short_product(left, 0..rows, &right, &mut ViewMut::new(&mut c, rows, width, width));
                    c
                };
                assert_eq!(products(&left), products(&expected), "{short:?} {keys}");
            }
        }
    }
}

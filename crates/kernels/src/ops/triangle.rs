//! Triangles on the diagonal of a factor, and the rows that are solved with them: strip of columns by strip.

use super::matrix::{View, ViewMut, gemm};
use crate::Level;
use crate::level::at_level;

/// Columns of a strip: two registers of the widest level.
pub(super) const STRIP: usize = 16;
/// Rows that loops take side by side, since each waits for its own last step.
const ROWS: usize = 8;
/// Rows of a band, at most.
pub(super) const MOST: usize = 128;

/// The columns of a strip in the rows of a band.
pub(super) type Tile = [[f64; STRIP]; MOST];

/// The triangle of a strip, lower triangular L or its transpose, as rows are solved with it.
pub(super) struct Strip {
    pub(super) width: usize,
    /// What a column that is solved takes off each of the others: L's columns, or its rows, without the diagonal.
    pub(super) others: [[f64; STRIP]; STRIP],
    /// One over the diagonal.
    pub(super) inverse: [f64; STRIP],
}

impl Strip {
    /// One without numbers.
    pub(super) fn empty(width: usize) -> Self {
        Strip { width, others: [[0.0; STRIP]; STRIP], inverse: [0.0; STRIP] }
    }

    /// The strip from row and column `at` on of the lower triangle of `l: [n, n]`, for [`Strip::forward`] and
    /// [`Strip::backward`].
    pub(super) fn both(l: &[f64], n: usize, at: usize) -> [Self; 2] {
        let width = STRIP.min(n - at);
        let (mut forward, mut backward) = (Strip::empty(width), Strip::empty(width));
        for i in 0..width {
            let row = &l[(at + i) * n + at..][..=i];
            for (j, &l) in row[..i].iter().enumerate() {
                forward.others[j][i] = l;
                backward.others[i][j] = l;
            }
            forward.inverse[i] = 1.0 / row[i];
        }
        backward.inverse = forward.inverse;
        [forward, backward]
    }

    /// Replaces each row by x with x·Lᵀ = row.
    pub(super) fn forward(&self, level: Level, rows: &mut [[f64; STRIP]]) {
        let strip = self;
        at_level!(level, eliminated::<false>, (rows: &mut [[f64; STRIP]], strip: &Strip));
    }

    /// Replaces each row by x with x·L = row.
    pub(super) fn backward(&self, level: Level, rows: &mut [[f64; STRIP]]) {
        let strip = self;
        at_level!(level, eliminated::<true>, (rows: &mut [[f64; STRIP]], strip: &Strip));
    }
}

#[inline(always)]
fn eliminated<const LAST_FIRST: bool>(rows: &mut [[f64; STRIP]], strip: &Strip) {
    for rows in rows.chunks_mut(ROWS) {
        for step in 0..STRIP {
            let j = if LAST_FIRST { STRIP - 1 - step } else { step };
            let (others, inverse) = (&strip.others[j], strip.inverse[j]);
            for row in rows.iter_mut() {
                let x = row[j] * inverse;
                for (r, l) in row.iter_mut().zip(others) {
                    *r -= x * l;
                }
                row[j] = x;
            }
        }
    }
}

/// Takes the columns from `at` on out of `rows: [rows, n]`, as many as `before` has rows, less what columns that are solved
/// account for, `done·beforeᵀ`.
pub(super) fn reduced(rows: &[f64], n: usize, at: usize, done: View<'_, f64>, before: View<'_, f64>, tile: &mut Tile) {
    let (height, width) = (done.rows(), before.rows());
    for (tile, row) in tile.iter_mut().zip(rows.chunks_exact(n)).take(height) {
        tile[..width].copy_from_slice(&row[at..][..width]);
    }
    if done.cols() > 0 {
        gemm(-1.0, done, before.t(), 1.0, &mut ViewMut::new(tile.as_flattened_mut(), height, width, STRIP));
    }
}

/// Copies `from: [rows, width]`, as far as it fits, into the columns of `to: [rows, n]` from `at` on.
pub(super) fn put(from: &[f64], width: usize, to: &mut [f64], n: usize, at: usize) {
    let fits = width.min(n - at);
    for (from, to) in from.chunks_exact(width).zip(to.chunks_exact_mut(n)) {
        to[at..][..fits].copy_from_slice(&from[..fits]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_solves_alike_both_ways() {
        for width in [1, 3, 8, 15, 16] {
            let entry = |i: usize, j: usize| if i == j { 2.0 } else { ((i * 7 + j * 3) as f64).sin() };
            let l: Vec<f64> = (0..width * width).map(|i| entry(i / width, i % width)).collect();
            let number = |i: usize, j: usize| if j < width { ((i * STRIP + j) as f64 * 0.7).sin() } else { 0.0 };
            let rows: Vec<[f64; STRIP]> = (0..13).map(|i| std::array::from_fn(|j| number(i, j))).collect();
            let [forward, backward] = Strip::both(&l, width, 0);
            let solved = |by: &dyn Fn(Level, &mut [[f64; STRIP]])| {
                let run = |level| {
                    let mut x = rows.clone();
                    by(level, &mut x);
                    x
                };
                let x = run(Level::Scalar);
                assert!(Level::all().into_iter().all(|level| run(level) == x));
                x
            };
            let (down, up) =
                (solved(&|level, x| forward.forward(level, x)), solved(&|level, x| backward.backward(level, x)));
            for (row, (down, up)) in rows.iter().zip(down.iter().zip(&up)) {
                for i in 0..width {
                    let first: f64 = (0..=i).map(|j| l[i * width + j] * down[j]).sum();
                    let second: f64 = (i..width).map(|j| l[j * width + i] * up[j]).sum();
                    assert!((first - row[i]).abs() < 1e-9 && (second - row[i]).abs() < 1e-9);
                }
            }
        }
    }
}

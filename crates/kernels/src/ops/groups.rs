//! Groups of integer grids, fitted and rounded by the widest instructions the machine has.
//!
//! The arithmetic is [`IntGrid::squares`] or [`IntGrid::covering`], and [`IntGrid::code`], compiled once per instruction set. Nothing in it is fused, so
//! each set gives the same bits.

use super::blocks::Stored;
use crate::Level;
use crate::level::at_level;
use bitmill_scheme::{Fit, GroupParams, IntGrid};
use rayon::prelude::*;

/// Weights of a task, about.
const TASK: usize = 1 << 15;

/// Fits the groups of `len` weights, by [`Fit::Squares`] or [`Fit::MinMax`], in the rows `w`, `[rows, n]`, the last of a row being what is left of it, and writes their
/// parameters, `[rows, n / len]`, and the codes of all weights. Returns Σ(w − ŵ)² and Σ w².
///
/// # Panics
/// When the lengths do not fit, or for another fit: a caller's bug.
pub fn fit_groups(
    level: Level,
    (grid, fit): (IntGrid, Fit<'_>),
    (n, len): (usize, usize),
    w: Stored<'_>,
    params: &mut [GroupParams],
    codes: &mut [u8],
) -> [f64; 2] {
    let searched = match fit {
        Fit::Squares => true,
        Fit::MinMax => false,
        _ => panic!("groups are not fitted by {fit:?} here"),
    };
    let groups = n.div_ceil(len.max(1)).max(1);
    let rows = w.len() / n.max(1);
    assert!(rows * n == w.len() && codes.len() == w.len() && params.len() == rows * groups, "groups of the matrix");
    let height = (TASK / n.max(1)).max(1);
    let parts = codes.par_chunks_mut((height * n).max(1)).zip(params.par_chunks_mut(height * groups)).enumerate();
    let task = |(i, (codes, params)): (usize, (&mut [u8], &mut [GroupParams]))| {
        let task = &Task { grid, searched, n, len, w: w.part(i * height * n, height * n) };
        at_level!(level, fit_rows, (task: &Task<'_>, params: &mut [GroupParams], codes: &mut [u8]) -> [f64; 2])
    };
    let sums: Vec<[f64; 2]> = parts.map(task).collect();
    sums.iter().fold([0.0; 2], |[error, energy], [e, w]| [error + e, energy + w])
}

/// Rows of a matrix.
struct Task<'a> {
    grid: IntGrid,
    /// Whether scales are searched; they cover the weights if not.
    searched: bool,
    n: usize,
    len: usize,
    w: Stored<'a>,
}

/// The definition.
#[inline(always)]
fn fit_rows(task: &Task<'_>, params: &mut [GroupParams], codes: &mut [u8]) -> [f64; 2] {
    let Task { grid, searched, n, len, w } = *task;
    let mut wide = vec![0.0f32; if matches!(w, Stored::Bf16(_)) { n } else { 0 }];
    let mut sums = [0.0; 2];
    let mut params = params.iter_mut();
    for (row, codes) in codes.chunks_mut(n).enumerate() {
        let w = w.part(row * n, n).wide(&mut wide);
        for ((w, codes), to) in w.chunks(len).zip(codes.chunks_mut(len)).zip(&mut params) {
            *to = if searched { grid.squares(w) } else { grid.covering(w) };
            let [error, energy] = grid.code(w, *to, codes);
            sums = [sums[0] + f64::from(error), sums[1] + f64::from(energy)];
        }
    }
    sums
}

/// Parameters of one group `w` by [`Fit::Weighted`], `h` being what a squared error of each weight costs.
#[must_use]
pub fn fit_weighted(level: Level, grid: IntGrid, w: &[f32], h: &[f32]) -> GroupParams {
    at_level!(level, weigh, (grid: IntGrid, w: &[f32], h: &[f32]) -> GroupParams)
}

#[inline(always)]
fn weigh(grid: IntGrid, w: &[f32], h: &[f32]) -> GroupParams {
    grid.weighted(w, h)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitmill_scheme::{Bits, Fit, Grid, ScaleType};

    #[test]
    fn every_level_weighs_as_the_definition_does() {
        let value = |i: usize| ((i as f32 * 0.731).sin() * 1.7).powi(3) + 0.1 * (i as f32 * 0.37).cos();
        for (bits, symmetric) in [(2, true), (3, false), (4, true), (8, false)] {
            let grid = IntGrid { bits: Bits::new(bits).unwrap(), symmetric, scale: ScaleType::Bf16 };
            for len in [1, 15, 32, 100, 128] {
                let w: Vec<f32> = (0..len).map(value).collect();
                let h: Vec<f32> = (0..len).map(|i| value(3 * i + 1).abs() + 0.01).collect();
                let expected = grid.fit(&w, Fit::Weighted(&h));
                for level in Level::all() {
                    assert_eq!(fit_weighted(level, grid, &w, &h), expected, "{level:?} {bits} {len}");
                }
            }
        }
    }

    #[test]
    fn every_level_fits_as_the_definition_does() {
        let value = |i: usize| ((i as f32 * 0.731).sin() * 1.7).powi(3) + 0.1 * (i as f32 * 0.37).cos();
        for (bits, symmetric) in [(2, true), (3, true), (4, true), (4, false), (8, true), (8, false)] {
            for scale in [ScaleType::F32, ScaleType::Bf16] {
                let grid = IntGrid { bits: Bits::new(bits).unwrap(), symmetric, scale };
                for (rows, n, len) in [(1, 1, 1), (3, 32, 32), (2, 130, 64), (600, 100, 100), (5, 257, 128)] {
                    let stored: Vec<[u8; 2]> =
                        (0..rows * n).map(|i| ((value(i).to_bits() >> 16) as u16).to_le_bytes()).collect();
                    let wide: Vec<f32> =
                        stored.iter().map(|&b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)).collect();
                    for (level, fit) in Level::all().into_iter().flat_map(|l| [(l, Fit::Squares), (l, Fit::MinMax)]) {
                        let expected: Vec<GroupParams> =
                            wide.chunks(n).flat_map(|row| row.chunks(len).map(|w| grid.fit(w, fit))).collect();
                        for w in [Stored::F32(&wide), Stored::Bf16(&stored)] {
                            let mut params = vec![GroupParams { scale: 0.0, zero: 0 }; expected.len()];
                            let mut codes = vec![0; wide.len()];
                            let [error, energy] = fit_groups(level, (grid, fit), (n, len), w, &mut params, &mut codes);
                            assert_eq!(params, expected, "{level:?} {bits} {symmetric} {n} {len}");
                            let p = |i: usize| params[i / n * n.div_ceil(len) + i % n / len];
                            let (mut e, mut all) = (0.0f64, 0.0f64);
                            for (i, (&x, &code)) in wide.iter().zip(&codes).enumerate() {
                                assert_eq!(code, grid.nearest(x, p(i)));
                                e += f64::from(x - grid.value(code, p(i))).powi(2);
                                all += f64::from(x).powi(2);
                            }
                            assert!((error - e).abs() <= 1e-5 * all && (energy - all).abs() <= 1e-5 * all);
                        }
                    }
                }
            }
        }
    }
}

//! Moments of every column of a matrix, added to what came before: Σ x, Σ |x|, Σ x⁴ in f64 and the largest magnitude.
//!
//! A column's sums are folded from the first row to the last, whichever columns lie beside it in a register, so every level
//! gives the same bits.

use crate::Level;
use crate::level::at_level;

/// Running moments of some columns.
#[derive(Debug)]
pub struct Moments<'a> {
    /// Σ x.
    pub sum: &'a mut [f64],
    /// Σ |x|.
    pub abs_sum: &'a mut [f64],
    /// Σ x⁴.
    pub fourth_sum: &'a mut [f64],
    /// max |x|.
    pub abs_max: &'a mut [f32],
}

/// Adds the rows of `x`, which start `stride` entries apart and whose first entries are the columns of `moments`.
///
/// # Panics
/// When lengths do not fit: a caller's bug.
pub fn add_moments(level: Level, x: &[f32], stride: usize, moments: &mut Moments<'_>) {
    let n = moments.sum.len();
    let others = [moments.abs_sum.len(), moments.fourth_sum.len(), moments.abs_max.len()];
    assert!(n <= stride && others == [n; 3], "a moment for each column");
    at_level!(level, add, (x: &[f32], stride: usize, moments: &mut Moments<'_>));
}

/// Rows and columns whose entries are in the first cache while their sums are in registers.
const ROWS: usize = 8;
const COLUMNS: usize = 16;

#[inline(always)]
fn add(x: &[f32], stride: usize, moments: &mut Moments<'_>) {
    let n = moments.sum.len();
    for rows in x.chunks(ROWS * stride) {
        let mut from = 0;
        while from + COLUMNS <= n {
            add_columns::<COLUMNS>(rows, stride, from, moments);
            from += COLUMNS;
        }
        for column in from..n {
            add_columns::<1>(rows, stride, column, moments);
        }
    }
}

#[inline(always)]
fn add_columns<const N: usize>(x: &[f32], stride: usize, from: usize, moments: &mut Moments<'_>) {
    let columns = from..from + N;
    let (mut sum, mut abs_sum, mut fourth, mut abs_max) = ([0.0; N], [0.0; N], [0.0; N], [0.0; N]);
    sum.copy_from_slice(&moments.sum[columns.clone()]);
    abs_sum.copy_from_slice(&moments.abs_sum[columns.clone()]);
    fourth.copy_from_slice(&moments.fourth_sum[columns.clone()]);
    abs_max.copy_from_slice(&moments.abs_max[columns.clone()]);
    for row in x.chunks(stride) {
        let row = &row[from..from + N];
        for j in 0..N {
            // Converted once: that takes longer than the arithmetic.
            let (v, size) = (f64::from(row[j]), row[j].abs());
            sum[j] += v;
            abs_sum[j] += v.abs();
            fourth[j] += v * v * (v * v);
            abs_max[j] = if size > abs_max[j] { size } else { abs_max[j] };
        }
    }
    moments.sum[columns.clone()].copy_from_slice(&sum);
    moments.abs_sum[columns.clone()].copy_from_slice(&abs_sum);
    moments.fourth_sum[columns.clone()].copy_from_slice(&fourth);
    moments.abs_max[columns].copy_from_slice(&abs_max);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_gives_the_bits_of_the_definition() {
        for (rows, stride, n) in [(1, 1, 1), (7, 40, 33), (100, 64, 64), (3, 20, 7)] {
            let x: Vec<f32> = (0..rows * stride).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
            // What lies beyond the last column of the last row need not be there.
            let x = &x[..(rows - 1) * stride + n];
            let run = |level| {
                let (mut a, mut b, mut c, mut d) = (vec![0.5; n], vec![0.5; n], vec![0.5; n], vec![0.5f32; n]);
                let mut moments = Moments { sum: &mut a, abs_sum: &mut b, fourth_sum: &mut c, abs_max: &mut d };
                add_moments(level, x, stride, &mut moments);
                (a, b, c, d)
            };
            let found = run(Level::Scalar);
            assert!(Level::all().into_iter().all(|level| run(level) == found));
            for j in 0..n {
                let column = || x.iter().skip(j).step_by(stride).map(|&v| f64::from(v));
                assert!((found.0[j] - 0.5 - column().sum::<f64>()).abs() < 1e-9);
                assert!((found.1[j] - 0.5 - column().map(f64::abs).sum::<f64>()).abs() < 1e-9);
                assert!((found.2[j] - 0.5 - column().map(|v| v.powi(4)).sum::<f64>()).abs() < 1e-3);
                assert!(f64::from(found.3[j]) == column().map(f64::abs).fold(0.5, f64::max));
            }
        }
    }
}

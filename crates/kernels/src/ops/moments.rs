//! Moments of every column of a matrix, added to what came before: Σ x, Σ |x|, Σ x⁴ in f64 and the largest magnitude.
//!
//! A column's sums are folded from the first row to the last, sixteen rows at a time in f32 before f64 takes them, whichever
//! columns lie beside it in a register, so every level gives the same bits. What sixteen add up to is off by 1e-6 of their
//! magnitudes, at most; fourth powers of what is beyond 10⁹ are infinite.

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

/// Rows whose sums are in f32.
pub const MOMENT_ROWS: usize = 16;
/// Columns whose sums are in registers.
const COLUMNS: usize = 16;

#[inline(always)]
fn add(x: &[f32], stride: usize, moments: &mut Moments<'_>) {
    let n = moments.sum.len();
    for rows in x.chunks(MOMENT_ROWS * stride) {
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
    let (mut sum, mut abs_sum, mut fourth, mut abs_max) = ([0.0f32; N], [0.0f32; N], [0.0f32; N], [0.0f32; N]);
    abs_max.copy_from_slice(&moments.abs_max[columns.clone()]);
    for row in x.chunks(stride) {
        let row = &row[from..from + N];
        for j in 0..N {
            let (v, size) = (row[j], row[j].abs());
            let square = v * v;
            sum[j] += v;
            abs_sum[j] += size;
            fourth[j] += square * square;
            abs_max[j] = if size > abs_max[j] { size } else { abs_max[j] };
        }
    }
    fold(&mut moments.sum[columns.clone()], &sum);
    fold(&mut moments.abs_sum[columns.clone()], &abs_sum);
    fold(&mut moments.fourth_sum[columns.clone()], &fourth);
    moments.abs_max[columns].copy_from_slice(&abs_max);
}

#[inline(always)]
fn fold<const N: usize>(all: &mut [f64], sums: &[f32; N]) {
    for (all, &sum) in all.iter_mut().zip(sums) {
        *all += f64::from(sum);
    }
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
                let column: Vec<f32> = x.iter().skip(j).step_by(stride).copied().collect();
                let sum = |of: &dyn Fn(f64) -> f64| column.iter().map(|&v| of(f64::from(v))).sum::<f64>();
                let near = |found: f64, sum: f64, size: f64| assert!((found - 0.5 - sum).abs() <= 1e-6 * size);
                near(found.0[j], sum(&|v| v), sum(&f64::abs));
                near(found.1[j], sum(&f64::abs), sum(&f64::abs));
                near(found.2[j], sum(&|v| v.powi(4)), sum(&|v| v.powi(4)));
                let sixteen = |rows: &[f32]| f64::from(rows.iter().fold(0.0f32, |sum, v| sum + v));
                assert_eq!(found.0[j], column.chunks(16).fold(0.5, |sum, rows| sum + sixteen(rows)));
                assert_eq!(found.3[j], column.iter().fold(0.5f32, |most, v| most.max(v.abs())));
            }
        }
    }
}

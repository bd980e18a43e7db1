//! Cholesky factorisation A = L·Lᵀ of a symmetric positive definite matrix.
//!
//! Right-looking by blocks of columns: factor a diagonal block, solve the panel below it, subtract the panel's product
//! from what remains. The last step does nearly all multiply-adds and is a [`gemm`] per band of rows. Rows and bands are
//! shared among threads, but each entry is folded in one order, so L is the same bits at any thread count.

use super::matrix::{View, ViewMut, gemm};
use crate::Level;
use crate::level::at_level;
use rayon::prelude::*;

/// Columns of a block: large enough for the product, small enough that the serial diagonal costs little.
const BLOCK: usize = 64;
/// Rows of the remainder that one thread updates at a time.
const BAND: usize = 64;

/// Replaces the lower triangle of the row-major `a: [n, n]` by L; what lies above the diagonal is left undefined.
/// Returns `false`, with `a` half done, where a pivot is not a positive finite number.
///
/// # Panics
/// When the length does not fit `n`: a caller's bug.
pub fn cholesky(a: &mut [f64], n: usize) -> bool {
    assert_eq!(a.len(), n * n, "matrix shape");
    let mut panel = Vec::new();
    for start in (0..n).step_by(BLOCK) {
        let width = BLOCK.min(n - start);
        let end = start + width;
        if !diagonal(a, n, start, end) {
            return false;
        }
        let (above, below) = a.split_at_mut(end * n);
        let columns: Vec<f64> =
            (0..width * width).map(|i| above[(start + i % width) * n + start + i / width]).collect();
        let rows = n - end;
        // The panel is read by every band while its rows are being written.
        panel.resize(rows * width, 0.0);
        let chunks = below.par_chunks_mut(BAND * n).zip(panel.par_chunks_mut((BAND * width).max(1)));
        chunks.for_each(|(below, panel)| {
            for (row, panel) in below.chunks_exact_mut(n).zip(panel.chunks_exact_mut(width)) {
                let row = &mut row[start..end];
                eliminate(Level::best(), row, &columns);
                panel.copy_from_slice(row);
            }
        });
        below.par_chunks_mut(BAND * n).enumerate().for_each(|(i, band)| {
            let (first, height) = (i * BAND, band.len() / n);
            let own = View::new(&panel[first * width..], height, width, width);
            let all = View::new(&panel, (first + height).min(rows), width, width);
            let target = &mut band[end..];
            gemm(-1.0, own, all.t(), 1.0, &mut ViewMut::new(target, height, first + height, n));
        });
    }
    true
}

/// Replaces a row by x with L·x = row, for the columns of a lower triangular L, `[width, width]`.
fn eliminate(level: Level, row: &mut [f64], columns: &[f64]) {
    at_level!(level, eliminated, (row: &mut [f64], columns: &[f64]));
}

#[inline(always)]
fn eliminated(row: &mut [f64], columns: &[f64]) {
    let width = row.len();
    for (j, l) in columns.chunks_exact(width).enumerate() {
        let (x, rest) = row[j..].split_at_mut(1);
        x[0] /= l[j];
        for (r, l) in rest.iter_mut().zip(&l[j + 1..]) {
            *r -= x[0] * l;
        }
    }
}

/// Factors the block `[start, end)` on the diagonal, one column after another.
fn diagonal(a: &mut [f64], n: usize, start: usize, end: usize) -> bool {
    for j in start..end {
        for i in j..end {
            let sum: f64 = (start..j).map(|k| a[i * n + k] * a[j * n + k]).sum();
            let value = a[i * n + j] - sum;
            if i > j {
                a[i * n + j] = value / a[j * n + j];
            } else if value > 0.0 && value.is_finite() {
                a[i * n + i] = value.sqrt();
            } else {
                return false;
            }
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    /// AᵀA of a fixed well-conditioned A.
    fn positive(n: usize) -> Vec<f64> {
        let x: Vec<f64> = (0..n * n)
            .map(|i| ((i * 7919 + 13) % 1009) as f64 / 1009.0 - 0.5 + if i % (n + 1) == 0 { 3.0 } else { 0.0 })
            .collect();
        let mut a = vec![0.0; n * n];
        let x = View::new(&x, n, n, n);
        gemm(1.0, x.t(), x, 0.0, &mut ViewMut::new(&mut a, n, n, n));
        a
    }

    #[test]
    fn the_factor_multiplies_to_the_matrix() {
        for n in [1, 2, 63, 64, 65, 130, 300] {
            let a = positive(n);
            let mut l = a.clone();
            assert!(cholesky(&mut l, n));
            for i in 0..n {
                for j in 0..=i {
                    let sum: f64 = (0..=j).map(|k| l[i * n + k] * l[j * n + k]).sum();
                    assert!((sum - a[i * n + j]).abs() < 1e-9 * a[i * n + i].max(1.0), "n {n}: {i},{j}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_positive_definite_is_refused() {
        let n = 100;
        for (at, value) in [(50, -1.0), (99, 0.0), (3, f64::NAN)] {
            let mut a = positive(n);
            a[at * n + at] = value;
            assert!(!cholesky(&mut a, n));
        }
    }

    #[test]
    fn every_level_eliminates_alike() {
        for width in [1, 3, 8, 64] {
            let (l, row) = (positive(width), (0..width).map(|i| (i as f64 * 0.7).sin()).collect::<Vec<_>>());
            let run = |level| {
                let mut x = row.clone();
                eliminate(level, &mut x, &l);
                x
            };
            let x = run(Level::Scalar);
            assert!(Level::all().into_iter().all(|level| run(level) == x));
            for i in 0..width {
                let sum: f64 = (0..=i).map(|j| l[j * width + i] * x[j]).sum();
                assert!((sum - row[i]).abs() < 1e-9);
            }
        }
    }

    #[test]
    fn threads_change_nothing() {
        let n = 333;
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut a = positive(n);
            assert!(pool.install(|| cholesky(&mut a, n)));
            (0..n).flat_map(|i| a[i * n..i * n + i + 1].to_vec()).collect::<Vec<_>>()
        };
        let one = run(1);
        assert!([2, 3, 8].iter().all(|&t| run(t) == one));
    }
}

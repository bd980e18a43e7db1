//! Systems of equations whose matrix is factored, for many right-hand sides.
//!
//! By blocks of columns: what is already solved is taken off by a [`gemm`], which does nearly all multiply-adds, and the
//! triangle on the diagonal is solved for each row by itself. Bands of rows are shared among threads and each row is
//! folded in one order, so results are the same bits at any thread count.

use super::matrix::{View, ViewMut, gemm};
use rayon::prelude::*;

/// Columns of a block, as in the factorisation.
const BLOCK: usize = 64;
/// Right-hand sides of one task.
const BAND: usize = 64;

/// Replaces each row b of `rows: [rows, n]` by x with x·L·Lᵀ = b, where the lower triangle of `l: [n, n]` holds L as
/// [`cholesky`](super::cholesky::cholesky) leaves it.
///
/// # Panics
/// When the lengths do not fit `n`: a caller's bug.
pub fn solve(l: &[f64], n: usize, rows: &mut [f64]) {
    assert!(l.len() == n * n && rows.len().is_multiple_of(n.max(1)), "matrix shape");
    let starts: Vec<usize> = (0..n).step_by(BLOCK).collect();
    rows.par_chunks_mut(BAND * n.max(1)).for_each(|band| {
        let mut block = Vec::with_capacity(BAND * BLOCK);
        for &start in &starts {
            let end = (start + BLOCK).min(n);
            let solved = View::new(&l[start * n..], end - start, start, n).t();
            take_off(band, n, (start, end), 0, solved, &mut block);
            for row in band.chunks_exact_mut(n) {
                for j in start..end {
                    let l = &l[j * n..=j * n + j];
                    let sum: f64 = row[start..j].iter().zip(&l[start..j]).map(|(x, l)| x * l).sum();
                    row[j] = (row[j] - sum) / l[j];
                }
            }
        }
        for &start in starts.iter().rev() {
            let end = (start + BLOCK).min(n);
            if end < n {
                let solved = View::new(&l[end * n + start..], n - end, end - start, n);
                take_off(band, n, (start, end), end, solved, &mut block);
            }
            for row in band.chunks_exact_mut(n) {
                for j in (start..end).rev() {
                    let l = &l[j * n..=j * n + j];
                    let x = row[j] / l[j];
                    row[j] = x;
                    row[start..j].iter_mut().zip(&l[start..j]).for_each(|(y, l)| *y -= x * l);
                }
            }
        }
    });
}

/// Subtracts the columns of `band` from `from` on, times `factor`, from its columns `[start, end)`.
fn take_off(
    band: &mut [f64],
    n: usize,
    (start, end): (usize, usize),
    from: usize,
    factor: View<'_, f64>,
    block: &mut Vec<f64>,
) {
    let (height, width) = (band.len() / n, end - start);
    if factor.rows() == 0 {
        return;
    }
    // The product reads the band while it writes to it, so it writes elsewhere first.
    block.clear();
    band.chunks_exact(n).for_each(|row| block.extend_from_slice(&row[start..end]));
    let solved = View::new(&band[from..], height, factor.rows(), n);
    gemm(-1.0, solved, factor, 1.0, &mut ViewMut::new(block, height, width, width));
    band.chunks_exact_mut(n).zip(block.chunks_exact(width)).for_each(|(row, b)| row[start..end].copy_from_slice(b));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cholesky;

    #[test]
    fn solutions_give_back_the_right_hand_sides_at_any_thread_count() {
        for (n, rows) in [(1, 1), (2, 3), (63, 65), (64, 1), (65, 64), (200, 130)] {
            let value = |i: usize| ((i * 7919 + 13) % 1009) as f64 / 1009.0 - 0.5;
            let x: Vec<f64> = (0..n * n).map(|i| value(i) + if i % (n + 1) == 0 { 3.0 } else { 0.0 }).collect();
            let mut a = vec![0.0; n * n];
            gemm(1.0, View::new(&x, n, n, n).t(), View::new(&x, n, n, n), 0.0, &mut ViewMut::new(&mut a, n, n, n));
            let mut l = a.clone();
            assert!(cholesky(&mut l, n));
            let b: Vec<f64> = (0..rows * n).map(|i| value(3 * i + 1)).collect();
            let run = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut x = b.clone();
                pool.install(|| solve(&l, n, &mut x));
                x
            };
            let x = run(1);
            assert_eq!(x, run(3));
            for (x, b) in x.chunks(n).zip(b.chunks(n)) {
                for (j, b) in b.iter().enumerate() {
                    let sum: f64 = x.iter().enumerate().map(|(k, x)| x * a[k * n + j]).sum();
                    assert!((sum - b).abs() < 1e-10, "{n} {rows}: {sum} {b}");
                }
            }
        }
    }
}

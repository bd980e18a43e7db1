//! Systems of equations whose matrix is factored, for many right-hand sides.
//!
//! By blocks of columns, and in them by strips: what is already solved is taken off by a [`gemm`], which does nearly all
//! multiply-adds, and loops solve for the triangle of a strip. Bands of rows are shared among threads and each row is
//! folded in one order, so results are the same bits at any thread count.

use super::matrix::{View, ViewMut, gemm};
use super::triangle::{MOST, STRIP, Strip, put, reduced};
use crate::Level;
use rayon::prelude::*;

/// Columns of a block: a number of strips.
const BLOCK: usize = 64;
/// Right-hand sides of one task, of so many: large enough for products, and enough tasks for all threads.
const fn band_of(rows: usize) -> usize {
    if rows < 16 * MOST { 64 } else { MOST }
}

/// Replaces each row b of `rows: [rows, n]` by x with x·L·Lᵀ = b, where the lower triangle of `l: [n, n]` holds L as
/// [`cholesky`](super::cholesky::cholesky) leaves it.
///
/// # Panics
/// When the lengths do not fit `n`: a caller's bug.
pub fn solve(l: &[f64], n: usize, rows: &mut [f64]) {
    assert!(l.len() == n * n && rows.len().is_multiple_of(n.max(1)), "matrix shape");
    let starts: Vec<usize> = (0..n).step_by(BLOCK).collect();
    let strips: Vec<[Strip; 2]> = (0..n).step_by(STRIP).map(|at| Strip::both(l, n, at)).collect();
    let band = band_of(rows.len() / n.max(1));
    rows.par_chunks_mut(band * n.max(1)).for_each(|band| {
        let height = band.len() / n;
        let mut block = Vec::with_capacity(height * BLOCK);
        let mut tile = [[0.0; STRIP]; MOST];
        for &start in &starts {
            let end = (start + BLOCK).min(n);
            let width = end - start;
            take_off(band, n, (start, end), 0, View::new(&l[start * n..], width, start, n).t(), &mut block);
            let corner = View::new(&l[start * n + start..], width, width, n);
            for from in (0..width).step_by(STRIP) {
                let [strip, _] = &strips[(start + from) / STRIP];
                let before = corner.some_rows(from..from + strip.width).t().some_rows(0..from).t();
                reduced(&block, width, from, View::new(&block, height, from, width), before, &mut tile);
                strip.forward(Level::best(), &mut tile[..height]);
                put(&tile.as_flattened()[..height * STRIP], STRIP, &mut block, width, from);
            }
            put(&block, width, band, n, start);
        }
        for &start in starts.iter().rev() {
            let end = (start + BLOCK).min(n);
            let width = end - start;
            take_off(band, n, (start, end), end, View::new(&l[start..], n, width, n).some_rows(end..n), &mut block);
            let corner = View::new(&l[start * n + start..], width, width, n);
            for from in (0..width).step_by(STRIP).rev() {
                let [_, strip] = &strips[(start + from) / STRIP];
                let next = from + strip.width;
                let after = corner.some_rows(next..width).t().some_rows(from..next);
                let done = View::new(&block, height, width, width).t().some_rows(next..width).t();
                reduced(&block, width, from, done, after, &mut tile);
                strip.backward(Level::best(), &mut tile[..height]);
                put(&tile.as_flattened()[..height * STRIP], STRIP, &mut block, width, from);
            }
            put(&block, width, band, n, start);
        }
    });
}

/// Puts the columns `[start, end)` of `band`, less its columns from `from` on times `factor`, into `block`.
fn take_off(
    band: &[f64],
    n: usize,
    (start, end): (usize, usize),
    from: usize,
    factor: View<'_, f64>,
    block: &mut Vec<f64>,
) {
    let (height, width) = (band.len() / n, end - start);
    block.clear();
    band.chunks_exact(n).for_each(|row| block.extend_from_slice(&row[start..end]));
    if factor.rows() > 0 {
        let solved = View::new(&band[from..], height, factor.rows(), n);
        gemm(-1.0, solved, factor, 1.0, &mut ViewMut::new(block, height, width, width));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cholesky;

    #[test]
    fn solutions_give_back_the_right_hand_sides_at_any_thread_count() {
        for (n, rows) in [(1, 1), (2, 3), (17, 2050), (63, 65), (64, 1), (65, 64), (200, 130)] {
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

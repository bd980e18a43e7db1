//! Cholesky factorisation A = L·Lᵀ of a symmetric positive definite matrix.
//!
//! Right-looking by blocks of columns: factor a diagonal block, solve the panel below it, subtract the panel's product
//! from what remains. The last step does nearly all multiply-adds and is a [`gemm`] per band of rows; of the others, loops do
//! what lies within a strip of columns, and products the rest. Bands are shared among threads, but each entry is folded in
//! one order, so L is the same bits at any thread count.

use super::matrix::{View, ViewMut, gemm};
use super::triangle::{MOST, STRIP, Strip, put, reduced};
use crate::Level;
use crate::team::{awake, fill_chunks};

/// Width from which on steps are worth sharing, and keeping threads awake between them.
const WIDE: usize = 576;

/// Columns of a block, and rows of the remainder that one thread updates at a time: large enough for the product, small enough
/// that the serial diagonal, and what bands compute beyond it, cost little.
const fn block_of(n: usize) -> usize {
    if n < 1536 { 64 } else { MOST }
}

/// Replaces the lower triangle of the row-major `a: [n, n]` by L; what lies above the diagonal is left undefined.
/// Returns `false`, with `a` half done, where a pivot is not a positive finite number.
///
/// # Panics
/// When the length does not fit `n`: a caller's bug.
pub fn cholesky(a: &mut [f64], n: usize) -> bool {
    assert_eq!(a.len(), n * n, "matrix shape");
    if n < WIDE { factor(a, n) } else { awake(|| factor(a, n)) }
}

fn factor(a: &mut [f64], n: usize) -> bool {
    let (block, worth) = (block_of(n), usize::from(n >= WIDE));
    // The columns of the block that are done, as products read them.
    let (mut top, mut panel) = (Vec::new(), Vec::new());
    for start in (0..n).step_by(block) {
        let width = block.min(n - start);
        let end = start + width;
        let (above, below) = a.split_at_mut(end * n);
        let own = &mut above[start * n..];
        top.resize(width * width, 0.0);
        let Some(strips) = diagonal(own, n, start, &mut top) else {
            return false;
        };
        put(&top, width, own, n, start);
        let rows = n - end;
        panel.resize(rows * width, 0.0);
        fill_chunks(&mut panel, block * width, worth * rows * width * width / 2, |i, panel| {
            let (band, height) = (&below[i * block * n..], panel.len() / width);
            let mut tile = [[0.0; STRIP]; MOST];
            for (i, strip) in strips.iter().enumerate() {
                let from = i * STRIP;
                let before = View::new(&top[from * width..], strip.width, from, width);
                reduced(band, n, start + from, View::new(panel, height, from, width), before, &mut tile);
                strip.forward(Level::best(), &mut tile[..height]);
                put(&tile.as_flattened()[..height * STRIP], STRIP, panel, width, from);
            }
        });
        fill_chunks(below, block * n, worth * rows * rows * width / 2, |i, band| {
            let (first, height) = (i * block, band.len() / n);
            let own = &panel[first * width..][..height * width];
            put(own, width, band, n, start);
            let all = View::new(&panel, (first + height).min(rows), width, width);
            let target = &mut ViewMut::new(&mut band[end..], height, first + height, n);
            gemm(-1.0, View::new(own, height, width, width), all.t(), 1.0, target);
        });
    }
    true
}

/// Writes the columns of L from `start` on in the rows `a` of the block on the diagonal to `top: [width, width]`. `None` where a
/// pivot is not a positive finite number.
fn diagonal(a: &[f64], n: usize, start: usize, top: &mut [f64]) -> Option<Vec<Strip>> {
    let width = a.len() / n;
    let mut tile = [[0.0; STRIP]; MOST];
    let mut strips = Vec::with_capacity(width.div_ceil(STRIP));
    for from in (0..width).step_by(STRIP) {
        let (height, count) = (width - from, STRIP.min(width - from));
        let top = &mut top[from * width..];
        let done = View::new(top, height, from, width);
        reduced(&a[from * n..], n, start + from, done, done.some_rows(0..count), &mut tile);
        let strip = triangle(&mut tile[..count])?;
        strip.forward(Level::best(), &mut tile[count..height]);
        put(&tile.as_flattened()[..height * STRIP], STRIP, top, width, from);
        strips.push(strip);
    }
    Some(strips)
}

/// Factors as many columns as there are rows, one after another.
fn triangle(rows: &mut [[f64; STRIP]]) -> Option<Strip> {
    let mut strip = Strip::empty(rows.len());
    for j in 0..rows.len() {
        let (before, own) = strip.others.split_at_mut(j);
        for (i, row) in rows.iter_mut().enumerate().skip(j) {
            let sum: f64 = before.iter().map(|column| column[i] * column[j]).sum();
            let value = row[j] - sum;
            if i > j {
                row[j] = value * strip.inverse[j];
                own[0][i] = row[j];
            } else if value > 0.0 && value.is_finite() {
                row[j] = value.sqrt();
                strip.inverse[j] = 1.0 / row[j];
            } else {
                return None;
            }
        }
    }
    Some(strip)
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
        for n in [1, 2, 15, 16, 17, 63, 64, 65, 130, 300, 1600] {
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

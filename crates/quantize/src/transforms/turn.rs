//! Orthogonal matrices as something to do to rows: signs and a fast Hadamard transform, in blocks where the width has
//! none, after a dense basis where one is given.

use super::SiteMoments;
use bitmill_calibrate::splitmix;
use bitmill_kernels::{Hadamard, View, ViewMut, gemm};
use rayon::prelude::*;
use std::sync::Arc;

/// Rows of one task.
const ROWS: usize = 32;

/// An orthogonal matrix T of width n; rows v of coordinates become T·v.
#[derive(Debug, Clone)]
pub(crate) struct Turn {
    n: usize,
    /// Columns are the vectors of a basis `[n, n]`: coordinates in it are taken first.
    basis: Option<Arc<Vec<f64>>>,
    signs: Vec<f64>,
    hadamard: Hadamard,
}

impl Turn {
    /// Random signs by `seed` (0 leaves all positive), then the Hadamard transform of width `n`, or of blocks of the
    /// largest width that divides `n` and has one.
    pub(crate) fn new(n: usize, seed: u64, basis: Option<Arc<Vec<f64>>>) -> Self {
        let sign = |i: usize| match seed {
            0 => 1.0,
            _ if splitmix(splitmix(seed) ^ i as u64) & 1 == 0 => 1.0,
            _ => -1.0,
        };
        let widths = (1..=n).rev().filter(|&w| n.is_multiple_of(w));
        let hadamard = widths.filter_map(Hadamard::new).next();
        // Width 1 divides everything and always has a transform.
        let Some(hadamard) = hadamard else { unreachable!("no Hadamard transform of width 1") };
        Turn { n, basis, signs: (0..n).map(sign).collect(), hadamard }
    }

    /// Replaces every row v of `x: [rows, n]` by T·v.
    pub(crate) fn rows(&self, x: &mut [f64]) {
        x.par_chunks_mut(ROWS * self.n).for_each(|x| {
            if let Some(basis) = &self.basis {
                let rows = x.len() / self.n;
                let mut out = vec![0.0; x.len()];
                let (a, b) = (View::new(x, rows, self.n, self.n), View::new(basis, self.n, self.n, self.n));
                gemm(1.0, a, b, 0.0, &mut ViewMut::new(&mut out, rows, self.n, self.n));
                x.copy_from_slice(&out);
            }
            let mut scratch = vec![0.0; self.hadamard.scratch()];
            for row in x.chunks_exact_mut(self.n) {
                row.iter_mut().zip(&self.signs).for_each(|(v, s)| *v *= s);
                self.hadamard.apply(row, &mut scratch);
            }
        });
    }

    /// The rows of an f32 matrix, computed in f64.
    pub(crate) fn rows_of(&self, x: &mut [f32]) {
        let mut wide: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
        self.rows(&mut wide);
        x.iter_mut().zip(wide).for_each(|(x, v)| *x = v as f32);
    }

    /// The columns of an f32 matrix `[n, cols]`.
    pub(crate) fn columns_of(&self, x: &mut [f32]) {
        let cols = x.len() / self.n;
        let mut wide = vec![0.0f64; x.len()];
        for (i, row) in x.chunks_exact(cols).enumerate() {
            row.iter().enumerate().for_each(|(j, &v)| wide[j * self.n + i] = f64::from(v));
        }
        self.rows(&mut wide);
        for (i, row) in x.chunks_exact_mut(cols).enumerate() {
            row.iter_mut().enumerate().for_each(|(j, v)| *v = wide[j * self.n + i] as f32);
        }
    }

    /// T·H·Tᵀ for the moments of T·x, where x falls into parts of width n.
    pub(crate) fn moments(&self, site: &mut SiteMoments) {
        let width = site.abs_max.len();
        // Row i of H becomes T times itself; then, H being symmetric, the same for the columns.
        self.rows_of(&mut site.h);
        transpose(&mut site.h, width);
        self.rows_of(&mut site.h);
        for part in site.abs_max.chunks_exact_mut(self.n) {
            let norm = part.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt() as f32;
            part.fill(norm);
        }
    }
}

fn transpose(x: &mut [f32], n: usize) {
    for i in 0..n {
        for j in 0..i {
            x.swap(i * n + j, j * n + i);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_orthogonal_at_every_width() {
        // Oracle 3 as the transforms use it; 86 = 2·43 has no transform of its own and is turned in blocks.
        for n in [2usize, 12, 24, 64, 86, 96] {
            let turn = Turn::new(n, 7, None);
            let mut t: Vec<f64> = (0..n * n).map(|i| f64::from(u8::from(i % (n + 1) == 0))).collect();
            turn.rows(&mut t);
            for i in 0..n {
                for j in 0..n {
                    let dot: f64 = (0..n).map(|k| t[i * n + k] * t[j * n + k]).sum();
                    assert!((dot - f64::from(u8::from(i == j))).abs() < 1e-12, "width {n}");
                }
            }
        }
    }

    #[test]
    fn kurtosis_of_heavy_tails_drops_to_that_of_a_gaussian() {
        // Oracle 23.
        let (n, rows) = (128, 64);
        let mut x: Vec<f64> = (0..rows * n)
            .map(|i| {
                let u = (splitmix(i as u64) >> 11) as f64 / (1u64 << 53) as f64 - 0.5;
                // Cubes of uniform numbers.
                u * u * u
            })
            .collect();
        let kurtosis = |x: &[f64]| {
            let mean = |p: i32| x.iter().map(|v| v.powi(p)).sum::<f64>() / x.len() as f64;
            mean(4) / mean(2).powi(2)
        };
        assert!(kurtosis(&x) > 3.7);
        Turn::new(n, 3, None).rows(&mut x);
        assert!((kurtosis(&x) - 3.0).abs() < 0.2, "{}", kurtosis(&x));
    }
}

//! The factor of H that error feedback runs on: H = Ũ·D·Ũᵀ with Ũ unit upper triangular.
//!
//! For a target W and rounded Ŵ, Δ = Ŵ − W, the proxy loss splits into tr(ΔHΔᵀ) = Σ_k D_k·‖(ΔŨ)_k‖², and (ΔŨ)_k depends
//! only on columns up to k. Rounding column k to the grid value nearest to w_k − Σ_{j<k} Δ_j·Ũ_jk is therefore the best
//! greedy choice: LDLQ (QuIP), and the same assignment as GPTQ, without inverting H (methods part 1.3).

use bitmill_kernels::cholesky;
use rayon::prelude::*;

/// The factors of a damped, permuted H.
#[derive(Debug, Clone)]
pub struct Factor {
    n: usize,
    /// Ũ, row-major `[n, n]`; ones on the diagonal, zeros below.
    unit: Vec<f32>,
    /// D.
    diagonal: Vec<f32>,
    damping: f32,
}

impl Factor {
    /// Factors `h: [n, n]` with rows and columns in `order`, after adding `damping` times the mean diagonal. The
    /// damping is raised tenfold while the matrix is not numerically positive definite.
    ///
    /// Inputs that were never active (a zero on the diagonal) get the mean diagonal, so their weights are rounded to
    /// nearest instead of being moved by noise.
    ///
    /// # Errors
    /// The last damping tried, when even that of the mean diagonal itself does not suffice.
    pub fn new(h: &[f32], order: &[u32], damping: f32) -> Result<Self, f32> {
        let n = order.len();
        let mean = mean_diagonal(h, n);
        let mut damping = damping;
        loop {
            if let Some(factor) = Factor::attempt(h, order, damping, mean) {
                return Ok(factor);
            }
            if damping >= 1.0 {
                return Err(damping);
            }
            damping = (damping * 10.0).clamp(1e-4, 1.0);
        }
    }

    fn attempt(h: &[f32], order: &[u32], damping: f32, mean: f64) -> Option<Self> {
        let n = order.len();
        // Cholesky gives H = L·Lᵀ with L lower; of the matrix with rows and columns reversed it gives the upper one.
        let at = |i: usize| order[n - 1 - i] as usize;
        let mut m = vec![0.0f64; n * n];
        m.par_chunks_exact_mut(n).enumerate().for_each(|(i, row)| {
            let h = &h[at(i) * n..][..n];
            row.iter_mut().take(i + 1).enumerate().for_each(|(j, m)| *m = f64::from(h[at(j)]));
            row[i] = raised(row[i], mean, damping);
        });
        if !cholesky(&mut m, n) {
            return None;
        }
        let pivots: Vec<f64> = (0..n).rev().map(|i| m[i * n + i]).collect();
        let diagonal = pivots.iter().map(|pivot| (pivot * pivot) as f32).collect();
        let mut unit = vec![0.0f32; n * n];
        let finite = unit.par_chunks_exact_mut(n).zip(m.par_chunks_exact(n).rev()).enumerate().map(|(i, (unit, m))| {
            let row = unit.iter_mut().zip(m.iter().rev()).zip(&pivots).skip(i);
            row.fold(true, |finite, ((u, m), pivot)| {
                *u = (m / pivot) as f32;
                finite & u.is_finite()
            })
        });
        finite.reduce(|| true, |a, b| a & b).then_some(Factor { n, unit, diagonal, damping })
    }

    /// Width of H.
    #[must_use]
    pub fn width(&self) -> usize {
        self.n
    }

    /// Ũ, row-major `[n, n]`.
    #[must_use]
    pub fn unit(&self) -> &[f32] {
        &self.unit
    }

    /// D: what a squared rounding error of each column costs once later columns have compensated for it.
    #[must_use]
    pub fn diagonal(&self) -> &[f32] {
        &self.diagonal
    }

    /// The damping that was needed.
    #[must_use]
    pub fn damping(&self) -> f32 {
        self.damping
    }
}

/// H with `damping` times its mean diagonal added, and the mean diagonal where an input was never active.
pub(crate) fn damped<T: From<f32> + Copy + Send>(h: &[f32], n: usize, damping: f32) -> Vec<T> {
    let mean = mean_diagonal(h, n);
    let mut out: Vec<T> = h.par_iter().map(|&v| T::from(v)).collect();
    for (d, h) in out.iter_mut().step_by(n + 1).zip(h.iter().step_by(n + 1)) {
        *d = T::from(raised(f64::from(*h), mean, damping) as f32);
    }
    out
}

/// A damped diagonal entry; NaN stays NaN, for the factorisation to refuse.
fn raised(d: f64, mean: f64, damping: f32) -> f64 {
    (if d <= 0.0 { mean } else { d }) + f64::from(damping) * mean
}

/// Mean of the diagonal; 1 for an H of zeros, which then stands for plain rounding.
fn mean_diagonal(h: &[f32], n: usize) -> f64 {
    let mean = (0..n).map(|i| f64::from(h[i * n + i])).sum::<f64>() / n as f64;
    if mean > 0.0 { mean } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sweep::tests::random_h;

    #[test]
    fn the_factors_multiply_to_h() {
        // Oracle 2: D and Ũ reproduce H; Π D = det H; tr D ≤ tr H; H = I gives D = I.
        let n = 24;
        let h = random_h(n, 3);
        let order: Vec<u32> = (0..n as u32).map(|i| (i * 7) % n as u32).collect();
        let f = Factor::new(&h, &order, 0.0).unwrap();
        for i in 0..n {
            for j in 0..n {
                let sum: f64 = (0..n)
                    .map(|k| f64::from(f.unit[i * n + k]) * f64::from(f.diagonal[k]) * f64::from(f.unit[j * n + k]))
                    .sum();
                let expected = f64::from(h[order[i] as usize * n + order[j] as usize]);
                assert!((sum - expected).abs() < 1e-4, "{i},{j}: {sum} {expected}");
            }
        }
        let trace: f32 = (0..n).map(|i| h[i * n + i]).sum();
        assert!(f.diagonal.iter().sum::<f32>() <= trace);
        // The determinant by Gaussian elimination.
        let mut m: Vec<f64> = h.iter().map(|&v| f64::from(v)).collect();
        let mut log_det = 0.0;
        for p in 0..n {
            log_det += m[p * n + p].ln();
            for i in p + 1..n {
                let f = m[i * n + p] / m[p * n + p];
                for j in p..n {
                    m[i * n + j] -= f * m[p * n + j];
                }
            }
        }
        let log_d: f64 = f.diagonal.iter().map(|&d| f64::from(d).ln()).sum();
        assert!((log_det - log_d).abs() < 1e-3, "{log_det} {log_d}");

        let identity: Vec<f32> = (0..n * n).map(|i| f32::from(u8::from(i % (n + 1) == 0))).collect();
        let f = Factor::new(&identity, &order, 0.0).unwrap();
        assert_eq!(f.diagonal, vec![1.0; n]);
        assert_eq!(f.unit, identity);
    }

    #[test]
    fn d_is_the_inverse_square_of_gptqs_factor() {
        // Oracle 2: UᵀU = H⁻¹ and D_i = 1/U_ii².
        let n = 12;
        let h = random_h(n, 5);
        let order: Vec<u32> = (0..n as u32).collect();
        let f = Factor::new(&h, &order, 0.0).unwrap();
        let u = crate::sweep::tests::gptq_factor(&h, n);
        for i in 0..n {
            assert!((f64::from(f.diagonal[i]) * u[i * n + i].powi(2) - 1.0).abs() < 1e-4);
        }
    }

    #[test]
    fn degenerate_inputs_are_damped_until_they_factor() {
        // Rank one with a dead input, no damping asked for.
        let n = 8;
        let v: Vec<f32> = (0..n).map(|i| if i == 3 { 0.0 } else { i as f32 + 1.0 }).collect();
        let h: Vec<f32> = (0..n * n).map(|i| v[i / n] * v[i % n]).collect();
        let order: Vec<u32> = (0..n as u32).collect();
        let f = Factor::new(&h, &order, 0.0).unwrap();
        assert!(f.damping() > 0.0 && f.damping() <= 0.01);
        assert!(f.diagonal.iter().all(|&d| d > 0.0));
        assert_eq!(Factor::new(&vec![0.0; n * n], &order, 0.01).unwrap().diagonal, vec![1.01; n]);
        assert!(Factor::new(&vec![f32::NAN; n * n], &order, 0.01).is_err());
        assert_eq!(damped::<f32>(&h, n, 0.5)[3 * n + 3], 1.5 * mean_diagonal(&h, n) as f32);
    }
}

//! Scales of groups, refitted to the codes they multiply.

use super::dot;
use bitmill_kernels::{View, ViewMut, gemm};

/// Rows of a matrix whose scales are refitted.
pub(super) struct Rows<'a> {
    /// G = (Ŵ−W)·H, `[rows, n]`.
    pub(super) g: &'a [f32],
    /// What the scales multiply, codes minus zero points, `[rows, n]`.
    pub(super) levels: &'a [f32],
    /// `[n, n]`.
    pub(super) h: &'a [f32],
    pub(super) n: usize,
    /// Columns of a group.
    pub(super) len: usize,
}

impl Rows<'_> {
    /// Moves the `scales`, `[rows, groups]`, to the common minimum of each row's, rounded by `round`, unless that is no better.
    /// Returns the number of rows improved.
    ///
    /// With q_g the row's levels inside group g, a change t of its scales changes the loss by tᵀAt + 2tᵀr, A_gg' = q_gᵀHq_g'
    /// and r_g = q_gᵀG, so t solves A·t = −r.
    pub(super) fn refit(&self, scales: &mut [f32], round: impl Fn(f32) -> f32) -> usize {
        let Rows { g, levels, n, len, .. } = *self;
        let groups = n.div_ceil(len);
        let curvatures = self.curvatures();
        let mut improved = 0;
        for (row, old) in scales.chunks_exact_mut(groups).enumerate() {
            let a = &curvatures[row * groups * groups..][..groups * groups];
            let at = |group: usize| row * n + group * len..row * n + n.min((group + 1) * len);
            let down: Vec<f64> = (0..groups).map(|group| -dot(&g[at(group)], &levels[at(group)])).collect();
            let Some(exact) = solve(a, &down) else { continue };
            // A scale of zero would not survive in its type.
            let moved = |(&old, t): (&f32, f64)| match (f64::from(old) + t) as f32 {
                0.0 => old,
                new => round(new),
            };
            let new: Vec<f32> = old.iter().zip(exact).map(moved).collect();
            let t: Vec<f64> = new.iter().zip(&*old).map(|(&new, &old)| f64::from(new) - f64::from(old)).collect();
            let change = |g: usize| t[g] * ((0..groups).map(|k| a[g * groups + k] * t[k]).sum::<f64>() - 2.0 * down[g]);
            if new.iter().all(|s| s.is_finite()) && (0..groups).map(change).sum::<f64>() < 0.0 {
                old.copy_from_slice(&new);
                improved += 1;
            }
        }
        improved
    }

    /// A of every row, `[rows, groups, groups]`: one product per group for all rows, with the groups from it on, since A is
    /// symmetric.
    fn curvatures(&self) -> Vec<f64> {
        let Rows { levels, h, n, len, .. } = *self;
        let (rows, groups) = (levels.len() / n, n.div_ceil(len));
        let mut a = vec![0.0f64; rows * groups * groups];
        let mut m = vec![0.0f32; rows * n];
        for g in 0..groups {
            let (from, width) = (g * len, len.min(n - g * len));
            let rest = n - from;
            let q = View::new(&levels[from..], rows, width, n);
            let h = View::new(&h[from * n + from..], width, rest, n);
            gemm(1.0, q, h, 0.0, &mut ViewMut::new(&mut m, rows, rest, rest));
            for (row, m) in m.chunks_exact(rest).enumerate().take(rows) {
                let a = &mut a[row * groups * groups..][..groups * groups];
                let levels = &levels[row * n + from..(row + 1) * n];
                for (k, (m, levels)) in (g..).zip(m.chunks(len).zip(levels.chunks(len))) {
                    a[g * groups + k] = dot(m, levels);
                    a[k * groups + g] = a[g * groups + k];
                }
            }
        }
        a
    }
}

/// Solves the symmetric positive semidefinite system A·x = b by Cholesky; rows without a pivot get 0.
fn solve(a: &[f64], b: &[f64]) -> Option<Vec<f64>> {
    let n = b.len();
    let mut l = vec![0.0f64; n * n];
    for i in 0..n {
        for j in 0..=i {
            let s: f64 = (0..j).map(|k| l[i * n + k] * l[j * n + k]).sum();
            let v = a[i * n + j] - s;
            if i == j {
                l[i * n + i] = if v > 1e-9 * a[i * n + i].max(0.0) && v > 0.0 { v.sqrt() } else { 0.0 };
            } else if l[j * n + j] > 0.0 {
                l[i * n + j] = v / l[j * n + j];
            }
        }
    }
    let mut x = b.to_vec();
    for i in 0..n {
        let s: f64 = (0..i).map(|k| l[i * n + k] * x[k]).sum();
        x[i] = if l[i * n + i] > 0.0 { (x[i] - s) / l[i * n + i] } else { 0.0 };
    }
    for i in (0..n).rev() {
        let s: f64 = (i + 1..n).map(|k| l[k * n + i] * x[k]).sum();
        x[i] = if l[i * n + i] > 0.0 { (x[i] - s) / l[i * n + i] } else { 0.0 };
    }
    x.iter().all(|v| v.is_finite()).then_some(x)
}

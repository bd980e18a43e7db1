//! Targets that make up for what earlier rounding did to a linear's input.
//!
//! ‖ŴX̂ − WX‖² = tr((Ŵ − W*)·H·(Ŵ − W*)ᵀ) + const with W* = W + W·E[(x − x̂)x̂ᵀ]·H⁻¹ (methods 1.4), so a solver that
//! takes (W*, H) needs to know nothing of it. Where the linear's output is added to a residual stream that has drifted by
//! h − ĥ, that can be made up for as well: + E[(h − ĥ)x̂ᵀ]·H⁻¹. Both are regressions on as many tokens as there are, so
//! how far to go, and how much to damp H for it, is read off held-out tokens, where the loss is a parabola in each.

use crate::factor::damped;
use crate::loss;
use crate::seen::{Moments, Seen};
use bitmill_kernels::{View, ViewMut, cholesky, gemm, solve};
use rayon::prelude::*;

/// Shares of the mean diagonal that are tried as damping.
const DAMPINGS: [f32; 3] = [0.01, 0.1, 1.0];
/// Rows of one task.
const ROWS: usize = 32;

/// The target of a linear.
pub(crate) struct Shifted {
    /// W* `[out, in]`.
    pub(crate) target: Vec<f32>,
    /// Share of each of the two shifts that is taken.
    pub(crate) shares: [f64; 2],
    /// Change of the output error on held-out tokens, relative to the output's energy.
    pub(crate) change: f64,
}

/// Targets of the linears of a site from their `weights`; `None` where nothing is to be shifted. `centred` as in [`Seen::all`].
pub(crate) fn targets(weights: &[Vec<f32>], seen: &Seen, centred: bool) -> Option<Vec<Shifted>> {
    let [learnt, held] = seen.split(centred)?;
    let total = |fits: &[Fit]| fits.iter().map(|f| f.gain).sum::<f64>();
    let fit = |damping: f32| -> Option<(f32, Vec<Fit>)> {
        let regression = Regression::new(&learnt, damping)?;
        Some((damping, weights.iter().map(|w| Fit::new(w, &regression.shifts(w), &held)).collect()))
    };
    let fits = DAMPINGS.into_iter().filter_map(fit);
    let (damping, fits) = fits.reduce(|a, b| if total(&b.1) > total(&a.1) { b } else { a })?;
    // How far was settled on held-out tokens; the direction is that of all.
    let all = seen.all(centred);
    let regression = Regression::new(&all, damping)?;
    let shifted = weights.iter().zip(fits).map(|(w, fit)| {
        let mut target = w.clone();
        for (shift, share) in regression.shifts(w).iter().zip(fit.shares) {
            target.iter_mut().zip(shift).for_each(|(t, s)| *t += share as f32 * s);
        }
        let energy: f64 = loss(w, &vec![0.0; w.len()], &held.h).iter().sum();
        Shifted { target, shares: fit.shares, change: if energy > 0.0 { -fit.gain / energy } else { 0.0 } }
    });
    Some(shifted.collect())
}

/// E[(x − x̂)x̂ᵀ]·H⁻¹ and E[(h − ĥ)x̂ᵀ]·H⁻¹.
struct Regression {
    n: usize,
    drift: Vec<f32>,
    residual: Vec<f32>,
}

impl Regression {
    /// `None` where the damped H is not positive definite.
    fn new(moments: &Moments, damping: f32) -> Option<Self> {
        let n = moments.h.len().isqrt();
        let mut l: Vec<f64> = damped(&moments.h, n, damping).iter().map(|&v| f64::from(v)).collect();
        cholesky(&mut l, n).then(|| Regression {
            n,
            drift: over(&l, &moments.drift, n),
            residual: over(&l, &moments.residual, n),
        })
    }

    /// What the two drifts ask of the weights `w [rows, n]`; the second is empty where there is no such drift.
    fn shifts(&self, w: &[f32]) -> [Vec<f32>; 2] {
        [times(w, &self.drift, self.n), self.residual.clone()]
    }
}

/// `b·(L·Lᵀ)⁻¹` for rows `b: [rows, n]`.
fn over(l: &[f64], b: &[f32], n: usize) -> Vec<f32> {
    let mut x: Vec<f64> = b.iter().map(|&v| f64::from(v)).collect();
    solve(l, n, &mut x);
    x.into_iter().map(|v| v as f32).collect()
}

/// `a·b` for `a: [rows, n]` and `b: [n, n]`.
fn times(a: &[f32], b: &[f32], n: usize) -> Vec<f32> {
    let mut out = vec![0.0; a.len()];
    out.par_chunks_mut(ROWS * n).zip(a.par_chunks(ROWS * n)).for_each(|(out, a)| {
        let rows = a.len() / n;
        gemm(1.0, View::new(a, rows, n, n), View::new(b, n, n, n), 0.0, &mut ViewMut::new(out, rows, n, n));
    });
    out
}

/// How far a linear goes along its shifts.
struct Fit {
    shares: [f64; 2],
    /// By how much E‖Ŵx̂ + … ‖² falls on held-out tokens before rounding.
    gain: f64,
}

impl Fit {
    /// Minimizes E‖Σ aᵢSᵢx̂ − (W(x − x̂) + (h − ĥ))‖² = aᵀQa − 2aᵀb + const over shares from 0 to 1.
    fn new(w: &[f32], shifts: &[Vec<f32>; 2], held: &Moments) -> Self {
        let n = held.h.len().isqrt();
        let mut goal = times(w, &held.drift, n);
        goal.iter_mut().zip(&held.residual).for_each(|(g, r)| *g += r);
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
        let image = shifts.each_ref().map(|s| times(s, &held.h, n));
        let q = |i: usize, j: usize| if shifts[j].is_empty() { 0.0 } else { dot(&image[i], &shifts[j]) };
        let q = [[q(0, 0), q(0, 1)], [q(1, 0), q(1, 1)]];
        let b = shifts.each_ref().map(|s| dot(s, &goal));
        let mut a = [0.0f64; 2];
        // Two numbers in a box: coordinate steps settle at once unless the shifts are nearly the same.
        for _ in 0..100 {
            for i in 0..2 {
                let other = q[i][1 - i] * a[1 - i];
                a[i] = if q[i][i] > 0.0 { ((b[i] - other) / q[i][i]).clamp(0.0, 1.0) } else { 0.0 };
            }
        }
        let quadratic: f64 = (0..2).map(|i| (0..2).map(|j| a[i] * q[i][j] * a[j]).sum::<f64>()).sum();
        Fit { shares: a, gain: 2.0 * (a[0] * b[0] + a[1] * b[1]) - quadratic }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seen::Glimpse;
    use crate::sweep::tests::{Random, random_w};
    use crate::{Observation, TargetShift};

    const N: usize = 12;
    const ROWS: usize = 9;

    /// Windows of correlated inputs x̂, their drift, which x̂ tells something of, and that of the residual stream.
    fn glimpses(windows: usize, drift: f32) -> Vec<Glimpse> {
        let mut r = Random::new(77);
        let window = |_| {
            let mut g = Glimpse::default();
            for _ in 0..40 {
                let common = r.normal() as f32;
                let x: Vec<f32> = (0..N).map(|_| r.normal() as f32 + common).collect();
                g.drift.extend((0..N).map(|i| drift * (x[(i + 1) % N] + 0.5 * r.normal() as f32)));
                g.residual.extend((0..ROWS).map(|i| drift * (x[i] - 0.3 * r.normal() as f32)));
                g.seen.extend(x);
            }
            g
        };
        (0..windows).map(window).collect()
    }

    fn seen(shift: TargetShift, glimpses: &[Glimpse]) -> Seen {
        let observation = Observation { shift, ..Observation::default() };
        let mut seen = Seen::new(observation, N, ROWS, glimpses.len());
        seen.add(0, glimpses, None);
        seen
    }

    /// Σ‖Ŵx̂ − (Wx + h − ĥ)‖² / tokens over all windows, in f64.
    fn output_error(approximation: &[f32], w: &[f32], glimpses: &[Glimpse], residual: bool) -> f64 {
        let mut total = 0.0;
        let mut tokens = 0.0;
        for g in glimpses {
            for (t, x) in g.seen.chunks(N).enumerate() {
                let drift = &g.drift[t * N..(t + 1) * N];
                for i in 0..ROWS {
                    let mut e = if residual { -f64::from(g.residual[t * ROWS + i]) } else { 0.0 };
                    for j in 0..N {
                        e += f64::from(approximation[i * N + j]) * f64::from(x[j])
                            - f64::from(w[i * N + j]) * (f64::from(x[j]) + f64::from(drift[j]));
                    }
                    total += e * e;
                }
                tokens += 1.0;
            }
        }
        total / tokens
    }

    #[test]
    fn the_loss_against_the_target_differs_by_a_constant() {
        // Oracle 12, with all of the shift and no damping to speak of, for both kinds of drift.
        let (glimpses, w) = (glimpses(16, 0.3), random_w(ROWS * N, 3));
        for (shift, residual) in [(TargetShift::Inputs, false), (TargetShift::Outputs, true)] {
            let seen = seen(shift, &glimpses);
            let all = seen.all(false);
            let regression = Regression::new(&all, 1e-9).unwrap();
            let mut target = w.clone();
            for shift in regression.shifts(&w) {
                target.iter_mut().zip(shift).for_each(|(t, s)| *t += s);
            }
            let constant = |seed: u64| {
                let other: Vec<f32> = random_w(ROWS * N, seed).iter().zip(&w).map(|(d, w)| w + 0.2 * d).collect();
                output_error(&other, &w, &glimpses, residual) - loss(&target, &other, &all.h).iter().sum::<f64>()
            };
            let constants: Vec<f64> = (10..20).map(constant).collect();
            assert!(constants.iter().all(|c| (c / constants[0] - 1.0).abs() < 1e-3), "{constants:?}");
        }
    }

    #[test]
    fn without_drift_the_target_is_the_weight() {
        // Oracle 12: X̂ = X gives W* = W, and so any solver its own result.
        let (glimpses, w) = (glimpses(16, 0.0), random_w(ROWS * N, 3));
        let shifted = targets(std::slice::from_ref(&w), &seen(TargetShift::Outputs, &glimpses), false).unwrap();
        assert_eq!(shifted[0].target, w);
        assert_eq!((shifted[0].change, shifted[0].shares), (0.0, [0.0, 0.0]));
        assert!(targets(&[w], &seen(TargetShift::Off, &glimpses), false).is_none());
    }

    #[test]
    fn what_is_taken_lowers_the_error_on_fresh_tokens() {
        let w = random_w(ROWS * N, 3);
        let all = glimpses(48, 0.3);
        let (learnt, fresh) = all.split_at(24);
        for (shift, residual) in [(TargetShift::Inputs, false), (TargetShift::Outputs, true)] {
            for centred in [false, true] {
                let shifted = targets(std::slice::from_ref(&w), &seen(shift, learnt), centred).unwrap();
                let (before, after) =
                    (output_error(&w, &w, fresh, residual), output_error(&shifted[0].target, &w, fresh, residual));
                assert!(after < 0.7 * before && shifted[0].change < 0.0, "{after} {before}");
                assert!(shifted[0].shares.iter().all(|a| (0.0..=1.0).contains(a)));
            }
        }
    }
}

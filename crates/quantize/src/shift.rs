//! Targets that make up for what earlier rounding did to a linear's input.
//!
//! ‖ŴX̂ − WX‖² = tr((Ŵ − W*)·H·(Ŵ − W*)ᵀ) + const with W* = W + W·E[(x − x̂)x̂ᵀ]·H⁻¹ (methods 1.4), so a solver that
//! takes (W*, H) needs to know nothing of it. Where the linear's output is added to a residual stream that has drifted by
//! h − ĥ, that can be made up for as well: + E[(h − ĥ)x̂ᵀ]·H⁻¹. Both are regressions on as many tokens as there are, so
//! how far to go, and how much to damp H for it, is read off held-out tokens, where the loss is a parabola in each.

use crate::factor::damped;
use crate::seen::Moments;
use crate::{StageChange, loss};
use bitmill_kernels::{View, ViewMut, cholesky, gemm, solve};
use rayon::prelude::*;
use std::borrow::Cow;

/// Shares of the mean diagonal that are tried as damping.
const DAMPINGS: [f32; 3] = [0.01, 0.1, 1.0];
/// Rows of one task.
const ROWS: usize = 32;
/// Rows whose shifts are in memory at a time. It fixes the order of sums, so it is a constant.
const BAND: usize = 512;

/// The target of a linear.
pub(crate) struct Shifted {
    /// W* `[out, in]`.
    pub(crate) target: Vec<f32>,
    /// Share of each of the two shifts that is taken.
    pub(crate) shares: [f64; 2],
    /// Change of the output error on held-out tokens, relative to the output's energy.
    pub(crate) change: f64,
}

impl Shifted {
    /// The target, and what is told of it.
    pub(crate) fn apart(self) -> (Vec<f32>, StageChange) {
        let of = "output error on held-out tokens".into();
        let stage = StageChange { stage: "target shift".into(), of, change: self.change, shares: self.shares.to_vec() };
        (self.target, stage)
    }
}

/// How far the linears of a site go, and under which damping.
pub(crate) struct Choice {
    damping: f32,
    /// By linear, with the energy of its output on held-out tokens.
    fits: Vec<(Fit, f64)>,
}

/// What becomes of the linears of a site with these `weights`, from moments of tokens to learn from and of held-out ones;
/// `None` where nothing can be said.
pub(crate) fn choose(weights: &[Vec<f32>], learnt: &Moments, held: &Moments) -> Option<Choice> {
    if learnt.is_empty() || held.drift.is_empty() {
        return None;
    }
    let total = |fits: &[Fit]| fits.iter().map(|f| f.gain).sum::<f64>();
    let fit = |damping: f32| -> Option<(f32, Vec<Fit>)> {
        let regression = Regression::new(learnt, damping, weights)?;
        Some((damping, weights.iter().map(|w| Fit::new(w, &regression, held)).collect()))
    };
    let fits = DAMPINGS.into_iter().filter_map(fit);
    let (damping, fits) = fits.reduce(|a, b| if total(&b.1) > total(&a.1) { b } else { a })?;
    let energy = |w: &Vec<f32>| loss(w, &vec![0.0; w.len()], &held.h).iter().sum::<f64>();
    Some(Choice { damping, fits: fits.into_iter().zip(weights.iter().map(energy)).collect() })
}

impl Choice {
    /// The targets of linears with these `weights`: how far was settled on held-out tokens, the direction is that of `all`.
    pub(crate) fn targets(self, weights: &[Vec<f32>], all: &Moments) -> Option<Vec<Shifted>> {
        let regression = Regression::new(all, self.damping, weights)?;
        let n = regression.n;
        let shifted = weights.iter().zip(self.fits).map(|(w, (fit, energy))| {
            let mut target = w.clone();
            for (i, target) in target.chunks_mut(BAND * n).enumerate() {
                for (shift, share) in regression.shifts(w, i * BAND).iter().zip(fit.shares) {
                    target.iter_mut().zip(shift).for_each(|(t, s)| *t += share as f32 * s);
                }
            }
            Shifted { target, shares: fit.shares, change: if energy > 0.0 { -fit.gain / energy } else { 0.0 } }
        });
        Some(shifted.collect())
    }
}

/// Regression of what is missing on what is there: D·H⁻¹ for D = W·E[(x − x̂)x̂ᵀ] and D = E[(h − ĥ)x̂ᵀ].
struct Regression<'a> {
    n: usize,
    /// L·Lᵀ = H, damped.
    l: Vec<f64>,
    /// E[(x − x̂)x̂ᵀ], or that by H⁻¹ where there are more rows to multiply it with than it has.
    drift: Cow<'a, [f32]>,
    residual: &'a [f32],
}

impl<'a> Regression<'a> {
    /// For linears with these `weights`; `None` where the damped H is not positive definite.
    fn new(moments: &'a Moments, damping: f32, weights: &[Vec<f32>]) -> Option<Self> {
        let n = moments.h.len().isqrt();
        let mut l = damped(&moments.h, n, damping);
        if !cholesky(&mut l, n) {
            return None;
        }
        let rows = weights.iter().map(|w| w.len() / n).sum::<usize>();
        let drift = match rows > n {
            true => Cow::Owned(over(&l, moments.drift.clone(), n)),
            false => Cow::Borrowed(&moments.drift[..]),
        };
        Some(Regression { n, l, drift, residual: &moments.residual })
    }

    /// What the two drifts ask of up to [`BAND`] rows of the weights `w [rows, n]`, from row `first` on; the second is empty
    /// where there is no such drift.
    fn shifts(&self, w: &[f32], first: usize) -> [Vec<f32>; 2] {
        let n = self.n;
        let of_inputs = times(band(w, first, n), &self.drift, n);
        let of_inputs = match self.drift {
            Cow::Owned(_) => of_inputs,
            Cow::Borrowed(_) => over(&self.l, of_inputs, n),
        };
        let of_outputs = match self.residual.is_empty() {
            true => Vec::new(),
            false => over(&self.l, band(self.residual, first, n).to_vec(), n),
        };
        [of_inputs, of_outputs]
    }
}

/// Up to [`BAND`] rows of `m [rows, n]` from row `first` on.
fn band(m: &[f32], first: usize, n: usize) -> &[f32] {
    &m[first * n..m.len().min((first + BAND) * n)]
}

/// `b·(L·Lᵀ)⁻¹` for rows `b: [rows, n]`, in the place of `b`.
fn over(l: &[f64], mut b: Vec<f32>, n: usize) -> Vec<f32> {
    /// Right-hand sides that read L together.
    const TASK: usize = 64;
    b.par_chunks_mut(TASK * n).for_each(|b| {
        let mut x: Vec<f64> = b.iter().map(|&v| f64::from(v)).collect();
        solve(l, n, &mut x);
        b.iter_mut().zip(x).for_each(|(b, x)| *b = x as f32);
    });
    b
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

/// Σ a·b in f64.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    const TASK: usize = 1 << 14;
    let part = |(a, b): (&[f32], &[f32])| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    let parts: Vec<f64> = a.par_chunks(TASK).zip(b.par_chunks(TASK)).map(part).collect();
    parts.iter().sum()
}

/// How far a linear goes along its shifts.
struct Fit {
    shares: [f64; 2],
    /// By how much E‖Ŵx̂ + … ‖² falls on held-out tokens before rounding.
    gain: f64,
}

impl Fit {
    /// Minimizes E‖Σ aᵢSᵢx̂ − (W(x − x̂) + (h − ĥ))‖² = aᵀQa − 2aᵀb + const over shares from 0 to 1.
    fn new(w: &[f32], regression: &Regression<'_>, held: &Moments) -> Self {
        let n = regression.n;
        let (mut q, mut b) = ([[0.0f64; 2]; 2], [0.0f64; 2]);
        for first in (0..w.len() / n).step_by(BAND) {
            let shifts = regression.shifts(w, first);
            let mut goal = times(band(w, first, n), &held.drift, n);
            if !held.residual.is_empty() {
                goal.iter_mut().zip(band(&held.residual, first, n)).for_each(|(g, r)| *g += r);
            }
            for (i, shift) in shifts.iter().enumerate().filter(|(_, shift)| !shift.is_empty()) {
                let image = times(shift, &held.h, n);
                b[i] += dot(shift, &goal);
                for (j, other) in shifts.iter().enumerate().filter(|(_, other)| !other.is_empty()) {
                    q[i][j] += dot(&image, other);
                }
            }
        }
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
    use crate::seen::{Glimpse, Seen};
    use crate::sweep::tests::{Random, random_w};
    use crate::{Observation, TargetShift};
    use bitmill_calibrate::Tokens;

    const N: usize = 12;
    const ROWS: usize = 9;

    /// Windows of correlated inputs x̂, their drift, which x̂ tells something of, and that of the residual stream.
    fn glimpses(windows: usize, drift: f32) -> Vec<Glimpse> {
        let mut r = Random::new(77);
        let window = |_| {
            let (mut g, mut seen) = (Glimpse::default(), Vec::new());
            for _ in 0..40 {
                let common = r.normal() as f32;
                let x: Vec<f32> = (0..N).map(|_| r.normal() as f32 + common).collect();
                g.drift.extend((0..N).map(|i| drift * (x[(i + 1) % N] + 0.5 * r.normal() as f32)));
                g.residual.extend((0..ROWS).map(|i| drift * (x[i] - 0.3 * r.normal() as f32)));
                seen.extend(x);
            }
            Glimpse { seen: Tokens::new(seen, N), ..g }
        };
        (0..windows).map(window).collect()
    }

    fn moments(shift: TargetShift, glimpses: &[Glimpse], centred: bool) -> (Moments, Moments) {
        let observation = Observation { shift, ..Observation::default() };
        let mut seen = Seen::new(observation, N, ROWS, glimpses.len());
        seen.add(0, glimpses, None);
        let (learnt, held) = seen.moments(centred);
        (learnt, held.unwrap())
    }

    fn targets(w: &[f32], shift: TargetShift, glimpses: &[Glimpse], centred: bool) -> Shifted {
        let (weights, (learnt, held)) = ([w.to_vec()], moments(shift, glimpses, centred));
        let choice = choose(&weights, &learnt, &held).unwrap();
        choice.targets(&weights, &learnt.merged(held)).unwrap().remove(0)
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
            let (learnt, held) = moments(shift, &glimpses, false);
            let all = learnt.merged(held);
            let regression = Regression::new(&all, 1e-9, std::slice::from_ref(&w)).unwrap();
            let mut target = w.clone();
            for shift in regression.shifts(&w, 0) {
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
        let shifted = targets(&w, TargetShift::Outputs, &glimpses, false);
        assert_eq!(shifted.target, w);
        assert_eq!((shifted.change, shifted.shares), (0.0, [0.0, 0.0]));
    }

    #[test]
    fn what_is_taken_lowers_the_error_on_fresh_tokens() {
        let w = random_w(ROWS * N, 3);
        let all = glimpses(48, 0.3);
        let (learnt, fresh) = all.split_at(24);
        for (shift, residual) in [(TargetShift::Inputs, false), (TargetShift::Outputs, true)] {
            for centred in [false, true] {
                let shifted = targets(&w, shift, learnt, centred);
                let (before, after) =
                    (output_error(&w, &w, fresh, residual), output_error(&shifted.target, &w, fresh, residual));
                assert!(after < 0.7 * before && shifted.change < 0.0, "{after} {before}");
                assert!(shifted.shares.iter().all(|a| (0.0..=1.0).contains(a)));
            }
        }
    }

    #[test]
    fn both_ways_of_solving_give_the_same_shifts() {
        // More rows than inputs, so that the drift itself is solved for, and fewer, so that the rows are.
        let (glimpses, w) = (glimpses(16, 0.3), random_w(2 * N * N, 5));
        let (learnt, _) = moments(TargetShift::Outputs, &glimpses, false);
        let of =
            |w: &Vec<f32>| Regression::new(&learnt, 0.01, std::slice::from_ref(w)).unwrap().shifts(w, 0)[0].clone();
        let (many, few) = (of(&w), of(&w[..3 * N].to_vec()));
        assert!(
            many.iter().zip(&few).all(|(a, b)| (a - b).abs() < 1e-5 * few.iter().fold(0.0f32, |m, v| m.max(v.abs())))
        );
    }

    #[test]
    fn moments_of_two_parts_are_those_of_all_tokens() {
        let windows = || glimpses(16, 0.3);
        for centred in [false, true] {
            let (learnt, held) = moments(TargetShift::Outputs, &windows(), centred);
            let all = learnt.merged(held);
            let mut one = Seen::new(Observation { full_share: 1e-9, ..Observation::default() }, N, ROWS, 16);
            let mut whole = windows();
            whole.iter_mut().for_each(|g| g.residual.clear());
            one.add(0, &whole, None);
            let (one, none) = one.moments(centred);
            assert!(none.is_none());
            let near = |a: &[f32], b: &[f32]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
            assert!(near(&all.h, &one.h) && near(&all.drift, &one.drift));
            assert!(near(&all.means[0], &one.means[0]) && near(&all.means[1], &one.means[1]));
        }
    }
}

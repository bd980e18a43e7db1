//! What gradients can change about a rounded linear: which code each weight takes, and the scales.
//!
//! Every weight has a latent position u on its group's axis of codes; its code is the nearest whole number,
//! ŵ = s·(clamp(round(u), 0, 2^b − 1) − z). Gradients pass the rounding as if it were not there (straight-through), so
//! ∂ŵ/∂u = s and ∂ŵ/∂s = code − z. A latent starts on the side of its present code where the weight itself lies, so the first
//! forward pass is the solution that was handed over, and a weight that the solver pushed to the far side of a threshold
//! is the first to come back. This is SignRound's rounding variable (arXiv 2309.05516) with a reach of any number
//! of codes, started from a solution instead of from round-to-nearest.

use super::adam::{Adam, State};
use bitmill_scheme::{GroupParams, Quantized};
use std::ops::Range;

/// Step sizes of one update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Rates {
    /// Of latents, in codes; 0 leaves the codes alone.
    pub(crate) codes: f32,
    /// Of scales, as a share of each; 0 leaves them alone.
    pub(crate) scales: f32,
    /// Of norms' weights, as a share of each; 0 leaves them alone.
    pub(crate) norms: f32,
    /// Of the head's weights, as a share of their root mean square; 0 leaves them alone.
    pub(crate) head: f32,
}

impl Rates {
    /// The rates of step `at` of `total`: half a cosine from the full rates to nothing, after a rise over the first steps,
    /// in which the moments of the gradients are still noise.
    pub(super) fn eased(self, at: usize, total: usize) -> Rates {
        /// Steps of the rise.
        const RISE: f32 = 12.0;
        let cosine = 0.5 * (1.0 + (std::f32::consts::PI * at as f32 / total as f32).cos());
        let share = cosine * ((at + 1) as f32 / RISE).min(1.0);
        let Rates { codes, scales, norms, head } = self;
        Rates { codes: codes * share, scales: scales * share, norms: norms * share, head: head * share }
    }
}

/// How far from its code a latent may start. Nearer to a threshold (0.5), many codes would flip in the first steps, before
/// the moments of the gradient mean anything.
const START: f32 = 0.3;
/// How far beyond the outermost codes a latent may go.
const BEYOND: f32 = 0.49;

/// One linear under training.
#[derive(Clone)]
pub(super) struct Rounding {
    quantized: Quantized,
    /// u, `[out, in]`.
    latents: Vec<f32>,
    /// Unrounded, laid out as the scales of `quantized`.
    scales: Vec<f32>,
    latent_moments: Adam,
    scale_moments: Adam,
}

impl Rounding {
    /// Starts from `quantized`, a rounding of `weight [out, in]`.
    pub(super) fn new(quantized: Quantized, weight: &[f32]) -> Self {
        let cols = quantized.shape[1];
        let start = |(i, &w): (usize, &f32)| {
            let (params, code) = (quantized.params(i / cols, quantized.group(i % cols)), f32::from(quantized.codes[i]));
            (w / params.scale + f32::from(params.zero)).clamp(code - START, code + START)
        };
        let latents: Vec<f32> = weight.iter().enumerate().map(start).collect();
        let scales = quantized.scales.clone();
        let (latent_moments, scale_moments) = (Adam::new(latents.len()), Adam::new(scales.len()));
        Rounding { quantized, latents, scales, latent_moments, scale_moments }
    }

    /// The present codes and scales.
    pub(super) fn quantized(&self) -> &Quantized {
        &self.quantized
    }

    /// One step against `grad [out, in]`, the gradient at Ŵ.
    pub(super) fn step(&mut self, grad: &[f32], rates: Rates) {
        if rates.scales > 0.0 {
            let (by_scale, scales) = (self.scale_gradient(grad), &mut self.scales);
            let old = scales.clone();
            self.scale_moments.step(|i| by_scale[i] * old[i], rates.scales, |i, d| scales[i] *= 1.0 + d);
        }
        if rates.codes > 0.0 {
            self.step_latents(grad, rates.codes);
        }
        self.harden();
    }

    /// One step of the latents; the gradient of each is its weight's times the scale of its group.
    fn step_latents(&mut self, grad: &[f32], rate: f32) {
        let highest = f32::from(self.quantized.scheme.bits().max_code()) + BEYOND;
        let (update, mean, square) = self.latent_moments.advance(rate);
        for run in runs(&self.quantized) {
            let (at, scale) = (run.at, run.params.scale);
            let moments = mean[at.clone()].iter_mut().zip(&mut square[at.clone()]);
            for ((u, g), (m, v)) in self.latents[at.clone()].iter_mut().zip(&grad[at]).zip(moments) {
                *u = (*u + update.of(g * scale, m, v)).clamp(-BEYOND, highest);
            }
        }
    }

    /// Σ grad · (code − zero) of every scale.
    fn scale_gradient(&self, grad: &[f32]) -> Vec<f32> {
        let mut sums = vec![0.0f32; self.quantized.scales.len()];
        for run in runs(&self.quantized) {
            let zero = f32::from(run.params.zero);
            let terms = grad[run.at.clone()].iter().zip(&self.quantized.codes[run.at]);
            sums[run.scale] += terms.map(|(g, &code)| g * (f32::from(code) - zero)).sum::<f32>();
        }
        sums
    }

    /// Brings codes and stored scales up to date with latents and scales.
    fn harden(&mut self) {
        let q = &mut self.quantized;
        let (highest, scale) = (f32::from(q.scheme.bits().max_code()), q.scheme.scale);
        // Adding a half and cutting is rounding where nothing is negative.
        let code = |u: &f32| (u + 0.5).clamp(0.0, highest) as u8;
        q.codes.iter_mut().zip(&self.latents).for_each(|(stored, u)| *stored = code(u));
        q.scales.iter_mut().zip(&self.scales).for_each(|(stored, s)| *stored = scale.round(*s));
    }

    /// Saves what [`Rounding::new`] cannot make, or takes it up.
    pub(super) fn exchange(&mut self, state: &mut State<'_>, steps: usize) -> std::io::Result<()> {
        state.floats(&mut self.latents)?;
        state.floats(&mut self.scales)?;
        self.latent_moments.exchange(state, steps)?;
        self.scale_moments.exchange(state, steps)?;
        self.harden();
        Ok(())
    }
}

/// Weights of one row that share a scale and lie side by side.
struct Run {
    /// Their indices in the matrix.
    at: Range<usize>,
    params: GroupParams,
    /// The index of their scale.
    scale: usize,
}

/// All weights of `q`, in order.
fn runs(q: &Quantized) -> impl Iterator<Item = Run> + '_ {
    let ([rows, cols], groups) = (q.shape, q.scheme.groups(q.shape[1]));
    // Where groups are not consecutive columns, every weight is a run.
    let length = if q.group_of.is_empty() { q.scheme.group_len(cols) } else { 1 };
    (0..rows).flat_map(move |row| {
        (0..cols).step_by(length).map(move |col| {
            let group = q.group(col);
            let scale = if q.scales.len() == 1 { 0 } else { row * groups + group };
            let at = row * cols + col..row * cols + cols.min(col + length);
            Run { at, params: q.params(row, group), scale }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sweep::tests::{random_h, random_w};
    use crate::{Linear, SolverOptions, loss, method};
    use bitmill_scheme::{Bits, Granularity, ScaleType, Scheme};

    /// Any scheme that a tuned linear may have, solved by GPTQ.
    fn solved(bits: u32, symmetric: bool, granularity: Granularity, w: &[f32], h: &[f32], n: usize) -> Quantized {
        let scheme = Scheme::int(Bits::new(bits).unwrap(), symmetric, granularity).with_scale(ScaleType::F32);
        let linear = Linear::new("x", w, [w.len() / n, n], scheme);
        method("gptq").unwrap().solve(&[linear], Some(h), &SolverOptions::default()).unwrap().remove(0).quantized
    }

    /// 2ΔH, the gradient of tr(ΔHΔᵀ) at Ŵ.
    fn gradient(w: &[f32], approximation: &[f32], h: &[f32], n: usize) -> Vec<f32> {
        let delta: Vec<f32> = approximation.iter().zip(w).map(|(a, b)| a - b).collect();
        let of = |i: usize| (0..n).map(|k| 2.0 * delta[i / n * n + k] * h[k * n + i % n]).sum();
        (0..w.len()).map(of).collect()
    }

    #[test]
    fn it_starts_from_what_was_handed_over() {
        let n = 32;
        let (h, w) = (random_h(n, 91), random_w(8 * n, 92));
        for granularity in [Granularity::Group(16), Granularity::Channel, Granularity::Tensor] {
            for (bits, symmetric) in [(2, true), (4, false), (8, true)] {
                let q = solved(bits, symmetric, granularity, &w, &h, n);
                let mut rounding = Rounding::new(q.clone(), &w);
                rounding.harden();
                assert_eq!(*rounding.quantized(), q);
            }
        }
    }

    #[test]
    fn the_gradient_of_scales_is_the_slope_of_the_loss() {
        let n = 32;
        let (h, w) = (random_h(n, 93), random_w(8 * n, 94));
        for granularity in [Granularity::Group(16), Granularity::Channel, Granularity::Tensor] {
            let q = solved(3, false, granularity, &w, &h, n);
            let grad = Rounding::new(q.clone(), &w).scale_gradient(&gradient(&w, &q.dequantize(), &h, n));
            let total = |q: &Quantized| loss(&w, &q.dequantize(), &h).iter().sum::<f64>();
            for (i, &g) in grad.iter().enumerate() {
                let (mut up, mut down) = (q.clone(), q.clone());
                let step = 1e-2 * q.scales[i].abs();
                up.scales[i] += step;
                down.scales[i] -= step;
                let slope = (total(&up) - total(&down)) / f64::from(2.0 * step);
                let size = grad.iter().fold(0.0f32, |a, v| a.max(v.abs()));
                assert!((slope - f64::from(g)).abs() < 2e-2 * f64::from(size), "{granularity:?} {i}: {slope} {g}");
            }
        }
    }

    #[test]
    fn the_best_of_some_steps_lowers_a_quadratic_loss_and_a_saved_state_goes_on_to_the_same_codes() {
        let n = 32;
        let (h, w) = (random_h(n, 95), random_w(16 * n, 96));
        // Round to nearest leaves much to be found.
        let scheme = Scheme::int(Bits::new(3).unwrap(), true, Granularity::Group(16)).with_scale(ScaleType::F32);
        let linear = Linear::new("x", &w, [16, n], scheme);
        let q = method("rtn").unwrap().solve(&[linear], None, &SolverOptions::default()).unwrap().remove(0).quantized;
        let total = |q: &Quantized| loss(&w, &q.dequantize(), &h).iter().sum::<f64>();
        let mut best = total(&q);
        let mut run = |rounding: &mut Rounding, steps: std::ops::Range<usize>| {
            for step in steps {
                let rate = 1.0 - step as f32 / 200.0;
                let grad = gradient(&w, &rounding.quantized().dequantize(), &h, n);
                rounding.step(&grad, Rates { codes: 0.005 * rate, scales: 0.002 * rate, norms: 0.0, head: 0.0 });
                best = best.min(total(rounding.quantized()));
            }
        };
        let (mut straight, mut saved) = (Rounding::new(q.clone(), &w), Vec::new());
        run(&mut straight, 0..100);
        straight.exchange(&mut State::Save(&mut saved), 100).unwrap();
        run(&mut straight, 100..200);
        let mut resumed = Rounding::new(q.clone(), &w);
        resumed.exchange(&mut State::Load(&mut saved.as_slice()), 100).unwrap();
        run(&mut resumed, 100..200);
        assert_eq!(straight.quantized(), resumed.quantized());
        assert!(best < 0.8 * total(&q), "{} {best}", total(&q));
        straight.quantized().validate().unwrap();
    }
}

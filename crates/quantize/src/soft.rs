//! Rounding directions learned by gradients of ℓ = tr((Ŵ−W)·H·(Ŵ−W)ᵀ), which in H form need neither activations nor
//! automatic differentiation: ∂ℓ/∂Ŵ = 2(Ŵ−W)H.
//!
//! All start from codes that are there already and keep, row by row, the best codes they meet: ℓ is a sum over rows, so
//! the result is never worse than the start. H is divided by its mean diagonal, since the regularizer is not free of scale.

use crate::refine::times;
use crate::{SoftKind, SoftRounding, loss};
use bitmill_scheme::{Granularity, GridKind, Quantized};
use rayon::prelude::*;

/// Rows of one task.
const ROWS: usize = 32;
/// Ends of the rectified sigmoid (AdaRound's ζ and γ).
const STRETCH: (f32, f32) = (1.1, -0.1);
/// Weight of the regularizer under a normalised H, at first and at last. A constant one leaves the sigmoids where the
/// weights lie as long as H is stiffer than it; a growing one settles soft directions first and all of them in the end.
const REGULAR: (f32, f32) = (0.01, 3.0);
/// Rank of LoRA-rounding (CBQ).
const RANK: usize = 5;

/// Learns the codes of `q` for the target `w` under `h`, scales fixed; returns the number of rows improved. Only
/// integers have neighbouring codes to choose from; other schemes are left as they are.
pub(crate) fn soften(w: &[f32], q: &mut Quantized, h: &[f32], soft: SoftRounding) -> usize {
    let n = q.shape[1];
    if !matches!(q.scheme.grid, GridKind::Int { .. }) || !q.group_of.is_empty() || soft.steps == 0 {
        return 0;
    }
    let mean = (0..n).map(|i| f64::from(h[i * n + i])).sum::<f64>() / n as f64;
    let normal: Vec<f32> = h.iter().map(|v| (f64::from(*v) / mean.max(f64::MIN_POSITIVE)) as f32).collect();
    let before = loss(w, &q.dequantize(), h);
    let codes = std::mem::take(&mut q.codes);
    let shape = (n, q.scheme.granularity == Granularity::Tensor);
    let of = &*q;
    let chunks = codes.par_chunks(ROWS * n).zip(w.par_chunks(ROWS * n)).enumerate();
    let best: Vec<Vec<u8>> = chunks
        .map(|(i, (codes, w))| {
            let problem = Problem::new(of, shape, i * ROWS, w, codes, &normal);
            match soft.kind {
                SoftKind::Sign => problem.sign(soft.steps),
                SoftKind::Ada => problem.sigmoids(&mut Free::new(&problem), soft.steps),
                SoftKind::LowRank => problem.sigmoids(&mut LowRank::new(&problem), soft.steps),
            }
        })
        .collect();
    q.codes = best.concat();
    let after = loss(w, &q.dequantize(), h);
    let mut improved = 0;
    for (r, (a, b)) in after.iter().zip(&before).enumerate() {
        if a < b {
            improved += 1;
        } else {
            q.codes[r * n..(r + 1) * n].copy_from_slice(&codes[r * n..(r + 1) * n]);
        }
    }
    improved
}

/// A few rows whose codes are to be learned.
struct Problem<'a> {
    n: usize,
    w: &'a [f32],
    h: &'a [f32],
    start: &'a [u8],
    /// Scale and zero point of every weight.
    scale: Vec<f32>,
    zero: Vec<f32>,
    top: f32,
}

impl<'a> Problem<'a> {
    fn new(
        q: &Quantized,
        (n, whole): (usize, bool),
        first: usize,
        w: &'a [f32],
        start: &'a [u8],
        h: &'a [f32],
    ) -> Self {
        let params = |i: usize| if whole { q.params(0, 0) } else { q.params(first + i / n, q.group(i % n)) };
        let (scale, zero) = (0..w.len()).map(|i| (params(i).scale, f32::from(params(i).zero))).unzip();
        let top = ((1u32 << q.scheme.bits().get()) - 1) as f32;
        Problem { n, w, h, start, scale, zero, top }
    }

    /// The weights at positions `p` on the axis of codes, minus the target, times H; and ℓ of each row.
    fn gradient(&self, p: &[f32]) -> (Vec<f32>, Vec<f64>) {
        let delta: Vec<f32> = (0..p.len()).map(|i| self.scale[i] * (p[i] - self.zero[i]) - self.w[i]).collect();
        let g = times(&delta, self.h, self.n);
        let dot = |(d, g): (&[f32], &[f32])| d.iter().zip(g).map(|(&d, &g)| f64::from(d) * f64::from(g)).sum();
        let losses = delta.chunks_exact(self.n).zip(g.chunks_exact(self.n)).map(dot).collect();
        (g, losses)
    }

    /// SignRound: latent positions, rounded for the loss, moved by the sign of its gradient in steps that shrink to nothing.
    fn sign(&self, steps: u32) -> Vec<u8> {
        let reach = |code: u8, exact: f32| f32::from(code) + (exact - f32::from(code)).clamp(-0.49, 0.49);
        let exact = |i: usize| self.w[i] / self.scale[i] + self.zero[i];
        let mut latent: Vec<f32> = (0..self.w.len()).map(|i| reach(self.start[i], exact(i))).collect();
        let (mut best, mut least) = (self.start.to_vec(), vec![f64::INFINITY; self.w.len() / self.n]);
        for step in 0..=steps {
            let rounded: Vec<f32> = latent.iter().map(|v| v.round_ties_even().clamp(0.0, self.top)).collect();
            let (g, losses) = self.gradient(&rounded);
            self.keep(&rounded, &losses, &mut best, &mut least);
            let rate = (1.0 - step as f32 / steps as f32) / steps as f32;
            for (i, v) in latent.iter_mut().enumerate() {
                let push = g[i] * self.scale[i];
                if push != 0.0 {
                    *v = (*v - rate * push.signum()).clamp(-0.49, self.top + 0.49);
                }
            }
        }
        best
    }

    /// AdaRound: each code is one of two neighbours, by a sigmoid that is pushed to its ends.
    fn sigmoids(&self, v: &mut dyn Directions, steps: u32) -> Vec<u8> {
        let low: Vec<f32> = (0..self.w.len()).map(|i| self.low(i)).collect();
        let (mut best, mut least) = (self.start.to_vec(), vec![f64::INFINITY; self.w.len() / self.n]);
        for step in 0..=steps {
            let values = v.values();
            let h: Vec<f32> = values.iter().map(|&v| rectified(v)).collect();
            if step % 10 == 0 || step == steps {
                let rounded: Vec<f32> =
                    (0..h.len()).map(|i| (low[i] + f32::from(u8::from(h[i] >= 0.5))).min(self.top)).collect();
                self.keep(&rounded, &self.gradient(&rounded).1, &mut best, &mut least);
            }
            let soft: Vec<f32> = low.iter().zip(&h).map(|(l, h)| (l + h).min(self.top)).collect();
            let (g, _) = self.gradient(&soft);
            let done = step as f32 / steps as f32;
            // No regularizer at first, then 1 − (2h − 1)² with a weight that grows.
            let weight = if done < 0.1 { 0.0 } else { REGULAR.0 * (REGULAR.1 / REGULAR.0).powf((done - 0.1) / 0.9) };
            let slope = |i: usize| {
                // In units of the code's own step, as the regularizer is.
                let data = 2.0 * g[i] / self.scale[i];
                (data - 4.0 * weight * (2.0 * h[i] - 1.0)) * rectified_slope(values[i])
            };
            let grad: Vec<f32> = (0..h.len()).map(slope).collect();
            v.step(&grad, step + 1, 0.1 * (1.0 - done));
        }
        self.settle(&low, &mut best);
        best
    }

    /// Turns over single choices between the two codes of a weight while that lowers the loss of a row.
    fn settle(&self, low: &[f32], best: &mut [u8]) {
        let positions: Vec<f32> = best.iter().map(|&c| f32::from(c)).collect();
        let (mut g, _) = self.gradient(&positions);
        for (row, g) in g.chunks_exact_mut(self.n).enumerate() {
            for _ in 0..20 {
                let mut changed = false;
                for k in 0..self.n {
                    let i = row * self.n + k;
                    let other = 2.0 * low[i] + 1.0 - f32::from(best[i]);
                    let step = self.scale[i] * (other - f32::from(best[i]));
                    let h = &self.h[k * self.n..(k + 1) * self.n];
                    // The start may lie beyond both codes where it was clamped.
                    if !(0.0..=self.top).contains(&other) || 2.0 * g[k] * step + h[k] * step * step >= 0.0 {
                        continue;
                    }
                    best[i] = other as u8;
                    changed = true;
                    g.iter_mut().zip(h).for_each(|(g, h)| *g += step * h);
                }
                if !changed {
                    break;
                }
            }
        }
    }

    /// The lower of the two codes that weight `i` may take: of the start and its neighbour towards the target.
    fn low(&self, i: usize) -> f32 {
        let (code, exact) = (f32::from(self.start[i]), self.w[i] / self.scale[i] + self.zero[i]);
        let low = if exact >= code { code } else { code - 1.0 };
        low.clamp(0.0, (self.top - 1.0).max(0.0))
    }

    fn keep(&self, rounded: &[f32], losses: &[f64], best: &mut [u8], least: &mut [f64]) {
        for (r, (&loss, least)) in losses.iter().zip(least).enumerate() {
            if loss < *least {
                *least = loss;
                let row = r * self.n..(r + 1) * self.n;
                best[row.clone()].iter_mut().zip(&rounded[row]).for_each(|(b, &p)| *b = p as u8);
            }
        }
    }
}

/// h(V) = clip(σ(V)(ζ−γ)+γ, 0, 1).
fn rectified(v: f32) -> f32 {
    let (zeta, gamma) = STRETCH;
    ((zeta - gamma) / (1.0 + (-v).exp()) + gamma).clamp(0.0, 1.0)
}

/// h′(V); 0 where it is clipped.
fn rectified_slope(v: f32) -> f32 {
    let ((zeta, gamma), s) = (STRETCH, 1.0 / (1.0 + (-v).exp()));
    let inside = (0.0..1.0).contains(&(s * (zeta - gamma) + gamma));
    if inside { s * (1.0 - s) * (zeta - gamma) } else { 0.0 }
}

/// V with h(V) = `share`.
fn latent(share: f32) -> f32 {
    let (zeta, gamma) = STRETCH;
    -((zeta - gamma) / (share.clamp(0.001, 0.999) - gamma) - 1.0).ln()
}

/// The numbers V behind the sigmoids of a few rows.
trait Directions {
    fn values(&self) -> Vec<f32>;
    /// One step of Adam, the `count`-th, against the gradient of every V.
    fn step(&mut self, grad: &[f32], count: u32, rate: f32);
}

/// Numbers under Adam.
struct Moving {
    values: Vec<f32>,
    first: Vec<f32>,
    second: Vec<f32>,
}

impl Moving {
    fn new(values: Vec<f32>) -> Self {
        let zeros = vec![0.0; values.len()];
        Moving { first: zeros.clone(), second: zeros, values }
    }

    fn step(&mut self, grad: &[f32], count: u32, rate: f32) {
        const BETA: (f32, f32) = (0.9, 0.999);
        let unbias = (1.0 - BETA.0.powi(count as i32), 1.0 - BETA.1.powi(count as i32));
        for (i, &g) in grad.iter().enumerate() {
            self.first[i] = BETA.0 * self.first[i] + (1.0 - BETA.0) * g;
            self.second[i] = BETA.1 * self.second[i] + (1.0 - BETA.1) * g * g;
            self.values[i] -= rate * (self.first[i] / unbias.0) / ((self.second[i] / unbias.1).sqrt() + 1e-8);
        }
    }
}

/// One V per weight, which starts between where the weight lies and where its code is.
struct Free(Moving);

/// Where weight `i` starts between its two codes.
fn share(p: &Problem<'_>, i: usize) -> f32 {
    let (low, exact) = (p.low(i), p.w[i] / p.scale[i] + p.zero[i]);
    let (own, code) = ((exact - low).clamp(0.0, 1.0), f32::from(p.start[i]) - low);
    // The start's own choice must be what h rounds to.
    let between = 0.95 * own + 0.05 * code;
    if code >= 0.5 { between.max(0.501) } else { between.min(0.499) }
}

impl Free {
    fn new(p: &Problem<'_>) -> Self {
        Free(Moving::new((0..p.w.len()).map(|i| latent(share(p, i))).collect()))
    }
}

impl Directions for Free {
    fn values(&self) -> Vec<f32> {
        self.0.values.clone()
    }

    fn step(&mut self, grad: &[f32], count: u32, rate: f32) {
        self.0.step(grad, count, rate);
    }
}

/// V = V₀ + A·B with A `[rows, RANK]` and B `[RANK, n]`.
struct LowRank {
    n: usize,
    start: Vec<f32>,
    a: Moving,
    b: Moving,
}

impl LowRank {
    fn new(p: &Problem<'_>) -> Self {
        let rows = p.w.len() / p.n;
        // A is nothing at first and B is not, so that the first step moves A.
        let b = (0..RANK * p.n).map(|i| ((i * 7919 + 13) % 997) as f32 / 498.0 - 1.0).collect();
        let start = (0..p.w.len()).map(|i| latent(share(p, i))).collect();
        LowRank { n: p.n, start, a: Moving::new(vec![0.0; rows * RANK]), b: Moving::new(b) }
    }
}

impl Directions for LowRank {
    fn values(&self) -> Vec<f32> {
        let mut v = self.start.clone();
        for (row, a) in v.chunks_exact_mut(self.n).zip(self.a.values.chunks_exact(RANK)) {
            for (a, b) in a.iter().zip(self.b.values.chunks_exact(self.n)) {
                row.iter_mut().zip(b).for_each(|(v, b)| *v += a * b);
            }
        }
        v
    }

    fn step(&mut self, grad: &[f32], count: u32, rate: f32) {
        let (mut d_a, mut d_b) = (vec![0.0f32; self.a.values.len()], vec![0.0f32; self.b.values.len()]);
        for (r, g) in grad.chunks_exact(self.n).enumerate() {
            for k in 0..RANK {
                let (a, b) = (self.a.values[r * RANK + k], &self.b.values[k * self.n..(k + 1) * self.n]);
                d_a[r * RANK + k] = g.iter().zip(b).map(|(g, b)| g * b).sum();
                d_b[k * self.n..(k + 1) * self.n].iter_mut().zip(g).for_each(|(d, g)| *d += a * g);
            }
        }
        self.a.step(&d_a, count, rate);
        self.b.step(&d_b, count, rate);
    }
}

#[cfg(test)]
mod tests;

//! Numbers that say how far one predictor of tokens is from the text, and from another predictor.

use crate::windows::splitmix;
use serde::{Deserialize, Serialize};

/// What one window contributes: per-token losses, and per-position differences to a reference.
#[derive(Debug, Clone, Default)]
pub(crate) struct WindowScores {
    /// −ln p of every predicted token.
    pub(crate) loss: Vec<f64>,
    /// The reference's −ln p of the same tokens.
    pub(crate) reference_loss: Vec<f64>,
    /// KL(reference ‖ model) at every position after the first.
    pub(crate) divergence: Vec<f64>,
    /// Positions after the first whose most likely token agrees.
    pub(crate) agreed: usize,
}

/// A row of logits as a probability distribution.
pub(crate) struct Distribution<'a> {
    logits: &'a [f32],
    /// ln Σ exp(logits).
    log_sum: f64,
}

impl<'a> Distribution<'a> {
    pub(crate) fn new(logits: &'a [f32]) -> Self {
        let max = logits.iter().fold(f32::NEG_INFINITY, |a, &v| a.max(v));
        // Exponents in f32 and their sum in f64: the error of a term is far below the noise of the logits.
        let sum: f64 = logits.iter().map(|&v| f64::from((v - max).exp())).sum();
        Distribution { logits, log_sum: f64::from(max) + sum.ln() }
    }

    /// ln p(token).
    pub(crate) fn log_p(&self, token: usize) -> f64 {
        f64::from(self.logits[token]) - self.log_sum
    }

    /// p of every token.
    pub(crate) fn probabilities(&self) -> Vec<f32> {
        self.logits.iter().map(|&a| ((f64::from(a) - self.log_sum) as f32).exp()).collect()
    }

    /// KL(self ‖ other) where [`Distribution::probabilities`] of `self` are at hand: one exponential per token less.
    pub(crate) fn divergence_by(&self, probabilities: &[f32], other: &Distribution<'_>) -> f64 {
        let each = probabilities.iter().zip(self.logits.iter().zip(other.logits));
        let terms = each.map(|(&p, (&a, &b))| f64::from(p) * (f64::from(a) - f64::from(b)));
        (terms.sum::<f64>() + (other.log_sum - self.log_sum)).max(0.0)
    }

    /// The most likely token; the first of equals.
    pub(crate) fn top(&self) -> usize {
        (1..self.logits.len()).fold(0, |best, i| if self.logits[i] > self.logits[best] { i } else { best })
    }

    /// KL(self ‖ other) in nats; never negative.
    pub(crate) fn divergence(&self, other: &Distribution<'_>) -> f64 {
        let shift = other.log_sum - self.log_sum;
        let terms = self.logits.iter().zip(other.logits).map(|(&a, &b)| {
            let p = f64::from((f64::from(a) - self.log_sum) as f32).exp();
            p * (f64::from(a) - f64::from(b) + shift)
        });
        terms.sum::<f64>().max(0.0)
    }
}

/// Perplexity of a text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// exp of the mean loss.
    pub value: f64,
    /// Standard error of the value, from the spread of token losses.
    pub error: f64,
    /// Mean loss in nats per token.
    pub mean_loss: f64,
    /// Predicted tokens.
    pub tokens: usize,
}

impl Perplexity {
    pub(crate) fn of(losses: &[f64]) -> Self {
        let (mean, error) = mean_and_error(losses);
        Perplexity { value: mean.exp(), error: mean.exp() * error, mean_loss: mean, tokens: losses.len() }
    }
}

/// Mean, spread and quantiles of a set of numbers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Arithmetic mean.
    pub mean: f64,
    /// Standard error of the mean, from 1000 bootstrap resamples of whole windows.
    pub error: f64,
    /// 50% quantile.
    pub median: f64,
    /// 90% quantile.
    pub p90: f64,
    /// 99% quantile.
    pub p99: f64,
    /// Largest value.
    pub max: f64,
}

/// How a model's predictions differ from a reference's on the same text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Divergence {
    /// KL(reference ‖ model), nats, over every position after the first of each window.
    pub kl: Summary,
    /// Share of those positions whose most likely token agrees, percent.
    pub top1_percent: f64,
    /// Standard error of the share, percent.
    pub top1_error: f64,
    /// Mean of Δp, the change of the probability of the correct token, percent.
    pub delta_p_mean: f64,
    /// Root mean square of Δp, percent.
    pub delta_p_rms: f64,
    /// Quantiles 1%, 5%, 50%, 95%, 99% of Δp, percent.
    pub delta_p_quantiles: [f64; 5],
    /// ln(perplexity / reference perplexity) and its standard error from paired losses.
    pub ln_perplexity_ratio: (f64, f64),
    /// Positions compared.
    pub positions: usize,
    /// How many positions have which divergence.
    pub histogram: Histogram,
}

/// Positions by the size of their divergence, in bins of equal width on a logarithmic axis.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// Upper edge of each bin, nats; the last one takes everything above, too.
    pub edges: Vec<f64>,
    /// Positions in each bin.
    pub counts: Vec<usize>,
}

impl Histogram {
    /// Bins from 10⁻⁷ to 10², four to a decade.
    fn of(values: &[f64]) -> Self {
        const BINS: usize = 36;
        let edges: Vec<f64> = (1..=BINS).map(|i| 10f64.powf(-7.0 + i as f64 / 4.0)).collect();
        let mut counts = vec![0; BINS];
        values.iter().for_each(|v| counts[edges.partition_point(|edge| edge < v).min(BINS - 1)] += 1);
        Histogram { edges, counts }
    }
}

impl Divergence {
    pub(crate) fn of(scores: &[WindowScores]) -> Self {
        let mut kl: Vec<f64> = scores.iter().flat_map(|s| s.divergence.iter().copied()).collect();
        let means: Vec<f64> =
            scores.iter().map(|s| s.divergence.iter().sum::<f64>() / s.divergence.len() as f64).collect();
        let mean = kl.iter().sum::<f64>() / kl.len() as f64;
        kl.sort_by(f64::total_cmp);
        let pairs = || scores.iter().flat_map(|s| s.loss.iter().zip(&s.reference_loss));
        let mut delta: Vec<f64> = pairs().map(|(q, r)| 100.0 * ((-q).exp() - (-r).exp())).collect();
        delta.sort_by(f64::total_cmp);
        let ratio: Vec<f64> = pairs().map(|(q, r)| q - r).collect();
        let positions = kl.len();
        let top1 = scores.iter().map(|s| s.agreed).sum::<usize>() as f64 / positions as f64;
        Divergence {
            kl: Summary {
                mean,
                error: bootstrap_error(&means),
                median: quantile(&kl, 0.5),
                p90: quantile(&kl, 0.9),
                p99: quantile(&kl, 0.99),
                max: quantile(&kl, 1.0),
            },
            top1_percent: 100.0 * top1,
            top1_error: 100.0 * (top1 * (1.0 - top1) / positions as f64).sqrt(),
            delta_p_mean: delta.iter().sum::<f64>() / delta.len() as f64,
            delta_p_rms: (delta.iter().map(|d| d * d).sum::<f64>() / delta.len() as f64).sqrt(),
            delta_p_quantiles: [0.01, 0.05, 0.5, 0.95, 0.99].map(|p| quantile(&delta, p)),
            ln_perplexity_ratio: mean_and_error(&ratio),
            positions,
            histogram: Histogram::of(&kl),
        }
    }
}

/// Mean and standard error of the mean of independent numbers.
pub(crate) fn mean_and_error(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean, (variance / n).sqrt())
}

/// Linear interpolation between order statistics; `sorted` ascends and is not empty.
pub(crate) fn quantile(sorted: &[f64], p: f64) -> f64 {
    let at = p * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

/// Standard deviation of the mean over 1000 resamples of `means`. Windows, not positions, are drawn: neighbouring
/// positions are not independent.
fn bootstrap_error(means: &[f64]) -> f64 {
    let n = means.len() as u64;
    let draws: Vec<f64> = (0..1000u64)
        .map(|round| (0..n).map(|i| means[(splitmix(round * n + i) % n) as usize]).sum::<f64>() / n as f64)
        .collect();
    let mean = draws.iter().sum::<f64>() / draws.len() as f64;
    (draws.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / draws.len() as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_equals_its_definition() {
        let a = [0.3f32, -1.0, 2.5, 0.0];
        let b = [0.1f32, -0.5, 2.0, 1.0];
        let softmax = |l: &[f32]| -> Vec<f64> {
            let z: f64 = l.iter().map(|&v| f64::from(v).exp()).sum();
            l.iter().map(|&v| f64::from(v).exp() / z).collect()
        };
        let (p, q) = (softmax(&a), softmax(&b));
        let expected: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
        let (pa, pb) = (Distribution::new(&a), Distribution::new(&b));
        assert!((pa.divergence(&pb) - expected).abs() < 1e-7);
        assert!(pa.divergence(&pa) < 1e-12);
        assert!((pa.log_p(2) - p[2].ln()).abs() < 1e-7);
        assert_eq!((pa.top(), Distribution::new(&[1.0, 1.0]).top()), (2, 0));
    }

    #[test]
    fn quantiles_and_errors_of_known_samples() {
        let sorted: Vec<f64> = (0..101).map(f64::from).collect();
        assert_eq!((quantile(&sorted, 0.5), quantile(&sorted, 0.99), quantile(&sorted, 1.0)), (50.0, 99.0, 100.0));
        assert_eq!(quantile(&[1.0, 2.0], 0.5), 1.5);
        let p = Perplexity::of(&[2.0, 2.0, 2.0]);
        assert_eq!((p.value, p.error), (2f64.exp(), 0.0));
        let h = Histogram::of(&[0.0, 1e-9, 0.5, 0.5, 1e6]);
        assert_eq!((h.counts.iter().sum::<usize>(), h.counts[0], h.counts[35]), (5, 2, 1));
        let at = h.edges.iter().position(|&e| e >= 0.5).unwrap();
        assert_eq!(h.counts[at], 2);
        // The bootstrap of n means has the standard error σ/√n.
        let means: Vec<f64> = (0..400).map(|i| f64::from(i % 2)).collect();
        assert!((bootstrap_error(&means) - 0.5 / 20.0).abs() < 0.002);
    }
}

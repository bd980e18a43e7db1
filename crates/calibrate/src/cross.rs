//! What a site's linears should have read, against what they do read in a model whose earlier part is rounded.

use crate::stats::add_columns;
use bitmill_kernels::{Panels, Short, View, ViewMut, gemm, short_gemm};
use rayon::prelude::*;
use std::borrow::Cow;

/// Rows of a product that one task computes. It depends on nothing, so sums are folded the same way at any thread count.
const BAND: usize = 64;
/// Tokens that are multiplied at a time, of windows that may be short: each time all of a product is gone through.
const TOKENS: usize = 1024;

/// Streaming moments of the drift of two streams at a site: x̂ is read in the partly rounded model, x in the
/// full-precision one, and h and ĥ are the residual streams that the output of the site's linears is added to.
#[derive(Debug, Clone, PartialEq)]
pub struct CrossStats {
    n: usize,
    rows: usize,
    short: Option<Short>,
    weight: f64,
    /// Σ r·(x − x̂)·x̂ᵀ, `[n, n]`.
    drift: Vec<f32>,
    /// Σ r·(h − ĥ)·x̂ᵀ, `[rows, n]`.
    residual: Vec<f32>,
    /// Σ r·(x − x̂).
    drift_sum: Vec<f64>,
    /// Σ r·(h − ĥ).
    residual_sum: Vec<f64>,
}

/// Activations of a few tokens, row-major, as [`CrossStats::add`] takes them.
#[derive(Debug, Clone, Copy)]
pub struct Drift<'a> {
    /// x̂ `[tokens, n]`.
    pub seen: &'a [f32],
    /// x − x̂ `[tokens, n]`.
    pub drift: &'a [f32],
    /// h − ĥ `[tokens, rows]`; empty where rows are 0.
    pub residual: &'a [f32],
    /// Weights of the tokens in the moments; 1 each where there are none.
    pub weights: Option<&'a [f32]>,
}

impl CrossStats {
    /// Moments of no tokens, for inputs of width `n` and a residual stream of width `rows` (0 leaves it out).
    #[must_use]
    pub fn new(n: usize, rows: usize) -> Self {
        let (drift, residual) = (vec![0.0; n * n], vec![0.0; rows * n]);
        let (drift_sum, residual_sum) = (vec![0.0; n], vec![0.0; rows]);
        CrossStats { n, rows, short: None, weight: 0.0, drift, residual, drift_sum, residual_sum }
    }

    /// The same, with activations rounded in products, or as they are with `None`.
    #[must_use]
    pub fn by(self, short: Option<Short>) -> Self {
        CrossStats { short, ..self }
    }

    /// Adds tokens, which come in parts. Sums are folded in their order.
    pub fn add<'a>(&mut self, parts: &[Drift<'a>]) {
        let n = self.n;
        let by_weight = |part: &Drift<'a>| match part.weights {
            None => Cow::Borrowed(part.seen),
            Some(r) => part.seen.chunks_exact(n).zip(r).flat_map(|(x, r)| x.iter().map(move |v| v * r)).collect(),
        };
        let seen: Vec<Cow<'_, [f32]>> = parts.iter().map(by_weight).collect();
        let weight = |part: &Drift<'_>| match part.weights {
            None => (part.seen.len() / n) as f64,
            Some(r) => r.iter().map(|&r| f64::from(r)).sum(),
        };
        self.weight += parts.iter().map(weight).sum::<f64>();
        let add = |what: fn(&Drift<'a>) -> &'a [f32], rows: usize, out: &mut [f32], sums: &mut [f64]| {
            let a: Vec<&[f32]> = parts.iter().flat_map(|part| what(part).chunks_exact(rows)).collect();
            let b: Vec<&[f32]> = seen.iter().flat_map(|seen| seen.chunks_exact(n)).collect();
            for (a, b) in a.chunks(TOKENS).zip(b.chunks(TOKENS)) {
                match self.short {
                    Some(short) => rounded_product(short, (a, rows), (b, n), out),
                    None => product(&a.concat(), rows, &b.concat(), n, out),
                }
            }
            add_columns(sums, &parts.iter().map(|part| (what(part), part.weights)).collect::<Vec<_>>());
        };
        add(|part| part.drift, n, &mut self.drift, &mut self.drift_sum);
        if self.rows > 0 {
            add(|part| part.residual, self.rows, &mut self.residual, &mut self.residual_sum);
        }
    }

    /// E[(x − x̂)·x̂ᵀ], `[n, n]`, and E[(h − ĥ)·x̂ᵀ], `[rows, n]`, both times `share`, in the memory of the sums.
    #[must_use]
    pub fn into_moments(mut self, share: f32) -> [Vec<f32>; 2] {
        let scale = if self.weight > 0.0 { share * (1.0 / self.weight) as f32 } else { 0.0 };
        for sums in [&mut self.drift, &mut self.residual] {
            sums.iter_mut().for_each(|v| *v *= scale);
        }
        [self.drift, self.residual]
    }

    /// E[x − x̂], `[n]`.
    #[must_use]
    pub fn mean_drift(&self) -> Vec<f32> {
        self.means_of(&self.drift_sum)
    }

    /// E[h − ĥ], `[rows]`.
    #[must_use]
    pub fn mean_residual(&self) -> Vec<f32> {
        self.means_of(&self.residual_sum)
    }

    fn means_of(&self, sums: &[f64]) -> Vec<f32> {
        let scale = if self.weight > 0.0 { 1.0 / self.weight } else { 0.0 };
        sums.iter().map(|s| (s * scale) as f32).collect()
    }
}

/// `out [rows, n] += aᵀ·b` for `a [tokens, rows]` and `b [tokens, n]`.
fn product(a: &[f32], rows: usize, b: &[f32], n: usize, out: &mut [f32]) {
    let tokens = b.len() / n;
    out.par_chunks_mut(BAND * n).enumerate().for_each(|(band, out)| {
        let height = out.len() / n;
        let a = View::new(&a[band * BAND..], tokens, height, rows).t();
        gemm(1.0, a, View::new(b, tokens, n, n), 1.0, &mut ViewMut::new(out, height, n, n));
    });
}

/// [`product`] of tokens that are rounded and may lie anywhere, of `rows` and of `n` entries.
fn rounded_product(short: Short, (a, rows): (&[&[f32]], usize), (b, n): (&[&[f32]], usize), out: &mut [f32]) {
    let (mut left, mut right) = (Panels::empty(short), Panels::empty(short));
    left.refill(a, rows);
    right.refill(b, n);
    out.par_chunks_mut(BAND * n).enumerate().for_each(|(band, out)| {
        let height = out.len() / n;
        let rows = band * BAND..band * BAND + height;
        short_gemm(&left, rows, &right, &mut ViewMut::new(out, height, n, n));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_follow_their_definition_in_one_part_and_in_two() {
        let (tokens, n, rows) = (30, 5, 70);
        let values = |count: usize, step: usize| -> Vec<f32> {
            (0..count).map(|i| ((i * step % 1013) as f32 - 500.0) / 400.0).collect()
        };
        let (seen, drift, residual) = (values(tokens * n, 7919), values(tokens * n, 911), values(tokens * rows, 577));
        let weights: Vec<f32> = (0..tokens).map(|t| 0.5 + (t % 3) as f32).collect();
        let part = |s: &mut CrossStats, from: usize, to: usize| {
            s.add(&[(from, from + 3), (from + 3, to)].map(|(from, to)| Drift {
                seen: &seen[from * n..to * n],
                drift: &drift[from * n..to * n],
                residual: &residual[from * rows..to * rows],
                weights: Some(&weights[from..to]),
            }));
        };
        let (mut one, mut two) = (CrossStats::new(n, rows), CrossStats::new(n, rows));
        part(&mut one, 0, tokens);
        part(&mut two, 0, 11);
        part(&mut two, 11, tokens);
        let total: f32 = weights.iter().sum();
        let mean = drift.iter().step_by(n).zip(&weights).map(|(d, r)| d * r).sum::<f32>() / total;
        assert!((one.mean_drift()[0] - mean).abs() < 1e-6 && (two.mean_drift()[0] - mean).abs() < 1e-6);
        let ([drift_of, residual_of], [drift_of_two, residual_of_two]) = (one.into_moments(0.5), two.into_moments(0.5));
        for (values, rows, found, of_two) in
            [(&drift, n, drift_of, drift_of_two), (&residual, rows, residual_of, residual_of_two)]
        {
            for i in 0..rows {
                for j in 0..n {
                    let term = |t: usize| weights[t] * values[t * rows + i] * seen[t * n + j];
                    let expected = 0.5 * (0..tokens).map(term).sum::<f32>() / total;
                    assert!((found[i * n + j] - expected).abs() < 1e-5 && (of_two[i * n + j] - expected).abs() < 1e-5);
                }
            }
        }
    }
}

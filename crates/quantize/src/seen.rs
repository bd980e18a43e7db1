//! What a run sees at one site of a block: statistics of the tokens it learns from and of those it judges by, and the
//! drift between two streams where there are two.

use crate::{Observation, TargetShift, TokenWeights};
use bitmill_calibrate::{CrossStats, Drift, SiteStats, Spread, Tokens, held_out};
use rayon::prelude::*;

/// One window in this many is held out.
const HELD_OUT: usize = 8;

/// Activations of one window at a site, row-major.
#[derive(Default)]
pub(crate) struct Glimpse {
    /// x̂ `[tokens, n]`.
    pub(crate) seen: Tokens,
    /// x − x̂ `[tokens, n]`; empty with one stream.
    pub(crate) drift: Vec<f32>,
    /// h − ĥ `[tokens, hidden]`; empty where the site's output is not added to the residual stream.
    pub(crate) residual: Vec<f32>,
}

/// Everything seen at a site.
#[derive(Clone)]
pub(crate) struct Seen {
    observation: Observation,
    /// Windows in all.
    windows: usize,
    /// Learnt from, and held out; without a shift all windows are in the first.
    parts: [(SiteStats, Option<CrossStats>); 2],
    /// Over all tokens, those that do not count included: who sees few of its own may see others later.
    largest: f32,
}

/// Second moments of some tokens at a site, and means that go with them.
pub(crate) struct Moments {
    /// Σ r over them.
    weight: f64,
    /// H `[n, n]`.
    pub(crate) h: Vec<f32>,
    /// E[(x − x̂)·x̂ᵀ] `[n, n]` and E[(h − ĥ)·x̂ᵀ] `[hidden, n]`; empty without two streams.
    pub(crate) drift: Vec<f32>,
    pub(crate) residual: Vec<f32>,
    /// E[x̂], E[x − x̂] and E[h − ĥ]; the last two are empty without two streams.
    pub(crate) means: [Vec<f32>; 3],
    /// Whether the moments are about the means.
    centred: bool,
}

impl Seen {
    /// Nothing yet, for inputs of width `n`. `hidden` is the width of the residual stream that the site's output is
    /// added to, 0 where it is not.
    pub(crate) fn new(observation: Observation, n: usize, hidden: usize, windows: usize) -> Self {
        let rows = if observation.shift == TargetShift::Outputs { hidden } else { 0 };
        let short = observation.arithmetic.short();
        let cross = || observation.two_streams().then(|| CrossStats::new(n, rows).by(short));
        Seen { observation, windows, parts: [(); 2].map(|()| (SiteStats::new(n).by(short), cross())), largest: 0.0 }
    }

    /// Adds windows from `first` on, with the `weights` of their tokens.
    pub(crate) fn add(&mut self, first: usize, glimpses: &[Glimpse], weights: Option<&[Vec<f32>]>) {
        self.take(first, glimpses, weights, true);
    }

    /// Adds tokens, as many times as their weights say, to the moments alone: they do not count as seen.
    pub(crate) fn add_prior(&mut self, first: usize, glimpses: &[Glimpse], weights: &[Vec<f32>]) {
        self.take(first, glimpses, Some(weights), false);
    }

    fn take(&mut self, first: usize, glimpses: &[Glimpse], weights: Option<&[Vec<f32>]>, counted: bool) {
        let split = self.observation.shift != TargetShift::Off || self.observation.damping_search;
        let share = self.observation.full_share;
        for part in 0..2 {
            let mine = |w: usize| usize::from(split && held_out(w, self.windows, HELD_OUT)) == part;
            let mine = |(w, _): &(usize, &Glimpse)| mine(*w);
            let tokens: Vec<&Tokens> = (first..).zip(glimpses).filter(mine).map(|(_, glimpse)| &glimpse.seen).collect();
            let parts: Vec<Drift<'_>> = (first..)
                .zip(glimpses)
                .filter(mine)
                .map(|(w, Glimpse { seen, drift, residual })| Drift {
                    seen,
                    drift,
                    residual,
                    weights: weights.map(|weights| &weights[w - first][..]),
                })
                .collect();
            if parts.is_empty() {
                continue;
            }
            let (stats, cross) = &mut self.parts[part];
            let plain = counted && weights.is_none() && share == 0.0 && cross.is_none();
            assert!(plain || tokens.iter().all(|x| !x.are_rounded()), "tokens as they are");
            // Sinks that are left out are so from ranges, too; what other weights leave out, a model still reads.
            let ranged = weights.is_some() && self.observation.tokens == TokenWeights::NoSinks;
            if !counted || ranged {
                let largest = |part: &Drift<'_>| {
                    let rows = part.seen.chunks_exact(stats.width()).enumerate();
                    let counts = |t: usize| !ranged || part.weights.is_none_or(|r| r[t] != 0.0);
                    let most = |row: &[f32]| row.iter().fold(0.0f32, |most, v| most.max(v.abs()));
                    rows.filter(|(t, _)| counts(*t)).map(|(_, row)| most(row)).fold(0.0, f32::max)
                };
                self.largest = self.largest.max(parts.par_iter().map(largest).reduce(|| 0.0, f32::max));
            }
            match (weights, share > 0.0) {
                (None, false) => stats.add_parts(&tokens),
                _ => {
                    let scaled = |by: f32| -> Vec<Vec<f32>> {
                        let of = |part: &Drift<'_>| match part.weights {
                            Some(r) => r.iter().map(|r| r * by).collect(),
                            None => vec![by; part.seen.len() / stats.width()],
                        };
                        parts.iter().map(of).collect()
                    };
                    let (own, other) = (scaled(1.0 - share), scaled(share));
                    let weights = own.iter().map(|r| &r[..]);
                    match counted {
                        true => stats.add_weighted(&tokens.into_iter().zip(weights).collect::<Vec<_>>()),
                        false => stats.add_gram(&parts.iter().map(|part| part.seen).zip(weights).collect::<Vec<_>>()),
                    }
                    if share > 0.0 {
                        let of = |part: &Drift<'_>| part.seen.iter().zip(part.drift).map(|(x, d)| x + d).collect();
                        let full: Vec<Vec<f32>> = parts.par_iter().map(of).collect();
                        stats.add_gram(&full.iter().zip(&other).map(|(x, r)| (&x[..], &r[..])).collect::<Vec<_>>());
                    }
                }
            }
            if counted && !ranged {
                self.largest = stats.abs_max().iter().fold(self.largest, |most, &v| most.max(v));
            }
            if let Some(cross) = cross {
                cross.add(&parts);
            }
        }
    }

    /// Whether every number is finite.
    pub(crate) fn is_finite(&self) -> bool {
        self.parts.iter().all(|(stats, _)| stats.is_finite())
    }

    /// Tokens seen.
    pub(crate) fn tokens(&self) -> u64 {
        self.parts.iter().map(|(stats, _)| stats.tokens()).sum()
    }

    /// The largest magnitude.
    pub(crate) fn largest(&self) -> f32 {
        self.largest
    }

    /// How far the activation is from evenly spread numbers, over all tokens.
    pub(crate) fn spread(&self) -> Spread {
        Spread::of_parts(&self.parts.each_ref().map(|(stats, _)| stats))
    }

    /// Moments of what was learnt from, and of what was held out if anything was. `centred` takes the means out, for linears
    /// whose bias takes care of them.
    pub(crate) fn moments(self, centred: bool) -> (Moments, Option<Moments>) {
        let [learnt, held] = self.parts;
        let held = (held.0.weight() > 0.0).then_some(held);
        (
            Moments::of(learnt, &self.observation, centred),
            held.map(|held| Moments::of(held, &self.observation, centred)),
        )
    }
}

impl Moments {
    fn of((stats, cross): (SiteStats, Option<CrossStats>), observation: &Observation, centred: bool) -> Self {
        let share = 1.0 - observation.full_share;
        let scaled = |m: Vec<f32>| -> Vec<f32> { m.into_iter().map(|v| v * share).collect() };
        let means = |c: &CrossStats| [scaled(c.mean_drift()), scaled(c.mean_residual())];
        let [mean_drift, mean_residual] = cross.as_ref().map(means).unwrap_or_default();
        let (weight, means) = (stats.weight(), [stats.centre(), mean_drift, mean_residual]);
        let [drift, residual] = cross.map(|cross| cross.into_moments(share)).unwrap_or_default();
        let mut moments = Moments { weight, h: stats.into_hessian(), drift, residual, means, centred };
        if centred {
            moments.add_products(-1.0, &moments.means.clone());
        }
        moments
    }

    /// Adds `by` times the products of `means` with the first of them.
    fn add_products(&mut self, by: f64, means: &[Vec<f32>; 3]) {
        for (m, mean) in [&mut self.h, &mut self.drift, &mut self.residual].into_iter().zip(means) {
            add_outer(by, m, mean, &means[0]);
        }
    }

    /// H and the means; what else there is goes.
    pub(crate) fn into_parts(self) -> (Vec<f32>, [Vec<f32>; 3]) {
        (self.h, self.means)
    }

    /// Whether they are of no tokens.
    pub(crate) fn is_empty(&self) -> bool {
        self.weight <= 0.0
    }

    /// Moments of both, in the memory of the first.
    pub(crate) fn merged(mut self, other: Moments) -> Self {
        let weight = self.weight + other.weight;
        let share = other.weight / weight;
        let mix = |a: &mut [f32], b: &[f32]| {
            a.par_iter_mut().zip(b).for_each(|(a, &b)| *a += (f64::from(b - *a) * share) as f32);
        };
        mix(&mut self.h, &other.h);
        mix(&mut self.drift, &other.drift);
        mix(&mut self.residual, &other.residual);
        if self.centred {
            // Each is about its own mean, and these lie apart.
            let mut apart = self.means.clone();
            apart.iter_mut().zip(&other.means).for_each(|(a, b)| a.iter_mut().zip(b).for_each(|(a, b)| *a -= b));
            self.add_products(share * (1.0 - share), &apart);
        }
        self.means.iter_mut().zip(&other.means).for_each(|(a, b)| mix(a, b));
        Moments { weight, ..self }
    }
}

/// `m += by·a·bᵀ`.
pub(crate) fn add_outer(by: f64, m: &mut [f32], a: &[f32], b: &[f32]) {
    m.par_chunks_exact_mut(b.len()).zip(a).for_each(|(row, a)| {
        row.iter_mut().zip(b).for_each(|(m, b)| *m = (f64::from(*m) + by * f64::from(*a) * f64::from(*b)) as f32);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sinks_that_are_left_out_set_no_range() {
        let glimpse =
            || Glimpse { seen: Tokens::new(vec![9.0, -40.0, 1.0, -2.0], 2), drift: Vec::new(), residual: Vec::new() };
        let largest = |tokens| {
            let mut seen = Seen::new(Observation { tokens, ..Observation::default() }, 2, 0, 1);
            seen.add(0, &[glimpse()], Some(&[vec![0.0, 2.0]]));
            seen.largest()
        };
        assert_eq!([TokenWeights::NoSinks, TokenWeights::First].map(largest), [2.0, 40.0]);
    }
}

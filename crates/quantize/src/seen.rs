//! What a run sees at one site of a block: statistics of the tokens it learns from and of those it judges by, and the
//! drift between two streams where there are two.

use crate::{Observation, TargetShift, TokenWeights};
use bitmill_calibrate::{CrossStats, Drift, SiteStats, Spread, held_out};
use rayon::prelude::*;
use std::borrow::Cow;

/// One window in this many is held out.
const HELD_OUT: usize = 8;

/// Activations of one window at a site, row-major.
#[derive(Default)]
pub(crate) struct Glimpse {
    /// x̂ `[tokens, n]`.
    pub(crate) seen: Vec<f32>,
    /// x − x̂ `[tokens, n]`; empty with one stream.
    pub(crate) drift: Vec<f32>,
    /// h − ĥ `[tokens, hidden]`; empty where the site's output is not added to the residual stream.
    pub(crate) residual: Vec<f32>,
}

/// Everything seen at a site.
pub(crate) struct Seen {
    observation: Observation,
    /// Windows in all.
    windows: usize,
    /// Learnt from, and held out; without a shift all windows are in the first.
    parts: [(SiteStats, Option<CrossStats>); 2],
    /// Over all tokens, those that do not count included: who sees few of its own may see others later.
    largest: f32,
}

/// Second moments of a site, and what they are used for.
pub(crate) struct Moments {
    /// H `[n, n]`.
    pub(crate) h: Vec<f32>,
    /// E[(x − x̂)·x̂ᵀ] `[n, n]` and E[(h − ĥ)·x̂ᵀ] `[hidden, n]`; empty without two streams.
    pub(crate) drift: Vec<f32>,
    pub(crate) residual: Vec<f32>,
}

impl Seen {
    /// Nothing yet, for inputs of width `n`. `hidden` is the width of the residual stream that the site's output is
    /// added to, 0 where it is not.
    pub(crate) fn new(observation: Observation, n: usize, hidden: usize, windows: usize) -> Self {
        let rows = if observation.shift == TargetShift::Outputs { hidden } else { 0 };
        let brain = observation.arithmetic.brain();
        let cross = || observation.two_streams().then(|| CrossStats::new(n, rows).by(brain));
        Seen { observation, windows, parts: [(); 2].map(|()| (SiteStats::new(n).by(brain), cross())), largest: 0.0 }
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
        for part in 0..2 {
            let mine = |w: usize| usize::from(split && held_out(w, self.windows, HELD_OUT)) == part;
            let of = |what: fn(&Glimpse) -> &Vec<f32>| -> Vec<f32> {
                let parts: Vec<&[f32]> =
                    (first..).zip(glimpses).filter(|(w, _)| mine(*w)).map(|(_, g)| &what(g)[..]).collect();
                parts.concat()
            };
            let seen = of(|g| &g.seen);
            if seen.is_empty() {
                continue;
            }
            let (drift, residual) = (of(|g| &g.drift), of(|g| &g.residual));
            let r: Option<Vec<f32>> = weights.map(|weights| {
                (first..).zip(weights).filter(|(w, _)| mine(*w)).flat_map(|(_, r)| r.iter().copied()).collect()
            });
            let share = self.observation.full_share;
            let (stats, cross) = &mut self.parts[part];
            // Sinks that are left out are so from ranges, too; what other weights leave out, a model still reads.
            let ranged = r.as_ref().filter(|_| self.observation.tokens == TokenWeights::NoSinks);
            let largest = |(t, row): (usize, &[f32])| match ranged {
                Some(r) if r[t] == 0.0 => 0.0,
                _ => row.iter().fold(0.0f32, |most, v| most.max(v.abs())),
            };
            let tokens = seen.par_chunks(stats.width()).enumerate().with_min_len(64);
            self.largest = self.largest.max(tokens.map(largest).reduce(|| 0.0, f32::max));
            let add = |stats: &mut SiteStats, r: &[f32]| match counted {
                true => stats.add_weighted(&seen, r),
                false => stats.add_gram(&seen, r),
            };
            match (&r, share > 0.0) {
                (None, false) => stats.add(&seen),
                (Some(r), false) => add(stats, r),
                (r, true) => {
                    let ones = vec![1.0; seen.len() / stats.width()];
                    let scaled = |by: f32| r.as_ref().unwrap_or(&ones).iter().map(|r| r * by).collect::<Vec<_>>();
                    add(stats, &scaled(1.0 - share));
                    let full: Vec<f32> = seen.iter().zip(&drift).map(|(x, d)| x + d).collect();
                    stats.add_gram(&full, &scaled(share));
                }
            }
            if let Some(cross) = cross {
                cross.add(&Drift { seen: &seen, drift: &drift, residual: &residual, weights: r.as_deref() });
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
        self.merged().0.spread()
    }

    /// Moments of what was learnt from and of what was held out; `None` where either is empty or nothing is to be shifted.
    pub(crate) fn split(&self, centred: bool) -> Option<[Moments; 2]> {
        let filled = self.parts.iter().all(|(stats, cross)| stats.weight() > 0.0 && cross.is_some());
        (filled && self.observation.shift != TargetShift::Off)
            .then(|| self.parts.each_ref().map(|part| self.moments_of(part, centred)))
    }

    /// H of what was learnt from and of what was held out; `None` where either is empty.
    pub(crate) fn apart(&self, centred: bool) -> Option<[Vec<f32>; 2]> {
        let filled = self.parts.iter().all(|(stats, _)| stats.weight() > 0.0);
        filled.then(|| self.parts.each_ref().map(|part| self.moments_of(part, centred).h))
    }

    /// Moments of everything. `centred` takes the means out, for linears whose bias takes care of them.
    pub(crate) fn all(&self, centred: bool) -> Moments {
        self.moments_of(&self.merged(), centred)
    }

    /// Both parts as one.
    fn merged(&self) -> Cow<'_, (SiteStats, Option<CrossStats>)> {
        let [first, (stats, cross)] = &self.parts;
        let mut all = Cow::Borrowed(first);
        if stats.weight() > 0.0 {
            let (both, both_cross) = all.to_mut();
            both.merge(stats);
            if let (Some(a), Some(b)) = (both_cross, cross) {
                a.merge(b);
            }
        }
        all
    }

    /// E[x̂], E[x − x̂] and E[h − ĥ]; the last two are empty without two streams.
    pub(crate) fn means(&self) -> [Vec<f32>; 3] {
        let merged = self.merged();
        let (stats, cross) = &*merged;
        let shifted = cross.as_ref().filter(|_| self.observation.shift != TargetShift::Off);
        let share = 1.0 - self.observation.full_share;
        let scaled = |m: Vec<f32>| m.into_iter().map(|v| v * share).collect();
        let means = |c: &CrossStats| [scaled(c.mean_drift()), scaled(c.mean_residual())];
        let [drift, residual] = shifted.map_or([Vec::new(), Vec::new()], means);
        [stats.centre(), drift, residual]
    }

    fn moments_of(&self, (stats, cross): &(SiteStats, Option<CrossStats>), centred: bool) -> Moments {
        let share = 1.0 - self.observation.full_share;
        let scaled = |mut m: Vec<f32>| {
            m.iter_mut().for_each(|v| *v *= share);
            m
        };
        let mut moments = Moments { h: stats.hessian(), drift: Vec::new(), residual: Vec::new() };
        if let Some(cross) = cross {
            (moments.drift, moments.residual) = (scaled(cross.drift()), scaled(cross.residual()));
        }
        if centred {
            let mean = stats.centre();
            subtract_outer(&mut moments.h, &mean, &mean);
            if let Some(cross) = cross {
                subtract_outer(&mut moments.drift, &scaled(cross.mean_drift()), &mean);
                subtract_outer(&mut moments.residual, &scaled(cross.mean_residual()), &mean);
            }
        }
        moments
    }
}

/// `m −= a·bᵀ`.
pub(crate) fn subtract_outer(m: &mut [f32], a: &[f32], b: &[f32]) {
    for (row, a) in m.chunks_exact_mut(b.len()).zip(a) {
        row.iter_mut().zip(b).for_each(|(m, b)| *m = (f64::from(*m) - f64::from(*a) * f64::from(*b)) as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sinks_that_are_left_out_set_no_range() {
        let glimpse = || Glimpse { seen: vec![9.0, -40.0, 1.0, -2.0], drift: Vec::new(), residual: Vec::new() };
        let largest = |tokens| {
            let mut seen = Seen::new(Observation { tokens, ..Observation::default() }, 2, 0, 1);
            seen.add(0, &[glimpse()], Some(&[vec![0.0, 2.0]]));
            seen.largest()
        };
        assert_eq!([TokenWeights::NoSinks, TokenWeights::First].map(largest), [2.0, 40.0]);
    }
}

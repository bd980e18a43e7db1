//! Which columns of a block are salient, and the magnitude at which its other weights are split in two.
//!
//! Columns are ranked by Σ_rows w²/U_jj², U being GPTQ's factor of H⁻¹: what it costs to lose them. The first i of them are
//! tried as salient for i = 1..=49, with all other columns binarized twice as well, and the i of least error is kept. Then
//! 81 percentiles of the remaining magnitudes, the 10th to the 90th, are tried as threshold, each part of each row being
//! binarized once. Errors are summed over all rows of the block, in an order that no number of threads changes.

use bitmill_scheme::{Binary, Residual};
use rayon::prelude::*;

/// Salient columns, at most.
const MOST: usize = 49;
/// Percentiles that are tried as thresholds: the 10th, the 11th, and so on to the 90th.
const PERCENTILES: std::ops::RangeInclusive<u32> = 10..=90;
/// Rows whose errors are summed by one task.
const ROWS: usize = 32;

/// The columns of a group, as they should be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Block<'a> {
    /// `[rows, width]`.
    pub(super) target: &'a [f32],
    /// 1/U_jj² of each column: what a squared error there still costs.
    pub(super) cost: &'a [f32],
}

/// What all rows of a block have in common.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Choice {
    /// For every column.
    pub(super) salient: Vec<bool>,
    /// The least magnitude of the sparse part.
    pub(super) threshold: f32,
}

impl Block<'_> {
    /// Columns by what it costs to lose them, and the split of least error.
    pub(super) fn choose(&self) -> Choice {
        self.choose_by(|w, cost| w * w * cost)
    }

    /// The same with columns ranked by the sum of `score`, of a weight and the cost of its column.
    pub(super) fn choose_by(&self, score: impl Fn(f32, f32) -> f32 + Sync) -> Choice {
        let width = self.cost.len();
        let scores = self.summed(width, |row, sums| {
            let each = row.iter().zip(self.cost).map(|(&w, &cost)| f64::from(score(w, cost)));
            sums.iter_mut().zip(each).for_each(|(sum, score)| *sum += score);
        });
        let mut ranked: Vec<usize> = (0..width).collect();
        ranked.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        let mut salient = vec![false; width];
        ranked[..self.count(&ranked)].iter().for_each(|&col| salient[col] = true);
        let threshold = self.threshold(&salient);
        Choice { salient, threshold }
    }

    /// Sums over all rows of what `add` adds to `count` sums for one.
    fn summed(&self, count: usize, add: impl Fn(&[f32], &mut [f64]) + Sync) -> Vec<f64> {
        let width = self.cost.len();
        let of = |rows: &[f32]| {
            let mut sums = vec![0.0f64; count];
            rows.chunks(width).for_each(|row| add(row, &mut sums));
            sums
        };
        let parts: Vec<Vec<f64>> = self.target.par_chunks(ROWS * width).map(of).collect();
        parts.into_iter().fold(vec![0.0; count], |mut all, part| {
            all.iter_mut().zip(part).for_each(|(a, p)| *a += p);
            all
        })
    }

    /// How many of the columns `ranked` are salient.
    fn count(&self, ranked: &[usize]) -> usize {
        let most = MOST.min(self.cost.len() - 1);
        let errors = self.summed(most, |row, sums| {
            let row: Vec<f32> = ranked.iter().map(|&col| row[col]).collect();
            for (i, sum) in sums.iter_mut().enumerate() {
                let (salient, rest) = row.split_at(i + 1);
                *sum += twice(salient) + twice(rest);
            }
        });
        least(&errors).map_or(0, |i| i + 1)
    }

    /// The threshold of least error for the columns that are not `salient`.
    fn threshold(&self, salient: &[bool]) -> f32 {
        let candidates = self.percentiles(salient);
        let errors = self.summed(candidates.len(), |row, sums| {
            let mut rest: Vec<f32> = row.iter().zip(salient).filter(|(_, s)| !**s).map(|(&v, _)| v).collect();
            rest.sort_by(|a, b| a.abs().total_cmp(&b.abs()));
            let mut last = (usize::MAX, 0.0);
            for (sum, &threshold) in sums.iter_mut().zip(&candidates) {
                let cut = rest.partition_point(|v| v.abs() < threshold);
                if cut != last.0 {
                    last = (cut, once(&rest[..cut]) + once(&rest[cut..]));
                }
                *sum += last.1;
            }
        });
        least(&errors).map_or(0.0, |i| candidates[i])
    }

    /// Percentiles of the magnitudes, those of salient columns counting as zeros, between neighbours on a line.
    fn percentiles(&self, salient: &[bool]) -> Vec<f32> {
        let magnitude = |(v, s): (&f32, &bool)| if *s { 0.0 } else { v.abs() };
        let mut all: Vec<f32> = self.target.iter().zip(salient.iter().cycle()).map(magnitude).collect();
        all.par_sort_unstable_by(f32::total_cmp);
        let at = |percent: u32| {
            let place = f64::from(percent) / 100.0 * all.len().saturating_sub(1) as f64;
            let (low, share) = (place.floor() as usize, place.fract());
            let [a, b] = [low, low + 1].map(|i| f64::from(all.get(i).or(all.last()).copied().unwrap_or(0.0)));
            (a + (b - a) * share) as f32
        };
        PERCENTILES.map(at).collect()
    }
}

/// Σ(w − ŵ)² of weights that are binarized once.
fn once(w: &[f32]) -> f64 {
    let fit = Binary::fit(w.iter().copied());
    w.iter().map(|&x| f64::from(x - fit.value(fit.plus(x))).powi(2)).sum()
}

/// The same of weights whose remainder is binarized again.
fn twice(w: &[f32]) -> f64 {
    let fit = Residual::fit(w.iter().copied());
    w.iter().map(|&x| f64::from(x - fit.value(fit.plus(x))).powi(2)).sum()
}

/// The first of the least.
fn least(errors: &[f64]) -> Option<usize> {
    (0..errors.len()).min_by(|&a, &b| errors[a].total_cmp(&errors[b]))
}

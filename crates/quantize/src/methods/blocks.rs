//! GGUF block types under the methods: fitted one by one for rounding to nearest, or as the grid of the sweep.

use super::Linear;
use crate::sweep::{Part, SweepGrid, Unit};
use crate::{Factor, Order, ScaleSearch, Sweep, sweep};
use bitmill_kernels::{Level, Stored, fit_blocks};
use bitmill_scheme::{BlockForm, BlockParams, Fitted, Quantized, Step};
use rayon::prelude::*;

/// Every block of the rows `w` of `linear` (whose own weights are not read) fitted to its own weights, whose errors cost
/// `importance` by columns if that is known, and each weight at its nearest value; Σ h(w − ŵ)² and Σ h·w² come along, h being
/// the importance, or 1.
///
/// # Panics
/// Where the scheme is none of blocks: a caller's bug.
pub(crate) fn nearest(linear: &Linear<'_>, w: Stored<'_>, importance: Option<&[f32]>) -> (Quantized, [f64; 2]) {
    let Some(form) = linear.scheme.form() else { panic!("{} is no scheme of blocks", linear.scheme) };
    let n = linear.shape[1];
    if form.has_lanes() {
        let blocks = w.len() / form.len;
        let mut q = Quantized {
            scheme: linear.scheme,
            shape: linear.shape,
            codes: vec![0; w.len()],
            scales: vec![0.0; blocks * form.reals()],
            zeros: vec![0; blocks * form.integers()],
            group_of: Vec::new(),
            input: None,
        };
        let to = Fitted { reals: &mut q.scales, integers: &mut q.zeros, codes: &mut q.codes };
        let lost = fit_blocks(Level::best(), form, w, importance, to);
        return (q, lost);
    }
    let mut wide = Vec::new();
    if let Stored::Bf16(w) = w {
        wide.resize(w.len(), 0.0);
    }
    let w = w.wide(&mut wide);
    // Uneven costs want the points that are really nearest.
    let fit = if importance.is_some() { BlockForm::fit } else { BlockForm::fit_near };
    let importance = importance.map_or_else(|| vec![1.0; n], <[f32]>::to_vec);
    let params: Vec<BlockParams> = (w.par_chunks(form.len).enumerate())
        .map(|(i, w)| fit(form, w, &importance[i * form.len % n..][..form.len]))
        .collect();
    let round = |(i, (w, codes)): (usize, (&[f32], &mut [u8]))| {
        let a = form.affine(&params[i / form.subs()], i % form.subs());
        form.round(w, &importance[i * form.sub % n..][..form.sub], a, codes);
    };
    let mut codes = vec![0u8; w.len()];
    w.par_chunks(form.sub).zip(codes.par_chunks_mut(form.sub)).enumerate().for_each(round);
    let q = assemble(linear, form, codes, &params);
    let lost = lost(w, &q.dequantize(), Some(&importance));
    (q, lost)
}

/// Σ h(w − ŵ)² and Σ h·w², with h = 1 where no costs are given.
pub(crate) fn lost(w: &[f32], rounded: &[f32], h: Option<&[f32]>) -> [f64; 2] {
    let cost = |i: usize| h.map_or(1.0, |h| f64::from(h[i % h.len()]));
    let each = w.iter().zip(rounded).enumerate();
    each.fold([0.0; 2], |[error, energy], (i, (&w, &r))| {
        [error + cost(i) * f64::from(w - r).powi(2), energy + cost(i) * f64::from(w).powi(2)]
    })
}

/// The sweep with the type as its grid.
pub(super) fn swept(
    linear: &Linear<'_>,
    form: &'static BlockForm,
    order: &Order,
    factor: &Factor,
    search: ScaleSearch,
) -> Quantized {
    let what = Sweep { factor, order, grid: BlockGrid(form), group_len: form.len, search, fixed: None };
    let (codes, params) = sweep(linear.weight, &what);
    assemble(linear, form, codes, &params)
}

fn assemble(linear: &Linear<'_>, form: &BlockForm, codes: Vec<u8>, params: &[BlockParams]) -> Quantized {
    let (mut scales, mut zeros) = (Vec::new(), Vec::new());
    scales.reserve_exact(params.len() * form.reals());
    zeros.reserve_exact(params.len() * form.integers());
    for p in params {
        scales.extend_from_slice(&p.reals[..form.reals()]);
        zeros.extend_from_slice(&p.integers[..form.integers()]);
    }
    Quantized { scheme: linear.scheme, shape: linear.shape, codes, scales, zeros, group_of: Vec::new(), input: None }
}

/// A block type as the sweep sees it: d and dmin are fitted with all integers when the sweep reaches a block, and the
/// integers of a sub-block once more when it reaches the sub-block.
#[derive(Debug, Clone, Copy)]
struct BlockGrid(&'static BlockForm);

impl BlockGrid {
    /// Weights and costs of a part in the order of the matrix.
    fn sorted(&self, part: Part<'_>, search: ScaleSearch) -> (Vec<f32>, Vec<f32>) {
        let mut at: Vec<usize> = (0..part.w.len()).collect();
        at.sort_unstable_by_key(|&i| part.columns[i]);
        let cost = |i: usize| if search == ScaleSearch::Hessian { part.cost[i] } else { 1.0 };
        at.into_iter().map(|i| (part.w[i], cost(i))).unzip()
    }
}

impl SweepGrid for BlockGrid {
    type Params = BlockParams;

    fn blank(&self) -> BlockParams {
        BlockParams::zero()
    }

    fn stride(&self, group_len: usize) -> usize {
        if matches!(self.0.step, Step::Scaled { .. } | Step::Odd { .. } | Step::Float) { self.0.sub } else { group_len }
    }

    fn fit(&self, group: Part<'_>, search: ScaleSearch) -> BlockParams {
        let (w, cost) = self.sorted(group, search);
        self.0.fit(&w, &cost)
    }

    fn refit(&self, params: &mut BlockParams, part: Part<'_>, search: ScaleSearch) {
        let (w, cost) = self.sorted(part, search);
        let sub = part.columns[0] as usize % self.0.len / self.0.sub;
        self.0.refit_sub(params, sub, &w, &cost);
    }

    fn unit(&self) -> usize {
        self.0.unit()
    }

    #[inline]
    fn round(&self, unit: Unit<'_>, params: &BlockParams, codes: &mut [u8], values: &mut [f32]) {
        let a = self.0.affine(params, unit.column % self.0.len / self.0.sub);
        if codes.len() == 1 {
            codes[0] = self.0.nearest(unit.w[0], a);
        } else {
            self.0.round_unit(unit.w, &unit.metric(), a, f32::INFINITY, codes);
        }
        codes.iter().zip(values).for_each(|(&c, v)| *v = self.0.value(c, a));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::refine::units::tests::point;
    use crate::sweep::tests::{Random, random_h, random_w};
    use bitmill_scheme::{BLOCKS, Scheme};

    #[test]
    fn every_unit_of_a_sweep_is_the_best_given_those_before_it() {
        let n = 512;
        let (h, w) = (random_h(n, 31), random_w(2 * n, 32));
        let importance: Vec<f32> = (0..n).map(|i| h[i * n + i]).collect();
        let mut r = Random::new(9);
        for form in BLOCKS.iter().filter(|f| f.unit() > 1) {
            let order = Order::nested(&importance, &[form.len, form.sub, form.unit()]);
            let factor = Factor::new(&h, &order.columns, 0.0).unwrap();
            let linear = Linear::new("x", &w, [2, n], Scheme::block(form.kind));
            let q = swept(&linear, form, &order, &factor, ScaleSearch::Hessian);
            q.validate().unwrap();
            let column = |k: usize| order.columns[k] as usize;
            // What the unit at position `at` costs: its share of Σ D(ΔŨ)².
            let cost = |values: &[f32], row: usize, at: usize| -> f64 {
                let delta = |k: usize| f64::from(values[row * n + column(k)] - w[row * n + column(k)]);
                let fed = |k: usize| (0..=k).map(|j| delta(j) * f64::from(factor.unit()[j * n + k])).sum::<f64>();
                (at..at + form.unit()).map(|k| f64::from(factor.diagonal()[k]) * fed(k).powi(2)).sum()
            };
            let values = q.dequantize();
            for _ in 0..60 {
                let (row, at) = (r.below(2), r.below(n / form.unit()) * form.unit());
                let from = row * n + column(at);
                let mut other = q.clone();
                let (fresh, begin) = (point(form.codebook().unwrap(), &mut r), r.below(form.unit()));
                other.codes[from + begin..from + form.unit()].copy_from_slice(&fresh[begin..]);
                if other.validate().is_ok() {
                    let (is, could_be) = (cost(&values, row, at), cost(&other.dequantize(), row, at));
                    assert!(is <= could_be * (1.0 + 1e-4), "{}: {is} where {could_be} is possible", form.name);
                }
            }
        }
    }
}

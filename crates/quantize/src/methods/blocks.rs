//! GGUF block types under the methods: fitted one by one for rounding to nearest, or as the grid of the sweep.

use super::Linear;
use crate::sweep::{Part, SweepGrid};
use crate::{Factor, Order, ScaleSearch, Sweep, sweep};
use bitmill_kernels::fit_blocks;
use bitmill_scheme::{BlockForm, BlockParams, Quantized, Step};
use rayon::prelude::*;

/// Every block fitted to its own weights, whose errors cost `importance`, and each weight at its nearest value.
pub(super) fn nearest(linear: &Linear<'_>, form: &BlockForm, importance: &[f32]) -> Quantized {
    let n = linear.shape[1];
    if form.has_lanes() {
        let mut params = vec![BlockParams::zero(); linear.weight.len() / form.len];
        let mut codes = vec![0u8; linear.weight.len()];
        fit_blocks(form, linear.weight, importance, &mut params, &mut codes);
        return assemble(linear, form, codes, &params);
    }
    let params: Vec<BlockParams> = (linear.weight.par_chunks(form.len).enumerate())
        .map(|(i, w)| form.fit(w, &importance[i * form.len % n..][..form.len]))
        .collect();
    let round = |(i, (w, codes)): (usize, (&[f32], &mut [u8]))| {
        let a = form.affine(&params[i / form.subs()], i % form.subs());
        w.iter().zip(codes).for_each(|(&x, c)| *c = form.nearest(x, a));
    };
    let mut codes = vec![0u8; linear.weight.len()];
    linear.weight.par_chunks(form.sub).zip(codes.par_chunks_mut(form.sub)).enumerate().for_each(round);
    assemble(linear, form, codes, &params)
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
    let scales = params.iter().flat_map(|p| p.reals[..form.reals()].iter().copied()).collect();
    let zeros = params.iter().flat_map(|p| p.integers[..form.integers()].iter().copied()).collect();
    Quantized { scheme: linear.scheme, shape: linear.shape, codes, scales, zeros, group_of: Vec::new() }
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
        if matches!(self.0.step, Step::Scaled { .. }) { self.0.sub } else { group_len }
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

    #[inline]
    fn round(&self, x: f32, params: &BlockParams, column: usize) -> (u8, f32) {
        let a = self.0.affine(params, column % self.0.len / self.0.sub);
        let code = self.0.nearest(x, a);
        (code, self.0.value(code, a))
    }
}

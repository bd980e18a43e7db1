//! The sweep: columns rounded one after another, each compensating for the errors of those before it.
//!
//! Pseudo-code, for every row of W, with Δ = Ŵ − W and the factor of [`crate::factor`]:
//!
//! ```text
//! for k in order:
//!     t   = w_k − Σ_{j before k} Δ_j·Ũ_jk
//!     ŵ_k = nearest grid value to t          (the grid's parameters are fitted to t at the start of a group)
//! ```
//!
//! Where a grid rounds several columns at once, as a codebook does, these are a unit: with M = Ũ·D·Ũᵀ the unit's own part
//! of the factors, the grid takes the point nearest to the unit's t in the metric M, which is what the unit can still lose
//! once later columns have made up for it, and the errors of all its columns go on to the columns after it (blocked LDLQ,
//! as in QuIP#).
//!
//! Columns are worked in blocks: one product brings in all earlier blocks, the rest happens inside the block. Rows are
//! independent, so chunks of rows run in parallel and give the same codes at any thread count.

mod sixteen;

use crate::refine::task_rows;
use crate::{Factor, ScaleSearch};
use bitmill_kernels::{Level, ROWS, View, ViewMut, fit_weighted, gemm};
use bitmill_scheme::{Fit, FloatGrid, Grid, GroupParams, IntGrid, Metric, UNIT};
use rayon::prelude::*;
use sixteen::Memory;

/// Columns of one block, unless a group is longer.
const BLOCK: usize = 128;

/// The order in which columns are rounded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// The column rounded at each position; whole groups of `group_len` neighbours follow one another.
    pub columns: Vec<u32>,
}

impl Order {
    /// Columns as they lie.
    #[must_use]
    pub fn natural(n: usize) -> Self {
        Order { columns: (0..n as u32).collect() }
    }

    /// Most important first, group by group: groups by their mean `importance`, columns inside a group by their own.
    /// Groups stay contiguous on disk and parameters can still be fitted when a group is reached, which is what makes
    /// activation order free at inference (GPTQModel calls it group-aware).
    #[must_use]
    pub fn by_importance(importance: &[f32], group_len: usize) -> Self {
        Order::nested(importance, &[group_len, 1])
    }

    /// As [`Order::by_importance`] for groups within groups: of `lens`, each divides the one before it. Columns of an
    /// innermost group stay as they lie.
    #[must_use]
    pub fn nested(importance: &[f32], lens: &[usize]) -> Self {
        fn arrange(importance: &[f32], from: usize, lens: &[usize], out: &mut Vec<u32>) {
            let [len, inner @ ..] = lens else {
                return out.extend((from..from + importance.len()).map(|c| c as u32));
            };
            let mean = |g: &[f32]| g.iter().sum::<f32>() / g.len() as f32;
            let mut groups: Vec<(f32, usize)> = importance.chunks(*len).map(mean).zip(0..).collect();
            groups.sort_by(|a, b| b.0.total_cmp(&a.0));
            for at in groups.into_iter().map(|(_, g)| g * len) {
                arrange(&importance[at..importance.len().min(at + len)], from + at, inner, out);
            }
        }
        let mut columns = Vec::with_capacity(importance.len());
        arrange(importance, 0, lens, &mut columns);
        Order { columns }
    }
}

/// A grid as the sweep sees it: fitted to a group when the sweep reaches it, and then rounded onto.
pub trait SweepGrid: Copy + Sync {
    /// What is stored for a group.
    type Params: Copy + Send + Sync;
    /// A placeholder until a group is reached.
    fn blank(&self) -> Self::Params;
    /// Columns between the places where parameters are fitted; divides the group.
    fn stride(&self, group_len: usize) -> usize {
        group_len
    }
    /// Parameters for a whole group.
    fn fit(&self, group: Part<'_>, search: ScaleSearch) -> Self::Params;
    /// Fits what belongs to the next `stride` columns alone to their weights, which have been compensated since.
    fn refit(&self, _params: &mut Self::Params, _part: Part<'_>, _search: ScaleSearch) {}
    /// The grid of integers it is, where each column is rounded by itself onto what [`SweepGrid::line`] says.
    fn integers(&self) -> Option<IntGrid> {
        None
    }
    /// Scale and zero point.
    fn line(&self, _params: &Self::Params) -> [f32; 2] {
        [1.0, 0.0]
    }
    /// Columns rounded at once, neighbours in the matrix; divides the stride.
    fn unit(&self) -> usize {
        1
    }
    /// The codes nearest to a unit, and their values.
    fn round(&self, unit: Unit<'_>, params: &Self::Params, codes: &mut [u8], values: &mut [f32]);
}

/// Columns of one row that are rounded at once.
#[derive(Debug, Clone, Copy)]
pub struct Unit<'a> {
    /// What they should be, given all columns before them.
    pub w: &'a [f32],
    /// The first column of the matrix they are.
    pub column: usize,
    factor: &'a Factor,
    /// Position of the first in the sweep.
    at: usize,
}

impl Unit<'_> {
    /// What errors of the unit still cost after later columns have made up for them.
    #[must_use]
    pub fn metric(&self) -> Metric {
        let (n, at, len) = (self.factor.width(), self.at, self.w.len());
        let mut metric = Metric::diagonal(&self.factor.diagonal()[at..at + len]);
        for (j, row) in metric.u.iter_mut().enumerate().take(len) {
            row[..len].copy_from_slice(&self.factor.unit()[(at + j) * n + at..][..len]);
        }
        metric
    }
}

/// Columns of one row on which parameters are fitted, in the order of the sweep.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    /// Compensated weights.
    pub w: &'a [f32],
    /// What a squared error of each still costs after later columns have made up for it.
    pub cost: &'a [f32],
    /// The columns of the matrix they are.
    pub columns: &'a [u32],
}

/// Grids whose groups have a scale and a zero point, with what fits one to a group and the integers they are.
macro_rules! by_groups {
    ($($grid:ty, $fit:expr, $integers:expr);*) => {$(
        impl SweepGrid for $grid {
            type Params = GroupParams;

            fn blank(&self) -> GroupParams {
                GroupParams { scale: 1.0, zero: 0 }
            }

            fn fit(&self, group: Part<'_>, search: ScaleSearch) -> GroupParams {
                $fit(*self, group.w, search.fit(group.cost))
            }

            fn integers(&self) -> Option<IntGrid> {
                $integers(*self)
            }

            fn line(&self, params: &GroupParams) -> [f32; 2] {
                [params.scale, f32::from(params.zero)]
            }

            #[inline]
            fn round(&self, unit: Unit<'_>, params: &GroupParams, codes: &mut [u8], values: &mut [f32]) {
                codes[0] = self.nearest(unit.w[0], *params);
                values[0] = self.value(codes[0], *params);
            }
        }
    )*};
}

by_groups!(IntGrid, fit_integers, Some; FloatGrid, |grid: FloatGrid, w, fit| Grid::fit(&grid, w, fit), |_| None);

/// [`Grid::fit`], as fast as this machine can.
fn fit_integers(grid: IntGrid, w: &[f32], fit: Fit<'_>) -> GroupParams {
    match fit {
        Fit::Weighted(h) => fit_weighted(Level::best(), grid, w, h),
        fit => Grid::fit(&grid, w, fit),
    }
}

/// What a sweep works with besides the weights.
#[derive(Debug, Clone, Copy)]
pub struct Sweep<'a, G: SweepGrid = IntGrid> {
    /// The factor of H, its columns already in `order`.
    pub factor: &'a Factor,
    /// The order of the columns.
    pub order: &'a Order,
    /// Where values may lie.
    pub grid: G,
    /// Inputs that share parameters.
    pub group_len: usize,
    /// How parameters are fitted to a group. The importance of a column in that fit is its D: what an error there still
    /// costs after later columns have made up for it.
    pub search: ScaleSearch,
    /// Parameters `[rows, groups]`, where several rows share a scale.
    pub fixed: Option<&'a [G::Params]>,
}

/// Rounds `w: [rows, in]`. Returns codes `[rows, in]` and parameters `[rows, groups]`, both in the original order of
/// columns.
#[must_use]
pub fn sweep<G: SweepGrid>(w: &[f32], what: &Sweep<'_, G>) -> (Vec<u8>, Vec<G::Params>) {
    let n = what.factor.width();
    let groups = n.div_ceil(what.group_len);
    let rows = w.len() / n;
    let mut codes = vec![0u8; w.len()];
    let mut params = vec![what.grid.blank(); rows * groups];
    let task = task_rows(n);
    (w.par_chunks(task * n))
        .zip(codes.par_chunks_mut(task * n))
        .zip(params.par_chunks_mut(task * groups))
        .enumerate()
        .for_each(|(i, ((w, codes), params))| {
            if let Some(fixed) = what.fixed {
                params.copy_from_slice(&fixed[i * task * groups..][..params.len()]);
            }
            Chunk::new(what, w).run(codes, params);
        });
    (codes, params)
}

/// A few rows on their way through the sweep. All arrays are in the order of the sweep.
struct Chunk<'a, G: SweepGrid> {
    what: &'a Sweep<'a, G>,
    n: usize,
    groups: usize,
    rows: usize,
    w: Vec<f32>,
    /// Ŵ − W of the columns done, `[rows, n]`.
    delta: Vec<f32>,
}

impl<'a, G: SweepGrid> Chunk<'a, G> {
    fn new(what: &'a Sweep<'a, G>, original: &[f32]) -> Self {
        let n = what.factor.width();
        let columns = &what.order.columns;
        let permuted = |row: &[f32]| columns.iter().map(|&c| row[c as usize]).collect::<Vec<_>>();
        Chunk {
            what,
            n,
            groups: n.div_ceil(what.group_len),
            rows: original.len() / n,
            w: original.chunks_exact(n).flat_map(permuted).collect(),
            delta: vec![0.0; original.len()],
        }
    }

    fn run(mut self, codes: &mut [u8], params: &mut [G::Params]) {
        let (n, group_len) = (self.n, self.what.group_len);
        // A group's parameters are fitted to compensated weights when the sweep reaches it, so a block holds whole
        // groups. One scale per row (or matrix) is longer than a block and is fitted to the weights themselves.
        let by_row = group_len >= n && self.what.grid.stride(group_len) == group_len;
        let block = if by_row { BLOCK } else { group_len * BLOCK.div_ceil(group_len) };
        for (row, params) in params.chunks_exact_mut(self.groups).enumerate() {
            if by_row && self.what.fixed.is_none() {
                params[0] = self.what.grid.fit(self.part(&self.w[row * n..(row + 1) * n], 0), self.what.search);
            }
        }
        let mut target = vec![0.0f32; self.rows * block];
        let mut memory = Memory::default();
        for start in (0..n).step_by(block) {
            let width = block.min(n - start);
            self.gather(start, width, &mut target);
            if let Some(grid) = self.what.grid.integers() {
                let parts = codes.chunks_mut(ROWS * n).zip(params.chunks_mut(ROWS * self.groups));
                let targets = target[..self.rows * width].chunks(ROWS * width);
                for (i, (part, target)) in parts.zip(targets).enumerate() {
                    self.round_sixteen((grid, i * ROWS, start), target, part, !by_row, &mut memory);
                }
                continue;
            }
            for row in 0..self.rows {
                let t = &mut target[row * width..(row + 1) * width];
                let params = &mut params[row * self.groups..(row + 1) * self.groups];
                self.round_block(row, start, t, &mut codes[row * n..(row + 1) * n], params, !by_row);
            }
        }
    }

    /// Target of a block: its weights minus what earlier blocks' errors ask it to make up for.
    fn gather(&self, start: usize, width: usize, target: &mut [f32]) {
        let n = self.n;
        for row in 0..self.rows {
            target[row * width..(row + 1) * width].copy_from_slice(&self.w[row * n + start..row * n + start + width]);
        }
        let delta = View::new(&self.delta, self.rows, start, n);
        let unit = View::new(&self.what.factor.unit()[start..], start, width, n);
        gemm(-1.0, delta, unit, 1.0, &mut ViewMut::new(target, self.rows, width, width));
    }

    /// Rounds one row's columns `start..start + t.len()`, spreading each error over the rest of the block.
    fn round_block(
        &mut self,
        row: usize,
        start: usize,
        t: &mut [f32],
        codes: &mut [u8],
        params: &mut [G::Params],
        fit: bool,
    ) {
        let (group_len, grid, search) = (self.what.group_len, self.what.grid, self.what.search);
        let (stride, unit) = (grid.stride(group_len), grid.unit());
        let mut current = params[0];
        let (mut found, mut values) = ([0u8; UNIT], [0.0f32; UNIT]);
        for k in (0..t.len()).step_by(unit) {
            let at = start + k;
            let column = self.what.order.columns[at] as usize;
            if fit && at.is_multiple_of(stride) {
                let group = column / group_len;
                let ahead = |len: usize| self.part(&t[k..t.len().min(k + len)], at);
                match at.is_multiple_of(group_len) {
                    _ if self.what.fixed.is_some() => {}
                    true => params[group] = grid.fit(ahead(group_len), search),
                    false => grid.refit(&mut params[group], ahead(stride), search),
                }
                current = params[group];
            }
            self.centre(row, at, &mut t[k..k + unit]);
            let what = Unit { w: &t[k..k + unit], column, factor: self.what.factor, at };
            grid.round(what, &current, &mut found[..unit], &mut values[..unit]);
            codes[column..column + unit].copy_from_slice(&found[..unit]);
            for (i, &value) in values[..unit].iter().enumerate() {
                self.spread(row, at + i, value, &mut t[k + unit..], start + k + unit);
            }
        }
    }

    /// Notes the value of the column at position `at`, and takes its error off the targets `t` of those from position
    /// `from` on.
    #[inline]
    fn spread(&mut self, row: usize, at: usize, value: f32, t: &mut [f32], from: usize) {
        let n = self.n;
        let delta = value - self.w[row * n + at];
        self.delta[row * n + at] = delta;
        let unit = &self.what.factor.unit()[at * n + from..at * n + from + t.len()];
        for (t, &u) in t.iter_mut().zip(unit) {
            *t -= delta * u;
        }
    }

    /// The targets of a unit from position `at` on, as each would be if those before it were met exactly.
    #[inline]
    fn centre(&self, row: usize, at: usize, t: &mut [f32]) {
        let n = self.n;
        for j in 0..t.len() - 1 {
            let delta = t[j] - self.w[row * n + at + j];
            for (k, t) in t.iter_mut().enumerate().skip(j + 1) {
                *t -= delta * self.what.factor.unit()[(at + j) * n + at + k];
            }
        }
    }

    /// The weights `w` of the columns from position `at` on, as a grid is fitted to them.
    fn part<'w>(&'w self, w: &'w [f32], at: usize) -> Part<'w> {
        let at = at..at + w.len();
        Part { w, cost: &self.what.factor.diagonal()[at.clone()], columns: &self.what.order.columns[at] }
    }
}

#[cfg(test)]
pub(crate) mod tests;

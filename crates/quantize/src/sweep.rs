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

use crate::refine::task_rows;
use crate::{Factor, ScaleSearch};
use bitmill_kernels::{Level, View, ViewMut, fit_weighted, gemm};
use bitmill_scheme::{Fit, FloatGrid, Grid, GroupParams, IntGrid, Metric, UNIT};
use rayon::prelude::*;

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

/// Grids whose groups have a scale and a zero point, with what fits one to a group.
macro_rules! by_groups {
    ($($grid:ty, $fit:expr);*) => {$(
        impl SweepGrid for $grid {
            type Params = GroupParams;

            fn blank(&self) -> GroupParams {
                GroupParams { scale: 1.0, zero: 0 }
            }

            fn fit(&self, group: Part<'_>, search: ScaleSearch) -> GroupParams {
                $fit(*self, group.w, search.fit(group.cost))
            }

            #[inline]
            fn round(&self, unit: Unit<'_>, params: &GroupParams, codes: &mut [u8], values: &mut [f32]) {
                codes[0] = self.nearest(unit.w[0], *params);
                values[0] = self.value(codes[0], *params);
            }
        }
    )*};
}

by_groups!(IntGrid, fit_integers; FloatGrid, |grid: FloatGrid, w, fit| Grid::fit(&grid, w, fit));

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
        for start in (0..n).step_by(block) {
            let width = block.min(n - start);
            self.gather(start, width, &mut target);
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
pub(crate) mod tests {
    use super::*;
    use bitmill_scheme::{Bits, ScaleType};

    pub(crate) struct Random(u64);

    impl Random {
        pub(crate) fn new(seed: u64) -> Self {
            Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678)
        }

        pub(crate) fn unit(&mut self) -> f64 {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (self.0 >> 11) as f64 / (1u64 << 53) as f64
        }

        pub(crate) fn below(&mut self, n: usize) -> usize {
            (self.unit() * n as f64) as usize
        }

        pub(crate) fn normal(&mut self) -> f64 {
            (-2.0 * self.unit().max(1e-300).ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos()
        }
    }

    /// A well-conditioned H of correlated inputs of unequal size.
    pub(crate) fn random_h(n: usize, seed: u64) -> Vec<f32> {
        let mut r = Random::new(seed);
        let size: Vec<f64> = (0..n).map(|_| (0.7 * r.normal()).exp()).collect();
        let mut h = vec![0.0f64; n * n];
        for _ in 0..4 * n {
            let common = r.normal();
            let x: Vec<f64> = (0..n).map(|i| size[i] * (r.normal() + 0.7 * common)).collect();
            for i in 0..n {
                for j in 0..n {
                    h[i * n + j] += x[i] * x[j] / (4 * n) as f64;
                }
            }
        }
        h.iter().map(|&v| v as f32).collect()
    }

    pub(crate) fn random_w(count: usize, seed: u64) -> Vec<f32> {
        let mut r = Random::new(seed);
        (0..count).map(|_| r.normal() as f32).collect()
    }

    /// U of the GPTQ paper, upper with UᵀU = H⁻¹, by Gauss–Jordan and the textbook Cholesky.
    pub(crate) fn gptq_factor(h: &[f32], n: usize) -> Vec<f64> {
        let inverse = invert(h, n);
        let mut u = vec![0.0f64; n * n];
        for i in 0..n {
            for j in i..n {
                let s: f64 = (0..i).map(|k| u[k * n + i] * u[k * n + j]).sum();
                u[i * n + j] =
                    if i == j { (inverse[i * n + i] - s).sqrt() } else { (inverse[i * n + j] - s) / u[i * n + i] };
            }
        }
        u
    }

    fn invert(h: &[f32], n: usize) -> Vec<f64> {
        let mut a: Vec<f64> = h.iter().map(|&v| f64::from(v)).collect();
        let mut inv: Vec<f64> = (0..n * n).map(|i| f64::from(u8::from(i % (n + 1) == 0))).collect();
        for p in 0..n {
            let pivot = a[p * n + p];
            for j in 0..n {
                a[p * n + j] /= pivot;
                inv[p * n + j] /= pivot;
            }
            for i in (0..n).filter(|&i| i != p) {
                let f = a[i * n + p];
                for j in 0..n {
                    a[i * n + j] -= f * a[p * n + j];
                    inv[i * n + j] -= f * inv[p * n + j];
                }
            }
        }
        inv
    }

    /// A grid with scale 1 for weights of a few units, so that the tests compare rounding and nothing else.
    const FIXED: GroupParams = GroupParams { scale: 0.5, zero: 8 };

    fn grid() -> IntGrid {
        IntGrid { bits: Bits::new(4).unwrap(), symmetric: true, scale: ScaleType::F32 }
    }

    fn run(w: &[f32], h: &[f32], order: &Order, group_len: usize) -> Vec<u8> {
        let factor = Factor::new(h, &order.columns, 0.0).unwrap();
        let fixed = vec![FIXED; w.len() / order.columns.len() * order.columns.len().div_ceil(group_len)];
        let what =
            Sweep { factor: &factor, order, grid: grid(), group_len, search: ScaleSearch::MinMax, fixed: Some(&fixed) };
        sweep(w, &what).0
    }

    /// GPTQ as published: e = (w − q)/U_ii, w_rest −= e·U_i,rest.
    fn gptq(w: &[f32], h: &[f32], n: usize) -> Vec<u8> {
        let (u, g) = (gptq_factor(h, n), grid());
        let mut codes = Vec::new();
        for row in w.chunks(n) {
            let mut t: Vec<f64> = row.iter().map(|&v| f64::from(v)).collect();
            for i in 0..n {
                let code = g.nearest(t[i] as f32, FIXED);
                codes.push(code);
                let e = (t[i] - f64::from(g.value(code, FIXED))) / u[i * n + i];
                for j in i..n {
                    t[j] -= e * u[i * n + j];
                }
            }
        }
        codes
    }

    /// Optimal brain quantization in fixed order, by eliminating each input from an explicitly inverted H.
    fn obq(w: &[f32], h: &[f32], n: usize) -> Vec<u8> {
        let g = grid();
        let mut codes = Vec::new();
        for row in w.chunks(n) {
            let mut t: Vec<f64> = row.iter().map(|&v| f64::from(v)).collect();
            let mut inv = invert(h, n);
            for i in 0..n {
                let code = g.nearest(t[i] as f32, FIXED);
                codes.push(code);
                let e = (t[i] - f64::from(g.value(code, FIXED))) / inv[i * n + i];
                for (j, t) in t.iter_mut().enumerate().skip(i) {
                    *t -= e * inv[i * n + j];
                }
                let (column, d) = ((0..n).map(|j| inv[j * n + i]).collect::<Vec<_>>(), inv[i * n + i]);
                for a in 0..n {
                    for b in 0..n {
                        inv[a * n + b] -= column[a] * column[b] / d;
                    }
                }
            }
        }
        codes
    }

    #[test]
    fn sweep_is_gptq_is_obq() {
        // Oracle 4.
        for seed in 0..20 {
            let n = 20;
            let (h, w) = (random_h(n, seed), random_w(6 * n, seed + 100));
            let ours = run(&w, &h, &Order::natural(n), n);
            assert_eq!(ours, gptq(&w, &h, n), "GPTQ, seed {seed}");
            assert_eq!(ours, obq(&w, &h, n), "OBQ, seed {seed}");
        }
    }

    fn proxy_loss(w: &[f32], codes: &[u8], params: impl Fn(usize, usize) -> GroupParams, h: &[f32], n: usize) -> f64 {
        let mut total = 0.0;
        for (r, (w, codes)) in w.chunks(n).zip(codes.chunks(n)).enumerate() {
            let d: Vec<f64> = (0..n).map(|k| f64::from(grid().value(codes[k], params(r, k)) - w[k])).collect();
            for i in 0..n {
                for j in 0..n {
                    total += d[i] * f64::from(h[i * n + j]) * d[j];
                }
            }
        }
        total
    }

    #[test]
    fn the_loss_splits_over_columns() {
        // Oracle 5: Σ D_k (ΔŨ)_k² = tr(ΔHΔᵀ), with clamping, groups and any order. The identity is algebraic, so it is
        // checked on the sweep's own result; the tolerance is that of f32 factors.
        let n = 48;
        let (h, w) = (random_h(n, 1), random_w(4 * n, 2).iter().map(|v| v * 3.0).collect::<Vec<_>>());
        let importance: Vec<f32> = (0..n).map(|i| h[i * n + i]).collect();
        for (order, group_len) in [
            (Order::natural(n), n),
            (Order::natural(n), 16),
            (Order::by_importance(&importance, 16), 16),
            (Order::by_importance(&importance, n), n),
        ] {
            let factor = Factor::new(&h, &order.columns, 0.0).unwrap();
            let what = Sweep {
                factor: &factor,
                order: &order,
                grid: grid(),
                group_len,
                search: ScaleSearch::Hessian,
                fixed: None,
            };
            let (codes, params) = sweep(&w, &what);
            let groups = n / group_len;
            let of = |r: usize, c: usize| params[r * groups + c / group_len];
            let mut split = 0.0f64;
            for r in 0..4 {
                let delta: Vec<f64> = order
                    .columns
                    .iter()
                    .map(|&c| {
                        f64::from(grid().value(codes[r * n + c as usize], of(r, c as usize)) - w[r * n + c as usize])
                    })
                    .collect();
                for k in 0..n {
                    let e: f64 = (0..=k).map(|j| delta[j] * f64::from(factor.unit()[j * n + k])).sum();
                    split += f64::from(factor.diagonal()[k]) * e * e;
                }
            }
            let direct = proxy_loss(&w, &codes, of, &h, n);
            assert!((split / direct - 1.0).abs() < 1e-4, "{split} {direct}");
        }
    }

    #[test]
    fn blocks_change_nothing() {
        // Oracle 5: 300 columns cross two block borders; the unblocked recursion in f64 is the reference.
        let n = 300;
        let (h, w) = (random_h(n, 4), random_w(2 * n, 5));
        let ours = run(&w, &h, &Order::natural(n), n);
        let differing = ours.iter().zip(gptq(&w, &h, n)).filter(|(a, b)| **a != *b).count();
        // f32 sums can flip a tie here and there, and a flip changes what follows in its row.
        assert!(differing * 50 < ours.len(), "{differing} of {}", ours.len());
    }

    #[test]
    fn diagonal_h_is_rounding_to_nearest() {
        // Oracle 6.
        let n = 64;
        let w = random_w(3 * n, 9);
        let h: Vec<f32> = (0..n * n).map(|i| if i % (n + 1) == 0 { 1.0 + (i % 7) as f32 } else { 0.0 }).collect();
        let nearest: Vec<u8> = w.iter().map(|&x| grid().nearest(x, FIXED)).collect();
        assert_eq!(run(&w, &h, &Order::natural(n), 16), nearest);
    }

    #[test]
    fn expected_loss_on_uniform_residues() {
        // Oracle 7: s²·tr(D)/12 for the sweep, s²·tr(H)/12 for rounding to nearest; and the sweep in order of
        // importance has the smaller tr(D).
        let (n, rows) = (32, 4000);
        let h = random_h(n, 11);
        let mut r = Random::new(12);
        let w: Vec<f32> = (0..rows * n).map(|_| (r.unit() * 3.0 - 1.5) as f32).collect();
        let trace: f64 = (0..n).map(|i| f64::from(h[i * n + i])).sum();
        let s2 = f64::from(FIXED.scale).powi(2);
        let loss = |codes: &[u8]| proxy_loss(&w, codes, |_, _| FIXED, &h, n) / rows as f64;
        let nearest: Vec<u8> = w.iter().map(|&x| grid().nearest(x, FIXED)).collect();
        assert!((loss(&nearest) / (s2 * trace / 12.0) - 1.0).abs() < 0.02);
        let importance: Vec<f32> = (0..n).map(|i| h[i * n + i]).collect();
        let mut traces = Vec::new();
        for order in [Order::natural(n), Order::by_importance(&importance, n)] {
            let d: f64 = Factor::new(&h, &order.columns, 0.0).unwrap().diagonal().iter().map(|&d| f64::from(d)).sum();
            let measured = loss(&run(&w, &h, &order, n));
            assert!((measured / (s2 * d / 12.0) - 1.0).abs() < 0.02, "{measured} {}", s2 * d / 12.0);
            traces.push(d);
        }
        assert!(traces[1] < traces[0] && traces[0] < trace);
    }

    #[test]
    fn importance_order_keeps_groups_together() {
        let importance = [1.0, 5.0, 2.0, 9.0, 0.5, 0.1];
        assert_eq!(Order::by_importance(&importance, 2).columns, [3, 2, 1, 0, 4, 5]);
        assert_eq!(Order::by_importance(&importance, 6).columns, [3, 1, 2, 0, 4, 5]);
    }
}

//! Rounding to nearest: every weight to the closest value of its group's grid.

use super::billm::ONLY;
use super::{ByRows, GroupGrid, Linear, Method, Needs, Solved, assemble, blocks, fitted, nearest};
use crate::{Error, ScaleSearch, SolverOptions};
use bitmill_kernels::{Level, Stored, fit_groups};
use bitmill_scheme::{Fit, Granularity, Grid, GridKind, GroupParams, Quantized, Scheme};
use std::borrow::Cow;

pub(super) struct Rtn;

impl Method for Rtn {
    fn name(&self) -> &'static str {
        "rtn"
    }

    fn summary(&self) -> &'static str {
        "round to nearest; the range of each group sets its scale unless --scale-search says otherwise"
    }

    fn refuses(&self, scheme: &Scheme) -> Option<&'static str> {
        (scheme.grid == GridKind::Binary).then_some(ONLY)
    }

    fn needs(&self, options: &SolverOptions) -> Needs {
        if options.scale_search == Some(ScaleSearch::Hessian) { Needs::Hessian } else { Needs::Nothing }
    }

    fn by_rows(&self, scheme: &Scheme, options: &SolverOptions) -> Option<ByRows> {
        let search = options.scale_search.unwrap_or(ScaleSearch::MinMax);
        match (scheme.grid, search) {
            _ if scheme.form().is_some() => Some(blocks::nearest),
            _ if shares_rows(scheme.granularity) => None,
            (GridKind::Int { .. }, ScaleSearch::MinMax) => Some(|linear, w, _| groups(linear, w, Fit::MinMax)),
            (GridKind::Int { .. }, ScaleSearch::Squares) => Some(|linear, w, _| groups(linear, w, Fit::Squares)),
            _ => None,
        }
    }

    fn takes_diagonal(&self) -> bool {
        true
    }

    fn solve(&self, linears: &[Linear<'_>], h: Option<&[f32]>, options: &SolverOptions) -> Result<Vec<Solved>, Error> {
        let search = options.scale_search.unwrap_or(ScaleSearch::MinMax);
        let solve = |linear: &Linear<'_>| {
            if let Some(by_rows) = self.by_rows(&linear.scheme, options) {
                let importance = h.map(|_| importance(h, linear.shape[1]));
                let (quantized, _) = by_rows(linear, Stored::F32(linear.weight), importance.as_deref());
                return Solved { quantized, damping: None, stages: Vec::new() };
            }
            let importance = importance(h, linear.shape[1]);
            let round = |grid: GroupGrid| match grid {
                GroupGrid::Int(grid) => rounded(linear, search, &importance, grid),
                GroupGrid::Float(grid) => rounded(linear, search, &importance, grid),
            };
            let (codes, params) = round(GroupGrid::of(linear));
            Solved { quantized: assemble(linear, codes, params), damping: None, stages: Vec::new() }
        };
        Ok(linears.iter().map(solve).collect())
    }
}

/// Whether several rows share a scale.
fn shares_rows(granularity: Granularity) -> bool {
    matches!(granularity, Granularity::Tensor | Granularity::Tile(_))
}

/// Rows `w` of a matrix of integers, every group fitted by itself.
fn groups(linear: &Linear<'_>, w: Stored<'_>, fit: Fit<'_>) -> (Quantized, [f64; 2]) {
    let n = linear.shape[1];
    let len = linear.scheme.group_len(n).max(1);
    let mut params = vec![GroupParams { scale: 1.0, zero: 0 }; linear.shape[0] * n.div_ceil(len)];
    let mut codes = vec![0; w.len()];
    let lost = fit_groups(Level::best(), (linear.scheme.grid(), fit), (n, len), w, &mut params, &mut codes);
    (assemble(linear, codes, params), lost)
}

/// The diagonal of H, which `h` may be already, or ones without one.
pub(super) fn importance(h: Option<&[f32]>, n: usize) -> Vec<f32> {
    match h {
        None => vec![1.0; n],
        Some(diagonal) if diagonal.len() == n => diagonal.to_vec(),
        Some(h) => (0..n).map(|i| h[i * n + i]).collect(),
    }
}

fn rounded(
    linear: &Linear<'_>,
    search: ScaleSearch,
    importance: &[f32],
    grid: impl Grid + Copy + Sync,
) -> (Vec<u8>, Vec<GroupParams>) {
    let params = fit(linear, search, importance, grid);
    (nearest(linear, &params, grid), params)
}

/// Parameters `[out, groups]`, each fitted to the weights that share them.
pub(super) fn fit(
    linear: &Linear<'_>,
    search: ScaleSearch,
    importance: &[f32],
    grid: impl Grid + Sync,
) -> Vec<GroupParams> {
    // One scale for matrices that are rounded one after the other: it covers them all.
    if let (Granularity::Tensor, Some(amax)) = (linear.scheme.granularity, linear.amax) {
        return vec![grid.fit(&[amax], Fit::MinMax); linear.shape[0]];
    }
    fitted(linear, |w, cols| {
        let own = &importance[cols];
        // Rows that share a scale weigh their inputs alike.
        let all: Cow<'_, [f32]> = match own.len() == w.len() {
            true => own.into(),
            false => own.iter().copied().cycle().take(w.len()).collect(),
        };
        grid.fit(w, search.fit(&all))
    })
}

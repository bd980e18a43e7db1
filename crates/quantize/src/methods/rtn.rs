//! Rounding to nearest: every weight to the closest value of its group's grid.

use super::{Linear, Method, Needs, Solved, assemble, blocks, groups, nearest};
use crate::{Error, ScaleSearch, SolverOptions};
use bitmill_scheme::{Granularity, Grid, GroupParams};
use rayon::prelude::*;

pub(super) struct Rtn;

impl Method for Rtn {
    fn name(&self) -> &'static str {
        "rtn"
    }

    fn summary(&self) -> &'static str {
        "round to nearest; the range of each group sets its scale unless --scale-search says otherwise"
    }

    fn needs(&self, options: &SolverOptions) -> Needs {
        if options.scale_search == Some(ScaleSearch::Hessian) { Needs::Hessian } else { Needs::Nothing }
    }

    fn works_by_rows(&self) -> bool {
        true
    }

    fn takes_diagonal(&self) -> bool {
        true
    }

    fn solve(&self, linears: &[Linear<'_>], h: Option<&[f32]>, options: &SolverOptions) -> Result<Vec<Solved>, Error> {
        let search = options.scale_search.unwrap_or(ScaleSearch::MinMax);
        let solve = |linear: &Linear<'_>| {
            if let Some(form) = linear.scheme.form() {
                let importance = h.map(|_| importance(h, linear.shape[1]));
                return Solved {
                    quantized: blocks::nearest(linear, form, importance.as_deref()),
                    damping: None,
                    stages: Vec::new(),
                };
            }
            let params = fit(linear, search, &importance(h, linear.shape[1]));
            let codes = nearest(linear, &params);
            Solved { quantized: assemble(linear, codes, params), damping: None, stages: Vec::new() }
        };
        Ok(linears.iter().map(solve).collect())
    }
}

/// The diagonal of H, which `h` may be already, or ones without one.
pub(super) fn importance(h: Option<&[f32]>, n: usize) -> Vec<f32> {
    match h {
        None => vec![1.0; n],
        Some(diagonal) if diagonal.len() == n => diagonal.to_vec(),
        Some(h) => (0..n).map(|i| h[i * n + i]).collect(),
    }
}

/// Parameters of every group, each fitted to its own weights.
pub(super) fn fit(linear: &Linear<'_>, search: ScaleSearch, importance: &[f32]) -> Vec<GroupParams> {
    let (grid, n) = (linear.scheme.grid(), linear.shape[1]);
    if linear.scheme.granularity == Granularity::Tensor {
        let weights: Vec<f32> = match search {
            ScaleSearch::Hessian => importance.iter().copied().cycle().take(linear.weight.len()).collect(),
            _ => Vec::new(),
        };
        return vec![grid.fit(linear.weight, search.fit(&weights))];
    }
    let len = linear.scheme.group_len(n);
    let chunks: Vec<&[f32]> = groups(linear).collect();
    let fit = |(i, w): (usize, &&[f32])| {
        let from = i * len % n;
        grid.fit(w, search.fit(&importance[from..from + w.len()]))
    };
    chunks.par_iter().enumerate().map(fit).collect()
}

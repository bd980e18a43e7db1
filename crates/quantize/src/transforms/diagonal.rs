//! Scales of single channels: what a site's linears read is divided by t, their columns are multiplied by it, and what
//! produces the activation (a norm's weight, or the rows of an earlier linear) takes up the division.

use super::{BlockWeights, Model};
use crate::{Error, Factor, Needs};
use bitmill_models::{Absorb, Role, Site};
use bitmill_scheme::{Fit, Grid, GridKind, Scheme};

/// Exponents that are tried: 0, 1/20, … 19/20.
const STEPS: usize = 20;

/// The site `index` of a block, with what it takes to judge scales of its channels.
pub(super) struct Candidate<'b> {
    pub(super) block: &'b BlockWeights<'b>,
    pub(super) site: Site,
    /// What a squared error of each input costs: after compensation where the method compensates.
    pub(super) cost: Vec<f32>,
    /// Linears that are to be rounded, with their schemes.
    pub(super) linears: Vec<(Role, Scheme)>,
}

impl<'b> Candidate<'b> {
    /// `None` where nothing absorbs a scale or nothing is rounded.
    pub(super) fn new(model: &Schemes, block: &'b BlockWeights<'b>, index: usize) -> Result<Option<Self>, Error> {
        let site = block.spec.sites(block.index)[index];
        let scheme = |&role: &Role| Some((role, model.of(block, role)?));
        let linears: Vec<(Role, Scheme)> = site.parts().iter().filter_map(scheme).collect();
        let (Some(moments), false, Some(_)) = (block.sites.get(index), linears.is_empty(), site.absorbed_by) else {
            return Ok(None);
        };
        let n = moments.abs_max.len();
        let cost = if model.compensates {
            let order: Vec<u32> = (0..n as u32).collect();
            let factor = Factor::new(&moments.h, &order, 0.01).map_err(|damping| {
                let tensor = block.spec.module(block.index, site.linears[0]);
                Error::NotPositive { tensor, damping }
            })?;
            factor.diagonal().to_vec()
        } else {
            (0..n).map(|i| moments.h[i * n + i]).collect()
        };
        Ok(Some(Candidate { block, site, cost, linears }))
    }

    /// The best of the scales `family(α)` by what rounding is predicted to lose, and α; `extra` is what else the scales
    /// cost. α = 0 must be no scale at all.
    pub(super) fn search(
        &self,
        family: impl Fn(f32) -> Vec<f32>,
        extra: impl Fn(&[f32]) -> f64,
    ) -> (f32, Vec<f32>, (f64, f64)) {
        let score = |t: &[f32]| self.predicted(t) + extra(t);
        let plain = vec![1.0; self.cost.len()];
        let before = score(&plain);
        let mut best = (0.0, plain, before);
        for step in 1..STEPS {
            let alpha = step as f32 / STEPS as f32;
            let t = centred(self.shared(family(alpha)));
            let loss = score(&t);
            if loss < best.2 {
                best = (alpha, t, loss);
            }
        }
        (best.0, best.1, (before, best.2))
    }

    /// Σ s²·D/12 with the steps of W·diag(t) and the costs D/t² (of H' = T⁻¹HT⁻¹ every D_j is D_j/t_j²).
    fn predicted(&self, t: &[f32]) -> f64 {
        let n = t.len();
        let cost: Vec<f64> = self.cost.iter().zip(t).map(|(&d, &t)| f64::from(d) / f64::from(t).powi(2)).collect();
        let of = |(role, scheme): &(Role, Scheme)| -> f64 {
            let Some(w) = self.block.linears.get(role) else { return 0.0 };
            let len = scheme.form().map_or_else(|| scheme.group_len(n), |form| form.sub);
            let row = |row: &[f32]| -> f64 {
                let scaled: Vec<f32> = row.iter().zip(t).map(|(w, t)| w * t).collect();
                let group = |(w, d): (&[f32], &[f64])| step(w, scheme).powi(2) * d.iter().sum::<f64>();
                scaled.chunks(len).zip(cost.chunks(len)).map(group).sum()
            };
            w.chunks_exact(n).map(row).sum()
        };
        self.linears.iter().map(of).sum::<f64>() / 12.0
    }

    /// `t` as the site's absorber can take it up: equal inside a group of query heads where V is shared.
    fn shared(&self, mut t: Vec<f32>) -> Vec<f32> {
        let (group, dim) = (self.block.spec.group(), self.block.spec.head_dim);
        if self.site.absorbed_by == Some(Absorb::Linear(Role::V)) && group > 1 {
            for heads in t.chunks_exact_mut(group * dim) {
                for d in 0..dim {
                    let mean = (0..group).map(|g| heads[g * dim + d].ln()).sum::<f32>() / group as f32;
                    (0..group).for_each(|g| heads[g * dim + d] = mean.exp());
                }
            }
        }
        t
    }
}

/// The step of the grid that covers `w`.
fn step(w: &[f32], scheme: &Scheme) -> f64 {
    match scheme.grid {
        // Their own levels lie unevenly; the spread of a group says as much.
        GridKind::Block(_) | GridKind::Float(_) | GridKind::Binary => {
            w.iter().map(|v| f64::from(v.abs())).fold(0.0, f64::max)
        }
        GridKind::Int { .. } => f64::from(scheme.grid().fit(w, Fit::MinMax).scale),
    }
}

/// `t` divided by √(max·min), bounded so that no channel vanishes.
fn centred(mut t: Vec<f32>) -> Vec<f32> {
    let bound = |v: f32| if v.is_finite() { v.clamp(1e-4, 1e4) } else { 1.0 };
    t.iter_mut().for_each(|v| *v = bound(*v));
    let (least, most) = t.iter().fold((f32::INFINITY, 0.0f32), |(a, b), &v| (a.min(v), b.max(v)));
    let middle = (least * most).sqrt();
    t.iter_mut().for_each(|v| *v /= middle);
    t
}

/// Scales the site `index` of `block` by `t`.
pub(super) fn fold(block: &mut BlockWeights<'_>, index: usize, t: &[f32]) {
    let (spec, site) = (block.spec, block.spec.sites(block.index)[index]);
    for role in site.parts() {
        let Some(w) = block.linears.get_mut(&role) else { continue };
        w.chunks_exact_mut(t.len()).for_each(|row| row.iter_mut().zip(t).for_each(|(w, t)| *w *= t));
    }
    match site.absorbed_by {
        Some(Absorb::Norm(norm)) => {
            if let Some(g) = block.norms.get_mut(&norm) {
                g.iter_mut().zip(t).for_each(|(g, t)| *g /= t);
            }
            if let Some(bias) = block.norm_biases.get_mut(&norm) {
                bias.iter_mut().zip(t).for_each(|(b, t)| *b /= t);
            }
        }
        Some(Absorb::Linear(role)) => {
            let [rows, cols] = spec.linear_shape(role);
            let (group, dim) = if role == Role::V { (spec.group(), spec.head_dim) } else { (1, rows) };
            let of = |row: usize| t[row / dim * group * dim + row % dim];
            if let Some(w) = block.linears.get_mut(&role) {
                for (row, w) in w.chunks_exact_mut(cols).enumerate() {
                    w.iter_mut().for_each(|w| *w /= of(row));
                }
            }
            if let Some(bias) = block.biases.get_mut(&role) {
                bias.iter_mut().enumerate().for_each(|(row, b)| *b /= of(row));
            }
        }
        None => {}
    }
    if let Some(moments) = block.sites.get_mut(index) {
        moments.scale(&t.iter().map(|t| 1.0 / t).collect::<Vec<_>>());
    }
}

/// What the linears of a model become, kept for the time of a rewrite.
pub(super) struct Schemes {
    schemes: std::collections::BTreeMap<String, Scheme>,
    compensates: bool,
}

impl Schemes {
    pub(super) fn new(model: &Model<'_>) -> Self {
        Schemes { schemes: model.schemes.clone(), compensates: model.needs == Needs::Hessian }
    }

    fn of(&self, block: &BlockWeights<'_>, role: Role) -> Option<Scheme> {
        self.schemes.get(&block.spec.module(block.index, block.spec.rows(role).0)).copied()
    }
}

//! R1 of QuaRot: the coordinates of the residual stream are turned by an orthogonal matrix.
//!
//! Norm weights are folded into the linears that read them; what is left of an RMS norm, x/rms(x), commutes with turning.
//! Everything that writes to the stream (embedding, O, Down) then writes turned vectors, everything that reads it (Q, K,
//! V, Gate, Up, the head) has its rows turned, and no product changes. `rotate` takes the best of a few Hadamard matrices
//! with random signs; `womi` (OSTQuant) goes to the eigenvectors of Σ WᵀW first, so that each direction that matters is
//! spread over all channels.

use super::turn::Turn;
use super::{BlockWeights, Model, Rewrite, Transform};
use crate::{Error, Factor};
use bitmill_kernels::{Element, View, ViewMut, eigen, gemm};
use bitmill_models::{ModelSpec, NormKind, NormRole, Role};
use bitmill_scheme::{Fit, Grid, GridKind, Scheme};
use std::sync::Arc;

/// Sign vectors that are tried.
const CANDIDATES: u64 = 8;
/// Blocks on which they are compared, evenly chosen.
const SAMPLED: usize = 4;
/// Linears that read the residual stream.
const READERS: [(Role, NormRole); 5] = [
    (Role::Q, NormRole::Input),
    (Role::K, NormRole::Input),
    (Role::V, NormRole::Input),
    (Role::Gate, NormRole::PostAttention),
    (Role::Up, NormRole::PostAttention),
];
/// Linears that write to it.
const WRITERS: [Role; 2] = [Role::O, Role::Down];

pub(super) struct Rotate {
    name: &'static str,
    summary: &'static str,
    eigenbasis: bool,
}

pub(super) static ROTATE: Rotate = Rotate {
    name: "rotate",
    summary: "fold the norms and turn the residual stream by the best of eight signed Hadamard matrices",
    eigenbasis: false,
};

pub(super) static WOMI: Rotate =
    Rotate { name: "womi", summary: "the same, from the eigenvectors of all weights (OSTQuant)", eigenbasis: true };

impl Transform for Rotate {
    fn name(&self) -> &'static str {
        self.name
    }

    fn summary(&self) -> &'static str {
        self.summary
    }

    fn refuses(&self, spec: &ModelSpec) -> Option<&'static str> {
        let pre_norm = spec.has_norm(NormRole::Input) && spec.has_norm(NormRole::PostAttention);
        if spec.norm != NormKind::Rms {
            return Some("it has layer norms, which take the mean over channels, and that does not turn with them");
        }
        if spec.has_norm(NormRole::AttnOutput) || spec.has_norm(NormRole::MlpOutput) {
            return Some(
                "what attention and MLP put out is normed channel by channel before it joins the residual stream",
            );
        }
        if !pre_norm || spec.head().is_none() {
            return Some("its norms stand in the residual stream, and their weights do not turn with it");
        }
        None
    }

    fn unties(&self) -> bool {
        true
    }

    fn prepare(&self, model: &Model<'_>) -> Result<Box<dyn Rewrite>, Error> {
        let n = model.spec.hidden;
        let basis = if self.eigenbasis { Some(Arc::new(eigenbasis(model)?)) } else { None };
        let turns: Vec<Turn> = (1..=CANDIDATES)
            .map(|candidate| Turn::new(n, model.seed.wrapping_mul(CANDIDATES).wrapping_add(candidate), basis.clone()))
            .collect();
        let (mut plain, mut losses) = (0.0, vec![0.0; turns.len()]);
        let (layers, count) = (model.spec.layers, SAMPLED.min(model.spec.layers));
        for i in 0..count {
            let mut folded = model.block(i * layers / count)?;
            fold_norms(&mut folded);
            plain += predicted(model, &folded)?;
            for (turn, loss) in turns.iter().zip(&mut losses) {
                let mut block = folded.clone();
                turn_block(turn, &mut block);
                *loss += predicted(model, &block)?;
            }
        }
        let best = turns.into_iter().zip(losses).reduce(|best, next| if next.1 < best.1 { next } else { best });
        match best {
            Some((turn, loss)) => Ok(Box::new(Rotated { turn, predicted: (plain, loss) })),
            None => unreachable!("no candidate was tried"),
        }
    }
}

struct Rotated {
    turn: Turn,
    predicted: (f64, f64),
}

impl Rewrite for Rotated {
    fn block(&self, block: &mut BlockWeights<'_>) -> Result<(), Error> {
        fold_norms(block);
        turn_block(&self.turn, block);
        Ok(())
    }

    fn embedding(&self, rows: &mut [f32]) {
        self.turn.rows_of(rows);
    }

    fn head(&self, rows: &mut [f32], norm: &[f32]) {
        for row in rows.chunks_exact_mut(norm.len()) {
            row.iter_mut().zip(norm).for_each(|(w, g)| *w *= g);
        }
        self.turn.rows_of(rows);
    }

    fn folds_final_norm(&self) -> bool {
        true
    }

    fn predicted(&self) -> Option<(f64, f64)> {
        Some(self.predicted)
    }
}

/// Makes the weights of the norms part of the linears that read them.
fn fold_norms(block: &mut BlockWeights<'_>) {
    let n = block.spec.hidden;
    for (role, norm) in READERS {
        let (Some(w), Some(g)) = (block.linears.get_mut(&role), block.norms.get(&norm)) else { continue };
        for row in w.chunks_exact_mut(n) {
            row.iter_mut().zip(g).for_each(|(w, g)| *w *= g);
        }
    }
    for (norm, site) in [(NormRole::Input, 0), (NormRole::PostAttention, 2)] {
        let Some(g) = block.norms.get_mut(&norm) else { continue };
        if let Some(site) = block.sites.get_mut(site) {
            // Of a channel whose norm weight is zero nothing was seen, and nothing reads it.
            let inverse: Vec<f32> = g.iter().map(|&g| if g == 0.0 { 0.0 } else { 1.0 / g }).collect();
            site.scale(&inverse);
        }
        g.fill(1.0);
    }
}

fn turn_block(turn: &Turn, block: &mut BlockWeights<'_>) {
    for (role, _) in READERS {
        if let Some(w) = block.linears.get_mut(&role) {
            turn.rows_of(w);
        }
    }
    for role in WRITERS {
        if let Some(w) = block.linears.get_mut(&role) {
            turn.columns_of(w);
        }
        if let Some(bias) = block.biases.get_mut(&role) {
            turn.rows_of(bias);
        }
    }
    for site in [0, 2] {
        if let Some(site) = block.sites.get_mut(site) {
            turn.moments(site);
        }
    }
}

/// What rounding the block is predicted to lose, relative to the energy of its outputs: Σ s²/12·tr(D)/tr(WHWᵀ), with s the
/// step of every group and D what an error of a column still costs after the others have made up for it (methods 1.3).
fn predicted(model: &Model<'_>, block: &BlockWeights<'_>) -> Result<f64, Error> {
    let mut total = 0.0;
    for (site, at) in model.spec.sites(block.index).iter().enumerate() {
        let n = model.spec.linear_shape(at.linears[0])[1];
        let h = block.sites.get(site).map(|s| &s.h);
        let mean_d = match h {
            None => 1.0,
            Some(h) => {
                let order: Vec<u32> = (0..n as u32).collect();
                let factor = Factor::new(h, &order, 0.01).map_err(|damping| {
                    let tensor = model.spec.module(block.index, at.linears[0]);
                    Error::NotPositive { tensor, damping }
                })?;
                factor.diagonal().iter().map(|&d| f64::from(d)).sum::<f64>() / n as f64
            }
        };
        for role in at.parts() {
            let (Some(scheme), Some(w)) = (model.scheme(block.index, role), block.linears.get(&role)) else { continue };
            let energy: f64 = match h {
                Some(h) => crate::loss(w, &vec![0.0; w.len()], h).iter().sum(),
                None => w.iter().map(|v| f64::from(*v).powi(2)).sum(),
            };
            if energy > 0.0 {
                total += mean_d * squared_steps(w, n, &scheme) / 12.0 / energy;
            }
        }
    }
    Ok(total)
}

/// Σ s² over the weights, with the scales that cover each group.
fn squared_steps(w: &[f32], n: usize, scheme: &Scheme) -> f64 {
    if !matches!(scheme.grid, GridKind::Int { .. }) {
        // Block types have scales of their own, and the levels of floats lie unevenly; the spread of the groups says as much.
        let step = |g: &[f32]| g.len() as f64 * g.iter().map(|v| f64::from(v.abs())).fold(0.0, f64::max).powi(2);
        return w.chunks(32).map(step).sum();
    }
    let (grid, len) = (scheme.grid(), scheme.group_len(n));
    let step = |g: &[f32]| f64::from(grid.fit(g, Fit::MinMax).scale).powi(2) * g.len() as f64;
    w.chunks(n).flat_map(|row| row.chunks(len)).map(step).sum()
}

/// The eigenvectors of Σ WᵀW over all that reads the residual stream and Σ WWᵀ over all that writes to it, as columns.
fn eigenbasis(model: &Model<'_>) -> Result<Vec<f64>, Error> {
    let n = model.spec.hidden;
    let mut sum = vec![0.0f64; n * n];
    for index in 0..model.spec.layers {
        let mut block = model.block(index)?;
        fold_norms(&mut block);
        for (role, w) in &block.linears {
            let wide: Vec<f64> = w.iter().map(|&v| f64::from(v)).collect();
            let (rows, cols) = (model.spec.linear_shape(*role)[0], model.spec.linear_shape(*role)[1]);
            let w = View::new(&wide, rows, cols, cols);
            let (a, b) = if WRITERS.contains(role) { (w, w.t()) } else { (w.t(), w) };
            gemm(f64::ONE, a, b, f64::ONE, &mut ViewMut::new(&mut sum, n, n, n));
        }
    }
    let mut values = vec![0.0; n];
    eigen(&mut sum, &mut values);
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn womi_is_orthogonal_and_diagonalizes_the_weights_before_it_mixes() {
        // Oracle 24.
        let n = 24;
        let w = crate::sweep::tests::random_w(60 * n, 5);
        let wide: Vec<f64> = w.iter().map(|&v| f64::from(v)).collect();
        let view = View::new(&wide, 60, n, n);
        let mut sum = vec![0.0f64; n * n];
        gemm(1.0, view.t(), view, 0.0, &mut ViewMut::new(&mut sum, n, n, n));
        let (moments, mut values) = (sum.clone(), vec![0.0; n]);
        eigen(&mut sum, &mut values);
        let q = &sum;
        for i in 0..n {
            for j in 0..n {
                let dot: f64 = (0..n).map(|k| q[k * n + i] * q[k * n + j]).sum();
                assert!((dot - f64::from(u8::from(i == j))).abs() < 1e-10);
                let inner = |k: usize| (0..n).map(|l| moments[k * n + l] * q[l * n + j]).sum::<f64>();
                let between: f64 = (0..n).map(|k| q[k * n + i] * inner(k)).sum();
                let expected = if i == j { values[i] } else { 0.0 };
                assert!((between - expected).abs() < 1e-9 * values[n - 1], "{i} {j} {between} {expected}");
            }
        }
        // With the Hadamard factor behind it, every channel carries the same share of the weights.
        let mut turned = wide.clone();
        Turn::new(n, 1, Some(Arc::new(sum))).rows(&mut turned);
        let share = |j: usize| turned.iter().skip(j).step_by(n).map(|v| v * v).sum::<f64>();
        let mean = values.iter().sum::<f64>() / n as f64;
        assert!((0..n).all(|j| (share(j) / mean - 1.0).abs() < 1e-9));
    }
}

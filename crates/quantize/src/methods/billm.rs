//! BiLLM (Huang et al. 2024): weights as binary numbers, those of salient columns twice over.
//!
//! Pseudo-code, for blocks of columns as long as a group, with the factor of [`crate::factor`]:
//!
//! ```text
//! T = what the block's columns should be, given Δ = Ŵ − W of the columns before it
//! salient columns, threshold of magnitudes: see `choice`, over all rows of T
//! every row: (μ, α) of the concentrated and of the sparse part, (μ₁ + μ₂, α₁, α₂) of the salient columns, in f16
//! for k in block:
//!     t   = w_k − Σ_{j before k} Δ_j·Ũ_jk
//!     ŵ_k = the value nearest to t of those its part has
//! ```
//!
//! The published program rounds a block to T at once and passes every column's error on to later blocks as if the columns beside it
//! had none. On books-10m that leaves a KL divergence of 0.151, and the last loop, which is GPTQ's, 0.141.

mod choice;

use super::gptq::shrunk;
use super::{Linear, Method, Needs, Solved};
use crate::refine::task_rows;
use crate::{Error, Factor, Order, SolverOptions};
use bitmill_kernels::{View, ViewMut, gemm};
use bitmill_scheme::{Binary, BinaryParams, GridKind, Quantized, Residual, Scheme};
use choice::{Block, Choice};
use rayon::prelude::*;

pub(super) struct Billm;

/// What other methods say of binary numbers.
pub(super) const ONLY: &str = "binary numbers are chosen with their salient columns; use --method billm";

impl Method for Billm {
    fn name(&self) -> &'static str {
        "billm"
    }

    fn summary(&self) -> &'static str {
        "binary numbers with salient columns and error feedback (BiLLM); for --scheme binary"
    }

    fn refuses(&self, scheme: &Scheme) -> Option<&'static str> {
        (scheme.grid != GridKind::Binary).then_some("it makes binary numbers; use --scheme binary, or --method gptq")
    }

    fn needs(&self, _: &SolverOptions) -> Needs {
        Needs::Hessian
    }

    fn solve(&self, linears: &[Linear<'_>], h: Option<&[f32]>, options: &SolverOptions) -> Result<Vec<Solved>, Error> {
        let (Some(first), Some(h)) = (linears.first(), h) else { return Ok(Vec::new()) };
        let order = Order::natural(first.shape[1]);
        let factor = Factor::new(&shrunk(h, options.shrinkage), &order.columns, options.damping)
            .map_err(|damping| Error::NotPositive { tensor: first.name.into(), damping })?;
        let solve = |linear: &Linear<'_>| Solved {
            quantized: swept(linear, &factor, |block| block.choose()),
            damping: Some(factor.damping()),
            stages: Vec::new(),
        };
        Ok(linears.iter().map(solve).collect())
    }
}

/// Rounds a linear block by block; `choose` is asked once for each.
fn swept(linear: &Linear<'_>, factor: &Factor, choose: impl Fn(&Block<'_>) -> Choice) -> Quantized {
    const REALS: usize = BinaryParams::REALS;
    let ([rows, n], len) = (linear.shape, linear.scheme.group_len(linear.shape[1]));
    let groups = linear.scheme.groups(n);
    let (mut codes, mut scales) = (vec![0u8; rows * n], vec![0.0f32; rows * groups * REALS]);
    let mut delta = vec![0.0f32; rows * n];
    for group in 0..groups {
        let (start, width) = (group * len, len.min(n - group * len));
        let target = targets(linear.weight, &delta, factor, start, width);
        let choice = choose(&Block { target: &target, cost: &factor.diagonal()[start..start + width] });
        (codes.par_chunks_mut(n))
            .zip(delta.par_chunks_mut(n))
            .zip(scales.par_chunks_mut(groups * REALS))
            .zip(linear.weight.par_chunks(n).zip(target.par_chunks(width)))
            .for_each(|(((codes, delta), scales), (weight, target))| {
                let block = start..start + width;
                let (codes, delta) = (&mut codes[block.clone()], &mut delta[block.clone()]);
                let (params, parts) = fitted(target, &choice);
                round(target, &params, &parts, (factor, start), codes);
                scales[group * REALS..][..REALS].copy_from_slice(&params.reals());
                for ((delta, &code), weight) in delta.iter_mut().zip(&*codes).zip(&weight[block]) {
                    *delta = params.value(code) - weight;
                }
            });
    }
    let (zeros, group_of) = (Vec::new(), Vec::new());
    Quantized { scheme: linear.scheme, shape: linear.shape, codes, scales, zeros, group_of, input: None }
}

/// What the columns from `start` on should be, given `delta` of those before them, if all are chosen together: `[rows, width]`.
fn targets(weight: &[f32], delta: &[f32], factor: &Factor, start: usize, width: usize) -> Vec<f32> {
    let (n, unit) = (factor.width(), factor.unit());
    let task = task_rows(n);
    let mut target = vec![0.0f32; weight.len() / n * width];
    (target.par_chunks_mut(task * width)).zip(delta.par_chunks(task * n)).zip(weight.par_chunks(task * n)).for_each(
        |((target, delta), weight)| {
            // Moves by Σ_j Δ_j·Ũ_jk of earlier blocks alone, then by what these do to one another.
            let rows = weight.len() / n;
            let earlier = View::new(&unit[start..], start, width, n);
            gemm(-1.0, View::new(delta, rows, start, n), earlier, 0.0, &mut ViewMut::new(target, rows, width, width));
            for (target, weight) in target.chunks_exact_mut(width).zip(weight.chunks_exact(n)) {
                for j in 0..width {
                    let moved = target[j];
                    pass_on(&mut target[j + 1..], moved, &unit[(start + j) * n + start + j + 1..]);
                }
                target.iter_mut().zip(&weight[start..]).for_each(|(t, w)| *t += w);
            }
        },
    );
    target
}

/// Takes from later columns what an error costs them.
fn pass_on(later: &mut [f32], error: f32, unit: &[f32]) {
    later.iter_mut().zip(unit).for_each(|(t, u)| *t -= error * u);
}

/// What a weight of a block belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Concentrated,
    Sparse,
    Salient,
}

/// The parameters of a row's part of a block, and the part of each of its weights.
fn fitted(target: &[f32], choice: &Choice) -> (BinaryParams, Vec<Part>) {
    let part = |(w, salient): (&f32, &bool)| match (salient, w.abs() >= choice.threshold) {
        (true, _) => Part::Salient,
        (false, true) => Part::Sparse,
        (false, false) => Part::Concentrated,
    };
    let parts: Vec<Part> = target.iter().zip(&choice.salient).map(part).collect();
    let of = |wanted: Part| -> Vec<f32> {
        target.iter().zip(&parts).filter(|(_, part)| **part == wanted).map(|(&w, _)| w).collect()
    };
    let [concentrated, sparse, salient] = [Part::Concentrated, Part::Sparse, Part::Salient].map(of);
    let once = |part: Vec<f32>| Binary::fit(part.iter().copied());
    let twice = Residual::fit(salient.iter().copied());
    (BinaryParams::new(once(concentrated), once(sparse), twice), parts)
}

/// Writes the codes of a row's part of a block, which begins with column `start`.
fn round(target: &[f32], params: &BinaryParams, parts: &[Part], (factor, start): (&Factor, usize), codes: &mut [u8]) {
    let (n, mut wanted) = (factor.width(), target.to_vec());
    for k in 0..codes.len() {
        codes[k] = match parts[k] {
            Part::Salient => params.salient_code(wanted[k]),
            side => params.plain_code(wanted[k], side == Part::Sparse),
        };
        let error = params.value(codes[k]) - target[k];
        pass_on(&mut wanted[k + 1..], error, &factor.unit()[(start + k) * n + start + k + 1..]);
    }
}

#[cfg(test)]
mod tests;

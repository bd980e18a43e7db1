//! The linears of a site, rounded from what was seen there.

use super::{Done, Flow, Target, rows};
use crate::bias::corrected_bias;
use crate::fused::together;
use crate::journal::{StageChange, TensorRecord};
use crate::refine::energy;
use crate::seen::Seen;
use crate::sensitivity::quick;
use crate::shift::{Shifted, choose};
use crate::{Error, Linear, Method, Solved, SolverOptions, TargetShift, loss};
use bitmill_kernels::Short;
use bitmill_models::{Block, Role};
use std::borrow::Cow;
use std::time::Instant;

impl Flow<'_> {
    /// Rounds the linears of one site together: they share H and its factor. Those whose bias is corrected are rounded
    /// for the error about its mean, since the bias takes care of the mean.
    pub(super) fn solve_site(
        &self,
        block: &Block,
        targets: &[&Target<'_>],
        seen: Seen,
        method: &dyn Method,
        options: &SolverOptions,
    ) -> Result<Vec<(Role, Done)>, Error> {
        let corrected = |t: &Target<'_>| self.observation.biases && t.bias.is_some();
        let (centred, plain): (Vec<&Target<'_>>, Vec<_>) = targets.iter().partition(|t| corrected(t));
        let mut all = Vec::new();
        // Who comes last takes what was seen; both are there in few models.
        let mut seen = Some(seen);
        for (group, is_centred) in [(plain, false), (centred.clone(), true)] {
            let others = !is_centred && !centred.is_empty();
            let seen = if group.is_empty() || others { seen.clone() } else { seen.take() };
            if let (Some(seen), false) = (seen, group.is_empty()) {
                all.extend(self.solve_group(block, &group, (seen, is_centred), (method, options))?);
            }
        }
        Ok(all)
    }

    /// Rounds linears of one site that are all corrected by their biases, or none of them.
    fn solve_group(
        &self,
        block: &Block,
        group: &[&Target<'_>],
        (seen, centred): (Seen, bool),
        (method, options): (&dyn Method, &SolverOptions),
    ) -> Result<Vec<(Role, Done)>, Error> {
        let weights = group.iter().map(|t| rows(block.linear(t.role))).collect::<Result<Vec<_>, _>>()?;
        let (tokens, largest) = (seen.tokens(), seen.largest());
        let (learnt, held) = seen.moments(centred);
        let shifts = self.observation.shift != TargetShift::Off;
        let choice = held.as_ref().filter(|_| shifts).and_then(|held| choose(&weights, &learnt, held));
        let apart = held.as_ref().filter(|_| self.observation.damping_search && !learnt.is_empty());
        let apart = apart.map(|held| [learnt.h.clone(), held.h.clone()]);
        let moments = match held {
            Some(held) => learnt.merged(held),
            None => learnt,
        };
        let shifted = choice.and_then(|choice| choice.targets(&weights, &moments));
        let (h, [mean, mean_drift, mean_residual]) = moments.into_parts();
        let means = if shifts { [mean, mean_drift, mean_residual] } else { [mean, Vec::new(), Vec::new()] };
        let (goals, shifts): (Cow<'_, [Vec<f32>]>, Option<Vec<StageChange>>) = match shifted {
            Some(shifted) => {
                let (goals, stages) = shifted.into_iter().map(Shifted::apart).unzip();
                (Cow::Owned(goals), Some(stages))
            }
            None => (Cow::Borrowed(&weights), None),
        };
        let (options, damping) = self.damped(group, &goals, (apart, largest), (method, options))?;
        let input = Input { h: &h, tokens, largest, short: self.observation.arithmetic.short() };
        let mut solved = solve_targets(group, &goals, &input, method, &options)?;
        for (i, (role, done)) in solved.iter_mut().enumerate() {
            done.record.stages.extend(damping.clone());
            done.record.stages.extend(shifts.as_ref().map(|s| s[i].clone()));
            if let (true, Some(bias), Some(round)) = (centred, block.bias(*role), group[i].bias) {
                let (own, rounded) = (rows(bias)?, done.solved.quantized.dequantize());
                let bias = corrected_bias(&own, &weights[i], &rounded, &means);
                // The mean of the error, which is gone, and what is left about it.
                let gone: f64 = own.iter().zip(&bias).map(|(a, b)| f64::from(a - b).powi(2)).sum();
                let left: f64 = loss(&goals[i], &rounded, &h).iter().sum();
                done.record.stages.push(StageChange {
                    stage: "bias".into(),
                    of: "output error".into(),
                    change: if gone > 0.0 { -gone / (gone + left) } else { 0.0 },
                    shares: Vec::new(),
                });
                done.bias = Some(bias.into_iter().map(round).collect());
            }
        }
        Ok(solved)
    }
}

/// Damping and shrinkage that are tried.
const DAMPINGS: [(f32, f32); 6] = [(0.001, 0.0), (0.01, 0.0), (0.05, 0.0), (0.01, 0.05), (0.01, 0.15), (0.01, 0.4)];

impl Flow<'_> {
    /// The options with the damping and shrinkage of H that lose least on held-out tokens, where there are H of the others and
    /// of these `apart`: rounded against the first, without refinements.
    fn damped(
        &self,
        targets: &[&Target<'_>],
        goals: &[Vec<f32>],
        (apart, largest): (Option<[Vec<f32>; 2]>, f32),
        (method, options): (&dyn Method, &SolverOptions),
    ) -> Result<(SolverOptions, Option<StageChange>), Error> {
        let Some([learnt, held]) = apart else { return Ok((options.clone(), None)) };
        let energies: Vec<f64> = goals.iter().map(|goal| energy(goal, &held, None)).collect();
        let loss_of = |(damping, shrinkage): (f32, f32)| -> Result<f64, Error> {
            let options = SolverOptions { damping, shrinkage, ..quick(options) };
            let solved = solve(targets, goals, (&learnt, largest), method, &options)?;
            let relative = |((goal, energy), solved): ((&Vec<f32>, &f64), &Solved)| -> f64 {
                let error: f64 = loss(goal, &solved.quantized.dequantize(), &held).iter().sum();
                if *energy > 0.0 { error / energy } else { 0.0 }
            };
            Ok(goals.iter().zip(&energies).zip(&solved).map(relative).sum())
        };
        let own = (options.damping, options.shrinkage);
        let before = loss_of(own)?;
        let mut best = (before, own);
        for candidate in DAMPINGS.into_iter().filter(|&c| c != own) {
            let loss = loss_of(candidate)?;
            if loss < best.0 {
                best = (loss, candidate);
            }
        }
        let (loss, (damping, shrinkage)) = best;
        let stage = StageChange {
            stage: "damping".into(),
            of: "output error on held-out tokens".into(),
            change: if before > 0.0 { loss / before - 1.0 } else { 0.0 },
            shares: vec![f64::from(damping), f64::from(shrinkage)],
        };
        Ok((SolverOptions { damping, shrinkage, ..options.clone() }, Some(stage)))
    }
}

/// What is known of the activation that targets read.
pub(crate) struct Input<'a> {
    /// Its H, the tokens that H is of, and the largest magnitude among them.
    pub(crate) h: &'a [f32],
    pub(crate) tokens: u64,
    pub(crate) largest: f32,
    /// What H was multiplied in: where that is bfloat16, it does for what is reported as well.
    pub(crate) short: Option<Short>,
}

/// Rounds `targets`, which read one activation, from their weights and its H, of which `largest` is the largest magnitude.
fn solve(
    targets: &[&Target<'_>],
    weights: &[Vec<f32>],
    (h, largest): (&[f32], f32),
    method: &dyn Method,
    options: &SolverOptions,
) -> Result<Vec<Solved>, Error> {
    let linears: Vec<Linear<'_>> = (targets.iter().zip(weights))
        .map(|(t, weight)| {
            let partners = targets.iter().zip(weights).filter(|(other, _)| together(t.role, other.role));
            let amax = || partners.flat_map(|(_, w)| w).fold(0.0f32, |a, w| a.max(w.abs()));
            let amax = t.scheme.shares_scale().then(amax);
            Linear { amax, input: largest, ..Linear::new(t.module, weight, t.shape, t.scheme) }
        })
        .collect();
    method.solve(&linears, Some(h), options)
}

/// The same, with a record of each.
pub(crate) fn solve_targets(
    targets: &[&Target<'_>],
    weights: &[Vec<f32>],
    &Input { h, tokens, largest, short }: &Input<'_>,
    method: &dyn Method,
    options: &SolverOptions,
) -> Result<Vec<(Role, Done)>, Error> {
    let started = Instant::now();
    let solved = solve(targets, weights, (h, largest), method, options)?;
    let seconds = started.elapsed().as_secs_f64() / targets.len() as f64;
    let done = targets.iter().zip(weights).zip(solved).map(|((t, weight), solved)| {
        let mut error = solved.quantized.dequantize();
        error.iter_mut().zip(weight).for_each(|(error, weight)| *error -= weight);
        let [error, energy] = [&error, weight].map(|x| energy(x, h, short));
        let record = TensorRecord {
            relative_error: if energy > 0.0 { error / energy } else { 0.0 },
            error_of: "output".into(),
            damping: solved.damping,
            stages: solved.stages.clone(),
            tokens,
            seconds,
            ..TensorRecord::of(t.module, t.shape, t.scheme, method, t.bytes)
        };
        (t.role, Done { module: t.module.into(), solved, record, bias: None })
    });
    Ok(done.collect())
}

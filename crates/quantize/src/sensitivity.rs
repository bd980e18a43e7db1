//! What each option of each tensor is predicted to cost the model's predictions.
//!
//! Prediction = (output error tr(ΔHΔᵀ) of the option) × (KL divergence per unit of output error at that site). The first
//! factor needs weights and H only, and there are two of it, at different cost:
//!
//! * *closed form*: Σ_k D_k·s²/12 per row, with D from the factor of H and s the step of the option's grid at each weight
//!   (for types of GGUF, Σ_k D_k·e² with e what rounding to nearest leaves). One factorisation per site and order of
//!   columns, and no error feedback.
//! * *measured*: what the method itself leaves, rounding a sample of the rows. Rows are independent, so a sample of them
//!   says the error of all to a few percent, and two options on the same rows compare far better than that.
//!
//! The second factor is measured once per site by a probe: round the linears of that site alone, look at the predictions.
//! The same probes say how errors of two sites add up (`Probes::cross`); without that they are taken to be independent,
//! which holds as long as they are small (the linearity rule of HIGGS).

use crate::methods::order;
use crate::weight::weight;
use crate::{Action, Error, Factor, Linear, Needs, Order, Plan, SolverOptions, Unit, loss, method};
use bitmill_calibrate::{Pass, Replacement, SiteStats, Statistics, Windows, probe};
use bitmill_checkpoint::Checkpoint;
use bitmill_models::{Block, ModelSpec, Role, SITES, Site};
use bitmill_scheme::{Binary, Bits, Fit, FloatGrid, FloatType, Granularity, Grid, GridKind, Scheme};
use serde::Serialize;

/// Width of the probes: errors large enough to stand out of rounding noise, small enough to add up.
const PROBE_BITS: Bits = Bits::ALL[2];
/// Group size of the probes, where it divides the width.
const PROBE_GROUP: usize = 128;
/// Rows of a tensor on which its options are compared, at most. An error of the sample is shared by all options of the tensor;
/// between tensors, one of 10% costs the best mixture about its square.
const ROWS: usize = 64;
/// Rows on which the closed form fits scales, at most.
const FITTED_ROWS: usize = 16;

/// A tensor and what every option costs and loses.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sensitivity {
    /// Module name.
    pub module: String,
    /// Its block.
    pub block: usize,
    /// Its place in the block.
    #[serde(skip)]
    pub role: Role,
    /// Its weights.
    pub weights: u64,
    /// For every option: bytes written, `None` where the format or the shape refuses it.
    pub bytes: Vec<Option<u64>>,
    /// For every option: output error tr(ΔHΔᵀ) that the method leaves; infinite where it is refused.
    pub output_error: Vec<f64>,
    /// The same by the closed form.
    pub closed_form: Vec<f64>,
    /// KL divergence per unit of output error.
    pub weight: f64,
}

impl Sensitivity {
    /// Predicted KL divergence of option `k`, in nats per position.
    #[must_use]
    pub fn predicted(&self, k: usize) -> f64 {
        self.output_error[k] * self.weight
    }

    /// Index of its site among all of the model.
    #[must_use]
    pub fn site(&self) -> usize {
        let own = SITES.iter().position(|s| s.linears.contains(&self.role)).unwrap_or(0);
        self.block * SITES.len() + own
    }
}

/// KL divergence per unit of output error at every site, `[blocks][4]` in the order of `SITES`, measured by rounding the
/// linears of one site at a time; and the correlations of what errors at two sites do (`Probes::cross`).
///
/// # Errors
/// Whatever the forward pass and the rounding report.
pub fn probe_sites(
    pass: Pass<'_>,
    windows: &Windows,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(Vec<[f64; 4]>, Vec<f64>), Error> {
    let mut errors: Vec<Vec<f64>> = Vec::new();
    let mut replace = |index: usize, block: &Block, stats: &[SiteStats; 4]| {
        let sites = pass.spec.sites(index);
        let rounded = sites.iter().zip(stats).map(|(site, stats)| round_site(pass.spec, index, block, site, stats));
        let (replacements, error) = rounded.collect::<Result<(Vec<_>, Vec<_>), Error>>()?;
        errors.push(error);
        Ok(replacements)
    };
    let measured = probe::<Error>(pass, windows, &mut replace, progress)?;
    let per_unit = |(kl, error): (&Vec<f64>, &Vec<f64>)| {
        std::array::from_fn(|site| if error[site] > 0.0 { kl[site] / error[site] } else { 0.0 })
    };
    Ok((measured.kl.iter().zip(&errors).map(per_unit).collect(), measured.cross))
}

/// The linears of a site rounded for a probe, and the output error that leaves.
fn round_site(
    spec: &ModelSpec,
    index: usize,
    block: &Block,
    site: &Site,
    stats: &SiteStats,
) -> Result<(Replacement, f64), Error> {
    let granularity = match stats.width().is_multiple_of(PROBE_GROUP) {
        true => Granularity::Group(PROBE_GROUP),
        false => Granularity::Channel,
    };
    let scheme = Scheme::int(PROBE_BITS, true, granularity);
    let (h, quick) = (stats.hessian(), quick(&SolverOptions::default()));
    let mut error = 0.0;
    let mut replacement = Replacement::new();
    for &role in site.linears {
        let (name, weight) = (spec.module(index, role), block.linear(role).flatten_all()?.to_vec1::<f32>()?);
        let linear = Linear::new(&name, &weight, spec.linear_shape(role), scheme);
        for solved in method("gptq")?.solve(&[linear], Some(&h), &quick)? {
            let values = solved.quantized.dequantize();
            error += loss(&weight, &values, &h).iter().sum::<f64>();
            replacement.push((role, values));
        }
    }
    Ok((replacement, error))
}

/// The options of a solve whose loss is to be known and whose codes are not kept: refinements lower all losses alike.
pub(crate) fn quick(options: &SolverOptions) -> SolverOptions {
    SolverOptions { descent_sweeps: 0, scale_refits: 0, soft: None, ..options.clone() }
}

/// The table of every tensor that `plan` quantizes and every option, in the plan's order. `progress` is told (blocks
/// done, blocks in all).
///
/// # Errors
/// [`Error::NoSensitivity`] for statistics without probes, and whatever the method reports.
pub fn sensitivities(
    input: &Checkpoint,
    plan: &Plan,
    statistics: &Statistics,
    options: &[Scheme],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Sensitivity>, Error> {
    let weights = statistics.sensitivity()?.ok_or(Error::NoSensitivity)?;
    let blocks: Vec<_> = plan.units.iter().filter_map(|u| Some((u.block?, u))).collect();
    let mut table = Vec::new();
    for (done, (block, unit)) in blocks.iter().enumerate() {
        for (site, &weight) in SITES.iter().zip(&weights[*block]) {
            let rows = sampled(input, plan.spec.as_ref(), unit, site)?;
            if rows.is_empty() {
                continue;
            }
            let h = statistics.hessian(*block, site)?;
            for (sample, costs) in rows.iter().zip(weigh(plan, &rows, &h, options)?) {
                let (mut bytes, mut output_error, mut closed_form) = (Vec::new(), Vec::new(), Vec::new());
                for cost in costs {
                    bytes.push(cost.as_ref().map(|c| c.bytes));
                    output_error.push(cost.as_ref().map_or(f64::INFINITY, |c| c.measured));
                    closed_form.push(cost.as_ref().map_or(f64::INFINITY, |c| c.closed_form));
                }
                let [rows, cols] = sample.shape;
                table.push(Sensitivity {
                    module: sample.module.clone(),
                    block: *block,
                    role: sample.role,
                    weights: (rows * cols) as u64,
                    bytes,
                    output_error,
                    closed_form,
                    weight,
                });
            }
        }
        progress(done + 1, blocks.len());
    }
    Ok(table)
}

/// Some rows of a linear.
struct Sample {
    module: String,
    role: Role,
    /// Of the whole linear.
    shape: [usize; 2],
    rows: Vec<f32>,
}

/// What an option of a linear is predicted to cost.
struct Cost {
    bytes: u64,
    measured: f64,
    closed_form: f64,
}

/// Evenly spaced rows of the linears of `unit` that read `site` and are quantized.
fn sampled(input: &Checkpoint, spec: Option<&ModelSpec>, unit: &Unit, site: &Site) -> Result<Vec<Sample>, Error> {
    let mut samples = Vec::new();
    for tensor in &unit.tensors {
        let Action::Quantize { module, role: Some(role), shape, .. } = &tensor.action else { continue };
        if !site.linears.contains(role) {
            continue;
        }
        let (all, [rows, cols]) = (weight(input, spec, module)?, *shape);
        let count = rows.min(ROWS);
        let row = |i: usize| &all[i * rows / count * cols..][..cols];
        let rows = (0..count).flat_map(row).copied().collect();
        samples.push(Sample { module: module.clone(), role: *role, shape: *shape, rows });
    }
    Ok(samples)
}

/// Costs of every option for the linears of one site. All are rounded in one call, so that those that round in the same
/// order share its factor.
fn weigh(plan: &Plan, samples: &[Sample], h: &[f32], options: &[Scheme]) -> Result<Vec<Vec<Option<Cost>>>, Error> {
    let solver = quick(&plan.settings.solver);
    let fits = |sample: &Sample, scheme: &Scheme| {
        scheme.check(sample.shape[1]).is_ok()
            && plan.method.refuses(scheme).is_none()
            && plan.format.check(&sample.module, scheme, sample.shape).is_ok()
    };
    let mut linears = Vec::new();
    for sample in samples {
        let [_, cols] = sample.shape;
        let shape = [sample.rows.len() / cols, cols];
        let of = |&scheme| Linear::new(&sample.module, &sample.rows, shape, scheme);
        linears.extend(options.iter().filter(|s| fits(sample, s)).map(of));
    }
    let h_for = (plan.method.needs(&solver) == Needs::Hessian).then_some(h);
    let mut solved = plan.method.solve(&linears, h_for, &solver)?.into_iter();
    let mut factors = Factors { h, importance: diagonal(h), factored: Vec::new() };
    let mut of = |sample: &Sample, scheme: &Scheme| -> Result<Option<Cost>, Error> {
        // What fits was rounded, in this order.
        let Some(solved) = fits(sample, scheme).then(|| solved.next()).flatten() else { return Ok(None) };
        let layout = plan.format.layout(&sample.module, scheme, sample.shape);
        let share = (sample.shape[0] * sample.shape[1]) as f64 / sample.rows.len() as f64;
        let (order, factor) = factors.of(&sample.module, scheme, &solver)?;
        let measured: f64 = loss(&sample.rows, &solved.quantized.dequantize(), h).iter().sum();
        Ok(Some(Cost {
            bytes: layout.iter().map(|t| t.bytes() as u64).sum(),
            measured: share * measured,
            closed_form: share * closed_form(&sample.rows, scheme, order, factor),
        }))
    };
    samples.iter().map(|sample| options.iter().map(|scheme| of(sample, scheme)).collect()).collect()
}

/// The factors of one H, one for each order of columns.
struct Factors<'a> {
    h: &'a [f32],
    importance: Vec<f32>,
    factored: Vec<(Order, Factor)>,
}

impl Factors<'_> {
    fn of(&mut self, module: &str, scheme: &Scheme, solver: &SolverOptions) -> Result<&(Order, Factor), Error> {
        let order = order(scheme, &self.importance, solver);
        let at = match self.factored.iter().position(|(o, _)| *o == order) {
            Some(at) => at,
            None => {
                let factor = Factor::new(self.h, &order.columns, solver.damping)
                    .map_err(|damping| Error::NotPositive { tensor: module.into(), damping })?;
                self.factored.push((order, factor));
                self.factored.len() - 1
            }
        };
        Ok(&self.factored[at])
    }
}

fn diagonal(h: &[f32]) -> Vec<f32> {
    let n = h.len().isqrt();
    h.iter().step_by(n + 1).copied().collect()
}

/// Σ D·s²/12 over all weights of `rows`: what error feedback is expected to leave, with s the step of the grid that is
/// fitted to each group (of some of the rows, which stand for all).
fn closed_form(rows: &[f32], scheme: &Scheme, order: &Order, factor: &Factor) -> f64 {
    let n = order.columns.len();
    let mut d = vec![0.0f64; n];
    order.columns.iter().zip(factor.diagonal()).for_each(|(&c, &v)| d[c as usize] = f64::from(v));
    let (mut total, all) = (0.0, rows.len() / n);
    let count = all.min(FITTED_ROWS);
    let fitted = (0..count).map(|i| &rows[i * all / count * n..][..n]);
    match scheme.form() {
        None if let GridKind::Float(float) = scheme.grid => {
            total = fitted.map(|row| float_error(row, &d, scheme, float)).sum();
        }
        // What columns and parts are split by is not known yet; binarized as a whole, groups still compare.
        None if scheme.grid == GridKind::Binary => {
            let length = scheme.group_len(n);
            for (group, d) in fitted.flat_map(|row| row.chunks(length).zip(d.chunks(length))) {
                let fit = Binary::fit(group.iter().copied());
                let error = |w: f32| f64::from(w - fit.value(fit.plus(w))).powi(2);
                total += 12.0 * group.iter().zip(d).map(|(&w, d)| d * error(w)).sum::<f64>();
            }
        }
        None => {
            let (grid, length) = (scheme.grid(), scheme.group_len(n));
            let even = vec![1.0f32; length];
            for row in fitted {
                for (group, d) in row.chunks(length).zip(d.chunks(length)) {
                    let step = f64::from(grid.fit(group, Fit::Weighted(&even[..group.len()])).scale);
                    total += step * step * d.iter().sum::<f64>();
                }
            }
        }
        // Levels need not be evenly spaced, nor codes be free of one another: rounding to nearest says what s²/12 is.
        Some(form) => {
            let (even, mut codes) = (vec![1.0f32; form.len], vec![0u8; form.sub]);
            for row in fitted {
                for (block, d) in row.chunks_exact(form.len).zip(d.chunks_exact(form.len)) {
                    let params = form.fit(block, &even);
                    for (sub, (w, d)) in block.chunks_exact(form.sub).zip(d.chunks_exact(form.sub)).enumerate() {
                        let affine = form.affine(&params, sub);
                        form.round(w, &even[..w.len()], affine, &mut codes);
                        let error = |(&c, &w): (&u8, &f32)| f64::from(form.value(c, affine) - w).powi(2);
                        total += 12.0 * codes.iter().zip(w).zip(d).map(|(cw, d)| d * error(cw)).sum::<f64>();
                    }
                }
            }
        }
    }
    total / 12.0 * all as f64 / count.max(1) as f64
}

/// 12·Σ d·(w − ŵ)² of a row rounded to nearest, which says of unevenly spaced levels what s² does of others.
fn float_error(row: &[f32], d: &[f64], scheme: &Scheme, float: FloatType) -> f64 {
    let amax = row.iter().fold(0.0f32, |a, v| a.max(v.abs()));
    let divisor = if scheme.has_divisor() { FloatGrid::divisor_for(float, amax) } else { 1.0 };
    let (grid, length) = (FloatGrid { float, scale: scheme.scale, divisor }, scheme.group_len(row.len()));
    let even = vec![1.0f32; length];
    let group = |(group, d): (&[f32], &[f64])| {
        let params = grid.fit(group, Fit::Weighted(&even[..group.len()]));
        let error = |&w: &f32| f64::from(grid.value(grid.nearest(w, params), params) - w).powi(2);
        12.0 * group.iter().zip(d).map(|(w, d)| d * error(w)).sum::<f64>()
    };
    row.chunks(length).zip(d.chunks(length)).map(group).sum()
}

/// Spearman's rank correlation of two lists; equal numbers share their mean rank. 0 where a list is constant.
#[must_use]
pub fn rank_correlation(a: &[f64], b: &[f64]) -> f64 {
    let (a, b) = (ranks(a), ranks(b));
    let mean = (a.len() as f64 - 1.0) / 2.0;
    let product = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| (x - mean) * (y - mean)).sum::<f64>();
    let scale = (product(&a, &a) * product(&b, &b)).sqrt();
    if scale > 0.0 { product(&a, &b) / scale } else { 0.0 }
}

fn ranks(values: &[f64]) -> Vec<f64> {
    let mut sorted: Vec<usize> = (0..values.len()).collect();
    sorted.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
    let mut ranks = vec![0.0; values.len()];
    let mut from = 0;
    for equal in sorted.chunk_by(|&i, &j| values[i] == values[j]) {
        let rank = from as f64 + (equal.len() as f64 - 1.0) / 2.0;
        equal.iter().for_each(|&i| ranks[i] = rank);
        from += equal.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sweep::tests::{random_h, random_w};
    use bitmill_scheme::BLOCKS;

    #[test]
    fn the_closed_form_predicts_what_the_sweep_leaves() {
        // Methods part 1.3, over grids, widths and groups: the same order of options, and the same size where clipping
        // does not matter.
        let (n, rows) = (256, 64);
        let (h, w) = (random_h(n, 21), random_w(rows * n, 22));
        let solver = quick(&SolverOptions::default());
        let int = |bits, symmetric, g| Scheme::int(Bits::new(bits).unwrap(), symmetric, Granularity::Group(g));
        let mut options = Vec::new();
        for bits in 2..=8 {
            for g in [32, 64, 128] {
                options.extend([int(bits, true, g), int(bits, false, g)]);
            }
        }
        options.extend(BLOCKS.iter().map(|b| Scheme::block(b.kind)));
        let mut factors = Factors { h: &h, importance: diagonal(&h), factored: Vec::new() };
        let (mut predicted, mut measured) = (Vec::new(), Vec::new());
        for scheme in &options {
            let linear = Linear::new("x", &w, [rows, n], *scheme);
            let solved = method("gptq").unwrap().solve(&[linear], Some(&h), &solver).unwrap();
            let (order, factor) = factors.of("x", scheme, &solver).unwrap();
            predicted.push(closed_form(&w, scheme, order, factor));
            measured.push(loss(&w, &solved[0].quantized.dequantize(), &h).iter().sum::<f64>());
        }
        let rank = rank_correlation(&predicted, &measured);
        assert!(rank > 0.95, "{rank}");
        for (scheme, (p, m)) in options.iter().zip(predicted.iter().zip(&measured)) {
            if scheme.form().is_none() && scheme.bits().get() >= 4 {
                // A searched scale makes residues of the smallest groups smaller than evenly spread ones.
                let most = if scheme.group_len(n) < 64 { 2.0 } else { 1.7 };
                assert!((0.6..most).contains(&(p / m)), "{scheme}: {p} {m}");
            }
        }
    }

    #[test]
    fn rank_correlation_of_known_lists() {
        let a = [1.0, 2.0, 3.0, 4.0];
        assert_eq!(rank_correlation(&a, &[10.0, 20.0, 30.0, 1000.0]), 1.0);
        assert_eq!(rank_correlation(&a, &[4.0, 3.0, 2.0, 1.0]), -1.0);
        assert_eq!(rank_correlation(&a, &[1.0; 4]), 0.0);
        // 1 − 6·Σd²/(n(n² − 1)) with d = 0, 1, 1, 0.
        assert!((rank_correlation(&a, &[1.0, 3.0, 2.0, 4.0]) - 0.8).abs() < 1e-12);
        assert!((rank_correlation(&[1.0, 1.0, 2.0], &[1.0, 1.0, 5.0]) - 1.0).abs() < 1e-12);
    }
}

//! What each option of each tensor is predicted to cost the model's predictions.
//!
//! Prediction = (output error tr(ΔHΔᵀ) that the method itself leaves under the option) × (KL divergence per unit of
//! output error at that site). The first factor needs weights and H only. The second is measured once per site by a probe:
//! round the linears of that site alone, look at the predictions. Both factors are of the full-precision model, and errors
//! of different places are taken to add up, which holds as long as they are small (the linearity rule of HIGGS).

use crate::{Action, Error, Linear, Needs, Plan, SolverOptions, loss, method};
use bitmill_calibrate::{Pass, Replacement, SiteStats, Statistics, Windows, probe};
use bitmill_checkpoint::Checkpoint;
use bitmill_models::{Block, ModelSpec, Role, SITES, Site};
use bitmill_scheme::{Bits, Granularity, Scheme};
use serde::Serialize;

/// Width of the probes: errors large enough to stand out of rounding noise, small enough to add up.
const PROBE_BITS: Bits = Bits::ALL[2];
/// Group size of the probes, where it divides the width.
const PROBE_GROUP: usize = 128;

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
    /// For every option: bytes written, `None` where the format or the shape refuses it.
    pub bytes: Vec<Option<u64>>,
    /// For every option: output error tr(ΔHΔᵀ); infinite where it is refused.
    pub output_error: Vec<f64>,
    /// KL divergence per unit of output error.
    pub weight: f64,
}

impl Sensitivity {
    /// Predicted KL divergence of option `k`, in nats per position.
    #[must_use]
    pub fn predicted(&self, k: usize) -> f64 {
        self.output_error[k] * self.weight
    }
}

/// KL divergence per unit of output error at every site, `[blocks][4]` in the order of `SITES`, measured by rounding the
/// linears of one site at a time.
///
/// # Errors
/// Whatever the forward pass and the rounding report.
pub fn probe_sites(
    pass: Pass<'_>,
    windows: &Windows,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<[f64; 4]>, Error> {
    let mut errors: Vec<Vec<f64>> = Vec::new();
    let mut replace = |index: usize, block: &Block, stats: &[SiteStats; 4]| {
        let rounded = SITES.iter().zip(stats).map(|(site, stats)| round_site(pass.spec, index, block, site, stats));
        let (replacements, error) = rounded.collect::<Result<(Vec<_>, Vec<_>), Error>>()?;
        errors.push(error);
        Ok(replacements)
    };
    let measured = probe::<Error>(pass, windows, &mut replace, progress)?;
    let per_unit = |(kl, error): (&Vec<f64>, &Vec<f64>)| {
        std::array::from_fn(|site| if error[site] > 0.0 { kl[site] / error[site] } else { 0.0 })
    };
    Ok(measured.iter().zip(&errors).map(per_unit).collect())
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
        let linear = Linear { name: &name, weight: &weight, shape: spec.linear_shape(role), scheme };
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
        for (site, weight) in SITES.iter().zip(&weights[*block]) {
            let mut h = None;
            for tensor in &unit.tensors {
                let Action::Quantize { module, role: Some(role), shape, .. } = &tensor.action else { continue };
                if !site.linears.contains(role) {
                    continue;
                }
                let h = match &h {
                    Some(h) => h,
                    None => h.insert(statistics.hessian(*block, site)?),
                };
                let values = input.weight(module)?.to_f32()?;
                let (mut bytes, mut output_error) = (Vec::new(), Vec::new());
                for &scheme in options {
                    let (size, error) = option(plan, module, &values, *shape, scheme, h)?;
                    bytes.push(size);
                    output_error.push(error);
                }
                let (module, block) = (module.clone(), *block);
                table.push(Sensitivity { module, block, role: *role, bytes, output_error, weight: *weight });
            }
        }
        progress(done + 1, blocks.len());
    }
    Ok(table)
}

/// Bytes and output error of a tensor under one scheme.
fn option(
    plan: &Plan,
    module: &str,
    weight: &[f32],
    shape: [usize; 2],
    scheme: Scheme,
    h: &[f32],
) -> Result<(Option<u64>, f64), Error> {
    if scheme.check(shape[1]).is_err() || plan.format.check(module, &scheme, shape).is_err() {
        return Ok((None, f64::INFINITY));
    }
    let bytes = plan.format.layout(module, &scheme, shape).iter().map(|t| t.bytes() as u64).sum();
    let linear = Linear { name: module, weight, shape, scheme };
    let h_for = (plan.method.needs(&plan.settings.solver) == Needs::Hessian).then_some(h);
    let solved = plan.method.solve(&[linear], h_for, &quick(&plan.settings.solver))?;
    let errors = solved.iter().flat_map(|s| loss(weight, &s.quantized.dequantize(), h));
    Ok((Some(bytes), errors.sum()))
}

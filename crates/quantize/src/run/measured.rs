//! A block rounded from statistics that an earlier pass collected: weights and H, or its diagonal, in; nothing flows.

use super::{Calibration, Records, Worker, write_quantized};
use crate::block::{Input, Target, solve_targets};
use crate::journal::{SiteRecord, TensorRecord};
use crate::run::Event;
use crate::weight::weight;
use crate::{Action, Error, Linear, Plan, Unit};
use bitmill_calibrate::Imatrix;
use bitmill_checkpoint::Checkpoint;
use bitmill_models::SITES;

/// Whether `plan` can do with `calibration`, where that is measured already: all linears read what all tokens do, and an
/// importance matrix weighs the inputs of every one of them.
pub(super) fn check(input: &Checkpoint, plan: &Plan, calibration: Option<Calibration<'_>>) -> Result<(), Error> {
    let experts = plan.spec.as_ref().is_some_and(|spec| spec.routing.is_some());
    match calibration {
        Some(Calibration::Statistics(_) | Calibration::Importance(_)) if plan.settings.kv_cache => {
            let reason = "the scales of keys and values are seen in text that flows through the model; give --calibration \
                          rather than statistics";
            Err(Error::Cache { reason: reason.into() })
        }
        Some(Calibration::Statistics(_) | Calibration::Importance(_)) if experts => {
            Err(Error::Experts { what: "a file of statistics".into(), dir: input.dir().into() })
        }
        Some(Calibration::Importance(imatrix)) => weighed(plan, imatrix),
        _ => Ok(()),
    }
}

fn weighed(plan: &Plan, imatrix: &Imatrix) -> Result<(), Error> {
    if !plan.method.takes_diagonal() {
        return Err(Error::DiagonalOnly { method: plan.method.name() });
    }
    let model_type = plan.spec.as_ref().map_or("", |spec| &spec.model_type);
    let blocks = plan.units.iter().filter(|unit| unit.block.is_some());
    for tensor in blocks.flat_map(|unit| &unit.tensors) {
        let Action::Quantize { module, shape, scheme, .. } = &tensor.action else { continue };
        if scheme.activations.is_calibrated() {
            let reason = "an importance matrix does not hold the largest".into();
            return Err(Error::NeedsInputs { scheme: *scheme, reason });
        }
        let got = imatrix.importance(model_type, module).map(<[f32]>::len);
        if got != Some(shape[1]) {
            return Err(Error::Importance { module: module.clone(), inputs: shape[1], got: got.unwrap_or(0) });
        }
    }
    Ok(())
}

impl Worker<'_, '_> {
    pub(super) fn measured_unit(
        &mut self,
        unit: &Unit,
        block: usize,
        calibration: Option<Calibration<'_>>,
    ) -> Result<Records, Error> {
        let Some(Calibration::Statistics(statistics)) = calibration else {
            let (method, reason) = (self.plan.method.name().into(), "neither text nor statistics were given".into());
            return Err(Error::NeedsForward { method, reason });
        };
        for tensor in unit.tensors.iter().filter(|t| t.action == Action::Copy) {
            self.copy(&tensor.name)?;
        }
        let targets: Vec<Target<'_>> = unit.tensors.iter().filter_map(Target::of).collect();
        let (mut tensors, mut sites) = (Vec::new(), Vec::new());
        for site in &SITES {
            (self.observe)(Event::Site { name: site.name });
            let wanted: Vec<&Target<'_>> = targets.iter().filter(|t| site.linears.contains(&t.role)).collect();
            if wanted.is_empty() {
                continue;
            }
            let h = statistics.hessian(block, site)?;
            let (name, tokens, spread) = (site.name.into(), statistics.tokens(), statistics.spread(block, site, &h)?);
            sites.push(SiteRecord { block, site: name, tokens, prior: None, spread });
            let largest = statistics.abs_max(block, site)?.into_iter().fold(0.0, f32::max);
            let weight = |t: &&Target<'_>| weight(self.input, self.plan.spec.as_ref(), t.module);
            let weights = wanted.iter().map(weight).collect::<Result<Vec<_>, _>>()?;
            let (method, solver) = (self.plan.method, &self.plan.settings.solver);
            let input = Input { h: &h, tokens, largest, short: None };
            for (_, done) in solve_targets(&wanted, &weights, &input, method, solver)? {
                write_quantized(self.plan, &self.output, &done.module, &done.solved.quantized)?;
                (self.observe)(Event::Tensor(&done.record));
                tensors.push(done.record);
            }
        }
        Ok((tensors, sites))
    }

    /// A block whose errors are weighed by the mean squares in `imatrix`.
    pub(super) fn weighed_unit(&mut self, unit: &Unit, imatrix: &Imatrix) -> Result<Vec<TensorRecord>, Error> {
        for tensor in unit.tensors.iter().filter(|t| t.action == Action::Copy) {
            self.copy(&tensor.name)?;
        }
        let mut records = Vec::new();
        let model_type = self.plan.spec.as_ref().map_or("", |spec| &spec.model_type);
        for target in unit.tensors.iter().filter_map(Target::of) {
            // Checked before the run began.
            let Some(h) = imatrix.importance(model_type, target.module) else { continue };
            let linear = Linear::new(target.module, &[], target.shape, target.scheme);
            let (method, solver) = (self.plan.method, &self.plan.settings.solver);
            records.push(self.without_feedback(&linear, Some(h), (method, solver), target.bytes)?);
        }
        Ok(records)
    }
}

//! A block rounded from statistics that an earlier pass collected: weights and H in, nothing flows.

use super::{Calibration, Records, Worker, write_quantized};
use crate::block::{Target, solve_targets};
use crate::journal::SiteRecord;
use crate::run::Event;
use crate::{Action, Error, Unit};
use bitmill_models::SITES;

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
            sites.push(SiteRecord { block, site: name, tokens, spread });
            let weight = |t: &&Target<'_>| Ok::<_, Error>(self.input.weight(t.module)?.to_f32()?);
            let weights = wanted.iter().map(weight).collect::<Result<Vec<_>, _>>()?;
            let (method, solver) = (self.plan.method, &self.plan.settings.solver);
            for (_, done) in solve_targets(&wanted, &weights, (&h, statistics.tokens()), method, solver)? {
                write_quantized(self.plan, &self.output, &done.module, &done.solved.quantized)?;
                (self.observe)(Event::Tensor(&done.record));
                tensors.push(done.record);
            }
        }
        Ok((tensors, sites))
    }
}

//! A block refined by gradients as soon as its linears are rounded, before anything flows on.

use crate::block::{Flow, Moment, Target, rows};
use crate::journal::StageChange;
use crate::learn::{Link, Rebuilding, Rebuilt, Start, ToStored, reconstruct, rounding_to};
use crate::{Error, Linear, Plan, Reconstruction, ScaleSearch, SolverOptions, method};
use bitmill_calibrate::{Stream, StreamKind};
use bitmill_checkpoint::Checkpoint;
use bitmill_models::{Block, NormRole};
use bitmill_scheme::Quantized;

/// What reconstruction is done by.
#[derive(Clone, Copy)]
pub(crate) struct Rebuild<'a> {
    pub(crate) how: &'a Reconstruction,
    /// The full-precision model.
    pub(crate) model: &'a Checkpoint,
    /// What becomes of every block.
    pub(crate) plan: &'a Plan,
    pub(crate) seed: u64,
}

/// What became of a block.
pub(crate) struct RebuiltBlock {
    /// Its linears, by module.
    pub(crate) linears: Vec<(String, Quantized)>,
    /// Its norms, by name, in values of their stored type.
    pub(crate) norms: Vec<(String, Vec<f32>)>,
    pub(crate) change: StageChange,
}

impl Flow<'_> {
    /// What enters the block, kept.
    pub(crate) fn entered(&self) -> Result<Stream, Error> {
        let kept = self.kept("entered")?;
        self.each_window(|w| Ok(kept.write(w, &self.hidden.read(w)?)?))?;
        Ok(kept)
    }

    fn kept(&self, name: &str) -> Result<Stream, Error> {
        let spill = self.spill.join(format!("reconstruction-{name}"));
        Ok(Stream::of_lengths(StreamKind::Bf16, self.lengths, self.spec.hidden, self.budget, &spill)?)
    }

    /// Reconstructs a block from what the solvers left (`rounded`, its linears in `start`) and `full`, the full-precision one,
    /// and moves the rounded stream past it. The full-precision stream is past it already.
    pub(crate) fn rebuild(
        &self,
        index: usize,
        [rounded, full]: [Block; 2],
        start: Vec<Start>,
        entered: &Stream,
        on: &mut dyn FnMut(Moment<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (Some(Rebuild { how, model, plan, seed }), Some(after)) = (self.rebuild, self.full) else { return Ok(()) };
        let spec = self.spec;
        let mut block = rounded;
        block.multiply_by(None);
        if !start.is_empty() {
            let last = spec.layers.min(index + how.depth as usize);
            let behind = (index + 1..last).map(|i| Block::load(spec, i, model)).collect::<Result<Vec<_>, _>>()?;
            let further = (!behind.is_empty()).then(|| self.further(&behind)).transpose()?;
            let goal = further.as_ref().unwrap_or(after);
            let rebuilding = Rebuilding {
                how,
                rope: self.rope,
                windows: self.hidden.windows(),
                input: &|w| self.tensor(entered, w),
                goal: &|w| self.tensor(goal, w),
                seed: seed ^ (index as u64) << 32,
            };
            let mut from = full;
            from.multiply_by(None);
            for (role, _) in spec.block_linears(index) {
                if let Some(bias) = block.bias(role) {
                    from.set_bias(role, Some(bias.clone()));
                }
            }
            let mut links = vec![Link { block: from, start, norms: self.stored_norms(index, model) }];
            for (next, block) in (index + 1..).zip(behind) {
                let start = if how.together { nearest(plan, next, &block)? } else { Vec::new() };
                let norms = if how.together { self.stored_norms(next, model) } else { Vec::new() };
                links.push(Link { block, start, norms });
            }
            let observe = &mut |done, total| on(Moment::Rebuilding(done, total));
            let rebuilt = reconstruct(&rebuilding, links, spec.norm_offset, observe)?;
            let Rebuilt { block: new, linears, norms, before, after } = rebuilt;
            block = new;
            let change = StageChange {
                stage: "reconstruction".into(),
                of: "output error of the block on held-out windows".into(),
                change: if before > 0.0 { after / before - 1.0 } else { 0.0 },
                shares: Vec::new(),
            };
            let linears = linears.into_iter().map(|(role, q)| (spec.module(index, role), q)).collect();
            let norms = norms.into_iter().map(|(role, norm)| (spec.norm(index, role), norm)).collect();
            on(Moment::Rebuilt(Box::new(RebuiltBlock { linears, norms, change })))?;
        }
        let pass = |w: usize| {
            let out = block.forward(&self.tensor(entered, w)?, self.rope)?;
            Ok(self.hidden.write(w, &rows(&out)?)?)
        };
        self.each_window(pass)
    }

    /// The full-precision stream behind further blocks.
    fn further(&self, behind: &[Block]) -> Result<Stream, Error> {
        let (goal, full) = (self.kept("goal")?, self.full.unwrap_or(self.hidden));
        let pass = |w: usize| {
            let mut h = self.tensor(full, w)?;
            for block in behind {
                h = block.forward(&h, self.rope)?;
            }
            Ok(goal.write(w, &rows(&h)?)?)
        };
        self.each_window(pass)?;
        Ok(goal)
    }

    /// The norms of block `index` that can be changed, each with the rounding to its stored type.
    fn stored_norms(&self, index: usize, model: &Checkpoint) -> Vec<(NormRole, ToStored)> {
        let stored = |role: NormRole| rounding_to(model.spec(&self.spec.norm(index, role)).map(|t| t.dtype));
        let norms = self.spec.block_norms(index).into_iter();
        norms.filter_map(|role| stored(role).map(|round| (role, round))).collect()
    }
}

/// What the linears of `block`, which is block `index` of `plan`, are rounded to nearest.
fn nearest(plan: &Plan, index: usize, block: &Block) -> Result<Vec<Start>, Error> {
    let options = SolverOptions { scale_search: Some(ScaleSearch::Mse), ..SolverOptions::default() };
    let rtn = method("rtn")?;
    let mut start = Vec::new();
    for target in
        plan.units.iter().filter(|unit| unit.block == Some(index)).flat_map(|u| &u.tensors).filter_map(Target::of)
    {
        let weight: Vec<f32> = block.linear(target.role).flatten_all()?.to_vec1()?;
        let linear = Linear::new(target.module, &weight, target.shape, target.scheme);
        start.extend(rtn.solve(&[linear], None, &options)?.into_iter().map(|solved| (target.role, solved.quantized)));
    }
    Ok(start)
}

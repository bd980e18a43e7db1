//! Transforms: rewrites of a model's weights that leave its function as it is and make it easier to round.
//!
//! What they write are plain weights, so that neither loaders nor the cost of inference notice. They are applied in the
//! order of [`TRANSFORMS`], block by block, to a copy of the model in the work folder; the run goes on from that copy.
//! Their choices are made from weights and from statistics of one pass of the original model: what a transform does to
//! an activation is known (x' = T·x), so H' = T·H·Tᵀ needs no pass of its own.
//!
//! To add one, write `transforms/x.rs`, its `mod` line, and a row of [`TRANSFORMS`]: `--transforms x`, help, and the test
//! that logits do not change come with it.

mod apply;
mod awq;
mod block;
mod diagonal;
mod heads;
mod rotate;
mod smoothquant;
#[cfg(test)]
mod tests;
mod turn;

pub(crate) use apply::{transformed, transformed_bytes};
pub use block::{BlockWeights, SiteMoments};

use crate::{Error, Needs};
use bitmill_calibrate::Statistics;
use bitmill_checkpoint::{Checkpoint, TensorSpec};
use bitmill_models::{ModelSpec, Role};
use bitmill_scheme::Scheme;
use std::collections::BTreeMap;

/// A rewrite of a model's weights.
pub trait Transform: Sync {
    /// Its name in `--transforms`.
    fn name(&self) -> &'static str;
    /// One line of help.
    fn summary(&self) -> &'static str;
    /// Why it cannot be applied to this architecture; `None` where it can.
    fn refuses(&self, _: &ModelSpec) -> Option<&'static str> {
        None
    }
    /// Whether it must be given statistics.
    fn needs_statistics(&self) -> bool {
        false
    }
    /// Whether an output head that is the embedding becomes a matrix of its own.
    fn unties(&self) -> bool {
        false
    }
    /// Looks at the whole model once, and says how every part of it is rewritten.
    ///
    /// # Errors
    /// Unreadable weights or statistics.
    fn prepare(&self, model: &Model<'_>) -> Result<Box<dyn Rewrite>, Error>;
}

/// What a [`Transform`] does to the parts of one model.
pub trait Rewrite: Sync {
    /// Rewrites a block, and its statistics where it has them.
    ///
    /// # Errors
    /// [`Error::NotPositive`] where a Hessian cannot be factored.
    fn block(&self, block: &mut BlockWeights<'_>) -> Result<(), Error>;
    /// Rewrites rows of the token embedding, `[rows, hidden]`.
    fn embedding(&self, _rows: &mut [f32]) {}
    /// Rewrites rows of the output head, `[rows, hidden]`, which reads what the final norm of weight `norm` puts out.
    fn head(&self, _rows: &mut [f32], _norm: &[f32]) {}
    /// Whether the weights of the final norm have become part of the head.
    fn folds_final_norm(&self) -> bool {
        false
    }
    /// What it predicts to bring: a loss without it and with it, whatever their unit.
    fn predicted(&self) -> Option<(f64, f64)> {
        None
    }
}

/// What a transform may look at.
pub struct Model<'a> {
    /// The original model.
    pub input: &'a Checkpoint,
    /// Its architecture.
    pub spec: &'a ModelSpec,
    /// What a pass of it saw, where there was one.
    pub statistics: Option<&'a Statistics>,
    /// What every linear becomes, by module; those that stay as they are are missing.
    pub schemes: &'a BTreeMap<String, Scheme>,
    /// What the method needs: with H it compensates errors, without it does not.
    pub needs: Needs,
    /// Seed of random choices.
    pub seed: u64,
}

impl<'a> Model<'a> {
    /// Block `index` as it is stored, with its statistics where there are some.
    ///
    /// # Errors
    /// Unreadable weights or statistics.
    pub fn block(&self, index: usize) -> Result<BlockWeights<'a>, Error> {
        BlockWeights::load(self.spec, self.input, index, self.statistics)
    }

    /// What the linear that stores `role` of block `index` becomes.
    #[must_use]
    pub fn scheme(&self, index: usize, role: Role) -> Option<Scheme> {
        self.schemes.get(&self.spec.module(index, self.spec.rows(role).0)).copied()
    }
}

/// Every transform, in the order in which they are applied.
pub static TRANSFORMS: &[&dyn Transform] =
    &[&smoothquant::SmoothQuant, &rotate::ROTATE, &rotate::WOMI, &heads::RotateHeads, &awq::Awq];

/// The transforms called `names`, in the order in which they are applied.
///
/// # Errors
/// [`Error::UnknownTransform`], listing the names there are.
pub fn transforms(names: &[String]) -> Result<Vec<&'static dyn Transform>, Error> {
    let known = || TRANSFORMS.iter().map(|t| t.name()).collect::<Vec<_>>().join(", ");
    if let Some(name) = names.iter().find(|n| !TRANSFORMS.iter().any(|t| t.name() == n.as_str())) {
        return Err(Error::UnknownTransform { name: name.clone(), known: known() });
    }
    Ok(TRANSFORMS.iter().copied().filter(|t| names.iter().any(|n| n == t.name())).collect())
}

/// Checks that `transforms` suit the model, and parts head and embedding in `spec` where one of them asks for it; returns
/// the head's tensor where the input has none.
pub(crate) fn untie(
    input: &Checkpoint,
    spec: Option<&mut ModelSpec>,
    transforms: &[&'static dyn Transform],
    as_gguf: bool,
    notes: &mut Vec<String>,
) -> Result<Option<TensorSpec>, Error> {
    let Some(first) = transforms.first() else { return Ok(None) };
    let refuse = |name, reason: &str| Error::Transform { name, dir: input.dir().into(), reason: reason.into() };
    let spec = spec.ok_or_else(|| refuse(first.name(), "its architecture has no forward pass here"))?;
    if let Some((name, reason)) = transforms.iter().find_map(|t| Some((t.name(), t.refuses(spec)?))) {
        return Err(refuse(name, reason));
    }
    if let [_, second, ..] = transforms.iter().filter(|t| t.unties()).collect::<Vec<_>>()[..] {
        return Err(refuse(second.name(), "the residual stream is turned already; one of these transforms is enough"));
    }
    let (Some(by), true, Some(head)) = (transforms.iter().find(|t| t.unties()), spec.tied, spec.head()) else {
        return Ok(None);
    };
    if as_gguf {
        return Err(refuse(by.name(), "its output head is its embedding, which a GGUF file keeps so"));
    }
    spec.tied = false;
    notes.push(format!("{} makes {head} a matrix of its own; it was the embedding", by.name()));
    let name = format!("{head}.weight");
    let embedding = input.spec(&spec.embedding()).filter(|_| input.spec(&name).is_none());
    Ok(embedding.map(|e| TensorSpec { name, ..e.clone() }))
}

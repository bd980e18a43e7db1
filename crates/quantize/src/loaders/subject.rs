//! What a loader sees of a model, be it planned or written.

use crate::{Action, Error, Plan};
use bitmill_checkpoint::{Checkpoint, Dialect, Weight};
use bitmill_models::ModelSpec;
use bitmill_scheme::Scheme;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// A model as a loader sees it.
#[derive(Debug)]
pub struct Subject {
    format: String,
    /// Quantized modules.
    pub(super) layers: BTreeMap<String, (Scheme, [usize; 2])>,
    /// Tensors that are plain numbers, and their shapes.
    pub(super) dense: BTreeMap<String, Vec<usize>>,
    /// Names of all stored tensors; empty for a plan, whose formats store what they must.
    pub(super) stored: BTreeSet<String>,
    pub(super) spec: Option<ModelSpec>,
    pub(super) config: Value,
    /// What config.json says of each module.
    pub(super) dialect: Option<Dialect>,
}

impl Subject {
    /// What the output of `plan` will be.
    #[must_use]
    pub fn of_plan(plan: &Plan) -> Self {
        let tensors = plan.units.iter().flat_map(|u| &u.tensors);
        let copied = tensors.filter(|t| t.action == Action::Copy);
        Subject {
            format: plan.format.name().to_owned(),
            layers: plan.quantized().map(|(m, s, shape)| (m.clone(), (*s, shape))).collect(),
            // Shapes are those of the input, which copying keeps; rules ask of linears only whether they are there.
            dense: copied.map(|t| (t.name.clone(), Vec::new())).collect(),
            stored: BTreeSet::new(),
            spec: plan.spec.clone(),
            config: plan.config.clone(),
            // What a format writes it reads; were it not so, the folder's own check would say it.
            dialect: Dialect::of(&plan.config).ok().flatten(),
        }
    }

    /// What is written in a folder or file.
    ///
    /// # Errors
    /// A quantized matrix that is damaged.
    pub fn of_checkpoint(checkpoint: &Checkpoint) -> Result<Self, Error> {
        let mut layers = BTreeMap::new();
        let mut dense = BTreeMap::new();
        for name in checkpoint.names() {
            if let Some(module) = checkpoint.module_of(name) {
                if !layers.contains_key(module)
                    && let Weight::Quantized(q) = checkpoint.weight(module)?
                {
                    layers.insert(module.to_owned(), (q.scheme, q.shape));
                }
            } else if let Some(spec) = checkpoint.spec(name) {
                dense.insert(name.to_owned(), spec.shape.clone());
            }
        }
        let format = checkpoint.dialect().map_or("dense", |d| d.format().name());
        let dialect = if checkpoint.gguf().is_some() { None } else { Dialect::of(checkpoint.config())? };
        Ok(Subject {
            format: format.to_owned(),
            layers,
            dense,
            stored: checkpoint.names().map(str::to_owned).collect(),
            spec: bitmill_models::spec_of(checkpoint).ok(),
            config: checkpoint.config().clone(),
            dialect,
        })
    }

    /// The name of its format; `dense` where there is none.
    #[must_use]
    pub fn format(&self) -> &str {
        &self.format
    }

    /// Quantized modules.
    #[must_use]
    pub fn quantized(&self) -> usize {
        self.layers.len()
    }

    /// Every weight under the name a dense model has for it, with its shape.
    pub(super) fn weights(&self) -> impl Iterator<Item = (String, &[usize])> {
        let layers = self.layers.iter().map(|(module, (_, shape))| (format!("{module}.weight"), &shape[..]));
        layers.chain(self.dense.iter().map(|(name, shape)| (name.clone(), &shape[..])))
    }

    /// The quantization block of config.json.
    pub(super) fn quantization(&self) -> Option<&Value> {
        self.config.get("quantization_config").filter(|q| !q.is_null())
    }
}

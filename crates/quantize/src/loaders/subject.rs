//! What a loader sees of a model, be it planned or written.

use crate::{Action, Error, Plan};
use bitmill_checkpoint::{Checkpoint, Dialect, MIXED, SIDECARS, Weight, default_format};
use bitmill_models::ModelSpec;
use bitmill_scheme::Scheme;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// A quantized matrix.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) format: &'static str,
    pub(super) scheme: Scheme,
    pub(super) shape: [usize; 2],
    /// What all its scales are divided by, and what those of its inputs are: known of what is written.
    pub(super) divisors: Option<(f32, Option<f32>)>,
}

/// A model as a loader sees it.
#[derive(Debug)]
pub struct Subject {
    format: String,
    /// Quantized modules.
    pub(super) layers: BTreeMap<String, Layer>,
    /// Tensors that are plain numbers, and their shapes.
    pub(super) dense: BTreeMap<String, Vec<usize>>,
    /// Names of all stored tensors; empty for a plan, whose formats store what they must.
    pub(super) stored: BTreeSet<String>,
    pub(super) spec: Option<ModelSpec>,
    pub(super) config: Value,
    /// What config.json says of each module.
    pub(super) dialect: Option<Dialect>,
    /// What [`SIDECARS`] say, where there are any: some loaders read them in the place of config.json.
    pub(super) sidecars: Vec<(&'static str, Value)>,
}

/// AutoRound's own packing: tensors of other formats, which loaders read by AutoRound's rules.
const AUTO_ROUND: &str = "auto-round";

impl Subject {
    /// What the output of `plan` will be.
    #[must_use]
    pub fn of_plan(plan: &Plan) -> Self {
        let tensors = plan.units.iter().flat_map(|u| &u.tensors);
        let copied = tensors.filter(|t| t.action == Action::Copy);
        let own = plan.format.name();
        let layer = |scheme: &Scheme, shape| {
            let format = if own == MIXED { default_format(scheme) } else { own };
            Layer { format, scheme: *scheme, shape, divisors: None }
        };
        Subject {
            format: own.to_owned(),
            layers: plan.quantized().map(|(m, s, shape)| (m.clone(), layer(s, shape))).collect(),
            // Shapes are those of the input, which copying keeps; rules ask of linears only whether they are there.
            dense: copied.map(|t| (t.name.clone(), Vec::new())).collect(),
            stored: BTreeSet::new(),
            spec: plan.spec.clone(),
            config: plan.config.clone(),
            // What a format writes it reads; were it not so, the folder's own check would say it.
            dialect: Dialect::of(&plan.config).ok().flatten(),
            sidecars: Vec::new(),
        }
    }

    /// What is written in a folder or file.
    ///
    /// # Errors
    /// A quantized matrix that is damaged.
    pub fn of_checkpoint(checkpoint: &Checkpoint) -> Result<Self, Error> {
        let mut layers = BTreeMap::new();
        let mut dense = BTreeMap::new();
        let own_packing = checkpoint.config()["quantization_config"]["quant_method"] == AUTO_ROUND;
        for name in checkpoint.names() {
            if let Some(module) = checkpoint.module_of(name) {
                if !layers.contains_key(module)
                    && let Weight::Quantized(q) = checkpoint.weight(module)?
                {
                    let stored = checkpoint.dialect().and_then(|d| d.format_of(module)).map_or("dense", |f| f.name());
                    let format = if own_packing { AUTO_ROUND } else { stored };
                    let divisors = q.scheme.has_divisor().then(|| (q.divisor(), q.input));
                    layers.insert(module.to_owned(), Layer { format, scheme: q.scheme, shape: q.shape, divisors });
                }
            } else if let Some(spec) = checkpoint.spec(name) {
                dense.insert(name.to_owned(), spec.shape.clone());
            }
        }
        let stored = checkpoint.dialect().map_or("dense", |d| d.format().name());
        let format = if own_packing { AUTO_ROUND } else { stored };
        let dialect = if checkpoint.gguf().is_some() { None } else { Dialect::of(checkpoint.config())? };
        Ok(Subject {
            format: format.to_owned(),
            layers,
            dense,
            stored: checkpoint.names().map(str::to_owned).collect(),
            spec: bitmill_models::spec_of(checkpoint).ok(),
            config: checkpoint.config().clone(),
            dialect,
            sidecars: sidecars(checkpoint),
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
        let layers = self.layers.iter().map(|(module, layer)| (format!("{module}.weight"), &layer.shape[..]));
        layers.chain(self.dense.iter().map(|(name, shape)| (name.clone(), &shape[..])))
    }

    /// The quantization block of config.json.
    pub(super) fn quantization(&self) -> Option<&Value> {
        self.config.get("quantization_config").filter(|q| !q.is_null())
    }
}

/// The files of [`SIDECARS`] that the folder has; one that is no JSON is no object of keys, which a rule says.
fn sidecars(checkpoint: &Checkpoint) -> Vec<(&'static str, Value)> {
    let read = |name: &'static str| {
        let bytes = std::fs::read(checkpoint.dir().join(name)).ok()?;
        Some((name, serde_json::from_slice(&bytes).unwrap_or(Value::Null)))
    };
    // A GGUF file has no folder of its own.
    if checkpoint.gguf().is_some() { Vec::new() } else { SIDECARS.into_iter().filter_map(read).collect() }
}

//! What a report is made of: the manifest of a run, and what was measured of its output.

use bitmill_calibrate::Evaluation;
use bitmill_quantize::{Mixture, SiteRecord};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::Path;

/// Everything a page shows.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Facts {
    /// Name of the output.
    pub(super) name: String,
    pub(super) manifest: Manifest,
    pub(super) evaluated: Option<Evaluated>,
}

/// A measurement.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Evaluated {
    /// What it was made on.
    pub(super) on: String,
    pub(super) evaluation: Evaluation,
}

/// `bitmill.json`, as far as a page shows it.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Manifest {
    /// What decided the output: version, settings and hashes.
    pub(super) run: Value,
    #[serde(default)]
    pub(super) model_type: Option<String>,
    #[serde(default)]
    pub(super) parameters: u64,
    pub(super) bits_per_weight: f64,
    #[serde(default)]
    pub(super) output_bytes: u64,
    #[serde(default)]
    pub(super) mixture: Option<Mixture>,
    pub(super) tensors: Vec<Tensor>,
    #[serde(default)]
    pub(super) sites: Vec<SiteRecord>,
    #[serde(default)]
    pub(super) stages: Vec<Stage>,
}

/// A quantized tensor.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Tensor {
    pub(super) tensor: String,
    #[serde(default)]
    pub(super) shape: [usize; 2],
    pub(super) scheme: String,
    pub(super) bits_per_weight: f64,
    pub(super) relative_error: f64,
    pub(super) error_of: String,
    #[serde(default)]
    pub(super) damping: Option<f32>,
}

/// A stage over the whole model.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Stage {
    pub(super) stage: String,
    pub(super) loss: String,
    pub(super) held_out_windows: usize,
    pub(super) before: f64,
    pub(super) after: f64,
    pub(super) kept_pass: usize,
}

impl Tensor {
    /// The number of its block: the first part of its name that is one.
    pub(super) fn block(&self) -> Option<usize> {
        self.tensor.split('.').find_map(|part| part.parse().ok())
    }

    /// Its kind: the last part of its name.
    pub(super) fn kind(&self) -> &str {
        self.tensor.rsplit('.').next().unwrap_or(&self.tensor)
    }
}

impl Manifest {
    /// Rank correlation of predicted and measured errors, where a mixture was chosen by them.
    pub(super) fn rank_correlation(&self) -> Option<f64> {
        self.mixture.as_ref()?.survey.as_ref().map(|s| s.rank_correlation)
    }

    /// Blocks of the model, as far as tensors and sites name them.
    pub(super) fn blocks(&self) -> usize {
        let tensors = self.tensors.iter().filter_map(Tensor::block);
        tensors.chain(self.sites.iter().map(|s| s.block)).max().map_or(0, |b| b + 1)
    }
}

/// What opens the element that holds the facts in a page.
pub(super) const DATA: &str = "<script type=\"application/json\" id=\"facts\">";

/// The evaluation in an earlier report at `file`, if there is one.
pub(super) fn evaluation_in(file: &Path) -> Option<Evaluated> {
    let page = std::fs::read_to_string(file).ok()?;
    let (_, rest) = page.split_once(DATA)?;
    let (facts, _) = rest.split_once("</script>")?;
    serde_json::from_str::<Facts>(facts).ok()?.evaluated
}

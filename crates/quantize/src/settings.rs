//! Everything that decides the bytes of an output, as plain data.

use bitmill_scheme::{Fit, ScaleType, Scheme};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// How the scale of a group is chosen before rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleSearch {
    /// Cover smallest to largest weight.
    MinMax,
    /// Shrink the range for the smallest Σ|w − ŵ|^2.4.
    Mse,
    /// Search the smallest Σ h(w − ŵ)² with h the importance of each input.
    Hessian,
}

impl ScaleSearch {
    /// The criterion, given the importance of the group's inputs.
    #[must_use]
    pub fn fit(self, importance: &[f32]) -> Fit<'_> {
        match self {
            ScaleSearch::MinMax => Fit::MinMax,
            ScaleSearch::Mse => Fit::Mse,
            ScaleSearch::Hessian => Fit::Weighted(importance),
        }
    }
}

/// What a method may be told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SolverOptions {
    /// How scales are searched; `None` leaves it to the method.
    pub scale_search: Option<ScaleSearch>,
    /// Share of the mean diagonal added to H (λ of the GPTQ paper); raised tenfold while H is not positive definite.
    pub damping: f32,
    /// Whether columns are rounded in order of importance, group by group.
    pub act_order: bool,
    /// Sweeps of coordinate descent after rounding.
    pub descent_sweeps: u32,
    /// Times the scales are refitted to the codes under the full H, each followed by coordinate descent.
    pub scale_refits: u32,
}

impl Default for SolverOptions {
    fn default() -> Self {
        SolverOptions { scale_search: None, damping: 0.01, act_order: true, descent_sweeps: 4, scale_refits: 2 }
    }
}

/// Refinement of the whole rounded model by gradients, after the last block.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tuning {
    /// Walks over the calibration windows.
    pub passes: u32,
    /// Windows per step.
    pub batch: usize,
    /// Largest step of a weight's position on the axis of codes; 0 leaves the codes alone.
    pub codes: f32,
    /// Largest step of a scale, as a share of it.
    pub scales: f32,
    /// Largest step of a norm's weight, as a share of it.
    pub norms: f32,
    /// Largest step of an entry of the output head, as a share of their root mean square; 0 leaves the head alone.
    pub head: f32,
    /// Share of the tokens that the full-precision model says anew from the second pass on.
    pub resample: f32,
}

impl Tuning {
    /// `passes` walks over the windows, with rates for codes of `bits`: coarse codes leave more to be made up for, and hide
    /// more of the noise that a step brings.
    #[must_use]
    pub fn new(passes: u32, bits: u32) -> Self {
        let (scales, head) = match bits {
            ..=2 => (0.008, 0.0015),
            3 => (0.004, 0.001),
            _ => (0.002, 0.0005),
        };
        Tuning { passes, batch: 2, codes: 0.01, scales, norms: scales / 2.0, head, resample: 0.3 }
    }
}

/// The settings of a run. Two runs with equal settings on equal input end in equal bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Name of the method (a row of `METHODS`).
    pub method: String,
    /// Name of the format (a row of `FORMATS`).
    pub format: String,
    /// The scheme of every quantized tensor that `layers` does not name.
    pub scheme: Scheme,
    /// Schemes of single modules, by name; an allocation or a plan file fills it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub layers: BTreeMap<String, Scheme>,
    /// Type of the stored scales; `None` is the 16-bit type nearest to the model's own, as the format has it.
    pub scale_type: Option<ScaleType>,
    /// Options of the method.
    pub solver: SolverOptions,
    /// Refinement by gradients, if any.
    pub tuning: Option<Tuning>,
    /// Regular expressions (Python's `re.match`) of modules that stay as they are.
    pub ignore: Vec<String>,
    /// Calibration windows; of an encoder, sentences.
    pub samples: usize,
    /// Tokens per window, or at most per sentence; the model's context if that is shorter.
    pub sequence_length: usize,
    /// Moves the calibration windows; 0 spaces them evenly.
    pub seed: u64,
    /// What becomes of the rest of the model, where the output is a GGUF file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gguf: Option<crate::GgufSettings>,
    /// Largest size of one output file in bytes.
    pub shard_bytes: u64,
}

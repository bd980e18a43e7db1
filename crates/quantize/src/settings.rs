//! Everything that decides the bytes of an output, as plain data.

use crate::learn::Rates;
use crate::{Error, Method};
use bitmill_kernels::{Brain, Eight, Short};
use bitmill_scheme::{Fit, GridKind, ScaleType, Scheme};
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
    /// The smallest Σ(w − ŵ)² that a few starting points lead to.
    Squares,
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
            ScaleSearch::Squares => Fit::Squares,
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
    /// Share of H's entries beside the diagonal that is taken away: with few tokens they are the least certain.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub shrinkage: f32,
    /// Whether columns are rounded in order of importance, group by group.
    pub act_order: bool,
    /// Sweeps of coordinate descent after rounding.
    pub descent_sweeps: u32,
    /// Times the scales are refitted to the codes under the full H, each followed by coordinate descent.
    pub scale_refits: u32,
    /// Rounding directions learned on H after all of that, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub soft: Option<SoftRounding>,
}

fn is_zero(share: &f32) -> bool {
    *share == 0.0
}

/// Rounding directions learned by gradients of tr(ΔHΔᵀ).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SoftRounding {
    /// What is learned.
    pub kind: SoftKind,
    /// Steps.
    pub steps: u32,
}

/// How a rounding direction is parametrised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SoftKind {
    /// A rectified sigmoid of each weight, driven to its ends (AdaRound).
    Ada,
    /// An offset of each weight before rounding, moved by the sign of its gradient (SignRound).
    Sign,
    /// The sigmoids of AdaRound, of a matrix of rank 5 (the LoRA-rounding of CBQ).
    LowRank,
}

impl Default for SolverOptions {
    fn default() -> Self {
        SolverOptions {
            scale_search: None,
            damping: 0.01,
            shrinkage: 0.0,
            act_order: true,
            descent_sweeps: 4,
            scale_refits: 2,
            soft: None,
        }
    }
}

/// What a calibrated run takes the goal of every linear to be, and which tokens say so.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Observation {
    /// What a linear makes up for besides its own rounding.
    pub shift: TargetShift,
    /// How much each token counts.
    pub tokens: TokenWeights,
    /// Share of the full-precision stream in H, the rest being the rounded one (QDrop's mixing); 0 without it.
    pub full_share: f32,
    /// Whether biases take up the mean of the error of their linear.
    pub biases: bool,
    /// Whether damping and shrinkage of each H are those that lose least on held-out tokens.
    pub damping_search: bool,
    /// What calibration multiplies in.
    #[serde(skip_serializing_if = "Arithmetic::is_f32")]
    pub arithmetic: Arithmetic,
}

/// What calibration multiplies in: weights by activations, and activations by activations for H.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arithmetic {
    /// 32 bits.
    #[default]
    F32,
    /// Inputs rounded to bfloat16, sums in 32 bits. For CPUs with such an instruction, which takes half the time.
    Bf16,
    /// Inputs rounded to eight bits, 128 neighbours sharing a scale; sums of those are exact, and those of sums in 32 bits. For
    /// CPUs with such an instruction, which takes half the time again.
    Int8,
}

impl Arithmetic {
    /// The faster one of this CPU.
    #[must_use]
    pub fn best() -> Self {
        if Brain::here().is_some() { Arithmetic::Bf16 } else { Arithmetic::F32 }
    }

    /// What the kernels ask for; `None` for 32 bits, and where this CPU has no such instruction.
    pub(crate) fn short(self) -> Option<Short> {
        match self {
            Arithmetic::F32 => None,
            Arithmetic::Bf16 => Brain::here().map(Short::Bf16),
            Arithmetic::Int8 => Eight::here().map(Short::Int8),
        }
    }

    /// What attention multiplies in, where the CPU decides it.
    pub(crate) fn attention(self) -> Option<&'static str> {
        let here = || if Brain::here().is_some() { "bf16" } else { "f32" };
        (self == Arithmetic::Int8).then(here)
    }

    /// Refuses what this CPU has no instruction for.
    pub(crate) fn check(self) -> Result<(), Error> {
        let (asked, lacks) = match self {
            Arithmetic::F32 => return Ok(()),
            Arithmetic::Bf16 => ("bf16", "AVX-512 BF16"),
            Arithmetic::Int8 => ("int8", "AVX-512 VNNI"),
        };
        if self.short().is_some() { Ok(()) } else { Err(Error::Arithmetic { asked, lacks }) }
    }

    fn is_f32(&self) -> bool {
        *self == Arithmetic::F32
    }
}

impl Default for Observation {
    fn default() -> Self {
        Observation {
            shift: TargetShift::Off,
            tokens: TokenWeights::Equal,
            full_share: 0.0,
            biases: false,
            damping_search: false,
            arithmetic: Arithmetic::F32,
        }
    }
}

impl Observation {
    /// Whether the full-precision model runs beside the rounded one.
    #[must_use]
    pub fn two_streams(&self) -> bool {
        self.shift != TargetShift::Off || self.full_share > 0.0
    }

    /// What activations may be rounded to as soon as they are made: where nothing but H is made of them as they are.
    pub(crate) fn rounds(&self) -> Option<Short> {
        self.arithmetic.short().filter(|_| !self.two_streams() && self.tokens == TokenWeights::Equal)
    }
}

/// What a linear makes up for besides its own rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetShift {
    /// Nothing: it imitates itself on what it reads.
    Off,
    /// What earlier rounding did to its input, so far as that can be told from the input (GPTAQ as a shift of the target).
    Inputs,
    /// That, and where its output is added to the residual stream, what earlier rounding did to the stream.
    Outputs,
}

/// How much each token of the calibration text counts in H.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenWeights {
    /// As much as any other.
    Equal,
    /// By how much it is attended to in its block (RSQ); attention sinks are capped.
    Attention,
    /// As any other, but for attention sinks, which count neither in H nor in the ranges of inputs.
    NoSinks,
    /// By the norm of what enters the block, sinks capped.
    Norm,
    /// By its distance from the other tokens of the window in what enters the block, sinks capped.
    Distinct,
    /// The less the block changes it, the more.
    Change,
    /// The less often it occurs in the text, the more.
    Rare,
    /// Those of the first eighth of a window alone.
    First,
    /// Those of the first and the last part of 32 alone.
    FirstLast,
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
    /// Share of the windows in whose place the full-precision model writes one of its own, from the second pass on.
    #[serde(default)]
    pub generated: f32,
    /// Likeliest tokens of the full-precision model whose probabilities alone make up the gradient (KL-Top of OSTQuant); all without it.
    /// Which pass is best is told by all in any case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top: Option<usize>,
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
        Tuning {
            passes,
            batch: 2,
            codes: 0.01,
            scales,
            norms: scales / 2.0,
            head,
            resample: 0.3,
            generated: 0.5,
            top: None,
        }
    }

    /// The step sizes that these rates are of a pass's full.
    pub(crate) fn rates(&self) -> Rates {
        Rates { codes: self.codes, scales: self.scales, norms: self.norms, head: self.head }
    }

    /// Texts that the full-precision model writes in all passes, as a multiple of the windows.
    pub(crate) fn written(&self) -> f64 {
        f64::from(self.generated) * f64::from(self.passes.saturating_sub(1))
    }
}

/// Refinement of each block by gradients as soon as its linears are rounded, before the next block sees it: the block's
/// output is held against the full-precision model's. Where tuning needs the whole model, this needs a block.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reconstruction {
    /// Walks over the calibration windows.
    pub passes: u32,
    /// Blocks after which outputs are compared: 1 is the block itself (BRECQ, AutoRound); with 2 the next one says which of
    /// the errors matter, as in the two-block windows of CBQ.
    pub depth: u32,
    /// Whether the blocks behind are rounded to nearest and tuned too, in every window anew; else they are in full precision and stay so.
    #[serde(default)]
    pub together: bool,
    /// Windows per step.
    pub batch: usize,
    /// Largest step of a weight's position on the axis of codes; 0 leaves the codes alone.
    pub codes: f32,
    /// Largest step of a scale, as a share of it.
    pub scales: f32,
    /// Largest step of a norm's weight, as a share of it.
    pub norms: f32,
}

impl Reconstruction {
    /// `passes` walks over the windows, with the rates that [`Tuning`] has for codes of `bits`.
    #[must_use]
    pub fn new(passes: u32, depth: u32, bits: u32) -> Self {
        let Tuning { batch, codes, scales, norms, .. } = Tuning::new(passes, bits);
        Reconstruction { passes, depth, together: false, batch, codes, scales, norms }
    }

    pub(crate) fn rates(&self) -> Rates {
        Rates { codes: self.codes, scales: self.scales, norms: self.norms, head: 0.0 }
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
    /// What a calibrated run takes the goal of every linear to be.
    #[serde(default)]
    pub observation: Observation,
    /// Names of the transforms (rows of `TRANSFORMS`) applied before anything is rounded, in any order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub transforms: Vec<String>,
    /// Refinement of each block by gradients, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reconstruction: Option<Reconstruction>,
    /// Refinement of the whole model by gradients, if any.
    pub tuning: Option<Tuning>,
    /// Whether keys and values are kept as 8-bit floats, under scales from calibration.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub kv_cache: bool,
    /// Regular expressions (Python's `re.match`) of modules that stay as they are.
    pub ignore: Vec<String>,
    /// Calibration windows; of an encoder, sentences.
    pub samples: usize,
    /// Tokens per window, or at most per sentence; the model's context if that is shorter.
    pub sequence_length: usize,
    /// Share of the calibration windows that the model writes itself.
    #[serde(default)]
    pub written: f32,
    /// Moves the calibration windows; 0 spaces them evenly.
    pub seed: u64,
    /// What becomes of the rest of the model, where the output is a GGUF file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gguf: Option<crate::GgufSettings>,
    /// Largest size of one output file in bytes.
    pub shard_bytes: u64,
}

impl Settings {
    /// `scheme` for every linear by the method and in the format of these names, calibrated (where the method wants that) on 128
    /// windows of 2048 tokens, without transforms, target shift or tuning, in files of 5 GB at most.
    #[must_use]
    pub fn new(method: &str, format: &str, scheme: Scheme) -> Self {
        Settings {
            method: method.into(),
            format: format.into(),
            scheme,
            layers: BTreeMap::new(),
            scale_type: None,
            solver: SolverOptions::default(),
            observation: Observation::default(),
            transforms: Vec::new(),
            reconstruction: None,
            tuning: None,
            kv_cache: false,
            ignore: Vec::new(),
            samples: 128,
            sequence_length: 2048,
            written: 0.0,
            seed: 0,
            gguf: None,
            shard_bytes: 5_000_000_000,
        }
    }

    /// Whether the full-precision model runs beside the rounded one.
    #[must_use]
    pub fn two_streams(&self) -> bool {
        self.observation.two_streams() || self.reconstruction.is_some()
    }

    /// Every scheme there is.
    pub(crate) fn schemes(&self) -> impl Iterator<Item = &Scheme> {
        std::iter::once(&self.scheme).chain(self.layers.values())
    }

    /// Whether `method`, and what moves its codes afterwards, can do so on the grid of every scheme.
    ///
    /// # Errors
    /// What is refused, and the remedy.
    pub(crate) fn check_schemes(&self, method: &dyn Method) -> Result<(), Error> {
        for scheme in self.schemes() {
            if let Some(reason) = method.refuses(scheme) {
                return Err(Error::MethodScheme { method: method.name(), scheme: *scheme, reason });
            }
            let others = matches!(scheme.grid, GridKind::Float(_) | GridKind::Binary);
            if others && (self.tuning.is_some() || self.reconstruction.is_some()) {
                return Err(Error::TuningFormat { format: self.format.clone() });
            }
            if others && self.solver.soft.is_some() {
                return Err(Error::SoftScheme { scheme: *scheme });
            }
        }
        Ok(())
    }
}

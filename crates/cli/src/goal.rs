//! Options of what a linear is rounded for: which tokens count, what it makes up for, and how its codes are learned.

use bitmill_quantize::{Arithmetic, Observation, Reconstruction, SoftKind, SoftRounding, TargetShift, TokenWeights};
use clap::ValueEnum;

#[derive(Debug, clap::Args)]
pub(crate) struct GoalArgs {
    /// Rounding directions learned by gradients of the layer's own loss after gptq
    #[arg(long, value_enum, value_name = "KIND")]
    soft_rounding: Option<Soft>,
    /// Steps of --soft-rounding
    #[arg(long, value_name = "N", default_value_t = 200, requires = "soft_rounding")]
    soft_steps: u32,
    /// What a linear makes up for besides its own rounding, told from a second stream of the full-precision model [default:
    /// outputs for gptq and billm on text, or inputs where the architecture does not allow that]
    #[arg(long, value_enum, value_name = "WHAT")]
    target_shift: Option<Shift>,
    /// How much each token of the calibration text counts
    #[arg(long, value_enum, value_name = "HOW", default_value = "equal")]
    token_weights: Weights,
    /// Share of the full-precision model's activations in each Hessian, the rest being the rounded model's
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = parse_share)]
    full_share: f32,
    /// Leave biases as they are, instead of having them take up the mean of their linear's error [default: gptq and billm on text correct them]
    #[arg(long)]
    keep_biases: bool,
    /// Passes over the calibration text in which each block, as soon as it is rounded, is tuned until it puts out what the
    /// full-precision model's block does
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=1000))]
    reconstruction_passes: u32,
    /// Blocks after which outputs are compared: 1 is the block itself, 2 has the next one say which errors matter
    #[arg(long, value_name = "N", default_value_t = 1, requires = "reconstruction_passes", value_parser = clap::value_parser!(u32).range(1..=8))]
    reconstruction_depth: u32,
    /// Round the blocks behind to nearest and tune them too meanwhile (CBQ), instead of having them in full precision
    #[arg(long, requires = "reconstruction_passes")]
    reconstruction_together: bool,
    /// Try damping and shrinkage of each Hessian on held-out tokens, and take what loses least there
    #[arg(long)]
    damping_search: bool,
    /// What calibration multiplies in [default: bf16 for gptq on text, where the CPU has AVX-512 BF16]
    #[arg(long, value_enum, value_name = "HOW")]
    arithmetic: Option<Products>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Products {
    /// Inputs rounded to eight bits, 128 neighbours sharing a scale: half the time of bf16
    Int8,
    /// Inputs rounded to bfloat16, sums in 32 bits: half the time of f32
    Bf16,
    /// 32 bits
    F32,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Soft {
    /// A rectified sigmoid for each weight (AdaRound)
    Ada,
    /// Offsets moved by the sign of their gradient (SignRound)
    Sign,
    /// Sigmoids of a matrix of low rank (CBQ)
    LowRank,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Shift {
    /// Nothing
    Off,
    /// What earlier rounding did to its input
    Inputs,
    /// That, and what it did to the residual stream its output is added to
    Outputs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Weights {
    /// As much as any other
    Equal,
    /// By how much it is attended to (RSQ), sinks capped
    Attention,
    /// As any other, but attention sinks do not count
    NoSinks,
    /// By the norm of what enters the block
    Norm,
    /// By its distance from the other tokens of its window
    Distinct,
    /// The less a block changes it, the more
    Change,
    /// The rarer it is in the text, the more
    Rare,
    /// The first eighth of each window alone
    First,
    /// The first and the last 32nd of each window alone
    FirstLast,
}

fn parse_share(text: &str) -> Result<f32, String> {
    let valid = |d: &f32| (0.0..1.0).contains(d);
    text.parse().ok().filter(valid).ok_or_else(|| format!("`{text}` is not a number from 0 to below 1"))
}

impl GoalArgs {
    /// What a calibrated run takes the goal of every linear to be; `shift` is what it makes up for, `biases` whether its biases help
    /// and `arithmetic` what it multiplies in, unless that is said.
    pub(crate) fn observation(&self, shift: TargetShift, biases: bool, arithmetic: Arithmetic) -> Observation {
        Observation {
            shift: match self.target_shift {
                None => shift,
                Some(Shift::Off) => TargetShift::Off,
                Some(Shift::Inputs) => TargetShift::Inputs,
                Some(Shift::Outputs) => TargetShift::Outputs,
            },
            tokens: match self.token_weights {
                Weights::Equal => TokenWeights::Equal,
                Weights::Attention => TokenWeights::Attention,
                Weights::NoSinks => TokenWeights::NoSinks,
                Weights::Norm => TokenWeights::Norm,
                Weights::Distinct => TokenWeights::Distinct,
                Weights::Change => TokenWeights::Change,
                Weights::Rare => TokenWeights::Rare,
                Weights::First => TokenWeights::First,
                Weights::FirstLast => TokenWeights::FirstLast,
            },
            full_share: self.full_share,
            biases: biases && !self.keep_biases,
            damping_search: self.damping_search,
            arithmetic: match self.arithmetic {
                None => arithmetic,
                Some(Products::Int8) => Arithmetic::Int8,
                Some(Products::Bf16) => Arithmetic::Bf16,
                Some(Products::F32) => Arithmetic::F32,
            },
        }
    }

    /// How blocks whose codes have `bits` are refined, if they are.
    pub(crate) fn reconstruction(&self, bits: u32) -> Option<Reconstruction> {
        let passes = self.reconstruction_passes;
        let new = || Reconstruction::new(passes, self.reconstruction_depth, bits);
        (passes > 0).then(|| Reconstruction { together: self.reconstruction_together, ..new() })
    }

    /// How codes are learned after gptq, if they are.
    pub(crate) fn soft(&self) -> Option<SoftRounding> {
        let kind = |soft| match soft {
            Soft::Ada => SoftKind::Ada,
            Soft::Sign => SoftKind::Sign,
            Soft::LowRank => SoftKind::LowRank,
        };
        self.soft_rounding.map(|soft| SoftRounding { kind: kind(soft), steps: self.soft_steps })
    }
}

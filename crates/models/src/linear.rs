//! One linear: a weight, maybe a bias, and how its input is rounded.

use crate::weights::{check, shaped};
use crate::{Error, Weights, ops};
use bitmill_scheme::Activations;
use candle_core::Tensor;

/// Inputs that share a scale under [`Activations::DynamicFp8Groups`].
const FP8_GROUP: usize = 128;

/// `y = x Wᵀ + b`.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    /// `[out, in]`, contiguous.
    pub(crate) weight: Tensor,
    /// `[out]`.
    pub(crate) bias: Option<Tensor>,
    /// Rounding of `x`.
    pub(crate) activations: Activations,
}

impl Linear {
    /// Loads `module` and checks its shape `[out, in]`; `transposed` tells that it is stored the other way round as long as
    /// it is dense.
    pub(crate) fn load(
        weights: &dyn Weights,
        module: &str,
        shape: [usize; 2],
        (bias, transposed): (bool, bool),
    ) -> Result<Self, Error> {
        let (name, weight) = (format!("{module}.weight"), weights.linear(module)?);
        let weight = match transposed && !weights.quantized(module) {
            true => check(&name, weight, &[shape[1], shape[0]])?.t()?.contiguous()?,
            false => check(&name, weight, &shape)?,
        };
        let bias = bias.then(|| shaped(weights, &format!("{module}.bias"), &shape[..1])).transpose()?;
        Ok(Linear { weight, bias, activations: weights.activations(module) })
    }

    /// `x [tokens, in]` to `[tokens, out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor, Error> {
        self.read(&Input::new(x, &[self])?)
    }

    /// The output `[tokens, out]` for an input shared with other linears.
    pub(crate) fn read(&self, input: &Input<'_>) -> Result<Tensor, Error> {
        let x = match (self.activations, &input.int8) {
            (Activations::DynamicInt8, Some(rounded)) => rounded,
            (Activations::DynamicFp8 | Activations::DynamicFp8Groups, _) => {
                let rounded = input.fp8.iter().find(|(activations, _)| *activations == self.activations);
                rounded.map_or(input.full, |(_, rounded)| rounded)
            }
            _ => input.full,
        };
        let y = ops::product(x, &self.weight)?;
        if let Some(bias) = &self.bias {
            ops::add(&y, bias)?;
        }
        Ok(y)
    }
}

/// An activation `[tokens, in]` as the linears of one site read it: rounded once for all that want it so.
pub(crate) struct Input<'a> {
    full: &'a Tensor,
    int8: Option<Tensor>,
    fp8: Vec<(Activations, Tensor)>,
}

impl<'a> Input<'a> {
    /// Prepares `x` for `linears`.
    pub(crate) fn new(x: &'a Tensor, linears: &[&Linear]) -> Result<Self, Error> {
        let wanted = |activations| linears.iter().any(|linear| linear.activations == activations);
        let int8 = if wanted(Activations::DynamicInt8) { Some(ops::round_int8(x)?) } else { None };
        let mut fp8 = Vec::new();
        for (activations, group) in [(Activations::DynamicFp8, x.dim(1)?), (Activations::DynamicFp8Groups, FP8_GROUP)] {
            if wanted(activations) {
                fp8.push((activations, ops::round_fp8(x, group)?));
            }
        }
        Ok(Input { full: x, int8, fp8 })
    }
}

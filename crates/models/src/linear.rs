//! One linear: a weight, maybe a bias, and how its input is rounded.

use crate::weights::{check, shaped};
use crate::{Error, Weights, ops};
use bitmill_scheme::Activations;
use candle_core::Tensor;

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
}

impl<'a> Input<'a> {
    /// Prepares `x` for `linears`.
    pub(crate) fn new(x: &'a Tensor, linears: &[&Linear]) -> Result<Self, Error> {
        let wanted = linears.iter().any(|linear| linear.activations == Activations::DynamicInt8);
        Ok(Input { full: x, int8: if wanted { Some(ops::round_int8(x)?) } else { None } })
    }
}

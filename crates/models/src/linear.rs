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
    /// Loads `module` and checks its shape `[out, in]`.
    pub(crate) fn load(weights: &dyn Weights, module: &str, shape: [usize; 2], bias: bool) -> Result<Self, Error> {
        let weight = check(&format!("{module}.weight"), weights.linear(module)?, &shape)?;
        let bias = bias.then(|| shaped(weights, &format!("{module}.bias"), &shape[..1])).transpose()?;
        Ok(Linear { weight, bias, activations: weights.activations(module) })
    }

    /// `x [tokens, in]` to `[tokens, out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor, Error> {
        Ok(self.product(&self.input(x)?)?)
    }

    /// `x` as the product sees it.
    fn input(&self, x: &Tensor) -> Result<Tensor, Error> {
        Ok(match self.activations {
            Activations::Full => x.clone(),
            Activations::DynamicInt8 => ops::round_int8(x)?,
        })
    }

    fn product(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let y = ops::product(x, &self.weight)?;
        if let Some(bias) = &self.bias {
            ops::add(&y, bias)?;
        }
        Ok(y)
    }
}

/// The outputs of several linears that read one `x`, which is rounded once.
pub(crate) fn forward_all<const N: usize>(linears: [&Linear; N], x: &Tensor) -> Result<[Tensor; N], Error> {
    let rounded = linears.iter().find(|l| l.activations != Activations::Full).map(|l| l.input(x)).transpose()?;
    let mut out = [const { None }; N];
    for (slot, linear) in out.iter_mut().zip(linears) {
        let input = match (&rounded, linear.activations) {
            (Some(rounded), Activations::DynamicInt8) => rounded,
            _ => x,
        };
        *slot = Some(linear.product(input)?);
    }
    // Every slot was filled above; an array has no fallible map.
    Ok(out.map(|y| y.unwrap_or_else(|| x.clone())))
}

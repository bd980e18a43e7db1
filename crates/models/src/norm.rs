//! A norm: what is divided out of a row, and the parameters put in its place.

use crate::backward::values;
use crate::weights::shaped;
use crate::{Error, ModelSpec, Weights, ops};
use candle_core::{DType, Device, Tensor};

/// The kind of all norms of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// `x / √(mean x² + ε) · w`.
    Rms,
    /// `(x − mean x) / √(var x + ε) · w + b`.
    Layer,
    /// `(x − mean x) / √(var x + ε) · w`.
    Centred,
}

/// One norm of rows of a fixed width.
#[derive(Debug, Clone)]
pub(crate) struct Norm {
    /// `[width]`.
    pub(crate) weight: Tensor,
    /// `[width]`, of a norm that subtracts the mean: zeros of a [`NormKind::Centred`].
    pub(crate) bias: Option<Tensor>,
    /// Added under the root.
    pub(crate) eps: f32,
}

impl Norm {
    /// Loads the tensors called `names`, weight and bias, of a norm of `spec`.
    pub(crate) fn load(spec: &ModelSpec, weights: &dyn Weights, names: &[String; 2]) -> Result<Self, Error> {
        let ([weight, bias], width) = (names, spec.hidden);
        let bias = match spec.norm {
            NormKind::Rms => None,
            NormKind::Layer => Some(shaped(weights, bias, &[width])?),
            NormKind::Centred => Some(Tensor::zeros(width, DType::F32, &Device::Cpu)?),
        };
        Ok(Norm { weight: load_weight(spec, weights, weight, width)?, bias, eps: spec.norm_eps as f32 })
    }

    /// `x [rows, width]`, normed row by row.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor, Error> {
        let x = x.contiguous()?;
        Ok(match &self.bias {
            None => ops::rms_norm(&x, &self.weight, self.eps)?,
            Some(bias) => ops::layer_norm(&x, &self.weight, bias, self.eps)?,
        })
    }

    /// The gradient of `x [rows, width]` from `grad`, that of [`Norm::forward`]; adds the weight's to `d_weight [width]`.
    pub(crate) fn backward(&self, x: &Tensor, grad: &[f32], d_weight: &mut [f32]) -> Result<Vec<f32>, Error> {
        let mut d_x = vec![0.0; grad.len()];
        let kind = (self.eps, self.bias.is_some());
        ops::norm_backward(&values(&x.contiguous()?)?, &values(&self.weight)?, kind, grad, &mut d_x, d_weight);
        Ok(d_x)
    }
}

/// The factor of a norm, which may be stored as its difference from one: `[width]`.
pub(crate) fn load_weight(spec: &ModelSpec, weights: &dyn Weights, name: &str, width: usize) -> Result<Tensor, Error> {
    let weight = shaped(weights, name, &[width])?;
    match spec.norm_offset {
        0.0 => Ok(weight),
        offset => Ok((weight + f64::from(offset))?),
    }
}

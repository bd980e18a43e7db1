//! What comes after the last block: the final norm and the output head; and both ends of a model together.

use crate::backward::{accumulate, backward_linear, values};
use crate::linear::{Linear, Matrix};
use crate::norm::Norm;
use crate::{Embedding, Error, ModelSpec, Weights, ops};
use candle_core::Tensor;
use std::borrow::Cow;

/// The final norm and the output head.
#[derive(Debug, Clone)]
pub struct Head {
    norm: Option<Norm>,
    linear: Linear,
    /// Factor of the logits.
    factor: f32,
    /// Bound `c` of the logits, which go through `c · tanh(x / c)`.
    cap: Option<f32>,
}

impl Head {
    /// Loads the final norm and the head, which is the embedding where the model ties them.
    ///
    /// # Errors
    /// [`Error::NoHead`] for a model without one; a tensor that is missing, unreadable or of another shape.
    pub fn load(spec: &ModelSpec, weights: &dyn Weights) -> Result<Self, Error> {
        Head::with(spec, weights, || Matrix::embedding(weights, &spec.embedding(), [spec.vocab, spec.hidden]))
    }

    /// The same with another way to come by the embedding.
    fn with(
        spec: &ModelSpec,
        weights: &dyn Weights,
        embedding: impl FnOnce() -> Result<Matrix, Error>,
    ) -> Result<Self, Error> {
        let Some(head) = spec.head() else { return Err(Error::NoHead { model_type: spec.model_type.clone() }) };
        let linear = match spec.tied {
            true => Linear::new(embedding()?, None),
            false => Linear::load(weights, &head, [spec.vocab, spec.hidden], (false, false))?,
        };
        let load = |module| Norm::load(spec, weights, &spec.norm_parts(&spec.spell(module)));
        Ok(Head {
            norm: spec.layout.final_norm.map(load).transpose()?,
            linear,
            factor: spec.factors.logits as f32,
            cap: spec.factors.logit_cap.map(|cap| cap as f32),
        })
    }

    /// Logits `[tokens, vocab]` of the residual stream `h [tokens, hidden]` that leaves the last block.
    ///
    /// # Errors
    /// [`Error::Tensor`] when `h` has another width.
    pub fn logits(&self, h: &Tensor) -> Result<Tensor, Error> {
        let logits = self.raw_logits(h)?;
        if self.factor != 1.0 {
            ops::scale(&logits, self.factor)?;
        }
        match self.cap {
            Some(cap) => Ok(ops::capped(&logits, cap)?),
            None => Ok(logits),
        }
    }

    /// What the linear puts out.
    fn raw_logits(&self, h: &Tensor) -> Result<Tensor, Error> {
        match &self.norm {
            Some(norm) => self.linear.forward(&norm.forward(h)?),
            None => self.linear.forward(h),
        }
    }

    /// The gradient of what the linear puts out from that of the logits.
    fn uncapped<'a>(&self, h: &Tensor, grad: &'a [f32]) -> Result<Cow<'a, [f32]>, Error> {
        if self.factor == 1.0 && self.cap.is_none() {
            return Ok(Cow::Borrowed(grad));
        }
        let mut grad: Vec<f32> = grad.iter().map(|g| g * self.factor).collect();
        if let Some(cap) = self.cap {
            let raw = self.raw_logits(h)?;
            let slope = |x: f32| 1.0 - (self.factor * x / cap).tanh().powi(2);
            grad.iter_mut().zip(values(&raw)?.iter()).for_each(|(g, &x)| *g *= slope(x));
        }
        Ok(Cow::Owned(grad))
    }

    /// The gradient of `h [tokens, hidden]` from `grad [tokens, vocab]`, that of the logits. Those of the parameters are
    /// added to `parameters`, where they are wanted.
    ///
    /// # Errors
    /// [`Error::Tensor`] when `h` has another width.
    pub fn backward(
        &self,
        h: &Tensor,
        grad: &[f32],
        parameters: Option<&mut HeadGradients>,
    ) -> Result<Vec<f32>, Error> {
        let grad = self.uncapped(h, grad)?;
        let Some(norm) = &self.norm else {
            let into = parameters.map(|p| &mut p.linear[..]).filter(|linear| !linear.is_empty());
            return backward_linear(self.linear.weight(), &grad, h, into);
        };
        let mut unwanted = Vec::new();
        let (linear, d_norm) = match parameters {
            Some(HeadGradients { linear, norm }) => (Some(linear).filter(|linear| !linear.is_empty()), norm),
            None => {
                unwanted.resize(norm.weight.elem_count(), 0.0);
                (None, &mut unwanted)
            }
        };
        let d_x = match linear {
            Some(into) => backward_linear(self.linear.weight(), &grad, &norm.forward(h)?, Some(into))?,
            None => backward_linear(self.linear.weight(), &grad, h, None)?,
        };
        norm.backward(h, &d_x, d_norm)
    }

    /// Gradients of zero, in this head's shapes; without `weight`, that of the weight is left out and not computed.
    #[must_use]
    pub fn no_gradients(&self, weight: bool) -> HeadGradients {
        let count = |t: Option<&Tensor>| vec![0.0; t.map_or(0, Tensor::elem_count)];
        let linear = count(Some(self.linear.weight()).filter(|_| weight));
        HeadGradients { linear, norm: count(self.norm.as_ref().map(|n| &n.weight)) }
    }

    /// The weight `[vocab, hidden]`.
    #[must_use]
    pub fn weight(&self) -> &Tensor {
        self.linear.weight()
    }

    /// Replaces the weight by another `[vocab, hidden]`, f32 on the CPU.
    pub fn set_weight(&mut self, weight: Tensor) {
        self.linear.set(Matrix::Dense(weight));
    }

    /// The weight of the final norm, `[hidden]`.
    #[must_use]
    pub fn norm(&self) -> Option<&Tensor> {
        self.norm.as_ref().map(|norm| &norm.weight)
    }

    /// Replaces the weight of the final norm by another `[hidden]`.
    pub fn set_norm(&mut self, weight: Tensor) {
        if let Some(norm) = &mut self.norm {
            norm.weight = weight;
        }
    }
}

/// Gradients of a head's parameters, each laid out as the parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadGradients {
    /// Of the weight `[vocab, hidden]`; empty where it is not wanted.
    pub linear: Vec<f32>,
    /// Of the final norm `[hidden]`; empty without one.
    pub norm: Vec<f32>,
}

impl HeadGradients {
    /// Adds another window's gradients.
    pub fn add(&mut self, other: &HeadGradients) {
        accumulate(&mut self.linear, &other.linear);
        accumulate(&mut self.norm, &other.norm);
    }
}

/// Both ends of a model.
#[derive(Debug, Clone)]
pub struct Ends {
    /// What comes before the first block.
    pub embedding: Embedding,
    /// What comes after the last.
    pub head: Head,
}

impl Ends {
    /// Loads both ends; tied models hold the embedding once.
    ///
    /// # Errors
    /// As [`Embedding::load`] and [`Head::load`].
    pub fn load(spec: &ModelSpec, weights: &dyn Weights) -> Result<Self, Error> {
        let embedding = Embedding::load(spec, weights)?;
        let head = Head::with(spec, weights, || match embedding.table() {
            Some(table) => Ok(table.clone()),
            None => unreachable!("a head over a vocabulary stands behind tokens"),
        })?;
        Ok(Ends { embedding, head })
    }

    /// See [`Embedding::embed`].
    ///
    /// # Errors
    /// As there.
    pub fn embed(&self, tokens: &[u32]) -> Result<Tensor, Error> {
        self.embedding.embed(tokens)
    }

    /// See [`Head::logits`].
    ///
    /// # Errors
    /// As there.
    pub fn logits(&self, h: &Tensor) -> Result<Tensor, Error> {
        self.head.logits(h)
    }
}

//! What comes before the first block and after the last.

use crate::backward::{accumulate, backward_linear, values};
use crate::linear::{Linear, Matrix};
use crate::norm::Norm;
use crate::weights::shaped;
use crate::{Error, ModelSpec, Weights, ops};
use bitmill_scheme::Inputs;
use candle_core::{Device, Tensor};
use std::borrow::Cow;

/// The token embedding, and what is added to it.
#[derive(Debug, Clone)]
pub struct Embedding {
    /// `[vocab, hidden]`.
    weight: Matrix,
    /// Factor of its rows.
    factor: f32,
    added: Option<Added>,
}

/// Learned embeddings beside those of the tokens.
#[derive(Debug, Clone)]
struct Added {
    /// `[positions, hidden]`; without them nothing is added, and the norm is all there is.
    positions: Option<Tensor>,
    /// The row of the first position.
    first: usize,
    /// The token that is not counted, whose position is the one before the first.
    padding: Option<u32>,
    /// Of the first type, which every token of a single text has: `[hidden]`.
    token_type: Option<Tensor>,
    /// Of the sum.
    norm: Option<Norm>,
}

impl Embedding {
    /// Loads the embedding alone, which is all that calibration needs.
    ///
    /// # Errors
    /// A tensor that is missing, unreadable or of another shape.
    pub fn load(spec: &ModelSpec, weights: &dyn Weights) -> Result<Self, Error> {
        let weight = Matrix::embedding(weights, &spec.embedding(), [spec.vocab, spec.hidden])?;
        let load = |added: &'static crate::Added| -> Result<Added, Error> {
            let rows = spec.max_positions + spec.position_offset;
            let positions = |name| shaped(weights, &spec.spell(name), &[rows, spec.hidden]);
            let types = |name| -> Result<Tensor, Error> {
                Ok(shaped(weights, &spec.spell(name), &[spec.token_types, spec.hidden])?.get(0)?)
            };
            let norm = |norm| Norm::load(spec, weights, &spec.norm_parts(&spec.spell(norm)));
            Ok(Added {
                positions: added.positions.map(positions).transpose()?,
                first: spec.position_offset,
                padding: spec.padding,
                token_type: added.types.map(types).transpose()?,
                norm: added.norm.map(norm).transpose()?,
            })
        };
        let added = spec.layout.added.as_ref().map(load).transpose()?;
        Ok(Embedding { weight, factor: spec.factors.embedding as f32, added })
    }

    /// The residual stream `[tokens, hidden]` that enters the first block.
    ///
    /// # Errors
    /// [`Error::Token`] for an id beyond the vocabulary, [`Error::Positions`] for more tokens than there are positions.
    pub fn embed(&self, tokens: &[u32]) -> Result<Tensor, Error> {
        self.embed_at(tokens, |added| added.places(tokens))
    }

    /// The same for the token that stands at position `at` of each of several texts.
    pub(crate) fn embed_next(&self, tokens: &[u32], at: usize) -> Result<Tensor, Error> {
        self.embed_at(tokens, |added| vec![(added.first + at) as u32; tokens.len()])
    }

    fn embed_at(&self, tokens: &[u32], places: impl FnOnce(&Added) -> Vec<u32>) -> Result<Tensor, Error> {
        let vocab = self.weight.rows();
        if let Some(&token) = tokens.iter().find(|&&t| t as usize >= vocab) {
            return Err(Error::Token { token, vocab });
        }
        let h = self.weight.select(tokens)?;
        if self.factor != 1.0 {
            ops::scale(&h, self.factor)?;
        }
        let Some(added) = &self.added else { return Ok(h) };
        if let Some(token_type) = &added.token_type {
            ops::add(&h, token_type)?;
        }
        if let Some(positions) = &added.positions {
            let (places, rows) = (places(added), positions.dim(0)?);
            if let Some(&beyond) = places.iter().max().filter(|&&place| place as usize >= rows) {
                let tokens = beyond as usize + 1 - added.first;
                return Err(Error::Positions { tokens, positions: rows - added.first });
            }
            let places = Tensor::from_slice(&places, places.len(), &Device::Cpu)?;
            ops::add(&h, &positions.index_select(&places, 0)?)?;
        }
        match &added.norm {
            Some(norm) => norm.forward(&h),
            None => Ok(h),
        }
    }
}

impl Added {
    /// The row of the position of every token.
    fn places(&self, tokens: &[u32]) -> Vec<u32> {
        let mut next = self.first as u32;
        let place = |token: &u32| {
            if Some(*token) == self.padding {
                return self.first as u32 - 1;
            }
            next += 1;
            next - 1
        };
        tokens.iter().map(place).collect()
    }
}

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
            true => Linear { matrix: embedding()?, bias: None, inputs: Inputs::FULL, brain: None },
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
        self.linear.matrix = Matrix::Dense(weight);
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
        let head = Head::with(spec, weights, || Ok(embedding.weight.clone()))?;
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

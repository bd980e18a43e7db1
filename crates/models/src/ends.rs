//! What comes before the first block and after the last.

use crate::backward::{backward_linear, values};
use crate::linear::Linear;
use crate::ops::rms_norm_backward;
use crate::weights::shaped;
use crate::{EMBEDDING, Error, FINAL_NORM, HEAD, ModelSpec, Weights};
use bitmill_scheme::Activations;
use candle_core::{Device, Tensor};
use candle_nn::ops::rms_norm;

/// The token embedding.
#[derive(Debug, Clone)]
pub struct Embedding {
    /// `[vocab, hidden]`.
    weight: Tensor,
}

impl Embedding {
    /// Loads the embedding alone, which is all that calibration needs.
    ///
    /// # Errors
    /// A tensor that is missing, unreadable or of another shape.
    pub fn load(spec: &ModelSpec, weights: &dyn Weights) -> Result<Self, Error> {
        Ok(Embedding { weight: shaped(weights, EMBEDDING, &[spec.vocab, spec.hidden])? })
    }

    /// The residual stream `[tokens, hidden]` that enters the first block.
    ///
    /// # Errors
    /// [`Error::Token`] for an id beyond the vocabulary.
    pub fn embed(&self, tokens: &[u32]) -> Result<Tensor, Error> {
        let vocab = self.weight.dim(0)?;
        if let Some(&token) = tokens.iter().find(|&&t| t as usize >= vocab) {
            return Err(Error::Token { token, vocab });
        }
        Ok(self.weight.index_select(&Tensor::from_slice(tokens, tokens.len(), &Device::Cpu)?, 0)?)
    }
}

/// The final norm and the output head.
#[derive(Debug, Clone)]
pub struct Head {
    norm: Tensor,
    linear: Linear,
    eps: f32,
}

impl Head {
    /// Loads the final norm and the head, which is the embedding where the model ties them.
    ///
    /// # Errors
    /// A tensor that is missing, unreadable or of another shape.
    pub fn load(spec: &ModelSpec, weights: &dyn Weights) -> Result<Self, Error> {
        let linear = if spec.tied {
            let weight = shaped(weights, EMBEDDING, &[spec.vocab, spec.hidden])?;
            Linear { weight, bias: None, activations: Activations::Full }
        } else {
            Linear::load(weights, HEAD, [spec.vocab, spec.hidden], false)?
        };
        Ok(Head { norm: shaped(weights, FINAL_NORM, &[spec.hidden])?, linear, eps: spec.norm_eps as f32 })
    }

    /// Logits `[tokens, vocab]` of the residual stream `h [tokens, hidden]` that leaves the last block.
    ///
    /// # Errors
    /// [`Error::Tensor`] when `h` has another width.
    pub fn logits(&self, h: &Tensor) -> Result<Tensor, Error> {
        self.linear.forward(&rms_norm(&h.contiguous()?, &self.norm, self.eps)?)
    }

    /// The gradients of `h [tokens, hidden]` and of the norm's weight `[hidden]`, from `grad [tokens, vocab]`, that of
    /// the logits.
    ///
    /// # Errors
    /// [`Error::Tensor`] when `h` has another width.
    pub fn backward(&self, h: &Tensor, grad: &[f32]) -> Result<(Vec<f32>, Vec<f32>), Error> {
        let d_normed = backward_linear(&self.linear.weight, grad, h, None)?;
        let (mut d_h, mut d_norm) = (vec![0.0; d_normed.len()], vec![0.0; self.norm.elem_count()]);
        rms_norm_backward(&values(&h.contiguous()?)?, &values(&self.norm)?, self.eps, &d_normed, &mut d_h, &mut d_norm);
        Ok((d_h, d_norm))
    }

    /// The weight of the final norm, `[hidden]`.
    #[must_use]
    pub fn norm(&self) -> &Tensor {
        &self.norm
    }

    /// Replaces the weight of the final norm by another `[hidden]`.
    pub fn set_norm(&mut self, weight: Tensor) {
        self.norm = weight;
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
        if !spec.tied {
            return Ok(Ends { embedding, head: Head::load(spec, weights)? });
        }
        let linear = Linear { weight: embedding.weight.clone(), bias: None, activations: Activations::Full };
        let norm = shaped(weights, FINAL_NORM, &[spec.hidden])?;
        Ok(Ends { embedding, head: Head { norm, linear, eps: spec.norm_eps as f32 } })
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

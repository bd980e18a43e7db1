//! One decoder block: its weights, and its execution in five pieces that meet at the sites.

use crate::backward::Heads;
use crate::linear::{Input, Linear};
use crate::weights::shaped;
use crate::{Act, Error, ModelSpec, NormRole, Role, RopeTable, Weights, attention, ops};
use bitmill_scheme::Activations;
use candle_core::Tensor;
use candle_nn::ops::rms_norm;

/// The weights of one block, f32.
///
/// A caller may stop after any piece, look at the activation, replace the linears it feeds and go on from there:
/// ```text
/// x = attn_in(h)                  Q K V read x
/// x = attn_out(x, rope)           O reads x
/// (h, x) = mlp_in(h, x)           Gate Up read x
/// x = mlp_out(x)                  Down reads x
/// h = finish(h, x)
/// ```
/// All activations are `[tokens, width]` of one window. Cloning shares the tensors.
#[derive(Debug, Clone)]
pub struct Block {
    pub(crate) linears: [Linear; 7],
    pub(crate) norms: [Tensor; 2],
    pub(crate) qk_norms: Option<[Tensor; 2]>,
    pub(crate) group: usize,
    pub(crate) head_dim: usize,
    pub(crate) window: Option<usize>,
    pub(crate) act: Act,
    pub(crate) eps: f32,
}

impl Block {
    /// Loads block `index`.
    ///
    /// # Errors
    /// A tensor that is missing, unreadable or of a shape other than the config's.
    pub fn load(spec: &ModelSpec, index: usize, weights: &dyn Weights) -> Result<Block, Error> {
        let linear =
            |role| Linear::load(weights, &spec.module(index, role), spec.linear_shape(role), spec.has_bias(role));
        let norm = |norm| shaped(weights, &spec.norm(index, norm), &[spec.hidden]);
        let [q_norm, k_norm] = spec.qk_norms(index);
        let qk_norm = |name: &str| shaped(weights, name, &[spec.head_dim]);
        Ok(Block {
            linears: [
                linear(Role::Q)?,
                linear(Role::K)?,
                linear(Role::V)?,
                linear(Role::O)?,
                linear(Role::Gate)?,
                linear(Role::Up)?,
                linear(Role::Down)?,
            ],
            norms: [norm(NormRole::Input)?, norm(NormRole::PostAttention)?],
            qk_norms: if spec.qk_norm { Some([qk_norm(&q_norm)?, qk_norm(&k_norm)?]) } else { None },
            group: spec.group(),
            head_dim: spec.head_dim,
            window: spec.windows.get(index).copied().flatten(),
            act: spec.act,
            eps: spec.norm_eps as f32,
        })
    }

    /// From the residual stream `h [tokens, hidden]` to the site `attn_in`, `[tokens, hidden]`.
    ///
    /// # Errors
    /// [`Error::Tensor`] when `h` has another width.
    pub fn attn_in(&self, h: &Tensor) -> Result<Tensor, Error> {
        Ok(rms_norm(&h.contiguous()?, self.norm(NormRole::Input), self.eps)?)
    }

    /// From the site `attn_in` to the site `attn_out`, `[tokens, heads · head_dim]`: queries, keys and values, rotary
    /// embedding, causal attention.
    ///
    /// # Errors
    /// [`Error::Window`] when `rope` was built for another length; [`Error::Tensor`] on a weight of another shape.
    pub fn attn_out(&self, x: &Tensor, rope: &RopeTable) -> Result<Tensor, Error> {
        self.attend(&self.heads(x, rope)?)
    }

    /// Queries, keys and values of the site `attn_in`.
    pub(crate) fn heads(&self, x: &Tensor, rope: &RopeTable) -> Result<Heads, Error> {
        let (cos, sin) = rope.for_window(x.dim(0)?)?;
        let [q, k, v] = [Role::Q, Role::K, Role::V].map(|role| self.at(role));
        let input = Input::new(x, &[q, k, v])?;
        let (mut q, mut k, v) = (q.read(&input)?, k.read(&input)?, v.read(&input)?);
        let mut raw = None;
        if let Some([q_norm, k_norm]) = &self.qk_norms {
            let normed = [self.norm_heads(&q, q_norm)?, self.norm_heads(&k, k_norm)?];
            raw = Some([q, k]);
            [q, k] = normed;
        }
        let (q, k) = (ops::rotate(&q, cos, sin, self.group)?, ops::rotate(&k, cos, sin, 1)?);
        Ok(Heads { raw, q, k, v: v.contiguous()? })
    }

    pub(crate) fn attend(&self, heads: &Heads) -> Result<Tensor, Error> {
        Ok(attention::causal(&heads.q, &heads.k, &heads.v, self.window)?)
    }

    /// Adds the attention's output to `h` and goes on to the site `mlp_in`; returns both, `[tokens, hidden]`.
    ///
    /// # Errors
    /// [`Error::Tensor`] on a weight of another shape.
    pub fn mlp_in(&self, h: &Tensor, x: &Tensor) -> Result<(Tensor, Tensor), Error> {
        let h = Self::add(h, self.at(Role::O).forward(x)?)?;
        let x = rms_norm(&h, self.norm(NormRole::PostAttention), self.eps)?;
        Ok((h, x))
    }

    /// From the site `mlp_in` to the site `mlp_out`, `[tokens, intermediate]`.
    ///
    /// # Errors
    /// [`Error::Tensor`] on a weight of another shape.
    pub fn mlp_out(&self, x: &Tensor) -> Result<Tensor, Error> {
        let (gate, up) = self.gates(x)?;
        self.activate(gate, &up)
    }

    /// Both branches of the MLP before the activation, `[tokens, intermediate]`.
    pub(crate) fn gates(&self, x: &Tensor) -> Result<(Tensor, Tensor), Error> {
        let [gate, up] = [Role::Gate, Role::Up].map(|role| self.at(role));
        let input = Input::new(x, &[gate, up])?;
        Ok((gate.read(&input)?, up.read(&input)?))
    }

    /// `act(gate) · up`, in the memory of `gate` where that can be.
    pub(crate) fn activate(&self, gate: Tensor, up: &Tensor) -> Result<Tensor, Error> {
        let gate = match self.act {
            Act::Silu => {
                ops::silu_mul(&gate, up)?;
                return Ok(gate);
            }
            Act::Gelu => gate.gelu_erf()?,
            Act::GeluTanh => gate.gelu()?,
            Act::Relu => gate.relu()?,
        };
        ops::mul(&gate, up)?;
        Ok(gate)
    }

    /// Adds the MLP's output to the `h` of [`Block::mlp_in`]: the residual stream after the block.
    ///
    /// # Errors
    /// [`Error::Tensor`] on a weight of another shape.
    pub fn finish(&self, h: &Tensor, x: &Tensor) -> Result<Tensor, Error> {
        Self::add(h, self.at(Role::Down).forward(x)?)
    }

    /// The whole block, `[tokens, hidden]` to `[tokens, hidden]`.
    ///
    /// # Errors
    /// As the five pieces.
    pub fn forward(&self, h: &Tensor, rope: &RopeTable) -> Result<Tensor, Error> {
        let x = self.attn_out(&self.attn_in(h)?, rope)?;
        let (h, x) = self.mlp_in(h, &x)?;
        self.finish(&h, &self.mlp_out(&x)?)
    }

    /// The weight of a linear, `[out, in]`.
    #[must_use]
    pub fn linear(&self, role: Role) -> &Tensor {
        &self.at(role).weight
    }

    /// Replaces the weight of a linear by one of the same shape `[out, in]`, f32 on the CPU.
    pub fn set_linear(&mut self, role: Role, weight: Tensor) {
        self.at_mut(role).weight = weight;
    }

    /// The bias of a linear, `[out]`.
    #[must_use]
    pub fn bias(&self, role: Role) -> Option<&Tensor> {
        self.at(role).bias.as_ref()
    }

    /// Replaces the bias of a linear by another `[out]`, or drops it.
    pub fn set_bias(&mut self, role: Role, bias: Option<Tensor>) {
        self.at_mut(role).bias = bias;
    }

    /// How the input of a linear is rounded.
    #[must_use]
    pub fn activations(&self, role: Role) -> Activations {
        self.at(role).activations
    }

    /// Changes how the input of a linear is rounded.
    pub fn set_activations(&mut self, role: Role, activations: Activations) {
        self.at_mut(role).activations = activations;
    }

    /// The weight of a norm, `[hidden]`.
    #[must_use]
    pub fn norm(&self, role: NormRole) -> &Tensor {
        &self.norms[role as usize]
    }

    /// Replaces the weight of a norm by another `[hidden]`.
    pub fn set_norm(&mut self, role: NormRole, weight: Tensor) {
        self.norms[role as usize] = weight;
    }

    /// `h + y`, in the fresh memory of `y`.
    fn add(h: &Tensor, y: Tensor) -> Result<Tensor, Error> {
        ops::add(&y, &h.contiguous()?)?;
        Ok(y)
    }

    /// Norms every head of `x [tokens, n · head_dim]`.
    fn norm_heads(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor, Error> {
        let rows = x.reshape(((), self.head_dim))?;
        Ok(rms_norm(&rows, weight, self.eps)?.reshape(x.shape())?)
    }

    fn at(&self, role: Role) -> &Linear {
        &self.linears[role as usize]
    }

    fn at_mut(&mut self, role: Role) -> &mut Linear {
        &mut self.linears[role as usize]
    }
}

#[cfg(test)]
mod tests;

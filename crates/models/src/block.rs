//! One block: its weights, and its execution in five pieces that meet at the sites.

use crate::attention::Sight;
use crate::backward::Heads;
use crate::linear::{Input, Linear};
use crate::norm::Norm;
use crate::weights::shaped;
use crate::{Act, Error, ModelSpec, NormRole, Role, RopeTable, Weights, attention, ops};
use bitmill_scheme::Activations;
use candle_core::Tensor;
use candle_nn::ops::rms_norm;

/// The weights of one block, f32.
///
/// Pre-norm and post-norm, gated and plain, causal and bidirectional blocks differ in which parts are there, not in code.
///
/// A caller may stop after any piece, look at the activation, replace the linears it feeds and go on from there:
/// ```text
/// x = attn_in(h)                  Q K V read x
/// x = attn_out(x, rope)           O reads x
/// (h, x) = mlp_in(h, x)           Gate Up read x
/// x = mlp_out(x)                  Down reads x
/// h = finish(h, x)
/// ```
/// A plain MLP has no Gate.
/// All activations are `[tokens, width]` of one window. Cloning shares the tensors.
#[derive(Debug, Clone)]
pub struct Block {
    /// By role; a plain MLP has no gate.
    pub(crate) linears: [Option<Linear>; 7],
    /// By role; an architecture has some of them.
    pub(crate) norms: [Option<Norm>; 4],
    pub(crate) qk_norms: Option<[Tensor; 2]>,
    pub(crate) group: usize,
    pub(crate) head_dim: usize,
    pub(crate) sight: Sight,
    pub(crate) act: Act,
    pub(crate) eps: f32,
}

impl Block {
    /// Loads block `index`.
    ///
    /// # Errors
    /// A tensor that is missing, unreadable or of a shape other than the config's.
    pub fn load(spec: &ModelSpec, index: usize, weights: &dyn Weights) -> Result<Block, Error> {
        let mut linears = [const { None }; 7];
        for (role, module) in spec.block_linears(index) {
            let linear = Linear::load(weights, &module, spec.linear_shape(role), spec.has_bias(role))?;
            linears[role as usize] = Some(linear);
        }
        let mut norms = [const { None }; 4];
        for (role, _) in spec.layout.norms {
            let names = spec.norm_tensors(index, *role);
            norms[*role as usize] = Some(Norm::load(weights, &names, spec.hidden, spec.norm, spec.norm_eps)?);
        }
        let [q_norm, k_norm] = spec.qk_norms(index);
        let qk_norm = |name: &str| shaped(weights, name, &[spec.head_dim]);
        Ok(Block {
            linears,
            norms,
            qk_norms: if spec.qk_norm { Some([qk_norm(&q_norm)?, qk_norm(&k_norm)?]) } else { None },
            group: spec.group(),
            head_dim: spec.head_dim,
            sight: match spec.windows.get(index).copied().flatten() {
                _ if !spec.causal => Sight::All,
                window => Sight::Past { window: window.unwrap_or(usize::MAX) },
            },
            act: spec.act,
            eps: spec.norm_eps as f32,
        })
    }

    /// From the residual stream `h [tokens, hidden]` to the site `attn_in`, `[tokens, hidden]`.
    ///
    /// # Errors
    /// [`Error::Tensor`] when `h` has another width.
    pub fn attn_in(&self, h: &Tensor) -> Result<Tensor, Error> {
        self.normed(NormRole::Input, h)
    }

    /// From the site `attn_in` to the site `attn_out`, `[tokens, heads · head_dim]`: queries, keys and values, rotary
    /// embedding where there is one, attention.
    ///
    /// # Errors
    /// [`Error::Window`] when `rope` was built for another length; [`Error::Tensor`] on a weight of another shape.
    pub fn attn_out(&self, x: &Tensor, rope: &RopeTable) -> Result<Tensor, Error> {
        self.attend(&self.heads(x, rope)?)
    }

    /// Queries, keys and values of the site `attn_in`.
    pub(crate) fn heads(&self, x: &Tensor, rope: &RopeTable) -> Result<Heads, Error> {
        let turns = rope.for_window(x.dim(0)?)?;
        let [q, k, v] = [Role::Q, Role::K, Role::V].map(|role| self.at(role));
        let input = Input::new(x, &[q, k, v])?;
        let (mut q, mut k, v) = (q.read(&input)?, k.read(&input)?, v.read(&input)?);
        let mut raw = None;
        if let Some([q_norm, k_norm]) = &self.qk_norms {
            let normed = [self.norm_heads(&q, q_norm)?, self.norm_heads(&k, k_norm)?];
            raw = Some([q, k]);
            [q, k] = normed;
        }
        let (q, k) = match turns {
            Some((cos, sin)) => (ops::rotate(&q, cos, sin, self.group)?, ops::rotate(&k, cos, sin, 1)?),
            None => (self.by_head(&q, self.group)?, self.by_head(&k, 1)?),
        };
        Ok(Heads { raw, q, k, v: v.contiguous()? })
    }

    /// From queries, keys and values to the site `attn_out`.
    pub(crate) fn attend(&self, Heads { q, k, v, .. }: &Heads) -> Result<Tensor, Error> {
        Ok(attention::attend(q, k, v, self.sight)?)
    }

    /// How much every token is attended to at the site `attn_in`, over all heads and queries, `[tokens]`.
    ///
    /// # Errors
    /// As [`Block::attn_out`].
    pub fn concentration(&self, x: &Tensor, rope: &RopeTable) -> Result<Vec<f32>, Error> {
        let Heads { q, k, .. } = self.heads(x, rope)?;
        attention::concentration(&q, &k, self.sight)
    }

    /// Adds the attention's output to `h` and goes on to the site `mlp_in`; returns both, `[tokens, hidden]`.
    ///
    /// # Errors
    /// [`Error::Tensor`] on a weight of another shape.
    pub fn mlp_in(&self, h: &Tensor, x: &Tensor) -> Result<(Tensor, Tensor), Error> {
        let h = self.normed(NormRole::AttnResidual, &self.attn_sum(h, x)?)?;
        let x = self.normed(NormRole::PostAttention, &h)?;
        Ok((h, x))
    }

    /// From the site `mlp_in` to the site `mlp_out`, `[tokens, intermediate]`.
    ///
    /// # Errors
    /// [`Error::Tensor`] on a weight of another shape.
    pub fn mlp_out(&self, x: &Tensor) -> Result<Tensor, Error> {
        let (gate, up) = self.branches(x)?;
        self.gated(gate, up)
    }

    /// The branches of the MLP before the activation, `[tokens, intermediate]`: gate, where there is one, and up.
    pub(crate) fn branches(&self, x: &Tensor) -> Result<(Option<Tensor>, Tensor), Error> {
        let up = self.at(Role::Up);
        let Some(gate) = &self.linears[Role::Gate as usize] else { return Ok((None, up.forward(x)?)) };
        let input = Input::new(x, &[gate, up])?;
        Ok((Some(gate.read(&input)?), up.read(&input)?))
    }

    /// `act(gate) · up`, in the memory of `gate` where that can be, or `act(up)` without a gate.
    pub(crate) fn gated(&self, gate: Option<Tensor>, up: Tensor) -> Result<Tensor, Error> {
        let Some(gate) = gate else { return self.activate(&up) };
        if self.act == Act::Silu {
            ops::silu_mul(&gate, &up)?;
            return Ok(gate);
        }
        let gate = self.activate(&gate)?;
        ops::mul(&gate, &up)?;
        Ok(gate)
    }

    /// Adds the MLP's output to the `h` of [`Block::mlp_in`]: the residual stream after the block.
    ///
    /// # Errors
    /// [`Error::Tensor`] on a weight of another shape.
    pub fn finish(&self, h: &Tensor, x: &Tensor) -> Result<Tensor, Error> {
        self.normed(NormRole::MlpResidual, &self.mlp_sum(h, x)?)
    }

    /// The residual stream plus the attention's output, before a norm of the sum.
    pub(crate) fn attn_sum(&self, h: &Tensor, x: &Tensor) -> Result<Tensor, Error> {
        Self::add(h, self.at(Role::O).forward(x)?)
    }

    /// The residual stream plus the MLP's output, before a norm of the sum.
    pub(crate) fn mlp_sum(&self, h: &Tensor, x: &Tensor) -> Result<Tensor, Error> {
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
    ///
    /// # Panics
    /// Like all access by role: where the block has no such part, which [`ModelSpec::has`] and [`ModelSpec::has_norm`]
    /// tell.
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
        match &self.norms[role as usize] {
            Some(norm) => &norm.weight,
            None => panic!("this block has no norm {role:?}"),
        }
    }

    /// Replaces the weight of a norm by another `[hidden]`.
    pub fn set_norm(&mut self, role: NormRole, weight: Tensor) {
        match &mut self.norms[role as usize] {
            Some(norm) => norm.weight = weight,
            None => panic!("this block has no norm {role:?}"),
        }
    }

    /// `x` through the norm at `role`, or as it is where none stands there.
    pub(crate) fn normed(&self, role: NormRole, x: &Tensor) -> Result<Tensor, Error> {
        match &self.norms[role as usize] {
            Some(norm) => norm.forward(x),
            None => Ok(x.contiguous()?),
        }
    }

    /// The activation of the MLP.
    fn activate(&self, x: &Tensor) -> Result<Tensor, Error> {
        Ok(match self.act {
            Act::Silu => x.silu()?,
            Act::Gelu => x.gelu_erf()?,
            Act::GeluTanh => x.gelu()?,
            Act::Relu => x.relu()?,
        })
    }

    /// `x [tokens, kv_heads · group · head_dim]` gathered by key-value head as [`ops::rotate`] does, without rotating.
    pub(crate) fn by_head(&self, x: &Tensor, group: usize) -> Result<Tensor, Error> {
        let (tokens, dim) = (x.dim(0)?, self.head_dim);
        let heads = x.reshape((tokens, (), group * dim))?.transpose(0, 1)?.contiguous()?;
        Ok(heads.reshape(((), tokens * group, dim))?)
    }

    /// `h + y`, in the fresh memory of `y`.
    fn add(h: &Tensor, y: Tensor) -> Result<Tensor, Error> {
        ops::add(&y, &h.contiguous()?)?;
        Ok(y)
    }

    /// Norms every head of `x [tokens, n · head_dim]`.
    pub(crate) fn norm_heads(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor, Error> {
        let rows = x.reshape(((), self.head_dim))?;
        Ok(rms_norm(&rows, weight, self.eps)?.reshape(x.shape())?)
    }

    pub(crate) fn at(&self, role: Role) -> &Linear {
        match &self.linears[role as usize] {
            Some(linear) => linear,
            None => panic!("this block has no {role:?}"),
        }
    }

    fn at_mut(&mut self, role: Role) -> &mut Linear {
        match &mut self.linears[role as usize] {
            Some(linear) => linear,
            None => panic!("this block has no {role:?}"),
        }
    }
}

#[cfg(test)]
mod tests;

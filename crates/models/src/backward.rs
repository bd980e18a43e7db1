//! The backward pass of a block: from the gradient of a loss at its output to those at its input and of its parameters.
//!
//! Written by hand over the same pieces as the forward pass. A general tape would cost more than it saves here: it
//! allocates zeros for every sum and spreads additions over a second pool of threads, where this runs one window per
//! thread and touches each activation as few times as the chain rule needs. What the forward pass leaves behind is a
//! [`Trace`] of one window; everything cheap is computed again from it.
//!
//! Routers are not trained: the gradient passes through the weights of the chosen experts, the choice itself has none.
//!
//! Gradients pass through the rounding of activations as if it were not there (straight-through).

use crate::experts::gated;
use crate::ops::{act_backward, entries, gated_backward, norm_backward, put_channels, unrotate};
use crate::{Block, Error, NormRole, Role, RopeTable, attention};
use bitmill_kernels::{View, ViewMut, gemm};
use candle_core::{Layout, Storage, Tensor, WithDType};
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::ops::{Deref, Range};

/// What one window's way through a block leaves behind. Tensors are `[tokens, width]` unless said.
#[derive(Debug)]
pub struct Trace {
    /// The residual stream that entered.
    h: Tensor,
    attn_in: Tensor,
    heads: Heads,
    attn_out: Tensor,
    /// What the attention puts out, where there is a norm of it.
    attn_output: Option<Tensor>,
    /// The residual stream after the attention, before and after a norm of it.
    attn_sum: Tensor,
    middle: Tensor,
    mlp_in: Tensor,
    /// Gate, where there is one, and up; of experts all is computed again.
    branches: Option<(Option<Tensor>, Tensor)>,
    mlp_out: Tensor,
    /// What the MLP puts out, where there is a norm of it.
    mlp_output: Option<Tensor>,
    /// What leaves the block, before a norm of it.
    mlp_sum: Tensor,
}

/// Queries, keys and values of one window.
#[derive(Debug)]
pub(crate) struct Heads {
    /// Before norm and rotation, `[tokens, heads · head_dim]`; kept where there is a norm.
    pub(crate) raw: Option<[Tensor; 2]>,
    /// Rotated, `[kv_heads, tokens · group, head_dim]`.
    pub(crate) q: Tensor,
    /// Rotated, `[kv_heads, tokens, head_dim]`.
    pub(crate) k: Tensor,
    /// `[tokens, kv_heads · head_dim]`.
    pub(crate) v: Tensor,
}

/// Gradients of one block's parameters, each laid out as the parameter; of parts that a block lacks they are empty.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockGradients {
    /// Of the linears' weights `[out, in]`.
    pub linears: BTreeMap<Role, Vec<f32>>,
    /// Of the norms' weights `[hidden]`, by [`NormRole`].
    pub norms: [Vec<f32>; 6],
}

impl BlockGradients {
    /// Adds another window's gradients.
    pub fn add(&mut self, other: &BlockGradients) {
        // Both are of one block, so they have the same linears.
        let own = self.linears.values_mut().chain(&mut self.norms);
        own.zip(other.linears.values().chain(&other.norms)).for_each(|(a, b)| accumulate(a, b));
    }
}

impl Block {
    /// [`Block::forward`], keeping what [`Block::backward`] needs.
    ///
    /// # Errors
    /// As [`Block::forward`].
    pub fn forward_traced(&self, h: &Tensor, rope: &RopeTable) -> Result<(Tensor, Trace), Error> {
        let attn_in = self.attn_in(h)?;
        let heads = self.heads(&attn_in, rope)?;
        let attn_out = self.attend(&heads)?;
        let attended = self.at(Role::O).forward(&attn_out)?;
        let (attn_sum, attn_output) = self.join_traced(h, attended, NormRole::AttnOutput)?;
        let middle = self.normed(NormRole::AttnResidual, &attn_sum)?;
        let mlp_in = self.normed(NormRole::PostAttention, if self.parallel { h } else { &middle })?;
        let branches = if self.experts.is_some() { None } else { Some(self.branches(&mlp_in)?) };
        let mlp_out = match &branches {
            Some((gate, up)) => gated(self.act, gate.as_ref().map(Tensor::copy).transpose()?, up.clone())?,
            None => self.mlp_out(&mlp_in)?,
        };
        let (mlp_sum, mlp_output) = self.join_traced(&middle, self.mlp_output(&mlp_out)?, NormRole::MlpOutput)?;
        let out = self.normed(NormRole::MlpResidual, &mlp_sum)?;
        let h = h.contiguous()?;
        let trace = Trace {
            h,
            attn_in,
            heads,
            attn_out,
            attn_output,
            attn_sum,
            middle,
            mlp_in,
            branches,
            mlp_out,
            mlp_output,
            mlp_sum,
        };
        Ok((out, trace))
    }

    /// The residual stream plus what attention or MLP put out; and that alone where the norm `norm` stands behind it.
    fn join_traced(&self, h: &Tensor, y: Tensor, norm: NormRole) -> Result<(Tensor, Option<Tensor>), Error> {
        let kept = self.norms[norm as usize].is_some().then(|| y.clone());
        Ok((self.joined(h, y, norm)?, kept))
    }

    /// From `grad [tokens, hidden]`, the gradient of a loss at the output of this window, to its gradient at the input.
    /// The gradients of the parameters are added to `parameters`; where that is `None` they are not computed.
    ///
    /// # Errors
    /// [`Error::Tensor`] when the trace is of another block's shape.
    pub fn backward(
        &self,
        trace: &Trace,
        rope: &RopeTable,
        grad: Vec<f32>,
        parameters: Option<&mut BlockGradients>,
    ) -> Result<Vec<f32>, Error> {
        let mut chain = Chain { block: self, parameters };
        let grad = chain.norm(NormRole::MlpResidual, &trace.mlp_sum, grad)?;
        let of_mlp = chain.mlp(trace, &grad)?;
        let mut d_middle = grad;
        if !self.parallel {
            accumulate(&mut d_middle, &of_mlp);
        }
        let grad = chain.norm(NormRole::AttnResidual, &trace.attn_sum, d_middle)?;
        let mut d_h = chain.attention(trace, rope, &grad)?;
        accumulate(&mut d_h, &grad);
        if self.parallel {
            accumulate(&mut d_h, &of_mlp);
        }
        Ok(d_h)
    }

    /// Gradients of zero, in this block's shapes.
    #[must_use]
    pub fn no_gradients(&self) -> BlockGradients {
        let zeros = |t: Option<&Tensor>| vec![0.0; t.map_or(0, Tensor::elem_count)];
        BlockGradients {
            linears: self.roles().map(|role| (role, zeros(Some(self.linear(role))))).collect(),
            norms: NormRole::ALL.map(|role| zeros(self.norms[role as usize].as_ref().map(|n| &n.weight))),
        }
    }
}

/// The chain rule through the parts of one block.
struct Chain<'a> {
    block: &'a Block,
    parameters: Option<&'a mut BlockGradients>,
}

impl Chain<'_> {
    /// Through a linear that read `x`.
    fn linear(&mut self, role: Role, grad: &[f32], x: &Tensor) -> Result<Vec<f32>, Error> {
        let into = self.parameters.as_deref_mut().and_then(|p| p.linears.get_mut(&role)).map(Vec::as_mut_slice);
        backward_linear(self.block.linear(role), grad, x, into)
    }

    /// Through the norm at `role`, if the block has one.
    fn norm(&mut self, role: NormRole, x: &Tensor, grad: Vec<f32>) -> Result<Vec<f32>, Error> {
        let Some(norm) = &self.block.norms[role as usize] else { return Ok(grad) };
        match &mut self.parameters {
            Some(parameters) => norm.backward(x, &grad, &mut parameters.norms[role as usize]),
            None => norm.backward(x, &grad, &mut vec![0.0; norm.weight.elem_count()]),
        }
    }

    /// From the gradient of a sum with the residual stream to that of what `role` put out, which `output` is where the norm
    /// `norm` stands behind it.
    fn joined(&mut self, grad: &[f32], output: Option<&Tensor>, norm: NormRole) -> Result<Vec<f32>, Error> {
        let factor = self.block.residual;
        let grad = grad.iter().map(|g| g * factor).collect();
        match output {
            Some(output) => self.norm(norm, output, grad),
            None => Ok(grad),
        }
    }

    /// Through the linears of `parts`, which all read `x`, from the gradients of what they put out.
    fn read<const N: usize>(
        &mut self,
        parts: [Role; N],
        (together, shares): (Role, Option<&[Vec<Range<usize>>; N]>),
        grads: [&[f32]; N],
        x: &Tensor,
    ) -> Result<Vec<f32>, Error> {
        if let Some(shares) = shares {
            let width = self.block.linear(together).dim(0)?;
            let mut grad = vec![0.0; x.dim(0)? * width];
            shares.iter().zip(grads).for_each(|(ranges, part)| put_channels(&mut grad, width, ranges, part));
            return self.linear(together, &grad, x);
        }
        let mut d_x = vec![0.0; x.elem_count()];
        for (role, grad) in parts.into_iter().zip(grads) {
            accumulate(&mut d_x, &self.linear(role, grad, x)?);
        }
        Ok(d_x)
    }

    /// Through the MLP, back to the residual stream it read.
    fn mlp(&mut self, trace: &Trace, grad: &[f32]) -> Result<Vec<f32>, Error> {
        let grad = self.joined(grad, trace.mlp_output.as_ref(), NormRole::MlpOutput)?;
        let act = self.block.act;
        let d_in = match (&trace.branches, &self.block.experts) {
            (Some((None, up)), _) => {
                let d_out = self.linear(Role::Down, &grad, &trace.mlp_out)?;
                self.linear(Role::Up, &act_backward(act, &values(up)?, &d_out), &trace.mlp_in)?
            }
            (Some((Some(gate), up)), _) => {
                let d_out = self.linear(Role::Down, &grad, &trace.mlp_out)?;
                let (d_gate, d_up) = gated_backward(act, &values(gate)?, &values(up)?, &d_out);
                let shares = (Role::GateUp, self.block.shares.gate_up.as_ref());
                self.read([Role::Gate, Role::Up], shares, [&d_gate, &d_up], &trace.mlp_in)?
            }
            (None, Some(experts)) => {
                experts.backward(&trace.mlp_in, &grad, self.parameters.as_deref_mut().map(|p| &mut p.linears))?
            }
            (None, None) => unreachable!("a block without experts has branches"),
        };
        let read = if self.block.parallel { &trace.h } else { &trace.middle };
        self.norm(NormRole::PostAttention, read, d_in)
    }

    /// Through the attention, back to the residual stream it read.
    fn attention(&mut self, trace: &Trace, rope: &RopeTable, grad: &[f32]) -> Result<Vec<f32>, Error> {
        let Block { head_dim, group, eps, qk_norms, pairs, .. } = self.block;
        let grad = self.joined(grad, trace.attn_output.as_ref(), NormRole::AttnOutput)?;
        let d_attn = self.linear(Role::O, &grad, &trace.attn_out)?;
        let Heads { q, k, v, raw } = &trace.heads;
        let d = attention::backward(q, k, v, &trace.attn_out, &d_attn, self.block.scoring)?;
        let tokens = trace.h.dim(0)?;
        let table = rope.of_block(self.block.index, tokens)?;
        let table = table.map(|(cos, sin)| Ok::<_, Error>((values(cos)?, values(sin)?, cos.dim(1)?))).transpose()?;
        let table = table.as_ref().map(|(cos, sin, half)| (&**cos, &**sin, *half));
        let mut d_q = unrotate(&d.q, table, (tokens, *head_dim, *group), *pairs);
        let mut d_k = unrotate(&d.k, table, (tokens, *head_dim, 1), *pairs);
        let width = d_q.len() / tokens;
        for (row, factor) in d_q.chunks_exact_mut(width).zip(self.block.tempers(tokens)) {
            row.iter_mut().for_each(|d| *d *= factor);
        }
        if let (Some(raw), Some(norms)) = (raw, qk_norms) {
            // The norms of queries and keys are not trained; their weights' gradients are dropped.
            for (grad, (x, weight)) in [&mut d_q, &mut d_k].into_iter().zip(raw.iter().zip(norms)) {
                let (weight, mut through) = (values(weight)?, vec![0.0; grad.len()]);
                let mut dropped = vec![0.0; weight.len()];
                norm_backward(&values(x)?, &weight, (*eps, false), grad, &mut through, &mut dropped);
                *grad = through;
            }
        }
        let shares = (Role::Qkv, self.block.shares.qkv.as_ref());
        let d_in = self.read([Role::Q, Role::K, Role::V], shares, [&d_q, &d_k, &d.v], &trace.attn_in)?;
        self.norm(NormRole::Input, &trace.h, d_in)
    }
}

/// `∂/∂x` of `y = x·Wᵀ` from `grad = ∂/∂y`, `[tokens, in]`; adds `∂/∂W = gradᵀ·x` to `into`.
pub(crate) fn backward_linear(
    weight: &Tensor,
    grad: &[f32],
    x: &Tensor,
    into: Option<&mut [f32]>,
) -> Result<Vec<f32>, Error> {
    let (out, inner) = weight.dims2()?;
    let tokens = grad.len() / out;
    let grad = View::new(grad, tokens, out, out);
    if let Some(into) = into {
        let x = values(x)?;
        gemm(1.0, grad.t(), View::new(&x, tokens, inner, inner), 1.0, &mut ViewMut::new(into, out, inner, inner));
    }
    let mut d_x = vec![0.0f32; tokens * inner];
    let weight = values(weight)?;
    gemm(1.0, grad, View::new(&weight, out, inner, inner), 0.0, &mut ViewMut::new(&mut d_x, tokens, inner, inner));
    Ok(d_x)
}

pub(crate) fn accumulate(sum: &mut [f32], term: &[f32]) {
    sum.iter_mut().zip(term).for_each(|(a, b)| *a += b);
}

/// The entries of a contiguous f32 tensor, borrowed.
///
/// # Errors
/// [`Error::Tensor`] where it is not one.
pub fn values(t: &Tensor) -> Result<impl Deref<Target = [f32]> + '_, Error> {
    values_of(t)
}

/// Those of a contiguous tensor of `T`.
///
/// # Errors
/// [`Error::Tensor`] where it is not one.
pub(crate) fn values_of<T: WithDType>(t: &Tensor) -> Result<impl Deref<Target = [T]> + '_, Error> {
    let (storage, layout) = t.storage_and_layout();
    let entries = Values { storage, layout, of: PhantomData };
    entries.get()?;
    Ok(entries)
}

/// `G` is the guard of a tensor's storage.
struct Values<'a, G, T> {
    storage: G,
    layout: &'a Layout,
    of: PhantomData<T>,
}

impl<G: Deref<Target = Storage>, T: WithDType> Values<'_, G, T> {
    fn get(&self) -> candle_core::Result<&[T]> {
        match &*self.storage {
            Storage::Cpu(storage) => entries(storage, self.layout),
            _ => candle_core::bail!("a tensor on the CPU is needed"),
        }
    }
}

impl<G: Deref<Target = Storage>, T: WithDType> Deref for Values<'_, G, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // `values_of` has seen this succeed.
        self.get().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;

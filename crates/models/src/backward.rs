//! The backward pass of a block: from the gradient of a loss at its output to those at its input and of its parameters.
//!
//! Written by hand over the same pieces as the forward pass. A general tape would cost more than it saves here: it
//! allocates zeros for every sum and spreads additions over a second pool of threads, where this runs one window per
//! thread and touches each activation as few times as the chain rule needs. What the forward pass leaves behind is a
//! [`Trace`] of one window; everything cheap is computed again from it.
//!
//! Gradients pass through the rounding of activations as if it were not there (straight-through).

use crate::ops::{act_backward, floats, rms_norm_backward, unrotate};
use crate::{Block, Error, NormRole, Role, RopeTable, attention};
use bitmill_kernels::{View, ViewMut, gemm};
use candle_core::{Layout, Storage, Tensor};
use std::ops::Deref;

/// What one window's way through a block leaves behind. Tensors are `[tokens, width]` unless said.
#[derive(Debug)]
pub struct Trace {
    /// The residual stream that entered.
    h: Tensor,
    attn_in: Tensor,
    heads: Heads,
    attn_out: Tensor,
    /// The residual stream after the attention.
    middle: Tensor,
    mlp_in: Tensor,
    gate: Tensor,
    up: Tensor,
    mlp_out: Tensor,
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

/// Gradients of one block's parameters, each laid out as the parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockGradients {
    /// Of the linears' weights `[out, in]`, by [`Role`].
    pub linears: [Vec<f32>; 7],
    /// Of the norms' weights `[hidden]`, by [`NormRole`].
    pub norms: [Vec<f32>; 2],
}

impl BlockGradients {
    /// Adds another window's gradients.
    pub fn add(&mut self, other: &BlockGradients) {
        let own = self.linears.iter_mut().chain(&mut self.norms);
        for (a, b) in own.zip(other.linears.iter().chain(&other.norms)) {
            a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        }
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
        let (middle, mlp_in) = self.mlp_in(h, &attn_out)?;
        let (gate, up) = self.gates(&mlp_in)?;
        let mlp_out = self.activate(gate.copy()?, &up)?;
        let out = self.finish(&middle, &mlp_out)?;
        Ok((out, Trace { h: h.contiguous()?, attn_in, heads, attn_out, middle, mlp_in, gate, up, mlp_out }))
    }

    /// From `grad [tokens, hidden]`, the gradient of a loss at the output of this window, to its gradient at the input
    /// and, where `parameters` is given, the gradients of the parameters, which are added to it.
    ///
    /// # Errors
    /// [`Error::Tensor`] when the trace is of another block's shape.
    pub fn backward(
        &self,
        trace: &Trace,
        rope: &RopeTable,
        grad: Vec<f32>,
        mut parameters: Option<&mut BlockGradients>,
    ) -> Result<Vec<f32>, Error> {
        let tokens = trace.h.dim(0)?;
        let mut linear = |role: Role, grad: &[f32], x: &Tensor| -> Result<Vec<f32>, Error> {
            let into = parameters.as_deref_mut().map(|p| p.linears[role as usize].as_mut_slice());
            backward_linear(self.linear(role), grad, x, into)
        };
        // The MLP.
        let d_out = linear(Role::Down, &grad, &trace.mlp_out)?;
        let (d_gate, d_up) = act_backward(self.act, &values(&trace.gate)?, &values(&trace.up)?, &d_out);
        let mut d_in = linear(Role::Gate, &d_gate, &trace.mlp_in)?;
        accumulate(&mut d_in, &linear(Role::Up, &d_up, &trace.mlp_in)?);
        let hidden = trace.h.dim(1)?;
        let mut d_norms = [vec![0.0; hidden], vec![0.0; hidden]];
        let mut d_middle = grad;
        let mut norm = |role: NormRole, x: &Tensor, grad: &[f32], into: &mut [f32]| -> Result<(), Error> {
            let weight = values(self.norm(role))?;
            rms_norm_backward(&values(x)?, &weight, self.eps, grad, into, &mut d_norms[role as usize]);
            Ok(())
        };
        norm(NormRole::PostAttention, &trace.middle, &d_in, &mut d_middle)?;
        // The attention.
        let d_attn = linear(Role::O, &d_middle, &trace.attn_out)?;
        let Heads { q, k, v, .. } = &trace.heads;
        let (d_q, d_k, d_v) = attention::backward(q, k, v, &trace.attn_out, &d_attn, self.window)?;
        let (cos, sin) = rope.for_window(tokens)?;
        let (cos, sin) = (values(cos)?, values(sin)?);
        let mut d_q = unrotate(&d_q, &cos, &sin, tokens, self.head_dim, self.group);
        let mut d_k = unrotate(&d_k, &cos, &sin, tokens, self.head_dim, 1);
        if let (Some(raw), Some(norms)) = (&trace.heads.raw, &self.qk_norms) {
            // The norms of single heads are not trained; their weights' gradients are dropped.
            for (grad, (x, weight)) in [&mut d_q, &mut d_k].into_iter().zip(raw.iter().zip(norms)) {
                let (weight, mut through) = (values(weight)?, vec![0.0; grad.len()]);
                rms_norm_backward(&values(x)?, &weight, self.eps, grad, &mut through, &mut vec![0.0; weight.len()]);
                *grad = through;
            }
        }
        let mut d_in = linear(Role::Q, &d_q, &trace.attn_in)?;
        accumulate(&mut d_in, &linear(Role::K, &d_k, &trace.attn_in)?);
        accumulate(&mut d_in, &linear(Role::V, &d_v, &trace.attn_in)?);
        let mut d_h = d_middle;
        norm(NormRole::Input, &trace.h, &d_in, &mut d_h)?;
        if let Some(parameters) = parameters {
            parameters.norms.iter_mut().zip(&d_norms).for_each(|(a, b)| accumulate(a, b));
        }
        Ok(d_h)
    }

    /// Gradients of zero, in this block's shapes.
    #[must_use]
    pub fn no_gradients(&self) -> BlockGradients {
        BlockGradients {
            linears: Role::ALL.map(|role| vec![0.0; self.linear(role).elem_count()]),
            norms: NormRole::ALL.map(|role| vec![0.0; self.norm(role).elem_count()]),
        }
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

fn accumulate(sum: &mut [f32], term: &[f32]) {
    sum.iter_mut().zip(term).for_each(|(a, b)| *a += b);
}

/// The entries of a contiguous f32 tensor, borrowed.
pub(crate) fn values(t: &Tensor) -> Result<impl Deref<Target = [f32]> + '_, Error> {
    let (storage, layout) = t.storage_and_layout();
    let entries = Values { storage, layout };
    entries.get()?;
    Ok(entries)
}

/// `G` is the guard of a tensor's storage.
struct Values<'a, G> {
    storage: G,
    layout: &'a Layout,
}

impl<G: Deref<Target = Storage>> Values<'_, G> {
    fn get(&self) -> candle_core::Result<&[f32]> {
        match &*self.storage {
            Storage::Cpu(storage) => floats(storage, self.layout),
            _ => candle_core::bail!("a tensor on the CPU is needed"),
        }
    }
}

impl<G: Deref<Target = Storage>> Deref for Values<'_, G> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // `values` has seen this succeed.
        self.get().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;

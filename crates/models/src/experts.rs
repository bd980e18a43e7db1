//! An MLP of experts: a router deals every token out to a few of many small MLPs.
//!
//! The router's scores go through a soft-max; a token goes to the experts with the largest, each weighted by its
//! probability, or by its share of theirs. Or the sigmoids of the scores weigh not what the chosen put out but what they read.
//! An expert that every token goes to may stand beside them, weighted by a sigmoid of its own or not at all. This is the one
//! definition of it: the sum over experts runs in the order of their indices, so that no result depends on who computed what first.

use crate::backward::{accumulate, backward_linear, values};
use crate::linear::Linear;
use crate::ops::gated_backward;
use crate::weights::shaped;
use crate::{Act, Block, Error, Expert, ModelSpec, Role, Routing, Weighing, Weights, ops};
use bitmill_kernels::{Level, View, ViewMut, axpy, gemm};
use candle_core::{Device, Tensor};
use std::collections::BTreeMap;

/// The experts of one block.
#[derive(Debug, Clone)]
pub(crate) struct Experts {
    /// `[experts, hidden]`.
    router: Tensor,
    routed: Vec<Gated>,
    shared: Option<Shared>,
    /// How many a token goes to.
    chosen: usize,
    /// How much each of them counts.
    weighing: Weighing,
    act: Act,
}

/// A gated MLP.
#[derive(Debug, Clone)]
struct Gated {
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// The expert that every token goes to.
#[derive(Debug, Clone)]
struct Shared {
    mlp: Gated,
    /// `[1, hidden]`: how much of it counts, through a sigmoid; without it, all.
    gate: Option<Tensor>,
}

/// Which tokens of a window go to which expert, and with what weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Routes {
    /// For each expert, its tokens in their order, each with its weight.
    pub tokens: Vec<Vec<(usize, f32)>>,
    /// The router's probabilities, or sigmoids of its scores, `[tokens, experts]`.
    probabilities: Vec<f32>,
}

impl Experts {
    /// Loads the experts of block `index`, where it has them.
    pub(crate) fn load(spec: &ModelSpec, index: usize, weights: &dyn Weights) -> Result<Option<Self>, Error> {
        let (Some(routing), Some((router, gate))) = (spec.routed(index), spec.routers(index)) else { return Ok(None) };
        let &Routing { experts, chosen, weighing, .. } = routing;
        let linear = |role: Role| {
            Linear::load(weights, &spec.module(index, role), spec.linear_shape(role), (false, spec.layout.transposed))
        };
        let mlp = |expert: Expert| -> Result<Gated, Error> {
            let [gate, up, down] = Role::of_expert(expert);
            Ok(Gated { gate: linear(gate)?, up: linear(up)?, down: linear(down)? })
        };
        let shared = || -> Result<Shared, Error> {
            let load = |gate: String| shaped(weights, &format!("{gate}.weight"), &[1, spec.hidden]);
            Ok(Shared { mlp: mlp(Expert::Shared)?, gate: gate.map(load).transpose()? })
        };
        Ok(Some(Experts {
            router: shaped(weights, &format!("{router}.weight"), &[experts, spec.hidden])?,
            routed: (0..experts as u16).map(|e| mlp(Expert::Routed(e))).collect::<Result<_, _>>()?,
            shared: if routing.shared > 0 { Some(shared()?) } else { None },
            chosen,
            weighing,
            act: spec.act,
        }))
    }

    /// Every expert, in execution order.
    pub(crate) fn all(&self) -> impl Iterator<Item = Expert> + use<> {
        let shared = self.shared.is_some().then_some(Expert::Shared);
        (0..self.routed.len() as u16).map(Expert::Routed).chain(shared)
    }

    fn mlp(&self, expert: Expert) -> Option<&Gated> {
        match expert {
            Expert::Routed(index) => self.routed.get(usize::from(index)),
            Expert::Shared => self.shared.as_ref().map(|shared| &shared.mlp),
        }
    }

    /// The linear at `role`, where there is one.
    pub(crate) fn linear(&self, role: Role) -> Option<&Linear> {
        let mlp = self.mlp(role.expert()?)?;
        match role.kind() {
            Role::Gate => Some(&mlp.gate),
            Role::Up => Some(&mlp.up),
            _ => Some(&mlp.down),
        }
    }

    /// The same to be changed.
    pub(crate) fn linear_mut(&mut self, role: Role) -> Option<&mut Linear> {
        let mlp = match role.expert()? {
            Expert::Routed(index) => self.routed.get_mut(usize::from(index))?,
            Expert::Shared => &mut self.shared.as_mut()?.mlp,
        };
        match role.kind() {
            Role::Gate => Some(&mut mlp.gate),
            Role::Up => Some(&mut mlp.up),
            _ => Some(&mut mlp.down),
        }
    }

    /// Deals out the tokens of `x [tokens, hidden]`. Of equal experts the first is chosen.
    fn routes(&self, x: &Tensor) -> Result<Routes, Error> {
        let experts = self.routed.len();
        let scores = ops::product(x, &self.router)?;
        let mut probabilities = values(&scores)?.to_vec();
        let mut tokens = vec![Vec::new(); experts];
        for (token, p) in probabilities.chunks_exact_mut(experts).enumerate() {
            if self.weighing != Weighing::Sigmoid {
                ops::softmax(p, 1.0);
            }
            let mut order: Vec<usize> = (0..experts).collect();
            order.sort_by(|&a, &b| p[b].total_cmp(&p[a]));
            order.truncate(self.chosen);
            if self.weighing == Weighing::Sigmoid {
                // After the choice: sigmoids of large scores are alike.
                p.iter_mut().for_each(|p| *p = sigmoid(*p));
            }
            let sum: f32 = if self.weighing == Weighing::Share { order.iter().map(|&e| p[e]).sum() } else { 1.0 };
            order.iter().for_each(|&e| tokens[e].push((token, p[e] / sum)));
        }
        Ok(Routes { tokens, probabilities })
    }

    /// The factors of what an expert reads and of what it puts out, where it counts by `weight`.
    fn sides(&self, weight: f32) -> [f32; 2] {
        if self.weighing == Weighing::Sigmoid { [weight, 1.0] } else { [1.0, weight] }
    }

    /// What an expert reads of the tokens that go to it, in `x [tokens, hidden]`.
    fn read(&self, x: &Tensor, tokens: &[(usize, f32)]) -> Result<Tensor, Error> {
        let own = rows_of(x, tokens)?;
        self.weigh(&own, tokens.iter().map(|&(_, weight)| weight).collect())?;
        Ok(own)
    }

    /// Multiplies rows that an expert reads by their weights, in place, if weights are factors of that.
    fn weigh(&self, rows: &Tensor, weights: Vec<f32>) -> Result<(), Error> {
        if self.weighing == Weighing::Sigmoid {
            let weights = Tensor::from_vec(weights, (rows.dim(0)?, 1), &Device::Cpu)?;
            ops::mul(rows, &weights.broadcast_as(rows.shape())?.contiguous()?)?;
        }
        Ok(())
    }

    /// What the experts together make of `x [tokens, hidden]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor, Error> {
        let (level, (count, hidden)) = (Level::best(), x.dims2()?);
        let mut sum = vec![0.0f32; count * hidden];
        for (expert, tokens) in self.routed.iter().zip(&self.routes(x)?.tokens) {
            if tokens.is_empty() {
                continue;
            }
            let y = expert.forward(self.act, &self.read(x, tokens)?)?;
            for (&(token, weight), row) in tokens.iter().zip(values(&y)?.chunks_exact(hidden)) {
                axpy(level, self.sides(weight)[1], row, &mut sum[token * hidden..][..hidden]);
            }
        }
        if let Some(shared) = &self.shared {
            let (y, weights) = (shared.mlp.forward(self.act, x)?, shared.weights(x)?);
            for ((sum, row), weight) in sum.chunks_exact_mut(hidden).zip(values(&y)?.chunks_exact(hidden)).zip(weights)
            {
                axpy(level, weight, row, sum);
            }
        }
        Ok(Tensor::from_vec(sum, (count, hidden), &Device::Cpu)?)
    }

    /// The gradient of `x [tokens, hidden]` from `grad`, that of [`Experts::forward`]; those of the linears' weights are
    /// added to `parameters`, where they are wanted.
    pub(crate) fn backward(
        &self,
        x: &Tensor,
        grad: &[f32],
        mut parameters: Option<&mut BTreeMap<Role, Vec<f32>>>,
    ) -> Result<Vec<f32>, Error> {
        let (hidden, experts) = (x.dim(1)?, self.routed.len());
        let routes = self.routes(x)?;
        let mut d_x = vec![0.0; grad.len()];
        // Of the weights of the chosen, `[tokens, experts]`.
        let mut d_weight = vec![0.0f32; routes.probabilities.len()];
        for (index, tokens) in routes.tokens.iter().enumerate().filter(|(_, tokens)| !tokens.is_empty()) {
            let (own, expert) = (self.read(x, tokens)?, Expert::Routed(index as u16));
            let mut d_y = Vec::with_capacity(tokens.len() * hidden);
            for &(token, weight) in tokens {
                let [_, weight] = self.sides(weight);
                d_y.extend(grad[token * hidden..][..hidden].iter().map(|g| g * weight));
            }
            let (y, d_own) = self.mlp_backward(expert, &own, &d_y, parameters.as_deref_mut())?;
            let (y, all, d_own) = (values(&y)?, values(x)?, d_own.chunks_exact(hidden));
            for ((&(token, weight), y), d_own) in tokens.iter().zip(y.chunks_exact(hidden)).zip(d_own) {
                let at = token * hidden..(token + 1) * hidden;
                d_weight[token * experts + index] = match self.weighing {
                    Weighing::Sigmoid => dot(d_own, &all[at.clone()]),
                    _ => dot(&grad[at.clone()], y),
                };
                let [weight, _] = self.sides(weight);
                d_x[at].iter_mut().zip(d_own).for_each(|(d, own)| *d += weight * own);
            }
        }
        let d_scores = self.through_choice(&routes, d_weight);
        add_product(&d_scores, &self.router, &mut d_x)?;
        if let Some(shared) = &self.shared {
            let weights = shared.weights(x)?;
            let scaled = grad.chunks_exact(hidden).zip(&weights).flat_map(|(g, w)| g.iter().map(move |g| g * w));
            let d_y: Vec<f32> = scaled.collect();
            let (y, d_own) = self.mlp_backward(Expert::Shared, x, &d_y, parameters)?;
            accumulate(&mut d_x, &d_own);
            if let Some(gate) = &shared.gate {
                let y = values(&y)?;
                let rows = grad.chunks_exact(hidden).zip(y.chunks_exact(hidden)).zip(&weights);
                let d_gate: Vec<f32> = rows.map(|((g, y), w)| dot(g, y) * w * (1.0 - w)).collect();
                add_product(&d_gate, gate, &mut d_x)?;
            }
        }
        Ok(d_x)
    }

    /// What an expert makes of `x`, and the gradient of `x` from that.
    fn mlp_backward(
        &self,
        expert: Expert,
        x: &Tensor,
        grad: &[f32],
        mut parameters: Option<&mut BTreeMap<Role, Vec<f32>>>,
    ) -> Result<(Tensor, Vec<f32>), Error> {
        let Some(mlp) = self.mlp(expert) else { unreachable!("only experts that are there are walked through") };
        let (gate, up) = mlp.branches(x)?;
        let inner = gated(self.act, Some(gate.copy()?), up.clone())?;
        let y = mlp.down.forward(&inner)?;
        let [gate_role, up_role, down_role] = Role::of_expert(expert);
        let mut through = |role: Role, linear: &Linear, grad: &[f32], x: &Tensor| {
            let into = parameters.as_deref_mut().and_then(|p| p.get_mut(&role)).map(Vec::as_mut_slice);
            backward_linear(linear.weight(), grad, x, into)
        };
        let d_inner = through(down_role, &mlp.down, grad, &inner)?;
        let (d_gate, d_up) = gated_backward(self.act, &values(&gate)?, &values(&up)?, &d_inner);
        let mut d_x = through(gate_role, &mlp.gate, &d_gate, x)?;
        accumulate(&mut d_x, &through(up_role, &mlp.up, &d_up, x)?);
        Ok((y, d_x))
    }

    /// From the gradients of the weights of the chosen to those of the router's scores, `[tokens, experts]`.
    fn through_choice(&self, routes: &Routes, mut grad: Vec<f32>) -> Vec<f32> {
        let experts = self.routed.len();
        if self.weighing == Weighing::Sigmoid {
            grad.iter_mut().zip(&routes.probabilities).for_each(|(g, p)| *g *= p * (1.0 - p));
            return grad;
        }
        if self.weighing == Weighing::Share {
            // w_i = p_i / Σ p over the chosen.
            let (mut sums, mut means) = (vec![0.0f32; grad.len() / experts], vec![0.0f32; grad.len() / experts]);
            for (e, tokens) in routes.tokens.iter().enumerate() {
                for &(token, weight) in tokens {
                    sums[token] += routes.probabilities[token * experts + e];
                    means[token] += weight * grad[token * experts + e];
                }
            }
            for (e, tokens) in routes.tokens.iter().enumerate() {
                for &(token, _) in tokens {
                    let g = &mut grad[token * experts + e];
                    *g = (*g - means[token]) / sums[token];
                }
            }
        }
        for (grad, p) in grad.chunks_exact_mut(experts).zip(routes.probabilities.chunks_exact(experts)) {
            let mean = dot(grad, p);
            grad.iter_mut().zip(p).for_each(|(g, p)| *g = p * (*g - mean));
        }
        grad
    }
}

impl Gated {
    fn branches(&self, x: &Tensor) -> Result<(Tensor, Tensor), Error> {
        let [gate, up] = Linear::forward_all([&self.gate, &self.up], x)?;
        Ok((gate, up))
    }

    /// What Down reads.
    fn inner(&self, act: Act, x: &Tensor) -> Result<Tensor, Error> {
        let (gate, up) = self.branches(x)?;
        gated(act, Some(gate), up)
    }

    fn forward(&self, act: Act, x: &Tensor) -> Result<Tensor, Error> {
        self.down.forward(&self.inner(act, x)?)
    }
}

impl Shared {
    /// How much of it counts for each token.
    fn weights(&self, x: &Tensor) -> Result<Vec<f32>, Error> {
        let Some(gate) = &self.gate else { return Ok(vec![1.0; x.dim(0)?]) };
        let scores = ops::product(x, gate)?;
        Ok(values(&scores)?.iter().map(|&s| sigmoid(s)).collect())
    }
}

impl Block {
    /// How the site `mlp_in`, `x [tokens, hidden]`, is dealt out to experts; `None` where the block has none.
    ///
    /// # Errors
    /// [`Error::Tensor`] when `x` has another width.
    pub fn routes(&self, x: &Tensor) -> Result<Option<Routes>, Error> {
        self.experts.as_ref().map(|experts| experts.routes(x)).transpose()
    }

    /// What an expert reads of rows `x [tokens, hidden]` of the site `mlp_in` that go to it: these, or weighted ones.
    ///
    /// # Errors
    /// [`Error::Tensor`] when `x` has another width.
    pub fn expert_input(&self, expert: Expert, x: Tensor) -> Result<Tensor, Error> {
        let (Some(experts), Expert::Routed(index)) = (&self.experts, expert) else { return Ok(x) };
        if experts.weighing != Weighing::Sigmoid {
            return Ok(x);
        }
        let scores = ops::product(&x, &experts.router.narrow(0, usize::from(index), 1)?)?;
        let weights = values(&scores)?.iter().map(|&s| sigmoid(s)).collect();
        let own = x.force_contiguous()?;
        experts.weigh(&own, weights)?;
        Ok(own)
    }

    /// What Down of an expert reads, `[tokens, expert width]`, of what the expert does ([`Block::expert_input`]).
    ///
    /// # Errors
    /// [`Error::Tensor`] when `x` has another width.
    ///
    /// # Panics
    /// Where the block has no such expert ([`ModelSpec::routed`]).
    pub fn expert_inner(&self, expert: Expert, x: &Tensor) -> Result<Tensor, Error> {
        match self.experts.as_ref().and_then(|experts| experts.mlp(expert)) {
            Some(mlp) => mlp.inner(self.act, x),
            None => panic!("this block has no expert {expert:?}"),
        }
    }
}

/// `act(gate) · up`, in the memory of `gate` where that can be, or `act(up)` without a gate.
pub(crate) fn gated(act: Act, gate: Option<Tensor>, up: Tensor) -> Result<Tensor, Error> {
    let activate = |x: &Tensor| match act {
        Act::Silu => x.silu(),
        Act::Gelu => x.gelu_erf(),
        Act::GeluTanh => x.gelu(),
        Act::Relu => x.relu(),
    };
    let Some(gate) = gate else { return Ok(activate(&up)?) };
    if act == Act::Silu {
        ops::silu_mul(&gate, &up)?;
        return Ok(gate);
    }
    let gate = activate(&gate)?;
    ops::mul(&gate, &up)?;
    Ok(gate)
}

fn rows_of(x: &Tensor, tokens: &[(usize, f32)]) -> Result<Tensor, Error> {
    let index: Vec<u32> = tokens.iter().map(|(token, _)| *token as u32).collect();
    Ok(x.index_select(&Tensor::from_vec(index, tokens.len(), &Device::Cpu)?, 0)?)
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Adds `grad [tokens, out] · weight [out, in]` to `sum [tokens, in]`.
fn add_product(grad: &[f32], weight: &Tensor, sum: &mut [f32]) -> Result<(), Error> {
    let (out, inner) = weight.dims2()?;
    let tokens = grad.len() / out;
    let weight = values(weight)?;
    let product = (View::new(grad, tokens, out, out), View::new(&weight, out, inner, inner));
    gemm(1.0, product.0, product.1, 1.0, &mut ViewMut::new(sum, tokens, inner, inner));
    Ok(())
}

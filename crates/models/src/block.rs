//! One block: its weights, and its execution in five pieces that meet at the sites.

use crate::attention::{Past, Scoring, Sight};
use crate::backward::{Heads, values};
use crate::experts::{Experts, gated};
use crate::linear::{Linear, Matrix};
use crate::norm::{Norm, load_weight};
use crate::{Act, Error, ModelSpec, NormRole, Pairs, QkNorm, Role, RopeTable, Tempering, Weights, attention, ops};
use bitmill_kernels::{Brain, Short};
use bitmill_scheme::{Activations, Inputs};
use candle_core::{DType, Device, Tensor};
use std::ops::Range;

/// The weights of one block, f32.
///
/// Pre-norm and post-norm, gated and plain, sequential and parallel, causal and bidirectional blocks differ in which parts
/// are there, not in code.
///
/// A caller may stop after any piece, look at the activation, replace the linears it feeds and go on from there:
/// ```text
/// x = attn_in(h)                  Q K V read x
/// x = attn_out(x, rope)           O reads x
/// (h, x) = mlp_in(h, x)           Gate Up read x
/// x = mlp_out(x)                  Down reads x
/// h = finish(h, x)
/// ```
/// Where experts stand in the place of the MLP, each reads rows of `mlp_in` of its own, so `mlp_out` hands that on, and
/// `finish` runs them ([`crate::Routes`]).
/// A plain MLP has no Gate; some architectures store Q, K and V, or Gate and Up, as one linear.
/// All activations are `[tokens, width]` of one window. Cloning shares the tensors.
#[derive(Debug, Clone)]
pub struct Block {
    /// By role, those outside of experts.
    pub(crate) linears: [Option<Linear>; 9],
    /// In the place of the MLP.
    pub(crate) experts: Option<Experts>,
    /// Where Q, K and V, and Gate and Up, lie in the outputs of the linears that store them together.
    pub(crate) shares: Shares,
    /// By role; an architecture has some of them.
    pub(crate) norms: [Option<Norm>; 6],
    pub(crate) qk_norms: Option<[Tensor; 2]>,
    /// Which channels are rotated together.
    pub(crate) pairs: Pairs,
    /// A factor of queries that grows with their position.
    pub(crate) tempering: Option<Tempering>,
    pub(crate) group: usize,
    pub(crate) head_dim: usize,
    pub(crate) scoring: Scoring,
    pub(crate) act: Act,
    pub(crate) eps: f32,
    /// Whether the MLP reads what the attention reads.
    pub(crate) parallel: bool,
    /// Factor of what attention and MLP add to the residual stream.
    pub(crate) residual: f32,
    /// Scales of keys and values, where they are kept as 8-bit floats.
    pub(crate) cache: Option<[f32; 2]>,
    /// How attention multiplies: in bfloat16, or in f32.
    pub(crate) short: Option<Short>,
    /// Which block of the model it is.
    pub(crate) index: usize,
}

/// What the tokens of a window so far leave for the attention of those to come.
#[derive(Debug)]
pub struct WindowPast {
    past: Option<Past>,
    short: Short,
}

/// Channels of parts that one linear puts out; `None` where each part has a linear of its own.
#[derive(Debug, Clone)]
pub(crate) struct Shares {
    pub(crate) qkv: Option<[Vec<Range<usize>>; 3]>,
    pub(crate) gate_up: Option<[Vec<Range<usize>>; 2]>,
}

impl Block {
    /// Loads block `index`.
    ///
    /// # Errors
    /// A tensor that is missing, unreadable or of a shape other than the config's.
    pub fn load(spec: &ModelSpec, index: usize, weights: &dyn Weights) -> Result<Block, Error> {
        let mut linears = [const { None }; 9];
        for (role, module) in spec.block_linears(index) {
            if let Some(at) = role.index() {
                let how = (spec.has_bias(role), spec.layout.transposed);
                linears[at] = Some(Linear::load(weights, &module, spec.linear_shape(role), how)?);
            }
        }
        let mut norms = [const { None }; 6];
        for role in spec.block_norms(index) {
            norms[role as usize] = Some(Norm::load(spec, weights, &spec.norm_tensors(index, role))?);
        }
        let rotates = spec.ropes[index].is_some();
        let qk_norms = match spec.qk_widths() {
            Some(widths) => {
                let [q, k] = spec.qk_norms(index);
                Some([load_weight(spec, weights, &q, widths[0])?, load_weight(spec, weights, &k, widths[1])?])
            }
            None if spec.qk_norm == Some(QkNorm::Bare) && rotates => {
                let ones = Tensor::ones(spec.head_dim, DType::F32, &Device::Cpu)?;
                Some([ones.clone(), ones])
            }
            None => None,
        };
        let sight = match spec.windows.get(index).copied().flatten() {
            None if !spec.causal => Sight::All,
            Some(window) if !spec.causal => Sight::Around { window },
            Some(window) if spec.chunked => Sight::Stretch { window },
            window => Sight::Past { window: window.unwrap_or(usize::MAX) },
        };
        let scale = spec.factors.attention.unwrap_or_else(|| (spec.head_dim as f64).powf(-0.5));
        let rows = |role| spec.rows(role).1;
        Ok(Block {
            linears,
            experts: Experts::load(spec, index, weights)?,
            shares: Shares {
                qkv: spec.has(Role::Qkv).then(|| [Role::Q, Role::K, Role::V].map(rows)),
                gate_up: spec.has(Role::GateUp).then(|| [Role::Gate, Role::Up].map(rows)),
            },
            norms,
            qk_norms,
            pairs: spec.pairs,
            tempering: spec.tempering.filter(|_| !rotates),
            group: spec.group(),
            head_dim: spec.head_dim,
            scoring: Scoring { sight, scale: scale as f32, cap: spec.factors.attention_cap.map(|cap| cap as f32) },
            act: spec.act,
            eps: spec.norm_eps as f32,
            parallel: spec.parallel,
            residual: spec.factors.residual as f32,
            cache: weights.cache_scales(&spec.attention(index))?,
            short: None,
            index,
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

    /// Nothing of a window yet, where [`Block::attn_out`] can be had part by part ([`Block::attn_part`]): where no token sees what
    /// comes after it, products are in fewer bits, and queries do not grow with their position.
    #[must_use]
    pub fn begin_window(&self) -> Option<WindowPast> {
        let short = self.short.filter(|_| self.scoring.sight.is_causal() && self.tempering.is_none())?;
        Some(WindowPast { past: None, short })
    }

    /// [`Block::attn_out`] of the next tokens of a window of `tokens` in all: a multiple of 128, unless they are its last. What they
    /// leave for those to come is added to `past`.
    ///
    /// # Errors
    /// As [`Block::attn_out`].
    ///
    /// # Panics
    /// Where those before were no such multiple: a caller's bug.
    pub fn attn_part(
        &self,
        past: &mut WindowPast,
        x: &Tensor,
        rope: &RopeTable,
        tokens: usize,
    ) -> Result<Tensor, Error> {
        let (from, count) = (past.past.as_ref().map_or(0, Past::tokens), x.dim(0)?);
        let turns = match rope.of_block(self.index, tokens)? {
            Some((cos, sin)) => Some((cos.narrow(0, from, count)?, sin.narrow(0, from, count)?)),
            None => None,
        };
        let Heads { q, k, v, .. } = self.turned(x, turns.as_ref().map(|(cos, sin)| (cos, sin)))?;
        let past = past
            .past
            .get_or_insert_with(|| Past::new(past.short, v.elem_count() / count / self.head_dim, self.head_dim));
        past.add(&values(&k)?, &values(&v)?);
        let out = past.attend(&values(&q)?, self.group, self.scoring);
        let width = out.len() / count;
        Ok(Tensor::from_vec(out, (count, width), &Device::Cpu)?)
    }

    /// Queries, keys and values of the site `attn_in`.
    pub(crate) fn heads(&self, x: &Tensor, rope: &RopeTable) -> Result<Heads, Error> {
        self.turned(x, rope.of_block(self.index, x.dim(0)?)?)
    }

    /// The same with the cosines and sines `turns` of the rotation, where there is one.
    pub(crate) fn turned(&self, x: &Tensor, turns: Option<(&Tensor, &Tensor)>) -> Result<Heads, Error> {
        let [mut q, mut k, v] = self.read([Role::Q, Role::K, Role::V], (Role::Qkv, self.shares.qkv.as_ref()), x)?;
        let mut raw = None;
        if let Some([q_norm, k_norm]) = &self.qk_norms {
            let normed = [self.norm_heads(&q, q_norm)?, self.norm_heads(&k, k_norm)?];
            raw = Some([q, k]);
            [q, k] = normed;
        }
        let factors = self.tempers(q.dim(0)?);
        if !factors.is_empty() {
            let factors = Tensor::from_vec(factors, (q.dim(0)?, 1), &Device::Cpu)?;
            ops::mul(&q, &factors.broadcast_as(q.shape())?.contiguous()?)?;
        }
        let (q, k) = match turns {
            Some(turns) => {
                let rotate = |x: &Tensor, group| ops::rotate(x, turns, (self.head_dim, group), self.pairs);
                (rotate(&q, self.group)?, rotate(&k, 1)?)
            }
            None => (self.by_head(&q, self.group)?, self.by_head(&k, 1)?),
        };
        let (k, v) = self.kept(k, v.contiguous()?)?;
        Ok(Heads { raw, q, k, v })
    }

    /// Keys, as they are rotated, and values as they are kept for later queries.
    pub(crate) fn kept(&self, k: Tensor, v: Tensor) -> Result<(Tensor, Tensor), Error> {
        let Some(scales) = self.cache else { return Ok((k, v)) };
        let [k_scale, v_scale] = scales.map(|stored| Inputs { activations: Activations::StaticFp8, stored });
        Ok((ops::round_inputs(&k, k_scale)?, ops::round_inputs(&v, v_scale)?))
    }

    /// The largest magnitudes of the keys and the values at the site `attn_in`.
    ///
    /// # Errors
    /// As [`Block::attn_out`].
    pub fn cache_range(&self, x: &Tensor, rope: &RopeTable) -> Result<[f32; 2], Error> {
        let Heads { k, v, .. } = self.heads(x, rope)?;
        let most = |t: &Tensor| Ok::<_, Error>(values(t)?.iter().fold(0.0f32, |most, v| most.max(v.abs())));
        Ok([most(&k)?, most(&v)?])
    }

    /// Has keys and values rounded to 8-bit floats under these scales, or leaves them as they are.
    pub fn set_cache(&mut self, scales: Option<[f32; 2]>) {
        self.cache = scales;
    }

    /// The factors of the queries of the first `tokens` positions, where any is not 1.
    pub(crate) fn tempers(&self, tokens: usize) -> Vec<f32> {
        let Some(tempering) = self.tempering else { return Vec::new() };
        // They grow: where the last is 1, all are.
        match tokens.checked_sub(1).map(|last| tempering.factor(last)) {
            None | Some(1.0) => Vec::new(),
            Some(_) => (0..tokens).map(|position| tempering.factor(position)).collect(),
        }
    }

    /// What the linears `parts` make of `x`, be it that one linear stores them all, each its share of the output.
    pub(crate) fn read<const N: usize>(
        &self,
        parts: [Role; N],
        (together, shares): (Role, Option<&[Vec<Range<usize>>; N]>),
        x: &Tensor,
    ) -> Result<[Tensor; N], Error> {
        let Some(shares) = shares else { return Linear::forward_all(parts.map(|role| self.at(role)), x) };
        let y = self.at(together).forward(x)?;
        let outputs = shares.iter().map(|ranges| Ok(ops::channels(&y, ranges)?)).collect::<Result<Vec<_>, Error>>()?;
        match outputs.try_into() {
            Ok(outputs) => Ok(outputs),
            Err(_) => unreachable!("there is one output for every part"),
        }
    }

    /// From queries, keys and values to the site `attn_out`.
    pub(crate) fn attend(&self, Heads { q, k, v, .. }: &Heads) -> Result<Tensor, Error> {
        Ok(attention::attend(q, k, v, self.scoring, self.short)?)
    }

    /// How much every token is attended to at the site `attn_in`, over all heads and queries, `[tokens]`.
    ///
    /// # Errors
    /// As [`Block::attn_out`].
    pub fn concentration(&self, x: &Tensor, rope: &RopeTable) -> Result<Vec<f32>, Error> {
        let Heads { q, k, .. } = self.heads(x, rope)?;
        attention::concentration(&q, &k, self.scoring)
    }

    /// Adds the attention's output to `h` and goes on to the site `mlp_in`; returns both, `[tokens, hidden]`.
    ///
    /// # Errors
    /// [`Error::Tensor`] on a weight of another shape.
    pub fn mlp_in(&self, h: &Tensor, x: &Tensor) -> Result<(Tensor, Tensor), Error> {
        let sum = self.joined(h, self.at(Role::O).forward(x)?, NormRole::AttnOutput)?;
        let middle = self.normed(NormRole::AttnResidual, &sum)?;
        let x = self.normed(NormRole::PostAttention, if self.parallel { h } else { &middle })?;
        Ok((middle, x))
    }

    /// From the site `mlp_in` to the site `mlp_out`, `[tokens, intermediate]`; where there are experts, `x` as it is.
    ///
    /// # Errors
    /// [`Error::Tensor`] on a weight of another shape.
    pub fn mlp_out(&self, x: &Tensor) -> Result<Tensor, Error> {
        if self.experts.is_some() {
            return Ok(x.contiguous()?);
        }
        let (gate, up) = self.branches(x)?;
        gated(self.act, gate, up)
    }

    /// Whether what [`Block::mlp_out`] returns can be had in [strips](Block::mlp_strips).
    #[must_use]
    pub fn has_strips(&self) -> bool {
        let parts = [Role::Gate, Role::Up].map(|role| self.part(role));
        let [Some(gate), Some(up)] = parts else { return false };
        self.act == Act::Silu && self.experts.is_none() && Linear::have_strips([gate, up])
    }

    /// [`Block::mlp_out`] in strips of columns, from the left to the right: `take` gets the columns of each, and its entries,
    /// `[tokens, columns]`. On the calling thread, for tokens few enough to stay in a cache of its core.
    ///
    /// # Errors
    /// As [`Block::mlp_out`].
    ///
    /// # Panics
    /// Where it does not [have them](Block::has_strips).
    pub fn mlp_strips(&self, x: &Tensor, take: &mut dyn FnMut(Range<usize>, &[f32])) -> Result<(), Error> {
        Linear::gated_strips([self.at(Role::Gate), self.at(Role::Up)], x, take)
    }

    /// The branches of the MLP before the activation, `[tokens, intermediate]`: gate, where there is one, and up.
    pub(crate) fn branches(&self, x: &Tensor) -> Result<(Option<Tensor>, Tensor), Error> {
        let shares = self.shares.gate_up.as_ref();
        if shares.is_none() && self.part(Role::Gate).is_none() {
            return Ok((None, self.at(Role::Up).forward(x)?));
        }
        let [gate, up] = self.read([Role::Gate, Role::Up], (Role::GateUp, shares), x)?;
        Ok((Some(gate), up))
    }

    /// What Down, or all experts, make of the site `mlp_out`.
    pub(crate) fn mlp_output(&self, x: &Tensor) -> Result<Tensor, Error> {
        match &self.experts {
            Some(experts) => experts.forward(x),
            None => self.at(Role::Down).forward(x),
        }
    }

    /// Adds the MLP's output to the `h` of [`Block::mlp_in`]: the residual stream after the block.
    ///
    /// # Errors
    /// [`Error::Tensor`] on a weight of another shape.
    pub fn finish(&self, h: &Tensor, x: &Tensor) -> Result<Tensor, Error> {
        let sum = self.joined(h, self.mlp_output(x)?, NormRole::MlpOutput)?;
        self.normed(NormRole::MlpResidual, &sum)
    }

    /// The residual stream plus what attention or MLP put out, `y`, through the norm at `role` where there is one; `y` is
    /// fresh memory, and may become the sum.
    pub(crate) fn joined(&self, h: &Tensor, y: Tensor, role: NormRole) -> Result<Tensor, Error> {
        let y = if self.norms[role as usize].is_some() { self.normed(role, &y)? } else { y };
        if self.residual != 1.0 {
            ops::scale(&y, self.residual)?;
        }
        ops::add(&y, &h.contiguous()?)?;
        Ok(y)
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
    /// Like all access by role: where the block has no such part, which [`ModelSpec::has`] and
    /// [`ModelSpec::block_norms`] tell.
    #[must_use]
    pub fn linear(&self, role: Role) -> &Tensor {
        self.at(role).weight()
    }

    /// Replaces the weight of a linear by one of the same shape `[out, in]`, f32 on the CPU.
    pub fn set_linear(&mut self, role: Role, weight: Tensor) {
        self.at_mut(role).set(Matrix::Dense(weight));
    }

    /// Drops a linear that no piece to come runs through.
    pub fn forget(&mut self, role: Role) {
        if let Some(at) = role.index() {
            self.linears[at] = None;
        }
    }

    /// Has dense linears multiply in fewer bits with sums in f32, or, with `None`, in f32. Attention multiplies in bfloat16 then,
    /// where there is such an instruction: its weights are not to be rounded further.
    pub fn multiply_by(&mut self, short: Option<Short>) {
        self.short = short.and_then(|_| Brain::here()).map(Short::Bf16);
        let roles: Vec<Role> = self.roles().collect();
        roles.into_iter().for_each(|role| self.at_mut(role).multiply_by(short));
    }

    /// Which block of the model it is.
    #[must_use]
    pub fn index(&self) -> usize {
        self.index
    }

    /// Whether linears of `roles`, if it has them all, are as well off with an input in bfloat16: they round it to that, or to less.
    #[must_use]
    pub fn reads_rounded(&self, roles: &[Role]) -> bool {
        roles.iter().all(|&role| self.part(role).is_some_and(Linear::rounds))
    }

    /// Lays the weights of `roles` out for products, by all threads: otherwise the first to multiply by one does it, and several
    /// may be the first.
    ///
    /// # Errors
    /// [`Error::Tensor`] on a weight of another shape.
    pub fn prepare(&self, roles: &[Role]) -> Result<(), Error> {
        let mut there = roles.iter().filter_map(|role| self.linears[role.index()?].as_ref());
        there.try_for_each(Linear::prepare)
    }

    /// Linears whose weight is in memory as f32.
    #[must_use]
    pub fn expanded(&self) -> usize {
        self.roles().filter(|&role| matches!(self.at(role).matrix, Matrix::Dense(_))).count()
    }

    /// Bytes of the linears' weights in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let of = |role| match &self.at(role).matrix {
            Matrix::Dense(weight) => 4 * weight.elem_count(),
            Matrix::Packed(packed) => packed.bytes(),
        };
        self.roles().map(of).sum()
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
    pub fn inputs(&self, role: Role) -> Inputs {
        self.at(role).inputs
    }

    /// Changes how the input of a linear is rounded.
    pub fn set_inputs(&mut self, role: Role, inputs: Inputs) {
        self.at_mut(role).inputs = inputs;
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

    /// `x [tokens, kv_heads · group · head_dim]` gathered by key-value head as [`ops::rotate`] does, without rotating.
    pub(crate) fn by_head(&self, x: &Tensor, group: usize) -> Result<Tensor, Error> {
        let (tokens, dim) = (x.dim(0)?, self.head_dim);
        let heads = x.reshape((tokens, (), group * dim))?.transpose(0, 1)?.contiguous()?;
        Ok(heads.reshape(((), tokens * group, dim))?)
    }

    /// Norms `x [tokens, n · head_dim]`, head by head or all heads together, as the weight is wide.
    pub(crate) fn norm_heads(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor, Error> {
        let rows = x.reshape(((), weight.dim(0)?))?;
        Ok(ops::rms_norm(&rows, weight, self.eps)?.reshape(x.shape())?)
    }

    /// Every linear it has, in the order of [`Role`].
    pub(crate) fn roles(&self) -> impl Iterator<Item = Role> {
        let experts = self.experts.iter().flat_map(Experts::all).flat_map(Role::of_expert);
        Role::ALL.into_iter().filter(|&role| self.part(role).is_some()).chain(experts)
    }

    fn part(&self, role: Role) -> Option<&Linear> {
        match (role.index(), &self.experts) {
            (Some(at), _) => self.linears[at].as_ref(),
            (None, Some(experts)) => experts.linear(role),
            (None, None) => None,
        }
    }

    pub(crate) fn at(&self, role: Role) -> &Linear {
        match self.part(role) {
            Some(linear) => linear,
            None => panic!("this block has no {role:?}"),
        }
    }

    fn at_mut(&mut self, role: Role) -> &mut Linear {
        let linear = match (role.index(), &mut self.experts) {
            (Some(at), _) => self.linears[at].as_mut(),
            (None, Some(experts)) => experts.linear_mut(role),
            (None, None) => None,
        };
        match linear {
            Some(linear) => linear,
            None => panic!("this block has no {role:?}"),
        }
    }
}

#[cfg(test)]
mod tests;

//! Attention inside one window: causal, or of every token to every other.
//!
//! The query heads of a group are stacked into one matrix against their shared keys, so keys and values are never
//! repeated. Tokens go in chunks, each against only the keys its tokens can see: the scores of a chunk stay in cache, no
//! mask exists, and the half above the diagonal is mostly not computed.

use crate::backward::values;
use crate::ops::{floats, softmax};
use bitmill_kernels::{Short, View, ViewMut, gemm};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;
use std::ops::Range;

mod short;

pub(crate) use short::Past;

/// Rows of scores computed at once: enough for an efficient product, few enough that the diagonal wastes little.
const ROWS: usize = 256;

/// Attends `q [kv_heads, tokens · group, head_dim]`, rows in order of token, then head, to
/// `k [kv_heads, tokens, head_dim]` and `v [tokens, kv_heads · head_dim]`; returns `[tokens, kv_heads · group · head_dim]`.
/// Every token mixes the values of what it sees. With `short` products are of what they are of in fewer bits.
pub(crate) fn attend(q: &Tensor, k: &Tensor, v: &Tensor, scoring: Scoring, short: Option<Short>) -> Result<Tensor> {
    q.apply_op3_no_bwd(k, &v.contiguous()?, &Attention { scoring, short })
}

/// How queries and keys become weights.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scoring {
    pub(crate) sight: Sight,
    /// Factor of their products.
    pub(crate) scale: f32,
    /// Bound `c` of the scaled products, which go through `c · tanh(x / c)`.
    pub(crate) cap: Option<f32>,
}

impl Scoring {
    /// Soft-max of one query's products with the keys it sees, in place.
    pub(crate) fn weigh(&self, products: &mut [f32]) {
        let scale = self.bounded(products);
        softmax(products, scale);
    }

    /// Bounds one query's products, in place, where they have a bound; returns the factor that is left to apply.
    fn bounded(&self, products: &mut [f32]) -> f32 {
        let Some(cap) = self.cap else { return self.scale };
        cap_scores(products, self.scale, cap);
        1.0
    }
}

/// `c · tanh(scale · x / c)`, in place.
pub(crate) fn cap_scores(x: &mut [f32], scale: f32, cap: f32) {
    x.iter_mut().for_each(|x| *x = cap * (scale * *x / cap).tanh());
}

/// What a token sees.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Sight {
    /// Itself and what came before it, `window` tokens in all.
    Past { window: usize },
    /// Itself and what came before it in a stretch of `window` tokens that begins at a multiple of that.
    Stretch { window: usize },
    /// Fewer than `window` tokens away, before or behind, and itself.
    Around { window: usize },
    /// Everything.
    All,
}

impl Sight {
    /// Whether nothing is seen before it comes.
    pub(crate) fn is_causal(self) -> bool {
        matches!(self, Sight::Past { .. } | Sight::Stretch { .. })
    }

    /// The tokens that `token` of `tokens` sees.
    pub(crate) fn of(self, token: usize, tokens: usize) -> Range<usize> {
        match self {
            Sight::Past { window } => (token + 1).saturating_sub(window)..token + 1,
            Sight::Stretch { window } => token / window * window..token + 1,
            Sight::Around { window } => (token + 1).saturating_sub(window)..tokens.min(token.saturating_add(window)),
            Sight::All => 0..tokens,
        }
    }
}

struct Attention {
    scoring: Scoring,
    short: Option<Short>,
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((kv_heads, tokens, dim), (_, rows, _)) = (k_layout.shape().dims3()?, q_layout.shape().dims3()?);
        let group = rows / tokens.max(1);
        if q_layout.dims() != [kv_heads, tokens * group, dim] || v_layout.dims() != [tokens, kv_heads * dim] {
            bail!(
                "attention: queries {:?}, keys {:?}, values {:?}",
                q_layout.shape(),
                k_layout.shape(),
                v_layout.shape()
            );
        }
        let inputs = Inputs {
            q: floats(q, q_layout)?,
            k: floats(k, k_layout)?,
            v: floats(v, v_layout)?,
            kv_heads,
            tokens,
            dim,
            group,
        };
        let width = kv_heads * group * dim;
        let out = match self.short {
            Some(short) => {
                let mut past = Past::new(short, kv_heads, dim);
                past.add(inputs.k, inputs.v);
                past.attend(inputs.q, group, self.scoring)
            }
            None => {
                let chunk = (ROWS / group.max(1)).max(32);
                let mut out = vec![0.0f32; tokens * width];
                out.par_chunks_mut((chunk * width).max(1))
                    .enumerate()
                    .for_each(|(i, out)| inputs.attend(i * chunk, self.scoring, out));
                out
            }
        };
        Ok((CpuStorage::F32(out), (tokens, width).into()))
    }
}

struct Inputs<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    kv_heads: usize,
    tokens: usize,
    dim: usize,
    group: usize,
}

impl Inputs<'_> {
    /// Fills `out`, the rows of the tokens from `begin` on.
    fn attend(&self, begin: usize, scoring: Scoring, out: &mut [f32]) {
        let Inputs { kv_heads, tokens, dim, group, .. } = *self;
        let (width, row, sight) = (kv_heads * group * dim, group * dim, scoring.sight);
        let end = begin + out.len() / width;
        // Sight moves on with the token, so the first of the chunk sees the oldest key and the last the newest.
        let (oldest, newest) = (sight.of(begin, tokens).start, sight.of(end - 1, tokens).end);
        let (rows, keys) = ((end - begin) * group, newest - oldest);
        let (mut scores, mut mixed) = (vec![0.0f32; rows * keys], vec![0.0f32; rows * dim]);
        for head in 0..kv_heads {
            let q = View::new(&self.q[(head * tokens + begin) * row..], rows, dim, dim);
            let k = View::new(&self.k[(head * tokens + oldest) * dim..], keys, dim, dim);
            let v = View::new(&self.v[oldest * kv_heads * dim + head * dim..], keys, dim, kv_heads * dim);
            self.weights(q, k, begin, (oldest, scoring), &mut scores);
            let scores = View::new(&scores, rows, keys, keys);
            gemm(1.0, scores, v, 0.0, &mut ViewMut::new(&mut mixed, rows, dim, dim));
            for (out, mixed) in out.chunks_exact_mut(width).zip(mixed.chunks_exact(row)) {
                out[head * row..][..row].copy_from_slice(mixed);
            }
        }
    }
}

/// How much every token is attended to: the sum over heads and queries of the weights in [`attend`], `[tokens]`.
pub(crate) fn concentration(q: &Tensor, k: &Tensor, scoring: Scoring) -> std::result::Result<Vec<f32>, crate::Error> {
    let (kv_heads, tokens, dim) = k.dims3()?;
    let group = q.dim(1)? / tokens.max(1);
    let (q, k) = (values(q)?, values(k)?);
    let inputs = Inputs { q: &q, k: &k, v: &[], kv_heads, tokens, dim, group };
    let sight = scoring.sight;
    let (mut sum, chunk, row) = (vec![0.0f64; tokens], (ROWS / group.max(1)).max(32), group * dim);
    for begin in (0..tokens).step_by(chunk) {
        let end = tokens.min(begin + chunk);
        let (oldest, newest) = (sight.of(begin, tokens).start, sight.of(end - 1, tokens).end);
        let (rows, keys) = ((end - begin) * group, newest - oldest);
        let mut weights = vec![0.0f32; rows * keys];
        for head in 0..kv_heads {
            let q = View::new(&inputs.q[(head * tokens + begin) * row..], rows, dim, dim);
            let k = View::new(&inputs.k[(head * tokens + oldest) * dim..], keys, dim, dim);
            inputs.weights(q, k, begin, (oldest, scoring), &mut weights);
            for weights in weights.chunks_exact(keys) {
                sum[oldest..newest].iter_mut().zip(weights).for_each(|(s, &w)| *s += f64::from(w));
            }
        }
    }
    Ok(sum.into_iter().map(|s| s as f32).collect())
}

/// Gradients of `q`, `k` and `v`, laid out as they are in [`attend`], from `out`, what that returned for them, and
/// `grad`, the gradient of it. The weights of the mix are computed again, a chunk of tokens at a time.
pub(crate) fn backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    out: &Tensor,
    grad: &[f32],
    scoring: Scoring,
) -> std::result::Result<Gradients, crate::Error> {
    let (kv_heads, tokens, dim) = k.dims3()?;
    let group = q.dim(1)? / tokens.max(1);
    let (q, k, v, out) = (values(q)?, values(k)?, values(v)?, values(out)?);
    let inputs = Inputs { q: &q, k: &k, v: &v, kv_heads, tokens, dim, group };
    let mut gradients = Gradients { q: vec![0.0; q.len()], k: vec![0.0; k.len()], v: vec![0.0; v.len()] };
    let chunk = (ROWS / group.max(1)).max(32);
    for begin in (0..tokens).step_by(chunk) {
        let tokens = begin..tokens.min(begin + chunk);
        inputs.attend_backward(tokens, scoring, &out, grad, &mut gradients);
    }
    Ok(gradients)
}

/// Gradients of the three inputs of [`attend`], each laid out as it.
pub(crate) struct Gradients {
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
}

impl Inputs<'_> {
    /// Adds what the queries of a chunk of tokens contribute. With P the weights, O = PV, and S the scaled scores:
    /// dV = PᵀdO, dP = dO·Vᵀ, dS = P ∘ (dP − rowsum(dO ∘ O)), dQ = scale·dS·K, dK = scale·dSᵀ·Q. A bound c on the scores
    /// takes dS times 1 − tanh²(S/c).
    fn attend_backward(&self, chunk: Range<usize>, scoring: Scoring, out: &[f32], grad: &[f32], into: &mut Gradients) {
        let Inputs { kv_heads, tokens, dim, group, .. } = *self;
        let (width, row, Scoring { sight, scale, cap }) = (kv_heads * group * dim, group * dim, scoring);
        let (oldest, newest) = (sight.of(chunk.start, tokens).start, sight.of(chunk.end - 1, tokens).end);
        let (rows, keys) = (chunk.len() * group, newest - oldest);
        let (mut p, mut d) = (vec![0.0f32; rows * keys], vec![0.0f32; rows * keys]);
        let (mut d_out, mut along) = (vec![0.0f32; rows * dim], vec![0.0f32; rows]);
        for head in 0..kv_heads {
            let at = |token: usize| token * width + head * row;
            for (i, token) in chunk.clone().enumerate() {
                d_out[i * row..(i + 1) * row].copy_from_slice(&grad[at(token)..][..row]);
                for (j, along) in along[i * group..(i + 1) * group].iter_mut().enumerate() {
                    let range = at(token) + j * dim..at(token) + (j + 1) * dim;
                    *along = grad[range.clone()].iter().zip(&out[range]).map(|(a, b)| a * b).sum();
                }
            }
            let first_query = (head * tokens + chunk.start) * row;
            let first_key = (head * tokens + oldest) * dim;
            let first_value = oldest * kv_heads * dim + head * dim;
            let q = View::new(&self.q[first_query..], rows, dim, dim);
            let k = View::new(&self.k[first_key..], keys, dim, dim);
            let v = View::new(&self.v[first_value..], keys, dim, kv_heads * dim);
            self.weights(q, k, chunk.start, (oldest, scoring), &mut p);
            let grad = View::new(&d_out, rows, dim, dim);
            gemm(1.0, grad, v.t(), 0.0, &mut ViewMut::new(&mut d, rows, keys, keys));
            for ((d, p), along) in d.chunks_exact_mut(keys).zip(p.chunks_exact(keys)).zip(&along) {
                d.iter_mut().zip(p).for_each(|(d, p)| *d = p * (*d - along));
            }
            if let Some(cap) = cap {
                // The products once more: where the weights are zero, their slope does not matter.
                let mut products = vec![0.0f32; rows * keys];
                gemm(1.0, q, k.t(), 0.0, &mut ViewMut::new(&mut products, rows, keys, keys));
                let slope = |x: f32| 1.0 - (scale * x / cap).tanh().powi(2);
                d.iter_mut().zip(&products).for_each(|(d, &x)| *d *= slope(x));
            }
            let (p, d) = (View::new(&p, rows, keys, keys), View::new(&d, rows, keys, keys));
            let d_v = &mut into.v[first_value..];
            gemm(1.0, p.t(), grad, 1.0, &mut ViewMut::new(d_v, keys, dim, kv_heads * dim));
            gemm(scale, d, k, 0.0, &mut ViewMut::new(&mut into.q[first_query..], rows, dim, dim));
            gemm(scale, d.t(), q, 1.0, &mut ViewMut::new(&mut into.k[first_key..], keys, dim, dim));
        }
    }

    /// Weights `[rows, keys]` with which a chunk of queries, of tokens from `begin` on, mixes the values from `oldest`.
    fn weights(
        &self,
        q: View<'_, f32>,
        k: View<'_, f32>,
        begin: usize,
        (oldest, scoring): (usize, Scoring),
        p: &mut [f32],
    ) {
        let keys = k.rows();
        gemm(1.0, q, k.t(), 0.0, &mut ViewMut::new(p, q.rows(), keys, keys));
        for (i, scores) in p.chunks_exact_mut(keys).enumerate() {
            let seen = scoring.sight.of(begin + i / self.group, self.tokens);
            let (first, past) = (seen.start - oldest, seen.end - oldest);
            scores[..first].fill(0.0);
            scoring.weigh(&mut scores[first..past]);
            scores[past..].fill(0.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitmill_kernels::Brain;
    use candle_core::{DType, Device};

    /// The definition, one query at a time in f64.
    fn naive(q: &[Vec<Vec<f32>>], k: &[Vec<Vec<f32>>], v: &[Vec<f32>], scoring: Scoring) -> Vec<Vec<f64>> {
        let (tokens, dim) = (v.len(), k[0][0].len());
        let group = q[0].len() / tokens;
        let attend = |token: usize, head: usize| {
            let (query, kv) = (&q[head / group][token * group + head % group], head / group);
            let sees = |t: usize| match scoring.sight {
                Sight::Past { window } => t <= token && token - t < window,
                Sight::Stretch { window } => t <= token && t / window == token / window,
                Sight::Around { window } => token.abs_diff(t) < window,
                Sight::All => true,
            };
            let seen: Vec<usize> = (0..tokens).filter(|&t| sees(t)).collect();
            let dot = |key: &[f32]| query.iter().zip(key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
            let score = |t: usize| {
                let scaled = dot(&k[kv][t]) * f64::from(scoring.scale);
                scoring.cap.map_or(scaled, |cap| f64::from(cap) * (scaled / f64::from(cap)).tanh())
            };
            let weights: Vec<f64> = seen.iter().map(|&t| score(t).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let mix = |c: usize| {
                seen.iter().zip(&weights).map(|(&t, w)| w * f64::from(v[t][kv * dim + c])).sum::<f64>() / sum
            };
            (0..dim).map(mix).collect::<Vec<f64>>()
        };
        (0..tokens).map(|token| (0..q.len() * group).flat_map(|head| attend(token, head)).collect()).collect()
    }

    #[test]
    fn attention_equals_its_definition() {
        let random = |shape: &[usize]| Tensor::randn(0f32, 1.5, shape, &Device::Cpu).unwrap();
        for (tokens, kv_heads, group, dim) in
            [(1, 1, 1, 2), (5, 2, 1, 4), (70, 1, 3, 6), (300, 2, 1, 8), (150, 1, 8, 4)]
        {
            let (q, k) = (random(&[kv_heads, tokens * group, dim]), random(&[kv_heads, tokens, dim]));
            let v = random(&[tokens, kv_heads * dim]);
            let past = [usize::MAX, 1, 3, 64, 1000].map(|window| Sight::Past { window });
            let around = [1, 3, 64, 1000].map(|window| Sight::Around { window });
            let stretches = [1, 3, 64, 1000].map(|window| Sight::Stretch { window });
            for sight in past.into_iter().chain(stretches).chain(around).chain([Sight::All]) {
                let cap = matches!(sight, Sight::Past { window: usize::MAX | 3 }).then_some(2.5);
                let scoring = Scoring { sight, scale: (dim as f32).powf(-0.5), cap };
                let got = attend(&q, &k, &v, scoring, None).unwrap();
                if let Some(short) = Brain::here().map(Short::Bf16) {
                    let rounded = |t: &Tensor| t.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
                    let [q, k, v] = [&q, &k, &v].map(rounded);
                    let exact = attend(&q, &k, &v, scoring, None).unwrap();
                    let found = attend(&q, &k, &v, scoring, Some(short)).unwrap();
                    let most = |t: Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                    // Weights are rounded by less than one part in 256, and sum to one.
                    assert!(most((exact - found).unwrap()) < most(v) / 256.0);
                }
                let got = got.to_vec2::<f32>().unwrap();
                let (q_of, k_of) = (q.clone(), k.clone());
                let (q, k, v) = (q.to_vec3().unwrap(), k.to_vec3().unwrap(), v.to_vec2().unwrap());
                let expected = naive(&q, &k, &v, scoring);
                // A token's share of all weights is what it gets of values that are one in it and zero elsewhere.
                let shares = concentration(&q_of, &k_of, scoring).unwrap();
                assert!((shares.iter().sum::<f32>() / (tokens * kv_heads * group) as f32 - 1.0).abs() < 1e-4);
                let marked = |t: usize| {
                    (0..tokens).map(|i| vec![f32::from(u8::from(i == t)); kv_heads * dim]).collect::<Vec<_>>()
                };
                let last = naive(&q, &k, &marked(tokens - 1), scoring);
                let share: f64 = last.iter().flatten().step_by(dim).sum();
                assert!((f64::from(shares[tokens - 1]) - share).abs() < 1e-4 * share.max(1.0));
                for (got, expected) in got.iter().flatten().zip(expected.iter().flatten()) {
                    assert!(
                        (f64::from(*got) - expected).abs() < 1e-5,
                        "{tokens} {kv_heads} {group} {dim} {sight:?}: {got} {expected}"
                    );
                }
            }
        }
    }
}

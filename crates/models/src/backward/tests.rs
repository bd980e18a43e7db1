//! The hand-written chain rule against candle's, on a block composed of candle's own elementary operations.

use super::*;
use crate::{Act, Head, ModelSpec, NormKind};
use candle_core::{D, Device, Var};
use serde_json::json;
use std::collections::BTreeMap;

/// Every bias, fewer heads for keys than for queries, and sizes that differ, in a block of the family of `model_type`.
fn spec(model_type: &str, act: Act, window: Option<usize>) -> ModelSpec {
    let heads = if model_type == "bert" { 3 } else { 6 };
    let mut config = json!({
        "model_type": model_type, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1, "vocab_size": 31,
        "num_attention_heads": heads, "num_key_value_heads": 2, "max_position_embeddings": 64, "attention_bias": true,
        "mlp_bias": true, "rope_theta": 100.0,
    });
    if model_type != "bert" {
        config["head_dim"] = json!(8);
    }
    ModelSpec { act, windows: vec![window], ..crate::spec(&config).unwrap() }
}

fn random(shape: &[usize], scale: f32) -> Tensor {
    Tensor::randn(0f32, scale, shape, &Device::Cpu).unwrap()
}

fn weights(spec: &ModelSpec) -> BTreeMap<String, Tensor> {
    let slots = spec.tensors().into_iter().filter(|slot| !slot.optional);
    slots.map(|slot| (slot.name, random(&slot.shape, 0.4))).collect()
}

/// The norms of the definition, by kind.
fn normed(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Tensor {
    let mean = |x: &Tensor| x.mean_keepdim(D::Minus1).unwrap();
    let x = if bias.is_some() { x.broadcast_sub(&mean(x)).unwrap() } else { x.clone() };
    let scale = (mean(&x.sqr().unwrap()) + eps).unwrap().sqrt().unwrap();
    let y = x.broadcast_div(&scale).unwrap().broadcast_mul(weight).unwrap();
    bias.map_or(y.clone(), |bias| y.broadcast_add(bias).unwrap())
}

/// A block by its definition, every operation one that candle differentiates.
struct Definition<'a> {
    spec: &'a ModelSpec,
    weights: &'a BTreeMap<String, Var>,
}

impl Definition<'_> {
    fn linear(&self, role: Role, x: &Tensor) -> Tensor {
        let module = self.spec.module(0, role);
        let y = x.matmul(&self.weights[&format!("{module}.weight")].as_tensor().t().unwrap()).unwrap();
        match self.weights.get(&format!("{module}.bias")) {
            Some(bias) => y.broadcast_add(bias.as_tensor()).unwrap(),
            None => y,
        }
    }

    fn norm(&self, role: NormRole, x: &Tensor) -> Tensor {
        if !self.spec.has_norm(role) {
            return x.clone();
        }
        let [weight, bias] = self.spec.norm_tensors(0, role);
        let bias = self.weights.get(&bias).filter(|_| self.spec.norm == NormKind::Layer).map(Var::as_tensor);
        normed(x, self.weights[&weight].as_tensor(), bias, self.spec.norm_eps)
    }

    /// `[heads, tokens, head_dim]`, normed and rotated if it is the queries' or keys', by the name of their norm.
    fn heads(&self, x: &Tensor, norm: Option<&str>) -> Tensor {
        let (tokens, dim) = (x.dim(0).unwrap(), self.spec.head_dim);
        let mut x = x.reshape((tokens, (), dim)).unwrap();
        if let (true, Some(norm)) = (self.spec.qk_norm, norm) {
            x = normed(&x, self.weights[norm].as_tensor(), None, self.spec.norm_eps);
        }
        if let (Some(rope), true) = (&self.spec.rope, norm.is_some()) {
            let f = rope.frequencies(tokens);
            let angle = |turn: fn(f32) -> f32| {
                let table: Vec<f32> = (0..tokens).flat_map(|p| f.iter().map(move |f| turn(p as f32 * f))).collect();
                Tensor::from_vec(table, (tokens, 1, dim / 2), &Device::Cpu).unwrap()
            };
            let (cos, sin) = (angle(f32::cos), angle(f32::sin));
            let (a, b) = (x.narrow(2, 0, dim / 2).unwrap(), x.narrow(2, dim / 2, dim / 2).unwrap());
            let times = |x: &Tensor, y: &Tensor| x.broadcast_mul(y).unwrap();
            let (c, d) = ((times(&a, &cos) - times(&b, &sin)).unwrap(), (times(&b, &cos) + times(&a, &sin)).unwrap());
            x = Tensor::cat(&[c, d], 2).unwrap();
        }
        x.transpose(0, 1).unwrap().contiguous().unwrap()
    }

    fn attention(&self, x: &Tensor) -> Tensor {
        let (spec, tokens) = (self.spec, x.dim(0).unwrap());
        let [q_norm, k_norm] = spec.qk_norms(0);
        let q = self.heads(&self.linear(Role::Q, x), Some(&q_norm));
        let k = self.heads(&self.linear(Role::K, x), Some(&k_norm));
        let v = self.heads(&self.linear(Role::V, x), None);
        let window = spec.windows[0].unwrap_or(usize::MAX);
        let sees = |i: usize, j: usize| !spec.causal || (j <= i && i - j < window);
        let mask: Vec<f32> =
            (0..tokens * tokens).map(|i| if sees(i / tokens, i % tokens) { 0.0 } else { -1e9 }).collect();
        let mask = Tensor::from_vec(mask, (tokens, tokens), &Device::Cpu).unwrap();
        let mixed = (0..spec.heads).map(|head| {
            let (k, v) = (k.get(head / spec.group()).unwrap(), v.get(head / spec.group()).unwrap());
            let scores = q.get(head).unwrap().matmul(&k.t().unwrap()).unwrap();
            let e = ((scores / (spec.head_dim as f64).sqrt()).unwrap() + &mask).unwrap().exp().unwrap();
            e.broadcast_div(&e.sum_keepdim(1).unwrap()).unwrap().matmul(&v).unwrap()
        });
        self.linear(Role::O, &Tensor::cat(&mixed.collect::<Vec<_>>(), 1).unwrap())
    }

    fn act(&self, x: &Tensor) -> Tensor {
        match self.spec.act {
            Act::Silu => x.silu(),
            Act::Gelu => x.gelu_erf(),
            Act::GeluTanh => x.gelu(),
            Act::Relu => x.relu(),
        }
        .unwrap()
    }

    fn block(&self, h: &Tensor) -> Tensor {
        let h = (h + self.attention(&self.norm(NormRole::Input, h))).unwrap();
        let h = self.norm(NormRole::AttnResidual, &h);
        let x = self.norm(NormRole::PostAttention, &h);
        let up = self.linear(Role::Up, &x);
        let inner = match self.spec.has(Role::Gate) {
            true => (self.act(&self.linear(Role::Gate, &x)) * up).unwrap(),
            false => self.act(&up),
        };
        self.norm(NormRole::MlpResidual, &(h + self.linear(Role::Down, &inner)).unwrap())
    }
}

/// `got` equals `expected` within a small share of the largest entry.
fn close(what: &str, got: &[f32], expected: &Tensor) {
    let expected = expected.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(got.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0f32, |a, v| a.max(v.abs()));
    let worst = got.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
    assert!(largest > 0.0 && worst <= 2e-4 * largest, "{what}: off by {worst}, largest {largest}");
}

#[test]
fn gradients_equal_those_of_candle() {
    for (model_type, act, window, tokens) in [
        ("llama", Act::Silu, None, 13),
        ("qwen3", Act::Silu, None, 40),
        ("llama", Act::Gelu, Some(5), 50),
        ("qwen3", Act::GeluTanh, Some(3), 9),
        ("llama", Act::Relu, None, 1),
        ("bert", Act::Gelu, None, 17),
    ] {
        let spec = spec(model_type, act, window);
        let vars: BTreeMap<String, Var> =
            weights(&spec).into_iter().map(|(name, t)| (name, Var::from_tensor(&t).unwrap())).collect();
        let plain: BTreeMap<String, Tensor> = vars.iter().map(|(n, v)| (n.clone(), v.as_detached_tensor())).collect();
        let block = Block::load(&spec, 0, &plain).unwrap();
        let rope = RopeTable::new(spec.rope.as_ref(), tokens).unwrap();
        let h = Var::from_tensor(&random(&[tokens, spec.hidden], 1.0)).unwrap();
        let grad = random(&[tokens, spec.hidden], 1.0);
        let definition = Definition { spec: &spec, weights: &vars };
        let expected = (definition.block(h.as_tensor()) * &grad).unwrap().sum_all().unwrap().backward().unwrap();

        let h_value = h.as_detached_tensor();
        let (out, trace) = block.forward_traced(&h_value, &rope).unwrap();
        let whole = block.forward(&h_value, &rope).unwrap();
        assert_eq!(out.to_vec2::<f32>().unwrap(), whole.to_vec2::<f32>().unwrap());
        let mut parameters = block.no_gradients();
        let grad: Vec<f32> = grad.flatten_all().unwrap().to_vec1().unwrap();
        let d_h = block.backward(&trace, &rope, grad.clone(), Some(&mut parameters)).unwrap();
        close("h", &d_h, expected.get(&h).unwrap());
        for (role, module) in spec.block_linears(0) {
            // Attention to one token is 1 whatever its query and key are.
            if tokens > 1 || !matches!(role, Role::Q | Role::K) {
                let name = format!("{module}.weight");
                close(&name, &parameters.linears[role as usize], expected.get(&vars[&name]).unwrap());
            }
        }
        for role in NormRole::ALL.into_iter().filter(|&role| spec.has_norm(role)) {
            let name = spec.norm(0, role);
            close(&name, &parameters.norms[role as usize], expected.get(&vars[&name]).unwrap());
        }
        // Without parameters, the same gradient at the input.
        assert_eq!(block.backward(&trace, &rope, grad, None).unwrap(), d_h);
    }
}

#[test]
fn gradients_of_the_head_equal_those_of_candle() {
    let spec = spec("llama", Act::Silu, None);
    let plain = weights(&spec);
    let head = Head::load(&spec, &plain).unwrap();
    let var = |t: &Tensor| Var::from_tensor(t).unwrap();
    let h = var(&random(&[7, spec.hidden], 1.0));
    let (norm, linear) = (var(&plain["model.norm.weight"]), var(&plain["lm_head.weight"]));
    let normed = normed(h.as_tensor(), &norm, None, spec.norm_eps);
    let logits = normed.matmul(&linear.t().unwrap()).unwrap();
    let grad = random(&[7, spec.vocab], 1.0);
    let expected = (logits * &grad).unwrap().sum_all().unwrap().backward().unwrap();
    let grad: Vec<f32> = grad.flatten_all().unwrap().to_vec1().unwrap();
    let mut parameters = head.no_gradients(true);
    let d_h = head.backward(&h.as_detached_tensor(), &grad, Some(&mut parameters)).unwrap();
    close("h", &d_h, expected.get(&h).unwrap());
    close("lm_head.weight", &parameters.linear, expected.get(&linear).unwrap());
    close("model.norm.weight", &parameters.norm, expected.get(&norm).unwrap());
    assert_eq!(head.backward(&h.as_detached_tensor(), &grad, None).unwrap(), d_h);
    // The weight's may be left out.
    let mut norm_alone = head.no_gradients(false);
    assert_eq!(head.backward(&h.as_detached_tensor(), &grad, Some(&mut norm_alone)).unwrap(), d_h);
    assert!(norm_alone.linear.is_empty() && norm_alone.norm == parameters.norm);
}

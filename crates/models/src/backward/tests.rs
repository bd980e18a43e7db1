//! The hand-written chain rule against candle's, on a block composed of candle's own elementary operations.

use super::*;
use crate::{Act, Expert, Head, ModelSpec, NormKind, Pairs, QkNorm, Routing, Weighing};
use candle_core::{D, Device, Var};
use serde_json::json;
use std::cell::Cell;
use std::collections::BTreeMap;

/// Every bias, fewer heads for keys than for queries, and sizes that differ, in a block of the family of `model_type`.
fn spec(model_type: &str, act: Act, window: Option<usize>) -> ModelSpec {
    // Of some architectures a model has as many heads for keys as for queries.
    let alike = ["bert", "gpt_neox", "modernbert", "opt"].contains(&model_type);
    let mut config = json!({
        "model_type": model_type, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1, "vocab_size": 31,
        "num_attention_heads": if alike { 3 } else { 6 }, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "attention_bias": model_type != "phi3", "mlp_bias": true, "rope_theta": 100.0, "ffn_dim": 20, "rotary_pct": 0.5,
        "partial_rotary_factor": if model_type == "phi3" { 0.5 } else { 1.0 }, "residual_multiplier": 0.4,
        "attention_multiplier": 0.3, "logits_scaling": 3.0, "attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 5,
        "final_logit_softcapping": 2.0, "no_rope_layers": [u8::from(window.is_some())],
        "moe_layers": if window.is_none() { vec![0] } else { vec![] }, "num_local_experts": 3, "num_experts": 3,
        "num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 16,
        "intermediate_size_mlp": 20, "floor_scale": 4, "attn_scale": 0.8,
    });
    if model_type == "gemma3_text" {
        config["attn_logit_softcapping"] = json!(null);
    }
    if !alike {
        config["head_dim"] = json!(8);
    }
    ModelSpec { act, windows: vec![window], ..crate::spec(&config).unwrap() }
}

fn random(shape: &[usize], scale: f32) -> Tensor {
    // The same numbers in every run of a test, which is a thread: with others, now and then an expert is chosen by no token.
    thread_local! {
        static STATE: Cell<u64> = const { Cell::new(1) };
    }
    let unit = || {
        STATE.set(STATE.get().wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407));
        ((STATE.get() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    let normal = |_| ((-2.0 * unit().ln()).sqrt() * (std::f64::consts::TAU * unit()).cos()) as f32 * scale;
    Tensor::from_vec((0..shape.iter().product::<usize>()).map(normal).collect(), shape, &Device::Cpu).unwrap()
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
    /// What `part` makes of `x`, by its rows of the linear that stores it.
    fn linear(&self, part: Role, x: &Tensor) -> Tensor {
        let (role, rows) = self.spec.rows(part);
        let module = self.spec.module(0, role);
        let own = |stored: &Var| {
            let parts: Vec<Tensor> =
                rows.iter().map(|r| stored.as_tensor().narrow(0, r.start, r.len()).unwrap()).collect();
            Tensor::cat(&parts, 0).unwrap()
        };
        let y = x.matmul(&own(&self.weights[&format!("{module}.weight")]).t().unwrap()).unwrap();
        match self.weights.get(&format!("{module}.bias")) {
            Some(bias) => y.broadcast_add(&own(bias)).unwrap(),
            None => y,
        }
    }

    /// The factor of a norm.
    fn factor(&self, name: &str) -> Tensor {
        (self.weights[name].as_tensor() + f64::from(self.spec.norm_offset)).unwrap()
    }

    /// What is added to the residual stream.
    fn update(&self, role: NormRole, y: &Tensor) -> Tensor {
        (self.norm(role, y) * self.spec.factors.residual).unwrap()
    }

    fn norm(&self, role: NormRole, x: &Tensor) -> Tensor {
        if !self.spec.block_norms(0).contains(&role) {
            return x.clone();
        }
        let [weight, bias] = self.spec.norm_tensors(0, role);
        let bias = match self.spec.norm {
            NormKind::Rms => None,
            NormKind::Layer => Some(self.weights[&bias].as_tensor().clone()),
            NormKind::Centred => Some(Tensor::zeros(self.spec.hidden, candle_core::DType::F32, &Device::Cpu).unwrap()),
        };
        normed(x, &self.factor(&weight), bias.as_ref(), self.spec.norm_eps)
    }

    /// `[heads, tokens, head_dim]`, normed and rotated if it is the queries' or keys', by the name of their norm.
    fn heads(&self, x: &Tensor, norm: Option<&str>) -> Tensor {
        let (tokens, dim) = (x.dim(0).unwrap(), self.spec.head_dim);
        let mut x = x.clone();
        if let (Some(how), Some(norm)) = (self.spec.qk_norm, norm) {
            let width = if how == QkNorm::Whole { x.dim(1).unwrap() } else { dim };
            let ones = || Tensor::ones(width, candle_core::DType::F32, &Device::Cpu).unwrap();
            let factor = if how == QkNorm::Bare { ones() } else { self.factor(norm) };
            if how != QkNorm::Bare || self.spec.ropes[0].is_some() {
                x = normed(&x.reshape(((), width)).unwrap(), &factor, None, self.spec.norm_eps);
            }
        }
        let mut x = x.reshape((tokens, (), dim)).unwrap();
        if let (Some(rope), true) = (&self.spec.ropes[0], norm.is_some()) {
            let (f, half) = (rope.frequencies(tokens), rope.dim / 2);
            let angle = |turn: fn(f32) -> f32| {
                let table: Vec<f32> = (0..tokens).flat_map(|p| f.iter().map(move |f| turn(p as f32 * f))).collect();
                Tensor::from_vec(table, (tokens, 1, half), &Device::Cpu).unwrap()
            };
            let (cos, sin) = (angle(f32::cos), angle(f32::sin));
            if self.spec.pairs == Pairs::Neighbours {
                x = neighbours_rotated(&x, &cos, &sin);
                return x.transpose(0, 1).unwrap().contiguous().unwrap();
            }
            let (a, b) = (x.narrow(2, 0, half).unwrap(), x.narrow(2, half, half).unwrap());
            let times = |x: &Tensor, y: &Tensor| x.broadcast_mul(y).unwrap();
            let (c, d) = ((times(&a, &cos) - times(&b, &sin)).unwrap(), (times(&b, &cos) + times(&a, &sin)).unwrap());
            let rest = x.narrow(2, rope.dim, dim - rope.dim).unwrap();
            x = if rope.dim < dim { Tensor::cat(&[c, d, rest], 2).unwrap() } else { Tensor::cat(&[c, d], 2).unwrap() };
        }
        x.transpose(0, 1).unwrap().contiguous().unwrap()
    }

    /// Factors of queries by position, `[tokens, 1]`.
    fn tempers(&self, tokens: usize) -> Tensor {
        let tempering = self.spec.tempering.filter(|_| self.spec.ropes[0].is_none());
        let factor =
            |at: usize| tempering.map_or(1.0, |t| 1.0 + t.scale * (((at + 1) as f64 / t.floor).floor() + 1.0).ln());
        Tensor::from_vec((0..tokens).map(|at| factor(at) as f32).collect(), (tokens, 1), &Device::Cpu).unwrap()
    }

    fn attention(&self, x: &Tensor) -> Tensor {
        let (spec, tokens) = (self.spec, x.dim(0).unwrap());
        let [q_norm, k_norm] = spec.qk_norms(0);
        let q = self.heads(&self.linear(Role::Q, x), Some(&q_norm));
        let k = self.heads(&self.linear(Role::K, x), Some(&k_norm));
        let v = self.heads(&self.linear(Role::V, x), None);
        let window = spec.windows[0].unwrap_or(usize::MAX);
        let beside = |i: usize, j: usize| if spec.chunked { i / window == j / window } else { i.abs_diff(j) < window };
        let sees = |i: usize, j: usize| (!spec.causal || j <= i) && beside(i, j);
        let mask: Vec<f32> =
            (0..tokens * tokens).map(|i| if sees(i / tokens, i % tokens) { 0.0 } else { -1e9 }).collect();
        let mask = Tensor::from_vec(mask, (tokens, tokens), &Device::Cpu).unwrap();
        let mixed = (0..spec.heads).map(|head| {
            let (k, v) = (k.get(head / spec.group()).unwrap(), v.get(head / spec.group()).unwrap());
            let q = q.get(head).unwrap().broadcast_mul(&self.tempers(tokens)).unwrap();
            let scores = q.matmul(&k.t().unwrap()).unwrap();
            let scale = spec.factors.attention.unwrap_or(1.0 / (spec.head_dim as f64).sqrt());
            let scores = capped(&(scores * scale).unwrap(), spec.factors.attention_cap);
            let e = (scores + &mask).unwrap().exp().unwrap();
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

    /// Every expert on every token, by weights of which most are zero.
    fn experts(&self, routing: &Routing, x: &Tensor) -> Tensor {
        let sigmoid = |x: &Tensor| (x.neg().unwrap().exp().unwrap() + 1.0).unwrap().recip().unwrap();
        let times =
            |module: &str, x: &Tensor| x.matmul(&self.weights[&format!("{module}.weight")].t().unwrap()).unwrap();
        let mlp = |expert: Expert, x: &Tensor| {
            let [gate, up, down] = Role::of_expert(expert).map(|role| self.spec.module(0, role));
            times(&down, &(self.act(&times(&gate, x)) * times(&up, x)).unwrap())
        };
        let (router, gate) = self.spec.routers(0).unwrap();
        let scores = times(&router, x);
        // The choice itself has no gradient.
        let rank = |row: &[f32], own: f32| row.iter().filter(|&&other| other > own).count();
        let chosen = |row: &[f32], own: f32| f32::from(u8::from(rank(row, own) < routing.chosen));
        let rows: Vec<Vec<f32>> = scores.to_vec2().unwrap();
        let mask: Vec<f32> = rows.iter().flat_map(|row| row.iter().map(|&s| chosen(row, s))).collect();
        let p = match routing.weighing {
            Weighing::Sigmoid => sigmoid(&scores),
            _ => {
                let e = scores.exp().unwrap();
                e.broadcast_div(&e.sum_keepdim(1).unwrap()).unwrap()
            }
        };
        let mut weights = (p * Tensor::from_vec(mask, scores.shape(), &Device::Cpu).unwrap()).unwrap();
        if routing.weighing == Weighing::Share {
            weights = weights.broadcast_div(&weights.sum_keepdim(1).unwrap()).unwrap();
        }
        let parts = (0..routing.experts).map(|e| {
            let (own, expert) = (weights.narrow(1, e, 1).unwrap(), Expert::Routed(e as u16));
            match routing.weighing {
                Weighing::Sigmoid => mlp(expert, &x.broadcast_mul(&own).unwrap()),
                _ => mlp(expert, x).broadcast_mul(&own).unwrap(),
            }
        });
        let shared = (routing.shared > 0).then(|| {
            let y = mlp(Expert::Shared, x);
            gate.map_or(y.clone(), |gate| y.broadcast_mul(&sigmoid(&times(&gate, x))).unwrap())
        });
        parts.chain(shared).reduce(|sum, part| (sum + part).unwrap()).unwrap()
    }

    fn block(&self, h: &Tensor) -> Tensor {
        let attention = self.attention(&self.norm(NormRole::Input, h));
        let middle = self.norm(NormRole::AttnResidual, &(h + self.update(NormRole::AttnOutput, &attention)).unwrap());
        let x = self.norm(NormRole::PostAttention, if self.spec.parallel { h } else { &middle });
        let made = match self.spec.routed(0) {
            Some(routing) => self.experts(routing, &x),
            None => {
                let up = self.linear(Role::Up, &x);
                let inner = match self.spec.gated() {
                    true => (self.act(&self.linear(Role::Gate, &x)) * up).unwrap(),
                    false => self.act(&up),
                };
                self.linear(Role::Down, &inner)
            }
        };
        let update = self.update(NormRole::MlpOutput, &made);
        self.norm(NormRole::MlpResidual, &(middle + update).unwrap())
    }
}

/// `x [tokens, heads, dim]` with neighbouring channels rotated by `cos` and `sin`, `[tokens, 1, dim / 2]`.
fn neighbours_rotated(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let (tokens, heads, dim) = x.dims3().unwrap();
    let pairs = x.reshape((tokens, heads, dim / 2, 2)).unwrap();
    let part = |i: usize| pairs.narrow(3, i, 1).unwrap().squeeze(3).unwrap();
    let times = |x: &Tensor, y: &Tensor| x.broadcast_mul(y).unwrap();
    let (a, b) = (part(0), part(1));
    let (c, d) = ((times(&a, cos) - times(&b, sin)).unwrap(), (times(&b, cos) + times(&a, sin)).unwrap());
    Tensor::stack(&[c, d], 3).unwrap().reshape((tokens, heads, dim)).unwrap()
}

fn capped(x: &Tensor, cap: Option<f64>) -> Tensor {
    cap.map_or(x.clone(), |cap| ((x / cap).unwrap().tanh().unwrap() * cap).unwrap())
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
        // Bounded scores, norms around everything, factors as differences from one; norms of heads on top.
        ("gemma2", Act::GeluTanh, Some(4), 19),
        ("gemma3_text", Act::GeluTanh, None, 11),
        // One linear for three, part of a head rotated; norms of all heads together; factors.
        ("phi3", Act::Silu, Some(6), 21),
        ("olmo2", Act::Silu, None, 12),
        ("granite", Act::Silu, None, 14),
        // Neighbours rotated and chunks seen, norms without weights; tempered queries without rotation, and experts that
        // weights come before; shares and probabilities behind experts.
        ("llama4_text", Act::Silu, Some(5), 23),
        ("llama4_text", Act::Silu, None, 33),
        ("mixtral", Act::Silu, None, 30),
        ("qwen2_moe", Act::Silu, None, 31),
        // The only block is the first, which has no norm before the attention, and the last, which has one behind the MLP.
        ("modernbert", Act::Gelu, None, 18),
        ("modernbert", Act::Gelu, Some(4), 23),
        // Side by side, by head; plain with layer norms.
        ("gpt_neox", Act::Gelu, None, 15),
        ("opt", Act::Relu, None, 16),
    ] {
        let spec = spec(model_type, act, window);
        let vars: BTreeMap<String, Var> =
            weights(&spec).into_iter().map(|(name, t)| (name, Var::from_tensor(&t).unwrap())).collect();
        let plain: BTreeMap<String, Tensor> = vars.iter().map(|(n, v)| (n.clone(), v.as_detached_tensor())).collect();
        let block = Block::load(&spec, 0, &plain).unwrap();
        let rope = RopeTable::new(&spec.ropes, tokens).unwrap();
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
                close(&format!("{model_type} {name}"), &parameters.linears[&role], expected.get(&vars[&name]).unwrap());
            }
        }
        for role in spec.block_norms(0) {
            let name = spec.norm(0, role);
            close(&name, &parameters.norms[role as usize], expected.get(&vars[&name]).unwrap());
        }
        // Without parameters, the same gradient at the input.
        assert_eq!(block.backward(&trace, &rope, grad, None).unwrap(), d_h);
    }
}

#[test]
fn gradients_of_the_head_equal_those_of_candle() {
    for model_type in ["llama", "gemma2", "granite", "opt"] {
        head_equals_candle(&ModelSpec { tied: false, ..spec(model_type, Act::Silu, None) });
    }
}

fn head_equals_candle(spec: &ModelSpec) {
    let plain = weights(spec);
    let head = Head::load(spec, &plain).unwrap();
    let var = |t: &Tensor| Var::from_tensor(t).unwrap();
    let h = var(&random(&[7, spec.hidden], 1.0));
    let [norm_name, bias] = spec.norm_parts(&spec.spell(spec.layout.final_norm.unwrap()));
    let (norm, linear) = (var(&plain[&norm_name]), var(&plain["lm_head.weight"]));
    let factor = (norm.as_tensor() + f64::from(spec.norm_offset)).unwrap();
    let normed = normed(h.as_tensor(), &factor, plain.get(&bias), spec.norm_eps);
    let logits = (normed.matmul(&linear.t().unwrap()).unwrap() * spec.factors.logits).unwrap();
    let logits = capped(&logits, spec.factors.logit_cap);
    let own = head.logits(h.as_tensor()).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    close("logits", &own, &logits);
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

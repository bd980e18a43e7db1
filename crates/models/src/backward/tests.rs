//! The hand-written chain rule against candle's, on a block composed of candle's own elementary operations.

use super::*;
use crate::{Act, Head, ModelSpec, Rope, RopeKind};
use candle_core::{D, Device, Var};
use std::collections::BTreeMap;

/// Fewer heads for keys than for queries, odd sizes, and the shape of everything in `spec`.
fn spec(act: Act, qk_norm: bool, window: Option<usize>) -> ModelSpec {
    ModelSpec {
        model_type: "tiny".into(),
        hidden: 24,
        intermediate: 20,
        layers: 1,
        vocab: 31,
        heads: 6,
        kv_heads: 2,
        head_dim: 8,
        norm_eps: 1e-5,
        rope: Rope { theta: 100.0, dim: 8, kind: RopeKind::Default },
        windows: vec![window],
        qkv_bias: true,
        out_bias: true,
        mlp_bias: true,
        qk_norm,
        tied: false,
        act,
        max_positions: 64,
        bos: None,
    }
}

fn random(shape: &[usize], scale: f32) -> Tensor {
    Tensor::randn(0f32, scale, shape, &Device::Cpu).unwrap()
}

fn weights(spec: &ModelSpec) -> BTreeMap<String, Tensor> {
    let slots = spec.tensors().into_iter().filter(|slot| !slot.optional);
    slots.map(|slot| (slot.name, random(&slot.shape, 0.4))).collect()
}

fn norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    let scale = (x.sqr().unwrap().mean_keepdim(D::Minus1).unwrap() + eps).unwrap().sqrt().unwrap();
    x.broadcast_div(&scale).unwrap().broadcast_mul(weight).unwrap()
}

/// The block by its definition, every operation one that candle differentiates.
fn definition(spec: &ModelSpec, w: &BTreeMap<String, Var>, h: &Tensor) -> Tensor {
    let tokens = h.dim(0).unwrap();
    let get = |name: &str| w[&format!("model.layers.0.{name}")].as_tensor();
    let linear = |role: Role, x: &Tensor| {
        let y = x.matmul(&get(&format!("{}.weight", role.module())).t().unwrap()).unwrap();
        y.broadcast_add(get(&format!("{}.bias", role.module()))).unwrap()
    };
    let dim = spec.head_dim;
    let heads = |x: Tensor, norm_name: &str, rotate: bool| {
        let mut x = x.reshape((tokens, (), dim)).unwrap();
        if spec.qk_norm && rotate {
            x = norm(&x, get(norm_name), spec.norm_eps);
        }
        if rotate {
            let f = spec.rope.frequencies(tokens);
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
    };
    let x = norm(h, get("input_layernorm.weight"), spec.norm_eps);
    let q = heads(linear(Role::Q, &x), "self_attn.q_norm.weight", true);
    let k = heads(linear(Role::K, &x), "self_attn.k_norm.weight", true);
    let v = heads(linear(Role::V, &x), "", false);
    let window = spec.windows[0].unwrap_or(usize::MAX);
    let mask: Vec<f32> = (0..tokens * tokens)
        .map(|i| if i % tokens <= i / tokens && i / tokens - i % tokens < window { 0.0 } else { -1e9 })
        .collect();
    let mask = Tensor::from_vec(mask, (tokens, tokens), &Device::Cpu).unwrap();
    let mixed: Vec<Tensor> = (0..spec.heads)
        .map(|head| {
            let (k, v) = (k.get(head / spec.group()).unwrap(), v.get(head / spec.group()).unwrap());
            let scores = (q.get(head).unwrap().matmul(&k.t().unwrap()).unwrap() / (dim as f64).sqrt()).unwrap();
            let e = (scores + &mask).unwrap().exp().unwrap();
            e.broadcast_div(&e.sum_keepdim(1).unwrap()).unwrap().matmul(&v).unwrap()
        })
        .collect();
    let h = (h + linear(Role::O, &Tensor::cat(&mixed, 1).unwrap())).unwrap();
    let x = norm(&h, get("post_attention_layernorm.weight"), spec.norm_eps);
    let gate = linear(Role::Gate, &x);
    let gate = match spec.act {
        Act::Silu => gate.silu(),
        Act::Gelu => gate.gelu_erf(),
        Act::GeluTanh => gate.gelu(),
        Act::Relu => gate.relu(),
    };
    (&h + linear(Role::Down, &(gate.unwrap() * linear(Role::Up, &x)).unwrap())).unwrap()
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
    for (act, qk_norm, window, tokens) in [
        (Act::Silu, false, None, 13),
        (Act::Silu, true, None, 40),
        (Act::Gelu, false, Some(5), 50),
        (Act::GeluTanh, true, Some(3), 9),
        (Act::Relu, false, None, 1),
    ] {
        let spec = spec(act, qk_norm, window);
        let vars: BTreeMap<String, Var> =
            weights(&spec).into_iter().map(|(name, t)| (name, Var::from_tensor(&t).unwrap())).collect();
        let plain: BTreeMap<String, Tensor> = vars.iter().map(|(n, v)| (n.clone(), v.as_detached_tensor())).collect();
        let block = Block::load(&spec, 0, &plain).unwrap();
        let rope = RopeTable::new(&spec.rope, tokens).unwrap();
        let h = Var::from_tensor(&random(&[tokens, spec.hidden], 1.0)).unwrap();
        let grad = random(&[tokens, spec.hidden], 1.0);
        let loss = (definition(&spec, &vars, h.as_tensor()) * &grad).unwrap().sum_all().unwrap();
        let expected = loss.backward().unwrap();

        let (out, trace) = block.forward_traced(&h.as_detached_tensor(), &rope).unwrap();
        assert_eq!(
            out.to_vec2::<f32>().unwrap(),
            block.forward(&h.as_detached_tensor(), &rope).unwrap().to_vec2::<f32>().unwrap()
        );
        let mut parameters = block.no_gradients();
        let grad = grad.flatten_all().unwrap().to_vec1().unwrap();
        let d_h = block.backward(&trace, &rope, grad.clone(), Some(&mut parameters)).unwrap();
        close("h", &d_h, expected.get(&h).unwrap());
        for role in Role::ALL {
            // Attention to one token is 1 whatever its query and key are.
            if tokens == 1 && matches!(role, Role::Q | Role::K) {
                continue;
            }
            let name = format!("{}.weight", spec.module(0, role));
            close(&name, &parameters.linears[role as usize], expected.get(&vars[&name]).unwrap());
        }
        for role in NormRole::ALL {
            let name = spec.norm(0, role);
            close(&name, &parameters.norms[role as usize], expected.get(&vars[&name]).unwrap());
        }
        // Without parameters, the same gradient at the input.
        assert_eq!(block.backward(&trace, &rope, grad, None).unwrap(), d_h);
    }
}

#[test]
fn gradients_of_the_head_equal_those_of_candle() {
    let spec = spec(Act::Silu, false, None);
    let plain = weights(&spec);
    let head = Head::load(&spec, &plain).unwrap();
    let (h, weight) = (Var::from_tensor(&random(&[7, spec.hidden], 1.0)).unwrap(), &plain["model.norm.weight"]);
    let weight = Var::from_tensor(weight).unwrap();
    let logits =
        norm(h.as_tensor(), weight.as_tensor(), spec.norm_eps).matmul(&plain["lm_head.weight"].t().unwrap()).unwrap();
    let grad = random(&[7, spec.vocab], 1.0);
    let expected = (logits * &grad).unwrap().sum_all().unwrap().backward().unwrap();
    let grad: Vec<f32> = grad.flatten_all().unwrap().to_vec1().unwrap();
    let (d_h, d_norm) = head.backward(&h.as_detached_tensor(), &grad).unwrap();
    close("h", &d_h, expected.get(&h).unwrap());
    close("norm", &d_norm, expected.get(&weight).unwrap());
}

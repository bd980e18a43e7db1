//! The pieces of a block: thread counts, rounded inputs, untouched arguments, wrong tensors.

use super::*;
use crate::{Ends, spec};
use candle_core::Device;
use serde_json::json;
use std::collections::BTreeMap;

fn tiny() -> ModelSpec {
    let config = json!({
        "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "attention_bias": true,
    });
    spec(&config).unwrap()
}

fn weights(spec: &ModelSpec) -> BTreeMap<String, Tensor> {
    let random = |shape: &[usize]| Tensor::randn(0f32, 0.4, shape, &Device::Cpu).unwrap();
    spec.tensors().into_iter().map(|slot| (slot.name, random(&slot.shape))).collect()
}

fn values(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let spec = tiny();
    let weights = weights(&spec);
    let ids: Vec<u32> = (0..1100).map(|i| i * 37 % 64).collect();
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let (ends, block) = (Ends::load(&spec, &weights).unwrap(), Block::load(&spec, 0, &weights).unwrap());
            let rope = RopeTable::new(&spec.rope, ids.len()).unwrap();
            values(&ends.logits(&block.forward(&ends.embed(&ids).unwrap(), &rope).unwrap()).unwrap())
        })
    };
    let alone = run(1);
    assert!(alone.iter().all(|v| v.is_finite()));
    assert_eq!(alone, run(3));
}

#[test]
fn int8_activations_round_the_input_of_exactly_the_flagged_linears() {
    let spec = tiny();
    let full = Block::load(&spec, 0, &weights(&spec)).unwrap();
    let rope = RopeTable::new(&spec.rope, 9).unwrap();
    let random = |width: usize| Tensor::randn(0f32, 1.0, (9, width), &Device::Cpu).unwrap();
    let (hidden, attended, gated) = (random(32), random(32), random(40));
    let round = |x: &Tensor| ops::round_int8(x).unwrap();
    let mut int8 = full.clone();
    for role in Role::ALL {
        int8.set_activations(role, Activations::DynamicInt8);
    }
    let same = |a: &Tensor, b: &Tensor| values(a) == values(b);
    assert!(same(&int8.attn_out(&hidden, &rope).unwrap(), &full.attn_out(&round(&hidden), &rope).unwrap()));
    assert!(same(&int8.mlp_in(&hidden, &attended).unwrap().0, &full.mlp_in(&hidden, &round(&attended)).unwrap().0));
    assert!(same(&int8.mlp_out(&hidden).unwrap(), &full.mlp_out(&round(&hidden)).unwrap()));
    assert!(same(&int8.finish(&hidden, &gated).unwrap(), &full.finish(&hidden, &round(&gated)).unwrap()));
    assert!(!same(&int8.mlp_out(&hidden).unwrap(), &full.mlp_out(&hidden).unwrap()));

    let mut mixed = full.clone();
    mixed.set_activations(Role::Up, Activations::DynamicInt8);
    let input = Input::new(&hidden, &[mixed.at(Role::Gate), mixed.at(Role::Up)]).unwrap();
    let (gate, up) = (mixed.at(Role::Gate).read(&input).unwrap(), mixed.at(Role::Up).read(&input).unwrap());
    assert!(same(&gate, &full.at(Role::Gate).forward(&hidden).unwrap()));
    assert!(same(&up, &full.at(Role::Up).forward(&round(&hidden)).unwrap()));
}

#[test]
fn pieces_leave_their_inputs_alone() {
    let spec = tiny();
    let block = Block::load(&spec, 0, &weights(&spec)).unwrap();
    let rope = RopeTable::new(&spec.rope, 7).unwrap();
    let h = Tensor::randn(0f32, 1.0, (7, 32), &Device::Cpu).unwrap();
    let before = values(&h);
    let x = block.attn_out(&block.attn_in(&h).unwrap(), &rope).unwrap();
    let site = values(&x);
    let (h2, y) = block.mlp_in(&h, &x).unwrap();
    let out = block.finish(&h2, &block.mlp_out(&y).unwrap()).unwrap();
    assert_eq!((values(&h), values(&x)), (before, site));
    assert_eq!(values(&out), values(&block.forward(&h, &rope).unwrap()));
}

#[test]
fn wrong_tensors_are_errors_that_name_them() {
    let spec = tiny();
    let good = weights(&spec);
    let name = "model.layers.0.self_attn.k_proj.bias";
    let mut bad = good.clone();
    bad.remove(name);
    assert!(matches!(Block::load(&spec, 0, &bad), Err(Error::Missing { tensor }) if tensor == name));
    bad.insert(name.into(), Tensor::zeros(3, candle_core::DType::F32, &Device::Cpu).unwrap());
    assert!(
        matches!(Block::load(&spec, 0, &bad), Err(Error::Shape { tensor, expected, got }) if (tensor.as_str(), &expected[..], &got[..]) == (name, &[16], &[3]))
    );
    assert!(matches!(Ends::load(&spec, &good).unwrap().embed(&[3, 64]), Err(Error::Token { token: 64, vocab: 64 })));

    let rope = RopeTable::new(&spec.rope, 7).unwrap();
    let h = Tensor::randn(0f32, 1.0, (7, 32), &Device::Cpu).unwrap();
    for role in Role::ALL {
        for shape in [(5, 3), (32, 64), (8, 32), (48, 32), (1, 1)] {
            let mut block = Block::load(&spec, 0, &good).unwrap();
            let wrong = block.linear(role).dims2().unwrap() != shape;
            block.set_linear(role, Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap());
            assert!(!wrong || block.forward(&h, &rope).is_err(), "{role:?} {shape:?}");
        }
    }
    let long = Tensor::zeros((8, 32), candle_core::DType::F32, &Device::Cpu).unwrap();
    let block = Block::load(&spec, 0, &good).unwrap();
    assert!(matches!(block.forward(&long, &rope), Err(Error::Window { tokens: 8, .. })));
}

//! The pieces of a block: thread counts, rounded inputs, untouched arguments, wrong tensors.

use super::*;
use crate::{Absorb, Ends, spec};
use candle_core::Device;
use serde_json::json;
use std::collections::BTreeMap;

const INT8: Inputs = Inputs { activations: Activations::DynamicInt8, stored: 1.0 };

fn tiny() -> ModelSpec {
    let config = json!({
        "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "attention_bias": true,
    });
    spec(&config).unwrap()
}

/// A post-norm encoder with a plain MLP.
fn encoder() -> ModelSpec {
    let config = json!({
        "model_type": "bert", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4,
        "vocab_size": 64, "max_position_embeddings": 16,
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
            let rope = RopeTable::new(&spec.ropes, ids.len()).unwrap();
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
    let rope = RopeTable::new(&spec.ropes, 9).unwrap();
    let random = |width: usize| Tensor::randn(0f32, 1.0, (9, width), &Device::Cpu).unwrap();
    let (hidden, attended, gated) = (random(32), random(32), random(40));
    let round = |x: &Tensor| ops::round_inputs(x, INT8).unwrap();
    let mut int8 = full.clone();
    for (role, _) in spec.block_linears(0) {
        int8.set_inputs(role, INT8);
    }
    let same = |a: &Tensor, b: &Tensor| values(a) == values(b);
    assert!(same(&int8.attn_out(&hidden, &rope).unwrap(), &full.attn_out(&round(&hidden), &rope).unwrap()));
    assert!(same(&int8.mlp_in(&hidden, &attended).unwrap().0, &full.mlp_in(&hidden, &round(&attended)).unwrap().0));
    assert!(same(&int8.mlp_out(&hidden).unwrap(), &full.mlp_out(&round(&hidden)).unwrap()));
    assert!(same(&int8.finish(&hidden, &gated).unwrap(), &full.finish(&hidden, &round(&gated)).unwrap()));
    assert!(!same(&int8.mlp_out(&hidden).unwrap(), &full.mlp_out(&hidden).unwrap()));

    let mut mixed = full.clone();
    mixed.set_inputs(Role::Up, INT8);
    let [gate, up] = Linear::forward_all([mixed.at(Role::Gate), mixed.at(Role::Up)], &hidden).unwrap();
    assert!(same(&gate, &full.at(Role::Gate).forward(&hidden).unwrap()));
    assert!(same(&up, &full.at(Role::Up).forward(&round(&hidden)).unwrap()));
}

#[test]
fn keys_and_values_are_rounded_where_they_are_kept() {
    let spec = tiny();
    let full = Block::load(&spec, 0, &weights(&spec)).unwrap();
    let rope = RopeTable::new(&spec.ropes, 9).unwrap();
    let x = Tensor::randn(0f32, 1.0, (9, 32), &Device::Cpu).unwrap();
    let scales = full.cache_range(&x, &rope).unwrap().map(|most| most / 448.0);
    let mut kept = full.clone();
    kept.set_cache(Some(scales));
    let heads = full.heads(&x, &rope).unwrap();
    let round = |t: &Tensor, stored| {
        let inputs = Inputs { activations: Activations::StaticFp8, stored };
        ops::round_inputs(t, inputs).unwrap()
    };
    let rounded = Heads { k: round(&heads.k, scales[0]), v: round(&heads.v, scales[1]), ..heads };
    let got = values(&kept.attn_out(&x, &rope).unwrap());
    assert_eq!(got, values(&full.attend(&rounded).unwrap()));
    let plain = values(&full.attn_out(&x, &rope).unwrap());
    let error: f32 = got.iter().zip(&plain).map(|(a, b)| (a - b).powi(2)).sum();
    let energy: f32 = plain.iter().map(|v| v * v).sum();
    assert!(error > 0.0 && error < 0.01 * energy, "{error} of {energy}");
}

#[test]
fn pieces_leave_their_inputs_alone() {
    for spec in [tiny(), encoder()] {
        let block = Block::load(&spec, 0, &weights(&spec)).unwrap();
        let rope = RopeTable::new(&spec.ropes, 7).unwrap();
        let h = Tensor::randn(0f32, 1.0, (7, 32), &Device::Cpu).unwrap();
        let before = values(&h);
        let x = block.attn_out(&block.attn_in(&h).unwrap(), &rope).unwrap();
        let site = values(&x);
        let (h2, y) = block.mlp_in(&h, &x).unwrap();
        let (h2_before, y_before) = (values(&h2), values(&y));
        let out = block.finish(&h2, &block.mlp_out(&y).unwrap()).unwrap();
        assert_eq!((values(&h), values(&x)), (before, site));
        assert_eq!((values(&h2), values(&y)), (h2_before, y_before));
        assert_eq!(values(&out), values(&block.forward(&h, &rope).unwrap()));
    }
}

#[test]
fn what_absorbs_a_scale_leaves_the_block_as_it_was() {
    // A plain MLP with ReLU lets a scale through, one with GELU does not.
    let relu = ModelSpec { act: Act::Relu, ..encoder() };
    let absorbed = |spec: &ModelSpec| spec.sites(0).map(|site| site.absorbed_by.is_some());
    assert_eq!(absorbed(&tiny()), [true; 4]);
    assert_eq!(absorbed(&encoder()), [false, true, false, false]);
    assert_eq!(absorbed(&relu), [false, true, false, true]);
    for spec in [tiny(), encoder(), relu] {
        let block = Block::load(&spec, 0, &weights(&spec)).unwrap();
        let rope = RopeTable::new(&spec.ropes, 9).unwrap();
        let h = Tensor::randn(0f32, 1.0, (9, 32), &Device::Cpu).unwrap();
        let before = values(&block.forward(&h, &rope).unwrap());
        for site in spec.sites(0) {
            let Some(absorb) = site.absorbed_by else { continue };
            let mut scaled = block.clone();
            // One scale per output row of a linear; the heads of a group share V's rows, so O sees each group's scales
            // once per head of it.
            let rows = match absorb {
                Absorb::Norm(norm) => block.norm(norm).dims1().unwrap(),
                Absorb::Linear(role) => block.linear(role).dim(0).unwrap(),
            };
            let scale: Vec<f32> = (0..rows).map(|i| 0.5 + (i % 7) as f32 / 4.0).collect();
            let scale = Tensor::from_vec(scale, rows, &Device::Cpu).unwrap();
            match absorb {
                Absorb::Norm(norm) => scaled.set_norm(norm, (block.norm(norm) * &scale).unwrap()),
                Absorb::Linear(role) => {
                    let column = scale.reshape((rows, 1)).unwrap();
                    scaled.set_linear(role, block.linear(role).broadcast_mul(&column).unwrap());
                    scaled.set_bias(role, block.bias(role).map(|bias| (bias * &scale).unwrap()));
                }
            }
            for &role in site.linears {
                let columns = block.linear(role).dim(1).unwrap();
                let repeat = if columns == rows { 1 } else { spec.group() };
                let heads = scale.reshape((rows / spec.head_dim.min(rows), 1, ())).unwrap();
                let inputs = match repeat {
                    1 => scale.clone(),
                    _ => heads.repeat((1, repeat, 1)).unwrap().flatten_all().unwrap(),
                };
                scaled.set_linear(role, block.linear(role).broadcast_div(&inputs).unwrap());
            }
            let after = values(&scaled.forward(&h, &rope).unwrap());
            let difference = before.iter().zip(&after).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(difference < 1e-3, "{} {}: {difference}", spec.model_type, site.name);
        }
    }
}

#[test]
fn an_encoder_sees_both_ways_and_counts_its_positions() {
    let spec = encoder();
    let weights = weights(&spec);
    let (embedding, block) =
        (crate::Embedding::load(&spec, &weights).unwrap(), Block::load(&spec, 0, &weights).unwrap());
    let run = |ids: &[u32]| {
        let rope = RopeTable::new(&spec.ropes, ids.len()).unwrap();
        block.forward(&embedding.embed(ids).unwrap(), &rope).unwrap().to_vec2::<f32>().unwrap()
    };
    let (a, b) = (run(&[1, 2, 3, 4]), run(&[1, 2, 3, 5]));
    assert!(a[0] != b[0], "the first token sees the last");
    assert!(run(&[1, 2])[0] != run(&[2, 1])[1], "positions count");
    let long: Vec<u32> = vec![1; 17];
    assert!(matches!(embedding.embed(&long), Err(Error::Positions { tokens: 17, positions: 16 })));
    assert!(matches!(crate::Head::load(&spec, &weights), Err(Error::NoHead { .. })));
    assert!(spec.block_linears(0).iter().all(|(role, _)| *role != Role::Gate));
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

    let rope = RopeTable::new(&spec.ropes, 7).unwrap();
    let h = Tensor::randn(0f32, 1.0, (7, 32), &Device::Cpu).unwrap();
    for (role, _) in spec.block_linears(0) {
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

#[test]
fn parts_of_a_window_and_strips_of_columns_have_the_bits_of_the_whole() {
    for (name, extra) in [("llama", json!({})), ("qwen3", json!({ "sliding_window": 50, "use_sliding_window": true }))]
    {
        let mut config = json!({
            "model_type": name, "hidden_size": 64, "intermediate_size": 136, "num_hidden_layers": 1, "num_attention_heads": 6,
            "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "rms_norm_eps": 1e-6,
        });
        extra.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
        let spec = spec(&config).unwrap();
        let weights = weights(&spec);
        for short in Short::all() {
            let mut block = Block::load(&spec, 0, &weights).unwrap();
            assert!(block.begin_window().is_none() && !block.has_strips(), "products in f32");
            block.multiply_by(Some(short));
            let tokens = 300;
            let rope = RopeTable::new(&spec.ropes, tokens).unwrap();
            // Products that need a shift, and products that need none.
            for size in [0.1, 20.0] {
                let x = Tensor::randn(0f32, size, (tokens, 64), &Device::Cpu).unwrap();
                let whole = values(&block.attn_out(&x, &rope).unwrap());
                let (mut past, mut found) = (block.begin_window().unwrap(), Vec::new());
                for from in (0..tokens).step_by(128) {
                    let part = x.narrow(0, from, 128.min(tokens - from)).unwrap();
                    found.extend(values(&block.attn_part(&mut past, &part, &rope, tokens).unwrap()));
                }
                assert!(whole.iter().all(|v| v.is_finite()) && found == whole, "{name} {short:?} {size}");
                let gated = values(&block.mlp_out(&x).unwrap());
                let mut found = vec![f32::NAN; gated.len()];
                assert!(block.has_strips());
                let mut take = |columns: Range<usize>, strip: &[f32]| {
                    for (row, strip) in found.chunks_mut(136).zip(strip.chunks(columns.len())) {
                        row[columns.clone()].copy_from_slice(strip);
                    }
                };
                block.mlp_strips(&x, &mut take).unwrap();
                assert_eq!(found, gated);
            }
        }
    }
}

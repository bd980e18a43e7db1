//! Each operation against its definition, candle or a golden file.

use super::*;
use bitmill_kernels::Brain;
use bitmill_scheme::Activations;
use candle_core::{DType, Device, IndexOp};
use std::path::Path;

#[test]
fn rounding_of_inputs_equals_compressed_tensors() {
    let golden = |case: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case).join("golden.safetensors");
        candle_core::safetensors::load(path, &Device::Cpu).unwrap()
    };
    let (int8, floats) = (golden("int8-activations"), golden("float-activations"));
    for (golden, name, activations, stored) in [
        (&int8, "output", Activations::DynamicInt8, 1.0),
        (&floats, "fp8", Activations::DynamicFp8, 1.0),
        (&floats, "fp8-groups", Activations::DynamicFp8Groups, 1.0),
        (&floats, "fp8-static", Activations::StaticFp8, 0.03125),
        (&floats, "nvfp4", Activations::Nvfp4, 128.0),
        (&floats, "mxfp4", Activations::Mxfp4, 1.0),
        (&floats, "mxfp8", Activations::Mxfp8, 1.0),
    ] {
        let got = round_inputs(&golden["input"], Inputs { activations, stored }).unwrap().to_vec2::<f32>().unwrap();
        let expected = golden[name].to_vec2::<f32>().unwrap();
        for (row, (got, expected)) in got.iter().zip(&expected).enumerate() {
            // Bit for bit, but for the sign of zero.
            let different = got.iter().zip(expected).position(|(a, b)| a != b);
            assert_eq!(different, None, "{name}, row {row}: {got:?} {expected:?}");
        }
    }
}

#[test]
fn products_agree_with_candle_and_with_any_split() {
    for (tokens, inner, out) in [(1, 3, 5), (7, 16, 24), (2 * BAND + 3, 40, 17)] {
        let x = Tensor::randn(0f32, 1.0, (tokens, inner), &Device::Cpu).unwrap();
        let w = Tensor::randn(0f32, 1.0, (inner, out), &Device::Cpu).unwrap().t().unwrap();
        let got = product(&x, &w).unwrap();
        let expected = x.matmul(&w.t().unwrap()).unwrap();
        let difference = (&got - expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(difference < 1e-5, "{tokens} {inner} {out}: {difference}");
        let alone =
            rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap().install(|| product(&x, &w).unwrap());
        assert_eq!(got.to_vec2::<f32>().unwrap(), alone.to_vec2::<f32>().unwrap());
    }
    let (x, w) = (
        Tensor::zeros((2, 3), candle_core::DType::F32, &Device::Cpu).unwrap(),
        Tensor::zeros((4, 5), candle_core::DType::F32, &Device::Cpu).unwrap(),
    );
    assert!(product(&x, &w).unwrap_err().to_string().contains("3 channels"));
}

#[test]
fn products_of_bfloat16_are_those_of_rounded_numbers() {
    let Some(short) = Brain::here().map(Short::Bf16) else {
        return println!("this CPU does not multiply bfloat16: nothing was tested");
    };
    for (tokens, inner, out) in [(1, 3, 5), (BAND + 3, 40, 257)] {
        let x = Tensor::randn(0f32, 1.0, (tokens, inner), &Device::Cpu).unwrap();
        let w = Tensor::randn(0f32, 1.0, (out, inner), &Device::Cpu).unwrap();
        let rounded = |t: &Tensor| t.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
        let run = || {
            let (x, w) = (left_panels(short, &x, None).unwrap(), right_panels(short, &w).unwrap());
            short_product(&x, &w).unwrap()
        };
        let (got, expected) = (run(), product(&rounded(&x), &rounded(&w)).unwrap());
        let difference = (&got - expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(difference < 1e-5, "{tokens} {inner} {out}: {difference}");
        let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let alone = alone.install(run);
        assert_eq!(got.to_vec2::<f32>().unwrap(), alone.to_vec2::<f32>().unwrap());
    }
}

#[test]
fn rotation_agrees_with_candle() {
    let (tokens, kv_heads, group, dim) = (19, 2, 3, 8);
    let heads = kv_heads * group;
    let x = Tensor::randn(0f32, 1.0, (tokens, heads * dim), &Device::Cpu).unwrap();
    let cos = Tensor::randn(0f32, 1.0, (tokens, dim / 2), &Device::Cpu).unwrap();
    let sin = Tensor::randn(0f32, 1.0, (tokens, dim / 2), &Device::Cpu).unwrap();
    let by_head = x.reshape((1, tokens, heads, dim)).unwrap().transpose(1, 2).unwrap().contiguous().unwrap();
    let expected = candle_nn::rotary_emb::rope(&by_head, &cos, &sin).unwrap();
    let got =
        rotate(&x, (&cos, &sin), (dim, group), Pairs::Halves).unwrap().reshape((kv_heads, tokens, group, dim)).unwrap();
    for head in 0..heads {
        let got = got.i((head / group, .., head % group)).unwrap();
        let expected = expected.i((0, head)).unwrap();
        let difference = (got - expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert!(difference < 1e-6, "head {head}: {difference}");
    }
}

#[test]
fn silu_saturates() {
    let gate = Tensor::new(&[[-200f32, -1.0, 0.0, 1.0, 200.0]], &Device::Cpu).unwrap();
    let up = Tensor::new(&[[2f32; 5]], &Device::Cpu).unwrap();
    silu_mul(&gate, &up).unwrap();
    let got = gate.to_vec2::<f32>().unwrap();
    for (got, expected) in got[0].iter().zip([0.0, -0.537_882_8, 0.0, 1.462_117_2, 400.0]) {
        assert!((got - expected).abs() < 1e-6 * f32::max(1.0, expected.abs()), "{got} {expected}");
    }
}

#[test]
fn layer_norm_equals_its_definition() {
    for (rows, width) in [(1, 1), (3, 7), (5, 16), (2000, 33)] {
        // Far from zero, where one pass over squares would fail.
        let x = (Tensor::randn(0f32, 1.0, (rows, width), &Device::Cpu).unwrap() + 300.0).unwrap();
        let weight = Tensor::randn(1f32, 0.3, width, &Device::Cpu).unwrap();
        let bias = Tensor::randn(0f32, 0.3, width, &Device::Cpu).unwrap();
        let got = layer_norm(&x, &weight, &bias, 1e-5).unwrap().to_vec2::<f32>().unwrap();
        let (weight, bias) = (weight.to_vec1::<f32>().unwrap(), bias.to_vec1::<f32>().unwrap());
        for (got, row) in got.iter().zip(x.to_vec2::<f32>().unwrap()) {
            let mean = row.iter().map(|&v| f64::from(v)).sum::<f64>() / width as f64;
            let variance = row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / width as f64;
            for (j, &v) in row.iter().enumerate() {
                let expected =
                    (f64::from(v) - mean) / (variance + 1e-5).sqrt() * f64::from(weight[j]) + f64::from(bias[j]);
                assert!((f64::from(got[j]) - expected).abs() < 2e-4, "{rows} {width}: {} {expected}", got[j]);
            }
        }
    }
    let row = |n: usize| Tensor::zeros(n, candle_core::DType::F32, &Device::Cpu).unwrap();
    assert!(
        layer_norm(&Tensor::zeros((2, 3), candle_core::DType::F32, &Device::Cpu).unwrap(), &row(3), &row(2), 1e-5)
            .is_err()
    );
}

#[test]
fn draws_fall_on_indices_by_their_room() {
    let p = [0.25, 0.0, 0.5, 0.25];
    assert_eq!([0.0, 0.2, 0.25, 0.74, 0.75, 0.999].map(|at| draw(&p, at)), [0, 0, 2, 2, 3, 3]);
    assert_eq!(draw(&[0.2, 0.4, 0.0], 0.99), 1);
}

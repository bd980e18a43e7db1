//! Known words of every format, computed independently of this crate, and layouts that are read but never written.

#![allow(clippy::unwrap_used, reason = "a failed test panics")]

mod support;

use bitmill_checkpoint::{Checkpoint, Dtype, Error, Weight, format};
use bitmill_scheme::{Activations, Bits, Granularity, Inputs, Quantized, ScaleType, Scheme};
use serde_json::{Value, json};
use support::{as_words, open, words};

fn scheme(bits: u32, symmetric: bool, granularity: Granularity) -> Scheme {
    Scheme::int(Bits::new(bits).unwrap(), symmetric, granularity)
}

/// One row of signed codes.
fn row(bits: u32, signed: &[i32]) -> Quantized {
    let half = 1 << (bits - 1);
    let codes = signed.iter().map(|q| (q + half) as u8).collect();
    let scheme = scheme(bits, true, Granularity::Channel);
    Quantized {
        scheme,
        shape: [1, signed.len()],
        codes,
        scales: vec![1.0],
        zeros: vec![],
        group_of: vec![],
        input: None,
    }
}

fn read(checkpoint: &Checkpoint, module: &str) -> Quantized {
    match checkpoint.weight(module).unwrap() {
        Weight::Quantized(q) => q,
        Weight::Dense(_) => panic!("{module} is dense"),
    }
}

#[test]
fn compressed_tensors_words() {
    let pack = format("pack-quantized").unwrap();
    for (bits, codes, expected) in [
        (4, vec![-8, -7, -1, 0, 1, 2, 6, 7], vec![0xfea98710]),
        (4, (-8..2).collect(), vec![0x76543210, 0x00000098]),
        (8, vec![-128, -1, 0, 127], vec![0xff807f00]),
        (3, (0..32).map(|j| j % 8 - 4).collect(), vec![0x88fac688, 0xc688fac6, 0xfac688fa]),
        (5, (-16..16).collect(), vec![0x8a418820, 0xc5a92839, 0xca307b9a, 0x38bdab49, 0xffbbcdeb]),
    ] {
        assert_eq!(as_words(&pack.encode("m", &row(bits, &codes))[0]), expected, "{bits} bits");
    }
    let zeros = [-8i32, -4, 0, 3, 7, -1, 1, 2].map(|z| (z + 8) as u8).to_vec();
    let scheme = scheme(4, false, Granularity::Channel);
    let q = Quantized {
        scheme,
        shape: [8, 8],
        codes: vec![0; 64],
        scales: vec![1.0; 8],
        zeros,
        group_of: vec![],
        input: None,
    };
    assert_eq!(as_words(&pack.encode("m", &q)[3]), [0xa97fb840]);
}

#[test]
fn float_bytes() {
    // 0, 0.5, −1, 1.5, 2, −3, 4, −6 twice, under the scale of a largest magnitude of 1.5 in a tensor of 3.
    let codes = [0u8, 1, 10, 3, 4, 13, 6, 15].repeat(2);
    let bytes = [0x10u8, 0x3a, 0xd4, 0xf6].repeat(2);
    let scheme = bitmill_scheme::scheme("nvfp4a16").unwrap();
    let q = Quantized {
        scheme,
        shape: [1, 16],
        codes,
        scales: vec![224.0, 896.0],
        zeros: vec![],
        group_of: vec![],
        input: None,
    };
    q.validate().unwrap();
    let payloads = format("nvfp4-pack-quantized").unwrap().encode("m", &q);
    assert_eq!(payloads, [bytes.clone(), vec![0x76], 896.0f32.to_le_bytes().to_vec()]);
    // ModelOpt stores the reciprocal, which for 896 is rounded: it is read, and not written as if it were the same.
    let modelopt = format("modelopt").unwrap();
    let said = modelopt.holds("m", &q).unwrap_err().to_string();
    assert!(said.contains("the reciprocal of 896"), "{said}");
    let whole = (1.0f32 / 896.0).to_le_bytes().to_vec();
    let parts: [(&str, Dtype, &[usize], Vec<u8>); 3] = [
        ("m.weight", Dtype::U8, &[1, 8], bytes.clone()),
        ("m.weight_scale", Dtype::F8_E4M3, &[1, 1], vec![0x76]),
        ("m.weight_scale_2", Dtype::F32, &[], whole),
    ];
    let there = read(&open(json!({"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}), &parts), "m");
    assert!(there.dequantize().iter().zip(q.dequantize()).all(|(a, b)| (a - b).abs() < 1e-6));
    let halved = Quantized { scales: vec![128.0, 512.0], ..q.clone() };
    assert_eq!(modelopt.encode("m", &halved)[1..], [vec![0x70], (1.0f32 / 512.0).to_le_bytes().to_vec()]);
    assert_eq!(q.dequantize()[..8], [0.0, 0.125, -0.25, 0.375, 0.5, -0.75, 1.0, -1.5]);

    let scheme = bitmill_scheme::scheme("mxfp4a16").unwrap();
    let (codes, bytes) = (q.codes.repeat(2), bytes.repeat(2));
    let q =
        Quantized { scheme, shape: [1, 32], codes, scales: vec![0.25], zeros: vec![], group_of: vec![], input: None };
    q.validate().unwrap();
    assert_eq!(format("mxfp4-pack-quantized").unwrap().encode("m", &q), [bytes, vec![125]]);

    let scheme = Scheme { activations: Activations::Full, ..bitmill_scheme::scheme("fp8_dynamic").unwrap() };
    // −448, 1, 2^−9 and −0 are the bytes fe, 38, 01 and 80.
    let codes = vec![0xfe, 0x38, 0x01, 0x80];
    let q = Quantized { scheme, shape: [1, 4], codes, scales: vec![2.0], zeros: vec![], group_of: vec![], input: None };
    assert_eq!(format("float-quantized").unwrap().encode("m", &q), [q.codes.clone(), vec![0x00, 0x40]]);
    assert_eq!(q.dequantize(), [-896.0, 2.0, 2.0f32.powi(-8), -0.0]);
}

#[test]
fn what_calibration_says_of_inputs() {
    let number = |value: f32| value.to_le_bytes().to_vec();
    let of = |name: &str, shape, codes, scales, input| {
        let scheme = bitmill_scheme::scheme(name).unwrap();
        let q = Quantized { scheme, shape, codes, scales, zeros: vec![], group_of: vec![], input: Some(input) };
        q.validate().unwrap();
        q
    };
    // A scale per tensor, and the scale of inputs, which the library multiplies by, too.
    let fp8 = of("fp8", [1, 4], vec![0xfe, 0x38, 0x01, 0x80], vec![2.0], 0.03125);
    let format_of = |name: &str| format(name).unwrap();
    let payloads = format_of("float-quantized").encode("m", &fp8);
    assert_eq!(payloads, [fp8.codes.clone(), vec![0x00, 0x40], number(0.03125)]);
    // NVFP4 divides by it, ModelOpt multiplies.
    let nvfp4 = of("nvfp4", [1, 16], vec![1; 16], vec![128.0, 512.0], 64.0);
    let payloads = format_of("nvfp4-pack-quantized").encode("m", &nvfp4);
    assert_eq!(payloads[2..], [number(512.0), number(64.0)]);
    let names: Vec<String> = format_of("nvfp4-pack-quantized")
        .layout("m", &nvfp4.scheme, nvfp4.shape)
        .into_iter()
        .map(|spec| format!("{} {:?}", spec.name, spec.shape))
        .collect();
    assert_eq!(names[2..], ["m.weight_global_scale [1]", "m.input_global_scale [1]"]);
    let modelopt = format_of("modelopt");
    assert_eq!(modelopt.encode("m", &nvfp4)[2..], [number(1.0 / 512.0), number(1.0 / 64.0)]);
    assert_eq!(modelopt.layout("m", &nvfp4.scheme, nvfp4.shape)[3].name, "m.input_scale");
    let odd = Quantized { input: Some(896.0), ..nvfp4.clone() };
    assert!(modelopt.holds("m", &odd).unwrap_err().to_string().contains("the reciprocal of 896"));
    // Without it there is nothing to round by, and zero is nothing either.
    let config = format_of("float-quantized").config(&[("m".to_owned(), fp8.scheme)].into(), &[]).unwrap();
    let weight: [(&str, Dtype, &[usize], Vec<u8>); 2] = [
        ("m.weight", Dtype::F8_E4M3, &[1, 4], fp8.codes.clone()),
        ("m.weight_scale", Dtype::BF16, &[1], vec![0x00, 0x40]),
    ];
    let lacking = open(config.clone(), &weight);
    assert!(matches!(lacking.inputs("m"), Err(Error::NoTensor { tensor, .. }) if tensor == "m.input_scale"));
    let with = |scale| [weight[0].clone(), weight[1].clone(), ("m.input_scale", Dtype::F32, &[1][..], number(scale))];
    let stored = open(config.clone(), &with(0.5));
    assert_eq!(stored.inputs("m").unwrap(), Inputs { activations: Activations::StaticFp8, stored: 0.5 });
    let nothing = open(config, &with(0.0)).inputs("m").unwrap_err().to_string();
    assert!(nothing.contains("the scale of its inputs is 0"), "{nothing}");
}

#[test]
fn awq_words() {
    let scheme = scheme(4, false, Granularity::Channel).with_scale(ScaleType::F16);
    // Output o of input 0 is o, of input 1 all zeros; zero points count down.
    let codes = (0..8).flat_map(|o| [o, 0]).collect();
    let zeros = (8..16).rev().collect();
    let q = Quantized { scheme, shape: [8, 2], codes, scales: vec![1.0; 8], zeros, group_of: vec![], input: None };
    let payloads = format("awq").unwrap().encode("m", &q);
    assert_eq!(as_words(&payloads[0]), [0x75316420, 0]);
    assert_eq!(as_words(&payloads[1]), [0x8ace9bdf]);
    assert_eq!(payloads[2], [0x00, 0x3c].repeat(8));
}

#[test]
fn gptq_words() {
    let (gptq, second) = (format("gptq").unwrap(), format("gptq_v2").unwrap());
    let zeros = [
        (2, vec![0x55555555u32; 2]),
        (3, vec![0xdb6db6db, 0xb6db6db6, 0x6db6db6d]),
        (4, vec![0x77777777; 4]),
        (8, vec![0x7f7f7f7f; 8]),
    ];
    for (bits, zeros) in zeros {
        // Column 1 of [in, out] counts up, the others are zero.
        let max = 1u32 << bits;
        let mut codes = vec![0u8; 32 * 32];
        (0..32).for_each(|i| codes[32 + i] = (i as u32 % max) as u8);
        let scheme = scheme(bits, true, Granularity::Channel).with_scale(ScaleType::F16);
        let q = Quantized {
            scheme,
            shape: [32, 32],
            codes,
            scales: vec![1.0; 32],
            zeros: vec![],
            group_of: vec![],
            input: None,
        };
        let payloads = gptq.encode("m", &q);
        let packed = as_words(&payloads[0]);
        let column: Vec<u32> = packed.iter().skip(1).step_by(32).copied().collect();
        let expected: &[u32] = match bits {
            2 => &[0xe4e4e4e4, 0xe4e4e4e4],
            3 => &[0x88fac688, 0xc688fac6, 0xfac688fa],
            4 => &[0x76543210, 0xfedcba98, 0x76543210, 0xfedcba98],
            _ => &[0x03020100, 0x07060504, 0x0b0a0908, 0x0f0e0d0c, 0x13121110, 0x17161514, 0x1b1a1918, 0x1f1e1d1c],
        };
        assert_eq!(column, expected, "{bits} bits");
        assert!(packed.iter().step_by(32).all(|&w| w == 0));
        assert_eq!(as_words(&payloads[1]), zeros, "{bits} bits");
        let constants = match bits {
            2 => [0xaaaaaaaa; 3],
            3 => [0x24924924, 0x49249249, 0x92492492],
            4 => [0x88888888; 3],
            _ => [0x80808080; 3],
        };
        assert_eq!(as_words(&second.encode("m", &q)[1])[..2], constants[..2], "{bits} bits, version 2");
    }
}

#[test]
fn the_spaced_layout_of_old_releases_is_read() {
    let group =
        json!({"targets": ["Linear"], "weights": {"num_bits": 3, "strategy": "channel"}, "format": "pack-quantized"});
    let config = json!({"quant_method": "compressed-tensors", "config_groups": {"group_0": group}});
    let old = words(&[0x08fac688, 0x1a23eb1a, 0x2c688fac, 0x0000003e]);
    let shape = [1i64, 32].iter().flat_map(|d| d.to_le_bytes()).collect();
    let checkpoint = open(
        config,
        &[
            ("m.weight_packed", Dtype::I32, &[1, 4], old),
            ("m.weight_shape", Dtype::I64, &[2], shape),
            ("m.weight_scale", Dtype::F16, &[1, 1], vec![0x00, 0x3c]),
        ],
    );
    let expected: Vec<u8> = (0..32).map(|j| j % 8).collect();
    let q = read(&checkpoint, "m");
    assert_eq!(q.codes, expected);
    assert_eq!(q.scheme.scale, ScaleType::F16);
}

/// A 4-bit GPTQ module `[32, 32]` of zeros with two groups and the given parts.
fn gptq(config: Value, zeros: u32, map: Option<Vec<u32>>) -> Checkpoint {
    let mut block = json!({"quant_method": "gptq", "bits": 4, "group_size": 16});
    block.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
    let mut tensors: Vec<(&str, Dtype, &[usize], Vec<u8>)> = vec![
        ("m.qweight", Dtype::I32, &[4, 32], words(&[0x76543210; 128])),
        ("m.qzeros", Dtype::I32, &[2, 4], words(&[zeros; 8])),
        ("m.scales", Dtype::F16, &[2, 32], [0x00, 0x3c].repeat(64)),
    ];
    if let Some(map) = map {
        tensors.push(("m.g_idx", Dtype::I32, &[32], words(&map)));
    }
    open(block, &tensors)
}

#[test]
fn versions_and_zero_points_of_gptq() {
    // Version 1 adds one and wraps each field; version 2 does not.
    for (config, zeros, expected) in [
        (json!({"sym": true}), 0x77777777, None),
        (json!({"sym": true, "checkpoint_format": "gptq_v2"}), 0x88888888, None),
        (json!({"sym": false}), 0x77777777, Some([8, 8])),
        (json!({"sym": false}), 0xf0f0f0f0, Some([1, 0])),
        (json!({"sym": false, "format": "gptq_v2"}), 0xf0f0f0f0, Some([0, 15])),
        // `sym` claims what the zero points deny: they are kept.
        (json!({"sym": true}), 0x66666666, Some([7, 7])),
    ] {
        let q = read(&gptq(config.clone(), zeros, None), "m");
        assert_eq!(q.scheme.symmetric(), expected.is_none(), "{config}");
        if let Some([even, odd]) = expected {
            // [out, groups]: row 0 has the low nibble.
            assert_eq!(q.zeros[..4], [even, even, odd, odd], "{config}");
        }
        assert_eq!(q.codes[..9], [0, 1, 2, 3, 4, 5, 6, 7, 0]);
    }
}

#[test]
fn group_maps_of_gptq() {
    let ordered: Vec<u32> = (0..32).map(|i| i / 16).collect();
    assert!(read(&gptq(json!({}), 0x77777777, Some(ordered)), "m").group_of.is_empty());
    let shuffled: Vec<u32> = (0..32).map(|i| i % 2).collect();
    assert_eq!(read(&gptq(json!({"desc_act": true}), 0x77777777, Some(shuffled.clone())), "m").group_of, shuffled);
    let error = gptq(json!({}), 0x77777777, Some(vec![2; 32])).weight("m").unwrap_err();
    assert!(error.to_string().contains("m.g_idx") && error.to_string().contains("entries below 2"), "{error}");
}

#[test]
fn group_maps_of_compressed_tensors() {
    let weights = json!({"num_bits": 8, "strategy": "group", "group_size": 2, "actorder": "group"});
    let group = json!({"targets": ["Linear"], "weights": weights});
    let config =
        json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": group}});
    let shape = [1i64, 4].iter().flat_map(|d| d.to_le_bytes()).collect();
    let checkpoint = open(
        config,
        &[
            ("m.weight_packed", Dtype::I32, &[1, 1], words(&[0x04030201])),
            ("m.weight_shape", Dtype::I64, &[2], shape),
            ("m.weight_scale", Dtype::F32, &[1, 2], words(&[1.0f32.to_bits(), 2.0f32.to_bits()])),
            ("m.weight_g_idx", Dtype::I32, &[4], words(&[1, 0, 1, 0])),
        ],
    );
    let q = read(&checkpoint, "m");
    assert_eq!(q.group_of, [1, 0, 1, 0]);
    assert_eq!(q.dequantize(), [-254.0, -126.0, -250.0, -124.0]);
}

#[test]
fn a_dense_weight_is_dense_whatever_the_configuration_claims() {
    let block = json!({"quant_method": "gptq", "bits": 4, "group_size": 16});
    let checkpoint = open(
        block,
        &[
            ("head.weight", Dtype::BF16, &[1, 2], vec![0x80, 0x3f, 0x00, 0x40]),
            ("norm.weight", Dtype::BF16, &[2], vec![0; 4]),
            ("code.weight", Dtype::I8, &[1, 2], vec![0; 2]),
        ],
    );
    let weight = checkpoint.weight("head").unwrap();
    assert_eq!((weight.shape(), weight.to_f32().unwrap()), ([1, 2], vec![1.0, 2.0]));
    assert_eq!(checkpoint.scheme_of("head"), None);
    assert!(matches!(checkpoint.weight("norm"), Err(Error::Shape { tensor, .. }) if tensor == "norm.weight"));
    assert!(matches!(checkpoint.weight("code"), Err(Error::NoTensor { tensor, .. }) if tensor == "code.qweight"));
    let dense = open(Value::Null, &[("code.weight", Dtype::I8, &[1, 2], vec![0; 2])]);
    assert!(matches!(dense.weight("code"), Err(Error::Dtype { .. })));
}

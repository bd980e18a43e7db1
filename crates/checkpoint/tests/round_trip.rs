//! Every format gives back every scheme it supports, bit for bit, and accounts for every byte.

#![allow(clippy::unwrap_used, reason = "a failed test panics")]

mod support;

use bitmill_checkpoint::{Checkpoint, Error, FORMATS, Weight, format};
use bitmill_scheme::{Activations, Bits, Granularity, Quantized, ScaleType, Scheme};
use std::collections::BTreeMap;
use support::{Random, quantized, schemes, write};

/// Square, wide, tall, and widths that fill no word.
const SHAPES: [[usize; 2]; 6] = [[32, 64], [96, 32], [1, 64], [7, 40], [33, 8], [3, 5]];

#[test]
fn what_is_written_is_what_is_read() {
    let mut random = Random(1);
    for &format in FORMATS {
        let mut layers: BTreeMap<String, Quantized> = BTreeMap::new();
        for scheme in schemes() {
            for shape in SHAPES {
                let module = format!("model.layers.{}.proj", layers.len());
                if format.check(&module, &scheme, shape).is_ok() {
                    layers.insert(module, quantized(scheme, shape, &mut random));
                }
            }
        }
        assert!(layers.len() >= 20, "{} supports next to nothing", format.name());
        for shard_limit in [u64::MAX, 20_000] {
            let dir = tempfile::tempdir().unwrap();
            let plan = write(dir.path(), format, &layers, shard_limit);
            let checkpoint = Checkpoint::open(dir.path()).unwrap();
            assert_eq!(checkpoint.dialect().unwrap().format().name(), format.name());
            let on_disk: u64 = plan.files().map(|(f, _)| std::fs::metadata(dir.path().join(f)).unwrap().len()).sum();
            assert_eq!(on_disk, plan.total_bytes());
            for (module, q) in &layers {
                let Weight::Quantized(read) = checkpoint.weight(module).unwrap() else { panic!("{module} is dense") };
                assert_eq!(&read, q, "{} {module} {}", format.name(), q.scheme);
                assert_eq!(checkpoint.scheme_of(module), Some(q.scheme));
            }
            assert_eq!(checkpoint.dialect().unwrap().scheme_of("lm_head"), None);
        }
    }
}

#[test]
fn bits_per_weight_are_the_bytes_on_disk() {
    // Invariant 7, for shapes whose rows and columns fill their words: the scheme's own figure plus what the format
    // adds, which is named here.
    let shape = [64, 128];
    let weights = (shape[0] * shape[1]) as f64;
    for &format in FORMATS {
        for scheme in schemes().into_iter().filter(|s| format.check("m", s, shape).is_ok()) {
            let payload: usize = format.layout("m", &scheme, shape).iter().map(|s| s.bytes()).sum();
            let bits = f64::from(scheme.bits().get());
            let groups = scheme.groups(shape[1]) as f64;
            let zeros = if scheme.symmetric() { 0.0 } else { scheme.scales(shape) as f64 };
            let extra = match format.name() {
                // weight_shape, and the one zero point of a tensor in a whole byte.
                "pack-quantized" if scheme.granularity == Granularity::Tensor => 16.0 + zeros * (8.0 - bits) / 8.0,
                "pack-quantized" => 16.0,
                // A byte per code and zero point.
                "int-quantized" | "naive-quantized" => (weights + zeros) * (8.0 - bits) / 8.0,
                // Constant zero points and the map of groups.
                _ => groups * shape[0] as f64 * bits / 8.0 + shape[1] as f64 * 4.0,
            };
            let expected = scheme.bits_per_weight(shape) * weights / 8.0 + extra;
            assert_eq!(payload as f64, expected, "{} {scheme}", format.name());
        }
    }
}

#[test]
fn refusals_name_tensor_scheme_format_and_remedy() {
    let w4 = Scheme::int(Bits::new(4).unwrap(), true, Granularity::Group(128));
    let asym = Scheme::int(Bits::new(4).unwrap(), false, Granularity::Group(128)).with_scale(ScaleType::F16);
    let w8a8 = Scheme {
        activations: Activations::DynamicInt8,
        ..Scheme::int(Bits::new(8).unwrap(), true, Granularity::Channel)
    };
    let gptq = w4.with_scale(ScaleType::F16);
    let five = Scheme::int(Bits::new(5).unwrap(), true, Granularity::Channel).with_scale(ScaleType::F16);
    for (name, scheme, shape, words) in [
        (
            "gptq",
            asym,
            [128, 128],
            "down: format gptq cannot store w4 g128 asym: version 1 cannot store every zero point",
        ),
        ("gptq", w4, [128, 128], "its scales are f16"),
        ("gptq", five, [128, 128], "2, 3, 4 and 8 bits"),
        ("gptq", gptq, [100, 128], "multiples of 32 and the shape is [100, 128]"),
        ("gptq", Scheme { granularity: Granularity::Tensor, ..gptq }, [32, 32], "scales per group or channel"),
        ("gptq", w8a8, [32, 32], "weights only"),
        ("pack-quantized", w4, [128, 192], "group size 128 does not divide the input width 192"),
        ("pack-quantized", w4, [0, 128], "empty matrix"),
        ("pack-quantized", w8a8, [128, 128], "use int-quantized"),
        ("int-quantized", w4, [128, 128], "use pack-quantized or naive-quantized"),
        ("int-quantized", Scheme { activations: Activations::DynamicInt8, ..w4 }, [128, 128], "8-bit weights"),
        ("naive-quantized", w8a8, [128, 128], "use int-quantized"),
    ] {
        let error = format(name).unwrap().check("down", &scheme, shape).unwrap_err();
        assert!(matches!(&error, Error::Unsupported { tensor, format, .. } if tensor == "down" && *format == name));
        assert!(error.to_string().contains(words), "{error}");
    }
    assert!(format("gguf").is_some() && format("ggml").is_none());
}

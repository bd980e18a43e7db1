//! Every format gives back every scheme it supports, bit for bit, and accounts for every byte.

#![allow(clippy::unwrap_used, reason = "a failed test panics")]

mod support;

use bitmill_checkpoint::{Checkpoint, Error, FORMATS, Format, GGUF, Weight, format};
use bitmill_scheme::{Activations, Bits, BlockType, Granularity, Quantized, ScaleType, Scheme};
use std::collections::BTreeMap;
use support::{Random, quantized, schemes, write};

/// Square, wide, tall, and widths that fill no word.
const SHAPES: [[usize; 2]; 6] = [[32, 64], [96, 32], [1, 64], [7, 40], [33, 8], [3, 5]];

/// Matrices of every scheme that `format` supports, in as many folders as its configuration needs for them.
fn folders(format: &dyn Format, random: &mut Random) -> Vec<BTreeMap<String, Quantized>> {
    let mut by_scheme: Vec<BTreeMap<String, Quantized>> = Vec::new();
    for scheme in schemes() {
        let name = |shape: [usize; 2]| format!("model.layers.{}.proj_{}x{}", by_scheme.len(), shape[0], shape[1]);
        let fits = |shape: &[usize; 2]| format.check("m", &scheme, *shape).is_ok() && support::can_be(&scheme, *shape);
        let layers = SHAPES.into_iter().filter(fits).map(|shape| (name(shape), quantized(scheme, shape, random)));
        by_scheme.push(layers.collect());
    }
    by_scheme.retain(|layers| !layers.is_empty());
    let together: BTreeMap<String, Scheme> = by_scheme.iter().flatten().map(|(m, q)| (m.clone(), q.scheme)).collect();
    match format.config(&together, &[]) {
        Ok(_) => vec![by_scheme.into_iter().flatten().collect()],
        Err(_) => by_scheme,
    }
}

#[test]
fn what_is_written_is_what_is_read() {
    let mut random = Random(1);
    for &format in FORMATS {
        let folders = folders(format, &mut random);
        let matrices: usize = folders.iter().map(BTreeMap::len).sum();
        assert!(matrices >= 3, "{} supports next to nothing", format.name());
        for (layers, shard_limit) in folders.iter().flat_map(|layers| [(layers, u64::MAX), (layers, 20_000)]) {
            let dir = tempfile::tempdir().unwrap();
            let plan = write(dir.path(), format, layers, shard_limit);
            let checkpoint = Checkpoint::open(dir.path()).unwrap();
            assert_eq!(checkpoint.dialect().unwrap().format().name(), format.name());
            let on_disk: u64 = plan.files().map(|(f, _)| std::fs::metadata(dir.path().join(f)).unwrap().len()).sum();
            assert_eq!(on_disk, plan.total_bytes());
            for (module, q) in layers {
                let Weight::Quantized(read) = checkpoint.weight(module).unwrap() else { panic!("{module} is dense") };
                assert_eq!(&read, q, "{} {module} {}", format.name(), q.scheme);
                assert_eq!(checkpoint.matrix_shape(module).unwrap(), q.shape);
                // Headers do not say what a map holds.
                if q.group_of.is_empty() {
                    assert_eq!(checkpoint.scheme_of(module), Some(q.scheme));
                }
            }
            assert_eq!(checkpoint.dialect().unwrap().scheme_of("lm_head"), None);
        }
    }
}

#[test]
fn what_is_stored_by_rows_is_encoded_alike_in_parts() {
    let mut random = Random(5);
    let mut seen = Vec::new();
    let blocks = [BlockType::Q4_0, BlockType::Q5_0, BlockType::Q8_0].map(Scheme::block);
    for &format in FORMATS.iter().chain([&GGUF]) {
        for (scheme, shape) in schemes().into_iter().chain(blocks).flat_map(|s| [[7, 40], [33, 256]].map(|n| (s, n))) {
            let holds = format.check("m", &scheme, shape).is_ok() && support::can_be(&scheme, shape);
            let Some(of_shape) = format.by_rows(&scheme, shape).filter(|_| holds) else { continue };
            seen.push(format.name());
            let q = quantized(scheme, shape, &mut random);
            let of = |from: usize, to: usize| {
                let cut = |len: usize| len / shape[0] * from..len / shape[0] * to;
                let (codes, scales, zeros) = (cut(q.codes.len()), cut(q.scales.len()), cut(q.zeros.len()));
                let part = Quantized {
                    shape: [to - from, shape[1]],
                    codes: q.codes[codes].to_vec(),
                    scales: q.scales[scales].to_vec(),
                    zeros: q.zeros[zeros].to_vec(),
                    ..q.clone()
                };
                format.encode("m", &part)
            };
            let mut whole = format.encode("m", &q);
            assert_eq!(whole.split_off(whole.len() - of_shape.len()), of_shape, "{} {scheme}", format.name());
            for (i, bytes) in whole.iter().enumerate() {
                assert_eq!(*bytes, [&of(0, 5)[i][..], &of(5, shape[0])[i]].concat(), "{} {scheme}", format.name());
            }
        }
    }
    seen.dedup();
    assert_eq!(seen, ["pack-quantized", "gguf"]);
}

#[test]
fn version_1_of_gptq_takes_zero_points_above_zero() {
    let scheme = Scheme::int(Bits::new(4).unwrap(), false, Granularity::Group(32)).with_scale(ScaleType::F16);
    let mut q = quantized(scheme, [32, 64], &mut Random(3));
    q.zeros.iter_mut().for_each(|z| *z = 1 + *z % 15);
    let (v1, v2) = (format("gptq").unwrap(), format("gptq_v2").unwrap());
    for format in [v1, v2] {
        assert_eq!(format.check("m", &scheme, q.shape).is_ok(), format.name() == "gptq_v2");
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), format, &BTreeMap::from([("m".to_owned(), q.clone())]), u64::MAX);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.config()["quantization_config"]["sym"], false);
        let Weight::Quantized(read) = checkpoint.weight("m").unwrap() else { panic!("dense") };
        assert_eq!(read, q);
    }
    q.zeros[5] = 0;
    v2.holds("m", &q).unwrap();
    let said = v1.holds("m", &q).unwrap_err().to_string();
    assert!(said.starts_with("m: format gptq cannot store") && said.contains("use gptq_v2"), "{said}");
}

#[test]
fn awq_has_one_scheme_and_exceptions_by_parts_of_names() {
    let awq = format("awq").unwrap();
    let scheme = |g| Scheme::int(Bits::new(4).unwrap(), false, Granularity::Group(g)).with_scale(ScaleType::F16);
    let layers = BTreeMap::from([("a.gate_proj".to_owned(), scheme(32)), ("a.up_proj".to_owned(), scheme(32))]);
    let said = awq.config(&layers, &["a.gate".to_owned()]).unwrap_err().to_string();
    assert!(said.contains("a.gate_proj") && said.contains("leave it out with a.gate,"), "{said}");
    let config = awq.config(&layers, &["lm_head".to_owned()]).unwrap();
    assert_eq!(config["modules_to_not_convert"][0], "lm_head");
    let mixed = BTreeMap::from([("a".to_owned(), scheme(32)), ("b".to_owned(), scheme(64))]);
    let said = awq.config(&mixed, &[]).unwrap_err().to_string();
    assert!(said.starts_with("b: format awq cannot store w4 g64 asym: its configuration has one scheme"), "{said}");
}

#[test]
fn bits_per_weight_are_the_bytes_on_disk() {
    // Invariant 7, for shapes whose rows and columns fill their words: the scheme's own figure plus what the format
    // adds, which is named here.
    let shape = [64, 128];
    let weights = (shape[0] * shape[1]) as f64;
    // A mixture adds nothing to what its formats do.
    for &format in FORMATS.iter().filter(|f| f.name() != "mixed-precision") {
        for scheme in schemes().into_iter().filter(|s| format.check("m", s, shape).is_ok()) {
            let payload: usize = format.layout("m", &scheme, shape).iter().map(|s| s.bytes()).sum();
            let bits = f64::from(scheme.bits().get());
            let groups = scheme.groups(shape[1]) as f64;
            let zeros = if scheme.symmetric() { 0.0 } else { scheme.scales(shape) as f64 };
            let extra = match format.name() {
                // weight_shape, and the one zero point of a tensor in a whole byte.
                "pack-quantized" if scheme.granularity == Granularity::Tensor => 16.0 + zeros * (8.0 - bits) / 8.0,
                "pack-quantized" => 16.0,
                // The scheme's own bits and nothing else.
                "float-quantized"
                | "nvfp4-pack-quantized"
                | "mxfp4-pack-quantized"
                | "mxfp8-quantized"
                | "modelopt"
                | "fp8" => 0.0,
                // A byte per code and zero point.
                "int-quantized" | "naive-quantized" => (weights + zeros) * (8.0 - bits) / 8.0,
                // Zero points are counted already, and there is no map.
                "awq" => 0.0,
                // The map of groups.
                "gptq_v2" if !scheme.symmetric() => shape[1] as f64 * 4.0,
                // Constant zero points as well.
                "gptq" | "gptq_v2" => groups * shape[0] as f64 * bits / 8.0 + shape[1] as f64 * 4.0,
                // The table of numbers, and what is said in words.
                "bitsandbytes" => {
                    let block = scheme.group_len(shape[1]);
                    // Both names of tables are as long.
                    let said = format!(
                        r#"{{"quant_type": "nf4", "blocksize": {block}, "dtype": "float32", "shape": [64, 128]}}"#
                    );
                    64.0 + said.len() as f64
                }
                // A bit for every column.
                "binary" => shape[1] as f64 / 8.0,
                other => panic!("what {other} adds is not known"),
            };
            let mapped = matches!(scheme.granularity, Granularity::Mapped(_)) && !format.name().starts_with("gptq");
            let extra = extra + if mapped { shape[1] as f64 * 4.0 } else { 0.0 };
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
    let fp8 = Scheme { activations: Activations::Full, ..bitmill_scheme::scheme("fp8_dynamic").unwrap() };
    let nvfp4 = bitmill_scheme::scheme("nvfp4a16").unwrap();
    let named = |name: &str| bitmill_scheme::scheme(name).unwrap();
    let (nf4, mxfp4) = (named("nf4"), named("mxfp4"));
    let five = Scheme::int(Bits::new(5).unwrap(), true, Granularity::Channel).with_scale(ScaleType::F16);
    for (name, scheme, shape, words) in [
        (
            "gptq",
            asym,
            [128, 128],
            "down: format gptq cannot store w4 g128 asym: version 1 cannot store every zero point",
        ),
        ("gptq", w4, [128, 128], "its scales are f16"),
        ("gptq_v2", w4, [128, 128], "its scales are f16"),
        ("awq", gptq, [128, 128], "it stores a zero point for every group; pass --asymmetric"),
        ("awq", asym, [100, 128], "it packs 8 outputs into a word and there are 100"),
        ("awq", five, [128, 128], "its readers know 4 bits"),
        ("awq", Scheme { granularity: Granularity::Mapped(128), ..asym }, [128, 128], "none out of order (desc_act)"),
        ("int-quantized", Scheme { granularity: Granularity::Mapped(128), ..w8a8 }, [128, 128], "consecutive groups"),
        ("gptq", five, [128, 128], "2, 3, 4 and 8 bits"),
        ("gptq", gptq, [100, 128], "multiples of 32 and the shape is [100, 128]"),
        ("gptq", Scheme { granularity: Granularity::Tensor, ..gptq }, [32, 32], "scales per group or channel"),
        ("gptq", w8a8, [32, 32], "weights only"),
        ("pack-quantized", w4, [128, 192], "group size 128 does not divide the input width 192"),
        ("pack-quantized", w4, [0, 128], "empty matrix"),
        ("pack-quantized", w8a8, [128, 128], "use int-quantized"),
        ("int-quantized", w4, [128, 128], "use pack-quantized or naive-quantized"),
        ("int-quantized", Scheme { activations: Activations::DynamicInt8, ..asym }, [128, 128], "8-bit weights"),
        (
            "pack-quantized",
            Scheme { activations: Activations::DynamicFp8, ..asym },
            [128, 128],
            "or of 4 bits with 8-bit floats",
        ),
        ("naive-quantized", w8a8, [128, 128], "use int-quantized"),
        ("naive-quantized", fp8, [128, 128], "use float-quantized for floats"),
        ("pack-quantized", nvfp4, [128, 128], "use nvfp4-pack-quantized for floats"),
        ("float-quantized", w4, [128, 128], "choose a scheme like fp8_dynamic"),
        ("float-quantized", nvfp4, [128, 128], "use nvfp4-pack-quantized"),
        (
            "float-quantized",
            Scheme { activations: Activations::DynamicInt8, ..fp8 },
            [128, 128],
            "no kernel for such inputs",
        ),
        ("nvfp4-pack-quantized", nvfp4, [128, 24], "group size 16 does not divide the input width 24"),
        ("nvfp4-pack-quantized", Scheme { granularity: Granularity::Group(32), ..nvfp4 }, [128, 32], "per 16 inputs"),
        ("mixed-precision", Scheme::block(BlockType::Q4K), [128, 256], "write a .gguf file"),
        ("gptq", fp8, [128, 128], "gptq cannot store fp8 channel"),
        ("bitsandbytes", w4, [128, 128], "choose --scheme nf4"),
        ("bitsandbytes", nf4, [128, 96], "group size 64 does not divide the input width 96"),
        ("bitsandbytes", Scheme { granularity: Granularity::Group(16), ..nf4 }, [128, 32], "blocks are of 32 to 4096"),
        ("float-quantized", nf4, [128, 128], "use bitsandbytes"),
        ("pack-quantized", nf4, [128, 128], "use bitsandbytes for floats"),
        ("mixed-precision", nf4, [128, 128], "compressed-tensors does not store such numbers"),
        ("nvfp4-pack-quantized", mxfp4, [128, 128], "use mxfp4-pack-quantized"),
        (
            "mxfp4-pack-quantized",
            Scheme { activations: Activations::Nvfp4, ..mxfp4 },
            [128, 128],
            "no kernel for such inputs",
        ),
        ("awq", fp8, [128, 128], "awq cannot store fp8 channel"),
        ("binary", w4, [128, 128], "choose --scheme binary"),
        ("binary", Scheme::binary(128), [128, 192], "group size 128 does not divide the input width 192"),
        ("binary", Scheme::binary(12), [128, 24], "groups are of a multiple of 8 inputs"),
    ] {
        let error = format(name).unwrap().check("down", &scheme, shape).unwrap_err();
        assert!(matches!(&error, Error::Unsupported { tensor, format, .. } if tensor == "down" && *format == name));
        assert!(error.to_string().contains(words), "{error}");
    }
    assert!(format("gguf").is_some() && format("ggml").is_none());
    for other in FORMATS.iter().copied().chain(format("gguf")).filter(|f| f.name() != "binary") {
        let said = other.check("down", &Scheme::binary(128), [128, 128]).unwrap_err().to_string();
        assert!(said.contains(&format!("format {} cannot store binary g128", other.name())), "{said}");
        assert!(said.contains("use binary"), "{said}");
    }
}

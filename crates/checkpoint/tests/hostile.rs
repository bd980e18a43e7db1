//! Damaged and lying input: always an error that names the culprit, never a panic.

#![allow(clippy::unwrap_used, reason = "a failed test panics")]

mod support;

use bitmill_checkpoint::{Checkpoint, Error, FORMATS, Format};
use bitmill_scheme::{Granularity, Quantized};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use support::{Random, quantized, schemes, write};

/// A folder with `config.json` and the given files.
fn folder(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    for (name, bytes) in files {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

/// A shard with `header` as it stands and `payload` behind it.
fn raw(header: &str, payload: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; payload]].concat()
}

fn one(name: &str) -> Vec<u8> {
    raw(&format!(r#"{{"{name}":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}}}"#), 8)
}

fn index(map: Value) -> Vec<u8> {
    json!({"metadata": {}, "weight_map": map}).to_string().into_bytes()
}

fn message(dir: &Path) -> String {
    Checkpoint::open(dir).expect_err("opened").to_string()
}

#[test]
fn lying_headers() {
    let tensor = |dtype: &str, shape: &str, from: u64, to: u64| {
        format!(r#""t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}"#)
    };
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("empty file", vec![]),
        ("no room for a length", vec![1, 2, 3]),
        ("length beyond the file", 1000u64.to_le_bytes().to_vec()),
        ("absurd length", [&u64::MAX.to_le_bytes()[..], b"{}"].concat()),
        ("not JSON", raw("{\"t\"", 0)),
        ("not UTF-8", [&2u64.to_le_bytes()[..], &[0xff, 0xfe]].concat()),
        ("offsets beyond the file", raw(&format!("{{{}}}", tensor("F32", "[2]", 0, 8)), 4)),
        ("bytes left over", raw(&format!("{{{}}}", tensor("F32", "[2]", 0, 8)), 12)),
        ("shape against offsets", raw(&format!("{{{}}}", tensor("F32", "[3]", 0, 8)), 8)),
        ("shape overflows", raw(&format!("{{{}}}", tensor("F32", "[4294967296,4294967296,2]", 0, 8)), 8)),
        ("backwards", raw(&format!("{{{}}}", tensor("F32", "[2]", 8, 0)), 8)),
        ("unknown type", raw(&format!("{{{}}}", tensor("Q4", "[2]", 0, 8)), 8)),
        (
            "overlap",
            raw(
                &format!(
                    "{{{},\"u\":{{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[4,12]}}}}",
                    tensor("F32", "[2]", 0, 8)
                ),
                12,
            ),
        ),
    ];
    for (case, bytes) in cases {
        let dir = folder(&[("model.safetensors", bytes)]);
        let error = Checkpoint::open(dir.path()).expect_err(case);
        assert!(matches!(&error, Error::Header { file, .. } if file.ends_with("model.safetensors")), "{case}: {error}");
        assert!(error.to_string().contains("truncated or damaged"), "{case}: {error}");
    }
}

#[test]
fn folders_with_something_missing_or_wrong() {
    let dir = tempfile::tempdir().unwrap();
    assert!(message(&dir.path().join("nowhere")).contains("give the folder of a model"));
    assert!(message(dir.path()).contains("config.json does not exist"));
    std::fs::write(dir.path().join("config.json"), "{").unwrap();
    assert!(message(dir.path()).contains("config.json is not the JSON it should be"));
    std::fs::write(dir.path().join("config.json"), "[]").unwrap();
    assert!(message(dir.path()).contains("not an object"));
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    assert!(message(dir.path()).contains("neither model.safetensors nor an index"));

    let name = "model.safetensors.index.json";
    for (files, expected) in [
        (vec![(name, b"{}".to_vec())], "no weight_map"),
        (vec![(name, index(json!({"t": "../secret"})))], "which is not a file name"),
        (vec![(name, index(json!({"t": "/etc/hostname"})))], "which is not a file name"),
        (vec![(name, index(json!({"t": 3})))], "which is not a file name"),
        (vec![(name, index(json!({"t": "a"})))], "the index names it: fetch the missing shard"),
        (
            vec![(name, index(json!({"t": "a", "u": "a"}))), ("a", one("t"))],
            "places tensor u in a, which does not hold it",
        ),
        (vec![(name, index(json!({"t": "a", "u": "b"}))), ("a", one("t")), ("b", one("t"))], "places tensor u in b"),
        (vec![(name, index(json!({"t": "a"}))), ("a", b"short".to_vec())], "a is truncated or damaged"),
    ] {
        let dir = folder(&files);
        let error = message(dir.path());
        assert!(error.contains(expected), "{error}");
    }
    let two = raw(
        r#"{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"u":{"dtype":"U8","shape":[],"data_offsets":[1,2]}}"#,
        2,
    );
    let dir = folder(&[(name, index(json!({"t": "a", "u": "b"}))), ("a", one("t")), ("b", two)]);
    let error = message(dir.path());
    assert!(error.contains("tensor t is stored twice") && error.contains("/a") && error.contains("/b"), "{error}");
}

#[test]
fn natural_limits_are_no_errors() {
    let header = r#"{"__metadata__":{"format":"pt"},"empty":{"dtype":"F32","shape":[0,4],"data_offsets":[0,0]},"scalar":{"dtype":"BF16","shape":[],"data_offsets":[0,2]}}"#;
    let dir = folder(&[("model.safetensors", raw(header, 2)), ("tokenizer.json", b"{}".to_vec()), (".hidden", vec![])]);
    std::fs::create_dir_all(dir.path().join("sub/.git")).unwrap();
    std::fs::write(dir.path().join("sub/template.jinja"), "").unwrap();
    std::fs::write(dir.path().join("sub/.git/HEAD"), "").unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["empty", "scalar"]);
    assert_eq!(checkpoint.tensor("empty").unwrap().to_f32().unwrap(), [0.0f32; 0]);
    assert_eq!(checkpoint.tensor("empty").unwrap().first_non_finite(), None);
    assert_eq!(checkpoint.tensor("scalar").unwrap().to_f32().unwrap(), [0.0]);
    assert_eq!(checkpoint.other_files().unwrap(), ["sub/template.jinja", "tokenizer.json"].map(Path::new));
    assert_eq!(checkpoint.file_of("scalar"), checkpoint.shard_paths().next());
    let error = checkpoint.tensor("absent").unwrap_err().to_string();
    assert!(error.contains("holds no tensor absent"), "{error}");
    let none = folder(&[("model.safetensors", raw("{}", 0))]);
    assert_eq!(Checkpoint::open(none.path()).unwrap().names().count(), 0);
}

#[test]
fn packed_tensors_of_the_wrong_shape() {
    let mut random = Random(5);
    for &format in FORMATS {
        // The last supported scheme of each kind has the most tensors.
        for symmetric in [true, false] {
            let supported = schemes().into_iter().filter(|s| s.symmetric() == symmetric);
            let Some(scheme) = supported.filter(|s| format.check("m", s, [32, 64]).is_ok()).last() else { continue };
            let q = quantized(scheme, [32, 64], &mut random);
            let specs = format.layout("m", &scheme, q.shape);
            let payloads = format.encode("m", &q);
            let config =
                json!({"quantization_config": format.config(&[("m".to_owned(), scheme)].into(), &[]).unwrap()});
            let build = |change: usize, cut: bool| {
                let views = specs.iter().zip(&payloads).enumerate().filter(|(i, _)| !(cut && *i == change));
                let views = views.map(|(i, (spec, bytes))| {
                    let mut shape = spec.shape.clone();
                    let mut bytes = bytes.clone();
                    if i == change {
                        // One row less, of a shape that agrees with its bytes; of one number, none.
                        let rows = shape.first().copied().unwrap_or(1);
                        bytes.truncate(bytes.len() / rows * (rows - 1));
                        shape = [&[rows - 1], shape.get(1..).unwrap_or_default()].concat();
                    }
                    (spec.name.clone(), spec.dtype, shape, bytes)
                });
                let views: Vec<_> = views.collect();
                let tensors: Vec<_> = views.iter().map(|(n, d, s, b)| (n.as_str(), *d, &s[..], b.clone())).collect();
                Checkpoint::in_memory(config.clone(), support::shard(&tensors)).unwrap()
            };
            assert!(build(usize::MAX, false).weight("m").is_ok());
            // A tile with a row less is a tile.
            let checked = if matches!(scheme.granularity, Granularity::Tile(_)) { 1 } else { 0 };
            for (i, spec) in specs.iter().enumerate().skip(checked) {
                let error = build(i, false).weight("m").expect_err(&spec.name);
                assert!(matches!(error, Error::Shape { .. }), "{}: {error}", spec.name);
                // Only the map of groups may be absent.
                let without = build(i, true);
                let absent = without.weight("m");
                match spec.name.as_str() {
                    "m.g_idx" | "m.weight_g_idx" => assert!(absent.is_ok()),
                    name => assert!(matches!(&absent, Err(Error::NoTensor { tensor, .. }) if tensor == name), "{name}"),
                }
            }
        }
    }
}

#[test]
fn binary_numbers_that_contradict_themselves() {
    use safetensors::Dtype::{BF16, F16, I8, U8};
    let config = |group: Value| json!({"quant_method": "bitmill", "format": "binary", "group_size": group});
    let open = |packed: (_, &[usize]), salient: (_, &[usize]), params: (_, &[usize]), value: [u8; 2]| {
        let bytes = |shape: &[usize], each: &[u8]| each.repeat(shape.iter().product());
        let tensors = [
            ("m.weight_packed", packed.0, packed.1, bytes(packed.1, &[0xe4])),
            ("m.weight_salient", salient.0, salient.1, bytes(salient.1, &[0x81])),
            ("m.weight_params", params.0, params.1, bytes(params.1, &value)),
        ];
        support::open(config(json!(8)), &tensors).weight("m").map(|w| w.to_f32().unwrap())
    };
    let (packed, salient, params, one) = ((U8, &[2, 4][..]), (U8, &[2][..]), (F16, &[2, 2, 7][..]), [0x00, 0x3c]);
    let read = open(packed, salient, params, one).unwrap();
    // Of parameters that are all 1: mean less magnitude, mean and magnitude, and of salient columns both magnitudes.
    assert_eq!(read[..8], [-1.0, 2.0, 0.0, 2.0, 0.0, 2.0, 0.0, 3.0]);
    for (said, result) in [
        ("[2, 2, 7]", open(packed, salient, (F16, &[2, 2, 6]), one)),
        ("[2, 2, 7]", open(packed, salient, (F16, &[28]), one)),
        ("F16 is needed", open(packed, salient, (BF16, &[2, 2, 7]), one)),
        ("[2]", open(packed, (U8, &[3]), params, one)),
        ("U8 is needed", open(packed, (I8, &[2]), params, one)),
        ("group size 8 does not divide the input width 12", open((U8, &[2, 3]), salient, params, one)),
        ("not empty", open((U8, &[0, 4]), salient, params, one)),
        ("the scale of row 0, group 0 is NaN", open(packed, salient, params, [0x01, 0x7e])),
        ("the scale of row 0, group 0 is inf", open(packed, salient, params, [0x00, 0x7c])),
    ] {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(said), "{said}: {error}");
    }
    for (group, said) in
        [(json!(12), "a multiple of 8"), (json!(0), "a multiple of 8"), (json!("x"), "a multiple of 8")]
    {
        let error = Checkpoint::in_memory(json!({"quantization_config": config(group)}), support::shard(&[]));
        assert!(error.unwrap_err().to_string().contains(said));
    }
}

/// A valid quantized folder per format, as config and shard.
fn samples() -> Vec<(Value, Vec<u8>)> {
    let mut random = Random(9);
    let sample = |format: &dyn Format, random: &mut Random| {
        let mut layers: BTreeMap<String, Quantized> = BTreeMap::new();
        let supported: Vec<_> = schemes().into_iter().filter(|s| format.check("m", s, [32, 32]).is_ok()).collect();
        for scheme in supported.iter().step_by(supported.len().div_ceil(12)) {
            layers.insert(format!("m{}", layers.len()), quantized(*scheme, [32, 32], random));
        }
        let schemes = layers.iter().map(|(m, q)| (m.clone(), q.scheme)).collect();
        if format.config(&schemes, &[]).is_err() {
            layers.retain(|m, _| m == "m0");
        }
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), format, &layers, u64::MAX);
        let config = serde_json::from_slice(&std::fs::read(dir.path().join("config.json")).unwrap()).unwrap();
        (config, std::fs::read(dir.path().join("model.safetensors")).unwrap())
    };
    FORMATS.iter().map(|&f| sample(f, &mut random)).collect()
}

/// Opens and reads everything there is; only the absence of a panic matters.
fn exercise(config: Value, shard: Vec<u8>) {
    let Ok(checkpoint) = Checkpoint::in_memory(config, shard) else { return };
    let names: Vec<String> = checkpoint.names().map(str::to_owned).collect();
    for name in names {
        let tensor = checkpoint.tensor(&name).unwrap();
        let _ = (tensor.to_f32(), tensor.first_non_finite());
        if let Some((module, _)) = name.rsplit_once('.') {
            let _ = checkpoint.scheme_of(module);
            if let Ok(weight) = checkpoint.weight(module) {
                let [rows, cols] = weight.shape();
                assert_eq!(weight.to_f32().unwrap().len(), rows * cols);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        exercise(json!({}), bytes.clone());
        // Behind a plausible length the bytes reach the parser.
        exercise(json!({}), [&(bytes.len() as u64).to_le_bytes()[..], &bytes].concat());
    }

    #[test]
    fn mutated_headers_never_panic(sample in 0usize..FORMATS.len(), edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let (config, mut shard) = SAMPLES.with(|s| s[sample].clone());
        let header = u64::from_le_bytes(shard[..8].try_into().unwrap()) as usize + 8;
        for (at, value) in edits {
            // Digits and brackets survive JSON more often than any byte.
            let alphabet = b"0123456789[]{},:\"IFU";
            shard[at.index(header)] = if value < 200 { alphabet[value as usize % alphabet.len()] } else { value };
        }
        exercise(config, shard);
    }

    #[test]
    fn truncated_and_mutated_files_never_panic(sample in 0usize..FORMATS.len(), cut: prop::sample::Index, edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..40), truncate: bool) {
        let (config, mut shard) = SAMPLES.with(|s| s[sample].clone());
        let header = u64::from_le_bytes(shard[..8].try_into().unwrap()) as usize + 8;
        for (at, value) in edits {
            let i = header + at.index(shard.len() - header);
            shard[i] = value;
        }
        if truncate {
            let n = cut.index(shard.len());
            shard.truncate(n);
            prop_assert!(Checkpoint::in_memory(config.clone(), shard.clone()).is_err());
        }
        exercise(config, shard);
    }

    #[test]
    fn contradicting_configurations_never_panic(sample in 0usize..FORMATS.len(), bits in 0u32..10, group in -2i64..80, symmetric: bool, strategy in 0usize..4) {
        let (_, shard) = SAMPLES.with(|s| s[sample].clone());
        let strategy = ["tensor", "channel", "group", "block"][strategy];
        let format = ["pack-quantized", "int-quantized", "naive-quantized"][bits as usize % 3];
        let weights = json!({"num_bits": bits, "symmetric": symmetric, "strategy": strategy, "group_size": group});
        let groups = json!({"g": {"targets": ["Linear"], "weights": weights}});
        exercise(json!({"quantization_config": {"quant_method": "compressed-tensors", "format": format, "config_groups": groups}}), shard.clone());
        exercise(json!({"quantization_config": {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric}}), shard);
    }
}

thread_local! {
    static SAMPLES: Vec<(Value, Vec<u8>)> = samples();
}

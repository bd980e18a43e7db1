//! What a user relies on: a folder goes in, a complete smaller folder comes out, and the reports are true.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use safetensors::SafeTensors;
use std::collections::BTreeSet;
use std::path::Path;
use support::{QUICK, assert_same, bitmill, books, json, success};

fn quantize(out: &Path, extra: &[&str]) -> serde_json::Value {
    json(bitmill(["quantize"]).arg(books()).arg("-o").arg(out).args(QUICK).args(extra))
}

#[test]
fn the_output_is_complete_and_its_size_is_what_was_reported() {
    let dir = tempfile::tempdir().unwrap();
    let schemes: [&[&str]; 9] = [
        &[],
        &["--bits", "3", "--asymmetric", "--group-size", "64"],
        &["--bits", "2", "--group-size", "-1"],
        &["--bits", "8", "--group-size", "0", "--format", "naive-quantized"],
        &["--scheme", "w8a8"],
        &["--scheme", "fp8_block"],
        &["--scheme", "nvfp4a16"],
        &["--format", "gptq"],
        &["--format", "gptq", "--bits", "3", "--group-size", "32"],
    ];
    for (i, scheme) in schemes.iter().enumerate() {
        let out = dir.path().join(format!("out-{i}"));
        let plan = json(
            bitmill(["quantize"]).arg(books()).arg("-o").arg(&out).args(["--method", "rtn", "--dry-run"]).args(*scheme),
        );
        assert!(!out.exists(), "a dry run writes nothing");
        let report = quantize(&out, &[&["--method", "rtn"], *scheme].concat());
        let bytes = std::fs::read(out.join("model.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();

        // Invariant 7: bits per weight × weights ÷ 8 is the payload on disk.
        let quantized: BTreeSet<&str> =
            report["tensors"].as_array().unwrap().iter().map(|t| t["tensor"].as_str().unwrap()).collect();
        let payload: usize = tensors
            .iter()
            .filter(|(name, _)| quantized.contains(name.rsplit_once('.').unwrap().0))
            .map(|(_, view)| view.data().len())
            .sum();
        let (bits, weights) =
            (report["bits_per_weight"].as_f64().unwrap(), report["quantized_weights"].as_f64().unwrap());
        assert_eq!((bits * weights / 8.0).round() as usize, payload, "{scheme:?}");
        assert_eq!(report["output_bytes"].as_u64().unwrap(), bytes.len() as u64);
        // What a dry run promised is what was written.
        assert_eq!(plan["output_bytes"], report["output_bytes"]);
        assert_eq!(plan["bits_per_weight"], report["bits_per_weight"]);

        // Invariant 8: each tensor of the input is quantized or copied, and each file is there.
        let original = std::fs::read(books().join("model.safetensors")).unwrap();
        for (name, view) in SafeTensors::deserialize(&original).unwrap().iter() {
            match name.strip_suffix(".weight").filter(|m| quantized.contains(m)) {
                Some(_) => assert!(name.contains("_proj")),
                None => assert_eq!(tensors.tensor(name).unwrap().data(), view.data(), "{name}"),
            }
        }
        assert_eq!(quantized.len(), 56);
        for file in
            ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json", "calibration.txt"]
        {
            assert_eq!(std::fs::read(out.join(file)).unwrap(), std::fs::read(books().join(file)).unwrap(), "{file}");
        }
        let log = std::fs::read_to_string(dir.path().join(format!("out-{i}.log.jsonl"))).unwrap();
        assert_eq!(log.lines().count(), 56);
        let inspected = json(bitmill(["inspect"]).arg(&out));
        assert_eq!(inspected["format"], report["format"]);
        let weights: u64 = inspected["kinds"].as_array().unwrap().iter().map(|k| k["weights"].as_u64().unwrap()).sum();
        assert_eq!(weights, 10_490_112, "every weight is counted once");
    }
}

#[test]
fn matrices_that_loaders_fuse_share_what_nvfp4_divides_by() {
    let dir = tempfile::tempdir().unwrap();
    for (name, method) in [("data-free", &["--method", "rtn"][..]), ("calibrated", &["--method", "gptq"])] {
        let (out, few) = (dir.path().join(name), ["--ignore", r"model\.layers\.[2-7]\."]);
        quantize(&out, &[&["--scheme", "nvfp4a16", "--descent-sweeps", "1"], method, &few[..]].concat());
        let bytes = std::fs::read(out.join("model.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let divisor = |module: &str| {
            let view = tensors.tensor(&format!("model.layers.1.{module}_proj.weight_global_scale")).unwrap();
            f32::from_le_bytes(view.data().try_into().unwrap())
        };
        let attention = ["q", "k", "v"].map(|m| divisor(&format!("self_attn.{m}")));
        let mlp = ["gate", "up"].map(|m| divisor(&format!("mlp.{m}")));
        assert!(attention.iter().all(|d| *d == attention[0]) && mlp[0] == mlp[1], "{name}: {attention:?} {mlp:?}");
        // Powers of two, so that the reciprocals other formats store are exact.
        let all = attention.into_iter().chain(mlp).chain(["self_attn.o", "mlp.down"].map(divisor));
        assert!(all.into_iter().all(|d| d.is_normal() && d.to_bits() << 9 == 0), "{name}");
    }
}

#[test]
fn shards_hold_the_same_tensors_as_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let (one, many) = (dir.path().join("one"), dir.path().join("many"));
    quantize(&one, &["--method", "rtn"]);
    quantize(&many, &["--method", "rtn", "--max-shard-size", "5MB"]);
    let whole = std::fs::read(one.join("model.safetensors")).unwrap();
    let whole = SafeTensors::deserialize(&whole).unwrap();
    let index: serde_json::Value =
        serde_json::from_slice(&std::fs::read(many.join("model.safetensors.index.json")).unwrap()).unwrap();
    let map = index["weight_map"].as_object().unwrap();
    assert_eq!(map.len(), whole.len());
    let files: BTreeSet<&str> = map.values().map(|f| f.as_str().unwrap()).collect();
    assert!(files.len() >= 3);
    for file in files {
        let bytes = std::fs::read(many.join(file)).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().iter() {
            assert_eq!(map[name], *file);
            assert_eq!(view.data(), whole.tensor(name).unwrap().data(), "{name}");
        }
    }
    let text = books().join("evaluation.txt");
    let perplexity = |m: &Path| {
        json(bitmill(["eval"]).arg(m).arg("--text").arg(&text).args(["--windows", "2", "--window", "128"]))["perplexity"].clone()
    };
    assert_eq!(perplexity(&one), perplexity(&many));
}

#[test]
fn ignored_modules_stay_dense_and_are_listed_for_loaders() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let report = quantize(&out, &["--method", "rtn", "--ignore", r".*\.down_proj$", r"model\.layers\.0\."]);
    assert_eq!(report["tensors"].as_array().unwrap().len(), 7 * 6);
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
    let ignore: Vec<&str> =
        config["quantization_config"]["ignore"].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect();
    for module in ["lm_head", "model.layers.0.self_attn.q_proj", "model.layers.7.mlp.down_proj"] {
        assert!(ignore.contains(&module), "{module} in {ignore:?}");
    }
    // What was written is read back: a model with dense and quantized linears runs.
    let text = books().join("evaluation.txt");
    let e = json(bitmill(["eval"]).arg(&out).arg("--reference").arg(books()).arg("--text").arg(text).args([
        "--windows",
        "2",
        "--window",
        "128",
    ]));
    let kl = e["divergence"]["kl"]["mean"].as_f64().unwrap();
    assert!(kl > 0.001 && kl < 0.1, "{kl}");
}

#[test]
fn output_bytes_do_not_depend_on_threads_or_memory() {
    // Invariant 4, and the spilled streams besides.
    let dir = tempfile::tempdir().unwrap();
    let reference = dir.path().join("a");
    quantize(&reference, &["--threads", "1"]);
    for (name, extra) in [("b", &["--threads", "2"][..]), ("c", &["--threads", "5", "--stream-memory", "0"])] {
        let out = dir.path().join(name);
        quantize(&out, extra);
        assert_same(&reference, &out);
    }
}

#[test]
fn text_tables_name_what_they_measure() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let said = success(bitmill(["quantize"]).arg(books()).arg("-o").arg(&out).args(["--method", "rtn"]));
    assert!(said.contains("bits per weight") && said.contains("out.log.jsonl"), "{said}");
    let text = books().join("evaluation.txt");
    let said = success(bitmill(["eval"]).arg(&out).arg("--reference").arg(books()).arg("--text").arg(text).args([
        "--windows",
        "2",
        "--window",
        "64",
    ]));
    for word in ["perplexity", "KL divergence", "same top token", "Δp"] {
        assert!(said.contains(word), "{said}");
    }
    let said = success(bitmill(["inspect"]).arg(&out));
    assert!(said.contains("pack-quantized") && said.contains("w4 g128 sym"), "{said}");
    let file = json(bitmill(["inspect"]).arg(out.join("model.safetensors")));
    assert!(file["bytes"].as_u64().unwrap() > 10_000_000 && file["known_architecture"] == false);
    for command in ["quantize", "eval", "inspect"] {
        assert!(success(&mut bitmill([command, "--help"])).contains("--json"));
    }
}

#[test]
fn a_dry_run_counts_the_activations_that_stay_in_memory() {
    let dir = tempfile::tempdir().unwrap();
    let estimate = |memory: usize, flags: &[&str]| -> u64 {
        let mut command = bitmill(["quantize"]);
        command.arg(books()).arg("-o").arg(dir.path().join("out")).args([
            "--sequence-length",
            "512",
            "--samples",
            "16",
        ]);
        command.args(["--dry-run", "--written", "0", "--stream-memory", &memory.to_string()]).args(flags);
        json(&mut command)["peak_memory_estimate"].as_u64().unwrap()
    };
    let [narrow, wide] = [256, 768].map(|width| 16 * 512 * width * 2);
    for (models, flags) in [(1, &["--target-shift", "off"][..]), (2, &[])] {
        let more = |memory: usize| estimate(3 * models * memory, flags) - estimate(0, flags);
        let counted = |streams: usize| (models * streams * 11 / 10) as u64;
        assert_eq!(more(narrow - 1), 0, "none stays that is too large");
        assert!(more(narrow).abs_diff(counted(narrow)) < 2, "the residual stream alone");
        assert!(more(wide).abs_diff(counted(narrow + wide)) < 2, "all of them");
    }
}

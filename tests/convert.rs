//! Conversion keeps codes: there and back again, refused where a number is not held, never half written.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use bitmill::checkpoint::{Checkpoint, Weight};
use bitmill::scheme::Quantized;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use support::{QUICK, assert_same, bitmill, books, contents, edit, failure, json, success};

/// The repository's model, rounded with `flags`.
fn quantized(dir: &Path, name: &str, flags: &[&str]) -> PathBuf {
    let out = dir.join(name);
    let method = ["--method", "rtn", "--no-report"];
    success(bitmill(["quantize"]).arg(books()).arg("-o").arg(&out).args(method).args(flags));
    out
}

fn convert(from: &Path, to: &Path, format: &str) -> std::process::Command {
    let mut command = bitmill(["convert"]);
    command.arg(from).arg(to).args(["--format", format]);
    command
}

/// Converts along `formats`, each step from what the last one wrote; returns the last folder.
fn chain(dir: &Path, from: &Path, formats: &[&str]) -> PathBuf {
    let mut at = from.to_owned();
    for (i, format) in formats.iter().enumerate() {
        let end = if *format == "gguf" { ".gguf" } else { "" };
        let to = dir.join(format!("{i}-{format}{end}"));
        let said = json(&mut convert(&at, &to, format));
        assert_eq!(said["rounded"], serde_json::json!([]), "{format}");
        at = to;
    }
    at
}

/// Codes and parameters of every quantized matrix.
fn matrices(path: &Path) -> BTreeMap<String, Quantized> {
    let checkpoint = Checkpoint::open(path).unwrap();
    let modules: Vec<String> =
        checkpoint.names().filter_map(|n| n.rsplit_once('.')).map(|(m, _)| m.to_owned()).collect();
    let quantized = |m: String| match checkpoint.scheme_of(&m).map(|_| checkpoint.weight(&m).unwrap())? {
        Weight::Quantized(q) => Some((m, q)),
        Weight::Dense(_) => None,
    };
    modules.into_iter().filter_map(quantized).collect()
}

/// What is written by hand in files that say how they were made.
const DESCRIPTIONS: [&str; 3] = ["README.md", "bitmill.json", "config.json"];

#[test]
fn folders_return_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    for (name, flags, formats) in [
        ("sym", &["--bits", "4"][..], &["gptq", "gptq_v2", "awq", "naive-quantized", "pack-quantized"][..]),
        // Not a zero point is 0, so version 1 of GPTQ will do.
        ("asym", &["--bits", "4", "--asymmetric"], &["awq", "gptq_v2", "gptq", "pack-quantized"]),
        ("eight", &["--bits", "8", "--group-size", "-1"], &["gptq", "naive-quantized", "pack-quantized"]),
        ("three", &["--bits", "3", "--group-size", "64"], &["gptq", "pack-quantized"]),
        ("nvfp4", &["--scheme", "nvfp4a16"], &["modelopt", "nvfp4-pack-quantized"]),
        ("fp8", &["--scheme", "fp8_block"], &["fp8", "float-quantized"]),
        (
            "inputs",
            &["--scheme", "nvfp4", QUICK[0], QUICK[1], QUICK[2], QUICK[3]],
            &["modelopt", "nvfp4-pack-quantized"],
        ),
        ("nf4", &["--scheme", "nf4"], &["bitsandbytes"]),
    ] {
        let from = quantized(dir.path(), name, flags);
        let steps = dir.path().join(format!("{name}-steps"));
        std::fs::create_dir(&steps).unwrap();
        let back = chain(&steps, &from, formats);
        assert_same(&from, &back);
        for (step, format) in formats.iter().enumerate() {
            let at = steps.join(format!("{step}-{format}"));
            assert_eq!(Checkpoint::open(&at).unwrap().dialect().unwrap().format().name(), *format);
            let (own, there) = (matrices(&from), matrices(&at));
            assert_eq!(own.keys().collect::<Vec<_>>(), there.keys().collect::<Vec<_>>());
            for (module, q) in &own {
                assert_eq!(q.codes, there[module].codes, "{format} {module}");
                assert_eq!(q.dequantize(), there[module].dequantize(), "{format} {module}");
            }
            let (own, there) = (contents(&from), contents(&at));
            for (file, bytes) in own.iter().filter(|(f, _)| !DESCRIPTIONS.contains(&f.to_str().unwrap())) {
                let weights = file.extension().is_some_and(|e| e == "safetensors");
                assert!(weights || *bytes == there[file], "{} is carried", file.display());
            }
        }
    }
}

#[test]
fn gguf_files_hold_codes_where_they_can() {
    let dir = tempfile::tempdir().unwrap();
    for (name, flags, kind, bits) in [
        ("q4", &["--bits", "4", "--group-size", "32", "--format", "gptq"][..], "4 × q4_0", 4),
        ("coarse", &["--bits", "4", "--group-size", "128"], "q4_0", 4),
        ("q8", &["--bits", "8", "--group-size", "32"], "q8_0", 8),
        // Zero points make one bit more.
        ("q5", &["--bits", "4", "--group-size", "32", "--asymmetric"], "q5_0", 5),
    ] {
        let from = quantized(dir.path(), name, flags);
        let steps = dir.path().join(format!("{name}-steps"));
        std::fs::create_dir(&steps).unwrap();
        let back = chain(&steps, &from, &["gguf", "pack-quantized"]);
        let file = steps.join("0-gguf.gguf");
        let kinds = success(bitmill(["inspect"]).arg(&file)).to_lowercase();
        assert!(kinds.contains(kind.rsplit(' ').next().unwrap()), "{kinds}");
        let (own, there, again) = (matrices(&from), matrices(&file), matrices(&back));
        assert_eq!(own.keys().collect::<Vec<_>>(), again.keys().collect::<Vec<_>>());
        for (module, q) in &own {
            let values = q.dequantize();
            assert_eq!(values, there[module].dequantize(), "{module} in the file");
            assert_eq!(values, again[module].dequantize(), "{module} back");
            assert_eq!(again[module].scheme.bits().get(), bits);
            if q.scheme.symmetric() {
                assert_eq!(q.codes, again[module].codes, "{module}");
            }
        }
        // Everything else is the same numbers.
        let (own, again) = (Checkpoint::open(&from).unwrap(), Checkpoint::open(&back).unwrap());
        for name in ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"] {
            assert_eq!(
                own.tensor(name).unwrap().to_f32().unwrap(),
                again.tensor(name).unwrap().to_f32().unwrap(),
                "{name}"
            );
        }
        let text = books().join("evaluation.txt");
        let measure = |model: &Path| {
            let windows = ["--window", "128", "--windows", "2"];
            json(bitmill(["eval"]).arg(model).arg("--text").arg(&text).args(windows))["perplexity"]["value"]
                .as_f64()
                .unwrap()
        };
        assert_eq!(measure(&file), measure(&from), "{name}");
    }
}

#[test]
fn plain_numbers_are_the_ones_stored() {
    let dir = tempfile::tempdir().unwrap();
    let from = quantized(dir.path(), "w4", &["--bits", "4", "--format", "gptq"]);
    let (plain, same) = (dir.path().join("f32"), dir.path().join("dequantized"));
    success(&mut convert(&from, &plain, "f32"));
    success(bitmill(["dequantize"]).arg(&from).arg("-o").arg(&same));
    assert_same(&plain, &same);
    let dense = Checkpoint::open(&plain).unwrap();
    assert!(dense.dialect().is_none());
    for (module, q) in matrices(&from) {
        assert_eq!(dense.weight(&module).unwrap().to_f32().unwrap(), q.dequantize(), "{module}");
    }
    // 4 bits times the 8 of a bf16 scale are more than bf16 has, and f16 has 11.
    let said = failure(&mut convert(&from, &dir.path().join("bf16"), "bf16"), 1);
    assert!(
        said.contains("model.layers.0.") && said.contains("BF16 does not hold") && said.contains("--allow-lossy"),
        "{said}"
    );
    success(convert(&from, &dir.path().join("bf16"), "bf16").arg("--allow-lossy"));
    assert!(!dir.path().join("bf16.bitmill-converting").exists());
}

#[test]
fn what_is_not_held_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let five = quantized(dir.path(), "five", &["--bits", "5"]);
    let wide = quantized(dir.path(), "wide", &["--bits", "4", "--scale-type", "f32"]);
    let w8 = quantized(dir.path(), "w8", &["--bits", "8", "--group-size", "-1"]);
    let before = contents(dir.path());
    for (from, format, words) in [
        (&five, "awq", &["its readers know 4 bits", "model.safetensors"][..]),
        (&wide, "gptq", &["the scale", "no value of type F16"]),
        (&w8, "int-quantized", &["rounds inputs to 8 bits"]),
    ] {
        let out = dir.path().join("out");
        let said = failure(&mut convert(from, &out, format), 1);
        for word in words.iter().chain(&["model.layers.0.", format, "--allow-lossy"]) {
            assert!(said.contains(word), "`{word}` is missing from: {said}");
        }
        assert!(contents(dir.path()) == before, "{format}: something was written");
        // Allowed, it is done, and everything that was rounded is listed.
        let said = json(convert(from, &out, format).arg("--allow-lossy"));
        let rounded = said["rounded"].as_array().unwrap();
        assert!(
            !rounded.is_empty() && rounded.iter().all(|r| r["tensor"].as_str().unwrap().starts_with("model.layers."))
        );
        let text = books().join("evaluation.txt");
        let args = ["--window", "128", "--windows", "2"];
        let measured =
            json(bitmill(["eval"]).arg(&out).arg("--reference").arg(from).arg("--text").arg(&text).args(args));
        assert!(measured["divergence"]["kl"]["mean"].as_f64().unwrap() < 0.2, "{measured}");
        std::fs::remove_dir_all(&out).unwrap();
    }
    let said = failure(&mut convert(&books(), &dir.path().join("out"), "gptq"), 1);
    assert!(said.contains("is not quantized") && said.contains("bitmill quantize"), "{said}");
}

#[test]
fn maps_of_groups_go_where_they_can() {
    // A matrix whose columns are dealt out to groups, as desc_act leaves them.
    let dir = tempfile::tempdir().unwrap();
    let from = quantized(dir.path(), "w4", &["--bits", "4", "--format", "gptq"]);
    let file = from.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let at = {
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let map = tensors.tensor("model.layers.1.self_attn.o_proj.g_idx").unwrap();
        map.data().as_ptr() as usize - bytes.as_ptr() as usize
    };
    // Two columns change places.
    bytes[at..at + 4].copy_from_slice(&1u32.to_le_bytes());
    bytes[at + 4 * 130..at + 4 * 131].copy_from_slice(&0u32.to_le_bytes());
    std::fs::write(&file, bytes).unwrap();
    edit(&from.join("config.json"), |c| c["quantization_config"]["desc_act"] = true.into());
    let back = chain(dir.path(), &from, &["gptq_v2", "pack-quantized", "naive-quantized", "gptq"]);
    assert_eq!(matrices(&from), matrices(&back));
    let pack = Checkpoint::open(&dir.path().join("1-pack-quantized")).unwrap();
    assert!(pack.config()["quantization_config"]["config_groups"].to_string().contains("\"actorder\":\"group\""));
    for format in ["awq", "gguf"] {
        let to = dir.path().join(format!("out.{format}"));
        let said = failure(&mut convert(&from, &to, format), 1);
        assert!(said.contains("model.layers.1.self_attn.o_proj") && said.contains("out of order (desc_act)"), "{said}");
    }
}

#[test]
fn places_and_previews() {
    let dir = tempfile::tempdir().unwrap();
    let from = quantized(dir.path(), "w4", &["--bits", "4"]);
    let out = dir.path().join("out");
    let said = json(convert(&from, &out, "gptq").arg("--dry-run"));
    assert_eq!(said["written"], false);
    assert!(!out.exists());
    success(&mut convert(&from, &out, "gptq"));
    let size = std::fs::metadata(out.join("model.safetensors")).unwrap().len();
    assert_eq!(said["bytes"], size, "sizes are exact before anything is written");
    let said = failure(&mut convert(&from, &out, "awq"), 1);
    assert!(said.contains("exists") && said.contains("--force"), "{said}");
    success(convert(&from, &out, "awq").arg("--force"));
    assert_eq!(Checkpoint::open(&out).unwrap().dialect().unwrap().format().name(), "awq");
    let inside = from.join("inside");
    assert!(failure(&mut convert(&from, &inside, "gptq"), 1).contains("inside one another"));
    assert!(failure(&mut convert(&from, &dir.path().join("x"), "gguf"), 1).contains("ends in .gguf"));
    // What a killed conversion left is cleared away.
    let left = dir.path().join("again.bitmill-converting");
    std::fs::create_dir_all(left.join("output")).unwrap();
    std::fs::write(left.join("output/model.safetensors"), "half").unwrap();
    success(&mut convert(&from, &dir.path().join("again"), "awq"));
    assert_same(&out, &dir.path().join("again"));
    assert!(!left.exists());
    // Sidecars of the old format would speak against config.json.
    std::fs::write(from.join("quantize_config.json"), "{}").unwrap();
    success(convert(&from, &dir.path().join("third"), "gptq_v2").args(["--threads", "1", "--max-shard-size", "2MB"]));
    assert!(!dir.path().join("third/quantize_config.json").exists());
    assert!(dir.path().join("third/model.safetensors.index.json").exists());
    assert_eq!(matrices(&dir.path().join("third")).len(), matrices(&from).len());
}

#[test]
fn gpt_oss_becomes_plain_numbers_as_its_model_has_them() {
    // transformers' own numbers of random blocks, by rows of the experts.
    let dir = tempfile::tempdir().unwrap();
    let (model, plain) = (dir.path().join("model"), dir.path().join("plain"));
    std::fs::create_dir(&model).unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("crates/checkpoint/tests/golden/gpt_oss.safetensors");
    std::fs::copy(golden, model.join("model.safetensors")).unwrap();
    let config = serde_json::json!({
        "model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    });
    std::fs::write(model.join("config.json"), config.to_string()).unwrap();
    success(bitmill(["dequantize"]).arg(&model).arg("-o").arg(&plain).args(["--dtype", "bf16"]));
    let (stored, back) = (Checkpoint::open(&model).unwrap(), Checkpoint::open(&plain).unwrap());
    assert!(back.dialect().is_none());
    for (stack, [experts, cols, rows]) in [("gate_up_proj", [3, 64, 8]), ("down_proj", [3, 32, 6])] {
        let module = format!("model.layers.0.mlp.experts.{stack}");
        assert_eq!(back.shape_of(&module).unwrap(), [experts, cols, rows]);
        let values = |folder: &Checkpoint, name: &str| folder.tensor(name).unwrap().to_f32().unwrap();
        let (got, by_rows) = (values(&back, &module), values(&stored, &format!("{module}.dequantized")));
        let at = |e: usize, r: usize, c: usize| (got[(e * cols + c) * rows + r], by_rows[(e * rows + r) * cols + c]);
        let all = (0..experts).flat_map(|e| (0..rows).flat_map(move |r| (0..cols).map(move |c| (e, r, c))));
        assert!({ all }.all(|(e, r, c)| at(e, r, c).0 == at(e, r, c).1), "{stack}");
    }
    let said = failure(&mut convert(&model, &dir.path().join("packed"), "mxfp4-pack-quantized"), 1);
    assert!(said.contains("stacks are written as plain numbers alone"), "{said}");
    let text = books().join("evaluation.txt");
    let said = failure(bitmill(["eval"]).arg(&model).arg("--text").arg(text), 1);
    assert!(said.contains("gpt_oss") && said.contains("llama"), "{said}");
}

//! `bitmill check` on the schemes of floats, mixtures of them, and what lies beside config.json: every rule that only they can
//! break, broken by itself.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use serde_json::{Value, json};
use std::path::Path;
use support::loaders::{breaks, broken, of, patch, quantized, resized, rewritten};
use support::{QUICK, bitmill, books, edit, failure, json as said, success};

/// Changes the `quantization_config` of a folder, after putting back what it was.
fn with(folder: &Path, good: &[u8], change: impl FnOnce(&mut Value)) {
    let config = folder.join("config.json");
    std::fs::write(&config, good).unwrap();
    edit(&config, |c| change(&mut c["quantization_config"]));
}

#[test]
fn sound_outputs_pass() {
    let dir = tempfile::tempdir().unwrap();
    let original = books();
    let original = ["--original", original.to_str().unwrap()];
    let all = &["vllm", "sglang", "transformers"][..];
    for (name, flags, takers) in [
        ("fp8", &[&["--scheme", "fp8"][..], &QUICK].concat()[..], all),
        ("tiles", &["--scheme", "fp8_block"], all),
        ("fine", &["--scheme", "fp8_block", "--format", "fp8"], all),
        ("nvfp4", &[&["--scheme", "nvfp4"][..], &QUICK].concat(), all),
        ("modelopt", &["--scheme", "nvfp4a16", "--format", "modelopt"], &["vllm", "sglang"]),
        ("mxfp4", &["--scheme", "mxfp4"], &["vllm", "transformers"]),
        ("mxfp8", &["--scheme", "mxfp8a16"], &["vllm", "transformers"]),
        ("nf4", &["--scheme", "nf4"], &["transformers"]),
    ] {
        let out = quantized(dir.path(), name, flags);
        for loader in takers {
            assert_eq!(broken(&out, loader, &original), [], "{name} by {loader}");
        }
    }
}

#[test]
fn what_fused_matrices_divide_their_scales_by() {
    let dir = tempfile::tempdir().unwrap();
    let double = |bytes: &mut [u8]| {
        let value = f32::from_le_bytes((&*bytes).try_into().unwrap());
        bytes.copy_from_slice(&(2.0 * value).to_le_bytes());
    };
    let out = quantized(dir.path(), "weights", &["--scheme", "nvfp4a16"]);
    patch(&out, "model.layers.1.self_attn.k_proj.weight_global_scale", double);
    for loader in ["vllm", "sglang"] {
        breaks(&out, loader, &[], "shared", "layers.1.self_attn.k_proj divides its scales by");
    }
    assert_eq!(broken(&out, "transformers", &[]), [], "it fuses nothing");
    let own = &["--scheme", "nvfp4", "--format", "modelopt"][..];
    let out = quantized(dir.path(), "inputs", &[own, &QUICK].concat());
    assert_eq!(broken(&out, "vllm", &[]), []);
    patch(&out, "model.layers.2.mlp.up_proj.input_scale", double);
    breaks(&out, "vllm", &[], "shared", "layers.2.mlp.up_proj divides those of its inputs by");
    // What an expert without tokens is left with by some tools.
    patch(&out, "model.layers.2.mlp.up_proj.input_scale", |bytes| bytes.copy_from_slice(&f32::NAN.to_le_bytes()));
    let text = failure(bitmill(["check"]).arg(&out).args(["--loader", "vllm"]), 1);
    assert!(text.contains("model.layers.2.mlp.up_proj") && text.contains("inputs"), "{text}");
}

#[test]
fn tiles_and_words_of_cut_matrices() {
    let dir = tempfile::tempdir().unwrap();
    let narrow = resized(&dir.path().join("narrow"), 768, true);
    let out = of(&narrow, &dir.path().join("tiles"), &["--scheme", "fp8_block"]);
    breaks(&out, "vllm", &[], "tiles", "k_proj: its 64 outputs are no whole tiles of 128");
    assert_eq!(broken(&out, "transformers", &[]), []);
    let out = quantized(dir.path(), "whole", &["--scheme", "fp8_block"]);
    breaks(&out, "vllm", &["--tensor-parallel", "4"], "tensor-parallel", "64 of each of 4 devices are no whole tiles");
    let thin = resized(&dir.path().join("thin"), 752, false);
    let flags = ["--bits", "4", "--asymmetric", "--group-size", "-1", "--format", "awq"];
    let out = of(&thin, &dir.path().join("words"), &flags);
    assert_eq!(broken(&out, "vllm", &["--tensor-parallel", "2"]), []);
    breaks(
        &out,
        "vllm",
        &["--tensor-parallel", "4"],
        "tensor-parallel",
        "up_proj: 188 codes of 4 bits are no whole words",
    );
    let out = quantized(dir.path(), "groups", &["--scheme", "mxfp4a16", "--ignore", "self_attn"]);
    assert_eq!(broken(&out, "vllm", &["--tensor-parallel", "4"]), []);
    let odd = resized(&dir.path().join("odd"), 736, false);
    let out = of(&odd, &dir.path().join("share"), &["--scheme", "mxfp4a16", "--ignore", "self_attn"]);
    breaks(
        &out,
        "vllm",
        &["--tensor-parallel", "2"],
        "tensor-parallel",
        "368 inputs of each of 2 devices are no whole groups",
    );
    let refused = bitmill(["quantize"])
        .arg(&thin)
        .args(["--scheme", "mxfp8", "--method", "rtn", "-o"])
        .arg(dir.path().join("no"))
        .output()
        .unwrap();
    let words = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && words.contains("752"), "groups divide inputs: {words}");
}

#[test]
fn arguments_of_groups() {
    let dir = tempfile::tempdir().unwrap();
    let out = quantized(dir.path(), "mxfp8", &["--scheme", "mxfp8a16"]);
    let good = std::fs::read(out.join("config.json")).unwrap();
    let group = "group_0";
    with(&out, &good, |q| drop(q["config_groups"][group]["weights"].as_object_mut().unwrap().remove("scale_dtype")));
    breaks(&out, "vllm", &[], "config", "weights.scale_dtype is not");
    let out = quantized(dir.path(), "mxfp4", &["--scheme", "mxfp4a16"]);
    let good = std::fs::read(out.join("config.json")).unwrap();
    with(&out, &good, |q| drop(q["config_groups"][group]["weights"].as_object_mut().unwrap().remove("scale_dtype")));
    breaks(&out, "transformers", &[], "config", "weights.scale_dtype is not");
    assert_eq!(broken(&out, "vllm", &[]), [], "it knows them by their size");
    with(&out, &good, |q| q["config_groups"]["group_1"] = q["config_groups"][group].clone());
    breaks(&out, "vllm", &[], "config", "several of config_groups are of all linears");
    let out = quantized(dir.path(), "naive", &["--bits", "8", "--format", "naive-quantized"]);
    let good = std::fs::read(out.join("config.json")).unwrap();
    with(&out, &good, |q| drop(q["config_groups"][group].as_object_mut().unwrap().remove("format")));
    breaks(&out, "transformers", &[], "config", "has no format of its own");
}

#[test]
fn the_type_of_the_model() {
    let dir = tempfile::tempdir().unwrap();
    for scheme in ["nvfp4a16", "mxfp4a16", "mxfp8a16"] {
        let out = quantized(dir.path(), scheme, &["--scheme", scheme]);
        edit(&out.join("config.json"), |c| c["torch_dtype"] = "float16".into());
        breaks(&out, "transformers", &[], "type", "has the type float16, and it makes bfloat16");
        assert_eq!(broken(&out, "vllm", &[]), []);
    }
}

#[test]
fn files_beside_config_json() {
    let dir = tempfile::tempdir().unwrap();
    let out = quantized(dir.path(), "modelopt", &["--scheme", "nvfp4a16", "--format", "modelopt"]);
    let file = out.join("hf_quant_config.json");
    let written: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!(
        (&written["producer"]["name"], &written["quantization"]),
        (
            &json!("modelopt"),
            &json!({"quant_algo": "W4A16_NVFP4", "kv_cache_quant_algo": null, "group_size": 16, "exclude_modules": ["lm_head"]})
        )
    );
    edit(&file, |f| f["quantization"]["quant_algo"] = "NVFP4".into());
    breaks(&out, "sglang", &[], "sidecars", "hf_quant_config.json: quant_algo is");
    edit(&file, |f| *f = written);
    // As NVIDIA's own models are, with the file alone.
    let read = |path: &Path| said(bitmill(["inspect"]).arg(path));
    let whole = read(&out);
    edit(&out.join("config.json"), |c| drop(c.as_object_mut().unwrap().remove("quantization_config")));
    assert_eq!(read(&out), whole);
    assert_eq!(whole["format"], "modelopt");
    // What is left out comes from the file, too.
    edit(&file, |f| f["quantization"]["exclude_modules"] = json!(["*.self_attn.*"]));
    breaks(&out, "vllm", &[], "listed", "lm_head is stored as plain numbers");
    // Nothing of it is left in another format.
    edit(&file, |f| f["quantization"]["exclude_modules"] = json!(["lm_head"]));
    let other = dir.path().join("other");
    said(bitmill(["convert"]).arg(&out).arg(&other).args(["--format", "nvfp4-pack-quantized"]));
    assert!(!other.join("hf_quant_config.json").exists());
    assert_eq!(broken(&other, "vllm", &[]), []);

    let gptq = quantized(dir.path(), "gptq", &["--bits", "4", "--format", "gptq"]);
    let file = gptq.join("quantize_config.json");
    std::fs::write(&file, r#"{"bits": 4, "group_size": 128, "desc_act": false, "sym": true}"#).unwrap();
    assert_eq!(broken(&gptq, "GPTQModel", &[]), []);
    edit(&file, |f| f["group_size"] = 64.into());
    breaks(&gptq, "GPTQModel", &[], "sidecars", "quantize_config.json: group_size is 64, and 128 in config.json");
    std::fs::write(&file, "nothing").unwrap();
    breaks(&gptq, "GPTQModel", &[], "sidecars", "quantize_config.json is no object of keys");
}

#[test]
fn folders_of_auto_round() {
    let dir = tempfile::tempdir().unwrap();
    let gptq = quantized(dir.path(), "gptq", &["--bits", "4", "--format", "gptq"]);
    let own = rewritten(&gptq, &dir.path().join("own"), |name| {
        if name.ends_with("g_idx") { Vec::new() } else { vec![name.to_owned()] }
    });
    edit(&own.join("config.json"), |c| {
        c["quantization_config"] = json!({
            "quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": true, "data_type": "int",
            "packing_format": "auto_round:auto_gptq", "block_name_to_quantize": "model.layers",
        });
    });
    for loader in ["vllm", "sglang", "transformers"] {
        assert_eq!(broken(&own, loader, &["--original", books().to_str().unwrap()]), [], "{loader}");
    }
    breaks(&own, "GPTQModel", &[], "format", "it does not read auto-round");
    let values = |folder: &Path| {
        let out = dir.path().join("plain");
        success(bitmill(["dequantize", "--force"]).arg(folder).arg("-o").arg(&out));
        std::fs::read(out.join("model.safetensors")).unwrap()
    };
    assert!(values(&own) == values(&gptq), "both are the same numbers");
    edit(&own.join("config.json"), |c| drop(c["quantization_config"].as_object_mut().unwrap().remove("sym")));
    breaks(&own, "vllm", &[], "config", "quantization_config lacks sym");
    edit(&own.join("config.json"), |c| c["quantization_config"]["packing_format"] = "auto_round:triton".into());
    assert!(failure(bitmill(["check"]).arg(&own), 1).contains("packing_format"));
}

#[test]
fn mixtures_are_held_to_the_rules_of_every_format_in_them() {
    let dir = tempfile::tempdir().unwrap();
    let stats = dir.path().join("statistics");
    assert!(bitmill(["calibrate"]).arg(books()).arg("-o").arg(&stats).args(QUICK).status().unwrap().success());
    let flags = ["--bits", "6.5", "--options", "fp8a16,nvfp4a16", "--stats", stats.to_str().unwrap()];
    let out = quantized(dir.path(), "mixed", &flags);
    let whole = said(bitmill(["check"]).arg(&out));
    assert_eq!(whole["format"], "mixed-precision");
    assert_eq!(broken(&out, "vllm", &[]), []);
    let found = broken(&out, "GPTQModel", &[]);
    assert!(
        ["float-quantized", "nvfp4-pack-quantized"].iter().all(|f| found[0].1.contains(&format!("does not read {f}"))),
        "{found:?}"
    );
}

#[test]
fn what_is_not_read_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let packed = quantized(dir.path(), "packed", &["--bits", "4"]);
    let nf4 = quantized(dir.path(), "nf4", &["--scheme", "nf4"]);
    let awq = quantized(dir.path(), "awq", &["--asymmetric", "--format", "awq"]);
    let fine = quantized(dir.path(), "fine", &["--scheme", "fp8_block", "--format", "fp8"]);
    for (folder, key, value) in [
        (&packed, "sparsity_config", json!({"format": "sparse-24-bitmask"})),
        (&packed, "transform_config", json!({"config_groups": {"r1": {}}})),
        (&packed, "kv_cache_scheme", json!({"num_bits": 8, "type": "int", "symmetric": true, "strategy": "tensor"})),
        (&nf4, "bnb_4bit_quant_type", json!("int4")),
        (&nf4, "load_in_4bit", json!(false)),
        (&awq, "version", json!("gemv")),
        (&fine, "weight_block_size", json!([64, 64])),
        (&fine, "activation_scheme", json!("static")),
    ] {
        let good = std::fs::read(folder.join("config.json")).unwrap();
        with(folder, &good, |q| q[key] = value);
        let text = failure(bitmill(["check"]).arg(folder).args(["--loader", "vllm"]), 1);
        assert!(text.contains(key), "{key}: {text}");
        std::fs::write(folder.join("config.json"), good).unwrap();
    }
}

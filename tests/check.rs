//! `bitmill check` finds each rule that a folder breaks, and nothing else, and passes what is sound.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use serde_json::Value;
use support::loaders::{breaks, broken, quantized, rewritten};
use support::{QUICK, bitmill, books, copy_of_books, edit, failure, json, success};

#[test]
fn sound_outputs_pass() {
    let dir = tempfile::tempdir().unwrap();
    let original = books();
    let original = ["--original", original.to_str().unwrap()];
    for (name, flags, takers) in [
        ("w4", &["--bits", "4"][..], &["vllm", "SGLang", "transformers"][..]),
        ("gptq", &["--bits", "4", "--format", "gptq"], &["vLLM", "sglang", "GPTQModel", "transformers", "mistral.rs"]),
        ("awq", &["--asymmetric", "--format", "awq"], &["vLLM", "sglang", "GPTQModel", "transformers", "mistral.rs"]),
        ("w8a8", &["--scheme", "w8a8"], &["vllm", "sglang", "transformers"]),
        ("file.gguf", &["--scheme", "q4_0"], &["llama.cpp", "mistral.rs"]),
    ] {
        let out = quantized(dir.path(), name, flags);
        for loader in takers {
            assert_eq!(broken(&out, loader, &original), [], "{name} by {loader}");
        }
        let all = json(bitmill(["check"]).arg(&out));
        let met = |l: &Value| l["met"] == true;
        assert!(all["loaders"].as_array().unwrap().iter().filter(|l| met(l)).count() >= takers.len());
        // What nobody asked for was not looked at, and is not said to be met.
        let rules = all["loaders"][0]["rules"].as_array().unwrap();
        assert!(rules.iter().all(|r| r["rule"] != "original" && r["rule"] != "tensor-parallel"), "{rules:?}");
    }
    let text = success(bitmill(["check"]).arg(dir.path().join("gptq")).args(["--loader", "transformers"]));
    assert!(text.contains("takes it, with the package gptqmodel"), "{text}");
    assert_eq!(broken(&dir.path().join("w4"), "vllm", &["--tensor-parallel", "2"]), []);
}

#[test]
fn rounded_keys_and_values_need_scales() {
    let dir = tempfile::tempdir().unwrap();
    let out =
        quantized(dir.path(), "kv", &["--scheme", "fp8", "--kv-cache", "fp8", QUICK[0], QUICK[1], QUICK[2], QUICK[3]]);
    let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
    let cache = config["quantization_config"]["kv_cache_scheme"].clone();
    assert_eq!((&cache["num_bits"], &cache["strategy"]), (&8.into(), &"tensor".into()));
    for loader in ["vllm", "sglang", "transformers"] {
        assert_eq!(broken(&out, loader, &[]), [], "{loader}");
    }
    // As plain numbers nothing is left of it; another folder that claims it lacks the scales.
    let plain = dir.path().join("plain");
    success(bitmill(["dequantize"]).arg(&out).arg("-o").arg(&plain));
    assert_eq!(broken(&plain, "vllm", &["--original", books().to_str().unwrap()]), []);
    let other = quantized(dir.path(), "other", &["--bits", "4"]);
    edit(&other.join("config.json"), |config| config["quantization_config"]["kv_cache_scheme"] = cache);
    breaks(&other, "vllm", &[], "cache", "model.layers.0.self_attn.k_scale is missing");
}

#[test]
fn formats_and_fused_linears() {
    let dir = tempfile::tempdir().unwrap();
    let w3 = quantized(dir.path(), "w3", &["--bits", "3", "--format", "gptq"]);
    breaks(&w3, "vllm", &[], "format", "w3 g128 sym as gptq is not among its kernels");
    breaks(&w3, "llama.cpp", &[], "format", "it reads gguf files, not gptq");
    let ignored = quantized(dir.path(), "ignored", &["--bits", "4", "--ignore", r"model.layers.1.self_attn.k_proj"]);
    breaks(&ignored, "vllm", &[], "fused", "block 1: q_proj, k_proj, v_proj are one matrix there");
    assert_eq!(broken(&ignored, "transformers", &[]), []);
    let text = failure(bitmill(["check"]).arg(&ignored).args(["--loader", "vllm"]), 3);
    assert!(text.contains("1 rule is broken"), "{text}");
    let said = failure(
        bitmill(["plan"]).arg(books()).args(["--ignore", r"model.layers.1.self_attn.k_proj", "--loader", "vllm"]),
        1,
    );
    assert!(said.contains("would not load this output: block 1"), "the plan is held to the same rule: {said}");
}

#[test]
fn tensor_parallelism() {
    let dir = tempfile::tempdir().unwrap();
    let out = quantized(dir.path(), "w4", &["--bits", "4", "--group-size", "256"]);
    breaks(
        &out,
        "vllm",
        &["--tensor-parallel", "2"],
        "tensor-parallel",
        "128 inputs of each of 2 devices are no whole groups of 256",
    );
    breaks(
        &out,
        "vllm",
        &["--tensor-parallel", "3"],
        "tensor-parallel",
        "attention heads cannot be dealt out to 3 devices",
    );
    breaks(&out, "transformers", &["--tensor-parallel", "2"], "tensor-parallel", "does not cut matrices");
}

#[test]
fn keys_of_config_json() {
    let dir = tempfile::tempdir().unwrap();
    let out = quantized(dir.path(), "w4", &["--bits", "4"]);
    let config = out.join("config.json");
    let good = std::fs::read(&config).unwrap();
    let with = |change: &dyn Fn(&mut Value)| edit(&config, |c| change(&mut c["quantization_config"]));
    with(&|q| q["config_groups"]["group_0"]["weights"]["zero"] = 1.into());
    breaks(&out, "vllm", &[], "config", "config_groups.group_0.weights.zero: compressed-tensors refuses the key");
    std::fs::write(&config, &good).unwrap();
    with(&|q| q["config_groups"]["group_0"]["weights"]["scale_dtype"] = Value::Null);
    assert_eq!(broken(&out, "vllm", &[]), []);
    with(&|q| q["version"] = "0.12.2".into());
    breaks(&out, "vllm", &[], "config", "weights.scale_dtype");
    std::fs::write(&config, &good).unwrap();
    with(&|q| q["quantization_status"] = "initialized".into());
    breaks(&out, "vllm", &[], "config", "quantization_status");
    // A head that config.json does not leave out is made room for as a quantized one, by vLLM if it is named.
    std::fs::write(&config, &good).unwrap();
    with(&|q| q["ignore"] = Value::Array(Vec::new()));
    breaks(&out, "transformers", &[], "listed", "lm_head is stored as plain numbers");
    assert_eq!(broken(&out, "vllm", &[]), []);
    with(&|q| q["config_groups"]["group_0"]["targets"] = serde_json::json!(["Linear", "lm_head"]));
    breaks(&out, "vllm", &[], "listed", "lm_head is stored as plain numbers");

    let gptq = quantized(dir.path(), "gptq", &["--bits", "4", "--format", "gptq"]);
    edit(&gptq.join("config.json"), |c| {
        c["quantization_config"].as_object_mut().unwrap().remove("desc_act");
    });
    breaks(&gptq, "vllm", &[], "config", "quantization_config lacks desc_act");
    assert_eq!(broken(&gptq, "GPTQModel", &[]), []);
}

#[test]
fn tensors_too_many_and_too_few() {
    let dir = tempfile::tempdir().unwrap();
    let out = quantized(dir.path(), "w4", &["--bits", "4"]);
    let original = books();
    let original = ["--original", original.to_str().unwrap()];
    let lost = rewritten(&out, &dir.path().join("lost"), |name| {
        if name == "model.layers.2.post_attention_layernorm.weight" { vec![] } else { vec![name.to_owned()] }
    });
    breaks(&lost, "vllm", &original, "original", "model.layers.2.post_attention_layernorm.weight is missing");
    assert_eq!(broken(&lost, "vllm", &[]), [], "without the original it cannot be known");
    let zeros = rewritten(&out, &dir.path().join("zeros"), |name| {
        let zero = name
            .strip_suffix("layers.0.mlp.up_proj.weight_scale")
            .map(|m| format!("{m}layers.0.mlp.up_proj.weight_zero_point"));
        zero.into_iter().chain([name.to_owned()]).collect()
    });
    breaks(&zeros, "vllm", &[], "tensors", "up_proj.weight_zero_point: a symmetric scheme has no zero points");
    let model = copy_of_books(dir.path());
    let twice = rewritten(&out, &dir.path().join("twice"), |name| {
        let head = (name == "model.embed_tokens.weight").then(|| "lm_head.weight".to_owned());
        head.into_iter().chain((name != "lm_head.weight").then(|| name.to_owned())).collect()
    });
    edit(&twice.join("config.json"), |c| c["tie_word_embeddings"] = true.into());
    breaks(&twice, "vllm", &[], "tied", "lm_head is stored beside the embedding");
    assert!(model.exists());
}

#[test]
fn a_quantized_head_is_to_be_named() {
    // Of a GGUF file the head is quantized too; as a folder it would have to be named, which `convert` avoids.
    let dir = tempfile::tempdir().unwrap();
    let out = quantized(dir.path(), "w8", &["--bits", "8", "--group-size", "32"]);
    let renamed = rewritten(&out, &dir.path().join("head"), |name| {
        let from = "model.layers.0.self_attn.q_proj.";
        let head = name.strip_prefix(from).map(|part| format!("lm_head.{part}"));
        head.into_iter().chain((name != "lm_head.weight").then(|| name.to_owned())).collect()
    });
    edit(&renamed.join("config.json"), |c| c["quantization_config"]["ignore"] = Value::Array(Vec::new()));
    let found = broken(&renamed, "vllm", &[]);
    assert!(found.iter().any(|(rule, words)| rule == "head" && words.contains("lm_head is quantized")), "{found:?}");
    edit(&renamed.join("config.json"), |c| {
        c["quantization_config"]["config_groups"]["group_0"]["targets"] = serde_json::json!(["Linear", "re:.*lm_head"]);
    });
    assert!(broken(&renamed, "vllm", &[]).iter().all(|(rule, _)| rule != "head"));
}

//! Mixtures of experts, from folder to folder. The model is two blocks of the real checkpoint with every MLP copied five times
//! and a router over the copies: whatever the router says, it computes what the two blocks do, so its numbers mean something.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use support::loaders;
use support::{bitmill, books, edit, failure, json, success};

/// Rows of the router as multiples of one direction: of five experts two are chosen, and never the last.
const ROUTER: [f32; 5] = [1.0, -1.0, 2.0, -2.0, 0.0];

type Tensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

/// Config and text files of the real checkpoint with its tensors changed.
fn folder(to: &Path, config: &[(&str, Value)], change: impl Fn(Tensors) -> Tensors) -> PathBuf {
    std::fs::create_dir_all(to).unwrap();
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(books().join(file), to.join(file)).unwrap();
    }
    edit(&to.join("config.json"), |c| config.iter().for_each(|(key, value)| c[*key] = value.clone()));
    let bytes = std::fs::read(books().join("model.safetensors")).unwrap();
    let stored = SafeTensors::deserialize(&bytes).unwrap();
    let all = stored.tensors().into_iter().map(|(name, view)| (name, (view.shape().to_vec(), view.data().to_vec())));
    let kept = all.filter(|(name, _)| (2..8).all(|l| !name.contains(&format!("layers.{l}."))));
    write(&to.join("model.safetensors"), &change(kept.collect()));
    to.to_owned()
}

/// All are stored in bf16.
fn write(file: &Path, tensors: &Tensors) {
    let views = tensors
        .iter()
        .map(|(name, (shape, bytes))| (name.clone(), TensorView::new(Dtype::BF16, shape.clone(), bytes).unwrap()));
    std::fs::write(file, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// The two blocks as they are.
fn dense(dir: &Path) -> PathBuf {
    folder(&dir.join("dense"), &[("num_hidden_layers", 2.into())], |tensors| tensors)
}

/// The same as Mixtral, experts stored one by one or stacked.
fn mixture(dir: &Path, stacked: bool) -> PathBuf {
    let config = [
        ("num_hidden_layers", 2.into()),
        ("model_type", "mixtral".into()),
        ("architectures", serde_json::json!(["MixtralForCausalLM"])),
        ("num_local_experts", ROUTER.len().into()),
        ("num_experts_per_tok", 2.into()),
    ];
    let (name, block) = if stacked { ("stacked", "mlp") } else { ("mixtral", "block_sparse_moe") };
    folder(&dir.join(name), &config, |mut tensors| {
        for layer in 0..2 {
            let mut part = |p: &str| tensors.remove(&format!("model.layers.{layer}.mlp.{p}_proj.weight")).unwrap();
            let (gate, up, down) = (part("gate"), part("up"), part("down"));
            let at = format!("model.layers.{layer}.{block}");
            // bf16 is the upper half of f32, and these numbers lose nothing by it.
            let bf16 = |v: f32| [v.to_bits().to_le_bytes()[2], v.to_bits().to_le_bytes()[3]];
            let row = |r: f32| (0..256).flat_map(move |i| bf16(r * if i % 2 == 0 { 0.25 } else { -0.5 }));
            tensors.insert(format!("{at}.gate.weight"), (vec![5, 256], ROUTER.into_iter().flat_map(row).collect()));
            if stacked {
                let both = [gate.1, up.1].concat();
                tensors.insert(format!("{at}.experts.gate_up_proj"), (vec![5, 1536, 256], both.repeat(5)));
                tensors.insert(format!("{at}.experts.down_proj"), (vec![5, 256, 768], down.1.repeat(5)));
                continue;
            }
            for expert in 0..5 {
                for (own, tensor) in [("w1", &gate), ("w2", &down), ("w3", &up)] {
                    tensors.insert(format!("{at}.experts.{expert}.{own}.weight"), tensor.clone());
                }
            }
        }
        tensors
    })
}

fn quantize(model: &Path, out: &Path, flags: &[&str]) -> String {
    let mut command = bitmill(["quantize"]);
    command.arg(model).arg("-o").arg(out).arg("--calibration").arg(books().join("calibration.txt"));
    success(command.args(["--samples", "10", "--sequence-length", "128", "--no-report"]).args(flags))
}

fn divergence(model: &Path, reference: &Path) -> f64 {
    let mut command = bitmill(["eval"]);
    command.arg(model).arg("--reference").arg(reference).arg("--text").arg(books().join("evaluation.txt"));
    json(command.args(["--windows", "6", "--window", "128"]))["divergence"]["kl"]["mean"].as_f64().unwrap()
}

/// Rules that vLLM finds broken, with its reasons.
fn broken(path: &Path) -> Vec<(String, String)> {
    let output = bitmill(["check"]).arg(path).args(["--loader", "vllm", "--json"]).output().unwrap();
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rules = said["loaders"][0]["rules"].as_array().unwrap().iter().filter(|r| r["met"] == false);
    rules.map(|r| (r["rule"].as_str().unwrap().to_owned(), r["broken"].to_string())).collect()
}

#[test]
fn experts_are_calibrated_measured_and_converted() {
    let dir = tempfile::tempdir().unwrap();
    let (dense, model) = (dense(dir.path()), mixture(dir.path(), false));
    // Their weights are rounded, and so is the sum of what they make: 2e-9.
    let copies = divergence(&model, &dense);
    assert!(copies < 1e-8, "experts that are copies compute what the original does: {copies}");
    let out = |name: &str| dir.path().join(name);
    let said = quantize(&model, &out("w4"), &["--bits", "4"]);
    assert!(
        said.contains("of 10 experts saw fewer tokens than they have inputs") && said.contains("block 0 expert 4 (0)")
    );
    let kl = divergence(&out("w4"), &model);
    quantize(&dense, &out("dense-w4"), &["--bits", "4"]);
    let own = divergence(&out("dense-w4"), &dense);
    assert!(kl > 0.0 && kl < 2.0 * own, "KL of {kl}, and {own} without experts");
    assert_eq!(broken(&out("w4")), []);
    success(bitmill(["convert"]).arg(out("w4")).arg(out("gptq")).args(["--format", "gptq"]));
    assert!((divergence(&out("gptq"), &model) - kl).abs() < 1e-9);
    assert_eq!(broken(&out("gptq")), []);
    let inspected = json(bitmill(["inspect"]).arg(out("w4")));
    assert_eq!((&inspected["model_type"], &inspected["known_architecture"]), (&"mixtral".into(), &true.into()));
    for refused in [&["--transforms", "awq"][..], &["--bits", "3.5"]] {
        let mut command = bitmill(["quantize"]);
        command.arg(&model).arg("-o").arg(out("refused")).arg("--calibration").arg(books().join("calibration.txt"));
        assert!(failure(command.args(refused), 1).contains("does not know mixtures of experts"), "{refused:?}");
    }
}

#[test]
fn experts_are_written_one_by_one_however_they_were_stored() {
    let dir = tempfile::tempdir().unwrap();
    let rtn = ["--method", "rtn", "--no-report"];
    let written = |model: PathBuf, name: &str| {
        let out = dir.path().join(name);
        success(bitmill(["quantize"]).arg(model).arg("-o").arg(&out).args(rtn));
        std::fs::read(out.join("model.safetensors")).unwrap()
    };
    let one = written(mixture(dir.path(), false), "one");
    assert!(one == written(mixture(dir.path(), true), "two"));
    let tensors = SafeTensors::deserialize(&one).unwrap();
    assert!(tensors.names().contains(&"model.layers.1.block_sparse_moe.experts.4.w2.weight_packed"));
    assert_eq!(tensors.tensor("model.layers.0.block_sparse_moe.gate.weight").unwrap().dtype(), Dtype::BF16);
}

#[test]
fn check_knows_the_kernels_of_mixtures() {
    let dir = tempfile::tempdir().unwrap();
    let model = mixture(dir.path(), false);
    let written = |name: &str, flags: &[&str]| {
        let out = dir.path().join(name);
        let mut command = bitmill(["quantize"]);
        success(command.arg(&model).arg("-o").arg(&out).args(["--method", "rtn", "--no-report"]).args(flags));
        out
    };
    let breaks = |path: &Path, rule: &str, words: &str| {
        let found = broken(path);
        assert_eq!(found.iter().map(|(r, _)| r.as_str()).collect::<Vec<_>>(), [rule], "{found:?}");
        assert!(found[0].1.contains(words), "{found:?}");
    };
    breaks(&written("w3", &["--bits", "3"]), "experts", "its kernels for mixtures take 4 and 8 bits");
    breaks(&written("w8", &["--bits", "8"]), "experts", "8 bits by channel alone");
    assert_eq!(broken(&written("w8-channel", &["--bits", "8", "--group-size", "-1"])), []);
    let uneven = written("uneven", &["--bits", "4", "--ignore", r"model.layers.1.block_sparse_moe.experts.3.w2"]);
    breaks(&uneven, "fused", "block 1: its experts are one matrix there");
    // A router in codes: those of a linear of another kind will do.
    let out = written("router", &["--bits", "4"]);
    let bytes = std::fs::read(out.join("model.safetensors")).unwrap();
    let stored = SafeTensors::deserialize(&bytes).unwrap();
    let router = "model.layers.0.block_sparse_moe.gate";
    let mut tensors: BTreeMap<String, TensorView<'_>> = stored.tensors().into_iter().collect();
    tensors.remove(&format!("{router}.weight"));
    for (name, view) in stored.tensors().iter().filter(|(name, _)| name.contains("layers.0.self_attn.k_proj.")) {
        tensors.insert(name.replace("model.layers.0.self_attn.k_proj", router), view.clone());
    }
    std::fs::write(out.join("model.safetensors"), safetensors::serialize(tensors, None).unwrap()).unwrap();
    edit(&out.join("config.json"), |c| {
        c["quantization_config"]["ignore"].as_array_mut().unwrap().retain(|m| m != router);
    });
    breaks(&out, "experts", "gate is quantized, and is read as plain numbers");
}

#[test]
fn kernels_for_mixtures_ask_for_more() {
    let dir = tempfile::tempdir().unwrap();
    let model = mixture(dir.path(), false);
    let nf4 = loaders::of(&model, &dir.path().join("nf4"), &["--scheme", "nf4"]);
    loaders::breaks(&nf4, "transformers", &[], "experts", "it holds them stacked");
    let rows = loaders::of(&model, &dir.path().join("rows"), &["--scheme", "w8a16"]);
    assert_eq!(loaders::broken(&rows, "vllm", &[]), []);
    edit(&rows.join("config.json"), |c| {
        c["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = Value::Null;
    });
    loaders::breaks(&rows, "vllm", &[], "config", "weights.group_size is not -1");
    // The two that a token's input is multiplied by are one matrix; another expert's is not part of it.
    let divided = loaders::of(&model, &dir.path().join("divided"), &["--scheme", "nvfp4a16"]);
    assert_eq!(loaders::broken(&divided, "vllm", &[]), []);
    loaders::patch(&divided, "model.layers.1.block_sparse_moe.experts.3.w3.weight_global_scale", |bytes| {
        bytes.copy_from_slice(&1.0f32.to_le_bytes());
    });
    loaders::breaks(&divided, "vllm", &[], "shared", "experts.3.w3 divides its scales by 1,");
}

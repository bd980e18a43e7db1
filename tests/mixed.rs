//! Mixed widths: the size is met, fused linears agree, and plans are files that people edit.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::Duration;
use support::{QUICK, assert_same, bitmill, books, contents, failure, json, success};

/// Statistics of the model, collected once for all tests.
fn stats() -> PathBuf {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    let make = || {
        let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("mixed-statistics");
        let _ = std::fs::remove_file(&file);
        success(bitmill(["calibrate"]).arg(books()).arg("-o").arg(&file).args(QUICK));
        file
    };
    MADE.get_or_init(make).clone()
}

/// Two blocks of eight, rounded without refinements.
const FEW: [&str; 8] =
    ["--descent-sweeps", "0", "--scale-refits", "0", "--target-shift", "off", "--ignore", r"model\.layers\.[2-7]\."];

/// The plan of a mixture.
fn plan(stats: &Path, flags: &[&str]) -> Value {
    json(bitmill(["plan"]).arg(books()).args(["--method", "rtn", "--stats"]).arg(stats).args(flags))
}

fn schemes(plan: &Value) -> BTreeMap<String, String> {
    let tensors = plan["tensors"].as_array().unwrap();
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    tensors.iter().map(|t| (text(&t["tensor"]), text(&t["scheme"]))).collect()
}

/// Bytes that one bit more costs the largest group of fused linears: gate and up.
const STEP: u64 = 2 * 768 * 256 / 8;

#[test]
fn sizes_are_met_and_never_exceeded() {
    let stats = stats();
    for bits in ["2.5", "3.5", "4.25"] {
        let plan = plan(&stats, &["--bits", bits, "--options", "2,3g64,3,4,6"]);
        let weights = plan["quantized_weights"].as_f64().unwrap();
        let allowed = (weights * bits.parse::<f64>().unwrap() / 8.0) as u64;
        let bytes = plan["quantized_bytes"].as_u64().unwrap();
        assert!(bytes <= allowed && bytes + STEP > allowed, "{bits}: {bytes} of {allowed}");
    }
    for size in [10_400_000u64, 10_813_579] {
        let plan = plan(&stats, &["--size", &size.to_string(), "--options", "2,3g64,4,6"]);
        let total = plan["output_bytes"].as_u64().unwrap();
        assert!(total <= size && total + 2 * STEP + 64 > size, "{total} of {size}");
    }
    // Fused linears agree, least widths hold.
    let mixture = plan(&stats, &["--bits", "3.0", "--least", "down_proj=4"]);
    let schemes = schemes(&mixture);
    let mut distinct: Vec<&String> = schemes.values().collect();
    distinct.sort();
    distinct.dedup();
    assert!(distinct.len() > 1, "a mixture mixes");
    for block in 0..8 {
        let of = |role: &str| &schemes[&format!("model.layers.{block}.{role}")];
        assert!(of("self_attn.q_proj") == of("self_attn.k_proj") && of("self_attn.q_proj") == of("self_attn.v_proj"));
        assert_eq!(of("mlp.gate_proj"), of("mlp.up_proj"));
        assert!(of("mlp.down_proj").as_bytes()[1] >= b'4');
    }
    for loader in mixture["loaders"].as_array().unwrap() {
        let takes = loader["refuses"].as_array().unwrap().is_empty();
        // SGLang has kernels for 4 and 8 bits, and the others read other formats.
        assert_eq!(takes, loader["loader"] == "vLLM" || loader["loader"] == "transformers", "{loader}");
    }
    let small = failure(bitmill(["plan"]).arg(books()).arg("--stats").arg(&stats).args(["--size", "8MB"]), 1);
    assert!(small.contains("no mixture of these options fits") && small.contains("raise the size"), "{small}");
    let alone = failure(bitmill(["plan"]).arg(books()).args(["--options", "2,4"]), 1);
    assert!(alone.contains("--size"), "{alone}");
}

#[test]
fn floats_and_integers_mix_in_one_folder() {
    let dir = tempfile::tempdir().unwrap();
    let (stats, out) = (stats(), dir.path().join("out"));
    let flags = ["--bits", "5.0", "--options", "3,4g32,nvfp4a16,mxfp4a16,fp8a16", "--loader", "vLLM"];
    let run = || {
        let mut command = bitmill(["quantize"]);
        command.arg(books()).arg("-o").arg(&out).args(["--method", "rtn", "--stats"]).arg(&stats).args(flags);
        command
    };
    let report = json(&mut run());
    let allowed = report["quantized_weights"].as_f64().unwrap() * 5.0 / 8.0;
    let bits = report["bits_per_weight"].as_f64().unwrap();
    assert!(bits <= 5.0 && bits * report["quantized_weights"].as_f64().unwrap() / 8.0 + 2.0 * STEP as f64 > allowed);
    let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
    let config = &config["quantization_config"];
    assert_eq!(config["format"], "mixed-precision");
    let formats: Vec<&str> =
        config["config_groups"].as_object().unwrap().values().map(|g| g["format"].as_str().unwrap()).collect();
    assert!(formats.contains(&"pack-quantized") || formats.contains(&"nvfp4-pack-quantized"), "{formats:?}");
    assert!(formats.contains(&"float-quantized"), "{formats:?}");
    success(bitmill(["check"]).arg(&out).args(["--loader", "vLLM"]));
    let text = books().join("evaluation.txt");
    let loss = json(
        bitmill(["eval"]).arg(&out).arg("--reference").arg(books()).arg("--text").arg(&text).args(["--windows", "1"]),
    );
    assert!(loss["divergence"]["kl"]["mean"].as_f64().unwrap() < 0.05, "{loss}");
}

/// A plan file says what a mixture came to, not how it was chosen: manifest and card of the run that chose it say more.
fn same_but_for_the_mixture(by_file: &Path, by_flags: &Path) {
    let (mut file, mut flags) = (contents(by_file), contents(by_flags));
    let manifest = |files: &mut BTreeMap<PathBuf, Vec<u8>>| -> Value {
        let bytes = files.remove(Path::new("bitmill.json")).unwrap();
        let mut manifest: Value = serde_json::from_slice(&bytes).unwrap();
        manifest["mixture"].take();
        assert!(files.remove(Path::new("README.md")).is_some());
        manifest
    };
    assert_eq!(manifest(&mut file), manifest(&mut flags));
    assert!(file == flags, "weights and configuration agree");
}

#[test]
fn a_plan_file_runs_as_the_flags_that_made_it() {
    let dir = tempfile::tempdir().unwrap();
    let stats = stats();
    let file = dir.path().join("plan.toml");
    let flags = ["--method", "rtn", "--bits", "3.5", "--options", "2,3,4g64,6", "--ignore", r".*layers\.1\."];
    let planned = json(bitmill(["plan"]).arg(books()).arg("-o").arg(&file).arg("--stats").arg(&stats).args(flags));
    let run = |name: &str, how: &[&str]| {
        let out = dir.path().join(name);
        let report = json(bitmill(["quantize"]).arg(books()).arg("-o").arg(&out).arg("--stats").arg(&stats).args(how));
        (out, report)
    };
    let (by_file, report) = run("file", &["--plan", file.to_str().unwrap()]);
    let (by_flags, _) = run("flags", &flags);
    same_but_for_the_mixture(&by_file, &by_flags);
    for key in ["output_bytes", "quantized_bytes", "bits_per_weight"] {
        assert_eq!(planned[key], report[key], "{key}");
    }
    // Edited by hand: a rule for a role, and one for a single module.
    let text = std::fs::read_to_string(&file).unwrap();
    let (head, _) = text.split_once("[layers]").unwrap();
    let rules =
        "[roles]\ndown_proj = \"w6 g128 sym\"\n[layers]\n\"model.layers.2.mlp.down_proj\" = \"w8 channel sym\"\n";
    std::fs::write(&file, format!("{head}{rules}")).unwrap();
    let edited = json(
        bitmill(["quantize"])
            .arg(books())
            .arg("-o")
            .arg(dir.path().join("x"))
            .arg("--dry-run")
            .arg("--stats")
            .arg(&stats)
            .arg("--plan")
            .arg(&file),
    );
    let schemes = schemes(&edited);
    assert_eq!(schemes["model.layers.2.mlp.down_proj"], "w8 channel sym");
    assert_eq!(schemes["model.layers.3.mlp.down_proj"], "w6 g128 sym");
    assert_eq!(schemes["model.layers.3.mlp.up_proj"], "w4 g128 sym");
    for (broken, said) in [
        (text.replacen("method", "methd", 1), "methd"),
        (text.replacen("w4 g128 sym", "w4 g128", 1), "`w4 g128` is not a scheme"),
        (format!("{head}[roles]\nnothing = \"w4 g128 sym\"\n"), "no quantized module ends in this name"),
        (format!("{head}[layers]\nlm_head = \"w4 g128 sym\"\n"), "lm_head"),
        ("[".to_owned(), "line 1"),
    ] {
        std::fs::write(&file, broken).unwrap();
        let error = failure(bitmill(["plan"]).arg(books()).arg("--plan").arg(&file), 1);
        assert!(error.contains(said), "{said}: {error}");
    }
}

#[test]
fn planning_from_headers_needs_no_text() {
    // No tokenizer, no weights beyond headers, no calibration text.
    let dir = tempfile::tempdir().unwrap();
    let model = support::copy_of_books(dir.path());
    std::fs::remove_file(model.join("tokenizer.json")).unwrap();
    let plan = json(bitmill(["plan"]).arg(&model).args(["--bits", "3"]));
    assert_eq!(plan["roles"].as_array().unwrap().len(), 7);
    let dry = json(bitmill(["quantize"]).arg(books()).args(["-o", "none", "--bits", "3", "--dry-run"]).args(QUICK));
    assert_eq!(plan["output_bytes"], dry["output_bytes"]);
}

#[test]
fn a_killed_mixture_resumes_in_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let command = |out: &Path| {
        let mut command = bitmill(["quantize"]);
        command.arg(books()).arg("-o").arg(out).args(["--bits", "3.0", "--options", "2,4", "--commit-every", "0"]);
        command.args(QUICK).args(FEW);
        command
    };
    let (whole, killed) = (dir.path().join("whole"), dir.path().join("killed"));
    success(&mut command(&whole));
    for units in [0, 4] {
        let journal = dir.path().join("killed.bitmill-partial/journal.jsonl");
        let mut child = command(&killed).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        let committed = || std::fs::read_to_string(&journal).map_or(0, |t| t.lines().count());
        while committed() < units && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(50));
        // SIGKILL: no handler runs.
        let _ = child.kill();
        child.wait().unwrap();
    }
    if !killed.exists() {
        success(&mut command(&killed));
    }
    assert_same(&whole, &killed);
    let manifest: Value = serde_json::from_slice(&contents(&whole)[Path::new("bitmill.json")]).unwrap();
    assert_eq!(manifest["run"]["settings"]["layers"].as_object().unwrap().len(), 14, "the allocation is on record");
}

#[test]
fn a_loss_is_bounded_on_held_out_text() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    // Two blocks, so that the bound is a matter of seconds.
    let run = |bound: &[&str], name: &str| {
        let mut command = bitmill(["quantize"]);
        command.arg(books()).arg("-o").arg(dir.path().join(name)).args(QUICK).args(FEW);
        command.args(["--tuning-passes", "0", "--options", "2,3,4,6"]).args(bound);
        command
    };
    let loose = json(&mut run(&["--max-kl", "0.02"], "out"));
    let tight = json(&mut run(&["--max-kl", "0.002", "--max-perplexity-ratio", "1.05"], "tight"));
    let kl = |v: &Value| v["held_out_kl"].as_f64().unwrap();
    assert!(kl(&loose) <= 0.02 && kl(&tight) <= 0.002, "{} {}", kl(&loose), kl(&tight));
    assert!(tight["quantized_bytes"].as_u64() > loose["quantized_bytes"].as_u64(), "less loss takes more bytes");
    // Each size that was tried is on record, and one that is a few percent smaller loses too much.
    let trials: Value = serde_json::from_slice(&std::fs::read(dir.path().join("out.search.json")).unwrap()).unwrap();
    let trials = trials["trials"].as_array().unwrap();
    let bits = loose["bits_per_weight"].as_f64().unwrap();
    let failed = trials.iter().filter(|t| t["kl"].as_f64().unwrap() > 0.02).map(|t| t["bits"].as_f64().unwrap());
    let nearest = failed.fold(0.0, f64::max);
    assert!(nearest < bits && (nearest > 0.9 * bits || bits < 2.2), "{nearest} {bits}: {trials:?}");
    assert!(out.exists() && !dir.path().join("out.trial").exists(), "trials are removed");
    let hopeless = failure(&mut run(&["--max-kl", "0.0000001"], "none"), 1);
    assert!(hopeless.contains("even the largest mixture loses more"), "{hopeless}");
}

#[test]
fn loaders_and_decode_time_are_constraints() {
    let stats = stats();
    // vLLM has no kernels for three asymmetric bits.
    let options = ["--bits", "3.6", "--options", "2asym,3asym,4asym,3,8", "--loader", "vLLM"];
    let distinct: Vec<String> = schemes(&plan(&stats, &options)).into_values().collect();
    assert!(distinct.iter().all(|s| !s.starts_with("w2") && s != "w3 g128 asym"), "{distinct:?}");
    let none = failure(
        bitmill(["plan"]).arg(books()).args(["--method", "rtn", "--stats"]).arg(&stats).args([
            "--bits",
            "3.6",
            "--options",
            "2asym,3asym",
            "--loader",
            "vLLM",
        ]),
        1,
    );
    assert!(none.contains("vLLM takes none of the schemes"), "{none}");
    let refused = failure(bitmill(["plan"]).arg(books()).args(["--bits", "3", "--asymmetric", "--loader", "vLLM"]), 1);
    assert!(refused.contains("vLLM would not load this output"), "{refused}");
    // Bytes read per token ÷ bandwidth: everything but the embedding, which is not read.
    let plan = plan(&stats, &["--decode-time", "7.5", "--bandwidth", "1GB", "--options", "2,3g64,4,6,8"]);
    let read = plan["output_bytes"].as_u64().unwrap() - 8192 * 256 * 2;
    assert!(read <= 7_500_000 && read + 2 * STEP > 7_500_000, "{read}");
    let mixed = failure(
        bitmill(["plan"]).arg(books()).args(["--bits", "3.5", "--options", "3,q4_k", "--stats"]).arg(&stats),
        1,
    );
    assert!(mixed.contains("do not mix"), "{mixed}");
}

#[test]
fn gguf_types_are_mixed() {
    let dir = tempfile::tempdir().unwrap();
    let stats = stats();
    let file = dir.path().join("mixed.gguf");
    let flags = ["--method", "rtn", "--bits", "4.0", "--options", "q2_k,q3_k,q4_k,q6_k,iq4_nl"];
    let made = json(bitmill(["quantize"]).arg(books()).arg("-o").arg(&file).arg("--stats").arg(&stats).args(flags));
    let (bytes, weights) = (made["quantized_bytes"].as_u64().unwrap(), made["quantized_weights"].as_u64().unwrap());
    assert!(bytes <= weights / 2 && bytes + STEP > weights / 2, "{bytes} of {}", weights / 2);
    let kinds: std::collections::BTreeSet<String> =
        made["tensors"].as_array().unwrap().iter().map(|t| t["scheme"].as_str().unwrap().to_owned()).collect();
    assert!(kinds.len() > 1 && kinds.iter().all(|k| k.starts_with('q') || k.starts_with("iq")), "{kinds:?}");
    let text = books().join("evaluation.txt");
    let read = json(bitmill(["eval"]).arg(&file).arg("--text").arg(text).args(["--windows", "2", "--window", "64"]));
    assert!(read["perplexity"]["value"].as_f64().unwrap() < 200.0);
}

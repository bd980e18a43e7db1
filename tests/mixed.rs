//! Mixed widths: the size is met, fused linears agree, and plans are files that people edit.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use support::{QUICK, assert_same, bitmill, books, contents, failure, json, success};

fn stats(dir: &Path) -> PathBuf {
    let file = dir.join("stats");
    success(bitmill(["calibrate"]).arg(books()).arg("-o").arg(&file).args(QUICK));
    file
}

/// Two blocks of eight, rounded without refinements.
const FEW: [&str; 6] = ["--descent-sweeps", "0", "--scale-refits", "0", "--ignore", r"model\.layers\.[2-7]\."];

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
    let dir = tempfile::tempdir().unwrap();
    let stats = stats(dir.path());
    for bits in ["2.5", "3.5", "4.25"] {
        let plan = plan(&stats, &["--bits", bits]);
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
        assert_eq!(takes, loader["loader"] != "GPTQModel", "{loader}");
    }
    let small = failure(bitmill(["plan"]).arg(books()).arg("--stats").arg(&stats).args(["--size", "8MB"]), 1);
    assert!(small.contains("no mixture of these options fits") && small.contains("raise the size"), "{small}");
    let alone = failure(bitmill(["plan"]).arg(books()).args(["--options", "2,4"]), 1);
    assert!(alone.contains("--size"), "{alone}");
}

#[test]
fn a_plan_file_runs_as_the_flags_that_made_it() {
    let dir = tempfile::tempdir().unwrap();
    let stats = stats(dir.path());
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
    assert_same(&by_file, &by_flags);
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
        command.arg(books()).arg("-o").arg(out).args(["--bits", "3.0", "--options", "2,4"]).args(QUICK).args(FEW);
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

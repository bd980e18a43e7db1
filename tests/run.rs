//! `bitmill run`: a model continues a text, the same text for the same seed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use serde_json::Value;
use support::{bitmill, books, failure, json, success};

fn run(flags: &[&str]) -> std::process::Command {
    let mut command = bitmill(["run"]);
    command.arg(books()).args(["--prompt", "It was a dark and", "--tokens", "12"]).args(flags);
    command
}

#[test]
fn a_model_continues_a_text() {
    let greedy = json(&mut run(&["--temperature", "0"]));
    let text = greedy["text"].as_str().unwrap();
    assert!(text.starts_with("It was a dark and") && text.len() > 20, "{text}");
    assert_eq!(greedy["new_tokens"], 12);
    assert!(greedy["tokens_per_second"].as_f64() > Some(0.0));
    // What is streamed is the text of the report.
    assert_eq!(success(&mut run(&["--temperature", "0"])).trim_end_matches('\n'), text.trim_end_matches('\n'));
    // One likely token is the most likely one, whatever the temperature and seed.
    assert_eq!(json(&mut run(&["--top-k", "1", "--seed", "5"]))["text"], greedy["text"]);
    let drawn = |seed: &str| -> Value {
        json(&mut run(&["--temperature", "1.5", "--top-k", "0", "--seed", seed]))["text"].take()
    };
    assert_eq!(drawn("1"), drawn("1"));
    assert_ne!(drawn("1"), drawn("2"));
}

#[test]
fn a_quantized_model_runs_in_the_memory_of_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("w4");
    let rtn = ["--method", "rtn", "--bits", "4", "--group-size", "128"];
    let made = json(bitmill(["quantize"]).arg(books()).arg("-o").arg(&out).args(rtn));
    let speak = |model: &std::path::Path, flags: &[&str]| {
        let prompt = ["--prompt", "The ship was lost, and", "--tokens", "24", "--temperature", "0"];
        json(bitmill(["run"]).arg(model).args(prompt).args(flags))
    };
    let packed = speak(&out, &[]);
    assert_eq!(packed["expanded_linears"], 0);
    // One copy of equal size, but for the shapes that a folder spells out.
    assert!(packed["block_bytes"].as_u64() <= made["quantized_bytes"].as_u64(), "{packed} {made}");
    // The same weights dequantized into f32 products say the same, which no rounding of inputs disturbs.
    let dense = dir.path().join("dense");
    success(bitmill(["dequantize"]).arg(&out).arg("-o").arg(&dense).args(["--dtype", "f32"]));
    let (full, expanded) = (speak(&out, &["--activations", "f32"]), speak(&dense, &[]));
    assert!(expanded["expanded_linears"].as_u64() > Some(0));
    assert_eq!(full["text"], expanded["text"]);
}

#[test]
fn what_cannot_be_continued_is_refused() {
    let long = "word ".repeat(600);
    assert!(failure(bitmill(["run"]).arg(books()).args(["--prompt", &long]), 1).contains("context is 512"));
    assert!(failure(&mut run(&["--temperature", "NaN"]), 1).contains("temperature"));
}

#[test]
fn a_model_writes_text_to_calibrate_it_on() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, flags: &[&str]| {
        let mut command = bitmill(["write"]);
        command.arg(books()).arg("-o").arg(dir.path().join(name));
        command.args(["--samples", "3", "--sequence-length", "40"]).args(flags);
        command
    };
    let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
    let report = json(&mut write("one.txt", &["--threads", "1"]));
    assert!(report["tokens"].as_u64() >= Some(117) && report["texts"].as_u64() >= Some(3), "{report}");
    success(&mut write("three.txt", &["--threads", "3"]));
    success(&mut write("other.txt", &["--seed", "1"]));
    assert_eq!(read("one.txt"), read("three.txt"));
    assert_ne!(read("one.txt"), read("other.txt"));
    assert!(failure(&mut write("one.txt", &[]), 1).contains("exists"));
    let encoder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("crates/models/tests/golden/bert");
    assert!(
        failure(bitmill(["write"]).arg(encoder).arg("-o").arg(dir.path().join("x.txt")), 1).contains("does not write")
    );
}

#[test]
fn a_model_writes_a_share_of_its_calibration_windows() {
    let dir = tempfile::tempdir().unwrap();
    let quantize = |name: &str, flags: &[&str]| {
        let mut command = bitmill(["quantize"]);
        command.arg(books()).arg("-o").arg(dir.path().join(name)).args(["--samples", "6", "--sequence-length", "48"]);
        command
            .args(["--target-shift", "off", "--descent-sweeps", "0", "--scale-refits", "0", "--no-report"])
            .args(flags);
        command
    };
    let weights = |name: &str| std::fs::read(dir.path().join(name).join("model.safetensors")).unwrap();
    let said = |command: &mut std::process::Command| {
        let output = command.output().unwrap();
        assert!(output.status.success(), "{command:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    // By default half of the windows of a small model; the same ones on any number of threads.
    let default = said(&mut quantize("default", &["--threads", "1"]));
    assert!(
        default.contains("writes 141 tokens") && default.contains("calibrating on 6 windows of 48 tokens"),
        "{default}"
    );
    assert!(default.contains("and text of its own"), "{default}");
    success(&mut quantize("half", &["--threads", "3", "--written", "0.5"]));
    assert_eq!(weights("default"), weights("half"));
    assert!(!said(&mut quantize("none", &["--written", "0"])).contains("writes"));
    assert_ne!(weights("default"), weights("none"));
    // All of them, and then no text at all.
    assert!(said(&mut quantize("all", &["--written", "1"])).contains("6 windows of 48 tokens from text of its own"));
    let text = books().join("calibration.txt");
    assert!(
        failure(quantize("x", &["--written", "1", "--calibration"]).arg(text), 1).contains("leave out --calibration")
    );
    // Planning writes nothing, and a plan keeps the share.
    assert!(!said(&mut quantize("x", &["--dry-run"])).contains("writes"));
    let plan = dir.path().join("plan.toml");
    success(bitmill(["plan"]).arg(books()).arg("-o").arg(&plan));
    let written = std::fs::read_to_string(&plan).unwrap();
    assert!(written.contains("written = 0.5"));
    std::fs::write(&plan, written.replace("written = 0.5", "written = 2.0")).unwrap();
    let mut edited = bitmill(["quantize", "--plan"]);
    edited.arg(&plan).arg(books()).arg("-o").arg(dir.path().join("x"));
    assert!(failure(&mut edited, 1).contains("no share"));
    let encoder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("crates/models/tests/golden/bert");
    let mut asked = bitmill(["quantize", "--written", "0.5", "--group-size", "-1"]);
    assert!(failure(asked.arg(encoder).arg("-o").arg(dir.path().join("x")), 1).contains("does not write"));
}

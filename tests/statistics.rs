//! One calibration pass, many outputs: statistics as a file give what separate passes give, and refuse what is not theirs.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use bitmill::calibrate::{Statistics, model_fingerprint};
use bitmill::checkpoint::Checkpoint;
use bitmill::models::SITES;
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use support::{QUICK, assert_same, bitmill, books, copy_of_books, edit, failure, json, success};

/// Two blocks of eight, rounded without refinements.
const FEW: [&str; 6] = ["--descent-sweeps", "0", "--scale-refits", "0", "--ignore", r"model\.layers\.[2-7]\."];

fn calibrated(dir: &Path, name: &str, extra: &[&str]) -> PathBuf {
    let file = dir.join(name);
    success(bitmill(["calibrate"]).arg(books()).arg("-o").arg(&file).args(QUICK).args(extra));
    file
}

fn quantized(model: &Path, dir: &Path, name: &str, extra: &[&str]) -> PathBuf {
    let out = dir.join(name);
    success(bitmill(["quantize"]).arg(model).arg("-o").arg(&out).args(FEW).args(extra));
    out
}

fn tensor(folder: &Path, name: &str) -> Vec<u8> {
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    SafeTensors::deserialize(&bytes).unwrap().tensor(name).unwrap().data().to_vec()
}

#[test]
fn one_pass_makes_the_outputs_that_separate_passes_make() {
    let dir = tempfile::tempdir().unwrap();
    let shared = calibrated(dir.path(), "shared", &["--threads", "1"]);
    let own = calibrated(dir.path(), "own", &["--stream-memory", "0"]);
    assert!(std::fs::read(&shared).unwrap() == std::fs::read(&own).unwrap(), "threads and memory decide nothing");
    let mixture = ["--bits", "3.5", "--options", "2,4", "--method", "rtn"];
    let outputs = [&["--bits", "4"][..], &["--bits", "3", "--group-size", "64"], &["--format", "gptq"], &mixture];
    for (i, flags) in outputs.iter().enumerate() {
        let out = |name: &str, stats: &Path| {
            let stats = stats.to_str().unwrap();
            quantized(&books(), dir.path(), &format!("{name}-{i}"), &[&["--stats", stats], *flags].concat())
        };
        assert_same(&out("from-shared", &shared), &out("from-own", &own));
    }
    // The first site has no rounded linears before it, so there text and statistics of it say the same.
    let text = quantized(&books(), dir.path(), "text", &QUICK);
    for role in ["q_proj", "k_proj", "v_proj"] {
        let name = format!("model.layers.0.self_attn.{role}.weight_packed");
        assert_eq!(tensor(&text, &name), tensor(&dir.path().join("from-shared-0"), &name));
    }
}

#[test]
fn texts_are_mixed_by_weight() {
    let dir = tempfile::tempdir().unwrap();
    let evaluation = books().join("evaluation.txt");
    let a = calibrated(dir.path(), "a", &["--no-sensitivity"]);
    let b = calibrated(dir.path(), "b", &["--no-sensitivity", "--calibration", evaluation.to_str().unwrap()]);
    let input = Checkpoint::open(&books()).unwrap();
    let spec = bitmill::models::spec(input.config()).unwrap();
    let model = model_fingerprint(&input).unwrap();
    let open = |files: &[(&PathBuf, f64)]| {
        let files: Vec<(PathBuf, f64)> = files.iter().map(|(p, w)| ((*p).clone(), *w)).collect();
        Statistics::open(&files, &spec, &model).unwrap()
    };
    let (one, other, mixed) = (open(&[(&a, 1.0)]), open(&[(&b, 5.0)]), open(&[(&a, 1.5), (&b, 0.5)]));
    let (one_h, other_h) = (one.hessian(3, &SITES[2]).unwrap(), other.hessian(3, &SITES[2]).unwrap());
    assert!(one_h != other_h);
    let each = mixed.hessian(3, &SITES[2]).unwrap().into_iter().zip(one_h.iter().zip(&other_h));
    assert!({ each }.all(|(m, (a, b))| (m - (0.75 * a + 0.25 * b)).abs() <= 1e-6 * (1.0 + a.abs())));
    let max = mixed.abs_max(3, &SITES[2]).unwrap();
    let (one_max, other_max) = (one.abs_max(3, &SITES[2]).unwrap(), other.abs_max(3, &SITES[2]).unwrap());
    assert!(max.iter().zip(one_max.iter().zip(&other_max)).all(|(m, (a, b))| *m == a.max(*b)));
    // Halves of the same are the same.
    let twice = format!("{}:0.5", a.display());
    let same = quantized(&books(), dir.path(), "twice", &["--stats", &twice, "--stats", &twice]);
    let once = quantized(&books(), dir.path(), "once", &["--stats", a.to_str().unwrap()]);
    let name = "model.layers.1.mlp.down_proj.weight_packed";
    assert_eq!(tensor(&same, name), tensor(&once, name));
}

#[test]
fn what_is_not_usable_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let stats = calibrated(dir.path(), "stats", &["--no-sensitivity"]);
    let refusal = |model: &Path, stats: &str, extra: &[&str]| {
        let out = dir.path().join("refused");
        let said =
            failure(bitmill(["quantize"]).arg(model).arg("-o").arg(&out).args(["--stats", stats]).args(extra), 1);
        assert!(!out.exists(), "{said}");
        said
    };
    let path = stats.to_str().unwrap();
    // A mixture needs sensitivities.
    let said = refusal(&books(), path, &["--bits", "3.5"]);
    assert!(said.contains("hold no sensitivities") && said.contains("bitmill calibrate"), "{said}");
    // Text and statistics exclude each other.
    let said = refusal(&books(), path, &["--calibration", books().join("calibration.txt").to_str().unwrap()]);
    assert!(said.contains("leave out either --stats or --calibration"), "{said}");
    // Another model: one number of its config is different.
    let other = copy_of_books(dir.path());
    edit(&other.join("config.json"), |c| c["rope_theta"] = 10001.0.into());
    let said = refusal(&other, path, &[]);
    assert!(said.contains("other weights or another config.json") && said.contains("bitmill calibrate"), "{said}");
    // Another architecture, another kind of file, no file.
    edit(&other.join("config.json"), |c| c["num_hidden_layers"] = 7.into());
    assert!(refusal(&other, path, &[]).contains("config.json"));
    let weights = books().join("model.safetensors");
    assert!(refusal(&books(), weights.to_str().unwrap(), &[]).contains("no tensor `about`"));
    assert!(refusal(&books(), "nowhere", &[]).contains("nowhere"));
    // Cut off, and with a number that is none.
    let whole = std::fs::read(&stats).unwrap();
    let damaged = dir.path().join("damaged");
    std::fs::write(&damaged, &whole[..whole.len() - 1000]).unwrap();
    assert!(refusal(&books(), damaged.to_str().unwrap(), &[]).contains("damaged"));
    let mut poisoned = whole.clone();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let entries: serde_json::Value = serde_json::from_slice(&whole[8..header]).unwrap();
    let at = header + entries["1.mlp_in.hessian"]["data_offsets"][0].as_u64().unwrap() as usize;
    poisoned[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&damaged, &poisoned).unwrap();
    let said = refusal(&books(), damaged.to_str().unwrap(), &["--force"]);
    assert!(said.contains("1.mlp_in.hessian: entry 0 is NaN"), "{said}");
    let said = failure(bitmill(["calibrate"]).arg(books()).arg("-o").arg(&stats), 1);
    assert!(said.contains("exists"), "{said}");
    assert!(json(bitmill(["inspect"]).arg(&stats))["kinds"].is_array(), "a statistics file is a safetensors file");
}

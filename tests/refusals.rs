//! Bad input gets its own clear error before work starts, and no file is lost.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use half::bf16;
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::{QUICK, bitmill, books, contents, copy_of_books, edit, failure, success};

/// Runs `bitmill quantize model -o out` with `extra` and asserts that it fails, mentions every one of `words` and leaves
/// nothing behind.
fn refused(model: &Path, extra: &[&str], words: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let said = failure(bitmill(["quantize"]).arg(model).arg("-o").arg(&out).args(QUICK).args(extra), 1);
    for word in words {
        assert!(said.contains(word), "`{word}` is missing from: {said}");
    }
    assert!(contents(dir.path()).is_empty(), "something was written: {:?}", contents(dir.path()).keys());
}

fn damaged(damage: impl FnOnce(&Path)) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let model = copy_of_books(dir.path());
    damage(&model);
    (dir, model)
}

#[test]
fn broken_weight_files() {
    let (_dir, model) = damaged(|m| {
        let file = std::fs::File::options().write(true).open(m.join("model.safetensors")).unwrap();
        file.set_len(1_000_000).unwrap();
    });
    refused(&model, &[], &["model.safetensors", "truncated", "fetch it again"]);

    let (_dir, model) = damaged(|m| {
        let mut bytes = std::fs::read(m.join("model.safetensors")).unwrap();
        bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        std::fs::write(m.join("model.safetensors"), bytes).unwrap();
    });
    refused(&model, &[], &["model.safetensors", "damaged"]);

    // A header whose offsets run past the end.
    let (_dir, model) = damaged(|m| {
        let mut bytes = std::fs::read(m.join("model.safetensors")).unwrap();
        let at = bytes.windows(10).position(|w| w == b"[0,4194304").unwrap();
        bytes[at..at + 10].copy_from_slice(b"[0,9194304");
        std::fs::write(m.join("model.safetensors"), bytes).unwrap();
    });
    refused(&model, &[], &["model.safetensors", "damaged"]);

    let (_dir, model) = damaged(|m| std::fs::remove_file(m.join("model.safetensors")).unwrap());
    refused(&model, &[], &["model.safetensors", "does not exist"]);

    let (_dir, model) = damaged(|m| {
        std::fs::rename(m.join("model.safetensors"), m.join("model-00001-of-00002.safetensors")).unwrap();
        let map = serde_json::json!({"metadata": {}, "weight_map": {
            "lm_head.weight": "model-00001-of-00002.safetensors", "model.norm.weight": "model-00002-of-00002.safetensors"}});
        std::fs::write(m.join("model.safetensors.index.json"), map.to_string()).unwrap();
    });
    refused(&model, &[], &["model-00002-of-00002.safetensors", "missing shard"]);
}

#[test]
fn weights_that_are_not_numbers() {
    for (value, name) in [(bf16::NAN, "model.layers.5.mlp.up_proj.weight"), (bf16::NEG_INFINITY, "model.norm.weight")] {
        let (_dir, model) = damaged(|m| {
            let mut bytes = std::fs::read(m.join("model.safetensors")).unwrap();
            let at = {
                let tensors = SafeTensors::deserialize(&bytes).unwrap();
                tensors.tensor(name).unwrap().data().as_ptr() as usize - bytes.as_ptr() as usize + 34
            };
            bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
            std::fs::write(m.join("model.safetensors"), bytes).unwrap();
        });
        for extra in [&[][..], &["--method", "rtn"]] {
            refused(&model, extra, &[name, "entry 17 is NaN or infinite", "model.safetensors"]);
        }
    }
}

#[test]
fn configs_that_do_not_fit() {
    refused(&books(), &["--group-size", "96"], &["model.layers.0", "group size 96", "256", "--group-size"]);
    refused(&books(), &["--format", "gptq", "--asymmetric"], &["gptq", "asym", "model.layers.0.mlp.down_proj"]);
    refused(&books(), &["--format", "gptq", "--bits", "5"], &["gptq", "w5"]);
    refused(&books(), &["--ignore", "(["], &["--ignore", "not a regular expression"]);
    refused(&books(), &["--ignore", ".*"], &["no tensor is left", "--ignore"]);

    let (_dir, model) = damaged(|m| edit(&m.join("config.json"), |c| c["hidden_size"] = 512.into()));
    refused(&model, &[], &["model.embed_tokens.weight", "config.json"]);
    let (_dir, model) = damaged(|m| edit(&m.join("config.json"), |c| c["num_hidden_layers"] = 9.into()));
    refused(&model, &[], &["model.layers.8.", "missing"]);
    let (_dir, model) = damaged(|m| std::fs::write(m.join("config.json"), "{").unwrap());
    refused(&model, &[], &["config.json", "JSON"]);
    let (_dir, model) = damaged(|m| {
        edit(&m.join("config.json"), |c| c["rope_scaling"] = serde_json::json!({"rope_type": "spiral", "factor": 2.0}));
    });
    refused(&model, &[], &["rope", "spiral"]);
    refused(Path::new("/nowhere"), &[], &["/nowhere", "does not exist"]);
}

#[test]
fn unknown_architectures_are_quantized_without_data_only() {
    let (dir, model) = damaged(|m| edit(&m.join("config.json"), |c| c["model_type"] = "resnext".into()));
    refused(&model, &[], &["resnext", "--method rtn"]);
    for method in ["rtn", "hqq"] {
        let out = dir.path().join(method);
        let run = bitmill(["quantize"]).arg(&model).arg("-o").arg(&out).args(["--method", method]).output().unwrap();
        let said = String::from_utf8_lossy(&run.stderr);
        assert!(run.status.success(), "{said}");
        assert!(
            said.contains("unknown architecture `resnext`") && said.contains("treated as linear: model.layers.0."),
            "{said}"
        );
        assert!(!said.contains("model.embed_tokens") && !said.contains("lm_head"), "{said}");
    }
}

#[test]
fn texts_and_tokenizers_that_cannot_be_used() {
    let dir = tempfile::tempdir().unwrap();
    let text = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    };
    refused(&books(), &["--calibration", &text("empty.txt", b"")], &["empty.txt", "0 tokens"]);
    refused(&books(), &["--calibration", &text("short.txt", b"A few words.")], &["short.txt", "one window needs 64"]);
    refused(&books(), &["--calibration", &text("latin1.txt", b"caf\xe9")], &["latin1.txt", "UTF-8"]);
    refused(&books(), &["--calibration", "/nowhere.txt"], &["/nowhere.txt"]);
    let (_dir, model) = damaged(|m| std::fs::write(m.join("tokenizer.json"), "{\"version\": \"1.0\"").unwrap());
    refused(&model, &[], &["tokenizer.json", "not a readable tokenizer"]);
    let (_dir, model) = damaged(|m| std::fs::remove_file(m.join("tokenizer.json")).unwrap());
    refused(&model, &[], &["no tokenizer.json and no tokenizer.model"]);
}

#[test]
fn what_is_not_done_to_floats() {
    for (scheme, extra, words) in [
        ("nvfp4a16", ["--tuning-passes", "1"], ["for integer schemes", "--tuning-passes 0"]),
        ("mxfp4a16", ["--reconstruction-passes", "1"], ["for integer schemes", "--reconstruction-passes 0"]),
        ("fp8_dynamic", ["--soft-rounding", "ada"], ["for integer schemes, not for fp8afp8 channel", "leave it out"]),
        ("fp8_block", ["--method", "hqq"], ["fp8afp8g128 128x128", "--method rtn"]),
        ("nvfp4a16", ["--format", "pack-quantized"], ["model.layers.0", "use nvfp4-pack-quantized for floats"]),
    ] {
        refused(&books(), &[&["--scheme", scheme], &extra[..]].concat(), &words);
    }
}

#[test]
fn places_that_must_not_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("precious"), "mine").unwrap();
    let command = || {
        let mut c = bitmill(["quantize"]);
        c.arg(books()).arg("-o").arg(&out).args(["--method", "rtn"]);
        c
    };
    let said = failure(&mut command(), 1);
    assert!(said.contains("exists") && said.contains("--force"), "{said}");
    assert_eq!(std::fs::read_to_string(out.join("precious")).unwrap(), "mine");
    success(command().arg("--force"));
    assert!(out.join("model.safetensors").exists() && !out.join("precious").exists());

    let (_dir, model) = damaged(|_| {});
    let before = contents(&model);
    for inside in [model.join("out"), model.clone(), model.parent().unwrap().to_owned()] {
        let said =
            failure(bitmill(["quantize"]).arg(&model).arg("-o").arg(&inside).args(["--method", "rtn", "--force"]), 1);
        assert!(said.contains("inside one another"), "{said}");
    }
    assert!(contents(&model) == before, "the model is untouched");

    // A quantized folder is not quantized again.
    let said =
        failure(bitmill(["quantize"]).arg(&out).arg("-o").arg(dir.path().join("twice")).args(["--method", "rtn"]), 1);
    assert!(said.contains("already quantized as pack-quantized"), "{said}");
}

#[test]
fn a_full_disk_is_noticed_before_work_starts() {
    // A limit on file size is what a full disk looks like to one process; its signal is ignored, as a disk sends none.
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let script = "trap '' XFSZ; ulimit -f 4096; exec \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh", env!("CARGO_BIN_EXE_bitmill"), "quantize"]);
    command.arg(books()).arg("-o").arg(&out).args(["--method", "rtn"]);
    let said = failure(&mut command, 1);
    assert!(said.contains("bytes free") && said.contains("needed") && said.contains("free some space"), "{said}");
    assert!(!said.contains("block 0"), "it was noticed before the first block: {said}");
    assert!(!out.exists());
    // With room, the same command succeeds in spite of what was left.
    success(bitmill(["quantize"]).arg(books()).arg("-o").arg(&out).args(["--method", "rtn"]));
}

#[test]
fn evaluations_that_make_no_sense() {
    let text = books().join("evaluation.txt");
    let eval = |args: &[&str]| failure(bitmill(["eval"]).arg(books()).arg("--text").arg(&text).args(args), 1);
    assert!(eval(&["--window", "600"]).contains("the model's context is 512 tokens"));
    assert!(eval(&["--window", "1"]).contains("at least two tokens"));
    let (_dir, model) = damaged(|m| edit(&m.join("config.json"), |c| c["vocab_size"] = 8000.into()));
    let said = eval(&["--reference", model.to_str().unwrap()]);
    assert!(said.contains("vocabularies have 8192 and 8000"), "{said}");
    failure(&mut bitmill(["quantize", "x", "-o", "y", "--bits", "9"]), 2);
    failure(&mut bitmill(["quantize", "x", "-o", "y", "--method", "magic"]), 2);
    failure(&mut bitmill(["quantize", "x", "-o", "y", "--scheme", "w4a16", "--bits", "3"]), 2);
}

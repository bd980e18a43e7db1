//! GGUF as an output and an input: one file that holds the whole model, and runs as the codes in it say.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use bitmill::checkpoint::gguf::{Value, gguf_name};
use bitmill::checkpoint::{Checkpoint, Weight};
use std::path::Path;
use support::{QUICK, bitmill, books, copy_of_books, edit, failure, json};

fn quantize(out: &Path, extra: &[&str]) -> serde_json::Value {
    json(bitmill(["quantize"]).arg(books()).arg("-o").arg(out).args(QUICK).args(extra))
}

#[test]
fn a_file_holds_the_whole_model_in_the_bytes_reported() {
    let dir = tempfile::tempdir().unwrap();
    for (scheme, method) in [("q4_k", "rtn"), ("q8_0", "rtn"), ("q2_k", "gptq"), ("iq4_nl", "rtn")] {
        let out = dir.path().join(format!("books-{scheme}.gguf"));
        let options = ["--scheme", scheme, "--method", method, "--output-tensor-type", "q6_k"];
        let plan = json(bitmill(["quantize"]).arg(books()).arg("-o").arg(&out).arg("--dry-run").args(options));
        let report = quantize(&out, &options);
        assert_eq!(report["format"], "gguf");
        let bytes = std::fs::metadata(&out).unwrap().len();
        assert_eq!((plan["output_bytes"].as_u64(), report["output_bytes"].as_u64()), (Some(bytes), Some(bytes)));

        let file = Checkpoint::open(&out).unwrap();
        let original = Checkpoint::open(&books()).unwrap();
        let gguf = file.gguf().unwrap();
        assert_eq!(gguf.get("general.architecture").and_then(Value::text), Some("llama"));
        assert_eq!(gguf.get("general.quantization_version"), Some(&Value::U32(2)));
        assert_eq!(gguf.get("tokenizer.ggml.tokens").unwrap().items().unwrap().len(), 8192);
        // Invariants 7 and 8: each tensor once, the quantized ones in the bytes reported.
        let payload: usize = gguf.tensors.iter().filter(|t| t.kind.block > 1).map(|t| t.range.len()).sum();
        let (bits, weights) =
            (report["bits_per_weight"].as_f64().unwrap(), report["quantized_weights"].as_f64().unwrap());
        assert_eq!((bits * weights / 8.0).round() as usize, payload);
        assert_eq!(gguf.tensors.len(), original.names().count());
        for name in original.names() {
            let tensor = gguf.tensor(&gguf_name("llama", name).unwrap()).unwrap();
            assert_eq!(tensor.shape, original.spec(name).unwrap().shape, "{name}");
            // What is not quantized is the original to the precision of its type, in the original order of rows.
            let module = name.strip_suffix(".weight").unwrap();
            let (ours, theirs) = match original.spec(name).unwrap().shape.len() {
                2 => {
                    (file.weight(module).unwrap().to_f32().unwrap(), original.weight(module).unwrap().to_f32().unwrap())
                }
                _ => (file.tensor(name).unwrap().to_f32().unwrap(), original.tensor(name).unwrap().to_f32().unwrap()),
            };
            let energy: f32 = theirs.iter().map(|x| x * x).sum();
            let error: f32 = ours.iter().zip(&theirs).map(|(a, b)| (a - b) * (a - b)).sum();
            // Error feedback moves weights on purpose; rows in another order would make it 2.
            let bound = match (tensor.kind.block, method) {
                (1, _) => 1e-6,
                (_, "rtn") => 0.02,
                _ => 0.6,
            };
            assert!(error <= bound * energy, "{scheme} {name}: {}", error / energy);
        }
        assert!(matches!(file.weight("lm_head").unwrap(), Weight::Quantized(q) if q.scheme.to_string() == "q6_k"));
        let inspected = json(bitmill(["inspect"]).arg(&out));
        let listed = inspected["kinds"].as_array().unwrap().iter().map(|k| k["weights"].as_u64().unwrap()).sum::<u64>();
        assert_eq!(listed, 10_490_112, "every weight is counted once");
        assert!(inspected["known_architecture"] == true && inspected["format"] == "gguf");
    }
}

#[test]
fn a_file_is_evaluated_with_its_own_tokenizer_and_row_order() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("books.gguf");
    quantize(&out, &["--scheme", "q8_0", "--method", "rtn"]);
    let eval = |model: &Path| {
        let mut command = bitmill(["eval"]);
        command.arg(model).arg("--reference").arg(books()).arg("--text").arg(books().join("evaluation.txt"));
        json(command.args(["--windows", "4", "--window", "128"]))
    };
    let e = eval(&out);
    // A wrong order of rows or another tokenizer would make it large.
    let kl = e["divergence"]["kl"]["mean"].as_f64().unwrap();
    assert!(kl > 1e-6 && kl < 5e-4, "{kl}");
}

#[test]
fn killed_or_not_and_at_any_thread_count_the_bytes_are_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one.gguf"), dir.path().join("two.gguf"));
    quantize(&one, &["--scheme", "q3_k", "--threads", "1"]);
    let mut child = bitmill(["quantize"])
        .arg(books())
        .arg("-o")
        .arg(&two)
        .args(QUICK)
        .args(["--scheme", "q3_k", "--commit-every", "0"])
        .stderr(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let journal = dir.path().join("two.gguf.bitmill-partial/journal.jsonl");
    while std::fs::read_to_string(&journal).map_or(0, |t| t.lines().count()) < 5 && child.try_wait().unwrap().is_none()
    {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let _ = child.kill();
    child.wait().unwrap();
    if !two.exists() {
        quantize(&two, &["--scheme", "q3_k", "--threads", "5"]);
    }
    assert_eq!(std::fs::read(&one).unwrap(), std::fs::read(&two).unwrap().as_slice());
    assert!(!dir.path().join("two.gguf.bitmill-partial").exists());
}

#[test]
fn what_cannot_be_is_refused_while_planning() {
    let dir = tempfile::tempdir().unwrap();
    let run = |model: &Path, out: &str, extra: &[&str]| {
        failure(bitmill(["quantize"]).arg(model).arg("-o").arg(dir.path().join(out)).args(extra), 1)
    };
    let books = books();
    for (out, extra, words) in [
        ("a", vec!["--scheme", "q4_k"], "ends in .gguf"),
        ("a.gguf", vec!["--bits", "4"], "choose one with --scheme"),
        ("a.gguf", vec!["--scheme", "q4_k", "--method", "hqq"], "use --method rtn"),
        ("a.gguf", vec!["--scheme", "q4_k", "--format", "gptq"], "q4_k is a type of GGUF"),
        ("a.gguf", vec!["--format", "gptq"], "only --format gguf writes a .gguf file"),
    ] {
        let said = run(&books, out, &extra);
        assert!(said.contains(words), "{said}");
    }
    let model = copy_of_books(dir.path());
    std::fs::copy(books.join("tokenizer.model"), model.join("tokenizer.model")).unwrap();
    edit(&model.join("config.json"), |c| c["hidden_act"] = "gelu".into());
    let said = run(&model, "b.gguf", &["--scheme", "q4_0"]);
    assert!(said.contains("SiLU"), "{said}");
    let file = dir.path().join("c.gguf");
    quantize(&file, &["--scheme", "q4_0", "--method", "rtn"]);
    let said = run(&file, "d.gguf", &["--scheme", "q4_0"]);
    assert!(said.contains("--allow-requantize"), "{said}");
}

/// The type of every matrix in a plan.
fn planned(model: &Path, extra: &[&str]) -> std::collections::BTreeMap<String, String> {
    let out = std::env::temp_dir().join("never-written.gguf");
    let plan = json(bitmill(["quantize"]).arg(model).arg("-o").arg(out).arg("--dry-run").args(extra));
    let tensors = plan["tensors"].as_array().unwrap().iter();
    let text = |v: &serde_json::Value| v.as_str().unwrap().to_owned();
    tensors.map(|t| (text(&t["tensor"]), text(&t["scheme"]))).collect()
}

#[test]
fn mixtures_patterns_and_names_decide_types_in_this_order() {
    let model = books();
    let own = planned(&model, &["--scheme", "q4_k_m", "--method", "rtn"]);
    let at = |plan: &std::collections::BTreeMap<String, String>, block: usize, part: &str| {
        plan[&format!("model.layers.{block}.{part}")].clone()
    };
    // llama-quantize's own choice for eight blocks: the first, the last, and every third between.
    let raised: Vec<usize> = (0..8).filter(|&b| at(&own, b, "mlp.down_proj") == "q6_k").collect();
    assert_eq!(raised, [0, 3, 6, 7]);
    assert_eq!((at(&own, 1, "mlp.down_proj"), at(&own, 0, "mlp.up_proj")), ("q4_k".into(), "q4_k".into()));
    assert_eq!((own["lm_head"].as_str(), own["model.embed_tokens"].as_str()), ("q6_k", "q4_k"));
    assert_eq!(own, planned(&model, &["--mix", "q4_k", "--method", "rtn"]), "the short name means the medium mixture");
    // Calibration data move one matrix of this mixture.
    let data = planned(&model, &["--mix", "q4_0", "--method", "gptq", "--sequence-length", "64"]);
    let none = planned(&model, &["--mix", "q4_0", "--method", "rtn"]);
    assert_eq!((at(&data, 0, "mlp.down_proj"), at(&none, 0, "mlp.down_proj")), ("q4_1".into(), "q4_0".into()));

    let pure = planned(&model, &["--mix", "q4_k_m", "--pure", "--method", "rtn"]);
    assert!(pure.len() == 58 && pure.values().all(|t| t == "q4_k"));
    let type_alone = planned(&model, &["--scheme", "q4_k", "--method", "rtn"]);
    assert!(type_alone.len() == 56 && type_alone.values().all(|t| t == "q4_k"), "embedding and output stay f16");
    let asked =
        ["--scheme", "q4_k_m", "--method", "rtn", "--tensor-type", r"blk\.[0-2]\.ffn_down=q8_0", "--tensor-type"];
    let asked = planned(&model, &[&asked[..], &["ffn_down=q5_k", "--token-embedding-type", "q2_k"]].concat());
    let down: Vec<String> = [0, 2, 3].map(|b| at(&asked, b, "mlp.down_proj")).into();
    assert_eq!((down.join(" "), asked["model.embed_tokens"].as_str()), ("q8_0 q8_0 q5_k".into(), "q2_k"));
}

#[test]
fn an_importance_matrix_weighs_errors_and_numbers_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let (matrix, old) = (dir.path().join("m.gguf"), dir.path().join("m.dat"));
    for file in [&matrix, &old] {
        let made = json(bitmill(["calibrate"]).arg(books()).arg("-o").arg(file).args([
            "--samples",
            "4",
            "--sequence-length",
            "64",
        ]));
        assert_eq!((made["weights"].as_u64(), made["chunks"].as_u64()), (Some(56), Some(4)));
    }
    let written = |name: &str, extra: &[&str]| {
        let out = dir.path().join(name);
        let mut command = bitmill(["quantize"]);
        json(command.arg(books()).arg("-o").arg(&out).args(["--scheme", "q2_k"]).args(extra));
        Checkpoint::open(&out).unwrap().weight("model.layers.0.mlp.up_proj").unwrap().to_f32().unwrap()
    };
    let plain = written("plain.gguf", &["--method", "rtn"]);
    let weighed = written("weighed.gguf", &["--imatrix", matrix.to_str().unwrap()]);
    assert_ne!(plain, weighed);
    assert_eq!(weighed, written("old.gguf", &["--imatrix", old.to_str().unwrap()]), "both layouts say the same");
    // It weighs the errors of a folder's scheme, too.
    let folder = |name: &str, extra: &[&str]| {
        let out = dir.path().join(name);
        json(bitmill(["quantize", "--method", "rtn"]).arg(books()).arg("-o").arg(&out).args(extra))["mean_relative_error"].clone()
    };
    let own = folder("folder", &["--scale-search", "mse"]);
    assert_ne!(own, folder("weighed", &["--imatrix", matrix.to_str().unwrap()]));
    let out = dir.path().join("x.gguf");
    let refused = |extra: &[&str]| failure(bitmill(["quantize"]).arg(books()).arg("-o").arg(&out).args(extra), 1);
    let said = refused(&["--scheme", "q2_k", "--method", "gptq", "--imatrix", matrix.to_str().unwrap()]);
    assert!(said.contains("diagonal only"), "{said}");

    // And back to a folder, which holds the numbers the file stands for.
    let folder = dir.path().join("numbers");
    json(bitmill(["dequantize"]).arg(dir.path().join("plain.gguf")).arg("-o").arg(&folder));
    let back = Checkpoint::open(&folder).unwrap();
    assert_eq!(back.weight("model.layers.0.mlp.up_proj").unwrap().to_f32().unwrap(), plain);
    assert_eq!(back.names().count(), Checkpoint::open(&books()).unwrap().names().count());
    let e = json(
        bitmill(["eval"])
            .arg(&folder)
            .arg("--reference")
            .arg(dir.path().join("plain.gguf"))
            .arg("--text")
            .arg(books().join("evaluation.txt"))
            .args(["--windows", "2", "--window", "64"]),
    );
    assert!(e["divergence"]["kl"]["mean"].as_f64().unwrap() < 1e-6, "{e}");
}

#[test]
fn files_are_split_read_from_any_part_and_quantized_again_only_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, out) = (dir.path().join("whole.gguf"), dir.path().join("parts.gguf"));
    quantize(&whole, &["--scheme", "q8_0", "--method", "rtn"]);
    let report = quantize(&out, &["--scheme", "q8_0", "--method", "rtn", "--max-shard-size", "5MB"]);
    let parts: Vec<_> = (1..=4).map(|i| dir.path().join(format!("parts-0000{i}-of-00004.gguf"))).collect();
    assert!(parts.iter().all(|p| p.exists()) && report["output"] == parts[0].to_str().unwrap(), "{report}");
    assert!(!out.exists());
    let one = Checkpoint::open(&whole).unwrap();
    for part in [&parts[0], &parts[3]] {
        let many = Checkpoint::open(part).unwrap();
        assert_eq!(many.names().collect::<Vec<_>>(), one.names().collect::<Vec<_>>());
        for module in ["model.layers.0.self_attn.q_proj", "model.layers.7.mlp.down_proj", "lm_head"] {
            let (a, b) =
                (one.weight(module).unwrap().to_f32().unwrap(), many.weight(module).unwrap().to_f32().unwrap());
            assert_eq!(a, b, "{module}");
        }
    }
    let again = dir.path().join("again.gguf");
    let how = ["--scheme", "q4_0", "--method", "rtn"];
    let said = failure(bitmill(["quantize"]).arg(&parts[0]).arg("-o").arg(&again).args(how), 1);
    assert!(said.contains("--allow-requantize"), "{said}");
    json(bitmill(["quantize"]).arg(&parts[0]).arg("-o").arg(&again).args(how).arg("--allow-requantize"));
    let direct = dir.path().join("direct.gguf");
    quantize(&direct, &how);
    // Eight bits before four are hardly felt, and names, rows and tokenizer came through.
    let (a, b) = (Checkpoint::open(&again).unwrap(), Checkpoint::open(&direct).unwrap());
    assert_eq!(a.gguf().unwrap().get("tokenizer.ggml.tokens"), b.gguf().unwrap().get("tokenizer.ggml.tokens"));
    for module in ["model.layers.3.self_attn.k_proj", "model.layers.3.mlp.up_proj", "model.embed_tokens"] {
        let (a, b) = (a.weight(module).unwrap().to_f32().unwrap(), b.weight(module).unwrap().to_f32().unwrap());
        let energy: f32 = b.iter().map(|x| x * x).sum();
        let error: f32 = a.iter().zip(&b).map(|(a, b)| (a - b) * (a - b)).sum();
        assert!(error < 0.01 * energy, "{module}: {}", error / energy);
    }
    std::fs::remove_file(&parts[2]).unwrap();
    let said = failure(bitmill(["inspect"]).arg(&parts[0]), 1);
    assert!(said.contains("parts-00003-of-00004.gguf"), "{said}");
}

//! Encoders of images from folder to folder: calibrated on images, quantized, and judged by their embeddings.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use bitmill::checkpoint::Checkpoint;
use candle_core::{Device, Tensor};
use serde_json::Value;
use std::path::{Path, PathBuf};
use support::{assert_same, bitmill, books, edit, failure, json, success};

/// A scheme that the tiny model's widths of 32 and 40 allow.
const SMALL: [&str; 4] = ["--group-size", "8", "--bits", "3"];

/// The golden classifier of images of 3 x 16 x 16.
fn vit(to: &Path) -> PathBuf {
    let (dir, golden) = (to.join("vit"), Path::new(env!("CARGO_MANIFEST_DIR")).join("crates/models/tests/golden/vit"));
    std::fs::create_dir_all(&dir).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(golden.join(file), dir.join(file)).unwrap();
    }
    dir
}

/// `count` smooth pictures that differ by `seed`, as a file of images.
fn pictures(to: &Path, name: &str, count: usize, seed: usize) -> PathBuf {
    let value = |i: usize| {
        let (image, channel, y, x) = (i / 768 + 1000 * seed, i / 256 % 3, i / 16 % 16, i % 16);
        let (a, b) = ((image * 37 % 101) as f32 / 16.0, (image * 53 % 97) as f32 / 16.0);
        (a * x as f32 / 4.0 + channel as f32).sin() + (b * y as f32 / 4.0).cos()
    };
    let values: Vec<f32> = (0..count * 768).map(value).collect();
    let file = to.join(name);
    Tensor::from_vec(values, (count, 3, 16, 16), &Device::Cpu)
        .unwrap()
        .save_safetensors("pixel_values", &file)
        .unwrap();
    file
}

fn quantize(model: &Path, out: &Path, images: &Path, extra: &[&str]) -> Value {
    let mut command = bitmill(["quantize"]);
    json(command.arg(model).arg("-o").arg(out).arg("--calibration").arg(images).args(SMALL).args(extra))
}

fn cosine(model: &Path, reference: &Path, images: &Path) -> f64 {
    let mut command = bitmill(["eval"]);
    let e = json(command.arg(model).arg("--reference").arg(reference).arg("--images").arg(images));
    assert_eq!((e["images"].as_u64(), e["longest"].as_u64(), e["pooling"].as_str()), (Some(24), Some(17), Some("cls")));
    e["cosine"]["mean"].as_f64().unwrap()
}

#[test]
fn calibrated_rounding_keeps_embeddings_better_and_the_folder_whole() {
    let dir = tempfile::tempdir().unwrap();
    let model = vit(dir.path());
    let (seen, new) = (pictures(dir.path(), "seen.safetensors", 96, 0), pictures(dir.path(), "new.safetensors", 24, 1));
    assert!((cosine(&model, &model, &new) - 1.0).abs() < 1e-12);
    let (gptq, rtn) = (dir.path().join("gptq"), dir.path().join("rtn"));
    let report = quantize(&model, &gptq, &seen, &["--samples", "64"]);
    quantize(&model, &rtn, &seen, &["--method", "rtn"]);
    let (gptq_cosine, rtn_cosine) = (cosine(&gptq, &model, &new), cosine(&rtn, &model, &new));
    assert!(gptq_cosine > rtn_cosine && rtn_cosine > 0.5, "{gptq_cosine} {rtn_cosine}");
    let records = report["tensors"].as_array().unwrap();
    assert_eq!(records.len(), 2 * 6);
    assert!(records.iter().all(|t| t["tokens"] == 64 * 17 && t["error_of"] == "output"), "{records:?}");
    let config: Value = serde_json::from_slice(&std::fs::read(gptq.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["quantization_config"]["ignore"], serde_json::json!(["classifier"]));
    let (before, after) = (Checkpoint::open(&model).unwrap(), Checkpoint::open(&gptq).unwrap());
    for name in before.names().filter(|name| !name.contains(".layer.") || name.contains("layernorm")) {
        assert_eq!(after.tensor(name).unwrap().bytes, before.tensor(name).unwrap().bytes, "{name} is copied");
    }
    let card = std::fs::read_to_string(gptq.join("README.md")).unwrap();
    assert!(card.contains("image-feature-extraction") && card.contains("64 images of 17 tokens"), "{card}");
    success(bitmill(["check"]).arg(&gptq).args(["--loader", "transformers"]));
    failure(bitmill(["check"]).arg(&gptq).args(["--loader", "vllm"]), 3);
}

#[test]
fn bytes_do_not_depend_on_threads_or_memory() {
    let dir = tempfile::tempdir().unwrap();
    let model = vit(dir.path());
    let images = pictures(dir.path(), "images.safetensors", 20, 0);
    let reference = dir.path().join("a");
    quantize(&model, &reference, &images, &["--threads", "1"]);
    for (name, extra) in [("b", &["--threads", "2"][..]), ("c", &["--threads", "5", "--stream-memory", "0"])] {
        let out = dir.path().join(name);
        quantize(&model, &out, &images, extra);
        assert_same(&reference, &out);
    }
    // Tuning and transforms know no words either.
    let tuned = dir.path().join("tuned");
    let report = quantize(&model, &tuned, &images, &["--tuning-passes", "2", "--transforms", "awq"]);
    assert!(report["stages"].as_array().unwrap().iter().any(|s| s["stage"] == "tuning"), "{report}");
}

#[test]
fn an_embedding_is_its_image_alone() {
    let dir = tempfile::tempdir().unwrap();
    let model = vit(dir.path());
    let embed = |images: &[&Path], count: &str| -> Vec<Vec<f32>> {
        let file = dir.path().join("out.safetensors");
        let mut command = bitmill(["eval"]);
        let command = command.arg(&model).arg("--images").args(images).args(["--windows", count]);
        success(command.arg("--embeddings").arg(&file));
        candle_core::safetensors::load(&file, &Device::Cpu).unwrap()["embeddings"].to_vec2().unwrap()
    };
    let (six, two) = (pictures(dir.path(), "six.safetensors", 6, 0), pictures(dir.path(), "two.safetensors", 2, 3));
    let all = embed(&[&six, &two], "100");
    assert_eq!(all.len(), 8);
    assert_eq!(all[6..], embed(&[&two], "2"));
    assert_eq!(embed(&[&six], "3"), [all[0].clone(), all[2].clone(), all[4].clone()]);
    assert!(all[0] != all[1] && all.iter().all(|row| (row.iter().map(|v| v * v).sum::<f32>() - 1.0).abs() < 1e-5));
}

#[test]
fn what_is_not_read_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let model = vit(dir.path());
    let (images, text) = (pictures(dir.path(), "images.safetensors", 2, 0), books().join("evaluation.txt"));
    let other = dir.path().join("wide.safetensors");
    Tensor::zeros((2, 3, 16, 32), candle_core::DType::F32, &Device::Cpu)
        .unwrap()
        .save_safetensors("pixel_values", &other)
        .unwrap();
    let damaged = dir.path().join("damaged.safetensors");
    let values = vec![f32::NAN; 768];
    Tensor::from_vec(values, (1, 3, 16, 16), &Device::Cpu).unwrap().save_safetensors("pixel_values", &damaged).unwrap();
    let out = dir.path().join("out");
    let calibrated = |model: &Path, files: &[&Path]| {
        let mut command = bitmill(["quantize"]);
        command.arg(model).arg("-o").arg(&out).args(SMALL);
        if !files.is_empty() {
            command.arg("--calibration").args(files);
        }
        failure(&mut command, 1)
    };
    for (model, files, words) in [
        (
            &model,
            &[][..],
            &["a vit model is calibrated on images", "--calibration FILE.safetensors", "[N, 3, 16, 16]"][..],
        ),
        (&model, &[text.as_path()], &["evaluation.txt is no file of images", "[N, 3, 16, 16]"]),
        (&model, &[&images, &other], &["wide.safetensors", "[2, 3, 16, 32]", "[N, 3, 16, 16]"]),
        (&model, &[damaged.as_path()], &["damaged.safetensors", "image 0", "NaN"]),
        (&model, &[&model.join("model.safetensors")], &["no tensor pixel_values"]),
        (&books(), &[images.as_path()], &["images.safetensors is a file of images, and a llama model reads text"]),
    ] {
        let said = calibrated(model, files);
        words.iter().for_each(|word| assert!(said.contains(word), "`{word}` is missing from: {said}"));
    }
    assert!(!out.exists());
    let eval = |model: &Path, args: &[&str]| failure(bitmill(["eval"]).arg(model).args(args), 1);
    let [images, text, own] = [&images, &text, &model].map(|path| path.to_str().unwrap());
    assert!(eval(&model, &["--text", text]).contains("a vit model reads images; give --images FILE"));
    assert!(eval(&books(), &["--images", images]).contains("a llama model reads text; give --text FILE"));
    assert!(eval(&model, &["--images", text]).contains("is no file of images"));
    assert!(eval(&model, &["--images", images]).contains("has no perplexity; give --reference"));
    assert!(
        eval(&model, &["--images", images, "--logits", "x"])
            .contains("--logits is for decoders; a vit model embeds images")
    );
    let books = books();
    let said = eval(&model, &["--images", images, "--reference", books.to_str().unwrap()]);
    assert!(said.contains("images [3, 16, 16] in patches [4, 4] and a vocabulary of 8192"), "{said}");
    let said = failure(bitmill(["eval", own, "--images", images, "--window", "5"]).args(["--reference", own]), 2);
    assert!(said.contains("--window"), "{said}");
    edit(&model.join("config.json"), |config| config["image_size"] = 20.into());
    let said = eval(&model, &["--images", images, "--reference", own]);
    assert!(said.contains("pixel_values is [2, 3, 16, 16]; the model reads [N, 3, 20, 20]"), "{said}");
}

#[test]
fn what_has_no_forward_pass_here_is_rounded_by_names_and_shapes_and_says_by_which() {
    let dir = tempfile::tempdir().unwrap();
    let model = vit(dir.path());
    edit(&model.join("config.json"), |config| config["model_type"] = "cousin_of_vit".into());
    let out = dir.path().join("out");
    let quantize = |extra: &[&str]| {
        let mut command = bitmill(["quantize"]);
        command.arg(&model).arg("-o").arg(&out).args(["--bits", "8", "--group-size", "-1"]).args(extra);
        command
    };
    let said = failure(&mut quantize(&[]), 1);
    assert!(said.contains("`cousin_of_vit`") && said.contains("--method rtn"), "{said}");
    assert!(!out.exists());
    let run = quantize(&["--method", "rtn"]).output().unwrap();
    let said = String::from_utf8(run.stderr).unwrap();
    assert!(run.status.success(), "{said}");
    let parts =
        ["attention.attention.key", "attention.attention.query", "attention.attention.value", "attention.output.dense"];
    let parts = parts.into_iter().chain(["intermediate.dense", "output.dense"]);
    let mut linears: Vec<String> =
        parts.flat_map(|part| [0, 1].map(|layer| format!("vit.encoder.layer.{layer}.{part}"))).collect();
    linears.sort();
    assert!(said.contains(&format!("treated as linear: {}", linears.join(", "))), "{said}");
    let (before, after) = (Checkpoint::open(&model).unwrap(), Checkpoint::open(&out).unwrap());
    for name in before.names() {
        let view = before.tensor(name).unwrap();
        let Some(module) = name.strip_suffix(".weight").filter(|m| linears.iter().any(|l| l == m)) else {
            assert_eq!(after.tensor(name).unwrap().bytes, view.bytes, "{name} is copied");
            continue;
        };
        let (rounded, columns) = (after.weight(module).unwrap().to_f32().unwrap(), view.shape[1]);
        for (row, rounded) in view.to_f32().unwrap().chunks(columns).zip(rounded.chunks(columns)) {
            let step = row.iter().fold(0.0f32, |m, v| m.max(v.abs())) / 127.0;
            assert!(row.iter().zip(rounded).all(|(a, b)| (a - b).abs() <= step), "{name}");
        }
    }
    // Loaders leave the classifier alone.
    let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
    assert!(config["quantization_config"]["ignore"].as_array().unwrap().contains(&"classifier".into()));
}

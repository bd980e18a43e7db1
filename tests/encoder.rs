//! An encoder from folder to folder: calibrated on sentences, quantized, and judged by its embeddings.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use serde_json::{Value, json as object};
use std::path::{Path, PathBuf};
use support::{assert_same, bitmill, books, edit, failure, json, success};

/// Calibration small enough to repeat, in a scheme that the tiny model's widths of 32 and 40 allow.
const SMALL: [&str; 8] = ["--samples", "300", "--sequence-length", "40", "--group-size", "8", "--bits", "3"];

/// The golden BERT with a WordPiece tokenizer of letters, as a sentence-transformers folder.
fn encoder(to: &Path) -> PathBuf {
    let dir = to.join("bert");
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("crates/models/tests/golden/bert");
    std::fs::create_dir_all(dir.join("1_Pooling")).unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(golden.join(file), dir.join(file)).unwrap();
    }
    let letters = ('a'..='z').map(String::from).chain(('a'..='z').map(|c| format!("##{c}")));
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"].map(String::from).into_iter();
    let marks = [".", ",", ";", "'", "\"", "-", "!", "?"].map(String::from);
    let vocab: serde_json::Map<String, Value> =
        special.chain(letters).chain(marks).enumerate().map(|(id, token)| (token, id.into())).collect();
    assert_eq!(vocab.len(), 64);
    let frame = |id: &str| object!({"SpecialToken": {"id": id, "type_id": 0}});
    let text = object!({"Sequence": {"id": "A", "type_id": 0}});
    let token = |id: &str, n: u32| object!({"id": id, "ids": [n], "tokens": [id]});
    let added = |id: u32, content: &str| object!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let tokenizer = object!({
        "version": "1.0",
        // What published folders carry, and what windows must not be cut or padded by.
        "truncation": {"max_length": 6, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": {"strategy": {"Fixed": 6}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"},
        "added_tokens": [added(0, "[PAD]"), added(1, "[UNK]"), added(2, "[CLS]"), added(3, "[SEP]")],
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing", "single": [frame("[CLS]"), text, frame("[SEP]")],
            "pair": [frame("[CLS]"), text, frame("[SEP]")],
            "special_tokens": {"[CLS]": token("[CLS]", 2), "[SEP]": token("[SEP]", 3)},
        },
        "decoder": null,
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": vocab},
    });
    let module =
        |path: &str, kind: &str| object!({"path": path, "type": format!("sentence_transformers.models.{kind}")});
    for (file, value) in [
        ("tokenizer.json", tokenizer),
        ("modules.json", object!([module("", "Transformer"), module("1_Pooling", "Pooling"), module("", "Normalize")])),
        ("1_Pooling/config.json", object!({"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": false})),
        ("sentence_bert_config.json", object!({"max_seq_length": 40})),
    ] {
        std::fs::write(dir.join(file), value.to_string()).unwrap();
    }
    dir
}

fn text(name: &str) -> PathBuf {
    books().join(name)
}

fn quantize(model: &Path, out: &Path, extra: &[&str]) -> Value {
    let calibration = text("calibration.txt");
    let mut command = bitmill(["quantize"]);
    json(command.arg(model).arg("-o").arg(out).arg("--calibration").arg(calibration).args(SMALL).args(extra))
}

/// Mean cosine similarity of the embeddings of 300 sentences.
fn cosine(model: &Path, reference: &Path) -> f64 {
    let mut command = bitmill(["eval"]);
    let command = command.arg(model).arg("--reference").arg(reference).arg("--text").arg(text("evaluation.txt"));
    let e = json(command.args(["--windows", "300"]));
    assert_eq!((e["sentences"].as_u64(), e["longest"].as_u64()), (Some(300), Some(40)));
    e["cosine"]["mean"].as_f64().unwrap()
}

#[test]
fn calibrated_rounding_keeps_embeddings_better_and_the_folder_whole() {
    let dir = tempfile::tempdir().unwrap();
    let model = encoder(dir.path());
    assert!((cosine(&model, &model) - 1.0).abs() < 1e-12);
    let (gptq, rtn) = (dir.path().join("gptq"), dir.path().join("rtn"));
    let report = quantize(&model, &gptq, &[]);
    quantize(&model, &rtn, &["--method", "rtn"]);
    let (gptq_cosine, rtn_cosine) = (cosine(&gptq, &model), cosine(&rtn, &model));
    assert!(gptq_cosine > rtn_cosine && rtn_cosine > 0.5, "{gptq_cosine} {rtn_cosine}");

    let tensors: Vec<&str> =
        report["tensors"].as_array().unwrap().iter().map(|t| t["tensor"].as_str().unwrap()).collect();
    assert_eq!(tensors.len(), 2 * 6);
    assert!(tensors.contains(&"encoder.layer.1.intermediate.dense"));
    let tokens = &report["tensors"][0]["tokens"];
    let said = bitmill(["quantize"])
        .arg(&model)
        .arg("-o")
        .arg(dir.path().join("dry"))
        .arg("--dry-run")
        .args(SMALL)
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&said.stderr).contains("300 sentences of up to 40 tokens"), "{said:?}");
    assert!(tokens.as_u64().unwrap() > 300 * 10, "each token of each sentence counts once: {tokens}");
    let config: Value = serde_json::from_slice(&std::fs::read(gptq.join("config.json")).unwrap()).unwrap();
    // Loaders build the pooler as a linear layer; there is no output head for them to leave alone.
    assert_eq!(config["quantization_config"]["ignore"], object!(["pooler.dense"]));
    for file in ["modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "tokenizer.json"] {
        assert_eq!(std::fs::read(gptq.join(file)).unwrap(), std::fs::read(model.join(file)).unwrap(), "{file}");
    }
    let kinds = json(bitmill(["inspect"]).arg(&gptq));
    assert_eq!(kinds["known_architecture"], true);
}

#[test]
fn bytes_do_not_depend_on_threads_or_memory() {
    let dir = tempfile::tempdir().unwrap();
    let model = encoder(dir.path());
    let reference = dir.path().join("a");
    quantize(&model, &reference, &["--threads", "1"]);
    for (name, extra) in [("b", &["--threads", "2"][..]), ("c", &["--threads", "5", "--stream-memory", "0"])] {
        let out = dir.path().join(name);
        quantize(&model, &out, extra);
        assert_same(&reference, &out);
    }
}

#[test]
fn an_embedding_is_its_sentences_alone() {
    let dir = tempfile::tempdir().unwrap();
    let model = encoder(dir.path());
    let embed = |name: &str, lines: &[&str]| -> Vec<Vec<f32>> {
        let (text, file) = (dir.path().join(name), dir.path().join(format!("{name}.safetensors")));
        std::fs::write(&text, lines.join("\n")).unwrap();
        success(bitmill(["eval"]).arg(&model).arg("--text").arg(&text).arg("--embeddings").arg(&file));
        let tensors = candle_core::safetensors::load(&file, &candle_core::Device::Cpu).unwrap();
        tensors["embeddings"].to_vec2().unwrap()
    };
    let long = "a much longer sentence, which would be beside the short ones; it is cut at forty tokens. ".repeat(3);
    let together = embed("together", &["Short one.", "", &long, "  Short one.  ", "another"]);
    assert_eq!(together.len(), 4, "blank lines are no sentences");
    assert_eq!(together[0], together[2]);
    assert_eq!(together[0], embed("alone", &["Short one."])[0]);
    assert!(together[0] != together[3]);
    for row in together {
        assert!((row.iter().map(|v| v * v).sum::<f32>() - 1.0).abs() < 1e-5);
    }
}

#[test]
fn what_an_encoder_cannot_do_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = encoder(dir.path());
    let file = dir.path().join("x.safetensors");
    let file = file.to_str().unwrap();
    let eval = |model: &Path, args: &[&str]| {
        failure(bitmill(["eval"]).arg(model).arg("--text").arg(text("evaluation.txt")).args(args), 1)
    };
    assert!(eval(&model, &[]).contains("has no perplexity; give --reference"));
    assert!(eval(&model, &["--logits", file]).contains("--logits is for decoders"));
    assert!(eval(&books(), &["--embeddings", file]).contains("--embeddings is for encoders"));
    let own = model.to_str().unwrap();
    assert!(eval(&model, &["--reference", own, "--window", "49"]).contains("context is 48 tokens"));
    assert!(eval(&model, &["--reference", own, "--window", "2"]).contains("adds 2 special tokens"));
    assert!(
        eval(&model, &["--reference", books().to_str().unwrap()])
            .contains("a vocabulary of 64 and a vocabulary of 8192")
    );
    edit(&model.join("modules.json"), |m| m[2]["type"] = "sentence_transformers.models.Dense".into());
    assert!(eval(&model, &["--reference", own]).contains("module `Dense`"));
    std::fs::write(model.join("modules.json"), "[]").unwrap();
    std::fs::write(dir.path().join("empty.txt"), "\n \n").unwrap();
    let out = dir.path().join("out");
    let mut command = bitmill(["quantize"]);
    command.arg(&model).arg("-o").arg(&out).args(SMALL).arg("--calibration").arg(dir.path().join("empty.txt"));
    assert!(failure(&mut command, 1).contains("empty.txt"));
    edit(&model.join("config.json"), |c| c["is_decoder"] = true.into());
    assert!(eval(&model, &["--reference", own]).contains("is_decoder"));
    assert!(!out.exists());
}

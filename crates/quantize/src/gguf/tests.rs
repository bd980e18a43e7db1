//! Every architecture as a GGUF file and back: what lies in the file, and that the model is the same under it.

use crate::{Calibration, Conversion, GgufSettings, Plan, RunOptions, Settings, Target, run, tiny};
use bitmill_calibrate::{Comparison, Sentences, compare_embeddings, evaluate, splitmix};
use bitmill_checkpoint::gguf::Value as Meta;
use bitmill_checkpoint::{Checkpoint, Dtype, OutputPlan, TensorSpec};
use bitmill_models::{spec, spec_of};
use bitmill_scheme::{BlockType, Scheme};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::atomic::AtomicBool;

const ROWS: usize = 48;

/// The architecture, the config, and what keys of the file hold.
type Case = (&'static str, Value, Vec<(&'static str, Meta)>);

/// The configs, with keys of the file that tell them from others.
fn cases() -> Vec<Case> {
    let longrope = json!({"type": "longrope", "short_factor": vec![1.25; 24], "long_factor": vec![1.5; 24]});
    let linear = json!({"rope_type": "linear", "factor": 8.0});
    let flags = |flags: &[bool]| {
        Meta::Array(bitmill_checkpoint::gguf::ValueType::Bool, flags.iter().map(|&f| Meta::Bool(f)).collect())
    };
    vec![
        (
            "gemma",
            json!({"model_type": "gemma"}),
            vec![("rope.freq_base", Meta::F32(1e4)), ("context_length", Meta::U32(64))],
        ),
        (
            "gemma2",
            json!({"model_type": "gemma2", "sliding_window": 5, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0}),
            vec![
                ("attention.sliding_window", Meta::U32(5)),
                ("attn_logit_softcapping", Meta::F32(4.0)),
                ("final_logit_softcapping", Meta::F32(3.0)),
            ],
        ),
        (
            "gemma3",
            json!({"model_type": "gemma3_text", "sliding_window": 5, "sliding_window_pattern": 2, "rope_scaling": linear,
                   "rope_local_base_freq": 300.0}),
            vec![
                ("attention.sliding_window_pattern", flags(&[true, false])),
                ("rope.freq_base", Meta::F32(1e6)),
                ("rope.freq_base_swa", Meta::F32(300.0)),
                ("rope.scaling.factor", Meta::F32(8.0)),
            ],
        ),
        (
            "phi3",
            json!({"model_type": "phi3", "original_max_position_embeddings": 16, "rope_scaling": longrope,
                   "partial_rotary_factor": 0.75, "tie_word_embeddings": false, "sliding_window": 40}),
            vec![
                ("rope.dimension_count", Meta::U32(48)),
                ("rope.scaling.original_context_length", Meta::U32(16)),
                ("rope.scaling.attn_factor", Meta::F32(1.5f64.sqrt() as f32)),
                ("attention.sliding_window", Meta::U32(40)),
            ],
        ),
        (
            "bert",
            json!({"model_type": "bert"}),
            vec![
                ("attention.causal", Meta::Bool(false)),
                ("pooling_type", Meta::U32(2)),
                ("attention.head_count", Meta::U32(4)),
            ],
        ),
    ]
}

/// A folder of random weights with a tokenizer.
fn folder(own: &Value, dir: &Path) -> Checkpoint {
    let mut config = json!({
        "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": ROWS, "max_position_embeddings": 64, "query_pre_attn_scalar": 64, "bos_token_id": 2,
    });
    let kind = own["model_type"].as_str().unwrap();
    if kind != "bert" {
        config["head_dim"] = json!(64);
    }
    config.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
    let spec = spec(&config).unwrap();
    let slots: Vec<_> = spec.tensors().into_iter().filter(|slot| !slot.optional).collect();
    let specs = slots.iter().map(|s| TensorSpec::new(&s.name, Dtype::F32, s.shape.clone())).collect();
    let output = OutputPlan::new(specs, u64::MAX).unwrap().create(dir).unwrap();
    let mut seed = 0;
    for slot in &slots {
        let (vector, norm) = (slot.shape.len() == 1, slot.name.to_lowercase().contains("norm.weight"));
        let (middle, width) = match (norm, vector) {
            (true, _) => (1.0 - spec.norm_offset, 0.5),
            (false, true) => (0.0, 0.5),
            (false, false) => (0.0, 0.125),
        };
        let value = |_| {
            seed += 1;
            middle + width * ((splitmix(seed) % 65536) as f32 / 32768.0 - 1.0)
        };
        let bytes: Vec<u8> = (0..slot.shape.iter().product::<usize>()).map(value).flat_map(f32::to_le_bytes).collect();
        output.write(&slot.name, &bytes).unwrap();
    }
    output.sync().unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    if kind == "bert" {
        std::fs::write(dir.join("tokenizer.json"), word_pieces().to_string()).unwrap();
        let names = json!({"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"});
        std::fs::write(dir.join("tokenizer_config.json"), names.to_string()).unwrap();
        std::fs::write(dir.join("modules.json"), json!([{"path": "pool", "type": "x.Pooling"}]).to_string()).unwrap();
        std::fs::create_dir(dir.join("pool")).unwrap();
        std::fs::write(dir.join("pool/config.json"), r#"{"pooling_mode_cls_token": true}"#).unwrap();
    } else {
        std::fs::write(dir.join("tokenizer.model"), sentence_pieces()).unwrap();
    }
    Checkpoint::open(dir).unwrap()
}

fn word_pieces() -> Value {
    let token = |id: usize, text: &str| json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    json!({
        "added_tokens": [token(0, "[PAD]"), token(1, "[UNK]"), token(2, "[CLS]"), token(3, "[SEP]")],
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
                  "vocab": {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "##a": 5}},
    })
}

/// A `tokenizer.model` of byte pairs that puts no space before a text: field after field of its protocol buffer.
fn sentence_pieces() -> Vec<u8> {
    let message = |field: u8, bytes: &[u8]| [&[field << 3 | 2, bytes.len() as u8], bytes].concat();
    let piece = |text: &str, kind: u8| {
        message(1, &[message(1, text.as_bytes()), vec![2 << 3 | 5, 0, 0, 0, 0, 3 << 3, kind]].concat())
    };
    let pieces = [("<pad>", 3), ("<eos>", 3), ("<bos>", 3), ("<unk>", 2), ("▁", 1), ("a", 1), ("▁a", 1), ("▁▁", 4)];
    let mut model = pieces.map(|(text, kind)| piece(text, kind)).concat();
    model.extend(message(2, &[3 << 3, 2]));
    model.extend(message(3, &[3 << 3, 0, 4 << 3, 0]));
    model
}

fn write(input: &Checkpoint, own: GgufSettings, scheme: BlockType, out: &Path) -> Checkpoint {
    let settings = Settings {
        samples: 0,
        sequence_length: 0,
        shard_bytes: u64::MAX,
        gguf: Some(own),
        ..Settings::new("rtn", "gguf", Scheme::block(scheme))
    };
    let plan = Plan::new(input, &settings).unwrap();
    let stop = AtomicBool::new(false);
    let options = RunOptions { force: true, ..RunOptions::new(&stop) };
    run(input, &plan, None::<Calibration<'_>>, out, options, &mut |_| {}).unwrap();
    Checkpoint::open(out).unwrap()
}

/// How far `model` is from `reference` on random tokens: KL divergence, or what cosines of embeddings lack of one.
fn distance(model: &Checkpoint, reference: &Checkpoint, dir: &Path) -> f64 {
    let spec = spec_of(model).unwrap();
    let (mut what, windows) = (
        Comparison { model, reference: Some(reference), stream_memory: 1 << 30, spill_dir: dir },
        tiny::windows(&spec, 2, 24),
    );
    if spec.causal {
        return evaluate(what, &windows, &mut |_, _| {}, None).unwrap().divergence.unwrap().kl.mean;
    }
    what.model = model;
    let (similarity, _) =
        compare_embeddings(what, &windows, Sentences::of(model).unwrap().pooling, &mut |_, _| {}).unwrap();
    1.0 - similarity.cosine.unwrap().mean
}

#[test]
fn every_architecture_is_the_same_model_in_a_file_and_back() {
    for (architecture, config, keys) in cases() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let input = folder(&config, &at("folder"));
        let mix = |name: &str| GgufSettings { mix: Some(name.into()), ..GgufSettings::default() };
        let dense = write(&input, mix("f32"), BlockType::Q8_0, &at("dense.gguf"));
        let gguf = dense.gguf().unwrap();
        assert_eq!(gguf.architecture(), architecture);
        for (key, value) in keys {
            assert_eq!(gguf.get(&format!("{architecture}.{key}")), Some(&value), "{architecture}.{key}");
        }
        // The file itself, not as it is read here: norms of Gemma are whole, all else is as it was.
        let bytes = std::fs::read(at("dense.gguf")).unwrap();
        let more = if architecture.starts_with("gemma") { 1.0 } else { 0.0 };
        for tensor in &gguf.tensors {
            let Some(name) = bitmill_checkpoint::gguf::hf_name(architecture, &tensor.name) else { continue };
            let more = if name.ends_with("norm.weight") { more } else { 0.0 };
            let there = bytes[tensor.range.clone()].chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
            let values: Vec<f32> = input.tensor(&name).unwrap().to_f32().unwrap().iter().map(|v| v + more).collect();
            assert!(there.eq(values), "{architecture}: {name}");
        }
        let extra = if architecture == "phi3" { 2 } else { 0 };
        assert_eq!(gguf.tensors.len(), input.names().count() + extra, "{architecture}: every tensor, once");

        assert!(distance(&dense, &input, dir.path()).abs() < 1e-9, "{architecture}");
        let four = write(&input, GgufSettings::default(), BlockType::Q4K, &at("four.gguf"));
        let far = distance(&four, &input, dir.path());
        assert!(far > 1e-6 && far < 0.1, "{architecture}: {far} at q4_k");

        // What is made of the file is what is made of the folder.
        let again = GgufSettings { requantize: true, ..mix("q4_0") };
        let (direct, twice) = (
            write(&input, mix("q4_0"), BlockType::Q4_0, &at("direct.gguf")),
            write(&dense, again, BlockType::Q4_0, &at("twice.gguf")),
        );
        let of = |file: &Checkpoint, name: &str| {
            let tensor = file.gguf().unwrap().tensor(name).unwrap().clone();
            std::fs::read(file.dir()).unwrap()[tensor.range].to_vec()
        };
        for tensor in &direct.gguf().unwrap().tensors {
            assert!(of(&direct, &tensor.name) == of(&twice, &tensor.name), "{architecture}: {}", tensor.name);
        }
        let back = at("back");
        let conversion = Conversion::new(&dense, Target::Dense(Dtype::F32), false, u64::MAX).unwrap();
        conversion.write(&back, false, &mut |_, _, _| {}).unwrap();
        let back = Checkpoint::open(&back).unwrap();
        assert!(distance(&back, &input, dir.path()).abs() < 1e-9, "{architecture}: dequantized");
        assert_eq!(spec_of(&back).unwrap().windows, spec_of(&input).unwrap().windows, "{architecture}");
        assert_eq!(Sentences::stated(&back).unwrap(), Sentences::stated(&input).unwrap(), "{architecture}");
        for name in input.names() {
            let pair = [&back, &input].map(|c| c.tensor(name).unwrap().to_f32().unwrap());
            assert!(pair[0].iter().zip(&pair[1]).all(|(a, b)| (a - b).abs() < 1e-6), "{architecture}: {name}");
        }
    }
}

#[test]
fn an_encoder_that_pools_as_llama_cpp_does_not_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let input = folder(&json!({"model_type": "bert"}), dir.path());
    std::fs::write(dir.path().join("pool/config.json"), r#"{"pooling_mode": "max"}"#).unwrap();
    let settings = Settings::new("rtn", "gguf", Scheme::block(BlockType::Q4_0));
    let error = Plan::new(&input, &settings).err().unwrap().to_string();
    assert!(error.contains("largest value of each channel"), "{error}");
}

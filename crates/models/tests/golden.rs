//! Logits of every golden checkpoint, or the hidden states of an encoder, against transformers: one harness, a folder per
//! case.
//!
//! The files come from `tools/reference/golden_logits.py`, which records the versions it ran with in their metadata.

#![allow(clippy::unwrap_used, reason = "a helper of a test may panic like the test")]

use bitmill_checkpoint::Checkpoint;
use bitmill_models::{ARCHES, Block, Embedding, Head, ModelSpec, RopeTable, Weights, Window, spec_of};
use candle_core::{DType, Device, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Largest accepted difference, relative to `max(1, |logit|)`.
const TOLERANCE: f32 = 1e-4;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn load(path: PathBuf) -> BTreeMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap().into_iter().collect()
}

fn ids(golden: &BTreeMap<String, Tensor>) -> Vec<u32> {
    golden["input_ids"].to_dtype(DType::U32).unwrap().to_vec1().unwrap()
}

/// Logits where the model has a head, hidden states otherwise; those of several images one after another.
fn output(spec: &ModelSpec, weights: &dyn Weights, golden: &BTreeMap<String, Tensor>) -> Tensor {
    let Some(images) = golden.get("pixel_values") else {
        return output_of_window(spec, weights, Window::from(&ids(golden)));
    };
    let one = |pixels: Tensor| pixels.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let pixels = (0..images.dim(0).unwrap()).map(|i| one(images.get(i).unwrap()));
    let outputs: Vec<Tensor> = pixels.map(|p| output_of_window(spec, weights, Window::Image(p.into()))).collect();
    Tensor::stack(&outputs, 0).unwrap()
}

fn output_of_window(spec: &ModelSpec, weights: &dyn Weights, window: Window<'_>) -> Tensor {
    let mut h = Embedding::load(spec, weights).unwrap().embed(window).unwrap();
    let rope = RopeTable::new(&spec.ropes, h.dim(0).unwrap()).unwrap();
    for index in 0..spec.layers {
        h = Block::load(spec, index, weights).unwrap().forward(&h, &rope).unwrap();
    }
    match spec.head() {
        Some(_) => Head::load(spec, weights).unwrap().logits(&h).unwrap(),
        None => h,
    }
}

fn assert_close(case: &str, got: &Tensor, expected: &Tensor) {
    assert_eq!(got.dims(), expected.dims(), "{case}");
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let worst = flat(got).iter().zip(flat(expected)).map(|(g, e)| (g - e).abs() / e.abs().max(1.0)).fold(0.0, f32::max);
    println!("{case}: {worst:.1e}");
    assert!(worst <= TOLERANCE, "{case}: outputs differ by {worst}");
}

/// Every tensor stored is claimed exactly once, every tensor required is stored, all in the shapes the config implies. What
/// belongs to another kind of input than tokens, or is the head of a task, is claimed by nobody.
fn assert_claimed(case: &str, spec: &ModelSpec, checkpoint: &Checkpoint) {
    let slots = spec.tensors();
    let other = |name: &str| {
        checkpoint.config()["vision_config"].is_object() && (name.contains("vision_") || name.contains("projector"))
            || name.starts_with("classifier.")
    };
    for name in checkpoint.names().filter(|name| !other(name)) {
        assert_eq!(slots.iter().filter(|s| s.name == name).count(), 1, "{case}: {name}");
    }
    for slot in slots {
        match checkpoint.spec(&slot.name) {
            Some(stored) => assert_eq!(stored.shape, slot.shape, "{case}: {}", slot.name),
            None => assert!(slot.optional, "{case}: {} is not stored", slot.name),
        }
    }
}

#[test]
fn every_golden_checkpoint_gives_the_reference_output() {
    let mut types = BTreeSet::new();
    let mut folders: Vec<PathBuf> = std::fs::read_dir(golden()).unwrap().map(|e| e.unwrap().path()).collect();
    folders.sort();
    for folder in folders.iter().filter(|f| f.join("config.json").exists()) {
        let case = folder.file_name().unwrap().to_string_lossy();
        let checkpoint = Checkpoint::open(folder).unwrap();
        let spec = spec_of(&checkpoint).unwrap();
        assert_claimed(&case, &spec, &checkpoint);
        let golden = load(folder.join("golden.safetensors"));
        let expected = if spec.head().is_some() { &golden["logits"] } else { &golden["hidden_states"] };
        assert_close(&case, &output(&spec, &checkpoint, &golden), expected);
        types.insert(spec.model_type);
    }
    let known: BTreeSet<String> = ARCHES.iter().flat_map(|a| a.model_types()).map(ToString::to_string).collect();
    assert_eq!(types, known, "every architecture has a golden checkpoint");
}

#[test]
fn books_10m_gives_the_reference_logits() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/books-10m");
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let spec = spec_of(&checkpoint).unwrap();
    assert_claimed("books-10m", &spec, &checkpoint);
    let golden = load(golden().join("books-10m/golden.safetensors"));
    let positions = golden["positions"].to_dtype(DType::U32).unwrap();
    let got = output(&spec, &checkpoint, &golden).index_select(&positions, 0).unwrap();
    assert_close("books-10m", &got, &golden["logits"]);
}

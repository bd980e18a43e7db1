//! Tiny models as inputs of tests: the golden checkpoints of `models`, one of every architecture, with settings and text; and
//! one of random weights.

use crate::Settings;
use bitmill_calibrate::{PIXELS, Windows, splitmix, uniform};
use bitmill_models::{Images, ModelSpec, spec};
use bitmill_scheme::{Bits, Granularity, Scheme};
use candle_core::{Device, Tensor};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The folder of them.
pub(crate) fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/golden")
}

/// Three bits per channel by gptq, after `transforms`.
pub(crate) fn settings(transforms: &[&str]) -> Settings {
    let transforms = transforms.iter().map(ToString::to_string).collect();
    let scheme = Scheme::int(Bits::ALL[2], true, Granularity::Channel);
    let (samples, sequence_length, shard_bytes) = (10, 32, u64::MAX);
    Settings { transforms, samples, sequence_length, shard_bytes, ..Settings::new("gptq", "pack-quantized", scheme) }
}

/// `count` windows of random tokens, at most `length` long, or of random images, as the model reads them.
pub(crate) fn windows(spec: &ModelSpec, count: usize, length: usize) -> Windows {
    if let Some(images) = &spec.images {
        let dir = tempfile::tempdir().unwrap();
        return Windows::images(&[pictures(dir.path(), images, count)], images, count, 0).unwrap();
    }
    let length = length.min(spec.max_positions);
    let token = |i: usize| (splitmix(i as u64) % spec.vocab as u64) as u32;
    Windows::of_tokens((0..count).map(|w| (0..length).map(|t| token(w * length + t)).collect()).collect())
}

/// A file of `count` random images below `dir`.
fn pictures(dir: &Path, images: &Images, count: usize) -> PathBuf {
    let shape = [&[count][..], &images.shape()].concat();
    let value = |i: usize| 2.0 * uniform(splitmix(i as u64)) - 1.0;
    let values: Vec<f32> = (0..shape.iter().product()).map(value).collect();
    let (file, tensor) = (dir.join("images.safetensors"), Tensor::from_vec(values, shape, &Device::Cpu).unwrap());
    tensor.save_safetensors(PIXELS, &file).unwrap();
    file
}

/// A Llama of `layers` blocks, `hidden` channels in two heads and 40 tokens, with normal weights of deviation `spread`.
pub(crate) fn llama(hidden: usize, layers: usize, spread: f32) -> (ModelSpec, BTreeMap<String, Tensor>) {
    let config = json!({"model_type": "llama", "hidden_size": hidden, "intermediate_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": 2, "vocab_size": 40});
    let spec = spec(&config).unwrap();
    let random = |shape: &[usize]| Tensor::randn(0.0, spread, shape, &Device::Cpu).unwrap();
    let weights = spec.tensors().into_iter().map(|slot| (slot.name, random(&slot.shape))).collect();
    (spec, weights)
}

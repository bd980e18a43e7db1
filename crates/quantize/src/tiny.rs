//! The golden checkpoints of `models` as inputs of tests: a tiny model of every architecture, settings and text for it.

use crate::{Observation, Settings, SolverOptions};
use bitmill_calibrate::{Windows, splitmix};
use bitmill_models::ModelSpec;
use bitmill_scheme::{Bits, Granularity, Scheme};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The folder of them.
pub(crate) fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/golden")
}

/// Three bits per channel by gptq, after `transforms`.
pub(crate) fn settings(transforms: &[&str]) -> Settings {
    Settings {
        method: "gptq".into(),
        format: "pack-quantized".into(),
        scheme: Scheme::int(Bits::ALL[2], true, Granularity::Channel),
        layers: BTreeMap::new(),
        scale_type: None,
        solver: SolverOptions::default(),
        observation: Observation::default(),
        transforms: transforms.iter().map(ToString::to_string).collect(),
        tuning: None,
        ignore: Vec::new(),
        samples: 10,
        sequence_length: 32,
        seed: 0,
        gguf: None,
        shard_bytes: u64::MAX,
    }
}

/// `count` windows of random tokens, at most `length` long.
pub(crate) fn windows(spec: &ModelSpec, count: usize, length: usize) -> Windows {
    let length = length.min(spec.max_positions);
    let token = |i: usize| (splitmix(i as u64) % spec.vocab as u64) as u32;
    let tokens = (0..count).map(|w| (0..length).map(|t| token(w * length + t)).collect()).collect();
    Windows { tokens, length, text_tokens: count * length }
}

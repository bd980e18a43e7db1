//! Qwen 2 and 2.5: biases on Q, K and V, windows for the upper layers.

use super::{Arch, Defaults, decoder, layer_windows};
use crate::config::Reader;
use crate::{Error, ModelSpec};
use serde_json::Value;

/// `model_type: qwen2`.
pub(super) struct Qwen2;

impl Arch for Qwen2 {
    fn model_types(&self) -> &'static [&'static str] {
        &["qwen2"]
    }

    fn spec(&self, config: &Value) -> Result<ModelSpec, Error> {
        let config = Reader::new(config)?;
        let defaults = Defaults { kv_heads: Some(32), max_positions: 32768, ..Defaults::USUAL };
        let spec = decoder(&config, "qwen2", &defaults)?;
        Ok(ModelSpec { qkv_bias: true, windows: layer_windows(&config, spec.layers)?, ..spec })
    }
}

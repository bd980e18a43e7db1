//! Qwen 3 (dense): norms of queries and keys, a head size of its own, no biases unless asked for.

use super::{Arch, Defaults, decoder, layer_windows};
use crate::config::Reader;
use crate::{Error, ModelSpec, QkNorm};
use serde_json::Value;

/// `model_type: qwen3`.
pub(super) struct Qwen3;

impl Arch for Qwen3 {
    fn model_types(&self) -> &'static [&'static str] {
        &["qwen3"]
    }

    fn spec(&self, config: &Value) -> Result<ModelSpec, Error> {
        let config = Reader::new(config)?;
        let defaults = Defaults { kv_heads: Some(32), head_dim: Some(128), max_positions: 32768, ..Defaults::USUAL };
        let spec = decoder(&config, "qwen3", &defaults)?;
        let attention_bias = config.flag("attention_bias", false)?;
        Ok(ModelSpec {
            qkv_bias: attention_bias,
            out_bias: attention_bias,
            qk_norm: Some(QkNorm::Head),
            windows: layer_windows(&config, spec.layers)?,
            ..spec
        })
    }
}

//! Mistral: Llama without biases, with one sliding window for all layers.

use super::{Arch, Defaults, decoder};
use crate::config::Reader;
use crate::{Error, ModelSpec};
use serde_json::Value;

/// `model_type: mistral`.
pub(super) struct Mistral;

impl Arch for Mistral {
    fn model_types(&self) -> &'static [&'static str] {
        &["mistral"]
    }

    fn spec(&self, config: &Value) -> Result<ModelSpec, Error> {
        let config = Reader::new(config)?;
        let defaults = Defaults { kv_heads: Some(8), max_positions: 4096 * 32, bos: Some(1), ..Defaults::USUAL };
        let spec = decoder(&config, "mistral", &defaults)?;
        // An explicit null switches the window off; silence leaves the first release's 4096.
        let window = if config.written("sliding_window") { config.positions("sliding_window")? } else { Some(4096) };
        Ok(ModelSpec { windows: vec![window; spec.layers], ..spec })
    }
}

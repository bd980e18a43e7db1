//! SmolLM3: Llama of which some layers, every fourth unless listed, do not rotate; these may have windows.

use super::{Arch, Defaults, decoder, listed_windows, rotated_layers};
use crate::config::Reader;
use crate::rope::RopeKeys;
use crate::{Error, ModelSpec};
use serde_json::Value;

/// `model_type: smollm3`.
pub(super) struct SmolLm3;

impl Arch for SmolLm3 {
    fn model_types(&self) -> &'static [&'static str] {
        &["smollm3"]
    }

    fn spec(&self, config: &Value) -> Result<ModelSpec, Error> {
        let config = Reader::new(config)?;
        let rope = RopeKeys { theta: 2e6, ..RopeKeys::USUAL };
        let (kv_heads, bos) = (Some(4), Some(128_000));
        let defaults = Defaults { kv_heads, max_positions: 32768, bos, tied: true, rope, ..Defaults::USUAL };
        let spec = decoder(&config, "smollm3", &defaults)?;
        let rotated = rotated_layers(&config, spec.layers)?;
        let width = match config.flag("use_sliding_window", false)? {
            true => config.positions("sliding_window")?,
            false => None,
        };
        let unrotated = || rotated.iter().map(|rotated| width.filter(|_| !rotated)).collect();
        let windows = listed_windows(&config, spec.layers, width)?.unwrap_or_else(unrotated);
        let ropes = spec.ropes.into_iter().zip(&rotated).map(|(rope, &rotated)| rope.filter(|_| rotated)).collect();
        let attention_bias = config.flag("attention_bias", false)?;
        let mlp_bias = config.flag("mlp_bias", false)?;
        Ok(ModelSpec { ropes, windows, qkv_bias: attention_bias, out_bias: attention_bias, mlp_bias, ..spec })
    }
}

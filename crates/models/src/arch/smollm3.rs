//! SmolLM3: Llama of which some layers, every fourth unless listed, do not rotate; these may have windows.

use super::{Arch, Defaults, decoder, listed_windows};
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
        let rotated = rotated(&config, spec.layers)?;
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

/// Which layers rotate.
fn rotated(config: &Reader<'_>, layers: usize) -> Result<Vec<bool>, Error> {
    let key = "no_rope_layers";
    let Some(list) = config.list(key)? else {
        let every = config.optional_size("no_rope_layer_interval")?.unwrap_or(4);
        return Ok((0..layers).map(|layer| !(layer + 1).is_multiple_of(every)).collect());
    };
    if list.len() < layers {
        return Err(config.error(key, format!("has {} entries for {layers} layers", list.len())));
    }
    // The name says the opposite of what an entry means.
    let flag = |value: &Value| match value.as_u64().or(value.as_bool().map(u64::from)) {
        Some(flag @ 0..=1) => Ok(flag == 1),
        _ => Err(config.error(key, "has an entry that is neither 0 nor 1")),
    };
    list.iter().take(layers).map(flag).collect()
}

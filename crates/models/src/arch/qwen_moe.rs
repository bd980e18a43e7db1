//! Qwen 2 and 3 with experts in the place of the MLP of most blocks; beside them in Qwen 2 one that every token goes to.

use super::{Arch, Defaults, decoder, listed_layers, listed_windows, routing};
use crate::config::Reader;
use crate::layout::{EXPERTS, SHARED_EXPERT};
use crate::{Error, ModelSpec, QkNorm, Routing, Weighing};
use serde_json::Value;

/// `model_type: qwen2_moe`.
pub(super) struct Qwen2Moe;
/// `model_type: qwen3_moe`.
pub(super) struct Qwen3Moe;

impl Arch for Qwen2Moe {
    fn model_types(&self) -> &'static [&'static str] {
        &["qwen2_moe"]
    }

    fn spec(&self, config: &Value) -> Result<ModelSpec, Error> {
        let config = Reader::new(config)?;
        let defaults = Defaults { kv_heads: Some(16), max_positions: 32768, ..Defaults::USUAL };
        let spec = decoder(&config, "qwen2_moe", &defaults)?;
        let width = window(&config)?;
        let upper = config.integer("max_window_layers", 0, 1 << 31)?.unwrap_or(28);
        let by_turns = || (0..spec.layers).map(|l| width.filter(|_| l.is_multiple_of(2) && l < upper)).collect();
        let windows = listed_windows(&config, spec.layers, width)?.unwrap_or_else(by_turns);
        let experts = routing(&config, ("num_experts", 60), 4)?;
        let routing = Routing {
            intermediate: config.optional_size("moe_intermediate_size")?.unwrap_or(1408),
            shared: config.optional_size("shared_expert_intermediate_size")?.unwrap_or(5632),
            weighing: weighing(&config)?,
            blocks: blocks(&config, spec.layers)?,
            ..experts
        };
        let qkv_bias = config.flag("qkv_bias", true)?;
        Ok(ModelSpec { layout: &SHARED_EXPERT, qkv_bias, windows, routing: Some(routing), ..spec })
    }
}

impl Arch for Qwen3Moe {
    fn model_types(&self) -> &'static [&'static str] {
        &["qwen3_moe"]
    }

    fn spec(&self, config: &Value) -> Result<ModelSpec, Error> {
        let config = Reader::new(config)?;
        let defaults = Defaults { kv_heads: Some(4), max_positions: 32768, ..Defaults::USUAL };
        let spec = decoder(&config, "qwen3_moe", &defaults)?;
        // Newer releases may write the name that Mixtral has for it.
        let key = if config.get("num_experts").is_some() { "num_experts" } else { "num_local_experts" };
        let experts = routing(&config, (key, 128), 8)?;
        let routing = Routing {
            intermediate: config.optional_size("moe_intermediate_size")?.unwrap_or(768),
            weighing: weighing(&config)?,
            blocks: blocks(&config, spec.layers)?,
            ..experts
        };
        let attention_bias = config.flag("attention_bias", false)?;
        Ok(ModelSpec {
            layout: &EXPERTS,
            qkv_bias: attention_bias,
            out_bias: attention_bias,
            qk_norm: Some(QkNorm::Head),
            windows: vec![window(&config)?; spec.layers],
            routing: Some(routing),
            ..spec
        })
    }
}

/// The width of windows, where they are switched on.
fn window(config: &Reader<'_>) -> Result<Option<usize>, Error> {
    match config.flag("use_sliding_window", false)? {
        false => Ok(None),
        true if config.written("sliding_window") => config.positions("sliding_window"),
        true => Ok(Some(4096)),
    }
}

/// Probabilities, or shares of them.
fn weighing(config: &Reader<'_>) -> Result<Weighing, Error> {
    Ok(if config.flag("norm_topk_prob", false)? { Weighing::Share } else { Weighing::Probability })
}

/// Which blocks have experts: every `decoder_sparse_step`-th but those of `mlp_only_layers`.
fn blocks(config: &Reader<'_>, layers: usize) -> Result<Vec<bool>, Error> {
    let step = config.optional_size("decoder_sparse_step")?.unwrap_or(1);
    let plain = listed_layers(config, "mlp_only_layers", layers)?.unwrap_or_default();
    Ok((0..layers).map(|layer| (layer + 1).is_multiple_of(step) && !plain.contains(&layer)).collect())
}

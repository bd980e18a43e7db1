//! Llama 4 (text): Llama of which most layers rotate and see chunks of the text, and the others see all of it without
//! rotating; experts that every token reads one of, weighted, and one that all read. Pairs of neighbouring channels are rotated.

use super::{Arch, Defaults, decoder, listed_kinds, listed_layers, nested, rotated_layers, routing};
use crate::config::Reader;
use crate::layout::LLAMA4;
use crate::rope::RopeKeys;
use crate::{Error, ModelSpec, Pairs, QkNorm, Rope, RopeKind, Routing, Tempering, Weighing};
use serde_json::Value;

/// `model_type: llama4_text`.
pub(super) struct Llama4Text;
/// `model_type: llama4`, with a vision tower, which is none of this.
pub(super) struct Llama4;

impl Arch for Llama4 {
    fn model_types(&self) -> &'static [&'static str] {
        &["llama4"]
    }

    fn spec(&self, config: &Value) -> Result<ModelSpec, Error> {
        nested(config, "llama4", false, |text| Llama4Text.spec(text))
    }
}

impl Arch for Llama4Text {
    fn model_types(&self) -> &'static [&'static str] {
        &["llama4_text"]
    }

    fn spec(&self, config: &Value) -> Result<ModelSpec, Error> {
        let config = Reader::new(config)?;
        let rope = RopeKeys { theta: 5e5, ..RopeKeys::USUAL };
        let (max_positions, bos, eps) = (4096 * 32, Some(1), 1e-5);
        let (kv_heads, head_dim) = (Some(8), Some(128));
        let spec = decoder(
            &config,
            "llama4_text",
            &Defaults { kv_heads, head_dim, max_positions, bos, eps, rope, ..Defaults::USUAL },
        )?;
        let stretched = |rope: &Rope| matches!(rope.kind, RopeKind::Yarn { .. } | RopeKind::LongRope { .. });
        let qk_norm = config.flag("use_qk_norm", true)?.then_some(QkNorm::Bare);
        if qk_norm.is_some() && spec.rope().is_some_and(stretched) {
            return Err(
                config.error("rope_scaling", "has a factor of what is rotated, which this architecture norms away")
            );
        }
        let rotated = rotated_layers(&config, spec.layers)?;
        let width = match config.written("attention_chunk_size") {
            true => config.positions("attention_chunk_size")?,
            false => Some(8192),
        };
        let windows = match listed_kinds(&config, spec.layers, ("chunked_attention", width))? {
            Some(listed) => listed,
            None => rotated.iter().map(|rotated| width.filter(|_| *rotated)).collect(),
        };
        let experts = routing(&config, ("num_local_experts", 16), 1)?;
        let (intermediate, blocks) = (spec.intermediate, blocks(&config, spec.layers)?);
        let routing = Routing { weighing: Weighing::Sigmoid, intermediate, shared: intermediate, blocks, ..experts };
        let ropes = spec.ropes.into_iter().zip(&rotated).map(|(rope, &rotated)| rope.filter(|_| rotated)).collect();
        let attention_bias = config.flag("attention_bias", false)?;
        Ok(ModelSpec {
            layout: &LLAMA4,
            spelling: &LLAMA4.spellings[0],
            intermediate: config.optional_size("intermediate_size_mlp")?.unwrap_or(16_384),
            routing: Some(routing).filter(|routing| routing.blocks.contains(&true)),
            ropes,
            pairs: Pairs::Neighbours,
            tempering: tempering(&config)?,
            windows,
            chunked: true,
            qkv_bias: attention_bias,
            out_bias: attention_bias,
            qk_norm,
            ..spec
        })
    }
}

/// Which layers have experts: those listed, or every few.
fn blocks(config: &Reader<'_>, layers: usize) -> Result<Vec<bool>, Error> {
    let every = config.optional_size("interleave_moe_layer_step")?.unwrap_or(1);
    Ok(match listed_layers(config, "moe_layers", layers)? {
        Some(listed) => (0..layers).map(|layer| listed.contains(&layer)).collect(),
        None => (0..layers).map(|layer| (layer + 1).is_multiple_of(every)).collect(),
    })
}

/// The first release writes a number where a flag is meant.
fn tempering(config: &Reader<'_>) -> Result<Option<Tempering>, Error> {
    let key = "attn_temperature_tuning";
    let wanted = match config.get(key).and_then(Value::as_u64) {
        Some(number) => number > 0,
        None => config.flag(key, true)?,
    };
    let floor = config.positive("floor_scale")?.unwrap_or(8192.0);
    let scale = config.positive("attn_scale")?.unwrap_or(0.1);
    Ok(wanted.then_some(Tempering { floor, scale }))
}

//! ModernBERT: a pre-norm encoder without positions of its own; most blocks see a window around each token, and have a rotary
//! embedding of another base than those that see everything.

use super::{Arch, Sizes, act, bare, equal_heads, layers, listed_windows, vocab};
use crate::config::Reader;
use crate::layout::MODERN_BERT;
use crate::{Error, ModelSpec, NormKind, Rope};
use serde_json::Value;

/// `model_type: modernbert`.
pub(super) struct ModernBert;

impl Arch for ModernBert {
    fn model_types(&self) -> &'static [&'static str] {
        &["modernbert"]
    }

    fn spec(&self, config: &Value) -> Result<ModelSpec, Error> {
        let config = Reader::new(config)?;
        let (hidden, heads) = (config.size("hidden_size")?, config.size("num_attention_heads")?);
        let layers = layers(&config)?;
        let head_dim = equal_heads(&config, hidden, heads)?;
        if !head_dim.is_multiple_of(2) {
            let reason = format!("makes heads of {head_dim} channels; rotary embedding pairs them up");
            return Err(config.error("num_attention_heads", reason));
        }
        if config.optional_size("head_dim")?.is_some_and(|own| own != head_dim) {
            return Err(config.error("head_dim", format!("is not {head_dim}, the width of one of {heads} heads")));
        }
        let sizes = Sizes {
            hidden,
            intermediate: config.size("intermediate_size")?,
            layers,
            vocab: vocab(&config)?,
            heads,
            kv_heads: heads,
            head_dim,
            max_positions: config.positions("max_position_embeddings")?.unwrap_or(8192),
        };
        let windows = windows(&config, layers)?;
        let bases = [("global_rope_theta", 160_000.0), ("local_rope_theta", 1e4)];
        let [full, windowed] = Rope::read_pair(&config, bases, [true; 2], head_dim, sizes.max_positions)?;
        let rope = |window: &Option<usize>| Some(if window.is_some() { windowed.clone() } else { full.clone() });
        let attention_bias = config.flag("attention_bias", false)?;
        Ok(ModelSpec {
            norm: if config.flag("norm_bias", false)? { NormKind::Layer } else { NormKind::Centred },
            norm_eps: config.positive("norm_eps")?.unwrap_or(1e-5),
            ropes: windows.iter().map(rope).collect(),
            causal: false,
            windows,
            qkv_bias: attention_bias,
            out_bias: attention_bias,
            mlp_bias: config.flag("mlp_bias", false)?,
            act: act(&config, ("hidden_activation", "gelu"))?,
            ..bare("modernbert", &MODERN_BERT, &sizes)
        })
    }
}

/// Windows in the layers that `layer_types` names, or in all but the first of every few. `local_attention` is their whole
/// width: half of it lies on either side.
fn windows(config: &Reader<'_>, layers: usize) -> Result<Vec<Option<usize>>, Error> {
    let width = config.positions("local_attention")?.unwrap_or(128) / 2 + 1;
    let every = config.optional_size("global_attn_every_n_layers")?.unwrap_or(3);
    let by_turns = || (0..layers).map(|layer| Some(width).filter(|_| !layer.is_multiple_of(every))).collect();
    Ok(listed_windows(config, layers, Some(width))?.unwrap_or_else(by_turns))
}

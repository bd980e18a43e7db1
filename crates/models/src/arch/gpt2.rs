//! GPT-2: layer norms, learned positions, Q, K and V stored as one linear, every linear of a block stored `[in, out]`.

use super::{Arch, Sizes, act, bare, bos, unsupported, vocab};
use crate::config::Reader;
use crate::layout::GPT2;
use crate::{Error, Factors, ModelSpec, NormKind};
use serde_json::Value;

/// `model_type: gpt2`.
pub(super) struct Gpt2;

impl Arch for Gpt2 {
    fn model_types(&self) -> &'static [&'static str] {
        &["gpt2"]
    }

    fn spec(&self, config: &Value) -> Result<ModelSpec, Error> {
        let config = Reader::new(config)?;
        let (hidden, heads) = (config.size("n_embd")?, config.size("n_head")?);
        if !hidden.is_multiple_of(heads) {
            return Err(config.error("n_head", format!("is {heads}, which does not divide {hidden} channels")));
        }
        unsupported(&config, "scale_attn_by_inverse_layer_idx", "every layer then has an attention scale of its own")?;
        unsupported(&config, "add_cross_attention", "it then reads another model")?;
        let positions = config.integer("n_positions", 1, 1 << 20)?.unwrap_or(1024);
        let sizes = Sizes {
            hidden,
            intermediate: config.optional_size("n_inner")?.unwrap_or(4 * hidden),
            layers: config.integer("n_layer", 1, 1 << 12)?.ok_or_else(|| config.missing("n_layer"))?,
            vocab: vocab(&config)?,
            heads,
            kv_heads: heads,
            head_dim: hidden / heads,
            max_positions: positions,
        };
        let attention = if config.flag("scale_attn_weights", true)? { None } else { Some(1.0) };
        Ok(ModelSpec {
            norm: NormKind::Layer,
            norm_eps: config.positive("layer_norm_epsilon")?.unwrap_or(1e-5),
            qkv_bias: true,
            out_bias: true,
            mlp_bias: true,
            factors: Factors { attention, ..Factors::NONE },
            tied: config.flag("tie_word_embeddings", true)?,
            act: act(&config, ("activation_function", "gelu_new"))?,
            bos: if config.written("bos_token_id") { bos(&config)? } else { Some(50_256) },
            ..bare("gpt2", &GPT2, &sizes)
        })
    }
}

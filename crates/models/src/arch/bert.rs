//! BERT and the sentence encoders made from it: post-norm, learned positions and token types, every token sees every other.

use super::{Arch, Sizes, act, bare, equal_heads, layers, vocab};
use crate::config::Reader;
use crate::layout::{BERT, Layout};
use crate::{Error, ModelSpec, NormKind};
use serde_json::Value;

/// `model_type: bert`.
pub(super) struct Bert;

impl Arch for Bert {
    fn model_types(&self) -> &'static [&'static str] {
        &["bert"]
    }

    fn spec(&self, config: &Value) -> Result<ModelSpec, Error> {
        encoder(&Reader::new(config)?, "bert", &BERT)
    }
}

/// The keys that BERT shares with those made after it.
pub(super) fn encoder(config: &Reader<'_>, model_type: &str, layout: &'static Layout) -> Result<ModelSpec, Error> {
    let (hidden, heads) = (config.size("hidden_size")?, config.size("num_attention_heads")?);
    let layers = layers(config)?;
    for key in ["is_decoder", "add_cross_attention"] {
        if config.flag(key, false)? {
            return Err(config.error(key, "is true; only the encoder is supported"));
        }
    }
    match config.text("position_embedding_type")? {
        None | Some("absolute") => {}
        Some(_) => {
            return Err(config.error("position_embedding_type", "is not \"absolute\", the only kind supported"));
        }
    }
    let sizes = Sizes {
        hidden,
        intermediate: config.size("intermediate_size")?,
        layers,
        vocab: vocab(config)?,
        heads,
        kv_heads: heads,
        head_dim: equal_heads(config, hidden, heads)?,
        max_positions: config.optional_size("max_position_embeddings")?.unwrap_or(512),
    };
    Ok(ModelSpec {
        norm: NormKind::Layer,
        norm_eps: config.positive("layer_norm_eps")?.unwrap_or(1e-12),
        token_types: config.optional_size("type_vocab_size")?.unwrap_or(2),
        causal: false,
        qkv_bias: true,
        out_bias: true,
        mlp_bias: true,
        act: act(config, ("hidden_act", "gelu"))?,
        ..bare(model_type, layout, &sizes)
    })
}

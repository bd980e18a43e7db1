//! OPT (all sizes but 350M): layer norms, learned positions whose first row is the third, ReLU.

use super::{Arch, Sizes, act, bare, bos, equal_heads, layers, unsupported, vocab};
use crate::config::Reader;
use crate::layout::OPT;
use crate::{Error, ModelSpec, NormKind};
use serde_json::Value;

/// `model_type: opt`.
pub(super) struct Opt;

impl Arch for Opt {
    fn model_types(&self) -> &'static [&'static str] {
        &["opt"]
    }

    fn spec(&self, config: &Value) -> Result<ModelSpec, Error> {
        let config = Reader::new(config)?;
        let (hidden, heads) = (config.size("hidden_size")?, config.size("num_attention_heads")?);
        for (key, means) in [
            ("do_layer_norm_before", "norms then stand in the residual stream"),
            ("layer_norm_elementwise_affine", "norms then have no weights"),
        ] {
            if !config.flag(key, true)? {
                return Err(config.error(key, format!("is false; {means}, which is unsupported")));
            }
        }
        unsupported(&config, "_remove_final_layer_norm", "the last norm is then left out")?;
        if config.optional_size("word_embed_proj_dim")?.is_some_and(|width| width != hidden) {
            return Err(
                config.error("word_embed_proj_dim", "is not hidden_size; embeddings of another width are unsupported")
            );
        }
        let sizes = Sizes {
            hidden,
            intermediate: config.size("ffn_dim")?,
            layers: layers(&config)?,
            vocab: vocab(&config)?,
            heads,
            kv_heads: heads,
            head_dim: equal_heads(&config, hidden, heads)?,
            max_positions: config.integer("max_position_embeddings", 1, 1 << 20)?.unwrap_or(2048),
        };
        let biases = config.flag("enable_bias", true)?;
        Ok(ModelSpec {
            norm: NormKind::Layer,
            norm_eps: 1e-5,
            position_offset: 2,
            qkv_bias: biases,
            out_bias: biases,
            mlp_bias: biases,
            tied: config.flag("tie_word_embeddings", true)?,
            act: act(&config, ("activation_function", "relu"))?,
            bos: if config.written("bos_token_id") { bos(&config)? } else { Some(2) },
            ..bare("opt", &OPT, &sizes)
        })
    }
}

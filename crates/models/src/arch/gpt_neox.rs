//! GPT-NeoX and Pythia: layer norms, the MLP beside the attention instead of behind it, Q, K and V stored as one linear head
//! by head, a quarter of every head rotated.

use super::{Arch, Sizes, act, bare, bos, equal_heads, layers, vocab};
use crate::config::Reader;
use crate::layout::NEOX;
use crate::rope::RopeKeys;
use crate::{Error, ModelSpec, NormKind, Rope};
use serde_json::Value;

/// `model_type: gpt_neox`.
pub(super) struct GptNeoX;

impl Arch for GptNeoX {
    fn model_types(&self) -> &'static [&'static str] {
        &["gpt_neox"]
    }

    fn spec(&self, config: &Value) -> Result<ModelSpec, Error> {
        let config = Reader::new(config)?;
        let (hidden, heads) = (config.size("hidden_size")?, config.size("num_attention_heads")?);
        let head_dim = equal_heads(&config, hidden, heads)?;
        let sizes = Sizes {
            hidden,
            intermediate: config.size("intermediate_size")?,
            layers: layers(&config)?,
            vocab: vocab(&config)?,
            heads,
            kv_heads: heads,
            head_dim,
            max_positions: config.positions("max_position_embeddings")?.unwrap_or(2048),
        };
        let keys = RopeKeys { base: "rotary_emb_base", share: Some(("rotary_pct", 0.25)), ..RopeKeys::USUAL };
        let rope = Rope::read(&config, &keys, head_dim, sizes.max_positions)?;
        let attention_bias = config.flag("attention_bias", true)?;
        Ok(ModelSpec {
            norm: NormKind::Layer,
            norm_eps: config.positive("layer_norm_eps")?.unwrap_or(1e-5),
            ropes: vec![Some(rope); sizes.layers],
            qkv_bias: attention_bias,
            out_bias: attention_bias,
            mlp_bias: true,
            parallel: config.flag("use_parallel_residual", true)?,
            tied: config.flag("tie_word_embeddings", false)?,
            act: act(&config, ("hidden_act", "gelu"))?,
            bos: if config.written("bos_token_id") { bos(&config)? } else { Some(0) },
            ..bare("gpt_neox", &NEOX, &sizes)
        })
    }
}

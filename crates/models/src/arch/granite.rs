//! Granite (dense): Llama with factors of embeddings, attention scores, residual sums and logits.

use super::{Arch, Defaults, decoder};
use crate::config::Reader;
use crate::{Error, Factors, ModelSpec};
use serde_json::Value;

/// `model_type: granite`.
pub(super) struct Granite;

impl Arch for Granite {
    fn model_types(&self) -> &'static [&'static str] {
        &["granite"]
    }

    fn spec(&self, config: &Value) -> Result<ModelSpec, Error> {
        let config = Reader::new(config)?;
        let attention_bias = config.flag("attention_bias", false)?;
        let factor = |key| Ok::<_, Error>(config.positive(key)?.unwrap_or(1.0));
        Ok(ModelSpec {
            qkv_bias: attention_bias,
            out_bias: attention_bias,
            mlp_bias: config.flag("mlp_bias", false)?,
            factors: Factors {
                embedding: factor("embedding_multiplier")?,
                attention: Some(factor("attention_multiplier")?),
                residual: factor("residual_multiplier")?,
                logits: 1.0 / factor("logits_scaling")?,
                ..Factors::NONE
            },
            ..decoder(&config, "granite", &Defaults { bos: Some(1), ..Defaults::USUAL })?
        })
    }
}

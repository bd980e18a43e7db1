//! OLMo 2: norms of what attention and MLP put out, none before them; queries and keys are normed over all heads at once.

use super::{Arch, Defaults, decoder};
use crate::config::Reader;
use crate::layout::POST_NORM;
use crate::{Error, ModelSpec, QkNorm};
use serde_json::Value;

/// `model_type: olmo2`.
pub(super) struct Olmo2;

impl Arch for Olmo2 {
    fn model_types(&self) -> &'static [&'static str] {
        &["olmo2"]
    }

    fn spec(&self, config: &Value) -> Result<ModelSpec, Error> {
        let config = Reader::new(config)?;
        let spec = decoder(&config, "olmo2", &Defaults { eps: 1e-5, ..Defaults::USUAL })?;
        let attention_bias = config.flag("attention_bias", false)?;
        if config.get("clip_qkv").is_some() {
            return Err(config.error("clip_qkv", "bounds queries, keys and values, which is unsupported"));
        }
        Ok(ModelSpec {
            layout: &POST_NORM,
            qkv_bias: attention_bias,
            out_bias: attention_bias,
            qk_norm: Some(QkNorm::Whole),
            ..spec
        })
    }
}

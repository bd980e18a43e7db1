//! Llama 1 to 3 and the many models that share its config.

use super::{Arch, Defaults, decoder};
use crate::config::Reader;
use crate::{Error, ModelSpec};
use serde_json::Value;

/// `model_type: llama`.
pub(super) struct Llama;

impl Arch for Llama {
    fn model_types(&self) -> &'static [&'static str] {
        &["llama"]
    }

    fn spec(&self, config: &Value) -> Result<ModelSpec, Error> {
        let config = Reader::new(config)?;
        let defaults = Defaults { bos: Some(1), ..Defaults::USUAL };
        let attention_bias = config.flag("attention_bias", false)?;
        Ok(ModelSpec {
            qkv_bias: attention_bias,
            out_bias: attention_bias,
            mlp_bias: config.flag("mlp_bias", false)?,
            ..decoder(&config, "llama", &defaults)?
        })
    }
}

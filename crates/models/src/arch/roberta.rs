//! RoBERTa and XLM-RoBERTa: BERT whose positions begin behind that of padding, which is not counted.

use super::{Arch, bert};
use crate::config::Reader;
use crate::layout::ROBERTA;
use crate::{Error, ModelSpec};
use serde_json::Value;

/// `model_type: roberta` and `xlm-roberta`.
pub(super) struct Roberta;

impl Arch for Roberta {
    fn model_types(&self) -> &'static [&'static str] {
        &["roberta", "xlm-roberta"]
    }

    fn spec(&self, config: &Value) -> Result<ModelSpec, Error> {
        let config = Reader::new(config)?;
        let model_type = config.text("model_type")?.unwrap_or("roberta");
        let spec = bert::encoder(&config, model_type, &ROBERTA)?;
        let padding = config.integer("pad_token_id", 0, 1 << 20)?.unwrap_or(1);
        let offset = padding + 1;
        let Some(max_positions) = spec.max_positions.checked_sub(offset).filter(|&left| left > 0) else {
            let reason = format!("is {}; the first {offset} positions are not for tokens", spec.max_positions);
            return Err(config.error("max_position_embeddings", reason));
        };
        Ok(ModelSpec { position_offset: offset, padding: Some(padding as u32), max_positions, ..spec })
    }
}

//! Mixtral: Mistral with eight experts in the place of the MLP, two of which a token goes to.

use super::{Arch, Defaults, decoder, routing};
use crate::config::Reader;
use crate::layout::MIXTRAL;
use crate::rope::RopeKeys;
use crate::{Error, ModelSpec, Routing, Weighing};
use serde_json::Value;

/// `model_type: mixtral`.
pub(super) struct Mixtral;

impl Arch for Mixtral {
    fn model_types(&self) -> &'static [&'static str] {
        &["mixtral"]
    }

    fn spec(&self, config: &Value) -> Result<ModelSpec, Error> {
        let config = Reader::new(config)?;
        let rope = RopeKeys { theta: 1e6, ..RopeKeys::USUAL };
        let (max_positions, bos, eps) = (4096 * 32, Some(1), 1e-5);
        let defaults = Defaults { kv_heads: Some(8), max_positions, bos, eps, rope, ..Defaults::USUAL };
        let spec = decoder(&config, "mixtral", &defaults)?;
        let window = config.positions("sliding_window")?;
        let experts = routing(&config, ("num_local_experts", 8), 2)?;
        let routing = Routing {
            intermediate: spec.intermediate,
            weighing: Weighing::Share,
            blocks: vec![true; spec.layers],
            ..experts
        };
        Ok(ModelSpec { layout: &MIXTRAL, windows: vec![window; spec.layers], routing: Some(routing), ..spec })
    }
}

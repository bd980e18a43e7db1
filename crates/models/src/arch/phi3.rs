//! Phi-3 and Phi-4: Llama with Q, K and V stored as one linear and Gate and Up as another; part of every head is rotated.

use super::{Arch, Defaults, decoder, unsupported};
use crate::config::Reader;
use crate::layout::FUSED;
use crate::rope::RopeKeys;
use crate::{Error, ModelSpec, Rope, RopeKind};
use serde_json::Value;

/// `model_type: phi3`.
pub(super) struct Phi3;

impl Arch for Phi3 {
    fn model_types(&self) -> &'static [&'static str] {
        &["phi3"]
    }

    fn spec(&self, config: &Value) -> Result<ModelSpec, Error> {
        let config = Reader::new(config)?;
        // Earlier configs write su or yarn and mean longrope.
        let rope = RopeKeys {
            share: Some(("partial_rotary_factor", 1.0)),
            longrope: &["su", "yarn"],
            original: Some(4096),
            ..RopeKeys::USUAL
        };
        let defaults = Defaults { max_positions: 4096, bos: Some(1), eps: 1e-5, rope, ..Defaults::USUAL };
        unsupported(&config, "attention_bias", "linears of the attention then have biases")?;
        let spec = decoder(&config, "phi3", &defaults)?;
        let scaled = |rope: &Rope| !matches!(rope.kind, RopeKind::Default | RopeKind::LongRope { .. });
        if spec.rope().is_some_and(scaled) {
            return Err(config.error("rope_scaling", "is none that this architecture has; it has longrope"));
        }
        let window = config.positions("sliding_window")?;
        Ok(ModelSpec { layout: &FUSED, windows: vec![window; spec.layers], ..spec })
    }
}

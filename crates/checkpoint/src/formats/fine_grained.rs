//! The `quantization_config` of fine-grained FP8, as DeepSeek publishes its models: tiles of weights with a scale each, inputs
//! rounded in groups at run time.

use super::{Format, floats};
use crate::dialect::{Rule, Target, wrong};
use crate::{Dialect, Error};
use bitmill_scheme::{Activations, FloatType, Granularity, ScaleType, Scheme};
use serde_json::{Value, json};
use std::collections::BTreeMap;

const METHOD: &str = "fp8";

/// The configuration; it names what is left out.
pub(super) fn config(_: &dyn Format, _: &BTreeMap<String, Scheme>, ignored: &[String]) -> Result<Value, Error> {
    Ok(json!({
        "quant_method": METHOD,
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [floats::TILE, floats::TILE],
        "modules_to_not_convert": ignored,
    }))
}

/// Reads a configuration.
pub(super) fn recognise(_: &dyn Format, config: &Value) -> Result<Option<Dialect>, Error> {
    if config.get("quant_method").and_then(Value::as_str) != Some(METHOD) {
        return Ok(None);
    }
    let get = |key: &str| config.get(key).filter(|v| !v.is_null());
    for (key, known, reason) in [
        ("fmt", "e4m3", "e4m3 is read"),
        ("activation_scheme", "dynamic", "inputs with scales of their own at run time are read"),
        ("scale_fmt", "float", "scales that are plain numbers are read"),
    ] {
        if let Some(other) = get(key).filter(|v| v.as_str() != Some(known)) {
            return Err(wrong(key, Some(other), reason));
        }
    }
    let size = get("weight_block_size");
    if size != Some(&json!([floats::TILE, floats::TILE])) {
        return Err(wrong("weight_block_size", size, "tiles of [128, 128] are read"));
    }
    let mut rules = Vec::new();
    for skipped in get("modules_to_not_convert").and_then(Value::as_array).into_iter().flatten() {
        let key = "modules_to_not_convert";
        let name = skipped.as_str().ok_or_else(|| wrong(key, Some(skipped), "a string is needed"))?;
        // A part of a name between dots.
        let pattern = format!(r"(.*\.)?{}(\..*)?$", fancy_regex::escape(name));
        rules.push(Rule { target: Target::pattern(key, &pattern)?, outcome: None });
    }
    let scheme = Scheme {
        activations: Activations::DynamicFp8Groups,
        ..Scheme::float(FloatType::E4m3, Granularity::Tile(floats::TILE), ScaleType::F32)
    };
    rules.push(Rule { target: Target::Linear, outcome: Some((&floats::FINE_GRAINED, scheme)) });
    Ok(Some(Dialect::new(&floats::FINE_GRAINED, rules)))
}

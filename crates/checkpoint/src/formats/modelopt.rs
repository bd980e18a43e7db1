//! The `quantization_config` of NVIDIA's ModelOpt, for weights in NVFP4 and inputs as they are (`W4A16_NVFP4`).
//!
//! The bytes are those of compressed-tensors' `nvfp4-pack-quantized` under other names, but for the scale of the whole matrix: it is
//! multiplied by, not divided. One is the other's reciprocal, exactly so for powers of two, which bitmill writes; of other
//! files the last bit of a weight may differ from the product.

use super::{Format, floats};
use crate::dialect::{Rule, Target, wrong};
use crate::{Dialect, Error};
use bitmill_scheme::{FloatType, Granularity, ScaleType, Scheme};
use serde_json::{Value, json};
use std::collections::BTreeMap;

const METHOD: &str = "modelopt";
/// Weights in NVFP4, inputs in 16 bits.
const ALGORITHM: &str = "W4A16_NVFP4";
/// Inputs that share a scale.
const GROUP: usize = 16;

/// The configuration; it has one scheme, and names what is left out.
pub(super) fn config(_: &dyn Format, _: &BTreeMap<String, Scheme>, ignored: &[String]) -> Result<Value, Error> {
    Ok(json!({
        "quant_method": METHOD,
        "quant_algo": ALGORITHM,
        "group_size": GROUP,
        "ignore": ignored,
        "kv_cache_scheme": null,
        "producer": {"name": METHOD},
    }))
}

/// Reads a configuration.
pub(super) fn recognise(_: &dyn Format, config: &Value) -> Result<Option<Dialect>, Error> {
    if config.get("quant_method").and_then(Value::as_str) != Some(METHOD) {
        return Ok(None);
    }
    let algorithm = config.get("quant_algo");
    if !algorithm.and_then(Value::as_str).is_some_and(|a| a.eq_ignore_ascii_case(ALGORITHM)) {
        let reason = "W4A16_NVFP4 is read; rounding inputs to 4-bit floats at run time is not computed here";
        return Err(wrong("quant_algo", algorithm, reason));
    }
    for key in ["kv_cache_scheme", "kv_cache_quant_algo"] {
        if let Some(other) = config.get(key).filter(|v| !v.is_null()) {
            return Err(wrong(key, Some(other), "quantized key-value caches are not read yet"));
        }
    }
    if let Some(size) = config.get("group_size").filter(|v| v.as_u64() != Some(GROUP as u64)) {
        return Err(wrong("group_size", Some(size), "NVFP4 has groups of 16"));
    }
    let mut rules = Vec::new();
    for skipped in config.get("ignore").and_then(Value::as_array).into_iter().flatten() {
        let name = skipped.as_str().ok_or_else(|| wrong("ignore", Some(skipped), "a string is needed"))?;
        // Shell patterns over whole names.
        let pattern = fancy_regex::escape(name).replace(r"\*", ".*").replace(r"\?", ".");
        rules.push(Rule { target: Target::pattern("ignore", &format!("{pattern}$"))?, outcome: None });
    }
    let scheme = Scheme::float(FloatType::E2m1, Granularity::Group(GROUP), ScaleType::E4m3);
    rules.push(Rule { target: Target::Linear, outcome: Some((&floats::MODELOPT, scheme)) });
    Ok(Some(Dialect::new(&floats::MODELOPT, rules)))
}

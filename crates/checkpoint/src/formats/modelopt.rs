//! The `quantization_config` of NVIDIA's ModelOpt, for weights in NVFP4 and inputs in it, too (`NVFP4`) or as they are
//! (`W4A16_NVFP4`).
//!
//! The bytes are those of compressed-tensors' `nvfp4-pack-quantized` under other names, but for the scales of the whole matrix and of its
//! inputs: they are multiplied by, not divided. One is the other's reciprocal, exactly so for powers of two, which bitmill writes; of other
//! files the last bit of a weight may differ from the product.

use super::{Format, floats, unsupported};
use crate::dialect::{Rule, Target, wrong};
use crate::{Dialect, Error};
use bitmill_scheme::{Activations, FloatType, Granularity, ScaleType, Scheme};
use serde_json::{Value, json};
use std::collections::BTreeMap;

const METHOD: &str = "modelopt";
/// Weights in NVFP4, and inputs in 16 bits or in it.
const ALGORITHMS: [(&str, Activations); 2] = [("W4A16_NVFP4", Activations::Full), ("NVFP4", Activations::Nvfp4)];
/// Inputs that share a scale.
const GROUP: usize = 16;

/// The configuration; it names what is left out.
pub(super) fn config(
    format: &dyn Format,
    layers: &BTreeMap<String, Scheme>,
    ignored: &[String],
) -> Result<Value, Error> {
    let mut algorithms = layers.iter().map(|layer| (layer, algorithm(layer.1)));
    let first = algorithms.next().map_or(ALGORITHMS[0].0, |(_, first)| first);
    if let Some(((module, scheme), _)) = algorithms.find(|(_, other)| *other != first) {
        return Err(unsupported(format, module, scheme, "it has one way to round inputs for all linears"));
    }
    Ok(json!({
        "quant_method": METHOD,
        "quant_algo": first,
        "group_size": GROUP,
        "ignore": ignored,
        "kv_cache_scheme": null,
        "producer": {"name": METHOD},
    }))
}

/// The file in which ModelOpt's releases kept the configuration before they wrote it to config.json, too. SGLang and TensorRT-LLM look
/// there, and NVIDIA's own models have it alone.
pub(crate) const SIDECAR: &str = "hf_quant_config.json";

/// The file for the configuration `config`.
pub(super) fn sidecar(config: &Value) -> Option<(&'static str, Value)> {
    let quantization = json!({
        "quant_algo": config["quant_algo"],
        "kv_cache_quant_algo": null,
        "group_size": config["group_size"],
        "exclude_modules": config["ignore"],
    });
    Some((SIDECAR, json!({"producer": config["producer"], "quantization": quantization})))
}

/// The configuration that the file holds.
pub(crate) fn folded(file: &Value) -> Option<Value> {
    let mut config = file.get("quantization")?.clone();
    let keys = config.as_object_mut()?;
    let ignored = keys.remove("exclude_modules").unwrap_or_default();
    keys.insert("ignore".into(), ignored);
    keys.insert("quant_method".into(), json!(METHOD));
    Some(config)
}

/// What a scheme is called.
fn algorithm(scheme: &Scheme) -> &'static str {
    let own = ALGORITHMS.iter().find(|(_, activations)| *activations == scheme.activations);
    own.unwrap_or(&ALGORITHMS[0]).0
}

/// Reads a configuration.
pub(super) fn recognise(_: &dyn Format, config: &Value) -> Result<Option<Dialect>, Error> {
    if config.get("quant_method").and_then(Value::as_str) != Some(METHOD) {
        return Ok(None);
    }
    let named = config.get("quant_algo");
    let name = named.and_then(Value::as_str).unwrap_or_default();
    let Some(&(_, activations)) = ALGORITHMS.iter().find(|(own, _)| own.eq_ignore_ascii_case(name)) else {
        return Err(wrong("quant_algo", named, "NVFP4 and W4A16_NVFP4 are read"));
    };
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
    let scheme = Scheme { activations, ..Scheme::float(FloatType::E2m1, Granularity::Group(GROUP), ScaleType::E4m3) };
    rules.push(Rule { target: Target::Linear, outcome: Some((&floats::MODELOPT, scheme)) });
    Ok(Some(Dialect::new(&floats::MODELOPT, rules)))
}

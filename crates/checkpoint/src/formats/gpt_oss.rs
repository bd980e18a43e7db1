//! The `quantization_config` of gpt-oss as it is published: experts in MXFP4, all else as it is.
//!
//! The bytes are those of compressed-tensors' `mxfp4-pack-quantized`, stacked by expert under other names, which
//! [`crate::experts::stacked_blocks`] takes care of when a folder is opened. It is read, and nothing is written so.

use super::{Format, compressed_tensors, floats};
use crate::dialect::{Rule, Target, wrong};
use crate::{Dialect, Error};
use bitmill_scheme::{FloatType, Granularity, ScaleType, Scheme};
use serde_json::Value;

/// What configurations call it.
pub(crate) const METHOD: &str = "mxfp4";

/// Reads a configuration of this or, if it is none, of compressed-tensors.
pub(super) fn recognise(own: &dyn Format, config: &Value) -> Result<Option<Dialect>, Error> {
    if config.get("quant_method").and_then(Value::as_str) != Some(METHOD) {
        return compressed_tensors::recognise(own, config);
    }
    let scheme = Scheme::float(FloatType::E2m1, Granularity::Group(32), ScaleType::E8m0);
    let key = "modules_to_not_convert";
    let mut rules = Vec::new();
    for skipped in config.get(key).and_then(Value::as_array).into_iter().flatten() {
        let name = skipped.as_str().ok_or_else(|| wrong(key, Some(skipped), "a string is needed"))?;
        // Shell patterns, for the parts of a module as well.
        let pattern = fancy_regex::escape(name).replace(r"\*", ".*");
        rules.push(Rule { target: Target::pattern(key, &format!(r"{pattern}(\..*)?$"))?, outcome: None });
    }
    rules.push(Rule { target: Target::pattern("experts", r".*\.experts\.")?, outcome: Some((&floats::MXFP4, scheme)) });
    Ok(Some(Dialect::new(&floats::MXFP4, rules)))
}

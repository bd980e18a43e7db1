//! The `quantization_config` of AutoRound's own format: tensors of GPTQ (without `g_idx`) or AWQ under keys of its own, which are
//! brought into theirs here.
//!
//! | `packing_format` | tensors |
//! | --- | --- |
//! | `auto_round:auto_gptq` | GPTQ, zero points less one |
//! | `auto_round`, `auto_round:auto_round`, `auto_round:gptqmodel` | GPTQ, zero points as they are |
//! | `auto_round:auto_awq` | AWQ gemm |

use crate::Error;
use crate::dialect::wrong;
use serde_json::{Map, Value, json};

/// What configurations call it.
pub(crate) const METHOD: &str = "auto-round";
/// From so many bits on a layer is left as it was.
const DENSE: u64 = 16;

/// The same configuration in the words of the format that its tensors have; `None` where it is not AutoRound's.
pub(crate) fn translated(config: &Value) -> Result<Option<Value>, Error> {
    if config.get("quant_method").and_then(Value::as_str) != Some(METHOD) {
        return Ok(None);
    }
    let get = |key: &str| config.get(key).filter(|v| !v.is_null());
    for (key, known) in [("data_type", json!("int")), ("act_bits", json!(DENSE))] {
        if let Some(other) = get(key).filter(|v| **v != known) {
            return Err(wrong(key, Some(other), format!("of this tool's own formats those with {known} are read")));
        }
    }
    let packing = get("packing_format").map_or(Some("auto_round"), Value::as_str);
    let mut own = json!({"bits": get("bits"), "group_size": get("group_size"), "sym": get("sym")});
    match packing.map(|name| name.trim_start_matches("auto_round:")) {
        Some(name @ ("auto_gptq" | "gptq" | "auto_round" | "gptqmodel" | "gptq_v2")) => {
            let version = if name.ends_with("gptq") { "gptq" } else { "gptq_v2" };
            own["quant_method"] = json!("gptq");
            own["checkpoint_format"] = json!(version);
            own["dynamic"] = exceptions(get("extra_config"));
        }
        Some("auto_awq" | "awq") => {
            let dense = layers(get("extra_config")).filter(|(_, layer)| is_dense(layer)).map(|(name, _)| name);
            own["quant_method"] = json!("awq");
            own["modules_to_not_convert"] = dense.cloned().collect();
            if let Some((name, _)) = layers(get("extra_config")).find(|(_, layer)| !is_dense(layer)) {
                return Err(wrong("extra_config", Some(&json!(name)), "AWQ has one scheme for all layers"));
            }
        }
        _ => {
            let reason = "packings of auto_gptq, gptqmodel and auto_awq are read";
            return Err(wrong("packing_format", get("packing_format"), reason));
        }
    }
    Ok(Some(own))
}

fn layers(extra: Option<&Value>) -> impl Iterator<Item = (&String, &Value)> {
    extra.and_then(Value::as_object).into_iter().flatten()
}

fn is_dense(layer: &Value) -> bool {
    layer.get("bits").and_then(Value::as_u64).is_some_and(|bits| bits >= DENSE)
}

/// Layers that differ, as GPTQModel writes them; names may be patterns.
fn exceptions(extra: Option<&Value>) -> Value {
    let pattern = |name: &String| {
        let regex = name.contains(['*', '\\', '^', '$', '(', '[', '|', '+']);
        if regex { name.clone() } else { format!("^{}$", fancy_regex::escape(name)) }
    };
    let exception = |(name, layer): (&String, &Value)| match is_dense(layer) {
        true => (format!("-:{}", pattern(name)), json!({})),
        false => (format!("+:{}", pattern(name)), layer.clone()),
    };
    Value::Object(layers(extra).map(exception).collect::<Map<_, _>>())
}

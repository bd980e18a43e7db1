//! The `quantization_config` that the compressed-tensors formats share.
//!
//! Written with the smallest set of keys: readers ignore unknown keys at the top, but refuse them inside groups and
//! arguments, and which ones they know depends on their version. The group's own `format` is written because the
//! library otherwise infers one from the scheme alone (and never `naive-quantized`); no released reader refuses it.

use super::{Format, floats, format, mixed_precision, unsupported};
use crate::dialect::{Rule, Target, wrong};
use crate::{Dialect, Error};
use bitmill_scheme::{Activations, Bits, FloatType, Granularity, GridKind, SCHEMES, ScaleType, Scheme};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

const METHOD: &str = "compressed-tensors";
/// The release since which 3, 5, 6 and 7 bits are dense bit streams; informational.
const VERSION: &str = "0.18.0";

/// The formats that share the configuration.
pub(super) const FAMILY: [&str; 7] = [
    "pack-quantized",
    "int-quantized",
    "naive-quantized",
    "float-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
];

/// The configuration of `layers` in `format`, one group per distinct scheme.
pub(super) fn config(
    format: &dyn Format,
    layers: &BTreeMap<String, Scheme>,
    ignored: &[String],
) -> Result<Value, Error> {
    let mut groups: Vec<(Scheme, Vec<&str>)> = Vec::new();
    for (module, scheme) in layers {
        if module.starts_with("re:") || module == "Linear" {
            return Err(unsupported(
                format,
                module,
                scheme,
                "a target of this name would be read as a pattern or class",
            ));
        }
        // The type of the scales is not part of a group: it is seen from the tensors.
        let scheme = scheme.with_scale(ScaleType::Bf16);
        match groups.iter_mut().find(|(s, _)| *s == scheme) {
            Some((_, modules)) => modules.push(module),
            None => groups.push((scheme, vec![module])),
        }
    }
    let mixed = format.name() == mixed_precision::NAME;
    let stored = |scheme: &Scheme| mixed_precision::format_of(scheme).filter(|_| mixed).unwrap_or(format);
    // A class target cannot tell two groups apart, so several groups name their modules.
    let single = groups.len() == 1;
    let mut config_groups = Map::new();
    for (i, (scheme, modules)) in groups.iter().enumerate() {
        let targets = if single { json!(["Linear"]) } else { json!(modules) };
        let group = json!({
            "targets": targets,
            "weights": weight_args(scheme),
            "input_activations": activation_args(scheme.activations),
            "output_activations": null,
            "format": stored(scheme).name(),
        });
        config_groups.insert(format!("group_{i}"), group);
    }
    Ok(json!({
        "quant_method": METHOD,
        "version": VERSION,
        "format": format.name(),
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": config_groups,
    }))
}

fn weight_args(scheme: &Scheme) -> Value {
    // Channels carry −1 rather than null: vLLM's mixture-of-experts path insists on it.
    let (strategy, group_size) = match scheme.granularity {
        Granularity::Tensor => ("tensor", Value::Null),
        Granularity::Channel => ("channel", json!(-1)),
        // A group under a scale that is itself scaled.
        Granularity::Group(g) if scheme.has_divisor() => ("tensor_group", json!(g)),
        Granularity::Group(g) | Granularity::Mapped(g) => ("group", json!(g)),
        Granularity::Tile(_) => ("block", Value::Null),
    };
    let mut args = json!({
        "num_bits": scheme.bits().get(),
        "type": if matches!(scheme.grid, GridKind::Float(_)) { "float" } else { "int" },
        "symmetric": scheme.symmetric(),
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": false,
    });
    if let Granularity::Tile(side) = scheme.granularity {
        args["block_structure"] = json!([side, side]);
    }
    // Without the key readers take the scales for numbers of the model's own type.
    match scheme.scale {
        ScaleType::E8m0 => args["scale_dtype"] = json!("torch.uint8"),
        ScaleType::E4m3 => args["scale_dtype"] = json!("torch.float8_e4m3fn"),
        _ => {}
    }
    // Without the key readers make no room for the map.
    if let Granularity::Mapped(_) = scheme.granularity {
        args["actorder"] = json!("group");
    }
    args
}

fn activation_args(activations: Activations) -> Value {
    let args = |bits: u32, kind: &str, strategy: &str, dynamic: Value| json!({"num_bits": bits, "type": kind, "symmetric": true, "strategy": strategy, "dynamic": dynamic});
    let groups = |mut args: Value, scale: Option<&str>| {
        args["group_size"] = json!(activations.group(0));
        if let Some(scale) = scale {
            args["scale_dtype"] = json!(scale);
        }
        args
    };
    match activations {
        Activations::Full => Value::Null,
        Activations::DynamicInt8 => args(8, "int", "token", json!(true)),
        Activations::DynamicFp8 => args(8, "float", "token", json!(true)),
        Activations::DynamicFp8Groups => groups(args(8, "float", "group", json!(true)), None),
        Activations::StaticFp8 => args(8, "float", "tensor", json!(false)),
        // Its scales are made at run time, what they are divided by is not.
        Activations::Nvfp4 => groups(args(4, "float", "tensor_group", json!("local")), Some("torch.float8_e4m3fn")),
        Activations::Mxfp4 => groups(args(4, "float", "group", json!(true)), Some("torch.uint8")),
        Activations::Mxfp8 => groups(args(8, "float", "group", json!(true)), Some("torch.uint8")),
    }
}

/// Reads a configuration; `None` unless its groups are of format `own`, or that is the mixed one and they differ.
pub(super) fn recognise(own: &dyn Format, config: &Value) -> Result<Option<Dialect>, Error> {
    if config.get("quant_method").and_then(Value::as_str) != Some(METHOD) {
        return Ok(None);
    }
    refuse_extras(config)?;
    let groups = config.get("config_groups").and_then(Value::as_object);
    let groups =
        groups.ok_or_else(|| wrong("config_groups", config.get("config_groups"), "an object of groups is needed"))?;

    let (mut names, mut patterns, mut classes) = (Vec::new(), Vec::new(), Vec::new());
    let mut formats: Vec<&'static dyn Format> = Vec::new();
    for (key, group) in groups {
        let path = format!("config_groups.{key}");
        let outcome = read_group(&path, key, group, config.get("format"))?;
        formats.extend(outcome.map(|(format, _)| format));
        let targets = group.as_array().or_else(|| group.get("targets").and_then(Value::as_array));
        let targets = targets.ok_or_else(|| wrong(&path, Some(group), "targets, a list of strings, are needed"))?;
        for target in read_targets(&format!("{path}.targets"), targets)? {
            let tier = match target {
                Target::Name(_) => &mut names,
                Target::Pattern(_) => &mut patterns,
                Target::Linear => &mut classes,
            };
            tier.push(Rule { target, outcome });
        }
    }
    let Some(&first) = formats.first() else {
        return Err(wrong("config_groups", Some(&Value::Object(groups.clone())), "no group quantizes weights"));
    };
    let name = if formats.iter().any(|f| f.name() != first.name()) { mixed_precision::NAME } else { first.name() };
    let Some(format) = format(name).filter(|_| name == own.name()) else { return Ok(None) };
    let ignored = config.get("ignore").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let ignored = read_targets("ignore", ignored)?.into_iter().map(|target| Rule { target, outcome: None });
    let rules = ignored.chain(names).chain(patterns).chain(classes).collect();
    Ok(Some(Dialect::new(format, rules).with_cache(read_cache(config)?)))
}

/// Refuses what would change the function of the model and is not applied here.
fn refuse_extras(config: &Value) -> Result<(), Error> {
    let refuse = |key: &str, reason: &str| Err(wrong(key, config.get(key), reason));
    let transforms = config.get("transform_config").and_then(|t| t.get("config_groups")).and_then(Value::as_object);
    if transforms.is_some_and(|t| !t.is_empty()) {
        return refuse("transform_config", "rotations applied at run time are not read yet");
    }
    let sparsity = config.get("sparsity_config").and_then(|s| s.get("format")).and_then(Value::as_str);
    if sparsity.is_some_and(|s| s != "dense") {
        return refuse("sparsity_config", "sparse storage is not read");
    }
    Ok(())
}

fn read_targets(key: &str, list: &[Value]) -> Result<Vec<Target>, Error> {
    let text = |v: &Value| v.as_str().map(str::to_owned).ok_or_else(|| wrong(key, Some(v), "a string is needed"));
    list.iter().map(|v| Target::parse(key, &text(v)?)).collect()
}

/// Format and scheme of a group; `None` where its weights are not quantized.
fn read_group(
    path: &str,
    key: &str,
    group: &Value,
    fallback: Option<&Value>,
) -> Result<Option<(&'static dyn Format, Scheme)>, Error> {
    let scheme = if group.is_array() {
        preset(key)?
    } else {
        match group.get("weights").filter(|w| !w.is_null()) {
            None => None,
            Some(weights) => Some(read_scheme(path, weights, group)?),
        }
    };
    let Some(mut scheme) = scheme else { return Ok(None) };
    let name = group.get("format").filter(|f| !f.is_null()).or(fallback);
    let name = name.and_then(Value::as_str).ok_or_else(|| wrong("format", name, "the name of a format is needed"))?;
    if let GridKind::Float(_) = scheme.grid {
        // The format says what scales are; older files leave it out of the arguments.
        scheme.scale = floats::fixed_scales(name).unwrap_or(ScaleType::Bf16);
        // Both names have been written for 8-bit floats, which are stored alike.
        let name = if name == "naive-quantized" { "float-quantized" } else { name };
        return match format(name).filter(|f| floats::holds(f.name(), &scheme)) {
            Some(format) => Ok(Some((format, scheme))),
            None => Err(wrong(&format!("{path}.format"), Some(&name.into()), format!("it does not store {scheme}"))),
        };
    }
    match format(name) {
        Some(format) if floats::holds_floats(name) => Err(wrong(
            &format!("{path}.format"),
            Some(&format.name().into()),
            "its numbers are floats, and these are not",
        )),
        Some(format) if FAMILY.contains(&format.name()) => Ok(Some((format, scheme))),
        _ => Err(Error::UnknownFormat { key: "format", got: name.to_owned(), known: FAMILY.join(", ") }),
    }
}

fn read_scheme(path: &str, weights: &Value, group: &Value) -> Result<Scheme, Error> {
    let key = |k: &str| format!("{path}.weights.{k}");
    let get = |k: &str| weights.get(k).filter(|v| !v.is_null());
    let float = match get("type").map(|t| t.as_str().map(str::to_lowercase)) {
        None => false,
        Some(Some(kind)) if kind == "int" => false,
        Some(Some(kind)) if kind == "float" => true,
        _ => return Err(wrong(&key("type"), get("type"), "int and float are read")),
    };
    if let Some(dynamic) = get("dynamic").filter(|d| **d != Value::Bool(false)) {
        return Err(wrong(&key("dynamic"), Some(dynamic), "weights must be static"));
    }
    let bits = get("num_bits").map_or(Some(8), Value::as_u64).and_then(|b| u32::try_from(b).ok());
    let bits = bits.and_then(|b| Bits::new(b).ok());
    let bits = bits.ok_or_else(|| wrong(&key("num_bits"), get("num_bits"), "integer weights have 1 to 8 bits"))?;
    let symmetric = match get("symmetric") {
        None => true,
        Some(v) => v.as_bool().ok_or_else(|| wrong(&key("symmetric"), Some(v), "true or false is needed"))?,
    };
    let size = get("group_size").map_or(Some(None), |v| v.as_i64().map(Some));
    let size = size.ok_or_else(|| wrong(&key("group_size"), get("group_size"), "an integer is needed"))?;
    let strategy = get("strategy").and_then(Value::as_str).map(str::to_lowercase);
    // Without a strategy the size implies one.
    let granularity = match (strategy.as_deref(), size) {
        (Some("tensor"), _) | (None, None) => Granularity::Tensor,
        (Some("channel"), _) | (None, Some(-1)) => Granularity::Channel,
        (Some("group") | None, Some(g)) if g > 0 => Granularity::Group(g as usize),
        (Some("tensor_group"), Some(g)) if g > 0 && float => Granularity::Group(g as usize),
        (Some("block"), _) if float => read_tile(&key("block_structure"), get("block_structure"))?,
        (Some("group" | "tensor_group") | None, _) => {
            return Err(wrong(&key("group_size"), get("group_size"), "groups need a size above zero"));
        }
        _ => return Err(wrong(&key("strategy"), get("strategy"), "tensor, channel and group are read")),
    };
    let activations = read_activations(path, group)?;
    let grid = match (float, bits.get()) {
        (false, _) => GridKind::Int { bits, symmetric },
        (true, _) if !symmetric => return Err(wrong(&key("symmetric"), get("symmetric"), "floats are symmetric")),
        (true, 8) => GridKind::Float(FloatType::E4m3),
        (true, 4) => GridKind::Float(FloatType::E2m1),
        _ => return Err(wrong(&key("num_bits"), get("num_bits"), "floats of 4 and 8 bits are read")),
    };
    Ok(Scheme { grid, granularity, scale: ScaleType::Bf16, activations })
}

/// `[128, 128]`, or the `"128x128"` of old files.
fn read_tile(key: &str, value: Option<&Value>) -> Result<Granularity, Error> {
    let sides: Vec<usize> = match value {
        Some(Value::String(text)) => text.split('x').filter_map(|s| s.parse().ok()).collect(),
        Some(Value::Array(list)) => list.iter().filter_map(|s| usize::try_from(s.as_u64()?).ok()).collect(),
        _ => Vec::new(),
    };
    match sides[..] {
        [rows, cols] if rows == cols && rows > 0 => Ok(Granularity::Tile(rows)),
        _ => Err(wrong(key, value, "square tiles are read, like [128, 128]")),
    }
}

fn read_activations(path: &str, group: &Value) -> Result<Activations, Error> {
    if let Some(output) = group.get("output_activations").filter(|v| !v.is_null()) {
        return Err(wrong(&format!("{path}.output_activations"), Some(output), "quantized outputs are not read"));
    }
    let Some(input) = group.get("input_activations").filter(|v| !v.is_null()) else {
        return Ok(Activations::Full);
    };
    let reason = "symmetric numbers are read: 8-bit ones, dynamic per token or (floats) per 128 inputs, or floats static per \
                  tensor; NVFP4's and the MX types' groups";
    let known = Activations::ROUNDING.into_iter().find(|activations| describes(input, *activations));
    known.ok_or_else(|| wrong(&format!("{path}.input_activations"), Some(input), reason))
}

/// Whether the arguments `given` are those of `activations`, keys that are left out being at their defaults.
fn describes(given: &Value, activations: Activations) -> bool {
    let args = activation_args(activations);
    let get = |key: &str| given.get(key).filter(|v| !v.is_null());
    let same = |key: &str, default: Value| get(key).unwrap_or(&default) == args.get(key).unwrap_or(&Value::Null);
    let name = |value: Option<&Value>| {
        value.and_then(Value::as_str).map_or_else(String::new, |name| name.trim_start_matches("torch.").to_owned())
    };
    let (scale, meant) = (name(get("scale_dtype")), name(args.get("scale_dtype")));
    same("num_bits", json!(8))
        && same("type", json!("int"))
        && same("symmetric", json!(true))
        && same("strategy", Value::Null)
        && same("dynamic", json!(false))
        && (args["group_size"].is_null() || same("group_size", Value::Null))
        // Before releases had the key, NVFP4 alone had scales of another type.
        && (scale == meant || (scale.is_empty() && activations == Activations::Nvfp4))
}

/// How keys and values are kept: 8-bit floats under one scale each, from calibration.
const CACHE: Activations = Activations::StaticFp8;

/// The `kv_cache_scheme` of a configuration in the format called `format`, whose attention layers have a `k_scale` and a
/// `v_scale`, F32 `[1]`; `None` where it has no place for them.
#[must_use]
pub fn cache_scheme(format: &str) -> Option<Value> {
    (FAMILY.contains(&format) || format == mixed_precision::NAME).then(|| activation_args(CACHE))
}

/// Whether keys and values are rounded.
fn read_cache(config: &Value) -> Result<bool, Error> {
    match config.get("kv_cache_scheme").filter(|v| !v.is_null()) {
        None => Ok(false),
        Some(scheme) if describes(scheme, CACHE) => Ok(true),
        other => Err(wrong("kv_cache_scheme", other, "8-bit floats with one static scale per layer are read")),
    }
}

/// The scheme a bare list of targets stands for; `None` for UNQUANTIZED.
fn preset(name: &str) -> Result<Option<Scheme>, Error> {
    let unknown = || {
        let known =
            "W2A16 to W8A16, W4A16_ASYM, W2A8 to W7A8, W8A8, INT8, FP8, FP8_DYNAMIC, FP8_BLOCK, NVFP4, NVFP4A16, MXFP4, \
                     MXFP4A16, MXFP8, MXFP8A16, UNQUANTIZED"
                .to_owned();
        Error::UnknownFormat { key: "config_groups", got: name.to_owned(), known }
    };
    let upper = name.to_uppercase();
    // Ours are named after the library's.
    let float = SCHEMES.iter().find(|p| matches!(p.scheme.grid, GridKind::Float(_)) && p.name == name.to_lowercase());
    if let Some(float) = float {
        return Ok(Some(float.scheme));
    }
    let (bits, activations, symmetric) = match upper.as_str() {
        "UNQUANTIZED" => return Ok(None),
        "W4A16_ASYM" => ("4", "16", false),
        "INT8" => ("8", "8", true),
        other => {
            let (bits, activations) = other.strip_prefix('W').and_then(|r| r.split_once('A')).ok_or_else(unknown)?;
            (bits, activations, true)
        }
    };
    let bits = bits.parse().ok().filter(|b| (2..=8).contains(b)).and_then(|b| Bits::new(b).ok()).ok_or_else(unknown)?;
    let (activations, granularity) = match activations {
        "16" => (Activations::Full, Granularity::Group(128)),
        "8" if bits.get() == 8 => (Activations::DynamicInt8, Granularity::Channel),
        "8" => (Activations::DynamicInt8, Granularity::Group(128)),
        _ => return Err(unknown()),
    };
    Ok(Some(Scheme { activations, ..Scheme::int(bits, symmetric, granularity) }))
}

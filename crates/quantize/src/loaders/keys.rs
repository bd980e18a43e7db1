//! The rules about what config.json and files beside it say.

use super::{Demands, Loader, Subject};
use serde_json::Value;

/// Keys by dialect. Readers of compressed-tensors refuse unknown keys inside of groups and arguments.
pub(super) fn config(subject: &Subject, loader: &Loader, _: &Demands) -> Vec<String> {
    let Some(block) = subject.quantization() else {
        let lacks = !subject.layers.is_empty() && subject.format() != "gguf";
        return if lacks { vec!["config.json has no quantization_config".into()] } else { Vec::new() };
    };
    let mut broken = Vec::new();
    match subject.format() {
        "gptq" | "gptq_v2" => {
            let needed: &[&str] =
                if loader.strict { &["bits", "group_size", "desc_act", "sym"] } else { &["bits", "group_size"] };
            broken.extend(missing(block, needed));
        }
        "auto-round" => broken.extend(missing(block, &["bits", "group_size", "sym"])),
        "awq" => broken.extend(missing(block, if loader.strict { &["zero_point"] } else { &[] })),
        // Readers here need of these what loaders need.
        "gguf" | "dense" | "modelopt" | "fp8" | "bitsandbytes" | "binary" => {}
        _ => broken.extend(compressed(subject, loader, block)),
    }
    broken
}

/// What readers of compressed-tensors ask for.
fn compressed(subject: &Subject, loader: &Loader, block: &Value) -> Vec<String> {
    let mut broken = Vec::new();
    let status = block.get("quantization_status").and_then(Value::as_str).unwrap_or("compressed");
    if status != "compressed" && status != "frozen" {
        broken.push(format!("quantization_status is {status:?}, and only \"compressed\" weights are stored packed"));
    }
    let version = block.get("version").and_then(Value::as_str).unwrap_or_default();
    let early = ["0.11.", "0.12."].iter().any(|v| version.starts_with(v));
    let known: Vec<&str> = ARGUMENTS.into_iter().filter(|key| !(early && LATER.contains(key))).collect();
    let groups = || block.get("config_groups").and_then(Value::as_object).into_iter().flatten();
    for (key, group) in groups() {
        let path = format!("config_groups.{key}");
        broken.extend(unknown(&path, group, &GROUP));
        for part in ["weights", "input_activations", "output_activations"] {
            let args = group.get(part).filter(|a| !a.is_null());
            broken.extend(args.into_iter().flat_map(|a| unknown(&format!("{path}.{part}"), a, &known)));
        }
        broken.extend(arguments(subject, loader, &path, group, block.get("format")));
    }
    let class = |group: &Value| {
        let targets = group.get("targets").and_then(Value::as_array);
        targets.is_some_and(|all| all.iter().any(|target| target == "Linear"))
    };
    if groups().filter(|(_, group)| class(group)).count() > 1 {
        broken
            .push("several of config_groups are of all linears (\"Linear\"), and one of them is taken for all".into());
    }
    broken
}

/// Arguments that a group lacks.
fn arguments(subject: &Subject, loader: &Loader, path: &str, group: &Value, whole: Option<&Value>) -> Vec<String> {
    let mut broken = Vec::new();
    let own = group.get("format").and_then(Value::as_str);
    let format = own.or(whole.and_then(Value::as_str)).unwrap_or_default();
    let get = |key: &str| group.get("weights").and_then(|w| w.get(key)).filter(|v| !v.is_null());
    // vLLM knows 4-bit floats in groups of 32 by their size.
    let powers = format == "mxfp8-quantized" || (format == "mxfp4-pack-quantized" && !loader.strict);
    let bytes = get("scale_dtype").and_then(Value::as_str).is_some_and(|name| name.ends_with("uint8"));
    if powers && !bytes {
        broken.push(format!(
            "{path}.weights.scale_dtype is not \"torch.uint8\", without which scales are no powers of two"
        ));
    }
    let mixture = subject.spec.as_ref().is_some_and(|spec| spec.routing.is_some());
    let channel = get("strategy").and_then(Value::as_str) == Some("channel") && format == "pack-quantized";
    if mixture && channel && loader.strict && get("group_size").and_then(Value::as_i64) != Some(-1) {
        broken.push(format!("{path}.weights.group_size is not -1, as its kernels for mixtures ask"));
    }
    if format == "naive-quantized" && own.is_none() && !loader.strict {
        broken.push(format!("{path} has no format of its own, and is taken for packed"));
    }
    broken
}

/// The file `name` beside config.json, where its keys contradict it: some loaders read it first.
pub(super) fn sidecars(subject: &Subject, _: &Loader, _: &Demands) -> Vec<String> {
    let Some(block) = subject.quantization() else { return Vec::new() };
    let mut broken = Vec::new();
    for (file, said) in &subject.sidecars {
        let said = said.get("quantization").unwrap_or(said);
        if !said.is_object() {
            broken.push(format!("{file} is no object of keys"));
        }
        for names in ALIKE {
            let get = |of: &Value| names.iter().find_map(|name| of.get(*name).filter(|v| !v.is_null()).cloned());
            if let (Some(own), Some(other)) = (get(block), get(said))
                && own != other
            {
                broken.push(format!("{file}: {} is {other}, and {own} in config.json", names[0]));
            }
        }
    }
    broken
}

/// Keys that mean the same, by all their names.
const ALIKE: [&[&str]; 8] = [
    &["bits", "w_bit"],
    &["group_size", "q_group_size"],
    &["sym"],
    &["desc_act"],
    &["checkpoint_format"],
    &["zero_point"],
    &["quant_algo"],
    &["exclude_modules", "ignore"],
];

/// 4-bit floats and the MX types become bf16, whatever the model's type is.
pub(super) fn own_type(subject: &Subject, loader: &Loader, _: &Demands) -> Vec<String> {
    let Some(formats) = loader.bf16 else { return Vec::new() };
    let Some(format) = subject.layers.values().map(|l| l.format).find(|f| formats.contains(f)) else {
        return Vec::new();
    };
    let own = ["dtype", "torch_dtype"].iter().find_map(|key| subject.config.get(*key)).and_then(Value::as_str);
    match own.map(|name| name.trim_start_matches("torch.")) {
        Some(own) if own != "bfloat16" => {
            vec![format!(
                "config.json has the type {own}, and it makes bfloat16 of {format}: load it with dtype=torch.bfloat16"
            )]
        }
        _ => Vec::new(),
    }
}

/// Keys of a group of compressed-tensors.
const GROUP: [&str; 5] = ["targets", "weights", "input_activations", "output_activations", "format"];
/// Keys of its arguments.
const ARGUMENTS: [&str; 12] = [
    "num_bits",
    "type",
    "symmetric",
    "strategy",
    "group_size",
    "block_structure",
    "dynamic",
    "actorder",
    "observer",
    "observer_kwargs",
    "scale_dtype",
    "zp_dtype",
];
/// Those that releases before 0.13 refuse; such a file says that it is of one of them.
const LATER: [&str; 2] = ["scale_dtype", "zp_dtype"];

fn missing(block: &Value, needed: &[&str]) -> Vec<String> {
    let old = |key: &str| match key {
        "bits" => block.get("w_bit").is_some(),
        "group_size" => block.get("q_group_size").is_some(),
        _ => false,
    };
    let absent = needed.iter().filter(|key| block.get(**key).is_none_or(Value::is_null) && !old(key));
    absent.map(|key| format!("quantization_config lacks {key}")).collect()
}

fn unknown(path: &str, object: &Value, known: &[&str]) -> Vec<String> {
    let keys = object.as_object().into_iter().flatten();
    let strange = keys.filter(|(key, _)| !known.contains(&key.as_str()));
    strange
        .map(|(key, _)| format!("{path}.{key}: compressed-tensors refuses the key, even if it is null; leave it out"))
        .collect()
}

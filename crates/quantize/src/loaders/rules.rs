//! The rules: facts about what loaders refuse, or read as something else.

use super::{Demands, Loader, Rule, Subject, refused};
use crate::fused::FUSED;
use crate::plan::is_embedding;
use bitmill_models::{Expert, ModelSpec, Role};
use bitmill_scheme::{Granularity, Scheme};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// Every rule, in the order in which verdicts are given.
pub(super) static RULES: &[Rule] = &[
    Rule { name: "format", about: "it reads every scheme in this format", broken: format, asked: ALWAYS },
    Rule { name: "fused", about: "linears that it loads as one matrix have one scheme", broken: fused, asked: ALWAYS },
    Rule {
        name: "experts",
        about: "experts are among its kernels for mixtures, and what deals out tokens is plain numbers",
        broken: experts,
        asked: ALWAYS,
    },
    Rule {
        name: "tensor-parallel",
        about: "matrices can be cut for several devices",
        broken: parallel,
        asked: |d| d.tensor_parallel > 1,
    },
    Rule {
        name: "config",
        about: "config.json has the keys it needs and none that it refuses",
        broken: config,
        asked: ALWAYS,
    },
    Rule { name: "listed", about: "config.json says of every linear what is stored", broken: listed, asked: ALWAYS },
    Rule {
        name: "cache",
        about: "keys and values that are rounded have scales in every block",
        broken: cache,
        asked: ALWAYS,
    },
    Rule { name: "head", about: "the output matrix is found and read", broken: head, asked: ALWAYS },
    Rule {
        name: "tied",
        about: "a head that is the embedding is not stored a second time",
        broken: tied,
        asked: ALWAYS,
    },
    Rule { name: "tensors", about: "nothing is stored that it has no place for", broken: unexpected, asked: ALWAYS },
    Rule {
        name: "original",
        about: "no tensor of the original is lost",
        broken: original,
        asked: |d| d.original.is_some(),
    },
];

const ALWAYS: fn(&Demands) -> bool = |_| true;

fn format(subject: &Subject, loader: &Loader, _: &Demands) -> Vec<String> {
    if subject.layers.is_empty() {
        let reads = subject.format() == "gguf" || loader.name != "llama.cpp";
        return if reads { Vec::new() } else { vec!["it reads gguf files, and this is a folder".into()] };
    }
    let mut reasons: Vec<String> =
        subject.layers.values().filter_map(|(scheme, _)| refused(loader, subject.format(), scheme)).collect();
    let transposed = subject.spec.as_ref().is_some_and(|spec| spec.layout.transposed);
    if transposed && !matches!(subject.format(), "gptq" | "gptq_v2" | "gguf") {
        reasons.push("the linears of this architecture are no nn.Linear, which it does not replace".into());
    }
    reasons.sort();
    reasons.dedup();
    reasons
}

/// Sites whose linears differ in scheme, or of which some are left dense.
fn fused(subject: &Subject, loader: &Loader, _: &Demands) -> Vec<String> {
    let Some(spec) = subject.spec.as_ref().filter(|_| loader.fuses) else { return Vec::new() };
    let schemes: BTreeMap<&String, Scheme> = subject.layers.iter().map(|(m, (s, _))| (m, *s)).collect();
    // All experts of a block are one kernel, the one for all tokens aside.
    let routed = |r: &Role| matches!(r.expert(), Some(Expert::Routed(_)));
    let places = (0..spec.layers).flat_map(|block| {
        let linears: Vec<Role> = spec.block_linears(block).into_iter().map(|(role, _)| role).collect();
        let plain = FUSED.map(|roles| linears.iter().copied().filter(|r| roles.contains(r)).collect());
        let shared = linears.iter().copied().filter(|r| r.expert() == Some(Expert::Shared) && r.kind() != Role::Down);
        let experts = linears.iter().copied().filter(routed).collect();
        plain.into_iter().chain([shared.collect(), experts]).map(move |roles: Vec<Role>| (block, roles))
    });
    let differs = |(block, roles): &(usize, Vec<Role>)| {
        let mut own = roles.iter().map(|&r| schemes.get(&spec.module(*block, r)));
        own.next().is_some_and(|first| own.any(|other| other != first))
    };
    let said = |(block, roles): (usize, Vec<Role>)| {
        if roles.iter().any(routed) {
            return format!("block {block}: its experts are one matrix there and need one scheme");
        }
        let names: Vec<&str> = roles.iter().map(|r| r.name()).collect();
        format!("block {block}: {} are one matrix there and need one scheme", names.join(", "))
    };
    { places }.find(differs).map(said).into_iter().collect()
}

/// Experts in a scheme that the kernels for all experts of a block do not know, and routers that are not dense.
fn experts(subject: &Subject, loader: &Loader, _: &Demands) -> Vec<String> {
    let Some(spec) = subject.spec.as_ref().filter(|spec| spec.routing.is_some()) else { return Vec::new() };
    let routers = (0..spec.layers).filter_map(|block| spec.routers(block));
    let routers = routers.flat_map(|(router, shared)| std::iter::once(router).chain(shared));
    let packed = |module: String| format!("{module} is quantized, and is read as plain numbers");
    let mut broken: Vec<String> =
        routers.filter(|m| subject.layers.contains_key(m)).map(packed).take(usize::from(loader.fuses)).collect();
    let routed = linears(spec).filter(|(_, role)| matches!(role.expert(), Some(Expert::Routed(_))));
    let schemes: BTreeSet<String> = routed
        .filter_map(|(module, _)| subject.layers.get(&module))
        .filter_map(|(scheme, _)| (loader.refuses_experts)(subject.format(), scheme))
        .collect();
    broken.extend(schemes);
    broken
}

/// Shards of matrices hold whole groups and whole words; heads are dealt out evenly.
fn parallel(subject: &Subject, loader: &Loader, demands: &Demands) -> Vec<String> {
    let n = demands.tensor_parallel;
    if !loader.splits {
        return vec![format!("{} does not cut matrices for {n} devices by these rules", loader.name)];
    }
    let Some(spec) = subject.spec.as_ref() else {
        return vec![
            "the architecture is unknown here, so it is not known along which side its linears are cut".into(),
        ];
    };
    let mut broken = Vec::new();
    if !spec.heads.is_multiple_of(n) {
        broken.push(format!("{} attention heads cannot be dealt out to {n} devices", spec.heads));
    }
    if !spec.kv_heads.is_multiple_of(n) && !n.is_multiple_of(spec.kv_heads) {
        broken.push(format!("{} key-value heads cannot be dealt out to {n} devices", spec.kv_heads));
    }
    for (module, role) in linears(spec) {
        let Some((scheme, [rows, cols])) = subject.layers.get(&module) else { continue };
        // O and down read what the devices computed each by itself; the others are cut by outputs.
        let by_inputs = matches!(role.kind(), Role::O | Role::Down);
        let side = if by_inputs { *cols } else { *rows };
        // Key-value heads are copied where there are fewer of them than devices.
        let copied = matches!(role, Role::K | Role::V) && spec.kv_heads < n;
        if !side.is_multiple_of(n) && !copied {
            broken.push(format!("{module}: {side} cannot be cut into {n}"));
            continue;
        }
        let share = side / n;
        match scheme.granularity {
            Granularity::Group(g) if by_inputs && !share.is_multiple_of(g) => {
                broken.push(format!("{module}: {share} inputs of each of {n} devices are no whole groups of {g}"));
            }
            Granularity::Tile(g) if !share.is_multiple_of(g) => {
                broken.push(format!("{module}: {share} of each of {n} devices are no whole tiles of {g}"));
            }
            Granularity::Mapped(_) if by_inputs => {
                broken.push(format!("{module}: groups out of order (desc_act) are spread over all {n} devices"));
            }
            _ if by_inputs && !(share * scheme.bits().get() as usize).is_multiple_of(32) => {
                broken.push(format!("{module}: {share} codes of {} bits are no whole words", scheme.bits().get()));
            }
            _ => {}
        }
    }
    broken
}

fn linears(spec: &ModelSpec) -> impl Iterator<Item = (String, Role)> {
    (0..spec.layers).flat_map(|b| spec.block_linears(b)).map(|(role, module)| (module, role))
}

/// Keys by dialect. Readers of compressed-tensors refuse unknown keys inside of groups and arguments.
fn config(subject: &Subject, loader: &Loader, _: &Demands) -> Vec<String> {
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
        "awq" => broken.extend(missing(block, if loader.strict { &["zero_point"] } else { &[] })),
        "gguf" | "dense" | "modelopt" | "fp8" => {}
        _ => {
            let status = block.get("quantization_status").and_then(Value::as_str).unwrap_or("compressed");
            if status != "compressed" && status != "frozen" {
                broken.push(format!(
                    "quantization_status is {status:?}, and only \"compressed\" weights are stored packed"
                ));
            }
            let version = block.get("version").and_then(Value::as_str).unwrap_or_default();
            let early = ["0.11.", "0.12."].iter().any(|v| version.starts_with(v));
            let known: Vec<&str> = ARGUMENTS.into_iter().filter(|key| !(early && LATER.contains(key))).collect();
            for (key, group) in block.get("config_groups").and_then(Value::as_object).into_iter().flatten() {
                broken.extend(unknown(&format!("config_groups.{key}"), group, &GROUP));
                for part in ["weights", "input_activations", "output_activations"] {
                    let args = group.get(part).filter(|a| !a.is_null());
                    broken.extend(
                        args.into_iter().flat_map(|a| unknown(&format!("config_groups.{key}.{part}"), a, &known)),
                    );
                }
            }
        }
    }
    broken
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

/// A linear that config.json speaks of otherwise than it is stored.
fn listed(subject: &Subject, _: &Loader, _: &Demands) -> Vec<String> {
    let Some(dialect) = &subject.dialect else { return Vec::new() };
    let mut broken = Vec::new();
    for name in subject.dense.keys() {
        let Some(module) = name.strip_suffix(".weight").filter(|m| !is_embedding(m)) else { continue };
        let linear = match &subject.spec {
            Some(spec) => linears(spec).any(|(m, _)| m == module) || spec.head().as_deref() == Some(module),
            None => false,
        };
        if linear && dialect.scheme_of(module).is_some() {
            broken.push(format!("{module} is stored as plain numbers, and config.json does not leave it out"));
        }
    }
    broken
}

/// Scales of keys and values that are missing, for which loaders take 1.
fn cache(subject: &Subject, _: &Loader, _: &Demands) -> Vec<String> {
    let (Some(dialect), Some(spec)) = (&subject.dialect, &subject.spec) else { return Vec::new() };
    // What is planned has them.
    if !dialect.rounds_cache() || subject.stored.is_empty() {
        return Vec::new();
    }
    let names = (0..spec.layers).flat_map(|block| crate::plan::cache_scales(spec, block)).map(|spec| spec.name);
    let lacking = names.filter(|name| !subject.stored.contains(name));
    lacking.map(|name| format!("{name} is missing, and config.json rounds keys and values")).collect()
}

/// A quantized head is found by loaders that are told of it by name.
fn head(subject: &Subject, loader: &Loader, _: &Demands) -> Vec<String> {
    let head = subject.spec.as_ref().and_then(ModelSpec::head).unwrap_or_else(|| bitmill_models::HEAD.into());
    if !subject.layers.contains_key(&head) || !loader.strict {
        return Vec::new();
    }
    let named = match subject.format() {
        "gptq" | "gptq_v2" | "awq" => {
            subject.quantization().is_some_and(|q| q.get("lm_head") == Some(&Value::Bool(true)))
        }
        // They name what is left out.
        "modelopt" | "fp8" => true,
        _ => {
            let groups = subject.quantization().and_then(|q| q.get("config_groups")).and_then(Value::as_object);
            let targets = groups.into_iter().flatten().filter_map(|(_, g)| g.get("targets").and_then(Value::as_array));
            { targets }.any(|t| t.iter().filter_map(Value::as_str).any(|t| t.contains(head.as_str())))
        }
    };
    if named { Vec::new() } else { vec![format!("{head} is quantized, and config.json does not name it")] }
}

fn tied(subject: &Subject, loader: &Loader, _: &Demands) -> Vec<String> {
    let tied = subject.config.get("tie_word_embeddings").and_then(Value::as_bool) == Some(true);
    let head = bitmill_models::HEAD;
    let twice = subject.layers.contains_key(head) || subject.dense.contains_key(&format!("{head}.weight"));
    if tied && twice && loader.strict {
        return vec![format!("tie_word_embeddings is true, and {head} is stored beside the embedding")];
    }
    Vec::new()
}

/// Parts that a module's scheme has no use for, and experts that are packed together.
fn unexpected(subject: &Subject, loader: &Loader, _: &Demands) -> Vec<String> {
    if !loader.strict {
        return Vec::new();
    }
    let mut broken = Vec::new();
    for name in &subject.stored {
        let (module, part) = name.rsplit_once('.').unwrap_or((name, ""));
        if part == "weight_zero_point" && subject.layers.get(module).is_some_and(|(s, _)| s.symmetric()) {
            broken.push(format!("{name}: a symmetric scheme has no zero points"));
        }
        if part.starts_with("gate_up_proj_packed") || part.starts_with("down_proj_packed") {
            broken.push(format!("{name}: experts are to be stored one by one"));
        }
    }
    broken
}

fn original(subject: &Subject, _: &Loader, demands: &Demands) -> Vec<String> {
    let Some(original) = &demands.original else { return Vec::new() };
    let stored: BTreeMap<String, &[usize]> = subject.weights().collect();
    let tied = subject.config.get("tie_word_embeddings").and_then(Value::as_bool) == Some(true);
    let mut broken = Vec::new();
    for (name, shape) in original {
        // Buffers that older exporters wrote, and a head that is the embedding.
        let spare = name.ends_with(".rotary_emb.inv_freq")
            || (tied && name.strip_suffix(".weight") == Some(bitmill_models::HEAD));
        match stored.get(name) {
            None if !spare => broken.push(format!("{name} is missing")),
            Some(own) if own != shape => broken.push(format!("{name} is {own:?}, and {shape:?} in the original")),
            _ => {}
        }
    }
    broken
}

//! The rules: facts about what loaders refuse, or read as something else.

use super::{Demands, Loader, Rule, Subject, keys};
use crate::fused::{FUSED, together};
use crate::plan::is_embedding;
use bitmill_models::{Expert, ModelSpec, Role};
use bitmill_scheme::{Granularity, ScaleType};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// Every rule, in the order in which verdicts are given.
pub(super) static RULES: &[Rule] = &[
    Rule { name: "format", about: "it reads every scheme in this format", broken: format, asked: ALWAYS },
    Rule { name: "fused", about: "linears that it loads as one matrix have one scheme", broken: fused, asked: ALWAYS },
    Rule {
        name: "shared",
        about: "linears that it loads as one matrix divide their scales by one number",
        broken: shared,
        asked: ALWAYS,
    },
    Rule {
        name: "tiles",
        about: "linears that it loads as one matrix end where tiles do",
        broken: tiles,
        asked: ALWAYS,
    },
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
        broken: keys::config,
        asked: ALWAYS,
    },
    Rule {
        name: "sidecars",
        about: "what lies beside config.json says of the weights what it says",
        broken: keys::sidecars,
        asked: ALWAYS,
    },
    Rule {
        name: "type",
        about: "the model's own type holds what weights become",
        broken: keys::own_type,
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
        subject.layers.values().filter_map(|l| (loader.refuses)(l.format, &l.scheme)).collect();
    let transposed = subject.spec.as_ref().is_some_and(|spec| spec.layout.transposed);
    if transposed && !matches!(subject.format(), "gptq" | "gptq_v2" | "gguf") {
        reasons.push("the linears of this architecture are no nn.Linear, which it does not replace".into());
    }
    if subject.spec.as_ref().is_some_and(|spec| spec.images.is_some()) && !loader.images {
        reasons.push("it has no encoders of images".into());
    }
    reasons.sort();
    reasons.dedup();
    reasons
}

/// Sites whose linears differ in scheme, or of which some are left dense.
fn fused(subject: &Subject, loader: &Loader, _: &Demands) -> Vec<String> {
    let Some(spec) = subject.spec.as_ref().filter(|_| loader.fuses) else { return Vec::new() };
    // Scales may be stored in two types, as long as kernels are the same.
    let scheme = |module: &String| subject.layers.get(module).map(|l| (l.format, l.scheme.with_scale(ScaleType::F32)));
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
        let mut own = roles.iter().map(|&r| scheme(&spec.module(*block, r)));
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

/// Every linear behind the first of those that `loader` holds as one matrix, and that first one.
fn fused_pairs(spec: &ModelSpec) -> impl Iterator<Item = (String, String)> {
    (0..spec.layers).flat_map(|block| {
        let linears = spec.block_linears(block);
        let first = |i: usize| linears[..i].iter().find(|(role, _)| together(*role, linears[i].0));
        let pairs: Vec<_> =
            (0..linears.len()).filter_map(|i| Some((first(i)?.1.clone(), linears[i].1.clone()))).collect();
        pairs
    })
}

/// Numbers that all scales of a matrix are divided by, of which a loader keeps one for the matrix that several become.
fn shared(subject: &Subject, loader: &Loader, _: &Demands) -> Vec<String> {
    let Some(spec) = subject.spec.as_ref().filter(|_| loader.fuses) else { return Vec::new() };
    let mut broken = Vec::new();
    for (first, module) in fused_pairs(spec) {
        let divisors = |module: &String| subject.layers.get(module).and_then(|l| l.divisors);
        let (Some((own, own_input)), Some((other, input))) = (divisors(&module), divisors(&first)) else { continue };
        if own != other {
            broken.push(format!("{module} divides its scales by {own}, and {first}, one matrix with it, by {other}"));
        }
        if let (Some(own), Some(other)) = (own_input, input)
            && own != other
        {
            broken.push(format!(
                "{module} divides those of its inputs by {own}, and {first}, one matrix with it, by {other}"
            ));
        }
    }
    broken
}

/// Parts of a fused matrix whose last tile would reach into the next part.
fn tiles(subject: &Subject, loader: &Loader, _: &Demands) -> Vec<String> {
    let Some(spec) = subject.spec.as_ref().filter(|_| loader.splits) else { return Vec::new() };
    let modules: BTreeSet<String> = fused_pairs(spec).flat_map(|(first, module)| [first, module]).collect();
    let cut = |module: &String| {
        let layer = subject.layers.get(module)?;
        let Granularity::Tile(side) = layer.scheme.granularity else { return None };
        let rows = layer.shape[0];
        let reason =
            || format!("{module}: its {rows} outputs are no whole tiles of {side}, and others follow them there");
        (!rows.is_multiple_of(side)).then(reason)
    };
    modules.iter().filter_map(cut).collect()
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
        .filter_map(|layer| (loader.refuses_experts)(layer.format, &layer.scheme))
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
        let Some(layer) = subject.layers.get(&module) else { continue };
        let (scheme, [rows, cols]) = (layer.scheme, &layer.shape);
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
        // GPTQ and AWQ files have several outputs in a word.
        let words = if matches!(layer.format, "gptq" | "gptq_v2" | "awq") { !by_inputs } else { by_inputs };
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
            _ if words && !copied && !(share * scheme.bits().get() as usize).is_multiple_of(32) => {
                broken.push(format!("{module}: {share} codes of {} bits are no whole words", scheme.bits().get()));
            }
            _ => {}
        }
    }
    broken
}

pub(super) fn linears(spec: &ModelSpec) -> impl Iterator<Item = (String, Role)> {
    (0..spec.layers).flat_map(|b| spec.block_linears(b)).map(|(role, module)| (module, role))
}

/// A linear that config.json speaks of otherwise than it is stored.
fn listed(subject: &Subject, loader: &Loader, _: &Demands) -> Vec<String> {
    let Some(dialect) = &subject.dialect else { return Vec::new() };
    let mut broken = Vec::new();
    for name in subject.dense.keys() {
        let Some(module) = name.strip_suffix(".weight").filter(|m| !is_embedding(m)) else { continue };
        let linear = match &subject.spec {
            Some(spec) => linears(spec).any(|(m, _)| m == module) || spec.head().as_deref() == Some(module),
            None => false,
        };
        // What stands for the head there is no linear, which compressed-tensors' class of linears does not reach.
        let own = subject.quantization().and_then(|q| q.get("quant_method")).and_then(Value::as_str);
        if loader.strict && own == Some("compressed-tensors") && is_head(subject, module) && !targeted(subject, module)
        {
            continue;
        }
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
        "modelopt" | "fp8" | "auto-round" => true,
        _ => targeted(subject, &head),
    };
    if named { Vec::new() } else { vec![format!("{head} is quantized, and config.json does not name it")] }
}

fn is_head(subject: &Subject, module: &str) -> bool {
    subject.spec.as_ref().and_then(ModelSpec::head).as_deref() == Some(module)
}

/// Whether a group of compressed-tensors names the head.
fn targeted(subject: &Subject, head: &str) -> bool {
    let groups = subject.quantization().and_then(|q| q.get("config_groups")).and_then(Value::as_object);
    let targets = groups.into_iter().flatten().filter_map(|(_, g)| g.get("targets").and_then(Value::as_array));
    { targets }.any(|t| t.iter().filter_map(Value::as_str).any(|t| t.contains(head)))
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
        if part == "weight_zero_point" && subject.layers.get(module).is_some_and(|l| l.scheme.symmetric()) {
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

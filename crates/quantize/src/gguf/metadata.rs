//! Metadata of a GGUF file: what a loader must know of the architecture, and the tokenizer.

use super::gguf_mix;
use crate::{Error, Settings};
use bitmill_calibrate::gguf_tokenizer;
use bitmill_checkpoint::Checkpoint;
use bitmill_checkpoint::Dtype;
use bitmill_checkpoint::gguf::{GgufSpec, Storage, Value, by_storage};
use bitmill_models::{ModelSpec, Rope, RopeKind};
use bitmill_scheme::BLOCKS;

/// The version of the block formats, which has to be told where any tensor is quantized.
const QUANTIZATION_VERSION: u32 = 2;

/// llama.cpp's name of the architecture.
pub(super) fn architecture(spec: &ModelSpec) -> &str {
    match spec.model_type.as_str() {
        "mistral" => "llama",
        other => other,
    }
}

/// Every key, in the order of the file.
pub(super) fn metadata(
    input: &Checkpoint,
    spec: &ModelSpec,
    settings: &Settings,
    tensors: &[(String, GgufSpec)],
) -> Result<Vec<(String, Value)>, Error> {
    let architecture = architecture(spec);
    let name = input.dir().file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    let mut keys = vec![
        ("general.architecture".to_owned(), Value::Text(architecture.to_owned())),
        ("general.type".to_owned(), Value::Text("model".into())),
        ("general.name".to_owned(), Value::Text(name)),
        ("general.file_type".to_owned(), Value::U32(file_type(settings))),
    ];
    if tensors.iter().any(|(_, t)| matches!(t.kind.storage, Storage::Block(_))) {
        keys.push(("general.quantization_version".to_owned(), Value::U32(QUANTIZATION_VERSION)));
    }
    let mut add = |key: &str, value: Value| keys.push((format!("{architecture}.{key}"), value));
    for (key, n) in [
        ("context_length", spec.max_positions),
        ("embedding_length", spec.hidden),
        ("block_count", spec.layers),
        ("feed_forward_length", spec.intermediate),
        ("attention.head_count", spec.heads),
        ("attention.head_count_kv", spec.kv_heads),
        ("attention.key_length", spec.head_dim),
        ("attention.value_length", spec.head_dim),
        ("rope.dimension_count", spec.head_dim),
        ("vocab_size", spec.vocab),
    ] {
        // Sizes of a spec fit into 32 bits: its reader sees to that.
        add(key, Value::U32(u32::try_from(n).unwrap_or(u32::MAX)));
    }
    add("attention.layer_norm_rms_epsilon", Value::F32(spec.norm_eps as f32));
    for (key, value) in spec.rope().into_iter().flat_map(rope) {
        add(key, value);
    }
    match input.gguf() {
        Some(gguf) => {
            let own = gguf.metadata.iter().filter(|(key, _)| key.starts_with("tokenizer."));
            keys.extend(own.map(|(key, value)| (key.clone(), value.clone())));
        }
        None => keys.extend(gguf_tokenizer(input.dir(), input.config(), spec.vocab)?),
    }
    keys.push(("bitmill.version".to_owned(), Value::Text(env!("CARGO_PKG_VERSION").into())));
    keys.push(("bitmill.method".to_owned(), Value::Text(settings.method.clone())));
    Ok(keys)
}

/// The number of the mixture, or of the type most weights have.
fn file_type(settings: &Settings) -> u32 {
    if let Some(mix) = settings.gguf.as_ref().and_then(|g| gguf_mix(g.mix.as_ref()?)) {
        return mix.file_type;
    }
    let block = settings.scheme.form().and_then(|f| BLOCKS.iter().find(|b| b.kind == f.kind));
    block.and_then(|b| by_storage(Storage::Block(b.kind))).map_or(1, |t| t.file_type)
}

fn rope(rope: &Rope) -> Vec<(&'static str, Value)> {
    let mut keys = vec![("rope.freq_base", Value::F32(rope.theta as f32))];
    let mut scaling = |kind: &str, factor: f64| {
        keys.push(("rope.scaling.type", Value::Text(kind.into())));
        keys.push(("rope.scaling.factor", Value::F32(factor as f32)));
    };
    match &rope.kind {
        RopeKind::Linear { factor } => scaling("linear", *factor),
        RopeKind::Yarn { factor, beta_fast, beta_slow, original, .. } => {
            scaling("yarn", *factor);
            keys.push((
                "rope.scaling.original_context_length",
                Value::U32(u32::try_from(*original).unwrap_or(u32::MAX)),
            ));
            keys.push(("rope.scaling.yarn_beta_fast", Value::F32(*beta_fast as f32)));
            keys.push(("rope.scaling.yarn_beta_slow", Value::F32(*beta_slow as f32)));
        }
        // Llama 3's factors go into a tensor; the others are refused while planning.
        _ => {}
    }
    keys
}

/// The divisors of the rotary frequencies, which GGUF keeps as a tensor: what Llama 3's scaling divides each by.
pub(super) fn rope_factors(spec: &ModelSpec) -> Vec<(GgufSpec, Vec<u8>)> {
    let Some(own) = spec.rope().filter(|rope| matches!(rope.kind, RopeKind::Llama3 { .. })) else {
        return Vec::new();
    };
    let plain = Rope { kind: RopeKind::Default, ..own.clone() };
    let (scaled, plain) = (own.frequencies(1), plain.frequencies(1));
    let factors: Vec<f32> = plain.iter().zip(&scaled).map(|(p, s)| p / s).collect();
    constant(super::ROPE_FACTORS, &factors)
}

/// A vector that is written with the header.
pub(super) fn constant(name: &str, values: &[f32]) -> Vec<(GgufSpec, Vec<u8>)> {
    let kind = by_storage(Storage::Dense(Dtype::F32));
    let spec = kind.map(|kind| GgufSpec { name: name.into(), kind, shape: vec![values.len()] });
    spec.map(|spec| (spec, values.iter().flat_map(|f| f.to_le_bytes()).collect())).into_iter().collect()
}

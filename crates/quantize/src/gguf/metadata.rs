//! Metadata of a GGUF file: what a loader must know of the architecture, and the tokenizer.

use super::gguf_mix;
use crate::{Error, Settings};
use bitmill_calibrate::{Pooling, Sentences, gguf_tokenizer};
use bitmill_checkpoint::gguf::{self, GgufSpec, Storage, Value, ValueType, by_storage};
use bitmill_checkpoint::{Checkpoint, Dtype};
use bitmill_models::{Act, ModelSpec, Rope, RopeKind};
use bitmill_scheme::BLOCKS;

/// The version of the block formats, which has to be told where any tensor is quantized.
const QUANTIZATION_VERSION: u32 = 2;

/// llama.cpp's name of the architecture; [`super::check`] has refused those without one.
pub(super) fn architecture(spec: &ModelSpec) -> &str {
    gguf::architecture(&spec.model_type).unwrap_or(&spec.model_type)
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
    let own = if spec.causal { decoder(architecture, input, spec) } else { encoder(input, spec)? };
    keys.extend(own.into_iter().map(|(key, value)| (format!("{architecture}.{key}"), value)));
    match input.gguf() {
        Some(gguf) => {
            let own = gguf.metadata.iter().filter(|(key, _)| key.starts_with("tokenizer."));
            keys.extend(own.map(|(key, value)| (key.clone(), value.clone())));
        }
        None => {
            keys.extend(gguf_tokenizer(input.dir(), input.config(), spec.vocab)?);
            if spec.token_types > 0 {
                keys.push(("tokenizer.ggml.token_type_count".into(), size(spec.token_types)));
            }
        }
    }
    rename(&mut keys);
    keys.push(("bitmill.version".to_owned(), Value::Text(env!("CARGO_PKG_VERSION").into())));
    keys.push(("bitmill.method".to_owned(), Value::Text(settings.method.clone())));
    Ok(keys)
}

/// Tokens that llama.cpp looks for in a model by the name of Phi-3, and does not load it without.
const PHI3_TOKENS: [&str; 4] = ["<s>", "</s>", "<unk>", "<|endoftext|>"];

/// Writes a name that llama.cpp takes for Phi-3's otherwise, where the vocabulary is another.
fn rename(keys: &mut [(String, Value)]) {
    let of = |wanted: &str| keys.iter().find(|(key, _)| key == wanted).map(|(_, value)| value);
    let tokens = of("tokenizer.ggml.tokens").and_then(Value::items).unwrap_or_default();
    if PHI3_TOKENS.iter().all(|wanted| tokens.iter().any(|token| token.text() == Some(wanted))) {
        return;
    }
    for (_, value) in keys.iter_mut().filter(|(key, _)| key == "general.name") {
        let Value::Text(name) = value else { continue };
        // Letters of ASCII keep their places in lower case.
        while let Some(at) = ["phi3", "phi-3"].iter().find_map(|own| name.to_ascii_lowercase().find(own)) {
            let digit = name[at..].find('3').map_or(at, |i| at + i);
            name.replace_range(at + 3..digit, " ");
        }
    }
}

/// The number of the mixture, or of the type most weights have.
fn file_type(settings: &Settings) -> u32 {
    if let Some(mix) = settings.gguf.as_ref().and_then(|g| gguf_mix(g.mix.as_ref()?)) {
        return mix.file_type;
    }
    let block = settings.scheme.form().and_then(|f| BLOCKS.iter().find(|b| b.kind == f.kind));
    block.and_then(|b| by_storage(Storage::Block(b.kind))).map_or(1, |t| t.file_type)
}

/// Sizes of a spec fit into 32 bits: its reader sees to that.
fn size(n: usize) -> Value {
    Value::U32(u32::try_from(n).unwrap_or(u32::MAX))
}

fn real(v: f64) -> Value {
    Value::F32(v as f32)
}

type Key = (&'static str, Value);

/// What every architecture has.
fn sizes(spec: &ModelSpec) -> Vec<Key> {
    vec![
        ("context_length", size(spec.max_positions)),
        ("embedding_length", size(spec.hidden)),
        ("block_count", size(spec.layers)),
        ("feed_forward_length", size(spec.intermediate)),
        ("attention.head_count", size(spec.heads)),
        ("attention.head_count_kv", size(spec.kv_heads)),
        ("attention.key_length", size(spec.head_dim)),
        ("attention.value_length", size(spec.head_dim)),
        ("vocab_size", size(spec.vocab)),
    ]
}

fn encoder(input: &Checkpoint, spec: &ModelSpec) -> Result<Vec<Key>, Error> {
    let mut keys = sizes(spec);
    keys.push(("attention.layer_norm_epsilon", real(spec.norm_eps)));
    keys.push(("attention.causal", Value::Bool(false)));
    // A plain encoder says nothing of sentences.
    if let Some(number) = Sentences::stated(input)?.and_then(Pooling::gguf) {
        keys.push(("pooling_type", Value::U32(number as u32)));
    }
    // llama.cpp approximates GELU in any case; who computes it exactly has to know.
    if spec.act == Act::GeluTanh {
        keys.push(("hidden_activation", Value::Text("gelu_pytorch_tanh".into())));
    }
    Ok(keys)
}

fn decoder(architecture: &str, input: &Checkpoint, spec: &ModelSpec) -> Vec<Key> {
    let mut keys = sizes(spec);
    keys.push(("attention.layer_norm_rms_epsilon", real(spec.norm_eps)));
    let of = |windowed: bool| spec.ropes.iter().zip(&spec.windows).find(|(_, w)| w.is_some() == windowed)?.0.as_ref();
    let local = of(true).filter(|_| architecture == "gemma3");
    let rope_of_all = of(false).or(of(true).filter(|_| architecture != "gemma3"));
    keys.push(("rope.dimension_count", size(rope_of_all.or(local).map_or(spec.head_dim, |rope| rope.dim))));
    keys.extend(rope_of_all.into_iter().flat_map(rope));
    keys.extend(local.map(|rope| ("rope.freq_base_swa", real(rope.theta))));
    keys.extend(spec.factors.attention_cap.map(|cap| ("attn_logit_softcapping", real(cap))));
    keys.extend(spec.factors.logit_cap.map(|cap| ("final_logit_softcapping", real(cap))));
    match architecture {
        "gemma2" => keys.extend(windows(spec, 2)),
        "gemma3" if spec.windows.iter().any(Option::is_some) => keys.extend(windows(spec, 6)),
        "phi3" => {
            // llama.cpp takes zero for none, and some of its versions miss the key.
            keys.push(("attention.sliding_window", size(spec.windows.iter().flatten().next().copied().unwrap_or(0))));
            if !keys.iter().any(|(key, _)| *key == ORIGINAL) {
                let own = input.config()["original_max_position_embeddings"].as_u64();
                keys.push((ORIGINAL, size(own.map_or(spec.max_positions, |n| n as usize))));
            }
        }
        _ => {}
    }
    keys
}

/// The key of the context length before scaling.
const ORIGINAL: &str = "rope.scaling.original_context_length";

/// The width of windows, and which blocks have them where it is not all but each `every`-th.
fn windows(spec: &ModelSpec, every: usize) -> Vec<Key> {
    let width = spec.windows.iter().flatten().next().copied().unwrap_or(spec.max_positions);
    let mut keys = vec![("attention.sliding_window", size(width))];
    let windowed: Vec<bool> = spec.windows.iter().map(Option::is_some).collect();
    if (0..spec.layers).any(|i| windowed[i] == (i + 1).is_multiple_of(every)) {
        let flags = windowed.into_iter().map(Value::Bool).collect();
        keys.push(("attention.sliding_window_pattern", Value::Array(ValueType::Bool, flags)));
    }
    keys
}

fn rope(rope: &Rope) -> Vec<Key> {
    let mut keys = vec![("rope.freq_base", real(rope.theta))];
    let mut scaling = |kind: &str, factor: f64| {
        keys.push(("rope.scaling.type", Value::Text(kind.into())));
        keys.push(("rope.scaling.factor", real(factor)));
    };
    match &rope.kind {
        RopeKind::Linear { factor } => scaling("linear", *factor),
        RopeKind::Yarn { factor, beta_fast, beta_slow, original, .. } => {
            scaling("yarn", *factor);
            keys.push((ORIGINAL, size(*original)));
            keys.push(("rope.scaling.yarn_beta_fast", real(*beta_fast)));
            keys.push(("rope.scaling.yarn_beta_slow", real(*beta_slow)));
        }
        RopeKind::LongRope { attention, original, .. } => {
            keys.push((ORIGINAL, size(*original)));
            keys.push(("rope.scaling.attn_factor", real(*attention)));
        }
        _ => {}
    }
    keys
}

/// The divisors of the rotary frequencies, which GGUF keeps as tensors: what Llama 3's scaling divides each by, or those
/// of longrope for long texts and for short ones.
pub(super) fn rope_factors(spec: &ModelSpec) -> Vec<(GgufSpec, Vec<u8>)> {
    let [all, short_texts, long_texts] = gguf::ROPE_FACTORS;
    let Some(own) = spec.rope() else { return Vec::new() };
    match &own.kind {
        RopeKind::Llama3 { .. } => {
            let plain = Rope { kind: RopeKind::Default, ..own.clone() };
            let (scaled, plain) = (own.frequencies(1), plain.frequencies(1));
            let factors: Vec<f32> = plain.iter().zip(&scaled).map(|(p, s)| p / s).collect();
            constant(all, &factors)
        }
        RopeKind::LongRope { short, long, .. } => {
            let narrow = |list: &[f64]| list.iter().map(|&v| v as f32).collect::<Vec<f32>>();
            [constant(long_texts, &narrow(long)), constant(short_texts, &narrow(short))].concat()
        }
        _ => Vec::new(),
    }
}

/// A vector that is written with the header.
pub(super) fn constant(name: &str, values: &[f32]) -> Vec<(GgufSpec, Vec<u8>)> {
    let kind = by_storage(Storage::Dense(Dtype::F32));
    let spec = kind.map(|kind| GgufSpec { name: name.into(), kind, shape: vec![values.len()] });
    spec.map(|spec| (spec, values.iter().flat_map(|f| f.to_le_bytes()).collect())).into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_promises_no_vocabulary_that_is_not_there() {
        let named = |name: &str, tokens: &[&str]| {
            let mut keys = vec![
                ("general.name".to_owned(), Value::Text(name.into())),
                ("tokenizer.ggml.tokens".to_owned(), Value::texts(tokens.iter().map(|t| (*t).to_owned()))),
            ];
            rename(&mut keys);
            keys[0].1.text().unwrap().to_owned()
        };
        assert_eq!(named("My-Phi-3-and-phi3é", &["<s>"]), "My-Phi 3-and-phi 3é");
        assert_eq!(named("Phi-3-mini", &PHI3_TOKENS), "Phi-3-mini");
        assert_eq!(named("phi-4", &[]), "phi-4");
    }
}

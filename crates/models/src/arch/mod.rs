//! The architectures, one file each: what its config spells differently, and nothing about computing.
//!
//! Adding one is a file with an [`Arch`], its `mod` line and a line of [`ARCHES`].

mod bert;
mod gemma;
mod gpt2;
mod gpt_neox;
mod granite;
mod llama;
mod llama4;
mod mistral;
mod mixtral;
mod modernbert;
mod olmo2;
mod opt;
mod phi3;
mod qwen2;
mod qwen3;
mod qwen_moe;
mod roberta;
mod smollm3;
mod vit;

use crate::config::Reader;
use crate::layout::{DECODER, Layout};
use crate::rope::RopeKeys;
use crate::{Act, Error, Factors, ModelSpec, NormKind, Pairs, Rope, Routing, Weighing};
use bitmill_checkpoint::Checkpoint;
use serde_json::Value;

/// Reads the configs of one architecture.
pub trait Arch: Sync {
    /// The values of `model_type` it answers to.
    fn model_types(&self) -> &'static [&'static str];

    /// The model a config describes.
    ///
    /// # Errors
    /// [`Error::Config`] for the first key that is missing, malformed, out of range or unsupported.
    fn spec(&self, config: &Value) -> Result<ModelSpec, Error>;
}

/// Every architecture.
pub static ARCHES: &[&dyn Arch] = &[
    &bert::Bert,
    &gemma::Gemma,
    &gemma::Gemma2,
    &gemma::Gemma3,
    &gemma::Gemma3Nested,
    &gpt2::Gpt2,
    &gpt_neox::GptNeoX,
    &granite::Granite,
    &llama::Llama,
    &llama4::Llama4Text,
    &llama4::Llama4,
    &mistral::Mistral,
    &mixtral::Mixtral,
    &modernbert::ModernBert,
    &olmo2::Olmo2,
    &opt::Opt,
    &phi3::Phi3,
    &qwen2::Qwen2,
    &qwen3::Qwen3,
    &qwen_moe::Qwen2Moe,
    &qwen_moe::Qwen3Moe,
    &roberta::Roberta,
    &smollm3::SmolLm3,
    &vit::Vit,
];

/// The model that a whole `config.json` describes.
///
/// # Errors
/// [`Error::UnknownArchitecture`] when no architecture answers to its `model_type`; [`Error::Config`] otherwise.
pub fn spec(config: &Value) -> Result<ModelSpec, Error> {
    let model_type = Reader::new(config)?.text("model_type")?.unwrap_or("(none)");
    match ARCHES.iter().find(|arch| arch.model_types().contains(&model_type)) {
        Some(arch) => arch.spec(config),
        None => Err(Error::UnknownArchitecture {
            model_type: model_type.chars().take(80).collect(),
            known: ARCHES.iter().flat_map(|arch| arch.model_types()).copied().collect(),
        }),
    }
}

/// The model a folder holds: what its config describes, in the spelling its tensors have.
///
/// # Errors
/// As [`spec`].
pub fn spec_of(checkpoint: &Checkpoint) -> Result<ModelSpec, Error> {
    Ok(spec(checkpoint.config())?.spelled_as(|name| checkpoint.contains(name)))
}

/// What an architecture assumes where its config is silent, and the keys it does not share with others.
struct Defaults {
    /// Key-value heads; `None` is one per head.
    kv_heads: Option<usize>,
    /// Head size; `None` is `hidden / heads`.
    head_dim: Option<usize>,
    max_positions: usize,
    bos: Option<u32>,
    /// Added under the root of norms.
    eps: f64,
    tied: bool,
    /// Key and value of the activation.
    act: (&'static str, &'static str),
    rope: RopeKeys,
}

impl Defaults {
    /// What most share.
    const USUAL: Defaults = Defaults {
        kv_heads: None,
        head_dim: None,
        max_positions: 2048,
        bos: None,
        eps: 1e-6,
        tied: false,
        act: ("hidden_act", "silu"),
        rope: RopeKeys::USUAL,
    };
}

/// The sizes every model has.
struct Sizes {
    hidden: usize,
    intermediate: usize,
    layers: usize,
    vocab: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    max_positions: usize,
}

/// A causal model of `layout` with nothing to it but its sizes: RMS norms, no positions, windows, biases or factors.
fn bare(model_type: &str, layout: &'static Layout, sizes: &Sizes) -> ModelSpec {
    let &Sizes { hidden, intermediate, layers, vocab, heads, kv_heads, head_dim, max_positions } = sizes;
    ModelSpec {
        model_type: model_type.into(),
        layout,
        spelling: &layout.spellings[0],
        hidden,
        intermediate,
        routing: None,
        layers,
        vocab,
        images: None,
        heads,
        kv_heads,
        head_dim,
        norm: NormKind::Rms,
        norm_eps: 1e-6,
        norm_offset: 0.0,
        ropes: vec![None; layers],
        pairs: Pairs::Halves,
        tempering: None,
        position_offset: 0,
        padding: None,
        token_types: 0,
        causal: true,
        windows: vec![None; layers],
        chunked: false,
        qkv_bias: false,
        out_bias: false,
        mlp_bias: false,
        qk_norm: None,
        parallel: false,
        factors: Factors::NONE,
        tied: false,
        act: Act::Silu,
        max_positions,
        bos: None,
    }
}

/// The keys that decoders in the manner of Llama share. Windows are open, biases and norms of queries and keys absent.
fn decoder(config: &Reader<'_>, model_type: &str, defaults: &Defaults) -> Result<ModelSpec, Error> {
    let (hidden, heads) = (config.size("hidden_size")?, config.size("num_attention_heads")?);
    let layers = layers(config)?;
    let kv_heads = config.optional_size("num_key_value_heads")?.unwrap_or(defaults.kv_heads.unwrap_or(heads));
    if !heads.is_multiple_of(kv_heads) {
        return Err(
            config.error("num_key_value_heads", format!("is {kv_heads}, which does not divide the {heads} heads"))
        );
    }
    let head_dim = match config.optional_size("head_dim")?.or(defaults.head_dim) {
        Some(head_dim) => head_dim,
        None => equal_heads(config, hidden, heads)?,
    };
    if !head_dim.is_multiple_of(2) {
        let key = if config.get("head_dim").is_some() { "head_dim" } else { "num_attention_heads" };
        return Err(config.error(key, format!("makes heads of {head_dim} channels; rotary embedding pairs them up")));
    }
    let max_positions = config.positions("max_position_embeddings")?.unwrap_or(defaults.max_positions);
    let (intermediate, vocab) = (config.size("intermediate_size")?, vocab(config)?);
    let sizes = Sizes { hidden, intermediate, layers, vocab, heads, kv_heads, head_dim, max_positions };
    Ok(ModelSpec {
        norm_eps: config.positive("rms_norm_eps")?.unwrap_or(defaults.eps),
        ropes: vec![Some(Rope::read(config, &defaults.rope, head_dim, max_positions)?); layers],
        tied: config.flag("tie_word_embeddings", defaults.tied)?,
        act: act(config, defaults.act)?,
        bos: if config.written("bos_token_id") { bos(config)? } else { defaults.bos },
        ..bare(model_type, &DECODER, &sizes)
    })
}

/// The number of experts, under its key and with its default, and how many of them a token goes to; widths and blocks are
/// the architecture's.
fn routing(config: &Reader<'_>, (key, default): (&str, usize), chosen: usize) -> Result<Routing, Error> {
    let experts = config.integer(key, 1, 1 << 12)?.unwrap_or(default);
    let chosen = config.optional_size("num_experts_per_tok")?.unwrap_or(chosen);
    if chosen > experts {
        return Err(config.error("num_experts_per_tok", format!("is {chosen}, more than the {experts} experts")));
    }
    Ok(Routing { experts, chosen, weighing: Weighing::Probability, intermediate: 0, shared: 0, blocks: Vec::new() })
}

fn layers(config: &Reader<'_>) -> Result<usize, Error> {
    config.integer("num_hidden_layers", 1, 1 << 12)?.ok_or_else(|| config.missing("num_hidden_layers"))
}

fn vocab(config: &Reader<'_>) -> Result<usize, Error> {
    config.integer("vocab_size", 1, u64::from(u32::MAX))?.ok_or_else(|| config.missing("vocab_size"))
}

/// Width of one of `heads` that share `hidden` channels.
fn equal_heads(config: &Reader<'_>, hidden: usize, heads: usize) -> Result<usize, Error> {
    if hidden.is_multiple_of(heads) {
        return Ok(hidden / heads);
    }
    Err(config.error("num_attention_heads", format!("is {heads}, which does not divide {hidden} channels")))
}

fn bos(config: &Reader<'_>) -> Result<Option<u32>, Error> {
    Ok(config.integer("bos_token_id", 0, u64::from(u32::MAX))?.map(|id| id as u32))
}

/// The activation that `key` names, `default` where it is silent.
fn act(config: &Reader<'_>, (key, default): (&str, &str)) -> Result<Act, Error> {
    match config.text(key)?.unwrap_or(default) {
        "silu" | "swish" => Ok(Act::Silu),
        "gelu" => Ok(Act::Gelu),
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(Act::GeluTanh),
        "relu" => Ok(Act::Relu),
        other => {
            let other: String = other.chars().take(40).collect();
            let known = "silu, swish, gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, relu";
            Err(config.error(key, format!("is \"{other}\"; understood are {known}")))
        }
    }
}

/// The error of a flag that asks for what is not implemented; nothing where it is not set.
fn unsupported(config: &Reader<'_>, key: &str, means: &str) -> Result<(), Error> {
    match config.flag(key, false)? {
        false => Ok(()),
        true => Err(config.error(key, format!("is true; {means}, which is unsupported"))),
    }
}

/// A bound on scores or logits: `default` where the config is silent, none where it says null.
fn cap(config: &Reader<'_>, key: &str, default: Option<f64>) -> Result<Option<f64>, Error> {
    if config.written(key) { config.positive(key) } else { Ok(default) }
}

/// Sliding windows as Qwen 2 and 3 spell them: a switch, a width, and either a list of layer types or the first layer
/// that has a window.
fn layer_windows(config: &Reader<'_>, layers: usize) -> Result<Vec<Option<usize>>, Error> {
    let width = match config.flag("use_sliding_window", false)? {
        false => None,
        true if config.written("sliding_window") => config.positions("sliding_window")?,
        true => Some(4096),
    };
    match listed_windows(config, layers, width)? {
        Some(windows) => Ok(windows),
        None => {
            let first = config.integer("max_window_layers", 0, 1 << 31)?.unwrap_or(28);
            Ok((0..layers).map(|layer| width.filter(|_| layer >= first)).collect())
        }
    }
}

/// The windows of the layers that `layer_types` lists, where it stands: `width` for each that slides.
fn listed_windows(
    config: &Reader<'_>,
    layers: usize,
    width: Option<usize>,
) -> Result<Option<Vec<Option<usize>>>, Error> {
    listed_kinds(config, layers, ("sliding_attention", width))
}

/// The same where layers with windows are called `kind`.
fn listed_kinds(
    config: &Reader<'_>,
    layers: usize,
    (kind, width): (&str, Option<usize>),
) -> Result<Option<Vec<Option<usize>>>, Error> {
    let Some(types) = config.list("layer_types")? else { return Ok(None) };
    if types.len() != layers {
        return Err(config.error("layer_types", format!("has {} entries for {layers} layers", types.len())));
    }
    let window = |own: &Value| match (own.as_str(), width) {
        (Some("full_attention"), _) => Ok(None),
        (Some(own), Some(width)) if own == kind => Ok(Some(width)),
        (Some(own), None) if own == kind => {
            Err(config.error("layer_types", "asks for windows that the other keys deny"))
        }
        _ => Err(config.error("layer_types", format!("has an entry that is neither full_attention nor {kind}"))),
    };
    types.iter().map(window).collect::<Result<_, _>>().map(Some)
}

/// Which layers rotate where some do not: those that `no_rope_layers` lists, or all but every fourth.
fn rotated_layers(config: &Reader<'_>, layers: usize) -> Result<Vec<bool>, Error> {
    let key = "no_rope_layers";
    let Some(list) = config.list(key)?.filter(|list| !list.is_empty()) else {
        let every = config.optional_size("no_rope_layer_interval")?.unwrap_or(4);
        return Ok((0..layers).map(|layer| !(layer + 1).is_multiple_of(every)).collect());
    };
    if list.len() < layers {
        return Err(config.error(key, format!("has {} entries for {layers} layers", list.len())));
    }
    // The name says the opposite of what an entry means.
    let flag = |value: &Value| match value.as_u64().or(value.as_bool().map(u64::from)) {
        Some(flag @ 0..=1) => Ok(flag == 1),
        _ => Err(config.error(key, "has an entry that is neither 0 nor 1")),
    };
    list.iter().take(layers).map(flag).collect()
}

/// The layers that `key` lists, where it stands.
fn listed_layers(config: &Reader<'_>, key: &str, layers: usize) -> Result<Option<Vec<usize>>, Error> {
    let layer = |value: &Value| match value.as_u64() {
        Some(layer) if layer < layers as u64 => Ok(layer as usize),
        _ => Err(config.error(key, format!("has an entry that is none of the {layers} layers"))),
    };
    config.list(key)?.map(|list| list.iter().map(layer).collect()).transpose()
}

/// The model of tokens inside one of several kinds of input, which `text_config` describes as `read` has it. What a token is
/// to the other kinds lies outside of it.
fn nested(
    config: &Value,
    model_type: &str,
    tied: bool,
    read: impl Fn(&Value) -> Result<ModelSpec, Error>,
) -> Result<ModelSpec, Error> {
    let key = "text_config";
    let whole = Reader::new(config)?;
    if whole.section(key)?.is_none() {
        return Err(whole.missing(key));
    }
    let spec = read(&config[key]).map_err(|e| match e {
        Error::Config { key: own, reason } => Error::Config { key: format!("{key}.{own}"), reason },
        other => other,
    })?;
    Ok(ModelSpec { model_type: model_type.into(), tied: whole.flag("tie_word_embeddings", tied)?, ..spec })
}

#[cfg(test)]
mod tests;

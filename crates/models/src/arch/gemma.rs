//! Gemma 1 to 3 (of the third with a vision tower, what reads tokens): scaled embeddings, norms stored as differences from
//! one, tanh-GELU; from 2 on norms around attention and MLP, windows in most layers and an attention scale of its own; 2 bounds scores and logits, 3 norms
//! queries and keys and gives windowed layers a rotary base of their own.

use super::{Arch, Defaults, act, cap, decoder, listed_windows, nested, unsupported};
use crate::config::Reader;
use crate::layout::{NESTED_SANDWICH, SANDWICH};
use crate::{Act, Error, Factors, ModelSpec, QkNorm, Rope};
use serde_json::Value;

/// `model_type: gemma`.
pub(super) struct Gemma;
/// `model_type: gemma2`.
pub(super) struct Gemma2;
/// `model_type: gemma3_text`.
pub(super) struct Gemma3;

/// `model_type: gemma3`, with a vision tower, which is none of this.
pub(super) struct Gemma3Nested;

const TANH: &str = "gelu_pytorch_tanh";

impl Arch for Gemma {
    fn model_types(&self) -> &'static [&'static str] {
        &["gemma"]
    }

    fn spec(&self, config: &Value) -> Result<ModelSpec, Error> {
        let config = Reader::new(config)?;
        let defaults = Defaults { kv_heads: Some(16), max_positions: 8192, act: ("hidden_act", TANH), ..GEMMA };
        let spec = shared(&config, "gemma", &defaults)?;
        // The first release says gelu and means its tanh approximation.
        let act_of = |spec: &ModelSpec| if spec.act == Act::Gelu { Act::GeluTanh } else { spec.act };
        let own = act_of(&spec);
        if config.get("hidden_activation").is_some() && act(&config, ("hidden_activation", TANH))? != own {
            return Err(config.error("hidden_activation", "is another activation than hidden_act"));
        }
        Ok(ModelSpec { act: own, ..spec })
    }
}

impl Arch for Gemma2 {
    fn model_types(&self) -> &'static [&'static str] {
        &["gemma2"]
    }

    fn spec(&self, config: &Value) -> Result<ModelSpec, Error> {
        let config = Reader::new(config)?;
        let spec = shared(&config, "gemma2", &Defaults { kv_heads: Some(4), max_positions: 8192, ..GEMMA })?;
        let windows = windows(&config, spec.layers, 2)?;
        let factors = Factors {
            attention_cap: cap(&config, "attn_logit_softcapping", Some(50.0))?,
            logit_cap: cap(&config, "final_logit_softcapping", Some(30.0))?,
            ..sandwich(&config, &spec)?
        };
        Ok(ModelSpec { layout: &SANDWICH, windows, factors, ..spec })
    }
}

impl Arch for Gemma3 {
    fn model_types(&self) -> &'static [&'static str] {
        &["gemma3_text"]
    }

    fn spec(&self, config: &Value) -> Result<ModelSpec, Error> {
        let whole = Reader::new(config)?;
        // Its rotary embeddings are read below, not where other decoders have theirs.
        let bare = without(config, &["rope_parameters", "rope_scaling", "rope_theta"]);
        let defaults = Defaults { kv_heads: Some(4), max_positions: 131_072, ..GEMMA };
        let spec = shared(&Reader::new(&bare)?, "gemma3_text", &defaults)?;
        if whole.get("attn_logit_softcapping").is_some() {
            return Err(
                whole.error("attn_logit_softcapping", "is set, which the reference of this architecture ignores")
            );
        }
        let pattern = whole.optional_size("sliding_window_pattern")?.unwrap_or(6);
        let windows = windows(&whole, spec.layers, pattern)?;
        let bases = [("rope_theta", 1e6), ("rope_local_base_freq", 1e4)];
        let [full, windowed] = Rope::read_pair(&whole, bases, [true, false], spec.head_dim, spec.max_positions)?;
        let rope = |window: &Option<usize>| Some(if window.is_some() { windowed.clone() } else { full.clone() });
        let factors = Factors { logit_cap: cap(&whole, "final_logit_softcapping", None)?, ..sandwich(&whole, &spec)? };
        Ok(ModelSpec {
            layout: &SANDWICH,
            ropes: windows.iter().map(rope).collect(),
            windows,
            factors,
            qk_norm: Some(QkNorm::Head),
            ..spec
        })
    }
}

impl Arch for Gemma3Nested {
    fn model_types(&self) -> &'static [&'static str] {
        &["gemma3"]
    }

    fn spec(&self, config: &Value) -> Result<ModelSpec, Error> {
        // Published configs leave out what is as in the reference.
        let sizes = [
            ("vocab_size", 262_208),
            ("hidden_size", 2304),
            ("intermediate_size", 9216),
            ("num_hidden_layers", 26),
            ("num_attention_heads", 8),
        ];
        let spec = nested(config, "gemma3", true, |text| {
            let mut text = text.clone();
            for (key, size) in sizes {
                if text[key].is_null() {
                    text[key] = size.into();
                }
            }
            Gemma3.spec(&text)
        })?;
        Ok(ModelSpec { layout: &NESTED_SANDWICH, spelling: &NESTED_SANDWICH.spellings[0], ..spec })
    }
}

const GEMMA: Defaults =
    Defaults { head_dim: Some(256), bos: Some(2), tied: true, act: ("hidden_activation", TANH), ..Defaults::USUAL };

/// What all three have.
fn shared(config: &Reader<'_>, model_type: &str, defaults: &Defaults) -> Result<ModelSpec, Error> {
    unsupported(config, "use_bidirectional_attention", "tokens then see what follows them")?;
    let spec = decoder(config, model_type, defaults)?;
    let attention_bias = config.flag("attention_bias", false)?;
    // The reference keeps the root in f32.
    let embedding = f64::from((spec.hidden as f64).sqrt() as f32);
    Ok(ModelSpec {
        norm_offset: 1.0,
        qkv_bias: attention_bias,
        out_bias: attention_bias,
        factors: Factors { embedding, ..Factors::NONE },
        ..spec
    })
}

/// The factors of the second and third generation, without bounds.
fn sandwich(config: &Reader<'_>, spec: &ModelSpec) -> Result<Factors, Error> {
    let scalar = config.positive("query_pre_attn_scalar")?.unwrap_or(256.0);
    Ok(Factors { attention: Some(scalar.powf(-0.5)), ..spec.factors })
}

/// Windows in every layer but each `pattern`-th, unless the config lists them.
fn windows(config: &Reader<'_>, layers: usize, pattern: usize) -> Result<Vec<Option<usize>>, Error> {
    let width = if config.written("sliding_window") { config.positions("sliding_window")? } else { Some(4096) };
    let by_pattern = || (0..layers).map(|layer| width.filter(|_| !(layer + 1).is_multiple_of(pattern))).collect();
    Ok(listed_windows(config, layers, width)?.unwrap_or_else(by_pattern))
}

/// A config without some keys.
fn without(config: &Value, keys: &[&str]) -> Value {
    let mut config = config.clone();
    if let Some(object) = config.as_object_mut() {
        keys.iter().for_each(|key| {
            object.remove(*key);
        });
    }
    config
}

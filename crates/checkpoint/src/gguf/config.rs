//! The `config.json` that a GGUF file's metadata amount to, for the architectures bitmill runs.

use super::names::model_type;
use super::{Gguf, Value as Meta};
use serde_json::{Value, json};

/// Blocks that llama.cpp takes.
const MOST_BLOCKS: u64 = 512;

/// Divisors of the rotary frequencies that a file carries as tensors.
#[derive(Debug, Default)]
pub(crate) struct Factors {
    /// For texts of any length.
    pub(crate) all: Option<Vec<f32>>,
    /// For texts no longer than those of training.
    pub(crate) short: Option<Vec<f32>>,
    /// For longer ones.
    pub(crate) long: Option<Vec<f32>>,
}

/// The metadata of one architecture.
struct Keys<'a> {
    gguf: &'a Gguf,
    architecture: &'a str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn get(&self, name: &str) -> Option<&Meta> {
        self.gguf.get(&self.key(name))
    }

    fn missing(&self, name: &str) -> String {
        format!("the metadata key {} is missing or no single number", self.key(name))
    }

    fn optional(&self, name: &str) -> Option<u64> {
        self.get(name).and_then(Meta::unsigned)
    }

    fn size(&self, name: &str) -> Result<u64, String> {
        self.optional(name).ok_or_else(|| self.missing(name))
    }

    fn real(&self, name: &str) -> Option<f64> {
        self.get(name).and_then(Meta::real)
    }

    fn epsilon(&self, name: &str) -> Result<f64, String> {
        self.real(name).ok_or_else(|| self.missing(name))
    }

    fn rows(&self, tensor: &str) -> Result<usize, String> {
        let rows = self.gguf.tensor(tensor).and_then(|t| t.shape.first().copied());
        rows.ok_or_else(|| format!("the tensor {tensor} is missing"))
    }

    fn special(&self, token: &str) -> Option<u64> {
        self.gguf.get(&format!("tokenizer.ggml.{token}_token_id")).and_then(Meta::unsigned)
    }
}

/// The configuration of the model in `gguf`. A file that is no model of a known architecture gets one that names its
/// architecture and nothing else, so that it can still be listed.
///
/// # Errors
/// A sentence on a key that is missing or malformed.
pub(crate) fn config(gguf: &Gguf, factors: Factors) -> Result<Value, String> {
    let architecture = gguf.architecture();
    let Some(model_type) = model_type(architecture) else {
        return Ok(json!({"model_type": architecture}));
    };
    let keys = Keys { gguf, architecture };
    let mut config = json!({
        "model_type": model_type,
        "hidden_size": keys.size("embedding_length")?,
        "num_hidden_layers": keys.size("block_count")?,
        "intermediate_size": keys.size("feed_forward_length")?,
        "num_attention_heads": keys.size("attention.head_count")?,
        "max_position_embeddings": keys.size("context_length")?,
        "vocab_size": keys.rows("token_embd.weight")?,
    });
    if architecture == "bert" {
        encoder(&keys, &mut config)?;
        return Ok(config);
    }
    decoder(&keys, &mut config)?;
    match architecture {
        "gemma" | "gemma2" | "gemma3" => gemma(&keys, &mut config)?,
        "phi3" => phi3(&keys, factors, &mut config)?,
        _ => {
            config["hidden_act"] = json!("silu");
            if architecture != "qwen2" {
                config["attention_bias"] = json!(gguf.tensor("blk.0.attn_q.bias").is_some());
            }
            if let Some(all) = factors.all {
                config["rope_scaling"] = json!({
                    "rope_type": "longrope", "short_factor": all, "long_factor": all, "attention_factor": 1.0,
                });
            }
        }
    }
    Ok(config)
}

fn encoder(keys: &Keys<'_>, config: &mut Value) -> Result<(), String> {
    // Without the key, llama.cpp has every token see those before it only.
    if keys.get("attention.causal") != Some(&Meta::Bool(false)) {
        return Err(format!(
            "{} is not false: a model that sees no later tokens is none of this architecture",
            keys.key("attention.causal")
        ));
    }
    config["layer_norm_eps"] = json!(keys.epsilon("attention.layer_norm_epsilon")?);
    config["type_vocab_size"] = json!(keys.rows("token_types.weight")?);
    config["hidden_act"] = json!(keys.get("hidden_activation").and_then(Meta::text).unwrap_or("gelu"));
    if let Some(id) = keys.special("padding") {
        config["pad_token_id"] = json!(id);
    }
    Ok(())
}

/// What decoders have in common.
fn decoder(keys: &Keys<'_>, config: &mut Value) -> Result<(), String> {
    config["num_key_value_heads"] = match keys.get("attention.head_count_kv") {
        None => config["num_attention_heads"].clone(),
        Some(v) => json!(v.unsigned().ok_or_else(|| keys.missing("attention.head_count_kv"))?),
    };
    config["rms_norm_eps"] = json!(keys.epsilon("attention.layer_norm_rms_epsilon")?);
    config["rope_theta"] = json!(keys.real("rope.freq_base").unwrap_or(10_000.0));
    config["tie_word_embeddings"] = json!(keys.gguf.tensor("output.weight").is_none());
    config["bos_token_id"] = json!(keys.special("bos"));
    if let Some(dim) = keys.optional("attention.key_length") {
        config["head_dim"] = json!(dim);
    }
    let factor = keys.real("rope.scaling.factor");
    config["rope_scaling"] = match keys.get("rope.scaling.type").and_then(Meta::text) {
        None | Some("none") => Value::Null,
        Some(kind) => json!({
            "rope_type": kind, "factor": factor,
            "original_max_position_embeddings": keys.optional("rope.scaling.original_context_length"),
        }),
    };
    Ok(())
}

/// The head size that a file means.
fn head_dim(keys: &Keys<'_>) -> Result<u64, String> {
    let (hidden, heads) = (keys.size("embedding_length")?, keys.size("attention.head_count")?);
    Ok(keys.optional("attention.key_length").unwrap_or(hidden / heads.max(1)))
}

fn gemma(keys: &Keys<'_>, config: &mut Value) -> Result<(), String> {
    let (architecture, layers) = (keys.architecture, keys.size("block_count")?);
    config["head_dim"] = json!(head_dim(keys)?);
    config["hidden_activation"] = json!("gelu_pytorch_tanh");
    if architecture == "gemma" {
        config["hidden_act"] = json!("gelu_pytorch_tanh");
        return Ok(());
    }
    let sizes = [keys.size("embedding_length")?, keys.size("attention.head_count")?];
    config["query_pre_attn_scalar"] = json!(query_scalar(architecture, layers, sizes, head_dim(keys)?));
    let cap = |name: &str, default: Option<f64>| json!(keys.real(name).or(default).filter(|&cap| cap != 0.0));
    let second = architecture == "gemma2";
    config["final_logit_softcapping"] = cap("final_logit_softcapping", second.then_some(30.0));
    if second {
        config["attn_logit_softcapping"] = cap("attn_logit_softcapping", Some(50.0));
    } else {
        config["rope_local_base_freq"] = json!(keys.real("rope.freq_base_swa").unwrap_or(10_000.0));
    }
    let window = keys.optional("attention.sliding_window").or(second.then_some(4096)).filter(|&window| window > 0);
    let windowed = windowed(keys, layers, if second { 2 } else { 6 })?;
    let kind = |windowed: &bool| if *windowed && window.is_some() { "sliding_attention" } else { "full_attention" };
    config["sliding_window"] = json!(window);
    config["layer_types"] = windowed.iter().map(kind).collect();
    Ok(())
}

/// What llama.cpp's gemma2 and gemma3 divide the squares of attention scores by. The largest model of each generation, which they
/// know by its number of blocks, has the width of a head if heads made up the hidden width; others that of their heads.
#[must_use]
pub fn query_scalar(architecture: &str, layers: u64, [hidden, heads]: [u64; 2], head_dim: u64) -> u64 {
    let largest = if architecture == "gemma2" { 46 } else { 62 };
    if layers == largest { hidden / heads.max(1) } else { head_dim }
}

/// Which blocks have windows: those the file lists, or all but every so many.
fn windowed(keys: &Keys<'_>, layers: u64, every: u64) -> Result<Vec<bool>, String> {
    let name = "attention.sliding_window_pattern";
    let flag = |v: &Meta| match v {
        Meta::Bool(flag) => Some(*flag),
        other => other.unsigned().map(|n| n != 0),
    };
    let wrong = || format!("{} lists no flag for each of the {layers} blocks", keys.key(name));
    if let Some(list) = keys.get(name).and_then(Meta::items) {
        let flags: Option<Vec<bool>> = list.iter().map(flag).collect();
        return flags.filter(|flags| flags.len() as u64 == layers).ok_or_else(wrong);
    }
    if layers > MOST_BLOCKS {
        return Err(format!("{} is {layers}, more than {MOST_BLOCKS}", keys.key("block_count")));
    }
    let every = keys.optional(name).unwrap_or(every);
    Ok((0..layers).map(|layer| every == 0 || layer % every < every - 1).collect())
}

fn phi3(keys: &Keys<'_>, factors: Factors, config: &mut Value) -> Result<(), String> {
    config["hidden_act"] = json!("silu");
    // llama.cpp runs these models without their windows; zero stands for none.
    config["sliding_window"] = json!(keys.optional("attention.sliding_window").filter(|&window| window > 0));
    let head_dim = head_dim(keys)?;
    let rotated = keys.optional("rope.dimension_count").unwrap_or(head_dim);
    if rotated != head_dim {
        let share = rotated as f64 / head_dim as f64;
        // Readers round down what the share makes of a head.
        let exact = (head_dim as f64 * share) as u64 == rotated;
        config["partial_rotary_factor"] = json!(if exact { share } else { share.next_up() });
    }
    let original = keys.optional("rope.scaling.original_context_length");
    config["original_max_position_embeddings"] =
        original.map_or_else(|| config["max_position_embeddings"].clone(), |n| json!(n));
    config["rope_scaling"] = match (factors.short, factors.long) {
        (Some(short), Some(long)) => json!({
            "rope_type": "longrope", "short_factor": short, "long_factor": long,
            "attention_factor": keys.real("rope.scaling.attn_factor").unwrap_or(1.0),
        }),
        (None, None) => Value::Null,
        _ => return Err("of the tensors rope_factors_short.weight and rope_factors_long.weight one is missing".into()),
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{GgufTensor, Storage, ValueType, by_storage};

    /// A file of the least that llama.cpp's converter writes of an architecture, and `more`.
    fn file(architecture: &str, more: &[(&str, Meta)]) -> Gguf {
        let text = Meta::Text(architecture.into());
        let sizes = [
            ("embedding_length", 96),
            ("block_count", 7),
            ("feed_forward_length", 64),
            ("attention.head_count", 4),
            ("context_length", 100),
        ];
        let own = sizes.map(|(name, n)| (name, Meta::U32(n)));
        let eps =
            ["attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"].map(|name| (name, Meta::F32(0.5)));
        let keys = own.into_iter().chain(eps).chain(more.iter().cloned());
        let metadata = keys
            .map(|(name, value)| (format!("{architecture}.{name}"), value))
            .chain([("general.architecture".into(), text)]);
        let kind = by_storage(Storage::Dense(safetensors::Dtype::F32)).unwrap();
        let tensor =
            |(name, rows): (&str, usize)| GgufTensor { name: name.into(), kind, shape: vec![rows, 96], range: 0..0 };
        let tensors = [("token_embd.weight", 40), ("token_types.weight", 2)].map(tensor).into();
        Gguf { metadata: metadata.collect(), tensors }
    }

    fn of(architecture: &str, more: &[(&str, Meta)]) -> Result<Value, String> {
        config(&file(architecture, more), Factors::default())
    }

    #[test]
    fn what_a_file_leaves_out_is_what_llama_cpp_takes() {
        let flags = |flags: [bool; 7]| Meta::Array(ValueType::Bool, flags.map(Meta::Bool).into());
        let (slides, full) = ("sliding_attention", "full_attention");
        let dim = ("attention.key_length", Meta::U32(16));
        let window = ("attention.sliding_window", Meta::U32(9));
        let second = json!([slides, full, slides, full, slides, full, slides]);
        for (architecture, more, expected) in [
            (
                "gemma",
                vec![],
                json!({"head_dim": 24, "rope_theta": 1e4, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": true}),
            ),
            (
                "gemma2",
                vec![dim.clone()],
                json!({"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4096, "layer_types": second,
                       "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
            ),
            ("gemma2", vec![dim.clone(), ("block_count", Meta::U32(46))], json!({"query_pre_attn_scalar": 24})),
            (
                "gemma3",
                vec![dim.clone()],
                json!({"sliding_window": null, "layer_types": vec![full; 7], "final_logit_softcapping": null}),
            ),
            (
                "gemma3",
                vec![
                    dim.clone(),
                    window.clone(),
                    ("rope.scaling.type", Meta::Text("linear".into())),
                    ("rope.scaling.factor", Meta::F32(8.0)),
                ],
                json!({"sliding_window": 9, "layer_types": [slides, slides, slides, slides, slides, full, slides],
                       "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0, "original_max_position_embeddings": null}}),
            ),
            (
                "gemma3",
                vec![
                    window.clone(),
                    ("attention.sliding_window_pattern", flags([true, false, true, false, false, false, true])),
                ],
                json!({"layer_types": [slides, full, slides, full, full, full, slides]}),
            ),
            (
                "gemma3",
                vec![window.clone(), ("attention.sliding_window_pattern", Meta::U32(2))],
                json!({"layer_types": second}),
            ),
            (
                "phi3",
                vec![("rope.dimension_count", Meta::U32(18)), ("attention.sliding_window", Meta::U32(0))],
                json!({"partial_rotary_factor": 0.75, "sliding_window": null, "rope_scaling": null, "original_max_position_embeddings": 100}),
            ),
            (
                "bert",
                vec![("attention.causal", Meta::Bool(false))],
                json!({"layer_norm_eps": 0.5, "type_vocab_size": 2, "hidden_act": "gelu", "max_position_embeddings": 100, "vocab_size": 40}),
            ),
        ] {
            let got = of(architecture, &more).unwrap();
            for (key, value) in expected.as_object().unwrap() {
                assert_eq!(&got[key], value, "{architecture}: {key}");
            }
        }
        let both = Factors { short: Some(vec![1.0, 2.0]), long: Some(vec![3.0, 4.0]), all: None };
        let got = config(&file("phi3", &[("rope.scaling.attn_factor", Meta::F32(1.25))]), both).unwrap();
        let scaling = json!({"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0], "attention_factor": 1.25});
        assert_eq!(got["rope_scaling"], scaling);
    }

    #[test]
    fn what_a_file_must_say_is_asked_for_by_name() {
        for (architecture, more, words) in [
            ("bert", vec![], "bert.attention.causal is not false"),
            (
                "gemma3",
                vec![("attention.sliding_window_pattern", Meta::texts(["a".into()]))],
                "sliding_window_pattern lists no flag",
            ),
            ("gemma2", vec![("block_count", Meta::U32(4_000_000_000))], "more than 512"),
            ("gemma2", vec![("embedding_length", Meta::F32(1.0))], "gemma2.embedding_length is missing"),
        ] {
            let said = of(architecture, &more).unwrap_err();
            assert!(said.contains(words), "{said}");
        }
        let one = Factors { short: Some(vec![1.0]), ..Factors::default() };
        assert!(config(&file("phi3", &[]), one).unwrap_err().contains("rope_factors_long.weight"));
        assert_eq!(of("clip", &[]).unwrap(), json!({"model_type": "clip"}));
    }
}

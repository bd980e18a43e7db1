//! The `config.json` that a GGUF file's metadata amount to, for the architectures bitmill runs.

use super::{Gguf, Value as Meta};
use serde_json::{Value, json};

/// Architectures whose metadata are understood: their names are those of `model_type` too.
const ARCHITECTURES: [&str; 3] = ["llama", "qwen2", "qwen3"];

/// The configuration of the model in `gguf`. `factors` are the divisors of the rotary frequencies, where the file
/// carries them as a tensor. A file that is no model of a known architecture gets one that names its architecture and
/// nothing else, so that it can still be listed.
///
/// # Errors
/// A sentence on a key that is missing or malformed.
pub(crate) fn config(gguf: &Gguf, factors: Option<Vec<f32>>) -> Result<Value, String> {
    let architecture = gguf.get("general.architecture").and_then(Meta::text).unwrap_or("(none)");
    if !ARCHITECTURES.contains(&architecture) {
        return Ok(json!({"model_type": architecture}));
    }
    let key = |name: &str| format!("{architecture}.{name}");
    let missing = |name: &str| format!("the metadata key {} is missing or no single number", key(name));
    let optional = |name: &str| gguf.get(&key(name)).and_then(Meta::unsigned);
    let size = |name: &str| optional(name).ok_or_else(|| missing(name));
    let real = |name: &str| gguf.get(&key(name)).and_then(Meta::real);
    let heads = size("attention.head_count")?;
    let vocab = gguf.tensor("token_embd.weight").and_then(|t| t.shape.first().copied());
    let bias = gguf.tensor("blk.0.attn_q.bias").is_some();
    let mut config = json!({
        "model_type": architecture,
        "hidden_size": size("embedding_length")?,
        "num_hidden_layers": size("block_count")?,
        "intermediate_size": size("feed_forward_length")?,
        "num_attention_heads": heads,
        "num_key_value_heads": match gguf.get(&key("attention.head_count_kv")) {
            None => heads,
            Some(v) => v.unsigned().ok_or_else(|| missing("attention.head_count_kv"))?,
        },
        "rms_norm_eps": real("attention.layer_norm_rms_epsilon").ok_or_else(|| missing("attention.layer_norm_rms_epsilon"))?,
        "rope_theta": real("rope.freq_base").unwrap_or(10_000.0),
        "max_position_embeddings": size("context_length")?,
        "vocab_size": vocab.ok_or("the tensor token_embd.weight is missing")?,
        "tie_word_embeddings": gguf.tensor("output.weight").is_none(),
        "hidden_act": "silu",
    });
    if let Some(dim) = optional("attention.key_length") {
        config["head_dim"] = json!(dim);
    }
    if architecture != "qwen2" {
        config["attention_bias"] = json!(bias);
    }
    config["bos_token_id"] = json!(gguf.get("tokenizer.ggml.bos_token_id").and_then(Meta::unsigned));
    let factor = real("rope.scaling.factor");
    config["rope_scaling"] = match gguf.get(&key("rope.scaling.type")).and_then(Meta::text) {
        _ if factors.is_some() => json!({
            "rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0,
        }),
        None | Some("none") => Value::Null,
        Some(kind) => json!({
            "rope_type": kind, "factor": factor,
            "original_max_position_embeddings": optional("rope.scaling.original_context_length"),
        }),
    };
    Ok(config)
}

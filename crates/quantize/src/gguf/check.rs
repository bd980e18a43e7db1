//! What llama.cpp would run differently, or not at all: refused by name while planning, with its reason.

use super::ROPE_FACTORS;
use crate::Error;
use bitmill_calibrate::{Pooling, Sentences};
use bitmill_checkpoint::{Checkpoint, gguf};
use bitmill_models::{Act, ModelSpec, RopeKind};

/// Refuses a model that llama.cpp would not run as it is, and notes what it does otherwise.
pub(crate) fn check(input: &Checkpoint, spec: Option<&ModelSpec>, notes: &mut Vec<String>) -> Result<(), Error> {
    let refuse = |reason: String| Error::Gguf { dir: input.dir().into(), reason };
    let Some(spec) = spec else {
        return Err(refuse(
            "its architecture is none that is run here, and names and settings in the file depend on it".into(),
        ));
    };
    let Some(architecture) = gguf::architecture(&spec.model_type) else {
        let known: Vec<&str> = gguf::model_types().collect();
        return Err(refuse(format!(
            "{} models are not written as GGUF; those that are: {}",
            spec.model_type,
            known.join(", ")
        )));
    };
    let found = match architecture {
        "bert" => encoder(input, spec)?,
        "gemma" | "gemma2" | "gemma3" => gemma(architecture, spec),
        "phi3" => phi3(spec),
        _ => llama(architecture, input, spec),
    };
    if let Some(reason) = found.or_else(|| activation(architecture, spec)) {
        return Err(refuse(reason));
    }
    let windowed = matches!(architecture, "gemma2" | "gemma3");
    if let Some(window) = spec.windows.iter().flatten().min().filter(|&&w| w < spec.max_positions && !windowed) {
        notes.push(format!(
            "llama.cpp runs this architecture without its sliding window: texts beyond {window} tokens differ"
        ));
    }
    let behind = |name: &str| !spec.causal && super::dropped(name, spec);
    if let Some(name) = input.names().find(|name| behind(name)) {
        notes.push(format!(
            "{name} and the like are left out: llama.cpp computes hidden states of this architecture alone"
        ));
    }
    if spec.model_type == "bert" && spec.act == Act::Gelu {
        notes.push("llama.cpp computes this architecture's GELU by its tanh approximation".into());
    }
    Ok(())
}

/// The activation that llama.cpp's graph of the architecture has built in.
fn activation(architecture: &str, spec: &ModelSpec) -> Option<String> {
    let (named, fits) = match architecture {
        "gemma" | "gemma2" | "gemma3" => ("the tanh approximation of GELU", spec.act == Act::GeluTanh),
        "bert" => ("GELU", matches!(spec.act, Act::Gelu | Act::GeluTanh)),
        _ => ("SiLU", spec.act == Act::Silu),
    };
    let wrong =
        || format!("its activation {:?} is not the one llama.cpp runs this architecture with ({named})", spec.act);
    (!fits).then(wrong)
}

fn llama(architecture: &str, input: &Checkpoint, spec: &ModelSpec) -> Option<String> {
    if architecture == "qwen3" && (spec.qkv_bias || spec.out_bias) {
        return Some("llama.cpp's qwen3 has no biases".into());
    }
    // A file that carries factors carries all there is to know.
    let factors = input.gguf().is_some() && input.contains(ROPE_FACTORS);
    let scaled = matches!(spec.rope().map(|r| &r.kind), Some(RopeKind::Dynamic { .. } | RopeKind::LongRope { .. }));
    (scaled && !factors).then(|| "llama.cpp has no dynamic or longrope scaling for this architecture".into())
}

fn gemma(architecture: &str, spec: &ModelSpec) -> Option<String> {
    if spec.qkv_bias || spec.out_bias {
        return Some(format!("llama.cpp's {architecture} has no biases"));
    }
    if architecture != "gemma3" && !spec.tied {
        return Some(format!(
            "llama.cpp's {architecture} takes the embedding for the output matrix, and this model has one of its own"
        ));
    }
    for (rope, window) in spec.ropes.iter().zip(&spec.windows) {
        let own = architecture == "gemma3" && window.is_some();
        let plain = match rope.as_ref().map(|rope| &rope.kind) {
            Some(RopeKind::Default) => true,
            Some(RopeKind::Linear { .. }) => !own,
            _ => false,
        };
        if !plain {
            let of = if own { "windowed blocks" } else { "blocks" };
            let kinds = if own { "none" } else { "none or a linear one" };
            return Some(format!(
                "its {of} scale rotary frequencies in a way that llama.cpp's {architecture} does not; it has {kinds}"
            ));
        }
    }
    if architecture == "gemma" {
        return None;
    }
    if architecture == "gemma2" && (spec.factors.attention_cap.is_none() || spec.factors.logit_cap.is_none()) {
        return Some("llama.cpp's gemma2 bounds scores and logits, and this model does not".into());
    }
    let scale = spec.factors.attention.unwrap_or((spec.head_dim as f64).powf(-0.5));
    let [layers, hidden, heads, dim] = [spec.layers, spec.hidden, spec.heads, spec.head_dim].map(|n| n as u64);
    let built_in = (gguf::query_scalar(architecture, layers, [hidden, heads], dim) as f64).powf(-0.5);
    ((scale / built_in - 1.0).abs() > 1e-6).then(|| {
        format!(
            "its query_pre_attn_scalar is {:.6}, and llama.cpp's {architecture} of {} blocks has {:.6} built in",
            scale.powi(-2),
            spec.layers,
            built_in.powi(-2)
        )
    })
}

fn phi3(spec: &ModelSpec) -> Option<String> {
    if spec.heads * spec.head_dim != spec.hidden {
        let (heads, dim, hidden) = (spec.heads, spec.head_dim, spec.hidden);
        return Some(format!(
            "its {heads} heads of {dim} channels are not the {hidden} that llama.cpp's phi3 takes them for"
        ));
    }
    None
}

fn encoder(input: &Checkpoint, spec: &ModelSpec) -> Result<Option<String>, Error> {
    if spec.token_types == 0 {
        return Ok(Some("llama.cpp's bert has token types, and this model has none".into()));
    }
    Ok(match Sentences::stated(input)? {
        Some(Pooling::Max) => Some("it pools by the largest value of each channel, which llama.cpp does not".into()),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitmill_models::spec;
    use serde_json::{Value, json};

    /// The reason for which a config is refused.
    fn said(changes: &Value) -> String {
        let mut config = json!({
            "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 32, "query_pre_attn_scalar": 16,
            "max_position_embeddings": 128,
        });
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        let model = Checkpoint::in_memory(config.clone(), b"\x02\0\0\0\0\0\0\0{}".to_vec()).unwrap();
        let mut notes = Vec::new();
        match check(&model, Some(&spec(&config).unwrap()), &mut notes) {
            Ok(()) => format!("fits {}", notes.join("; ")),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn what_llama_cpp_computes_otherwise_is_refused_by_name() {
        let yarn = json!({"rope_type": "yarn", "factor": 2.0});
        let linear = json!({"rope_type": "linear", "factor": 2.0});
        let ropes = json!({
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        });
        for (changes, words) in [
            (json!({"model_type": "gemma"}), "fits"),
            (json!({"model_type": "gemma", "rope_scaling": linear}), "fits"),
            (json!({"model_type": "gemma", "rope_scaling": yarn}), "scale rotary frequencies"),
            (json!({"model_type": "gemma", "hidden_activation": "silu", "hidden_act": "silu"}), "Silu"),
            (json!({"model_type": "gemma", "tie_word_embeddings": false}), "output matrix"),
            (json!({"model_type": "gemma2"}), "fits"),
            (json!({"model_type": "gemma2", "tie_word_embeddings": false}), "output matrix"),
            (json!({"model_type": "gemma2", "attention_bias": true}), "no biases"),
            (json!({"model_type": "gemma2", "final_logit_softcapping": null}), "bounds scores and logits"),
            (json!({"model_type": "gemma2", "query_pre_attn_scalar": 256}), "query_pre_attn_scalar is 256"),
            (json!({"model_type": "gemma2", "num_hidden_layers": 46}), "fits"),
            (json!({"model_type": "gemma2", "num_hidden_layers": 46, "head_dim": 32}), "fits"),
            (json!({"model_type": "gemma3_text", "tie_word_embeddings": false}), "fits"),
            (json!({"model_type": "gemma3_text", "rope_scaling": linear}), "fits"),
            (json!({"model_type": "gemma3_text", "rope_parameters": ropes}), "windowed blocks"),
            (json!({"model_type": "gemma3_text", "hidden_activation": "gelu"}), "Gelu"),
            (json!({"model_type": "phi3"}), "fits"),
            (json!({"model_type": "phi3", "head_dim": 32}), "heads of 32"),
            (json!({"model_type": "phi3", "sliding_window": 40}), "beyond 40 tokens"),
            (json!({"model_type": "bert"}), "tanh approximation"),
            (json!({"model_type": "bert", "hidden_act": "gelu_new"}), "fits"),
            (json!({"model_type": "bert", "hidden_act": "relu"}), "Relu"),
            (
                json!({"model_type": "granite"}),
                "those that are: llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text, phi3, bert",
            ),
        ] {
            let said = said(&changes);
            assert!(said.contains(words), "{changes}: {said}");
        }
    }
}

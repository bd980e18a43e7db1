//! Names: what GGUF calls the architectures bitmill runs and their tensors, and which of these lie there otherwise than
//! in a model folder: in another row order, or with one added.

/// How GGUF calls the tensors of a family of models.
struct Names {
    /// What stands before the number of a block in a folder; in GGUF it is `blk.`.
    blocks: &'static str,
    /// Modules inside of a block: in a folder, in GGUF.
    block: &'static [(&'static str, &'static str)],
    /// Modules outside of blocks.
    ends: &'static [(&'static str, &'static str)],
}

const DECODER_ENDS: &[(&str, &str)] =
    &[("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];

/// Decoders in the manner of Llama.
static LLAMA: Names = Names {
    blocks: "model.layers.",
    block: &[
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ],
    ends: DECODER_ENDS,
};

/// Gemma 2 and 3, which have norms behind attention and MLP too.
static SANDWICH: Names = Names {
    blocks: "model.layers.",
    block: &[
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("post_attention_layernorm", "post_attention_norm"),
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
    ],
    ends: DECODER_ENDS,
};

/// Phi-3, which stores Q, K and V as one linear and both branches of the MLP as another.
static FUSED: Names = Names {
    blocks: "model.layers.",
    block: &[
        ("input_layernorm", "attn_norm"),
        ("self_attn.qkv_proj", "attn_qkv"),
        ("self_attn.o_proj", "attn_output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ],
    ends: DECODER_ENDS,
};

static BERT: Names = Names {
    blocks: "encoder.layer.",
    block: &[
        ("attention.self.query", "attn_q"),
        ("attention.self.key", "attn_k"),
        ("attention.self.value", "attn_v"),
        ("attention.output.dense", "attn_output"),
        ("attention.output.LayerNorm", "attn_output_norm"),
        ("intermediate.dense", "ffn_up"),
        ("output.dense", "ffn_down"),
        ("output.LayerNorm", "layer_output_norm"),
    ],
    ends: &[
        ("embeddings.word_embeddings", "token_embd"),
        ("embeddings.position_embeddings", "position_embd"),
        ("embeddings.token_type_embeddings", "token_types"),
        ("embeddings.LayerNorm", "token_embd_norm"),
    ],
};

/// Values of `model_type`, GGUF's name of the architecture, and the names of its tensors. The first row of an architecture
/// says what a file of it becomes as a folder.
static ARCHITECTURES: &[(&str, &str, &Names)] = &[
    ("llama", "llama", &LLAMA),
    ("mistral", "llama", &LLAMA),
    ("qwen2", "qwen2", &LLAMA),
    ("qwen3", "qwen3", &LLAMA),
    ("gemma", "gemma", &LLAMA),
    ("gemma2", "gemma2", &SANDWICH),
    ("gemma3_text", "gemma3", &SANDWICH),
    ("phi3", "phi3", &FUSED),
    ("bert", "bert", &BERT),
];

/// Values of `model_type` that GGUF files are read and written of.
pub fn model_types() -> impl Iterator<Item = &'static str> {
    ARCHITECTURES.iter().map(|(model_type, ..)| *model_type)
}

/// GGUF's name of the architecture that a folder calls `model_type`.
#[must_use]
pub fn architecture(model_type: &str) -> Option<&'static str> {
    ARCHITECTURES.iter().find(|(own, ..)| *own == model_type).map(|(_, architecture, _)| *architecture)
}

/// What a folder calls an architecture of GGUF.
pub(crate) fn model_type(architecture: &str) -> Option<&'static str> {
    ARCHITECTURES.iter().find(|(_, own, _)| *own == architecture).map(|(model_type, ..)| *model_type)
}

/// Names of an architecture of GGUF; of one that is not known here, those that most share.
fn names(architecture: &str) -> &'static Names {
    ARCHITECTURES.iter().find(|(_, own, _)| *own == architecture).map_or(&LLAMA, |(.., names)| names)
}

/// GGUF's name of the tensor `name` of a model folder; `None` for one that GGUF has no name for.
#[must_use]
pub fn gguf_name(architecture: &str, name: &str) -> Option<String> {
    let names = names(architecture);
    // Folders with a task's head put the family's name first, and those of TensorFlow's time call the parts of norms by letters.
    let name = if architecture == "bert" { name.strip_prefix("bert.").unwrap_or(name) } else { name };
    let (module, end) = name.rsplit_once('.')?;
    let end = match end {
        "weight" | "bias" => end,
        "gamma" if architecture == "bert" => "weight",
        "beta" if architecture == "bert" => "bias",
        _ => return None,
    };
    if let Some((_, gguf)) = names.ends.iter().find(|(hf, _)| *hf == module) {
        return Some(format!("{gguf}.{end}"));
    }
    let (layer, module) = module.strip_prefix(names.blocks)?.split_once('.')?;
    layer.parse::<u32>().ok()?;
    let (_, gguf) = names.block.iter().find(|(hf, _)| *hf == module)?;
    Some(format!("blk.{layer}.{gguf}.{end}"))
}

/// The name in a model folder of GGUF's tensor `name`; `None` for one that a folder does not have.
#[must_use]
pub fn hf_name(architecture: &str, name: &str) -> Option<String> {
    let names = names(architecture);
    let (module, end) = name.rsplit_once('.').filter(|(_, end)| matches!(*end, "weight" | "bias"))?;
    if let Some((hf, _)) = names.ends.iter().find(|(_, gguf)| *gguf == module) {
        return Some(format!("{hf}.{end}"));
    }
    let (layer, module) = module.strip_prefix("blk.")?.split_once('.')?;
    layer.parse::<u32>().ok()?;
    let (hf, _) = names.block.iter().find(|(_, gguf)| *gguf == module)?;
    Some(format!("{}{layer}.{hf}.{end}", names.blocks))
}

/// Heads of the tensor `name` (as a folder calls it) whose rows GGUF has pairwise interleaved: queries and keys of
/// architecture `llama`, whose rotary embedding turns neighbouring rows there and the halves of a head in a folder. Row
/// `2i` of a head in GGUF is row `i` of the folder, row `2i + 1` is row `i + D/2`.
#[must_use]
pub fn interleaved_heads(architecture: &str, name: &str, heads: usize, kv_heads: usize) -> Option<usize> {
    let projection =
        |end: &str| ["weight", "bias"].iter().any(|kind| name.ends_with(&format!(".self_attn.{end}.{kind}")));
    match architecture {
        "llama" if projection("q_proj") => Some(heads),
        "llama" if projection("k_proj") => Some(kv_heads),
        _ => None,
    }
}

/// Whether the tensor `name` (as a folder calls it) is the weight of a norm that a folder has as its difference from one
/// and GGUF as it is: all norms of Gemma.
#[must_use]
pub fn lacks_one(architecture: &str, name: &str) -> bool {
    matches!(architecture, "gemma" | "gemma2" | "gemma3") && name.ends_with("norm.weight")
}

/// Whether GGUF's tensor `name` is one that llama.cpp adds to vectors, which wants plain f32.
#[must_use]
pub fn always_f32(name: &str) -> bool {
    matches!(name, "position_embd.weight" | "token_types.weight")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for (architecture, hf, gguf) in [
            ("llama", "model.layers.12.self_attn.q_proj.bias", "blk.12.attn_q.bias"),
            ("qwen3", "model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
            ("llama", "lm_head.weight", "output.weight"),
            ("gemma", "model.embed_tokens.weight", "token_embd.weight"),
            ("gemma", "model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
            ("gemma2", "model.layers.0.post_attention_layernorm.weight", "blk.0.post_attention_norm.weight"),
            ("gemma3", "model.layers.3.pre_feedforward_layernorm.weight", "blk.3.ffn_norm.weight"),
            ("gemma3", "model.layers.3.post_feedforward_layernorm.weight", "blk.3.post_ffw_norm.weight"),
            ("gemma3", "model.layers.3.self_attn.k_norm.weight", "blk.3.attn_k_norm.weight"),
            ("phi3", "model.layers.1.self_attn.qkv_proj.weight", "blk.1.attn_qkv.weight"),
            ("phi3", "model.layers.1.mlp.gate_up_proj.weight", "blk.1.ffn_up.weight"),
            ("bert", "embeddings.token_type_embeddings.weight", "token_types.weight"),
            ("bert", "embeddings.LayerNorm.bias", "token_embd_norm.bias"),
            ("bert", "encoder.layer.5.attention.output.LayerNorm.weight", "blk.5.attn_output_norm.weight"),
            ("bert", "encoder.layer.5.output.LayerNorm.bias", "blk.5.layer_output_norm.bias"),
            ("bert", "encoder.layer.5.intermediate.dense.bias", "blk.5.ffn_up.bias"),
        ] {
            assert_eq!(gguf_name(architecture, hf).as_deref(), Some(gguf));
            assert_eq!(hf_name(architecture, gguf).as_deref(), Some(hf));
        }
        let old = "bert.encoder.layer.1.output.LayerNorm.gamma";
        assert_eq!(gguf_name("bert", old).as_deref(), Some("blk.1.layer_output_norm.weight"));
        for (architecture, unknown) in [
            ("llama", "model.layers.x.mlp.up_proj.weight"),
            ("llama", "model.layers.0.mlp.up_proj.scale"),
            ("llama", "model.norm.gamma"),
            ("llama", "bert.model.norm.weight"),
            ("llama", "vision.weight"),
            ("llama", "a"),
            ("phi3", "model.layers.0.mlp.up_proj.weight"),
            ("bert", "pooler.dense.weight"),
        ] {
            assert_eq!(gguf_name(architecture, unknown), None, "{unknown}");
        }
        assert_eq!(hf_name("llama", "rope_freqs.weight"), None);
        assert_eq!(hf_name("phi3", "rope_factors_long.weight"), None);
    }

    #[test]
    fn what_lies_otherwise_is_told_by_name() {
        assert_eq!(interleaved_heads("llama", "model.layers.0.self_attn.k_proj.weight", 8, 2), Some(2));
        assert_eq!(interleaved_heads("qwen2", "model.layers.0.self_attn.k_proj.weight", 8, 2), None);
        assert_eq!(interleaved_heads("llama", "model.layers.0.self_attn.v_proj.weight", 8, 2), None);
        assert!(
            lacks_one("gemma", "model.norm.weight") && lacks_one("gemma3", "model.layers.0.self_attn.q_norm.weight")
        );
        assert!(lacks_one("gemma2", "model.layers.0.post_feedforward_layernorm.weight"));
        assert!(!lacks_one("llama", "model.norm.weight") && !lacks_one("gemma2", "model.embed_tokens.weight"));
        assert_eq!((architecture("mistral"), model_type("llama")), (Some("llama"), Some("llama")));
        assert_eq!((architecture("gemma3_text"), model_type("gemma3")), (Some("gemma3"), Some("gemma3_text")));
        assert_eq!((architecture("gemma3"), model_type("clip")), (None, None));
    }
}

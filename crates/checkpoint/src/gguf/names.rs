//! Names: what GGUF calls the tensors of the architectures bitmill runs, and which of them lie in another row order.

/// Ends of the tensors of block N: in a model folder after `model.layers.N.`, in GGUF after `blk.N.`.
const BLOCK: &[(&str, &str)] = &[
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
];

/// Modules outside of blocks.
const ENDS: &[(&str, &str)] =
    &[("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];

/// GGUF's name of the tensor `name` of a model folder; `None` for one that GGUF has no name for.
#[must_use]
pub fn gguf_name(name: &str) -> Option<String> {
    let (module, end) = name.rsplit_once('.').filter(|(_, end)| matches!(*end, "weight" | "bias"))?;
    if let Some((_, gguf)) = ENDS.iter().find(|(hf, _)| *hf == module) {
        return Some(format!("{gguf}.{end}"));
    }
    let (layer, module) = module.strip_prefix("model.layers.")?.split_once('.')?;
    layer.parse::<u32>().ok()?;
    let (_, gguf) = BLOCK.iter().find(|(hf, _)| *hf == module)?;
    Some(format!("blk.{layer}.{gguf}.{end}"))
}

/// The name in a model folder of GGUF's tensor `name`; `None` for one that a folder does not have.
#[must_use]
pub fn hf_name(name: &str) -> Option<String> {
    let (module, end) = name.rsplit_once('.').filter(|(_, end)| matches!(*end, "weight" | "bias"))?;
    if let Some((hf, _)) = ENDS.iter().find(|(_, gguf)| *gguf == module) {
        return Some(format!("{hf}.{end}"));
    }
    let (layer, module) = module.strip_prefix("blk.")?.split_once('.')?;
    layer.parse::<u32>().ok()?;
    let (hf, _) = BLOCK.iter().find(|(_, gguf)| *gguf == module)?;
    Some(format!("model.layers.{layer}.{hf}.{end}"))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for (hf, gguf) in [
            ("model.layers.12.self_attn.q_proj.bias", "blk.12.attn_q.bias"),
            ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
            ("lm_head.weight", "output.weight"),
            ("model.embed_tokens.weight", "token_embd.weight"),
        ] {
            assert_eq!(gguf_name(hf).as_deref(), Some(gguf));
            assert_eq!(hf_name(gguf).as_deref(), Some(hf));
        }
        for unknown in ["model.layers.x.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.scale", "vision.weight", "a"] {
            assert_eq!(gguf_name(unknown), None);
        }
        assert_eq!(hf_name("rope_freqs.weight"), None);
        assert_eq!(interleaved_heads("llama", "model.layers.0.self_attn.k_proj.weight", 8, 2), Some(2));
        assert_eq!(interleaved_heads("qwen2", "model.layers.0.self_attn.k_proj.weight", 8, 2), None);
        assert_eq!(interleaved_heads("llama", "model.layers.0.self_attn.v_proj.weight", 8, 2), None);
    }
}

//! Which tensors a family of checkpoints has, and how it spells them.
//!
//! A [`Layout`] is a constant table: what it does not list, the family does not have. Sizes and variants of one model
//! are the [`crate::ModelSpec`]'s.

use crate::{NormRole, Role};

/// The tensor of token embeddings of a decoder, `[vocab, hidden]`.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The tensor of a decoder's norm after the last block, `[hidden]`.
pub const FINAL_NORM: &str = "model.norm.weight";
/// The module of a decoder's output head, `[vocab, hidden]`.
pub const HEAD: &str = "lm_head";

/// The modules of a family. Names are relative to the prefix of the [`Spelling`] in use.
#[derive(Debug, PartialEq, Eq)]
pub struct Layout {
    /// Spellings in use, most usual first.
    pub spellings: &'static [Spelling],
    /// What stands before the index of a block.
    pub blocks: &'static str,
    /// The linears of a block in execution order, with their modules inside it.
    pub linears: &'static [(Role, &'static str)],
    /// What stands in the place of the MLP in blocks that have experts.
    pub routed: Option<Routed>,
    /// The norms of a block in execution order, with their modules inside it.
    pub norms: &'static [(NormRole, &'static str)],
    /// Whether the first block lacks [`NormRole::Input`], since a norm stands behind the embeddings.
    pub first_bare: bool,
    /// Modules of the norms of queries and keys inside a block, used where the model has them.
    pub qk_norms: [&'static str; 2],
    /// In what order rows of Q, K and V lie where one linear stores them.
    pub fused: Fused,
    /// Whether linears are stored `[in, out]` as long as they are dense.
    pub transposed: bool,
    /// Buffers inside a block that exporters store and nothing here needs.
    pub buffers: &'static [(&'static str, Buffer)],
    /// What comes before the first block.
    pub entry: Entry,
    /// The module of the norm after the last block. Without a head it belongs to that block, as [`NormRole::MlpResidual`].
    pub final_norm: Option<&'static str>,
    /// The module of the output head, whatever the spelling; without one, a model's result is its hidden states.
    pub head: Option<&'static str>,
    /// What the names of a masked-language-model head begin with, and its linear over the vocabulary; such a head is carried
    /// along, not computed.
    pub task_head: Option<[&'static str; 2]>,
    /// A linear `[hidden, hidden]` over the first hidden state, which nothing here computes with.
    pub pooler: Option<&'static str>,
}

/// The modules of an MLP of experts, inside a block.
#[derive(Debug, PartialEq, Eq)]
pub struct Routed {
    /// The linear `[experts, hidden]` that says which experts a token goes to.
    pub router: &'static str,
    /// What stands before the index of an expert.
    pub experts: &'static str,
    /// Gate, up and down inside an expert.
    pub parts: [&'static str; 3],
    /// The expert that every token goes to, and the linear `[1, hidden]` that says how much of it counts, if not all does.
    pub shared: Option<(&'static str, Option<&'static str>)>,
    /// Whether other readers know dense experts of this family as stacks alone, and not as a matrix each.
    pub stacked: bool,
}

/// The tensors that make a residual stream of what a model reads.
#[derive(Debug, PartialEq, Eq)]
pub enum Entry {
    /// The embeddings of tokens, `[vocab, hidden]`, and what is added to them.
    Tokens(&'static str, Option<Added>),
    /// Patches of an image.
    Patches(Patched),
}

/// Patches of an image as tokens, behind one that stands for the whole of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Patched {
    /// The module that makes a token of each patch, a convolution whose stride is its size: `[hidden, channels, height, width]`.
    pub projection: &'static str,
    /// The token before them, `[1, 1, hidden]`.
    pub class: &'static str,
    /// The tensor of positions, `[1, 1 + patches, hidden]`.
    pub positions: &'static str,
    /// A token in the place of patches that training hides, `[1, 1, hidden]`; nothing here needs it.
    pub mask: &'static str,
}

/// Learned embeddings beside those of the tokens, and the norm of their sum; of a model that rotates, the norm alone.
#[derive(Debug, PartialEq, Eq)]
pub struct Added {
    /// The tensor of positions, `[positions, hidden]`.
    pub positions: Option<&'static str>,
    /// The tensor of token types, `[types, hidden]`.
    pub types: Option<&'static str>,
    /// The module of the norm.
    pub norm: Option<&'static str>,
    /// The row of position numbers that old exporters store, `[1, positions]`.
    pub position_ids: Option<&'static str>,
}

/// The order of rows in a linear that stores Q, K and V.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fused {
    /// All queries, then all keys, then all values.
    ByPart,
    /// Of each head its queries, its keys and its values.
    ByHead,
}

/// The shape of a buffer that is not needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Buffer {
    /// Rotary frequencies, half the rotated width.
    Frequencies,
    /// The causal mask, `[1, 1, positions, positions]`.
    Mask,
    /// One number.
    Number,
}

/// One way of writing the names of a layout.
#[derive(Debug, PartialEq, Eq)]
pub struct Spelling {
    /// What stands before every name.
    pub prefix: &'static str,
    /// What a norm calls its weight and its bias.
    pub norm: [&'static str; 2],
    /// The module of the output head, where it is not the layout's.
    pub head: Option<&'static str>,
}

/// The usual way of writing the parts of a norm.
const fn spelled(prefix: &'static str) -> Spelling {
    Spelling { prefix, norm: ["weight", "bias"], head: None }
}

const LLAMA: Layout = Layout {
    spellings: &[spelled("")],
    blocks: "model.layers.",
    linears: &[
        (Role::Q, "self_attn.q_proj"),
        (Role::K, "self_attn.k_proj"),
        (Role::V, "self_attn.v_proj"),
        (Role::O, "self_attn.o_proj"),
        (Role::Gate, "mlp.gate_proj"),
        (Role::Up, "mlp.up_proj"),
        (Role::Down, "mlp.down_proj"),
    ],
    routed: None,
    norms: &[(NormRole::Input, "input_layernorm"), (NormRole::PostAttention, "post_attention_layernorm")],
    first_bare: false,
    qk_norms: ["self_attn.q_norm", "self_attn.k_norm"],
    fused: Fused::ByPart,
    transposed: false,
    buffers: &[("self_attn.rotary_emb.inv_freq", Buffer::Frequencies)],
    entry: Entry::Tokens(EMBEDDING, None),
    final_norm: Some("model.norm"),
    head: Some(HEAD),
    task_head: None,
    pooler: None,
};

/// Decoders in the manner of Llama.
pub(crate) static DECODER: Layout = LLAMA;

/// Mixtral, which has experts in every block.
pub(crate) static MIXTRAL: Layout = Layout {
    linears: &[
        (Role::Q, "self_attn.q_proj"),
        (Role::K, "self_attn.k_proj"),
        (Role::V, "self_attn.v_proj"),
        (Role::O, "self_attn.o_proj"),
    ],
    routed: Some(Routed {
        router: "block_sparse_moe.gate",
        experts: "block_sparse_moe.experts.",
        parts: ["w1", "w3", "w2"],
        shared: None,
        stacked: false,
    }),
    ..LLAMA
};

/// What Qwen calls its experts.
const QWEN: Routed = Routed {
    router: "mlp.gate",
    experts: "mlp.experts.",
    parts: ["gate_proj", "up_proj", "down_proj"],
    shared: None,
    stacked: false,
};

/// Decoders in the manner of Llama with experts in some blocks.
pub(crate) static EXPERTS: Layout = Layout { routed: Some(QWEN), ..LLAMA };

/// The same with an expert more, which every token goes to.
pub(crate) static SHARED_EXPERT: Layout = Layout {
    routed: Some(Routed { shared: Some(("mlp.shared_expert", Some("mlp.shared_expert_gate"))), ..QWEN }),
    ..LLAMA
};

/// Llama 4, which calls an MLP or its experts a feed-forward. Models with a vision tower put `language_model.` before
/// everything.
pub(crate) static LLAMA4: Layout = Layout {
    spellings: &[spelled(""), Spelling { head: Some("language_model.lm_head"), ..spelled("language_model.") }],
    linears: &[
        (Role::Q, "self_attn.q_proj"),
        (Role::K, "self_attn.k_proj"),
        (Role::V, "self_attn.v_proj"),
        (Role::O, "self_attn.o_proj"),
        (Role::Gate, "feed_forward.gate_proj"),
        (Role::Up, "feed_forward.up_proj"),
        (Role::Down, "feed_forward.down_proj"),
    ],
    routed: Some(Routed {
        router: "feed_forward.router",
        experts: "feed_forward.experts.",
        shared: Some(("feed_forward.shared_expert", None)),
        stacked: true,
        ..QWEN
    }),
    ..LLAMA
};

/// Decoders in the manner of Llama with norms before and behind attention and MLP. What Llama calls the norm behind the attention is one here.
pub(crate) static SANDWICH: Layout = NORMS_AROUND;

/// The same inside a model with a vision tower, whose releases differ in where they put the name of the part for tokens.
pub(crate) static NESTED_SANDWICH: Layout = Layout {
    spellings: &[
        Spelling { head: Some("language_model.lm_head"), ..spelled("language_model.model.") },
        spelled("model.language_model."),
    ],
    blocks: "layers.",
    entry: Entry::Tokens("embed_tokens.weight", None),
    final_norm: Some("norm"),
    ..NORMS_AROUND
};

const NORMS_AROUND: Layout = Layout {
    norms: &[
        (NormRole::Input, "input_layernorm"),
        (NormRole::AttnOutput, "post_attention_layernorm"),
        (NormRole::PostAttention, "pre_feedforward_layernorm"),
        (NormRole::MlpOutput, "post_feedforward_layernorm"),
    ],
    ..LLAMA
};

/// The same with norms behind attention and MLP alone.
pub(crate) static POST_NORM: Layout = Layout {
    norms: &[(NormRole::AttnOutput, "post_attention_layernorm"), (NormRole::MlpOutput, "post_feedforward_layernorm")],
    ..LLAMA
};

/// Decoders in the manner of Llama that store Q, K and V as one, and Gate and Up.
pub(crate) static FUSED: Layout = Layout {
    linears: &[
        (Role::Qkv, "self_attn.qkv_proj"),
        (Role::O, "self_attn.o_proj"),
        (Role::GateUp, "mlp.gate_up_proj"),
        (Role::Down, "mlp.down_proj"),
    ],
    ..LLAMA
};

/// GPT-NeoX, which older releases of transformers gave another name of the head.
pub(crate) static NEOX: Layout = Layout {
    spellings: &[Spelling { head: Some("embed_out"), ..spelled("gpt_neox.") }, spelled("gpt_neox.")],
    blocks: "layers.",
    linears: &[
        (Role::Qkv, "attention.query_key_value"),
        (Role::O, "attention.dense"),
        (Role::Up, "mlp.dense_h_to_4h"),
        (Role::Down, "mlp.dense_4h_to_h"),
    ],
    fused: Fused::ByHead,
    buffers: &[
        ("attention.rotary_emb.inv_freq", Buffer::Frequencies),
        ("attention.bias", Buffer::Mask),
        ("attention.masked_bias", Buffer::Number),
    ],
    entry: Entry::Tokens("embed_in.weight", None),
    final_norm: Some("final_layer_norm"),
    ..LLAMA
};

/// GPT-2. The first release has no prefix.
pub(crate) static GPT2: Layout = Layout {
    spellings: &[spelled("transformer."), spelled("")],
    blocks: "h.",
    linears: &[
        (Role::Qkv, "attn.c_attn"),
        (Role::O, "attn.c_proj"),
        (Role::Up, "mlp.c_fc"),
        (Role::Down, "mlp.c_proj"),
    ],
    norms: &[(NormRole::Input, "ln_1"), (NormRole::PostAttention, "ln_2")],
    transposed: true,
    buffers: &[("attn.bias", Buffer::Mask), ("attn.masked_bias", Buffer::Number)],
    entry: Entry::Tokens(
        "wte.weight",
        Some(Added { positions: Some("wpe.weight"), types: None, norm: None, position_ids: None }),
    ),
    final_norm: Some("ln_f"),
    ..LLAMA
};

/// OPT. The first release lacks a part of the prefix.
pub(crate) static OPT: Layout = Layout {
    spellings: &[spelled("model.decoder."), spelled("decoder.")],
    blocks: "layers.",
    linears: &[
        (Role::Q, "self_attn.q_proj"),
        (Role::K, "self_attn.k_proj"),
        (Role::V, "self_attn.v_proj"),
        (Role::O, "self_attn.out_proj"),
        (Role::Up, "fc1"),
        (Role::Down, "fc2"),
    ],
    norms: &[(NormRole::Input, "self_attn_layer_norm"), (NormRole::PostAttention, "final_layer_norm")],
    buffers: &[],
    entry: Entry::Tokens(
        "embed_tokens.weight",
        Some(Added { positions: Some("embed_positions.weight"), types: None, norm: None, position_ids: None }),
    ),
    final_norm: Some("final_layer_norm"),
    ..LLAMA
};

/// RoBERTa: BERT's tensors under another prefix, and another head.
pub(crate) static ROBERTA: Layout = Layout {
    spellings: &[spelled(""), spelled("roberta.")],
    task_head: Some(["lm_head.", "lm_head.decoder"]),
    ..BERT_LIKE
};

/// ModernBERT: norms before attention and MLP, but for the first attention; Q, K and V stored as one linear, and the two
/// branches of the MLP. Models with a task's head put `model.` before everything else.
pub(crate) static MODERN_BERT: Layout = Layout {
    spellings: &[spelled("model."), spelled("")],
    blocks: "layers.",
    linears: &[(Role::Qkv, "attn.Wqkv"), (Role::O, "attn.Wo"), (Role::GateUp, "mlp.Wi"), (Role::Down, "mlp.Wo")],
    norms: &[(NormRole::Input, "attn_norm"), (NormRole::PostAttention, "mlp_norm")],
    first_bare: true,
    entry: Entry::Tokens(
        "embeddings.tok_embeddings.weight",
        Some(Added { positions: None, types: None, norm: Some("embeddings.norm"), position_ids: None }),
    ),
    final_norm: Some("final_norm"),
    task_head: Some(["head.", "decoder"]),
    pooler: None,
    ..BERT_LIKE
};

/// BERT. Models with a task's head put `bert.` before everything, and checkpoints that came from TensorFlow call the
/// parts of a norm gamma and beta.
pub(crate) static BERT: Layout = BERT_LIKE;

const BERT_LIKE: Layout = Layout {
    spellings: &[
        spelled(""),
        spelled("bert."),
        Spelling { prefix: "bert.", norm: ["gamma", "beta"], head: None },
        Spelling { prefix: "", norm: ["gamma", "beta"], head: None },
    ],
    blocks: "encoder.layer.",
    linears: &[
        (Role::Q, "attention.self.query"),
        (Role::K, "attention.self.key"),
        (Role::V, "attention.self.value"),
        (Role::O, "attention.output.dense"),
        (Role::Up, "intermediate.dense"),
        (Role::Down, "output.dense"),
    ],
    routed: None,
    norms: &[(NormRole::AttnResidual, "attention.output.LayerNorm"), (NormRole::MlpResidual, "output.LayerNorm")],
    first_bare: false,
    qk_norms: ["attention.self.q_norm", "attention.self.k_norm"],
    fused: Fused::ByPart,
    transposed: false,
    buffers: &[],
    entry: Entry::Tokens(
        "embeddings.word_embeddings.weight",
        Some(Added {
            positions: Some("embeddings.position_embeddings.weight"),
            types: Some("embeddings.token_type_embeddings.weight"),
            norm: Some("embeddings.LayerNorm"),
            position_ids: Some("embeddings.position_ids"),
        }),
    ),
    final_norm: None,
    head: None,
    task_head: Some(["cls.predictions.", "cls.predictions.decoder"]),
    pooler: Some("pooler.dense"),
};

/// ViT. Models with a task's head put `vit.` before everything else.
pub(crate) static VIT: Layout = Layout {
    spellings: &[spelled("vit."), spelled("")],
    linears: &[
        (Role::Q, "attention.attention.query"),
        (Role::K, "attention.attention.key"),
        (Role::V, "attention.attention.value"),
        (Role::O, "attention.output.dense"),
        (Role::Up, "intermediate.dense"),
        (Role::Down, "output.dense"),
    ],
    norms: &[(NormRole::Input, "layernorm_before"), (NormRole::PostAttention, "layernorm_after")],
    entry: Entry::Patches(Patched {
        projection: "embeddings.patch_embeddings.projection",
        class: "embeddings.cls_token",
        positions: "embeddings.position_embeddings",
        mask: "embeddings.mask_token",
    }),
    final_norm: Some("layernorm"),
    task_head: None,
    ..BERT_LIKE
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layout_lists_roles_once_in_execution_order() {
        for layout in [
            &DECODER,
            &MIXTRAL,
            &EXPERTS,
            &SHARED_EXPERT,
            &LLAMA4,
            &SANDWICH,
            &NESTED_SANDWICH,
            &POST_NORM,
            &FUSED,
            &NEOX,
            &GPT2,
            &OPT,
            &BERT,
            &ROBERTA,
            &MODERN_BERT,
            &VIT,
        ] {
            assert!(layout.linears.is_sorted_by(|a, b| a.0 < b.0), "{:?}", layout.linears);
            assert!(layout.norms.is_sorted_by(|a, b| a.0 < b.0), "{:?}", layout.norms);
            let mut names: Vec<&str> =
                layout.linears.iter().map(|l| l.1).chain(layout.norms.iter().map(|n| n.1)).collect();
            let all = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), all);
        }
        assert_eq!(DECODER.linears.len(), Role::ALL.iter().filter(|role| role.parts().len() == 1).count());
        assert_eq!(FINAL_NORM.strip_suffix(".weight"), DECODER.final_norm);
    }
}

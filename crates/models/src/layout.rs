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
    /// The norms of a block in execution order, with their modules inside it.
    pub norms: &'static [(NormRole, &'static str)],
    /// Modules of the norms of queries and keys inside a block, used where the model has them.
    pub qk_norms: [&'static str; 2],
    /// The tensor of token embeddings, `[vocab, hidden]`.
    pub tokens: &'static str,
    /// What is added to token embeddings.
    pub added: Option<Added>,
    /// The module of the norm after the last block.
    pub final_norm: Option<&'static str>,
    /// The module of the output head; without one, a model's result is its hidden states.
    pub head: Option<&'static str>,
    /// What the names of a masked-language-model head begin with; such a head is carried along, not computed.
    pub task_head: Option<&'static str>,
    /// A linear `[hidden, hidden]` over the first hidden state, which nothing here computes with.
    pub pooler: Option<&'static str>,
}

/// Learned embeddings beside those of the tokens, and the norm of their sum.
#[derive(Debug, PartialEq, Eq)]
pub struct Added {
    /// The tensor of positions, `[max_positions, hidden]`.
    pub positions: &'static str,
    /// The tensor of token types, `[types, hidden]`.
    pub types: &'static str,
    /// The module of the norm.
    pub norm: &'static str,
    /// The row of position numbers that old exporters store, `[1, max_positions]`.
    pub position_ids: &'static str,
}

/// One way of writing the names of a layout.
#[derive(Debug, PartialEq, Eq)]
pub struct Spelling {
    /// What stands before every name.
    pub prefix: &'static str,
    /// What a norm calls its weight and its bias.
    pub norm: [&'static str; 2],
}

/// Decoders in the manner of Llama.
pub(crate) static DECODER: Layout = Layout {
    spellings: &[Spelling { prefix: "", norm: ["weight", "bias"] }],
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
    norms: &[(NormRole::Input, "input_layernorm"), (NormRole::PostAttention, "post_attention_layernorm")],
    qk_norms: ["self_attn.q_norm", "self_attn.k_norm"],
    tokens: EMBEDDING,
    added: None,
    final_norm: Some("model.norm"),
    head: Some(HEAD),
    task_head: None,
    pooler: None,
};

/// BERT. Models with a task's head put `bert.` before everything, and checkpoints that came from TensorFlow call the
/// parts of a norm gamma and beta.
pub(crate) static BERT: Layout = Layout {
    spellings: &[
        Spelling { prefix: "", norm: ["weight", "bias"] },
        Spelling { prefix: "bert.", norm: ["weight", "bias"] },
        Spelling { prefix: "bert.", norm: ["gamma", "beta"] },
        Spelling { prefix: "", norm: ["gamma", "beta"] },
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
    norms: &[(NormRole::AttnResidual, "attention.output.LayerNorm"), (NormRole::MlpResidual, "output.LayerNorm")],
    qk_norms: ["attention.self.q_norm", "attention.self.k_norm"],
    tokens: "embeddings.word_embeddings.weight",
    added: Some(Added {
        positions: "embeddings.position_embeddings.weight",
        types: "embeddings.token_type_embeddings.weight",
        norm: "embeddings.LayerNorm",
        position_ids: "embeddings.position_ids",
    }),
    final_norm: None,
    head: None,
    task_head: Some("cls.predictions."),
    pooler: Some("pooler.dense"),
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layout_lists_roles_once_in_execution_order() {
        for layout in [&DECODER, &BERT] {
            assert!(layout.linears.is_sorted_by(|a, b| a.0 < b.0), "{:?}", layout.linears);
            assert!(layout.norms.is_sorted_by(|a, b| a.0 < b.0), "{:?}", layout.norms);
            let mut names: Vec<&str> =
                layout.linears.iter().map(|l| l.1).chain(layout.norms.iter().map(|n| n.1)).collect();
            let all = names.len();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), all);
        }
        assert_eq!(DECODER.linears.len(), Role::ALL.len());
        assert_eq!(FINAL_NORM.strip_suffix(".weight"), DECODER.final_norm);
    }
}

//! A model as data: sizes, variants, and the name and shape of every tensor.

use crate::{NormRole, Role, Rope};

/// The tensor of token embeddings, `[vocab, hidden]`.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The tensor of the norm after the last block, `[hidden]`.
pub const FINAL_NORM: &str = "model.norm.weight";
/// The module of the output head, `[vocab, hidden]`.
pub const HEAD: &str = "lm_head";

/// The activation of the gated MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// `x · sigmoid(x)`.
    Silu,
    /// `x · Φ(x)` by the error function.
    Gelu,
    /// The tanh approximation of [`Act::Gelu`].
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
}

/// Everything the forward pass must know about a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// `model_type` of the config.
    pub model_type: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the MLP.
    pub intermediate: usize,
    /// Number of decoder blocks.
    pub layers: usize,
    /// Rows of the embedding and of the head.
    pub vocab: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Added to the mean square inside every RMS norm.
    pub norm_eps: f64,
    /// Rotary position embedding.
    pub rope: Rope,
    /// For each block, how many latest positions (its own included) a token attends to; `None` is all of them.
    pub windows: Vec<Option<usize>>,
    /// Whether Q, K and V have biases.
    pub qkv_bias: bool,
    /// Whether O has a bias.
    pub out_bias: bool,
    /// Whether the linears of the MLP have biases.
    pub mlp_bias: bool,
    /// Whether queries and keys are normed per head before the rotary embedding.
    pub qk_norm: bool,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// The activation of the MLP.
    pub act: Act,
    /// Context length the model was made for.
    pub max_positions: usize,
    /// The token a text begins with, where the config names one.
    pub bos: Option<u32>,
}

/// A tensor the architecture owns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSlot {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Whether the forward pass does without it: buffers of old exporters, a head beside tied embeddings.
    pub optional: bool,
}

impl ModelSpec {
    /// Query heads that share one key-value head.
    #[must_use]
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Module name of `role` in block `block`: `model.layers.0.self_attn.q_proj`.
    #[must_use]
    pub fn module(&self, block: usize, role: Role) -> String {
        format!("model.layers.{block}.{}", role.module())
    }

    /// Tensor name of the weight of `norm` in block `block`.
    #[must_use]
    pub fn norm(&self, block: usize, norm: NormRole) -> String {
        format!("model.layers.{block}.{}.weight", norm.module())
    }

    /// Tensor names of the norms of queries and keys in block `block`, used where [`ModelSpec::qk_norm`] is set.
    #[must_use]
    pub fn qk_norms(&self, block: usize) -> [String; 2] {
        ["q_norm", "k_norm"].map(|norm| format!("model.layers.{block}.self_attn.{norm}.weight"))
    }

    /// The linears of block `block`, in execution order, with their module names.
    #[must_use]
    pub fn block_linears(&self, block: usize) -> Vec<(Role, String)> {
        Role::ALL.iter().map(|&role| (role, self.module(block, role))).collect()
    }

    /// Shape `[out, in]` of a linear.
    #[must_use]
    pub fn linear_shape(&self, role: Role) -> [usize; 2] {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        match role {
            Role::Q => [q, self.hidden],
            Role::K | Role::V => [kv, self.hidden],
            Role::O => [self.hidden, q],
            Role::Gate | Role::Up => [self.intermediate, self.hidden],
            Role::Down => [self.hidden, self.intermediate],
        }
    }

    /// Whether a linear has a bias.
    #[must_use]
    pub fn has_bias(&self, role: Role) -> bool {
        match role {
            Role::Q | Role::K | Role::V => self.qkv_bias,
            Role::O => self.out_bias,
            Role::Gate | Role::Up | Role::Down => self.mlp_bias,
        }
    }

    /// The tensors of block `block` as a dense checkpoint stores them, each once.
    #[must_use]
    pub fn block_tensors(&self, block: usize) -> Vec<TensorSlot> {
        let mut slots = Vec::new();
        for (role, module) in self.block_linears(block) {
            let shape = self.linear_shape(role);
            slots.push(TensorSlot::new(format!("{module}.weight"), &shape));
            if self.has_bias(role) {
                slots.push(TensorSlot::new(format!("{module}.bias"), &shape[..1]));
            }
        }
        for norm in NormRole::ALL {
            slots.push(TensorSlot::new(self.norm(block, norm), &[self.hidden]));
        }
        if self.qk_norm {
            slots.extend(self.qk_norms(block).map(|name| TensorSlot::new(name, &[self.head_dim])));
        }
        let rotary = format!("model.layers.{block}.self_attn.rotary_emb.inv_freq");
        slots.push(TensorSlot { optional: true, ..TensorSlot::new(rotary, &[self.head_dim / 2]) });
        slots
    }

    /// Every tensor the architecture owns, each once: embedding, blocks in order, final norm, head.
    #[must_use]
    pub fn tensors(&self) -> Vec<TensorSlot> {
        let mut slots = vec![TensorSlot::new(EMBEDDING.into(), &[self.vocab, self.hidden])];
        slots.extend((0..self.layers).flat_map(|block| self.block_tensors(block)));
        slots.push(TensorSlot::new(FINAL_NORM.into(), &[self.hidden]));
        slots.push(TensorSlot {
            optional: self.tied,
            ..TensorSlot::new(format!("{HEAD}.weight"), &[self.vocab, self.hidden])
        });
        slots
    }
}

impl TensorSlot {
    fn new(name: String, shape: &[usize]) -> Self {
        TensorSlot { name, shape: shape.to_vec(), optional: false }
    }
}

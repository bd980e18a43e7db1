//! A model as data: sizes, variants, and the names of its parts.

use crate::layout::{Entry, Fused, Layout, Spelling};
use crate::{Absorb, Expert, NormKind, NormRole, Pairs, Role, Rope, SITES, Site};
use std::ops::Range;

/// The activation of the MLP: of its gate, or of its only branch.
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

/// What the norms of queries and keys take in at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// One head, `[head_dim]`.
    Head,
    /// All heads together, `[heads · head_dim]` and `[kv_heads · head_dim]`.
    Whole,
    /// One head, without a weight, in blocks that rotate.
    Bare,
}

/// Factors and bounds between the parts of a model; in most models there are none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Factors {
    /// Of token embeddings.
    pub embedding: f64,
    /// Of the products of queries and keys; `None` is `head_dim^−½`.
    pub attention: Option<f64>,
    /// Of what attention and MLP add to the residual stream.
    pub residual: f64,
    /// Of the logits.
    pub logits: f64,
    /// Scores of the attention go through `c · tanh(x / c)` before the soft-max.
    pub attention_cap: Option<f64>,
    /// So do logits, after their factor.
    pub logit_cap: Option<f64>,
}

impl Factors {
    /// No factors and no bounds.
    pub const NONE: Factors =
        Factors { embedding: 1.0, attention: None, residual: 1.0, logits: 1.0, attention_cap: None, logit_cap: None };
}

/// A factor of queries that grows with their position (arXiv 2501.19399), in blocks that do not rotate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tempering {
    /// Positions after which it grows.
    pub floor: f64,
    /// How fast.
    pub scale: f64,
}

impl Tempering {
    /// `1 + scale · ln(1 + ⌊(position + 1) / floor⌋)`, in f32 as the reference.
    #[must_use]
    pub fn factor(self, position: usize) -> f32 {
        ((position as f32 + 1.0) / self.floor as f32).floor().ln_1p() * self.scale as f32 + 1.0
    }
}

/// How much an expert counts for a token that goes to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weighing {
    /// As much as its probability by a soft-max of all scores; a factor of what it puts out.
    Probability,
    /// As much as its share of the probabilities of the chosen; a factor of what it puts out.
    Share,
    /// As much as the sigmoid of its score; a factor of what it reads.
    Sigmoid,
}

/// Experts, and how tokens are dealt out to them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Routing {
    /// Experts to choose from.
    pub experts: usize,
    /// How many of them a token goes to.
    pub chosen: usize,
    /// How much each of them counts.
    pub weighing: Weighing,
    /// Width inside an expert.
    pub intermediate: usize,
    /// Width inside the expert that every token goes to; 0 where there is none.
    pub shared: usize,
    /// For each block, whether experts stand in the place of its MLP.
    pub blocks: Vec<bool>,
}

/// The images a model reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Images {
    /// Colours.
    pub channels: usize,
    /// Height and width.
    pub size: [usize; 2],
    /// Height and width of a patch. What is left at the lower and the right edge is not looked at.
    pub patch: [usize; 2],
}

impl Images {
    /// Patches of an image, row after row.
    #[must_use]
    pub fn patches(&self) -> usize {
        (self.size[0] / self.patch[0]) * (self.size[1] / self.patch[1])
    }

    /// Shape of an image: `[channels, height, width]`.
    #[must_use]
    pub fn shape(&self) -> [usize; 3] {
        [self.channels, self.size[0], self.size[1]]
    }
}

/// Everything the forward pass must know about a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// `model_type` of the config.
    pub model_type: String,
    /// The tensors there are.
    pub layout: &'static Layout,
    /// How their names are written.
    pub spelling: &'static Spelling,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the MLP; of experts, it is [`Routing`]'s.
    pub intermediate: usize,
    /// Experts in the place of the MLP.
    pub routing: Option<Routing>,
    /// Number of blocks.
    pub layers: usize,
    /// Rows of the embedding and of the head; 0 of a model that reads no tokens.
    pub vocab: usize,
    /// What it reads in the place of tokens.
    pub images: Option<Images>,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// The kind of every norm.
    pub norm: NormKind,
    /// Added under the root of every norm.
    pub norm_eps: f64,
    /// What the stored weights of norms lack: 1 where they are written as differences from one.
    pub norm_offset: f32,
    /// For each block, its rotary position embedding; `None` where it has none.
    pub ropes: Vec<Option<Rope>>,
    /// Which channels they rotate together.
    pub pairs: Pairs,
    /// A factor of queries that grows with their position.
    pub tempering: Option<Tempering>,
    /// The row of the first position, where positions have learned embeddings.
    pub position_offset: usize,
    /// The token that fills up texts, where it is left out in counting positions; its own is the one before the first.
    pub padding: Option<u32>,
    /// Kinds of tokens with an embedding of their own; 0 where tokens have no kinds.
    pub token_types: usize,
    /// Whether a token attends to what came before it only.
    pub causal: bool,
    /// For each block, how many latest positions (its own included) a causal token attends to, any other token as many to
    /// either side; `None` is all of them.
    pub windows: Vec<Option<usize>>,
    /// Whether windows lie side by side, so that a token sees what came before it in its own, and do not move with the token.
    pub chunked: bool,
    /// Whether Q, K and V have biases.
    pub qkv_bias: bool,
    /// Whether O has a bias.
    pub out_bias: bool,
    /// Whether the linears of the MLP have biases.
    pub mlp_bias: bool,
    /// Norms of queries and keys, before the rotary embedding (to one of whole heads the order is the same).
    pub qk_norm: Option<QkNorm>,
    /// Whether the MLP reads what the attention reads, and not what it leaves.
    pub parallel: bool,
    /// Factors and bounds between the parts.
    pub factors: Factors,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// The activation of the MLP.
    pub act: Act,
    /// Context length the model was made for.
    pub max_positions: usize,
    /// The token a text begins with, where the config names one.
    pub bos: Option<u32>,
}

impl ModelSpec {
    /// Query heads that share one key-value head.
    #[must_use]
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// The rotary embedding that all blocks share, where they do.
    #[must_use]
    pub fn rope(&self) -> Option<&Rope> {
        let (first, others) = self.ropes.split_first()?;
        first.as_ref().filter(|_| others.iter().all(|rope| rope == first))
    }

    /// Whether what O and Down put out is added to the residual stream as it is.
    #[must_use]
    pub fn adds_plainly(&self) -> bool {
        let normed = self.has_norm(NormRole::AttnOutput) || self.has_norm(NormRole::MlpOutput);
        !normed && self.factors.residual == 1.0
    }

    /// Whether the activation of the MLP is multiplied by a second branch.
    #[must_use]
    pub fn gated(&self) -> bool {
        self.layout.routed.is_some() || self.has(Role::Gate) || self.has(Role::GateUp)
    }

    /// The linear that stores `part`, and the rows of it there, in order: itself and all its rows, or a share of
    /// [`Role::Qkv`] or [`Role::GateUp`].
    #[must_use]
    pub fn rows(&self, part: Role) -> (Role, Vec<Range<usize>>) {
        let [own, _] = self.linear_shape(part);
        let whole = [Role::Qkv, Role::GateUp].into_iter().find(|role| role.parts().contains(&part) && self.has(*role));
        let Some(whole) = whole else { return (part, std::iter::once(0..own).collect()) };
        let before = whole.parts().iter().take_while(|&&p| p != part);
        if whole == Role::Qkv && self.layout.fused == Fused::ByHead {
            let (dim, at) = (self.head_dim, before.count());
            let head = |head: usize| (3 * head + at) * dim..(3 * head + at + 1) * dim;
            return (whole, (0..self.heads).map(head).collect());
        }
        let first: usize = before.map(|&p| self.linear_shape(p)[0]).sum();
        (whole, std::iter::once(first..first + own).collect())
    }

    /// The experts of block `block`, where they stand in the place of its MLP.
    #[must_use]
    pub fn routed(&self, block: usize) -> Option<&Routing> {
        self.routing.as_ref().filter(|routing| routing.blocks.get(block) == Some(&true))
    }

    /// Whether blocks have this linear outside of experts.
    #[must_use]
    pub fn has(&self, role: Role) -> bool {
        self.layout.linears.iter().any(|(r, _)| *r == role)
    }

    /// Whether blocks have this norm; the first or the last may be an exception ([`ModelSpec::block_norms`]).
    #[must_use]
    pub fn has_norm(&self, norm: NormRole) -> bool {
        self.layout.norms.iter().any(|(n, _)| *n == norm)
    }

    /// The norms of block `block`, in execution order.
    #[must_use]
    pub fn block_norms(&self, block: usize) -> Vec<NormRole> {
        let bare = |norm: NormRole| norm == NormRole::Input && block == 0 && self.layout.first_bare;
        let own = self.layout.norms.iter().map(|(norm, _)| *norm).filter(|&norm| !bare(norm));
        let last = block + 1 == self.layers && self.layout.head.is_none() && self.layout.final_norm.is_some();
        own.chain(last.then_some(NormRole::MlpResidual)).collect()
    }

    /// Module name of `role` in block `block`: `model.layers.0.self_attn.q_proj`.
    ///
    /// # Panics
    /// Where a block has no such linear ([`ModelSpec::has`]).
    #[must_use]
    pub fn module(&self, block: usize, role: Role) -> String {
        let module = match role.expert() {
            Some(expert) => self.layout.routed.as_ref().and_then(|names| names.module(expert, role)),
            None => self.layout.linears.iter().find(|(r, _)| *r == role).map(|(_, module)| (*module).to_owned()),
        };
        match module {
            Some(module) => self.in_block(block, &module),
            None => panic!("{} blocks have no {role:?}", self.model_type),
        }
    }

    /// The module of the attention of block `block`, which keys and values are made in.
    #[must_use]
    pub fn attention(&self, block: usize) -> String {
        let module = self.module(block, if self.has(Role::Qkv) { Role::Qkv } else { Role::K });
        module.rsplit_once('.').map_or_else(String::new, |(attention, _)| attention.to_owned())
    }

    /// Modules of the linears that stay out of [`ModelSpec::block_linears`] where block `block` has experts: the router,
    /// `[experts, hidden]`, and what says how much of the shared expert counts, `[1, hidden]`.
    #[must_use]
    pub fn routers(&self, block: usize) -> Option<(String, Option<String>)> {
        let names = self.routed(block).and(self.layout.routed.as_ref())?;
        let shared = names.shared.and_then(|(_, gate)| gate).map(|gate| self.in_block(block, gate));
        Some((self.in_block(block, names.router), shared))
    }

    /// Tensor name of the weight of `norm` in block `block`.
    ///
    /// # Panics
    /// Where a block has no such norm ([`ModelSpec::block_norms`]).
    #[must_use]
    pub fn norm(&self, block: usize, norm: NormRole) -> String {
        let [weight, _] = self.norm_tensors(block, norm);
        weight
    }

    /// Tensor name of the bias of `norm` in block `block`, where its kind has one.
    ///
    /// # Panics
    /// Where a block has no such norm ([`ModelSpec::block_norms`]).
    #[must_use]
    pub fn norm_bias(&self, block: usize, norm: NormRole) -> Option<String> {
        let [_, bias] = self.norm_tensors(block, norm);
        (self.norm == NormKind::Layer).then_some(bias)
    }

    /// Tensor names of the weight and, where the kind has one, the bias of `norm` in block `block`.
    pub(crate) fn norm_tensors(&self, block: usize, norm: NormRole) -> [String; 2] {
        match (self.layout.norms.iter().find(|(n, _)| *n == norm), self.layout.final_norm) {
            (Some((_, module)), _) => self.norm_parts(&self.in_block(block, module)),
            (None, Some(last)) if norm == NormRole::MlpResidual => self.norm_parts(&self.spell(last)),
            _ => panic!("{} blocks have no norm {norm:?}", self.model_type),
        }
    }

    /// Tensor names of the norms of queries and keys in block `block`, used where [`ModelSpec::qk_norm`] is set.
    #[must_use]
    pub fn qk_norms(&self, block: usize) -> [String; 2] {
        self.layout.qk_norms.map(|norm| format!("{}.weight", self.in_block(block, norm)))
    }

    /// The tensor that what is read goes through first: of token embeddings, `[vocab, hidden]`, or the projection of patches.
    #[must_use]
    pub fn embedding(&self) -> String {
        match &self.layout.entry {
            Entry::Tokens(tokens, _) => self.spell(tokens),
            Entry::Patches(names) => format!("{}.weight", self.spell(names.projection)),
        }
    }

    /// The kind of what it reads, for messages.
    #[must_use]
    pub fn reads(&self) -> &'static str {
        if self.images.is_some() { "images" } else { "text" }
    }

    /// The name of the weight of the norm before the head, where there is one.
    #[must_use]
    pub fn final_norm(&self) -> Option<String> {
        self.layout.final_norm.filter(|_| self.layout.head.is_some()).map(|norm| {
            let [weight, _] = self.norm_parts(&self.spell(norm));
            weight
        })
    }

    /// The module of the output head, where there is one.
    #[must_use]
    pub fn head(&self) -> Option<String> {
        self.layout.head.map(|head| self.spelling.head.unwrap_or(head).to_owned())
    }

    /// The linear over the vocabulary that a loader may build without a tensor of its own: the output head, or for an
    /// encoder that of the masked-language-model head its checkpoint carries, if any tensor there `starts_with` its name.
    #[must_use]
    pub fn tied_head(&self, starts_with: impl Fn(&str) -> bool) -> Option<String> {
        self.head().or_else(|| {
            let [_, linear] = self.layout.task_head.filter(|[task, _]| starts_with(task))?;
            Some(linear.to_owned())
        })
    }

    /// The linears of block `block`, in execution order, with their module names.
    #[must_use]
    pub fn block_linears(&self, block: usize) -> Vec<(Role, String)> {
        let routing = self.routed(block);
        let of_mlp = |role: Role| matches!(role, Role::GateUp | Role::Gate | Role::Up | Role::Down);
        let plain = self.layout.linears.iter().map(|(role, _)| *role).filter(|&r| routing.is_none() || !of_mlp(r));
        let experts = routing.into_iter().flat_map(Routing::all).flat_map(Role::of_expert);
        plain.chain(experts).map(|role| (role, self.module(block, role))).collect()
    }

    /// The sites of block `block`, in execution order.
    #[must_use]
    pub fn sites(&self, block: usize) -> [Site; 4] {
        SITES.map(|site| Site {
            name: site.name,
            linears: match (site.linears, self.gated()) {
                ([fused, ..], _) if self.has(*fused) => &site.linears[..1],
                ([Role::GateUp, Role::Gate, plain @ ..], false) | ([Role::Qkv | Role::GateUp, plain @ ..], _) => plain,
                (all, _) => all,
            },
            absorbed_by: site.absorbed_by.filter(|absorb| match absorb {
                // In post-norm models a site reads the residual stream, which carries its scale on to the next sum.
                Absorb::Norm(norm) => self.block_norms(block).contains(norm),
                // A plain MLP has the activation between Up and Down, and of those only ReLU lets a scale through.
                Absorb::Linear(Role::Up) => self.gated() || self.act == Act::Relu,
                Absorb::Linear(_) => true,
            }),
        })
    }

    /// The same model in the first spelling whose tensors are `stored`; as it is where none fits.
    #[must_use]
    pub fn spelled_as(self, stored: impl Fn(&str) -> bool) -> Self {
        let fits = |spelling: &&'static Spelling| {
            let spec = ModelSpec { spelling, ..self.clone() };
            let norm = spec.block_norms(0).first().map(|norm| spec.norm(0, *norm));
            // A tied head need not be stored, and where a name of its own is, it is the spelling's.
            let head = spec.head().filter(|_| !spec.tied).map(|head| format!("{head}.weight"));
            stored(&spec.embedding()) && [norm, head].into_iter().flatten().all(|name| stored(&name))
        };
        match self.layout.spellings.iter().find(fits) {
            Some(spelling) => ModelSpec { spelling, ..self },
            None => self,
        }
    }

    /// A name as this checkpoint writes it.
    pub(crate) fn spell(&self, name: &str) -> String {
        format!("{}{name}", self.spelling.prefix)
    }

    /// Tensor names of the weight and bias of a norm's module.
    pub(crate) fn norm_parts(&self, module: &str) -> [String; 2] {
        self.spelling.norm.map(|part| format!("{module}.{part}"))
    }

    pub(crate) fn in_block(&self, block: usize, module: &str) -> String {
        format!("{}{}{block}.{module}", self.spelling.prefix, self.layout.blocks)
    }

    /// Shape `[out, in]` of a linear.
    #[must_use]
    pub fn linear_shape(&self, role: Role) -> [usize; 2] {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        match role {
            Role::Qkv => [q + 2 * kv, self.hidden],
            Role::GateUp => [2 * self.intermediate, self.hidden],
            Role::Q => [q, self.hidden],
            Role::K | Role::V => [kv, self.hidden],
            Role::O => [self.hidden, q],
            Role::Gate | Role::Up => [self.intermediate, self.hidden],
            Role::Down => [self.hidden, self.intermediate],
            Role::ExpertGate(expert) | Role::ExpertUp(expert) => [self.expert_width(expert), self.hidden],
            Role::ExpertDown(expert) => [self.hidden, self.expert_width(expert)],
        }
    }

    fn expert_width(&self, expert: Expert) -> usize {
        let of = |routing: &Routing| if expert == Expert::Shared { routing.shared } else { routing.intermediate };
        self.routing.as_ref().map_or(0, of)
    }

    /// Its shape as a dense checkpoint stores it: `[in, out]` in families that transpose.
    #[must_use]
    pub fn stored_shape(&self, role: Role) -> [usize; 2] {
        let [out, inner] = self.linear_shape(role);
        if self.layout.transposed { [inner, out] } else { [out, inner] }
    }

    /// Widths of the stored norms of queries and keys.
    pub(crate) fn qk_widths(&self) -> Option<[usize; 2]> {
        match self.qk_norm? {
            QkNorm::Head => Some([self.head_dim; 2]),
            QkNorm::Whole => Some([Role::Q, Role::K].map(|role| self.linear_shape(role)[0])),
            QkNorm::Bare => None,
        }
    }

    /// Whether a linear has a bias.
    #[must_use]
    pub fn has_bias(&self, role: Role) -> bool {
        match role {
            Role::Qkv | Role::Q | Role::K | Role::V => self.qkv_bias,
            Role::O => self.out_bias,
            Role::GateUp | Role::Gate | Role::Up | Role::Down => self.mlp_bias,
            Role::ExpertGate(_) | Role::ExpertUp(_) | Role::ExpertDown(_) => false,
        }
    }
}

impl Routing {
    /// Every expert, in execution order.
    pub fn all(&self) -> impl Iterator<Item = Expert> + use<> {
        let shared = (self.shared > 0).then_some(Expert::Shared);
        (0..self.experts as u16).map(Expert::Routed).chain(shared)
    }
}

impl crate::layout::Routed {
    /// The module of an expert's linear, inside its block.
    fn module(&self, expert: Expert, role: Role) -> Option<String> {
        let [gate, up, down] = self.parts;
        let part = match role.kind() {
            Role::Gate => gate,
            Role::Up => up,
            _ => down,
        };
        match expert {
            Expert::Routed(index) => Some(format!("{}{index}.{part}", self.experts)),
            Expert::Shared => self.shared.map(|(shared, _)| format!("{shared}.{part}")),
        }
    }
}

//! The name and shape of every tensor of a model.

use crate::layout::{Buffer, Entry};
use crate::{Images, ModelSpec, NormKind};

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
    /// The tensors of block `block` as a dense checkpoint stores them, each once.
    #[must_use]
    pub fn block_tensors(&self, block: usize) -> Vec<TensorSlot> {
        let mut slots = Vec::new();
        for (role, module) in self.block_linears(block) {
            let shape = self.linear_shape(role);
            slots.push(TensorSlot::new(format!("{module}.weight"), &self.stored_shape(role)));
            if self.has_bias(role) {
                slots.push(TensorSlot::new(format!("{module}.bias"), &shape[..1]));
            }
        }
        if let (Some((router, shared)), Some(routing)) = (self.routers(block), &self.routing) {
            slots.push(TensorSlot::new(format!("{router}.weight"), &[routing.experts, self.hidden]));
            slots.extend(shared.map(|gate| TensorSlot::new(format!("{gate}.weight"), &[1, self.hidden])));
        }
        for norm in self.block_norms(block) {
            slots.extend(self.norm_slots(self.norm_tensors(block, norm)));
        }
        for (name, width) in self.qk_norms(block).into_iter().zip(self.qk_widths().into_iter().flatten()) {
            slots.push(TensorSlot::new(name, &[width]));
        }
        for (buffer, kind) in self.layout.buffers {
            let positions = self.max_positions + self.position_offset;
            let shape = match (kind, &self.ropes[block]) {
                (Buffer::Frequencies, None) => continue,
                (Buffer::Frequencies, Some(rope)) => vec![rope.dim / 2],
                (Buffer::Mask, _) => vec![1, 1, positions, positions],
                (Buffer::Number, _) => vec![],
            };
            let slot = TensorSlot::new(self.in_block(block, buffer), &shape);
            slots.push(TensorSlot { optional: true, ..slot });
        }
        slots
    }

    /// Every tensor the architecture owns, each once: embeddings, blocks in order, final norm, head.
    #[must_use]
    pub fn tensors(&self) -> Vec<TensorSlot> {
        let mut slots = self.entry_tensors();
        slots.extend((0..self.layers).flat_map(|block| self.block_tensors(block)));
        if let Some(norm) = self.layout.final_norm.filter(|_| self.layout.head.is_some()) {
            slots.extend(self.norm_slots(self.norm_parts(&self.spell(norm))));
        }
        if let Some(head) = self.head() {
            let head = TensorSlot::new(format!("{head}.weight"), &[self.vocab, self.hidden]);
            slots.push(TensorSlot { optional: self.tied, ..head });
        }
        if let Some(pooler) = self.layout.pooler {
            let pooler = self.spell(pooler);
            for (part, shape) in [("weight", &[self.hidden, self.hidden][..]), ("bias", &[self.hidden])] {
                let slot = TensorSlot::new(format!("{pooler}.{part}"), shape);
                slots.push(TensorSlot { optional: true, ..slot });
            }
        }
        slots
    }

    /// The tensors before the first block.
    fn entry_tensors(&self) -> Vec<TensorSlot> {
        let slot = |name, shape: &[usize]| TensorSlot::new(self.spell(name), shape);
        match (&self.layout.entry, &self.images) {
            (Entry::Patches(names), Some(images)) => {
                let Images { channels, patch: [height, width], .. } = *images;
                vec![
                    slot(names.class, &[1, 1, self.hidden]),
                    TensorSlot { optional: true, ..slot(names.mask, &[1, 1, self.hidden]) },
                    slot(names.positions, &[1, 1 + images.patches(), self.hidden]),
                    TensorSlot::new(self.embedding(), &[self.hidden, channels, height, width]),
                    TensorSlot::new(format!("{}.bias", self.spell(names.projection)), &[self.hidden]),
                ]
            }
            (Entry::Patches(_), None) => Vec::new(),
            (Entry::Tokens(_, added), _) => {
                let mut slots = vec![TensorSlot::new(self.embedding(), &[self.vocab, self.hidden])];
                let positions = self.max_positions + self.position_offset;
                if let Some(added) = added {
                    slots.extend(added.positions.map(|name| slot(name, &[positions, self.hidden])));
                    slots.extend(added.types.map(|name| slot(name, &[self.token_types, self.hidden])));
                    let norm = added.norm.map(|norm| self.norm_slots(self.norm_parts(&self.spell(norm))));
                    slots.extend(norm.into_iter().flatten());
                    let ids = added.position_ids.map(|name| slot(name, &[1, positions]));
                    slots.extend(ids.map(|ids| TensorSlot { optional: true, ..ids }));
                }
                slots
            }
        }
    }

    fn norm_slots(&self, names: [String; 2]) -> impl Iterator<Item = TensorSlot> + use<> {
        let (hidden, parts) = (self.hidden, if self.norm == NormKind::Layer { 2 } else { 1 });
        names.into_iter().take(parts).map(move |name| TensorSlot::new(name, &[hidden]))
    }
}

impl TensorSlot {
    fn new(name: String, shape: &[usize]) -> Self {
        TensorSlot { name, shape: shape.to_vec(), optional: false }
    }
}

//! R2 of QuaRot: the channels of every value head are turned, and the attention's output turned back by O.
//!
//! Attention mixes whole value vectors, so an orthogonal matrix of the width of a head passes through it. It spreads
//! what single channels of a head carry over all of them.

use super::turn::Turn;
use super::{BlockWeights, Model, Rewrite, Transform};
use crate::Error;
use bitmill_models::Role;

pub(super) struct RotateHeads;

impl Transform for RotateHeads {
    fn name(&self) -> &'static str {
        "rotate-heads"
    }

    fn summary(&self) -> &'static str {
        "turn the channels of every value head by a Hadamard matrix, and back in the attention's output"
    }

    fn prepare(&self, model: &Model<'_>) -> Result<Box<dyn Rewrite>, Error> {
        Ok(Box::new(Turned(Turn::new(model.spec.head_dim, model.seed.wrapping_add(2), None))))
    }
}

struct Turned(Turn);

impl Rewrite for Turned {
    fn block(&self, block: &mut BlockWeights<'_>) -> Result<(), Error> {
        let (dim, [_, hidden]) = (block.spec.head_dim, block.spec.linear_shape(Role::V));
        if let Some(v) = block.linears.get_mut(&Role::V) {
            v.chunks_exact_mut(dim * hidden).for_each(|head| self.0.columns_of(head));
        }
        if let Some(bias) = block.biases.get_mut(&Role::V) {
            self.0.rows_of(bias);
        }
        // A row of O holds one part of a head's width for every query head.
        if let Some(o) = block.linears.get_mut(&Role::O) {
            self.0.rows_of(o);
        }
        if let Some(site) = block.sites.get_mut(1) {
            self.0.moments(site);
        }
        Ok(())
    }
}

//! What a quantized tensor is, as plain data, and the scalar definition of every number in it.
//!
//! A [`Scheme`] says how numbers are stored: a grid of values, the set of weights that share one scale, and the type
//! of that scale; integers, 4- and 8-bit floats, BiLLM's
//! binary numbers, or one of the block types of GGUF. A [`Quantized`] holds codes and parameters under a scheme; [`Quantized::dequantize`] defines the
//! weights they stand for. A [`Grid`] fits parameters to a group of weights and rounds onto them.
//!
//! There is no I/O here, no thread and no `unsafe`; arithmetic on a valid scheme cannot fail.

#![forbid(unsafe_code)]

mod activations;
mod error;
mod grids;
#[cfg(test)]
mod miri;
mod quantized;
mod recast;
mod scheme;

pub use activations::{Activations, Inputs};
pub use error::Error;
pub use grids::binary::{Binary, BinaryParams, Residual};
pub use grids::block::{
    Affine, BLOCKS, BlockForm, BlockParams, BlockType, Codebook, Fitted, Flags, LANES, Metric, Shift, Sides, Step,
    Turned, UNIT, turn,
};
pub use grids::float::{FloatGrid, FloatType, exponent_byte, exponent_value};
pub use grids::{
    Fit, Grid, GroupParams,
    int::{IntGrid, folded},
};
pub use quantized::Quantized;
pub use recast::Loss;
pub use scheme::{Bits, Granularity, GridKind, Preset, SCHEMES, ScaleType, Scheme, block_scheme, scheme};

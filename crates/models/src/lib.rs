//! Model architectures as data, and the one forward pass they share.
//!
//! An [`Arch`] turns a `config.json` into a [`ModelSpec`]: sizes, positions, windows, which norms and biases exist, the name
//! of every tensor. From there on no code knows which architecture it runs, decoder or encoder: [`Block`] holds the weights
//! of one block and executes it in five pieces that meet at the [`SITES`], the places where several linears read one activation.
//! [`Ends`] are what comes before the first block and after the last; what a model reads is a [`Window`] of tokens or an image. [`Block::backward`] is the chain rule over the same
//! pieces, for refinement by gradients.
//!
//! Everything is f32 on the CPU, one window of tokens per call; callers run windows in parallel. No result depends on the
//! number of threads. Nothing here calibrates or quantizes.

mod arch;
mod attention;
mod backward;
mod block;
mod config;
mod decode;
mod ends;
mod entry;
mod error;
mod experts;
mod layout;
mod linear;
mod norm;
mod ops;
mod packed;
mod rope;
mod sites;
mod spec;
mod tensors;
mod weights;

pub use arch::{ARCHES, Arch, spec, spec_of};
pub use backward::{BlockGradients, Trace, values};
pub use block::{Block, WindowPast};
pub use decode::Decoder;
pub use ends::{Ends, Head, HeadGradients};
pub use entry::{Embedding, Window};
pub use error::Error;
pub use experts::Routes;
pub use layout::{Added, Buffer, EMBEDDING, Entry, FINAL_NORM, Fused, HEAD, Layout, Patched, Routed, Spelling};
pub use norm::NormKind;
pub use ops::{draw, softmax, softmax_divergence};
pub use packed::{PackedInput, PackedLinear, PackedWeight, Precision};
pub use rope::{Pairs, Rope, RopeKind, RopeTable};
pub use sites::{Absorb, Expert, NormRole, Role, SITES, Site};
pub use spec::{Act, Factors, Images, ModelSpec, QkNorm, Routing, Tempering, Weighing};
pub use tensors::TensorSlot;
pub use weights::{AsStored, Weights};

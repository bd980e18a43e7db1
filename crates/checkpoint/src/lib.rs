//! Named tensors on disk, and the dialects in which tools write quantized ones.
//!
//! A [`Checkpoint`] is an opened model folder: its configuration and every tensor by name, mapped and not read. A
//! [`Format`] turns a [`Quantized`](bitmill_scheme::Quantized) into named payloads and back; [`FORMATS`] lists them all.
//! An [`OutputPlan`] fixes where every tensor of a new folder lies before any weight exists, so that an interrupted run
//! continues at the same offsets and ends in the same bytes.
//!
//! GGUF files are opened the same way, under the names of a folder ([`gguf`]).
//!
//! Formats never round: what a method put into a `Quantized` is what a reader gets out.

mod checkpoint;
mod dialect;
mod error;
mod experts;
mod formats;
pub mod gguf;
mod output;
mod plan;
mod shard;
mod space;
mod survey;
mod tensor;

pub use checkpoint::{CACHE_SCALES, Checkpoint, Weight};
pub use dialect::Dialect;
pub use error::Error;
pub use formats::{FORMATS, Format, GGUF, MIXED, SIDECARS, cache_scheme, default_format, format};
pub use output::Output;
pub use plan::OutputPlan;
pub use safetensors::Dtype;
pub use space::ensure_free;
pub use survey::{Fingerprint, Survey};
pub use tensor::{Order, TensorSpec, TensorView};

//! `mixed-precision`: a folder of compressed-tensors whose groups are stored in different formats, each matrix in the one that
//! its scheme is written in by default. Only the configuration says that they belong together.

use super::{Format, compressed_tensors, default_format, format, refuse_binary, unsupported};
use crate::{Checkpoint, Dialect, Error, TensorSpec};
use bitmill_scheme::{Quantized, Scheme};
use serde_json::Value;
use std::collections::BTreeMap;

#[derive(Debug)]
pub(super) struct MixedPrecision;

/// What the configuration calls a folder whose matrices are stored in several formats, each by [`super::default_format`].
pub const NAME: &str = "mixed-precision";

/// The format of a matrix under `scheme`; `None` for what compressed-tensors does not store.
pub(super) fn format_of(scheme: &Scheme) -> Option<&'static dyn Format> {
    format(default_format(scheme)).filter(|format| compressed_tensors::FAMILY.contains(&format.name()))
}

impl Format for MixedPrecision {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "compressed-tensors, every matrix in the format of its scheme: vLLM, transformers"
    }

    /// Of its first group's format: modules are read by their own.
    fn codes(&self) -> &'static str {
        "weight_packed"
    }

    fn scales(&self) -> &'static str {
        "weight_scale"
    }

    fn candidates(&self, scheme: &Scheme) -> Vec<Scheme> {
        format_of(scheme).map_or(Vec::new(), |f| f.candidates(scheme))
    }

    fn check(&self, module: &str, scheme: &Scheme, shape: [usize; 2]) -> Result<(), Error> {
        refuse_binary(self, module, scheme)?;
        match format_of(scheme) {
            Some(format) => format.check(module, scheme, shape),
            None if scheme.form().is_some() => {
                Err(unsupported(self, module, scheme, "it is a type of GGUF; write a .gguf file (--format gguf)"))
            }
            None => Err(unsupported(self, module, scheme, "compressed-tensors does not store such numbers")),
        }
    }

    fn layout(&self, module: &str, scheme: &Scheme, shape: [usize; 2]) -> Vec<TensorSpec> {
        format_of(scheme).map_or(Vec::new(), |f| f.layout(module, scheme, shape))
    }

    fn encode(&self, module: &str, q: &Quantized) -> Vec<Vec<u8>> {
        match format_of(&q.scheme) {
            Some(format) => format.encode(module, q),
            None => panic!("{module}: {} is no scheme of {NAME}; `check` was not asked", q.scheme),
        }
    }

    fn shape(&self, module: &str, scheme: &Scheme, source: &Checkpoint) -> Result<[usize; 2], Error> {
        match format_of(scheme) {
            Some(format) => format.shape(module, scheme, source),
            None => self.decode(module, scheme, source).map(|q| q.shape),
        }
    }

    fn decode(&self, module: &str, scheme: &Scheme, source: &Checkpoint) -> Result<Quantized, Error> {
        match format_of(scheme) {
            Some(format) => format.decode(module, scheme, source),
            None => Err(unsupported(self, module, scheme, "compressed-tensors does not store such numbers")),
        }
    }

    fn input(&self, module: &str, scheme: &Scheme, source: &Checkpoint) -> Result<Option<f32>, Error> {
        format_of(scheme).map_or(Ok(None), |format| format.input(module, scheme, source))
    }

    fn config(&self, layers: &BTreeMap<String, Scheme>, ignored: &[String]) -> Result<Value, Error> {
        compressed_tensors::config(self, layers, ignored)
    }

    fn recognise(&self, config: &Value) -> Result<Option<Dialect>, Error> {
        compressed_tensors::recognise(self, config)
    }
}

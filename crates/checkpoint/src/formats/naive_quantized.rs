//! `naive-quantized` of compressed-tensors: weights alone, one signed byte per code whatever its width. The storage is
//! that of [`super::int8`]; it is the plainest form, for readers without unpacking.

use super::{Format, assert_encodable, check_matrix, compressed_tensors, int8, unsupported};
use crate::{Checkpoint, Dialect, Error, TensorSpec};
use bitmill_scheme::{Activations, Quantized, Scheme};
use serde_json::Value;
use std::collections::BTreeMap;

/// The format.
#[derive(Debug)]
pub(super) struct NaiveQuantized;

impl Format for NaiveQuantized {
    fn name(&self) -> &'static str {
        "naive-quantized"
    }

    fn summary(&self) -> &'static str {
        "compressed-tensors, one byte per weight at any width: transformers"
    }

    fn codes(&self) -> &'static str {
        "weight"
    }

    fn scales(&self) -> &'static str {
        "weight_scale"
    }

    fn check(&self, module: &str, scheme: &Scheme, shape: [usize; 2]) -> Result<(), Error> {
        if scheme.activations != Activations::Full {
            return Err(unsupported(self, module, scheme, "use int-quantized for 8-bit activations"));
        }
        check_matrix(self, module, scheme, shape)
    }

    fn layout(&self, module: &str, scheme: &Scheme, shape: [usize; 2]) -> Vec<TensorSpec> {
        int8::layout(module, scheme, shape)
    }

    fn encode(&self, module: &str, q: &Quantized) -> Vec<Vec<u8>> {
        assert_encodable(self, module, q);
        int8::encode(q)
    }

    fn shape(&self, module: &str, _: &Scheme, source: &Checkpoint) -> Result<[usize; 2], Error> {
        int8::shape(module, source)
    }

    fn decode(&self, module: &str, scheme: &Scheme, source: &Checkpoint) -> Result<Quantized, Error> {
        int8::decode(module, scheme, source)
    }

    fn config(&self, layers: &BTreeMap<String, Scheme>, ignored: &[String]) -> Result<Value, Error> {
        compressed_tensors::config(self, layers, ignored)
    }

    fn recognise(&self, config: &Value) -> Result<Option<Dialect>, Error> {
        compressed_tensors::recognise(self, config)
    }
}

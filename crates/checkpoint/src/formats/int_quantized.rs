//! `int-quantized` of compressed-tensors: weights of 8 bits (W8A8), or of 4 in a byte each (W4A8), for integer products with
//! 8-bit activations. The storage is that of [`super::int8`]; what the format adds is that inputs are rounded too, one scale per
//! token, at run time.

use super::{Format, assert_encodable, check_matrix, compressed_tensors, int8, refuse_binary, unsupported};
use crate::{Checkpoint, Dialect, Error, TensorSpec};
use bitmill_scheme::{Activations, Quantized, Scheme};
use serde_json::Value;
use std::collections::BTreeMap;

/// The format.
#[derive(Debug)]
pub(super) struct IntQuantized;

impl Format for IntQuantized {
    fn name(&self) -> &'static str {
        "int-quantized"
    }

    fn summary(&self) -> &'static str {
        "compressed-tensors, 8-bit weights with 8-bit activations: vLLM, SGLang, transformers"
    }

    fn codes(&self) -> &'static str {
        "weight"
    }

    fn scales(&self) -> &'static str {
        "weight_scale"
    }

    fn candidates(&self, scheme: &Scheme) -> Vec<Scheme> {
        vec![Scheme { activations: Activations::DynamicInt8, ..*scheme }]
    }

    fn check(&self, module: &str, scheme: &Scheme, shape: [usize; 2]) -> Result<(), Error> {
        refuse_binary(self, module, scheme)?;
        if scheme.activations != Activations::DynamicInt8 {
            let reason = "it is for 8-bit activations; use pack-quantized or naive-quantized for weights alone";
            return Err(unsupported(self, module, scheme, reason));
        }
        // Those of 4 bits take a byte each, too: loaders pack them for their kernels.
        let narrow = scheme.bits().get() == 4 && scheme.symmetric();
        if scheme.bits().get() != 8 && !narrow {
            return Err(unsupported(
                self,
                module,
                scheme,
                "its integer products take 8-bit weights, or symmetric ones of 4 bits",
            ));
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

//! The block types of GGUF as a format: one tensor of bytes per matrix, its blocks row after row. The container around
//! it is [`crate::gguf`]'s matter; it is no dialect of safetensors, so nothing recognises it in a `config.json`.

use super::{Format, assert_encodable, part, refuse_binary, unsupported, validated};
use crate::{Checkpoint, Dialect, Error, Order, TensorSpec, gguf};
use bitmill_scheme::{Activations, BlockForm, BlockType, Quantized, ScaleType, Scheme, Shift};
use safetensors::Dtype;
use serde_json::Value;
use std::collections::BTreeMap;

/// The format.
#[derive(Debug)]
pub(super) struct Gguf;

impl Format for Gguf {
    fn name(&self) -> &'static str {
        "gguf"
    }

    fn summary(&self) -> &'static str {
        "one file for llama.cpp and everything built on it"
    }

    fn codes(&self) -> &'static str {
        "weight"
    }

    fn scales(&self) -> &'static str {
        "weight"
    }

    fn scale_type(&self, _: ScaleType) -> ScaleType {
        ScaleType::F16
    }

    fn candidates(&self, scheme: &Scheme) -> Vec<Scheme> {
        if scheme.form().is_some() {
            return vec![*scheme];
        }
        // By size; a type with a minimum for what has zero points, a wider one where the minima are no halves.
        let kinds = [BlockType::Q4_0, BlockType::Q4_1, BlockType::Q5_0, BlockType::Q5_1, BlockType::Q8_0];
        let wide = |kind: &BlockType| kind.form().levels.len() > usize::from(scheme.bits().max_code());
        let kept = |kind: &BlockType| !scheme.symmetric() || kind.form().shift == Shift::None;
        kinds.into_iter().filter(wide).filter(kept).map(Scheme::block).collect()
    }

    fn check(&self, module: &str, scheme: &Scheme, [rows, cols]: [usize; 2]) -> Result<(), Error> {
        refuse_binary(self, module, scheme)?;
        let Some(form) = scheme.form() else {
            let reason = "it stores the types q1_0 to q6_k, iq1_s to iq4_xs, mxfp4, nvfp4, tq1_0 and tq2_0: choose one with --scheme";
            return Err(unsupported(self, module, scheme, reason));
        };
        if scheme.activations != Activations::Full {
            return Err(unsupported(self, module, scheme, "it stores weights only"));
        }
        if rows == 0 || cols == 0 {
            return Err(unsupported(self, module, scheme, "an empty matrix has nothing to quantize; ignore it"));
        }
        if !cols.is_multiple_of(form.len) {
            let reason = format!(
                "its rows of {cols} are no multiple of the type's {}; choose a type in blocks of 32 (q4_0, q5_0, q8_0, iq4_nl) or --ignore it",
                form.len
            );
            return Err(unsupported(self, module, scheme, reason));
        }
        Ok(())
    }

    fn layout(&self, module: &str, scheme: &Scheme, [rows, cols]: [usize; 2]) -> Vec<TensorSpec> {
        // `check` has been passed, so there is a form.
        let bytes = scheme.form().map_or(0, |f| cols / f.len * f.bytes);
        vec![TensorSpec::new(format!("{module}.weight"), Dtype::U8, [rows, bytes])]
    }

    fn encode(&self, module: &str, q: &Quantized) -> Vec<Vec<u8>> {
        assert_encodable(self, module, q);
        q.scheme.form().map(|form| gguf::encode(form, q)).into_iter().collect()
    }

    fn by_rows(&self, _: &Scheme, _: [usize; 2]) -> Option<Vec<Vec<u8>>> {
        Some(Vec::new())
    }

    fn decode(&self, module: &str, scheme: &Scheme, source: &Checkpoint) -> Result<Quantized, Error> {
        let view = part(source, module, "weight")?;
        let [rows, bytes] = view.matrix()?;
        let form = scheme.form().filter(|f| bytes.is_multiple_of(f.bytes));
        let form = form.ok_or_else(|| view.wrong_shape("[out, whole blocks] under its type"))?;
        let mut q = gguf::decode(form, [rows, bytes / form.bytes * form.len], view.bytes);
        if let Order::Interleaved(heads) = view.order {
            restore(&mut q, form, heads);
        }
        validated(module, source, q)
    }

    fn config(&self, _: &BTreeMap<String, Scheme>, _: &[String]) -> Result<Value, Error> {
        Ok(Value::Null)
    }

    fn recognise(&self, _: &Value) -> Result<Option<Dialect>, Error> {
        Ok(None)
    }
}

/// Puts interleaved rows back into a folder's order.
fn restore(q: &mut Quantized, form: &BlockForm, heads: usize) {
    let (rows, blocks) = (q.shape[0], q.scheme.groups(q.shape[1]));
    gguf::deinterleave(&mut q.codes, rows, heads);
    if form.reals() > 0 && blocks > 0 {
        gguf::deinterleave(&mut q.scales, rows, heads);
    }
    if form.integers() > 0 && blocks > 0 {
        gguf::deinterleave(&mut q.zeros, rows, heads);
    }
}

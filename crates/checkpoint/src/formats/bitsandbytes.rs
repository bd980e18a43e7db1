//! 4-bit numbers of bitsandbytes: NF4 codes under the largest magnitude of every 64 weights.
//!
//! | tensor | type | shape |
//! | --- | --- | --- |
//! | `weight` | U8 | `[out · in / 2, 1]`, row by row; the first of two codes in the high half |
//! | `weight.absmax` | F32 | `[out · in / block]` |
//! | `weight.quant_map` | F32 | `[16]`, the numbers that codes stand for |
//! | `weight.quant_state.bitsandbytes__nf4` | U8 | JSON: type, block, shape, and the type that the library dequantizes to |
//!
//! "Double quantization" is read, not written: `absmax` is U8, codes for `weight.nested_quant_map` F32 `[256]` times
//! `weight.nested_absmax` F32 (one for `nested_blocksize` of them) plus `nested_offset`. Blocks that cross rows, which the
//! library makes where a block does not divide the inputs, are not read.

use super::{Format, assert_encodable, check_shape, part, scale_bytes, unsupported, validated};
use crate::dialect::{Rule, Target, wrong};
use crate::{Checkpoint, Dialect, Error, TensorSpec, TensorView};
use bitmill_scheme::{Activations, FloatType, Granularity, GridKind, Quantized, ScaleType, Scheme};
use safetensors::Dtype;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// The format.
#[derive(Debug)]
pub(super) struct BitsAndBytes;

/// Its name, and what configurations call it.
pub(super) const NAME: &str = "bitsandbytes";
/// Weights that share a scale unless a file says otherwise.
const BLOCK: usize = 64;
/// The only type of number that is read and written.
const FLOAT: FloatType = FloatType::Nf4;
const ABSMAX: &str = "weight.absmax";
const STATE: &str = "weight.quant_state.bitsandbytes__nf4";

/// The scheme for blocks of `block`.
fn scheme(block: usize) -> Scheme {
    Scheme::float(FLOAT, Granularity::Group(block), ScaleType::F32)
}

/// What the library keeps beside the tensors, written as it writes it. It dequantizes to f32, which holds every number.
fn state(block: usize, [rows, cols]: [usize; 2]) -> String {
    format!(r#"{{"quant_type": "nf4", "blocksize": {block}, "dtype": "float32", "shape": [{rows}, {cols}]}}"#)
}

/// The same as it is read.
struct State {
    block: usize,
    shape: [usize; 2],
    /// Blocks that share a scale of scales, and what is added to these.
    nested: Option<(usize, f32)>,
}

impl State {
    fn read(view: &TensorView<'_>) -> Result<Self, Error> {
        let expected = r#"JSON with "quant_type": "nf4", a "blocksize" and a "shape" of two"#;
        let text: Value = serde_json::from_slice(view.bytes).map_err(|_| view.wrong_shape(expected))?;
        let count = |key: &str| text.get(key).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        let shape = text.get("shape").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let side = |i: usize| shape.get(i).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        let known = text["quant_type"] == "nf4" && shape.len() == 2;
        let (Some(block), Some(rows), Some(cols), true) = (count("blocksize"), side(0), side(1), known) else {
            return Err(view.wrong_shape(expected));
        };
        if block == 0 || rows == 0 || !cols.is_multiple_of(block) || cols == 0 || rows.checked_mul(cols).is_none() {
            let reason = format!("rows of whole blocks of {block} (those of {cols} are not)");
            return Err(view.wrong_shape(reason));
        }
        let nested = count("nested_blocksize").filter(|&n| n > 0);
        let offset = text.get("nested_offset").and_then(Value::as_f64).unwrap_or(0.0) as f32;
        Ok(State { block, shape: [rows, cols], nested: nested.map(|n| (n, offset)) })
    }

    fn blocks(&self) -> usize {
        self.shape[0] * self.shape[1] / self.block
    }

    /// The scale of every block.
    fn scales(&self, module: &str, source: &Checkpoint) -> Result<Vec<f32>, Error> {
        let numbers = |suffix: &str, count: usize| {
            let view = part(source, module, suffix)?;
            let values = view.to_f32()?;
            if values.len() == count { Ok(values) } else { Err(view.wrong_shape(format!("[{count}]"))) }
        };
        let blocks = self.blocks();
        let Some((size, offset)) = self.nested else { return numbers(ABSMAX, blocks) };
        let view = part(source, module, ABSMAX)?;
        if view.dtype != Dtype::U8 {
            return Err(view.wrong_dtype("U8"));
        }
        if view.bytes.len() != blocks {
            return Err(view.wrong_shape(format!("[{blocks}]")));
        }
        let map = numbers("weight.nested_quant_map", 256)?;
        let outer = numbers("weight.nested_absmax", blocks.div_ceil(size))?;
        let scale = |(i, &code): (usize, &u8)| map[usize::from(code)] * outer[i / size] + offset;
        Ok(view.bytes.iter().enumerate().map(scale).collect())
    }
}

impl Format for BitsAndBytes {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "bitsandbytes, 4-bit NF4: transformers, PEFT"
    }

    fn codes(&self) -> &'static str {
        "weight"
    }

    fn scales(&self) -> &'static str {
        ABSMAX
    }

    fn seen(&self, own: Scheme, codes: &TensorSpec, scales: &TensorSpec) -> Scheme {
        // The configuration does not say how large blocks are; there are two codes to a byte.
        let blocks = scales.bytes() / if scales.dtype == Dtype::U8 { 1 } else { 4 };
        codes.bytes().saturating_mul(2).checked_div(blocks).filter(|&block| block > 0).map_or(own, scheme)
    }

    fn scale_type(&self, _: ScaleType) -> ScaleType {
        ScaleType::F32
    }

    fn candidates(&self, own: &Scheme) -> Vec<Scheme> {
        vec![Scheme { activations: Activations::Full, ..*own }.with_scale(ScaleType::F32)]
    }

    fn check(&self, module: &str, scheme: &Scheme, shape: [usize; 2]) -> Result<(), Error> {
        let refuse = |reason: &str| Err(unsupported(self, module, scheme, reason));
        if scheme.grid != GridKind::Float(FLOAT) {
            return refuse("its numbers are NF4; choose --scheme nf4");
        }
        let Granularity::Group(block) = scheme.granularity else { return refuse("its scales are per group") };
        if !block.is_power_of_two() || !(32..=4096).contains(&block) {
            return refuse("its blocks are of 32 to 4096 weights, a power of two");
        }
        if scheme.scale != ScaleType::F32 {
            return refuse("its scales are f32");
        }
        if scheme.activations != Activations::Full {
            return refuse("it is for weights alone");
        }
        check_shape(self, module, scheme, shape)
    }

    fn layout(&self, module: &str, scheme: &Scheme, shape: [usize; 2]) -> Vec<TensorSpec> {
        let spec = |suffix: &str, dtype, shape| TensorSpec::new(format!("{module}.{suffix}"), dtype, shape);
        let block = scheme.group_len(shape[1]);
        vec![
            spec("weight", Dtype::U8, vec![shape[0] * shape[1] / 2, 1]),
            spec(ABSMAX, Dtype::F32, vec![scheme.scales(shape)]),
            spec("weight.quant_map", Dtype::F32, vec![16]),
            spec(STATE, Dtype::U8, vec![state(block, shape).len()]),
        ]
    }

    fn encode(&self, module: &str, q: &Quantized) -> Vec<Vec<u8>> {
        assert_encodable(self, module, q);
        vec![
            q.codes.as_chunks::<2>().0.iter().map(|&[first, second]| first << 4 | second).collect(),
            scale_bytes(q.scales.iter().copied(), ScaleType::F32),
            scale_bytes((0..16).map(|code| FLOAT.value(code)), ScaleType::F32),
            state(q.scheme.group_len(q.shape[1]), q.shape).into_bytes(),
        ]
    }

    fn decode(&self, module: &str, _: &Scheme, source: &Checkpoint) -> Result<Quantized, Error> {
        let state = State::read(&part(source, module, STATE)?)?;
        let view = part(source, module, "weight")?;
        if view.dtype != Dtype::U8 {
            return Err(view.wrong_dtype("U8"));
        }
        let [rows, cols] = state.shape;
        if view.bytes.len() * 2 != rows * cols {
            return Err(view.wrong_shape(format!("[{}, 1]", rows * cols / 2)));
        }
        let map = part(source, module, "weight.quant_map")?;
        let same = |(code, &value): (usize, &f32)| (FLOAT.value(code as u8) - value).abs() < 1e-6;
        let values = map.to_f32()?;
        if values.len() != 16 || !values.iter().enumerate().all(same) {
            return Err(map.wrong_shape("[16], the numbers of NF4,"));
        }
        let codes = view.bytes.iter().flat_map(|&b| [b >> 4, b & 15]).collect();
        let (scheme, scales) = (scheme(state.block), state.scales(module, source)?);
        let (zeros, group_of) = (Vec::new(), Vec::new());
        validated(module, source, Quantized { scheme, shape: state.shape, codes, scales, zeros, group_of, input: None })
    }

    fn config(&self, _: &BTreeMap<String, Scheme>, ignored: &[String]) -> Result<Value, Error> {
        Ok(json!({
            "quant_method": NAME,
            "load_in_4bit": true,
            "load_in_8bit": false,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": false,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": ignored,
        }))
    }

    fn recognise(&self, config: &Value) -> Result<Option<Dialect>, Error> {
        if config.get("quant_method").and_then(Value::as_str) != Some(NAME) {
            return Ok(None);
        }
        let get = |key: &str| config.get(key).filter(|v| !v.is_null());
        // What is left out is FP4, as in transformers.
        for (key, needed) in [("load_in_4bit", json!(true)), ("bnb_4bit_quant_type", json!("nf4"))] {
            if get(key) != Some(&needed) {
                return Err(wrong(key, get(key), format!("4-bit NF4 is read, which needs {needed}")));
            }
        }
        let key = "llm_int8_skip_modules";
        let mut rules = Vec::new();
        for skipped in get(key).and_then(Value::as_array).into_iter().flatten() {
            let name = skipped.as_str().ok_or_else(|| wrong(key, Some(skipped), "a string is needed"))?;
            // A part of a name between dots.
            let pattern = format!(r"(.*\.)?{}(\..*)?$", fancy_regex::escape(name));
            rules.push(Rule { target: Target::pattern(key, &pattern)?, outcome: None });
        }
        rules.push(Rule { target: Target::Linear, outcome: Some((&BitsAndBytes, scheme(BLOCK))) });
        Ok(Some(Dialect::new(&BitsAndBytes, rules)))
    }
}

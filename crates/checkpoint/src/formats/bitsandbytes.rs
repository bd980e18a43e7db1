//! 4-bit numbers of bitsandbytes: codes of NF4 or FP4 under the largest magnitude of every 64 weights.
//!
//! | tensor | type | shape |
//! | --- | --- | --- |
//! | `weight` | U8 | `[out · in / 2, 1]`, row by row; the first of two codes in the high half |
//! | `weight.absmax` | F32 | `[out · in / block]` |
//! | `weight.quant_map` | F32 | `[16]`, the numbers that codes stand for |
//! | `weight.quant_state.bitsandbytes__nf4`, or `…__fp4` | U8 | JSON: type, block, shape, and the type that the library dequantizes to |
//!
//! "Double quantization" is read, not written: `absmax` is U8, codes for `weight.nested_quant_map` F32 `[256]` times
//! `weight.nested_absmax` F32 (one for `nested_blocksize` of them) plus `nested_offset`. Blocks that cross rows, which the
//! library makes where a block does not divide the inputs, are not read.

use super::{Format, assert_encodable, check_shape, part, refuse_binary, scale_bytes, unsupported, validated};
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
/// The types of number, by the library's names.
const TABLES: [(&str, FloatType); 2] = [("nf4", FloatType::Nf4), ("fp4", FloatType::Fp4)];
const ABSMAX: &str = "weight.absmax";

/// The scheme for blocks of `block`.
fn scheme(float: FloatType, block: usize) -> Scheme {
    Scheme::float(float, Granularity::Group(block), ScaleType::F32)
}

/// The table of a scheme, and its name; `None` for other numbers.
fn table(scheme: &Scheme) -> Option<(&'static str, FloatType)> {
    TABLES.into_iter().find(|(_, float)| scheme.grid == GridKind::Float(*float))
}

/// The table of a scheme that [`Format::check`] let pass.
fn own_table(scheme: &Scheme) -> (&'static str, FloatType) {
    table(scheme).unwrap_or(TABLES[0])
}

/// The suffix of what is said in words.
fn state_part(name: &str) -> String {
    format!("weight.quant_state.bitsandbytes__{name}")
}

/// What the library keeps beside the tensors, written as it writes it. It dequantizes to f32, which holds every number.
fn state(name: &str, block: usize, [rows, cols]: [usize; 2]) -> String {
    format!(r#"{{"quant_type": "{name}", "blocksize": {block}, "dtype": "float32", "shape": [{rows}, {cols}]}}"#)
}

/// The same as it is read.
struct State {
    block: usize,
    shape: [usize; 2],
    /// Blocks that share a scale of scales, and what is added to these.
    nested: Option<(usize, f32)>,
}

impl State {
    fn read(name: &str, view: &TensorView<'_>) -> Result<Self, Error> {
        let expected = format!(r#"JSON with "quant_type": "{name}", a "blocksize" and a "shape" of two"#);
        let text: Value = serde_json::from_slice(view.bytes).map_err(|_| view.wrong_shape(&*expected))?;
        let count = |key: &str| text.get(key).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        let shape = text.get("shape").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let side = |i: usize| shape.get(i).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        let known = text["quant_type"] == name && shape.len() == 2;
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

    /// The one of `module`, and its table: readers go by what lies beside the codes, whatever config.json says.
    fn of(module: &str, own: &Scheme, source: &Checkpoint) -> Result<(Self, (&'static str, FloatType)), Error> {
        let stored = |(name, _): &(&str, FloatType)| source.contains(&format!("{module}.{}", state_part(name)));
        let table = TABLES.into_iter().find(stored).unwrap_or(own_table(own));
        Ok((State::read(table.0, &part(source, module, &state_part(table.0))?)?, table))
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
        "bitsandbytes, 4-bit NF4 and FP4: transformers, PEFT"
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
        let size = codes.bytes().saturating_mul(2).checked_div(blocks).filter(|&block| block > 0);
        size.map_or(own, |block| scheme(own_table(&own).1, block))
    }

    fn scale_type(&self, _: ScaleType) -> ScaleType {
        ScaleType::F32
    }

    fn candidates(&self, own: &Scheme) -> Vec<Scheme> {
        vec![Scheme { activations: Activations::Full, ..*own }.with_scale(ScaleType::F32)]
    }

    fn check(&self, module: &str, scheme: &Scheme, shape: [usize; 2]) -> Result<(), Error> {
        refuse_binary(self, module, scheme)?;
        let refuse = |reason: &str| Err(unsupported(self, module, scheme, reason));
        if table(scheme).is_none() {
            return refuse("its numbers are NF4 or FP4; choose --scheme nf4");
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
        let (block, (name, _)) = (scheme.group_len(shape[1]), own_table(scheme));
        vec![
            spec("weight", Dtype::U8, vec![shape[0] * shape[1] / 2, 1]),
            spec(ABSMAX, Dtype::F32, vec![scheme.scales(shape)]),
            spec("weight.quant_map", Dtype::F32, vec![16]),
            spec(&state_part(name), Dtype::U8, vec![state(name, block, shape).len()]),
        ]
    }

    fn encode(&self, module: &str, q: &Quantized) -> Vec<Vec<u8>> {
        assert_encodable(self, module, q);
        let (name, float) = own_table(&q.scheme);
        vec![
            q.codes.as_chunks::<2>().0.iter().map(|&[first, second]| first << 4 | second).collect(),
            scale_bytes(q.scales.iter().copied(), ScaleType::F32),
            scale_bytes((0..16).map(|code| float.value(code)), ScaleType::F32),
            state(name, q.scheme.group_len(q.shape[1]), q.shape).into_bytes(),
        ]
    }

    fn shape(&self, module: &str, own: &Scheme, source: &Checkpoint) -> Result<[usize; 2], Error> {
        State::of(module, own, source).map(|(state, _)| state.shape)
    }

    fn decode(&self, module: &str, own: &Scheme, source: &Checkpoint) -> Result<Quantized, Error> {
        let (state, (name, float)) = State::of(module, own, source)?;
        let view = part(source, module, "weight")?;
        if view.dtype != Dtype::U8 {
            return Err(view.wrong_dtype("U8"));
        }
        let [rows, cols] = state.shape;
        if view.bytes.len() * 2 != rows * cols {
            return Err(view.wrong_shape(format!("[{}, 1]", rows * cols / 2)));
        }
        let map = part(source, module, "weight.quant_map")?;
        let same = |(code, &value): (usize, &f32)| (float.value(code as u8) - value).abs() < 1e-6;
        let values = map.to_f32()?;
        if values.len() != 16 || !values.iter().enumerate().all(same) {
            return Err(map.wrong_shape(format!("[16], the numbers of {name},")));
        }
        let codes = view.bytes.iter().flat_map(|&b| [b >> 4, b & 15]).collect();
        let (scheme, scales) = (scheme(float, state.block), state.scales(module, source)?);
        let (zeros, group_of) = (Vec::new(), Vec::new());
        validated(module, source, Quantized { scheme, shape: state.shape, codes, scales, zeros, group_of, input: None })
    }

    fn config(&self, layers: &BTreeMap<String, Scheme>, ignored: &[String]) -> Result<Value, Error> {
        let mut tables = layers.iter().map(|layer| (layer, own_table(layer.1).0));
        let name = tables.next().map_or(TABLES[0].0, |(_, name)| name);
        if let Some(((module, other), _)) = tables.find(|(_, other)| *other != name) {
            return Err(unsupported(self, module, other, "its configuration has one table for all linears"));
        }
        Ok(json!({
            "quant_method": NAME,
            "load_in_4bit": true,
            "load_in_8bit": false,
            "bnb_4bit_quant_type": name,
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
        if get("load_in_4bit") != Some(&json!(true)) {
            return Err(wrong("load_in_4bit", get("load_in_4bit"), "4-bit numbers are read, which need true"));
        }
        // What is left out is FP4, as in transformers.
        let key = "bnb_4bit_quant_type";
        let named = get(key).map_or(Some("fp4"), Value::as_str);
        let Some((_, float)) = TABLES.into_iter().find(|(own, _)| named == Some(own)) else {
            return Err(wrong(key, get(key), "nf4 and fp4 are read"));
        };
        let key = "llm_int8_skip_modules";
        let mut rules = Vec::new();
        for skipped in get(key).and_then(Value::as_array).into_iter().flatten() {
            let name = skipped.as_str().ok_or_else(|| wrong(key, Some(skipped), "a string is needed"))?;
            // A part of a name between dots.
            let pattern = format!(r"(.*\.)?{}(\..*)?$", fancy_regex::escape(name));
            rules.push(Rule { target: Target::pattern(key, &pattern)?, outcome: None });
        }
        rules.push(Rule { target: Target::Linear, outcome: Some((&BitsAndBytes, scheme(float, BLOCK))) });
        Ok(Some(Dialect::new(&BitsAndBytes, rules)))
    }
}

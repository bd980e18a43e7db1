//! Binary numbers of BiLLM, in a layout of bitmill's own: no other loader has one.
//!
//! | tensor | type | shape |
//! | --- | --- | --- |
//! | `weight_packed` | U8 | `[out, in / 4]`, the two lower bits of four codes, the first in the lowest |
//! | `weight_salient` | U8 | `[in / 8]`, a bit for every input column, the first in the lowest: the third bit of its codes |
//! | `weight_params` | F16 | `[out, groups, 7]`, means and magnitudes as `BinaryParams::reals` lists them |
//!
//! Groups are of a multiple of 8 inputs, so there is no bit to spare in any of them. The original program stores the rounded
//! weights as plain numbers; what it would take to store them packed is what this layout shows.

use super::{Format, assert_encodable, check_shape, part, scale_bytes, unsupported, validated};
use crate::dialect::{Rule, Target, wrong};
use crate::{Checkpoint, Dialect, Error, TensorSpec, TensorView};
use bitmill_scheme::{Activations, BinaryParams, Granularity, GridKind, Quantized, ScaleType, Scheme};
use safetensors::Dtype;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// The format.
#[derive(Debug)]
pub(super) struct Binary;

/// Its name.
pub(super) const NAME: &str = "binary";
/// What configurations call the program whose format it is.
const METHOD: &str = "bitmill";
const PACKED: &str = "weight_packed";
const SALIENT: &str = "weight_salient";
const PARAMS: &str = "weight_params";

/// Whether groups of `group` inputs fill bytes.
fn fills_bytes(group: usize) -> bool {
    group > 0 && group.is_multiple_of(8)
}

fn shape_of(view: &TensorView<'_>) -> Result<[usize; 2], Error> {
    let [rows, bytes] = view.matrix()?;
    match bytes.checked_mul(4).filter(|&cols| rows > 0 && cols > 0) {
        Some(cols) => Ok([rows, cols]),
        None => Err(view.wrong_shape("a matrix that is not empty")),
    }
}

/// A tensor in its only type and shape.
fn exact<'a>(source: &'a Checkpoint, spec: &TensorSpec) -> Result<TensorView<'a>, Error> {
    let view = source.tensor(&spec.name)?;
    if view.dtype != spec.dtype {
        return Err(view.wrong_dtype(if spec.dtype == Dtype::F16 { "F16" } else { "U8" }));
    }
    if view.shape != spec.shape { Err(view.wrong_shape(format!("{:?}", spec.shape))) } else { Ok(view) }
}

impl Format for Binary {
    fn name(&self) -> &'static str {
        NAME
    }

    fn summary(&self) -> &'static str {
        "bitmill's own packing of BiLLM's binary numbers: no other loader reads it"
    }

    fn codes(&self) -> &'static str {
        PACKED
    }

    fn scales(&self) -> &'static str {
        PARAMS
    }

    fn scale_type(&self, _: ScaleType) -> ScaleType {
        ScaleType::F16
    }

    fn check(&self, module: &str, scheme: &Scheme, shape: [usize; 2]) -> Result<(), Error> {
        let refuse = |reason: &str| Err(unsupported(self, module, scheme, reason));
        if scheme.grid != GridKind::Binary {
            return refuse("it holds BiLLM's binary numbers; choose --scheme binary");
        }
        if !matches!(scheme.granularity, Granularity::Group(group) if fills_bytes(group)) {
            return refuse("its groups are of a multiple of 8 inputs");
        }
        if scheme.scale != ScaleType::F16 || scheme.activations != Activations::Full {
            return refuse("its means and magnitudes are f16, and inputs stay as they are");
        }
        check_shape(self, module, scheme, shape)
    }

    fn layout(&self, module: &str, scheme: &Scheme, [rows, cols]: [usize; 2]) -> Vec<TensorSpec> {
        let spec = |suffix: &str, dtype, shape: Vec<usize>| TensorSpec::new(format!("{module}.{suffix}"), dtype, shape);
        vec![
            spec(PACKED, Dtype::U8, vec![rows, cols / 4]),
            spec(SALIENT, Dtype::U8, vec![cols / 8]),
            spec(PARAMS, Dtype::F16, vec![rows, scheme.groups(cols), BinaryParams::REALS]),
        ]
    }

    fn encode(&self, module: &str, q: &Quantized) -> Vec<Vec<u8>> {
        assert_encodable(self, module, q);
        let four = |codes: &[u8; 4]| codes.iter().rev().fold(0, |byte, code| byte << 2 | code & 3);
        let eight = |columns: &[bool; 8]| columns.iter().rev().fold(0, |byte, &bit| byte << 1 | u8::from(bit));
        vec![
            q.codes.as_chunks::<4>().0.iter().map(four).collect(),
            q.salient().as_chunks::<8>().0.iter().map(eight).collect(),
            scale_bytes(q.scales.iter().copied(), ScaleType::F16),
        ]
    }

    fn shape(&self, module: &str, _: &Scheme, source: &Checkpoint) -> Result<[usize; 2], Error> {
        shape_of(&part(source, module, PACKED)?)
    }

    fn decode(&self, module: &str, scheme: &Scheme, source: &Checkpoint) -> Result<Quantized, Error> {
        let shape = self.shape(module, scheme, source)?;
        self.check(module, scheme, shape)?;
        let specs = self.layout(module, scheme, shape);
        let view = |i: usize| exact(source, &specs[i]);
        let (packed, salient, params) = (view(0)?, view(1)?, view(2)?);
        let third = |col: usize| (salient.bytes[col / 8] >> (col % 8) & 1) << 2;
        let third: Vec<u8> = (0..shape[1]).map(third).collect();
        let low = packed.bytes.iter().flat_map(|byte| [0, 2, 4, 6].map(|at| byte >> at & 3));
        let codes = low.zip(third.iter().cycle()).map(|(low, third)| low | third).collect();
        let (scales, zeros, group_of) = (params.to_f32()?, Vec::new(), Vec::new());
        validated(module, source, Quantized { scheme: *scheme, shape, codes, scales, zeros, group_of, input: None })
    }

    fn config(&self, layers: &BTreeMap<String, Scheme>, ignored: &[String]) -> Result<Value, Error> {
        let size = |scheme: &Scheme| scheme.group_len(0);
        let group = layers.values().next().map_or(128, size);
        if let Some((module, other)) = layers.iter().find(|(_, scheme)| size(scheme) != group) {
            return Err(unsupported(self, module, other, "its configuration has one size of groups for all linears"));
        }
        Ok(json!({
            "quant_method": METHOD,
            "format": NAME,
            "group_size": group,
            "modules_to_not_convert": ignored,
        }))
    }

    fn recognise(&self, config: &Value) -> Result<Option<Dialect>, Error> {
        if config.get("quant_method").and_then(Value::as_str) != Some(METHOD) {
            return Ok(None);
        }
        let get = |key: &str| config.get(key).filter(|v| !v.is_null());
        if get("format").and_then(Value::as_str) != Some(NAME) {
            return Err(wrong("format", get("format"), format!("of bitmill's own, \"{NAME}\" is read")));
        }
        let group = get("group_size").and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
        let Some(group) = group.filter(|&group| fills_bytes(group)) else {
            return Err(wrong("group_size", get("group_size"), "groups are of a multiple of 8 inputs"));
        };
        let key = "modules_to_not_convert";
        let mut rules = Vec::new();
        for skipped in get(key).and_then(Value::as_array).into_iter().flatten() {
            let name = skipped.as_str().ok_or_else(|| wrong(key, Some(skipped), "a string is needed"))?;
            rules.push(Rule { target: Target::Name(name.to_owned()), outcome: None });
        }
        rules.push(Rule { target: Target::Linear, outcome: Some((&Binary, Scheme::binary(group))) });
        Ok(Some(Dialect::new(&Binary, rules)))
    }
}

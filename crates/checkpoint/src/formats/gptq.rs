//! GPTQ checkpoints: version 1, the dialect of AutoGPTQ, which GPTQModel, vLLM, SGLang and ExLlama read, and version 2, which
//! GPTQModel reads.
//!
//! | tensor | type | shape |
//! | --- | --- | --- |
//! | `qweight` | I32 | `[in·b/32, out]`, codes packed down each column, least significant bit first |
//! | `qzeros` | I32 | `[groups, out·b/32]`, zero points packed along each row |
//! | `scales` | F16 | `[groups, out]` |
//! | `g_idx` | I32 | `[in]`, group of every input column, out of order where groups are mapped (`desc_act`) |
//!
//! Version 1 stores a zero point less one (modulo 2^b), version 2 the zero point itself. Readers of version 1 disagree about
//! a zero point of 0: some add the one back field by field, others to whole words, where it carries into the neighbour. So
//! version 1 is written with symmetric matrices, or with those whose zero points happen to be above 0.

use super::{
    Format, assert_encodable, check_matrix, group_map_bytes, part, read_group_map, read_scales, refuse_binary,
    scale_bytes, transpose, unsupported, validated, word_bytes,
};
use crate::dialect::{Rule, Target, wrong};
use crate::{Checkpoint, Dialect, Error, TensorSpec};
use bitmill_kernels::{pack_bits, packed_words, unpack_bits};
use bitmill_scheme::{Activations, Bits, Granularity, GridKind, Quantized, ScaleType, Scheme};
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

const METHOD: &str = "gptq";
/// Packers and kernels work on blocks of this many rows and columns.
const BLOCK: usize = 32;

/// The format in one of its versions.
#[derive(Debug)]
pub(super) struct Gptq {
    /// What readers call it.
    name: &'static str,
    summary: &'static str,
    /// What a stored zero point is less than its value.
    less: u8,
}

/// Version 1.
pub(super) static V1: Gptq = Gptq {
    name: "gptq",
    summary: "GPTQ v1, symmetric 2, 3, 4 or 8 bits: GPTQModel, ExLlama; vLLM and SGLang at 4 and 8",
    less: 1,
};
/// Version 2.
pub(super) static V2: Gptq =
    Gptq { name: "gptq_v2", summary: "GPTQ v2, 2, 3, 4 or 8 bits with zero points: GPTQModel", less: 0 };

/// Widths that readers know, narrowest first.
const WIDTHS: [u32; 4] = [2, 3, 4, 8];

impl Format for Gptq {
    fn name(&self) -> &'static str {
        self.name
    }

    fn summary(&self) -> &'static str {
        self.summary
    }

    fn codes(&self) -> &'static str {
        "qweight"
    }

    fn scales(&self) -> &'static str {
        "scales"
    }

    fn scale_type(&self, _: ScaleType) -> ScaleType {
        ScaleType::F16
    }

    fn check(&self, module: &str, scheme: &Scheme, shape: [usize; 2]) -> Result<(), Error> {
        if !scheme.symmetric() && scheme.form().is_none() && self.less > 0 {
            let reason = "version 1 cannot store every zero point; use a symmetric scheme, gptq_v2 or pack-quantized";
            return Err(unsupported(self, module, scheme, reason));
        }
        self.check_layout(module, scheme, shape)
    }

    fn candidates(&self, scheme: &Scheme) -> Vec<Scheme> {
        let width = WIDTHS.into_iter().find(|&b| b >= scheme.bits().get()).and_then(|b| Bits::new(b).ok());
        let grid = GridKind::Int { bits: width.unwrap_or(scheme.bits()), symmetric: scheme.symmetric() };
        let granularity = match scheme.granularity {
            Granularity::Tensor => Granularity::Channel,
            other => other,
        };
        vec![Scheme { grid, granularity, scale: ScaleType::F16, activations: Activations::Full }]
    }

    fn holds(&self, module: &str, q: &Quantized) -> Result<(), Error> {
        self.check_layout(module, &q.scheme, q.shape)?;
        if self.less > 0 && q.zeros.contains(&0) {
            let reason = "readers of version 1 disagree about a zero point of 0, which it has; use gptq_v2";
            return Err(unsupported(self, module, &q.scheme, reason));
        }
        Ok(())
    }

    fn layout(&self, module: &str, scheme: &Scheme, [rows, cols]: [usize; 2]) -> Vec<TensorSpec> {
        let (bits, groups) = (scheme.bits().get(), scheme.groups(cols));
        let spec = |suffix: &str, dtype, shape: Vec<usize>| TensorSpec::new(format!("{module}.{suffix}"), dtype, shape);
        vec![
            spec("qweight", Dtype::I32, vec![packed_words(cols, bits), rows]),
            spec("qzeros", Dtype::I32, vec![groups, packed_words(rows, bits)]),
            spec("scales", Dtype::F16, vec![groups, rows]),
            spec("g_idx", Dtype::I32, vec![cols]),
        ]
    }

    fn encode(&self, module: &str, q: &Quantized) -> Vec<Vec<u8>> {
        assert_encodable(self, module, q);
        let [rows, cols] = q.shape;
        let (bits, groups) = (q.scheme.bits(), q.scheme.groups(cols));
        let height = packed_words(cols, bits.get());
        let mut packed = vec![0u32; rows * height];
        packed
            .par_chunks_mut(height)
            .zip(q.codes.par_chunks(cols))
            .for_each(|(words, row)| pack_bits(row, bits.get(), words));

        let width = packed_words(rows, bits.get());
        let mut zeros = vec![0u32; groups * width];
        let stored = match q.scheme.symmetric() {
            true => vec![bits.middle() - self.less; rows * groups],
            false => transpose(rows, groups, &q.zeros).iter().map(|z| z - self.less).collect(),
        };
        zeros.chunks_mut(width).zip(stored.chunks(rows)).for_each(|(words, row)| pack_bits(row, bits.get(), words));
        let scales = transpose(rows, groups, &q.scales);
        vec![
            word_bytes(&transpose(rows, height, &packed)),
            word_bytes(&zeros),
            scale_bytes(scales.into_iter(), ScaleType::F16),
            group_map_bytes(q),
        ]
    }

    fn shape(&self, module: &str, scheme: &Scheme, source: &Checkpoint) -> Result<[usize; 2], Error> {
        let qweight = part(source, module, "qweight")?;
        let [height, rows] = qweight.matrix()?;
        let b = scheme.bits().get() as usize;
        if rows == 0 || height == 0 || !height.is_multiple_of(b / gcd32(b)) {
            return Err(qweight.wrong_shape(format!("[in·{b}/32, out]")));
        }
        // The payload exists, so this product cannot overflow.
        Ok([rows, height * 32 / b])
    }

    fn decode(&self, module: &str, scheme: &Scheme, source: &Checkpoint) -> Result<Quantized, Error> {
        let qweight = part(source, module, "qweight")?;
        let [rows, cols] = self.shape(module, scheme, source)?;
        let (bits, height) = (scheme.bits(), qweight.shape[0]);
        let columns = transpose(height, rows, &qweight.words()?);
        let mut codes = vec![0u8; rows * cols];
        codes
            .par_chunks_mut(cols)
            .zip(columns.par_chunks(height))
            .for_each(|(row, words)| unpack_bits(words, bits.get(), row));

        let groups = scheme.groups(cols);
        let scales = part(source, module, "scales")?;
        if scales.shape != [groups, rows] {
            return Err(scales.wrong_shape(format!("[{groups}, {rows}]")));
        }
        let (stored, by_group) = read_scales(&scales)?;
        let scales = transpose(groups, rows, &by_group);
        let zeros = self.read_zeros(module, bits, [groups, rows], source)?;
        let mut scheme = scheme.with_scale(stored);
        // What is stored decides: zero points that are not the constant make it asymmetric whatever `sym` claims.
        let constant = zeros.iter().all(|&z| z == bits.middle());
        scheme.grid = GridKind::Int { bits, symmetric: scheme.symmetric() && constant };
        let zeros = if scheme.symmetric() { Vec::new() } else { zeros };

        let group_of = read_group_map(source, module, "g_idx", &mut scheme, cols)?;
        validated(
            module,
            source,
            Quantized { scheme, shape: [rows, cols], codes, scales, zeros, group_of, input: None },
        )
    }

    fn config(&self, layers: &BTreeMap<String, Scheme>, ignored: &[String]) -> Result<Value, Error> {
        // The commonest scheme is the base; the others are exceptions by name.
        let mut counts: Vec<(Scheme, usize)> = Vec::new();
        for scheme in layers.values() {
            match counts.iter_mut().find(|(s, _)| s == scheme) {
                Some((_, n)) => *n += 1,
                None => counts.push((*scheme, 1)),
            }
        }
        let base = counts.iter().rev().max_by_key(|(_, n)| *n).map(|(s, _)| *s);
        let Some(base) = base else {
            return Err(wrong("layers", None, "at least one quantized layer is needed"));
        };
        let mut dynamic = Map::new();
        // lm_head has a key of its own.
        for module in ignored.iter().filter(|m| *m != "lm_head") {
            dynamic.insert(format!("-:^{}$", fancy_regex::escape(module)), json!({}));
        }
        for (module, scheme) in layers.iter().filter(|(_, s)| **s != base) {
            let mut exception = json!({"bits": scheme.bits().get(), "group_size": group_size(scheme)});
            if scheme.symmetric() != base.symmetric() {
                exception["sym"] = json!(scheme.symmetric());
            }
            dynamic.insert(format!("+:^{}$", fancy_regex::escape(module)), exception);
        }
        let mut config = json!({
            "quant_method": METHOD,
            "bits": base.bits().get(),
            "group_size": group_size(&base),
            "desc_act": layers.values().any(|s| matches!(s.granularity, Granularity::Mapped(_))),
            "sym": base.symmetric(),
            "lm_head": layers.contains_key("lm_head"),
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
        });
        if !dynamic.is_empty() {
            config["dynamic"] = Value::Object(dynamic);
        }
        Ok(config)
    }

    fn recognise(&self, config: &Value) -> Result<Option<Dialect>, Error> {
        if config.get("quant_method").and_then(Value::as_str) != Some(METHOD) {
            return Ok(None);
        }
        refuse_variants(config)?;
        if version(config).unwrap_or(V1.name) != self.name {
            return Ok(None);
        }
        let own: &'static dyn Format = if self.less > 0 { &V1 } else { &V2 };
        let base = read_scheme("", config, None)?;
        let mut rules = Vec::new();
        let dynamic = config.get("dynamic").and_then(Value::as_object);
        for (pattern, exception) in dynamic.into_iter().flatten() {
            let path = format!("dynamic.{pattern}.");
            let (outcome, pattern) = match pattern.strip_prefix("-:") {
                Some(rest) => (None, rest),
                None => (
                    Some((own, read_scheme(&path, exception, Some(base))?)),
                    pattern.strip_prefix("+:").unwrap_or(pattern),
                ),
            };
            rules.push(Rule { target: Target::pattern("dynamic", pattern)?, outcome });
        }
        if config.get("lm_head").and_then(Value::as_bool) != Some(true) {
            rules.push(Rule { target: Target::Name("lm_head".to_owned()), outcome: None });
        }
        rules.push(Rule { target: Target::Linear, outcome: Some((own, base)) });
        Ok(Some(Dialect::new(own, rules)))
    }
}

impl Gptq {
    /// What both versions ask of a matrix.
    fn check_layout(&self, module: &str, scheme: &Scheme, shape: [usize; 2]) -> Result<(), Error> {
        refuse_binary(self, module, scheme)?;
        let refuse = |reason: &str| Err(unsupported(self, module, scheme, reason));
        if scheme.activations != Activations::Full {
            return refuse("it quantizes weights only; use int-quantized");
        }
        if !WIDTHS.contains(&scheme.bits().get()) {
            return refuse("its readers know 2, 3, 4 and 8 bits; use pack-quantized for other widths");
        }
        if scheme.granularity == Granularity::Tensor {
            return refuse("it has scales per group or channel; use one of these");
        }
        if scheme.scale != ScaleType::F16 {
            return refuse("its scales are f16; fit the scales in that type");
        }
        if shape.iter().any(|d| !d.is_multiple_of(BLOCK)) {
            let [rows, cols] = shape;
            return refuse(&format!(
                "its readers need multiples of {BLOCK} and the shape is [{rows}, {cols}]; ignore it"
            ));
        }
        check_matrix(self, module, scheme, shape)
    }

    /// Zero points as `[out, groups]`.
    fn read_zeros(
        &self,
        module: &str,
        bits: Bits,
        [groups, rows]: [usize; 2],
        source: &Checkpoint,
    ) -> Result<Vec<u8>, Error> {
        let qzeros = part(source, module, "qzeros")?;
        let width = packed_words(rows, bits.get());
        if qzeros.shape != [groups, width] {
            return Err(qzeros.wrong_shape(format!("[{groups}, {width}]")));
        }
        let words = qzeros.words()?;
        let mut zeros = vec![0u8; groups * rows];
        for (row, words) in zeros.chunks_mut(rows).zip(words.chunks(width)) {
            unpack_bits(words, bits.get(), row);
        }
        // Each field wraps on its own, as AutoGPTQ defined it.
        zeros.iter_mut().for_each(|z| *z = z.wrapping_add(self.less) & bits.max_code());
        Ok(transpose(groups, rows, &zeros))
    }
}

/// Greatest common divisor of a width from 1 to 8 and 32.
fn gcd32(bits: usize) -> usize {
    1 << bits.trailing_zeros()
}

fn group_size(scheme: &Scheme) -> Value {
    match scheme.granularity {
        Granularity::Group(g) | Granularity::Mapped(g) => json!(g),
        _ => json!(-1),
    }
}

/// The name of the layout; newer writers call the key `format`.
fn version(config: &Value) -> Option<&str> {
    ["checkpoint_format", "format"].iter().find_map(|k| config.get(k)).and_then(Value::as_str)
}

fn refuse_variants(config: &Value) -> Result<(), Error> {
    let marlin = config.get("is_marlin_format").and_then(Value::as_bool) == Some(true);
    let layout = if marlin { "marlin" } else { version(config).unwrap_or("gptq") };
    if !matches!(layout, "gptq" | "gptq_v2") {
        let known = "gptq, gptq_v2".to_owned();
        return Err(Error::UnknownFormat { key: "checkpoint_format", got: layout.to_owned(), known });
    }
    match config.get("pack_dtype").filter(|v| !v.is_null()) {
        Some(dtype) if dtype != "int32" => Err(wrong("pack_dtype", Some(dtype), "only int32 is read")),
        _ => Ok(()),
    }
}

/// Reads `bits`, `group_size` and `sym` under the name of either generation of writers; `base` fills what is absent.
fn read_scheme(path: &str, config: &Value, base: Option<Scheme>) -> Result<Scheme, Error> {
    let get = |keys: [&str; 2]| keys.iter().find_map(|k| config.get(k)).filter(|v| !v.is_null());
    let bits = match (get(["bits", "w_bit"]), base) {
        (None, Some(base)) => base.bits(),
        (v, _) => v
            .and_then(Value::as_u64)
            .and_then(|b| u32::try_from(b).ok())
            .filter(|b| WIDTHS.contains(b))
            .and_then(|b| Bits::new(b).ok())
            .ok_or_else(|| wrong(&format!("{path}bits"), v, "2, 3, 4 and 8 bits are read"))?,
    };
    let granularity = match (get(["group_size", "q_group_size"]), base) {
        (None, Some(base)) => base.granularity,
        (v, _) => match v.and_then(Value::as_i64) {
            Some(-1) => Granularity::Channel,
            Some(g) if g > 0 => Granularity::Group(g as usize),
            _ => return Err(wrong(&format!("{path}group_size"), v, "-1 or a size above zero is needed")),
        },
    };
    let symmetric = match get(["sym", "sym"]) {
        None => base.is_none_or(|b| b.symmetric()),
        Some(v) => v.as_bool().ok_or_else(|| wrong(&format!("{path}sym"), Some(v), "true or false is needed"))?,
    };
    let scheme = Scheme::int(bits, symmetric, granularity).with_scale(ScaleType::F16);
    Ok(scheme)
}

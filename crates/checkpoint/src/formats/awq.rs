//! AWQ checkpoints in the `gemm` layout of AutoAWQ, which vLLM, SGLang and, through GPTQModel, transformers read.
//!
//! | tensor | type | shape |
//! | --- | --- | --- |
//! | `qweight` | I32 | `[in, out/8]`, eight neighbouring outputs of one input in a word |
//! | `qzeros` | I32 | `[groups, out/8]`, zero points the same way |
//! | `scales` | F16 | `[groups, out]` |
//!
//! Four bits, always with zero points: a symmetric matrix is one whose zero points are all 8. The eight nibbles of a word
//! hold its outputs in the order 0, 2, 4, 6, 1, 3, 5, 7, lowest bits first. The configuration knows one scheme for all layers,
//! and names exceptions by any part of their names.

use super::{
    Format, assert_encodable, check_matrix, part, read_scales, refuse_binary, scale_bytes, transpose, unsupported,
    validated, word_bytes,
};
use crate::dialect::{Rule, Target, wrong};
use crate::{Checkpoint, Dialect, Error, TensorSpec, TensorView};
use bitmill_scheme::{Activations, Bits, Granularity, Quantized, ScaleType, Scheme};
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Value, json};
use std::collections::BTreeMap;

const METHOD: &str = "awq";
/// Codes of a word.
const WORD: usize = 8;
/// The output that each nibble of a word holds.
const ORDER: [usize; WORD] = [0, 2, 4, 6, 1, 3, 5, 7];
const BITS: u32 = 4;

/// The format.
#[derive(Debug)]
pub(super) struct Awq;

impl Format for Awq {
    fn name(&self) -> &'static str {
        METHOD
    }

    fn summary(&self) -> &'static str {
        "AWQ gemm, 4 bits with zero points: vLLM, SGLang, AutoAWQ, GPTQModel"
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
        refuse_binary(self, module, scheme)?;
        let refuse = |reason: &str| Err(unsupported(self, module, scheme, reason));
        if scheme.activations != Activations::Full {
            return refuse("it quantizes weights only; use int-quantized");
        }
        if scheme.form().is_none() && scheme.bits().get() != BITS {
            return refuse("its readers know 4 bits; use gptq or pack-quantized for other widths");
        }
        if !matches!(scheme.granularity, Granularity::Group(_) | Granularity::Channel) {
            return refuse(
                "it has scales per group of consecutive columns or channel, and none out of order (desc_act)",
            );
        }
        if scheme.form().is_none() && scheme.symmetric() {
            return refuse("it stores a zero point for every group; pass --asymmetric");
        }
        if scheme.scale != ScaleType::F16 {
            return refuse("its scales are f16; fit the scales in that type");
        }
        if !shape[0].is_multiple_of(WORD) {
            return refuse(&format!("it packs {WORD} outputs into a word and there are {}; ignore it", shape[0]));
        }
        check_matrix(self, module, scheme, shape)
    }

    fn candidates(&self, scheme: &Scheme) -> Vec<Scheme> {
        let granularity = match scheme.granularity {
            Granularity::Tensor => Granularity::Channel,
            other => other,
        };
        // The matrix as it is says why it is refused; its numbers may have room in 4 bits all the same.
        let own = Scheme::int(scheme.bits(), false, granularity).with_scale(ScaleType::F16);
        let four = Bits::new(BITS).map(|bits| Scheme::int(bits, false, granularity).with_scale(ScaleType::F16));
        std::iter::once(own).chain(four).collect()
    }

    fn layout(&self, module: &str, scheme: &Scheme, [rows, cols]: [usize; 2]) -> Vec<TensorSpec> {
        let groups = scheme.groups(cols);
        let spec = |suffix: &str, dtype, shape: [usize; 2]| TensorSpec::new(format!("{module}.{suffix}"), dtype, shape);
        vec![
            spec("qweight", Dtype::I32, [cols, rows / WORD]),
            spec("qzeros", Dtype::I32, [groups, rows / WORD]),
            spec("scales", Dtype::F16, [groups, rows]),
        ]
    }

    fn encode(&self, module: &str, q: &Quantized) -> Vec<Vec<u8>> {
        assert_encodable(self, module, q);
        let [rows, cols] = q.shape;
        let groups = q.scheme.groups(cols);
        let scales = transpose(rows, groups, &q.scales);
        vec![
            word_bytes(&pack(&transpose(rows, cols, &q.codes))),
            word_bytes(&pack(&transpose(rows, groups, &q.zeros))),
            scale_bytes(scales.into_iter(), ScaleType::F16),
        ]
    }

    fn shape(&self, module: &str, scheme: &Scheme, source: &Checkpoint) -> Result<[usize; 2], Error> {
        let qweight = part(source, module, "qweight")?;
        let [cols, words] = qweight.matrix()?;
        if words == 0 || cols == 0 || scheme.check(cols).is_err() {
            return Err(qweight.wrong_shape("[in, out/8], not empty and in whole groups,"));
        }
        Ok([words * WORD, cols])
    }

    fn decode(&self, module: &str, scheme: &Scheme, source: &Checkpoint) -> Result<Quantized, Error> {
        let qweight = part(source, module, "qweight")?;
        let [rows, cols] = self.shape(module, scheme, source)?;
        let words = rows / WORD;
        let groups = scheme.groups(cols);
        let scales = part(source, module, "scales")?;
        if scales.shape != [groups, rows] {
            return Err(scales.wrong_shape(format!("[{groups}, {rows}]")));
        }
        let (stored, by_group) = read_scales(&scales)?;
        let qzeros = part(source, module, "qzeros")?;
        if qzeros.shape != [groups, words] {
            return Err(qzeros.wrong_shape(format!("[{groups}, {words}]")));
        }
        let q = Quantized {
            scheme: scheme.with_scale(stored),
            shape: [rows, cols],
            codes: transpose(cols, rows, &unpack(&qweight)?),
            scales: transpose(groups, rows, &by_group),
            zeros: transpose(groups, rows, &unpack(&qzeros)?),
            group_of: Vec::new(),
            input: None,
        };
        validated(module, source, q)
    }

    fn config(&self, layers: &BTreeMap<String, Scheme>, ignored: &[String]) -> Result<Value, Error> {
        let mut schemes = layers.iter();
        let Some((_, base)) = schemes.next() else {
            return Err(wrong("layers", None, "at least one quantized layer is needed"));
        };
        if let Some((module, other)) = schemes.find(|(_, s)| *s != base) {
            let reason = format!("its configuration has one scheme for all layers, and others are {base}");
            return Err(unsupported(self, module, other, reason));
        }
        for left in ignored {
            if let Some(module) = layers.keys().find(|m| m.contains(left.as_str())) {
                let reason = format!("its configuration would leave it out with {left}, a part of its name");
                return Err(unsupported(self, module, base, reason));
            }
        }
        let size = match base.granularity {
            Granularity::Group(g) => json!(g),
            _ => json!(-1),
        };
        Ok(json!({
            "quant_method": METHOD,
            "bits": BITS,
            "group_size": size,
            "zero_point": true,
            "version": "gemm",
            "modules_to_not_convert": ignored,
        }))
    }

    fn recognise(&self, config: &Value) -> Result<Option<Dialect>, Error> {
        if config.get("quant_method").and_then(Value::as_str) != Some(METHOD) {
            return Ok(None);
        }
        let get = |keys: [&str; 2]| keys.iter().find_map(|k| config.get(k).filter(|v| !v.is_null()));
        let version = get(["version", "version"]).and_then(Value::as_str).unwrap_or("gemm");
        if !version.eq_ignore_ascii_case("gemm") {
            return Err(Error::UnknownFormat { key: "version", got: version.to_owned(), known: "gemm".to_owned() });
        }
        let bits = get(["bits", "w_bit"]);
        let bits = bits
            .and_then(Value::as_u64)
            .filter(|&b| b == u64::from(BITS))
            .map(|_| BITS)
            .and_then(|b| Bits::new(b).ok());
        let bits = bits.ok_or_else(|| wrong("bits", get(["bits", "w_bit"]), "4 bits are read"))?;
        let size = get(["group_size", "q_group_size"]);
        let granularity = match size.and_then(Value::as_i64) {
            Some(-1) => Granularity::Channel,
            Some(g) if g > 0 => Granularity::Group(g as usize),
            _ => return Err(wrong("group_size", size, "-1 or a size above zero is needed")),
        };
        // Some writers say false of symmetric schemes, and store the constant zero points all the same, which are read.
        let scheme = Scheme::int(bits, false, granularity).with_scale(ScaleType::F16);
        let mut rules = Vec::new();
        for skipped in config.get("modules_to_not_convert").and_then(Value::as_array).into_iter().flatten() {
            let key = "modules_to_not_convert";
            let name = skipped.as_str().ok_or_else(|| wrong(key, Some(skipped), "a string is needed"))?;
            rules.push(Rule {
                target: Target::pattern(key, &format!(".*{}", fancy_regex::escape(name)))?,
                outcome: None,
            });
        }
        if config.get("lm_head").and_then(Value::as_bool) != Some(true) {
            rules.push(Rule { target: Target::Name("lm_head".to_owned()), outcome: None });
        }
        rules.push(Rule { target: Target::Linear, outcome: Some((&Awq, scheme)) });
        Ok(Some(Dialect::new(&Awq, rules)))
    }
}

/// Words of codes, eight neighbours each; the last dimension of what they come from is a multiple of eight.
fn pack(codes: &[u8]) -> Vec<u32> {
    let word = |codes: &[u8]| ORDER.iter().enumerate().fold(0, |w, (i, &c)| w | u32::from(codes[c]) << (4 * i));
    codes.par_chunks(WORD).map(word).collect()
}

/// The codes in the words of a tensor.
fn unpack(view: &TensorView<'_>) -> Result<Vec<u8>, Error> {
    let words = view.words()?;
    let mut codes = vec![0u8; words.len() * WORD];
    codes.par_chunks_mut(WORD).zip(&words).for_each(|(codes, &word)| {
        ORDER.iter().enumerate().for_each(|(i, &c)| codes[c] = (word >> (4 * i) & 15) as u8);
    });
    Ok(codes)
}

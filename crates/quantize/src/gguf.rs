//! A GGUF file as the output of a plan: its metadata, its tensors under their own names and types, and the bytes that
//! copied tensors turn into.
//!
//! Tensors keep the names of the model folder inside a run; the file's header has GGUF's names. Rows of queries and keys
//! of `llama` models are reordered as they are written: rows are whole, so it does not matter that they are quantized.

mod metadata;

use crate::{Action, Error, Settings, Unit};
use bitmill_checkpoint::gguf::{self, GgmlType, GgufSpec, Storage};
use bitmill_checkpoint::{Checkpoint, Dtype, OutputPlan, TensorSpec, TensorView};
use bitmill_models::{Act, ModelSpec, RopeKind};
use bitmill_scheme::{BLOCKS, Scheme};
use half::{bf16, f16};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::BTreeMap;

/// What becomes of the matrices outside of blocks, and of block linears that are left out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GgufSettings {
    /// Type of the token embedding: `f32`, `f16`, `bf16` or a block type.
    pub token_embedding: String,
    /// Type of the output matrix.
    pub output: String,
}

impl Default for GgufSettings {
    fn default() -> Self {
        GgufSettings { token_embedding: "f16".into(), output: "f16".into() }
    }
}

/// Names that [`GgufSettings`] take.
#[must_use]
pub fn gguf_types() -> Vec<&'static str> {
    ["f32", "f16", "bf16"].into_iter().chain(BLOCKS.iter().map(|b| b.name)).collect()
}

/// How the tensors of a plan lie in a GGUF file.
#[derive(Debug)]
pub struct GgufOutput {
    /// Copied tensors and the types their numbers get.
    dense: BTreeMap<String, Dtype>,
    /// Tensors whose rows are interleaved, and their heads.
    interleaved: BTreeMap<String, usize>,
}

/// Name of the file inside of the work folder.
pub(crate) const FILE: &str = "model.gguf";

/// Module of the embedding and of the output matrix.
const EMBEDDING: &str = "model.embed_tokens";
const HEAD: &str = bitmill_models::HEAD;

/// Refuses a model that llama.cpp would run differently, or not at all.
pub(crate) fn check(input: &Checkpoint, spec: Option<&ModelSpec>, notes: &mut Vec<String>) -> Result<(), Error> {
    let refuse = |reason: String| Err(Error::Gguf { dir: input.dir().into(), reason });
    let Some(spec) = spec else {
        return refuse(
            "its architecture is none that is run here, and names and settings in the file depend on it".into(),
        );
    };
    if !spec.causal {
        return refuse("encoders are not written as GGUF".into());
    }
    if spec.act != Act::Silu {
        return refuse(format!(
            "its activation {:?} is not the one llama.cpp runs this architecture with (SiLU)",
            spec.act
        ));
    }
    if spec.model_type == "qwen3" && (spec.qkv_bias || spec.out_bias) {
        return refuse("llama.cpp's qwen3 has no biases".into());
    }
    if matches!(spec.rope.as_ref().map(|r| &r.kind), Some(RopeKind::Dynamic { .. } | RopeKind::LongRope { .. })) {
        return refuse("llama.cpp has no dynamic or longrope scaling for this architecture".into());
    }
    if let Some(window) = spec.windows.iter().flatten().min().filter(|&&w| w < spec.max_positions) {
        notes.push(format!(
            "llama.cpp runs this architecture without its sliding window: texts beyond {window} tokens differ"
        ));
    }
    Ok(())
}

/// The scheme that the settings ask for a matrix outside of blocks; `None` where it stays dense.
///
/// # Errors
/// [`Error::Gguf`] for a type that does not exist.
pub(crate) fn end_scheme(
    input: &Checkpoint,
    settings: &Settings,
    spec: &ModelSpec,
    module: &str,
) -> Result<Option<Scheme>, Error> {
    let name = end_type(settings, spec, module);
    let kind = type_named(name);
    match kind.map(|k| k.storage) {
        Some(Storage::Block(block)) => Ok(Some(Scheme::block(block))),
        Some(_) => Ok(None),
        None => {
            let reason = format!("there is no tensor type `{name}`; the types are {}", gguf_types().join(", "));
            Err(Error::Gguf { dir: input.dir().into(), reason })
        }
    }
}

fn end_type<'a>(settings: &'a Settings, spec: &ModelSpec, module: &str) -> &'a str {
    let Some(types) = &settings.gguf else { return "f16" };
    // A tied embedding is the output matrix.
    if module == HEAD || (module == EMBEDDING && spec.tied) { &types.output } else { &types.token_embedding }
}

fn type_named(name: &str) -> Option<&'static GgmlType> {
    gguf::TYPES.iter().find(|t| t.storage != Storage::Opaque && t.name.eq_ignore_ascii_case(name))
}

/// Whether the file does without a tensor of the folder: buffers of old exporters, and a head beside tied embeddings.
fn dropped(name: &str, spec: &ModelSpec) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || (spec.tied && name.strip_suffix(".weight") == Some(HEAD))
}

/// Lays out the file.
///
/// # Errors
/// [`Error::TuningFormat`], since tuning moves integer codes; [`Error::Gguf`] for a tensor that GGUF has no name for; whatever the tokenizer or the container refuses.
pub(crate) fn output(
    input: &Checkpoint,
    spec: &ModelSpec,
    units: &mut Vec<Unit>,
    settings: &Settings,
) -> Result<(GgufOutput, OutputPlan), Error> {
    if settings.tuning.is_some() {
        return Err(Error::TuningFormat { format: settings.format.clone() });
    }
    for unit in units.iter_mut() {
        unit.tensors.retain(|t| !dropped(&t.name, spec));
    }
    units.retain(|u| !u.tensors.is_empty());
    let architecture = metadata::architecture(spec);
    let mut out = GgufOutput { dense: BTreeMap::new(), interleaved: BTreeMap::new() };
    let mut tensors = Vec::new();
    for tensor in units.iter_mut().flat_map(|u| &mut u.tensors) {
        let refuse = |reason: String| Error::Gguf { dir: input.dir().into(), reason };
        let name = gguf::gguf_name(&tensor.name)
            .ok_or_else(|| refuse(format!("tensor {} has no name in GGUF; is it part of the model?", tensor.name)))?;
        let shape = input.spec(&tensor.name).map(|s| s.shape.clone()).unwrap_or_default();
        let storage = match &tensor.action {
            Action::Quantize { scheme, .. } => scheme.form().map_or(Storage::Opaque, |f| Storage::Block(f.kind)),
            Action::Copy => {
                let dtype = dense_type(&tensor.name, &shape, settings, spec);
                out.dense.insert(tensor.name.clone(), dtype);
                tensor.bytes = TensorSpec::new("", dtype, shape.clone()).bytes() as u64;
                Storage::Dense(dtype)
            }
        };
        let kind = gguf::by_storage(storage).ok_or_else(|| refuse(format!("{}: no type of GGUF fits", tensor.name)))?;
        if let Some(heads) = gguf::interleaved_heads(architecture, &tensor.name, spec.heads, spec.kv_heads) {
            out.interleaved.insert(tensor.name.clone(), heads);
        }
        tensors.push((tensor.name.clone(), GgufSpec { name, kind, shape }));
    }
    let keys = metadata::metadata(input, spec, settings, &tensors)?;
    let constants = metadata::rope_factors(spec);
    Ok((out, OutputPlan::gguf(FILE, &keys, &constants, &tensors)?))
}

/// Vectors are f32, the ends of the model what was asked for, and linears that are left out f16.
fn dense_type(name: &str, shape: &[usize], settings: &Settings, spec: &ModelSpec) -> Dtype {
    if shape.len() < 2 {
        return Dtype::F32;
    }
    let module = name.strip_suffix(".weight").unwrap_or(name);
    let asked = if module == EMBEDDING || module == HEAD { end_type(settings, spec, module) } else { "f16" };
    match type_named(asked).map(|t| t.storage) {
        Some(Storage::Dense(dtype)) => dtype,
        _ => Dtype::F16,
    }
}

impl GgufOutput {
    /// The bytes of a copied tensor.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a type that is no number; [`Error::Overflow`] for a weight that f16 does not hold.
    pub(crate) fn copied<'a>(&self, view: &TensorView<'a>) -> Result<Cow<'a, [u8]>, Error> {
        let Some(&dtype) = self.dense.get(view.name) else { return Ok(Cow::Borrowed(view.bytes)) };
        let values = view.to_f32()?;
        let bytes = match dtype {
            _ if dtype == view.dtype => view.bytes.to_vec(),
            Dtype::F16 => {
                let halves: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
                if let Some(index) = halves.iter().position(|h| !h.is_finite()) {
                    let value = values[index];
                    return Err(Error::Overflow { tensor: view.name.into(), index, value });
                }
                halves.iter().flat_map(|h| h.to_le_bytes()).collect()
            }
            Dtype::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        };
        Ok(Cow::Owned(self.ordered(view.name, view.shape.first().copied().unwrap_or(1), bytes)))
    }

    /// The bytes of a tensor with `rows` rows in the order of the file.
    pub(crate) fn ordered(&self, name: &str, rows: usize, bytes: Vec<u8>) -> Vec<u8> {
        match self.interleaved.get(name) {
            Some(&heads) => gguf::interleave(&bytes, rows, heads),
            None => bytes,
        }
    }
}

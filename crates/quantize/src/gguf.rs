//! A GGUF file as the output of a plan: its metadata, its tensors under their own names and types, and the bytes that
//! copied tensors turn into.
//!
//! Tensors keep the names of the model folder inside a run; the file's header has GGUF's names. Rows of queries and keys
//! of `llama` models are reordered as they are written: rows are whole, so it does not matter that they are quantized.

mod check;
mod metadata;
mod mixes;
#[cfg(test)]
mod tests;
mod types;

pub(crate) use check::check;
pub use mixes::{MIXES, Mix};
pub(crate) use types::TensorTypes;
pub use types::{gguf_mix, gguf_types};

use crate::{Action, Error, Settings, Unit};
use bitmill_checkpoint::gguf::{self, GgufSpec, Storage};
use bitmill_checkpoint::{Checkpoint, Dtype, Order, OutputPlan, TensorSpec, TensorView};
use bitmill_models::{Entry, ModelSpec};
use half::{bf16, f16};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

/// Which types the matrices of a file get, beside the scheme.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GgufSettings {
    /// Type of the token embedding: `f32`, `f16`, `bf16` or a block type.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_embedding: Option<String>,
    /// Type of the output matrix, and of an embedding that is tied to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub output: Option<String>,
    /// A row of [`MIXES`] that says what each matrix becomes; the scheme is its base type.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mix: Option<String>,
    /// Every matrix gets the one type, those outside of blocks too.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub pure: bool,
    /// Regular expressions searched in GGUF's names of tensors, and the type of the first that is found.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub overrides: Vec<(String, String)>,
    /// Whether a file that is quantized already may be quantized again.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub requantize: bool,
}

/// How the tensors of a plan lie in a GGUF file.
#[derive(Debug)]
pub struct GgufOutput {
    /// Copied tensors and the types their numbers get.
    dense: BTreeMap<String, Dtype>,
    /// Tensors whose rows are interleaved, and their heads.
    interleaved: BTreeMap<String, usize>,
    /// Norms that are one more in the file.
    one_more: BTreeSet<String>,
}

/// Name of the file inside of the work folder, without its end.
pub(crate) const STEM: &str = "model";

/// The tensor of divisors of the rotary frequencies, which folders have no name for.
const ROPE_FACTORS: &str = gguf::ROPE_FACTORS[0];

/// Whether the file does without a tensor of the folder: buffers of old exporters, a head beside tied embeddings, and what
/// stands behind the hidden states of an encoder.
fn dropped(name: &str, spec: &ModelSpec) -> bool {
    let layout = spec.layout;
    let own = |module: Option<&str>| {
        module.is_some_and(|module| name.starts_with(&format!("{}{module}.", spec.spelling.prefix)))
    };
    name.ends_with(".rotary_emb.inv_freq")
        || gguf::ROPE_FACTORS.contains(&name)
        || (spec.tied && name.strip_suffix(".weight") == spec.head().as_deref())
        || (spec.model_type == "bert" && name.starts_with("cls."))
        || own(layout.pooler)
        || matches!(&layout.entry, Entry::Tokens(_, Some(added)) if added.position_ids
            .is_some_and(|ids| name == format!("{}{ids}", spec.spelling.prefix)))
}

/// Shape of the numbers that a tensor of the input stands for.
type Shapes<'a> = &'a dyn Fn(&str) -> Option<Vec<usize>>;

/// Lays out the file. `dense` has the types that dense matrices get, `shape_of` the shape of every tensor.
///
/// # Errors
/// [`Error::TuningFormat`], since tuning moves integer codes; [`Error::Gguf`] for a tensor that GGUF has no name for; whatever the tokenizer or the container refuses.
pub(crate) fn output(
    input: &Checkpoint,
    spec: &ModelSpec,
    units: &mut Vec<Unit>,
    (dense, shape_of): (&BTreeMap<String, Dtype>, Shapes<'_>),
    settings: &Settings,
) -> Result<(GgufOutput, OutputPlan), Error> {
    if settings.tuning.is_some() || settings.reconstruction.is_some() {
        return Err(Error::TuningFormat { format: settings.format.clone() });
    }
    for unit in units.iter_mut() {
        unit.tensors.retain(|t| !dropped(&t.name, spec));
    }
    units.retain(|u| !u.tensors.is_empty());
    let architecture = metadata::architecture(spec);
    let mut out = GgufOutput { dense: BTreeMap::new(), interleaved: BTreeMap::new(), one_more: BTreeSet::new() };
    let mut tensors = Vec::new();
    for tensor in units.iter_mut().flat_map(|u| &mut u.tensors) {
        let refuse = |reason: String| Error::Gguf { dir: input.dir().into(), reason };
        let name = gguf::gguf_name(architecture, &tensor.name)
            .ok_or_else(|| refuse(format!("tensor {} has no name in GGUF; is it part of the model?", tensor.name)))?;
        let shape = shape_of(&tensor.name).unwrap_or_default();
        let storage = match &tensor.action {
            Action::Quantize { scheme, .. } => scheme.form().map_or(Storage::Opaque, |f| Storage::Block(f.kind)),
            Action::Copy => {
                // Vectors are f32, and linears that are left out f16.
                let own = dense.get(&tensor.name).copied().filter(|_| !gguf::always_f32(&name));
                let wide = shape.len() < 2 || gguf::always_f32(&name);
                let dtype = own.unwrap_or(if wide { Dtype::F32 } else { Dtype::F16 });
                out.dense.insert(tensor.name.clone(), dtype);
                tensor.bytes = TensorSpec::new("", dtype, shape.clone()).bytes() as u64;
                Storage::Dense(dtype)
            }
        };
        let kind = gguf::by_storage(storage).ok_or_else(|| refuse(format!("{}: no type of GGUF fits", tensor.name)))?;
        if let Some(heads) = gguf::interleaved_heads(architecture, &tensor.name, spec.heads, spec.kv_heads) {
            out.interleaved.insert(tensor.name.clone(), heads);
        }
        if gguf::lacks_one(architecture, &tensor.name) {
            out.one_more.insert(tensor.name.clone());
        }
        tensors.push((tensor.name.clone(), GgufSpec { name, kind, shape }));
    }
    let keys = metadata::metadata(input, spec, settings, &tensors)?;
    let constants = match input.tensor(ROPE_FACTORS) {
        Ok(own) if input.gguf().is_some() => metadata::constant(ROPE_FACTORS, &own.to_f32()?),
        _ => metadata::rope_factors(spec),
    };
    Ok((out, OutputPlan::gguf(STEM, &keys, &constants, &tensors, settings.shard_bytes)?))
}

impl GgufOutput {
    /// The bytes of the tensor `name` of `input`, which is not quantized in the file.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a type that is no number; [`Error::Overflow`] for a weight that f16 does not hold.
    pub(crate) fn copied<'a>(&self, input: &'a Checkpoint, name: &str) -> Result<Cow<'a, [u8]>, Error> {
        let view = input.tensor(name)?;
        let Some(&dtype) = self.dense.get(name) else { return Ok(Cow::Borrowed(view.bytes)) };
        if dtype == view.dtype && view.order == Order::Rows && !self.one_more.contains(name) {
            let rows = view.shape.first().copied().unwrap_or(1);
            return Ok(Cow::Owned(self.ordered(name, rows, view.bytes.to_vec())));
        }
        let module = name.strip_suffix(".weight").filter(|module| input.scheme_of(module).is_some());
        let values = match module {
            Some(module) => input.weight(module)?.to_f32()?,
            None => view.to_f32()?,
        };
        Ok(Cow::Owned(self.stored(&view, &values, dtype)?))
    }

    /// The bytes of a tensor that stays dense, with other numbers in it.
    pub(crate) fn with_values(&self, view: &TensorView<'_>, values: &[f32]) -> Result<Vec<u8>, Error> {
        match self.dense.get(view.name) {
            Some(&dtype) => self.stored(view, values, dtype),
            None => Ok(view.with_values(values)?),
        }
    }

    fn stored(&self, view: &TensorView<'_>, values: &[f32], dtype: Dtype) -> Result<Vec<u8>, Error> {
        let values = &*match self.one_more.contains(view.name) {
            true => Cow::Owned(values.iter().map(|v| v + 1.0).collect::<Vec<f32>>()),
            false => Cow::Borrowed(values),
        };
        let bytes = match dtype {
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
        Ok(self.ordered(view.name, view.shape.first().copied().unwrap_or(1), bytes))
    }

    /// The row of the folder's tensor `name`, of `rows` rows, that is row `row` in the file.
    pub(crate) fn source_row(&self, name: &str, row: usize, rows: usize) -> usize {
        self.interleaved.get(name).map_or(row, |&heads| gguf::interleaved_from(row, rows, heads))
    }

    /// Whether rows of the tensor `name` lie in the file as they do in the folder.
    pub(crate) fn keeps_rows(&self, name: &str) -> bool {
        !self.interleaved.contains_key(name)
    }

    /// The bytes of a tensor with `rows` rows in the order of the file.
    pub(crate) fn ordered(&self, name: &str, rows: usize, bytes: Vec<u8>) -> Vec<u8> {
        match self.interleaved.get(name) {
            Some(&heads) => gguf::interleave(&bytes, rows, heads),
            None => bytes,
        }
    }
}

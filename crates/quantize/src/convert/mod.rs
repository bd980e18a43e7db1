//! Conversion: the numbers of a quantized model under another format, code for code, or as plain numbers.
//!
//! A [`Conversion`] decides what becomes of every tensor before anything is written. Whether a format holds a matrix is a
//! matter of its very scales, zero points and codes, so every quantized matrix is read for that: a refusal names the
//! first number that is not held. What is written is decided by the input and the target alone.

mod fate;
mod write;

pub use write::Converted;

use crate::{Action, Error, GgufOutput, GgufSettings, PlannedTensor, Settings, Unit, gguf, plan};
use bitmill_checkpoint::{Checkpoint, Dialect, Dtype, Format, GGUF, OutputPlan, SIDECARS, TensorSpec, cache_scheme};
use bitmill_models::ModelSpec;
use bitmill_scheme::{Bits, Granularity, ScaleType, Scheme};
use fate::Fate;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What a model is converted to.
#[derive(Debug, Clone, Copy)]
pub enum Target {
    /// A quantized format.
    Format(&'static dyn Format),
    /// Plain numbers of this type: F32, F16 or BF16.
    Dense(Dtype),
}

impl Target {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Target::Format(format) => format.name(),
            Target::Dense(Dtype::F16) => "f16",
            Target::Dense(Dtype::BF16) => "bf16",
            Target::Dense(_) => "f32",
        }
    }
}

/// A number that the target does not hold and that was rounded, because that was allowed.
#[derive(Debug, Clone, PartialEq)]
pub struct Rounded {
    /// Module or tensor.
    pub tensor: String,
    /// What is not held.
    pub reason: String,
    /// What it became.
    pub became: String,
}

/// Everything that will be written.
pub struct Conversion<'a> {
    input: &'a Checkpoint,
    /// What the model becomes.
    pub target: Target,
    /// Name and fate of every weight, in model order.
    items: Vec<Item>,
    /// Where every output tensor lies.
    pub output: OutputPlan,
    gguf: Option<GgufOutput>,
    config: Value,
    files: Vec<PathBuf>,
    /// What was rounded; empty unless that was allowed.
    pub rounded: Vec<Rounded>,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// A tensor of the input, or a module whose tensors become others.
struct Item {
    /// `module.weight`, or the name of the tensor.
    name: String,
    fate: Fate,
    shape: Vec<usize>,
}

impl<'a> Conversion<'a> {
    /// Decides how `input` becomes `target`; `lossy` allows rounding what it does not hold. `shard_bytes` bounds weight files.
    ///
    /// # Errors
    /// [`Error::Lossy`], naming the first tensor that is not held; [`Error::NotQuantized`]; what a GGUF file refuses.
    pub fn new(input: &'a Checkpoint, target: Target, lossy: bool, shard_bytes: u64) -> Result<Self, Error> {
        if input.dialect().is_none() {
            return Err(Error::NotQuantized { dir: input.dir().into() });
        }
        let as_gguf = matches!(target, Target::Format(format) if format.name() == GGUF.name());
        if as_gguf && input.gguf().is_some() {
            return Err(Error::Gguf { dir: input.dir().into(), reason: "it is a GGUF file already".into() });
        }
        let spec = bitmill_models::spec_of(input).ok();
        let (items, rounded, mut notes) = fate::Decider::new(input, spec.as_ref(), target, lossy)?.decide()?;
        let stacked =
            |spec: &&ModelSpec| spec.routing.is_some() && spec.layout.routed.as_ref().is_some_and(|r| r.stacked);
        if let (Target::Dense(_), Some(spec)) = (target, spec.as_ref().filter(stacked)) {
            let of = &spec.model_type;
            notes.push(format!(
                "experts are written as one matrix each; transformers reads dense ones of {of} models stacked alone"
            ));
        }
        let mut conversion = Conversion {
            input,
            target,
            items,
            output: OutputPlan::new(Vec::new(), u64::MAX)?,
            gguf: None,
            config: Value::Null,
            files: Vec::new(),
            rounded,
            notes: Vec::new(),
        };
        if as_gguf {
            conversion.lay_out_gguf(spec.as_ref(), shard_bytes, &mut notes)?;
        } else {
            conversion.config = conversion.folder_config(spec.as_ref(), &mut notes)?;
            conversion.output = OutputPlan::new(conversion.specs(), shard_bytes)?;
            conversion.files = if input.gguf().is_some() { Vec::new() } else { conversion.carried(&mut notes)? };
        }
        conversion.notes = notes;
        Ok(conversion)
    }

    /// Modules that are quantized in the output, with their schemes and shapes.
    pub fn quantized(&self) -> impl Iterator<Item = (&str, &Scheme, [usize; 2])> {
        self.items.iter().filter_map(|item| match (&item.fate, &item.shape[..]) {
            (Fate::Quantized { scheme, .. }, &[rows, cols]) => Some((item.module(), scheme, [rows, cols])),
            _ => None,
        })
    }

    /// Tensors of the output, a quantized matrix counted once.
    #[must_use]
    pub fn tensors(&self) -> usize {
        self.items.len()
    }

    fn specs(&self) -> Vec<TensorSpec> {
        let of = |item: &Item| match (&item.fate, self.target) {
            (Fate::Quantized { scheme, .. }, Target::Format(format)) => {
                format.layout(item.module(), scheme, [item.shape[0], item.shape[1]])
            }
            (Fate::Dense { dtype, .. }, _) => vec![TensorSpec::new(&item.name, *dtype, item.shape.clone())],
            _ => self.input.spec(&item.name).cloned().into_iter().collect(),
        };
        self.items.iter().flat_map(of).collect()
    }

    /// `config.json` of a folder.
    fn folder_config(&self, spec: Option<&ModelSpec>, notes: &mut Vec<String>) -> Result<Value, Error> {
        let mut config = self.input.config().clone();
        let Some(keys) = config.as_object_mut() else { return Ok(config) };
        keys.remove("quantization_config");
        keys.remove("compression_config");
        let own = ["dtype", "torch_dtype"].into_iter().find(|key| keys.contains_key(*key)).unwrap_or("torch_dtype");
        let Target::Format(format) = self.target else {
            let name = match self.target {
                Target::Dense(Dtype::F16) => "float16",
                Target::Dense(Dtype::BF16) => "bfloat16",
                _ => "float32",
            };
            keys.insert(own.into(), json!(name));
            return Ok(config);
        };
        let halves = self.quantized().any(|(_, scheme, _)| scheme.scale == ScaleType::F16);
        let bf16 = keys.get(own).and_then(Value::as_str).is_some_and(|name| name.ends_with("bfloat16"));
        if self.input.gguf().is_some() || (halves && bf16 && format.codes() != "qweight") {
            // Readers of compressed-tensors hold scales in the type of the model.
            keys.insert(own.into(), json!("float16"));
            if bf16 {
                notes.push(format!("{own} becomes float16 in config.json: bfloat16 does not hold the scales"));
            }
        }
        let layers: BTreeMap<String, Scheme> = self.quantized().map(|(m, s, _)| (m.to_owned(), *s)).collect();
        let dense = self.items.iter().filter(|i| !matches!(i.fate, Fate::Quantized { .. }) && i.shape.len() == 2);
        let ignored = plan::left_dense(self.input, spec, dense.map(|i| i.name.as_str()));
        config["quantization_config"] = format.config(&layers, &ignored)?;
        if let (true, Some(scheme)) =
            (self.input.dialect().is_some_and(Dialect::rounds_cache), cache_scheme(format.name()))
        {
            config["quantization_config"]["kv_cache_scheme"] = scheme;
        }
        Ok(config)
    }

    /// Files that are copied: all but those that describe how the input was quantized.
    fn carried(&self, notes: &mut Vec<String>) -> Result<Vec<PathBuf>, Error> {
        let sidecar = |f: &Path| SIDECARS.iter().any(|name| f == Path::new(name));
        let (left, files): (Vec<_>, Vec<_>) =
            plan::copied_files(self.input, notes)?.into_iter().partition(|f| sidecar(f));
        for file in left {
            notes.push(format!("{} describes the input's format and is not copied", file.display()));
        }
        Ok(files)
    }

    fn lay_out_gguf(
        &mut self,
        spec: Option<&ModelSpec>,
        shard_bytes: u64,
        notes: &mut Vec<String>,
    ) -> Result<(), Error> {
        gguf::check(self.input, spec, notes)?;
        // `check` refuses a model without a spec.
        let Some(spec) = spec else { return Ok(()) };
        for slot in spec.tensors().into_iter().filter(|slot| !slot.optional) {
            if !self.items.iter().any(|item| item.name == slot.name) {
                return Err(Error::MissingTensor { dir: self.input.dir().into(), tensor: slot.name });
            }
        }
        let mut dense = BTreeMap::new();
        let mut tensors = Vec::new();
        for item in &self.items {
            let action = match item.fate {
                Fate::Quantized { scheme, .. } => {
                    let (module, shape) = (item.module().to_owned(), [item.shape[0], item.shape[1]]);
                    Action::Quantize { module, role: None, scheme, shape }
                }
                Fate::Dense { dtype, .. } => {
                    dense.insert(item.name.clone(), dtype);
                    Action::Copy
                }
                Fate::Copy => {
                    // Matrices keep their type; vectors are f32 there, which holds what is narrower.
                    let own = self.input.spec(&item.name).map(|s| s.dtype).filter(|_| item.shape.len() > 1);
                    dense.extend(own.map(|dtype| (item.name.clone(), dtype)));
                    Action::Copy
                }
            };
            tensors.push(PlannedTensor { name: item.name.clone(), action, bytes: 0 });
        }
        let mut units = vec![Unit { label: String::new(), block: None, tensors }];
        let settings = self.gguf_settings(shard_bytes);
        let shapes: BTreeMap<&str, &Vec<usize>> = self.items.iter().map(|i| (i.name.as_str(), &i.shape)).collect();
        let shape = |name: &str| shapes.get(name).map(|s| (*s).clone());
        let (gguf, output) = gguf::output(self.input, spec, &mut units, (&dense, &shape), &settings)?;
        let kept: Vec<&str> = units.iter().flat_map(|u| &u.tensors).map(|t| t.name.as_str()).collect();
        self.items.retain(|item| kept.contains(&item.name.as_str()));
        (self.gguf, self.output) = (Some(gguf), output);
        Ok(())
    }

    /// What a GGUF file says of how it was made: the type most weights have, and no method.
    fn gguf_settings(&self, shard_bytes: u64) -> Settings {
        let mut counts: Vec<(Scheme, usize)> = Vec::new();
        for (_, scheme, [rows, cols]) in self.quantized() {
            match counts.iter_mut().find(|(s, _)| s == scheme) {
                Some((_, n)) => *n += rows * cols,
                None => counts.push((*scheme, rows * cols)),
            }
        }
        let most = counts.iter().max_by_key(|(_, n)| *n).map(|(s, _)| *s);
        let scheme = most.unwrap_or(Scheme::int(Bits::ALL[7], true, Granularity::Channel));
        let gguf = Some(GgufSettings::default());
        Settings { samples: 0, sequence_length: 0, gguf, shard_bytes, ..Settings::new("convert", GGUF.name(), scheme) }
    }
}

impl Item {
    /// The module whose weight it is.
    fn module(&self) -> &str {
        self.name.strip_suffix(".weight").unwrap_or(&self.name)
    }
}

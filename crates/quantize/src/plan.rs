//! The plan: what becomes of every tensor, decided from config and headers alone. Every refusal happens here.

use crate::gguf::TensorTypes;
use crate::weight::is_transposed;
use crate::{
    Error, GgufOutput, Method, Mixture, Needs, Settings, TargetShift, TokenWeights, Transform, gguf, method, transforms,
};
use bitmill_checkpoint::gguf::Storage;
use bitmill_checkpoint::{CACHE_SCALES, Checkpoint, Dtype, FORMATS, Format, GGUF, OutputPlan, TensorSpec, format};
use bitmill_models::{ModelSpec, Role};
use bitmill_scheme::{ScaleType, Scheme};
use fancy_regex::Regex;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What becomes of a tensor.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Its bytes are copied.
    Copy,
    /// It is the weight of a linear and is rounded.
    Quantize {
        /// The linear's module name.
        module: String,
        /// Its place in the block, where the architecture is known.
        role: Option<Role>,
        /// What it becomes.
        scheme: Scheme,
        /// `[out, in]`.
        shape: [usize; 2],
    },
}

/// A tensor of the input and its fate.
#[derive(Debug, Clone)]
pub struct PlannedTensor {
    /// Name in the input.
    pub name: String,
    /// What becomes of it.
    pub action: Action,
    /// Bytes of everything that is written for it.
    pub bytes: u64,
}

/// Tensors that are worked and committed together: a block, or one tensor outside of blocks.
#[derive(Debug, Clone)]
pub struct Unit {
    /// Name for progress and logs.
    pub label: String,
    /// Index of the block, where the architecture is known.
    pub block: Option<usize>,
    /// Its tensors.
    pub tensors: Vec<PlannedTensor>,
}

/// Everything that will be done.
pub struct Plan {
    /// The settings it was made from, with the scale type resolved.
    pub settings: Settings,
    /// The method.
    pub method: &'static dyn Method,
    /// The output format.
    pub format: &'static dyn Format,
    /// The architecture, if it is known.
    pub spec: Option<ModelSpec>,
    /// Whether text must be run through the model.
    pub calibrated: bool,
    /// Units in the order they are worked.
    pub units: Vec<Unit>,
    /// Where every output tensor lies.
    pub output: OutputPlan,
    /// Files copied as they are, relative to the model folder.
    pub files: Vec<PathBuf>,
    /// The output's `config.json`.
    pub config: serde_json::Value,
    /// Numbers in all tensors of the input.
    pub parameters: u64,
    /// What is done to the weights before anything is rounded, in order.
    pub transforms: Vec<&'static dyn Transform>,
    /// Whether the input's output head is its embedding; `spec` speaks of the output.
    pub tied: bool,
    /// The output head that transforms part from the embedding, where the input has no tensor for it.
    pub untied: Option<TensorSpec>,
    /// How tensors lie in the output, where it is a GGUF file.
    pub gguf: Option<GgufOutput>,
    /// The mixture its schemes are from, where one was chosen.
    pub mixture: Option<Mixture>,
    /// What the user should know before it starts.
    pub notes: Vec<String>,
}

impl Plan {
    /// Plans the quantization of `input` under `settings`.
    ///
    /// # Errors
    /// Everything that would fail later for a reason that names, shapes and settings already show.
    pub fn new(input: &Checkpoint, settings: &Settings) -> Result<Self, Error> {
        taken(input, settings)?;
        let method = method(&settings.method)?;
        let format = format(&settings.format).ok_or_else(|| Error::UnknownFormat {
            name: settings.format.clone(),
            known: FORMATS.iter().map(|f| f.name()).collect::<Vec<_>>().join(", "),
        })?;
        let transforms = transforms(&settings.transforms)?;
        let sees_inputs = settings.schemes().find(|scheme| scheme.activations.is_calibrated());
        let calibrated = method.needs(&settings.solver) == Needs::Hessian
            || settings.tuning.is_some()
            || settings.reconstruction.is_some()
            || transforms.iter().any(|t| t.needs_statistics())
            || sees_inputs.is_some()
            || settings.kv_cache;
        let mut notes = Vec::new();
        let mut spec = match bitmill_models::spec_of(input) {
            Ok(spec) => Some(spec),
            Err(e) if calibrated => {
                let reason = e.to_string();
                return Err(match sees_inputs {
                    Some(&scheme) => Error::NeedsInputs { scheme, reason },
                    None => Error::NeedsForward { method: method.name().into(), reason },
                });
            }
            Err(e) => {
                notes.push(format!("{e}; linear layers are found by name and shape"));
                None
            }
        };
        if let Some(spec) = &spec {
            complete(input, spec)?;
            if settings.observation.shift == TargetShift::Outputs && !spec.adds_plainly() {
                return Err(Error::TargetShift { dir: input.dir().into() });
            }
            if settings.observation.tokens == TokenWeights::Rare && spec.images.is_some() {
                return Err(Error::TokenWeights { dir: input.dir().into() });
            }
            settings.observation.arithmetic.check()?;
            if spec.routing.is_some() && !settings.transforms.is_empty() {
                return Err(Error::Experts { what: "--transforms".into(), dir: input.dir().into() });
            }
            if spec.layout.transposed {
                notes.push(
                    "linears are stored [in, out] and are quantized as [out, in], as GPTQ files have them".into(),
                );
            }
        }
        settings.check_schemes(method)?;
        let cache = settings.kv_cache.then(|| cache_scheme(input, spec.as_ref(), format)).transpose()?;
        let as_gguf = format.name() == GGUF.name();
        if as_gguf {
            gguf::check(input, spec.as_ref(), &mut notes)?;
        }
        let tied = spec.as_ref().is_some_and(|spec| spec.tied);
        let untied = crate::transforms::untie(input, spec.as_mut(), &transforms, as_gguf, &mut notes)?;
        let mut settings = settings.clone();
        let (mut units, dense) =
            Units::new(input, spec.as_ref(), format, &mut settings, calibrated)?.build(untied.as_ref(), &mut notes)?;
        let layers: BTreeMap<String, Scheme> = quantized(&units).map(|(m, s, _)| (m.clone(), *s)).collect();
        // A GGUF file may be wanted for its container alone.
        if layers.is_empty() && dense.is_empty() {
            return Err(Error::NothingToQuantize { dir: input.dir().into() });
        }
        if let Some(module) = settings.layers.keys().find(|m| !layers.contains_key(*m)) {
            return Err(Error::UnknownLayer { dir: input.dir().into(), module: module.clone() });
        }
        let sizes = input.names().filter_map(|n| input.shape_of(n)).map(|s| s.iter().product::<usize>() as u64);
        let parameters = sizes.sum();
        let files = if as_gguf { Vec::new() } else { copied_files(input, &mut notes)? };
        let (gguf, config, output) = match (as_gguf, &spec) {
            (true, Some(spec)) => {
                let (gguf, output) =
                    gguf::output(input, spec, &mut units, (&dense, &|name| input.shape_of(name)), &settings)?;
                (Some(gguf), serde_json::Value::Null, output)
            }
            _ => {
                let mut config = input.config().clone();
                let copied = units.iter().flat_map(|u| &u.tensors).filter(|t| t.action == Action::Copy);
                let copied = copied.filter(|t| input.spec(&t.name).is_some_and(|s| s.shape.len() == 2));
                let left = left_dense(input, spec.as_ref(), copied.map(|t| t.name.as_str()));
                config["quantization_config"] = format.config(&layers, &left)?;
                if let Some(scheme) = cache {
                    config["quantization_config"]["kv_cache_scheme"] = scheme;
                }
                if tied && spec.as_ref().is_some_and(|spec| !spec.tied) {
                    config["tie_word_embeddings"] = false.into();
                }
                let mut outputs = outputs(input, untied.as_ref(), &units, format);
                let kept = spec.as_ref().filter(|_| settings.kv_cache);
                outputs
                    .extend(kept.iter().flat_map(|spec| (0..spec.layers).flat_map(|block| cache_scales(spec, block))));
                (None, config, OutputPlan::new(outputs, settings.shard_bytes)?)
            }
        };
        Ok(Plan {
            settings,
            method,
            format,
            spec,
            calibrated,
            units,
            output,
            files,
            config,
            parameters,
            transforms,
            tied,
            untied,
            gguf,
            mixture: None,
            notes,
        })
    }

    /// What becomes of most weights, in a word or two: `w4 g128 sym`, `q4_k`, `q4_k_m`.
    #[must_use]
    pub fn label(&self) -> String {
        match self.settings.gguf.as_ref().and_then(|gguf| gguf.mix.clone()) {
            Some(mix) => mix,
            None if self.settings.layers.is_empty() => self.settings.scheme.to_string(),
            None => "a mixture".into(),
        }
    }

    /// Modules that are quantized, with scheme and shape, in order.
    pub fn quantized(&self) -> impl Iterator<Item = (&String, &Scheme, [usize; 2])> {
        quantized(&self.units)
    }

    /// Weights that are quantized, and the bytes written for them.
    #[must_use]
    pub fn quantized_size(&self) -> (u64, u64) {
        let tensors = self.units.iter().flat_map(|u| &u.tensors);
        tensors.fold((0, 0), |(weights, bytes), t| match &t.action {
            Action::Quantize { shape, .. } => (weights + (shape[0] * shape[1]) as u64, bytes + t.bytes),
            Action::Copy => (weights, bytes),
        })
    }

    /// Bytes written for the quantized modules that `wanted` names.
    pub(crate) fn bytes_of(&self, wanted: impl Fn(&str) -> bool) -> u64 {
        let tensors = self.units.iter().flat_map(|u| &u.tensors);
        let named = tensors.filter(|t| matches!(&t.action, Action::Quantize { module, .. } if wanted(module)));
        named.map(|t| t.bytes).sum()
    }

    /// Bytes of the output that generating a token does not read: an embedding that is not the output matrix, of which
    /// a row is all that is looked up.
    #[must_use]
    pub fn unread_bytes(&self) -> u64 {
        if self.spec.as_ref().is_some_and(|s| s.tied) {
            return 0;
        }
        let tensors = self.units.iter().flat_map(|u| &u.tensors);
        tensors.filter(|t| t.name.strip_suffix(".weight").is_some_and(is_embedding)).map(|t| t.bytes).sum()
    }

    /// Bits per quantized weight: every byte written for quantized tensors, over their weights.
    #[must_use]
    pub fn bits_per_weight(&self) -> f64 {
        let (weights, bytes) = self.quantized_size();
        if weights == 0 { 0.0 } else { bytes as f64 * 8.0 / weights as f64 }
    }
}

fn quantized(units: &[Unit]) -> impl Iterator<Item = (&String, &Scheme, [usize; 2])> {
    units.iter().flat_map(|u| &u.tensors).filter_map(|t| match &t.action {
        Action::Quantize { module, scheme, shape, .. } => Some((module, scheme, *shape)),
        Action::Copy => None,
    })
}

/// Whether `input` may be quantized: a model of plain numbers, or a GGUF file that becomes another, which its user has to
/// ask for if blocks would be rounded a second time.
fn taken(input: &Checkpoint, settings: &Settings) -> Result<(), Error> {
    let Some(dialect) = input.dialect() else { return Ok(()) };
    let format = dialect.format().name();
    let Some(gguf) = input.gguf() else {
        return Err(Error::AlreadyQuantized { dir: input.dir().into(), format: format.into() });
    };
    let reason = match &settings.gguf {
        None => "from a GGUF file only another GGUF file is made; `bitmill dequantize` makes a folder of it first",
        Some(own) if !own.requantize && gguf.tensors.iter().any(|t| t.kind.block > 1) => {
            "it is quantized already, and rounding a second time adds to what was lost; --allow-requantize does it anyway"
        }
        Some(_) => return Ok(()),
    };
    Err(Error::Gguf { dir: input.dir().into(), reason: reason.into() })
}

/// What the configuration says of a cache of 8-bit floats.
fn cache_scheme(input: &Checkpoint, spec: Option<&ModelSpec>, format: &dyn Format) -> Result<serde_json::Value, Error> {
    let refuse = |reason: String| Err(Error::Cache { reason });
    if spec.is_some_and(|spec| !spec.causal) {
        return refuse(format!("{} is an encoder, which keeps no keys and values", input.dir().display()));
    }
    match bitmill_checkpoint::cache_scheme(format.name()) {
        Some(scheme) => Ok(scheme),
        None => refuse(format!(
            "format {} has no place for the scales of keys and values; those of compressed-tensors do (pack-quantized, \
             float-quantized, …)",
            format.name()
        )),
    }
}

/// The tensors of the scales of keys and values of a block.
pub(crate) fn cache_scales(spec: &ModelSpec, block: usize) -> [TensorSpec; 2] {
    let attention = spec.attention(block);
    CACHE_SCALES.map(|suffix| TensorSpec::new(format!("{attention}.{suffix}"), Dtype::F32, vec![1]))
}

/// Every tensor the architecture needs is stored, in its shape.
fn complete(input: &Checkpoint, spec: &ModelSpec) -> Result<(), Error> {
    for slot in spec.tensors() {
        match input.shape_of(&slot.name) {
            None if slot.optional => {}
            None => return Err(Error::MissingTensor { dir: input.dir().into(), tensor: slot.name }),
            Some(got) if got != slot.shape && !slot.optional => {
                let (tensor, expected) = (slot.name, slot.shape);
                return Err(bitmill_models::Error::Shape { tensor, expected, got }.into());
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Names of linears that stay dense, for the `ignore` list of loaders: matrices outside the quantized set, `copied`, that a
/// loader builds as linear layers.
pub(crate) fn left_dense<'a>(
    input: &Checkpoint,
    spec: Option<&ModelSpec>,
    copied: impl Iterator<Item = &'a str>,
) -> Vec<String> {
    let modules = copied.filter_map(|name| name.strip_suffix(".weight"));
    let mut names: Vec<String> = modules.filter(|module| !is_embedding(module)).map(str::to_owned).collect();
    // A tied head has no tensor of its own, yet loaders build it as a linear.
    let head = match spec {
        Some(spec) => spec.tied_head(|prefix| input.names().any(|n| n.starts_with(prefix))),
        None => Some(bitmill_models::HEAD.into()),
    };
    // Releases of a loader differ in its name, as folders do.
    let usual = spec.and_then(|spec| spec.layout.head).map(str::to_owned);
    for head in head.into_iter().chain(usual) {
        if !names.contains(&head) {
            names.push(head);
        }
    }
    names
}

/// Specs of every output tensor, in model order.
fn outputs(input: &Checkpoint, untied: Option<&TensorSpec>, units: &[Unit], format: &dyn Format) -> Vec<TensorSpec> {
    let of = |t: &PlannedTensor| match &t.action {
        Action::Copy => input.spec(&t.name).or(untied.filter(|u| u.name == t.name)).cloned().into_iter().collect(),
        Action::Quantize { module, scheme, shape, .. } => format.layout(module, scheme, *shape),
    };
    units.iter().flat_map(|u| &u.tensors).flat_map(of).collect()
}

/// Weights in other containers would be copied beside the quantized ones, and some loaders would prefer them.
pub(crate) fn copied_files(input: &Checkpoint, notes: &mut Vec<String>) -> Result<Vec<PathBuf>, Error> {
    let weights = |file: &Path| {
        let extension = file.extension().and_then(|e| e.to_str()).unwrap_or_default();
        let name = file.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        matches!(extension, "bin" | "pth" | "pt" | "gguf" | "onnx" | "h5" | "msgpack" | "ckpt" | "safetensors")
            || name.ends_with(".bin.index.json")
            || name.ends_with(".safetensors.index.json")
    };
    let (left, copied): (Vec<_>, Vec<_>) = input.other_files()?.into_iter().partition(|f| weights(f));
    if !left.is_empty() {
        let names: Vec<String> = left.iter().map(|f| f.display().to_string()).collect();
        notes.push(format!("not copied, since they hold weights of the original model: {}", names.join(", ")));
    }
    Ok(copied)
}

/// Sorts tensors into units.
struct Units<'a> {
    input: &'a Checkpoint,
    spec: Option<&'a ModelSpec>,
    format: &'a dyn Format,
    ignore: Vec<Regex>,
    scheme: Scheme,
    settings: Settings,
    /// How matrices get their types in a GGUF file.
    types: Option<TensorTypes<'a>>,
}

/// A tensor's plan, and the type of its numbers where a GGUF file gives dense ones another.
type Sorted = (PlannedTensor, Option<Dtype>);

impl<'a> Units<'a> {
    fn new(
        input: &'a Checkpoint,
        spec: Option<&'a ModelSpec>,
        format: &'a dyn Format,
        settings: &mut Settings,
        calibrated: bool,
    ) -> Result<Self, Error> {
        let compile = |p: &String| {
            // Python's re.match: anchored at the start only.
            let anchored = format!("^(?:{p})");
            Regex::new(&anchored).map_err(|e| Error::Pattern { pattern: p.clone(), reason: e.to_string() })
        };
        let ignore = settings.ignore.iter().map(compile).collect::<Result<_, _>>()?;
        let own = || format.scale_type(model_scale_type(input));
        let scale = settings.scale_type.unwrap_or_else(own);
        settings.scheme = settings.scheme.with_scale(scale);
        settings.layers.values_mut().for_each(|s| *s = s.with_scale(scale));
        let types = match spec.filter(|_| format.name() == GGUF.name()) {
            Some(spec) => Some(TensorTypes::new(input.dir(), settings, spec, calibrated)?),
            None => None,
        };
        Ok(Units { input, spec, format, ignore, scheme: settings.scheme, settings: settings.clone(), types })
    }

    /// Units in order, and the types that dense matrices get in a GGUF file.
    fn build(
        &self,
        untied: Option<&TensorSpec>,
        notes: &mut Vec<String>,
    ) -> Result<(Vec<Unit>, BTreeMap<String, Dtype>), Error> {
        let linears = |b| self.spec.map(|spec| spec.block_linears(b)).into_iter().flatten();
        let layers = self.spec.map_or(0, |spec| spec.layers);
        let roles: BTreeMap<String, (Role, usize)> =
            (0..layers).flat_map(|b| linears(b).map(move |(role, module)| (module, (role, b)))).collect();
        let block_of: BTreeMap<String, usize> = match self.spec {
            Some(spec) => {
                (0..spec.layers).flat_map(|b| spec.block_tensors(b).into_iter().map(move |t| (t.name, b))).collect()
            }
            None => BTreeMap::new(),
        };
        let mut names: Vec<&str> = self.input.names().collect();
        names.sort_by_key(|n| natural_key(n));
        let mut blocks: BTreeMap<usize, Vec<PlannedTensor>> = BTreeMap::new();
        let (mut outside, mut dense) = (Vec::new(), BTreeMap::new());
        for name in names {
            let (tensor, own) = self.tensor(name, &roles, notes)?;
            dense.extend(own.map(|dtype| (name.to_owned(), dtype)));
            match block_of.get(name) {
                Some(&block) => blocks.entry(block).or_default().push(tensor),
                None => outside.push(tensor),
            }
        }
        outside.extend(untied.map(|u| PlannedTensor {
            name: u.name.clone(),
            action: Action::Copy,
            bytes: u.bytes() as u64,
        }));
        if self.spec.is_none() {
            let found: Vec<&str> = (outside.iter())
                .filter_map(|t| match &t.action {
                    Action::Quantize { module, .. } => Some(module.as_str()),
                    Action::Copy => None,
                })
                .collect();
            notes.push(format!("treated as linear: {}", found.join(", ")));
        }
        // Tensors outside of blocks need no activations: each is a unit of its own, before the blocks.
        let alone = outside.into_iter().map(|t| Unit { label: t.name.clone(), block: None, tensors: vec![t] });
        let blocks =
            blocks.into_iter().map(|(b, tensors)| Unit { label: format!("block {b}"), block: Some(b), tensors });
        Ok((alone.chain(blocks).collect(), dense))
    }

    fn tensor(
        &self,
        name: &str,
        roles: &BTreeMap<String, (Role, usize)>,
        notes: &mut Vec<String>,
    ) -> Result<Sorted, Error> {
        let shape = self.input.shape_of(name);
        let stored = self.input.spec(name).zip(shape).map(|(s, shape)| (shape, s.dtype, s.bytes() as u64));
        let (shape, dtype, stored_bytes) = stored.unwrap_or((Vec::new(), Dtype::F32, 0));
        let copy = |own| Ok((PlannedTensor { name: name.into(), action: Action::Copy, bytes: stored_bytes }, own));
        let Some(module) = name.strip_suffix(".weight") else { return copy(None) };
        let place = roles.get(module).copied();
        let linear = match self.spec {
            Some(_) => place.is_some(),
            None => looks_linear(module, &shape, dtype),
        };
        let &[mut rows, mut cols] = shape.as_slice() else { return copy(None) };
        if place.is_some() && is_transposed(self.spec) && self.input.scheme_of(module).is_none() {
            (rows, cols) = (cols, rows);
        }
        if self.ignore.iter().any(|r| r.is_match(module).unwrap_or(false)) {
            return copy(None);
        }
        let own = self.settings.layers.get(module).copied();
        let chosen = match &self.types {
            Some(types) if own.is_none() => {
                types.place(module, place).map(|place| types.of(name, place, cols)).transpose()?
            }
            _ => None,
        };
        if let Some((to, from)) = chosen.and_then(|c| Some((c.kind.name, c.instead_of?))) {
            notes.push(format!("{module} is {to}: its rows of {cols} are no whole blocks of {from}"));
        }
        let scheme = match chosen.map(|c| c.kind.storage) {
            Some(Storage::Block(kind)) => Scheme::block(kind),
            Some(_) => return copy(chosen.and_then(|c| c.dense())),
            // The ends of a model are block types of a GGUF file, or stay as they are.
            None if linear
                || (own.is_some() && self.types.as_ref().is_some_and(|t| t.place(module, place).is_some())) =>
            {
                own.unwrap_or(self.scheme)
            }
            None => return copy(None),
        };
        let shape = [rows, cols];
        scheme.check(cols).map_err(|source| Error::Scheme { tensor: module.into(), source })?;
        self.format.check(module, &scheme, shape)?;
        let bytes = self.format.layout(module, &scheme, shape).iter().map(|t| t.bytes() as u64).sum();
        let role = place.map(|(role, _)| role);
        let action = Action::Quantize { module: module.into(), role, scheme, shape };
        Ok((PlannedTensor { name: name.into(), action, bytes }, None))
    }
}

/// The 16-bit type nearest to that of the model's weights: its own, or f16 (the more precise one) for f32.
pub(crate) fn model_scale_type(input: &Checkpoint) -> ScaleType {
    let matrices = input.names().filter_map(|n| input.spec(n)).filter(|s| s.shape.len() == 2);
    match matrices.max_by_key(|s| s.bytes()).map(|s| s.dtype) {
        Some(Dtype::BF16) => ScaleType::Bf16,
        _ => ScaleType::F16,
    }
}

/// Whether a module is the token embedding or the output matrix.
pub(crate) fn is_end(module: &str) -> bool {
    module == bitmill_models::HEAD || bitmill_models::EMBEDDING.strip_suffix(".weight") == Some(module)
}

pub(crate) fn is_embedding(module: &str) -> bool {
    let last = module.rsplit('.').next().unwrap_or_default();
    last.contains("embed") || matches!(last, "wte" | "wpe")
}

/// Without an architecture: a floating-point matrix that is neither an embedding, a head, a router nor a norm.
fn looks_linear(module: &str, shape: &[usize], dtype: Dtype) -> bool {
    let last = module.rsplit('.').next().unwrap_or_default();
    let excluded = is_embedding(module)
        || ["norm", "head", "router", "classifier", "score"].iter().any(|w| last.contains(w))
        || matches!(last, "gate" | "shared_expert_gate" | "ln_f");
    !excluded
        && matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
        && shape.len() == 2
        && shape.iter().all(|&d| d >= 32)
}

/// Orders names so that layer 2 comes before layer 10.
pub(crate) fn natural_key(name: &str) -> Vec<(u64, String)> {
    name.split('.').map(|part| (part.parse().unwrap_or(u64::MAX), part.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_sort_by_number() {
        let mut names = ["b.10.w", "b.2.w", "a.x", "b.2.a"];
        names.sort_by_key(|n| natural_key(n));
        assert_eq!(names, ["a.x", "b.2.a", "b.2.w", "b.10.w"]);
    }

    #[test]
    fn linear_layers_of_unknown_models_are_recognised() {
        for (module, shape, linear) in [
            ("transformer.h.0.attn.c_attn", vec![64, 192], true),
            ("encoder.layer.3.output.dense", vec![64, 64], true),
            ("model.layers.0.block_sparse_moe.gate", vec![64, 64], false),
            ("model.embed_tokens", vec![1000, 64], false),
            ("wte", vec![1000, 64], false),
            ("lm_head", vec![1000, 64], false),
            ("model.norm", vec![64], false),
            ("conv", vec![64, 64, 3], false),
            ("tiny", vec![16, 64], false),
        ] {
            assert_eq!(looks_linear(module, &shape, Dtype::BF16), linear, "{module}");
        }
        assert!(!looks_linear("codes", &[64, 64], Dtype::I32));
    }
}

//! What becomes of every tensor: held code for code, carried, plain numbers, or refused.

use super::{Item, Rounded, Target};
use crate::methods::{Linear, method};
use crate::plan::{is_embedding, is_end, model_scale_type, natural_key};
use crate::weight::is_transposed;
use crate::{Error, ScaleSearch, SolverOptions};
use bitmill_checkpoint::gguf::ROPE_FACTORS;
use bitmill_checkpoint::{
    CACHE_SCALES, Checkpoint, Dialect, Dtype, Format, GGUF, Order, TensorView, Weight, cache_scheme,
};
use bitmill_models::ModelSpec;
use bitmill_scheme::{Activations, Granularity, GridKind, Quantized, ScaleType, Scheme};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// What becomes of a tensor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Fate {
    /// It is carried.
    Copy,
    /// Its numbers are written as such.
    Dense {
        /// Their type.
        dtype: Dtype,
        /// Whether they are codes in the input.
        quantized: bool,
        /// Whether they are stored `[in, out]`, where they are codes for `[out, in]`, as the family has it.
        turned: bool,
    },
    /// It is the weight of a module and stays quantized.
    Quantized {
        /// What it becomes.
        scheme: Scheme,
        how: How,
    },
}

/// How a matrix comes to its new scheme.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// Code for code.
    Exactly,
    /// The same codes, with scales rounded to their new type.
    Scales,
    /// Weights are rounded to nearest once more.
    Nearest,
}

/// Walks over the tensors of an input.
pub(super) struct Decider<'a> {
    input: &'a Checkpoint,
    target: Target,
    lossy: bool,
    /// Whether zero points are all in the middle of the grid, so that they need not be stored.
    middle: bool,
    /// Whether scales of keys and values, if there are any, are kept; without a cache that is rounded nothing is called so.
    keeps_cache: bool,
    spec: Option<&'a ModelSpec>,
    rounded: Vec<Rounded>,
    notes: Vec<String>,
}

/// Items in model order, what was rounded, and notes.
type Decided = (Vec<Item>, Vec<Rounded>, Vec<String>);

impl<'a> Decider<'a> {
    pub(super) fn new(
        input: &'a Checkpoint,
        spec: Option<&'a ModelSpec>,
        target: Target,
        lossy: bool,
    ) -> Result<Self, Error> {
        let held = matches!(target, Target::Format(format) if cache_scheme(format.name()).is_some());
        let keeps_cache = held || !input.dialect().is_some_and(Dialect::rounds_cache);
        let (middle, rounded, notes) = (true, Vec::new(), Vec::new());
        let mut decider = Decider { input, target, lossy, middle, keeps_cache, spec, rounded, notes };
        for module in decider.modules() {
            if !decider.middle || input.gguf().is_some() {
                break;
            }
            if input.scheme_of(&module).is_some_and(|s| !s.symmetric())
                && let Weight::Quantized(q) = input.weight(&module)?
            {
                decider.middle = q.zeros.iter().all(|&z| z == q.scheme.bits().middle());
            }
        }
        Ok(decider)
    }

    /// Quantized modules.
    fn modules(&self) -> Vec<String> {
        let mut modules: Vec<&str> = self.input.names().filter_map(|n| n.rsplit_once('.')).map(|(m, _)| m).collect();
        modules.sort_unstable();
        modules.dedup();
        modules.into_iter().filter(|m| self.input.scheme_of(m).is_some()).map(str::to_owned).collect()
    }

    pub(super) fn decide(mut self) -> Result<Decided, Error> {
        let modules = self.modules();
        let owner = |name: &str| {
            let module = self.input.module_of(name)?;
            modules.binary_search_by(|m| m.as_str().cmp(module)).ok()
        };
        // A module stands where its first tensor does.
        let mut fates: BTreeMap<String, Option<usize>> = BTreeMap::new();
        let mut dropped = false;
        for name in self.input.names().filter(|n| !ROPE_FACTORS.contains(n) || self.input.gguf().is_none()) {
            if !self.keeps_cache && CACHE_SCALES.iter().any(|suffix| name.ends_with(&format!(".{suffix}"))) {
                dropped = true;
                continue;
            }
            match owner(name) {
                Some(i) => fates.insert(format!("{}.weight", modules[i]), Some(i)),
                None => fates.insert(name.to_owned(), None),
            };
        }
        let mut names: Vec<(String, Option<usize>)> = fates.into_iter().collect();
        // As `quantize` lays them out, so that what returns to its format is the same file.
        let blocks = self.spec.iter().flat_map(|spec| (0..spec.layers).flat_map(|b| spec.block_tensors(b)));
        let in_block: BTreeSet<String> = blocks.map(|slot| slot.name).collect();
        names.sort_by_cached_key(|(name, _)| (in_block.contains(name), natural_key(name)));
        let mut items = Vec::new();
        for (name, module) in names {
            items.push(match module {
                Some(i) => self.module(name, &modules[i])?,
                None => self.tensor(name)?,
            });
        }
        self.note_activations(&items);
        if dropped {
            self.notes
                .push("keys and values are no longer rounded at run time: their scales have no place there".into());
        }
        Ok((items, self.rounded, self.notes))
    }

    fn note_activations(&mut self, items: &[Item]) {
        let rounded = |item: &Item| {
            let before = self.input.scheme_of(item.module()).map(|s| s.activations);
            let plain = matches!(item.fate, Fate::Quantized { scheme, .. } if scheme.activations == Activations::Full);
            plain && before.is_some_and(|a| a != Activations::Full)
        };
        if items.iter().any(rounded) {
            self.notes
                .push("inputs of linears are no longer rounded at run time: the format stores weights only".into());
        }
    }

    /// The fate of a tensor that is no part of a quantized module.
    fn tensor(&mut self, name: String) -> Result<Item, Error> {
        let view = self.input.tensor(&name)?;
        let shape = view.shape.to_vec();
        let number = matches!(view.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64);
        if !number && view.dtype == Dtype::U8 && self.input.gguf().is_some() {
            // Blocks of a type that is not read here: as numbers they are refused by name.
            view.to_f32()?;
        }
        let fate = match self.target {
            // In a GGUF file vectors are f32 whatever the matrices are.
            Target::Dense(dtype) if number && !(shape.len() == 1 && self.input.gguf().is_some()) => {
                if dtype != view.dtype {
                    self.dense(&name, &view.to_f32()?, dtype)?;
                }
                Fate::Dense { dtype, quantized: false, turned: false }
            }
            // Rows of a GGUF file may lie in another order, stacked experts the other way round.
            _ if number && view.order != Order::Rows => {
                Fate::Dense { dtype: view.dtype, quantized: false, turned: false }
            }
            _ => Fate::Copy,
        };
        Ok(Item { name, fate, shape })
    }

    /// The fate of a quantized module.
    fn module(&mut self, name: String, module: &str) -> Result<Item, Error> {
        let Weight::Quantized(q) = self.input.weight(module)? else {
            return self.tensor(name);
        };
        if let Some(experts) = self.input.stacked(module) {
            return self.stack(module, &q, experts);
        }
        let fate = match self.target {
            Target::Dense(dtype) => {
                self.dense(module, &q.dequantize(), dtype)?;
                Fate::Dense { dtype, quantized: true, turned: is_transposed(self.spec) }
            }
            // In folders embeddings are plain numbers, and so is the output matrix unless the input was a folder.
            Target::Format(format)
                if format.name() != GGUF.name()
                    && (is_embedding(module) || (self.input.gguf().is_some() && is_end(module))) =>
            {
                let values = q.dequantize();
                let dtype =
                    [Dtype::F16, Dtype::BF16].into_iter().find(|&dtype| first_rounded(&values, dtype).is_none());
                Fate::Dense { dtype: dtype.unwrap_or(Dtype::F32), quantized: true, turned: false }
            }
            Target::Format(format) => self.quantized(module, &q, format)?,
        };
        let [rows, cols] = q.shape;
        let shape = if matches!(fate, Fate::Dense { turned: true, .. }) { vec![cols, rows] } else { vec![rows, cols] };
        Ok(Item { name, fate, shape })
    }

    /// The fate of a matrix of `experts`, which become plain numbers in one tensor, as their model has it.
    fn stack(&mut self, module: &str, q: &Quantized, experts: usize) -> Result<Item, Error> {
        let Target::Dense(dtype) = self.target else {
            let reason = "the experts of its model are stacked, and stacks are written as plain numbers alone".into();
            return Err(self.refusal(module, reason, "choose bf16, which holds every number"));
        };
        self.dense(module, &q.dequantize(), dtype)?;
        let [rows, cols] = q.shape;
        let fate = Fate::Dense { dtype, quantized: true, turned: true };
        Ok(Item { name: module.to_owned(), fate, shape: vec![experts, cols, rows / experts] })
    }

    /// Refuses numbers that `dtype` does not hold, or records that they are rounded.
    fn dense(&mut self, tensor: &str, values: &[f32], dtype: Dtype) -> Result<(), Error> {
        let there = stored(values, dtype);
        let held = |value: f32| format!("is {value}, which {dtype:?} does not hold");
        if let Some(i) = there.iter().zip(values).position(|(s, v)| !s.is_finite() && v.is_finite()) {
            let reason = format!("entry {i} {} at all", held(values[i]));
            return Err(self.refusal(tensor, reason, "choose bf16 or f32"));
        }
        let Some(i) = first_rounded(values, dtype) else { return Ok(()) };
        let reason = format!("entry {i} {}", held(values[i]));
        self.round(tensor, reason, format!("{dtype:?}"), "f32 holds it")
    }

    fn round(&mut self, tensor: &str, reason: String, became: String, remedy: &'static str) -> Result<(), Error> {
        if !self.lossy {
            return Err(self.refusal(tensor, reason, remedy));
        }
        self.rounded.push(Rounded { tensor: tensor.into(), reason, became });
        Ok(())
    }

    fn refusal(&self, tensor: &str, reason: String, remedy: &'static str) -> Error {
        let part = |name: &&str| name.strip_prefix(tensor).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
        let file = self.input.names().find(part).and_then(|name| self.input.file_of(name)).unwrap_or(self.input.dir());
        Error::Lossy { tensor: tensor.into(), file: file.into(), format: self.target.name(), reason, remedy }
    }

    /// The fate of a module that stays quantized.
    fn quantized(&mut self, module: &str, q: &Quantized, format: &'static dyn Format) -> Result<Fate, Error> {
        let mut why = None;
        for scheme in self.variants(q, format) {
            let held = match q.recast(scheme) {
                Ok(_) if scheme.activations != Activations::Full && q.scheme.activations == Activations::Full => {
                    Err("the format rounds inputs to 8 bits at run time, which the model as it is does not".to_owned())
                }
                Ok(moved) => format.holds(module, &moved).map_err(|e| reason(&e)),
                Err(loss) => Err(loss.to_string()),
            };
            match held {
                Ok(()) => return Ok(Fate::Quantized { scheme, how: How::Exactly }),
                Err(reason) => why = why.or(Some(reason)),
            }
        }
        let why = why.unwrap_or_else(|| format!("it has no type for {}", q.scheme));
        let (fate, became) = self.nearest(module, q, format)?;
        self.round(module, why, became, "pack-quantized holds every integer scheme, f32 every number")?;
        Ok(fate)
    }

    /// Schemes of `format` in which the numbers may be held, the best first.
    fn variants(&self, q: &Quantized, format: &dyn Format) -> Vec<Scheme> {
        let plain = plain(&q.scheme);
        let mut variants = Vec::new();
        for candidate in plain.iter().flat_map(|s| format.candidates(s)) {
            let without = self.middle && self.input.gguf().is_none();
            let symmetries = if without && candidate.form().is_none() {
                vec![true, candidate.symmetric()]
            } else {
                vec![candidate.symmetric()]
            };
            for symmetric in symmetries {
                let grid = match candidate.grid {
                    GridKind::Int { bits, .. } => GridKind::Int { bits, symmetric },
                    other @ (GridKind::Block(_) | GridKind::Float(_) | GridKind::Binary) => other,
                };
                // The model's own type first: what was widened for another format comes back as it was.
                for scale in [format.scale_type(model_type(self.input)), candidate.scale] {
                    let scheme = Scheme { grid, ..candidate }.with_scale(scale);
                    if !variants.contains(&scheme) {
                        variants.push(scheme);
                    }
                }
            }
        }
        variants
    }

    /// What comes nearest to a matrix that is not held, and its name.
    fn nearest(&self, module: &str, q: &Quantized, format: &'static dyn Format) -> Result<(Fate, String), Error> {
        for scheme in self.variants(q, format).into_iter().flat_map(relaxed) {
            if format.check(module, &scheme, q.shape).is_ok() {
                // What the scheme holds and the format does not, no other rounding makes it hold.
                if q.recast(scheme).is_ok_and(|moved| format.holds(module, &moved).is_err()) {
                    continue;
                }
                let widened = Scheme { scale: ScaleType::F32, ..scheme };
                let (how, what) = match scheme.form() {
                    _ if q.recast(scheme).is_ok() => (How::Exactly, "its inputs rounded at run time"),
                    None if q.recast(widened).is_ok() => (How::Scales, "its scales rounded"),
                    _ => (How::Nearest, "its weights rounded to nearest"),
                };
                return Ok((Fate::Quantized { scheme, how }, format!("{scheme}, {what}")));
            }
        }
        let dtype = match model_type(self.input) {
            ScaleType::Bf16 => Dtype::BF16,
            _ => Dtype::F16,
        };
        let values = q.dequantize();
        let dtype = if stored(&values, dtype).iter().all(|v| v.is_finite()) { dtype } else { Dtype::F32 };
        Ok((
            Fate::Dense { dtype, quantized: true, turned: is_transposed(self.spec) },
            format!("{dtype:?}, not quantized"),
        ))
    }
}

/// The matrix under its new scheme.
pub(super) fn requantized(module: &str, q: &Quantized, scheme: Scheme, how: How) -> Result<Quantized, Error> {
    let wide = Scheme { scale: ScaleType::F32, ..scheme };
    match how {
        How::Exactly => q.recast(scheme).map_err(|loss| Error::Moved { module: module.into(), source: loss }),
        How::Scales => {
            let mut moved = q.recast(wide).map_err(|loss| Error::Moved { module: module.into(), source: loss })?;
            moved.scheme = scheme;
            moved.scales.iter_mut().for_each(|s| *s = scheme.scale.round(*s));
            Ok(moved)
        }
        How::Nearest => {
            let weight = q.dequantize();
            let linear = Linear::new(module, &weight, q.shape, scheme);
            let options = SolverOptions { scale_search: Some(ScaleSearch::Mse), ..SolverOptions::default() };
            let mut solved = method("rtn")?.solve(&[linear], None, &options)?;
            let input = q.input.filter(|_| scheme.activations == q.scheme.activations);
            let rounded = solved.remove(0).quantized;
            Ok(Quantized { input: input.or(rounded.input), ..rounded })
        }
    }
}

/// Integer schemes in which a scheme's numbers may be written; its own, if it is one.
fn plain(scheme: &Scheme) -> Vec<Scheme> {
    let Some(form) = scheme.form() else { return vec![*scheme] };
    let highest = form.levels.iter().map(|&l| i32::from(l)).max().unwrap_or(0);
    // Levels from −2^(b−1) to 2^(b−1) − 1; a type with a minimum counts from 0 and has a zero point.
    let width = |b: &bitmill_scheme::Bits| {
        let codes = i32::from(b.max_code()) + 1;
        if scheme.symmetric() { highest < codes / 2 } else { highest < codes }
    };
    let Some(bits) = bitmill_scheme::Bits::ALL.into_iter().find(width) else { return Vec::new() };
    let own = Scheme::int(bits, scheme.symmetric(), Granularity::Group(form.sub));
    [ScaleType::F16, ScaleType::F32].map(|scale| own.with_scale(scale)).into()
}

/// A scheme, and what is left of it where a format lacks zero points or maps of groups.
fn relaxed(scheme: Scheme) -> Vec<Scheme> {
    let granularity = match scheme.granularity {
        Granularity::Mapped(g) => Granularity::Group(g),
        other => other,
    };
    let mut all = vec![scheme, Scheme { granularity, ..scheme }];
    if let GridKind::Int { bits, .. } = scheme.grid {
        all.push(Scheme { grid: GridKind::Int { bits, symmetric: true }, granularity, ..scheme });
    }
    all
}

/// The reason inside of a refusal.
fn reason(error: &bitmill_checkpoint::Error) -> String {
    match error {
        bitmill_checkpoint::Error::Unsupported { reason, .. } => reason.clone(),
        other => other.to_string(),
    }
}

/// The type of the numbers that the input is not quantized in.
fn model_type(input: &Checkpoint) -> ScaleType {
    let name = ["dtype", "torch_dtype"].iter().find_map(|k| input.config().get(k)).and_then(|v| v.as_str());
    match name.map(|n| n.trim_start_matches("torch.")) {
        Some("float16") => ScaleType::F16,
        Some("bfloat16") => ScaleType::Bf16,
        _ => model_scale_type(input),
    }
}

/// Numbers as they come out of `dtype`.
fn stored(values: &[f32], dtype: Dtype) -> Vec<f32> {
    let shape = [values.len()];
    let typed = |bytes| TensorView { name: "", file: Path::new(""), dtype, shape: &shape, bytes, order: Order::Rows };
    let bytes = typed(&[]).with_values(values).unwrap_or_default();
    typed(&bytes).to_f32().unwrap_or_default()
}

/// The first number that `dtype` does not hold.
fn first_rounded(values: &[f32], dtype: Dtype) -> Option<usize> {
    if dtype == Dtype::F32 {
        return None;
    }
    stored(values, dtype).iter().zip(values).position(|(s, v)| s != v && !v.is_nan())
}

/// The numbers of a tensor as bytes of `dtype`.
pub(super) fn payload(values: &[f32], dtype: Dtype) -> Result<Vec<u8>, Error> {
    let shape = [values.len()];
    let view = TensorView { name: "", file: Path::new(""), dtype, shape: &shape, bytes: &[], order: Order::Rows };
    Ok(view.with_values(values)?)
}

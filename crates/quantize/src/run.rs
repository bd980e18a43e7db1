//! The run: a plan applied unit by unit, committed as it goes, published by a rename.

mod measured;
#[cfg(test)]
mod tests;

use crate::block::{Flow, Target};
use crate::journal::{Journal, Line, StageRecord, TensorRecord, hash_file, identity, io, write_durably};
use crate::learn::{Lesson, rounding_to, tune};
use crate::transforms::{transformed, transformed_bytes};
use crate::{Action, Error, Linear, Method, Needs, Observation, Plan, SolverOptions, Unit, method};
use bitmill_calibrate::{Statistics, Stream, StreamKind, Windows, in_order};
use bitmill_checkpoint::{Checkpoint, Output, TensorView, Weight, ensure_free};
use bitmill_models::{Block, Embedding, ModelSpec, RopeTable};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// What a run tells while it goes.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// Weights are being checked for NaN and infinity.
    Checking,
    /// An unfinished run of the same command is taken up.
    Resumed {
        /// Units already finished.
        done: usize,
        /// Units in all.
        total: usize,
    },
    /// A unit starts.
    Started {
        /// Its index.
        unit: usize,
        /// Units in all.
        total: usize,
        /// Its name.
        label: &'a str,
    },
    /// A site of the unit is being worked.
    Site {
        /// Its name.
        name: &'static str,
    },
    /// A tensor is finished.
    Tensor(&'a TensorRecord),
    /// The weights are being transformed, before anything is rounded.
    Transforming {
        /// Steps done.
        done: usize,
        /// Steps in all.
        total: usize,
    },
    /// The rounded model is being tuned.
    Tuning {
        /// Steps done.
        done: usize,
        /// Steps in all.
        total: usize,
        /// Loss on held-out windows after the last pass, and before the first.
        held_out: (f64, f64),
    },
    /// A stage over the whole model is finished.
    Stage(&'a StageRecord),
    /// A unit is on disk.
    Committed {
        /// Units finished.
        done: usize,
        /// Units in all.
        total: usize,
    },
}

/// Where a calibrated run learns what the linears read.
#[derive(Clone, Copy)]
pub enum Calibration<'a> {
    /// Text that flows through the model as it is rounded, so that later blocks make up for earlier ones.
    Text(&'a Windows),
    /// What an earlier pass saw in the full-precision model: no forward pass.
    Statistics(&'a Statistics),
}

/// How a run is carried out, as far as it does not change its bytes.
#[derive(Clone, Copy)]
pub struct RunOptions<'a> {
    /// Replace an existing output, and discard an unfinished run with other settings.
    pub force: bool,
    /// Bytes of activations kept in memory.
    pub stream_memory: u64,
    /// Set to ask the run to stop at the next clean point.
    pub stop: &'a AtomicBool,
}

/// A finished run.
#[derive(Debug)]
pub struct Finished {
    /// The output folder.
    pub out: PathBuf,
    /// The log beside it, one JSON object per quantized tensor.
    pub log: PathBuf,
    /// What became of every quantized tensor.
    pub tensors: Vec<TensorRecord>,
    /// What stages over the whole model brought.
    pub stages: Vec<StageRecord>,
    /// Bytes of the weight files.
    pub bytes: u64,
}

/// Applies `plan` to `input` and writes the folder `out`. `calibration` is required if the plan is calibrated.
///
/// # Errors
/// What the plan could not see: an occupied output, damaged weights, a full disk; [`Error::Stopped`] after a request.
pub fn run(
    input: &Checkpoint,
    plan: &Plan,
    calibration: Option<Calibration<'_>>,
    out: &Path,
    options: RunOptions<'_>,
    observe: &mut dyn FnMut(Event<'_>),
) -> Result<Finished, Error> {
    check_place(input, out, options.force)?;
    if plan.settings.tuning.is_some() && !matches!(calibration, Some(Calibration::Text(_))) {
        return Err(Error::TuningNeedsText);
    }
    if !plan.transforms.is_empty() && matches!(calibration, Some(Calibration::Statistics(_))) {
        return Err(Error::TransformsNeedText);
    }
    let identity = identity(input, plan, calibration)?;
    let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !Journal::resumable(out, &identity, options.force)? {
        observe(Event::Checking);
        check_finite(input)?;
        let work = plan.work_bytes() + transformed_bytes(input, plan);
        ensure_free(parent, plan.output.total_bytes() + extra_bytes(input, plan)? + work)?;
    }
    std::fs::create_dir_all(parent).map_err(io(parent, "creating the output's parent folder"))?;
    let mut journal = Journal::open(out, &identity, options.force)?;
    let output = open_output(plan, &mut journal)?;
    let (done, total) = (journal.lines.len(), plan.units.len() + usize::from(plan.settings.tuning.is_some()));
    if done > 0 {
        observe(Event::Resumed { done, total });
    }
    let text = match calibration {
        Some(Calibration::Text(windows)) => Some(windows),
        _ => None,
    };
    let place = (journal.dir(), options.stream_memory, options.stop);
    let rewritten = transformed(input, plan, text, place, &mut |done, total| {
        observe(Event::Transforming { done, total });
    })?;
    let (model, stages) = rewritten.as_ref().map_or((input, &[][..]), |(model, stages)| (model, stages));
    stages.iter().for_each(|stage| observe(Event::Stage(stage)));
    let mut worker = Worker { input: model, plan, output, observe, options };
    let flow = Calibrated::new(&worker, calibration, &journal)?;
    for unit in done..total {
        if options.stop.load(Ordering::Relaxed) {
            return Err(Error::Stopped { done: unit, total });
        }
        let Some(label) = plan.units.get(unit).map(|unit| &unit.label) else {
            (worker.observe)(Event::Started { unit, total, label: "tuning" });
            let stage = worker.tune(calibration, &journal)?;
            worker.output.sync()?;
            journal.append(Line { unit, stream: None, full: None, tensors: Vec::new(), stage: Some(stage) })?;
            (worker.observe)(Event::Committed { done: unit + 1, total });
            continue;
        };
        (worker.observe)(Event::Started { unit, total, label });
        let tensors = match (&flow, plan.units[unit].block) {
            (Some(flow), Some(block)) => worker.calibrated_unit(&plan.units[unit], block, &flow.flow(), unit, total)?,
            (None, Some(block)) if plan.calibrated => worker.measured_unit(&plan.units[unit], block, calibration)?,
            _ => worker.plain_unit(&plan.units[unit])?,
        };
        worker.output.sync()?;
        let save = |stream: &Stream, file: PathBuf| -> Result<String, Error> {
            stream.save(&file)?;
            hash_file(&file)
        };
        let (mut stream, mut full) = (None, None);
        if let (Some(flow), Some(_), true) = (&flow, plan.units[unit].block, unit + 1 < plan.units.len()) {
            stream = Some(save(&flow.hidden, journal.stream(unit + 1))?);
            full = flow.full.as_ref().map(|full| save(full, journal.full_stream(unit + 1))).transpose()?;
        }
        journal.append(Line { unit, stream, full, tensors, stage: None })?;
        // What entered this unit is of no more use; a file that stays behind goes with the work folder.
        let _ = std::fs::remove_file(journal.stream(unit));
        let _ = std::fs::remove_file(journal.full_stream(unit));
        (worker.observe)(Event::Committed { done: unit + 1, total });
    }
    drop(flow);
    publish(input, plan, &identity, journal, stages, (out, options.force))
}

/// OUT must not exist (unless it is to be replaced), nor lie in MODEL, nor MODEL in it.
fn check_place(input: &Checkpoint, out: &Path, force: bool) -> Result<(), Error> {
    let absolute = |p: &Path| -> Result<PathBuf, Error> {
        let p = std::path::absolute(p).map_err(io(p, "resolving"))?;
        // The output does not exist yet: resolve links in the part of its path that does.
        let existing = p.ancestors().find(|a| a.exists()).unwrap_or(&p);
        let rest = p.strip_prefix(existing).unwrap_or(Path::new("")).to_owned();
        Ok(existing.canonicalize().map_err(io(existing, "resolving"))?.join(rest))
    };
    let (model, target) = (absolute(input.dir())?, absolute(out)?);
    if target.starts_with(&model) || model.starts_with(&target) {
        return Err(Error::Nested { out: out.to_owned(), model: input.dir().to_owned() });
    }
    if out.exists() && !force { Err(Error::Exists { out: out.to_owned() }) } else { Ok(()) }
}

fn check_finite(input: &Checkpoint) -> Result<(), Error> {
    for name in input.names() {
        if let Some(index) = input.tensor(name)?.first_non_finite() {
            let file = input.file_of(name).unwrap_or(input.dir()).to_owned();
            return Err(Error::NonFinite { tensor: name.into(), file, index });
        }
    }
    Ok(())
}

/// Bytes of the files copied beside the weights.
fn extra_bytes(input: &Checkpoint, plan: &Plan) -> Result<u64, Error> {
    let size = |f: &PathBuf| {
        let path = input.dir().join(f);
        path.metadata().map(|m| m.len()).map_err(io(&path, "inspecting"))
    };
    plan.files.iter().map(size).sum()
}

fn open_output(plan: &Plan, journal: &mut Journal) -> Result<Output, Error> {
    let dir = journal.output();
    if !journal.lines.is_empty() {
        return Ok(plan.output.reopen(&dir)?);
    }
    // Nothing is committed, so whatever lies there was cut off while it was being laid out.
    if dir.exists() {
        std::fs::remove_dir_all(&dir).map_err(io(&dir, "clearing"))?;
    }
    std::fs::create_dir_all(&dir).map_err(io(&dir, "creating"))?;
    if plan.gguf.is_none() {
        // From the start, so that what is written so far can be read back.
        write_durably(&dir.join("config.json"), &pretty(&plan.config))?;
    }
    Ok(plan.output.create(&dir)?)
}

fn pretty(value: &serde_json::Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

struct Worker<'a, 'o> {
    input: &'a Checkpoint,
    plan: &'a Plan,
    output: Output,
    observe: &'o mut dyn FnMut(Event<'_>),
    options: RunOptions<'a>,
}

impl Worker<'_, '_> {
    /// A unit without activations: copies, and methods that need no data.
    fn plain_unit(&mut self, unit: &Unit) -> Result<Vec<TensorRecord>, Error> {
        let mut records = Vec::new();
        for tensor in &unit.tensors {
            let Action::Quantize { module, scheme, shape, .. } = &tensor.action else {
                self.copy(&tensor.name)?;
                continue;
            };
            let started = Instant::now();
            let weight = self.input.tensor(&tensor.name)?.to_f32()?;
            let linear = Linear { name: module, weight: &weight, shape: *shape, scheme: *scheme };
            let (method, solver) = self.plain_method()?;
            let solved = method.solve(&[linear], None, &solver)?;
            for solved in solved {
                self.write(module, &solved.quantized)?;
                let squares = |v: &mut dyn Iterator<Item = f32>| v.map(|x| f64::from(x).powi(2)).sum::<f64>();
                let back = solved.quantized.dequantize();
                let error = squares(&mut back.iter().zip(&weight).map(|(a, b)| a - b));
                let energy = squares(&mut weight.iter().copied());
                let record = TensorRecord {
                    relative_error: if energy > 0.0 { error / energy } else { 0.0 },
                    seconds: started.elapsed().as_secs_f64(),
                    ..TensorRecord::of(module, *shape, *scheme, method, tensor.bytes)
                };
                (self.observe)(Event::Tensor(&record));
                records.push(record);
            }
        }
        Ok(records)
    }

    /// A block through which the calibration text flows.
    fn calibrated_unit(
        &mut self,
        unit: &Unit,
        index: usize,
        flow: &Flow<'_>,
        done: usize,
        total: usize,
    ) -> Result<Vec<TensorRecord>, Error> {
        for tensor in unit.tensors.iter().filter(|t| t.action == Action::Copy) {
            self.copy(&tensor.name)?;
        }
        let block = Block::load(flow.spec, index, self.input)?;
        let target = |tensor| {
            let target = Target::of(tensor)?;
            let stored = self.input.spec(&format!("{}.bias", target.module)).map(|t| t.dtype);
            let bias = block.bias(target.role).and_then(|_| rounding_to(stored));
            Some(Target { bias, ..target })
        };
        let targets: Vec<Target<'_>> = unit.tensors.iter().filter_map(target).collect();
        let (method, solver, stop) = (self.plan.method, &self.plan.settings.solver, self.options.stop);
        let mut records = Vec::new();
        // Both callbacks report to the observer; only one of them runs at a time.
        let observe = std::cell::RefCell::new(&mut *self.observe);
        let (plan, output, input) = (self.plan, &self.output, self.input);
        flow.quantize_block(
            index,
            block,
            &targets,
            (method, solver),
            &mut |site| {
                if stop.load(Ordering::Relaxed) {
                    return Err(Error::Stopped { done, total });
                }
                (observe.borrow_mut())(Event::Site { name: site.name });
                Ok(())
            },
            &mut |finished| {
                write_quantized(plan, output, &finished.module, &finished.solved.quantized)?;
                if let Some(bias) = &finished.bias {
                    write_values(plan, output, &input.tensor(&format!("{}.bias", finished.module))?, bias)?;
                }
                (observe.borrow_mut())(Event::Tensor(&finished.record));
                records.push(finished.record);
                Ok(())
            },
        )?;
        Ok(records)
    }

    /// Tunes the whole rounded model and writes what came of it in the place of what was there.
    fn tune(&mut self, calibration: Option<Calibration<'_>>, journal: &Journal) -> Result<StageRecord, Error> {
        let started = Instant::now();
        let settings = &self.plan.settings;
        let (Some(tuning), Some(spec)) = (&settings.tuning, &self.plan.spec) else {
            unreachable!("a plan with tuning is calibrated, and so has an architecture");
        };
        let Some(Calibration::Text(windows)) = calibration else {
            unreachable!("checked before anything was written");
        };
        let written = Checkpoint::open(&journal.output())?;
        let lesson = Lesson {
            spec,
            input: self.input,
            written: &written,
            windows,
            tuning,
            seed: settings.seed,
            train_head: self.plan.trains_head(),
            work: journal.dir(),
            stream_memory: self.options.stream_memory,
            stop: self.options.stop,
        };
        let read = |target: Target<'_>| match written.weight(target.module)? {
            Weight::Quantized(quantized) => Ok((target.role, quantized)),
            Weight::Dense(_) => unreachable!("{} was written quantized", target.module),
        };
        let blocks = self.plan.units.iter().filter(|unit| unit.block.is_some());
        let start = blocks.map(|unit| unit.tensors.iter().filter_map(Target::of).map(read).collect());
        let start = start.collect::<Result<Vec<Vec<_>>, Error>>()?;
        let tuned = tune(lesson, start, &mut |step| {
            (self.observe)(Event::Tuning { done: step.done, total: step.total, held_out: step.held_out });
        })?;
        for (block, role, quantized) in &tuned.linears {
            self.write(&spec.module(*block, *role), quantized)?;
        }
        for (name, weight) in &tuned.dense {
            let stored = self.input.tensor(name)?;
            self.output.write(name, &stored.with_values(weight)?)?;
        }
        let record = StageRecord { seconds: started.elapsed().as_secs_f64(), ..tuned.record };
        (self.observe)(Event::Stage(&record));
        Ok(record)
    }

    fn write(&self, module: &str, quantized: &bitmill_scheme::Quantized) -> Result<(), Error> {
        write_quantized(self.plan, &self.output, module, quantized)
    }

    /// Writes a tensor that is not quantized.
    fn copy(&self, name: &str) -> Result<(), Error> {
        write_dense(self.plan, &self.output, &self.input.tensor(name)?)
    }

    /// The method for matrices that no calibration reaches: the ends of a model in a GGUF file are rounded to nearest
    /// where the plan's own method needs data.
    fn plain_method(&self) -> Result<(&'static dyn Method, SolverOptions), Error> {
        let solver = self.plan.settings.solver.clone();
        if self.plan.method.needs(&solver) == Needs::Nothing {
            return Ok((self.plan.method, solver));
        }
        Ok((method("rtn")?, SolverOptions { scale_search: None, ..solver }))
    }
}

/// Writes a tensor that is not quantized, as it is.
fn write_dense(plan: &Plan, output: &Output, view: &TensorView<'_>) -> Result<(), Error> {
    match &plan.gguf {
        Some(gguf) => output.write(view.name, &gguf.copied(view)?)?,
        None => output.write(view.name, view.bytes)?,
    }
    Ok(())
}

/// Writes a tensor that is not quantized with other numbers in it.
fn write_values(plan: &Plan, output: &Output, view: &TensorView<'_>, values: &[f32]) -> Result<(), Error> {
    let bytes = view.with_values(values)?;
    write_dense(plan, output, &TensorView { bytes: &bytes, ..*view })
}

fn write_quantized(
    plan: &Plan,
    output: &Output,
    module: &str,
    quantized: &bitmill_scheme::Quantized,
) -> Result<(), Error> {
    let specs = plan.format.layout(module, &quantized.scheme, quantized.shape);
    for (spec, bytes) in specs.iter().zip(plan.format.encode(module, quantized)) {
        match &plan.gguf {
            Some(gguf) => output.write(&spec.name, &gguf.ordered(&spec.name, quantized.shape[0], bytes))?,
            None => output.write(&spec.name, &bytes)?,
        }
    }
    Ok(())
}

/// The state that a calibrated run carries from block to block.
struct Calibrated<'a> {
    spec: &'a ModelSpec,
    rope: RopeTable,
    lengths: Vec<usize>,
    budget: u64,
    spill: PathBuf,
    hidden: Stream,
    full: Option<Stream>,
    observation: Observation,
}

impl<'a> Calibrated<'a> {
    fn new(
        worker: &Worker<'a, '_>,
        calibration: Option<Calibration<'_>>,
        journal: &Journal,
    ) -> Result<Option<Self>, Error> {
        let (true, Some(spec), Some(Calibration::Text(windows))) =
            (worker.plan.calibrated, &worker.plan.spec, calibration)
        else {
            return Ok(None);
        };
        // Three streams exist at a time: the residual, and a site's input and output; and as many of a second model.
        let observation = worker.plan.settings.observation;
        let budget = worker.options.stream_memory / if observation.two_streams() { 6 } else { 3 };
        let (count, lengths) = (windows.count(), windows.lengths());
        let spill = journal.dir().join("stream-spill");
        let hidden = Stream::of_lengths(StreamKind::Bf16, &lengths, spec.hidden, budget, &spill)?;
        let second = journal.dir().join("stream-full-spill");
        let second = || Stream::of_lengths(StreamKind::Bf16, &lengths, spec.hidden, budget, &second);
        let full = observation.two_streams().then(second).transpose()?;
        let rope = RopeTable::new(&spec.rope, windows.length)?;
        let done = journal.lines.len();
        let saved = journal.lines.last().and_then(|l| l.stream.as_ref());
        match saved {
            Some(hash) => {
                take_up(&hidden, &journal.stream(done), hash)?;
                if let (Some(full), Some(hash)) = (&full, journal.lines.last().and_then(|l| l.full.as_ref())) {
                    take_up(full, &journal.full_stream(done), hash)?;
                }
            }
            None => {
                let embedding = Embedding::load(spec, worker.input)?;
                in_order(
                    count,
                    16,
                    |w| -> Result<(), Error> {
                        let h: Vec<f32> = embedding.embed(&windows.tokens[w])?.flatten_all()?.to_vec1()?;
                        if let Some(full) = &full {
                            full.write(w, &h)?;
                        }
                        Ok(hidden.write(w, &h)?)
                    },
                    |_, _| Ok(()),
                )?;
            }
        }
        let spill = journal.dir().to_owned();
        Ok(Some(Calibrated { spec, rope, lengths, budget, spill, hidden, full, observation }))
    }
}

impl Calibrated<'_> {
    fn flow(&self) -> Flow<'_> {
        let Calibrated { spec, rope, lengths, budget, spill, hidden, full, observation } = self;
        let (budget, full, observation) = (*budget, full.as_ref(), *observation);
        Flow { spec, rope, lengths, budget, spill, hidden, full, observation }
    }
}

/// Fills `stream` from `file`, which must have this hash.
fn take_up(stream: &Stream, file: &Path, hash: &str) -> Result<(), Error> {
    if hash_file(file)? != hash {
        let source = std::io::Error::other("its contents changed since it was written");
        return Err(io(file, "taking up the calibration stream")(source));
    }
    Ok(stream.load(file)?)
}

/// Completes the folder and gives it its name.
fn publish(
    input: &Checkpoint,
    plan: &Plan,
    identity: &serde_json::Value,
    journal: Journal,
    first: &[StageRecord],
    (out, force): (&Path, bool),
) -> Result<Finished, Error> {
    let later = journal.lines.iter().filter_map(|l| l.stage.clone());
    let stages: Vec<StageRecord> = first.iter().cloned().chain(later).collect();
    let tensors: Vec<TensorRecord> = journal.lines.iter().flat_map(|l| l.tensors.iter().cloned()).collect();
    // A GGUF file is complete in itself; a folder has more in it than weights.
    let result = match plan.gguf {
        Some(_) => journal.output().join(crate::gguf::FILE),
        None => complete_folder(input, plan, identity, &journal.output(), (&tensors, &stages))?,
    };
    let mut name = out.file_name().unwrap_or_default().to_owned();
    name.push(".log.jsonl");
    let log = out.with_file_name(name);
    let lines: String = tensors.iter().map(|t| format!("{}\n", json!(t))).collect();
    write_durably(&log, lines.as_bytes())?;
    if out.exists() {
        if !force {
            return Err(Error::Exists { out: out.to_owned() });
        }
        let old = journal.dir().join("replaced");
        std::fs::rename(out, &old).map_err(io(out, "moving the old output away"))?;
    }
    std::fs::rename(&result, out).map_err(io(out, "naming the output"))?;
    journal.remove()?;
    Ok(Finished { out: out.to_owned(), log, tensors, stages, bytes: plan.output.total_bytes() })
}

/// Adds what a folder holds besides weights, and returns it.
fn complete_folder(
    input: &Checkpoint,
    plan: &Plan,
    identity: &serde_json::Value,
    dir: &Path,
    (tensors, stages): (&[TensorRecord], &[StageRecord]),
) -> Result<PathBuf, Error> {
    for file in &plan.files {
        let (from, to) = (input.dir().join(file), dir.join(file));
        if let Some(parent) = to.parent() {
            std::fs::create_dir_all(parent).map_err(io(parent, "creating"))?;
        }
        let copy = || std::fs::copy(&from, &to).and_then(|_| std::fs::File::open(&to)?.sync_all());
        copy().map_err(io(&to, "copying"))?;
    }
    // Everything in the folder is a function of input and settings, so seconds stay in the log beside it.
    let manifest = json!({
        "run": identity,
        "bits_per_weight": plan.bits_per_weight(),
        "tensors": tensors.iter().map(|t| json!({
            "tensor": t.tensor, "scheme": t.scheme, "bits_per_weight": t.bits_per_weight,
            "relative_error": t.relative_error, "error_of": t.error_of, "damping": t.damping, "stages": t.stages,
        })).collect::<Vec<_>>(),
        "stages": stages.iter().map(|s| json!({
            "stage": s.stage, "loss": s.loss, "held_out_windows": s.held_out_windows, "before": s.before,
            "after": s.after, "kept_pass": s.kept_pass,
        })).collect::<Vec<_>>(),
    });
    write_durably(&dir.join("bitmill.json"), &pretty(&manifest))?;
    Ok(dir.to_owned())
}

//! The run: a plan applied unit by unit, committed as it goes, published by a rename.

mod calibrated;
mod card;
mod commits;
mod copies;
mod later;
mod measured;
mod publish;
mod slabs;
mod tensors;

#[cfg(test)]
mod tests;

pub(crate) use publish::gguf_names;

use crate::block::{Flow, Moment, Target};
use crate::fused::Magnitudes;
use crate::journal::{
    Journal, Line, SiteRecord, StageRecord, TensorRecord, Work, fingerprints, identity, io, write_durably,
};
use crate::learn::{Lesson, rounding_to, tune};
use crate::reconstruction::RebuiltBlock;
use crate::transforms::{transformed, transformed_bytes};
use crate::weight::weight;
use crate::{Action, Error, Linear, Method, Needs, Plan, SolverOptions, Unit, method};
use bitmill_calibrate::{Imatrix, Statistics, Windows};
use bitmill_checkpoint::{Checkpoint, Format, Output, Weight, ensure_free};
use bitmill_models::Block;
use calibrated::Calibrated;
use commits::Commits;
use copies::Copies;
use later::{changed, read_later};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tensors::{write_cache_scales, write_quantized, write_values};

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
    /// A block is being reconstructed.
    Rebuilding {
        /// Steps done.
        done: usize,
        /// Steps in all.
        total: usize,
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
    /// A unit is finished, and will be on disk.
    Worked {
        /// Its index.
        unit: usize,
    },
    /// Units are on disk.
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
    /// Text, or images, that flow through the model as it is rounded, so that later blocks make up for earlier ones.
    Text(&'a Windows),
    /// What an earlier pass saw in the full-precision model: no forward pass.
    Statistics(&'a Statistics),
    /// The diagonal of what another program saw, which is enough to weigh errors and not to feed them back.
    Importance(&'a Imatrix),
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
    /// Time between commits, at least: what a kill may cost besides the unit in the making. Units that take less are committed
    /// together, and the next ones are worked meanwhile; with none, each is on disk before the next is begun.
    pub commit_every: Duration,
}

impl<'a> RunOptions<'a> {
    /// Nothing is replaced, activations take 4 GiB, and commits are five seconds apart.
    #[must_use]
    pub fn new(stop: &'a AtomicBool) -> Self {
        RunOptions { force: false, stream_memory: 4 << 30, stop, commit_every: Duration::from_secs(5) }
    }
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
    /// What calibration saw at every site.
    pub sites: Vec<SiteRecord>,
    /// What stages over the whole model brought.
    pub stages: Vec<StageRecord>,
    /// The manifest: what decides the output, and what became of every tensor. `bitmill.json` of a folder.
    pub manifest: serde_json::Value,
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
    for (_, to) in publish::names(plan, Path::new(""), out) {
        check_place(input, &to, options.force)?;
    }
    let learns = plan.settings.tuning.is_some() || plan.settings.reconstruction.is_some();
    if learns && !matches!(calibration, Some(Calibration::Text(_))) {
        return Err(Error::TuningNeedsText);
    }
    measured::check(input, plan, calibration)?;
    if !plan.transforms.is_empty() && !matches!(calibration, Some(Calibration::Text(_)) | None) {
        return Err(Error::TransformsNeedText);
    }
    let later = read_later(input, plan)?;
    let surveys: Vec<_> = input.survey(&|name| later.contains(name)).collect();
    let mut identity = identity(input, &surveys, plan, calibration)?;
    let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !Journal::resumable(out, &identity, options.force)? {
        observe(Event::Checking);
        if surveys.iter().any(|survey| !survey.finite()) {
            check_finite(input)?;
        }
        let work = plan.work_bytes() + transformed_bytes(input, plan);
        ensure_free(parent, plan.output.total_bytes() + extra_bytes(input, plan)? + work)?;
    }
    std::fs::create_dir_all(parent).map_err(io(parent, "creating the output's parent folder"))?;
    let mut journal = Journal::open(out, &identity, options.force)?;
    if let Some(change) = changed(input, &journal.lines)? {
        journal.start_over(&identity, change, options.force)?;
    }
    let output = open_output(plan, &mut journal)?;
    let copies = Copies::begin(input, plan, &journal.work.output());
    let (done, total) = (journal.lines.len(), plan.units.len() + usize::from(plan.settings.tuning.is_some()));
    if done > 0 {
        observe(Event::Resumed { done, total });
    }
    let text = match calibration {
        Some(Calibration::Text(windows)) => Some(windows),
        _ => None,
    };
    let work = journal.work.clone();
    let place = (work.dir(), options.stream_memory, options.stop);
    let rewritten = transformed(input, plan, text, place, &mut |done, total| {
        observe(Event::Transforming { done, total });
    })?;
    let (model, stages) = rewritten.as_ref().map_or((input, &[][..]), |(model, stages)| (model, stages));
    stages.iter().for_each(|stage| observe(Event::Stage(stage)));
    let flow = Calibrated::new((model, plan), calibration, &journal, options.stream_memory)?;
    let output = Arc::new(output);
    let commits = Commits::new(journal, output.clone());
    let (sources, held, last) = (BTreeMap::new(), Vec::new(), Instant::now());
    let mut worker =
        Worker { input: model, plan, output, work, commits, held, last, observe, options, later: &later, sources };
    let worked = (done..total).try_for_each(|unit| worker.unit((unit, total), calibration, flow.as_ref()));
    let settled = worker.settle();
    let journal = match (worker.commits.into_journal(), settled.and(worked)) {
        (Some(journal), Ok(())) => journal,
        // Where weights are damaged nothing is written; those that nobody had read yet show it now.
        (Some(journal), Err(damaged @ Error::NonFinite { .. })) => {
            drop(copies);
            journal.remove()?;
            return Err(damaged);
        }
        // Units that were finished shortly before are begun again.
        (Some(journal), Err(Error::Stopped { total, .. })) => {
            return Err(Error::Stopped { done: journal.lines.len(), total });
        }
        (_, Err(error)) => return Err(error),
        (None, Ok(())) => unreachable!("a commit that failed says so"),
    };
    drop(flow);
    let read = journal.lines.iter().flat_map(|line| line.sources.clone()).collect();
    identity["weights"] = fingerprints(&surveys, &read);
    publish::publish(copies, plan, &identity, journal, stages, (out, options.force))
}

/// OUT must not exist (unless it is to be replaced), nor lie in MODEL, nor MODEL in it.
pub(crate) fn check_place(input: &Checkpoint, out: &Path, force: bool) -> Result<(), Error> {
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
    let dir = journal.work.output();
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
        write_config(&dir, Some(plan.format), &plan.config)?;
    }
    Ok(plan.output.create(&dir)?)
}

/// Writes `config.json`, and what a format has some loaders find beside it.
pub(crate) fn write_config(dir: &Path, format: Option<&dyn Format>, config: &serde_json::Value) -> Result<(), Error> {
    write_durably(&dir.join("config.json"), &pretty(config))?;
    match format.and_then(|format| format.sidecar(&config["quantization_config"])) {
        Some((name, value)) => write_durably(&dir.join(name), &pretty(&value)),
        None => Ok(()),
    }
}

pub(crate) fn pretty(value: &serde_json::Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

/// What became of a unit's tensors, and what was seen at its sites.
type Records = (Vec<TensorRecord>, Vec<SiteRecord>);

struct Worker<'a, 'o> {
    input: &'a Checkpoint,
    plan: &'a Plan,
    output: Arc<Output>,
    work: Work,
    commits: Commits,
    /// Units that are finished and not yet sent to the disk.
    held: Vec<Line>,
    /// When units were sent last.
    last: Instant,
    observe: &'o mut dyn FnMut(Event<'_>),
    options: RunOptions<'a>,
    /// Tensors that nobody has read yet.
    later: &'a BTreeSet<String>,
    /// Fingerprints of those of the unit.
    sources: BTreeMap<String, String>,
}

impl Worker<'_, '_> {
    /// Works one unit, and sends it on its way to the disk.
    fn unit(
        &mut self,
        (unit, total): (usize, usize),
        calibration: Option<Calibration<'_>>,
        flow: Option<&Calibrated<'_>>,
    ) -> Result<(), Error> {
        if self.options.stop.load(Ordering::Relaxed) {
            self.commit(flow)?;
            return Err(Error::Stopped { done: unit, total });
        }
        let plan = self.plan;
        let line = match plan.units.get(unit) {
            None => {
                (self.observe)(Event::Started { unit, total, label: "tuning" });
                // It takes long: what the disk says to what was before is said first.
                self.commit(flow)?;
                self.settle()?;
                Line { unit, stage: Some(self.tune(calibration)?), ..Line::default() }
            }
            Some(planned) => {
                (self.observe)(Event::Started { unit, total, label: &planned.label });
                let (tensors, sites) = match (flow, planned.block) {
                    (Some(flow), Some(block)) => {
                        let is_last = plan.units[unit + 1..].iter().all(|unit| unit.block.is_none());
                        self.calibrated_unit(planned, block, &flow.flow(is_last), unit, total)?
                    }
                    (None, Some(block)) if plan.calibrated => match calibration {
                        Some(Calibration::Importance(imatrix)) => (self.weighed_unit(planned, imatrix)?, Vec::new()),
                        _ => self.measured_unit(planned, block, calibration)?,
                    },
                    _ => (self.plain_unit(planned)?, Vec::new()),
                };
                // No unit reads the weights of another.
                self.input.release();
                Line { unit, tensors, sites, sources: std::mem::take(&mut self.sources), ..Line::default() }
            }
        };
        self.held.push(line);
        (self.observe)(Event::Worked { unit });
        if unit + 1 == total || self.last.elapsed() >= self.options.commit_every {
            self.commit(flow)?;
        }
        if self.options.commit_every.is_zero() {
            self.settle()?;
        }
        Ok(())
    }

    /// A unit without activations: copies, and methods that need no data.
    fn plain_unit(&mut self, unit: &Unit) -> Result<Vec<TensorRecord>, Error> {
        let mut records = Vec::new();
        let mut magnitudes = Magnitudes::new(self.input, self.plan.spec.as_ref());
        for tensor in &unit.tensors {
            let Action::Quantize { module, scheme, shape, .. } = &tensor.action else {
                self.copy(&tensor.name)?;
                continue;
            };
            let (method, solver) = plain_method(self.plan)?;
            let amax = scheme.shares_scale().then(|| magnitudes.largest(module)).transpose()?;
            let linear = Linear { amax, ..Linear::new(module, &[], *shape, *scheme) };
            records.push(self.without_feedback(&linear, None, (method, &solver), tensor.bytes)?);
        }
        Ok(records)
    }

    /// Rounds, encodes and writes the matrix of `linear`, whose weights are not read yet, where errors cost `h` by columns if that
    /// is known: slab by slab, if the method can.
    fn without_feedback(
        &mut self,
        linear: &Linear<'_>,
        h: Option<&[f32]>,
        (method, solver): (&dyn Method, &SolverOptions),
        bytes: u64,
    ) -> Result<TensorRecord, Error> {
        let started = Instant::now();
        let [error, energy] = match slabs::way(self.plan, linear, (method, solver)) {
            Some(way) => {
                let stored = self.input.weight(linear.name)?;
                let name = format!("{}.weight", linear.name);
                let unseen = self.later.contains(&name).then_some(self.input);
                let (lost, read) = slabs::round((self.plan, &self.output), linear, &stored, h, &way, unseen)?;
                if let Some(fingerprint) = read {
                    self.sources.insert(name, fingerprint.to_string());
                }
                lost
            }
            None => {
                let weight = weight(self.input, self.plan.spec.as_ref(), linear.name)?;
                let mut sums = [0.0; 2];
                for solved in method.solve(&[Linear { weight: &weight, ..*linear }], h, solver)? {
                    self.write(linear.name, &solved.quantized)?;
                    sums = crate::methods::blocks::lost(&weight, &solved.quantized.dequantize(), h);
                }
                sums
            }
        };
        let record = TensorRecord {
            relative_error: if energy > 0.0 { error / energy } else { 0.0 },
            error_of: if h.is_some() { "weighed weights".into() } else { "weights".into() },
            seconds: started.elapsed().as_secs_f64(),
            ..TensorRecord::of(linear.name, linear.shape, linear.scheme, method, bytes)
        };
        (self.observe)(Event::Tensor(&record));
        Ok(record)
    }

    /// A block through which the calibration text flows.
    fn calibrated_unit(
        &mut self,
        unit: &Unit,
        index: usize,
        flow: &Flow<'_>,
        done: usize,
        total: usize,
    ) -> Result<Records, Error> {
        for tensor in unit.tensors.iter().filter(|t| t.action == Action::Copy) {
            self.copy(&tensor.name)?;
        }
        let mut block = Block::load(flow.spec, index, self.input)?;
        block.multiply_by(flow.observation.arithmetic.short());
        let target = |tensor| {
            let target = Target::of(tensor)?;
            let stored = self.input.spec(&format!("{}.bias", target.module)).map(|t| t.dtype);
            let bias = block.bias(target.role).and_then(|_| rounding_to(stored));
            Some(Target { bias, ..target })
        };
        let targets: Vec<Target<'_>> = unit.tensors.iter().filter_map(target).collect();
        let how = (self.plan.method, &self.plan.settings.solver);
        let (mut tensors, mut sites) = (Vec::new(), Vec::new());
        flow.quantize_block(index, block, &targets, how, &mut |moment| {
            let committed = self.commits.poll()?;
            self.tell(committed);
            match moment {
                Moment::Site(_) | Moment::Rebuilding(..) if self.options.stop.load(Ordering::Relaxed) => {
                    return Err(Error::Stopped { done, total });
                }
                Moment::Rebuilding(done, total) => (self.observe)(Event::Rebuilding { done, total }),
                Moment::Rebuilt(rebuilt) => self.rebuilt(*rebuilt, &mut tensors)?,
                Moment::Cache(scales) => write_cache_scales(&self.output, flow.spec, index, scales)?,
                Moment::Site(site) => (self.observe)(Event::Site { name: site.name }),
                Moment::Seen(site) => sites.push(site),
                Moment::Finished(finished) => {
                    write_quantized(self.plan, &self.output, &finished.module, &finished.solved.quantized)?;
                    if let Some(bias) = &finished.bias {
                        let view = self.input.tensor(&format!("{}.bias", finished.module))?;
                        write_values(self.plan, &self.output, &view, bias)?;
                    }
                    (self.observe)(Event::Tensor(&finished.record));
                    tensors.push(finished.record);
                }
            }
            Ok(())
        })?;
        Ok((tensors, sites))
    }

    /// Writes what reconstruction made of a block in the place of what was there, and notes in its `records` what that brought.
    fn rebuilt(&self, rebuilt: RebuiltBlock, records: &mut [TensorRecord]) -> Result<(), Error> {
        for (module, quantized) in &rebuilt.linears {
            self.write(module, quantized)?;
            for record in records.iter_mut().filter(|r| r.tensor == *module) {
                record.stages.push(rebuilt.change.clone());
            }
        }
        for (name, values) in &rebuilt.norms {
            write_values(self.plan, &self.output, &self.input.tensor(name)?, values)?;
        }
        Ok(())
    }

    /// Tunes the whole rounded model and writes what came of it in the place of what was there.
    fn tune(&mut self, calibration: Option<Calibration<'_>>) -> Result<StageRecord, Error> {
        let started = Instant::now();
        let settings = &self.plan.settings;
        let (Some(tuning), Some(spec)) = (&settings.tuning, &self.plan.spec) else {
            unreachable!("a plan with tuning is calibrated, and so has an architecture");
        };
        let Some(Calibration::Text(windows)) = calibration else {
            unreachable!("checked before anything was written");
        };
        let written = Checkpoint::open(&self.work.output())?;
        let lesson = Lesson {
            spec,
            input: self.input,
            written: &written,
            windows,
            tuning,
            seed: settings.seed,
            train_head: self.plan.trains_head(),
            work: self.work.dir(),
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
        match &self.plan.gguf {
            Some(gguf) => self.output.write(name, &gguf.copied(self.input, name)?)?,
            None => self.output.write(name, &self.input.tensor(name)?.by_rows())?,
        }
        Ok(())
    }
}

/// The method for matrices that no calibration reaches: the ends of a model in a GGUF file are rounded to nearest
/// where the plan's own method needs data.
fn plain_method(plan: &Plan) -> Result<(&'static dyn Method, SolverOptions), Error> {
    let solver = plan.settings.solver.clone();
    if plan.method.needs(&solver) == Needs::Nothing {
        return Ok((plan.method, solver));
    }
    Ok((method("rtn")?, SolverOptions { scale_search: None, ..solver }))
}

//! Applying transforms: the original model in, its rewritten copy in the work folder out.

use super::{BlockWeights, Model, Rewrite};
use crate::journal::{StageRecord, io, write_durably};
use crate::{Action, Error, Plan, calibrate};
use bitmill_calibrate::{Pass, Statistics, Windows, model_fingerprint};
use bitmill_checkpoint::{Checkpoint, Dtype, Output, OutputPlan, TensorSpec, TensorView};
use bitmill_models::ModelSpec;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Values of an embedding or a head that are rewritten at a time.
const CHUNK: usize = 1 << 22;

/// Bytes of disk that the rewritten copy takes.
pub(crate) fn transformed_bytes(input: &Checkpoint, plan: &Plan) -> u64 {
    if plan.transforms.is_empty() { 0 } else { tensors(input, plan).iter().map(|t| t.bytes() as u64).sum() }
}

/// The model that `plan`'s transforms make of `input`, written once to `work` and taken up from there; and what each
/// predicts to bring. `None` without transforms.
pub(crate) fn transformed(
    input: &Checkpoint,
    plan: &Plan,
    text: Option<&Windows>,
    (work, stream_memory, stop): (&Path, u64, &AtomicBool),
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Option<(Checkpoint, Vec<StageRecord>)>, Error> {
    if plan.transforms.is_empty() {
        return Ok(None);
    }
    let (dir, draft, report) = (work.join("transformed"), work.join("transformed.draft"), work.join("transforms.json"));
    if !dir.exists() {
        if draft.exists() {
            std::fs::remove_dir_all(&draft).map_err(io(&draft, "clearing"))?;
        }
        std::fs::create_dir_all(&draft).map_err(io(&draft, "creating"))?;
        let statistics = statistics(input, plan, text, work, stream_memory, progress)?;
        let stages = Rewriting { input, plan, statistics, stop }.write(&draft, progress)?;
        write_durably(&report, &serde_json::to_vec(&stages).unwrap_or_default())?;
        std::fs::rename(&draft, &dir).map_err(io(&dir, "naming the rewritten model"))?;
    }
    let stages = std::fs::read(&report).map_err(io(&report, "reading"))?;
    let stages = serde_json::from_slice(&stages).map_err(|e| io(&report, "reading")(e.into()))?;
    Ok(Some((Checkpoint::open(&dir)?, stages)))
}

/// What a pass of the text through the original model sees, kept beside the copy in case the run is killed.
fn statistics(
    input: &Checkpoint,
    plan: &Plan,
    text: Option<&Windows>,
    work: &Path,
    stream_memory: u64,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Option<Statistics>, Error> {
    let (Some(windows), Some(spec)) = (text, &plan.spec) else { return Ok(None) };
    let file: PathBuf = work.join("transforms.stats.safetensors");
    let original = ModelSpec { tied: plan.tied, ..spec.clone() };
    if !file.exists() {
        let pass = Pass { model: input, spec: &original, stream_memory, spill_dir: work };
        calibrate(pass, windows, &file, false, progress)?;
    }
    Ok(Some(Statistics::open(&[(file, 1.0)], &original, &model_fingerprint(input)?)?))
}

/// Every tensor of the copy: f32 where it is to be rounded, so that it is rounded once, and as stored elsewhere.
fn tensors(input: &Checkpoint, plan: &Plan) -> Vec<TensorSpec> {
    let spec = |t: &crate::PlannedTensor| -> Option<TensorSpec> {
        let stored = input.spec(&t.name).cloned().or_else(|| plan.untied.clone().filter(|u| u.name == t.name))?;
        Some(match t.action {
            Action::Quantize { .. } => TensorSpec { dtype: Dtype::F32, ..stored },
            Action::Copy => stored,
        })
    };
    plan.units.iter().flat_map(|u| &u.tensors).filter_map(spec).collect()
}

struct Rewriting<'a> {
    input: &'a Checkpoint,
    plan: &'a Plan,
    statistics: Option<Statistics>,
    stop: &'a AtomicBool,
}

impl Rewriting<'_> {
    fn write(&self, to: &Path, progress: &mut dyn FnMut(usize, usize)) -> Result<Vec<StageRecord>, Error> {
        let Rewriting { input, plan, .. } = self;
        let Some(spec) = &plan.spec else { unreachable!("transforms are planned for known architectures") };
        let specs = tensors(input, plan);
        let output = OutputPlan::new(specs.clone(), u64::MAX)?.create(to)?;
        let types: BTreeMap<String, Dtype> = specs.into_iter().map(|t| (t.name, t.dtype)).collect();
        let mut config = input.config().clone();
        config["tie_word_embeddings"] = spec.tied.into();
        write_durably(&to.join("config.json"), format!("{config:#}\n").as_bytes())?;
        let schemes = plan.quantized().map(|(module, scheme, _)| (module.clone(), *scheme)).collect();
        let needs = plan.method.needs(&plan.settings.solver);
        let (statistics, seed) = (self.statistics.as_ref(), plan.settings.seed);
        let model = Model { input, spec, statistics, schemes: &schemes, needs, seed };
        // A transform sees the original; those after the first would have to see what it made of it, and of them only
        // the ones that look at single blocks exist.
        let rewrites = plan.transforms.iter().map(|t| t.prepare(&model)).collect::<Result<Vec<_>, _>>()?;
        let mut written: Vec<String> = Vec::new();
        for index in 0..spec.layers {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Error::Stopped { done: 0, total: plan.units.len() });
            }
            let mut block = model.block(index)?;
            rewrites.iter().try_for_each(|r| r.block(&mut block))?;
            written.extend(self.write_block(&output, &block, &types)?);
            progress(index + 1, spec.layers);
        }
        self.write_ends(&output, spec, &rewrites, &types, &mut written)?;
        for name in types.keys().filter(|name| !written.contains(name)) {
            let view = input.tensor(name)?;
            // What stays as it is need not be numbers of weights at all: positions, for example.
            match types[name] == view.dtype {
                true => output.write(name, &view.by_rows())?,
                false => output.write(name, &stored(&view, types[name], &view.to_f32()?)?)?,
            }
        }
        output.sync()?;
        let mut stages = Vec::new();
        for (transform, rewrite) in plan.transforms.iter().zip(&rewrites) {
            let Some((before, after)) = rewrite.predicted() else { continue };
            stages.push(StageRecord {
                stage: transform.name().into(),
                loss: "predicted relative error".into(),
                held_out_windows: 0,
                before,
                after,
                kept_pass: 1,
                seconds: 0.0,
            });
        }
        Ok(stages)
    }

    /// Writes what transforms may have changed in a block; returns the names.
    fn write_block(
        &self,
        output: &Output,
        block: &BlockWeights<'_>,
        types: &BTreeMap<String, Dtype>,
    ) -> Result<Vec<String>, Error> {
        let mut written = Vec::new();
        for slot in block.spec.block_tensors(block.index) {
            let (Some(values), Some(&dtype)) = (block.values(&slot.name), types.get(&slot.name)) else { continue };
            output.write(&slot.name, &stored(&self.input.tensor(&slot.name)?, dtype, &values)?)?;
            written.push(slot.name);
        }
        Ok(written)
    }

    /// Writes embedding, head and final norm.
    fn write_ends(
        &self,
        output: &Output,
        spec: &ModelSpec,
        rewrites: &[Box<dyn Rewrite>],
        types: &BTreeMap<String, Dtype>,
        written: &mut Vec<String>,
    ) -> Result<(), Error> {
        let Some(head) = spec.head().map(|head| format!("{head}.weight")) else { return Ok(()) };
        let (embedding, norm_name) = (spec.embedding(), spec.final_norm());
        let mut norm = match &norm_name {
            Some(name) => self.input.tensor(name)?.to_f32()?.into_iter().map(|w| w + spec.norm_offset).collect(),
            None => vec![1.0; spec.hidden],
        };
        let view = self.input.tensor(&embedding)?;
        let rows = |rows: &mut [f32]| rewrites.iter().for_each(|r| r.embedding(rows));
        output.write(&embedding, &rewritten(&view, types[&embedding], spec.hidden, rows)?)?;
        written.push(embedding.clone());
        if !spec.tied {
            let from = if self.plan.tied { embedding } else { head.clone() };
            let rows = |rows: &mut [f32]| rewrites.iter().for_each(|r| r.head(rows, &norm));
            output.write(&head, &rewritten(&self.input.tensor(&from)?, types[&head], spec.hidden, rows)?)?;
            written.push(head);
        }
        if let Some(name) = norm_name {
            if rewrites.iter().any(|r| r.folds_final_norm()) {
                norm.fill(1.0);
            }
            norm.iter_mut().for_each(|w| *w -= spec.norm_offset);
            output.write(&name, &self.input.tensor(&name)?.with_values(&norm)?)?;
            written.push(name);
        }
        Ok(())
    }
}

/// The payload, of type `dtype`, of a matrix with rows of `width` numbers after `rewrite`, which sees a part at a time.
fn rewritten(
    view: &TensorView<'_>,
    dtype: Dtype,
    width: usize,
    rewrite: impl Fn(&mut [f32]),
) -> Result<Vec<u8>, Error> {
    let mut values = view.to_f32()?;
    values.chunks_mut((CHUNK / width).max(1) * width).for_each(rewrite);
    stored(view, dtype, &values)
}

/// `values` as the payload of a tensor like `view` of type `dtype`, which is its own or f32.
fn stored(view: &TensorView<'_>, dtype: Dtype, values: &[f32]) -> Result<Vec<u8>, Error> {
    if dtype == view.dtype {
        Ok(view.with_values(values)?)
    } else {
        Ok(values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }
}

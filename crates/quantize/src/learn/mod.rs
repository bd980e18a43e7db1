//! Refinement by gradients: the codes, scales and norms of a whole rounded model, tuned until its logits come as near to
//! the full-precision model's as they will.
//!
//! Layer-wise solvers see each linear alone; what remains after them is what only the loss at the end of the model can
//! tell: which errors cancel downstream, and which the logits never notice. Tuning starts from the solvers' result, walks
//! a few times over the calibration windows with the KL divergence of the logits as its loss ([`goal`]), and keeps the
//! pass that is best on windows held out from training. If none beats the start, the start is kept.
//!
//! It holds the whole model in memory several times over ([`memory`]), which is its price and limit. Every pass is saved,
//! and a killed run goes on after the last one, to the same bytes.

mod adam;
mod goal;
mod pupil;
mod rounding;

use crate::Error;
use crate::journal::{StageRecord, io};
use crate::settings::Tuning;
use adam::State;
use bitmill_calibrate::{Stream, StreamKind, Windows, in_order, splitmix};
use bitmill_checkpoint::{Checkpoint, Dtype};
use bitmill_models::{Block, BlockGradients, Embedding, Head, ModelSpec, NormRole, Role, RopeTable};
use bitmill_scheme::Quantized;
use candle_core::{Device, Tensor};
use goal::{Goal, resample};
use half::{bf16, f16};
use pupil::Pupil;
pub(crate) use pupil::ToStored;
use rounding::Rates;
use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Windows whose gradients are in memory at a time. It fixes the order of sums, so it is a constant.
const TOGETHER: usize = 4;
/// One window in this many is held out from training.
const HELD_OUT: usize = 16;

/// What tuning works with.
#[derive(Clone, Copy)]
pub(crate) struct Lesson<'a> {
    pub(crate) spec: &'a ModelSpec,
    /// The full-precision model.
    pub(crate) input: &'a Checkpoint,
    /// The rounded model, whose biases may have changed.
    pub(crate) written: &'a Checkpoint,
    pub(crate) windows: &'a Windows,
    pub(crate) tuning: &'a Tuning,
    pub(crate) seed: u64,
    /// Folder for the state of every pass and for spilled activations.
    pub(crate) work: &'a Path,
    /// Bytes the activations may take in memory.
    pub(crate) stream_memory: u64,
    pub(crate) stop: &'a AtomicBool,
}

/// A rounded linear and its module.
pub(crate) type Start = (Role, Quantized);

/// What came of it.
pub(crate) struct Tuned {
    /// Every trained linear: block, role, and its new codes and scales.
    pub(crate) linears: Vec<(usize, Role, Quantized)>,
    /// Every trained norm: the name of its weight, and the weight in values of its stored type.
    pub(crate) norms: Vec<(String, Vec<f32>)>,
    pub(crate) record: StageRecord,
}

/// How far tuning has come.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    pub(crate) done: usize,
    pub(crate) total: usize,
    /// Loss on the held-out windows after the last pass, and before the first.
    pub(crate) held_out: (f64, f64),
}

/// Bytes of the saved states that exist at a time: the start, the best, the latest and the one being written.
pub(crate) fn disk(weights: u64) -> u64 {
    4 * weights * 3 * 4
}

/// Bytes of memory that tuning `weights` rounded weights of a model of `all` weights takes: the teacher in f32; the student
/// and its best pass, each with its latents, their two moments and codes; and the gradients of the windows in flight.
pub(crate) fn memory(weights: u64, all: u64) -> u64 {
    let student = weights * (4 + 3 * 4 + 1);
    4 * all + 2 * student + 4 * weights * (TOGETHER as u64 + 1)
}

/// Tunes the model whose blocks were rounded to `start`, in order of blocks.
///
/// # Errors
/// [`Error::Stopped`] on request, after which the same call goes on from the last finished pass.
pub(crate) fn tune(lesson: Lesson<'_>, start: Vec<Vec<Start>>, observe: &mut dyn FnMut(Step)) -> Result<Tuned, Error> {
    let school = School::new(lesson)?;
    let (mut pupils, mut best) = (school.pupils(start)?, None::<Best>);
    let (mut before, mut last) = (f64::NAN, f64::NAN);
    let passes = lesson.tuning.passes as usize;
    let saved = (0..=passes).rev().find(|&pass| school.state_file(pass).exists());
    // Pass 0 is the start itself: it is saved too, since finished codes will take its place in the output.
    for pass in 0..=passes {
        if saved.is_some_and(|saved| pass <= saved) {
            if !school.take_up(pass, &mut pupils)? {
                continue;
            }
        } else {
            if pass > 0 {
                school.pass(pass, &mut pupils, &mut |done| {
                    let (done, total) = ((pass - 1) * school.steps() + done, passes * school.steps());
                    observe(Step { done, total, held_out: (last, before) });
                })?;
            }
            school.save(pass, &mut pupils)?;
        }
        last = school.held_out_loss(&pupils)?;
        if pass == 0 {
            before = last;
        }
        let beaten = best.as_ref().is_none_or(|best| last < best.loss);
        let discarded = match &best {
            Some(old) if beaten && old.pass > 0 => Some(old.pass),
            Some(old) if !beaten && pass > old.pass + 1 => Some(pass - 1),
            _ => None,
        };
        // Only the best pass and the latest are needed any more, and the start.
        if let Some(old) = discarded {
            let _ = std::fs::remove_file(school.state_file(old));
        }
        if beaten {
            best = Some(Best { pupils: pupils.clone(), loss: last, pass });
        }
    }
    match best {
        Some(best) => Ok(school.tuned(best, before)),
        // Pass 0 always is a first best.
        None => unreachable!("tuning saw no pass"),
    }
}

/// The best pass so far.
struct Best {
    pupils: Vec<Pupil>,
    loss: f64,
    pass: usize,
}

/// Everything that stays the same from pass to pass.
struct School<'a> {
    lesson: Lesson<'a>,
    embedding: Embedding,
    /// The full-precision blocks.
    teacher: Vec<Block>,
    head: Option<Head>,
    rope: RopeTable,
    /// Last hidden states of the teacher on the windows as they are.
    reference: Stream,
    training: Vec<usize>,
    held_out: Vec<usize>,
}

impl<'a> School<'a> {
    fn new(lesson: Lesson<'a>) -> Result<Self, Error> {
        let Lesson { spec, input, windows, work, stream_memory, .. } = lesson;
        let spill = work.join("tuning-reference");
        let reference = Stream::of_lengths(StreamKind::F32, &windows.lengths(), spec.hidden, stream_memory, &spill)?;
        // One window alone is both.
        let held =
            |w: &usize| (w + 1).is_multiple_of(HELD_OUT) || (windows.count() < HELD_OUT && w + 1 == windows.count());
        let (held_out, mut training): (Vec<_>, Vec<_>) = (0..windows.count()).partition(held);
        if training.is_empty() {
            training.clone_from(&held_out);
        }
        let school = School {
            lesson,
            embedding: Embedding::load(spec, input)?,
            teacher: (0..spec.layers).map(|i| Block::load(spec, i, input)).collect::<Result<_, _>>()?,
            head: if spec.head().is_some() { Some(Head::load(spec, input)?) } else { None },
            rope: RopeTable::new(&spec.rope, windows.length)?,
            reference,
            training,
            held_out,
        };
        let teach = |w: usize| -> Result<(), Error> {
            let h = school.forward(school.teacher.iter(), &windows.tokens[w])?;
            Ok(school.reference.write(w, &h.flatten_all()?.to_vec1::<f32>()?)?)
        };
        in_order(windows.count(), 16, teach, |_, _| Ok(()))?;
        Ok(school)
    }

    fn goal(&self) -> Goal<'_> {
        self.head.as_ref().map_or(Goal::States, Goal::Logits)
    }

    /// Steps of one pass.
    fn steps(&self) -> usize {
        self.training.len().div_ceil(self.lesson.tuning.batch)
    }

    fn pupils(&self, start: Vec<Vec<Start>>) -> Result<Vec<Pupil>, Error> {
        let Lesson { spec, input, written, .. } = self.lesson;
        let pupil = |(index, (linears, block)): (usize, (Vec<Start>, &Block))| {
            let norm = |role: NormRole| {
                let dtype = input.spec(&spec.norm(index, role)).map(|t| t.dtype);
                rounding_to(dtype).map(|round| (role, round))
            };
            let norms = NormRole::ALL.into_iter().filter(|&r| spec.has_norm(r)).filter_map(norm).collect();
            let mut block = block.clone();
            for (role, module) in spec.block_linears(index).into_iter().filter(|(role, _)| spec.has_bias(*role)) {
                let bias = written.tensor(&format!("{module}.bias"))?.to_f32()?;
                block.set_bias(role, Some(Tensor::from_slice(&bias, bias.len(), &Device::Cpu)?));
            }
            Pupil::new(block, linears, norms)
        };
        start.into_iter().zip(&self.teacher).enumerate().map(pupil).collect()
    }

    fn forward<'b>(&self, blocks: impl Iterator<Item = &'b Block>, tokens: &[u32]) -> Result<Tensor, Error> {
        let mut h = self.embedding.embed(tokens)?;
        for block in blocks {
            h = block.forward(&h, &self.rope)?;
        }
        Ok(h)
    }

    /// The teacher's last hidden states of window `w` as it is.
    fn reference(&self, w: usize) -> Result<Tensor, Error> {
        let (values, width) = (self.reference.read(w)?, self.lesson.spec.hidden);
        Ok(Tensor::from_vec(values, (self.lesson.windows.tokens[w].len(), width), &Device::Cpu)?)
    }

    fn held_out_loss(&self, pupils: &[Pupil]) -> Result<f64, Error> {
        let mut total = 0.0;
        let loss = |i: usize| -> Result<f64, Error> {
            let w = self.held_out[i];
            let h = self.forward(pupils.iter().map(|p| &p.block), &self.lesson.windows.tokens[w])?;
            Ok(self.goal().loss(&h, &self.reference(w)?, false)?.0)
        };
        in_order(self.held_out.len(), 16, loss, |_, losses| -> Result<(), Error> {
            total += losses.iter().sum::<f64>();
            Ok(())
        })?;
        Ok(total / self.held_out.len() as f64)
    }

    /// Walks once over the training windows, in an order of its own.
    fn pass(&self, pass: usize, pupils: &mut [Pupil], observe: &mut dyn FnMut(usize)) -> Result<(), Error> {
        let tuning = self.lesson.tuning;
        let mut order = self.training.clone();
        order.sort_by_key(|&w| self.random(&[pass as u64, w as u64]));
        let total = self.steps() * tuning.passes as usize;
        for (step, windows) in order.chunks(tuning.batch).enumerate() {
            if self.lesson.stop.load(Ordering::Relaxed) {
                return Err(Error::Stopped { done: self.lesson.spec.layers, total: self.lesson.spec.layers + 1 });
            }
            let mut sum: Option<Vec<BlockGradients>> = None;
            let one = |i: usize| self.window(pass, windows[i], pupils);
            in_order(windows.len(), TOGETHER, one, |_, gradients| -> Result<(), Error> {
                for gradients in gradients {
                    match &mut sum {
                        None => sum = Some(gradients),
                        Some(sum) => sum.iter_mut().zip(&gradients).for_each(|(a, b)| a.add(b)),
                    }
                }
                Ok(())
            })?;
            let done = ((pass - 1) * self.steps() + step) as f32 / total as f32;
            // Half a cosine, from the full rates to nothing.
            let share = 0.5 * (1.0 + (std::f32::consts::PI * done).cos());
            let rates =
                Rates { codes: tuning.codes * share, scales: tuning.scales * share, norms: tuning.norms * share };
            for (pupil, gradients) in pupils.iter_mut().zip(sum.iter().flatten()) {
                pupil.step(gradients, rates)?;
            }
            observe(step + 1);
        }
        Ok(())
    }

    /// The gradients that window `w` gives every block. From the second pass on, part of its tokens are the teacher's.
    fn window(&self, pass: usize, w: usize, pupils: &[Pupil]) -> Result<Vec<BlockGradients>, Error> {
        let mut tokens = self.lesson.windows.tokens[w].clone();
        let mut reference = self.reference(w)?;
        if let (Some(head), true, true) = (&self.head, pass > 1, self.lesson.tuning.resample > 0.0) {
            let mut drawn = 0;
            let mut random = || {
                drawn += 1;
                (self.random(&[pass as u64, w as u64, drawn]) >> 40) as f32 / (1u64 << 24) as f32
            };
            resample(head, &reference, &mut tokens, self.lesson.tuning.resample, &mut random)?;
            reference = self.forward(self.teacher.iter(), &tokens)?;
        }
        let mut h = self.embedding.embed(&tokens)?;
        let mut traces = Vec::with_capacity(pupils.len());
        for pupil in pupils {
            let (out, trace) = pupil.block.forward_traced(&h, &self.rope)?;
            traces.push(trace);
            h = out;
        }
        let (_, mut grad) = self.goal().loss(&h, &reference, true)?;
        let mut gradients: Vec<BlockGradients> = pupils.iter().map(|p| p.block.no_gradients()).collect();
        for ((pupil, trace), gradients) in pupils.iter().zip(traces).zip(&mut gradients).rev() {
            grad = pupil.block.backward(&trace, &self.rope, grad, Some(gradients))?;
        }
        Ok(gradients)
    }

    /// A number that depends on the seed and on `path` alone.
    fn random(&self, path: &[u64]) -> u64 {
        path.iter().fold(splitmix(self.lesson.seed), |state, &part| splitmix(state ^ splitmix(part)))
    }

    fn state_file(&self, pass: usize) -> PathBuf {
        self.lesson.work.join(format!("tuning-{pass}"))
    }

    /// Makes pass `pass` durable.
    fn save(&self, pass: usize, pupils: &mut [Pupil]) -> Result<(), Error> {
        let (file, draft) = (self.state_file(pass), self.state_file(pass).with_extension("draft"));
        let steps = pass * self.steps();
        let mut out = BufWriter::with_capacity(1 << 20, File::create(&draft).map_err(io(&draft, "creating"))?);
        for pupil in pupils {
            pupil.exchange(&mut State::Save(&mut out), steps)?.map_err(io(&draft, "writing"))?;
        }
        let mut finish = || -> std::io::Result<()> {
            out.flush()?;
            out.get_ref().sync_data()?;
            std::fs::rename(&draft, &file)
        };
        finish().map_err(io(&file, "writing"))
    }

    /// Takes up pass `pass` of an earlier process; `false` where its file is gone, because another pass was better.
    fn take_up(&self, pass: usize, pupils: &mut [Pupil]) -> Result<bool, Error> {
        let file = self.state_file(pass);
        if !file.exists() {
            return Ok(false);
        }
        let mut input = BufReader::with_capacity(1 << 20, File::open(&file).map_err(io(&file, "opening"))?);
        for pupil in pupils {
            pupil.exchange(&mut State::Load(&mut input), pass * self.steps())?.map_err(io(&file, "reading"))?;
        }
        Ok(true)
    }

    fn tuned(&self, best: Best, before: f64) -> Tuned {
        let (mut linears, mut norms) = (Vec::new(), Vec::new());
        for (index, pupil) in best.pupils.into_iter().enumerate() {
            let named = |norm: &pupil::TrainedNorm| (self.lesson.spec.norm(index, norm.role), norm.stored());
            norms.extend(pupil.norms.iter().map(named));
            linears.extend(pupil.linears.into_iter().map(|(role, r)| (index, role, r.quantized().clone())));
        }
        let record = StageRecord {
            stage: "tuning".into(),
            loss: if self.head.is_some() { "KL divergence" } else { "relative error of hidden states" }.into(),
            held_out_windows: self.held_out.len(),
            before,
            after: best.loss,
            kept_pass: best.pass,
            seconds: 0.0,
        };
        Tuned { linears, norms, record }
    }
}

/// Rounding to a stored floating-point type; `None` for others.
pub(crate) fn rounding_to(dtype: Option<Dtype>) -> Option<ToStored> {
    match dtype? {
        Dtype::F32 | Dtype::F64 => Some(|v| v),
        Dtype::F16 => Some(|v| f16::from_f32(v).to_f32()),
        Dtype::BF16 => Some(|v| bf16::from_f32(v).to_f32()),
        _ => None,
    }
}

//! The school of tuning: a teacher, windows to learn from and windows to be examined by.

use super::adam::State;
use super::dense::{ToStored, TrainedHead};
use super::goal::{Goal, resample};
use super::pupil::Pupil;
use super::rounding::Rates;
use super::{Lesson, Start, TOGETHER, Tuned};
use crate::Error;
use crate::journal::{StageRecord, io};
use bitmill_calibrate::{Author, Stream, StreamKind, Written, held_out, in_order, splitmix, together, uniform};
use bitmill_checkpoint::Dtype;
use bitmill_models::{Block, BlockGradients, Embedding, Head, HeadGradients, NormRole, RopeTable, Window};
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::PathBuf;
use std::sync::atomic::Ordering;

/// Tokens of a window that a text of the teacher's starts from, so that it stays near the calibration text.
const PROMPT: usize = 16;
/// One window in this many is held out from training.
const HELD_OUT: usize = 16;

/// The model under training.
#[derive(Clone)]
pub(super) struct Student {
    pupils: Vec<Pupil>,
    /// Where the model has one.
    head: Option<TrainedHead>,
}

/// The best pass so far.
pub(super) struct Best {
    pub(super) student: Student,
    pub(super) loss: f64,
    pub(super) pass: usize,
}

/// Everything that stays the same from pass to pass.
pub(super) struct School<'a> {
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
    pub(super) fn new(lesson: Lesson<'a>) -> Result<Self, Error> {
        let Lesson { spec, input, windows, work, stream_memory, .. } = lesson;
        let spill = work.join("tuning-reference");
        let reference = Stream::of_lengths(StreamKind::F32, &windows.lengths(), spec.hidden, stream_memory, &spill)?;
        // One window alone is both.
        let held = |w: &usize| held_out(*w, windows.count(), HELD_OUT);
        let (held_out, mut training): (Vec<_>, Vec<_>) = (0..windows.count()).partition(held);
        if training.is_empty() {
            training.clone_from(&held_out);
        }
        let school = School {
            lesson,
            embedding: Embedding::load(spec, input)?,
            teacher: (0..spec.layers).map(|i| Block::load(spec, i, input)).collect::<Result<_, _>>()?,
            head: if spec.head().is_some() { Some(Head::load(spec, input)?) } else { None },
            rope: RopeTable::new(&spec.ropes, windows.length)?,
            reference,
            training,
            held_out,
        };
        let teach = |w: usize| -> Result<(), Error> {
            let h = school.forward(school.teacher.iter(), windows.get(w)?)?;
            Ok(school.reference.write(w, &h.flatten_all()?.to_vec1::<f32>()?)?)
        };
        in_order(windows.count(), 16, teach, |_, _| Ok(()))?;
        Ok(school)
    }

    fn goal<'b>(&'b self, student: &'b Student) -> Goal<'b> {
        match (&self.head, &student.head) {
            (Some(teacher), Some(student)) => Goal::Logits { teacher, student, top: self.lesson.tuning.top },
            _ => Goal::States,
        }
    }

    /// Steps of one pass.
    pub(super) fn steps(&self) -> usize {
        self.training.len().div_ceil(self.lesson.tuning.batch)
    }

    /// The model as the solvers left it.
    pub(super) fn student(&self, start: Vec<Vec<Start>>) -> Result<Student, Error> {
        let Lesson { spec, input, written, train_head, .. } = self.lesson;
        let stored = |name: &str| rounding_to(input.spec(name).map(|t| t.dtype));
        let pupil = |(index, (linears, block)): (usize, (Vec<Start>, &Block))| {
            let norm = |role: NormRole| stored(&spec.norm(index, role)).map(|round| (role, round));
            let norms = spec.block_norms(index).into_iter().filter_map(norm).collect();
            let mut block = block.clone();
            // Reconstruction may have changed the norms, and correction the biases.
            for role in spec.block_norms(index).into_iter().filter(|&r| stored(&spec.norm(index, r)).is_some()) {
                let norm =
                    (written.tensor(&spec.norm(index, role))?.to_f32()?.iter().map(|v| v + spec.norm_offset)).collect();
                block.set_norm(role, Tensor::from_vec(norm, block.norm(role).shape(), &Device::Cpu)?);
            }
            for (role, module) in spec.block_linears(index).into_iter().filter(|(role, _)| spec.has_bias(*role)) {
                let bias = written.tensor(&format!("{module}.bias"))?.to_f32()?;
                block.set_bias(role, Some(Tensor::from_slice(&bias, bias.len(), &Device::Cpu)?));
            }
            Pupil::new(block, linears, (norms, spec.norm_offset))
        };
        let pupils = start.into_iter().zip(&self.teacher).enumerate().map(pupil).collect::<Result<_, _>>()?;
        let names = (spec.head().filter(|_| train_head).map(|head| format!("{head}.weight")), spec.final_norm());
        let trained = |head: &Head| {
            let [weight, norm] = [&names.0, &names.1].map(|name| name.as_deref().and_then(stored));
            TrainedHead::new(head, weight, norm, spec.norm_offset)
        };
        Ok(Student { pupils, head: self.head.as_ref().map(trained).transpose()? })
    }

    fn forward<'b>(&self, blocks: impl Iterator<Item = &'b Block>, window: Window<'_>) -> Result<Tensor, Error> {
        let mut h = self.embedding.embed(window)?;
        for block in blocks {
            h = block.forward(&h, &self.rope)?;
        }
        Ok(h)
    }

    /// The teacher's last hidden states of window `w` as it is.
    fn reference(&self, w: usize) -> Result<Tensor, Error> {
        let (values, width) = (self.reference.read(w)?, self.lesson.spec.hidden);
        let tokens = values.len() / width;
        Ok(Tensor::from_vec(values, (tokens, width), &Device::Cpu)?)
    }

    pub(super) fn held_out_loss(&self, student: &Student) -> Result<f64, Error> {
        let mut total = 0.0;
        let loss = |i: usize| -> Result<f64, Error> {
            let w = self.held_out[i];
            let h = self.forward(student.pupils.iter().map(|p| &p.block), self.lesson.windows.get(w)?)?;
            self.goal(student).loss(&h, &self.reference(w)?)
        };
        in_order(self.held_out.len(), 16, loss, |_, losses| -> Result<(), Error> {
            total += losses.iter().sum::<f64>();
            Ok(())
        })?;
        Ok(total / self.held_out.len() as f64)
    }

    /// Walks once over the training windows, in an order of its own.
    pub(super) fn pass(&self, pass: usize, student: &mut Student, observe: &mut dyn FnMut(usize)) -> Result<(), Error> {
        let tuning = self.lesson.tuning;
        let mut order = self.training.clone();
        order.sort_by_key(|&w| self.random(&[pass as u64, w as u64]));
        let total = self.steps() * tuning.passes as usize;
        let mut step = 0;
        // Texts are written as many at a time as the author likes, just before they are read.
        let at_once = together(self.lesson.spec, self.lesson.windows.length);
        for some in order.chunks(at_once.next_multiple_of(tuning.batch)) {
            let texts = self.texts(pass, some)?;
            for windows in some.chunks(tuning.batch) {
                if self.lesson.stop.load(Ordering::Relaxed) {
                    return Err(Error::Stopped { done: self.lesson.spec.layers, total: self.lesson.spec.layers + 1 });
                }
                let mut sum: Option<Gradients> = None;
                let one = |i: usize| self.window(pass, windows[i], texts.get(&windows[i]), student);
                in_order(windows.len(), TOGETHER, one, |_, gradients| -> Result<(), Error> {
                    for gradients in gradients {
                        match &mut sum {
                            None => sum = Some(gradients),
                            Some(sum) => sum.add(&gradients),
                        }
                    }
                    Ok(())
                })?;
                let rates = tuning.rates().eased((pass - 1) * self.steps() + step, total);
                if let Some(sum) = sum {
                    student.step(&sum, rates)?;
                }
                step += 1;
                observe(step);
            }
        }
        Ok(())
    }

    /// The teacher as an author, where it can write: it predicts tokens.
    fn author(&self) -> Option<Author<'_>> {
        let (embedding, rope, length) = (&self.embedding, &self.rope, self.lesson.windows.length);
        self.head.as_ref().map(|head| Author { embedding, blocks: &self.teacher, head, rope, length })
    }

    /// What the teacher writes in pass `pass` in place of some of `windows`: from the second on, when they have been seen.
    fn texts(&self, pass: usize, windows: &[usize]) -> Result<BTreeMap<usize, Written>, Error> {
        let share = self.lesson.tuning.generated;
        let Some(author) = self.author().filter(|_| pass > 1 && share > 0.0) else { return Ok(BTreeMap::new()) };
        let path = |w: usize| [pass as u64, w as u64, 0];
        let chosen = windows.iter().copied().filter(|&w| uniform(self.random(&path(w))) < share);
        let chosen: Vec<usize> = chosen.collect();
        let random = |i: usize, at: u64| self.random(&[&path(chosen[i])[..], &[at]].concat());
        let prompt = |(i, &w): (usize, &usize)| prompt(self.lesson.windows.tokens(w), author.length, random(i, 0));
        let starts = chosen.iter().enumerate().map(prompt).collect();
        Ok(chosen.iter().copied().zip(author.write(starts, &random)?).collect())
    }

    /// Window `w` with part of its tokens drawn anew in pass `pass`, and the teacher's last hidden states on it; `None` where it
    /// stays as it is. From the second pass on, part of the tokens are the teacher's, if it predicts any.
    fn redrawn(&self, pass: usize, w: usize) -> Result<Option<Written>, Error> {
        let share = self.lesson.tuning.resample;
        let Some(head) = self.head.as_ref().filter(|_| pass > 1 && share > 0.0) else { return Ok(None) };
        let mut tokens = self.lesson.windows.tokens(w).to_vec();
        let mut drawn = 0;
        let mut random = || {
            drawn += 1;
            uniform(self.random(&[pass as u64, w as u64, drawn]))
        };
        resample(head, &self.reference(w)?, &mut tokens, share, &mut random)?;
        Ok(Some(Written { states: self.forward(self.teacher.iter(), Window::from(&tokens))?, tokens }))
    }

    /// The gradients that window `w` gives every block, or the text that takes its place.
    fn window(&self, pass: usize, w: usize, text: Option<&Written>, student: &Student) -> Result<Gradients, Error> {
        let redrawn = if text.is_none() { self.redrawn(pass, w)? } else { None };
        let (window, states) = match text.or(redrawn.as_ref()) {
            Some(Written { tokens, states }) => (Window::from(tokens), states.clone()),
            None => (self.lesson.windows.get(w)?, self.reference(w)?),
        };
        let mut h = self.embedding.embed(window)?;
        let mut traces = Vec::with_capacity(student.pupils.len());
        for pupil in &student.pupils {
            let (out, trace) = pupil.block.forward_traced(&h, &self.rope)?;
            traces.push(trace);
            h = out;
        }
        let (mut grad, head) = self.goal(student).gradients(&h, &states)?;
        let mut blocks: Vec<BlockGradients> = student.pupils.iter().map(|p| p.block.no_gradients()).collect();
        for ((pupil, trace), gradients) in student.pupils.iter().zip(traces).zip(&mut blocks).rev() {
            grad = pupil.block.backward(&trace, &self.rope, grad, Some(gradients))?;
        }
        Ok(Gradients { blocks, head })
    }

    /// A number that depends on the seed and on `path` alone.
    fn random(&self, path: &[u64]) -> u64 {
        path.iter().fold(splitmix(self.lesson.seed), |state, &part| splitmix(state ^ splitmix(part)))
    }

    pub(super) fn state_file(&self, pass: usize) -> PathBuf {
        self.lesson.work.join(format!("tuning-{pass}"))
    }

    /// Makes pass `pass` durable.
    pub(super) fn save(&self, pass: usize, student: &mut Student) -> Result<(), Error> {
        let (file, draft) = (self.state_file(pass), self.state_file(pass).with_extension("draft"));
        let steps = pass * self.steps();
        let mut out = BufWriter::with_capacity(1 << 20, File::create(&draft).map_err(io(&draft, "creating"))?);
        student.exchange(&mut State::Save(&mut out), steps)?.map_err(io(&draft, "writing"))?;
        let mut finish = || -> std::io::Result<()> {
            out.flush()?;
            out.get_ref().sync_data()?;
            std::fs::rename(&draft, &file)
        };
        finish().map_err(io(&file, "writing"))
    }

    /// Takes up pass `pass` of an earlier process; `false` where its file is gone, because another pass was better.
    pub(super) fn take_up(&self, pass: usize, student: &mut Student) -> Result<bool, Error> {
        let file = self.state_file(pass);
        if !file.exists() {
            return Ok(false);
        }
        let mut input = BufReader::with_capacity(1 << 20, File::open(&file).map_err(io(&file, "opening"))?);
        student.exchange(&mut State::Load(&mut input), pass * self.steps())?.map_err(io(&file, "reading"))?;
        Ok(true)
    }

    pub(super) fn tuned(&self, best: Best, before: f64) -> Tuned {
        let (spec, Student { pupils, head }) = (self.lesson.spec, best.student);
        let (mut linears, mut dense) = (Vec::new(), Vec::new());
        for (index, pupil) in pupils.into_iter().enumerate() {
            dense.extend(pupil.norms.iter().map(|(role, norm)| (spec.norm(index, *role), norm.stored())));
            linears.extend(pupil.linears.into_iter().map(|(role, r)| (index, role, r.quantized().clone())));
        }
        if let Some(TrainedHead { weight, norm, .. }) = head {
            let head = spec.head().map(|head| format!("{head}.weight"));
            dense.extend(spec.final_norm().zip(norm).map(|(name, norm)| (name, norm.stored())));
            dense.extend(head.zip(weight).map(|(name, weight)| (name, weight.stored())));
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
        Tuned { linears, dense, record }
    }
}

/// What a text of `length` tokens starts from: the first token of `window`, and some that stand side by side in it.
fn prompt(window: &[u32], length: usize, random: u64) -> Vec<u32> {
    let prompt = PROMPT.min(length);
    let from = 1 + random as usize % (window.len() - prompt + 1);
    [&window[..1], &window[from..][..prompt - 1]].concat()
}

/// What a step needs.
struct Gradients {
    blocks: Vec<BlockGradients>,
    head: Option<HeadGradients>,
}

impl Gradients {
    /// Adds another window's.
    fn add(&mut self, other: &Gradients) {
        self.blocks.par_iter_mut().zip(&other.blocks).for_each(|(a, b)| a.add(b));
        if let (Some(a), Some(b)) = (&mut self.head, &other.head) {
            a.add(b);
        }
    }
}

impl Student {
    fn step(&mut self, gradients: &Gradients, rates: Rates) -> Result<(), Error> {
        let each = self.pupils.par_iter_mut().zip(&gradients.blocks);
        each.try_for_each(|(pupil, gradients)| pupil.step(gradients, rates))?;
        match (&mut self.head, &gradients.head) {
            (Some(head), Some(gradients)) => head.step(gradients, rates),
            _ => Ok(()),
        }
    }

    /// Saves everything that training has changed, or takes it up.
    fn exchange(&mut self, state: &mut State<'_>, steps: usize) -> Result<std::io::Result<()>, Error> {
        for pupil in &mut self.pupils {
            if let failed @ Err(_) = pupil.exchange(state, steps)? {
                return Ok(failed);
            }
        }
        self.head.as_mut().map_or(Ok(Ok(())), |head| head.exchange(state, steps))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_parts_of_their_window() {
        let window: Vec<u32> = (0..48).map(|t| 7 * t % 40).collect();
        for random in 0..100 {
            let start = prompt(&window, 48, random);
            assert_eq!((start.len(), start[0]), (PROMPT, window[0]));
            assert!(window.windows(PROMPT - 1).any(|part| part == &start[1..]));
            assert_eq!(prompt(&window[..12], 12, random)[0], window[0]);
        }
    }
}

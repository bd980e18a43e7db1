//! Refinement by gradients: the codes, scales, norms and head of a whole rounded model, tuned until its logits come as near to
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
mod dense;
mod goal;
mod pupil;
mod reconstruct;
mod rounding;
mod school;

pub(crate) use dense::ToStored;
pub(crate) use reconstruct::{Link, Rebuilding, Rebuilt, reconstruct};
pub(crate) use rounding::Rates;
pub(crate) use school::rounding_to;

use crate::Error;
use crate::journal::StageRecord;
use crate::settings::Tuning;
use bitmill_calibrate::Windows;
use bitmill_checkpoint::Checkpoint;
use bitmill_models::{ModelSpec, Role};
use bitmill_scheme::Quantized;
use school::{Best, School};
use std::path::Path;
use std::sync::atomic::AtomicBool;

/// Windows whose gradients are in memory at a time. It fixes the order of sums, so it is a constant.
const TOGETHER: usize = 4;

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
    /// Whether the output head is there, dense and nothing else, so that it may be trained.
    pub(crate) train_head: bool,
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
    /// Every trained tensor that stays dense: its name, and its values in its stored type.
    pub(crate) dense: Vec<(String, Vec<f32>)>,
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

/// Bytes of the saved states that exist at a time: the start, the best, the latest and the one being written. `trained`
/// are the weights under training, rounded ones and those of the head.
pub(crate) fn disk(trained: u64) -> u64 {
    4 * trained * 3 * 4
}

/// Bytes of memory that tuning `trained` weights of a model of `all` weights takes: the teacher in f32; the student and its
/// best pass, each with its latents, their two moments and codes; the gradients of the windows in flight; and the texts of
/// `length` tokens that are being written, if any are.
pub(crate) fn memory(trained: u64, all: u64, texts: Option<(&ModelSpec, usize)>) -> u64 {
    let student = trained * (4 + 3 * 4 + 1);
    let texts = texts.map_or(0, |(spec, length)| bitmill_calibrate::author_memory(spec, length) as u64);
    4 * all + 2 * student + 4 * trained * (TOGETHER as u64 + 1) + texts
}

/// Tunes the model whose blocks were rounded to `start`, in order of blocks.
///
/// # Errors
/// [`Error::Stopped`] on request, after which the same call goes on from the last finished pass.
pub(crate) fn tune(lesson: Lesson<'_>, start: Vec<Vec<Start>>, observe: &mut dyn FnMut(Step)) -> Result<Tuned, Error> {
    let school = School::new(lesson)?;
    let (mut student, mut best) = (school.student(start)?, None::<Best>);
    let (mut before, mut last) = (f64::NAN, f64::NAN);
    let passes = lesson.tuning.passes as usize;
    let saved = (0..=passes).rev().find(|&pass| school.state_file(pass).exists());
    // Pass 0 is the start itself: it is saved too, since finished codes will take its place in the output.
    for pass in 0..=passes {
        if saved.is_some_and(|saved| pass <= saved) {
            if !school.take_up(pass, &mut student)? {
                continue;
            }
        } else {
            if pass > 0 {
                school.pass(pass, &mut student, &mut |done| {
                    let (done, total) = ((pass - 1) * school.steps() + done, passes * school.steps());
                    observe(Step { done, total, held_out: (last, before) });
                })?;
            }
            school.save(pass, &mut student)?;
        }
        last = school.held_out_loss(&student)?;
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
            best = Some(Best { student: student.clone(), loss: last, pass });
        }
    }
    match best {
        Some(best) => Ok(school.tuned(best, before)),
        // Pass 0 always is a first best.
        None => unreachable!("tuning saw no pass"),
    }
}

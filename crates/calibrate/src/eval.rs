//! Perplexity of a model on a text, and its divergence from a reference model, in one pass over both.
//!
//! Each model runs block by block over all windows, so memory holds one block and one activation stream per model; the
//! logits of both are formed a few positions at a time and folded at once, so none is stored.

use crate::metrics::{Distribution, WindowScores};
use crate::{Divergence, Error, Perplexity, Stream, StreamKind, Windows, in_order};
use bitmill_checkpoint::Checkpoint;
use bitmill_models::{Block, Embedding, Head, ModelSpec, RopeTable};
use candle_core::{Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Windows computed at a time; more than any core count in use would only cost memory.
const BATCH: usize = 16;
/// Positions whose logits exist at a time: bounds memory for vocabularies of 256,000 entries.
const POSITIONS: usize = 128;

/// What [`evaluate`] compares.
#[derive(Clone, Copy)]
pub struct Comparison<'a> {
    /// The model under test.
    pub model: &'a Checkpoint,
    /// The model it is measured against, if any.
    pub reference: Option<&'a Checkpoint>,
    /// Bytes of activations kept in memory; beyond it, streams live in `spill_dir`.
    pub stream_memory: u64,
    /// Folder of spill files.
    pub spill_dir: &'a Path,
}

/// The result of an evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Windows scored.
    pub windows: usize,
    /// Tokens per window, BOS included.
    pub window: usize,
    /// Perplexity of the model over all predicted tokens.
    pub perplexity: Perplexity,
    /// Perplexity of the reference on the same tokens.
    pub reference_perplexity: Option<Perplexity>,
    /// Divergence of the model from the reference.
    pub divergence: Option<Divergence>,
}

/// Receives a window's logits, row-major `[window, vocab]`.
pub type LogitsSink<'a> = &'a mut dyn FnMut(usize, Vec<f32>) -> Result<(), Error>;

/// Scores `what` on `windows`. `progress` is told (steps done, steps in all); `logits`, if given, receives the model's
/// logits of every window, in order.
///
/// # Errors
/// [`Error::Incomparable`] when the vocabularies differ, [`Error::Window`] when a window exceeds a model's context, and
/// whatever reading and running the models reports.
pub fn evaluate(
    what: Comparison<'_>,
    windows: &Windows,
    progress: &mut dyn FnMut(usize, usize),
    mut logits: Option<LogitsSink<'_>>,
) -> Result<Evaluation, Error> {
    let spec = bitmill_models::spec_of(what.model)?;
    let reference = match what.reference {
        None => None,
        Some(checkpoint) => {
            let other = bitmill_models::spec_of(checkpoint)?;
            if other.vocab != spec.vocab {
                let reason = format!("their vocabularies have {} and {} entries", spec.vocab, other.vocab);
                let (model, reference) = (what.model.dir().to_owned(), checkpoint.dir().to_owned());
                return Err(Error::Incomparable { model, reference, reason });
            }
            Some((checkpoint, other))
        }
    };
    let steps = spec.layers + 1 + reference.as_ref().map_or(0, |(_, r)| r.layers);
    let mut done = 0;
    let mut tick = || {
        done += 1;
        progress(done, steps);
    };
    // Whether there is a head is known before the work of reaching it.
    let head = Head::load(&spec, what.model)?;
    let last = run_blocks(what.model, &spec, windows, &what, "model", &mut tick)?;
    let other = match &reference {
        None => None,
        Some((checkpoint, spec)) => {
            let last = run_blocks(checkpoint, spec, windows, &what, "reference", &mut tick)?;
            Some((last, Head::load(spec, *checkpoint)?, spec.hidden))
        }
    };
    let keep = logits.is_some();
    let mut scores = Vec::with_capacity(windows.count());
    let compute = |w: usize| {
        let reference = other.as_ref().map(|(stream, head, hidden)| (stream, head, *hidden));
        score_window(windows.tokens(w), (&last, &head, spec.hidden), reference, w, keep)
    };
    in_order(windows.count(), BATCH, compute, |first, batch| {
        for (i, (window, rows)) in batch.into_iter().enumerate() {
            scores.push(window);
            if let Some(sink) = logits.as_deref_mut() {
                sink(first + i, rows)?;
            }
        }
        Ok(())
    })?;
    tick();
    let losses: Vec<f64> = scores.iter().flat_map(|s| s.loss.iter().copied()).collect();
    let reference_losses: Vec<f64> = scores.iter().flat_map(|s| s.reference_loss.iter().copied()).collect();
    Ok(Evaluation {
        windows: windows.count(),
        window: windows.length,
        perplexity: Perplexity::of(&losses),
        reference_perplexity: other.as_ref().map(|_| Perplexity::of(&reference_losses)),
        divergence: other.as_ref().map(|_| Divergence::of(&scores)),
    })
}

/// The activations after the last block of a model.
pub(crate) fn run_blocks(
    checkpoint: &Checkpoint,
    spec: &ModelSpec,
    windows: &Windows,
    what: &Comparison<'_>,
    name: &str,
    tick: &mut dyn FnMut(),
) -> Result<Stream, Error> {
    let (count, lengths) = (windows.count(), windows.lengths());
    let rope = RopeTable::new(&spec.ropes, windows.length)?;
    let spill = what.spill_dir.join(format!(".bitmill-eval-{}-{name}", std::process::id()));
    let stream = Stream::of_lengths(StreamKind::F32, &lengths, spec.hidden, what.stream_memory / 2, &spill)?;
    {
        let embedding = Embedding::load(spec, checkpoint)?;
        (0..count)
            .into_par_iter()
            .try_for_each(|w| stream.write(w, &embedding.embed(windows.get(w)?)?.flatten_all()?.to_vec1::<f32>()?))?;
    }
    for index in 0..spec.layers {
        let block = Block::load(spec, index, checkpoint)?;
        (0..count).into_par_iter().try_for_each(|w| {
            let h = Tensor::from_vec(stream.read(w)?, (lengths[w], spec.hidden), &Device::Cpu)?;
            stream.write(w, &block.forward(&h, &rope)?.flatten_all()?.to_vec1::<f32>()?)
        })?;
        tick();
    }
    Ok(stream)
}

type Side<'a> = (&'a Stream, &'a Head, usize);

/// Scores of one window, and the model's logits when `keep` is set.
fn score_window(
    tokens: &[u32],
    model: Side<'_>,
    reference: Option<Side<'_>>,
    window: usize,
    keep: bool,
) -> Result<(WindowScores, Vec<f32>), Error> {
    let hidden = |side: &Side<'_>| -> Result<Tensor, Error> {
        Ok(Tensor::from_vec(side.0.read(window)?, (tokens.len(), side.2), &Device::Cpu)?)
    };
    let h = hidden(&model)?;
    let r = reference.as_ref().map(|side| Ok::<_, Error>((hidden(side)?, side.1))).transpose()?;
    let mut scores = WindowScores::default();
    let mut kept = Vec::new();
    for from in (0..tokens.len()).step_by(POSITIONS) {
        let rows = POSITIONS.min(tokens.len() - from);
        let logits = |h: &Tensor, head: &Head| -> Result<Vec<f32>, Error> {
            Ok(head.logits(&h.narrow(0, from, rows)?)?.flatten_all()?.to_vec1()?)
        };
        let own = logits(&h, model.1)?;
        let other = r.as_ref().map(|(h, head)| logits(h, head)).transpose()?;
        let vocab = own.len() / rows;
        for row in 0..rows {
            let (position, at) = (from + row, row * vocab..(row + 1) * vocab);
            let q = Distribution::new(&own[at.clone()]);
            let p = other.as_ref().map(|l| Distribution::new(&l[at]));
            if let Some(&next) = tokens.get(position + 1) {
                scores.loss.push(-q.log_p(next as usize));
                if let Some(p) = &p {
                    scores.reference_loss.push(-p.log_p(next as usize));
                }
            }
            if let (Some(p), true) = (&p, position > 0) {
                scores.divergence.push(p.divergence(&q));
                scores.agreed += usize::from(p.top() == q.top());
            }
        }
        if keep {
            kept.extend_from_slice(&own);
        }
    }
    Ok((scores, kept))
}

//! What an error in one place does to the model's predictions: single-layer probes, all in one pass over the blocks.
//!
//! Each probe replaces the weights of a few linears of one block and leaves the rest of the model as it is; its KL
//! divergence from the untouched model is what those replacements cost. A probe shares the model's activations up to its
//! block and has a stream of its own from there on, so one block is in memory at a time, and all probes together cost
//! about as much as (probes per block) × (blocks) ÷ 2 evaluations of the probe text.

use crate::collect::{Pass, rows};
use crate::metrics::Distribution;
use crate::{Error, SiteStats, Stream, StreamKind, Windows, in_order};
use bitmill_models::{Block, Head, Role, RopeTable};
use candle_core::{Device, Tensor};

/// Positions whose logits exist at a time.
const POSITIONS: usize = 128;
/// Windows computed at a time.
const BATCH: usize = 16;

/// New weights for some linears of one block.
pub type Replacement = Vec<(Role, Vec<f32>)>;

/// Names the replacements to measure in a block, given its index, its weights and what its sites see.
pub type Replace<'a, E> = &'a mut dyn FnMut(usize, &Block, &[SiteStats; 4]) -> Result<Vec<Replacement>, E>;

/// Measures the replacements that `replace` names for every block, given what its sites see; the result has an entry for
/// each, in order: its mean KL divergence (nats per position) from the untouched model. `progress` is told (steps done,
/// steps in all).
///
/// # Errors
/// Whatever reading and running the model reports; errors of `replace`.
pub fn probe<E: From<Error>>(
    pass: Pass<'_>,
    windows: &Windows,
    replace: Replace<'_, E>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Vec<f64>>, E> {
    let (spec, length) = (pass.spec, windows.length);
    let rope = RopeTable::new(&spec.rope, length).map_err(Error::from)?;
    let mut streams: Vec<Stream> = Vec::new();
    let mut counts = Vec::with_capacity(spec.layers);
    let mut left = pass.stream_memory;
    let bytes = Stream::bytes(StreamKind::F32, windows.count(), length, spec.hidden);
    // A stream that does not fit any more lives in a file.
    let mut budget = || {
        let fits = left >= bytes;
        left -= if fits { bytes } else { 0 };
        if fits { u64::MAX } else { 0 }
    };
    let mut base = pass.embed(windows, StreamKind::F32, budget())?;
    let spill = pass.spill_dir.join(format!(".bitmill-probe-{}-base", std::process::id()));
    let mut next = Stream::new(StreamKind::F32, windows.count(), length, spec.hidden, budget(), &spill)?;
    for index in 0..spec.layers {
        let block = Block::load(spec, index, pass.model).map_err(Error::from)?;
        for stream in &streams {
            advance(&block, &rope, stream, stream, length)?;
        }
        let stats = pass.observe(index, &block, &rope, &base, &next, length)?;
        let replacements = replace(index, &block, &stats)?;
        counts.push(replacements.len());
        for linears in replacements {
            let mut changed = block.clone();
            for (role, weight) in linears {
                let [rows, cols] = spec.linear_shape(role);
                let weight = Tensor::from_vec(weight, (rows, cols), &Device::Cpu).map_err(Error::from)?;
                changed.set_linear(role, weight);
            }
            let spill = pass.spill_dir.join(format!(".bitmill-probe-{}-{}", std::process::id(), streams.len()));
            let stream = Stream::new(StreamKind::F32, windows.count(), length, spec.hidden, budget(), &spill)?;
            advance(&changed, &rope, &base, &stream, length)?;
            streams.push(stream);
        }
        std::mem::swap(&mut base, &mut next);
        progress(index + 1, spec.layers + 1);
    }
    let head = Head::load(spec, pass.model).map_err(Error::from)?;
    let mut flat = divergences(&head, &base, &streams, length)?.into_iter();
    progress(spec.layers + 1, spec.layers + 1);
    Ok(counts.into_iter().map(|n| flat.by_ref().take(n).collect()).collect())
}

/// Moves every window past `block`, from one stream to another (or in place).
fn advance(block: &Block, rope: &RopeTable, from: &Stream, to: &Stream, length: usize) -> Result<(), Error> {
    let step = |w| {
        let values = from.read(w)?;
        let width = values.len() / length;
        let h = Tensor::from_vec(values, (length, width), &Device::Cpu)?;
        to.write(w, &rows(&block.forward(&h, rope)?)?)
    };
    in_order(from.windows(), BATCH, step, |_, _| Ok(()))
}

/// Mean KL(base ‖ stream) over the positions after the first, for every stream.
fn divergences(head: &Head, base: &Stream, streams: &[Stream], length: usize) -> Result<Vec<f64>, Error> {
    let mut sums = vec![0.0; streams.len()];
    let window = |w| -> Result<Vec<f64>, Error> {
        let hidden = |s: &Stream| -> Result<Tensor, Error> {
            let values = s.read(w)?;
            let width = values.len() / length;
            Ok(Tensor::from_vec(values, (length, width), &Device::Cpu)?)
        };
        let own = hidden(base)?;
        let others = streams.iter().map(hidden).collect::<Result<Vec<_>, _>>()?;
        let mut sums = vec![0.0; streams.len()];
        for from in (1..length).step_by(POSITIONS) {
            let count = POSITIONS.min(length - from);
            let logits = |h: &Tensor| -> Result<Vec<f32>, Error> { rows(&head.logits(&h.narrow(0, from, count)?)?) };
            let reference = logits(&own)?;
            let vocab = reference.len() / count;
            let reference: Vec<Distribution<'_>> = reference.chunks(vocab).map(Distribution::new).collect();
            let probabilities: Vec<Vec<f32>> = reference.iter().map(Distribution::probabilities).collect();
            for (sum, other) in sums.iter_mut().zip(&others) {
                let other = logits(other)?;
                let each = reference.iter().zip(&probabilities).zip(other.chunks(vocab));
                *sum += each.map(|((d, p), q)| d.divergence_by(p, &Distribution::new(q))).sum::<f64>();
            }
        }
        Ok(sums)
    };
    in_order(base.windows(), BATCH, window, |_, batch| {
        for window in batch {
            sums.iter_mut().zip(window).for_each(|(sum, s)| *sum += s);
        }
        Ok::<(), Error>(())
    })?;
    let positions = (base.windows() * (length - 1)) as f64;
    Ok(sums.into_iter().map(|s| s / positions).collect())
}

//! What an error in one place does to the model's predictions: single-layer probes, all in one pass over the blocks.
//!
//! Each probe replaces the weights of a few linears of one block and leaves the rest of the model as it is; its KL
//! divergence from the untouched model is what those replacements cost. A probe shares the model's activations up to its
//! block and has a stream of its own from there on, so one block is in memory at a time, and all probes together cost
//! about as much as (probes per block) × (blocks) ÷ 2 evaluations of the probe text.
//!
//! The same logits give what errors in two places do together. To second order, KL = ½·Var_p(z) with z the change of the
//! logits and p the model's prediction; for z = Σ z_a that is ½·Σ_a Σ_b Cov_p(z_a, z_b). This is the Gram form of the
//! augmented Hessian (methods part 2.11): z_a in the direction of a token is ⟨g, δ_a⟩ with g the gradient of that token's
//! log-probability and δ_a the error of the weights, and the covariance is E[⟨g, δ_a⟩·⟨g, δ_b⟩] over the tokens that the model
//! itself would say. Taking the differences forward gives the expectation over tokens exactly instead of by samples.

use crate::collect::{Pass, rows};
use crate::metrics::Distribution;
use crate::{Error, SiteStats, Stream, StreamKind, Windows, in_order};
use bitmill_kernels::{View, ViewMut, gemm};
use bitmill_models::{Block, Head, Role, RopeTable};
use candle_core::{Device, Tensor};

/// Positions whose logits exist at a time, at most.
const POSITIONS: usize = 128;
/// Logits of all probes that exist at a time in one thread, unless those of one position are more.
const LOGITS: usize = 1 << 23;
/// Windows computed at a time.
const BATCH: usize = 16;

/// New weights for some linears of one block.
pub type Replacement = Vec<(Role, Vec<f32>)>;

/// Names the replacements to measure in a block, given its index, its weights and what its sites see.
pub type Replace<'a, E> = &'a mut dyn FnMut(usize, &Block, &[SiteStats; 4]) -> Result<Vec<Replacement>, E>;

/// What probes measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Probes {
    /// For every block and each of its replacements: mean KL divergence (nats per position) from the untouched model.
    pub kl: Vec<Vec<f64>>,
    /// Correlations of what two replacements do to the logits, row-major over all replacements in order.
    pub cross: Vec<f64>,
}

/// Measures the replacements that `replace` names for every block, given what its sites see. `progress` is told (steps
/// done, steps in all).
///
/// # Errors
/// Whatever reading and running the model reports; errors of `replace`.
pub fn probe<E: From<Error>>(
    pass: Pass<'_>,
    windows: &Windows,
    replace: Replace<'_, E>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Probes, E> {
    let (spec, length) = (pass.spec, windows.length);
    let rope = RopeTable::new(&spec.ropes, length).map_err(Error::from)?;
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
    let (kl, cross) = divergences(&head, &base, &streams, length)?;
    let mut flat = kl.into_iter();
    progress(spec.layers + 1, spec.layers + 1);
    Ok(Probes { kl: counts.into_iter().map(|n| flat.by_ref().take(n).collect()).collect(), cross })
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

/// Mean KL(base ‖ stream) over the positions after the first, for every stream, and the correlations of all pairs.
fn divergences(head: &Head, base: &Stream, streams: &[Stream], length: usize) -> Result<(Vec<f64>, Vec<f64>), Error> {
    let probes = streams.len();
    let mut sums = Sums::new(probes);
    let window = |w| -> Result<Sums, Error> {
        let hidden = |s: &Stream| -> Result<Tensor, Error> {
            let values = s.read(w)?;
            let width = values.len() / length;
            Ok(Tensor::from_vec(values, (length, width), &Device::Cpu)?)
        };
        let own = hidden(base)?;
        let others = streams.iter().map(hidden).collect::<Result<Vec<_>, _>>()?;
        let mut sums = Sums::new(probes);
        let logits = |h: &Tensor| -> Result<Vec<f32>, Error> { rows(&head.logits(h)?) };
        let vocab = logits(&own.narrow(0, 0, 1)?)?.len();
        let step = (LOGITS / (probes * vocab).max(1)).clamp(1, POSITIONS);
        for from in (1..length).step_by(step) {
            let count = step.min(length - from);
            let reference = logits(&own.narrow(0, from, count)?)?;
            let parts = others.iter().map(|h| h.narrow(0, from, count)).collect::<Result<Vec<_>, _>>()?;
            if !parts.is_empty() {
                sums.add(&reference, logits(&Tensor::cat(&parts, 0)?)?, vocab);
            }
        }
        Ok(sums)
    };
    in_order(base.windows(), BATCH, window, |_, batch| {
        batch.iter().for_each(|window| sums.merge(window));
        Ok::<(), Error>(())
    })?;
    let positions = (base.windows() * (length - 1)) as f64;
    Ok((sums.kl.iter().map(|s| s / positions).collect(), sums.correlations()))
}

/// What is summed over positions.
struct Sums {
    /// KL divergence of every probe.
    kl: Vec<f64>,
    /// Covariances of the probes' changes of logits, `[probes, probes]`.
    covariance: Vec<f64>,
}

impl Sums {
    fn new(probes: usize) -> Self {
        Sums { kl: vec![0.0; probes], covariance: vec![0.0; probes * probes] }
    }

    fn merge(&mut self, other: &Sums) {
        self.kl.iter_mut().zip(&other.kl).for_each(|(a, b)| *a += b);
        self.covariance.iter_mut().zip(&other.covariance).for_each(|(a, b)| *a += b);
    }

    /// Adds some positions: logits `reference: [positions, vocab]` and `probed: [probes, positions, vocab]`.
    ///
    /// The change z of the logits at a position, centred under p and weighted by √p, makes the covariance of two probes
    /// a plain product: Cov_p(z_a, z_b) = Σ_v p_v·(z_a − E z_a)_v·(z_b − E z_b)_v.
    fn add(&mut self, reference: &[f32], mut probed: Vec<f32>, vocab: usize) {
        let (probes, positions) = (self.kl.len(), reference.len() / vocab);
        for (at, base) in reference.chunks_exact(vocab).enumerate() {
            let d = Distribution::new(base);
            let p = d.probabilities();
            let root: Vec<f32> = p.iter().map(|p| p.sqrt()).collect();
            for (probe, sum) in self.kl.iter_mut().enumerate() {
                let q = &mut probed[(probe * positions + at) * vocab..][..vocab];
                *sum += d.divergence_by(&p, &Distribution::new(q));
                let mean: f64 =
                    p.iter().zip(q.iter().zip(base)).map(|(&p, (&q, &b))| f64::from(p) * f64::from(q - b)).sum();
                for ((q, &b), &root) in q.iter_mut().zip(base).zip(&root) {
                    *q = root * (*q - b - mean as f32);
                }
            }
        }
        let width = positions * vocab;
        let (all, mut product) = (View::new(&probed, probes, width, width), vec![0.0f32; probes * probes]);
        gemm(1.0, all, all.t(), 0.0, &mut ViewMut::new(&mut product, probes, probes, probes));
        self.covariance.iter_mut().zip(product).for_each(|(sum, v)| *sum += f64::from(v));
    }

    fn correlations(&self) -> Vec<f64> {
        let n = self.kl.len();
        let at = |a: usize, b: usize| self.covariance[a * n + b];
        let of = |a: usize, b: usize| {
            let scale = (at(a, a) * at(b, b)).sqrt();
            let symmetric = 0.5 * (at(a, b) + at(b, a));
            if a == b {
                1.0
            } else if scale > 0.0 {
                (symmetric / scale).clamp(-1.0, 1.0)
            } else {
                0.0
            }
        };
        (0..n * n).map(|i| of(i / n, i % n)).collect()
    }
}

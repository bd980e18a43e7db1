//! Embeddings of sentences or images by an encoder, and how far they are from a reference model's.
//!
//! Each is a window of its own: no padding exists, so none is attended to or pooled.

use crate::eval::run_blocks;
use crate::metrics::{mean_and_error, quantile};
use crate::{Comparison, Error, Pooling, Windows};
use bitmill_checkpoint::Checkpoint;
use bitmill_models::ModelSpec;
use serde::Serialize;

/// The result of an evaluation by embeddings.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Similarity {
    /// What was embedded, and how many of them.
    #[serde(flatten)]
    pub embedded: Embedded,
    /// Their tokens, special tokens included.
    pub tokens: usize,
    /// Tokens of the longest.
    pub longest: usize,
    /// How hidden states were pooled.
    pub pooling: Pooling,
    /// Cosine similarity of each embedding to the reference's.
    pub cosine: Option<Cosine>,
}

/// What embeddings are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Embedded {
    /// So many sentences.
    Sentences(usize),
    /// So many images.
    Images(usize),
}

/// Mean, spread and quantiles of cosine similarities.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Cosine {
    /// Arithmetic mean.
    pub mean: f64,
    /// Standard error of the mean; sentences are taken as independent.
    pub error: f64,
    /// Smallest value.
    pub min: f64,
    /// 1% quantile.
    pub p1: f64,
    /// 10% quantile.
    pub p10: f64,
    /// 50% quantile.
    pub median: f64,
}

impl Cosine {
    fn of(mut values: Vec<f64>) -> Self {
        let (mean, error) = mean_and_error(&values);
        values.sort_by(f64::total_cmp);
        let at = |p| quantile(&values, p);
        Cosine { mean, error, min: at(0.0), p1: at(0.01), p10: at(0.1), median: at(0.5) }
    }
}

/// Embeds `windows` with the model, and with the reference if there is one; returns the comparison and the model's embeddings
/// `[windows][hidden]`, each of length 1. `progress` is told (steps done, steps in all). The hidden states of both models are
/// pooled by `pooling`.
///
/// # Errors
/// [`Error::Incomparable`] when the models differ in what they read or in width, [`Error::NonFinite`] when an embedding has no
/// direction, and whatever reading and running the models reports.
pub fn compare_embeddings(
    what: Comparison<'_>,
    windows: &Windows,
    pooling: Pooling,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(Similarity, Vec<Vec<f32>>), Error> {
    let spec = bitmill_models::spec_of(what.model)?;
    let reference = match what.reference {
        None => None,
        Some(checkpoint) => {
            let other = bitmill_models::spec_of(checkpoint)?;
            if (other.vocab, other.images, other.hidden) != (spec.vocab, spec.images, spec.hidden) {
                let reads = |spec: &ModelSpec| match spec.images {
                    Some(images) => format!("images {:?} in patches {:?}", images.shape(), images.patch),
                    None => format!("a vocabulary of {}", spec.vocab),
                };
                let reason = format!(
                    "they read {} and {}, and their embeddings have {} and {} channels",
                    reads(&spec),
                    reads(&other),
                    spec.hidden,
                    other.hidden
                );
                let (model, reference) = (what.model.dir().to_owned(), checkpoint.dir().to_owned());
                return Err(Error::Incomparable { model, reference, reason });
            }
            Some((checkpoint, other))
        }
    };
    let steps = spec.layers + reference.as_ref().map_or(0, |(_, r)| r.layers);
    let mut done = 0;
    let mut tick = || {
        done += 1;
        progress(done, steps);
    };
    let own = embed(&what, what.model, &spec, windows, pooling, "model", &mut tick)?;
    let cosine = match reference {
        None => None,
        Some((checkpoint, spec)) => {
            let other = embed(&what, checkpoint, &spec, windows, pooling, "reference", &mut tick)?;
            Some(Cosine::of(own.iter().zip(&other).map(|(a, b)| dot(a, b)).collect()))
        }
    };
    let similarity = Similarity {
        embedded: match windows.are_images() {
            true => Embedded::Images(windows.count()),
            false => Embedded::Sentences(windows.count()),
        },
        tokens: windows.text_tokens,
        longest: windows.length,
        pooling,
        cosine,
    };
    let embeddings = own.into_iter().map(|e| e.into_iter().map(|v| v as f32).collect()).collect();
    Ok((similarity, embeddings))
}

/// The embedding of every window, of length 1.
fn embed(
    what: &Comparison<'_>,
    checkpoint: &Checkpoint,
    spec: &ModelSpec,
    windows: &Windows,
    pooling: Pooling,
    name: &str,
    tick: &mut dyn FnMut(),
) -> Result<Vec<Vec<f64>>, Error> {
    let last = run_blocks(checkpoint, spec, windows, what, name, tick)?;
    let one = |w: usize| {
        let pooled: Vec<f64> = pooling.pool(&last.read(w)?, spec.hidden).into_iter().map(f64::from).collect();
        let norm = dot(&pooled, &pooled).sqrt();
        if !norm.is_finite() || norm == 0.0 {
            return Err(Error::NonFinite { block: spec.layers - 1, site: format!("the embedding of window {w}") });
        }
        Ok(pooled.into_iter().map(|v| v / norm).collect())
    };
    (0..windows.count()).map(one).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosines_of_known_samples() {
        let c = Cosine::of((0..101).map(|i| f64::from(i) / 100.0).collect());
        assert_eq!((c.min, c.p1, c.p10, c.median), (0.0, 0.01, 0.1, 0.5));
        assert!((c.mean - 0.5).abs() < 1e-12 && (c.error - 0.2930 / 101f64.sqrt()).abs() < 1e-4);
    }
}

//! `--max-kl` and `--max-perplexity-ratio`: the smallest mixture that loses no more, found by trying sizes.
//!
//! What a size loses is measured: the mixture is made as it will be (but for tuning, which only lowers the loss) and held
//! against the full-precision model on windows that calibration does not see. Sizes are tried by bisection, with the
//! predicted losses, scaled to what was measured last, to point into the bracket. Every trial is kept in a file beside the
//! output, so a killed search goes on with what it knows.

use crate::beside::{beside, replace};
use crate::mixed::Weighed;
use crate::text::Text;
use anyhow::{Context, bail};
use bitmill_calibrate::{Comparison, evaluate, model_fingerprint};
use bitmill_checkpoint::Checkpoint;
use bitmill_quantize::{Budget, Calibration, Plan, RunOptions, Survey, run};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::atomic::AtomicBool;

/// How much may be lost.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Bound {
    /// Mean KL divergence, nats per token.
    pub(crate) kl: Option<f64>,
    /// Perplexity over that of the full-precision model.
    pub(crate) ratio: Option<f64>,
}

/// What a size lost.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Trial {
    /// Bits per weight that were allowed.
    bits: f64,
    kl: f64,
    /// ln of the perplexities' ratio.
    ln_ratio: f64,
}

impl Bound {
    /// How far `trial` is from the bound: above 1 it loses too much.
    fn share(&self, trial: &Trial) -> f64 {
        let kl = self.kl.map_or(0.0, |bound| trial.kl / bound);
        kl.max(self.ratio.map_or(0.0, |bound| trial.ln_ratio / bound.ln()))
    }
}

/// What the file of trials beside the output ends in.
const TRIED: &str = ".search.json";
/// Trials, at most.
const TRIALS: usize = 9;
/// The search ends when the bracket is this part of the size.
const CLOSE: f64 = 0.01;

/// What a search works with.
pub(crate) struct BySize<'a> {
    pub(crate) input: &'a Checkpoint,
    /// The plan without a mixture.
    pub(crate) plan: &'a Plan,
    pub(crate) weighed: &'a Weighed,
    pub(crate) text: &'a Text,
    pub(crate) out: &'a Path,
    pub(crate) stream_memory: u64,
}

/// Trials of an earlier process, and what they are of.
#[derive(Default, Serialize, Deserialize)]
struct Known {
    of: Value,
    trials: Vec<Trial>,
}

impl BySize<'_> {
    /// The plan of the smallest mixture within `bound`.
    pub(crate) fn smallest(&self, bound: &Bound) -> anyhow::Result<Plan> {
        let survey = self.weighed.survey();
        let (Some(&(least, _)), Some(&(most, _))) = (survey.frontier.first(), survey.frontier.last()) else {
            bail!("there is no mixture to choose");
        };
        let mut known = self.known(bound, &survey)?;
        // Sizes that lose too much and that do not. Only a measured one counts as the latter.
        let (mut low, mut high, mut scale) = (least, None::<f64>, 1.0);
        let mut next = guess(&survey, bound, scale).clamp(least, most);
        for step in 0..TRIALS {
            let trial = self.trial(next, &mut known)?;
            let share = bound.share(&trial);
            let verdict = if share <= 1.0 { "kept" } else { "too much is lost" };
            let ratio = trial.ln_ratio.exp();
            eprintln!(
                "{next:.3} bits: KL divergence {:.5}, perplexity x{ratio:.4} on held-out text: {verdict}",
                trial.kl
            );
            if share <= 1.0 {
                high = Some(next);
            } else if next >= most {
                bail!(
                    "even the largest mixture loses more than asked for: KL divergence {:.5}, perplexity x{ratio:.4}; allow \
                     more, or give --options with more bits",
                    trial.kl
                );
            } else {
                low = next;
            }
            let predicted = predicted(&survey, next);
            if predicted > 0.0 && trial.kl > 0.0 {
                scale = trial.kl / predicted;
            }
            let to = high.unwrap_or(most);
            if next <= least && share <= 1.0 || high.is_some() && to - low <= CLOSE * to {
                break;
            }
            // A little inside of the bound, so that half of the guesses do not fail by a hair; and well inside of the
            // bracket, or in the middle of it every third time, so that it shrinks whatever the prediction is worth.
            let (pointed, margin) = (guess(&survey, bound, 1.02 * scale), 0.1 * (to - low));
            next = match high {
                None if pointed >= to => to,
                _ if step % 3 == 2 => 0.5 * (low + to),
                _ => pointed.clamp(low + margin, to - margin),
            };
        }
        let bits = high.context("no size that was tried loses as little as asked for; allow more")?;
        self.weighed.plan(self.input, self.plan, Budget::Bits(bits))
    }

    /// Makes and measures the mixture of `bits` per weight, unless that was done.
    fn trial(&self, bits: f64, known: &mut Known) -> anyhow::Result<Trial> {
        if let Some(trial) = known.trials.iter().find(|t| t.bits == bits) {
            return Ok(*trial);
        }
        let windows = self.held_out()?;
        let mut plan = self.weighed.plan(self.input, self.plan, Budget::Bits(bits))?;
        if plan.settings.tuning.is_some() {
            plan = Plan::new(self.input, &bitmill_quantize::Settings { tuning: None, ..plan.settings })?;
        }
        let out = beside(self.out, if self.plan.gguf.is_some() { ".trial.gguf" } else { ".trial" });
        let (memory, stop) = (self.stream_memory, AtomicBool::new(false));
        let options = RunOptions { force: true, stream_memory: memory, ..RunOptions::new(&stop) };
        let calibration = plan.calibrated.then_some(Calibration::Text(&self.text.windows));
        let made = run(self.input, &plan, calibration, &out, options, &mut |_| {})?;
        let model = Checkpoint::open(&out)?;
        let spill = std::env::temp_dir();
        let what = Comparison { model: &model, reference: Some(self.input), stream_memory: memory, spill_dir: &spill };
        let result = evaluate(what, windows, &mut |_, _| {}, None)?;
        drop(model);
        let cleared = if out.is_dir() { std::fs::remove_dir_all(&out) } else { std::fs::remove_file(&out) };
        cleared.with_context(|| format!("removing {}", out.display()))?;
        // The trial's log and manifest go with it; a file that stays behind does no harm.
        let _ = std::fs::remove_file(&made.log);
        let _ = std::fs::remove_file(beside(&out, ".bitmill.json"));
        let divergence = result.divergence.context("there was a reference")?;
        let trial = Trial { bits, kl: divergence.kl.mean, ln_ratio: divergence.ln_perplexity_ratio.0 };
        known.trials.push(trial);
        replace(&beside(self.out, TRIED), format!("{:#}\n", json!(known)))?;
        Ok(trial)
    }

    fn held_out(&self) -> anyhow::Result<&bitmill_calibrate::Windows> {
        self.text.held_out.as_ref().with_context(|| {
            format!(
                "{} leaves no text beside the calibration windows to measure a loss on; give more text, fewer --samples, or \
                 --size instead",
                self.text.name
            )
        })
    }

    /// What an earlier search of the same kind measured.
    fn known(&self, bound: &Bound, survey: &Survey) -> anyhow::Result<Known> {
        let held_out = self.held_out()?;
        let of = json!({
            "bitmill": env!("CARGO_PKG_VERSION"), "settings": self.plan.settings, "bound": bound,
            "model": model_fingerprint(self.input)?, "text": self.text.windows.fingerprint(),
            "held_out": held_out.fingerprint(), "survey": survey,
        });
        let file = beside(self.out, TRIED);
        let found = std::fs::read(&file).ok().and_then(|text| serde_json::from_slice::<Known>(&text).ok());
        if let Some(known) = found.filter(|k| k.of == of) {
            eprintln!("taking up {} trials of {}", known.trials.len(), file.display());
            return Ok(known);
        }
        eprintln!("searching sizes; what is tried is kept in {}", file.display());
        Ok(Known { of, trials: Vec::new() })
    }
}

/// Predicted KL divergence at `bits`, between the points of the frontier.
fn predicted(survey: &Survey, bits: f64) -> f64 {
    let at = survey.frontier.partition_point(|p| p.0 < bits).clamp(1, survey.frontier.len().max(2) - 1);
    let (Some(a), Some(b)) = (survey.frontier.get(at - 1), survey.frontier.get(at)) else { return 0.0 };
    let t = if b.0 > a.0 { ((bits - a.0) / (b.0 - a.0)).clamp(0.0, 1.0) } else { 0.0 };
    (a.1.ln() + t * (b.1.ln() - a.1.ln())).exp()
}

/// The size at which the predicted divergence, times `scale`, is what is allowed. A bound on perplexity alone is taken to
/// be one on the divergence: to first order, they are the same where the text is as the model would write it.
fn guess(survey: &Survey, bound: &Bound, scale: f64) -> f64 {
    let allowed = bound.kl.unwrap_or(f64::INFINITY).min(bound.ratio.map_or(f64::INFINITY, f64::ln)) / scale;
    let steps = survey.frontier.windows(2).find(|w| w[1].1 <= allowed);
    match steps {
        None => survey.frontier.last().map_or(0.0, |p| p.0),
        Some(w) if w[0].1 <= allowed => w[0].0,
        Some(w) => {
            let t = (w[0].1.ln() - allowed.ln()) / (w[0].1.ln() - w[1].1.max(f64::MIN_POSITIVE).ln());
            w[0].0 + t * (w[1].0 - w[0].0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guesses_invert_the_frontier() {
        let frontier: Vec<(f64, f64)> =
            (4..=16).map(|i| (f64::from(i) / 2.0, 4f64.powf(-f64::from(i) / 2.0))).collect();
        let survey = Survey { frontier, uniform: Vec::new(), rank_correlation: 1.0 };
        for bits in [2.0, 2.3, 4.9, 7.75] {
            let kl = predicted(&survey, bits);
            assert!((kl / 4f64.powf(-bits) - 1.0).abs() < 1e-9);
            assert!((guess(&survey, &Bound { kl: Some(kl), ratio: None }, 1.0) - bits).abs() < 1e-9);
            assert!((guess(&survey, &Bound { kl: Some(2.0 * kl), ratio: None }, 2.0) - bits).abs() < 1e-9);
        }
        // Out of reach, and no bound at all.
        assert_eq!(guess(&survey, &Bound { kl: Some(1e-12), ratio: None }, 1.0), 8.0);
        assert_eq!(guess(&survey, &Bound { kl: Some(9.0), ratio: None }, 1.0), 2.0);
        let trial = Trial { bits: 3.0, kl: 0.03, ln_ratio: 0.01 };
        assert!((Bound { kl: Some(0.02), ratio: None }.share(&trial) - 1.5).abs() < 1e-12);
        assert!((Bound { kl: Some(0.06), ratio: Some(1.02) }.share(&trial) - 0.5).abs() < 0.01);
    }
}

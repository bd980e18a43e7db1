//! Calibration text: where it comes from and how it is cut, for every command that runs some.

use crate::mixed::parse_weighted;
use crate::quantize::amount;
use crate::units;
use bitmill_calibrate::{BUNDLED_TEXT, Sentences, Tokenizer, Windows, read_texts};
use bitmill_checkpoint::Checkpoint;
use bitmill_models::ModelSpec;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub(crate) struct TextArgs {
    /// Calibration text; by default MODEL/calibration.txt, or else a text that comes with bitmill. With weights
    /// (prose.txt:0.7 code.txt:0.3), each text gives its share of the windows
    #[arg(long, value_name = "FILE[:WEIGHT]", num_args = 1.., value_parser = parse_weighted)]
    pub(crate) calibration: Vec<(PathBuf, Option<f64>)>,
    /// Calibration windows; of an encoder, sentences [default: 128, or 2048 sentences]
    #[arg(long, value_name = "N", value_parser = units::parse_positive)]
    samples: Option<usize>,
    /// Tokens per window, or at most per sentence; shortened to the model's context
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = units::parse_positive)]
    pub(crate) sequence_length: usize,
    /// Moves the calibration windows; 0 spaces them evenly
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
}

/// `samples` divided by `weights`, at least one each; what is over goes to the largest remainders.
fn shares(weights: &[f64], samples: usize) -> Vec<usize> {
    let total: f64 = weights.iter().sum();
    let exact: Vec<f64> = weights.iter().map(|w| w / total * samples as f64).collect();
    let mut counts: Vec<usize> = exact.iter().map(|e| e.floor() as usize).collect();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| (exact[b] - exact[b].floor()).total_cmp(&(exact[a] - exact[a].floor())));
    let over = samples.saturating_sub(counts.iter().sum());
    order.iter().take(over).for_each(|&i| counts[i] += 1);
    counts.iter().map(|&c| c.max(1)).collect()
}

/// A text's name and its windows.
pub(crate) struct Text {
    pub(crate) name: String,
    pub(crate) windows: Windows,
    /// Windows of the same text that calibration does not see; `None` where it leaves no room for any.
    pub(crate) held_out: Option<Windows>,
}

/// Held-out windows, at most.
const HELD_OUT: usize = 16;

impl TextArgs {
    /// The number of windows, by default as many as suit the model `input`: a sentence is a tenth or less of a window,
    /// and a Hessian needs several times as many tokens as it has rows.
    pub(crate) fn samples(&self, input: &Checkpoint) -> usize {
        let sentences = bitmill_models::spec(input.config()).is_ok_and(|spec| !spec.causal);
        self.samples.unwrap_or(if sentences { 2048 } else { 128 })
    }

    /// Reads the text and cuts it into `samples` windows of `length` tokens.
    pub(crate) fn windows(
        &self,
        input: &Checkpoint,
        spec: &ModelSpec,
        (samples, length, seed): (usize, usize, u64),
    ) -> anyhow::Result<Text> {
        let beside = input.dir().join("calibration.txt");
        let (name, texts) = if !self.calibration.is_empty() {
            let files: Vec<&PathBuf> = self.calibration.iter().map(|(file, _)| file).collect();
            let texts = read_texts(&files)?;
            (texts.iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>().join(", "), texts)
        } else if beside.is_file() {
            (beside.display().to_string(), read_texts(&[beside])?)
        } else {
            let name = "the text that comes with bitmill (give --calibration FILE for text of the model's own use)";
            (name.to_owned(), vec![("the bundled text".to_owned(), BUNDLED_TEXT.to_owned())])
        };
        let tokenizer = Tokenizer::of(input, spec.bos)?;
        let length = length.min(spec.max_positions);
        let limit = match spec.causal {
            true => length,
            // Positions that the model's own pipeline never reaches would only dilute the statistics.
            false => Sentences::limit(input.dir())?.unwrap_or(length).min(length),
        };
        let cut = |texts: &[(String, String)], samples: usize| match spec.causal {
            true => Windows::with_held_out(texts, &tokenizer, spec.vocab, (limit, samples, seed), HELD_OUT),
            false => Ok((Windows::sentences(texts, &tokenizer, spec.vocab, limit, samples, seed)?, None)),
        };
        let weights: Vec<f64> = self.calibration.iter().map(|(_, weight)| weight.unwrap_or(1.0)).collect();
        let (windows, held_out) = if self.calibration.iter().any(|(_, weight)| weight.is_some()) {
            let (mut parts, mut held) = (Vec::new(), Vec::new());
            for (text, samples) in texts.iter().zip(shares(&weights, samples)) {
                let (part, rest) = cut(std::slice::from_ref(text), samples)?;
                eprintln!("{}: {}", text.0, amount(&part));
                parts.push(part);
                held.extend(rest);
            }
            (Windows::joined(parts), (!held.is_empty()).then(|| Windows::joined(held)))
        } else {
            cut(&texts, samples)?
        };
        // By default an encoder takes what the text has; a number that was asked for and missed is worth a note.
        if windows.count() < samples && (spec.causal || self.samples.is_some()) {
            eprintln!("note: {name} holds {}, not {samples}", amount(&windows));
        }
        Ok(Text { name, windows, held_out })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_shared_by_weight() {
        assert_eq!(shares(&[0.3, 0.7], 128), [38, 90]);
        assert_eq!(shares(&[1.0, 1.0, 1.0], 128), [43, 43, 42]);
        assert_eq!(shares(&[1.0, 1000.0], 10), [1, 10]);
        assert_eq!(shares(&[2.0], 7), [7]);
    }
}

//! Calibration text, or images: where they come from and how they are cut, for every command that runs some.

use crate::mixed::parse_weighted;
use crate::{units, write};
use anyhow::{bail, ensure};
use bitmill_calibrate::{BUNDLED_TEXT, PIXELS, Sentences, Tokenizer, Windows, read_texts};
use bitmill_checkpoint::Checkpoint;
use bitmill_models::{Images, ModelSpec};
use std::path::{Path, PathBuf};

#[derive(Debug, clap::Args)]
pub(crate) struct TextArgs {
    /// Calibration text; by default MODEL/calibration.txt, or else a text that comes with bitmill. With weights
    /// (prose.txt:0.7 code.txt:0.3), each text gives its share of the windows. A model of images takes safetensors files with a
    /// tensor pixel_values, [N, channels, height, width] in float32, as its own image processor makes it
    #[arg(long, value_name = "FILE[:WEIGHT]", num_args = 1.., value_parser = parse_weighted)]
    pub(crate) calibration: Vec<(PathBuf, Option<f64>)>,
    /// Calibration windows; of an encoder, sentences or images [default: 128, or 2048 sentences]
    #[arg(long, value_name = "N", value_parser = units::parse_positive)]
    samples: Option<usize>,
    /// Tokens per window, or at most per sentence; shortened to the model's context
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = units::parse_positive)]
    pub(crate) sequence_length: usize,
    /// Share of the windows that the model writes itself instead, by sampling from its predictions: what it was trained on is
    /// then calibrated for too, and not the kind of text alone that was given [default: 0.5 for gptq and billm and up to 500M weights (0.25 for --effort best at 2 bits), else 0]
    #[arg(long, value_name = "SHARE", value_parser = parse_whole_share)]
    pub(crate) written: Option<f32>,
    /// Moves the calibration windows; 0 spaces them evenly
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
}

fn parse_whole_share(text: &str) -> Result<f32, String> {
    let valid = |d: &f32| (0.0..=1.0).contains(d);
    text.parse().ok().filter(valid).ok_or_else(|| format!("`{text}` is not a number from 0 to 1"))
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

/// Bytes of weights that are read while the text is made ready.
const AHEAD: usize = 1 << 28;
/// Held-out windows, at most.
const HELD_OUT: usize = 16;

impl TextArgs {
    /// The number of windows, by default as many as suit the model `input`: a sentence is a tenth or less of a window,
    /// and a Hessian needs several times as many tokens as it has rows.
    pub(crate) fn samples(&self, input: &Checkpoint) -> usize {
        let sentences = bitmill_models::spec(input.config()).is_ok_and(|s| !s.causal && s.images.is_none());
        self.samples.unwrap_or(if sentences { 2048 } else { 128 })
    }

    /// Whether text was asked for, given or written.
    pub(crate) fn asked(&self) -> bool {
        !self.calibration.is_empty() || self.written.is_some_and(|share| share > 0.0)
    }

    /// Reads the text and cuts it into `samples` windows of `length` tokens, of which the model writes a share of `written`; or
    /// `samples` images.
    pub(crate) fn windows(
        &self,
        input: &Checkpoint,
        spec: &ModelSpec,
        (samples, length, seed): (usize, usize, u64),
        written: f32,
    ) -> anyhow::Result<Text> {
        ensure!(
            (0.0..=1.0).contains(&written),
            "the plan has {written} of the windows written, which is no share: from 0 to 1"
        );
        ensure!(written == 0.0 || spec.causal, "a {} model does not write; leave out --written", spec.model_type);
        let own = (samples as f64 * f64::from(written)).round() as usize;
        let samples = samples - own;
        if samples == 0 {
            ensure!(
                self.calibration.is_empty(),
                "the model writes every window: leave out --calibration, or let --written be less"
            );
            let tokenizer = Tokenizer::of(input, spec.bos)?;
            let windows = write::windows(input, spec, &tokenizer, (own, length.min(spec.max_positions), seed))?;
            ensure!(windows.count() > 0, "the model ends its texts before one window is full: give --calibration FILE");
            return Ok(Text { name: "text of its own".to_owned(), windows, held_out: None });
        }
        let files: Vec<&Path> = self.calibration.iter().map(|(file, _)| file.as_path()).collect();
        only_what_it_reads(&files, spec)?;
        if let Some(images) = &spec.images {
            return self.images(&files, (spec, images), (samples, seed));
        }
        // Most of what comes until weights are asked for is the work of one thread.
        input.read_ahead(AHEAD);
        let beside = input.dir().join("calibration.txt");
        let read = || -> anyhow::Result<(String, Vec<(String, String)>)> {
            if !self.calibration.is_empty() {
                let texts = read_texts(&files)?;
                return Ok((texts.iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>().join(", "), texts));
            }
            if beside.is_file() {
                return Ok((beside.display().to_string(), read_texts(&[&beside])?));
            }
            let name = "the text that comes with bitmill (give --calibration FILE for text of the model's own use)";
            Ok((name.to_owned(), vec![("the bundled text".to_owned(), BUNDLED_TEXT.to_owned())]))
        };
        let (text, tokenizer) = rayon::join(read, || Tokenizer::of(input, spec.bos));
        let ((name, texts), tokenizer) = (text?, tokenizer?);
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
        let (windows, held_out) = if let Some(shares) = self.shares(samples) {
            let (mut parts, mut held) = (Vec::new(), Vec::new());
            for (text, samples) in texts.iter().zip(shares) {
                let (part, rest) = cut(std::slice::from_ref(text), samples)?;
                eprintln!("{}: {}", text.0, amount(&part));
                parts.push(part);
                held.extend(rest);
            }
            (Windows::joined(parts)?, (!held.is_empty()).then(|| Windows::joined(held)).transpose()?)
        } else {
            cut(&texts, samples)?
        };
        // By default an encoder takes what the text has; a number that was asked for and missed is worth a note.
        if windows.count() < samples && (spec.causal || self.samples.is_some()) {
            eprintln!("note: {name} holds {}, not {samples}", amount(&windows));
        }
        if own == 0 {
            return Ok(Text { name, windows, held_out });
        }
        let other = write::windows(input, spec, &tokenizer, (own, length, seed))?;
        if other.count() < own {
            eprintln!("note: the model ends its texts early and filled {}, not {own}", amount(&other));
        }
        let windows = if other.count() == 0 { windows } else { Windows::joined(vec![windows, other])? };
        Ok(Text { name: format!("{name} and text of its own"), windows, held_out })
    }

    /// `samples` images of `files`.
    fn images(
        &self,
        files: &[&Path],
        (spec, images): (&ModelSpec, &Images),
        (samples, seed): (usize, u64),
    ) -> anyhow::Result<Text> {
        ensure!(
            !files.is_empty(),
            "a {} model is calibrated on images, and none come with bitmill: give --calibration FILE.safetensors with a tensor \
             {PIXELS}, [N, {}] in float32, as the model's own image processor makes it; --method rtn needs none",
            spec.model_type,
            images.shape().map(|n| n.to_string()).join(", "),
        );
        let name = files.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(", ");
        let windows = match self.shares(samples) {
            Some(shares) => {
                let part = |(file, samples): (&&Path, usize)| Windows::images(&[file], images, samples, seed);
                Windows::joined(files.iter().zip(shares).map(part).collect::<Result<_, _>>()?)?
            }
            None => Windows::images(files, images, samples, seed)?,
        };
        if windows.count() < samples && self.samples.is_some() {
            eprintln!("note: {name} holds {}, not {samples}", amount(&windows));
        }
        Ok(Text { name, windows, held_out: None })
    }

    /// How many of `samples` windows each file gives, where weights say so.
    fn shares(&self, samples: usize) -> Option<Vec<usize>> {
        let weights: Vec<f64> = self.calibration.iter().map(|(_, weight)| weight.unwrap_or(1.0)).collect();
        self.calibration.iter().any(|(_, weight)| weight.is_some()).then(|| shares(&weights, samples))
    }
}

/// Whether a file is named as one of images, and not of text.
pub(crate) fn holds_images(file: &Path) -> bool {
    file.extension().is_some_and(|e| e == "safetensors")
}

/// Refuses a file of images for a model of text, and the other way round.
pub(crate) fn only_what_it_reads(files: &[&Path], spec: &ModelSpec) -> anyhow::Result<()> {
    let kind = &spec.model_type;
    match (files.iter().find(|file| holds_images(file) != spec.images.is_some()), &spec.images) {
        (None, _) => Ok(()),
        (Some(file), None) => bail!("{} is a file of images, and a {kind} model reads text", file.display()),
        (Some(file), Some(images)) => bail!(
            "{} is no file of images, which a {kind} model reads: give a .safetensors file with a tensor {PIXELS}, [N, {}] in float32",
            file.display(),
            images.shape().map(|n| n.to_string()).join(", "),
        ),
    }
}

/// How much text `windows` are.
pub(crate) fn amount(windows: &Windows) -> String {
    let equal = windows.lengths().iter().all(|&length| length == windows.length);
    match equal {
        true if windows.are_images() => format!("{} images of {} tokens", windows.count(), windows.length),
        true => format!("{} windows of {} tokens", windows.count(), windows.length),
        false => {
            format!("{} sentences of up to {} tokens, {} in all", windows.count(), windows.length, windows.text_tokens)
        }
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

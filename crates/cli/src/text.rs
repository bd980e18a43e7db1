//! Calibration text: where it comes from and how it is cut, for every command that runs some.

use crate::quantize::amount;
use crate::units;
use bitmill_calibrate::{BUNDLED_TEXT, Sentences, Tokenizer, Windows, read_texts};
use bitmill_checkpoint::Checkpoint;
use bitmill_models::ModelSpec;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub(crate) struct TextArgs {
    /// Calibration text; by default MODEL/calibration.txt, or else a text that comes with bitmill
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub(crate) calibration: Vec<PathBuf>,
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
            let texts = read_texts(&self.calibration)?;
            (texts.iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>().join(", "), texts)
        } else if beside.is_file() {
            (beside.display().to_string(), read_texts(&[beside])?)
        } else {
            let name = "the text that comes with bitmill (give --calibration FILE for text of the model's own use)";
            (name.to_owned(), vec![("the bundled text".to_owned(), BUNDLED_TEXT.to_owned())])
        };
        let tokenizer = Tokenizer::of(input, spec.bos)?;
        let length = length.min(spec.max_positions);
        let (windows, held_out) = match spec.causal {
            true => Windows::with_held_out(&texts, &tokenizer, spec.vocab, (length, samples, seed), HELD_OUT)?,
            false => {
                // Positions that the model's own pipeline never reaches would only dilute the statistics.
                let limit = Sentences::limit(input.dir())?.unwrap_or(length).min(length);
                (Windows::sentences(&texts, &tokenizer, spec.vocab, limit, samples, seed)?, None)
            }
        };
        // By default an encoder takes what the text has; a number that was asked for and missed is worth a note.
        if windows.count() < samples && (spec.causal || self.samples.is_some()) {
            eprintln!("note: {name} holds {}, not {samples}", amount(&windows));
        }
        Ok(Text { name, windows, held_out })
    }
}

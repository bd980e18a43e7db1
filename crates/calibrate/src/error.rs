//! What can go wrong between a text and a number.

use std::path::PathBuf;

/// A failure of calibration or evaluation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The folder has neither `tokenizer.json` nor `tokenizer.model`.
    #[error("{dir}: no tokenizer.json and no tokenizer.model; copy the model's tokenizer there", dir = dir.display())]
    NoTokenizer {
        /// The model folder.
        dir: PathBuf,
    },
    /// A tokenizer file that cannot be understood.
    #[error("{file}: not a readable tokenizer ({reason}); fetch the file again or convert it to tokenizer.json", file = file.display())]
    Tokenizer {
        /// The tokenizer file.
        file: PathBuf,
        /// What its parser said.
        reason: String,
    },
    /// A token of the text that the model has no embedding for.
    #[error("the tokenizer of {dir} produced token {token}, but the model's vocabulary has {vocab} entries; the tokenizer belongs to another model", dir = dir.display())]
    Vocabulary {
        /// The model folder.
        dir: PathBuf,
        /// The token id.
        token: u32,
        /// Rows of the embedding.
        vocab: usize,
    },
    /// A text that cannot be read.
    #[error("{file}: cannot read the text ({source})", file = file.display())]
    Text {
        /// The text file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A text too short for one window.
    #[error("the text ({name}) has {tokens} tokens, one window needs {needed}; give a longer text or a smaller window")]
    ShortText {
        /// Where the text came from.
        name: String,
        /// Tokens it has.
        tokens: usize,
        /// Tokens one window takes from it.
        needed: usize,
    },
    /// A window length the model cannot run.
    #[error("windows of {window} tokens: {reason}")]
    Window {
        /// Tokens per window.
        window: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A sentence-transformers file that asks for something that is not computed here.
    #[error("{file}: {reason}", file = file.display())]
    Sentences {
        /// The file.
        file: PathBuf,
        /// What is wrong with it, and the remedy.
        reason: String,
    },
    /// A file that does not hold the images a model reads.
    #[error("{file}: {reason}", file = file.display())]
    Images {
        /// The file.
        file: PathBuf,
        /// What is wrong with it, and the remedy.
        reason: String,
    },
    /// Two models that cannot be compared.
    #[error("{model} cannot be compared with {reference}: {reason}", model = model.display(), reference = reference.display())]
    Incomparable {
        /// The model under test.
        model: PathBuf,
        /// The reference.
        reference: PathBuf,
        /// The difference.
        reason: String,
    },
    /// An activation that is NaN or infinite.
    #[error(
        "block {block}: the activations become NaN or infinite at {site}; the checkpoint is damaged or needs more range than f32"
    )]
    NonFinite {
        /// Index of the block.
        block: usize,
        /// The site.
        site: String,
    },
    /// The spill file of an activation stream failed.
    #[error("{file}: cannot keep the calibration stream there ({source}); free space or raise --stream-memory", file = file.display())]
    Stream {
        /// The spill file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A statistics file that cannot be used for this model.
    #[error("{file}: not usable as statistics of this model ({reason}); collect them again with `bitmill calibrate`", file = file.display())]
    Statistics {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// An importance matrix that cannot be read.
    #[error("{file}: not usable as an importance matrix: {reason}", file = file.display())]
    Imatrix {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A file operation failed.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The forward pass failed.
    #[error(transparent)]
    Model(#[from] bitmill_models::Error),
    /// The checkpoint failed.
    #[error(transparent)]
    Checkpoint(#[from] bitmill_checkpoint::Error),
    /// A tensor operation failed.
    #[error("tensor operation: {0}")]
    Tensor(#[from] candle_core::Error),
}

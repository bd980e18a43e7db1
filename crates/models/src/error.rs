//! What can go wrong between a config, its tensors and the forward pass.

/// A model that cannot be understood, loaded or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The config names an architecture that is not in [`crate::ARCHES`].
    #[error("unknown architecture `{model_type}`; known are {}. Methods that need no data still work", known.join(", "))]
    UnknownArchitecture {
        /// `model_type` of the config, or `(none)`.
        model_type: String,
        /// Every `model_type` that is understood.
        known: Vec<&'static str>,
    },
    /// A key of config.json is missing, of the wrong type, out of range, or asks for something unsupported.
    #[error("config.json: `{key}` {reason}")]
    Config {
        /// The key, with the section it lies in: `rope_scaling.factor`.
        key: String,
        /// What is wrong with it and what would be right.
        reason: String,
    },
    /// A tensor of the architecture is not stored.
    #[error("tensor `{tensor}` is missing; the checkpoint does not match its config.json")]
    Missing {
        /// The tensor.
        tensor: String,
    },
    /// A stored tensor has a shape the config does not allow.
    #[error("tensor `{tensor}` is {got:?} where config.json asks for {expected:?}; one of the two is wrong")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Shape according to the config.
        expected: Vec<usize>,
        /// Shape as stored.
        got: Vec<usize>,
    },
    /// A token id beyond the embedding.
    #[error("token {token} lies beyond a vocabulary of {vocab}; the tokenizer belongs to another model")]
    Token {
        /// The token id.
        token: u32,
        /// Rows of the embedding.
        vocab: usize,
    },
    /// A window whose length the rotary table does not serve.
    #[error(
        "a window of {tokens} tokens on a rotary table for {shortest} to {longest}; build the table for this length"
    )]
    Window {
        /// Length of the window.
        tokens: usize,
        /// Shortest length the table's frequencies hold for.
        shortest: usize,
        /// Rows of the table.
        longest: usize,
    },
    /// A window longer than the model has positions.
    #[error("a window of {tokens} tokens for a model with {positions} positions; cut it shorter")]
    Positions {
        /// Length of the window.
        tokens: usize,
        /// Rows of the position embedding.
        positions: usize,
    },
    /// A model was given something else than it reads.
    #[error("the model reads {expected}, and was given {got}")]
    Reads {
        /// What it reads.
        expected: &'static str,
        /// What it was given.
        got: &'static str,
    },
    /// An image of another size.
    #[error(
        "an image of {got} numbers for a model that reads images of {expected:?}; preprocess it as the model's own processor does"
    )]
    Image {
        /// Channels, height and width that the model reads.
        expected: [usize; 3],
        /// Numbers of the image.
        got: usize,
    },
    /// Logits asked of a model that ends in hidden states.
    #[error("a {model_type} model has no output head, so it predicts no tokens; compare its embeddings instead")]
    NoHead {
        /// `model_type` of the config.
        model_type: String,
    },
    /// A weight was asked for in the size it is stored in, and no kernel reads it so.
    #[error(
        "the weight of `{module}` is not of integers in groups of a multiple of 32, nor of 16-bit floats, which are what \
         kernels read as it is stored; dequantize it instead"
    )]
    NotPacked {
        /// The linear.
        module: String,
    },
    /// The checkpoint could not be read.
    #[error(transparent)]
    Checkpoint(#[from] bitmill_checkpoint::Error),
    /// Tensor arithmetic refused its operands: a weight was replaced by one of another shape, or a bug.
    #[error("tensor arithmetic failed: {0}")]
    Tensor(#[from] Box<candle_core::Error>),
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Error::Tensor(Box::new(error))
    }
}

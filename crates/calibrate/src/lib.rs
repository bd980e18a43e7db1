//! Text or images through a model: tokens, windows, activation streams, statistics per site, perplexity and KL divergence, sentence
//! embeddings.
//!
//! Everything here runs a model block by block over a fixed set of windows, so that one block's weights are in memory at
//! a time. Work is split by window and folded in window order: the same input gives the same bits at any thread count.

mod author;
mod collect;
mod cross;
mod embeddings;
mod error;
mod eval;
mod gguf;
mod images;
mod imatrix;
mod metrics;
mod pooling;
mod probe;
mod sentencepiece;
mod statistics;
mod stats;
mod stream;
mod tokenizer;
mod windows;

pub use author::{Author, Written, author_memory, together};
pub use collect::{BlockSink, Pass, collect};
pub use cross::{CrossStats, Drift};
pub use embeddings::{Cosine, Embedded, Similarity, compare_embeddings};
pub use error::Error;
pub use eval::{Comparison, Evaluation, LogitsSink, evaluate};
pub use gguf::{gguf_tokenizer, tokenizer_files};
pub use images::PIXELS;
pub use imatrix::{Imatrix, Importance};
pub use metrics::{Divergence, Histogram, Perplexity, Summary};
pub use pooling::{Pooling, Sentences};
pub use probe::{Probes, Replace, Replacement, probe};
pub use sentencepiece::to_tokenizer_json;
pub use statistics::{About, Statistics, StatisticsWriter, model_fingerprint};
pub use stats::{SiteStats, Spread, Tokens};
pub use stream::{Saved, Spare, Stream, StreamKind, in_order, overlapped};
pub use tokenizer::Tokenizer;
pub use windows::{Windows, held_out, read_texts, splitmix, uniform};

/// Calibration text for models that bring none: prose from public-domain books, none of it in any evaluation text of
/// this repository.
pub const BUNDLED_TEXT: &str = include_str!("../text/bundled.txt");

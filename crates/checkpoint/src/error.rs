//! What can go wrong between a folder and its tensors. Every message names the file, the tensor and what to do.

use bitmill_scheme::Scheme;
use safetensors::Dtype;
use std::path::PathBuf;

/// A checkpoint that cannot be read, described or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: "open", "write" and so on.
        action: &'static str,
        /// File or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A folder or file that a checkpoint must have is not there.
    #[error("{} does not exist: {remedy}", path.display())]
    Missing {
        /// What was looked for.
        path: PathBuf,
        /// What to do about it.
        remedy: &'static str,
    },
    /// A JSON file that does not parse, or does not hold an object where it must.
    #[error("{} is not the JSON it should be ({reason}); fetch it again or repair it", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// The parser's words.
        reason: String,
    },
    /// A safetensors header that is truncated, malformed or does not describe its file.
    #[error("{} is truncated or damaged ({reason}; {size} bytes on disk); fetch it again", file.display())]
    Header {
        /// The shard.
        file: PathBuf,
        /// Which rule of the container it breaks.
        reason: String,
        /// Size of the file in bytes.
        size: u64,
    },
    /// The index sends a reader to a shard that does not hold the tensor.
    #[error("{} places tensor {tensor} in {shard}, which does not hold it; fetch the shard and the index again", index.display())]
    Index {
        /// The index file.
        index: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shard as the index names it.
        shard: String,
    },
    /// The same tensor in two shards.
    #[error("tensor {tensor} is stored twice, in {} and {}; remove the shard that does not belong", first.display(), second.display())]
    Duplicate {
        /// The tensor.
        tensor: String,
        /// The shard it was first seen in.
        first: PathBuf,
        /// The other shard.
        second: PathBuf,
    },
    /// A tensor that no shard holds.
    #[error("{} holds no tensor {tensor}; is the folder complete, and of the architecture its config.json names?", dir.display())]
    NoTensor {
        /// The tensor.
        tensor: String,
        /// The folder.
        dir: PathBuf,
    },
    /// A tensor of a type that its use does not allow.
    #[error("tensor {tensor} in {} is {got}, but {expected} is needed here", file.display())]
    Dtype {
        /// The tensor.
        tensor: String,
        /// The shard.
        file: PathBuf,
        /// Types that would do.
        expected: &'static str,
        /// The type stored.
        got: Dtype,
    },
    /// A tensor of a shape that its use does not allow.
    #[error("tensor {tensor} in {} has shape {got:?}, but {expected} is needed here; it was cut or belongs to another model", file.display())]
    Shape {
        /// The tensor.
        tensor: String,
        /// The shard.
        file: PathBuf,
        /// Shape that would do, in words or brackets.
        expected: String,
        /// The shape stored.
        got: Vec<usize>,
    },
    /// A quantized tensor whose values contradict its scheme.
    #[error("the quantized weight of {module} in {} is damaged: {source}", dir.display())]
    Damaged {
        /// The module.
        module: String,
        /// The folder.
        dir: PathBuf,
        /// The contradiction.
        source: bitmill_scheme::Error,
    },
    /// A key of `quantization_config` with a value that is wrong or beyond this reader.
    #[error("quantization_config: {key} is {got}; {reason}")]
    Config {
        /// Path of the key.
        key: String,
        /// The value found, as JSON.
        got: String,
        /// What was expected, or why it is refused.
        reason: String,
    },
    /// A way of quantizing that no format of this crate reads.
    #[error("quantization_config: {key} \"{got}\" is not one this version reads; it reads {known}")]
    UnknownFormat {
        /// `quant_method` or `format`.
        key: &'static str,
        /// Its value.
        got: String,
        /// The values that are read, comma-separated.
        known: String,
    },
    /// A scheme that a format cannot express.
    #[error("{tensor}: format {format} cannot store {scheme}: {reason}")]
    Unsupported {
        /// The module.
        tensor: String,
        /// The scheme asked for.
        scheme: Scheme,
        /// The format asked for.
        format: &'static str,
        /// Why, and what would do.
        reason: String,
    },
    /// Too little space for the output.
    #[error("{} has {free} bytes free and {needed} are needed; free some space or choose another output folder", path.display())]
    DiskFull {
        /// Folder or file on the full disk.
        path: PathBuf,
        /// Bytes needed.
        needed: u64,
        /// Bytes available.
        free: u64,
    },
    /// A list of tensors that cannot be laid out, or a write that does not fit the layout.
    #[error("output tensor {tensor}: {reason}")]
    Layout {
        /// The tensor.
        tensor: String,
        /// What is wrong.
        reason: String,
    },
    /// Files of an interrupted run that are not those of the plan.
    #[error("{} was not left by this run ({reason}); remove it or start over with --force", file.display())]
    Leftover {
        /// The file.
        file: PathBuf,
        /// How it differs.
        reason: String,
    },
}

/// Turns a system error into [`Error::Io`].
pub(crate) fn io(action: &'static str, path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_path_buf();
    move |source| Error::Io { action, path, source }
}

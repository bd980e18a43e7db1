//! What can stop a plan or a run.

use std::path::PathBuf;

/// A failure of quantization.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No method of this name.
    #[error("method `{name}` does not exist; the methods are {known}")]
    UnknownMethod {
        /// The name asked for.
        name: String,
        /// The names there are.
        known: String,
    },
    /// No transform of this name.
    #[error("transform `{name}` does not exist; the transforms are {known}")]
    UnknownTransform {
        /// The name asked for.
        name: String,
        /// The names there are.
        known: String,
    },
    /// A transform that a model or an output does not allow.
    #[error("transform `{name}` cannot be applied to {dir}: {reason}; leave it out of --transforms", dir = dir.display())]
    Transform {
        /// The transform.
        name: &'static str,
        /// The model folder.
        dir: PathBuf,
        /// Why.
        reason: String,
    },
    /// Products of what this CPU does not multiply.
    #[error("--arithmetic {asked} cannot be used here: this CPU has no {lacks}; use f32")]
    Arithmetic {
        /// What was asked for.
        asked: &'static str,
        /// The instructions.
        lacks: &'static str,
    },
    /// A shift of targets by what the residual stream lost, in a model that does not add to the stream plainly.
    #[error(
        "--target-shift outputs cannot be used with {dir}: norms or factors stand between what is rounded and the residual stream; use inputs or off", dir = dir.display()
    )]
    TargetShift {
        /// The model folder.
        dir: PathBuf,
    },
    /// Tokens that count by how often they occur, of a model that reads none.
    #[error("--token-weights rare cannot be used with {dir}: it reads images, which have no tokens; choose another", dir = dir.display())]
    TokenWeights {
        /// The model folder.
        dir: PathBuf,
    },
    /// A stage that does not know experts.
    #[error(
        "{what} cannot be used with {dir}: it does not know mixtures of experts; leave it out: one scheme for all is rounded from text, tuned if need be", dir = dir.display()
    )]
    Experts {
        /// The stage or flag.
        what: String,
        /// The model folder.
        dir: PathBuf,
    },
    /// Transforms choose by what text does in the original model.
    #[error(
        "transforms run text through the model, and statistics do not hold any; give text, or leave --transforms out"
    )]
    TransformsNeedText,
    /// No format of this name.
    #[error("format `{name}` does not exist; the formats are {known}")]
    UnknownFormat {
        /// The name asked for.
        name: String,
        /// The names there are.
        known: String,
    },
    /// A pattern of `--ignore` that is not a regular expression.
    #[error("--ignore `{pattern}`: not a regular expression ({reason})")]
    Pattern {
        /// The pattern.
        pattern: String,
        /// What its parser said.
        reason: String,
    },
    /// The input is quantized already.
    #[error("{dir}: already quantized as {format}; rounding twice adds up errors, so start from the original model", dir = dir.display())]
    AlreadyQuantized {
        /// The model folder.
        dir: PathBuf,
        /// Its format.
        format: String,
    },
    /// There is nothing to convert.
    #[error("{dir} is not quantized, so there is nothing to convert; `bitmill quantize` quantizes it", dir = dir.display())]
    NotQuantized {
        /// The model folder.
        dir: PathBuf,
    },
    /// A tensor whose numbers the target of a conversion does not hold.
    #[error("{tensor} in {file} cannot become {format} as it is: {reason}; {remedy}, and --allow-lossy rounds it", file = file.display())]
    Lossy {
        /// Module or tensor.
        tensor: String,
        /// Its shard.
        file: PathBuf,
        /// The target.
        format: &'static str,
        /// The first number that is not held, or what the format lacks.
        reason: String,
        /// What would do.
        remedy: &'static str,
    },
    /// A matrix that changed between its check and its conversion.
    #[error("{module} changed while it was converted ({source}); keep the input still")]
    Moved {
        /// The module.
        module: String,
        /// What is no longer held.
        source: bitmill_scheme::Loss,
    },
    /// Nothing to do.
    #[error("{dir}: no tensor is left to quantize; loosen --ignore", dir = dir.display())]
    NothingToQuantize {
        /// The model folder.
        dir: PathBuf,
    },
    /// A scheme is given for a module that is not quantized.
    #[error("{dir}: a scheme is given for {module}, which is not a linear that is quantized; correct the name, or take it off the ignore list", dir = dir.display())]
    UnknownLayer {
        /// The model folder.
        dir: PathBuf,
        /// The module.
        module: String,
    },
    /// Statistics lack what a mixture of widths is chosen by.
    #[error(
        "the statistics hold no sensitivities, by which a mixture of widths is chosen; collect them with `bitmill calibrate` without --no-sensitivity"
    )]
    NoSensitivity,
    /// No mixture fits the size.
    #[error("no mixture of these options fits: {source}; raise the size, or give narrower --options")]
    Allocation {
        /// Why.
        #[from]
        source: crate::Impossible,
    },
    /// A plan file that cannot be understood.
    #[error("{file}: not a plan ({reason}); `bitmill plan MODEL -o FILE` writes one to start from", file = file.display())]
    PlanFile {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The scheme does not fit a tensor.
    #[error(
        "{tensor}: {source}; choose another --group-size (or --group-size -1 for one scale per row), or --ignore it"
    )]
    Scheme {
        /// Module whose weight it is.
        tensor: String,
        /// What does not fit.
        source: bitmill_scheme::Error,
    },
    /// A method needs activations, but the architecture has no forward pass here.
    #[error(
        "method `{method}` needs calibration, but {reason}; data-free methods still work: --method rtn or --method hqq"
    )]
    NeedsForward {
        /// The method.
        method: String,
        /// Why there is no forward pass.
        reason: String,
    },
    /// Inputs whose rounding calibration has to say, where it cannot see them.
    #[error(
        "{scheme} rounds inputs by what calibration says of them, but {reason}; other schemes round them as they come, or not \
         at all (--scheme fp8_dynamic, nvfp4a16)"
    )]
    NeedsInputs {
        /// The scheme.
        scheme: bitmill_scheme::Scheme,
        /// Why they are not seen.
        reason: String,
    },
    /// Keys and values that are to be rounded where they cannot be.
    #[error("--kv-cache: {reason}")]
    Cache {
        /// Why, and what would do.
        reason: String,
    },
    /// A method that needs all of H where only its diagonal is known.
    #[error(
        "method `{method}` feeds errors back through all of H, and an importance matrix holds its diagonal only; use --method \
         rtn with --imatrix, or give the method text (--calibration) or --stats"
    )]
    DiagonalOnly {
        /// The method.
        method: &'static str,
    },
    /// An importance matrix that does not fit the model.
    #[error("{module}: the importance matrix weighs {got} of its {inputs} inputs; it was made of another model")]
    Importance {
        /// The linear.
        module: String,
        /// Its inputs.
        inputs: usize,
        /// Entries of the matrix; 0 where it has none for the linear.
        got: usize,
    },
    /// A block linear of the architecture that the folder does not hold.
    #[error("{dir}: tensor {tensor} is missing; the download is incomplete or config.json describes another model", dir = dir.display())]
    MissingTensor {
        /// The model folder.
        dir: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A weight that is NaN or infinite.
    #[error("{tensor} in {file}: entry {index} is NaN or infinite; the checkpoint is damaged", file = file.display())]
    NonFinite {
        /// The tensor.
        tensor: String,
        /// Its shard.
        file: PathBuf,
        /// Position in row-major order.
        index: usize,
    },
    /// OUT exists.
    #[error("{out} exists; choose another name or pass --force to replace it", out = out.display())]
    Exists {
        /// The output.
        out: PathBuf,
    },
    /// OUT lies in MODEL, or MODEL in OUT.
    #[error("{out} and {model} lie inside one another; write the output elsewhere", out = out.display(), model = model.display())]
    Nested {
        /// The output.
        out: PathBuf,
        /// The model folder.
        model: PathBuf,
    },
    /// An unfinished run with other settings or another input lies at the same place.
    #[error("{work} holds an unfinished run with another {what} ({theirs} there, {ours} now); repeat that command to finish it, or pass --force to discard it", work = work.display())]
    Leftover {
        /// The work folder.
        work: PathBuf,
        /// The setting that differs.
        what: String,
        /// Its value in the unfinished run.
        theirs: String,
        /// Its value now.
        ours: String,
    },
    /// Another process works on the same output.
    #[error("another bitmill is writing {work}; wait for it or choose another output", work = work.display())]
    Busy {
        /// The work folder.
        work: PathBuf,
    },
    /// A method that cannot round onto a scheme.
    #[error("method `{method}` cannot make {scheme}: {reason}")]
    MethodScheme {
        /// The method.
        method: &'static str,
        /// The scheme.
        scheme: bitmill_scheme::Scheme,
        /// Why, and what would do.
        reason: &'static str,
    },
    /// A model that cannot become a GGUF file.
    #[error("{dir}: no GGUF file can be made of it: {reason}", dir = dir.display())]
    Gguf {
        /// The model folder.
        dir: PathBuf,
        /// Why.
        reason: String,
    },
    /// A weight beyond the range of the type it is to be stored in.
    #[error(
        "{tensor}: entry {index} is {value}, which f16 cannot hold; store it as bf16 (--token-embedding-type, --output-tensor-type)"
    )]
    Overflow {
        /// The tensor.
        tensor: String,
        /// Position in row-major order.
        index: usize,
        /// The weight.
        value: f32,
    },
    /// H cannot be factored even with heavy damping.
    #[error(
        "{tensor}: its Hessian is not positive definite even with damping {damping}; the activations are degenerate, use more calibration text"
    )]
    NotPositive {
        /// First linear of the site.
        tensor: String,
        /// The last damping tried.
        damping: f32,
    },
    /// Tuning reads windows of text, which statistics do not hold.
    #[error(
        "tuning and reconstruction run text through the model, and statistics do not hold any; give text, or leave them out (--tuning-passes 0 --reconstruction-passes 0)"
    )]
    TuningNeedsText,
    /// Soft rounding chooses between neighbouring integers.
    #[error("--soft-rounding is for integer schemes, not for {scheme}; leave it out")]
    SoftScheme {
        /// The scheme.
        scheme: bitmill_scheme::Scheme,
    },
    /// Tuning moves integer codes, and the format holds others.
    #[error(
        "tuning and reconstruction are for integer schemes, not for {format} files; leave them out (--tuning-passes 0 --reconstruction-passes 0)"
    )]
    TuningFormat {
        /// The format.
        format: String,
    },
    /// The user asked to stop; everything finished is kept.
    #[error("stopped on request after {done} of {total} blocks; the same command goes on from there")]
    Stopped {
        /// Units finished.
        done: usize,
        /// Units in all.
        total: usize,
    },
    /// A file operation failed.
    #[error("{path}: {action} failed ({source})", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The checkpoint failed.
    #[error(transparent)]
    Checkpoint(#[from] bitmill_checkpoint::Error),
    /// The model failed.
    #[error(transparent)]
    Model(#[from] bitmill_models::Error),
    /// Calibration failed.
    #[error(transparent)]
    Calibrate(#[from] bitmill_calibrate::Error),
    /// A tensor operation failed.
    #[error("tensor operation: {0}")]
    Tensor(#[from] candle_core::Error),
}

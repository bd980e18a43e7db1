//! `bitmill calibrate`: statistics of a model on a text, as a file.

use crate::text::{Text, TextArgs, amount};
use crate::{Common, mixed, units};
use anyhow::Context;
use bitmill_calibrate::{Imatrix, Pass, Statistics, model_fingerprint};
use bitmill_checkpoint::Checkpoint;
use bitmill_models::ModelSpec;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Collect statistics for `quantize --stats`
///
/// Runs text through the full-precision model once and writes what the linears read (second moments, means, maxima) and
/// how much an error in each place costs the predictions. `quantize --stats FILE` then makes any number of outputs
/// without a forward pass: other widths, sizes, formats and methods. A FILE that ends in .gguf or .dat gets llama.cpp's
/// importance matrix instead, which llama-quantize and `quantize --imatrix` read.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of the model, in Hugging Face layout, its name on the hub (org/model), or a GGUF file
    pub(crate) model: PathBuf,
    /// File to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    text: TextArgs,
    /// Make an importance matrix of these statistics, an earlier output of this command, instead of running text
    #[arg(long, value_name = "FILE", conflicts_with = "calibration")]
    stats: Option<PathBuf>,
    /// Leave out the probes by which mixtures are chosen; `--bits` and `--size` of quantize then cannot mix
    #[arg(long)]
    no_sensitivity: bool,
    /// Replace FILE if it exists
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.common.set_threads()?;
    anyhow::ensure!(
        args.force || !args.output.exists(),
        "{} exists; choose another name or pass --force to replace it",
        args.output.display()
    );
    let input = Checkpoint::open(&args.model)?;
    let spec = bitmill_models::spec(input.config())?;
    anyhow::ensure!(
        spec.causal,
        "statistics are collected from decoders; an encoder is quantized with its text or images directly (quantize --calibration)"
    );
    if let Some(stats) = &args.stats {
        anyhow::ensure!(is_imatrix(&args.output), "--stats makes an importance matrix; name it FILE.gguf or FILE.dat");
        let tokens_of_a_window = args.text.sequence_length.min(spec.max_positions);
        return to_imatrix(args, &input, &spec, stats, (&stats.display().to_string(), tokens_of_a_window));
    }
    let Text { name, windows, .. } = args.text.windows(
        &input,
        &spec,
        (args.text.samples(&input), args.text.sequence_length, args.text.seed),
        args.text.written.unwrap_or(0.0),
    )?;
    eprintln!("calibrating on {} from {name}", amount(&windows));
    let parent = args.output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
    let pass = Pass { model: &input, spec: &spec, stream_memory: args.common.stream_memory, spill_dir: parent };
    let started = Instant::now();
    if is_imatrix(&args.output) {
        let mut draft = args.output.as_os_str().to_owned();
        draft.push(".stats");
        let draft = PathBuf::from(draft);
        mixed::collect_to(&draft, pass, &windows, false)?;
        let made = to_imatrix(args, &input, &spec, &draft, (&name, windows.length));
        std::fs::remove_file(&draft).with_context(|| format!("removing {}", draft.display()))?;
        return made;
    }
    mixed::collect_to(&args.output, pass, &windows, !args.no_sensitivity)?;
    let seconds = started.elapsed().as_secs_f64();
    let size = args.output.metadata().with_context(|| format!("inspecting {}", args.output.display()))?.len();
    if args.common.json {
        let value = json!({"statistics": args.output, "bytes": size, "calibration": name, "seconds": seconds,
            "windows": windows.count(), "sequence_length": windows.length});
        println!("{value:#}");
    } else {
        println!(
            "{}: statistics of {} sites, {} in {seconds:.1} s",
            args.output.display(),
            spec.layers * 4,
            units::bytes(size)
        );
    }
    Ok(())
}

/// Whether a file of this name is an importance matrix.
fn is_imatrix(file: &Path) -> bool {
    file.extension().is_some_and(|e| e == "gguf" || e == "dat")
}

/// Writes the diagonals of the statistics in `stats`, of a text called `name` in windows of `length` tokens.
fn to_imatrix(
    args: &Args,
    input: &Checkpoint,
    spec: &ModelSpec,
    stats: &Path,
    (name, length): (&str, usize),
) -> anyhow::Result<()> {
    let statistics = Statistics::open(&[(stats.to_owned(), 1.0)], spec, &model_fingerprint(input)?)?;
    let chunks = usize::try_from(statistics.tokens())? / length.max(1);
    let imatrix = Imatrix::of(&statistics, spec, name, (chunks, length))?;
    imatrix.write(&args.output)?;
    if args.common.json {
        let value =
            json!({"imatrix": args.output, "weights": imatrix.entries.len(), "chunks": chunks, "calibration": name});
        println!("{value:#}");
    } else {
        println!("{}: mean squares of the inputs of {} weights", args.output.display(), imatrix.entries.len());
    }
    Ok(())
}

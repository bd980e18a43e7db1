//! `bitmill calibrate`: statistics of a model on a text, as a file.

use crate::quantize::amount;
use crate::text::{Text, TextArgs};
use crate::{Common, mixed, units};
use anyhow::Context;
use bitmill_calibrate::Pass;
use bitmill_checkpoint::Checkpoint;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Collect statistics for `quantize --stats`
///
/// Runs text through the full-precision model once and writes what the linears read (second moments, means, maxima) and
/// how much an error in each place costs the predictions. `quantize --stats FILE` then makes any number of outputs
/// without a forward pass: other widths, sizes, formats and methods.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of the model, in Hugging Face layout
    model: PathBuf,
    /// File to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    text: TextArgs,
    /// Leave out the probes by which mixtures are chosen; `--bits` and `--size` of quantize then cannot mix
    #[arg(long)]
    no_sensitivity: bool,
    /// Replace FILE if it exists
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    common: Common,
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
        "statistics are collected from decoders; an encoder is quantized with its text directly (quantize --calibration)"
    );
    let Text { name, windows, .. } =
        args.text.windows(&input, &spec, (args.text.samples(&input), args.text.sequence_length, args.text.seed))?;
    eprintln!("calibrating on {} from {name}", amount(&windows));
    let parent = args.output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
    let pass = Pass { model: &input, spec: &spec, stream_memory: args.common.stream_memory, spill_dir: parent };
    let started = Instant::now();
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

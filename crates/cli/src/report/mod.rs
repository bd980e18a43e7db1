//! `bitmill report`: one HTML file that shows what a quantization is, what it was made by and what it lost.
//!
//! The page is self-contained: styles and drawings are in it, nothing is fetched, no script runs. The facts it shows are in
//! it as JSON, too, so that a later `bitmill report` takes up the evaluation of an earlier one.

mod facts;
mod page;
mod plot;
mod sections;

use crate::beside::{beside, replace};
use crate::progress::Progress;
use crate::{Common, units};
use anyhow::{Context, ensure};
use bitmill_calibrate::{Comparison, Tokenizer, Windows, evaluate, read_texts};
use bitmill_checkpoint::Checkpoint;
use facts::{Evaluated, Facts, Manifest};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Write the report of a quantized model
///
/// Reads what `quantize` left (bitmill.json in a folder, OUT.bitmill.json beside a GGUF file) and writes one HTML file without
/// links to anything: rate and distortion, errors of every tensor, outliers, calibration coverage, divergence from
/// the reference, settings and hashes. `quantize` writes the same beside its output.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Quantized folder, or a GGUF file
    pub(crate) model: PathBuf,
    /// File to write [default: MODEL.report.html]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Folder of the full-precision model, to measure the divergence from; with --text
    #[arg(long, value_name = "MODEL", requires = "text")]
    pub(crate) reference: Option<PathBuf>,
    /// Text to measure on; it must not overlap the calibration text
    #[arg(long, value_name = "FILE", num_args = 1.., requires = "reference")]
    text: Vec<PathBuf>,
    /// Tokens per window
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = units::parse_positive)]
    window: usize,
    /// Windows, spread evenly over the text; by default as many as it holds
    #[arg(long, value_name = "N", value_parser = units::parse_positive)]
    windows: Option<usize>,
    #[command(flatten)]
    pub(crate) common: Common,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.common.set_threads()?;
    let file = args.output.clone().unwrap_or_else(|| beside(&args.model, ".report.html"));
    let manifest =
        if args.model.is_dir() { args.model.join("bitmill.json") } else { beside(&args.model, ".bitmill.json") };
    let text = std::fs::read_to_string(&manifest).with_context(|| {
        format!("reading {}, which bitmill quantize writes; there is no report without it", manifest.display())
    })?;
    let manifest: Manifest =
        serde_json::from_str(&text).with_context(|| format!("{} is not a manifest of bitmill", manifest.display()))?;
    let evaluated = match &args.reference {
        Some(reference) => Some(measure(args, reference)?),
        None => facts::evaluation_in(&file),
    };
    let facts = Facts { name: name(&args.model), manifest, evaluated };
    write(&file, &facts)?;
    if args.common.json {
        let kl = facts.evaluated.as_ref().and_then(|e| e.evaluation.divergence.as_ref()).map(|d| d.kl.mean);
        println!("{:#}", json!({"report": file, "kl": kl, "rank_correlation": facts.manifest.rank_correlation()}));
    } else {
        println!("{}", file.display());
    }
    Ok(())
}

/// Writes the report of a finished run beside its output; `held_out` is what to measure on, if anything.
pub(crate) fn of_run(
    out: &Path,
    manifest: serde_json::Value,
    input: &Checkpoint,
    held_out: Option<(&str, &Windows)>,
    stream_memory: u64,
) -> anyhow::Result<(PathBuf, Option<f64>)> {
    let evaluated = match held_out {
        None => None,
        Some((text, windows)) => {
            let model = Checkpoint::open(out)?;
            let what =
                Comparison { model: &model, reference: Some(input), stream_memory, spill_dir: &std::env::temp_dir() };
            let on = format!("{} held-out windows of {} tokens of {text}", windows.count(), windows.length);
            Some(Evaluated { on, evaluation: watched(what, windows)? })
        }
    };
    let manifest = serde_json::from_value(manifest).context("the manifest of the run")?;
    let kl = evaluated.as_ref().and_then(|e| e.evaluation.divergence.as_ref()).map(|d| d.kl.mean);
    let file = beside(out, ".report.html");
    write(&file, &Facts { name: name(out), manifest, evaluated })?;
    Ok((file, kl))
}

fn measure(args: &Args, reference: &Path) -> anyhow::Result<Evaluated> {
    let (model, reference) = (Checkpoint::open(&args.model)?, Checkpoint::open(reference)?);
    let spec = bitmill_models::spec_of(&model)?;
    ensure!(spec.causal, "a {} model predicts no tokens; bitmill eval compares its embeddings", spec.model_type);
    ensure!(args.window <= spec.max_positions, "the model's context is {} tokens", spec.max_positions);
    let texts = read_texts(&args.text)?;
    let tokenizer = Tokenizer::of(&model, spec.bos)?;
    let count = args.windows.unwrap_or(usize::MAX);
    let windows = Windows::from_texts(&texts, &tokenizer, spec.vocab, args.window, count, 0)?;
    let spill_dir = std::env::temp_dir();
    let stream_memory = args.common.stream_memory;
    let what = Comparison { model: &model, reference: Some(&reference), stream_memory, spill_dir: &spill_dir };
    let names: Vec<String> = args.text.iter().map(|p| name(p)).collect();
    let on = format!("{} windows of {} tokens of {}", windows.count(), windows.length, names.join(", "));
    Ok(Evaluated { on, evaluation: watched(what, &windows)? })
}

fn watched(what: Comparison<'_>, windows: &Windows) -> anyhow::Result<bitmill_calibrate::Evaluation> {
    let mut bar = None;
    let mut tick = |done: usize, total: usize| {
        bar.get_or_insert_with(|| Progress::new(total as u64)).set(done as u64);
    };
    let result = evaluate(what, windows, &mut tick, None);
    if let Some(bar) = bar {
        bar.finish();
    }
    Ok(result?)
}

fn write(file: &Path, facts: &Facts) -> anyhow::Result<()> {
    replace(file, page::page(facts))
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).display().to_string()
}

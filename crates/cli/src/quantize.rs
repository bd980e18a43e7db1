//! `bitmill quantize`: a checkpoint in, a smaller one out.

use crate::how::{How, Reads, Ready, Source, is_gguf};
use crate::watch::{Reporter, stop_on_ctrl_c};
use crate::{Common, plan, report, units};
use anyhow::bail;
use bitmill_checkpoint::Checkpoint;
use bitmill_quantize::{Calibration, Finished, Plan, RunOptions};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Quantize a model folder
///
/// Reads MODEL (config.json, tokenizer, safetensors in F32, F16 or BF16), runs calibration text through it block by
/// block, rounds the linear layers of each block and writes OUT, a complete folder that transformers and vLLM load. OUT
/// appears under its name only when it is finished. A run that was killed is taken up by the same command at the last
/// block that was on disk and ends in the same bytes.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of the model, in Hugging Face layout, its name on the hub (org/model), or a GGUF file
    pub(crate) model: PathBuf,
    /// Folder to write, or a file whose name ends in .gguf; a log (OUT.log.jsonl) is written beside it
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    #[command(flatten)]
    how: How,
    /// Write no report (OUT.report.html), and measure nothing on held-out text for it
    #[arg(long)]
    no_report: bool,
    /// Print the plan (sizes, memory, what becomes of every tensor) and stop
    #[arg(long)]
    dry_run: bool,
    /// Replace OUT if it exists, and discard an unfinished run with other settings
    #[arg(long)]
    force: bool,
    /// Time between commits, at least: what a kill may cost besides the block in the making
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = units::parse_seconds)]
    commit_every: Duration,
    #[command(flatten)]
    pub(crate) common: Common,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.common.set_threads()?;
    let input = Checkpoint::open(&args.model)?;
    let reads = if args.dry_run { Reads::Given } else { Reads::Text };
    let ready = args.how.ready(&input, &args.output, args.common.stream_memory, reads)?;
    let (file, out) = (ready.plan.gguf.is_some(), args.output.display());
    if file != is_gguf(&args.output) {
        let why = if file {
            "a GGUF file is written; give it a name that ends in .gguf"
        } else {
            "only --format gguf writes a .gguf file"
        };
        bail!("{out}: {why}");
    }
    if args.dry_run {
        dry_run(args, &ready);
        return Ok(());
    }
    let Ready { plan, source } = ready;
    let text = match &source {
        Source::Text(text) => Some(text.name.as_str()),
        _ => None,
    };
    let calibration = match &source {
        Source::Text(text) => Some(Calibration::Text(&text.windows)),
        Source::Statistics(statistics) => Some(Calibration::Statistics(statistics)),
        Source::Importance(imatrix) => Some(Calibration::Importance(imatrix)),
        Source::Nothing => None,
    };
    let stop = stop_on_ctrl_c()?;
    let started = Instant::now();
    let mut progress = Reporter::new(plan.units.len() + usize::from(plan.settings.tuning.is_some()));
    let Args { force, commit_every, common: Common { stream_memory, .. }, .. } = *args;
    let options = RunOptions { force, stream_memory, stop: &stop, commit_every };
    if plan.memory_is_scarce() {
        bitmill_kernels::give_back_large_buffers();
    }
    let result = bitmill_quantize::run(&input, &plan, calibration, &args.output, options, &mut |e| progress.event(&e));
    progress.bar.finish();
    let finished = result.inspect_err(|_| {
        if stop.load(Ordering::Relaxed) {
            eprintln!("what is finished is kept; run the same command to go on");
        }
    })?;
    let seconds = started.elapsed().as_secs_f64();
    let held_out = match &source {
        Source::Text(text) => text.held_out.as_ref().map(|w| (text.name.as_str(), w)),
        _ => None,
    };
    let reported = match args.no_report {
        true => None,
        false => {
            let memory = args.common.stream_memory;
            Some(report::of_run(&finished.out, finished.manifest.clone(), &input, held_out, memory)?)
        }
    };
    print(args, &plan, text, &finished, (seconds, reported))
}

fn dry_run(args: &Args, ready: &Ready) {
    let memory = args.common.stream_memory;
    if args.common.json {
        let mut value = plan::report(&args.model, ready, memory);
        value["output"] = json!(args.output);
        println!("{value:#}");
    } else {
        print!("{}", plan::summary(&args.model, ready, memory));
    }
}

/// Prints the result: a report's file and divergence are there unless it was left out.
fn print(
    args: &Args,
    plan: &Plan,
    text: Option<&str>,
    done: &Finished,
    (seconds, reported): (f64, Option<(PathBuf, Option<f64>)>),
) -> anyhow::Result<()> {
    let (page, kl) = reported.map_or((None, None), |(page, kl)| (Some(page), kl));
    let (weights, payload) = plan.quantized_size();
    let input = folder_weights(&args.model);
    let mean = done.tensors.iter().map(|t| t.relative_error).sum::<f64>() / done.tensors.len().max(1) as f64;
    if args.common.json {
        let value = json!({
            "output": done.out, "log": done.log, "method": plan.settings.method, "format": plan.format.name(),
            "scheme": plan.settings.scheme, "calibration": text, "seconds": seconds, "input_bytes": input,
            "output_bytes": done.bytes, "quantized_weights": weights, "quantized_bytes": payload,
            "bits_per_weight": plan.bits_per_weight(), "mean_relative_error": mean, "peak_memory": units::peak_memory(),
            "tensors": done.tensors, "sites": done.sites, "stages": done.stages,
            "mixture": plan.mixture, "report": page, "held_out_kl": kl,
        });
        println!("{value:#}");
        return Ok(());
    }
    println!(
        "{}: {} in {} tensors at {:.3} bits per weight, {} ({}), mean relative error {mean:.2e}",
        done.out.display(),
        units::count(weights) + " weights",
        done.tensors.len(),
        plan.bits_per_weight(),
        plan.label(),
        plan.settings.method,
    );
    println!(
        "weights {} -> {} in {seconds:.1} s; what became of each tensor: {}",
        units::bytes(input),
        units::bytes(done.bytes),
        done.log.display()
    );
    if let Some(said) = crate::watch::starved(&done.sites) {
        println!("{said}");
    }
    if let Some(page) = page {
        let kl = kl.map_or(String::new(), |kl| format!("KL divergence on held-out text {kl:.5}; "));
        println!("{kl}report: {}", page.display());
    }
    Ok(())
}

/// Bytes of the safetensors files in a folder.
fn folder_weights(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let weights = entries.filter(|e| e.path().extension().is_some_and(|x| x == "safetensors"));
    weights.filter_map(|e| e.path().metadata().ok()).map(|m| m.len()).sum()
}

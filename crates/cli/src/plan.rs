//! `bitmill plan`: what a run would do, from headers alone, and as a file that people edit.

use crate::how::{How, Reads, Ready, Source};
use crate::{Common, effort, units};
use anyhow::{Context, ensure};
use bitmill_checkpoint::Checkpoint;
use bitmill_quantize::{Plan, loaders, write_plan};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Plan a quantization without running it
///
/// Reads config.json and tensor headers, takes the same flags as `quantize`, and prints what every kind of linear
/// becomes, the exact size of the output, the memory a run needs, and which loaders take the result. With -o it writes the
/// plan as TOML for `quantize --plan`. Only a mixture of widths (--size, --bits 3.5) reads weights: it is chosen by
/// statistics, so give those with --stats, or text is run through the model.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of the model, in Hugging Face layout, its name on the hub (org/model), or a GGUF file
    pub(crate) model: PathBuf,
    /// File to write the plan to
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    how: How,
    /// Replace FILE if it exists
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.common.set_threads()?;
    if let Some(file) = &args.output {
        ensure!(args.force || !file.exists(), "{} exists; choose another name or pass --force", file.display());
    }
    let input = Checkpoint::open(&args.model)?;
    let beside = args.output.clone().unwrap_or_else(|| PathBuf::from("plan.toml"));
    let memory = args.common.stream_memory;
    let ready = args.how.ready(&input, &beside, memory, Reads::Headers)?;
    let text = summary(&args.model, &ready, memory);
    if let Some(file) = &args.output {
        // The file is the same on every machine; the time is not.
        let lasting = text.lines().filter(|line| !line.starts_with("  time "));
        let remarks: Vec<String> = lasting.map(str::to_owned).collect();
        std::fs::write(file, write_plan(&ready.plan.settings, &remarks)?)
            .with_context(|| format!("writing {}", file.display()))?;
    }
    if args.common.json {
        let mut value = report(&args.model, &ready, memory);
        value["plan"] = json!(args.output);
        println!("{value:#}");
    } else {
        print!("{text}");
        if let Some(file) = &args.output {
            println!("run it with: bitmill quantize {} -o OUT --plan {}", args.model.display(), file.display());
        }
    }
    Ok(())
}

/// Windows and tokens per window that a run reads; without text there are none.
fn text((plan, source): (&Plan, &Source)) -> (usize, usize) {
    let settings = &plan.settings;
    let length = plan.spec.as_ref().map_or(0, |s| settings.sequence_length.min(s.max_positions));
    match source {
        Source::Text(text) => (text.windows.count(), text.windows.length),
        Source::Statistics(_) | Source::Importance(_) => (0, 0),
        Source::Nothing => (settings.samples, length),
    }
}

/// Peak memory with `stream_memory` bytes of activations at most.
fn memory(Ready { plan, source }: &Ready, stream_memory: u64) -> u64 {
    let (windows, length) = text((plan, source));
    plan.peak_memory((windows * length) as u64, stream_memory)
}

/// Seconds that the run is expected to take here.
fn seconds(Ready { plan, source }: &Ready) -> f64 {
    let (windows, length) = text((plan, source));
    effort::seconds(plan, windows as u64, (windows * length) as u64)
}

/// The plan of `model` for people.
pub(crate) fn summary(model: &Path, ready: &Ready, stream_memory: u64) -> String {
    let Ready { plan, .. } = ready;
    let (weights, payload) = plan.quantized_size();
    let total = plan.output.total_bytes();
    let mut text =
        format!("{}: {} by {}, stored as {}\n", name(model), plan.label(), plan.method.name(), plan.format.name());
    for ((role, scheme), row) in plan.kinds() {
        let (bits, tensors, bytes) = (row.bits_per_weight(), row.tensors, units::bytes(row.bytes));
        text += &format!("  {role:<12} {scheme:<16} {tensors:>4} tensors  {bits:>6.3} bits per weight  {bytes:>9}\n");
    }
    text +=
        &format!("  quantized    {} weights at {:.4} bits per weight\n", units::count(weights), plan.bits_per_weight());
    text += &format!("  payload      {payload} bytes ({})\n", units::bytes(payload));
    text += &format!(
        "  output       {total} bytes ({}), in {} file(s)\n",
        units::bytes(total),
        plan.output.files().count()
    );
    text += &format!("  peak memory  about {}\n", units::bytes(memory(ready, stream_memory)));
    let threads = rayon::current_num_threads();
    text += &format!("  time         about {} on {threads} threads of this machine\n", effort::span(seconds(ready)));
    if let Some(predicted) = plan.mixture.as_ref().map(|m| m.predicted) {
        text += &format!("  predicted    KL divergence {predicted:.5} nats per position\n");
    }
    text += &format!("  recommended  {} by a rule of thumb for its size\n", effort::recommended(plan.parameters));
    for (loader, reasons) in loaders(plan) {
        let verdict = if reasons.is_empty() { "takes it".to_owned() } else { format!("no: {}", reasons.join("; ")) };
        text += &format!("  {loader:<12} {verdict}\n");
    }
    text
}

/// The plan of `model` for programs.
pub(crate) fn report(model: &Path, ready: &Ready, stream_memory: u64) -> serde_json::Value {
    let Ready { plan, source } = ready;
    let (weights, payload) = plan.quantized_size();
    let rows = plan.kinds().into_iter().map(|((role, scheme), row)| {
        json!({"role": role, "scheme": scheme, "tensors": row.tensors, "weights": row.weights, "bytes": row.bytes})
    });
    let loaders = loaders(plan).into_iter().map(|(name, reasons)| json!({"loader": name, "refuses": reasons}));
    let tensors = plan.quantized().map(|(m, s, shape)| json!({"tensor": m, "scheme": s.to_string(), "shape": shape}));
    let files = plan.output.files().map(|(f, b)| json!({"file": f, "bytes": b}));
    let text = match source {
        Source::Text(text) => Some(&text.name),
        _ => None,
    };
    json!({
        "model": model, "method": plan.method.name(), "format": plan.format.name(),
        "roles": rows.collect::<Vec<_>>(), "tensors": tensors.collect::<Vec<_>>(), "files": files.collect::<Vec<_>>(), "calibration": text,
        "quantized_weights": weights, "quantized_bytes": payload,
        "bits_per_weight": plan.bits_per_weight(), "output_bytes": plan.output.total_bytes(),
        "seconds_estimate": seconds(ready), "recommended": effort::recommended(plan.parameters),
        "peak_memory_estimate": memory(ready, stream_memory), "predicted_kl": plan.mixture.as_ref().map(|m| m.predicted), "mixture": plan.mixture,
        "loaders": loaders.collect::<Vec<_>>(), "notes": plan.notes,
    })
}

fn name(model: &Path) -> String {
    model.file_name().unwrap_or(model.as_os_str()).display().to_string()
}

//! `bitmill quantize`: a checkpoint in, a smaller one out.

use crate::progress::Progress;
use crate::{Common, units};
use anyhow::{Context, bail};
use bitmill_calibrate::{BUNDLED_TEXT, Sentences, Tokenizer, Windows, read_texts};
use bitmill_checkpoint::{Checkpoint, FORMATS};
use bitmill_models::SITES;
use bitmill_quantize::{Event, Finished, METHODS, Plan, RunOptions, ScaleSearch, Settings, SolverOptions};
use bitmill_scheme::{Activations, Bits, Granularity, SCHEMES, ScaleType, Scheme};
use clap::builder::PossibleValuesParser;
use clap::{ArgAction, ValueEnum};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Quantize a model folder
///
/// Reads MODEL (config.json, tokenizer, safetensors in F32, F16 or BF16), runs calibration text through it block by
/// block, rounds the linear layers of each block and writes OUT, a complete folder that transformers and vLLM load. OUT
/// appears under its name only when it is finished. A run that was killed is taken up by the same command at the last
/// finished block and ends in the same bytes.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of the model, in Hugging Face layout
    model: PathBuf,
    /// Folder to write; a log (OUT.log.jsonl) is written beside it
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// A named scheme [default: w4a16]
    #[arg(long, value_name = "NAME", value_parser = preset_names(), hide_possible_values = true,
          conflicts_with_all = ["bits", "group_size", "asymmetric"], long_help = scheme_help())]
    scheme: Option<String>,
    /// Bits per weight, 2 to 8 [default: 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=8))]
    bits: Option<u32>,
    /// Inputs that share one scale; -1 is one scale per output row, 0 one per tensor [default: 128]
    #[arg(long, value_name = "G", allow_negative_numbers = true, value_parser = clap::value_parser!(i64).range(-1..))]
    group_size: Option<i64>,
    /// Store a zero point per group
    #[arg(long)]
    asymmetric: bool,
    /// How weights are rounded
    #[arg(long, default_value = "gptq", value_parser = method_names(), hide_possible_values = true, long_help = method_help())]
    method: String,
    /// How the result is stored [default: what compressed-tensors uses for the scheme]
    #[arg(long, value_name = "FORMAT", value_parser = format_names(), hide_possible_values = true, long_help = format_help())]
    format: Option<String>,
    /// Number type of the stored scales [default: the model's own, or f16 for f32 models and for GPTQ files]
    #[arg(long, value_enum, value_name = "TYPE")]
    scale_type: Option<Scales>,
    /// How the scale of a group is chosen [default: hessian for gptq, minmax for rtn]
    #[arg(long, value_enum, value_name = "SEARCH")]
    scale_search: Option<Search>,
    /// Share of its mean diagonal added to each Hessian
    #[arg(long, default_value_t = SolverOptions::default().damping, value_parser = parse_damping)]
    damping: f32,
    /// Round columns as they lie instead of most important first
    #[arg(long)]
    no_act_order: bool,
    /// Passes of coordinate descent over the codes after gptq
    #[arg(long, value_name = "N", default_value_t = SolverOptions::default().descent_sweeps)]
    descent_sweeps: u32,
    /// Times gptq refits the scales to the codes
    #[arg(long, value_name = "N", default_value_t = SolverOptions::default().scale_refits)]
    scale_refits: u32,
    /// Calibration text; by default MODEL/calibration.txt, or else a text that comes with bitmill
    #[arg(long, value_name = "FILE", num_args = 1..)]
    calibration: Vec<PathBuf>,
    /// Calibration windows; of an encoder, sentences [default: 128, or 2048 sentences]
    #[arg(long, value_name = "N", value_parser = parse_positive)]
    samples: Option<usize>,
    /// Tokens per window, or at most per sentence; shortened to the model's context
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = parse_positive)]
    sequence_length: usize,
    /// Regular expression of module names to leave as they are, matched from the start of the name
    #[arg(long, value_name = "REGEX", action = ArgAction::Append, num_args = 1..)]
    ignore: Vec<String>,
    /// Moves the calibration windows; 0 spaces them evenly
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Largest size of one weight file
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = units::parse_bytes)]
    max_shard_size: u64,
    /// Print the plan (sizes, memory, what becomes of every tensor) and stop
    #[arg(long)]
    dry_run: bool,
    /// Replace OUT if it exists, and discard an unfinished run with other settings
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Search {
    /// Cover smallest to largest weight
    Minmax,
    /// Shrink the range for the smallest mean error
    Mse,
    /// Weigh the errors by the importance of each input (runs calibration)
    Hessian,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Scales {
    /// Half precision
    F16,
    /// bfloat16
    Bf16,
    /// Single precision
    F32,
}

fn preset_names() -> PossibleValuesParser {
    PossibleValuesParser::new(SCHEMES.iter().map(|p| p.name))
}

fn method_names() -> PossibleValuesParser {
    PossibleValuesParser::new(METHODS.iter().map(|m| m.name()))
}

fn format_names() -> PossibleValuesParser {
    PossibleValuesParser::new(FORMATS.iter().map(|f| f.name()))
}

fn table(head: &str, rows: impl Iterator<Item = (&'static str, &'static str)>) -> String {
    rows.fold(head.to_owned(), |text, (name, summary)| format!("{text}\n  {name:<16} {summary}"))
}

fn scheme_help() -> String {
    table("A named scheme [default: w4a16]:", SCHEMES.iter().map(|p| (p.name, p.summary)))
}

fn method_help() -> String {
    table("How weights are rounded:", METHODS.iter().map(|m| (m.name(), m.summary())))
}

fn format_help() -> String {
    table(
        "How the result is stored [default: pack-quantized, or int-quantized where activations are quantized too]:",
        FORMATS.iter().map(|f| (f.name(), f.summary())),
    )
}

fn parse_positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| format!("`{text}` is not a positive number"))
}

fn parse_damping(text: &str) -> Result<f32, String> {
    let valid = |d: &f32| (0.0..=1.0).contains(d);
    text.parse().ok().filter(valid).ok_or_else(|| format!("`{text}` is not a number from 0 to 1"))
}

impl Args {
    fn scheme(&self) -> anyhow::Result<Scheme> {
        if let Some(name) = &self.scheme {
            let preset = SCHEMES.iter().find(|p| p.name == name).context("no such scheme")?;
            return Ok(preset.scheme);
        }
        let granularity = match self.group_size.unwrap_or(128) {
            -1 => Granularity::Channel,
            0 => Granularity::Tensor,
            g => Granularity::Group(usize::try_from(g)?),
        };
        Ok(Scheme::int(Bits::new(self.bits.unwrap_or(4))?, !self.asymmetric, granularity))
    }

    fn settings(&self, input: &Checkpoint) -> anyhow::Result<Settings> {
        // A sentence is a tenth or less of a window, and a Hessian needs several times as many tokens as it has rows.
        let sentences = bitmill_models::spec(input.config()).is_ok_and(|spec| !spec.causal);
        let scheme = self.scheme()?;
        let default_format = match scheme.activations {
            Activations::Full => "pack-quantized",
            Activations::DynamicInt8 => "int-quantized",
        };
        Ok(Settings {
            method: self.method.clone(),
            format: self.format.clone().unwrap_or_else(|| default_format.into()),
            scheme,
            scale_type: self.scale_type.map(|t| match t {
                Scales::F16 => ScaleType::F16,
                Scales::Bf16 => ScaleType::Bf16,
                Scales::F32 => ScaleType::F32,
            }),
            solver: SolverOptions {
                scale_search: self.scale_search.map(|s| match s {
                    Search::Minmax => ScaleSearch::MinMax,
                    Search::Mse => ScaleSearch::Mse,
                    Search::Hessian => ScaleSearch::Hessian,
                }),
                damping: self.damping,
                act_order: !self.no_act_order,
                descent_sweeps: self.descent_sweeps,
                scale_refits: self.scale_refits,
            },
            ignore: self.ignore.clone(),
            samples: self.samples.unwrap_or(if sentences { 2048 } else { 128 }),
            sequence_length: self.sequence_length,
            seed: self.seed,
            shard_bytes: self.max_shard_size,
        })
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.common.set_threads()?;
    let input = Checkpoint::open(&args.model)?;
    let plan = Plan::new(&input, &args.settings(&input)?)?;
    for note in &plan.notes {
        eprintln!("note: {note}");
    }
    let calibration = if plan.calibrated { Some(calibration(args, &input, &plan)?) } else { None };
    let text = calibration.as_ref().map(|c| c.0.as_str());
    let windows = calibration.as_ref().map(|c| &c.1);
    if let (Some(text), Some(w)) = (text, windows) {
        eprintln!("calibrating on {} from {text}", amount(w));
    } else if !args.calibration.is_empty() {
        eprintln!("note: method {} needs no calibration; the text given is not used", args.method);
    }
    if args.dry_run {
        return dry_run(args, &plan, text, windows);
    }
    let stop = stop_on_ctrl_c()?;
    let started = Instant::now();
    let mut progress = Reporter::new(plan.units.len());
    let options = RunOptions { force: args.force, stream_memory: args.common.stream_memory, stop: &stop };
    let result = bitmill_quantize::run(&input, &plan, windows, &args.output, options, &mut |e| progress.event(&e));
    progress.bar.finish();
    let finished = result.inspect_err(|_| {
        if stop.load(Ordering::Relaxed) {
            eprintln!("what is finished is kept; run the same command to go on");
        }
    })?;
    report(args, &plan, text, &finished, started.elapsed().as_secs_f64())
}

/// The calibration text's name and its windows.
fn calibration(args: &Args, input: &Checkpoint, plan: &Plan) -> anyhow::Result<(String, Windows)> {
    let Some(spec) = &plan.spec else { bail!("no forward pass for this architecture") };
    let beside = args.model.join("calibration.txt");
    let (name, texts) = if !args.calibration.is_empty() {
        let texts = read_texts(&args.calibration)?;
        (texts.iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>().join(", "), texts)
    } else if beside.is_file() {
        (beside.display().to_string(), read_texts(&[beside])?)
    } else {
        let name = "the text that comes with bitmill (give --calibration FILE for text of the model's own use)";
        (name.to_owned(), vec![("the bundled text".to_owned(), BUNDLED_TEXT.to_owned())])
    };
    let tokenizer = Tokenizer::open(input.dir(), spec.bos)?;
    let Settings { samples, sequence_length, seed, .. } = plan.settings;
    let length = sequence_length.min(spec.max_positions);
    let windows = match spec.causal {
        true => Windows::from_texts(&texts, &tokenizer, spec.vocab, length, samples, seed)?,
        false => {
            // Positions that the model's own pipeline never reaches would only dilute the statistics.
            let limit = Sentences::limit(input.dir())?.unwrap_or(length).min(length);
            Windows::sentences(&texts, &tokenizer, spec.vocab, limit, samples, seed)?
        }
    };
    // By default an encoder takes what the text has; a number that was asked for and missed is worth a note.
    if windows.count() < samples && (spec.causal || args.samples.is_some()) {
        eprintln!("note: {name} holds {}, not {samples}", amount(&windows));
    }
    Ok((name, windows))
}

/// How much text `windows` are.
fn amount(windows: &Windows) -> String {
    match windows.tokens.iter().all(|t| t.len() == windows.length) {
        true => format!("{} windows of {} tokens", windows.count(), windows.length),
        false => {
            format!("{} sentences of up to {} tokens, {} in all", windows.count(), windows.length, windows.text_tokens)
        }
    }
}

/// The first Ctrl-C asks for a clean stop, the second ends the process; neither loses what is finished.
fn stop_on_ctrl_c() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("\nstopping at the next clean point; press Ctrl-C again to end at once");
    })?;
    Ok(stop)
}

/// Turns the events of a run into progress.
struct Reporter {
    bar: Progress,
    unit: u64,
    label: String,
    errors: Vec<f64>,
}

/// Steps of the bar per unit: its sites.
const STEPS: u64 = SITES.len() as u64;

impl Reporter {
    fn new(units: usize) -> Self {
        Reporter { bar: Progress::new(units as u64 * STEPS), unit: 0, label: String::new(), errors: Vec::new() }
    }

    fn event(&mut self, event: &Event<'_>) {
        match event {
            Event::Checking => self.bar.message("checking weights for NaN and infinity".into()),
            Event::Resumed { done, total } => {
                self.bar.skip(*done as u64 * STEPS);
                self.bar.line(&format!("taking up an unfinished run: {done} of {total} steps are done"));
            }
            Event::Started { unit, label, .. } => {
                self.unit = *unit as u64;
                self.label = (*label).to_owned();
                self.errors.clear();
                self.bar.message(self.label.clone());
            }
            Event::Site { name } => {
                let step = SITES.iter().position(|s| s.name == *name).unwrap_or(0) as u64;
                self.bar.set(self.unit * STEPS + step);
                self.bar.message(format!("{} {name}", self.label));
            }
            Event::Tensor(record) => {
                self.errors.push(record.relative_error);
                let name = record.tensor.rsplit('.').next().unwrap_or(&record.tensor);
                self.bar.message(format!("{} {name}: relative error {:.2e}", self.label, record.relative_error));
            }
            Event::Committed { done, .. } => {
                self.bar.set(*done as u64 * STEPS);
                if !self.errors.is_empty() {
                    let mean = self.errors.iter().sum::<f64>() / self.errors.len() as f64;
                    self.bar.plain_line(&format!("{}: mean relative error {mean:.3e}", self.label));
                }
            }
            _ => {}
        }
    }
}

fn dry_run(args: &Args, plan: &Plan, text: Option<&str>, windows: Option<&Windows>) -> anyhow::Result<()> {
    let (weights, payload) = plan.quantized_size();
    let total = plan.output.total_bytes();
    let memory = plan.peak_memory(stream_bytes(args, plan, windows));
    if args.common.json {
        let tensors: Vec<_> = plan
            .quantized()
            .map(|(m, s, shape)| json!({"tensor": m, "scheme": s.to_string(), "shape": shape}))
            .collect();
        let value = json!({
            "model": args.model, "output": args.output, "method": plan.settings.method, "format": plan.format.name(),
            "quantized_weights": weights, "quantized_bytes": payload, "bits_per_weight": plan.bits_per_weight(),
            "output_bytes": total, "peak_memory_estimate": memory, "calibration": text, "tensors": tensors,
            "files": plan.output.files().map(|(f, b)| json!({"file": f, "bytes": b})).collect::<Vec<_>>(),
            "notes": plan.notes,
        });
        println!("{value:#}");
        return Ok(());
    }
    println!("plan for {} -> {}", args.model.display(), args.output.display());
    println!(
        "  scheme            {} by {}, stored as {}",
        plan.settings.scheme,
        plan.settings.method,
        plan.format.name()
    );
    println!("  quantized         {} weights in {} tensors", units::count(weights), plan.quantized().count());
    println!("  bits per weight   {:.4} ({} of payload)", plan.bits_per_weight(), units::bytes(payload));
    println!("  output            {total} bytes ({}) in {} file(s)", units::bytes(total), plan.output.files().count());
    println!("  peak memory       about {}", units::bytes(memory));
    for (module, scheme, shape) in plan.quantized() {
        println!("  {scheme}  {shape:?}  {module}");
    }
    Ok(())
}

/// Bytes of activations that will be in memory.
fn stream_bytes(args: &Args, plan: &Plan, windows: Option<&Windows>) -> u64 {
    let (Some(spec), Some(w)) = (&plan.spec, windows) else { return 0 };
    let widths = spec.hidden + 2 * spec.intermediate.max(spec.heads * spec.head_dim);
    let tokens: usize = w.tokens.iter().map(Vec::len).sum();
    ((tokens * widths * 2) as u64).min(args.common.stream_memory)
}

fn report(args: &Args, plan: &Plan, text: Option<&str>, done: &Finished, seconds: f64) -> anyhow::Result<()> {
    let (weights, payload) = plan.quantized_size();
    let input = folder_weights(&args.model);
    let mean = done.tensors.iter().map(|t| t.relative_error).sum::<f64>() / done.tensors.len().max(1) as f64;
    if args.common.json {
        let value = json!({
            "output": done.out, "log": done.log, "method": plan.settings.method, "format": plan.format.name(),
            "scheme": plan.settings.scheme, "calibration": text, "seconds": seconds, "input_bytes": input,
            "output_bytes": done.bytes, "quantized_weights": weights, "quantized_bytes": payload,
            "bits_per_weight": plan.bits_per_weight(), "mean_relative_error": mean, "tensors": done.tensors,
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
        plan.settings.scheme,
        plan.settings.method,
    );
    println!(
        "weights {} -> {} in {seconds:.1} s; what became of each tensor: {}",
        units::bytes(input),
        units::bytes(done.bytes),
        done.log.display()
    );
    Ok(())
}

/// Bytes of the safetensors files in a folder.
fn folder_weights(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let weights = entries.filter(|e| e.path().extension().is_some_and(|x| x == "safetensors"));
    weights.filter_map(|e| e.path().metadata().ok()).map(|m| m.len()).sum()
}

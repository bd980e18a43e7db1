//! `bitmill quantize`: a checkpoint in, a smaller one out.

use crate::effort::Effort;
use crate::goal::GoalArgs;
use crate::mixed::{self, MixtureArgs, Width};
use crate::progress::Progress;
use crate::text::{Text, TextArgs};
use crate::{Common, effort, plan, units};
use anyhow::{Context, bail};
use bitmill_calibrate::{Pass, Statistics, Windows};
use bitmill_checkpoint::{Checkpoint, FORMATS, GGUF};
use bitmill_models::SITES;
use bitmill_quantize::{
    Calibration, Event, Finished, GgufSettings, METHODS, Plan, RunOptions, ScaleSearch, Settings, SolverOptions,
    StageRecord, TRANSFORMS, gguf_types, read_plan,
};
use bitmill_scheme::{Activations, BLOCKS, Bits, Granularity, SCHEMES, ScaleType, Scheme};
use clap::builder::PossibleValuesParser;
use clap::{ArgAction, ValueEnum};
use serde_json::json;
use std::collections::BTreeMap;
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
    /// Folder to write, or a file whose name ends in .gguf; a log (OUT.log.jsonl) is written beside it
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    #[command(flatten)]
    how: How,
    /// Print the plan (sizes, memory, what becomes of every tensor) and stop
    #[arg(long)]
    dry_run: bool,
    /// Replace OUT if it exists, and discard an unfinished run with other settings
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    common: Common,
}

/// What decides the bytes of an output.
#[derive(Debug, clap::Args)]
pub(crate) struct How {
    /// A plan file in place of the flags that say how: `bitmill plan` writes one, people edit it
    #[arg(long, value_name = "FILE", conflicts_with_all = ["scheme", "bits", "group_size", "asymmetric", "effort", "method", "tuning_passes",
          "transforms", "format", "scale_type", "scale_search", "damping", "no_act_order", "descent_sweeps", "scale_refits", "samples",
          "soft_rounding", "target_shift", "token_weights", "full_share", "correct_biases", "damping_search",
          "sequence_length", "seed", "size", "options", "least", "ignore", "max_shard_size"])]
    plan: Option<PathBuf>,
    /// A named scheme [default: w4a16]
    #[arg(long, value_name = "NAME", value_parser = preset_names(), hide_possible_values = true,
          conflicts_with_all = ["bits", "group_size", "asymmetric"], long_help = scheme_help())]
    scheme: Option<String>,
    /// Bits per weight: 2 to 8 for every tensor, or with a point (3.5, 4.0) a mean that tensors of different widths
    /// meet, scales included [default: 4]
    #[arg(long, value_name = "N", value_parser = mixed::parse_width)]
    bits: Option<Width>,
    /// Inputs that share one scale; -1 is one scale per output row, 0 one per tensor [default: 128]
    #[arg(long, value_name = "G", allow_negative_numbers = true, value_parser = clap::value_parser!(i64).range(-1..))]
    group_size: Option<i64>,
    /// Store a zero point per group
    #[arg(long)]
    asymmetric: bool,
    /// How much work to put in
    #[arg(long, value_enum, value_name = "LEVEL", default_value = "balanced")]
    effort: Effort,
    /// How weights are rounded [default: what the effort says]
    #[arg(long, value_name = "NAME", value_parser = method_names(), hide_possible_values = true, long_help = method_help())]
    method: Option<String>,
    /// Passes over the calibration text in which codes, scales and norms of the whole model are tuned against the
    /// full-precision logits, after gptq; 0 leaves it out [default: what the effort says]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=1000))]
    tuning_passes: Option<u32>,
    /// What is done to the weights before they are rounded; the model's function stays as it is [default: nothing]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', value_parser = transform_names(), hide_possible_values = true,
          long_help = transform_help())]
    transforms: Vec<String>,
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
    #[command(flatten)]
    goal: GoalArgs,
    #[command(flatten)]
    text: TextArgs,
    #[command(flatten)]
    mixed: MixtureArgs,
    /// Regular expression of module names to leave as they are, matched from the start of the name
    #[arg(long, value_name = "REGEX", action = ArgAction::Append, num_args = 1..)]
    ignore: Vec<String>,
    /// Type of the token embedding in a GGUF file
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = tensor_types(), hide_possible_values = true)]
    token_embedding_type: String,
    /// Type of the output matrix in a GGUF file, and of an embedding that is tied to it
    #[arg(long, value_name = "TYPE", default_value = "f16", value_parser = tensor_types(), hide_possible_values = true)]
    output_tensor_type: String,
    /// Largest size of one weight file
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = units::parse_bytes)]
    max_shard_size: u64,
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
    PossibleValuesParser::new(SCHEMES.iter().map(|p| p.name).chain(BLOCKS.iter().map(|b| b.name)))
}

fn tensor_types() -> PossibleValuesParser {
    PossibleValuesParser::new(gguf_types())
}

fn method_names() -> PossibleValuesParser {
    PossibleValuesParser::new(METHODS.iter().map(|m| m.name()))
}

fn transform_names() -> PossibleValuesParser {
    PossibleValuesParser::new(TRANSFORMS.iter().map(|t| t.name()))
}

fn transform_help() -> String {
    table(
        "What is done to the weights before they are rounded, without changing the model's function [default: nothing]:",
        TRANSFORMS.iter().map(|t| (t.name(), t.summary())),
    )
}

fn format_names() -> PossibleValuesParser {
    PossibleValuesParser::new(FORMATS.iter().chain([&GGUF]).map(|f| f.name()))
}

fn table(head: &str, rows: impl Iterator<Item = (&'static str, &'static str)>) -> String {
    rows.fold(head.to_owned(), |text, (name, summary)| format!("{text}\n  {name:<16} {summary}"))
}

fn scheme_help() -> String {
    table(
        "A named scheme [default: w4a16]:",
        SCHEMES.iter().map(|p| (p.name, p.summary)).chain(BLOCKS.iter().map(|b| (b.name, b.summary))),
    )
}

fn method_help() -> String {
    table("How weights are rounded:", METHODS.iter().map(|m| (m.name(), m.summary())))
}

fn format_help() -> String {
    table(
        "How the result is stored [default: pack-quantized, or int-quantized where activations are quantized too]:",
        FORMATS.iter().chain([&GGUF]).map(|f| (f.name(), f.summary())),
    )
}

fn parse_damping(text: &str) -> Result<f32, String> {
    let valid = |d: &f32| (0.0..=1.0).contains(d);
    text.parse().ok().filter(valid).ok_or_else(|| format!("`{text}` is not a number from 0 to 1"))
}

impl How {
    fn scheme(&self) -> anyhow::Result<Scheme> {
        if let Some(name) = &self.scheme {
            return bitmill_scheme::scheme(name).context("no such scheme");
        }
        let granularity = match self.group_size.unwrap_or(128) {
            -1 => Granularity::Channel,
            0 => Granularity::Tensor,
            g => Granularity::Group(usize::try_from(g)?),
        };
        let bits = match self.bits {
            Some(Width::Uniform(bits)) => bits,
            // Of a mixture this scheme gives all but the widths.
            Some(Width::Mean(_)) | None => 4,
        };
        Ok(Scheme::int(Bits::new(bits)?, !self.asymmetric, granularity))
    }

    /// The settings of the flags, or of the plan file for `input`.
    /// `named_gguf` says whether the output is named as a GGUF file.
    pub(crate) fn settings(&self, input: &Checkpoint, named_gguf: bool) -> anyhow::Result<Settings> {
        let flags = self.flags(input, named_gguf)?;
        match &self.plan {
            Some(file) => Ok(read_plan(file, input, &flags)?),
            None => Ok(flags),
        }
    }

    fn flags(&self, input: &Checkpoint, named_gguf: bool) -> anyhow::Result<Settings> {
        let scheme = self.scheme()?;
        let method = self.method.clone().unwrap_or_else(|| self.effort.method(&scheme).into());
        let default_format = match scheme.activations {
            _ if named_gguf || scheme.form().is_some() => GGUF.name(),
            Activations::Full => "pack-quantized",
            Activations::DynamicInt8 => "int-quantized",
        };
        let format = self.format.clone().unwrap_or_else(|| default_format.into());
        if let (Some(form), true) = (scheme.form(), format != GGUF.name()) {
            bail!("{} is a type of GGUF, which --format {format} cannot store; leave --format out", form.name);
        }
        let as_gguf = format == GGUF.name();
        // Statistics stand in for text, and tuning reads text; it moves integer codes.
        let passes = self.tuning_passes.or((as_gguf || !self.mixed.stats.is_empty()).then_some(0));
        Ok(Settings {
            tuning: self.effort.tuning(&method, &scheme, passes),
            transforms: self.transforms.clone(),
            method,
            format,
            scheme,
            layers: BTreeMap::new(),
            scale_type: self.scale_type.map(|t| match t {
                Scales::F16 => ScaleType::F16,
                Scales::Bf16 => ScaleType::Bf16,
                Scales::F32 => ScaleType::F32,
            }),
            solver: SolverOptions {
                scale_search: self
                    .scale_search
                    .map(|s| match s {
                        Search::Minmax => ScaleSearch::MinMax,
                        Search::Mse => ScaleSearch::Mse,
                        Search::Hessian => ScaleSearch::Hessian,
                    })
                    .or_else(|| self.effort.scale_search()),
                damping: self.damping,
                shrinkage: 0.0,
                act_order: !self.no_act_order,
                descent_sweeps: self.descent_sweeps,
                scale_refits: self.scale_refits,
                soft: self.goal.soft(),
            },
            observation: self.goal.observation(),
            ignore: self.ignore.clone(),
            samples: self.text.samples(input),
            sequence_length: self.text.sequence_length,
            seed: self.text.seed,
            gguf: as_gguf.then(|| GgufSettings {
                token_embedding: self.token_embedding_type.clone(),
                output: self.output_tensor_type.clone(),
            }),
            shard_bytes: self.max_shard_size,
        })
    }
}

/// A plan, and what its method learns about activations from.
pub(crate) struct Ready {
    pub(crate) plan: Plan,
    pub(crate) source: Source,
    /// What the mixture is predicted to lose, where one was chosen.
    pub(crate) predicted: Option<f64>,
}

/// How far [`How::ready`] goes where no mixture has to be chosen.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Reads {
    /// Headers are enough.
    Headers,
    /// The method's text or statistics are opened.
    Text,
}

impl How {
    /// Plans the output `beside` which statistics for a mixture are kept.
    pub(crate) fn ready(
        &self,
        input: &Checkpoint,
        beside: &Path,
        stream_memory: u64,
        reads: Reads,
    ) -> anyhow::Result<Ready> {
        let mut settings = self.settings(input, is_gguf(beside))?;
        let mut plan = Plan::new(input, &settings)?;
        if let (None, None, Some(why)) = (&self.plan, self.tuning_passes, self.effort.too_large(&plan)) {
            settings.tuning = None;
            plan = Plan::new(input, &settings)?;
            plan.notes.push(why);
        }
        plan.notes.iter().for_each(|note| eprintln!("note: {note}"));
        let budget = self.mixed.budget(self.bits)?;
        let source = match (reads, budget) {
            (Reads::Headers, None) => Source::Nothing,
            _ => Source::open(self, input, &plan)?,
        };
        let Some(budget) = budget else {
            return Ok(Ready { plan, source, predicted: None });
        };
        let collected = match &source {
            Source::Text(text) => Some(collect(beside, stream_memory, input, &plan, text)?),
            _ => None,
        };
        let statistics = match (&source, &collected) {
            (Source::Statistics(statistics), _) | (_, Some(statistics)) => statistics,
            _ => anyhow::bail!("a mixture needs text or statistics"),
        };
        let mixture = self.mixed.mixture(input, &plan, statistics, budget)?;
        let plan = Plan::new(input, &mixture.settings(&plan.settings))?;
        Ok(Ready { plan, source, predicted: Some(mixture.predicted) })
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.common.set_threads()?;
    let input = Checkpoint::open(&args.model)?;
    let ready = args.how.ready(&input, &args.output, args.common.stream_memory, Reads::Text)?;
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
    let Ready { plan, source, .. } = ready;
    let text = match &source {
        Source::Text(text) => Some(text.name.as_str()),
        _ => None,
    };
    let calibration = match &source {
        Source::Text(text) => Some(Calibration::Text(&text.windows)),
        Source::Statistics(statistics) => Some(Calibration::Statistics(statistics)),
        Source::Nothing => None,
    };
    let stop = stop_on_ctrl_c()?;
    let started = Instant::now();
    let mut progress = Reporter::new(plan.units.len() + usize::from(plan.settings.tuning.is_some()));
    let options = RunOptions { force: args.force, stream_memory: args.common.stream_memory, stop: &stop };
    let result = bitmill_quantize::run(&input, &plan, calibration, &args.output, options, &mut |e| progress.event(&e));
    progress.bar.finish();
    let finished = result.inspect_err(|_| {
        if stop.load(Ordering::Relaxed) {
            eprintln!("what is finished is kept; run the same command to go on");
        }
    })?;
    report(args, &plan, text, &finished, started.elapsed().as_secs_f64())
}

/// What tells the method about activations.
pub(crate) enum Source {
    Text(Text),
    Statistics(Statistics),
    Nothing,
}

impl Source {
    fn open(how: &How, input: &Checkpoint, plan: &Plan) -> anyhow::Result<Source> {
        if let Some(statistics) = how.mixed.statistics(input, plan)? {
            if !how.text.calibration.is_empty() {
                anyhow::bail!("--stats stands in for text; leave out either --stats or --calibration");
            }
            return Ok(Source::Statistics(statistics));
        }
        if !plan.calibrated && how.mixed.budget(how.bits)?.is_none() {
            if !how.text.calibration.is_empty() {
                let method = plan.method.name();
                eprintln!("note: method {method} needs no calibration; the text given is not used");
            }
            return Ok(Source::Nothing);
        }
        let spec = plan.spec.as_ref().context("a mixture needs a forward pass, and this architecture has none here")?;
        let (samples, length, seed) = (plan.settings.samples, plan.settings.sequence_length, plan.settings.seed);
        let text = how.text.windows(input, spec, (samples, length, seed))?;
        eprintln!("calibrating on {} from {}", amount(&text.windows), text.name);
        if let Some(cost) = effort::expected(plan, &text.windows) {
            eprintln!("{cost}");
        }
        Ok(Source::Text(text))
    }
}

/// Statistics of the text beside the output, by which a mixture is chosen.
fn collect(
    beside: &Path,
    stream_memory: u64,
    input: &Checkpoint,
    plan: &Plan,
    text: &Text,
) -> anyhow::Result<Statistics> {
    let spec = plan.spec.as_ref().context("statistics need an architecture with a forward pass")?;
    anyhow::ensure!(spec.causal, "mixtures are chosen by what predictions of tokens lose, and an encoder makes none");
    let spill_dir = beside.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(spill_dir).with_context(|| format!("creating {}", spill_dir.display()))?;
    let pass = Pass { model: input, spec, stream_memory, spill_dir };
    mixed::collect_beside(beside, pass, &text.windows)
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
            Event::Transforming { done, total } => {
                self.bar.message(format!("transforming the weights: step {done} of {total}"));
            }
            Event::Tuning { done, total, held_out } => {
                self.bar.set(self.unit * STEPS + (*done as u64 * STEPS) / (*total).max(1) as u64);
                let (last, before) = held_out;
                self.bar.message(format!("tuning step {done}/{total}: held-out loss {before:.5} -> {last:.5}"));
            }
            Event::Stage(stage) => self.bar.line(&tuned(stage)),
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

/// What a stage brought, in one line.
fn tuned(stage: &StageRecord) -> String {
    let StageRecord { stage: name, loss, held_out_windows: windows, before, after, kept_pass, .. } = stage;
    if *windows == 0 {
        return format!("{name}: {loss} {before:.4e} -> {after:.4e}");
    }
    let kept = if *kept_pass == 0 { "dropped".to_owned() } else { format!("pass {kept_pass} kept") };
    format!("{name}: {loss} on {windows} held-out windows {before:.5} -> {after:.5}, {kept}")
}

/// Whether `path` is named as a GGUF file.
fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == GGUF.name())
}

/// How much text `windows` are.
pub(crate) fn amount(windows: &Windows) -> String {
    match windows.tokens.iter().all(|t| t.len() == windows.length) {
        true => format!("{} windows of {} tokens", windows.count(), windows.length),
        false => {
            format!("{} sentences of up to {} tokens, {} in all", windows.count(), windows.length, windows.text_tokens)
        }
    }
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

/// Bytes of activations that will be in memory.
pub(crate) fn stream_bytes(plan: &Plan, windows: usize, length: usize, memory: u64) -> u64 {
    let Some(spec) = &plan.spec else { return 0 };
    let widths = spec.hidden + 2 * spec.intermediate.max(spec.heads * spec.head_dim);
    ((windows * length * widths * 2) as u64).min(memory)
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
            "bits_per_weight": plan.bits_per_weight(), "mean_relative_error": mean, "tensors": done.tensors, "stages": done.stages,
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

//! What decides the bytes of an output: the flags of `bitmill quantize`, and the settings and plan they make.

use crate::effort::Effort;
use crate::gguf::{GgufArgs, scheme_mixes};
use crate::goal::GoalArgs;
use crate::mixed::{self, Goal, MixtureArgs, Width};
use crate::search::BySize;
use crate::text::{Text, TextArgs, amount};
use crate::{effort, units};
use anyhow::{Context, bail};
use bitmill_calibrate::{Imatrix, Pass, Statistics};
use bitmill_checkpoint::{Checkpoint, FORMATS, GGUF, default_format};
use bitmill_quantize::{
    Arithmetic, METHODS, Plan, ScaleSearch, Settings, SolverOptions, TRANSFORMS, TargetShift, Tuning, read_plan,
};
use bitmill_scheme::{BLOCKS, Bits, BlockType, Granularity, GridKind, SCHEMES, ScaleType, Scheme, block_scheme};
use clap::builder::PossibleValuesParser;
use clap::{ArgAction, ValueEnum};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What decides the bytes of an output.
#[derive(Debug, clap::Args)]
pub(crate) struct How {
    /// A plan file in place of the flags that say how: `bitmill plan` writes one, people edit it
    #[arg(long, value_name = "FILE", conflicts_with_all = ["scheme", "bits", "group_size", "asymmetric", "effort", "method", "tuning_passes", "tuning_top_k",
          "transforms", "format", "kv_cache", "scale_type", "scale_search", "damping", "no_act_order", "descent_sweeps", "scale_refits", "samples",
          "soft_rounding", "target_shift", "token_weights", "full_share", "keep_biases", "damping_search", "arithmetic",
          "reconstruction_passes", "reconstruction_depth", "reconstruction_together",
          "sequence_length", "seed", "written", "size", "decode_time", "max_kl", "max_perplexity_ratio", "options", "least", "ignore", "max_shard_size"])]
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
    /// Have tuning look at so many of the full-precision model's likeliest tokens instead of all
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u64).range(2..))]
    tuning_top_k: Option<u64>,
    /// What is done to the weights before they are rounded; the model's function stays as it is [default: nothing]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', value_parser = transform_names(), hide_possible_values = true,
          long_help = transform_help())]
    transforms: Vec<String>,
    /// How the result is stored [default: what compressed-tensors uses for the scheme]
    #[arg(long, value_name = "FORMAT", value_parser = format_names(), hide_possible_values = true, long_help = format_help())]
    format: Option<String>,
    /// Keep keys and values as 8-bit floats, under scales from calibration (compressed-tensors formats)
    #[arg(long, value_enum, value_name = "TYPE")]
    kv_cache: Option<Cache>,
    /// Number type of the stored scales [default: the model's own, or f16 for f32 models and for GPTQ files]
    #[arg(long, value_enum, value_name = "TYPE")]
    scale_type: Option<Scales>,
    /// How the scale of a group is chosen [default: hessian for gptq, minmax for rtn, squares (of floats mse) with --effort fast]
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
    #[command(flatten)]
    gguf: GgufArgs,
    /// Largest size of one weight file [default: 5GB, or one GGUF file whatever its size]
    #[arg(long, value_name = "SIZE", value_parser = units::parse_bytes)]
    max_shard_size: Option<u64>,
}

/// Largest size of a weight file in a folder.
const SHARD: u64 = 5_000_000_000;

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Search {
    /// Cover smallest to largest weight
    Minmax,
    /// Shrink the range for the smallest mean error, of many ranges
    Mse,
    /// The smallest mean squared error that a few ranges lead to, found much faster
    Squares,
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

/// What keys and values are kept as.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Cache {
    /// E4M3 numbers with one scale for the keys of a layer, and one for its values
    Fp8,
}

fn preset_names() -> PossibleValuesParser {
    let folders = || SCHEMES.iter().map(|p| p.name);
    let blocks = BLOCKS.iter().map(|b| b.name).filter(|name| !folders().any(|own| own == *name));
    PossibleValuesParser::new(folders().chain(blocks).chain(scheme_mixes()))
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
        "How the result is stored [default: pack-quantized, or int-quantized where activations are quantized too; that of the scheme for floats]:",
        FORMATS.iter().chain([&GGUF]).map(|f| (f.name(), f.summary())),
    )
}

fn parse_damping(text: &str) -> Result<f32, String> {
    let valid = |d: &f32| (0.0..=1.0).contains(d);
    text.parse().ok().filter(valid).ok_or_else(|| format!("`{text}` is not a number from 0 to 1"))
}

impl How {
    fn scheme(&self, named_gguf: bool) -> anyhow::Result<Scheme> {
        if let Some(base) = self.gguf.scheme(self.scheme.as_ref()) {
            return Ok(base);
        }
        if let Some(name) = &self.scheme {
            // Some names are of a type of GGUF and of a scheme of folders: what is written decides.
            let block = block_scheme(name).filter(|_| named_gguf);
            return block.or_else(|| bitmill_scheme::scheme(name)).context("no such scheme");
        }
        // Of a mixture this scheme gives all but the widths; in a GGUF file, nothing but a frame that fits every shape.
        if named_gguf && self.mixed.goal(self.bits)?.is_some() {
            return Ok(Scheme::block(BlockType::Q8_0));
        }
        let granularity = match self.group_size.unwrap_or(128) {
            -1 => Granularity::Channel,
            0 => Granularity::Tensor,
            g => Granularity::Group(usize::try_from(g)?),
        };
        let bits = match self.bits {
            Some(Width::Uniform(bits)) => bits,
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
        let named_gguf = named_gguf || self.format.as_deref() == Some(GGUF.name());
        let scheme = self.scheme(named_gguf)?;
        let nearest = self.gguf.rounds_to_nearest(self.scheme.as_ref());
        let own = || if nearest { "rtn" } else { self.effort.method(&scheme) };
        let method = self.method.clone().unwrap_or_else(|| own().into());
        let default_format = match self.mixed.format() {
            _ if named_gguf => GGUF.name(),
            Some(mixed) => mixed,
            None => default_format(&scheme),
        };
        let format = self.format.clone().unwrap_or_else(|| default_format.into());
        if let (Some(form), true) = (scheme.form(), format != GGUF.name()) {
            bail!("{} is a type of GGUF, which --format {format} cannot store; leave --format out", form.name);
        }
        let as_gguf = format == GGUF.name();
        self.gguf.check(as_gguf)?;
        // Statistics stand in for text, and tuning reads text; it moves integer codes.
        let integers = matches!(scheme.grid, GridKind::Int { .. }) && self.mixed.format().is_none();
        let passes = self.tuning_passes.or((!integers || as_gguf || !self.mixed.stats.is_empty()).then_some(0));
        let flows = self.mixed.stats.is_empty() && !self.gguf.weighs();
        let shift = if flows { self.effort.shift(&method, input) } else { TargetShift::Off };
        let top = self.tuning_top_k.map(|k| usize::try_from(k).unwrap_or(usize::MAX));
        let tuning = self.effort.tuning(&method, &scheme, passes);
        if top.is_some() && tuning.is_none() {
            bail!(
                "--tuning-top-k says what tuning looks at, and nothing is tuned; ask for it by --tuning-passes or --effort best"
            );
        }
        let feeds_back = flows && effort::feeds_back(&method);
        let arithmetic = if feeds_back { Arithmetic::best() } else { Arithmetic::F32 };
        Ok(Settings {
            tuning: tuning.map(|t| Tuning { top, ..t }),
            transforms: self.transforms.clone(),
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
                        Search::Squares => ScaleSearch::Squares,
                        Search::Hessian => ScaleSearch::Hessian,
                    })
                    .or(self.gguf.weighs().then_some(ScaleSearch::Hessian))
                    .or_else(|| self.effort.scale_search(&scheme)),
                damping: self.damping,
                shrinkage: 0.0,
                act_order: !self.no_act_order,
                descent_sweeps: self.descent_sweeps,
                scale_refits: self.scale_refits,
                soft: self.goal.soft(),
            },
            observation: self.goal.observation(shift, feeds_back, arithmetic),
            reconstruction: self.goal.reconstruction(scheme.bits().get()),
            kv_cache: self.kv_cache.is_some(),
            ignore: self.ignore.clone(),
            samples: self.text.samples(input),
            sequence_length: self.text.sequence_length,
            written: self
                .text
                .written
                .unwrap_or_else(|| if flows { self.effort.written(&method, &scheme, input) } else { 0.0 }),
            seed: self.text.seed,
            gguf: as_gguf.then(|| self.gguf.settings(self.scheme.as_ref())),
            shard_bytes: self.max_shard_size.unwrap_or(if as_gguf { u64::MAX } else { SHARD }),
            method,
        })
    }
}

/// A plan, and what its method learns about activations from.
pub(crate) struct Ready {
    pub(crate) plan: Plan,
    pub(crate) source: Source,
}

/// How far [`How::ready`] goes where no mixture has to be chosen.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Reads {
    /// Headers are enough.
    Headers,
    /// The method's text or statistics are opened, and nothing is written.
    Given,
    /// All that a run reads.
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
        let settings = self.settings(input, is_gguf(beside))?;
        let plan = Plan::new(input, &settings)?;
        plan.notes.iter().for_each(|note| eprintln!("note: {note}"));
        let goal = self.mixed.goal(self.bits)?;
        let source = match (reads, goal) {
            (Reads::Headers, None) => Source::Nothing,
            _ => Source::open(self, input, &plan, reads == Reads::Text || goal.is_some())?,
        };
        let Some(goal) = goal else {
            self.mixed.check_loaders(&plan)?;
            return Ok(Ready { plan, source });
        };
        let collected = match &source {
            Source::Text(text) => Some(collect(beside, stream_memory, input, &plan, text)?),
            _ => None,
        };
        let statistics = match (&source, &collected) {
            (Source::Statistics(statistics), _) | (_, Some(statistics)) => statistics,
            _ => anyhow::bail!("a mixture needs text or statistics"),
        };
        let weighed = self.mixed.weighed(input, &plan, statistics)?;
        let mut plan = match (goal, &source) {
            (Goal::Within(budget), _) => weighed.plan(input, &plan, budget)?,
            (Goal::Losing(bound), Source::Text(text)) => {
                BySize { input, plan: &plan, weighed: &weighed, text, out: beside, stream_memory }.smallest(&bound)?
            }
            _ => bail!("a loss is measured on held-out text, and there is none"),
        };
        if let Some(mixture) = &mut plan.mixture {
            mixture.survey = Some(weighed.survey());
            mixed::describe(mixture);
        }
        self.mixed.check_loaders(&plan)?;
        Ok(Ready { plan, source })
    }
}

/// What tells the method about activations.
pub(crate) enum Source {
    Text(Text),
    Statistics(Statistics),
    Importance(Imatrix),
    Nothing,
}

impl Source {
    fn open(how: &How, input: &Checkpoint, plan: &Plan, writes: bool) -> anyhow::Result<Source> {
        if let Some(statistics) = how.mixed.statistics(input, plan)? {
            if how.text.asked() {
                anyhow::bail!("--stats stands in for text; leave out either --stats or --calibration (and --written)");
            }
            return Ok(Source::Statistics(statistics));
        }
        if let Some(imatrix) = how.gguf.imatrix()? {
            return Ok(Source::Importance(imatrix));
        }
        if !plan.calibrated && how.mixed.goal(how.bits)?.is_none() {
            if how.text.asked() {
                eprintln!("note: method {} needs no calibration; no text is used", plan.method.name());
            }
            return Ok(Source::Nothing);
        }
        let spec = plan.spec.as_ref().context("a mixture needs a forward pass, and this architecture has none here")?;
        let (samples, length, seed) = (plan.settings.samples, plan.settings.sequence_length, plan.settings.seed);
        let written = if writes { plan.settings.written } else { 0.0 };
        let text = how.text.windows(input, spec, (samples, length, seed), written)?;
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

/// Whether `path` is named as a GGUF file.
pub(crate) fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == GGUF.name())
}

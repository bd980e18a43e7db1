//! `bitmill bench`: a matrix of recipes and schemes on one model, each cell quantized and evaluated like a user would.
//!
//! Every cell is two child processes of this same program, so that its seconds and peak memory are its own. What a cell
//! found is written at once: a bench that was stopped goes on after its last finished cell.

use crate::Common;
use crate::beside::{beside, replace};
use crate::progress::Progress;
use crate::text::holds_images;
use anyhow::{Context, bail};
use bitmill_quantize::METHODS;
use bitmill_scheme::{GridKind, SCHEMES};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Compare ways to quantize a model: KL divergence, perplexity, bits, seconds and memory of each, in one table
///
/// Rows are recipes at every width, or once where they name a --scheme. A recipe is a method, an effort, or flags of `quantize` under a name of your own:
/// `--recipe 'no descent=--method gptq --tuning-passes 0 --descent-sweeps 0'`. The table goes to standard output; with
/// `-o RESULTS` also to RESULTS.json and RESULTS.csv, from which a stopped bench goes on.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of the full-precision model
    pub(crate) model: PathBuf,
    /// Widths
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "4", value_parser = clap::value_parser!(u32).range(1..=8))]
    bits: Vec<u32>,
    /// Weights per scale at every width, or one number per width
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "128")]
    group_size: Vec<usize>,
    /// Methods by themselves (rtn, gptq, hqq, billm: no tuning) and efforts (fast, balanced, best)
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "rtn,gptq")]
    methods: Vec<String>,
    /// A row of its own: a name, and the flags of `quantize` it stands for
    #[arg(long, value_name = "NAME=FLAGS")]
    recipe: Vec<String>,
    /// Text to calibrate on [default: as of quantize]
    #[arg(long, value_name = "FILE", num_args = 1..)]
    calibration: Vec<PathBuf>,
    /// Windows or sentences of calibration [default: as of quantize]
    #[arg(long, value_name = "N")]
    samples: Option<usize>,
    /// Tokens per calibration window
    #[arg(long, value_name = "N", default_value_t = 2048)]
    sequence_length: usize,
    /// Text, or files of images, to evaluate on; it must not overlap the calibration text
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    text: Vec<PathBuf>,
    /// Tokens per evaluated window [default: as of eval]
    #[arg(long, value_name = "N")]
    window: Option<usize>,
    /// Evaluated windows or sentences [default: all]
    #[arg(long, value_name = "N")]
    windows: Option<usize>,
    /// Write RESULTS.json and RESULTS.csv, and go on from them
    #[arg(short, long, value_name = "RESULTS")]
    output: Option<PathBuf>,
    /// Keep every quantized model in RESULTS.models
    #[arg(long, requires = "output")]
    keep: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// What one cell found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Cell {
    recipe: String,
    /// Zero, as the group size, where the recipe names a scheme.
    bits: u32,
    group_size: usize,
    /// Every argument that decides the numbers, and the version of the program: what a cell is known by.
    key: Vec<String>,
    bits_per_weight: f64,
    /// Of a decoder, against the full-precision model.
    #[serde(skip_serializing_if = "Option::is_none")]
    kl: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kl_error: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    perplexity: Option<f64>,
    /// Share of positions whose most likely token agrees, percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    same_top: Option<f64>,
    /// Of an encoder, mean cosine similarity of embeddings.
    #[serde(skip_serializing_if = "Option::is_none")]
    cosine: Option<f64>,
    /// Of quantizing.
    seconds: f64,
    /// Of quantizing, in bytes; where the system tells.
    peak_memory: Option<u64>,
}

/// A row: its name and its flags.
struct Recipe {
    name: String,
    flags: Vec<String>,
}

impl Recipe {
    /// Whether it says its own scheme, which no width and group size go with.
    fn names_scheme(&self) -> bool {
        self.flags.iter().any(|flag| flag == "--scheme" || flag.starts_with("--scheme="))
    }

    /// What a cell of it is called.
    fn at(&self, bits: u32) -> String {
        if self.names_scheme() { self.name.clone() } else { format!("{} at {bits} bits", self.name) }
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let (recipes, groups) = (recipes(args)?, groups(args)?);
    let known = args.output.as_deref().map(taken_up).transpose()?.unwrap_or_default();
    let models = match &args.output {
        Some(output) if args.keep => with_suffix(output, "models"),
        Some(output) => with_suffix(output, "partial"),
        None => std::env::temp_dir().join(format!("bitmill-bench-{}", std::process::id())),
    };
    std::fs::create_dir_all(&models).with_context(|| format!("creating {}", models.display()))?;
    let measured = matrix(args, &recipes, &groups, known, &models);
    // What a stopped cell left would only be of use if the bench can be taken up.
    if !args.keep && (measured.is_ok() || args.output.is_none()) {
        let _ = std::fs::remove_dir_all(&models);
    }
    let cells = measured?;
    if args.common.json {
        println!("{:#}", serde_json::to_value(&cells)?);
    } else {
        print!("{}", table(&cells));
    }
    Ok(())
}

/// Every cell, those that are `known` as they are; what is found is written after each.
fn matrix(
    args: &Args,
    recipes: &[Recipe],
    groups: &[usize],
    mut known: Vec<Cell>,
    models: &Path,
) -> anyhow::Result<Vec<Cell>> {
    let once = recipes.iter().filter(|r| r.names_scheme()).count();
    let total = args.bits.len() * (recipes.len() - once) + once;
    let bar = Progress::new(total as u64);
    let mut cells = Vec::with_capacity(total);
    for (round, (&bits, &group)) in args.bits.iter().zip(groups).enumerate() {
        for recipe in recipes.iter().filter(|r| round == 0 || !r.names_scheme()) {
            let (bits, group) = if recipe.names_scheme() { (0, 0) } else { (bits, group) };
            let name = recipe.at(bits);
            bar.message(name.clone());
            let key = key(args, recipe, bits, group);
            let cell = match known.iter().position(|cell| cell.key == key) {
                Some(i) => known.swap_remove(i),
                None => measured(args, recipe, (bits, group), key, models)?,
            };
            bar.plain_line(&name);
            cells.push(cell);
            bar.set(cells.len() as u64);
            if let Some(output) = &args.output {
                write(output, &cells, &known)?;
            }
        }
    }
    bar.finish();
    Ok(cells)
}

fn recipes(args: &Args) -> anyhow::Result<Vec<Recipe>> {
    let mut recipes = Vec::new();
    for name in &args.methods {
        let flags = match name.as_str() {
            effort if crate::effort::Effort::from_str(effort, true).is_ok() => vec!["--effort".into(), name.clone()],
            method if let Some(method) = METHODS.iter().find(|m| m.name() == method) => {
                let mut flags = ["--method", name, "--tuning-passes", "0"].map(String::from).to_vec();
                // One that makes no integers is asked for what it makes.
                let integers = SCHEMES
                    .iter()
                    .any(|p| matches!(p.scheme.grid, GridKind::Int { .. }) && method.refuses(&p.scheme).is_none());
                if !integers && let Some(own) = SCHEMES.iter().find(|p| method.refuses(&p.scheme).is_none()) {
                    flags.extend(["--scheme", own.name].map(String::from));
                }
                flags
            }
            _ => bail!("{name} is neither a method nor an effort; --recipe 'NAME=FLAGS' names anything else"),
        };
        recipes.push(Recipe { name: name.clone(), flags });
    }
    for recipe in &args.recipe {
        let (name, flags) =
            recipe.split_once('=').with_context(|| format!("--recipe {recipe:?}: NAME=FLAGS is needed"))?;
        let flags = flags.split_whitespace().map(String::from).collect();
        recipes.push(Recipe { name: name.trim().to_owned(), flags });
    }
    match recipes.is_empty() {
        true => bail!("nothing to compare; name --methods or a --recipe"),
        false => Ok(recipes),
    }
}

/// The group size of every width.
fn groups(args: &Args) -> anyhow::Result<Vec<usize>> {
    match args.group_size.as_slice() {
        [all] => Ok(vec![*all; args.bits.len()]),
        each if each.len() == args.bits.len() => Ok(each.to_vec()),
        each => bail!("{} group sizes for {} widths", each.len(), args.bits.len()),
    }
}

fn texts(flag: &str, paths: &[PathBuf]) -> Vec<OsString> {
    let paths = paths.iter().map(|p| p.clone().into_os_string());
    if paths.len() == 0 { Vec::new() } else { std::iter::once(flag.into()).chain(paths).collect() }
}

fn number(flag: &str, value: Option<usize>) -> Vec<OsString> {
    value.map_or(Vec::new(), |n| vec![flag.into(), n.to_string().into()])
}

/// Arguments of `quantize`, output aside.
fn quantize_args(args: &Args, recipe: &Recipe, bits: u32, group: usize) -> Vec<OsString> {
    let mut all: Vec<OsString> = vec![args.model.clone().into()];
    if !recipe.names_scheme() {
        all.extend(["--bits".into(), bits.to_string().into(), "--group-size".into(), group.to_string().into()]);
    }
    all.extend(recipe.flags.iter().map(OsString::from));
    all.extend(texts("--calibration", &args.calibration));
    all.extend(number("--samples", args.samples));
    all.extend(number("--sequence-length", Some(args.sequence_length)));
    all
}

/// Arguments of `eval`, model aside.
fn eval_args(args: &Args) -> Vec<OsString> {
    let mut all = vec!["--reference".into(), args.model.clone().into()];
    let flag = if args.text.iter().any(|file| holds_images(file)) { "--images" } else { "--text" };
    all.extend(texts(flag, &args.text));
    all.extend(number("--window", args.window));
    all.extend(number("--windows", args.windows));
    all
}

fn key(args: &Args, recipe: &Recipe, bits: u32, group: usize) -> Vec<String> {
    let words = quantize_args(args, recipe, bits, group).into_iter().chain(eval_args(args));
    let version = format!("bitmill {}", env!("CARGO_PKG_VERSION"));
    std::iter::once(version).chain(words.map(|word| word.to_string_lossy().into_owned())).collect()
}

fn measured(
    args: &Args,
    recipe: &Recipe,
    (bits, group): (u32, usize),
    key: Vec<String>,
    models: &Path,
) -> anyhow::Result<Cell> {
    let plain: String = recipe.name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let out = models.join(format!("{plain}-{bits}-{group}"));
    let quantize = quantize_args(args, recipe, bits, group).into_iter();
    let quantize = quantize.chain(["-o".into(), out.clone().into(), "--force".into(), "--no-report".into()]);
    let made = child(args, "quantize", quantize).with_context(|| recipe.at(bits))?;
    let eval = std::iter::once(out.clone().into()).chain(eval_args(args));
    let found = child(args, "eval", eval).with_context(|| format!("evaluating {}", recipe.at(bits)))?;
    if !args.keep {
        let _ = std::fs::remove_dir_all(&out);
    }
    let number = |value: &Value, pointer: &str| value.pointer(pointer).and_then(Value::as_f64);
    Ok(Cell {
        recipe: recipe.name.clone(),
        bits,
        group_size: group,
        key,
        bits_per_weight: number(&made, "/bits_per_weight").context("quantize reported no bits per weight")?,
        kl: number(&found, "/divergence/kl/mean"),
        kl_error: number(&found, "/divergence/kl/error"),
        perplexity: number(&found, "/perplexity/value"),
        same_top: number(&found, "/divergence/top1_percent"),
        cosine: number(&found, "/cosine/mean"),
        seconds: number(&made, "/seconds").context("quantize reported no seconds")?,
        peak_memory: made["peak_memory"].as_u64(),
    })
}

/// Runs this program with `--json`; its messages are shown only if it fails.
fn child(args: &Args, command: &str, words: impl Iterator<Item = OsString>) -> anyhow::Result<Value> {
    let mut child = Command::new(std::env::current_exe()?);
    child.arg(command).args(words).arg("--json").stdout(Stdio::piped()).stderr(Stdio::piped());
    child.arg("--stream-memory").arg(args.common.stream_memory.to_string());
    if let Some(threads) = args.common.threads {
        child.arg("--threads").arg(threads.to_string());
    }
    let done = child.output()?;
    if !done.status.success() {
        bail!("{} {command}: {}", done.status, String::from_utf8_lossy(&done.stderr).trim_end());
    }
    Ok(serde_json::from_slice(&done.stdout)?)
}

/// `output` with another ending: `results` and `results.json` both become `results.csv`.
fn with_suffix(output: &Path, suffix: &str) -> PathBuf {
    match output.extension().and_then(|e| e.to_str()) {
        Some("json" | "csv") => output.with_extension(suffix),
        _ => beside(output, &format!(".{suffix}")),
    }
}

/// The cells of an earlier bench.
fn taken_up(output: &Path) -> anyhow::Result<Vec<Cell>> {
    let file = with_suffix(output, "json");
    match std::fs::read(&file) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .with_context(|| format!("{} holds no results of bench; move it away", file.display())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e).with_context(|| format!("reading {}", file.display())),
    }
}

/// Writes the cells of this bench, and after them those of an earlier one that it did not ask for.
fn write(output: &Path, cells: &[Cell], others: &[Cell]) -> anyhow::Result<()> {
    let all: Vec<&Cell> = cells.iter().chain(others).collect();
    let mut csv = String::from(
        "recipe,bits,group_size,bits_per_weight,kl,kl_error,perplexity,same_top,cosine,seconds,peak_memory\n",
    );
    for cell in &all {
        let some = |value: Option<f64>| value.map_or(String::new(), |v| v.to_string());
        let memory = cell.peak_memory.map_or(String::new(), |v| v.to_string());
        let name = cell.recipe.replace('"', "\"\"");
        let scheme = format!("{},{},{}", cell.bits, cell.group_size, cell.bits_per_weight);
        let quality = [cell.kl, cell.kl_error, cell.perplexity, cell.same_top, cell.cosine].map(some).join(",");
        let _ = writeln!(csv, "\"{name}\",{scheme},{quality},{},{memory}", cell.seconds);
    }
    replace(&with_suffix(output, "json"), serde_json::to_vec_pretty(&all)?)?;
    replace(&with_suffix(output, "csv"), csv)
}

/// A column of the table: its title, and its text where a cell has it.
type Column = (&'static str, fn(&Cell) -> Option<String>);

/// Columns that decoders or encoders alone have.
const QUALITY: [Column; 4] = [
    ("KL", |cell| Some(format!("{:.5} ± {:.5}", cell.kl?, cell.kl_error?))),
    ("perplexity", |cell| Some(format!("{:.3}", cell.perplexity?))),
    ("same top %", |cell| Some(format!("{:.2}", cell.same_top?))),
    ("cosine", |cell| Some(format!("{:.6}", cell.cosine?))),
];

/// The table for people.
fn table(cells: &[Cell]) -> String {
    let width = cells.iter().map(|cell| cell.recipe.chars().count()).max().unwrap_or(0).max(6);
    let columns: Vec<Column> =
        QUALITY.into_iter().filter(|(_, of)| cells.iter().any(|cell| of(cell).is_some())).collect();
    let mut out = format!("{:<width$}  {:>4}  {:>5}  {:>7}", "recipe", "bits", "group", "b/w");
    for (title, _) in &columns {
        let _ = write!(out, "  {title:>18}");
    }
    let _ = writeln!(out, "  {:>8}  {:>9}", "seconds", "memory");
    for cell in cells {
        let Cell { recipe, bits, group_size, bits_per_weight, .. } = cell;
        let [bits, group] = [*bits as usize, *group_size].map(|n| if n == 0 { "-".to_owned() } else { n.to_string() });
        let _ = write!(out, "{recipe:<width$}  {bits:>4}  {group:>5}  {bits_per_weight:>7.3}");
        for (_, of) in &columns {
            let _ = write!(out, "  {:>18}", of(cell).unwrap_or_default());
        }
        let memory = cell.peak_memory.map_or(String::new(), crate::units::bytes);
        let _ = writeln!(out, "  {:>8.1}  {memory:>9}", cell.seconds);
    }
    out
}

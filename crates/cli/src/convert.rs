//! `bitmill convert`: a quantized model under another format, code for code.

use crate::progress::Progress;
use crate::{Common, units};
use anyhow::ensure;
use bitmill_checkpoint::{Checkpoint, Dtype, FORMATS, GGUF};
use bitmill_quantize::{Conversion, Target};
use clap::builder::PossibleValuesParser;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Write a quantized model in another format, without rounding anything
///
/// Reads a quantized folder (GPTQ, AWQ, compressed-tensors) or GGUF file and writes OUT with the same codes, scales and zero
/// points in another layout, or as plain numbers. What a format does not hold, down to a single scale, is refused before
/// anything is written, with the first tensor it is so of; --allow-lossy rounds it instead and says what it rounded. Norms, embeddings,
/// tokenizer and other files are carried; config.json says the new format.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of a quantized model, or a GGUF file
    pub(crate) model: PathBuf,
    /// Folder to write, or a file whose name ends in .gguf
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// What OUT is written in
    #[arg(long, value_name = "FORMAT", value_parser = format_names(), hide_possible_values = true, long_help = format_help())]
    format: String,
    /// Round what the format does not hold
    #[arg(long)]
    allow_lossy: bool,
    /// Largest size of one weight file [default: 5GB, or one GGUF file whatever its size]
    #[arg(long, value_name = "SIZE", value_parser = units::parse_bytes)]
    max_shard_size: Option<u64>,
    /// Check that everything is held, print sizes, and stop
    #[arg(long)]
    dry_run: bool,
    /// Replace OUT if it exists
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

const DENSE: [(&str, Dtype, &str); 3] = [
    ("f32", Dtype::F32, "plain numbers, single precision: holds every number"),
    ("f16", Dtype::F16, "plain numbers, half precision"),
    ("bf16", Dtype::BF16, "plain numbers, bfloat16"),
];

/// Largest size of a weight file in a folder.
const SHARD: u64 = 5_000_000_000;

fn rows() -> impl Iterator<Item = (&'static str, &'static str)> {
    FORMATS
        .iter()
        .chain([&GGUF])
        .map(|f| (f.name(), f.summary()))
        .chain(DENSE.map(|(name, _, summary)| (name, summary)))
}

fn format_names() -> PossibleValuesParser {
    PossibleValuesParser::new(rows().map(|(name, _)| name))
}

fn format_help() -> String {
    rows().fold("What OUT is written in:".to_owned(), |text, (name, summary)| format!("{text}\n  {name:<16} {summary}"))
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.common.set_threads()?;
    let dense = DENSE.iter().find(|(name, ..)| *name == args.format).map(|(_, dtype, _)| Target::Dense(*dtype));
    let target = dense.or_else(|| bitmill_checkpoint::format(&args.format).map(Target::Format));
    // The argument's values are the names of these two tables.
    let target = target.ok_or_else(|| anyhow::anyhow!("format {} does not exist", args.format))?;
    let as_gguf = args.format == GGUF.name();
    let named = args.output.extension().is_some_and(|e| e == GGUF.name());
    ensure!(!as_gguf || named, "{}: a GGUF file is written; give it a name that ends in .gguf", args.output.display());
    ensure!(as_gguf || !named, "{}: only --format gguf writes a .gguf file", args.output.display());
    let shard = args.max_shard_size.unwrap_or(if as_gguf { u64::MAX } else { SHARD });
    Convert { model: &args.model, out: &args.output, target, lossy: args.allow_lossy, shard }.run(
        args.dry_run,
        args.force,
        args.common.json,
    )
}

/// A conversion that a command asks for.
pub(crate) struct Convert<'a> {
    pub(crate) model: &'a Path,
    pub(crate) out: &'a Path,
    pub(crate) target: Target,
    pub(crate) lossy: bool,
    pub(crate) shard: u64,
}

impl Convert<'_> {
    pub(crate) fn run(&self, dry_run: bool, force: bool, as_json: bool) -> anyhow::Result<()> {
        let input = Checkpoint::open(self.model)?;
        let conversion = Conversion::new(&input, self.target, self.lossy, self.shard)?;
        conversion.notes.iter().for_each(|note| eprintln!("note: {note}"));
        // A request for fewer bits of precision need not be told of every tensor that has fewer.
        if let (Target::Format(_), false) = (self.target, conversion.rounded.is_empty()) {
            for r in &conversion.rounded {
                eprintln!("rounded: {} is {}: {}", r.tensor, r.became, r.reason);
            }
        }
        let mut bytes = conversion.output.total_bytes();
        let mut out = self.out.to_owned();
        if dry_run {
            conversion.check(self.out, force)?;
        } else {
            let progress = Progress::new(conversion.tensors() as u64);
            let written = conversion.write(self.out, force, &mut |done, _, name| {
                progress.set(done as u64);
                progress.message(name.to_owned());
            });
            progress.finish();
            let written = written?;
            (out, bytes) = (written.out, written.bytes);
        }
        self.print(&conversion, &out, bytes, (dry_run, as_json));
        Ok(())
    }

    fn print(&self, conversion: &Conversion<'_>, out: &Path, bytes: u64, (dry_run, as_json): (bool, bool)) {
        let mut schemes: BTreeMap<String, usize> = BTreeMap::new();
        for (_, scheme, _) in conversion.quantized() {
            *schemes.entry(scheme.to_string()).or_default() += 1;
        }
        if as_json {
            let rounded: Vec<_> = (conversion.rounded.iter())
                .map(|r| json!({"tensor": r.tensor, "reason": r.reason, "became": r.became}))
                .collect();
            let value = json!({
                "output": out, "format": self.target.name(), "written": !dry_run, "tensors": conversion.tensors(), "bytes": bytes,
                "schemes": schemes, "rounded": rounded, "notes": conversion.notes,
            });
            println!("{value:#}");
            return;
        }
        let kinds: Vec<String> = schemes.iter().map(|(scheme, n)| format!("{n} × {scheme}")).collect();
        let kinds = if kinds.is_empty() { String::new() } else { format!(" ({})", kinds.join(", ")) };
        let exact = match conversion.rounded.len() {
            0 => "every number as it was".to_owned(),
            n => format!("{n} tensors rounded"),
        };
        let would = if dry_run { "would be " } else { "" };
        println!(
            "{}: {would}{} tensors{kinds}, {}, {}, {exact}",
            out.display(),
            conversion.tensors(),
            self.target.name(),
            units::bytes(bytes)
        );
    }
}

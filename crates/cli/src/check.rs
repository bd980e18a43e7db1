//! `bitmill check`: which rules of a loader a written model meets or breaks.

use crate::Broken;
use anyhow::Context;
use bitmill_checkpoint::Checkpoint;
use bitmill_quantize::{Demands, Subject, Verdict, loader_names, needed, tensors_of, verdicts};
use clap::builder::PossibleValuesParser;
use serde_json::json;
use std::path::PathBuf;

/// Say which rules of a loader a model meets or breaks
///
/// Reads a written folder or file, of bitmill or of any other tool, and holds it to what the loader's source asks for: schemes it
/// has kernels for, equal schemes in what it fuses, divisibility for tensor parallelism, keys of config.json, heads, lost tensors. Every
/// quantized matrix is decoded, so damage is found too. Exit code 0 where all rules are met, 3 where one is broken.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of a model, or one GGUF file
    pub(crate) path: PathBuf,
    /// The program that is to load it; several may be given [default: all]
    #[arg(long, value_name = "NAME", action = clap::ArgAction::Append, ignore_case = true,
          value_parser = PossibleValuesParser::new(loader_names()))]
    loader: Vec<String>,
    /// Devices that matrices are cut for
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    tensor_parallel: u16,
    /// The model it was made of, to find tensors that were lost
    #[arg(long, value_name = "MODEL")]
    pub(crate) original: Option<PathBuf>,
    /// Print JSON on standard output
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let subject = Subject::of_checkpoint(&Checkpoint::open(&args.path)?)?;
    let original = match &args.original {
        Some(path) => {
            Some(tensors_of(&Checkpoint::open(path)?).with_context(|| format!("reading {}", path.display()))?)
        }
        None => None,
    };
    let demands = Demands { tensor_parallel: args.tensor_parallel.into(), original };
    let loaders = match args.loader.is_empty() {
        true => loader_names().into_iter().map(str::to_owned).collect(),
        false => args.loader.clone(),
    };
    let checked: Vec<(&String, Vec<Verdict>)> =
        loaders.iter().map(|loader| (loader, verdicts(loader, &subject, &demands))).collect();
    if args.json {
        let rules = |all: &[Verdict]| {
            let rule =
                |v: &Verdict| json!({"rule": v.rule, "about": v.about, "met": v.broken.is_empty(), "broken": v.broken});
            all.iter().map(rule).collect::<Vec<_>>()
        };
        let loaders = checked.iter().map(|(loader, all)| {
            let met = all.iter().all(|v| v.broken.is_empty());
            json!({"loader": loader, "met": met, "needs": needed(loader, &subject), "rules": rules(all)})
        });
        let value = json!({
            "path": args.path, "format": subject.format(), "quantized": subject.quantized(),
            "loaders": loaders.collect::<Vec<_>>(),
        });
        println!("{value:#}");
    } else {
        println!("{}: {}, {} quantized matrices", args.path.display(), subject.format(), subject.quantized());
        for (loader, all) in &checked {
            print(loader, all, needed(loader, &subject));
        }
    }
    let broken = |all: &[Verdict]| all.iter().filter(|v| !v.broken.is_empty()).count();
    let count: usize = checked.iter().map(|(_, all)| broken(all)).sum();
    // Asked about every loader, an answer is all there is to give.
    if args.loader.is_empty() || count == 0 { Ok(()) } else { Err(Broken(count).into()) }
}

fn print(loader: &str, all: &[Verdict], needs: Option<&str>) {
    /// Examples of a broken rule; the JSON has all.
    const SHOWN: usize = 5;
    let met = all.iter().all(|v| v.broken.is_empty());
    let needs = needs.map_or(String::new(), |n| format!(", with {n}"));
    println!("{loader}: {}", if met { format!("takes it{needs}") } else { "does not take it as it is".into() });
    for verdict in all {
        println!(
            "  {} {:<16} {}",
            if verdict.broken.is_empty() { "met   " } else { "BROKEN" },
            verdict.rule,
            verdict.about
        );
        for reason in verdict.broken.iter().take(SHOWN) {
            println!("         {reason}");
        }
        if verdict.broken.len() > SHOWN {
            println!("         and {} more (--json lists them)", verdict.broken.len() - SHOWN);
        }
    }
}

//! The `bitmill` command: arguments, progress and reports. One file per command, no arithmetic.
//!
//! Results go to standard output (a table, or JSON with `--json`), progress and notes to standard error. Exit codes:
//! 0 done, 1 refused or failed, 2 wrong arguments, 3 checked and found to break a rule, 130 stopped by Ctrl-C with everything finished kept.

mod bench;
mod beside;
mod calibrate;
mod check;
mod convert;
mod dequantize;
mod effort;
mod eval;
mod gguf;
mod goal;
mod how;
mod hub;
mod inspect;
mod mixed;
mod pages;
mod plan;
mod progress;
mod quantize;
mod report;
mod run;
mod search;
mod text;
mod units;
mod watch;
mod write;

use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// Post-training quantization of neural-network weights: bounded memory, resumable, on the CPU.
#[derive(Debug, Parser)]
#[command(name = "bitmill", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Branch, tag or commit of models given by their name on the hub (org/model), which are looked up in its cache and fetched
    /// into it (HF_HUB_OFFLINE=1 forbids that) [default: main]
    #[arg(long, value_name = "REVISION", global = true)]
    revision: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    Quantize(quantize::Args),
    Plan(plan::Args),
    Calibrate(calibrate::Args),
    Convert(convert::Args),
    Check(check::Args),
    Dequantize(dequantize::Args),
    Eval(eval::Args),
    Inspect(inspect::Args),
    Report(report::Args),
    Bench(bench::Args),
    Run(run::Args),
    Write(write::Args),
}

impl Command {
    /// Every model that is read.
    fn models(&mut self) -> Vec<&mut PathBuf> {
        match self {
            Command::Quantize(args) => vec![&mut args.model],
            Command::Plan(args) => vec![&mut args.model],
            Command::Calibrate(args) => vec![&mut args.model],
            Command::Convert(args) => vec![&mut args.model],
            Command::Check(args) => [&mut args.path].into_iter().chain(&mut args.original).collect(),
            Command::Dequantize(args) => vec![&mut args.model],
            Command::Eval(args) => [&mut args.model].into_iter().chain(&mut args.reference).collect(),
            Command::Inspect(args) => vec![&mut args.path],
            Command::Report(args) => args.reference.iter_mut().collect(),
            Command::Bench(args) => vec![&mut args.model],
            Command::Run(args) => vec![&mut args.model],
            Command::Write(args) => vec![&mut args.model],
        }
    }
}

/// Options every command has.
#[derive(Debug, clap::Args)]
struct Common {
    /// Worker threads; all cores by default. The result does not depend on it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Print the result as JSON on standard output
    #[arg(long)]
    json: bool,
    /// Activations kept in memory; beyond it they are spilled to a file
    #[arg(long, value_name = "SIZE", default_value = "4GiB", value_parser = units::parse_bytes)]
    stream_memory: u64,
}

impl Common {
    fn set_threads(&self) -> anyhow::Result<()> {
        if let Some(n) = self.threads {
            rayon::ThreadPoolBuilder::new().num_threads(n.into()).build_global()?;
        }
        Ok(())
    }
}

/// Rules of a loader that a model breaks.
#[derive(Debug)]
struct Broken(usize);

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} rule{} broken", self.0, if self.0 == 1 { " is" } else { "s are" })
    }
}

impl std::error::Error for Broken {}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    pages::ask_for_large_ones();
    bitmill_kernels::keep_freed_memory();
    let mut cli = Cli::parse();
    let found = hub::resolve(cli.command.models(), cli.revision.as_deref());
    let result = found.and_then(|()| match cli.command {
        Command::Quantize(args) => quantize::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Calibrate(args) => calibrate::run(&args),
        Command::Convert(args) => convert::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Dequantize(args) => dequantize::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Run(args) => run::run(&args),
        Command::Write(args) => write::run(&args),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            let stopped = matches!(error.downcast_ref(), Some(bitmill_quantize::Error::Stopped { .. }));
            let broken = error.is::<Broken>();
            ExitCode::from(if stopped {
                130
            } else if broken {
                3
            } else {
                1
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_argument_table_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}

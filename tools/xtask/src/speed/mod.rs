//! `cargo xtask bench`: how fast bitmill is beside other programs at the same work, in turns, so that whatever else the
//! machine does slows all of them.

mod copy;
mod decode;
mod kernels;
mod quantize;

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// What is measured.
#[derive(Subcommand)]
pub(crate) enum Bench {
    /// How fast a quantized model speaks, beside llama.cpp's llama-bench.
    Decode(decode::Decode),
    /// Products with 4-bit weights, beside llama.cpp's.
    Products(kernels::Products),
    /// Products of bfloat16 and H += XᵀX, beside oneDNN's as PyTorch calls them.
    Dense(kernels::Dense),
    /// GPTQ with 4 bits in groups of 128, end to end, beside GPTQModel and llm-compressor.
    Quantize(quantize::Quantize),
    /// Quantizing without data, beside copying the model.
    Copy(copy::Copy),
}

impl Bench {
    /// Measures it.
    pub(crate) fn run(self) -> Result<()> {
        match self {
            Bench::Decode(bench) => bench.run(),
            Bench::Products(bench) => bench.run(),
            Bench::Dense(bench) => bench.run(),
            Bench::Quantize(bench) => bench.run(),
            Bench::Copy(bench) => bench.run(),
        }
    }
}

/// What `command` prints.
fn output(command: &mut Command) -> Result<Vec<u8>> {
    let done = command.output().with_context(|| format!("starting {command:?}"))?;
    if !done.status.success() {
        bail!("{command:?} ended with {}: {}", done.status, String::from_utf8_lossy(&done.stderr));
    }
    Ok(done.stdout)
}

/// The same, and the seconds that it takes.
fn timed(command: &mut Command) -> Result<(f64, Vec<u8>)> {
    let start = Instant::now();
    let said = output(command)?;
    Ok((start.elapsed().as_secs_f64(), said))
}

/// Makes a scratch folder.
fn made(work: &Path) -> Result<()> {
    std::fs::create_dir_all(work).with_context(|| format!("creating {}", work.display()))
}

/// Removes what an earlier run left, and returns where it was.
fn cleared(path: PathBuf) -> Result<PathBuf> {
    let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
    match removed {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(path),
    }
}

/// An interpreter that works from any folder; a bare name is looked up in PATH.
fn interpreter(python: &Path) -> Result<PathBuf> {
    if python.components().count() < 2 {
        return Ok(python.to_owned());
    }
    std::path::absolute(python).with_context(|| format!("finding {}", python.display()))
}

/// Fails with what to do unless the interpreter runs and finds a package.
fn require_package(python: &Path, package: &str, remedy: &str) -> Result<()> {
    let program = format!("import importlib.util, sys; sys.exit(importlib.util.find_spec({package:?}) is None)");
    let found = Command::new(python).args(["-c", &program]).output();
    let found = found.with_context(|| format!("{} does not start as a Python interpreter; {remedy}", python.display()));
    if !found?.status.success() {
        bail!("{} lacks the package {package}; {remedy}", python.display());
    }
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Bytes for people.
fn megabytes(bytes: u64) -> String {
    format!("{:.0} MB", bytes as f64 / 1e6)
}

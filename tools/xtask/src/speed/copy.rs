//! `cargo xtask bench copy`: quantizing without data beside `cp` of the same folder.
//!
//! A copy reads every weight and writes as much; what rounds them to 4 bits can hardly ask for more.

use super::{cleared, made, median, megabytes, timed};
use crate::{built, root};
use anyhow::{Context, Result};
use clap::Args;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What is compared.
#[derive(Args)]
pub(crate) struct Copy {
    /// A built bitmill, in place of building it.
    #[arg(long)]
    bitmill: Option<PathBuf>,
    /// Unquantized model folder.
    #[arg(long, default_value_os_t = root().join("models/books-10m"))]
    model: PathBuf,
    /// Rounds, of whose times the median counts.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Threads of bitmill.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Scratch folder, on the disk that is written to.
    #[arg(long, default_value_os_t = root().join("target/bench"))]
    work: PathBuf,
}

impl Copy {
    /// Runs both in turns and prints medians and their ratio.
    pub(crate) fn run(&self) -> Result<()> {
        let (bitmill, rounds) = (built(self.bitmill.clone())?, self.rounds.max(1));
        made(&self.work)?;
        let (out, copy) = (self.work.join("rounded"), self.work.join("copied"));
        let mut seconds: [Vec<f64>; 2] = Default::default();
        // The first round counts for nothing: it brings the model into memory.
        for round in 0..=rounds {
            let mut ours = Command::new(&bitmill);
            ours.arg("quantize").arg(&self.model).arg("-o").arg(cleared(out.clone())?);
            ours.args(["--method", "rtn", "--bits", "4", "--group-size", "128", "--no-report", "--force"]);
            let ours = timed(ours.args(["--threads", &self.threads.to_string()]))?.0;
            let mut theirs = Command::new("cp");
            let theirs = timed(theirs.arg("-r").arg(&self.model).arg(cleared(copy.clone())?))?.0;
            if round > 0 {
                seconds[0].push(ours);
                seconds[1].push(theirs);
            }
        }
        let [ours, theirs] = seconds.map(median);
        let (read, written) = (size(&copy)?, size(&out)?);
        println!("{} of a model, {} threads, medians of {rounds} rounds in turns", megabytes(read), self.threads);
        let rate = |seconds: f64| read as f64 / seconds / 1e9;
        println!(
            "bitmill quantize --method rtn   {ours:>8.3} s  {:>6.2} GB/s read  {} written  {:.0}% of cp's speed",
            rate(ours),
            megabytes(written),
            100.0 * theirs / ours
        );
        println!("cp -r                           {theirs:>8.3} s  {:>6.2} GB/s read", rate(theirs));
        // And the log beside what was quantized.
        [out, copy, self.work.join("rounded.log.jsonl")].into_iter().try_for_each(|path| cleared(path).map(drop))
    }
}

/// Bytes of the files in a folder.
fn size(folder: &Path) -> Result<u64> {
    let listing = std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    listing
        .map(|entry| {
            let path = entry.with_context(|| format!("reading {}", folder.display()))?.path();
            if path.is_dir() { size(&path) } else { Ok(path.metadata().context("the size of a file")?.len()) }
        })
        .sum()
}

//! `bitmill eval`: how well a model predicts a text, and how far it is from another.

use crate::Common;
use crate::progress::Progress;
use anyhow::Context;
use bitmill_calibrate::{Comparison, Evaluation, Tokenizer, Windows, evaluate, read_texts};
use bitmill_checkpoint::{Checkpoint, Dtype, OutputPlan, TensorSpec};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Measure perplexity, and KL divergence from a reference model
///
/// Each window is BOS + text tokens; every position after the first is scored. Both models run in f32 from their stored
/// weights, in the same pass; dense folders, GGUF files and every format bitmill writes are read.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of the model, or a GGUF file
    model: PathBuf,
    /// Folder of the full-precision model to compare with
    #[arg(long, value_name = "MODEL")]
    reference: Option<PathBuf>,
    /// Text to predict; it must not overlap the calibration text
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    text: Vec<PathBuf>,
    /// Tokens per window, BOS included
    #[arg(long, value_name = "N", default_value_t = 512)]
    window: usize,
    /// Windows, spread evenly over the text; by default as many as it holds
    #[arg(long, value_name = "N")]
    windows: Option<usize>,
    /// Also write the tokens (`input_ids`) and logits (`logits.N` of window N) to this safetensors file
    #[arg(long, value_name = "FILE")]
    logits: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.common.set_threads()?;
    let model = Checkpoint::open(&args.model)?;
    let reference = args.reference.as_deref().map(Checkpoint::open).transpose()?;
    let spec = bitmill_models::spec(model.config())?;
    if args.window > spec.max_positions {
        let (window, reason) = (args.window, format!("the model's context is {} tokens", spec.max_positions));
        return Err(bitmill_calibrate::Error::Window { window, reason }.into());
    }
    let tokenizer = Tokenizer::of(&model, spec.bos)?;
    let texts = read_texts(&args.text)?;
    let count = args.windows.unwrap_or(usize::MAX);
    let windows = Windows::from_texts(&texts, &tokenizer, spec.vocab, args.window, count, 0)?;
    if let Some(asked) = args.windows.filter(|&n| n > windows.count()) {
        eprintln!("note: the text holds {} windows of {} tokens, not {asked}", windows.count(), args.window);
    }
    let spill = std::env::temp_dir();
    let what = Comparison {
        model: &model,
        reference: reference.as_ref(),
        stream_memory: args.common.stream_memory,
        spill_dir: &spill,
    };
    let started = Instant::now();
    let mut bar = None;
    let mut tick = |done: usize, total: usize| {
        bar.get_or_insert_with(|| Progress::new(total as u64)).set(done as u64);
    };
    let result = match &args.logits {
        None => evaluate(what, &windows, &mut tick, None)?,
        Some(file) => with_logits(what, &windows, spec.vocab, file, &mut tick)?,
    };
    if let Some(bar) = bar {
        bar.finish();
    }
    print(args, &result, started.elapsed().as_secs_f64())
}

/// Evaluates and writes `input_ids [windows, window]` and, for each window N, `logits.N [window, vocab]`: one tensor a
/// window, since the logits of all of them would not fit in memory.
fn with_logits(
    what: Comparison<'_>,
    windows: &Windows,
    vocab: usize,
    file: &Path,
    tick: &mut dyn FnMut(usize, usize),
) -> anyhow::Result<Evaluation> {
    let (count, length) = (windows.count(), windows.length);
    let names: Vec<(TensorSpec, usize)> =
        (0..count).map(|w| (TensorSpec::new(format!("logits.{w}"), Dtype::F32, vec![length, vocab]), w)).collect();
    let ids = TensorSpec::new("input_ids", Dtype::I64, vec![count, length]);
    let specs = std::iter::once(ids).chain(names.iter().map(|(s, _)| s.clone())).collect();
    let plan = OutputPlan::new(specs, u64::MAX)?;
    let folder = file.with_extension("draft");
    std::fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    let output = plan.create(&folder)?;
    let tokens: Vec<u8> = windows.tokens.iter().flatten().flat_map(|&t| i64::from(t).to_le_bytes()).collect();
    output.write("input_ids", &tokens)?;
    let result = evaluate(
        what,
        windows,
        tick,
        Some(&mut |w, logits| {
            let bytes: Vec<u8> = logits.iter().flat_map(|v| v.to_le_bytes()).collect();
            Ok(output.write(&format!("logits.{w}"), &bytes)?)
        }),
    )?;
    output.sync()?;
    let (written, _) = plan.files().next().context("no file was planned")?;
    std::fs::rename(folder.join(written), file).with_context(|| format!("naming {}", file.display()))?;
    std::fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))?;
    Ok(result)
}

fn print(args: &Args, e: &Evaluation, seconds: f64) -> anyhow::Result<()> {
    if args.common.json {
        let mut value =
            json!({"model": args.model, "reference": args.reference, "text": args.text, "seconds": seconds});
        if let (Some(all), serde_json::Value::Object(result)) = (value.as_object_mut(), serde_json::to_value(e)?) {
            all.extend(result);
        }
        println!("{value:#}");
        return Ok(());
    }
    println!("{} windows of {} tokens, {seconds:.1} s", e.windows, e.window);
    println!("perplexity          {:.4} ± {:.4}", e.perplexity.value, e.perplexity.error);
    if let Some(r) = &e.reference_perplexity {
        println!("  of the reference  {:.4} ± {:.4}", r.value, r.error);
    }
    if let Some(d) = &e.divergence {
        let (ratio, error) = d.ln_perplexity_ratio;
        println!("  ln of their ratio {ratio:.5} ± {error:.5}");
        println!("KL divergence       {:.5} ± {:.5} nats over {} positions", d.kl.mean, d.kl.error, d.positions);
        println!("  median {:.5}  90% {:.5}  99% {:.5}  max {:.3}", d.kl.median, d.kl.p90, d.kl.p99, d.kl.max);
        println!("same top token      {:.2} ± {:.2} %", d.top1_percent, d.top1_error);
        let [p1, p5, p50, p95, p99] = d.delta_p_quantiles;
        println!("Δp of correct token {:.3} % mean, {:.3} % rms", d.delta_p_mean, d.delta_p_rms);
        println!("  1% {p1:.2}  5% {p5:.2}  50% {p50:.3}  95% {p95:.2}  99% {p99:.2}");
    }
    Ok(())
}

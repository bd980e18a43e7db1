//! `bitmill eval`: how well a model predicts a text, and how far it is from another; for an encoder, how far its
//! embeddings of sentences or images are from another's.

use crate::Common;
use crate::progress::Progress;
use crate::text::only_what_it_reads;
use anyhow::{Context, bail, ensure};
use bitmill_calibrate::{
    Comparison, Embedded, Error, Evaluation, Pooling, Sentences, Similarity, Tokenizer, Windows, compare_embeddings,
    evaluate, read_texts,
};
use bitmill_checkpoint::{Checkpoint, Dtype, Output, OutputPlan, TensorSpec};
use bitmill_models::ModelSpec;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Measure perplexity and KL divergence from a reference model; of encoders, cosine similarity of embeddings
///
/// Decoders: each window is BOS + text tokens; every position after the first is scored. Encoders: each line of the text is
/// a sentence, embedded as the folder's sentence-transformers files say (else by mean pooling) and compared with the
/// reference's embedding. Models of images: each image of --images is embedded as its first hidden state. Models run in f32 from their stored weights; dense folders, GGUF files and every format
/// bitmill writes are read.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of the model, or a GGUF file
    pub(crate) model: PathBuf,
    /// Folder of the full-precision model to compare with
    #[arg(long, value_name = "MODEL")]
    pub(crate) reference: Option<PathBuf>,
    /// Text to predict or embed; it must not overlap the calibration text
    #[arg(long, value_name = "FILE", required_unless_present = "images", num_args = 1..)]
    text: Vec<PathBuf>,
    /// Images to embed, in the place of text: safetensors files with a tensor pixel_values, [N, channels, height, width] in
    /// float32, as the model's own image processor makes it
    #[arg(long, value_name = "FILE", conflicts_with_all = ["text", "window"], num_args = 1..)]
    images: Vec<PathBuf>,
    /// Tokens per window, BOS included [default: 512]; of an encoder, most tokens per sentence [default: as its folder says]
    #[arg(long, value_name = "N")]
    window: Option<usize>,
    /// Windows, sentences or images, spread evenly over the text or the files; by default as many as they hold
    #[arg(long, value_name = "N")]
    windows: Option<usize>,
    /// Also write the tokens (`input_ids`) and logits (`logits.N` of window N) to this safetensors file
    #[arg(long, value_name = "FILE")]
    logits: Option<PathBuf>,
    /// Also write an encoder's embeddings, of length 1 (`embeddings`, one row per sentence or image), to this safetensors file
    #[arg(long, value_name = "FILE", conflicts_with = "logits")]
    embeddings: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) common: Common,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.common.set_threads()?;
    let model = Checkpoint::open(&args.model)?;
    let reference = args.reference.as_deref().map(Checkpoint::open).transpose()?;
    let spec = bitmill_models::spec_of(&model)?;
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
    let asked = if spec.images.is_some() { &args.images } else { &args.text };
    ensure!(!asked.is_empty(), "a {} model reads {}; give --{} FILE", spec.model_type, spec.reads(), spec.reads());
    only_what_it_reads(&asked.iter().map(PathBuf::as_path).collect::<Vec<_>>(), &spec)?;
    if spec.causal {
        let windows = text_windows(args, &model, &spec)?;
        let result = match &args.logits {
            None => evaluate(what, &windows, &mut tick, None)?,
            Some(file) => with_logits(what, &windows, spec.vocab, file, &mut tick)?,
        };
        if let Some(bar) = bar {
            bar.finish();
        }
        print(args, &result, started.elapsed().as_secs_f64())
    } else {
        let (windows, pooling) = embedded(args, &model, &spec)?;
        let (result, embeddings) = compare_embeddings(what, &windows, pooling, &mut tick)?;
        if let Some(file) = &args.embeddings {
            write_embeddings(file, &embeddings)?;
        }
        if let Some(bar) = bar {
            bar.finish();
        }
        print_similarity(args, &result, started.elapsed().as_secs_f64())
    }
}

/// The windows of a decoder.
fn text_windows(args: &Args, model: &Checkpoint, spec: &ModelSpec) -> anyhow::Result<Windows> {
    if args.embeddings.is_some() {
        bail!("--embeddings is for encoders; a {} model predicts tokens, which --logits writes", spec.model_type);
    }
    let window = args.window.unwrap_or(512);
    fits(window, spec)?;
    let count = args.windows.unwrap_or(usize::MAX);
    let (texts, tokenizer) = (read_texts(&args.text)?, Tokenizer::of(model, spec.bos)?);
    let windows = Windows::from_texts(&texts, &tokenizer, spec.vocab, window, count, 0)?;
    if let Some(asked) = args.windows.filter(|&n| n > windows.count()) {
        eprintln!("note: the text holds {} windows of {window} tokens, not {asked}", windows.count());
    }
    Ok(windows)
}

/// The sentences or images of an encoder, and how their hidden states become embeddings.
fn embedded(args: &Args, model: &Checkpoint, spec: &ModelSpec) -> anyhow::Result<(Windows, Pooling)> {
    if args.logits.is_some() {
        let (kind, reads) = (&spec.model_type, spec.reads());
        bail!("--logits is for decoders; a {kind} model embeds {reads}, and --embeddings writes that");
    }
    if args.reference.is_none() && args.embeddings.is_none() {
        bail!(
            "a {} model predicts no tokens, so it has no perplexity; give --reference MODEL to compare its embeddings with, \
             or --embeddings FILE to write them",
            spec.model_type
        );
    }
    let count = args.windows.unwrap_or(usize::MAX);
    if let Some(images) = &spec.images {
        let windows = Windows::images(&args.images, images, count, 0)?;
        if let Some(asked) = args.windows.filter(|&n| n > windows.count()) {
            eprintln!("note: there are {} images, not {asked}", windows.count());
        }
        // The token that stands for the whole image.
        return Ok((windows, Pooling::Cls));
    }
    let how = Sentences::of(model)?;
    if let Some(window) = args.window {
        fits(window, spec)?;
    }
    let limit = args.window.or(how.limit).unwrap_or(spec.max_positions).min(spec.max_positions);
    let (texts, tokenizer) = (read_texts(&args.text)?, Tokenizer::of(model, spec.bos)?);
    let sentences = Windows::sentences(&texts, &tokenizer, spec.vocab, limit, count, 0)?;
    if let Some(asked) = args.windows.filter(|&n| n > sentences.count()) {
        eprintln!("note: the text holds {} sentences, not {asked}", sentences.count());
    }
    Ok((sentences, how.pooling))
}

fn fits(window: usize, spec: &ModelSpec) -> Result<(), Error> {
    if window > spec.max_positions {
        return Err(Error::Window { window, reason: format!("the model's context is {} tokens", spec.max_positions) });
    }
    Ok(())
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
    let mut result = None;
    write_file(file, specs, |output| {
        let tokens: Vec<u8> =
            (0..count).flat_map(|w| windows.tokens(w)).flat_map(|&t| i64::from(t).to_le_bytes()).collect();
        output.write("input_ids", &tokens)?;
        let evaluation = evaluate(
            what,
            windows,
            tick,
            Some(&mut |w, logits| {
                let bytes: Vec<u8> = logits.iter().flat_map(|v| v.to_le_bytes()).collect();
                Ok(output.write(&format!("logits.{w}"), &bytes)?)
            }),
        )?;
        result = Some(evaluation);
        Ok(())
    })?;
    result.context("nothing was evaluated")
}

/// Writes `embeddings [sentences, hidden]`.
fn write_embeddings(file: &Path, embeddings: &[Vec<f32>]) -> anyhow::Result<()> {
    let width = embeddings.first().map_or(0, Vec::len);
    let spec = TensorSpec::new("embeddings", Dtype::F32, vec![embeddings.len(), width]);
    write_file(file, vec![spec], |output| {
        let bytes: Vec<u8> = embeddings.iter().flatten().flat_map(|v| v.to_le_bytes()).collect();
        Ok(output.write("embeddings", &bytes)?)
    })
}

/// Writes one safetensors file, which appears under its name only when `fill` is done with it.
fn write_file(
    file: &Path,
    specs: Vec<TensorSpec>,
    fill: impl FnOnce(&Output) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let plan = OutputPlan::new(specs, u64::MAX)?;
    let folder = file.with_extension("draft");
    std::fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    let output = plan.create(&folder)?;
    fill(&output)?;
    output.sync()?;
    let (written, _) = plan.files().next().context("no file was planned")?;
    std::fs::rename(folder.join(written), file).with_context(|| format!("naming {}", file.display()))?;
    std::fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))?;
    Ok(())
}

/// Prints a result as JSON, with what it is of.
fn print_json(args: &Args, result: &impl serde::Serialize, seconds: f64) -> anyhow::Result<()> {
    let (read, files) = if args.images.is_empty() { ("text", &args.text) } else { ("image_files", &args.images) };
    let mut value = json!({"model": args.model, "reference": args.reference, read: files, "seconds": seconds});
    if let (Some(all), serde_json::Value::Object(result)) = (value.as_object_mut(), serde_json::to_value(result)?) {
        all.extend(result);
    }
    println!("{value:#}");
    Ok(())
}

fn print_similarity(args: &Args, s: &Similarity, seconds: f64) -> anyhow::Result<()> {
    if args.common.json {
        return print_json(args, s, seconds);
    }
    let Similarity { tokens, longest, .. } = s;
    match s.embedded {
        Embedded::Sentences(n) => println!("{n} sentences, {tokens} tokens, {longest} in the longest, {seconds:.1} s"),
        Embedded::Images(n) => println!("{n} images of {longest} tokens, {seconds:.1} s"),
    }
    if let Some(c) = &s.cosine {
        println!("cosine similarity   {:.6} ± {:.6} of embeddings to the reference's", c.mean, c.error);
        println!("  min {:.6}  1% {:.6}  10% {:.6}  median {:.6}", c.min, c.p1, c.p10, c.median);
    }
    Ok(())
}

fn print(args: &Args, e: &Evaluation, seconds: f64) -> anyhow::Result<()> {
    if args.common.json {
        return print_json(args, e, seconds);
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

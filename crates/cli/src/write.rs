//! `bitmill write`: calibration text by the model itself.

use crate::progress::Progress;
use crate::run::stops;
use crate::{Common, units};
use anyhow::{Context, bail, ensure};
use bitmill_calibrate::{Author, Tokenizer, Windows, author_memory, splitmix, together};
use bitmill_checkpoint::Checkpoint;
use bitmill_models::{Block, Ends, ModelSpec, RopeTable};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Have a model write its own calibration text, where there is no text of its use
///
/// Every text begins where the model's texts begin and goes on by sampling from its predictions as they are, so it is about what
/// the model was trained on, and no data is needed. `quantize --calibration FILE` then calibrates on it. The whole model is held in
/// memory, in f32.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of the model, or a GGUF file
    pub(crate) model: PathBuf,
    /// File to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Windows of calibration to write text for
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = units::parse_positive)]
    samples: usize,
    /// Tokens per window; shortened to the model's context
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = units::parse_positive)]
    sequence_length: usize,
    /// Other seeds, other texts
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Replace FILE if it exists
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// How many times the texts asked for are written at most, where they end early.
const ROUNDS: usize = 8;

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.common.set_threads()?;
    ensure!(
        args.force || !args.output.exists(),
        "{} exists; choose another name or pass --force to replace it",
        args.output.display()
    );
    let model = Checkpoint::open(&args.model)?;
    let spec = bitmill_models::spec_of(&model)?;
    if !spec.causal {
        bail!("a {} model does not write; give it {} of its use with --calibration", spec.model_type, spec.reads());
    }
    let length = args.sequence_length.min(spec.max_positions);
    let tokenizer = Tokenizer::of(&model, spec.bos)?;
    let (parent, name) = (args.output.parent().filter(|p| !p.as_os_str().is_empty()), args.output.file_name());
    std::fs::create_dir_all(parent.unwrap_or(Path::new("."))).context("creating the folder of the text")?;
    let mut draft = name.context("the text needs the name of a file")?.to_owned();
    draft.push(".draft");
    let draft = args.output.with_file_name(draft);
    let started = Instant::now();
    let texts = texts(&model, &spec, &tokenizer, (args.samples, length, args.seed))?;
    let tokens = texts.iter().map(Vec::len).sum::<usize>();
    let texts = texts.iter().map(|text| tokenizer.decode(text)).collect::<Result<Vec<_>, _>>()?;
    std::fs::write(&draft, texts.join("\n\n"))
        .and_then(|()| std::fs::rename(&draft, &args.output))
        .with_context(|| format!("writing {}", args.output.display()))?;
    let seconds = started.elapsed().as_secs_f64();
    if args.common.json {
        let value = json!({"text": args.output, "texts": texts.len(), "tokens": tokens, "seconds": seconds});
        println!("{value:#}");
    } else {
        let (file, count) = (args.output.display(), texts.len());
        println!("{file}: {count} texts of {tokens} tokens in all, in {seconds:.1} s");
    }
    Ok(())
}

/// Weights of `model`.
pub(crate) fn parameters(model: &Checkpoint) -> u64 {
    let sizes = model.names().filter_map(|name| model.shape_of(name));
    sizes.map(|shape| shape.iter().product::<usize>() as u64).sum()
}

/// `count` windows of `length` tokens that `model` writes itself, or fewer where it keeps ending its texts early.
pub(crate) fn windows(
    model: &Checkpoint,
    spec: &ModelSpec,
    tokenizer: &Tokenizer,
    (count, length, seed): (usize, usize, u64),
) -> anyhow::Result<Windows> {
    let begin = tokenizer.bos();
    let tokens = texts(model, spec, tokenizer, (count, length, seed))?.concat();
    let window = |own: &[u32]| begin.into_iter().chain(own.iter().copied()).collect();
    let own = length - usize::from(begin.is_some());
    Ok(Windows::of_tokens(tokens.chunks_exact(own).take(count).map(window).collect()))
}

/// Texts that fill `count` windows of `length` tokens, fewer only where the model keeps ending them early; each without the token
/// that begins all of them.
fn texts(
    model: &Checkpoint,
    spec: &ModelSpec,
    tokenizer: &Tokenizer,
    (count, length, seed): (usize, usize, u64),
) -> anyhow::Result<Vec<Vec<u32>>> {
    let begins = usize::from(tokenizer.bos().is_some());
    ensure!(length > begins, "a window of {length} tokens leaves the model nothing to write");
    let wanted = count * (length - begins);
    let memory = 4 * parameters(model) + author_memory(spec, length) as u64;
    eprintln!("the model writes {wanted} tokens, which takes {} of memory", units::bytes(memory));
    if let Some(free) = units::available_memory().filter(|&free| free < memory) {
        eprintln!("note: only {} are free: expect it to swap or to be killed", units::bytes(free));
    }
    let ends = Ends::load(spec, model)?;
    let blocks = (0..spec.layers).map(|i| Block::load(spec, i, model)).collect::<Result<Vec<_>, _>>()?;
    let rope = RopeTable::new(&spec.ropes, length)?;
    let author = Author { embedding: &ends.embedding, blocks: &blocks, head: &ends.head, rope: &rope, length };
    let (stops, at_once) = (stops(model, spec), together(spec, length).min(count));
    let bar = Progress::new(wanted as u64);
    let (mut texts, mut tokens, mut number) = (Vec::new(), 0, 0u64);
    while tokens < wanted && number < (ROUNDS * count) as u64 {
        // A model without a token to begin with begins with any.
        let random = |w: usize, at: u64| splitmix(splitmix(seed ^ splitmix(number + w as u64)) ^ splitmix(at));
        let begin = |w: usize| tokenizer.bos().unwrap_or_else(|| (random(w, 0) % spec.vocab as u64) as u32);
        let starts = (0..at_once).map(|w| vec![begin(w)]).collect();
        for written in author.write(starts, &random)? {
            // What follows an end is another text, whose beginning nobody gave.
            let end = written.tokens.iter().skip(1).position(|t| stops.contains(t)).map_or(length, |at| at + 1);
            tokens += end - begins;
            texts.push(written.tokens[begins..end].to_vec());
        }
        number += at_once as u64;
        bar.set(tokens as u64);
    }
    bar.finish();
    Ok(texts)
}

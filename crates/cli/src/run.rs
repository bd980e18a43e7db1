//! `bitmill run`: a model continues a text, so that a person can see it speak.

use crate::{Common, units};
use anyhow::{Context, bail};
use bitmill_calibrate::{Tokenizer, splitmix, uniform};
use bitmill_checkpoint::Checkpoint;
use bitmill_kernels::awake;
use bitmill_models::{AsStored, Block, Decoder, Ends, ModelSpec, Precision, RopeTable, draw, softmax};
use serde_json::{Value, json};
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

/// Continue a text: with the original, or with any folder or GGUF file that bitmill reads
///
/// Integers in groups of a multiple of 32 and 16-bit weights are read as they are stored, so a quantized model takes the
/// memory of its file; weights of other kinds are expanded to f32, and how many is said.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of the model, or a GGUF file
    pub(crate) model: PathBuf,
    /// Text to continue
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// Most tokens to add
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = units::parse_positive)]
    tokens: usize,
    /// Spread of the choice of a token; 0 always takes the most likely
    #[arg(long, value_name = "T", default_value_t = 0.8)]
    temperature: f32,
    /// Choose among this many most likely tokens; 0 among all
    #[arg(long, value_name = "N", default_value_t = 40)]
    top_k: usize,
    /// Seed of the choice
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// How products with quantized weights read their input: rounded to 8 bits, 128 numbers sharing a scale, or in f32
    #[arg(long, value_name = "KIND", default_value = "int8")]
    activations: Activations,
    #[command(flatten)]
    pub(crate) common: Common,
}

/// Values of `--activations`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Activations {
    Int8,
    F32,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.common.set_threads()?;
    if !(args.temperature >= 0.0 && args.temperature.is_finite()) {
        bail!("--temperature {}: a number from 0 on is needed", args.temperature);
    }
    let model = Checkpoint::open(&args.model)?;
    let spec = bitmill_models::spec_of(&model)?;
    if !spec.causal {
        bail!("a {} model does not continue text; `bitmill eval --embeddings` shows what it does", spec.model_type);
    }
    let tokenizer = Tokenizer::of(&model, spec.bos)?;
    let mut tokens: Vec<u32> = tokenizer.bos().into_iter().chain(tokenizer.encode(&args.prompt, spec.vocab)?).collect();
    if tokens.is_empty() {
        bail!("this model needs a --prompt that is not empty: it has no token to begin a text with");
    }
    let (prompt, capacity) = (tokens.len(), spec.max_positions.min(tokens.len() + args.tokens));
    if prompt >= spec.max_positions {
        bail!("the prompt has {prompt} tokens, and the model's context is {}", spec.max_positions);
    }
    let precision = match args.activations {
        Activations::Int8 => Precision::Int8,
        Activations::F32 => Precision::Full,
    };
    let stored = AsStored { folder: &model, precision };
    let ends = Ends::load(&spec, &stored)?;
    let blocks = (0..spec.layers).map(|i| Block::load(&spec, i, &stored)).collect::<Result<Vec<_>, _>>()?;
    let expanded: usize = blocks.iter().map(Block::expanded).sum();
    let weights: usize = blocks.iter().map(Block::bytes).sum();
    if expanded > 0 {
        eprintln!(
            "{expanded} linears are expanded to f32: their kind of weight has no kernel that reads it as it is stored"
        );
    }
    let rope = RopeTable::new(&spec.ropes, capacity)?;
    let mut decoder = Decoder::new(&ends.embedding, &blocks, &rope, 1, capacity)?;
    let stops = stops(&model, &spec);
    // On a thread of the pool, so that handing work to the others costs no wait.
    let speed = rayon::scope(|_| -> anyhow::Result<[f64; 2]> {
        let mut shown = Shown::new(&tokenizer, args.common.json);
        let started = Instant::now();
        let mut h = decoder.begin(&tokens)?;
        let reading = started.elapsed().as_secs_f64();
        shown.text(&tokens)?;
        let started = Instant::now();
        awake(|| -> anyhow::Result<()> {
            while tokens.len() < capacity {
                if tokens.len() > prompt {
                    h = decoder.step(&tokens[tokens.len() - 1..])?;
                }
                let logits: Vec<f32> = ends.logits(&h)?.flatten_all()?.to_vec1()?;
                let token = choose(logits, args, tokens.len());
                if stops.contains(&token) {
                    break;
                }
                tokens.push(token);
                shown.text(&tokens)?;
            }
            Ok(())
        })?;
        let made = tokens.len() - prompt;
        let rate = |count: usize, seconds: f64| if count == 0 { 0.0 } else { count as f64 / seconds };
        Ok([rate(prompt, reading), rate(made, started.elapsed().as_secs_f64())])
    });
    let ([reading, writing], made) = (speed?, tokens.len() - prompt);
    if args.common.json {
        let value = json!({
            "model": args.model, "text": tokenizer.decode(&tokens)?, "token_ids": tokens, "prompt_tokens": prompt,
            "new_tokens": made, "prompt_tokens_per_second": reading, "tokens_per_second": writing,
            "block_bytes": weights, "expanded_linears": expanded,
        });
        println!("{value:#}");
    } else {
        println!();
        eprintln!("{made} tokens, {writing:.1} per second; prompt of {prompt}, {reading:.1} per second");
    }
    Ok(())
}

/// The tokens that end a text.
pub(crate) fn stops(model: &Checkpoint, spec: &ModelSpec) -> Vec<u32> {
    let file = std::fs::read(model.dir().join("generation_config.json")).ok();
    let generation: Value = file.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
    let named = [&model.config()["eos_token_id"], &generation["eos_token_id"]];
    let ids = named.into_iter().flat_map(|v| v.as_array().cloned().unwrap_or_else(|| vec![v.clone()]));
    ids.filter_map(|id| id.as_u64()).filter(|&id| id < spec.vocab as u64).map(|id| id as u32).collect()
}

/// The next token, the `at`th of its text.
fn choose(mut logits: Vec<f32>, args: &Args, at: usize) -> u32 {
    if args.temperature < 1e-6 {
        // The first of the likeliest.
        let likelier = |best: usize, i: usize| if logits[i].total_cmp(&logits[best]).is_gt() { i } else { best };
        return (0..logits.len()).fold(0, likelier) as u32;
    }
    let likelier = |a: &usize, b: &usize, logits: &[f32]| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
    let mut ranked: Vec<usize> = (0..logits.len()).collect();
    let kept = if args.top_k == 0 { ranked.len() } else { args.top_k.min(ranked.len()) };
    if kept < ranked.len() {
        ranked.select_nth_unstable_by(kept - 1, |a, b| likelier(a, b, &logits));
        ranked[kept..].iter().for_each(|&i| logits[i] = f32::NEG_INFINITY);
    }
    softmax(&mut logits, 1.0 / args.temperature);
    draw(&logits, uniform(splitmix(args.seed ^ splitmix(at as u64)))) as u32
}

/// Text as it grows, on standard output.
struct Shown<'a> {
    tokenizer: &'a Tokenizer,
    silent: bool,
    /// Tokens whose text is out.
    tokens: usize,
    /// Where the tokens begin that are decoded with the next one, as they may change how it reads.
    from: usize,
}

impl<'a> Shown<'a> {
    fn new(tokenizer: &'a Tokenizer, silent: bool) -> Self {
        Shown { tokenizer, silent, tokens: 0, from: 0 }
    }

    /// Shows what `tokens` say more than before; a character whose last token is still to come waits for it.
    fn text(&mut self, tokens: &[u32]) -> anyhow::Result<()> {
        if self.silent {
            return Ok(());
        }
        let before = self.tokenizer.decode(&tokens[self.from..self.tokens])?;
        let text = self.tokenizer.decode(&tokens[self.from..])?;
        if text.ends_with('\u{fffd}') {
            return Ok(());
        }
        let mut out = std::io::stdout().lock();
        let new = text.get(before.len()..).unwrap_or_default();
        out.write_all(new.as_bytes()).and_then(|()| out.flush()).context("writing the text")?;
        (self.from, self.tokens) = (self.tokens, tokens.len());
        Ok(())
    }
}

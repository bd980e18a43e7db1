//! `bitmill inspect`: what a model folder, a GGUF file or a safetensors file holds, from headers.

use crate::units;
use bitmill_checkpoint::Checkpoint;
use bitmill_checkpoint::gguf::Gguf;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Show what a model folder, a GGUF file or a safetensors file holds
///
/// Reads headers only: architecture, format, and for every way of storing weights the number of tensors, weights, bytes
/// and bits per weight.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of a model, or one GGUF or safetensors file
    pub(crate) path: PathBuf,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    /// Print JSON on standard output
    #[arg(long)]
    json: bool,
}

/// Tensors stored the same way.
#[derive(Default)]
struct Kind {
    tensors: u64,
    weights: u64,
    bytes: u64,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let checkpoint = match args.path.is_file() {
        true => Checkpoint::open_file(&args.path)?,
        false => Checkpoint::open(&args.path)?,
    };
    let spec = bitmill_models::spec(checkpoint.config());
    let model_type = checkpoint.config()["model_type"].as_str().unwrap_or("unknown").to_owned();
    let format = checkpoint.dialect().map_or("dense", |d| d.format().name());
    let kinds = match checkpoint.gguf() {
        Some(gguf) => gguf_kinds(gguf),
        None => folder_kinds(&checkpoint)?,
    };
    let weights: u64 = kinds.values().map(|k| k.weights).sum();
    let bytes: u64 = kinds.values().map(|k| k.bytes).sum();
    let files: Vec<String> = checkpoint.shard_paths().map(|p| p.display().to_string()).collect();
    if args.json {
        let kinds: Vec<_> = (kinds.iter())
            .map(|(k, v)| json!({"stored_as": k, "tensors": v.tensors, "weights": v.weights, "bytes": v.bytes, "bits_per_weight": bits(v)}))
            .collect();
        let tensors: Vec<_> = (checkpoint.names())
            .filter_map(|n| checkpoint.spec(n))
            .map(|s| json!({"name": s.name, "dtype": format!("{:?}", s.dtype), "shape": s.shape, "bytes": s.bytes()}))
            .collect();
        let value = json!({
            "path": args.path, "model_type": model_type, "known_architecture": spec.is_ok(), "format": format,
            "weights": weights, "bytes": bytes, "files": files, "kinds": kinds, "tensors": tensors,
        });
        println!("{value:#}");
        return Ok(());
    }
    println!(
        "{}: {model_type}, {format}, {} weights in {}",
        args.path.display(),
        units::count(weights),
        units::bytes(bytes)
    );
    if let Ok(s) = &spec {
        let reads = match s.images {
            Some(images) => format!("images {:?} in patches {:?}", images.shape(), images.patch),
            None => format!("vocabulary {}", s.vocab),
        };
        println!(
            "{} blocks, hidden {}, intermediate {}, {} heads over {} of {}, {reads}, context {}",
            s.layers, s.hidden, s.intermediate, s.heads, s.kv_heads, s.head_dim, s.max_positions
        );
    }
    println!("{:<18} {:>8} {:>10} {:>10} {:>8}", "stored as", "tensors", "weights", "bytes", "bits");
    for (name, k) in &kinds {
        println!(
            "{name:<18} {:>8} {:>10} {:>10} {:>8.3}",
            k.tensors,
            units::count(k.weights),
            units::bytes(k.bytes),
            bits(k)
        );
    }
    if args.tensors {
        for spec in checkpoint.names().filter_map(|n| checkpoint.spec(n)) {
            println!("{:?} {:?} {}", spec.dtype, spec.shape, spec.name);
        }
    }
    Ok(())
}

/// What a GGUF file holds, by type.
fn gguf_kinds(gguf: &Gguf) -> BTreeMap<String, Kind> {
    let mut kinds = BTreeMap::new();
    for t in &gguf.tensors {
        add(&mut kinds, t.kind.name.to_owned(), t.shape.iter().product::<usize>() as u64, t.range.len() as u64);
    }
    kinds
}

/// What a folder holds, by scheme or type.
fn folder_kinds(checkpoint: &Checkpoint) -> anyhow::Result<BTreeMap<String, Kind>> {
    let mut kinds: BTreeMap<String, Kind> = BTreeMap::new();
    // A module's tensors do not always follow one another.
    let mut modules: BTreeMap<&str, u64> = BTreeMap::new();
    for spec in checkpoint.names().filter_map(|name| checkpoint.spec(name)) {
        let (weights, bytes) = (spec.shape.iter().product::<usize>() as u64, spec.bytes() as u64);
        match checkpoint.module_of(&spec.name) {
            Some(module) => *modules.entry(module).or_default() += bytes,
            None => add(&mut kinds, format!("{:?}", spec.dtype), weights, bytes),
        }
    }
    for (module, bytes) in modules {
        let Some(scheme) = checkpoint.scheme_of(module) else { continue };
        let [rows, cols] = checkpoint.matrix_shape(module)?;
        add(&mut kinds, scheme.to_string(), (rows * cols) as u64, bytes);
    }
    Ok(kinds)
}

fn bits(k: &Kind) -> f64 {
    k.bytes as f64 * 8.0 / k.weights.max(1) as f64
}

fn add(kinds: &mut BTreeMap<String, Kind>, name: String, weights: u64, bytes: u64) {
    let kind = kinds.entry(name).or_default();
    kind.tensors += 1;
    kind.weights += weights;
    kind.bytes += bytes;
}

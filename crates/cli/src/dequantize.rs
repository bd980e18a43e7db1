//! `bitmill dequantize`: a quantized folder or GGUF file in, a folder of plain numbers out.

use crate::{Common, units};
use anyhow::{Context, ensure};
use bitmill_calibrate::tokenizer_files;
use bitmill_checkpoint::{Checkpoint, Dtype, OutputPlan, TensorSpec, TensorView};
use bitmill_quantize::transpose;
use bitmill_scheme::Scheme;
use clap::ValueEnum;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Write the numbers that a quantized model stands for
///
/// Reads a GGUF file or any quantized folder and writes OUT, a folder of config.json, tokenizer and weights as plain numbers,
/// under the names and in the row order of Hugging Face folders. f32 holds every stored value exactly.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// GGUF file, or folder of a quantized model
    model: PathBuf,
    /// Folder to write
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// Type of the numbers; vectors of a GGUF file stay as they are
    #[arg(long, value_enum, value_name = "TYPE", default_value = "f32")]
    dtype: Numbers,
    /// Largest size of one weight file
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = units::parse_bytes)]
    max_shard_size: u64,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Numbers {
    /// Single precision
    F32,
    /// Half precision
    F16,
    /// bfloat16
    Bf16,
}

/// A tensor of the output, and the module whose weight it is, if that is quantized.
type Planned = (TensorSpec, Option<String>);

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.common.set_threads()?;
    let out = &args.output;
    ensure!(!out.exists(), "{} exists; choose another name", out.display());
    let input = Checkpoint::open(&args.model)?;
    ensure!(input.dialect().is_some(), "{} is not quantized; there is nothing to do", args.model.display());
    let dtype = match args.dtype {
        Numbers::F32 => Dtype::F32,
        Numbers::F16 => Dtype::F16,
        Numbers::Bf16 => Dtype::BF16,
    };
    // Where the family stores dense linears [in, out], those that were quantized return to that.
    let transposed = bitmill_models::spec_of(&input).is_ok_and(|spec| spec.layout.transposed);
    let planned = tensors(&input, dtype, transposed)?;
    let plan = OutputPlan::new(planned.iter().map(|(spec, _)| spec.clone()).collect(), args.max_shard_size)?;
    let mut draft = out.as_os_str().to_owned();
    draft.push(".draft");
    let draft = PathBuf::from(draft);
    let output = plan.create(&draft)?;
    for (spec, module) in &planned {
        let values = match module {
            Some(module) => {
                let weight = input.weight(module)?;
                let values = weight.to_f32()?;
                if transposed { transpose(&values, weight.shape()) } else { values }
            }
            None => input.tensor(&spec.name)?.to_f32()?,
        };
        output.write(&spec.name, &payload(&values, spec)?)?;
    }
    output.sync()?;
    companions(&input, dtype, &draft)?;
    std::fs::rename(&draft, out).with_context(|| format!("naming {}", out.display()))?;
    let bytes = plan.total_bytes();
    if args.common.json {
        println!("{:#}", json!({"output": out, "tensors": planned.len(), "bytes": bytes}));
    } else {
        println!("{}: {} tensors, {}", out.display(), planned.len(), units::bytes(bytes));
    }
    Ok(())
}

/// What the output holds: every weight once, and none of what belongs to a quantized one.
fn tensors(input: &Checkpoint, dtype: Dtype, transposed: bool) -> anyhow::Result<Vec<Planned>> {
    let mut schemes: BTreeMap<&str, Option<Scheme>> = BTreeMap::new();
    let mut planned = Vec::new();
    for name in input.names() {
        let (module, part) = name.rsplit_once('.').unwrap_or((name, ""));
        let scheme = *schemes.entry(module).or_insert_with(|| input.scheme_of(module));
        let (Some(spec), true) = (input.spec(name), name != "rope_freqs.weight") else { continue };
        if scheme.is_none() || part == "bias" {
            // In a GGUF file vectors are f32 whatever the matrices are.
            let own = if spec.shape.len() == 1 && input.gguf().is_some() { spec.dtype } else { dtype };
            planned.push((TensorSpec::new(name, own, spec.shape.clone()), None));
        } else if !planned.iter().any(|(_, m): &Planned| m.as_deref() == Some(module)) {
            let [rows, cols] = input.weight(module)?.shape();
            let shape = if transposed { [cols, rows] } else { [rows, cols] };
            planned.push((TensorSpec::new(format!("{module}.weight"), dtype, shape), Some(module.to_owned())));
        }
    }
    Ok(planned)
}

fn payload(values: &[f32], spec: &TensorSpec) -> anyhow::Result<Vec<u8>> {
    let typed = |bytes| TensorView {
        name: &spec.name,
        file: Path::new(""),
        dtype: spec.dtype,
        shape: &spec.shape,
        bytes,
        interleaved: None,
    };
    let bytes = typed(&[]).with_values(values)?;
    let beyond = typed(&bytes).first_non_finite().map(|i| values[i]);
    ensure!(beyond.is_none(), "{}: {beyond:?} is beyond {:?}; choose --dtype bf16 or f32", spec.name, spec.dtype);
    Ok(bytes)
}

/// Configuration and tokenizer.
fn companions(input: &Checkpoint, dtype: Dtype, dir: &Path) -> anyhow::Result<()> {
    let mut config = input.config().clone();
    if let Some(config) = config.as_object_mut() {
        config.remove("quantization_config");
        let name = match dtype {
            Dtype::F16 => "float16",
            Dtype::BF16 => "bfloat16",
            _ => "float32",
        };
        config.insert("torch_dtype".into(), json!(name));
    }
    let write = |name: &str, value: &Value| {
        let path = dir.join(name);
        std::fs::write(&path, format!("{value:#}\n")).with_context(|| format!("writing {}", path.display()))
    };
    write("config.json", &config)?;
    if let Some(gguf) = input.gguf() {
        return tokenizer_files(gguf, input.dir())?.iter().try_for_each(|(name, value)| write(name, value));
    }
    for file in input.other_files()? {
        let (from, to) = (input.dir().join(&file), dir.join(&file));
        if let Some(parent) = to.parent() {
            std::fs::create_dir_all(parent).with_context(|| format!("creating {}", parent.display()))?;
        }
        std::fs::copy(&from, &to).with_context(|| format!("copying {}", from.display()))?;
    }
    Ok(())
}

//! `bitmill dequantize`: a quantized folder or GGUF file in, a folder of plain numbers out. It is a conversion that may
//! round.

use crate::convert::Convert;
use crate::{Common, units};
use bitmill_checkpoint::Dtype;
use bitmill_quantize::Target;
use clap::ValueEnum;
use std::path::PathBuf;

/// Write the numbers that a quantized model stands for
///
/// Reads a GGUF file or any quantized folder and writes OUT, a folder of config.json, tokenizer and weights as plain numbers,
/// under the names and in the row order of Hugging Face folders. f32 holds every stored value exactly; `bitmill convert --format
/// f16` refuses where f16 does not.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// GGUF file, or folder of a quantized model
    pub(crate) model: PathBuf,
    /// Folder to write
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// Type of the numbers; vectors of a GGUF file stay as they are
    #[arg(long, value_enum, value_name = "TYPE", default_value = "f32")]
    dtype: Numbers,
    /// Largest size of one weight file
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = units::parse_bytes)]
    max_shard_size: u64,
    /// Replace OUT if it exists
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    pub(crate) common: Common,
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

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.common.set_threads()?;
    let target = Target::Dense(match args.dtype {
        Numbers::F32 => Dtype::F32,
        Numbers::F16 => Dtype::F16,
        Numbers::Bf16 => Dtype::BF16,
    });
    let asked = Convert { model: &args.model, out: &args.output, target, lossy: true, shard: args.max_shard_size };
    asked.run(false, args.force, args.common.json)
}

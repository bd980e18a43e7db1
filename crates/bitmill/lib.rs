//! bitmill: post-training quantization of neural-network weights.
//!
//! This crate is a facade over the rooms of the workspace, which depend on one another from left to right:
//! [`scheme`] ← [`kernels`] ← [`checkpoint`] ← [`models`] ← [`calibrate`] ← [`quantize`].
//!
//! ```no_run
//! use bitmill::checkpoint::Checkpoint;
//! use bitmill::quantize::{Plan, RunOptions, Settings, run};
//! use bitmill::scheme::{Bits, Granularity, Scheme};
//! use std::path::Path;
//!
//! let input = Checkpoint::open(Path::new("models/books-10m"))?;
//! let scheme = Scheme::int(Bits::new(4)?, true, Granularity::Group(128));
//! let settings = Settings { sequence_length: 512, ..Settings::new("rtn", "pack-quantized", scheme) };
//! let plan = Plan::new(&input, &settings)?;
//! let stop = std::sync::atomic::AtomicBool::new(false);
//! let options = RunOptions::new(&stop);
//! run(&input, &plan, None, Path::new("out/books-10m-w4"), options, &mut |_| {})?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

/// Linears of quantized folders for servers: products with weights in the size they are stored in.
pub mod linear {
    pub use bitmill_models::{PackedInput, PackedLinear, PackedWeight, Precision};
}

pub use bitmill_calibrate as calibrate;
pub use bitmill_checkpoint as checkpoint;
pub use bitmill_kernels as kernels;
pub use bitmill_models as models;
pub use bitmill_quantize as quantize;
pub use bitmill_scheme as scheme;

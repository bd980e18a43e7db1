//! Methods that round weights against calibration statistics, and the resumable loop that applies a plan.
//!
//! A [`Method`] turns weights and the second moment of their input into a `Quantized`. A [`Plan`] says, from headers
//! alone, what becomes of every tensor; every refusal happens while it is made. [`run`] applies a plan block by block
//! and can be killed at any instant.

mod block;
mod error;
mod factor;
mod gguf;
mod journal;
mod methods;
mod plan;
mod refine;
mod refine_blocks;
mod run;
mod settings;
mod sweep;

pub use error::Error;
pub use factor::Factor;
pub use gguf::{GgufOutput, GgufSettings, gguf_types};
pub use journal::TensorRecord;
pub use methods::{Linear, METHODS, Method, Needs, Solved, method};
pub use plan::{Action, Plan, PlannedTensor, Unit};
pub use refine::{descend, loss, refit_scales};
pub use run::{Event, Finished, RunOptions, run};
pub use settings::{ScaleSearch, Settings, SolverOptions};
pub use sweep::{Order, Part, Sweep, SweepGrid, sweep};

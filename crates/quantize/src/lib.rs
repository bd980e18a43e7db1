//! Methods that round weights against calibration statistics, and the resumable loop that applies a plan.
//!
//! A [`Method`] turns weights and the second moment of their input into a `Quantized`. A [`Plan`] says, from headers
//! alone, what becomes of every tensor; every refusal happens while it is made. [`run`] applies a plan block by block
//! and can be killed at any instant.

mod allocate;
mod bias;
mod block;
mod calibration;
mod convert;
mod cost;
mod error;
mod experts;
mod factor;
mod fused;
mod gguf;
mod journal;
mod learn;
mod loaders;
mod methods;
mod mixture;
mod plan;
mod plan_file;
mod reconstruction;
mod refine;
mod run;
mod seen;
mod sensitivity;
mod settings;
mod shift;
mod soft;
mod sweep;
#[cfg(test)]
mod tiny;
mod token_weights;
mod transforms;
mod weight;

pub use allocate::{Allocation, Choice, Impossible, allocate, allocate_crossed};
pub use calibration::calibrate;
pub use convert::{Conversion, Converted, Rounded, Target};
pub use cost::Kind;
pub use error::Error;
pub use factor::Factor;
pub use gguf::{GgufOutput, GgufSettings, MIXES, Mix, gguf_mix, gguf_types};
pub use journal::{SiteRecord, StageChange, StageRecord, TensorRecord};
pub use loaders::{Demands, Subject, Verdict, loader_names, loaders, needed, refusal, tensors_of, verdicts};
pub use methods::{ByRows, Linear, METHODS, Method, Needs, Solved, method};
pub use mixture::{Budget, Chosen, Mixing, Mixture, Survey, mix};
pub use plan::{Action, Plan, PlannedTensor, Unit};
pub use plan_file::{parse_scheme, read_plan, write_plan};
pub use refine::{descend, loss, refit_scales};
pub use run::{Calibration, Event, Finished, RunOptions, run};
pub use sensitivity::{Sensitivity, probe_sites, rank_correlation, sensitivities};
pub use settings::{
    Arithmetic, Observation, Reconstruction, ScaleSearch, Settings, SoftKind, SoftRounding, SolverOptions, TargetShift,
    TokenWeights, Tuning,
};
pub use sweep::{Order, Part, Sweep, SweepGrid, sweep};
pub use transforms::{BlockWeights, Model, Rewrite, SiteMoments, TRANSFORMS, Transform, transforms};

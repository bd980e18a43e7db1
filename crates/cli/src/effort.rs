//! `--effort`: how much work goes into a result, and what it is expected to cost.

use crate::write::parameters;
use bitmill_calibrate::Windows;
use bitmill_checkpoint::Checkpoint;
use bitmill_kernels::{View, ViewMut, gemm};
use bitmill_quantize::{METHODS, Method, Needs, Plan, ScaleSearch, SolverOptions, TargetShift, Tuning};
use bitmill_scheme::{GridKind, Scheme};
use clap::ValueEnum;
use std::time::{Duration, Instant};

/// How much work to put in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Effort {
    /// No calibration: weights are rounded with searched scales (rtn), or hqq where there are zero points
    Fast,
    /// Calibrated gptq, in which every linear also makes up for what the rounding before it did
    Balanced,
    /// The same, then 8 passes of tuning of the whole model, 12 at 3 bits and 28 at 2
    Best,
}

impl Effort {
    /// The method, unless one is named: the first that makes `scheme`, where the one of the effort does not.
    pub(crate) fn method(self, scheme: &Scheme) -> &'static str {
        let own = match self {
            Effort::Fast if scheme.symmetric() => "rtn",
            Effort::Fast => "hqq",
            _ => METHODS[0].name(),
        };
        let makes = |m: &&&dyn Method| m.refuses(scheme).is_none();
        let named = METHODS.iter().find(|m| m.name() == own).filter(makes);
        named.or_else(|| METHODS.iter().find(makes)).map_or(own, |m| m.name())
    }

    /// The scale search for `scheme`, unless one is named; `None` leaves it to the method. Scales of integers are found by squares
    /// in a fraction of the time and lose less; those of floats are not (fp8_dynamic loses 5 % more on books-10m).
    pub(crate) fn scale_search(self, scheme: &Scheme) -> Option<ScaleSearch> {
        let integers = matches!(scheme.grid, GridKind::Int { .. });
        (self == Effort::Fast).then_some(if integers { ScaleSearch::Squares } else { ScaleSearch::Mse })
    }

    /// Tuning for `scheme`, unless passes are named: only what gptq rounded is worth it.
    pub(crate) fn tuning(self, method: &str, scheme: &Scheme, passes: Option<u32>) -> Option<Tuning> {
        let own = match self {
            _ if method != METHODS[0].name() => 0,
            Effort::Fast | Effort::Balanced => 0,
            // Coarse codes leave more to be learned. More passes still lower the loss, at some 14% for twice as many at 2 bits.
            Effort::Best => match scheme.bits().get() {
                ..=2 => 28,
                3 => 12,
                _ => 8,
            },
        };
        let passes = passes.unwrap_or(own);
        (passes > 0).then(|| Tuning::new(passes, scheme.bits().get()))
    }

    /// Share of the calibration windows that `input` writes itself, unless that is said. A model rounded for prose alone loses
    /// more on code: at 2 bits 0.74 nats on books-10m, and 0.28 where half of the windows are its own, at no loss on prose.
    pub(crate) fn written(self, method: &str, scheme: &Scheme, input: &Checkpoint) -> f32 {
        let writes = bitmill_models::spec_of(input).is_ok_and(|spec| spec.causal);
        match (self, scheme.bits().get()) {
            _ if !feeds_back(method) || !writes || parameters(input) > WRITES => 0.0,
            // The many passes of tuning at 2 bits see so much of what the model writes that they want more of the given text.
            (Effort::Best, ..=2) => 0.25,
            _ => 0.5,
        }
    }

    /// What the linears of `input` make up for, unless that is said: gptq loses a quarter to two fifths less by it, billm half.
    pub(crate) fn shift(self, method: &str, input: &Checkpoint) -> TargetShift {
        match bitmill_models::spec_of(input) {
            Ok(spec) if feeds_back(method) && spec.adds_plainly() => TargetShift::Outputs,
            Ok(_) if feeds_back(method) => TargetShift::Inputs,
            _ => TargetShift::Off,
        }
    }
}

/// Whether a method rounds against H without being asked to.
pub(crate) fn feeds_back(method: &str) -> bool {
    METHODS.iter().any(|m| m.name() == method && m.needs(&SolverOptions::default()) == Needs::Hessian)
}

/// Weights of a model, at most, that writes part of its calibration text unless told not to: writing takes the whole model in f32,
/// and takes longer than the rest where a weight is read from memory for every few tokens.
const WRITES: u64 = 500_000_000;

/// What tuning on `windows` will cost here, as a sentence; `None` without tuning.
pub(crate) fn expected(plan: &Plan, windows: &Windows) -> Option<String> {
    let tuning = plan.settings.tuning.as_ref()?;
    let tokens = windows.lengths().into_iter().map(|length| length as u64).sum();
    let operations = plan.tuning_operations(windows.count() as u64, tokens) as f64;
    // What is not a product of matrices takes a third as long again.
    let seconds = 1.3 * operations / product_rate();
    let memory = plan.tuning_memory();
    let scarce = crate::units::available_memory().filter(|&free| free < memory);
    let scarce = scarce.map_or(String::new(), |free| {
        format!(
            "; only {} are free: expect it to swap or to be killed, and see --tuning-passes 0",
            crate::units::bytes(free)
        )
    });
    Some(format!(
        "tuning: {} pass{} of {:.1e} operations, {} of memory, about {} on this machine{scarce}",
        tuning.passes,
        if tuning.passes == 1 { "" } else { "es" },
        operations / f64::from(tuning.passes),
        crate::units::bytes(memory),
        span(seconds),
    ))
}

/// Seconds that a run over `windows` windows of `tokens` tokens in all is expected to take on this machine.
pub(crate) fn seconds(plan: &Plan, windows: u64, tokens: u64) -> f64 {
    (plan.run_operations(tokens) + 1.3 * plan.tuning_operations(windows, tokens) as f64) / product_rate()
}

/// What suits a model of this size when nothing else is known: a rule of thumb, not measured here. Fewer weights share less
/// redundancy, so the bits at which a model keeps its predictions fall as it grows; around four bits every loader has kernels.
pub(crate) fn recommended(parameters: u64) -> &'static str {
    match parameters {
        ..1_000_000_000 => "--bits 5.0",
        1_000_000_000..15_000_000_000 => "--bits 4.5",
        15_000_000_000..50_000_000_000 => "--scheme w4a16",
        _ => "--bits 3.5",
    }
}

/// Operations per second of all threads on products of the size that occurs, side by side, as they share what the machine has:
/// of each thread the best of a tenth of a second.
fn product_rate() -> f64 {
    const N: usize = 256;
    let rate = |_: rayon::BroadcastContext<'_>| {
        let (a, b, mut c) = (vec![0.5f32; N * N], vec![0.25f32; N * N], vec![0.0f32; N * N]);
        let (begin, mut best) = (Instant::now(), f64::INFINITY);
        while begin.elapsed() < Duration::from_millis(100) {
            let started = Instant::now();
            gemm(1.0, View::new(&a, N, N, N), View::new(&b, N, N, N), 0.0, &mut ViewMut::new(&mut c, N, N, N));
            best = best.min(started.elapsed().as_secs_f64());
        }
        2.0 * (N * N * N) as f64 / best
    };
    rayon::broadcast(rate).into_iter().sum()
}

pub(crate) fn span(seconds: f64) -> String {
    match seconds {
        ..90.0 => format!("{seconds:.0} s"),
        90.0..5400.0 => format!("{:.0} min", seconds / 60.0),
        _ => format!("{:.1} h", seconds / 3600.0),
    }
}

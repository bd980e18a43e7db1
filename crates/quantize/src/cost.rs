//! What a plan costs, from headers alone: arithmetic, memory and disk, and bytes by role and scheme.

use crate::block::batch_bytes;
use crate::{Action, Arithmetic, Needs, Plan, ScaleSearch, TargetShift, Unit};
use bitmill_calibrate::{Stream, StreamKind};
use bitmill_models::{Expert, ModelSpec, Role, SITES};
use std::collections::BTreeMap;

/// Linears of one role and scheme.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Kind {
    /// How many there are.
    pub tensors: usize,
    /// Weights in all of them.
    pub weights: u64,
    /// Bytes written for all of them.
    pub bytes: u64,
}

impl Kind {
    /// Bits per weight, everything written included.
    #[must_use]
    pub fn bits_per_weight(self) -> f64 {
        self.bytes as f64 * 8.0 / self.weights as f64
    }
}

/// What a step of tuning does to a weight (its gradient, moments, code and value), as operations that take as long (measured).
const STEP: u64 = 2000;

/// Bytes that a run may take, activations that wait aside, for freed memory to be kept: taking it from the system again costs
/// time.
const SCARCE: u64 = 4_000_000_000;

/// Floating-point operations that a token written by the model takes, per weight: as long as a pass and a half (measured).
const WRITTEN: f64 = 8.0;

impl Plan {
    /// Quantized modules counted by role, the last part of their names, and scheme.
    #[must_use]
    pub fn kinds(&self) -> BTreeMap<(String, String), Kind> {
        let mut kinds: BTreeMap<(String, String), Kind> = BTreeMap::new();
        for (module, scheme, shape) in self.quantized() {
            let role = module.rsplit('.').next().unwrap_or(module).to_owned();
            let kind = kinds.entry((role, scheme.to_string())).or_default();
            kind.tensors += 1;
            kind.weights += (shape[0] * shape[1]) as u64;
            kind.bytes += self.format.layout(module, scheme, shape).iter().map(|t| t.bytes() as u64).sum::<u64>();
        }
        kinds
    }

    /// Floating-point operations of a run over `tokens` tokens of calibration, tuning left out: the forward pass, H of every
    /// site and its factor, and rounding. Parts that do not run at the rate of a large product count for as many operations as
    /// take as long; the rates behind that were measured on models of 10 M and 300 M weights.
    #[must_use]
    pub fn run_operations(&self, tokens: u64) -> f64 {
        /// Reading, rounding and writing a weight.
        const WEIGHT: f64 = 2200.0;
        /// Searching the scale of its group.
        const SEARCH: f64 = 12_000.0;
        /// Rounding one column against those before it, and one sweep of coordinate descent, per weight and input.
        const SWEEP: f64 = 4.0;
        /// The factor of H is in double precision.
        const FACTOR: f64 = 4.0;
        // Products of the shapes that occur take longer than large square ones, of bfloat16 half of that, and of eight bits little more than a quarter.
        let shapes = match self.settings.observation.arithmetic {
            Arithmetic::F32 => 1.4,
            Arithmetic::Bf16 => 0.7,
            Arithmetic::Int8 => 0.4,
        };
        let hessian = self.method.needs(&self.settings.solver) == Needs::Hessian;
        let solver = &self.settings.solver;
        // The sweep itself, then descents: after rounding, and after every refit.
        let sweeps = 1.0 + f64::from(solver.descent_sweeps) * f64::from(1 + solver.scale_refits);
        let streams = if self.settings.two_streams() { 2.0 } else { 1.0 };
        let quick = matches!(solver.scale_search, None | Some(ScaleSearch::MinMax | ScaleSearch::Squares));
        let searches = hessian || !quick;
        let each = if searches { WEIGHT + SEARCH } else { WEIGHT };
        let mut total = 0.0;
        for unit in &self.units {
            for tensor in &unit.tensors {
                let Action::Quantize { shape: [rows, cols], role, .. } = &tensor.action else { continue };
                let (weights, cols) = ((rows * cols) as f64, *cols as f64);
                let own = tokens as f64 * self.share(*role);
                let forward = if self.calibrated { shapes * 2.0 * weights * own * streams } else { 0.0 };
                let rounding = if hessian { SWEEP * sweeps * weights * cols } else { 0.0 };
                total += forward + each * weights + rounding;
            }
            if hessian {
                // The second stream's share is not symmetric, and takes factors of its own.
                let n3 = |(n, share): (f64, f64)| {
                    (3.0 * streams - 2.0) * (shapes * n * n * tokens as f64 * share + FACTOR * n * n * n / 3.0)
                };
                total += self.site_widths(unit).into_iter().map(n3).sum::<f64>();
            }
            if self.calibrated && unit.block.is_some() {
                total += streams * tokens as f64 * self.elementwise_operations();
            }
        }
        total + self.reconstruction_operations(tokens) + self.writing_operations(tokens)
    }

    /// The same of the part of `tokens` that the model writes itself.
    fn writing_operations(&self, tokens: u64) -> f64 {
        let share = if self.calibrated { self.settings.written } else { 0.0 };
        f64::from(share) * WRITTEN * self.parameters as f64 * tokens as f64
    }

    /// The same of what a block does to a token besides products with its weights: attention, norms and activations, and keeping
    /// what comes out of its pieces.
    fn elementwise_operations(&self) -> f64 {
        /// Operations that one element takes, which is read and written several times and goes through transcendental functions.
        const ELEMENT: f64 = 250.0;
        let Some(spec) = &self.spec else { return 0.0 };
        let length = self.settings.sequence_length.min(spec.max_positions) as f64;
        let attention = (spec.heads as f64) * length;
        let products = 2.0 * attention * spec.head_dim as f64;
        products + ELEMENT * (10.0 * spec.hidden as f64 + 3.0 * spec.intermediate as f64 + 2.0 * attention)
    }

    /// The same of reconstruction: for each weight of a block and token, a forward and a backward pass (two and four
    /// operations), the same without its own weights' gradients for each further block, and a step over the weights.
    fn reconstruction_operations(&self, tokens: u64) -> f64 {
        let Some(how) = &self.settings.reconstruction else { return 0.0 };
        let (weights, tokens) = (self.quantized_size().0 as f64, tokens as f64);
        let length = self.settings.sequence_length.max(1) as f64;
        let steps = tokens / length / how.batch as f64;
        // Of a block behind, gradients of its own weights only where they move.
        let (behind, moving) = (f64::from(how.depth - 1), if how.together { f64::from(how.depth) } else { 1.0 });
        let each = (2.0 * moving + 4.0 * (1.0 + behind)) * tokens + STEP as f64 * steps * moving;
        f64::from(how.passes) * each * weights
    }

    /// Floating-point operations of tuning over `windows` windows of `tokens` tokens in all: a forward pass of the teacher
    /// and forward and backward passes of the model, at two operations per weight and token each and twice that for the
    /// backward pass; texts that the teacher writes; and what a step over the weights themselves costs, which moves bytes
    /// rather than computes.
    #[must_use]
    pub fn tuning_operations(&self, windows: u64, tokens: u64) -> u64 {
        let Some(tuning) = &self.settings.tuning else { return 0 };
        let steps = windows.div_ceil(tuning.batch as u64);
        let writes = self.spec.as_ref().is_some_and(|spec| spec.head().is_some());
        let written = if writes { tuning.written() * WRITTEN * self.parameters as f64 * tokens as f64 } else { 0.0 };
        u64::from(tuning.passes) * (8 * self.parameters * tokens + STEP * self.trained_weights() * steps)
            + written as u64
    }

    /// An upper estimate of peak memory in bytes, for so many tokens in all, whose activations may take `stream_memory` bytes: those
    /// that stay in memory, what is known of the widest site, what collects it (one block in f32, twice with two streams, and the activations of one batch), what
    /// solves it (a factor of its Hessian in f64 and in f32, and a few copies of its largest matrix), and the block as it is stored.
    /// Where memory [is scarce](Plan::memory_is_scarce), only the larger of a batch's activations and of what solves counts. A tenth
    /// more goes to the program, what allocators keep, and large pages.
    #[must_use]
    pub fn peak_memory(&self, tokens: u64, stream_memory: u64) -> u64 {
        let kept = if self.memory_is_scarce() { self.memory(u64::max) } else { self.memory(|a, b| a + b) };
        let all = kept + if self.calibrated { self.stream_bytes(tokens, stream_memory) } else { 0 };
        all + all / 10
    }

    /// Bytes that each stream of activations may take in memory, of `memory` for all: three exist at a time at most, the residual
    /// and a site's input and output; as many of a second model; and with reconstruction what entered the block, and what is to
    /// leave it. One that takes more is in a file.
    pub(crate) fn stream_budget(&self, memory: u64) -> u64 {
        let lanes = 1 + u64::from(self.settings.two_streams());
        memory / (3 * lanes + if self.settings.reconstruction.is_some() { 2 } else { 0 })
    }

    /// Bytes of activations of so many tokens in all that are in memory, where `memory` is what they may take: of every model the
    /// residual stream and one that waits for all windows, as wide as the widest.
    fn stream_bytes(&self, tokens: u64, memory: u64) -> u64 {
        let Some(spec) = &self.spec else { return 0 };
        let (lanes, budget) = (1 + u64::from(self.settings.two_streams()), self.stream_budget(memory));
        let widths = [spec.hidden, spec.intermediate.max(spec.heads * spec.head_dim)];
        let bytes = widths.map(|width| Stream::bytes(StreamKind::Bf16, 1, tokens as usize, width));
        lanes * bytes.into_iter().filter(|&bytes| bytes <= budget).sum::<u64>()
    }

    /// Whether freed memory had better be given back to the system at once.
    #[must_use]
    pub fn memory_is_scarce(&self) -> bool {
        self.memory(|a, b| a + b) > SCARCE
    }

    /// What blocks, tuning or writing take, whatever is most, where what collects and what solves go together by `with`.
    fn memory(&self, with: fn(u64, u64) -> u64) -> u64 {
        let observation = &self.settings.observation;
        let lanes = 1 + u64::from(self.settings.two_streams());
        let parts = 1 + u64::from(observation.damping_search || observation.shift != TargetShift::Off);
        let unit = |u: &Unit| -> u64 {
            let shapes = u.tensors.iter().filter_map(|t| match &t.action {
                Action::Quantize { shape, .. } => Some(shape.map(|n| n as u64)),
                Action::Copy => None,
            });
            let shapes: Vec<[u64; 2]> = shapes.collect();
            let weights: u64 = shapes.iter().map(|[rows, n]| rows * n * 4).sum();
            let largest = shapes.iter().map(|[rows, n]| rows * n * 4).max().unwrap_or(0);
            let [rows, n] = shapes.iter().copied().max_by_key(|[_, n]| *n).unwrap_or_default();
            // Blocks in full precision, and those that learn twice, with latents and their moments.
            let rebuilt = self.settings.reconstruction.as_ref().map_or(0, |how| {
                let depth = u64::from(how.depth);
                let learning = if how.together { depth } else { 1 };
                weights * (1 + depth) + crate::learn::memory(learning * weights / 4, 0, None)
            });
            if !self.calibrated {
                return weights * 3 + rebuilt;
            }
            let sums = 4 * parts * (lanes * n * n + (lanes - 1) * rows * n);
            // Each window's part, and all of them on their way into sums.
            let batch = 2 * lanes * batch_bytes(n);
            // Stored in 16 bits, mostly.
            sums + lanes * weights + with(batch, 12 * n * n + 4 * largest) + weights / 2 + rebuilt
        };
        let experts = match self.spec.as_ref().map(|spec| (spec, spec.routing.as_ref())) {
            Some((spec, Some(routing))) if self.calibrated => {
                crate::experts::memory(spec, routing, self.settings.observation)
            }
            _ => 0,
        };
        let blocks = self.units.iter().map(unit).max().unwrap_or(0) + experts;
        blocks.max(self.tuning_memory()).max(self.writing_memory())
    }

    /// Whether tuning may change the output head: it exists, is not the embedding too, and stays dense.
    pub(crate) fn trains_head(&self) -> bool {
        let head = self.spec.as_ref().filter(|spec| !spec.tied).and_then(ModelSpec::head);
        head.is_some_and(|head| !self.quantized().any(|(module, ..)| *module == head))
    }

    /// Weights that tuning changes, norms aside.
    pub(crate) fn trained_weights(&self) -> u64 {
        let head = self.spec.as_ref().filter(|_| self.trains_head()).map_or(0, |spec| spec.vocab * spec.hidden);
        self.quantized_size().0 + head as u64
    }

    /// Bytes of memory that tuning takes beside activations; 0 without tuning.
    #[must_use]
    pub fn tuning_memory(&self) -> u64 {
        let Some(tuning) = &self.settings.tuning else { return 0 };
        let author = self.spec.as_ref().filter(|spec| spec.head().is_some() && tuning.written() > 0.0);
        let texts = author.map(|spec| (spec, self.settings.sequence_length.min(spec.max_positions)));
        crate::learn::memory(self.trained_weights(), self.parameters, texts)
    }

    /// Bytes of memory that the model takes while it writes its part of the calibration text, before anything is rounded.
    fn writing_memory(&self) -> u64 {
        let spec = self.spec.as_ref().filter(|_| self.calibrated && self.settings.written > 0.0);
        let texts = spec.map(|spec| (spec, self.settings.sequence_length.min(spec.max_positions)));
        texts.map_or(0, |(spec, length)| 4 * self.parameters + bitmill_calibrate::author_memory(spec, length) as u64)
    }

    /// Bytes of disk that the run takes while it works, beside its output.
    #[must_use]
    pub fn work_bytes(&self) -> u64 {
        self.settings.tuning.as_ref().map_or(0, |_| crate::learn::disk(self.trained_weights()))
    }

    /// Inputs of the sites of a block that have something to round, and the share of all tokens that is seen there.
    fn site_widths(&self, unit: &Unit) -> Vec<(f64, f64)> {
        let roles = unit.tensors.iter().filter_map(|t| match &t.action {
            Action::Quantize { role: Some(role), shape, .. } => Some((*role, shape[1] as f64)),
            _ => None,
        });
        let mut sites: BTreeMap<(Option<Expert>, &str), (f64, f64)> = BTreeMap::new();
        for (role, width) in roles {
            for site in SITES.iter().filter(|site| site.reads(role)) {
                sites.entry((role.expert(), site.name)).or_insert((width, self.share(Some(role))));
            }
        }
        sites.into_values().collect()
    }

    /// The share of all tokens that a linear reads: an expert gets those that are routed to it, on average.
    fn share(&self, role: Option<Role>) -> f64 {
        let routing = self.spec.as_ref().and_then(|spec| spec.routing.as_ref());
        match (role.and_then(Role::expert), routing) {
            (Some(Expert::Routed(_)), Some(routing)) => routing.chosen as f64 / routing.experts as f64,
            _ => 1.0,
        }
    }
}

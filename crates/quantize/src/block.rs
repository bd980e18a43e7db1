//! One calibrated block: activations in, quantized linears out, activations on.
//!
//! The block runs in the five pieces its sites cut it into. At each site the statistics of all windows are collected,
//! the linears it feeds are rounded, and the run goes on with the rounded ones (true-sequential order), so nothing is
//! computed twice.

use crate::journal::{SiteRecord, TensorRecord};
use crate::{Action, Error, Linear, PlannedTensor, Solved, loss};
use crate::{Method, SolverOptions};
use bitmill_calibrate::{SiteStats, Stream, StreamKind, in_order};
use bitmill_models::{Block, ModelSpec, Role, RopeTable, Site};
use bitmill_scheme::Scheme;
use candle_core::{Device, Tensor};
use std::path::Path;
use std::time::Instant;

/// Tokens whose activations are in memory at a time. It fixes the order of sums, so it is a constant.
const BATCH_TOKENS: usize = 16_384;

/// The calibration text on its way through the model.
pub(crate) struct Flow<'a> {
    pub(crate) spec: &'a ModelSpec,
    pub(crate) rope: &'a RopeTable,
    /// Tokens of each window.
    pub(crate) lengths: &'a [usize],
    /// Bytes one stream may take in memory.
    pub(crate) budget: u64,
    /// Folder of spilled streams.
    pub(crate) spill: &'a Path,
    /// Residual stream that enters the block; what leaves it, afterwards.
    pub(crate) hidden: &'a Stream,
}

/// A linear of the block that is to be quantized.
pub(crate) struct Target<'a> {
    pub(crate) module: &'a str,
    pub(crate) role: Role,
    pub(crate) scheme: Scheme,
    pub(crate) shape: [usize; 2],
    pub(crate) bytes: u64,
}

impl<'a> Target<'a> {
    pub(crate) fn of(tensor: &'a PlannedTensor) -> Option<Self> {
        match &tensor.action {
            Action::Quantize { module, role: Some(role), scheme, shape } => {
                Some(Target { module, role: *role, scheme: *scheme, shape: *shape, bytes: tensor.bytes })
            }
            _ => None,
        }
    }
}

/// What happens while a block is rounded.
pub(crate) enum Moment<'a> {
    /// A site is about to be worked.
    Site(&'a Site),
    /// What calibration saw there.
    Seen(SiteRecord),
    /// A linear is finished.
    Finished(Done),
}

/// A finished linear.
pub(crate) struct Done {
    pub(crate) module: String,
    pub(crate) solved: Solved,
    pub(crate) record: TensorRecord,
}

impl Flow<'_> {
    /// Rounds the `targets` of `block`, which is block `index`, and moves the flow past it; `on` is told what happens.
    pub(crate) fn quantize_block(
        &self,
        index: usize,
        mut block: Block,
        targets: &[Target<'_>],
        (method, options): (&dyn Method, &SolverOptions),
        on: &mut dyn FnMut(Moment<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let spec = self.spec;
        let mut x: Option<Stream> = None;
        for (i, at) in spec.sites().iter().enumerate() {
            on(Moment::Site(at))?;
            let width = spec.linear_shape(at.linears[0])[1];
            let wanted: Vec<&Target<'_>> = targets.iter().filter(|t| at.linears.contains(&t.role)).collect();
            let mut stats = (!wanted.is_empty()).then(|| SiteStats::new(width));
            let next = self.stream(width, at.name)?;
            self.windows(|w| self.piece(i, &block, x.as_ref(), &next, w), stats.as_mut())?;
            x = Some(next);
            let Some(stats) = stats else { continue };
            if !stats.is_finite() {
                return Err(bitmill_calibrate::Error::NonFinite { block: index, site: at.name.into() }.into());
            }
            let (site, tokens) = (at.name.into(), stats.tokens());
            on(Moment::Seen(SiteRecord { block: index, site, tokens, spread: stats.spread() }))?;
            for (role, done) in solve_site(&block, &wanted, &stats, method, options)? {
                let [rows, cols] = done.solved.quantized.shape;
                let weight = done.solved.quantized.dequantize();
                block.set_linear(role, Tensor::from_vec(weight, (rows, cols), &Device::Cpu)?);
                block.set_activations(role, done.solved.quantized.scheme.activations);
                on(Moment::Finished(done))?;
            }
        }
        let Some(x) = x else { return Ok(()) };
        self.windows(
            |w| {
                let out = block.finish(&self.tensor(self.hidden, w)?, &self.tensor(&x, w)?)?;
                self.hidden.write(w, &rows(&out)?)?;
                Ok(Vec::new())
            },
            None,
        )
    }

    /// Piece `i` of the block for window `w`: writes the activation at its site to `next` and returns it.
    fn piece(&self, i: usize, block: &Block, x: Option<&Stream>, next: &Stream, w: usize) -> Result<Vec<f32>, Error> {
        let hidden = || self.tensor(self.hidden, w);
        let input = || match x {
            Some(x) => self.tensor(x, w),
            None => hidden(),
        };
        let out = match i {
            0 => block.attn_in(&hidden()?)?,
            1 => block.attn_out(&input()?, self.rope)?,
            2 => {
                let (h, out) = block.mlp_in(&hidden()?, &input()?)?;
                self.hidden.write(w, &rows(&h)?)?;
                out
            }
            _ => block.mlp_out(&input()?)?,
        };
        let out = rows(&out)?;
        next.write(w, &out)?;
        Ok(out)
    }

    /// Runs `compute` for all windows and adds what it returns to `stats`, in window order.
    fn windows(
        &self,
        compute: impl Fn(usize) -> Result<Vec<f32>, Error> + Sync,
        mut stats: Option<&mut SiteStats>,
    ) -> Result<(), Error> {
        let longest = self.lengths.iter().copied().max().unwrap_or(1);
        let batch = (BATCH_TOKENS / longest).clamp(1, 64);
        in_order(self.hidden.windows(), batch, compute, |_, activations| {
            if let Some(stats) = stats.as_deref_mut() {
                stats.add(&activations.concat());
            }
            Ok(())
        })
    }

    fn stream(&self, width: usize, site: &str) -> Result<Stream, Error> {
        let spill = self.spill.join(format!("site-{site}"));
        Ok(Stream::of_lengths(StreamKind::Bf16, self.lengths, width, self.budget, &spill)?)
    }

    fn tensor(&self, stream: &Stream, w: usize) -> Result<Tensor, Error> {
        let values = stream.read(w)?;
        let (length, width) = (self.lengths[w], values.len() / self.lengths[w]);
        Ok(Tensor::from_vec(values, (length, width), &Device::Cpu)?)
    }
}

fn rows(t: &Tensor) -> Result<Vec<f32>, Error> {
    Ok(t.flatten_all()?.to_vec1()?)
}

/// Rounds the linears of one site together: they share H and its factor.
fn solve_site(
    block: &Block,
    targets: &[&Target<'_>],
    stats: &SiteStats,
    method: &dyn Method,
    options: &SolverOptions,
) -> Result<Vec<(Role, Done)>, Error> {
    let weights = targets.iter().map(|t| rows(block.linear(t.role))).collect::<Result<Vec<_>, _>>()?;
    solve_targets(targets, &weights, (&stats.hessian(), stats.tokens()), method, options)
}

/// Rounds `targets`, which read one activation, from their weights and its H (and the tokens that H is of).
pub(crate) fn solve_targets(
    targets: &[&Target<'_>],
    weights: &[Vec<f32>],
    (h, tokens): (&[f32], u64),
    method: &dyn Method,
    options: &SolverOptions,
) -> Result<Vec<(Role, Done)>, Error> {
    let started = Instant::now();
    let linears: Vec<Linear<'_>> = (targets.iter().zip(weights))
        .map(|(t, weight)| Linear { name: t.module, weight, shape: t.shape, scheme: t.scheme })
        .collect();
    let solved = method.solve(&linears, Some(h), options)?;
    let seconds = started.elapsed().as_secs_f64() / targets.len() as f64;
    let done = targets.iter().zip(weights).zip(solved).map(|((t, weight), solved)| {
        let error: f64 = loss(weight, &solved.quantized.dequantize(), h).iter().sum();
        let energy: f64 = loss(weight, &vec![0.0; weight.len()], h).iter().sum();
        let record = TensorRecord {
            relative_error: if energy > 0.0 { error / energy } else { 0.0 },
            error_of: "output".into(),
            damping: solved.damping,
            tokens,
            seconds,
            ..TensorRecord::of(t.module, t.shape, t.scheme, method, t.bytes)
        };
        (t.role, Done { module: t.module.into(), solved, record })
    });
    Ok(done.collect())
}

impl TensorRecord {
    /// A record of what is known before the weights are rounded.
    pub(crate) fn of(module: &str, shape: [usize; 2], scheme: Scheme, method: &dyn Method, bytes: u64) -> Self {
        TensorRecord {
            tensor: module.into(),
            shape,
            scheme: scheme.to_string(),
            method: method.name().into(),
            relative_error: 0.0,
            error_of: "weights".into(),
            bits_per_weight: bytes as f64 * 8.0 / (shape[0] * shape[1]) as f64,
            damping: None,
            tokens: 0,
            seconds: 0.0,
        }
    }
}

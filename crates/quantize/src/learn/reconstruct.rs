//! Reconstruction of one block: its codes, scales and norms, tuned until what it puts out comes as near to the full-precision
//! model's as it will.
//!
//! The block reads what the rounded blocks before it put out, and is held against what the full-precision block makes of
//! what *its* predecessors put out (BRECQ, arXiv 2102.05426; AutoRound, arXiv 2309.05516), so it also makes up for some of what went
//! wrong before it. Behind it may stand further blocks in full precision, through which the error is looked at: they
//! know which of it matters (the two-block windows of CBQ, arXiv 2312.07950, without moving the second block). It takes the
//! memory of a block, and so does what the whole model's tuning cannot do for large models. The pass that is best on windows
//! held out from training is kept; if none beats the solvers' result, that is.

use super::goal::distance;
use super::pupil::Pupil;
use super::{Start, TOGETHER, ToStored};
use crate::Error;
use crate::settings::Reconstruction;
use bitmill_calibrate::{held_out, in_order, splitmix};
use bitmill_models::{Block, BlockGradients, NormRole, Role, RopeTable};
use bitmill_scheme::Quantized;
use candle_core::Tensor;

/// One window in this many is held out from training.
const HELD_OUT: usize = 16;

/// The states of one window, `[tokens, hidden]`.
type States<'a> = dyn Fn(usize) -> Result<Tensor, Error> + Sync + 'a;

/// What a block is rebuilt with.
pub(crate) struct Rebuilding<'a> {
    pub(crate) how: &'a Reconstruction,
    pub(crate) rope: &'a RopeTable,
    /// The full-precision blocks behind it, through which outputs are compared.
    pub(crate) behind: &'a [Block],
    pub(crate) windows: usize,
    /// What enters the block in the rounded model.
    pub(crate) input: &'a States<'a>,
    /// What leaves the last block of `behind` (or else the block) in the full-precision model.
    pub(crate) goal: &'a States<'a>,
    pub(crate) seed: u64,
}

/// What came of it.
pub(crate) struct Rebuilt {
    /// The block as it is now.
    pub(crate) block: Block,
    pub(crate) linears: Vec<(Role, Quantized)>,
    /// The norms, in values of their stored type.
    pub(crate) norms: Vec<(NormRole, Vec<f32>)>,
    /// Relative error of the output on held-out windows.
    pub(crate) before: f64,
    pub(crate) after: f64,
}

/// Rebuilds the full-precision `block` (with the biases it is to have), whose linears were rounded to `start`. `observe` is told
/// the steps done and their number, and may stop the work.
pub(crate) fn reconstruct(
    rebuilding: &Rebuilding<'_>,
    block: Block,
    start: Vec<Start>,
    norms: (Vec<(NormRole, ToStored)>, f32),
    observe: &mut dyn FnMut(usize, usize) -> Result<(), Error>,
) -> Result<Rebuilt, Error> {
    let Rebuilding { how, windows, seed, .. } = *rebuilding;
    let (held, mut training): (Vec<_>, Vec<_>) = (0..windows).partition(|&w| held_out(w, windows, HELD_OUT));
    if training.is_empty() {
        training.clone_from(&held);
    }
    let mut pupil = Pupil::new(block, start, norms)?;
    let before = rebuilding.loss(&pupil.block, &held)?;
    let mut best = (pupil.clone(), before);
    let total = how.passes as usize * training.len().div_ceil(how.batch);
    let mut step = 0;
    for pass in 1..=u64::from(how.passes) {
        let mut order = training.clone();
        order.sort_by_key(|&w| splitmix(splitmix(seed ^ splitmix(pass)) ^ splitmix(w as u64)));
        for some in order.chunks(how.batch) {
            observe(step, total)?;
            let mut sum: Option<BlockGradients> = None;
            let one = |i: usize| rebuilding.gradients(&pupil.block, some[i]);
            in_order(some.len(), TOGETHER, one, |_, gradients| -> Result<(), Error> {
                for gradients in gradients {
                    match &mut sum {
                        None => sum = Some(gradients),
                        Some(sum) => sum.add(&gradients),
                    }
                }
                Ok(())
            })?;
            if let Some(sum) = sum {
                pupil.step(&sum, how.rates().eased(step, total))?;
            }
            step += 1;
        }
        let loss = rebuilding.loss(&pupil.block, &held)?;
        if loss < best.1 {
            best = (pupil.clone(), loss);
        }
    }
    let (Pupil { block, linears, norms }, after) = best;
    let linears = linears.into_iter().map(|(role, rounding)| (role, rounding.quantized().clone())).collect();
    let norms = norms.into_iter().map(|(role, norm)| (role, norm.stored())).collect();
    Ok(Rebuilt { block, linears, norms, before, after })
}

impl Rebuilding<'_> {
    /// Mean over `windows` of the relative squared error of the output.
    fn loss(&self, block: &Block, windows: &[usize]) -> Result<f64, Error> {
        let mut total = 0.0;
        let one = |i: usize| -> Result<f64, Error> {
            let mut h = block.forward(&(self.input)(windows[i])?, self.rope)?;
            for behind in self.behind {
                h = behind.forward(&h, self.rope)?;
            }
            Ok(distance(&h, &(self.goal)(windows[i])?)?.0)
        };
        in_order(windows.len(), TOGETHER, one, |_, losses| -> Result<(), Error> {
            total += losses.iter().sum::<f64>();
            Ok(())
        })?;
        Ok(total / windows.len() as f64)
    }

    /// The gradients that window `w` gives the block.
    fn gradients(&self, block: &Block, w: usize) -> Result<BlockGradients, Error> {
        let (mut h, trace) = block.forward_traced(&(self.input)(w)?, self.rope)?;
        let mut traces = Vec::with_capacity(self.behind.len());
        for behind in self.behind {
            let (out, trace) = behind.forward_traced(&h, self.rope)?;
            traces.push(trace);
            h = out;
        }
        let (_, mut grad) = distance(&h, &(self.goal)(w)?)?;
        for (behind, trace) in self.behind.iter().zip(&traces).rev() {
            grad = behind.backward(trace, self.rope, grad, None)?;
        }
        let mut gradients = block.no_gradients();
        block.backward(&trace, self.rope, grad, Some(&mut gradients))?;
        Ok(gradients)
    }
}

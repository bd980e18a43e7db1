//! Reconstruction of one block: its codes, scales and norms, tuned until what it puts out comes as near to the full-precision
//! model's as it will.
//!
//! The block reads what the rounded blocks before it put out, and is held against what the full-precision block makes of
//! what *its* predecessors put out (BRECQ, arXiv 2102.05426; AutoRound, arXiv 2309.05516), so it also makes up for some of what went
//! wrong before it. Behind it may stand further blocks in full precision, through which the error is looked at: they
//! know which of it matters. Or they are rounded too and move along (the overlapping windows of CBQ, arXiv 2312.07950), so that the
//! block is made for a successor that makes up for some of what it leaves; what they became is given up, for their own turn starts
//! from what the solvers make of what enters them then. It takes the memory of a few blocks, and so does what the whole model's tuning
//! cannot do for large models. The pass that is best on windows held out from training is kept; if none beats the solvers' result, that is.

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
    pub(crate) windows: usize,
    /// What enters the block in the rounded model.
    pub(crate) input: &'a States<'a>,
    /// What leaves the last of the blocks in the full-precision model.
    pub(crate) goal: &'a States<'a>,
    pub(crate) seed: u64,
}

/// A block that is rebuilt, or stands behind one that is.
pub(crate) struct Link {
    /// In full precision, with the biases it is to have.
    pub(crate) block: Block,
    /// What its linears were rounded to; nothing, and no norms either, has it stay as it is.
    pub(crate) start: Vec<Start>,
    /// Its norms, with the rounding to their stored type.
    pub(crate) norms: Vec<(NormRole, ToStored)>,
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

/// Rebuilds the first of `links`, behind which the others stand; `norm_offset` is what their norms' weights lack. `observe` is told
/// the steps done and their number, and may stop the work.
pub(crate) fn reconstruct(
    rebuilding: &Rebuilding<'_>,
    links: Vec<Link>,
    norm_offset: f32,
    observe: &mut dyn FnMut(usize, usize) -> Result<(), Error>,
) -> Result<Rebuilt, Error> {
    let Rebuilding { how, windows, seed, .. } = *rebuilding;
    let (held, mut training): (Vec<_>, Vec<_>) = (0..windows).partition(|&w| held_out(w, windows, HELD_OUT));
    if training.is_empty() {
        training.clone_from(&held);
    }
    let pupil = |Link { block, start, norms }| Pupil::new(block, start, (norms, norm_offset));
    let mut pupils = links.into_iter().map(pupil).collect::<Result<Vec<_>, _>>()?;
    let before = rebuilding.loss(&pupils, &held)?;
    let mut best = (pupils[0].clone(), before);
    let total = how.passes as usize * training.len().div_ceil(how.batch);
    let mut step = 0;
    for pass in 1..=u64::from(how.passes) {
        let mut order = training.clone();
        order.sort_by_key(|&w| splitmix(splitmix(seed ^ splitmix(pass)) ^ splitmix(w as u64)));
        for some in order.chunks(how.batch) {
            observe(step, total)?;
            let mut sum: Option<Vec<Option<BlockGradients>>> = None;
            let one = |i: usize| rebuilding.gradients(&pupils, some[i]);
            in_order(some.len(), TOGETHER, one, |_, gradients| -> Result<(), Error> {
                for gradients in gradients {
                    let Some(sum) = &mut sum else {
                        sum = Some(gradients);
                        continue;
                    };
                    for pair in sum.iter_mut().zip(&gradients) {
                        if let (Some(sum), Some(own)) = pair {
                            sum.add(own);
                        }
                    }
                }
                Ok(())
            })?;
            for (pupil, sum) in pupils.iter_mut().zip(sum.into_iter().flatten()) {
                if let Some(sum) = sum {
                    pupil.step(&sum, how.rates().eased(step, total))?;
                }
            }
            step += 1;
        }
        let loss = rebuilding.loss(&pupils, &held)?;
        if loss < best.1 {
            best = (pupils[0].clone(), loss);
        }
    }
    let (Pupil { block, linears, norms }, after) = best;
    let linears = linears.into_iter().map(|(role, rounding)| (role, rounding.quantized().clone())).collect();
    let norms = norms.into_iter().map(|(role, norm)| (role, norm.stored())).collect();
    Ok(Rebuilt { block, linears, norms, before, after })
}

impl Rebuilding<'_> {
    /// Mean over `windows` of the relative squared error of the output.
    fn loss(&self, pupils: &[Pupil], windows: &[usize]) -> Result<f64, Error> {
        let mut total = 0.0;
        let one = |i: usize| -> Result<f64, Error> {
            let mut h = (self.input)(windows[i])?;
            for pupil in pupils {
                h = pupil.block.forward(&h, self.rope)?;
            }
            Ok(distance(&h, &(self.goal)(windows[i])?)?.0)
        };
        in_order(windows.len(), TOGETHER, one, |_, losses| -> Result<(), Error> {
            total += losses.iter().sum::<f64>();
            Ok(())
        })?;
        Ok(total / windows.len() as f64)
    }

    /// The gradients that window `w` gives each block; none where nothing moves.
    fn gradients(&self, pupils: &[Pupil], w: usize) -> Result<Vec<Option<BlockGradients>>, Error> {
        let mut h = (self.input)(w)?;
        let mut traces = Vec::with_capacity(pupils.len());
        for pupil in pupils {
            let (out, trace) = pupil.block.forward_traced(&h, self.rope)?;
            traces.push(trace);
            h = out;
        }
        let (_, mut grad) = distance(&h, &(self.goal)(w)?)?;
        let mut all = Vec::with_capacity(pupils.len());
        for (pupil, trace) in pupils.iter().zip(&traces).rev() {
            let mut gradients = pupil.moves().then(|| pupil.block.no_gradients());
            grad = pupil.block.backward(trace, self.rope, grad, gradients.as_mut())?;
            all.push(gradients);
        }
        all.reverse();
        Ok(all)
    }
}

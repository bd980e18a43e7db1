//! A block under training.

use super::adam::{Adam, State};
use super::rounding::{Rates, Rounding};
use crate::Error;
use bitmill_models::{Block, BlockGradients, NormRole, Role};
use bitmill_scheme::Quantized;
use candle_core::{Device, Tensor};

/// A block whose rounded linears and norms are trained; the rest of it stays as it is.
#[derive(Clone)]
pub(super) struct Pupil {
    /// The block as the present codes, scales and norms make it.
    pub(super) block: Block,
    pub(super) linears: Vec<(Role, Rounding)>,
    pub(super) norms: Vec<TrainedNorm>,
}

/// The weight of a norm, kept unrounded; the block sees it in its stored type.
#[derive(Clone)]
pub(super) struct TrainedNorm {
    pub(super) role: NormRole,
    weight: Vec<f32>,
    moments: Adam,
    /// To the stored type.
    round: ToStored,
}

/// Rounds a number to a stored type.
pub(crate) type ToStored = fn(f32) -> f32;

/// Smallest size a norm's weight is taken to have when its step is a share of it.
const SMALL: f32 = 1e-3;

impl Pupil {
    /// Starts from the full-precision `block`, with `linears` rounded and `norms` to be trained, each with the rounding
    /// to its stored type.
    pub(super) fn new(
        mut block: Block,
        linears: Vec<(Role, Quantized)>,
        norms: Vec<(NormRole, ToStored)>,
    ) -> Result<Self, Error> {
        let mut trained = Vec::with_capacity(linears.len());
        for (role, quantized) in linears {
            let weight: Vec<f32> = block.linear(role).flatten_all()?.to_vec1()?;
            block.set_activations(role, quantized.scheme.activations);
            trained.push((role, Rounding::new(quantized, &weight)));
        }
        let norm = |(role, round)| -> Result<TrainedNorm, Error> {
            let weight: Vec<f32> = block.norm(role).to_vec1()?;
            Ok(TrainedNorm { role, moments: Adam::new(weight.len()), weight, round })
        };
        let norms = norms.into_iter().map(norm).collect::<Result<_, _>>()?;
        let mut pupil = Pupil { block, linears: trained, norms };
        pupil.refresh()?;
        Ok(pupil)
    }

    /// One step against the gradients at the present weights.
    pub(super) fn step(&mut self, gradients: &BlockGradients, rates: Rates) -> Result<(), Error> {
        for (role, rounding) in &mut self.linears {
            rounding.step(&gradients.linears[*role as usize], rates);
        }
        if rates.norms > 0.0 {
            for norm in &mut self.norms {
                let (g, weight) = (&gradients.norms[norm.role as usize], &mut norm.weight);
                norm.moments.step(|i| g[i], rates.norms, |i, d| weight[i] += d * weight[i].abs().max(SMALL));
            }
        }
        self.refresh()
    }

    /// Puts the present weights into the block.
    fn refresh(&mut self) -> Result<(), Error> {
        for (role, rounding) in &self.linears {
            let q = rounding.quantized();
            self.block.set_linear(*role, Tensor::from_vec(q.dequantize(), &q.shape, &Device::Cpu)?);
        }
        for norm in &self.norms {
            let weight = norm.stored();
            let width = weight.len();
            self.block.set_norm(norm.role, Tensor::from_vec(weight, width, &Device::Cpu)?);
        }
        Ok(())
    }

    /// Saves everything that training has changed, or takes it up.
    pub(super) fn exchange(&mut self, state: &mut State<'_>, steps: usize) -> Result<std::io::Result<()>, Error> {
        let mut all = || -> std::io::Result<()> {
            for (_, rounding) in &mut self.linears {
                rounding.exchange(state, steps)?;
            }
            for norm in &mut self.norms {
                state.floats(&mut norm.weight)?;
                norm.moments.exchange(state, steps)?;
            }
            Ok(())
        };
        let done = all();
        self.refresh()?;
        Ok(done)
    }
}

impl TrainedNorm {
    /// The weight as it will be stored.
    pub(super) fn stored(&self) -> Vec<f32> {
        self.weight.iter().map(|&v| (self.round)(v)).collect()
    }
}

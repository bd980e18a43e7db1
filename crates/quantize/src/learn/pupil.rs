//! A block under training.

use super::adam::State;
use super::dense::{Dense, ToStored};
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
    pub(super) norms: Vec<(NormRole, Dense)>,
}

impl Pupil {
    /// Starts from the full-precision `block`, with `linears` rounded and `norms` to be trained, each with the rounding
    /// to its stored type, which lacks `norm_offset`.
    pub(super) fn new(
        mut block: Block,
        linears: Vec<(Role, Quantized)>,
        (norms, norm_offset): (Vec<(NormRole, ToStored)>, f32),
    ) -> Result<Self, Error> {
        let mut trained = Vec::with_capacity(linears.len());
        for (role, quantized) in linears {
            let weight: Vec<f32> = block.linear(role).flatten_all()?.to_vec1()?;
            block.set_inputs(role, quantized.inputs());
            trained.push((role, Rounding::new(quantized, &weight)));
        }
        let norm = |(role, round)| Ok::<_, Error>((role, Dense::with_offset(block.norm(role), round, norm_offset)?));
        let norms = norms.into_iter().map(norm).collect::<Result<_, _>>()?;
        let mut pupil = Pupil { block, linears: trained, norms };
        pupil.refresh()?;
        Ok(pupil)
    }

    /// Whether anything of it is trained.
    pub(super) fn moves(&self) -> bool {
        !self.linears.is_empty() || !self.norms.is_empty()
    }

    /// One step against the gradients at the present weights.
    pub(super) fn step(&mut self, gradients: &BlockGradients, rates: Rates) -> Result<(), Error> {
        for (role, rounding) in &mut self.linears {
            rounding.step(&gradients.linears[role], rates);
        }
        if rates.norms > 0.0 {
            for (role, norm) in &mut self.norms {
                norm.step_by_shares(&gradients.norms[*role as usize], rates.norms);
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
        for (role, norm) in &self.norms {
            let tensor = norm.tensor(self.block.norm(*role))?;
            self.block.set_norm(*role, tensor);
        }
        Ok(())
    }

    /// Saves everything that training has changed, or takes it up.
    pub(super) fn exchange(&mut self, state: &mut State<'_>, steps: usize) -> Result<std::io::Result<()>, Error> {
        let mut all = || -> std::io::Result<()> {
            for (_, rounding) in &mut self.linears {
                rounding.exchange(state, steps)?;
            }
            self.norms.iter_mut().try_for_each(|(_, norm)| norm.exchange(state, steps))
        };
        let done = all();
        self.refresh()?;
        Ok(done)
    }
}

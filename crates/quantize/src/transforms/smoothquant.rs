//! SmoothQuant (Xiao et al. 2022) for activations that are rounded at run time: part of their range moves into the
//! weights. t_j = max|x_j|^α / max|W_:j|^(1−α); α is the best of twenty by the predicted errors of both sides.

use super::diagonal::{Candidate, Schemes, fold};
use super::{BlockWeights, Model, Rewrite, Transform};
use crate::Error;
use bitmill_models::SITES;
use bitmill_scheme::Activations;

pub(super) struct SmoothQuant;

impl Transform for SmoothQuant {
    fn name(&self) -> &'static str {
        "smoothquant"
    }

    fn summary(&self) -> &'static str {
        "move part of the range of rounded activations (w8a8) into the weights that read them"
    }

    fn needs_statistics(&self) -> bool {
        true
    }

    fn prepare(&self, model: &Model<'_>) -> Result<Box<dyn Rewrite>, Error> {
        Ok(Box::new(Smoothed(Schemes::new(model))))
    }
}

struct Smoothed(Schemes);

impl Rewrite for Smoothed {
    fn block(&self, block: &mut BlockWeights<'_>) -> Result<(), Error> {
        for index in 0..SITES.len() {
            let Some(candidate) = Candidate::new(&self.0, block, index)? else { continue };
            // Where activations stay as they are, there is no range to move.
            if candidate.linears.iter().all(|(_, scheme)| scheme.activations == Activations::Full) {
                continue;
            }
            let range = &block.sites[index].abs_max;
            let (mut largest, mut square) = (vec![0.0f32; range.len()], vec![0.0f64; range.len()]);
            for (role, _) in &candidate.linears {
                for row in block.linears[role].chunks_exact(range.len()) {
                    for (j, w) in row.iter().enumerate() {
                        largest[j] = largest[j].max(w.abs());
                        square[j] += f64::from(*w).powi(2);
                    }
                }
            }
            let family = |alpha: f32| -> Vec<f32> {
                let t = |(x, w): (&f32, &f32)| x.max(1e-5).powf(alpha) / w.max(1e-5).powf(1.0 - alpha);
                range.iter().zip(&largest).map(t).collect()
            };
            // Each input is rounded in steps of a 127th of the largest; the error reaches every row by its weight.
            let activations = |t: &[f32]| -> f64 {
                let step = range.iter().zip(t).map(|(x, t)| f64::from(x / t)).fold(0.0, f64::max) / 127.0;
                let energy: f64 = square.iter().zip(t).map(|(w, t)| w * f64::from(*t).powi(2)).sum();
                step * step / 12.0 * energy
            };
            let (_, t, _) = candidate.search(family, activations);
            fold(block, index, &t);
        }
        Ok(())
    }
}

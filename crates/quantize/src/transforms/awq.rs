//! AWQ (Lin et al. 2023) in H form: channels that carry much are scaled up before rounding, so that they are rounded more
//! finely, and what produces them is scaled down.
//!
//! t = a^α with a the root mean square of each channel (the paper takes the mean of |x|; this one follows from H, and so
//! through every transform before it). α is the best of twenty by the predicted loss of the whole site, without a forward
//! pass or a rounding.

use super::diagonal::{Candidate, Schemes, fold};
use super::{BlockWeights, Model, Rewrite, Transform};
use crate::Error;
use bitmill_models::SITES;
use std::sync::{Mutex, PoisonError};

pub(super) struct Awq;

impl Transform for Awq {
    fn name(&self) -> &'static str {
        "awq"
    }

    fn summary(&self) -> &'static str {
        "scale channels by a power of what they carry, and undo it in the norm or linear before (AWQ)"
    }

    fn needs_statistics(&self) -> bool {
        true
    }

    fn prepare(&self, model: &Model<'_>) -> Result<Box<dyn Rewrite>, Error> {
        Ok(Box::new(Scaled { schemes: Schemes::new(model), predicted: Mutex::new((0.0, 0.0)) }))
    }
}

struct Scaled {
    schemes: Schemes,
    /// Sum over the sites so far, relative to the loss of each without scales.
    predicted: Mutex<(f64, f64)>,
}

impl Rewrite for Scaled {
    fn block(&self, block: &mut BlockWeights<'_>) -> Result<(), Error> {
        for index in 0..SITES.len() {
            let Some(candidate) = Candidate::new(&self.schemes, block, index)? else { continue };
            let h = &block.sites[index].h;
            let n = block.sites[index].abs_max.len();
            let carried: Vec<f32> = (0..n).map(|i| h[i * n + i].max(0.0).sqrt()).collect();
            let family = |alpha: f32| carried.iter().map(|a| a.max(1e-12).powf(alpha).max(1e-4)).collect();
            let (_, t, (before, after)) = candidate.search(family, |_| 0.0);
            if before > 0.0 {
                let mut predicted = self.predicted.lock().unwrap_or_else(PoisonError::into_inner);
                *predicted = (predicted.0 + 1.0, predicted.1 + after / before);
            }
            fold(block, index, &t);
        }
        Ok(())
    }

    fn predicted(&self) -> Option<(f64, f64)> {
        Some(*self.predicted.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

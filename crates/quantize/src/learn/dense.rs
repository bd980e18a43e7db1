//! What is trained and stays dense: norms, and the ends of a model.

use super::adam::{Adam, State};
use super::rounding::Rates;
use crate::Error;
use bitmill_models::{Head, HeadGradients};
use candle_core::{Device, Tensor};

/// Rounds a number to a stored type.
pub(crate) type ToStored = fn(f32) -> f32;

/// Smallest size an entry is taken to have when its step is a share of it.
const SMALL: f32 = 1e-3;

/// A dense parameter, kept unrounded; the model sees it in its stored type.
#[derive(Clone)]
pub(super) struct Dense {
    weight: Vec<f32>,
    moments: Adam,
    /// To the stored type.
    round: ToStored,
    /// What is stored lacks this.
    offset: f32,
}

impl Dense {
    /// A parameter whose numbers are stored as they are.
    pub(super) fn new(weight: &Tensor, round: ToStored) -> Result<Self, Error> {
        Dense::with_offset(weight, round, 0.0)
    }

    /// A parameter that is stored without `offset`: factors of norms as their differences from one.
    pub(super) fn with_offset(weight: &Tensor, round: ToStored, offset: f32) -> Result<Self, Error> {
        let weight: Vec<f32> = weight.flatten_all()?.to_vec1()?;
        Ok(Dense { moments: Adam::new(weight.len()), weight, round, offset })
    }

    /// The weight as it will be stored.
    pub(super) fn stored(&self) -> Vec<f32> {
        self.weight.iter().map(|&v| (self.round)(v - self.offset)).collect()
    }

    /// What the stored weight stands for, in the shape of `like`.
    pub(super) fn tensor(&self, like: &Tensor) -> Result<Tensor, Error> {
        let seen: Vec<f32> = self.stored().into_iter().map(|v| v + self.offset).collect();
        Ok(Tensor::from_vec(seen, like.shape(), &Device::Cpu)?)
    }

    /// A step of at most about `rate` times the size of each entry: for parameters whose entries are factors.
    pub(super) fn step_by_shares(&mut self, grad: &[f32], rate: f32) {
        let weight = &mut self.weight;
        self.moments.step(|i| grad[i], rate, |i, d| weight[i] += d * weight[i].abs().max(SMALL));
    }

    /// A step of at most about `rate` times the root mean square of all entries: for parameters whose entries are summands.
    pub(super) fn step(&mut self, grad: &[f32], rate: f32) {
        let energy: f64 = self.weight.iter().map(|&w| f64::from(w).powi(2)).sum();
        let size = (energy / self.weight.len() as f64).sqrt() as f32;
        let (update, mean, square) = self.moments.advance(rate * size);
        for ((w, &g), (m, v)) in self.weight.iter_mut().zip(grad).zip(mean.iter_mut().zip(square)) {
            *w += update.of(g, m, v);
        }
    }

    /// Saves everything that training has changed, or takes it up.
    pub(super) fn exchange(&mut self, state: &mut State<'_>, steps: usize) -> std::io::Result<()> {
        state.floats(&mut self.weight)?;
        self.moments.exchange(state, steps)
    }
}

/// The output head under training, with the norm before it.
#[derive(Clone)]
pub(super) struct TrainedHead {
    /// The head as the present weights make it.
    pub(super) head: Head,
    pub(super) weight: Option<Dense>,
    pub(super) norm: Option<Dense>,
}

impl TrainedHead {
    /// Starts from the full-precision `head`; a part without rounding to its stored type is left alone.
    pub(super) fn new(
        head: &Head,
        weight: Option<ToStored>,
        norm: Option<ToStored>,
        norm_offset: f32,
    ) -> Result<Self, Error> {
        let dense = |(tensor, round)| Dense::with_offset(tensor, round, norm_offset);
        let norm = head.norm().zip(norm).map(dense).transpose()?;
        let weight = weight.map(|round| Dense::new(head.weight(), round)).transpose()?;
        Ok(TrainedHead { head: head.clone(), weight, norm })
    }

    /// Gradients of zero, of what is trained.
    pub(super) fn no_gradients(&self) -> HeadGradients {
        self.head.no_gradients(self.weight.is_some())
    }

    /// One step against the gradients at the present weights.
    pub(super) fn step(&mut self, gradients: &HeadGradients, rates: Rates) -> Result<(), Error> {
        if let Some(weight) = self.weight.as_mut().filter(|_| rates.head > 0.0) {
            weight.step(&gradients.linear, rates.head);
        }
        if let Some(norm) = self.norm.as_mut().filter(|_| rates.norms > 0.0) {
            norm.step_by_shares(&gradients.norm, rates.norms);
        }
        self.refresh()
    }

    /// Puts the present weights into the head.
    fn refresh(&mut self) -> Result<(), Error> {
        if let Some(weight) = &self.weight {
            let tensor = weight.tensor(self.head.weight())?;
            self.head.set_weight(tensor);
        }
        if let (Some(norm), Some(like)) = (&self.norm, self.head.norm()) {
            let tensor = norm.tensor(like)?;
            self.head.set_norm(tensor);
        }
        Ok(())
    }

    /// Saves everything that training has changed, or takes it up.
    pub(super) fn exchange(&mut self, state: &mut State<'_>, steps: usize) -> Result<std::io::Result<()>, Error> {
        let mut parts = self.weight.iter_mut().chain(&mut self.norm);
        let done = parts.try_for_each(|part| part.exchange(state, steps));
        self.refresh()?;
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_bounded_by_size_and_the_stored_type_is_what_is_seen() {
        let start = Tensor::new(&[[4.0f32, -4.0], [0.5, 0.0]], &Device::Cpu).unwrap();
        let round: ToStored = |v| (v * 64.0).round() / 64.0;
        let (mut shares, mut even) = (Dense::new(&start, round).unwrap(), Dense::new(&start, round).unwrap());
        let grad = [1.0, -1.0, 2.0, 0.0];
        shares.step_by_shares(&grad, 0.1);
        even.step(&grad, 0.1);
        let close = |a: &[f32], b: [f32; 4]| a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1.0 / 128.0 + 1e-6);
        assert!(close(&shares.stored(), [3.6, -3.6, 0.45, 0.0]), "{:?}", shares.stored());
        // Root mean square of the entries: √(32.25 / 4).
        let d = 0.1 * (32.25f32 / 4.0).sqrt();
        assert!(close(&even.stored(), [4.0 - d, -4.0 + d, 0.5 - d, 0.0]), "{:?}", even.stored());
        assert!(even.stored().iter().all(|&v| v == round(v)));
        assert_eq!(even.tensor(&start).unwrap().dims(), [2, 2]);
        // Of a factor 1 + w, w is what is rounded.
        let coarse: ToStored = |v| (v * 4.0).round() / 4.0;
        let factor = Tensor::new(&[1.3f32, 0.9], &Device::Cpu).unwrap();
        let norm = Dense::with_offset(&factor, coarse, 1.0).unwrap();
        assert_eq!(norm.stored(), [0.25, -0.0]);
        assert_eq!(norm.tensor(&factor).unwrap().to_vec1::<f32>().unwrap(), [1.25, 1.0]);
    }
}

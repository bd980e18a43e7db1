//! What tuning aims at, as a loss on the last hidden states and its gradient there.

use crate::Error;
use bitmill_models::Head;
use candle_core::Tensor;

/// Positions whose logits exist at a time: bounds memory for large vocabularies.
const POSITIONS: usize = 128;

/// What the hidden states after the last block are held against.
#[derive(Clone, Copy)]
pub(super) enum Goal<'a> {
    /// The full-precision logits, by KL divergence.
    Logits(&'a Head),
    /// The full-precision hidden states, by mean squared error relative to their mean square: for models without a head.
    States,
}

impl Goal<'_> {
    /// The loss of hidden states `h` against `reference`, both `[tokens, hidden]`, and its gradient at `h`, which is
    /// not computed (and empty) without `gradient`. Means are over positions.
    pub(super) fn loss(self, h: &Tensor, reference: &Tensor, gradient: bool) -> Result<(f64, Vec<f32>), Error> {
        match self {
            Goal::States => {
                let (h, r): (Vec<f32>, Vec<f32>) = (h.flatten_all()?.to_vec1()?, reference.flatten_all()?.to_vec1()?);
                let energy = r.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().max(f64::MIN_POSITIVE);
                let error: f64 = h.iter().zip(&r).map(|(a, b)| f64::from(a - b).powi(2)).sum();
                let slope = |(a, b): (&f32, &f32)| (2.0 * f64::from(a - b) / energy) as f32;
                let grad = if gradient { h.iter().zip(&r).map(slope).collect() } else { Vec::new() };
                Ok((error / energy, grad))
            }
            Goal::Logits(head) => divergence(head, h, reference, gradient),
        }
    }
}

/// KL(softmax p ‖ softmax q), q the logits of `h` and p those of `reference`; the gradient at the logits is q − p.
fn divergence(head: &Head, h: &Tensor, reference: &Tensor, gradient: bool) -> Result<(f64, Vec<f32>), Error> {
    let tokens = h.dim(0)?;
    let (mut total, mut grad) = (0.0, Vec::new());
    for from in (0..tokens).step_by(POSITIONS) {
        let rows = POSITIONS.min(tokens - from);
        let part = h.narrow(0, from, rows)?.contiguous()?;
        let mut q = head.logits(&part)?.flatten_all()?.to_vec1::<f32>()?;
        let mut p = head.logits(&reference.narrow(0, from, rows)?)?.flatten_all()?.to_vec1::<f32>()?;
        let vocab = q.len() / rows;
        for (q, p) in q.chunks_exact_mut(vocab).zip(p.chunks_exact_mut(vocab)) {
            let (to_q, to_p) = (1.0 / exponentials(q), 1.0 / exponentials(p));
            for (q, p) in q.iter_mut().zip(p) {
                let (mine, theirs) = (*q * to_q, *p * to_p);
                if theirs > 0.0 {
                    total += f64::from(theirs * (theirs / mine.max(f32::MIN_POSITIVE)).ln());
                }
                *q = (mine - theirs) / tokens as f32;
            }
        }
        if gradient {
            grad.extend(head.backward(&part, &q)?);
        }
    }
    Ok((total / tokens as f64, grad))
}

/// Replaces logits by their exponentials relative to the largest; returns the sum.
fn exponentials(row: &mut [f32]) -> f32 {
    let max = row.iter().fold(f32::NEG_INFINITY, |a, &v| a.max(v));
    row.iter_mut().for_each(|v| *v = (*v - max).exp());
    row.iter().map(|&v| f64::from(v)).sum::<f64>() as f32
}

/// Replaces each token after the first by what the full-precision model itself would have said there, with probability
/// `share`: sampled from its prediction given the true text so far. `h [tokens, hidden]` are its last hidden states.
/// Teacher and student both read the result, so it needs no true continuation; it gives every pass over few windows new
/// contexts, which is what keeps rounding from learning the windows by heart.
pub(super) fn resample(
    head: &Head,
    h: &Tensor,
    tokens: &mut [u32],
    share: f32,
    random: &mut dyn FnMut() -> f32,
) -> Result<(), Error> {
    let count = tokens.len();
    for from in (0..count).step_by(POSITIONS) {
        let rows = POSITIONS.min(count - from);
        let mut p = head.logits(&h.narrow(0, from, rows)?)?.flatten_all()?.to_vec1::<f32>()?;
        let vocab = p.len() / rows;
        for (i, row) in p.chunks_exact_mut(vocab).enumerate() {
            let Some(next) = tokens.get_mut(from + i + 1) else { continue };
            if random() >= share {
                continue;
            }
            let mut left = random() * exponentials(row);
            let passed = row.iter().position(|v| {
                left -= v;
                left < 0.0
            });
            *next = passed.unwrap_or(vocab - 1) as u32;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitmill_models::spec;
    use candle_core::Device;
    use serde_json::json;
    use std::collections::BTreeMap;

    fn head() -> Head {
        let spec =
            spec(&json!({"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 40}))
            .unwrap();
        let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();
        let weights: BTreeMap<String, Tensor> =
            spec.tensors().into_iter().map(|slot| (slot.name, random(&slot.shape))).collect();
        Head::load(&spec, &weights).unwrap()
    }

    #[test]
    fn gradients_are_slopes_of_the_loss() {
        let head = head();
        let (h, r) =
            (Tensor::randn(0f32, 1.0, (140, 16), &Device::Cpu), Tensor::randn(0f32, 1.0, (140, 16), &Device::Cpu));
        let (h, r) = (h.unwrap(), r.unwrap());
        for goal in [Goal::Logits(&head), Goal::States] {
            let (value, grad) = goal.loss(&h, &r, true).unwrap();
            assert!(value > 0.0 && grad.len() == 140 * 16);
            assert!(goal.loss(&r, &r, false).unwrap().0.abs() < 1e-6, "nothing is lost against itself");
            let along = Tensor::randn(0f32, 1.0, (140, 16), &Device::Cpu).unwrap();
            let at = |t: f64| goal.loss(&(&h + (&along * t).unwrap()).unwrap(), &r, false).unwrap().0;
            let slope = (at(1e-2) - at(-1e-2)) / 2e-2;
            let along: Vec<f32> = along.flatten_all().unwrap().to_vec1().unwrap();
            let expected: f64 = along.iter().zip(&grad).map(|(a, b)| f64::from(a * b)).sum();
            assert!((slope - expected).abs() < 0.02 * expected.abs() + 1e-3, "{slope} {expected}");
        }
    }

    #[test]
    fn resampling_changes_its_share_of_tokens_but_never_the_first() {
        let head = head();
        let h = Tensor::randn(0f32, 1.0, (300, 16), &Device::Cpu).unwrap();
        let (mut state, original) = (1u64, vec![40u32; 300]);
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 24) as f32
        };
        for (share, least, most) in [(0.0, 0, 0), (0.3, 60, 120), (1.0, 299, 299)] {
            let mut tokens = original.clone();
            resample(&head, &h, &mut tokens, share, &mut random).unwrap();
            let changed = tokens.iter().filter(|&&t| t != 40).count();
            assert!((least..=most).contains(&changed) && tokens[0] == 40, "{share}: {changed}");
            assert!(tokens.iter().all(|&t| t <= 40));
        }
    }
}

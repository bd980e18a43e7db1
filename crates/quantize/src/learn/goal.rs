//! What tuning aims at, as a loss on the last hidden states and its gradient there.

use super::dense::TrainedHead;
use crate::Error;
use bitmill_models::{Head, HeadGradients, draw, softmax, softmax_divergence};
use candle_core::Tensor;

/// Positions whose logits exist at a time: bounds memory for large vocabularies.
const POSITIONS: usize = 128;

/// What the hidden states after the last block are held against.
#[derive(Clone, Copy)]
pub(super) enum Goal<'a> {
    /// The full-precision logits, by KL divergence.
    Logits {
        /// The head that makes them.
        teacher: &'a Head,
        /// The one under training.
        student: &'a TrainedHead,
        /// Likeliest tokens of the teacher's that the gradient is of, if not all.
        top: Option<usize>,
    },
    /// The full-precision hidden states, by mean squared error relative to their mean square: for models without a head.
    States,
}

impl Goal<'_> {
    /// The loss of hidden states `h` against `reference`, both `[tokens, hidden]`: its mean over positions.
    pub(super) fn loss(self, h: &Tensor, reference: &Tensor) -> Result<f64, Error> {
        match self {
            Goal::States => Ok(distance(h, reference)?.0),
            Goal::Logits { teacher, student, .. } => {
                Ok(divergence([teacher, &student.head], h, reference, None, None)?.0)
            }
        }
    }

    /// The gradient of the loss at `h`, and those of the head where there is one.
    pub(super) fn gradients(self, h: &Tensor, reference: &Tensor) -> Result<(Vec<f32>, Option<HeadGradients>), Error> {
        match self {
            Goal::States => Ok((distance(h, reference)?.1, None)),
            Goal::Logits { teacher, student, top } => {
                let mut of_head = student.no_gradients();
                let (_, grad) = divergence([teacher, &student.head], h, reference, top, Some(&mut of_head))?;
                Ok((grad, Some(of_head)))
            }
        }
    }
}

/// The squared distance of `h` to `reference` over the energy of that, and its gradient at `h`.
pub(super) fn distance(h: &Tensor, reference: &Tensor) -> Result<(f64, Vec<f32>), Error> {
    let (h, r): (Vec<f32>, Vec<f32>) = (h.flatten_all()?.to_vec1()?, reference.flatten_all()?.to_vec1()?);
    let energy = r.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().max(f64::MIN_POSITIVE);
    let error: f64 = h.iter().zip(&r).map(|(a, b)| f64::from(a - b).powi(2)).sum();
    let slope = |(a, b): (&f32, &f32)| (2.0 * f64::from(a - b) / energy) as f32;
    Ok((error / energy, h.iter().zip(&r).map(slope).collect()))
}

/// KL(softmax p ‖ softmax q), q the logits of `h` and p those of `reference`; the gradient at the logits is q − p. Both are of the `top`
/// likeliest tokens alone, if that is said.
fn divergence(
    [teacher, student]: [&Head; 2],
    h: &Tensor,
    reference: &Tensor,
    top: Option<usize>,
    mut gradients: Option<&mut HeadGradients>,
) -> Result<(f64, Vec<f32>), Error> {
    let tokens = h.dim(0)?;
    let (mut total, mut grad) = (0.0, Vec::new());
    for from in (0..tokens).step_by(POSITIONS) {
        let rows = POSITIONS.min(tokens - from);
        let part = h.narrow(0, from, rows)?.contiguous()?;
        let mut q = student.logits(&part)?.flatten_all()?.to_vec1::<f32>()?;
        let p = teacher.logits(&reference.narrow(0, from, rows)?)?.flatten_all()?.to_vec1::<f32>()?;
        let vocab = q.len() / rows;
        for (q, p) in q.chunks_exact_mut(vocab).zip(p.chunks_exact(vocab)) {
            total += match top.filter(|&top| top < vocab) {
                Some(top) => top_divergence(q, p, top),
                None => softmax_divergence(q, p),
            };
            q.iter_mut().for_each(|slope| *slope /= tokens as f32);
        }
        if let Some(of_head) = gradients.as_deref_mut() {
            grad.extend(student.backward(&part, &q, Some(of_head))?);
        }
    }
    Ok((total / tokens as f64, grad))
}

/// [`softmax_divergence`] over the `top` largest logits of `p` alone; elsewhere the gradient is zero.
fn top_divergence(q: &mut [f32], p: &[f32], top: usize) -> f64 {
    let mut likeliest: Vec<u32> = (0..p.len() as u32).collect();
    let of = |row: &[f32], token: u32| row[token as usize];
    // Equal logits in the order of their tokens, so that the choice is always the same.
    let likelier = |&a: &u32, &b: &u32| of(p, b).total_cmp(&of(p, a)).then(a.cmp(&b));
    if (1..p.len()).contains(&top) {
        likeliest.select_nth_unstable_by(top - 1, likelier);
    }
    likeliest.truncate(top);
    likeliest.sort_unstable();
    let mut own: Vec<f32> = likeliest.iter().map(|&token| of(q, token)).collect();
    let full: Vec<f32> = likeliest.iter().map(|&token| of(p, token)).collect();
    let divergence = softmax_divergence(&mut own, &full);
    q.fill(0.0);
    likeliest.iter().zip(own).for_each(|(&token, slope)| q[token as usize] = slope);
    divergence
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
    // Token t is drawn from position t − 1; only the positions drawn from are worth a product with the head.
    let drawn: Vec<u32> = (1..tokens.len() as u32).filter(|_| random() < share).collect();
    for some in drawn.chunks(POSITIONS) {
        let before: Vec<u32> = some.iter().map(|t| t - 1).collect();
        let rows = h.index_select(&Tensor::new(before, h.device())?, 0)?;
        let mut p = head.logits(&rows)?.flatten_all()?.to_vec1::<f32>()?;
        let vocab = p.len() / some.len();
        for (&token, row) in some.iter().zip(p.chunks_exact_mut(vocab)) {
            softmax(row, 1.0);
            tokens[token as usize] = draw(row, random()) as u32;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiny;
    use candle_core::Device;

    fn head() -> Head {
        let (spec, weights) = tiny::llama(16, 1, 1.0);
        Head::load(&spec, &weights).unwrap()
    }

    #[test]
    fn gradients_are_slopes_of_the_loss() {
        let head = head();
        let (h, r) =
            (Tensor::randn(0f32, 1.0, (140, 16), &Device::Cpu), Tensor::randn(0f32, 1.0, (140, 16), &Device::Cpu));
        let (h, r) = (h.unwrap(), r.unwrap());
        let near = |slope: f64, expected: f64| (slope - expected).abs() < 0.02 * expected.abs() + 1e-3;
        let dot = |a: &Tensor, b: &[f32]| -> f64 {
            let a: Vec<f32> = a.flatten_all().unwrap().to_vec1().unwrap();
            a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum()
        };
        let moved = |x: &Tensor, along: &Tensor, t: f64| (x + (along * t).unwrap()).unwrap();
        let random = |like: &Tensor| Tensor::randn(0f32, 1.0, like.shape(), &Device::Cpu).unwrap();
        let trained = |head: &Head| TrainedHead::new(head, Some(|v| v), Some(|v| v), 0.0).unwrap();
        for goal in [Goal::Logits { teacher: &head, student: &trained(&head), top: None }, Goal::States] {
            let value = goal.loss(&h, &r).unwrap();
            let (grad, of_head) = goal.gradients(&h, &r).unwrap();
            assert!(value > 0.0 && grad.len() == 140 * 16);
            assert!(goal.loss(&r, &r).unwrap().abs() < 1e-6, "nothing is lost against itself");
            let along = random(&h);
            let at = |t: f64| goal.loss(&moved(&h, &along, t), &r).unwrap();
            let slope = (at(1e-2) - at(-1e-2)) / 2e-2;
            assert!(near(slope, dot(&along, &grad)), "{slope} {}", dot(&along, &grad));
            let Some(of_head) = of_head else { continue };
            let (to_weight, to_norm) = (random(head.weight()), random(head.norm().unwrap()));
            let at = |t: f64| {
                let mut student = head.clone();
                student.set_weight(moved(head.weight(), &to_weight, t));
                student.set_norm(moved(head.norm().unwrap(), &to_norm, t));
                Goal::Logits { teacher: &head, student: &trained(&student), top: None }.loss(&h, &r).unwrap()
            };
            let (slope, expected) =
                ((at(1e-2) - at(-1e-2)) / 2e-2, dot(&to_weight, &of_head.linear) + dot(&to_norm, &of_head.norm));
            assert!(near(slope, expected), "{slope} {expected}");
        }
    }

    #[test]
    fn of_the_likeliest_alone_is_a_divergence_of_what_they_share() {
        let (q, p) = ([0.1, 2.0, -1.0, 0.7, 0.7], [3.0, -2.0, 0.5, 2.5, 0.5]);
        let mut slopes = q;
        // Tokens 0, 3 and, of two alike, 2.
        let all = top_divergence(&mut slopes, &p, 3);
        let (mut own, full) = ([0.1f32, -1.0, 0.7], [3.0f32, 0.5, 2.5]);
        assert!((all - softmax_divergence(&mut own, &full)).abs() < 1e-9);
        assert_eq!(slopes, [own[0], 0.0, own[1], own[2], 0.0]);
        let (mut some, mut every) = (q, q);
        assert_eq!(top_divergence(&mut some, &p, 5), softmax_divergence(&mut every, &p));
        assert_eq!(some, every);
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

//! Adam (Kingma and Ba 2015) over one slice of parameters.

/// Decay of the mean and of the square. The second is shorter than usual: a stage has a few hundred steps.
const BETA: (f32, f32) = (0.9, 0.99);
/// Keeps a parameter still that has never seen a gradient; gradients of a mean loss lie far above it.
const TINY: f32 = 1e-20;

/// Moments of the gradients of `n` parameters.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Adam {
    mean: Vec<f32>,
    square: Vec<f32>,
    steps: i32,
}

impl Adam {
    pub(super) fn new(n: usize) -> Self {
        Adam { mean: vec![0.0; n], square: vec![0.0; n], steps: 0 }
    }

    /// Moves every parameter by at most about `rate` against `gradient(i)`: `change(i, −rate · m̂ / √v̂)`.
    pub(super) fn step(&mut self, gradient: impl Fn(usize) -> f32, rate: f32, mut change: impl FnMut(usize, f32)) {
        let (update, mean, square) = self.advance(rate);
        for (i, (m, v)) in mean.iter_mut().zip(square).enumerate() {
            change(i, update.of(gradient(i), m, v));
        }
    }

    /// Begins the next step: its rule, and the means and squares it is to be applied to, once each.
    pub(super) fn advance(&mut self, rate: f32) -> (Update, &mut [f32], &mut [f32]) {
        self.steps += 1;
        let correct = (1.0 - BETA.0.powi(self.steps), 1.0 - BETA.1.powi(self.steps));
        (Update { rate: rate / correct.0, square: 1.0 / correct.1 }, &mut self.mean, &mut self.square)
    }

    /// Writes the moments to `state`, or reads them back; `steps` is the same for all of a stage.
    pub(super) fn exchange(&mut self, state: &mut State<'_>, steps: usize) -> std::io::Result<()> {
        self.steps = steps as i32;
        state.floats(&mut self.mean)?;
        state.floats(&mut self.square)
    }
}

/// The rule of one step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Update {
    /// Over the share of the mean that its start at zero has left.
    rate: f32,
    /// One over the same of the square.
    square: f32,
}

impl Update {
    /// The change of a parameter with moments `m` and `v`, brought up to date, for its gradient `g`.
    #[inline]
    pub(super) fn of(self, g: f32, m: &mut f32, v: &mut f32) -> f32 {
        *m += (1.0 - BETA.0) * (g - *m);
        *v += (1.0 - BETA.1) * (g * g - *v);
        -self.rate * *m / ((*v * self.square).sqrt() + TINY)
    }
}

/// A stream of numbers in one direction: what is saved and what is taken up is one list, so the two cannot drift apart.
pub(super) enum State<'a> {
    Save(&'a mut dyn std::io::Write),
    Load(&'a mut dyn std::io::Read),
}

impl State<'_> {
    pub(super) fn floats(&mut self, values: &mut [f32]) -> std::io::Result<()> {
        let mut bytes = vec![0u8; values.len() * 4];
        match self {
            State::Save(out) => {
                bytes.chunks_exact_mut(4).zip(values).for_each(|(b, v)| b.copy_from_slice(&v.to_le_bytes()));
                out.write_all(&bytes)
            }
            State::Load(input) => {
                input.read_exact(&mut bytes)?;
                values.iter_mut().zip(bytes.as_chunks().0).for_each(|(v, b)| *v = f32::from_le_bytes(*b));
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parabola_is_descended_at_the_rate() {
        let (mut x, mut adam) = ([3.0f32, -2.0, 0.5], Adam::new(3));
        let goal = [1.0f32, 1.0, 0.5];
        for step in 0..400 {
            let old = x;
            adam.step(|i| 2.0 * (old[i] - goal[i]), 0.05 * (1.0 - step as f32 / 400.0), |i, d| x[i] += d);
            assert!(x.iter().zip(old).all(|(a, b)| (a - b).abs() < 0.06), "steps are bounded by the rate");
        }
        assert!(x.iter().zip(goal).all(|(a, b)| (a - b).abs() < 1e-2), "{x:?}");
    }
}

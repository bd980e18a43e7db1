//! Rotary position embedding: the variants configs ask for, and the table of cosines and sines of a window.
//!
//! Position `p` rotates the pair `(x[i], x[i + dim/2])`, or a pair of neighbours ([`Pairs`]), by `p · f_i`, with `f_i = theta^(−2i/dim)` before scaling; the
//! variants change the frequencies `f_i` and may stretch cosines and sines by an attention factor. The arithmetic is
//! f32 where the reference's is, so that angles agree to the last bit or two at long positions.

mod read;

pub(crate) use read::RopeKeys;

use crate::Error;
use candle_core::{Device, Tensor};
use std::f64::consts::PI;

/// Rotary embedding of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the geometric row of wavelengths.
    pub theta: f64,
    /// Rotated width: the head size, or less where the rest of a head is left as it is.
    pub dim: usize,
    /// How the frequencies are changed for long contexts.
    pub kind: RopeKind,
}

/// Which channels of a head are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairs {
    /// Channel `i` and channel `i + dim / 2`.
    Halves,
    /// Channel `2i` and channel `2i + 1`.
    Neighbours,
}

/// Scaling of the frequencies. `original` is always the context length before scaling.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeKind {
    /// None.
    Default,
    /// Every frequency divided by a factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// The base grows with the window once it exceeds the context length.
    Dynamic {
        /// Strength of the growth.
        factor: f64,
        /// Context length up to which nothing changes.
        original: usize,
    },
    /// Low frequencies divided, high ones kept, a ramp between (Llama 3.1).
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// `original / low` is the wavelength above which a frequency is low.
        low: f64,
        /// `original / high` is the wavelength below which a frequency is high.
        high: f64,
        /// Context length before scaling.
        original: usize,
    },
    /// Interpolation by parts (arXiv 2309.00071).
    Yarn {
        /// Divisor of the interpolated frequencies.
        factor: f64,
        /// Rotations over the original context above which a frequency is kept.
        beta_fast: f64,
        /// Rotations over the original context below which a frequency is interpolated.
        beta_slow: f64,
        /// Whether the ramp's ends are rounded outwards to whole indices.
        truncate: bool,
        /// Factor of cosines and sines.
        attention: f64,
        /// Context length before scaling.
        original: usize,
    },
    /// A divisor for every frequency, one set for short and one for long windows (arXiv 2402.13753).
    LongRope {
        /// Divisors of windows up to `original`.
        short: Vec<f64>,
        /// Divisors of longer windows.
        long: Vec<f64>,
        /// Factor of cosines and sines.
        attention: f64,
        /// Context length before scaling.
        original: usize,
    },
}

impl Rope {
    /// The `dim / 2` frequencies, in radians per position, for a window of `tokens`.
    #[must_use]
    pub fn frequencies(&self, tokens: usize) -> Vec<f32> {
        let plain = |theta: f64| self.pairs().map(move |e| 1.0 / (theta as f32).powf(e));
        match &self.kind {
            RopeKind::Default => plain(self.theta).collect(),
            RopeKind::Linear { factor } => plain(self.theta).map(|f| f / *factor as f32).collect(),
            RopeKind::Dynamic { factor, original } => {
                let stretch = factor * tokens.max(*original) as f64 / *original as f64 - (factor - 1.0);
                plain(self.theta * stretch.powf(self.dim as f64 / (self.dim as f64 - 2.0))).collect()
            }
            RopeKind::Llama3 { factor, low, high, original } => plain(self.theta)
                .map(|f| llama3(f, *factor as f32, *low as f32, *high as f32, *original as f32))
                .collect(),
            RopeKind::Yarn { factor, .. } => {
                let (from, to) = self.yarn_ramp();
                let interpolated = |i: usize| ((i as f32 - from) / (to - from)).clamp(0.0, 1.0);
                let blend = |(i, e): (usize, f32)| {
                    let wave = (self.theta as f32).powf(e);
                    let kept = 1.0 - interpolated(i);
                    1.0 / (*factor as f32 * wave) * (1.0 - kept) + 1.0 / wave * kept
                };
                self.pairs().enumerate().map(blend).collect()
            }
            RopeKind::LongRope { short, long, original, .. } => {
                let divisors = if tokens > *original { long } else { short };
                self.pairs().zip(divisors).map(|(e, &d)| 1.0 / (d as f32 * (self.theta as f32).powf(e))).collect()
            }
        }
    }

    /// Exponents `2i / dim` of the base.
    fn pairs(&self) -> impl Iterator<Item = f32> + use<> {
        let dim = self.dim;
        (0..dim / 2).map(move |i| (2 * i) as f32 / dim as f32)
    }

    /// Pair indices between which YaRN goes over from keeping to interpolating.
    fn yarn_ramp(&self) -> (f32, f32) {
        let RopeKind::Yarn { beta_fast, beta_slow, truncate, original, .. } = self.kind else { return (0.0, 1.0) };
        let index =
            |turns: f64| self.dim as f64 * (original as f64 / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
        let (mut from, mut to) = (index(beta_fast), index(beta_slow));
        if truncate {
            (from, to) = (from.floor(), to.ceil());
        }
        (from, to) = (from.max(0.0), to.min(self.dim as f64 - 1.0));
        if from == to {
            // The reference's own way around a ramp of no length.
            to += 0.001;
        }
        (from as f32, to as f32)
    }

    fn attention(&self) -> f32 {
        match self.kind {
            RopeKind::Yarn { attention, .. } | RopeKind::LongRope { attention, .. } => attention as f32,
            _ => 1.0,
        }
    }

    /// Cosines and sines `[tokens, dim / 2]` of a window of `tokens`.
    fn turns(&self, tokens: usize) -> Result<(Tensor, Tensor), Error> {
        let (frequencies, scale) = (self.frequencies(tokens), self.attention());
        let table = |turn: fn(f32) -> f32| {
            let angle = |p: usize| frequencies.iter().map(move |f| turn(p as f32 * f) * scale);
            let entries: Vec<f32> = (0..tokens).flat_map(angle).collect();
            Tensor::from_vec(entries, (tokens, frequencies.len()), &Device::Cpu)
        };
        Ok((table(f32::cos)?, table(f32::sin)?))
    }

    /// The shortest window with the same frequencies as one of `tokens`.
    fn shortest(&self, tokens: usize) -> usize {
        match self.kind {
            RopeKind::Dynamic { original, .. } if tokens > original => tokens,
            RopeKind::LongRope { original, .. } if tokens > original => original + 1,
            _ => 1,
        }
    }
}

fn llama3(f: f32, factor: f32, low: f32, high: f32, original: f32) -> f32 {
    let wavelength = 2.0 * PI as f32 / f;
    if wavelength < original / high {
        f
    } else if wavelength > original / low {
        f / factor
    } else {
        let keep = (original / wavelength - low) / (high - low);
        (1.0 - keep) * f / factor + keep * f
    }
}

/// Cosines and sines of the positions of one window, for every block that rotates.
#[derive(Debug, Clone)]
pub struct RopeTable {
    /// Cosines and sines, each `[longest, dim / 2]`, of every rotary embedding there is.
    turns: Vec<(Tensor, Tensor)>,
    /// For each block, which of them it uses.
    of_block: Vec<Option<usize>>,
    shortest: usize,
    longest: usize,
}

impl RopeTable {
    /// The table for windows of `tokens` positions, for blocks with these rotary embeddings. It also serves shorter
    /// windows, as far as the frequencies do not depend on the length (dynamic and longrope scaling beyond the original
    /// context).
    ///
    /// # Errors
    /// [`Error::Window`] for a window of no tokens.
    pub fn new(ropes: &[Option<Rope>], tokens: usize) -> Result<Self, Error> {
        if tokens == 0 {
            return Err(Error::Window { tokens, shortest: 1, longest: usize::MAX });
        }
        let mut distinct: Vec<&Rope> = Vec::new();
        let place = |rope: &'_ Option<Rope>, distinct: &mut Vec<&Rope>| {
            rope.as_ref().map(|rope| distinct.iter().position(|known| *known == rope))
        };
        for rope in ropes {
            if place(rope, &mut distinct) == Some(None) {
                distinct.extend(rope);
            }
        }
        let of_block = ropes.iter().map(|rope| place(rope, &mut distinct).flatten()).collect();
        let turns = distinct.iter().map(|rope| rope.turns(tokens)).collect::<Result<_, _>>()?;
        let shortest = distinct.iter().map(|rope| rope.shortest(tokens)).max().unwrap_or(1);
        Ok(RopeTable { turns, of_block, shortest, longest: tokens })
    }

    /// Checks that a window of `tokens` may use the table.
    pub(crate) fn serves(&self, tokens: usize) -> Result<(), Error> {
        if (self.shortest..=self.longest).contains(&tokens) {
            Ok(())
        } else {
            Err(Error::Window { tokens, shortest: self.shortest, longest: self.longest })
        }
    }

    /// Cosines and sines `[longest, dim / 2]` of block `index`, where it rotates, after checking that a window of `tokens`
    /// may use them.
    pub(crate) fn of_block(&self, index: usize, tokens: usize) -> Result<Option<(&Tensor, &Tensor)>, Error> {
        self.serves(tokens)?;
        Ok(self.of_block[index].map(|i| (&self.turns[i].0, &self.turns[i].1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_refuses_windows_with_other_frequencies() {
        let dynamic = Rope { theta: 1e4, dim: 8, kind: RopeKind::Dynamic { factor: 2.0, original: 16 } };
        let long = RopeKind::LongRope { short: vec![1.0; 4], long: vec![2.0; 4], attention: 1.0, original: 16 };
        let long = Rope { theta: 1e4, dim: 8, kind: long };
        let default = Rope { theta: 1e4, dim: 8, kind: RopeKind::Default };
        for (rope, built, served, refused) in [
            (&default, 32, vec![1, 16, 32], vec![0, 33]),
            (&dynamic, 16, vec![1, 16], vec![17]),
            (&dynamic, 32, vec![32], vec![16, 31, 33]),
            (&long, 32, vec![17, 32], vec![1, 16, 33]),
            (&long, 16, vec![1, 16], vec![17]),
        ] {
            let table = RopeTable::new(&[Some(rope.clone())], built).unwrap();
            assert!(served.iter().all(|&t| table.of_block(0, t).is_ok()), "{rope:?} {built}");
            assert!(
                refused.iter().all(|&t| matches!(table.of_block(0, t), Err(Error::Window { .. }))),
                "{rope:?} {built}"
            );
        }
        assert!(RopeTable::new(&[Some(default)], 0).is_err());
    }

    #[test]
    fn blocks_have_the_tables_of_their_own_ropes() {
        let rope = |theta: f64, dim: usize| Some(Rope { theta, dim, kind: RopeKind::Default });
        let table = RopeTable::new(&[rope(1e4, 8), None, rope(1e2, 4), rope(1e4, 8)], 5).unwrap();
        let of = |block| table.of_block(block, 5).unwrap().map(|(cos, _)| cos.to_vec2::<f32>().unwrap());
        assert_eq!(table.turns.len(), 2, "equal ones are kept once");
        assert!(of(0) == of(3) && of(1).is_none());
        let (wide, narrow) = (of(0).unwrap(), of(2).unwrap());
        assert_eq!((wide[4].len(), narrow[4].len()), (4, 2));
        assert_eq!(narrow[4][1], (4.0f32 * 0.1).cos());
    }
}

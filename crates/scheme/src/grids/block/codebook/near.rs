//! A point near a unit of weights, by one look into a table.
//!
//! Every weight takes its own nearest magnitude, and a table says for each combination of magnitudes which listed vector is
//! nearest to it. That is the nearest point where the combination is listed, and close to it elsewhere: good enough to tell
//! a good scale from a bad one, at a fraction of a search. Codes that are stored come from the search.

use super::{Codebook, Flags, UNIT};
use std::sync::OnceLock;

/// Digits of a codebook, at most.
const DIGITS: usize = 8;
/// Listed vectors that are looked at.
const CHOICE: usize = 6;

/// What is near to combinations of digits.
#[derive(Debug)]
pub(super) struct Near {
    /// The digits of the vectors.
    listed: Vec<[u8; UNIT]>,
    /// The vectors nearest to a combination, nearest first, found when it is first met.
    cells: Vec<OnceLock<[[u8; UNIT]; CHOICE]>>,
}

/// What digits stand for, in ascending order.
#[derive(Debug)]
pub(super) struct Ladder {
    levels: [f32; DIGITS],
    /// Between each level and the next.
    middles: [f32; DIGITS],
}

impl Ladder {
    pub(super) const fn new(of: &[i8]) -> Self {
        let mut ladder = Ladder { levels: [0.0; DIGITS], middles: [0.0; DIGITS] };
        let mut d = 0;
        while d < of.len() {
            ladder.levels[d] = of[d] as f32;
            if d > 0 {
                ladder.middles[d - 1] = 0.5 * (ladder.levels[d - 1] + ladder.levels[d]);
            }
            d += 1;
        }
        ladder
    }
}

impl Codebook {
    /// Writes the codes of a point near `centre`, in levels, where errors cost `costs` each, independently.
    pub fn near(&self, centre: &[f32], costs: &[f32], codes: &mut [u8]) {
        match self.flags {
            Flags::None => self.near_vectors(centre, costs, &self.plain, codes),
            Flags::Free | Flags::Even => self.near_signed(centre, costs, codes),
            Flags::Alike => {
                self.near_vectors(centre, costs, &self.plain, codes);
                let mut other = [0; UNIT];
                let other = &mut other[..codes.len()];
                self.near_vectors(centre, costs, &self.flagged, other);
                if cost(centre, costs, other, &self.flagged) < cost(centre, costs, codes, &self.plain) {
                    codes.iter_mut().zip(other).for_each(|(c, &mut o)| *c = o + self.digits as u8);
                }
            }
        }
    }

    /// Flags are signs: magnitudes are rounded, and an odd number of signs is made even where turning one costs least.
    fn near_signed(&self, centre: &[f32], costs: &[f32], codes: &mut [u8]) {
        let mut sizes = [0.0f32; UNIT];
        sizes.iter_mut().zip(centre).for_each(|(s, c)| *s = c.abs());
        self.near_vectors(&sizes[..centre.len()], costs, &self.plain, codes);
        let mut turned = usize::MAX;
        if self.flags == Flags::Even && centre.iter().filter(|&&c| c < 0.0).count() % 2 == 1 {
            // Costs that are no numbers turn the first.
            let mut least = (f32::INFINITY, 0);
            for (k, &code) in codes.iter().enumerate() {
                let cost = costs[k] * sizes[k] * self.plain.levels[usize::from(code)];
                if cost < least.0 {
                    least = (cost, k);
                }
            }
            turned = least.1;
        }
        for (k, (c, &x)) in codes.iter_mut().zip(centre).enumerate() {
            *c += if (x < 0.0) != (k == turned) { self.digits as u8 } else { 0 };
        }
    }

    /// The digits of the vectors near `centre`, where digits have these `levels`.
    fn near_vectors(&self, centre: &[f32], costs: &[f32], levels: &Ladder, codes: &mut [u8]) {
        let near = self.near.get_or_init(|| Near {
            listed: self.numbers[..self.vectors].iter().map(|&number| self.digits_of(number.into())).collect(),
            cells: vec![OnceLock::new(); self.end],
        });
        let vectors = centre.chunks(self.len).zip(costs.chunks(self.len)).zip(codes.chunks_mut(self.len));
        for ((centre, costs), codes) in vectors {
            let codes = &mut codes[..centre.len()];
            match (<&[f32; 8]>::try_from(centre), <&[f32; 8]>::try_from(costs)) {
                (Ok(centre), Ok(costs)) => codes.copy_from_slice(self.nearest_listed(near, centre, costs, levels)),
                _ => {
                    let four = |x: &[f32]| -> [f32; 4] { std::array::from_fn(|k| x[k]) };
                    codes.copy_from_slice(&self.nearest_listed(near, &four(centre), &four(costs), levels)[..4]);
                }
            }
        }
    }

    /// The best vector of the few that the cell of `centre` names.
    #[inline]
    fn nearest_listed<'a, const N: usize>(
        &self,
        near: &'a Near,
        centre: &[f32; N],
        costs: &[f32; N],
        of: &Ladder,
    ) -> &'a [u8; UNIT] {
        let mut digits = [0u32; N];
        for &middle in &of.middles[..self.digits - 1] {
            for k in 0..N {
                digits[k] += u32::from(centre[k] > middle);
            }
        }
        let number = digits.iter().rev().fold(0, |number, &digit| number * self.digits + digit as usize);
        let cell = near.cells[number].get_or_init(|| self.cell(&near.listed, number));
        let (mut least, mut best) = (f32::INFINITY, &cell[0]);
        for vector in cell {
            let mut losses = [0.0f32; N];
            for k in 0..N {
                let e = of.levels[usize::from(vector[k]) % DIGITS] - centre[k];
                losses[k] = costs[k] * e * e;
            }
            let loss = losses.iter().sum();
            if loss < least {
                (least, best) = (loss, vector);
            }
        }
        best
    }

    /// A number's digits, lowest first.
    fn digits_of(&self, number: usize) -> [u8; UNIT] {
        let (mut rest, mut digits) = (number, [0u8; UNIT]);
        for d in &mut digits[..self.len] {
            *d = (rest % self.digits) as u8;
            rest /= self.digits;
        }
        digits
    }

    /// The digits of the listed vectors nearest to a combination of digits, nearest first.
    #[cold]
    fn cell(&self, listed: &[[u8; UNIT]], number: usize) -> [[u8; UNIT]; CHOICE] {
        let own = self.digits_of(number);
        let mut best = [(f32::INFINITY, listed[0]); CHOICE];
        for vector in listed {
            let mut distance = 0.0;
            for (&a, &b) in own[..self.len].iter().zip(vector) {
                distance += (self.plain.levels[usize::from(a)] - self.plain.levels[usize::from(b)]).powi(2);
                if distance >= best[CHOICE - 1].0 {
                    break;
                }
            }
            let at = best.iter().position(|b| distance < b.0);
            if let Some(at) = at {
                best[at..].rotate_right(1);
                best[at] = (distance, *vector);
            }
        }
        best.map(|b| b.1)
    }
}

fn cost(centre: &[f32], costs: &[f32], codes: &[u8], of: &Ladder) -> f32 {
    centre.iter().zip(costs).zip(codes).map(|((&x, &h), &c)| h * (of.levels[usize::from(c)] - x).powi(2)).sum()
}

//! Codebooks: what the i-quants of GGUF allow of the codes of neighbouring weights.
//!
//! A weight of such a type has a code of its own, as in every other type, but the codes of a *vector* of four or eight
//! weights must be one of a few hundred combinations. A code is a digit, which says which of a handful of magnitudes it
//! stands for, and a flag, which is the sign (or in IQ1_M the shift); the table lists the vectors of digits, and flags
//! follow a rule of their own. The weights that the rules tie together are a *unit*.
//!
//! The point nearest to a unit of weights is found by depth-first search over its codes, closest first, cut off as soon
//! as what is already lost exceeds the best point so far (Schnorr and Euchner's sphere decoder, 1994). It is exact under
//! any metric U·D·Uᵀ, and fast because prefixes that no vector continues are cut off too.

mod near;
mod sets;

use super::BlockType;
use near::{Ladder, Near};
use std::sync::OnceLock;

/// Weights of a unit, at most.
pub const UNIT: usize = 8;
/// Levels of a codebook, at most.
const LEVELS: usize = 16;
/// Vectors of a codebook, at most.
const VECTORS: usize = 2048;
/// Steps of a search after which the best point so far is taken: reached only where inputs are almost copies of each
/// other.
const STEPS: u32 = 1 << 14;

/// The rule that flags of a unit follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flags {
    /// There are none.
    None,
    /// Each is free.
    Free,
    /// An even number of them is set.
    Even,
    /// All are alike.
    Alike,
}

impl Flags {
    /// Bits stored for the flags of a unit of `len`.
    #[must_use]
    pub const fn bits(self, len: usize) -> usize {
        match self {
            Flags::None => 0,
            Flags::Free => len,
            Flags::Even => len - 1,
            Flags::Alike => 1,
        }
    }
}

/// The allowed codes of a type.
#[derive(Debug)]
pub struct Codebook {
    /// Weights of a vector.
    pub len: usize,
    /// Weights of a unit: one vector, or two whose flags are tied.
    pub unit: usize,
    /// Digits there are; code = digit + `digits` · flag.
    pub digits: usize,
    /// The rule of the flags.
    pub flags: Flags,
    /// Number of vectors, a power of two.
    pub vectors: usize,
    /// The codes in ascending order of their levels; only the first [`Codebook::codes`] are used.
    ascending: [Code; LEVELS],
    /// Numbers of `len` digits.
    end: usize,
    /// Bit n of part k: whether a vector begins with the k digits of n, lowest first.
    prefixes: [u64; 154],
    /// The vectors in order, their digits as numbers, lowest first.
    numbers: [u16; VECTORS],
    /// The level of each code.
    levels: [f32; LEVELS],
    /// What digits stand for without a flag, and with one where that is no sign.
    plain: Ladder,
    flagged: Ladder,
    /// The vectors nearest to each combination of digits, made when one is first wanted.
    near: OnceLock<Near>,
}

/// What a code stands for.
#[derive(Debug, Clone, Copy)]
struct Code {
    code: u8,
    digit: u8,
    flag: bool,
    level: f32,
}

/// How much errors e of a unit cost: Σ_k d_k·(e_k + Σ_{j<k} e_j·u_jk)².
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// D.
    pub d: [f32; UNIT],
    /// U, unit upper triangular: `u[j][k]` for j < k, the rest ignored.
    pub u: [[f32; UNIT]; UNIT],
}

impl Metric {
    /// Errors that cost `d` each, independently.
    #[must_use]
    pub fn diagonal(costs: &[f32]) -> Self {
        let mut d = [0.0; UNIT];
        d[..costs.len()].copy_from_slice(costs);
        Metric { d, u: [[0.0; UNIT]; UNIT] }
    }

    /// The metric ΔMΔᵀ of a positive definite `m(i, j)` of width `n`.
    #[must_use]
    pub fn of(n: usize, m: impl Fn(usize, usize) -> f32) -> Self {
        let mut rest = [[0.0f64; UNIT]; UNIT];
        for (i, row) in rest.iter_mut().enumerate().take(n) {
            (0..n).for_each(|j| row[j] = f64::from(m(i, j)));
        }
        let mut metric = Metric::diagonal(&[]);
        for k in (0..n).rev() {
            let d = rest[k][k].max(1e-30);
            metric.d[k] = d as f32;
            let column: [f64; UNIT] = std::array::from_fn(|i| rest[i][k] / d);
            for i in 0..k {
                metric.u[i][k] = column[i] as f32;
                (0..k).for_each(|j| rest[i][j] -= column[i] * column[j] * d);
            }
        }
        metric
    }

    /// Solves M·y = g in place.
    pub fn solve(&self, g: &mut [f32]) {
        for j in (0..g.len()).rev() {
            g[j] -= (j + 1..g.len()).map(|k| self.u[j][k] * g[k]).sum::<f32>();
        }
        for k in 0..g.len() {
            g[k] = g[k] / self.d[k] - (0..k).map(|j| self.u[j][k] * g[j]).sum::<f32>();
        }
    }
}

static IQ2_XXS: Codebook = Codebook::new(&sets::IQ2_XXS, 8, 8, &super::IQ2, Flags::Even);
static IQ2_XS: Codebook = Codebook::new(&sets::IQ2_XS, 8, 8, &super::IQ2, Flags::Even);
static IQ2_S: Codebook = Codebook::new(&sets::IQ2_S, 8, 8, &super::IQ2, Flags::Free);
static IQ3_XXS: Codebook = Codebook::new(&sets::IQ3_XXS, 4, 8, &super::IQ3_XXS, Flags::Even);
static IQ3_S: Codebook = Codebook::new(&sets::IQ3_S, 4, 4, &super::IQ3_S, Flags::Free);
static IQ1_S: Codebook = Codebook::new(&sets::IQ1, 8, 8, &super::IQ1_S, Flags::None);
static IQ1_M: Codebook = Codebook::new(&sets::IQ1, 8, 8, &super::IQ1_M, Flags::Alike);

/// The codebook of a type that has one.
pub(super) const fn of(kind: BlockType) -> Option<&'static Codebook> {
    match kind {
        BlockType::Iq2Xxs => Some(&IQ2_XXS),
        BlockType::Iq2Xs => Some(&IQ2_XS),
        BlockType::Iq2S => Some(&IQ2_S),
        BlockType::Iq3Xxs => Some(&IQ3_XXS),
        BlockType::Iq3S => Some(&IQ3_S),
        BlockType::Iq1S => Some(&IQ1_S),
        BlockType::Iq1M => Some(&IQ1_M),
        _ => None,
    }
}

impl Codebook {
    const fn new(set: &[u64], len: usize, unit: usize, levels: &[i8], flags: Flags) -> Self {
        let digits = if matches!(flags, Flags::None) { levels.len() } else { levels.len() / 2 };
        let (mut prefixes, mut numbers, mut vectors) = ([0u64; 154], [0u16; VECTORS], 0);
        let mut n = 0;
        while n < digits.pow(len as u32) {
            if set[n / 64] >> (n % 64) & 1 == 1 {
                numbers[vectors] = n as u16;
                vectors += 1;
                let (mut k, mut power, mut from) = (0, 1, 0);
                while k <= len {
                    let at = from + n % power;
                    prefixes[at / 64] |= 1 << (at % 64);
                    from += power;
                    power *= digits;
                    k += 1;
                }
            }
            n += 1;
        }
        let mut ascending = [Code { code: 0, digit: 0, flag: false, level: 0.0 }; LEVELS];
        let (mut all, mut i) = ([0.0; LEVELS], 0);
        while i < levels.len() {
            all[i] = levels[i] as f32;
            let (digit, flag) = ((i % digits) as u8, i >= digits);
            let code = Code { code: i as u8, digit, flag, level: levels[i] as f32 };
            // Insertion sort.
            let mut at = i;
            while at > 0 && ascending[at - 1].level > code.level {
                ascending[at] = ascending[at - 1];
                at -= 1;
            }
            ascending[at] = code;
            i += 1;
        }
        let (plain, after) = levels.split_at(digits);
        let flagged = Ladder::new(if matches!(flags, Flags::Alike) { after } else { plain });
        let end = digits.pow(len as u32);
        Codebook {
            len,
            unit,
            digits,
            flags,
            vectors,
            ascending,
            end,
            prefixes,
            numbers,
            levels: all,
            plain: Ladder::new(plain),
            flagged,
            near: OnceLock::new(),
        }
    }

    /// Number of codes.
    const fn codes(&self) -> usize {
        if matches!(self.flags, Flags::None) { self.digits } else { 2 * self.digits }
    }

    const fn digit(&self, code: u8) -> usize {
        code as usize % self.digits
    }

    const fn flag(&self, code: u8) -> bool {
        code as usize >= self.digits
    }

    /// Bits of a vector's index.
    #[must_use]
    pub const fn index_bits(&self) -> usize {
        self.vectors.ilog2() as usize
    }

    /// The index of a vector of codes; `None` if the table does not list it.
    #[must_use]
    pub fn index(&self, codes: &[u8]) -> Option<usize> {
        let number = codes.iter().rev().fold(0, |n, &c| n * self.digits + self.digit(c));
        self.numbers[..self.vectors].binary_search(&u16::try_from(number).ok()?).ok()
    }

    /// The stored flags of a unit of codes, lowest first; `None` if they break the rule.
    #[must_use]
    pub fn stored_flags(&self, codes: &[u8]) -> Option<usize> {
        let all = codes.iter().rev().fold(0, |bits, &c| bits << 1 | usize::from(self.flag(c)));
        match self.flags {
            Flags::None | Flags::Free => Some(all),
            Flags::Even => (all.count_ones() % 2 == 0).then_some(all & ((1 << (codes.len() - 1)) - 1)),
            Flags::Alike => [0, (1 << codes.len()) - 1].contains(&all).then_some(all & 1),
        }
    }

    /// Whether the codes of a unit obey all rules.
    #[must_use]
    pub fn holds(&self, unit: &[u8]) -> bool {
        let known = |&c: &u8| usize::from(c) < self.codes();
        unit.len() == self.unit
            && unit.iter().all(known)
            && self.stored_flags(unit).is_some()
            && unit.chunks(self.len).all(|v| self.index(v).is_some())
    }

    /// The codes of vector `index`, below [`Codebook::vectors`], without flags.
    pub fn vector(&self, index: usize, codes: &mut [u8]) {
        let mut rest = usize::from(self.numbers[index]);
        for c in codes {
            *c = (rest % self.digits) as u8;
            rest /= self.digits;
        }
    }

    /// Adds `stored` flags to the codes of a unit.
    pub fn set_flags(&self, stored: usize, codes: &mut [u8]) {
        let last = codes.len() - 1;
        let all = match self.flags {
            Flags::None => 0,
            Flags::Free => stored,
            Flags::Even => stored | (stored.count_ones() as usize % 2) << last,
            Flags::Alike => stored * ((2 << last) - 1),
        };
        for (k, c) in codes.iter_mut().enumerate() {
            *c += if all >> k & 1 == 1 { self.digits as u8 } else { 0 };
        }
    }

    /// Writes the codes of the point nearest to `centre`, in levels, and returns what its error costs under `metric`.
    /// A point that costs `bound` or more is not looked for: then nothing is written, and `None` returned.
    pub fn nearest(&self, centre: &[f32], metric: &Metric, bound: f32, codes: &mut [u8]) -> Option<f32> {
        let walk = Walk::new(self, centre, &metric.d, bound);
        Walk { u: &metric.u, ..walk }.run::<false>(codes)
    }

    fn cost(&self, centre: &[f32], costs: &[f32], codes: &[u8]) -> f32 {
        let levels = |&code: &u8| self.levels[usize::from(code)];
        centre.iter().zip(costs).zip(codes.iter().map(levels)).map(|((x, h), level)| h * (level - x).powi(2)).sum()
    }

    /// As [`Codebook::nearest`] for errors that cost `costs` each, independently, and without a bound. Centres and costs
    /// are finite.
    pub fn nearest_apart(&self, centre: &[f32], costs: &[f32], codes: &mut [u8]) {
        let mut walk = Walk::new(self, centre, costs, f32::INFINITY);
        for k in (0..centre.len()).rev() {
            let ascending = &self.ascending[..self.codes()];
            walk.above[k] = ascending.iter().filter(|c| c.level <= centre[k]).count();
            let at = walk.above[k];
            let up = ascending.get(at).map_or(f32::INFINITY, |c| c.level - centre[k]);
            let down = if at > 0 { centre[k] - ascending[at - 1].level } else { f32::INFINITY };
            let least = up.min(down);
            walk.rest[k] = walk.rest[k + 1] + costs[k] * least * least;
        }
        // A near point bounds the search; it stands where none is nearer.
        self.near(centre, costs, codes);
        walk.best = self.cost(centre, costs, codes);
        walk.run::<true>(codes);
    }
}

/// A search on its way.
struct Walk<'a> {
    book: &'a Codebook,
    centre: &'a [f32],
    d: &'a [f32],
    u: &'a [[f32; UNIT]; UNIT],
    /// A lower bound of what weights from the k-th on cost.
    rest: [f32; UNIT + 1],
    /// How many levels lie below each centre, where errors are independent.
    above: [usize; UNIT],
    errors: [f32; UNIT],
    codes: [u8; UNIT],
    best: f32,
    point: Option<[u8; UNIT]>,
    steps: u32,
}

/// The digits of a vector so far.
#[derive(Clone, Copy)]
struct Prefix {
    number: usize,
    /// Numbers of so many digits.
    power: usize,
    /// Where prefixes of so many digits are listed.
    from: usize,
}

impl Prefix {
    const NONE: Prefix = Prefix { number: 0, power: 1, from: 0 };
}

static ZERO: [[f32; UNIT]; UNIT] = [[0.0; UNIT]; UNIT];

impl<'a> Walk<'a> {
    fn new(book: &'a Codebook, centre: &'a [f32], d: &'a [f32], bound: f32) -> Self {
        Walk {
            book,
            centre,
            d,
            u: &ZERO,
            rest: [0.0; UNIT + 1],
            above: [0; UNIT],
            errors: [0.0; UNIT],
            codes: [0; UNIT],
            best: bound,
            point: None,
            steps: 0,
        }
    }

    /// `APART`: errors are independent.
    fn run<const APART: bool>(mut self, codes: &mut [u8]) -> Option<f32> {
        self.deeper::<APART>(0, Prefix::NONE, false, 0.0);
        codes.copy_from_slice(&self.point?[..self.centre.len()]);
        Some(self.best)
    }

    /// Tries the codes of weight `k`, which follow those chosen at cost `spent`; `odd` says whether an odd number of flags
    /// is set.
    fn deeper<const APART: bool>(&mut self, k: usize, prefix: Prefix, odd: bool, spent: f32) {
        let (book, last) = (self.book, k + 1 == self.centre.len());
        // A vector that ends lets the next begin.
        let prefix = if prefix.power == book.end { Prefix::NONE } else { prefix };
        let next = Prefix { number: 0, power: prefix.power * book.digits, from: prefix.from + prefix.power };
        let ascending = &book.ascending[..book.codes()];
        let (centre, mut above) = if APART {
            (self.centre[k], self.above[k])
        } else {
            let centre = self.centre[k] - (0..k).map(|j| self.errors[j] * self.u[j][k]).sum::<f32>();
            (centre, ascending.iter().filter(|c| c.level <= centre).count())
        };
        let mut below = above;
        loop {
            let up = if above < ascending.len() { ascending[above].level - centre } else { f32::INFINITY };
            let down = if below > 0 { centre - ascending[below - 1].level } else { f32::INFINITY };
            let distance = up.min(down);
            let cost = spent + self.d[k] * distance * distance;
            // Levels further away cost more. Written so that NaN ends the search.
            let promising = cost + self.rest[k + 1] < self.best;
            if !promising || distance == f32::INFINITY || self.steps > STEPS {
                return;
            }
            self.steps += 1;
            let code = if up < down {
                above += 1;
                &ascending[above - 1]
            } else {
                below -= 1;
                &ascending[below]
            };
            let number = prefix.number + prefix.power * usize::from(code.digit);
            let listed = next.from + number;
            if book.prefixes[listed / 64] >> (listed % 64) & 1 == 0 {
                continue;
            }
            let odd = odd ^ code.flag;
            match book.flags {
                Flags::Even if odd && last => continue,
                Flags::Alike if k > 0 && code.flag != book.flag(self.codes[0]) => continue,
                _ => {}
            }
            self.codes[k] = code.code;
            if last {
                // Later levels of this weight are further away.
                (self.best, self.point) = (cost, Some(self.codes));
                return;
            }
            self.errors[k] = code.level - self.centre[k];
            self.deeper::<APART>(k + 1, Prefix { number, ..next }, odd, cost);
        }
    }
}

#[cfg(test)]
mod tests;

//! Blocks of one scale and few levels, one at a time: what runs side by side are sixteen positions of the block itself, whose sums are
//! folded in halves at its end, so that every instruction set computes the same bits.

use super::{BlockForm, BlockType, Even, Fitted, SHIFT, Snap, half, unshifted};
use crate::grids::block::{Step, exponent};

/// Positions side by side.
const WIDE: usize = 16;

type Wide = [f32; WIDE];

/// The two signs.
#[derive(Clone, Copy)]
struct Signs;

impl Snap for Signs {
    #[inline(always)]
    fn level(self, x: f32) -> f32 {
        if x > 0.0 { 1.0 } else { -1.0 }
    }
    #[inline(always)]
    fn level_of(self, w: f32, inverse: f32) -> f32 {
        self.level(w * inverse)
    }
    #[inline(always)]
    fn coded(self, x: f32) -> (f32, u8) {
        (self.level(x), u8::from(x > 0.0))
    }
    #[inline(always)]
    fn coded_of(self, w: f32, inverse: f32) -> (f32, u8) {
        self.coded(w * inverse)
    }
}

/// Twice the values of E2M1: whole numbers up to 4, even ones up to 8, and 12.
#[derive(Clone, Copy)]
struct DoubledE2M1;

impl Snap for DoubledE2M1 {
    #[inline(always)]
    fn level(self, x: f32) -> f32 {
        let size = x.abs();
        let size = if size < 12.0 { size } else { 12.0 };
        let whole = |x: f32| unshifted((x + SHIFT).to_bits() as i32);
        let (ones, twos, fours) = (whole(size), 2.0 * whole(0.5 * size), 4.0 * whole(0.25 * size));
        let level = if size < 4.0 { ones } else { twos };
        (if size < 8.0 { level } else { fours }).copysign(x)
    }
    #[inline(always)]
    fn level_of(self, w: f32, inverse: f32) -> f32 {
        self.level(w * inverse)
    }
    #[inline(always)]
    fn coded(self, x: f32) -> (f32, u8) {
        let level = self.level(x);
        let size = level.abs();
        let code = if size < 4.0 { size } else { 0.5 * size + 2.0 };
        let code = if size < 8.0 { code } else { 0.25 * size + 4.0 };
        let negative = if level < 0.0 { 8.0 } else { 0.0 };
        (level, (code + negative + SHIFT).to_bits() as u8)
    }
    #[inline(always)]
    fn coded_of(self, w: f32, inverse: f32) -> (f32, u8) {
        self.coded(w * inverse)
    }
}

/// How a block gets its real scale.
trait Scaling: Copy {
    fn scale<C: Costs, S: Snap>(self, block: &Block<'_, C>, snap: S) -> f32;
}

/// It has none.
#[derive(Clone, Copy)]
struct Unscaled;

impl Scaling for Unscaled {
    #[inline(always)]
    fn scale<C: Costs, S: Snap>(self, _: &Block<'_, C>, _: S) -> f32 {
        0.0
    }
}

/// The mean magnitude, which is best for signs.
#[derive(Clone, Copy)]
struct MeanSize;

impl Scaling for MeanSize {
    #[inline(always)]
    fn scale<C: Costs, S: Snap>(self, block: &Block<'_, C>, _: S) -> f32 {
        let [sizes, _, costs] = block.size();
        if costs > 0.0 { sizes / costs } else { 0.0 }
    }
}

/// The best from these starts, which are multiples of the weights' root mean square.
#[derive(Clone, Copy)]
struct Search(&'static [f32]);

/// How often the best is refitted.
const REFITS: usize = 2;

impl Scaling for Search {
    #[inline(always)]
    fn scale<C: Costs, S: Snap>(self, block: &Block<'_, C>, snap: S) -> f32 {
        let [_, squares, costs] = block.size();
        let sigma = if costs > 0.0 { (squares / costs).sqrt() } else { 0.0 };
        let mut best = [0.0; 2];
        for start in self.0 {
            let new = block.refitted(start * sigma, snap);
            best = if new[1] > best[1] { new } else { best };
        }
        for _ in 0..REFITS {
            let new = block.refitted(best[0], snap);
            best = if new[1] > best[1] { new } else { best };
        }
        best[0]
    }
}

/// What errors cost.
trait Costs: Copy {
    /// At sixteen positions.
    fn at(self, at: usize) -> Wide;
    /// Those of block `block`, of so many times sixteen weights.
    fn of(self, block: usize, wide: usize) -> Self;
}

/// One everywhere, so that multiplications by costs disappear.
#[derive(Clone, Copy)]
struct One;

impl Costs for One {
    #[inline(always)]
    fn at(self, _: usize) -> Wide {
        [1.0; WIDE]
    }
    #[inline(always)]
    fn of(self, _: usize, _: usize) -> Self {
        One
    }
}

/// One for each weight.
impl Costs for &[Wide] {
    #[inline(always)]
    fn at(self, at: usize) -> Wide {
        self[at]
    }
    #[inline(always)]
    fn of(self, block: usize, wide: usize) -> Self {
        &self[block * wide..][..wide]
    }
}

/// The weights of a block and their costs.
#[derive(Clone, Copy)]
struct Block<'a, C> {
    w: &'a [Wide],
    h: C,
}

#[inline(always)]
fn folded(mut sums: Wide) -> f32 {
    let mut half = WIDE / 2;
    while half > 0 {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
        half /= 2;
    }
    sums[0]
}

/// 1/x, and 0 where there is none.
#[inline(always)]
fn inverse(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0 } else { 1.0 / x }
}

impl<C: Costs> Block<'_, C> {
    /// Σ h·|w|, Σ h·w² and Σ h.
    #[inline(always)]
    fn size(&self) -> [f32; 3] {
        let (mut sizes, mut squares, mut costs) = ([0.0; WIDE], [0.0; WIDE], [0.0; WIDE]);
        for (at, w) in self.w.iter().enumerate() {
            let h = self.h.at(at);
            for i in 0..WIDE {
                let hw = h[i] * w[i];
                sizes[i] += hw.abs();
                squares[i] = hw.mul_add(w[i], squares[i]);
                costs[i] += h[i];
            }
        }
        [folded(sizes), folded(squares), folded(costs)]
    }

    /// The best scale of the levels that `scale` leads to, and what it explains of Σ h·w².
    #[inline(always)]
    fn refitted(&self, scale: f32, snap: impl Snap) -> [f32; 2] {
        let inverse = inverse(scale);
        let (mut xl, mut ll) = ([0.0; WIDE], [0.0; WIDE]);
        for (at, w) in self.w.iter().enumerate() {
            let h = self.h.at(at);
            for i in 0..WIDE {
                let l = snap.level_of(w[i], inverse);
                let hl = h[i] * l;
                xl[i] = hl.mul_add(w[i], xl[i]);
                ll[i] = hl.mul_add(l, ll[i]);
            }
        }
        let (xl, ll) = (folded(xl), folded(ll));
        if ll > 0.0 { [xl / ll, xl / ll * xl] } else { [0.0; 2] }
    }

    /// The best of the exponents around that of the largest weight.
    #[inline(always)]
    fn exponent(&self, snap: impl Snap) -> u8 {
        let mut largest = [0.0f32; WIDE];
        for w in self.w {
            for i in 0..WIDE {
                largest[i] = if w[i].abs() > largest[i] { w[i].abs() } else { largest[i] };
            }
        }
        let largest = largest.iter().fold(0.0f32, |a, &b| if b > a { b } else { a });
        if largest == 0.0 {
            return 0;
        }
        // The least power of two that twelve times is not below the largest weight; stored exponents exceed theirs by 128.
        let bits = (largest / 12.0).to_bits();
        let top = (bits >> 23) as i32 + 1 + i32::from(bits & 0x7f_ffff != 0);
        let mut best = (f32::INFINITY, 0);
        for e in (top - 1..=top + 1).map(|e| e.clamp(0, 254) as u8) {
            let scale = exponent(e);
            let inverse = inverse(scale);
            let mut errors = [0.0; WIDE];
            for (at, w) in self.w.iter().enumerate() {
                let h = self.h.at(at);
                for i in 0..WIDE {
                    let e = (-scale).mul_add(snap.level_of(w[i], inverse), w[i]);
                    errors[i] = (h[i] * e).mul_add(e, errors[i]);
                }
            }
            let error = folded(errors);
            if error < best.0 {
                best = (error, e);
            }
        }
        best.1
    }

    /// Rounds under `scale`; returns Σ h(w − ŵ)² and Σ h·w².
    #[inline(always)]
    fn round(&self, scale: f32, codes: &mut [[u8; WIDE]], snap: impl Snap) -> [f64; 2] {
        let inverse = inverse(scale);
        let (mut errors, mut energies) = ([0.0; WIDE], [0.0; WIDE]);
        for (at, (w, codes)) in self.w.iter().zip(codes).enumerate() {
            let h = self.h.at(at);
            let mut rounded = [0; WIDE];
            for i in 0..WIDE {
                let (l, code) = snap.coded_of(w[i], inverse);
                let e = (-scale).mul_add(l, w[i]);
                rounded[i] = code;
                errors[i] = (h[i] * e).mul_add(e, errors[i]);
                energies[i] = (h[i] * w[i]).mul_add(w[i], energies[i]);
            }
            *codes = rounded;
        }
        [errors, energies].map(|sums| f64::from(folded(sums)))
    }
}

impl BlockForm {
    /// Whether blocks of the type are fitted one at a time, by [`BlockForm::fit_alone`].
    #[must_use]
    #[inline]
    pub const fn alone(&self) -> bool {
        use BlockType::{Mxfp4, Q1_0, Q2_0, Tq1_0, Tq2_0};
        matches!(self.kind, Mxfp4 | Q1_0 | Q2_0 | Tq1_0 | Tq2_0)
    }

    /// Fits whole blocks to the weights `w`, and rounds them. Errors cost `h`, one for each weight, or else one. Returns
    /// Σ h(w − ŵ)² and Σ h·w².
    ///
    /// # Panics
    /// For a type whose blocks are not fitted [alone](BlockForm::alone), or where lengths differ: a caller's bug.
    #[inline(always)]
    pub fn fit_alone(&self, w: &[f32], h: Option<&[f32]>, to: Fitted<'_>) -> [f64; 2] {
        // Levels of Gaussian weights lie best at 1.22 σ, or 1 σ apart; heavier tails want them farther. Two levels above and one below
        // make either sign of the scale another grid.
        const TERNARY: &[f32] = &[1.3];
        const FOUR: &[f32] = &[1.05, -1.05];
        assert!(
            w.len().is_multiple_of(self.len) && h.is_none_or(|h| h.len() == w.len()),
            "whole blocks, a cost for each weight"
        );
        let w = w.as_chunks::<WIDE>().0;
        let levels = Even::new(f32::from(self.levels[0]), f32::from(self.levels[self.levels.len() - 1]));
        match (self.kind, h.map(|h| h.as_chunks::<WIDE>().0)) {
            (BlockType::Mxfp4, None) => self.each(w, One, to, DoubledE2M1, Unscaled),
            (BlockType::Mxfp4, Some(h)) => self.each(w, h, to, DoubledE2M1, Unscaled),
            (BlockType::Q1_0, None) => self.each(w, One, to, Signs, MeanSize),
            (BlockType::Q1_0, Some(h)) => self.each(w, h, to, Signs, MeanSize),
            (BlockType::Tq1_0, None) => self.each(w, One, to, levels, Search(TERNARY)),
            (BlockType::Tq1_0, Some(h)) => self.each(w, h, to, levels, Search(TERNARY)),
            (BlockType::Tq2_0 | BlockType::Q2_0, None) => self.each(w, One, to, levels, Search(FOUR)),
            (BlockType::Tq2_0 | BlockType::Q2_0, Some(h)) => self.each(w, h, to, levels, Search(FOUR)),
            _ => unreachable!("{} has lanes", self.name),
        }
    }

    #[inline(always)]
    fn each(&self, w: &[Wide], h: impl Costs, to: Fitted<'_>, snap: impl Snap, scaling: impl Scaling) -> [f64; 2] {
        let wide = self.len / WIDE;
        assert!(to.holds(self, w.len() / wide), "room for each block");
        let codes = to.codes.as_chunks_mut::<WIDE>().0;
        let mut sums = [0.0; 2];
        for (b, (w, codes)) in w.chunks_exact(wide).zip(codes.chunks_exact_mut(wide)).enumerate() {
            let block = Block { w, h: h.of(b, wide) };
            let stored = if self.step == Step::Exponent {
                to.integers[b] = block.exponent(snap);
                exponent(to.integers[b])
            } else {
                to.reals[b] = half(scaling.scale(&block, snap));
                to.reals[b]
            };
            let [error, energy] = block.round(stored, codes, snap);
            sums = [sums[0] + error, sums[1] + energy];
        }
        sums
    }
}

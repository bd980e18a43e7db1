//! The level nearest to a number, and its code, in arithmetic that becomes a few instructions for all lanes.

use super::super::IQ4;

/// Levels, as arithmetic.
pub(super) trait Levels: Copy {
    /// The level nearest to `x`.
    fn level(self, x: f32) -> f32;
    /// The level nearest to `w · inverse`, the product not rounded before.
    fn level_of(self, w: f32, inverse: f32) -> f32;
}

/// Levels and their codes.
pub(super) trait Snap: Levels {
    /// The level nearest to `x`, and its code.
    fn coded(self, x: f32) -> (f32, u8);
    /// The level nearest to `w · inverse`, and its code.
    fn coded_of(self, w: f32, inverse: f32) -> (f32, u8);
}

/// Neighbouring whole numbers, where what is rounded lies between the first and the last by itself.
#[derive(Clone, Copy)]
pub(super) struct Unlimited;

impl Levels for Unlimited {
    #[inline(always)]
    fn level(self, x: f32) -> f32 {
        x.round_ties_even()
    }
    #[inline(always)]
    fn level_of(self, w: f32, inverse: f32) -> f32 {
        self.level(w * inverse)
    }
}

/// Neighbouring whole numbers.
#[derive(Clone, Copy)]
pub(super) struct Even {
    /// Bits of the first and the last level after [`SHIFT`] is added, which are in the order of the numbers.
    first: i32,
    last: i32,
}

/// Added to what is small, it leaves the nearest whole number in the lowest bits.
const SHIFT: f32 = 12_582_912.0;

impl Even {
    #[inline(always)]
    pub(super) fn new(first: f32, last: f32) -> Self {
        let [first, last] = [first, last].map(|level| (level + SHIFT).to_bits() as i32);
        Even { first, last }
    }

    /// Limits what has been shifted. Integers are compared, which more of a processor's units can do than compare reals.
    #[inline(always)]
    fn limited(self, shifted: f32) -> i32 {
        let bits = shifted.to_bits() as i32;
        let bits = if bits > self.first { bits } else { self.first };
        if bits < self.last { bits } else { self.last }
    }

    #[inline(always)]
    fn coded(self, bits: i32) -> (f32, u8) {
        (unshifted(bits), (bits as u8).wrapping_sub(self.first as u8))
    }
}

#[inline(always)]
fn unshifted(bits: i32) -> f32 {
    f32::from_bits(bits as u32) - SHIFT
}

impl Levels for Even {
    #[inline(always)]
    fn level(self, x: f32) -> f32 {
        unshifted(self.limited(x + SHIFT))
    }
    #[inline(always)]
    fn level_of(self, w: f32, inverse: f32) -> f32 {
        unshifted(self.limited(w.mul_add(inverse, SHIFT)))
    }
}

impl Snap for Even {
    #[inline(always)]
    fn coded(self, x: f32) -> (f32, u8) {
        self.coded(self.limited(x + SHIFT))
    }
    #[inline(always)]
    fn coded_of(self, w: f32, inverse: f32) -> (f32, u8) {
        self.coded(self.limited(w.mul_add(inverse, SHIFT)))
    }
}

/// The levels of IQ4_NL and IQ4_XS.
#[derive(Clone, Copy)]
pub(super) struct Uneven;

impl Levels for Uneven {
    #[inline(always)]
    fn level(self, x: f32) -> f32 {
        let mut level = f32::from(IQ4[0]);
        for i in 1..IQ4.len() {
            let (a, b) = (f32::from(IQ4[i - 1]), f32::from(IQ4[i]));
            level += if x > 0.5 * (a + b) { b - a } else { 0.0 };
        }
        level
    }
    #[inline(always)]
    fn level_of(self, w: f32, inverse: f32) -> f32 {
        self.level(w * inverse)
    }
}

impl Snap for Uneven {
    #[inline(always)]
    fn coded(self, x: f32) -> (f32, u8) {
        let mut code = SHIFT;
        for i in 1..IQ4.len() {
            code += if x > 0.5 * (f32::from(IQ4[i - 1]) + f32::from(IQ4[i])) { 1.0 } else { 0.0 };
        }
        (self.level(x), code.to_bits() as u8)
    }
    #[inline(always)]
    fn coded_of(self, w: f32, inverse: f32) -> (f32, u8) {
        self.coded(w * inverse)
    }
}

/// The two signs.
#[derive(Clone, Copy)]
pub(super) struct Signs;

impl Levels for Signs {
    #[inline(always)]
    fn level(self, x: f32) -> f32 {
        if x > 0.0 { 1.0 } else { -1.0 }
    }
    #[inline(always)]
    fn level_of(self, w: f32, inverse: f32) -> f32 {
        self.level(w * inverse)
    }
}

impl Snap for Signs {
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
pub(super) struct DoubledE2M1;

impl Levels for DoubledE2M1 {
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
}

impl Snap for DoubledE2M1 {
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

//! Block grids: the quantized types of GGUF, as data.
//!
//! A block of consecutive weights of one row is cut into sub-blocks, and every weight of a sub-block takes a value
//! `scale · level(code) + offset`. What a block stores is one or two real numbers and, for super-blocks, small integers:
//!
//! ```text
//! scale  = d                      | d · (integer − bias)      | 2^(integer − 128)
//!                                 | d · (2·integer + 1) / 2^k | E4M3(integer) / 2
//! offset = none | m               | −dmin · integer           | ±scale
//! ```
//!
//! d, dmin and m are half-precision numbers of either sign. Every product of a real and an integer is exact in f32, so
//! the value of a code is one rounding at most, and the same in every program that follows the format.
//!
//! In the types with a [`Codebook`] neighbouring weights may not take any combination of codes, but only one that is listed.

mod codebook;
mod fit;
mod lanes;

pub use lanes::{Fitted, LANES, Sides, Turned, turn};

pub use codebook::{Codebook, Flags, Metric, UNIT};

use super::float::{FloatType, exponent_value};
use super::int::round_small;
use serde::{Deserialize, Serialize};

/// The quantized types of GGUF.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "each is described by its form")]
pub enum BlockType {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Iq4Nl,
    Iq4Xs,
    Mxfp4,
    Tq1_0,
    Tq2_0,
    Iq2Xxs,
    Iq2Xs,
    Iq2S,
    Iq3Xxs,
    Iq3S,
    Iq1S,
    Iq1M,
    Nvfp4,
    Q1_0,
    Q2_0,
}

/// Where the scale of a sub-block comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The block's d.
    Real,
    /// d times an integer of the sub-block.
    Scaled {
        /// Width of the stored integer.
        bits: u32,
        /// What the stored integer exceeds its value by; zero where it has no sign.
        bias: u8,
    },
    /// d times (2·integer + 1) / 2^halvings, which is never zero.
    Odd {
        /// Width of the stored integer.
        bits: u32,
        /// How often the odd number is halved.
        halvings: u32,
    },
    /// 2^(e − 128), with e a stored byte below 255.
    Exponent,
    /// Half of an unsigned E4M3 number, a stored byte below 128.
    Float,
}

/// What is added to the values of a sub-block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shift {
    /// Nothing.
    None,
    /// The block's m.
    Real,
    /// −dmin times an unsigned integer of the sub-block.
    Scaled {
        /// Width of the stored integer.
        bits: u32,
    },
    /// The scale or its negative, as a bit of the sub-block says.
    Sign,
}

/// How a block type stores numbers.
#[derive(Debug)]
pub struct BlockForm {
    /// The type.
    pub kind: BlockType,
    /// Its name, as users write it.
    pub name: &'static str,
    /// One line of help.
    pub summary: &'static str,
    /// Weights of a block.
    pub len: usize,
    /// Bytes of a block.
    pub bytes: usize,
    /// Weights that share a scale.
    pub sub: usize,
    /// The level each code stands for.
    pub levels: &'static [i8],
    /// The scale of a sub-block.
    pub step: Step,
    /// The offset of a sub-block.
    pub shift: Shift,
}

/// Sub-blocks of a block, at most.
const SUBS: usize = 16;

/// What one block stores besides its codes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BlockParams {
    /// d, then dmin or m; the form says how many count.
    pub reals: [f32; 2],
    /// The integers as stored: those of the scales, then those of the offsets.
    pub integers: [u8; 2 * SUBS],
}

/// Scale and offset of one sub-block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Affine {
    /// Distance between neighbouring levels; may be negative or zero.
    pub scale: f32,
    /// The value of level 0.
    pub offset: f32,
}

const fn span<const N: usize>(lowest: i16) -> [i8; N] {
    let mut levels = [0i8; N];
    let mut i = 0;
    while i < N {
        levels[i] = (lowest + i as i16) as i8;
        i += 1;
    }
    levels
}

/// The non-uniform levels of IQ4_NL and IQ4_XS.
const IQ4: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// Twice the values of E2M1; codes from 8 on are negative.
const E2M1: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Magnitudes of the codebooks, then their negatives.
const IQ2: [i8; 6] = [8, 25, 43, -8, -25, -43];
const IQ3_XXS: [i8; 16] = [4, 12, 20, 28, 36, 44, 52, 62, -4, -12, -20, -28, -36, -44, -52, -62];
const IQ3_S: [i8; 16] = [1, 3, 5, 7, 9, 11, 13, 15, -1, -3, -5, -7, -9, -11, -13, -15];
/// −1, 0 and 1 in eighths; an offset of an eighth up or down belongs to the sub-block.
const IQ1_S: [i8; 3] = [-8, 0, 8];
/// The same, an eighth up and an eighth down.
const IQ1_M: [i8; 6] = [-7, 1, 9, -9, -1, 7];

const SIGNS: [i8; 2] = [-1, 1];

const NO_SCALE: Step = Step::Real;
const fn odd(bits: u32, halvings: u32) -> Step {
    Step::Odd { bits, halvings }
}
const SIX: Step = Step::Scaled { bits: 6, bias: 0 };

macro_rules! forms {
    ($($kind:ident $name:literal $len:literal $bytes:literal $sub:literal $levels:expr, $step:expr, $shift:expr, $summary:literal;)*) => {
        /// Every block type, in the order of [`BlockType`].
        pub static BLOCKS: &[BlockForm] = &[$(BlockForm {
            kind: BlockType::$kind, name: $name, summary: $summary, len: $len, bytes: $bytes, sub: $sub,
            levels: &$levels, step: $step, shift: $shift,
        }),*];
    };
}

forms! {
    Q4_0 "q4_0" 32 18 32 span::<16>(-8), NO_SCALE, Shift::None, "GGUF, 4 bits in blocks of 32, 4.5 bits per weight";
    Q4_1 "q4_1" 32 20 32 span::<16>(0), NO_SCALE, Shift::Real, "GGUF, 4 bits and a minimum in blocks of 32, 5 bits per weight";
    Q5_0 "q5_0" 32 22 32 span::<32>(-16), NO_SCALE, Shift::None, "GGUF, 5 bits in blocks of 32, 5.5 bits per weight";
    Q5_1 "q5_1" 32 24 32 span::<32>(0), NO_SCALE, Shift::Real, "GGUF, 5 bits and a minimum in blocks of 32, 6 bits per weight";
    Q8_0 "q8_0" 32 34 32 span::<256>(-128), NO_SCALE, Shift::None, "GGUF, 8 bits in blocks of 32, 8.5 bits per weight";
    Q2K "q2_k" 256 84 16 span::<4>(0), Step::Scaled { bits: 4, bias: 0 }, Shift::Scaled { bits: 4 }, "GGUF, 2-bit super-blocks, 2.625 bits per weight";
    Q3K "q3_k" 256 110 16 span::<8>(-4), Step::Scaled { bits: 6, bias: 32 }, Shift::None, "GGUF, 3-bit super-blocks, 3.4375 bits per weight";
    Q4K "q4_k" 256 144 32 span::<16>(0), SIX, Shift::Scaled { bits: 6 }, "GGUF, 4-bit super-blocks, 4.5 bits per weight";
    Q5K "q5_k" 256 176 32 span::<32>(0), SIX, Shift::Scaled { bits: 6 }, "GGUF, 5-bit super-blocks, 5.5 bits per weight";
    Q6K "q6_k" 256 210 16 span::<64>(-32), Step::Scaled { bits: 8, bias: 128 }, Shift::None, "GGUF, 6-bit super-blocks, 6.5625 bits per weight";
    Iq4Nl "iq4_nl" 32 18 32 IQ4, NO_SCALE, Shift::None, "GGUF, 16 uneven levels in blocks of 32, 4.5 bits per weight";
    Iq4Xs "iq4_xs" 256 136 32 IQ4, Step::Scaled { bits: 6, bias: 32 }, Shift::None, "GGUF, 16 uneven levels in super-blocks, 4.25 bits per weight";
    Mxfp4 "mxfp4" 32 17 32 E2M1, Step::Exponent, Shift::None, "GGUF, 4-bit floats with a power of two per 32, 4.25 bits per weight";
    Tq1_0 "tq1_0" 256 54 256 span::<3>(-1), NO_SCALE, Shift::None, "GGUF, ternary, 1.6875 bits per weight";
    Tq2_0 "tq2_0" 256 66 256 span::<4>(-1), NO_SCALE, Shift::None, "GGUF, ternary in 2 bits, 2.0625 bits per weight";
    Iq2Xxs "iq2_xxs" 256 66 32 IQ2, odd(4, 3), Shift::None, "GGUF, a codebook of 256 times signs for 8 weights, 2.0625 bits per weight";
    Iq2Xs "iq2_xs" 256 74 16 IQ2, odd(4, 3), Shift::None, "GGUF, a codebook of 512 times signs for 8 weights, 2.3125 bits per weight";
    Iq2S "iq2_s" 256 82 16 IQ2, odd(4, 3), Shift::None, "GGUF, a codebook of 1024 times signs for 8 weights, 2.5625 bits per weight";
    Iq3Xxs "iq3_xxs" 256 98 32 IQ3_XXS, odd(4, 2), Shift::None, "GGUF, a codebook of 256 times signs for 4 weights, 3.0625 bits per weight";
    Iq3S "iq3_s" 256 110 32 IQ3_S, odd(4, 0), Shift::None, "GGUF, a codebook of 512 times signs for 4 weights, 3.4375 bits per weight";
    Iq1S "iq1_s" 256 50 32 IQ1_S, odd(3, 3), Shift::Sign, "GGUF, a codebook of 2048 for 8 ternary weights, 1.5625 bits per weight";
    Iq1M "iq1_m" 256 56 16 IQ1_M, odd(3, 3), Shift::None, "GGUF, the same with a shift for each 8, 1.75 bits per weight";
    Nvfp4 "nvfp4" 64 36 16 E2M1, Step::Float, Shift::None, "GGUF, 4-bit floats with an 8-bit float per 16, 4.5 bits per weight";
    Q1_0 "q1_0" 128 18 128 SIGNS, NO_SCALE, Shift::None, "GGUF, signs in blocks of 128, 1.125 bits per weight";
    Q2_0 "q2_0" 64 18 64 span::<4>(-1), NO_SCALE, Shift::None, "GGUF, 2 bits in blocks of 64, 2.25 bits per weight";
}

impl BlockType {
    /// How the type stores numbers.
    #[must_use]
    pub fn form(self) -> &'static BlockForm {
        &BLOCKS[self as usize]
    }
}

impl BlockForm {
    /// Sub-blocks of a block.
    #[must_use]
    pub const fn subs(&self) -> usize {
        self.len / self.sub
    }

    /// Real numbers a block stores.
    #[must_use]
    pub const fn reals(&self) -> usize {
        let d = !matches!(self.step, Step::Exponent | Step::Float) as usize;
        d + matches!(self.shift, Shift::Real | Shift::Scaled { .. }) as usize
    }

    /// Integers a block stores for its scales.
    #[must_use]
    pub const fn scale_integers(&self) -> usize {
        if matches!(self.step, Step::Real) { 0 } else { self.subs() }
    }

    /// Integers a block stores.
    #[must_use]
    pub const fn integers(&self) -> usize {
        self.scale_integers() + if matches!(self.shift, Shift::Scaled { .. } | Shift::Sign) { self.subs() } else { 0 }
    }

    /// The largest stored integer number `i`.
    #[must_use]
    pub const fn max_integer(&self, i: usize) -> u8 {
        let bits = match (self.step, self.shift) {
            (Step::Exponent, _) => return 254,
            (Step::Float, _) => return 127,
            (Step::Scaled { bits, .. } | Step::Odd { bits, .. }, _) if i < self.subs() => bits,
            (_, Shift::Scaled { bits }) => bits,
            (_, Shift::Sign) => 1,
            _ => 0,
        };
        ((1u32 << bits) - 1) as u8
    }

    /// Bits per weight, everything included.
    #[must_use]
    pub const fn bits_per_weight(&self) -> f64 {
        (self.bytes * 8) as f64 / self.len as f64
    }

    /// Scale and offset of sub-block `sub`.
    #[must_use]
    #[inline]
    pub fn affine(&self, p: &BlockParams, sub: usize) -> Affine {
        let integer = |i: usize| p.integers[i];
        let scale = match self.step {
            Step::Real => p.reals[0],
            Step::Scaled { .. } | Step::Odd { .. } => p.reals[0] * self.multiple(integer(sub)),
            Step::Exponent => exponent(integer(sub)),
            Step::Float => float8(integer(sub)),
        };
        let offset = match self.shift {
            Shift::None => 0.0,
            Shift::Real => p.reals[1],
            Shift::Scaled { .. } => -(p.reals[1] * f32::from(integer(self.scale_integers() + sub))),
            Shift::Sign if integer(self.scale_integers() + sub) == 0 => scale,
            Shift::Sign => -scale,
        };
        Affine { scale, offset }
    }

    /// What d is multiplied by where a sub-block stores `integer` for its scale.
    #[must_use]
    #[inline]
    pub fn multiple(&self, integer: u8) -> f32 {
        match self.step {
            Step::Scaled { bias, .. } => f32::from(integer) - f32::from(bias),
            Step::Odd { halvings, .. } => (2.0 * f32::from(integer) + 1.0) / (1u32 << halvings) as f32,
            Step::Real | Step::Exponent | Step::Float => 1.0,
        }
    }

    /// The stored integer, before it is limited to what can be stored, whose multiple is nearest to `multiple`.
    #[must_use]
    pub fn integer_near(&self, multiple: f32) -> i32 {
        let multiple = multiple.clamp(-256.0, 256.0);
        match self.step {
            Step::Scaled { bias, .. } => multiple.round() as i32 + i32::from(bias),
            Step::Odd { halvings, .. } => ((multiple * (1u32 << halvings) as f32 - 1.0) / 2.0).round() as i32,
            Step::Real | Step::Exponent | Step::Float => 0,
        }
    }

    /// What combinations of codes there are, if not all.
    #[must_use]
    #[inline]
    pub const fn codebook(&self) -> Option<&'static Codebook> {
        codebook::of(self.kind)
    }

    /// Weights whose codes are chosen together; divides a sub-block.
    #[must_use]
    #[inline]
    pub const fn unit(&self) -> usize {
        match self.codebook() {
            Some(book) => book.unit,
            None => 1,
        }
    }

    /// The codes nearest to `w`, whole units of one sub-block, where errors cost `h` each.
    pub fn round(&self, w: &[f32], h: &[f32], a: Affine, codes: &mut [u8]) {
        let Some(book) = self.codebook() else {
            w.iter().zip(codes).for_each(|(&x, c)| *c = self.nearest(x, a));
            return;
        };
        for ((w, h), codes) in w.chunks(book.unit).zip(h.chunks(book.unit)).zip(codes.chunks_mut(book.unit)) {
            book.nearest_apart(&self.in_levels(w, a)[..w.len()], h, codes);
        }
    }

    /// The codes of the unit nearest to `w` under `metric`. None that costs `bound` or more is looked for: then nothing
    /// is written, and `false` returned.
    pub fn round_unit(&self, w: &[f32], metric: &Metric, a: Affine, bound: f32, codes: &mut [u8]) -> bool {
        let Some(book) = self.codebook() else {
            codes[0] = self.nearest(w[0], a);
            return (w[0] - self.value(codes[0], a)).powi(2) * metric.d[0] < bound;
        };
        let levels = self.in_levels(w, a);
        let bound = if a.scale == 0.0 { f32::INFINITY } else { bound / (a.scale * a.scale) };
        book.nearest(&levels[..w.len()], metric, bound, codes).is_some()
    }

    /// A unit of weights in levels; all zero where levels have no width.
    fn in_levels(&self, w: &[f32], a: Affine) -> [f32; UNIT] {
        let mut levels = [0.0; UNIT];
        if a.scale != 0.0 {
            levels.iter_mut().zip(w).for_each(|(l, &x)| *l = (x - a.offset) / a.scale);
        }
        levels
    }

    /// The value of `code` in a sub-block.
    #[must_use]
    #[inline]
    pub fn value(&self, code: u8, a: Affine) -> f32 {
        let scaled = a.scale * f32::from(self.levels[usize::from(code)]);
        if matches!(self.shift, Shift::None) { scaled } else { scaled + a.offset }
    }

    /// The code whose value is nearest to `x`, in a type without codebook. In a sub-block of scale zero all codes have one value, and the one of
    /// level 0 stands for it.
    #[must_use]
    #[inline]
    pub fn nearest(&self, x: f32, a: Affine) -> u8 {
        if a.scale == 0.0 {
            return self.zero_code();
        }
        let level = (x - a.offset) / a.scale;
        if self.is_uniform() {
            let (first, last) = (f32::from(self.levels[0]), f32::from(self.levels[self.levels.len() - 1]));
            (round_small(level.clamp(first, last)) - first) as u8
        } else {
            self.nearest_level(level)
        }
    }

    /// Whether the levels are neighbouring integers.
    #[must_use]
    #[inline]
    pub const fn is_uniform(&self) -> bool {
        let uneven = matches!(self.kind, BlockType::Iq4Nl | BlockType::Iq4Xs | BlockType::Mxfp4 | BlockType::Nvfp4);
        !uneven && !matches!(self.kind, BlockType::Q1_0) && self.codebook().is_none()
    }

    fn zero_code(&self) -> u8 {
        self.nearest_level(0.0)
    }

    fn nearest_level(&self, level: f32) -> u8 {
        let mut best = (f32::INFINITY, 0u8);
        for (code, &l) in self.levels.iter().enumerate() {
            let distance = (level - f32::from(l)).abs();
            if distance < best.0 {
                best = (distance, code as u8);
            }
        }
        best.1
    }
}

impl BlockParams {
    /// Nothing stored: every weight is zero.
    #[must_use]
    pub const fn zero() -> Self {
        BlockParams { reals: [0.0; 2], integers: [0; 2 * SUBS] }
    }
}

/// 2^(e − 128), subnormal for the two smallest.
fn exponent(e: u8) -> f32 {
    exponent_value(e) / 2.0
}

/// Half of an unsigned E4M3 number, whose last code would be NaN and stands for zero.
fn float8(byte: u8) -> f32 {
    FloatType::E4m3.value(byte & 0x7f) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_table_is_in_order_and_adds_up() {
        for (i, form) in BLOCKS.iter().enumerate() {
            assert_eq!(form.kind as usize, i, "{}", form.name);
            assert_eq!(serde_json_name(form.kind), form.name);
            assert!(form.len.is_multiple_of(form.sub) && form.subs() <= SUBS);
            let code_bits = match (form.kind, form.codebook()) {
                (BlockType::Tq1_0, _) => 0,
                (_, None) => form.levels.len().ilog2() as usize * form.len,
                (_, Some(b)) => form.len / b.len * b.index_bits() + form.len / b.unit * b.flags.bits(b.unit),
            };
            let integers: u32 = (0..form.integers()).map(|i| 32 - u32::from(form.max_integer(i)).leading_zeros()).sum();
            let bits = code_bits + 16 * form.reals() + integers as usize;
            // Ternary digits are packed five to a byte.
            let ternary = if form.kind == BlockType::Tq1_0 { 52 * 8 } else { 0 };
            // The sign bit of an unsigned float is never set.
            let unused = if form.step == Step::Float { form.subs() } else { 0 };
            assert_eq!(bits + ternary + unused, form.bytes * 8, "{}", form.name);
        }
    }

    /// The name serde gives a kind, without a JSON library: through the `Debug` of its deserializer's error is not
    /// needed, since names are lower-case words that differ from the variants by one underscore at most.
    fn serde_json_name(kind: BlockType) -> String {
        use serde::de::value::{Error, StrDeserializer};
        use serde::de::{Deserialize, IntoDeserializer};
        let form = kind.form();
        let d: StrDeserializer<'_, Error> = form.name.into_deserializer();
        assert_eq!(BlockType::deserialize(d).unwrap(), kind);
        form.name.to_owned()
    }

    #[test]
    fn exponents_are_powers_of_two() {
        for e in 0..=254u8 {
            assert_eq!(f64::from(exponent(e)), 2f64.powi(i32::from(e) - 128));
        }
    }

    proptest! {
        #[test]
        fn nearest_is_nearest(kind in 0..BLOCKS.len(), x in -3.0f32..3.0, scale in -0.5f32..0.5, offset in -1.0f32..1.0) {
            let form = &BLOCKS[kind];
            prop_assume!(form.codebook().is_none());
            let offset = if form.shift == Shift::None { 0.0 } else { offset };
            let a = Affine { scale, offset };
            let e = (x - form.value(form.nearest(x, a), a)).abs();
            for code in 0..form.levels.len() {
                prop_assert!(e <= (x - form.value(code as u8, a)).abs() * (1.0 + 1e-5) + 1e-6);
            }
        }
    }
}

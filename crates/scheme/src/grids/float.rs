//! Float grids: values `scale · f`, where f is a number of 4 or 8 bits with an exponent of its own.
//!
//! | type | sign, exponent, mantissa | values |
//! | --- | --- | --- |
//! | E4M3 | 1, 4, 3 | ±0 to ±448, the last code of either sign is NaN |
//! | E2M1 | 1, 2, 1 | ±0, 0.5, 1, 1.5, 2, 3, 4, 6 |
//! | NF4 | – | sixteen from −1 to 1, closer to each other about 0 |
//! | FP4 | – | ±0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1, in no order |
//!
//! Codes are the bit patterns themselves, which grow with the magnitude; those of NF4 (Dettmers et al. 2023), whose numbers
//! split a normal distribution into parts of equal weight, are places in its table, and so are those of bitsandbytes' FP4. What a scale may be is [`ScaleType`]'s matter:
//! FP8 has 16 or 32 bits for it, the MX types of the Open Compute Project a power of two, NVFP4 an E4M3 number over a
//! divisor that the whole matrix shares.

use super::int::round_small;
use super::{Fit, Grid, GroupParams};
use crate::ScaleType;
use serde::{Deserialize, Serialize};

/// The number type of a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FloatType {
    /// 8 bits: OCP's E4M3 without infinities ("fn").
    E4m3,
    /// 4 bits.
    E2m1,
    /// 4 bits, places in a table of normal quantiles.
    Nf4,
    /// 4 bits, places in the other table of bitsandbytes.
    Fp4,
}

/// The arithmetic of `GridKind::Float`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FloatGrid {
    /// The type of a code.
    pub float: FloatType,
    /// Number type the scale is rounded to.
    pub scale: ScaleType,
    /// What stored scales are divided by; 1 but under [`ScaleType::E4m3`].
    pub divisor: f32,
}

/// Every value of E4M3, by code. The two that are NaN stand as zeros, which no valid matrix holds.
static E4M3: [f32; 256] = values(FloatType::E4m3);
/// Every value of E2M1, by code.
static E2M1: [f32; 16] = values(FloatType::E2m1);

/// Every value of NF4, by code.
static NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Every value of FP4, by code.
static FP4: [f32; 16] = [
    0.0,
    0.005_208_333_5,
    0.666_666_7,
    1.0,
    0.333_333_34,
    0.5,
    0.166_666_67,
    0.25,
    0.0,
    -0.005_208_333_5,
    -0.666_666_7,
    -1.0,
    -0.333_333_34,
    -0.5,
    -0.166_666_67,
    -0.25,
];
/// Its codes by their values. There are two zeros, of which the library takes the second for what lies above them.
static FP4_ORDER: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];

const fn values<const N: usize>(float: FloatType) -> [f32; N] {
    let mut all = [0.0; N];
    let mut code = 0;
    while code < N {
        let magnitude = code as u32 & (N as u32 / 2 - 1);
        if magnitude <= float.largest() as u32 {
            let (m, shift) = (float.mantissa(), 23 - float.mantissa());
            let normal = f32::from_bits((magnitude << shift) + ((127 - float.bias()) << 23));
            // Without the implicit one: so many steps of the least normal number's own.
            let step = f32::from_bits((128 - float.bias() - m) << 23);
            let value = if magnitude >> m == 0 { magnitude as f32 * step } else { normal };
            all[code] = if code < N / 2 { value } else { -value };
        }
        code += 1;
    }
    all
}

impl FloatType {
    /// Width of a code in bits.
    #[must_use]
    pub const fn bits(self) -> u32 {
        match self {
            FloatType::E4m3 => 8,
            FloatType::E2m1 | FloatType::Nf4 | FloatType::Fp4 => 4,
        }
    }

    /// Bits of the mantissa; none in a table.
    const fn mantissa(self) -> u32 {
        match self {
            FloatType::E4m3 => 3,
            FloatType::E2m1 => 1,
            FloatType::Nf4 | FloatType::Fp4 => 0,
        }
    }

    const fn bias(self) -> u32 {
        match self {
            FloatType::E4m3 => 7,
            FloatType::E2m1 => 1,
            FloatType::Nf4 | FloatType::Fp4 => 0,
        }
    }

    /// The code of the largest number.
    const fn largest(self) -> u8 {
        match self {
            FloatType::E4m3 => 0x7e,
            FloatType::E2m1 => 7,
            FloatType::Nf4 => 15,
            FloatType::Fp4 => 3,
        }
    }

    /// The largest number.
    #[must_use]
    pub const fn max(self) -> f32 {
        match self {
            FloatType::E4m3 => 448.0,
            FloatType::E2m1 => 6.0,
            FloatType::Nf4 | FloatType::Fp4 => 1.0,
        }
    }

    /// Whether `code` stands for a number.
    #[must_use]
    pub const fn is_number(self, code: u8) -> bool {
        match self {
            FloatType::E4m3 => code & 0x7f <= self.largest(),
            FloatType::E2m1 | FloatType::Nf4 | FloatType::Fp4 => code < 16,
        }
    }

    /// The number that `code` stands for.
    #[must_use]
    #[inline]
    pub fn value(self, code: u8) -> f32 {
        match self {
            FloatType::E4m3 => E4M3[usize::from(code)],
            FloatType::E2m1 => E2M1[usize::from(code & 15)],
            FloatType::Nf4 => NF4[usize::from(code & 15)],
            FloatType::Fp4 => FP4[usize::from(code & 15)],
        }
    }

    /// The code nearest to `x`, ties to even codes (in a table, as bitsandbytes has it, to the lower), what lies beyond the largest number to that. Zeros keep their sign.
    #[must_use]
    #[inline]
    pub fn nearest(self, x: f32) -> u8 {
        match self {
            FloatType::Nf4 => return NF4.windows(2).map(|pair| u8::from(x > (pair[0] + pair[1]) / 2.0)).sum(),
            FloatType::Fp4 => {
                let middle = |pair: &[u8]| (FP4[usize::from(pair[0])] + FP4[usize::from(pair[1])]) / 2.0;
                return FP4_ORDER[FP4_ORDER.windows(2).filter(|pair| x > middle(pair)).count()];
            }
            FloatType::E4m3 | FloatType::E2m1 => {}
        }
        let (m, bias) = (self.mantissa(), self.bias());
        // NaN, of which nothing here is made, becomes the largest number.
        let a = x.abs().min(self.max());
        let code = if a < f32::from_bits((128 - bias) << 23) {
            // As many steps as fit; one too many is the least normal number, whose code follows.
            round_small(a * f32::from_bits((126 + bias + m) << 23)) as u32
        } else {
            let shift = 23 - m;
            let bits = a.to_bits();
            let rounded = bits + (1 << (shift - 1)) - 1 + (bits >> shift & 1);
            (rounded >> shift) - ((127 - bias) << m)
        };
        code as u8 | u8::from(x.is_sign_negative()) << (self.bits() - 1)
    }
}

/// 2^(byte − 127), the value of an E8M0 scale; NaN for the last byte.
#[must_use]
pub const fn exponent_value(byte: u8) -> f32 {
    match byte {
        0 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        _ => f32::from_bits((byte as u32) << 23),
    }
}

/// The E8M0 byte of a power of two, or of the one nearest to `scale`, whose sign does not count.
#[must_use]
pub const fn exponent_byte(scale: f32) -> u8 {
    let bits = scale.to_bits() & 0x7fff_ffff;
    if bits < 0x0060_0000 {
        // The least power is subnormal, without a leading one.
        return 0;
    }
    // Half a step of the exponent is the mantissa 1.5.
    let rounded = bits + 0x0040_0000;
    let byte = (rounded >> 23) as u8;
    if byte == 255 { 254 } else { byte }
}

/// How far the search goes from the scale that covers the range: a factor of 2^(up/8) to 2^(−down/8).
const UP: i32 = 5;
const DOWN: i32 = 8;
/// Between them, the factors of a scale that may be any number lie this many times closer.
const FINER: i32 = 4;
/// The exponent of the "mse" search, as of integer grids.
const MSE_NORM: f32 = 2.4;

impl Grid for FloatGrid {
    fn fit(&self, w: &[f32], fit: Fit<'_>) -> GroupParams {
        let cover = self.cover(w.iter().fold(0.0f32, |a, &x| a.max(x.abs())));
        match fit {
            Fit::MinMax => self.params(cover),
            Fit::Mse => self.search(cover, |s| {
                let p = self.params(s);
                (w.iter().map(|&x| (x - self.value(self.nearest(x, p), p)).abs().powf(MSE_NORM)).sum(), s)
            }),
            Fit::Weighted(h) => self.search(cover, |s| self.moments(w, h, s)),
            Fit::Squares => {
                let alike = vec![1.0; w.len()];
                self.search(cover, |s| self.moments(w, &alike, s))
            }
        }
    }

    #[inline]
    fn nearest(&self, x: f32, p: GroupParams) -> u8 {
        self.float.nearest(x / p.scale)
    }

    #[inline]
    fn value(&self, code: u8, p: GroupParams) -> f32 {
        self.float.value(code) * p.scale
    }
}

impl FloatGrid {
    /// The divisor of a matrix (or of several that loaders hold as one) whose largest magnitude is `amax`: the largest
    /// power of two under which every scale that covers its group is an E4M3 number. Powers of two keep all products exact,
    /// and their reciprocals, which other formats store, too.
    #[must_use]
    pub fn divisor_for(float: FloatType, amax: f32) -> f32 {
        let most = FloatType::E4m3.max() * float.max() / amax;
        // The exponent alone; of no weights at all, or of absurd ones, what stays a normal number.
        f32::from_bits(most.clamp(2.0f32.powi(-100), 2.0f32.powi(100)).to_bits() & 0x7f80_0000)
    }

    /// The stored scale under which the largest number is `amax`, by the rules of compressed-tensors.
    fn cover(&self, amax: f32) -> f32 {
        match self.scale {
            _ if amax == 0.0 => 1.0,
            // An amax whose mantissa is 1.75 or more counts as the next power of two, and what exceeds the largest number
            // under the scale is clamped.
            ScaleType::E8m0 => {
                let rounded = f32::from_bits(amax.to_bits() + 0x0020_0000);
                exponent_value(((rounded.to_bits() >> 23) as u8).saturating_sub(self.float.max().log2() as u8))
            }
            ScaleType::E4m3 => self.scale.round(amax / self.float.max() * self.divisor),
            _ => self.scale.round(amax / self.float.max()),
        }
    }

    fn params(&self, stored: f32) -> GroupParams {
        GroupParams { scale: stored / self.divisor, zero: 0 }
    }

    /// The stored scale of least `loss` about `cover`; `loss` returns a refitted scale, too. Ties keep the earlier one.
    fn search(&self, cover: f32, loss: impl Fn(f32) -> (f32, f32)) -> GroupParams {
        let mut best = (f32::INFINITY, cover);
        let mut consider = |s: f32| {
            let (l, refit) = loss(s);
            if l < best.0 {
                best = (l, s);
            }
            refit
        };
        let mut add = |s: f32| {
            let refit = consider(s);
            if refit != s {
                consider(refit);
            }
        };
        add(cover);
        match self.scale {
            ScaleType::E8m0 => {
                let byte = exponent_byte(cover);
                (byte.saturating_sub(2)..=(byte + 1).min(254)).for_each(|b| add(exponent_value(b)));
            }
            ScaleType::E4m3 => {
                // Neighbouring codes of three mantissa bits lie a factor of about 2^(1/8) apart.
                let code = i32::from(FloatType::E4m3.nearest(cover));
                let codes = (code - DOWN).max(1)..=(code + UP).min(i32::from(FloatType::E4m3.largest()));
                codes.for_each(|c| add(FloatType::E4m3.value(c as u8)));
            }
            _ => {
                let factor = |i: i32| (i as f32 / (8 * FINER) as f32).exp2();
                (-DOWN * FINER..=UP * FINER).for_each(|i| add(self.scale.round(cover * factor(i))));
            }
        }
        self.params(best.1)
    }

    /// Σ h(w − ŵ)² under the stored scale `s`, and the scale that least squares finds for its codes.
    fn moments(&self, w: &[f32], h: &[f32], s: f32) -> (f32, f32) {
        let p = self.params(s);
        let (mut loss, mut hwf, mut hff) = (0.0f32, 0.0f32, 0.0f32);
        for (&x, &h) in w.iter().zip(h) {
            let f = self.float.value(self.nearest(x, p));
            loss += h * (x - f * p.scale).powi(2);
            hwf += h * x * f;
            hff += h * f * f;
        }
        let refit = if hff > 0.0 && hwf > 0.0 { self.scale.round(hwf / hff * self.divisor) } else { s };
        (loss, refit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::miri::FEW;
    use proptest::prelude::*;

    const TYPES: [FloatType; 4] = [FloatType::E4m3, FloatType::E2m1, FloatType::Nf4, FloatType::Fp4];

    fn grid(float: FloatType, scale: ScaleType) -> FloatGrid {
        FloatGrid { float, scale, divisor: 1.0 }
    }

    #[test]
    fn values_follow_the_definition_of_the_types() {
        assert_eq!(E2M1[..8], [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]);
        for code in 0..=255u8 {
            let (e, m) = (i32::from(code >> 3 & 15), f64::from(code & 7));
            let magnitude = if e == 0 { m / 8.0 * 2f64.powi(-6) } else { (1.0 + m / 8.0) * 2f64.powi(e - 7) };
            let sign = if code < 128 { 1.0 } else { -1.0 };
            assert_eq!(FloatType::E4m3.is_number(code), code & 127 != 127);
            if FloatType::E4m3.is_number(code) {
                assert_eq!(f64::from(E4M3[usize::from(code)]), sign * magnitude);
            }
        }
        for float in TYPES {
            assert_eq!(float.value(float.largest()), float.max());
            for code in (0..=255u8).filter(|&c| float.is_number(c)) {
                // Of FP4's two zeros one is met.
                let own = if float == FloatType::Fp4 && code == 8 { 0 } else { code };
                assert_eq!(float.nearest(float.value(code)), own, "{float:?}");
            }
        }
        for byte in 0..255u8 {
            assert_eq!(f64::from(exponent_value(byte)), 2f64.powi(i32::from(byte) - 127));
            assert_eq!(exponent_byte(exponent_value(byte)), byte);
        }
    }

    #[test]
    fn golden_vectors_of_4_bit_floats() {
        let codes = [0.0, 0.5, -1.0, 1.5, 2.0, -3.0, 4.0, -6.0].map(|x| FloatType::E2m1.nearest(x));
        assert_eq!(codes, [0, 1, 10, 3, 4, 13, 6, 15]);
        let ties = [0.25f32, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0].map(|x| E2M1[usize::from(FloatType::E2m1.nearest(x))]);
        assert_eq!(ties, [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]);
        assert_eq!(FloatType::E2m1.nearest(-0.1), 8);
        // Halfway between 0 and the number above it lies 0.03979, and all of it belongs to 0.
        let table = [-2.0f32, -1.0, -0.0455, 0.0397, 0.039_790_15, 0.0398, 0.86, 0.87, 9.0];
        assert_eq!(table.map(|x| FloatType::Nf4.nearest(x)), [0, 0, 7, 7, 7, 8, 14, 15, 15]);
        // What bitsandbytes makes of numbers about zero and of ties, which go to the lower.
        let table = [-2.0f32, -1.0, -0.416_666_7, -0.085_937_5, -0.0026, -1e-9, 0.0, 1e-9, 0.0025, 0.0027];
        assert_eq!(table.map(|x| FloatType::Fp4.nearest(x)), [11, 11, 13, 14, 0, 0, 0, 8, 8, 1]);
        assert_eq!([0.085_937_5, 0.208_333_34, 0.833_333_4].map(|x| FloatType::Fp4.nearest(x)), [1, 6, 2]);
    }

    #[test]
    fn golden_vectors_of_scales() {
        let byte = |float, amax| exponent_byte(grid(float, ScaleType::E8m0).fit(&[amax], Fit::MinMax).scale);
        let fp4 = [6.0, 6.9, 7.0, 1.0, 1.74, 1.75, 0.1, 448.0].map(|a| byte(FloatType::E2m1, a));
        assert_eq!(fp4, [127, 127, 128, 125, 125, 126, 121, 134]);
        assert_eq!(byte(FloatType::E4m3, 448.0), 128);
        // compressed-tensors' own divisor for a largest magnitude of 3, and ours below it.
        let nvfp4 = FloatGrid { divisor: 896.0, ..grid(FloatType::E2m1, ScaleType::E4m3) };
        assert_eq!(nvfp4.fit(&[1.5, -0.2], Fit::MinMax).scale, 0.25);
        assert_eq!(FloatType::E4m3.nearest(nvfp4.cover(1.5)), 0x76);
        assert_eq!(FloatGrid::divisor_for(FloatType::E2m1, 3.0), 512.0);
        assert!([0.0, 1e-38, 3e38].iter().all(|&a| FloatGrid::divisor_for(FloatType::E2m1, a).is_normal()));
        assert_eq!(grid(FloatType::E4m3, ScaleType::F32).fit(&[-896.0], Fit::MinMax).scale, 2.0);
    }

    #[test]
    fn zeros_stay_zero() {
        for float in TYPES {
            for scale in [ScaleType::F16, ScaleType::F32, ScaleType::E8m0, ScaleType::E4m3] {
                for fit in [Fit::MinMax, Fit::Mse, Fit::Weighted(&[1.0; 4]), Fit::Squares] {
                    let g = FloatGrid { divisor: 1024.0, ..grid(float, scale) };
                    let p = g.fit(&[0.0; 4], fit);
                    assert_eq!(g.value(g.nearest(0.0, p), p), 0.0);
                    assert!(p.scale.is_finite() && p.scale > 0.0);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn nearest_is_nearest(x in -8.0f32..8.0, scale in 0.001f32..2.0) {
            for float in TYPES {
                let (g, p) = (grid(float, ScaleType::F32), GroupParams { scale, zero: 0 });
                let e = (x - g.value(g.nearest(x, p), p)).abs();
                for code in (0..=255u8).filter(|&c| float.is_number(c)) {
                    prop_assert!(e <= (x - g.value(code, p)).abs() * (1.0 + 1e-5) + 1e-6);
                }
            }
        }

        #[test]
        fn searches_never_lose_to_the_range(w in prop::collection::vec(-2.0f32..2.0, 1..if FEW { 4 } else { 48 })) {
            let h: Vec<f32> = (0..w.len()).map(|i| 1.0 + (i % 5) as f32).collect();
            for float in TYPES {
                for scale in [ScaleType::Bf16, ScaleType::F32, ScaleType::E8m0, ScaleType::E4m3] {
                    let divisor = if scale == ScaleType::E4m3 { 256.0 } else { 1.0 };
                    let g = FloatGrid { divisor, ..grid(float, scale) };
                    let error = |p, n: f32| -> f32 {
                        let one = |(&x, &h): (&f32, &f32)| (x - g.value(g.nearest(x, p), p)).abs().powf(n) * if n == 2.0 { h } else { 1.0 };
                        w.iter().zip(&h).map(one).sum()
                    };
                    let base = g.fit(&w, Fit::MinMax);
                    prop_assert!(error(g.fit(&w, Fit::Mse), MSE_NORM) <= error(base, MSE_NORM) * 1.0001);
                    prop_assert!(error(g.fit(&w, Fit::Weighted(&h)), 2.0) <= error(base, 2.0) * 1.0001);
                    prop_assert_eq!(scale.round(base.scale * divisor), base.scale * divisor);
                }
            }
        }
    }
}

//! Binary numbers of BiLLM (Huang et al. 2024): a mean, and a magnitude to either side of it.
//!
//! Of the weights of a row that share parameters, those of salient columns are binarized twice, the second time what the
//! first left over. The others are split by magnitude into a concentrated and a sparse part, each binarized once with
//! numbers of its own. So a code is one of eight values:
//!
//! | code | bit 0 | bit 1 | value |
//! | --- | --- | --- | --- |
//! | 0..4 | plus | sparse | mean ± magnitude of its part |
//! | 4..8 | plus, first | plus, second | mean ± first ± second |
//!
//! A column is salient for all rows or for none, so that one bit a column tells codes below 4 from the others, and two bits
//! a weight the rest. What is advertised as 1.1 bits counts signs alone: which part a weight belongs to takes a bit as well,
//! and seven half-precision numbers for 128 weights most of another.

use crate::ScaleType;

/// The bit of a code that says that its column is salient.
pub(crate) const SALIENT: u8 = 4;

/// Numbers that are a mean or lie a magnitude above or below it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Binary {
    /// μ, the middle of the two values.
    pub mean: f32,
    /// α, the distance of either from it.
    pub magnitude: f32,
}

impl Binary {
    /// The parameters of least Σ(w − ŵ)² with signs as [`Binary::plus`] has them: μ the mean and α = mean|w − μ|, which
    /// is the closed form for a fixed μ (XNOR-Net). Zeros for no weights at all.
    #[must_use]
    pub fn fit(w: impl ExactSizeIterator<Item = f32> + Clone) -> Self {
        let n = w.len().max(1) as f64;
        let mean = w.clone().map(f64::from).sum::<f64>() / n;
        let magnitude = w.map(|x| (f64::from(x) - mean).abs()).sum::<f64>() / n;
        Binary { mean: mean as f32, magnitude: magnitude as f32 }
    }

    /// Whether `x` becomes the larger value, which is the nearer one.
    #[must_use]
    pub fn plus(self, x: f32) -> bool {
        x >= self.mean
    }

    /// The larger or the smaller value.
    #[must_use]
    pub fn value(self, plus: bool) -> f32 {
        signed(self.mean, self.magnitude, plus)
    }

    /// The same in half precision.
    #[must_use]
    pub fn rounded(self) -> Self {
        Binary { mean: ScaleType::F16.round(self.mean), magnitude: ScaleType::F16.round(self.magnitude) }
    }
}

/// Numbers that are binarized, and then what that left over: ŵ = μ₁ ± α₁ + μ₂ ± α₂.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Residual {
    /// μ₁ and α₁.
    pub first: Binary,
    /// μ₂ and α₂, of w − μ₁ ∓ α₁.
    pub second: Binary,
}

impl Residual {
    /// Fits one after the other.
    #[must_use]
    pub fn fit(w: impl ExactSizeIterator<Item = f32> + Clone) -> Self {
        let first = Binary::fit(w.clone());
        let second = Binary::fit(w.map(|x| x - first.value(first.plus(x))));
        Residual { first, second }
    }

    /// Which value of either `x` becomes.
    #[must_use]
    pub fn plus(&self, x: f32) -> [bool; 2] {
        let first = self.first.plus(x);
        [first, self.second.plus(x - self.first.value(first))]
    }

    /// Its value.
    #[must_use]
    pub fn value(&self, [first, second]: [bool; 2]) -> f32 {
        self.first.value(first) + self.second.value(second)
    }
}

/// What a row stores for a group.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct BinaryParams {
    /// Of weights below the threshold of magnitudes.
    pub concentrated: Binary,
    /// Of those at or above it.
    pub sparse: Binary,
    /// Of salient columns: μ₁ + μ₂ and α₁.
    pub salient: Binary,
    /// α₂ of salient columns.
    pub second: f32,
}

impl BinaryParams {
    /// Numbers stored.
    pub const REALS: usize = 7;

    /// The parameters as they are stored.
    #[must_use]
    pub fn reals(&self) -> [f32; Self::REALS] {
        let BinaryParams { concentrated: c, sparse: s, salient, second } = *self;
        [c.mean, c.magnitude, s.mean, s.magnitude, salient.mean, salient.magnitude, second]
    }

    /// The same read back.
    #[must_use]
    pub fn from_reals(reals: [f32; Self::REALS]) -> Self {
        let pair = |i: usize| Binary { mean: reals[i], magnitude: reals[i + 1] };
        BinaryParams { concentrated: pair(0), sparse: pair(2), salient: pair(4), second: reals[6] }
    }

    /// What is stored of the parts, in half precision.
    #[must_use]
    pub fn new(concentrated: Binary, sparse: Binary, salient: Residual) -> Self {
        let Residual { first, second } = salient;
        BinaryParams {
            concentrated: concentrated.rounded(),
            sparse: sparse.rounded(),
            salient: Binary { mean: first.mean + second.mean, magnitude: first.magnitude }.rounded(),
            second: ScaleType::F16.round(second.magnitude),
        }
    }

    /// The code of a weight in a plain column.
    #[must_use]
    pub fn plain_code(&self, x: f32, sparse: bool) -> u8 {
        let part = if sparse { self.sparse } else { self.concentrated };
        u8::from(part.plus(x)) | u8::from(sparse) << 1
    }

    /// The code of a weight in a salient column: of the nearest of its four values.
    #[must_use]
    pub fn salient_code(&self, x: f32) -> u8 {
        let away = |code: &u8| (self.value(*code) - x).abs();
        let nearer = |a: u8, b: u8| if away(&b) < away(&a) { b } else { a };
        (SALIENT + 1..2 * SALIENT).fold(SALIENT, nearer)
    }

    /// The value of `code`, of which bits beyond the third are ignored.
    #[must_use]
    pub fn value(&self, code: u8) -> f32 {
        let (low, high) = (code & 1 != 0, code & 2 != 0);
        match (code & SALIENT != 0, high) {
            (true, _) => signed(self.salient.value(low), self.second, high),
            (false, true) => self.sparse.value(low),
            (false, false) => self.concentrated.value(low),
        }
    }
}

fn signed(mean: f32, magnitude: f32, plus: bool) -> f32 {
    if plus { mean + magnitude } else { mean - magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn error(w: &[f32], value: impl Fn(f32) -> f32) -> f64 {
        w.iter().map(|&x| (f64::from(x) - f64::from(value(x))).powi(2)).sum()
    }

    /// Least Σ(w − μ − α·s)² over all signs s and α ≥ 0, for the given μ: of fixed signs the best α is mean(s·(w − μ)).
    fn by_enumeration(w: &[f32], mean: f64) -> f64 {
        let n = w.len();
        let of = |signs: u32| {
            let side = |i: usize| if signs >> i & 1 == 1 { 1.0 } else { -1.0 };
            let dot: f64 = w.iter().enumerate().map(|(i, &x)| side(i) * (f64::from(x) - mean)).sum();
            let alpha = (dot / n as f64).max(0.0);
            w.iter().enumerate().map(|(i, &x)| (f64::from(x) - mean - alpha * side(i)).powi(2)).sum::<f64>()
        };
        (0..1u32 << n).map(of).fold(f64::INFINITY, f64::min)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Oracle 15.
        #[test]
        fn mean_magnitude_and_signs_are_the_global_minimum(w in prop::collection::vec(-3.0f32..3.0, 1..=12)) {
            let fit = Binary::fit(w.iter().copied());
            let own = error(&w, |x| fit.value(fit.plus(x)));
            let best = by_enumeration(&w, f64::from(fit.mean));
            prop_assert!(own <= best + 1e-5 * (1.0 + best), "{own} against {best}");
        }

        /// Oracle 15.
        #[test]
        fn a_second_order_is_never_worse_than_the_first(w in prop::collection::vec(-3.0f32..3.0, 1..200)) {
            let (one, two) = (Binary::fit(w.iter().copied()), Residual::fit(w.iter().copied()));
            let first = error(&w, |x| one.value(one.plus(x)));
            let second = error(&w, |x| two.value(two.plus(x)));
            prop_assert!(second <= first * (1.0 + 1e-6) + 1e-9, "{second} against {first}");
        }

        #[test]
        fn codes_stand_for_what_was_fitted(w in prop::collection::vec(-3.0f32..3.0, 2..100)) {
            let (one, two) = (Binary::fit(w.iter().copied()), Residual::fit(w.iter().copied()));
            let p = BinaryParams::new(one, Binary::default(), two);
            prop_assert_eq!(BinaryParams::from_reals(p.reals()), p);
            for &x in &w {
                // Off by the rounding of parameters, unless that moved the weight to the other side of a middle.
                let plain = p.value(p.plain_code(x, false));
                prop_assert!((plain - one.value(one.plus(x))).abs() < 4e-3 || (x - one.mean).abs() < 2e-3);
                // The nearest of four values is no further than the one that the two steps lead to.
                let salient = p.value(p.salient_code(x));
                prop_assert!((salient - x).abs() <= (two.value(two.plus(x)) - x).abs() + 1e-2);
            }
        }
    }

    #[test]
    fn parts_without_weights_are_zeros() {
        let p = BinaryParams::new(Binary::fit([].into_iter()), Binary::default(), Residual::fit([].into_iter()));
        assert_eq!(p.reals(), [0.0; BinaryParams::REALS]);
        assert!((0..8).all(|code| p.value(code) == 0.0));
    }

    #[test]
    fn a_normal_sample_reaches_the_constants_of_one_and_two_bits() {
        // Table 0.2 of the methods: one bit leaves 0.36338 of the variance; two, one after the other, not quite the 0.11885
        // of the best four evenly spaced levels.
        let n = 20_000;
        // The normal quantile by bisection on the integral of the density would be exact; a sum of sines is not needed:
        // Box-Muller on a lattice is even enough.
        let w: Vec<f32> = (0..n)
            .map(|i| {
                let (u, v) = ((i as f64 + 0.5) / n as f64, (i as f64 * 0.618_033_988_749_895).fract());
                ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
            })
            .collect();
        let (one, two) = (Binary::fit(w.iter().copied()), Residual::fit(w.iter().copied()));
        let first = error(&w, |x| one.value(one.plus(x))) / n as f64;
        let second = error(&w, |x| two.value(two.plus(x))) / n as f64;
        assert!((first - 0.36338).abs() < 0.005, "{first}");
        assert!((0.117..0.14).contains(&second), "{second}");
    }
}

//! Functions of rows that rest on the exponential: soft-max, the divergence of two of them, and SiLU gates.
//!
//! Every level gives the same bits: an entry is computed alike wherever it lies, and sums run in a fixed number of lanes.

use crate::Level;
use crate::level::at_level;

/// Independent accumulators of a row's reduction: enough for any vector width, and one fixed order.
pub(super) const LANES: usize = 16;
/// As many as hide the latency of what an entry is added to.
const WIDE: usize = 4 * LANES;

/// Soft-max of `scale · row`, in place.
pub fn softmax(level: Level, row: &mut [f32], scale: f32) {
    at_level!(level, softmax_row, (row: &mut [f32], scale: f32));
}

/// `2^(scale · v − shift)` for every `v` of a row, in place, each of which is added to the sixteenth of `sums` that it is in the order
/// of. What would be below 2^−125 is that, and what would be above 2^127 is anything.
pub(super) fn powers(level: Level, row: &mut [f32], (scale, shift): (f32, f32), sums: &mut [f32; LANES]) {
    let by = (scale, shift);
    at_level!(level, powers_of, (row: &mut [f32], by: (f32, f32), sums: &mut [f32; LANES]));
}

/// The largest entry of a row; negative infinity where there is none.
#[must_use]
pub fn largest(level: Level, row: &[f32]) -> f32 {
    at_level!(level, largest_of, (row: &[f32]) -> f32)
}

/// `gate ← silu(gate) · up`.
///
/// # Panics
/// When the lengths differ: a caller's bug.
pub fn silu_mul(level: Level, gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "a gate for every entry");
    at_level!(level, silu_mul_row, (gate: &mut [f32], up: &[f32]));
}

/// KL(softmax p ‖ softmax q) in nats, of two rows of logits. `q` becomes softmax q − softmax p, the divergence's gradient
/// at q. Sums run in f32 over fixed lanes: the divergence is good to about 1e-6.
///
/// # Panics
/// When the lengths differ: a caller's bug.
pub fn softmax_divergence(level: Level, q: &mut [f32], p: &[f32]) -> f64 {
    assert_eq!(q.len(), p.len(), "logits of one vocabulary");
    at_level!(level, divergence_row, (q: &mut [f32], p: &[f32]) -> f64)
}

#[inline(always)]
fn softmax_row(row: &mut [f32], scale: f32) {
    let scale = scale * std::f32::consts::LOG2_E;
    let mut sums = [0.0; LANES];
    powers_of(row, (scale, scale * largest_of(row)), &mut sums);
    let inverse = 1.0 / folded(sums, |a, b| a + b);
    for v in row.iter_mut() {
        *v *= inverse;
    }
}

#[inline(always)]
fn powers_of(row: &mut [f32], (scale, shift): (f32, f32), sums: &mut [f32; LANES]) {
    let power = |v: f32| power(at_least(f32::mul_add(scale, v, -shift), LEAST));
    let (whole, rest) = row.as_chunks_mut::<LANES>();
    for chunk in whole {
        for i in 0..LANES {
            chunk[i] = power(chunk[i]);
            sums[i] += chunk[i];
        }
    }
    // Apart: these are looked up one by one, which keeps sums out of registers.
    for (sum, v) in sums.iter_mut().zip(rest) {
        *v = power(*v);
        *sum += *v;
    }
}

/// All lanes in one number, in halves.
#[inline(always)]
pub(super) fn folded(lanes: [f32; LANES], with: impl Fn(f32, f32) -> f32) -> f32 {
    let (mut eight, mut four) = ([0.0f32; 8], [0.0f32; 4]);
    for i in 0..8 {
        eight[i] = with(lanes[i], lanes[8 + i]);
    }
    for i in 0..4 {
        four[i] = with(eight[i], eight[4 + i]);
    }
    with(with(four[0], four[2]), with(four[1], four[3]))
}

#[inline(always)]
fn silu_mul_row(gate: &mut [f32], up: &[f32]) {
    for (g, &u) in gate.iter_mut().zip(up) {
        let exponent = at_least(*g * -std::f32::consts::LOG2_E, LEAST);
        let exponent = if exponent > MOST { MOST } else { exponent };
        *g = *g * u * inverse(1.0 + power(exponent));
    }
}

#[inline(always)]
fn divergence_row(q: &mut [f32], p: &[f32]) -> f64 {
    let (top_q, top_p) = (largest_of(q), largest_of(p));
    // Σ e^q, Σ e^p and Σ e^p (p − q), exponents relative to the largest.
    let (mut sum_q, mut sum_p, mut cross) = ([0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES]);
    for (q, p) in q.chunks(LANES).zip(p.chunks(LANES)) {
        for (i, (&q, &p)) in q.iter().zip(p).enumerate() {
            let (to_q, to_p) = (q - top_q, p - top_p);
            let (eq, ep) = (exp_fused(to_q), exp_fused(to_p));
            sum_q[i] += eq;
            sum_p[i] += ep;
            cross[i] += ep * (to_p - to_q);
        }
    }
    let [sum_q, sum_p, cross] = [sum_q, sum_p, cross].map(|lanes| lanes.iter().map(|&v| f64::from(v)).sum::<f64>());
    let (inverse_q, inverse_p) = ((1.0 / sum_q) as f32, (1.0 / sum_p) as f32);
    for (q, &p) in q.iter_mut().zip(p) {
        *q = exp_fused(*q - top_q) * inverse_q - exp_fused(p - top_p) * inverse_p;
    }
    cross / sum_p - (sum_p / sum_q).ln()
}

#[inline(always)]
fn largest_of(row: &[f32]) -> f32 {
    let (mut wide, mut lanes, mut last) =
        ([f32::NEG_INFINITY; WIDE], [f32::NEG_INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    let (whole, rest) = row.as_chunks::<WIDE>();
    for chunk in whole {
        for i in 0..WIDE {
            wide[i] = if chunk[i] > wide[i] { chunk[i] } else { wide[i] };
        }
    }
    let (whole, rest) = rest.as_chunks::<LANES>();
    for chunk in whole {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    for (lane, &v) in last.iter_mut().zip(rest) {
        *lane = if v > *lane { v } else { *lane };
    }
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    for i in 0..LANES {
        let wide = larger(larger(wide[i], wide[LANES + i]), larger(wide[2 * LANES + i], wide[3 * LANES + i]));
        lanes[i] = larger(wide, larger(lanes[i], last[i]));
    }
    folded(lanes, larger)
}

/// The exponents of 2 that are told apart here: what is left out is nothing beside 1, and so is one over it.
pub(super) const LEAST: f32 = -125.0;
pub(super) const MOST: f32 = 125.0;

/// `x`, or `least` where that is more; NaN stays NaN.
#[inline(always)]
fn at_least(x: f32, least: f32) -> f32 {
    if x < least { least } else { x }
}

/// What has a number rounded to an integer that is added to it and taken away again.
pub(super) const TO_INTEGER: f32 = 12_582_912.0;
/// The polynomial of least relative error for 2^r, |r| ≤ 1/2, among those that begin as the series does; its last factor first.
pub(super) const SERIES: [f32; 6] =
    [1.330_060_7e-3, 9.669_691e-3, 5.550_558_5e-2, 2.402_228_3e-1, std::f32::consts::LN_2, 1.0];

/// `2^x` to a relative error of 2e-7, for `x` from −125 to 127; anything for others. Two thirds of the instructions of [`exp`]:
/// exponents are whole numbers as they are.
#[inline(always)]
fn power(x: f32) -> f32 {
    let shifted = x + TO_INTEGER;
    let r = x - (shifted - TO_INTEGER);
    let mut series = SERIES[0];
    for factor in &SERIES[1..] {
        series = f32::mul_add(series, r, *factor);
    }
    f32::from_bits(series.to_bits().wrapping_add(shifted.to_bits() << 23))
}

/// What a number's bits are taken from for those of about its inverse, and Newton's steps from there.
pub(super) const INVERSE: u32 = 0x7ef3_11c7;
pub(super) const STEPS: usize = 3;

/// `1 / x` to a relative error of 2e-7, for `x` from 1 to 2¹²⁵: Newton's steps from what the exponent tells, which a loop takes half
/// the time for of what it would divide in.
#[inline(always)]
fn inverse(x: f32) -> f32 {
    let mut inverse = f32::from_bits(INVERSE.wrapping_sub(x.to_bits()));
    for _ in 0..STEPS {
        inverse = f32::mul_add(inverse, f32::mul_add(-x, inverse, 1.0), inverse);
    }
    inverse
}

/// `e^x` within two units in the last place, written without branches so that loops over it become vector code. Below
/// −87 it stays at `e^−87` (1.6e-38) instead of underflowing; NaN stays NaN.
#[inline(always)]
#[must_use]
pub fn exp(x: f32) -> f32 {
    exp_with(x, |a, b, c| a * b + c)
}

/// The same in fewer instructions where products are added in one, as all vector levels do; elsewhere that takes longer.
#[inline(always)]
fn exp_fused(x: f32) -> f32 {
    exp_with(x, f32::mul_add)
}

#[inline(always)]
fn exp_with(x: f32, product_plus: impl Fn(f32, f32, f32) -> f32) -> f32 {
    // ln 2 in two parts, the first short enough that its product with an exponent is exact.
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = x.clamp(-87.0, 88.0);
    let shifted = product_plus(x, std::f32::consts::LOG2_E, TO_INTEGER);
    let n = shifted - TO_INTEGER;
    let r = product_plus(n, -LN2_LOW, product_plus(n, -LN2_HIGH, x));
    // The Taylor series: |r| ≤ ln(2)/2 leaves a remainder under 2^-27.
    let mut series = 1.0 / 5040.0;
    for factor in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5] {
        series = product_plus(series, r, factor);
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    (product_plus(series * r, r, r) + 1.0) * power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst = 0.0f64;
        for i in -870_000..=880_000 {
            let x = i as f32 * 1e-4;
            let truth = f64::from(x).exp();
            let unit = f64::from(f32::EPSILON) * 2f64.powi(truth.log2().floor() as i32);
            let worse = |found: f32| (f64::from(found) - truth).abs() / unit;
            worst = worst.max(worse(exp(x))).max(worse(exp_fused(x)));
        }
        assert!(worst <= 2.0, "{worst}");
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(f32::NEG_INFINITY) < 1.7e-38 && exp(f32::INFINITY).is_finite());
    }

    #[test]
    fn powers_and_inverses_are_good_to_their_errors() {
        let worst = |x: &mut dyn Iterator<Item = (f32, f64)>| {
            x.map(|(a, b)| (f64::from(a) / b - 1.0).abs()).fold(0.0, f64::max)
        };
        let exponents = (-125_000..=127_000).map(|i| i as f32 * 1e-3);
        assert!(worst(&mut exponents.map(|x| (power(x), f64::from(x).exp2()))) < 2e-7);
        let numbers = (0..=125_000).map(|i| (f64::from(i) * 1e-3).exp2() as f32);
        assert!(worst(&mut numbers.map(|x| (inverse(x), 1.0 / f64::from(x)))) < 2e-7);
        assert_eq!((power(0.0), power(3.0)), (1.0, 8.0));
        let gates = [-1e30, -200.0, -20.0, -1.5, 0.0, 3.0, 200.0, 1e30f32];
        let (mut gate, up) = (gates, [2.0f32; 8]);
        let expected = gates.map(|g| 2.0 * f64::from(g) / (1.0 + (-f64::from(g)).exp()));
        silu_mul(Level::best(), &mut gate, &up);
        for ((found, expected), g) in gate.into_iter().zip(expected).zip(gates) {
            let size = f64::from(g.abs());
            let bound = (4e-7 + 1e-7 * size) * expected.abs() + 2e-37 * size;
            assert!((f64::from(found) - expected).abs() <= bound, "{g}: {found} {expected}");
        }
        let mut odd = [f32::NAN, f32::INFINITY, 1.0];
        silu_mul(Level::best(), &mut odd, &[1.0; 3]);
        assert!(odd[0].is_nan() && odd[1] == f32::INFINITY);
        let mut odd = [f32::NAN, 1.0];
        softmax(Level::best(), &mut odd, 1.0);
        assert!(odd[0].is_nan());
    }

    #[test]
    fn softmax_equals_its_definition() {
        for len in [1, 2, 15, 16, 17, 33, 500] {
            let row: Vec<f32> = (0..len).map(|i| ((i * 7919) % 1013) as f32 * 0.02 - 10.0).collect();
            let sum: f64 = row.iter().map(|&v| (0.7 * f64::from(v)).exp()).sum();
            let mut got = row.clone();
            softmax(Level::best(), &mut got, 0.7);
            for (got, v) in got.iter().zip(row) {
                let expected = (0.7 * f64::from(v)).exp() / sum;
                assert!((f64::from(*got) - expected).abs() <= 2e-6 * expected, "{len}: {got} {expected}");
            }
        }
    }

    #[test]
    fn a_divergence_of_logits_and_its_gradient_equal_their_definition() {
        for n in [1usize, 5, 16, 100, 1003] {
            let value = |i: usize, k: f64| (4.0 * (i as f64 * k).sin()) as f32;
            let (mut q, p): (Vec<f32>, Vec<f32>) = (0..n).map(|i| (value(i, 1.7), value(i, 2.3) + 30.0)).unzip();
            let soft = |row: &[f32]| -> Vec<f64> {
                let sum: f64 = row.iter().map(|&v| f64::from(v).exp()).sum();
                row.iter().map(|&v| f64::from(v).exp() / sum).collect()
            };
            let (sq, sp) = (soft(&q), soft(&p));
            let expected: f64 = sp.iter().zip(&sq).map(|(p, q)| p * (p / q).ln()).sum();
            let found = softmax_divergence(Level::best(), &mut q, &p);
            assert!((found - expected).abs() < 2e-6 * expected.max(1.0), "{n}: {found} {expected}");
            for (slope, (q, p)) in q.iter().zip(sq.iter().zip(&sp)) {
                assert!((f64::from(*slope) - (q - p)).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn every_level_gives_the_bits_of_the_definition() {
        for n in [1, 15, 16, 33, 200] {
            let row = |by: f32| (0..n).map(|i| (i as f32 * by).sin() * 9.0).collect::<Vec<f32>>();
            let run = |level| {
                let (mut soft, mut gate, mut q) = (row(0.7), row(0.3), row(0.9));
                softmax(level, &mut soft, 0.7);
                silu_mul(level, &mut gate, &row(0.5));
                let kl = softmax_divergence(level, &mut q, &row(0.8));
                (soft, gate, q, kl)
            };
            let found = run(Level::Scalar);
            assert!(Level::all().into_iter().all(|level| run(level) == found), "{n}");
        }
    }
}

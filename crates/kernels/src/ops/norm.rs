//! Norms of rows.

use super::softmax::{LANES as SIXTEEN, folded};
use crate::Level;
use crate::level::at_level;

/// Independent accumulators of a row's sum of squares: enough for any vector width to hide an addition's latency, and one
/// fixed order.
const LANES: usize = 64;

/// Every row of `x` as `x / √(mean x² + eps) · weight`, in `out`; rows are as long as `weight`. Every level gives the same bits.
///
/// # Panics
/// When there are no whole rows, or not as many: a caller's bug.
pub fn rms_norm(level: Level, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert!(!weight.is_empty() && x.len().is_multiple_of(weight.len()) && out.len() == x.len(), "whole rows");
    at_level!(level, norm_rows, (x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]));
}

#[inline(always)]
fn norm_rows(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    for (row, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let inverse = 1.0 / (square(row) / width as f32 + eps).sqrt();
        for ((out, v), w) in out.iter_mut().zip(row).zip(weight) {
            *out = *v * inverse * w;
        }
    }
}

/// Σ v² of a row.
#[inline(always)]
fn square(row: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (whole, rest) = row.as_chunks::<LANES>();
    for chunk in whole {
        for i in 0..LANES {
            lanes[i] += chunk[i] * chunk[i];
        }
    }
    for (lane, v) in lanes.iter_mut().zip(rest) {
        *lane += v * v;
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[half + i];
        }
        half /= 2;
    }
    lanes[0]
}

/// The largest Euclidean norm of the rows, which are `width` long; NaN where one is. Every level gives the same bits.
///
/// # Panics
/// When there are no whole rows: a caller's bug.
#[must_use]
pub fn largest_norm(level: Level, rows: &[f32], width: usize) -> f32 {
    assert!(width > 0 && rows.len().is_multiple_of(width), "whole rows");
    at_level!(level, largest_norm_of, (rows: &[f32], width: usize) -> f32)
}

#[inline(always)]
fn largest_norm_of(rows: &[f32], width: usize) -> f32 {
    let mut most = 0.0f32;
    for row in rows.chunks_exact(width) {
        let mut lanes = [0.0f32; SIXTEEN];
        let (whole, rest) = row.as_chunks::<SIXTEEN>();
        for chunk in whole {
            for i in 0..SIXTEEN {
                lanes[i] += chunk[i] * chunk[i];
            }
        }
        for (lane, v) in lanes.iter_mut().zip(rest) {
            *lane += v * v;
        }
        let square = folded(lanes, |a, b| a + b);
        // A NaN is not less, and stays.
        most = if square < most || most.is_nan() { most } else { square };
    }
    most.sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_gives_the_definition_and_the_same_bits() {
        for (rows, width) in [(3, 1), (2, 63), (5, 64), (4, 200), (1, 1000)] {
            let x: Vec<f32> = (0..rows * width).map(|i| (i as f32 * 0.7).sin() * 3.0 + 0.1).collect();
            let weight: Vec<f32> = (0..width).map(|i| 1.0 + (i as f32 * 0.3).cos()).collect();
            let run = |level| {
                let mut out = vec![f32::NAN; x.len()];
                rms_norm(level, &x, &weight, 1e-3, &mut out);
                out
            };
            let found = run(Level::Scalar);
            assert!(Level::all().into_iter().all(|level| run(level) == found), "{width}");
            for (row, found) in x.chunks_exact(width).zip(found.chunks_exact(width)) {
                let mean = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / width as f64;
                for ((v, w), found) in row.iter().zip(&weight).zip(found) {
                    let expected = f64::from(*v) / (mean + 1e-3).sqrt() * f64::from(*w);
                    assert!(
                        (f64::from(*found) - expected).abs() <= 1e-6 * expected.abs(),
                        "{width}: {found} {expected}"
                    );
                }
            }
            let norm = |row: &[f32]| row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
            let (most, found) = (x.chunks(width).map(norm).fold(0.0, f64::max), largest_norm(Level::best(), &x, width));
            assert!((f64::from(found) / most - 1.0).abs() < 1e-6);
            assert!(Level::all().into_iter().all(|level| largest_norm(level, &x, width) == found));
            let odd: Vec<f32> = [f32::NAN].into_iter().chain(x[1..].iter().copied()).collect();
            assert!(largest_norm(Level::best(), &odd, width).is_nan());
        }
    }
}

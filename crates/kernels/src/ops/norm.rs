//! Norms of rows.

use crate::Level;
use crate::level::at_level;

/// Independent accumulators of a row's sum of squares: enough for any vector width to hide an addition's latency, and one
/// fixed order.
const LANES: usize = 64;

/// Every row `x / √(mean x² + eps) · weight`, in place; rows are as long as `weight`. Every level gives the same bits.
///
/// # Panics
/// When there are no whole rows: a caller's bug.
pub fn rms_norm(level: Level, rows: &mut [f32], weight: &[f32], eps: f32) {
    assert!(!weight.is_empty() && rows.len().is_multiple_of(weight.len()), "whole rows");
    at_level!(level, norm_rows, (rows: &mut [f32], weight: &[f32], eps: f32));
}

#[inline(always)]
fn norm_rows(rows: &mut [f32], weight: &[f32], eps: f32) {
    let width = weight.len();
    for row in rows.chunks_exact_mut(width) {
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
        let inverse = 1.0 / (lanes[0] / width as f32 + eps).sqrt();
        for (v, w) in row.iter_mut().zip(weight) {
            *v = *v * inverse * w;
        }
    }
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
                let mut rows = x.clone();
                rms_norm(level, &mut rows, &weight, 1e-3);
                rows
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
        }
    }
}

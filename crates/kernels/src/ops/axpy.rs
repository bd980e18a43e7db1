//! y ← y + a·x, the inner loop of attention over kept keys and values.

use crate::Level;

/// Adds `a·x` to `y`, each entry by one fused multiply-add.
///
/// # Panics
/// When the lengths differ: a caller's bug.
#[inline]
pub fn axpy(level: Level, a: f32, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "lengths");
    match level {
        Level::Scalar => add(a, x, y),
        #[cfg(target_arch = "x86_64")]
        Level::Avx2(_) => {
            #[target_feature(enable = "avx2,fma")]
            fn compiled(a: f32, x: &[f32], y: &mut [f32]) {
                add(a, x, y);
            }
            // SAFETY: the level's token proves AVX2 and FMA.
            unsafe { compiled(a, x, y) }
        }
        #[cfg(target_arch = "x86_64")]
        Level::Avx512(_) => {
            #[target_feature(enable = "avx512f,fma")]
            fn compiled(a: f32, x: &[f32], y: &mut [f32]) {
                add(a, x, y);
            }
            // SAFETY: the level's token proves AVX-512 and FMA.
            unsafe { compiled(a, x, y) }
        }
    }
}

#[inline(always)]
fn add(a: f32, x: &[f32], y: &mut [f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y = a.mul_add(*x, *y));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_gives_the_bits_of_the_definition() {
        for n in [0, 1, 7, 8, 33, 100] {
            let x: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin()).collect();
            let run = |level| {
                let mut y: Vec<f32> = (0..n).map(|i| (i as f32 * 0.3).cos()).collect();
                axpy(level, 0.37, &x, &mut y);
                y
            };
            let expected: Vec<f32> = (0..n).map(|i| 0.37f32.mul_add(x[i], (i as f32 * 0.3).cos())).collect();
            assert!(Level::all().into_iter().all(|level| run(level) == expected));
        }
    }
}

//! y ← y + a·x for one x or several, the inner loops of attention over kept keys and values.

use crate::Level;
use crate::level::at_level;

/// Entries that several x are added to at a time: they stay in registers meanwhile, and are as many as hide the latency of an
/// addition.
const WIDE: usize = 128;
/// The same of what is left, such as the channels of a head.
const HEAD: usize = 64;
/// And of what is left then.
const LANES: usize = 16;

/// Adds `a·x` to `y`, each entry by one fused multiply-add.
///
/// # Panics
/// When the lengths differ: a caller's bug.
#[inline]
pub fn axpy(level: Level, a: f32, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "lengths");
    axpys(level, &[a], (x, x.len()), y);
}

/// Adds `Σ a[i]·x[i]` to `y`, in the order of i, each term by one fused multiply-add: the bits of [`axpy`] for one after another, with
/// `y` read and written once. Each x is as long as `y` and starts `stride` entries after the one before.
///
/// # Panics
/// When `x` is too short: a caller's bug.
#[inline]
pub fn axpys(level: Level, a: &[f32], (x, stride): (&[f32], usize), y: &mut [f32]) {
    let needed = a.len().checked_sub(1).map_or(0, |last| last * stride + y.len());
    assert!(x.len() >= needed, "{} entries of x, and {needed} needed", x.len());
    at_level!(level, add, (a: &[f32], x: &[f32], stride: usize, y: &mut [f32]));
}

#[inline(always)]
fn add(a: &[f32], x: &[f32], stride: usize, y: &mut [f32]) {
    let mut from = 0;
    while from + WIDE <= y.len() {
        add_chunk::<WIDE>(a, x, stride, y, from);
        from += WIDE;
    }
    while from + HEAD <= y.len() {
        add_chunk::<HEAD>(a, x, stride, y, from);
        from += HEAD;
    }
    while from + LANES <= y.len() {
        add_chunk::<LANES>(a, x, stride, y, from);
        from += LANES;
    }
    let y = &mut y[from..];
    for (i, &a) in a.iter().enumerate() {
        let x = &x[i * stride + from..][..y.len()];
        y.iter_mut().zip(x).for_each(|(y, x)| *y = a.mul_add(*x, *y));
    }
}

#[inline(always)]
fn add_chunk<const N: usize>(a: &[f32], x: &[f32], stride: usize, y: &mut [f32], from: usize) {
    let mut sum = [0.0f32; N];
    sum.copy_from_slice(&y[from..][..N]);
    for (i, &a) in a.iter().enumerate() {
        let x = &x[i * stride + from..][..N];
        for j in 0..N {
            sum[j] = a.mul_add(x[j], sum[j]);
        }
    }
    y[from..][..N].copy_from_slice(&sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_gives_the_bits_of_the_definition() {
        for (n, count) in [(0, 1), (1, 3), (7, 0), (8, 1), (33, 5), (64, 2), (100, 4), (130, 3)] {
            let stride = n + 3;
            let x: Vec<f32> = (0..count * stride).map(|i| (i as f32 * 0.7).sin()).collect();
            let a: Vec<f32> = (0..count).map(|i| (i as f32 * 0.9).cos()).collect();
            let start: Vec<f32> = (0..n).map(|i| (i as f32 * 0.3).cos()).collect();
            let mut expected = start.clone();
            for (i, &a) in a.iter().enumerate() {
                expected.iter_mut().zip(&x[i * stride..]).for_each(|(y, x)| *y = a.mul_add(*x, *y));
            }
            for level in Level::all() {
                let (mut at_once, mut in_turn) = (start.clone(), start.clone());
                axpys(level, &a, (&x, stride), &mut at_once);
                a.iter().enumerate().for_each(|(i, &a)| axpy(level, a, &x[i * stride..][..n], &mut in_turn));
                assert!(at_once == expected && in_turn == expected, "{n} {count} {level:?}");
            }
        }
    }
}

//! Rotary position embedding of halves: channel j of a head turns with channel j of its other half.

use crate::Level;
use crate::level::at_level;

/// The heads of `rows`, as many of `dim` channels as a row holds, turned by their row's angle: of the first and the second `half` of
/// the channels, (a, b) becomes (a·cos − b·sin, b·cos + a·sin); those beyond stay as they are. Rows of `x` are `stride` apart, and
/// `cos`, `sin` are `half` for each. Every level gives the same bits.
///
/// # Panics
/// When lengths do not fit: a caller's bug.
pub fn rotate_halves(
    level: Level,
    (x, stride): (&[f32], usize),
    (cos, sin): (&[f32], &[f32]),
    (dim, half): (usize, usize),
    (out, width): (&mut [f32], usize),
) {
    let rows = out.len() / width.max(1);
    assert!(dim > 0 && 2 * half <= dim && width.is_multiple_of(dim) && out.len() == rows * width, "whole heads");
    assert!(rows == 0 || x.len() >= (rows - 1) * stride + width, "a row for each");
    assert!(cos.len() >= rows * half && sin.len() >= rows * half, "an angle for each");
    let (x, angles, heads, out) = ((x, stride), (cos, sin), (dim, half), (out, width));
    at_level!(level, rotate, (x: (&[f32], usize), angles: (&[f32], &[f32]), heads: (usize, usize), out: (&mut [f32], usize)));
}

#[inline(always)]
fn rotate(
    (x, stride): (&[f32], usize),
    (cos, sin): (&[f32], &[f32]),
    (dim, half): (usize, usize),
    (out, width): (&mut [f32], usize),
) {
    for (row, out) in out.chunks_exact_mut(width.max(1)).enumerate() {
        let (cos, sin) = (&cos[row * half..][..half], &sin[row * half..][..half]);
        let x = &x[row * stride..][..width];
        for (x, out) in x.chunks_exact(dim).zip(out.chunks_exact_mut(dim)) {
            let ((a, b), (c, d)) = (x.split_at(half), out.split_at_mut(half));
            let ((b, rest), (d, kept)) = (b.split_at(half), d.split_at_mut(half));
            kept.copy_from_slice(rest);
            for j in 0..half {
                c[j] = a[j] * cos[j] - b[j] * sin[j];
                d[j] = b[j] * cos[j] + a[j] * sin[j];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_turns_pairs_by_their_angle() {
        for (rows, dim, half, heads, stride) in
            [(1, 2, 1, 1, 2), (5, 64, 32, 3, 200), (4, 20, 7, 2, 40), (3, 6, 0, 1, 9)]
        {
            let value = |i: usize, by: f32| (i as f32 * by).sin();
            let x: Vec<f32> = (0..rows * stride).map(|i| value(i, 0.7)).collect();
            let angle = |i: usize| f64::from(value(i, 0.3)) * 3.0;
            let cos: Vec<f32> = (0..rows * half).map(|i| angle(i).cos() as f32).collect();
            let sin: Vec<f32> = (0..rows * half).map(|i| angle(i).sin() as f32).collect();
            let run = |level| {
                let mut out = vec![f32::NAN; rows * heads * dim];
                rotate_halves(level, (&x, stride), (&cos, &sin), (dim, half), (&mut out, heads * dim));
                out
            };
            let found = run(Level::Scalar);
            assert!(Level::all().into_iter().all(|level| run(level) == found));
            for (i, &found) in found.iter().enumerate() {
                let (row, head, j) = (i / (heads * dim), i / dim % heads, i % dim);
                let at = |j: usize| f64::from(x[row * stride + head * dim + j]);
                let expected = match j {
                    j if j < half => at(j) * angle(row * half + j).cos() - at(half + j) * angle(row * half + j).sin(),
                    j if j < 2 * half => {
                        let turn = angle(row * half + j - half);
                        at(j) * turn.cos() + at(j - half) * turn.sin()
                    }
                    j => at(j),
                };
                assert!((f64::from(found) - expected).abs() < 1e-6, "{row} {head} {j}");
            }
        }
    }
}

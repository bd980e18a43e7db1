//! Orthogonal Hadamard transforms of any width 2^k·K for which an order-K Hadamard matrix is built here.
//!
//! The power of two is the fast transform, O(n log n). The rest is a small dense matrix by Paley's constructions over
//! primes, which need no tables: order q + 1 for q ≡ 3 (mod 4), order 2(q + 1) for q ≡ 1 (mod 4). The transform is
//! H_K ⊗ H_{2^k} divided by √n; it preserves norms, and for a power of two it is its own inverse.

use super::matrix::Element;
use std::ops::{Add, Mul, Sub};

/// The dense factor costs K multiply-adds an entry; beyond this a transform by smaller blocks is the better bargain.
const LARGEST_ORDER: usize = 256;

/// A number that can be transformed.
pub trait Signed: Element + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + From<f32> {
    /// 1/√n, rounded once.
    fn inverse_root(n: usize) -> Self;
}

impl Signed for f32 {
    fn inverse_root(n: usize) -> f32 {
        (1.0 / (n as f64).sqrt()) as f32
    }
}

impl Signed for f64 {
    fn inverse_root(n: usize) -> f64 {
        1.0 / (n as f64).sqrt()
    }
}

/// The transform of one width.
#[derive(Debug, Clone)]
pub struct Hadamard {
    n: usize,
    /// Order K of the dense factor; 1 where n is a power of two.
    order: usize,
    /// Its signs, row-major `[K, K]`.
    signs: Vec<i8>,
}

impl Hadamard {
    /// The transform of width `n`, or `None` where no factorisation 2^k·K with a K of Paley's is known: then a block of
    /// smaller width has to do.
    #[must_use]
    pub fn new(n: usize) -> Option<Self> {
        if n == 0 {
            return None;
        }
        // The largest power of two is the fastest split; K keeps factors of four where Paley needs them.
        let twos = n.trailing_zeros();
        let candidates = (0..=twos).map(|k| n >> (twos - k)).take_while(|&order| order <= LARGEST_ORDER);
        let (order, signs) = candidates.into_iter().find_map(|order| Some((order, matrix(order)?)))?;
        Some(Hadamard { n, order, signs })
    }

    /// Replaces each row of `x: [rows, n]` by its transform. `scratch` holds at least K entries; see
    /// [`Hadamard::scratch`].
    ///
    /// # Panics
    /// When the lengths do not fit: a caller's bug.
    pub fn apply<T: Signed>(&self, x: &mut [T], scratch: &mut [T]) {
        assert!(x.len().is_multiple_of(self.n) && scratch.len() >= self.order, "widths of the transform");
        let (span, scale) = (self.n / self.order, T::inverse_root(self.n));
        for row in x.chunks_exact_mut(self.n) {
            row.chunks_exact_mut(span).for_each(fast);
            for i in 0..span {
                for (k, out) in scratch[..self.order].iter_mut().enumerate() {
                    let signs = &self.signs[k * self.order..(k + 1) * self.order];
                    let terms = signs.iter().enumerate().map(|(j, &s)| (row[j * span + i], s));
                    *out = terms.fold(T::ZERO, |sum, (v, s)| if s > 0 { sum + v } else { sum - v });
                }
                for (k, &v) in scratch[..self.order].iter().enumerate() {
                    row[k * span + i] = v * scale;
                }
            }
        }
    }

    /// Entries of scratch that [`Hadamard::apply`] needs.
    #[must_use]
    pub fn scratch(&self) -> usize {
        self.order
    }
}

/// The unnormalised fast transform of a power of two.
fn fast<T: Signed>(x: &mut [T]) {
    let mut half = 1;
    while half < x.len() {
        for pair in x.chunks_exact_mut(2 * half) {
            let (a, b) = pair.split_at_mut(half);
            for (a, b) in a.iter_mut().zip(b) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
}

/// Signs of a Hadamard matrix of this order by Paley's constructions; order 1 is the matrix (1).
fn matrix(order: usize) -> Option<Vec<i8>> {
    if order == 1 {
        return Some(vec![1]);
    }
    if !order.is_multiple_of(4) {
        return None;
    }
    let mut signs = vec![0i8; order * order];
    if is_prime(order - 1) && (order - 1) % 4 == 3 {
        let residues = squares(order - 1);
        for i in 0..order {
            for j in 0..order {
                signs[i * order + j] = match (i, j) {
                    _ if i == j => 1,
                    (0, _) => 1,
                    (_, 0) => -1,
                    _ => character(&residues, i, j),
                };
            }
        }
        return Some(signs);
    }
    let half = order / 2;
    if is_prime(half - 1) && (half - 1) % 4 == 1 {
        let residues = squares(half - 1);
        for i in 0..half {
            for j in 0..half {
                let block: [i8; 4] = match (i, j) {
                    _ if i == j => [1, -1, -1, -1],
                    (0, _) | (_, 0) => [1, 1, 1, -1],
                    _ => [1, 1, 1, -1].map(|s| s * character(&residues, i, j)),
                };
                for (b, s) in block.into_iter().enumerate() {
                    signs[(2 * i + b / 2) * order + 2 * j + b % 2] = s;
                }
            }
        }
        return Some(signs);
    }
    None
}

/// The quadratic character of i − j over the prime field, for i ≠ j.
fn character(residues: &[bool], i: usize, j: usize) -> i8 {
    let q = residues.len();
    if residues[(i + q - j) % q] { 1 } else { -1 }
}

/// Which numbers below the prime q are squares.
fn squares(q: usize) -> Vec<bool> {
    let mut found = vec![false; q];
    (1..q).for_each(|x| found[x * x % q] = true);
    found
}

fn is_prime(n: usize) -> bool {
    n >= 2 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(n: usize) -> Vec<f64> {
        (0..n).map(|i| ((i * 7919 + 5) % 997) as f64 / 500.0 - 1.0).collect()
    }

    fn transform(x: &[f64]) -> Vec<f64> {
        let h = Hadamard::new(x.len()).unwrap();
        let (mut out, mut scratch) = (x.to_vec(), vec![0.0; h.scratch()]);
        h.apply(&mut out, &mut scratch);
        out
    }

    #[test]
    fn powers_of_two_equal_the_dense_matrix_and_invert_themselves() {
        // Oracle 3.
        for n in [1usize, 2, 4, 8, 16, 32, 64] {
            let x = sample(n);
            let y = transform(&x);
            for (i, y) in y.iter().enumerate() {
                // Sylvester's matrix: the sign is the parity of the bits two indices share.
                let sign = |j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
                let dot: f64 = x.iter().enumerate().map(|(j, v)| sign(j) * v).sum();
                assert!((y - dot / (n as f64).sqrt()).abs() < 1e-12);
            }
            assert!(transform(&y).iter().zip(&x).all(|(a, b)| (a - b).abs() < 1e-12));
        }
    }

    #[test]
    fn paleys_orders_are_hadamard_matrices() {
        // Oracle 3: H·Hᵀ = K·I, in integers.
        for k in [12, 20, 28, 36, 44, 60, 76, 84, 108, 140, 148] {
            let h = matrix(k).unwrap();
            for i in 0..k {
                for j in 0..k {
                    let dot: i32 = (0..k).map(|l| i32::from(h[i * k + l]) * i32::from(h[j * k + l])).sum();
                    assert_eq!(dot, if i == j { k as i32 } else { 0 }, "order {k}");
                }
            }
        }
    }

    #[test]
    fn widths_of_real_models_keep_their_norm() {
        for n in [64, 128, 576, 768, 896, 960, 1536, 2560, 3584, 4864, 5120, 14336, 18944] {
            let x = sample(2 * n);
            let h = Hadamard::new(n).unwrap();
            let (mut y, mut scratch) = (x.clone(), vec![0.0; h.scratch()]);
            h.apply(&mut y, &mut scratch);
            for (x, y) in x.chunks(n).zip(y.chunks(n)) {
                let norm = |v: &[f64]| v.iter().map(|a| a * a).sum::<f64>();
                assert!((norm(x) / norm(y) - 1.0).abs() < 1e-12, "width {n}");
            }
            let (mut single, mut scratch) =
                (x.iter().map(|&v| v as f32).collect::<Vec<_>>(), vec![0.0f32; h.scratch()]);
            h.apply(&mut single, &mut scratch);
            assert!(single.iter().zip(&y).all(|(&a, b)| (f64::from(a) - b).abs() < 1e-4), "f32 follows f64, width {n}");
        }
        assert!(Hadamard::new(11008).is_none() && Hadamard::new(0).is_none() && Hadamard::new(6).is_none());
    }
}

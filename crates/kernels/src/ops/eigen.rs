//! Eigenvalues and eigenvectors of a symmetric matrix: Householder reflections to tridiagonal form, then implicit QL.
//!
//! O(n³), on the calling thread: it runs once per model.

/// Replaces the symmetric row-major `a: [n, n]` by its eigenvectors as columns, and fills `values: [n]` with the
/// eigenvalues in ascending order.
///
/// # Panics
/// When the lengths do not fit: a caller's bug.
pub fn eigen(a: &mut [f64], values: &mut [f64]) {
    let n = values.len();
    assert_eq!(a.len(), n * n, "matrix shape");
    let mut off = vec![0.0; n];
    // Rows of `vectors` are eigenvectors in the making, so that every step works on neighbours in memory.
    let mut vectors = tridiagonal(a, n, values, &mut off);
    ql(values, &mut off, &mut vectors);
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
    let unsorted = values.to_vec();
    for (column, &from) in order.iter().enumerate() {
        values[column] = unsorted[from];
        for k in 0..n {
            a[k * n + column] = vectors[from * n + k];
        }
    }
}

/// Reduces `a` to the diagonal `d` and the entries `e` beside it (e[i] between i and i + 1); returns Qᵀ, A = Q·T·Qᵀ.
fn tridiagonal(a: &mut [f64], n: usize, d: &mut [f64], e: &mut [f64]) -> Vec<f64> {
    let mut reflections: Vec<(f64, Vec<f64>)> = Vec::new();
    for k in 0..n.saturating_sub(2) {
        let mut v: Vec<f64> = (k + 1..n).map(|i| a[i * n + k]).collect();
        let norm = v.iter().map(|x| x * x).sum::<f64>().sqrt();
        let alpha = if v[0] > 0.0 { -norm } else { norm };
        e[k] = alpha;
        v[0] -= alpha;
        let square: f64 = v.iter().map(|x| x * x).sum();
        let tau = if square > 0.0 { 2.0 / square } else { 0.0 };
        // A ← (I − τvvᵀ)·A·(I − τvvᵀ) on what remains, as a symmetric update of rank two.
        let row = |i: usize| &a[(k + 1 + i) * n + k + 1..(k + 2 + i) * n];
        let mut w: Vec<f64> =
            (0..v.len()).map(|i| tau * row(i).iter().zip(&v).map(|(x, v)| x * v).sum::<f64>()).collect();
        let half = 0.5 * tau * w.iter().zip(&v).map(|(w, v)| w * v).sum::<f64>();
        w.iter_mut().zip(&v).for_each(|(w, v)| *w -= half * v);
        for i in 0..v.len() {
            let row = &mut a[(k + 1 + i) * n + k + 1..(k + 2 + i) * n];
            for (j, x) in row.iter_mut().enumerate() {
                *x -= v[i] * w[j] + w[i] * v[j];
            }
        }
        reflections.push((tau, v));
    }
    if n > 1 {
        e[n - 2] = a[(n - 1) * n + n - 2];
    }
    (0..n).for_each(|i| d[i] = a[i * n + i]);
    let mut q: Vec<f64> = (0..n * n).map(|i| if i % (n + 1) == 0 { 1.0 } else { 0.0 }).collect();
    // Row by row q ← q·P with P = I − τvvᵀ on the columns after k: Qᵀ = P_last … P_first, built from the first on.
    for (k, (tau, v)) in reflections.iter().enumerate() {
        // Qᵀ ← P·Qᵀ: rows after k are mixed.
        let mut dots = vec![0.0; n];
        for (i, v) in v.iter().enumerate() {
            let row = &q[(k + 1 + i) * n..(k + 2 + i) * n];
            dots.iter_mut().zip(row).for_each(|(d, x)| *d += v * x);
        }
        for (i, v) in v.iter().enumerate() {
            let row = &mut q[(k + 1 + i) * n..(k + 2 + i) * n];
            row.iter_mut().zip(&dots).for_each(|(x, d)| *x -= tau * v * d);
        }
    }
    q
}

/// Diagonalizes the tridiagonal matrix (`d`, `e`) by implicitly shifted QL steps, and turns the rows of `z` with it.
fn ql(d: &mut [f64], e: &mut [f64], z: &mut [f64]) {
    let n = d.len();
    for l in 0..n {
        loop {
            let negligible = |m: usize| e[m].abs() <= f64::EPSILON * (d[m].abs() + d[m + 1].abs());
            let m = (l..n - 1).find(|&m| negligible(m)).unwrap_or(n - 1);
            if m == l {
                break;
            }
            let g = (d[l + 1] - d[l]) / (2.0 * e[l]);
            let r = g.hypot(1.0);
            let shift = d[m] - d[l] + e[l] / (g + if g >= 0.0 { r } else { -r });
            step(d, e, z, (l, m), shift);
        }
    }
}

/// One QL step on rows `l..=m`, by plane rotations from the end.
fn step(d: &mut [f64], e: &mut [f64], z: &mut [f64], (l, m): (usize, usize), shift: f64) {
    let n = d.len();
    let (mut s, mut c, mut p, mut g) = (1.0, 1.0, 0.0, shift);
    for i in (l..m).rev() {
        let (f, b) = (s * e[i], c * e[i]);
        let r = f64::hypot(f, g);
        e[i + 1] = r;
        if r == 0.0 {
            // The matrix has fallen apart here; the next step works on the part.
            d[i + 1] -= p;
            e[m] = 0.0;
            return;
        }
        (s, c) = (f / r, g / r);
        let h = d[i + 1] - p;
        let t = (d[i] - h) * s + 2.0 * c * b;
        p = s * t;
        d[i + 1] = h + p;
        g = c * t - b;
        let (low, high) = z.split_at_mut((i + 1) * n);
        for (x, y) in low[i * n..].iter_mut().zip(&mut high[..n]) {
            (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
        }
    }
    d[l] -= p;
    e[l] = g;
    e[m] = 0.0;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_and_values_rebuild_the_matrix() {
        for n in [1usize, 2, 3, 10, 37] {
            let b: Vec<f64> = (0..n * n).map(|i| ((i * 7919 + 5) % 997) as f64 / 500.0 - 1.0).collect();
            let a: Vec<f64> = (0..n * n).map(|i| b[i] + b[i % n * n + i / n]).collect();
            let (mut q, mut values) = (a.clone(), vec![0.0; n]);
            eigen(&mut q, &mut values);
            assert!(values.is_sorted());
            for i in 0..n {
                for j in 0..n {
                    let rebuilt: f64 = (0..n).map(|k| q[i * n + k] * values[k] * q[j * n + k]).sum();
                    assert!((rebuilt - a[i * n + j]).abs() < 1e-11 * n as f64, "{n}: {rebuilt} {}", a[i * n + j]);
                    let dot: f64 = (0..n).map(|k| q[k * n + i] * q[k * n + j]).sum();
                    assert!((dot - f64::from(u8::from(i == j))).abs() < 1e-12 * n as f64);
                }
            }
        }
    }

    #[test]
    fn equal_and_zero_values_are_no_trouble() {
        for a in [vec![0.0; 16], (0..16).map(|i| f64::from(u8::from(i % 5 == 0))).collect(), vec![1.0; 16]] {
            let (mut q, mut values) = (a.clone(), vec![0.0; 4]);
            eigen(&mut q, &mut values);
            assert!(values.iter().chain(&q).all(|v| v.is_finite()));
            for i in 0..16 {
                let rebuilt: f64 = (0..4).map(|k| q[i / 4 * 4 + k] * values[k] * q[i % 4 * 4 + k]).sum();
                assert!((rebuilt - a[i]).abs() < 1e-13);
            }
        }
    }
}

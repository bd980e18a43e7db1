//! What can still be gained after rounding: coordinate descent over the codes, and scales refitted to them.
//!
//! Both lower ℓ = tr((Ŵ−W)·H·(Ŵ−W)ᵀ) and never raise it; each row stops as soon as nothing changes.

use crate::refine_blocks::refit_blocks;
use crate::refine_units::descend_units;
use bitmill_kernels::{View, ViewMut, gemm};
use bitmill_scheme::{Affine, BlockForm, Granularity, Grid, GridKind, GroupParams, Quantized};
use rayon::prelude::*;

/// Rows of one task over matrices of `n` columns. Every task reads all of H, which where H is larger than the caches takes longer
/// than the products of a few rows.
pub(crate) const fn task_rows(n: usize) -> usize {
    if n <= 1024 { 32 } else { 256 }
}

/// tr((Ŵ−W)·H·(Ŵ−W)ᵀ) of each row, for `w` and `approximation: [rows, n]` and `h: [n, n]`.
#[must_use]
pub fn loss(w: &[f32], approximation: &[f32], h: &[f32]) -> Vec<f64> {
    let n = h.len().isqrt();
    let mut out = vec![0.0; w.len() / n];
    let rows = task_rows(n);
    let chunks = w.par_chunks(rows * n).zip(approximation.par_chunks(rows * n)).zip(out.par_chunks_mut(rows));
    chunks.for_each(|((w, a), out)| {
        let delta: Vec<f32> = a.iter().zip(w).map(|(a, w)| a - w).collect();
        let g = times(&delta, h, n);
        for (r, out) in out.iter_mut().enumerate() {
            *out = dot(&delta[r * n..(r + 1) * n], &g[r * n..(r + 1) * n]);
        }
    });
    out
}

/// Where the values of a matrix may lie, column by column.
trait Values: Sync {
    /// What decides the values of one weight.
    type Local: Copy;
    fn local(&self, row: usize, col: usize) -> Self::Local;
    fn nearest(&self, x: f32, local: Self::Local) -> u8;
    fn value(&self, code: u8, local: Self::Local) -> f32;
}

struct GroupValues<'a, G> {
    q: &'a Quantized,
    grid: G,
}

impl<G: Grid + Sync> Values for GroupValues<'_, G> {
    type Local = GroupParams;

    #[inline]
    fn local(&self, row: usize, col: usize) -> GroupParams {
        self.q.params(row, self.q.group(col))
    }

    #[inline]
    fn nearest(&self, x: f32, local: GroupParams) -> u8 {
        self.grid.nearest(x, local)
    }

    #[inline]
    fn value(&self, code: u8, local: GroupParams) -> f32 {
        self.grid.value(code, local)
    }
}

struct BlockValues<'a> {
    form: &'a BlockForm,
    /// Sub-blocks of a row.
    subs: usize,
    affine: Vec<Affine>,
}

impl<'a> BlockValues<'a> {
    fn new(form: &'a BlockForm, q: &Quantized) -> Self {
        let [rows, cols] = q.shape;
        let subs = cols / form.sub;
        let of = |i: usize| {
            let (row, sub) = (i / subs, i % subs);
            form.affine(&q.block(form, row, sub / form.subs()), sub % form.subs())
        };
        BlockValues { form, subs, affine: (0..rows * subs).map(of).collect() }
    }
}

impl Values for BlockValues<'_> {
    type Local = Affine;

    #[inline]
    fn local(&self, row: usize, col: usize) -> Affine {
        self.affine[row * self.subs + col / self.form.sub]
    }

    #[inline]
    fn nearest(&self, x: f32, local: Affine) -> u8 {
        self.form.nearest(x, local)
    }

    #[inline]
    fn value(&self, code: u8, local: Affine) -> f32 {
        self.form.value(code, local)
    }
}

/// Cyclic coordinate descent (QuIP#'s refinement): each code in turn moves to the best value given all others,
/// ŵ_k ← nearest(ŵ_k − G_k/H_kk) with G = (Ŵ−W)·H. At most `sweeps` passes; returns the number of codes changed. Where
/// codes are chosen together, they move together.
pub fn descend(w: &[f32], q: &mut Quantized, h: &[f32], sweeps: u32) -> usize {
    if let Some(form) = q.scheme.form().filter(|f| f.unit() > 1) {
        return descend_units(w, q, form, h, sweeps);
    }
    let mut codes = std::mem::take(&mut q.codes);
    let changed = match q.scheme.form() {
        Some(form) => descend_on(w, &mut codes, h, sweeps, q.shape[1], &BlockValues::new(form, q)),
        None => match q.scheme.float_grid(q.divisor()) {
            Some(grid) => descend_on(w, &mut codes, h, sweeps, q.shape[1], &GroupValues { q, grid }),
            None => descend_on(w, &mut codes, h, sweeps, q.shape[1], &GroupValues { q, grid: q.scheme.grid() }),
        },
    };
    q.codes = codes;
    changed
}

fn descend_on(w: &[f32], codes: &mut [u8], h: &[f32], sweeps: u32, n: usize, values: &impl Values) -> usize {
    let rows = task_rows(n);
    codes
        .par_chunks_mut(rows * n)
        .zip(w.par_chunks(rows * n))
        .enumerate()
        .map(|(i, (codes, w))| {
            let first = i * rows;
            let mut delta: Vec<f32> = w.to_vec();
            for (j, d) in delta.iter_mut().enumerate() {
                *d = values.value(codes[j], values.local(first + j / n, j % n)) - *d;
            }
            let mut g = times(&delta, h, n);
            let rows = codes.chunks_mut(n).zip(g.chunks_mut(n)).enumerate();
            rows.map(|(r, (codes, g))| descend_row(codes, g, h, sweeps, values, first + r)).sum::<usize>()
        })
        .sum()
}

fn descend_row(codes: &mut [u8], g: &mut [f32], h: &[f32], sweeps: u32, values: &impl Values, row: usize) -> usize {
    let n = codes.len();
    let mut changed = 0;
    for _ in 0..sweeps {
        let before = changed;
        for k in 0..n {
            let local = values.local(row, k);
            let (curvature, old) = (h[k * n + k], values.value(codes[k], local));
            let code = values.nearest(old - g[k] / curvature, local);
            if code == codes[k] {
                continue;
            }
            let step = values.value(code, local) - old;
            // The nearest value to the minimum of a parabola lowers it, except for ties and rounding of G.
            if 2.0 * g[k] * step + curvature * step * step >= 0.0 {
                continue;
            }
            codes[k] = code;
            changed += 1;
            for (g, &h) in g.iter_mut().zip(&h[k * n..(k + 1) * n]) {
                *g += step * h;
            }
        }
        if changed == before {
            break;
        }
    }
    changed
}

/// Refits the scales of each row to its codes under the full H: with q_g the row's code − zero inside group g, the
/// normal equations A·s = r, A_gg' = q_gᵀHq_g', r_g = q_gᵀHw (methods part 0.1), rounded to the stored type. A row
/// keeps its old scales where the rounded new ones are no better. Returns the number of rows improved. A matrix whose
/// rows share scales is left as it is.
pub fn refit_scales(w: &[f32], q: &mut Quantized, h: &[f32]) -> usize {
    let n = q.shape[1];
    if let Some(form) = q.scheme.form() {
        return refit_blocks(w, q, form, h);
    }
    if matches!(q.scheme.granularity, Granularity::Tensor | Granularity::Tile(_)) || !q.group_of.is_empty() {
        return 0;
    }
    let divisor = q.divisor();
    let groups = q.scheme.groups(n);
    let mut scales = std::mem::take(&mut q.scales);
    let (scheme, codes, zeros) = (q.scheme, &q.codes, &q.zeros);
    let level = |code: u8, zero: u8| match scheme.grid {
        // In units of the stored scale.
        GridKind::Float(float) => float.value(code) / divisor,
        _ => f32::from(code) - f32::from(zero),
    };
    let count = scheme.scales(q.shape);
    let rows = task_rows(n);
    let improved = scales[..count]
        .par_chunks_mut(rows * groups)
        .zip(w.par_chunks(rows * n))
        .enumerate()
        .map(|(i, (scales, w))| {
            let (first, len) = (i * rows, scheme.group_len(n));
            let middle = scheme.bits().middle();
            let zero = |r: usize, g: usize| zeros.get((first + r) * groups + g).copied().unwrap_or(middle);
            let codes = &codes[first * n..first * n + w.len()];
            let levels: Vec<f32> = codes.iter().enumerate().map(|(j, &c)| level(c, zero(j / n, j % n / len))).collect();
            refit_chunk(w, &levels, scales, h, n, len, |s| scheme.scale.round(s))
        })
        .sum();
    q.scales = scales;
    improved
}

/// One task of [`refit_scales`]: `levels` are what the scales multiply, codes minus zero points.
fn refit_chunk(
    w: &[f32],
    levels: &[f32],
    scales: &mut [f32],
    h: &[f32],
    n: usize,
    len: usize,
    round: impl Fn(f32) -> f32,
) -> usize {
    let (rows, groups) = (w.len() / n, n.div_ceil(len));
    // a[r][g][g'] = q_gᵀ H q_g' and b[r][g] = q_gᵀ H w, one product per group for all rows of the task.
    let (mut a, mut b) = (vec![0.0f64; rows * groups * groups], vec![0.0f64; rows * groups]);
    let mut m = vec![0.0f32; rows * n];
    for g in 0..groups {
        let (from, width) = (g * len, len.min(n - g * len));
        let q = View::new(&levels[from..], rows, width, n);
        gemm(1.0, q, View::new(&h[from * n..], width, n, n), 0.0, &mut ViewMut::new(&mut m, rows, n, n));
        for r in 0..rows {
            let (m, row) = (&m[r * n..(r + 1) * n], r * n);
            for (g2, a) in a[(r * groups + g) * groups..][..groups].iter_mut().enumerate() {
                let part = g2 * len..n.min((g2 + 1) * len);
                *a = dot(&m[part.clone()], &levels[row + part.start..row + part.end]);
            }
            b[r * groups + g] = dot(m, &w[row..row + n]);
        }
    }
    let mut improved = 0;
    for r in 0..rows {
        let (a, b) = (&a[r * groups * groups..][..groups * groups], &b[r * groups..][..groups]);
        let old = &mut scales[r * groups..(r + 1) * groups];
        let Some(exact) = solve(a, b) else { continue };
        // A group of zeros has no say; a scale of zero would not survive in its type.
        let new: Vec<f32> =
            (exact.iter().zip(&*old)).map(|(&s, &o)| if s == 0.0 { o } else { round(s as f32) }).collect();
        // ℓ up to the constant wᵀHw: sᵀAs − 2sᵀb.
        let value = |s: &[f32]| -> f64 {
            let quadratic =
                |g: usize| (0..groups).map(|k| a[g * groups + k] * f64::from(s[k])).sum::<f64>() - 2.0 * b[g];
            (0..groups).map(|g| f64::from(s[g]) * quadratic(g)).sum()
        };
        if new.iter().all(|s| s.is_finite()) && value(&new) < value(old) {
            old.copy_from_slice(&new);
            improved += 1;
        }
    }
    improved
}

/// Solves the symmetric positive semidefinite system A·x = b by Cholesky; rows without a pivot get 0.
fn solve(a: &[f64], b: &[f64]) -> Option<Vec<f64>> {
    let n = b.len();
    let mut l = vec![0.0f64; n * n];
    for i in 0..n {
        for j in 0..=i {
            let s: f64 = (0..j).map(|k| l[i * n + k] * l[j * n + k]).sum();
            let v = a[i * n + j] - s;
            if i == j {
                l[i * n + i] = if v > 1e-9 * a[i * n + i].max(0.0) && v > 0.0 { v.sqrt() } else { 0.0 };
            } else if l[j * n + j] > 0.0 {
                l[i * n + j] = v / l[j * n + j];
            }
        }
    }
    let mut x = b.to_vec();
    for i in 0..n {
        let s: f64 = (0..i).map(|k| l[i * n + k] * x[k]).sum();
        x[i] = if l[i * n + i] > 0.0 { (x[i] - s) / l[i * n + i] } else { 0.0 };
    }
    for i in (0..n).rev() {
        let s: f64 = (i + 1..n).map(|k| l[k * n + i] * x[k]).sum();
        x[i] = if l[i * n + i] > 0.0 { (x[i] - s) / l[i * n + i] } else { 0.0 };
    }
    x.iter().all(|v| v.is_finite()).then_some(x)
}

/// `a·h` for a few rows `a: [rows, n]`.
pub(crate) fn times(a: &[f32], h: &[f32], n: usize) -> Vec<f32> {
    let rows = a.len() / n;
    let mut out = vec![0.0; a.len()];
    gemm(1.0, View::new(a, rows, n, n), View::new(h, n, n, n), 0.0, &mut ViewMut::new(&mut out, rows, n, n));
    out
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sweep::tests::{Random, random_h, random_w};
    use crate::{Factor, Order, ScaleSearch, Sweep, sweep};
    use bitmill_scheme::{Bits, Fit, GroupParams, ScaleType, Scheme};

    fn rounded(w: &[f32], n: usize, bits: u32, granularity: Granularity) -> Quantized {
        let scheme = Scheme::int(Bits::new(bits).unwrap(), true, granularity).with_scale(ScaleType::F32);
        let (grid, len) = (scheme.grid(), scheme.group_len(n));
        let params: Vec<GroupParams> =
            w.chunks(n).flat_map(|r| r.chunks(len).map(|g| grid.fit(g, Fit::MinMax))).collect();
        let codes = w.iter().enumerate().map(|(i, &x)| grid.nearest(x, params[i / len])).collect();
        let scales = params.iter().map(|p| p.scale).collect();
        Quantized { scheme, shape: [w.len() / n, n], codes, scales, zeros: vec![], group_of: vec![], input: None }
    }

    #[test]
    fn descent_never_raises_the_loss_and_ends_one_optimal() {
        // Oracle 10.
        let n = 32;
        let (h, w) = (random_h(n, 21), random_w(40 * n, 22));
        let mut q = rounded(&w, n, 3, Granularity::Group(16));
        let mut last = loss(&w, &q.dequantize(), &h);
        while descend(&w, &mut q, &h, 1) > 0 {
            let now = loss(&w, &q.dequantize(), &h);
            assert!(now.iter().zip(&last).all(|(a, b)| *a <= b * (1.0 + 1e-5)));
            last = now;
        }
        let best = loss(&w, &q.dequantize(), &h);
        for at in (0..w.len()).step_by(7) {
            for code in 0..8 {
                let mut other = q.clone();
                other.codes[at] = code;
                assert!(loss(&w, &other.dequantize(), &h)[at / n] >= best[at / n] * (1.0 - 1e-4));
            }
        }
    }

    /// The least of (q − w)ᵀH(q − w) over integers q within two below and three above each of six weights.
    fn enumerate(w: &[f32], h: &[f32]) -> f64 {
        let mut best = f64::INFINITY;
        for choice in 0..6usize.pow(6) {
            let mut d = [0.0f64; 6];
            let mut rest = choice;
            for (d, &w) in d.iter_mut().zip(w) {
                *d = f64::from(w.floor()) + (rest % 6) as f64 - 2.0 - f64::from(w);
                rest /= 6;
            }
            let row = |i: usize| (0..6).map(|j| f64::from(h[i * 6 + j]) * d[j]).sum::<f64>() * d[i];
            best = best.min((0..6).map(row).sum());
        }
        best
    }

    #[test]
    fn brute_force_statistics() {
        // Oracles 8 and 10: 200 rows of six weights on a fixed grid, all 6^6 roundings around each enumerated. The
        // shares are those the methods digest reports for its own ensemble, so they are bounds of order, not equalities.
        let n = 6;
        let grid = GroupParams { scale: 1.0, zero: 8 };
        let scheme = Scheme::int(Bits::new(4).unwrap(), true, Granularity::Channel).with_scale(ScaleType::F32);
        let (mut better, mut worse, mut hit, mut hit_cd, mut ratios) = (0, 0, 0, 0, Vec::new());
        for seed in 0..200 {
            let h = random_h(n, 1000 + seed);
            let mut r = Random::new(seed);
            let w: Vec<f32> = (0..n).map(|_| (r.unit() * 6.0 - 3.0) as f32).collect();
            let order = Order::natural(n);
            let factor = Factor::new(&h, &order.columns, 0.0).unwrap();
            let search = ScaleSearch::MinMax;
            let what = Sweep {
                factor: &factor,
                order: &order,
                grid: scheme.grid(),
                group_len: n,
                search,
                fixed: Some(&[grid]),
            };
            let of = |codes: Vec<u8>| Quantized {
                scheme,
                shape: [1, n],
                codes,
                scales: vec![1.0],
                zeros: vec![],
                group_of: vec![],
                input: None,
            };
            let value = |q: &Quantized| loss(&w, &q.dequantize(), &h)[0];
            let mut swept = of(sweep(&w, &what).0);
            let nearest = value(&of(w.iter().map(|&x| scheme.grid().nearest(x, grid)).collect()));
            let gptq = value(&swept);
            descend(&w, &mut swept, &h, 20);
            let refined = value(&swept);
            let optimum = enumerate(&w, &h);
            assert!(
                gptq >= optimum * (1.0 - 1e-4) && refined >= optimum * (1.0 - 1e-4) && refined <= gptq * (1.0 + 1e-5)
            );
            better += u32::from(gptq < nearest * 0.9999);
            worse += u32::from(gptq > nearest * 1.0001);
            hit += u32::from(gptq < optimum * 1.0001);
            hit_cd += u32::from(refined < optimum * 1.0001);
            ratios.push(gptq / optimum);
        }
        ratios.sort_by(f64::total_cmp);
        eprintln!("better {better}, worse {worse}, optimal {hit}, with descent {hit_cd}, median ratio {}", ratios[100]);
        assert!(better > 2 * worse && hit_cd > hit && ratios[100] < 1.5);
    }

    #[test]
    fn refitted_scales_solve_the_normal_equations() {
        let n = 32;
        let (h, w) = (random_h(n, 31), random_w(40 * n, 32));
        for granularity in [Granularity::Group(8), Granularity::Channel] {
            let mut q = rounded(&w, n, 2, granularity);
            let before = loss(&w, &q.dequantize(), &h);
            assert!(refit_scales(&w, &mut q, &h) > 30);
            let after = loss(&w, &q.dequantize(), &h);
            assert!(after.iter().zip(&before).all(|(a, b)| *a <= b * (1.0 + 1e-5)));
            // No small change of any scale helps.
            for at in 0..q.scales.len() {
                for factor in [0.999, 1.001] {
                    let mut other = q.clone();
                    other.scales[at] *= factor;
                    let row = at / q.scheme.groups(n);
                    assert!(loss(&w, &other.dequantize(), &h)[row] >= after[row] * (1.0 - 1e-5));
                }
            }
        }
    }

    #[test]
    fn all_zero_rows_survive() {
        let n = 16;
        let (h, w) = (random_h(n, 41), vec![0.0; 2 * n]);
        let mut q = rounded(&w, n, 4, Granularity::Group(8));
        assert_eq!((descend(&w, &mut q, &h, 4), refit_scales(&w, &mut q, &h)), (0, 0));
        assert_eq!(q.dequantize(), w);
    }
}

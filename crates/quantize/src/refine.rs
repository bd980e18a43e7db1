//! What can still be gained after rounding: coordinate descent over the codes, and scales refitted to them.
//!
//! Both lower ℓ = tr((Ŵ−W)·H·(Ŵ−W)ᵀ) and never raise it; each row stops as soon as nothing changes. Both go by the gradient
//! G = (Ŵ−W)·H, which costs a product with all of H: it is made once, follows the codes as they move, and is made again where
//! scales have moved.

mod blocks;
mod codes;
mod scales;
pub(crate) mod units;

use bitmill_kernels::{Short, View, ViewMut, gemm, short_syrk};
use bitmill_scheme::{Granularity, GridKind, Quantized};
use blocks::refit_blocks;
use codes::{BlockValues, GroupValues, Values, descend_rows};
use rayon::prelude::*;
use scales::Rows;
use units::descend_units;

/// Rows of one task over matrices of `n` columns. Every task reads all of H, which where H is larger than the caches takes longer
/// than the products of a few rows.
pub(crate) const fn task_rows(n: usize) -> usize {
    if n <= 1024 { 32 } else { 256 }
}

/// Columns of a block of H.
const BLOCK: usize = 256;

/// tr((Ŵ−W)·H·(Ŵ−W)ᵀ) of each row, for `w` and `approximation: [rows, n]` and a symmetric `h: [n, n]`.
#[must_use]
pub fn loss(w: &[f32], approximation: &[f32], h: &[f32]) -> Vec<f64> {
    let n = h.len().isqrt();
    let mut out = vec![0.0; w.len() / n];
    let rows = task_rows(n);
    let chunks = w.par_chunks(rows * n).zip(approximation.par_chunks(rows * n)).zip(out.par_chunks_mut(rows));
    chunks.for_each(|((w, a), out)| {
        let delta: Vec<f32> = a.iter().zip(w).map(|(a, w)| a - w).collect();
        let mut g = vec![0.0f32; out.len() * BLOCK.min(n)];
        // Of what lies beside the blocks on the diagonal, the half above them counts twice.
        for from in (0..n).step_by(BLOCK) {
            let width = BLOCK.min(n - from);
            for (above, times) in [(0..from, 2.0), (from..from + width, 1.0)] {
                let d = View::new(&delta[above.start..], out.len(), above.len(), n);
                let h = View::new(&h[above.start * n + from..], above.len(), width, n);
                gemm(1.0, d, h, 0.0, &mut ViewMut::new(&mut g, out.len(), width, width));
                for ((r, out), g) in out.iter_mut().enumerate().zip(g.chunks_exact(width)) {
                    *out += times * dot(&delta[r * n + from..][..width], g);
                }
            }
        }
    });
    out
}

/// tr(X·H·Xᵀ) for `x: [rows, n]` and a symmetric `h: [n, n]`. Rounded to bfloat16 by `short`, `x` meets itself first, as tokens do
/// for H: Σ (XᵀX)·H is the same. Rounding is off in either direction, so that of so many squares it leaves less than a thousandth.
pub(crate) fn energy(x: &[f32], h: &[f32], short: Option<Short>) -> f64 {
    let Some(short @ Short::Bf16(_)) = short else { return loss(&vec![0.0; x.len()], x, h).iter().sum() };
    let n = h.len().isqrt();
    let mut squares = vec![0.0; n * n];
    short_syrk(short, &[x], n, &mut squares);
    // What lies above the diagonal is what lies below.
    let rows = squares.par_chunks_exact(n).zip(h.par_chunks_exact(n)).enumerate();
    let of_row = |(i, (squares, h)): (usize, (&[f32], &[f32]))| {
        2.0 * dot(&squares[..i], &h[..i]) + f64::from(squares[i]) * f64::from(h[i])
    };
    rows.map(of_row).collect::<Vec<f64>>().iter().sum()
}

/// G = (Ŵ−W)·H of `q` under a symmetric `h: [n, n]`, `[rows, n]`.
fn gradient(w: &[f32], q: &Quantized, h: &[f32]) -> Vec<f32> {
    let n = q.shape[1];
    let mut g = q.dequantize();
    let rows = task_rows(n) * n;
    g.par_chunks_mut(rows).zip(w.par_chunks(rows)).for_each(|(g, w)| {
        let delta: Vec<f32> = g.iter().zip(w).map(|(v, w)| v - w).collect();
        let rows = delta.len() / n;
        gemm(1.0, View::new(&delta, rows, n, n), View::new(h, n, n, n), 0.0, &mut ViewMut::new(g, rows, n, n));
    });
    g
}

/// Cyclic coordinate descent (QuIP#'s refinement): each code in turn moves to the best value given all others,
/// ŵ_k ← nearest(ŵ_k − G_k/H_kk) with G = (Ŵ−W)·H. At most `sweeps` passes; returns the number of codes changed. Where
/// codes are chosen together, they move together.
pub fn descend(w: &[f32], q: &mut Quantized, h: &[f32], sweeps: u32) -> usize {
    match q.scheme.form().filter(|f| f.unit() > 1) {
        Some(form) => descend_units(w, q, form, h, sweeps),
        None => descend_by(&mut gradient(w, q, h), q, h, sweeps),
    }
}

/// [`descend`] where G is known, which follows.
fn descend_by(g: &mut [f32], q: &mut Quantized, h: &[f32], sweeps: u32) -> usize {
    let mut codes = std::mem::take(&mut q.codes);
    let changed = match q.scheme.form() {
        Some(form) => descend_on(&BlockValues::new(form, q), g, &mut codes, h, sweeps),
        None => match q.scheme.float_grid(q.divisor()) {
            Some(grid) => descend_on(&GroupValues { q, grid }, g, &mut codes, h, sweeps),
            None => descend_on(&GroupValues { q, grid: q.scheme.grid() }, g, &mut codes, h, sweeps),
        },
    };
    q.codes = codes;
    changed
}

fn descend_on<V: Values>(values: &V, g: &mut [f32], codes: &mut [u8], h: &[f32], sweeps: u32) -> usize {
    let n = h.len().isqrt();
    let diagonal: Vec<f32> = h.iter().step_by(n + 1).copied().collect();
    let rows = task_rows(n);
    let tasks = codes.par_chunks_mut(rows * n).zip(g.par_chunks_mut(rows * n)).enumerate();
    tasks.map(|(i, (codes, g))| descend_rows(values, (h, &diagonal), sweeps, i * rows, codes, g)).sum()
}

/// Refits the scales of each row to its codes under the full H (methods part 0.1), rounded to the stored type. A row
/// keeps its old scales where the rounded new ones are no better. Returns the number of rows improved. A matrix whose
/// rows share scales is left as it is.
pub fn refit_scales(w: &[f32], q: &mut Quantized, h: &[f32]) -> usize {
    match q.scheme.form() {
        Some(form) => refit_blocks(w, q, form, h),
        None if !has_own_scales(q) => 0,
        None => refit_by(&gradient(w, q, h), q, h),
    }
}

/// Whether each row has scales of its own, of groups that are neighbours.
fn has_own_scales(q: &Quantized) -> bool {
    !matches!(q.scheme.granularity, Granularity::Tensor | Granularity::Tile(_)) && q.group_of.is_empty()
}

/// [`refit_scales`] of groups where G is known. It is that of the scales before.
fn refit_by(g: &[f32], q: &mut Quantized, h: &[f32]) -> usize {
    let n = q.shape[1];
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
        .zip(g.par_chunks(rows * n))
        .enumerate()
        .map(|(i, (scales, g))| {
            let (first, len) = (i * rows, scheme.group_len(n));
            let middle = scheme.bits().middle();
            let zero = |r: usize, g: usize| zeros.get((first + r) * groups + g).copied().unwrap_or(middle);
            let codes = &codes[first * n..first * n + g.len()];
            let levels: Vec<f32> = codes.iter().enumerate().map(|(j, &c)| level(c, zero(j / n, j % n / len))).collect();
            Rows { g, levels: &levels, h, n, len }.refit(scales, |s| scheme.scale.round(s))
        })
        .sum();
    q.scales = scales;
    improved
}

/// [`descend`], then [`refit_scales`] and [`descend`] again, up to `refits` times, until no scale improves.
pub(crate) fn refine(w: &[f32], q: &mut Quantized, h: &[f32], sweeps: u32, refits: u32) {
    if q.scheme.form().is_some() || !has_own_scales(q) {
        descend(w, q, h, sweeps);
        for _ in 0..refits {
            if refit_scales(w, q, h) == 0 {
                break;
            }
            descend(w, q, h, sweeps);
        }
        return;
    }
    if sweeps == 0 && refits == 0 {
        return;
    }
    let mut g = gradient(w, q, h);
    descend_by(&mut g, q, h, sweeps);
    for _ in 0..refits {
        if refit_by(&g, q, h) == 0 {
            break;
        }
        // As large as the matrix, so the old one goes first.
        drop(g);
        g = gradient(w, q, h);
        descend_by(&mut g, q, h, sweeps);
    }
}

/// `a·h` for a few rows `a: [rows, n]`.
pub(crate) fn times(a: &[f32], h: &[f32], n: usize) -> Vec<f32> {
    let rows = a.len() / n;
    let mut out = vec![0.0; a.len()];
    gemm(1.0, View::new(a, rows, n, n), View::new(h, n, n, n), 0.0, &mut ViewMut::new(&mut out, rows, n, n));
    out
}

/// Σ a·b: sixteen sums of a few hundred products each are folded in f64.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    const LANES: usize = 16;
    let part = |(a, b): (&[f32], &[f32])| -> f64 {
        let mut sums = [0.0f32; LANES];
        for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
            for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
                *sum += a * b;
            }
        }
        sums.iter().map(|&s| f64::from(s)).sum()
    };
    a.chunks(BLOCK).zip(b.chunks(BLOCK)).map(part).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sweep::tests::{Random, random_h, random_w};
    use crate::{Factor, Order, ScaleSearch, Sweep, sweep};
    use bitmill_scheme::{Bits, Fit, Grid, GroupParams, ScaleType, Scheme};

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
    fn energy_is_the_loss_but_for_what_independent_roundings_leave() {
        for (rows, n) in [(7, 96), (300, 160), (64, 600)] {
            let (h, w) = (random_h(n, 31), random_w(rows * n, 32));
            let exact: f64 = loss(&w, &vec![0.0; w.len()], &h).iter().sum();
            let ways = Short::all().into_iter().map(Some).chain([None]);
            for short in ways {
                let energy = energy(&w, &h, short);
                // Entries are off by a 2⁻⁹th at most, each row's in their own directions; one direction of H may outweigh the others.
                let bound = if matches!(short, Some(Short::Bf16(_))) { 0.01 / (rows as f64).sqrt() } else { 1e-6 };
                assert!((energy / exact - 1.0).abs() < bound, "{short:?} {rows} {n}: {energy} {exact}");
            }
        }
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

//! HQQ: half-quadratic quantization (Badri and Shaji 2023), which needs no data.
//!
//! Minimises ‖W − Ŵ‖_p^p with p < 1, so that a few outliers do not set the parameters of their group. A copy E of the
//! error is split off: E ← shrink(W − Ŵ; β) solves the p-norm part in closed form, the grid parameter is then fitted to
//! W − E by least squares, and β grows. The published method moves the zero point and leaves it fractional; formats
//! store integers, so here the zero point is rounded at the end and the scale refitted, and a symmetric grid, which has
//! no zero point to move, has its scale moved instead.

use super::billm::ONLY;
use super::{Linear, Method, Needs, Solved, assemble, fitted, nearest};
use crate::{Error, SolverOptions};
use bitmill_scheme::{Fit, Grid, GridKind, GroupParams, IntGrid, Scheme};

pub(super) struct Hqq;

/// The published constants: exponent, first β, its growth, and the most iterations.
const P: f32 = 0.7;
const BETA: f32 = 10.0;
const KAPPA: f32 = 1.01;
const ITERATIONS: u32 = 20;

impl Method for Hqq {
    fn name(&self) -> &'static str {
        "hqq"
    }

    fn summary(&self) -> &'static str {
        "half-quadratic fit of each zero point to most of its group; needs no calibration, made for --asymmetric"
    }

    fn refuses(&self, scheme: &Scheme) -> Option<&'static str> {
        let reason = "it fits the zero points of integer grids; use --method rtn, which needs no data either";
        match scheme.grid {
            GridKind::Int { .. } => None,
            GridKind::Binary => Some(ONLY),
            GridKind::Block(_) | GridKind::Float(_) => Some(reason),
        }
    }

    fn needs(&self, _: &SolverOptions) -> Needs {
        Needs::Nothing
    }

    fn solve(&self, linears: &[Linear<'_>], _: Option<&[f32]>, _: &SolverOptions) -> Result<Vec<Solved>, Error> {
        let solve = |linear: &Linear<'_>| {
            let grid = linear.scheme.grid();
            let params = fitted(linear, |w, _| fit_group(grid, w));
            let codes = nearest(linear, &params, grid);
            Solved { quantized: assemble(linear, codes, params), damping: None, stages: Vec::new() }
        };
        Ok(linears.iter().map(solve).collect())
    }
}

/// Proximal step of (1/β)‖·‖_p^p as HQQ writes it: sign(x)·max(0, |x| − |x|^(p−1)/β).
fn shrink(x: f32, beta: f32, p: f32) -> f32 {
    let a = x.abs();
    if a == 0.0 { 0.0 } else { x.signum() * (a - a.powf(p - 1.0) / beta).max(0.0) }
}

/// Parameters that are real numbers while they are fitted.
#[derive(Clone, Copy)]
struct Real {
    scale: f32,
    zero: f32,
}

impl Real {
    fn code(self, grid: IntGrid, x: f32) -> f32 {
        (x / self.scale + self.zero).round_ties_even().clamp(0.0, f32::from(grid.bits.max_code()))
    }
}

fn mean_error(grid: IntGrid, w: &[f32], p: Real) -> f32 {
    w.iter().map(|&x| (x - (p.code(grid, x) - p.zero) * p.scale).abs()).sum::<f32>() / w.len() as f32
}

/// One half-quadratic step: the error split off, then the free parameter in closed form.
fn step(grid: IntGrid, w: &[f32], p: Real, beta: f32, exponent: f32) -> Real {
    let kept = |x: f32, q: f32| x - shrink(x - (q - p.zero) * p.scale, beta, exponent);
    if grid.symmetric {
        let (mut top, mut bottom) = (0.0f32, 0.0f32);
        for &x in w {
            let level = p.code(grid, x) - p.zero;
            top += level * kept(x, level + p.zero);
            bottom += level * level;
        }
        if bottom > 0.0 && top != 0.0 { Real { scale: top / bottom, ..p } } else { p }
    } else {
        let residual = |x: f32| {
            let q = p.code(grid, x);
            q - kept(x, q) / p.scale
        };
        Real { zero: w.iter().map(|&x| residual(x)).sum::<f32>() / w.len() as f32, ..p }
    }
}

fn fit_group(grid: IntGrid, w: &[f32]) -> GroupParams {
    let start = grid.fit(w, Fit::MinMax);
    // The published β suits weights of the size of a language model's; here it follows the group's own step.
    let scale = start.scale.abs();
    let unit: Vec<f32> = w.iter().map(|x| x / scale).collect();
    let mut p = Real { scale: 1.0, zero: f32::from(start.zero) };
    let (mut best, mut error, mut beta) = (p, mean_error(grid, &unit, p), BETA);
    for _ in 0..ITERATIONS {
        p = step(grid, &unit, p, beta, P);
        beta *= KAPPA;
        let now = mean_error(grid, &unit, p);
        if now >= error {
            break;
        }
        (best, error) = (p, now);
    }
    storable(grid, w, Real { scale: best.scale * scale, ..best }, start)
}

/// The nearest parameters a format can store, or the starting ones where rounding lost what was gained.
fn storable(grid: IntGrid, w: &[f32], p: Real, start: GroupParams) -> GroupParams {
    let zero = p.zero.round_ties_even().clamp(0.0, f32::from(grid.bits.max_code()));
    let rounded = Real { zero, ..p };
    let (mut top, mut bottom) = (0.0f32, 0.0f32);
    for &x in w {
        let level = rounded.code(grid, x) - zero;
        top += level * x;
        bottom += level * level;
    }
    let refit = if bottom > 0.0 && top != 0.0 { top / bottom } else { p.scale };
    let as_real = |g: GroupParams| Real { scale: g.scale, zero: f32::from(g.zero) };
    let candidates = [refit, p.scale].map(|s| GroupParams { scale: grid.scale.round(s), zero: zero as u8 });
    let mut best = (mean_error(grid, w, as_real(start)), start);
    for c in candidates {
        let e = mean_error(grid, w, as_real(c));
        if e < best.0 {
            best = (e, c);
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sweep::tests::random_w;
    use bitmill_scheme::{Bits, ScaleType};

    fn grid(symmetric: bool) -> IntGrid {
        IntGrid { bits: Bits::new(4).unwrap(), symmetric, scale: ScaleType::F32 }
    }

    #[test]
    fn p_of_one_is_the_soft_threshold() {
        // Oracle 14.
        for x in [-2.0f32, -0.3, 0.0, 0.05, 0.4, 7.0] {
            let soft = x.signum() * (x.abs() - 0.1).max(0.0);
            assert!((shrink(x, 10.0, 1.0) - if x == 0.0 { 0.0 } else { soft }).abs() < 1e-7);
        }
    }

    #[test]
    fn p_of_two_leaves_the_zero_point_at_the_mean_residual() {
        // Oracle 14: with p = 2, shrink(x) = x·(1 − 1/β), so W − E = Ŵ + (W − Ŵ)/β. As β → ∞ nothing of the error
        // stays with the fit (z keeps), and at β = 1 all of it does: z = mean(q − W/s), the least-squares zero point.
        let w = random_w(64, 3);
        let start = grid(false).fit(&w, Fit::MinMax);
        let p = Real { scale: start.scale, zero: f32::from(start.zero) };
        let least_squares = w.iter().map(|&x| p.code(grid(false), x) - x / p.scale).sum::<f32>() / w.len() as f32;
        assert!((step(grid(false), &w, p, 1.0, 2.0).zero - least_squares).abs() < 1e-4);
        assert!((step(grid(false), &w, p, 1e9, 2.0).zero - p.zero).abs() < 1e-4);
    }

    #[test]
    fn never_worse_than_where_it_starts() {
        // Oracle 14: the objective does not rise until the stop, so the result is at least as good as min-max.
        for seed in 0..50 {
            let mut w = random_w(128, seed);
            w[5] *= 8.0;
            for symmetric in [true, false] {
                let g = grid(symmetric);
                let real = |p: GroupParams| Real { scale: p.scale, zero: f32::from(p.zero) };
                let (ours, plain) = (fit_group(g, &w), g.fit(&w, Fit::MinMax));
                assert!(mean_error(g, &w, real(ours)) <= mean_error(g, &w, real(plain)));
            }
        }
    }
}

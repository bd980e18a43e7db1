//! What a GGUF block stores besides its codes, refitted to them under the full H.
//!
//! For fixed codes the loss of a row is a parabola in the scales s_g and offsets o_g of its sub-blocks: with q_g the
//! levels and 1_g the ones of sub-block g, its curvature is A = [q 1]ᵀH[q 1] and its gradient [q 1]ᵀG, G = (Ŵ−W)·H. The
//! integers of each sub-block move to the best pair there is (scale and offset are strongly coupled, so they move
//! together), then d and dmin of each block move to their common minimum, rounded to half precision. Every move is taken
//! only if it lowers the parabola, so the loss never rises.

use super::times;
use bitmill_kernels::{View, ViewMut, gemm};
use bitmill_scheme::{Affine, BlockForm, BlockParams, Quantized, Shift, Step};
use half::f16;
use rayon::prelude::*;

/// Passes over the parameters of a row.
const PASSES: usize = 4;
/// Entries of A in memory per task.
const CURVATURES: usize = 1 << 21;
/// Rows of one task, at most.
const ROWS: usize = 32;

/// Refits the parameters of every block; returns the number of rows improved.
pub(crate) fn refit_blocks(w: &[f32], q: &mut Quantized, form: &BlockForm, h: &[f32]) -> usize {
    let n = q.shape[1];
    let (groups, subs) = (q.scheme.groups(n), n / form.sub);
    let width = if form.shift == Shift::None { subs } else { 2 * subs };
    let rows = (CURVATURES / (width * width)).clamp(1, ROWS);
    let mut params: Vec<BlockParams> =
        (0..q.shape[0] * groups).map(|i| q.block(form, i / groups, i % groups)).collect();
    let shared = Shared { form, n, subs, width, h };
    let improved = (params.par_chunks_mut(rows * groups))
        .zip(q.codes.par_chunks(rows * n))
        .zip(w.par_chunks(rows * n))
        .map(|((params, codes), w)| shared.rows(params, codes, w))
        .sum();
    let (reals, integers) = (form.reals(), form.integers());
    for (i, p) in params.iter().enumerate() {
        q.scales[i * reals..][..reals].copy_from_slice(&p.reals[..reals]);
        q.zeros[i * integers..][..integers].copy_from_slice(&p.integers[..integers]);
    }
    improved
}

/// What all rows have in common.
struct Shared<'a> {
    form: &'a BlockForm,
    n: usize,
    /// Sub-blocks of a row.
    subs: usize,
    /// Width of A: scales, then offsets if there are any.
    width: usize,
    h: &'a [f32],
}

impl Shared<'_> {
    fn rows(&self, params: &mut [BlockParams], codes: &[u8], w: &[f32]) -> usize {
        let (n, subs, form) = (self.n, self.subs, self.form);
        let (rows, groups) = (w.len() / n, n / form.len);
        let levels: Vec<f32> = codes.iter().map(|&c| f32::from(form.levels[usize::from(c)])).collect();
        let mut delta = vec![0.0f32; w.len()];
        for (i, delta) in delta.chunks_mut(form.sub).enumerate() {
            let (row, sub) = (i / subs, i % subs);
            let a = form.affine(&params[row * groups + sub / form.subs()], sub % form.subs());
            for (d, (&c, &w)) in delta.iter_mut().zip(codes[i * form.sub..].iter().zip(&w[i * form.sub..])) {
                *d = form.value(c, a) - w;
            }
        }
        let g = times(&delta, self.h, n);
        let curvatures = self.curvatures(&levels, rows);
        let mut improved = 0;
        for (row, params) in params.chunks_mut(groups).enumerate() {
            let part = |sub: usize| row * n + sub * form.sub..row * n + (sub + 1) * form.sub;
            let along =
                |sub: usize| g[part(sub)].iter().zip(&levels[part(sub)]).map(|(g, l)| f64::from(g * l)).sum::<f64>();
            let sums = (0..subs).map(|sub| g[part(sub)].iter().map(|&g| f64::from(g)).sum::<f64>());
            let mut gradient: Vec<f64> = (0..subs).map(along).collect();
            if self.width > subs {
                gradient.extend(sums);
            }
            let a = &curvatures[row * self.width * self.width..][..self.width * self.width];
            let mut state = Row { shared: self, a, gradient, params };
            improved += usize::from(state.improve());
        }
        improved
    }

    /// A of every row, `[rows, width, width]`.
    fn curvatures(&self, levels: &[f32], rows: usize) -> Vec<f32> {
        let (n, subs, width, len) = (self.n, self.subs, self.width, self.form.sub);
        let mut a = vec![0.0f32; rows * width * width];
        let ones = vec![1.0f32; if width > subs { levels.len() } else { 0 }];
        let mut m = vec![0.0f32; rows * n];
        for i in 0..width {
            let (from, basis) = (i % subs * len, if i < subs { levels } else { &ones });
            let q = View::new(&basis[from..], rows, len, n);
            gemm(1.0, q, View::new(&self.h[from * n..], len, n, n), 0.0, &mut ViewMut::new(&mut m, rows, n, n));
            for (row, m) in m.chunks(n).enumerate() {
                for (j, a) in a[(row * width + i) * width..][..width].iter_mut().enumerate() {
                    let part = j % subs * len..(j % subs + 1) * len;
                    *a = match j < subs {
                        true => m[part.clone()].iter().zip(&levels[row * n..][part]).map(|(m, l)| m * l).sum(),
                        false => m[part].iter().sum(),
                    };
                }
            }
        }
        a
    }
}

/// One row on its way downhill.
struct Row<'a> {
    shared: &'a Shared<'a>,
    a: &'a [f32],
    gradient: Vec<f64>,
    params: &'a mut [BlockParams],
}

impl Row<'_> {
    fn improve(&mut self) -> bool {
        let form = self.shared.form;
        let mut any = false;
        for _ in 0..PASSES {
            let mut moved = false;
            for group in 0..self.params.len() {
                if form.step != Step::Real {
                    for sub in 0..form.subs() {
                        moved |= self.move_integers(group, sub);
                    }
                }
                if form.reals() > 0 {
                    moved |= self.move_reals(group);
                }
            }
            any |= moved;
            if !moved {
                break;
            }
        }
        any
    }

    fn curvature(&self, i: usize, j: usize) -> f64 {
        f64::from(self.a[i * self.shared.width + j])
    }

    /// Index of the scale of a sub-block, and of its offset if there is one.
    fn indices(&self, group: usize, sub: usize) -> (usize, Option<usize>) {
        let scale = group * self.shared.form.subs() + sub;
        (scale, (self.shared.width > self.shared.subs).then_some(self.shared.subs + scale))
    }

    /// Change of the loss when a sub-block's scale and offset move by `by`.
    fn change(&self, (s, o): (usize, Option<usize>), by: [f64; 2]) -> f64 {
        let own = 2.0 * by[0] * self.gradient[s] + by[0] * by[0] * self.curvature(s, s);
        let Some(o) = o else { return own };
        let other = 2.0 * by[1] * self.gradient[o] + by[1] * by[1] * self.curvature(o, o);
        own + other + 2.0 * by[0] * by[1] * self.curvature(s, o)
    }

    /// The best integers within two steps of the best real scale.
    fn move_integers(&mut self, group: usize, sub: usize) -> bool {
        let form = self.shared.form;
        let (index, old) = (self.indices(group, sub), self.params[group]);
        let (s, o) = index;
        let here = form.affine(&old, sub);
        let by = |p: &BlockParams| difference(form.affine(p, sub), here);
        let mut best = (0.0, old);
        // With the offset free to follow, the curvature along the scale is the Schur complement.
        let (mut slope, mut bend) = (self.gradient[s], self.curvature(s, s));
        if let Some(o) = o.filter(|&o| self.curvature(o, o) > 0.0 && form.shift != Shift::Sign) {
            slope -= self.curvature(s, o) * self.gradient[o] / self.curvature(o, o);
            bend -= self.curvature(s, o).powi(2) / self.curvature(o, o);
        }
        let unit = match form.step {
            Step::Scaled { .. } | Step::Odd { .. } => f64::from(old.reals[0] * (form.multiple(1) - form.multiple(0))),
            // The next float is a power of two, or an eighth of one, away.
            Step::Float => f64::from(here.scale) / 8.0,
            _ => f64::from(here.scale),
        };
        let ideal = if bend > 0.0 && unit != 0.0 { (-slope / bend / unit).clamp(-300.0, 300.0) } else { 0.0 };
        let centre = i32::from(old.integers[sub]) + ideal.round() as i32;
        let most = i32::from(form.max_integer(sub));
        let (first, last) = ((centre - 2).clamp(0, most), (centre + 2).clamp(0, most));
        // Where the offset is the scale or its negative, both are tried with every scale.
        let signs = if form.shift == Shift::Sign { 2 } else { 1 };
        for (integer, sign) in (first..=last).flat_map(|i| (0..signs).map(move |s| (i, s))) {
            let mut p = old;
            p.integers[sub] = integer as u8;
            if form.shift == Shift::Sign {
                p.integers[form.scale_integers() + sub] = sign;
            }
            if let (Some(o), Shift::Scaled { .. }) = (o, form.shift) {
                let at = form.scale_integers() + sub;
                let moved = by(&p)[0];
                let free = -(self.gradient[o] + moved * self.curvature(s, o)) / self.curvature(o, o);
                let steps =
                    if old.reals[1] == 0.0 || !free.is_finite() { 0.0 } else { -free / f64::from(old.reals[1]) };
                let wanted = f64::from(old.integers[at]) + steps.clamp(-300.0, 300.0);
                p.integers[at] = wanted.round().clamp(0.0, f64::from(form.max_integer(at))) as u8;
            }
            let change = self.change(index, by(&p));
            if change < best.0 {
                best = (change, p);
            }
        }
        if best.0 >= -1e-12 * self.curvature(s, s).abs() * f64::from(here.scale).powi(2) {
            return false;
        }
        self.take(group, best.1);
        true
    }

    /// d, with dmin or m, at their common minimum.
    fn move_reals(&mut self, group: usize) -> bool {
        let form = self.shared.form;
        let old = self.params[group];
        // Directions in which the scales and offsets go when d, or dmin or m, grows by one.
        let unit = |real: usize| {
            let mut p = old;
            p.reals = [f32::from(u8::from(real == 0)), f32::from(u8::from(real == 1))];
            let (subs, first) = (form.subs(), group * form.subs());
            let at = (0..subs).map(|sub| form.affine(&p, sub)).collect::<Vec<_>>();
            let scales = at.iter().enumerate().map(|(i, a)| (first + i, f64::from(a.scale)));
            let offsets = at.iter().enumerate().map(|(i, a)| (self.shared.subs + first + i, f64::from(a.offset)));
            match (real, form.shift) {
                (0, Shift::Sign) => scales.chain(offsets).collect::<Vec<_>>(),
                (0, _) => scales.collect(),
                _ => offsets.collect(),
            }
        };
        let along = |u: &[(usize, f64)]| u.iter().map(|&(i, x)| x * self.gradient[i]).sum::<f64>();
        let form_of = |u: &[(usize, f64)], v: &[(usize, f64)]| {
            let row = |&(i, x): &(usize, f64)| x * v.iter().map(|&(j, y)| y * self.curvature(i, j)).sum::<f64>();
            u.iter().map(row).sum::<f64>()
        };
        let u = unit(0);
        let (du, uu) = (along(&u), form_of(&u, &u));
        let round = |x: f32, by: f64| f16::from_f64(f64::from(x) + by).to_f32();
        let mut new = old;
        let (mut dv, mut vv, mut uv) = (0.0, 0.0, 0.0);
        if form.reals() == 2 {
            let v = unit(1);
            (dv, vv, uv) = (along(&v), form_of(&v, &v), form_of(&u, &v));
        }
        let determinant = uu * vv - uv * uv;
        if determinant > 1e-9 * uu * vv && determinant > 0.0 {
            new.reals[0] = round(old.reals[0], (uv * dv - vv * du) / determinant);
            // The second follows the rounded first.
            let moved = f64::from(new.reals[0]) - f64::from(old.reals[0]);
            new.reals[1] = round(old.reals[1], -(dv + moved * uv) / vv);
        } else if uu > 0.0 {
            new.reals[0] = round(old.reals[0], -du / uu);
        }
        let [x, y] = [0, 1].map(|i| f64::from(new.reals[i]) - f64::from(old.reals[i]));
        let change = 2.0 * (x * du + y * dv) + x * x * uu + 2.0 * x * y * uv + y * y * vv;
        if new == old || !new.reals.iter().all(|r| r.is_finite()) || change.is_nan() || change >= 0.0 {
            return false;
        }
        self.take(group, new);
        true
    }

    /// Gives a block new parameters and brings the gradient up to date.
    fn take(&mut self, group: usize, new: BlockParams) {
        let form = self.shared.form;
        let old = std::mem::replace(&mut self.params[group], new);
        for sub in 0..form.subs() {
            let (s, o) = self.indices(group, sub);
            let by = difference(form.affine(&new, sub), form.affine(&old, sub));
            for (i, by) in [(Some(s), by[0]), (o, by[1])] {
                let Some(i) = i.filter(|_| by != 0.0) else { continue };
                let row = &self.a[i * self.shared.width..][..self.shared.width];
                self.gradient.iter_mut().zip(row).for_each(|(g, &a)| *g += by * f64::from(a));
            }
        }
    }
}

fn difference(a: Affine, b: Affine) -> [f64; 2] {
    [f64::from(a.scale) - f64::from(b.scale), f64::from(a.offset) - f64::from(b.offset)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sweep::tests::{random_h, random_w};
    use crate::{descend, loss};
    use bitmill_scheme::{BLOCKS, Scheme};

    /// Each block fitted on its own, as without error feedback.
    fn fitted(form: &BlockForm, w: &[f32], n: usize) -> Quantized {
        let blocks: Vec<BlockParams> = w.chunks(form.len).map(|w| form.fit(w, &vec![1.0; w.len()])).collect();
        let mut codes = vec![0u8; w.len()];
        for (i, (w, codes)) in w.chunks(form.sub).zip(codes.chunks_mut(form.sub)).enumerate() {
            let a = form.affine(&blocks[i / form.subs()], i % form.subs());
            form.round(w, &vec![1.0; w.len()], a, codes);
        }
        Quantized {
            scheme: Scheme::block(form.kind),
            shape: [w.len() / n, n],
            codes,
            scales: blocks.iter().flat_map(|p| p.reals[..form.reals()].to_vec()).collect(),
            zeros: blocks.iter().flat_map(|p| p.integers[..form.integers()].to_vec()).collect(),
            group_of: vec![],
            input: None,
        }
    }

    #[test]
    fn refits_and_descent_never_raise_the_loss() {
        let n = 512;
        let (h, w) = (random_h(n, 7), random_w(3 * n, 8));
        for form in BLOCKS {
            let mut q = fitted(form, &w, n);
            let mut last = loss(&w, &q.dequantize(), &h);
            let first: f64 = last.iter().sum();
            for _ in 0..3 {
                for step in [true, false] {
                    if step {
                        _ = refit_blocks(&w, &mut q, form, &h)
                    } else {
                        _ = descend(&w, &mut q, &h, 2)
                    }
                    q.validate().unwrap();
                    let now = loss(&w, &q.dequantize(), &h);
                    let pairs = || now.iter().zip(&last);
                    assert!(pairs().all(|(a, b)| *a <= b * (1.0 + 1e-3)), "{} {now:?} {last:?}", form.name);
                    last = now;
                }
            }
            assert!(last.iter().sum::<f64>() < 0.85 * first, "{}: {last:?} from {first}", form.name);
        }
    }

    #[test]
    fn zeros_stay_zero() {
        let (h, w) = (random_h(256, 9), vec![0.0; 512]);
        for form in BLOCKS {
            let mut q = fitted(form, &w, 256);
            refit_blocks(&w, &mut q, form, &h);
            assert_eq!(q.dequantize(), w, "{}", form.name);
        }
    }
}

//! Coordinate descent over the vectors of a codebook.
//!
//! As in [`crate::descend`], but what moves is a unit of codes at a time: with M the part of H that belongs to the unit, G =
//! (Ŵ−W)·H there and v its values, the loss as a function of the unit's values x is (x−c)·M·(x−c)ᵀ and a constant, where
//! c = v − G·M⁻¹. The point nearest to c in the metric M is therefore the best there is given all others.

use super::{task_rows, times};
use bitmill_scheme::{BlockForm, Metric, Quantized, UNIT};
use rayon::prelude::*;

/// At most `sweeps` passes over the units of each row; returns the number of units changed. The loss never rises.
pub(crate) fn descend_units(w: &[f32], q: &mut Quantized, form: &BlockForm, h: &[f32], sweeps: u32) -> usize {
    let (n, unit) = (q.shape[1], form.unit());
    let mut codes = std::mem::take(&mut q.codes);
    let at = |k: usize| move |i: usize, j: usize| h[(k + i) * n + k + j];
    let metrics: Vec<Metric> = (0..n).step_by(unit).map(|k| Metric::of(unit, at(k))).collect();
    let shared = Shared { form, h, n, metrics: &metrics, q };
    let rows = task_rows(n);
    let changed = (codes.par_chunks_mut(rows * n).zip(w.par_chunks(rows * n)).enumerate())
        .map(|(i, (codes, w))| shared.rows(i * rows, codes, w, sweeps))
        .sum();
    q.codes = codes;
    changed
}

struct Shared<'a> {
    form: &'a BlockForm,
    h: &'a [f32],
    n: usize,
    metrics: &'a [Metric],
    /// For its parameters.
    q: &'a Quantized,
}

impl Shared<'_> {
    fn rows(&self, first: usize, codes: &mut [u8], w: &[f32], sweeps: u32) -> usize {
        let n = self.n;
        let mut values = vec![0.0f32; w.len()];
        for (row, (codes, values)) in codes.chunks(n).zip(values.chunks_mut(n)).enumerate() {
            for (sub, (codes, values)) in codes.chunks(self.form.sub).zip(values.chunks_mut(self.form.sub)).enumerate()
            {
                let a = self.affine(first + row, sub * self.form.sub);
                codes.iter().zip(values).for_each(|(&c, v)| *v = self.form.value(c, a));
            }
        }
        let delta: Vec<f32> = values.iter().zip(w).map(|(v, w)| v - w).collect();
        let mut g = times(&delta, self.h, n);
        let rows = codes.chunks_mut(n).zip(values.chunks_mut(n)).zip(g.chunks_mut(n)).enumerate();
        rows.map(|(row, ((codes, values), g))| self.row(first + row, codes, values, g, sweeps)).sum()
    }

    fn affine(&self, row: usize, col: usize) -> bitmill_scheme::Affine {
        let form = self.form;
        form.affine(&self.q.block(form, row, col / form.len), col % form.len / form.sub)
    }

    fn row(&self, row: usize, codes: &mut [u8], values: &mut [f32], g: &mut [f32], sweeps: u32) -> usize {
        let unit = self.form.unit();
        let mut changed = 0;
        // Units that the last move of any unit since their own visit has left alone need no visit; which are those is
        // not tracked, so a pass without a change ends the row.
        for _ in 0..sweeps {
            let before = changed;
            for (metric, k) in self.metrics.iter().zip((0..self.n).step_by(unit)) {
                let a = self.affine(row, k);
                let part = k..k + unit;
                changed += usize::from(self.step(metric, a, &mut codes[part.clone()], &mut values[part], g, k));
            }
            if changed == before {
                break;
            }
        }
        changed
    }

    /// Moves the unit from column `k` on to its best point; whether that is another one.
    fn step(
        &self,
        metric: &Metric,
        a: bitmill_scheme::Affine,
        codes: &mut [u8],
        values: &mut [f32],
        g: &mut [f32],
        k: usize,
    ) -> bool {
        let unit = codes.len();
        let mut away = [0.0f32; UNIT];
        away[..unit].copy_from_slice(&g[k..k + unit]);
        metric.solve(&mut away[..unit]);
        // What the present point costs beyond the best real values: only less is of interest.
        let bound: f32 = away.iter().zip(&g[k..k + unit]).map(|(y, g)| y * g).sum();
        let mut centre = [0.0f32; UNIT];
        (0..unit).for_each(|i| centre[i] = values[i] - away[i]);
        let mut found = [0u8; UNIT];
        if a.scale == 0.0 || !self.form.round_unit(&centre[..unit], metric, a, bound * (1.0 - 1e-5), &mut found[..unit])
        {
            return false;
        }
        let mut step = [0.0f32; UNIT];
        (0..unit).for_each(|i| step[i] = self.form.value(found[i], a) - values[i]);
        // The search works with factors of M; the move is judged by M itself.
        let h = |i: usize| &self.h[(k + i) * self.n..][..self.n];
        let bend = |i: usize| h(i)[k..k + unit].iter().zip(&step).map(|(h, s)| h * s).sum::<f32>();
        let change: f32 = (0..unit).map(|i| step[i] * (2.0 * g[k + i] + bend(i))).sum();
        if change.is_nan() || change >= 0.0 {
            return false;
        }
        for i in (0..unit).filter(|&i| step[i] != 0.0) {
            (codes[i], values[i]) = (found[i], self.form.value(found[i], a));
            g.iter_mut().zip(h(i)).for_each(|(g, &h)| *g += step[i] * h);
        }
        // Codes of equal value may still differ, as where the scale is zero; those of a unit belong together.
        codes.copy_from_slice(&found[..unit]);
        true
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::methods::blocks::nearest;
    use crate::sweep::tests::{Random, random_h, random_w};
    use crate::{Linear, loss};
    use bitmill_kernels::Stored;
    use bitmill_scheme::{BLOCKS, Codebook, Scheme};

    /// A random point of a codebook.
    pub(crate) fn point(book: &Codebook, r: &mut Random) -> Vec<u8> {
        let mut codes = vec![0u8; book.unit];
        codes.chunks_mut(book.len).for_each(|v| book.vector(r.below(book.vectors), v));
        book.set_flags(r.below(1 << book.flags.bits(book.unit)), &mut codes);
        codes
    }

    #[test]
    fn descent_over_units_never_raises_the_loss_and_ends_one_optimal() {
        // Oracle 10, for vectors.
        let n = 256;
        let (h, w) = (random_h(n, 21), random_w(2 * n, 22));
        for form in BLOCKS.iter().filter(|f| f.unit() > 1) {
            let (book, scheme) = (form.codebook().unwrap(), Scheme::block(form.kind));
            let linear = Linear::new("x", &w, [2, n], scheme);
            let (mut q, _) = nearest(&linear, Stored::F32(&w), Some(&vec![1.0; n]));
            let mut last = loss(&w, &q.dequantize(), &h);
            while descend_units(&w, &mut q, form, &h, 1) > 0 {
                q.validate().unwrap();
                let now = loss(&w, &q.dequantize(), &h);
                assert!(now.iter().zip(&last).all(|(a, b)| *a <= b * (1.0 + 1e-5)), "{}", form.name);
                last = now;
            }
            let mut r = Random::new(5);
            for _ in 0..200 {
                let mut other = q.clone();
                let at = r.below(w.len() / book.unit) * book.unit;
                let fresh = point(book, &mut r);
                // All of a random point, and one vector or flag of it, which is nearer.
                let from = r.below(book.unit);
                other.codes[at + from..at + book.unit].copy_from_slice(&fresh[from..]);
                if book.holds(&other.codes[at..at + book.unit]) {
                    let value = loss(&w, &other.dequantize(), &h)[at / n];
                    assert!(value >= last[at / n] * (1.0 - 1e-4), "{}", form.name);
                }
            }
        }
    }
}

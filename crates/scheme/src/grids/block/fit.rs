//! Fits of a block's parameters to weights whose squared errors have costs: Σ h(w − ŵ)².
//!
//! First every sub-block gets its own best real scale and offset: a search over starting points, each refitted in closed
//! form for the codes it leads to. Then d, dmin and the integers are fitted to the *weights*, not to those reals: for
//! several d, every integer takes the value with the smallest loss after its codes are rounded anew, and d and dmin
//! follow in closed form, rounded to half precision, in turns until nothing improves. Either sign of d and dmin is
//! allowed wherever the format allows it.

use super::{Affine, BlockForm, BlockParams, BlockType, Codebook, E2M1, IQ4, Shift, Step, UNIT};
use crate::grids::int::round_small;
use half::f16;

/// Turns of integers and reals in a joint fit.
const TURNS: usize = 3;

/// Sums over a sub-block under given scale and offset, with l the level nearest to each weight and e = w − ŵ.
#[derive(Debug, Clone, Copy, Default)]
struct Moments {
    /// Σ h·e²: the loss.
    ee: f32,
    /// Σ h·e·l.
    el: f32,
    /// Σ h·e.
    e: f32,
    /// Σ h·l².
    ll: f32,
    /// Σ h·l.
    l: f32,
    /// Σ h.
    h: f32,
}

/// How codes of a codebook are found while parameters are fitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Points {
    /// The nearest.
    Nearest,
    /// [Near](Codebook::near) ones.
    Near,
}

impl BlockForm {
    /// Parameters for the weights `w` of a block under costs `h`, one per weight.
    #[must_use]
    pub fn fit(&self, w: &[f32], h: &[f32]) -> BlockParams {
        self.fit_to(Points::Nearest, w, h)
    }

    /// As [`BlockForm::fit`], much faster for types with a codebook: candidates are judged by points that are not always the
    /// nearest, so the best of them may be missed by little.
    #[must_use]
    pub fn fit_near(&self, w: &[f32], h: &[f32]) -> BlockParams {
        self.fit_to(Points::Near, w, h)
    }

    fn fit_to(&self, points: Points, w: &[f32], h: &[f32]) -> BlockParams {
        let subs = || w.chunks(self.sub).zip(h.chunks(self.sub));
        if self.step == Step::Real {
            // Such blocks have one scale, so its own best is the block's.
            return subs().next().map_or(BlockParams::zero(), |_| self.real(self.sub_affine(points, w, h)));
        }
        if matches!(self.step, Step::Exponent | Step::Float) {
            let mut p = BlockParams::zero();
            for (sub, (w, h)) in subs().enumerate() {
                p.integers[sub] = if self.step == Step::Float { float(self, w, h) } else { self.exponent(w, h) };
            }
            return p;
        }
        let own: Vec<Affine> = subs().map(|(w, h)| self.sub_affine(points, w, h)).collect();
        let mut best = (f32::INFINITY, BlockParams::zero());
        let biggest = own.iter().fold(0.0f32, |b, a| if a.scale.abs() > b.abs() { a.scale } else { b });
        let dmin = self.first_dmin(&own, h);
        let (divisors, turns) = if points == Points::Near { (1, 2) } else { (usize::MAX, TURNS) };
        for &divisor in self.divisors().iter().take(divisors) {
            let mut p = BlockParams { reals: [half(biggest / divisor), dmin], ..BlockParams::zero() };
            let mut before = f32::INFINITY;
            for turn in 0..turns {
                let mut sums = [[0.0f64; 2]; 3];
                let mut loss = 0.0;
                for (sub, (w, h)) in subs().enumerate() {
                    let start = if turn == 0 { own[sub] } else { self.affine(&p, sub) };
                    let m = self.integers_of(points, &mut p, (sub, start), w, h);
                    loss += m.ee;
                    self.add(&p, sub, &m, &mut sums);
                }
                if loss < best.0 {
                    best = (loss, p);
                }
                if loss.is_nan() || loss >= before {
                    break;
                }
                before = loss;
                p.reals = self.improved(p.reals, &sums);
            }
        }
        best.1
    }

    /// New integers of sub-block `sub` for the weights `w`, with d and dmin as they are: what a sweep does on reaching
    /// a sub-block whose weights have been compensated since the block was fitted.
    pub fn refit_sub(&self, p: &mut BlockParams, sub: usize, w: &[f32], h: &[f32]) {
        match self.step {
            Step::Scaled { .. } | Step::Odd { .. } => {
                let start = self.sub_affine(Points::Nearest, w, h);
                let mut fresh = *p;
                let new = self.integers_of(Points::Nearest, &mut fresh, (sub, start), w, h);
                let old = self.moments(w, h, self.affine(p, sub));
                if new.ee < old.ee {
                    *p = fresh;
                }
            }
            Step::Float => p.integers[sub] = float(self, w, h),
            Step::Real | Step::Exponent => {}
        }
    }

    /// Σ h(w − ŵ)² of sub-block `sub` with each weight at its nearest value.
    #[must_use]
    pub fn sub_loss(&self, p: &BlockParams, sub: usize, w: &[f32], h: &[f32]) -> f32 {
        self.moments(w, h, self.affine(p, sub)).ee
    }

    /// A block with one real scale, and maybe an offset.
    fn real(&self, a: Affine) -> BlockParams {
        let offset = if self.shift == Shift::Real { half(a.offset) } else { 0.0 };
        BlockParams { reals: [half(a.scale), offset], ..BlockParams::zero() }
    }

    /// The best of the exponents around that of the largest weight.
    fn exponent(&self, w: &[f32], h: &[f32]) -> u8 {
        let amax = w.iter().fold(0.0f32, |a, x| a.max(x.abs()));
        let top = if amax > 0.0 { (amax / 12.0).log2().ceil() as i32 + 128 } else { 0 };
        let mut best = (f32::INFINITY, 0u8);
        for e in (top - 2..=top + 1).map(|e| e.clamp(0, 254) as u8) {
            let loss = self.moments(w, h, Affine { scale: super::exponent(e), offset: 0.0 }).ee;
            if loss < best.0 {
                best = (loss, e);
            }
        }
        best.1
    }

    /// What the largest scale may be divided by to get d.
    fn divisors(&self) -> &'static [f32] {
        match self.kind {
            BlockType::Q2K => &[15.0, 13.3, 14.5, 12.0, 15.7, 17.0],
            BlockType::Q3K | BlockType::Iq4Xs => &[-32.0, 31.0, -30.4, -32.8],
            BlockType::Q6K => &[-128.0, 127.0],
            BlockType::Iq2Xxs | BlockType::Iq2Xs | BlockType::Iq2S => &[31.0 / 8.0, 28.5 / 8.0, 32.5 / 8.0],
            BlockType::Iq3Xxs => &[31.0 / 4.0, 28.5 / 4.0, 32.5 / 4.0],
            BlockType::Iq3S => &[31.0, 28.5, 32.5],
            BlockType::Iq1S | BlockType::Iq1M => &[15.0 / 8.0, 13.0 / 8.0, 16.5 / 8.0],
            _ => &[63.0, 60.7],
        }
    }

    /// A dmin that reaches the largest offset. Its sign is that of most of the offsets' weight; a sub-block on the
    /// other side gets none.
    fn first_dmin(&self, own: &[Affine], h: &[f32]) -> f32 {
        let Shift::Scaled { bits } = self.shift else { return 0.0 };
        let weight = |i: usize| h.chunks(self.sub).nth(i).map_or(0.0, |h| h.iter().sum::<f32>());
        let pull: f32 = own.iter().enumerate().map(|(i, a)| a.offset * weight(i)).sum();
        let reach = own.iter().fold(0.0f32, |r, a| if a.offset * pull > 0.0 { r.max(a.offset.abs()) } else { r });
        half((reach / ((1u32 << bits) - 1) as f32).copysign(-pull))
    }

    /// The integers of a sub-block near scale and offset `start` with the smallest loss under d and dmin.
    fn integers_of(
        &self,
        points: Points,
        p: &mut BlockParams,
        (sub, start): (usize, Affine),
        w: &[f32],
        h: &[f32],
    ) -> Moments {
        let most = i32::from(self.max_integer(0));
        let wanted = if p.reals[0] == 0.0 { 0.0 } else { start.scale / p.reals[0] };
        let middle = self.integer_near(wanted).clamp(0, most);
        let mut best = (Moments { ee: f32::INFINITY, ..Moments::default() }, *p);
        for integer in (middle - 1).max(0)..=(middle + 1).min(most) {
            let mut q = *p;
            q.integers[sub] = integer as u8;
            let mut offset = start.offset;
            // The offset that suits the scale, then the one that suits the codes this offset leads to.
            for turn in 0..if self.shift == Shift::None { 1 } else { 2 } {
                match self.shift {
                    Shift::Sign => q.integers[self.scale_integers() + sub] = turn,
                    _ => self.set_offset(&mut q, sub, offset),
                }
                let a = self.affine(&q, sub);
                let m = match self.codebook() {
                    Some(book) => self.book_moments((book, points), w, h, a, best.0.ee),
                    None => self.moments(w, h, a),
                };
                if m.ee < best.0.ee {
                    best = (m, q);
                }
                offset = if m.h > 0.0 { a.offset + m.e / m.h } else { a.offset };
            }
        }
        *p = best.1;
        best.0
    }

    /// The stored offset of sub-block `sub` nearest to `offset`.
    fn set_offset(&self, p: &mut BlockParams, sub: usize, offset: f32) {
        if let Shift::Scaled { bits } = self.shift {
            let most = ((1u32 << bits) - 1) as f32;
            let wanted = if p.reals[1] == 0.0 { 0.0 } else { -offset / p.reals[1] };
            p.integers[self.scale_integers() + sub] = wanted.round().clamp(0.0, most) as u8;
        }
    }

    /// Adds a sub-block's share to the normal equations of d and dmin: rows (dd, dm), (mm, 0), (rd, rm).
    fn add(&self, p: &BlockParams, sub: usize, m: &Moments, sums: &mut [[f64; 2]; 3]) {
        let s = f64::from(self.multiple(p.integers[sub]));
        let o = match self.shift {
            Shift::Scaled { .. } => -f64::from(p.integers[self.scale_integers() + sub]),
            _ => 0.0,
        };
        let [ll, l, h, el, e] = [m.ll, m.l, m.h, m.el, m.e].map(f64::from);
        sums[0][0] += s * s * ll;
        sums[0][1] += s * o * l;
        sums[1][0] += o * o * h;
        sums[2][0] += s * el;
        sums[2][1] += o * e;
    }

    /// d and dmin after one Newton step on the loss, which is the exact minimum for the codes and integers at hand.
    fn improved(&self, [d, dmin]: [f32; 2], sums: &[[f64; 2]; 3]) -> [f32; 2] {
        let [[dd, dm], [mm, _], [rd, rm]] = *sums;
        let step = |x: f32, by: f64| half((f64::from(x) + by) as f32);
        let determinant = dd * mm - dm * dm;
        if determinant > 1e-9 * dd * mm && mm > 0.0 {
            [step(d, (rd * mm - rm * dm) / determinant), step(dmin, (rm * dd - rd * dm) / determinant)]
        } else if dd > 0.0 {
            [step(d, rd / dd), dmin]
        } else {
            [d, dmin]
        }
    }

    /// The best real scale and offset of one sub-block.
    fn sub_affine(&self, points: Points, w: &[f32], h: &[f32]) -> Affine {
        let mut best = (f32::INFINITY, Affine { scale: 0.0, offset: 0.0 });
        let mut consider = |a: Affine| {
            let (loss, refitted) = self.refitted(points, w, h, a);
            if loss < best.0 {
                best = (loss, refitted);
            }
        };
        let (lo, hi) = w.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(lo, hi), &x| (lo.min(x), hi.max(x)));
        if matches!(self.shift, Shift::None | Shift::Sign) {
            let amax = hi.max(-lo);
            let (first, step, count) = self.reach();
            let every = if points == Points::Near && self.codebook().is_some() { 2 } else { 1 };
            for i in (0..count).step_by(every) {
                let scale = amax / (first + i as f32 * step);
                let offset = if self.shift == Shift::Sign { scale } else { 0.0 };
                consider(Affine { scale, offset });
                if self.shift == Shift::Sign {
                    consider(Affine { scale, offset: -offset });
                } else if self.codebook().is_none() {
                    consider(Affine { scale: -scale, offset });
                }
            }
        } else {
            let last = (self.levels.len() - 1) as f32;
            let (step, count) = if last < 8.0 { (0.25, 12) } else { (0.5, 8) };
            for i in 0..count {
                let scale = (hi - lo) / (last + i as f32 * step - 0.2);
                // What the range leaves uncovered lies above, on both sides, or below.
                let uncovered = (hi - lo) - last * scale;
                for share in [0.0, 0.5, 1.0] {
                    consider(Affine { scale, offset: lo + share * uncovered });
                }
            }
        }
        // The refitted scale leads to other codes, and these to another scale.
        for _ in 0..4 {
            let (loss, again) = self.refitted(points, w, h, best.1);
            if loss >= best.0 {
                break;
            }
            best = (loss, again);
        }
        best.1
    }

    /// First divisor of the largest weight, distance and number of divisors, for levels around zero.
    fn reach(&self) -> (f32, f32, usize) {
        match self.levels.len() {
            _ if self.codebook().is_some() => match self.kind {
                BlockType::Iq3Xxs => (48.0, 2.5, 10),
                BlockType::Iq3S => (11.5, 0.6, 10),
                BlockType::Iq1S | BlockType::Iq1M => (8.0, 1.2, 10),
                _ => (30.0, 2.8, 10),
            },
            // Any scale leads to the same signs, and these to the best of all: the mean magnitude.
            2 => (1.0, 1.0, 1),
            _ if !self.is_uniform() => (90.0, 3.2, 24),
            3 | 4 => (0.9, 0.15, 24),
            8 | 16 => (f32::from(self.levels[0]).abs() - 0.8, 0.16, 24),
            _ => (f32::from(self.levels[0]).abs() - 0.6, 0.12, 20),
        }
    }

    /// Scale and offset refitted to the codes that `a` leads to, and the loss with these codes.
    fn refitted(&self, points: Points, w: &[f32], h: &[f32], a: Affine) -> (f32, Affine) {
        let m = match self.codebook() {
            Some(book) => self.book_moments((book, points), w, h, a, f32::INFINITY),
            None => self.moments(w, h, a),
        };
        if matches!(self.shift, Shift::None | Shift::Sign) {
            if m.ll <= 0.0 {
                return (m.ee, a);
            }
            let by = m.el / m.ll;
            let scale = a.scale + by;
            let offset = if self.shift == Shift::Sign { scale * eighths(a) } else { 0.0 };
            return (m.ee - m.el * by, Affine { scale, offset });
        }
        let determinant = m.ll * m.h - m.l * m.l;
        if determinant <= 1e-6 * m.ll * m.h || m.h <= 0.0 {
            // One level for all: only the offset can be fitted.
            let by = if m.h > 0.0 { m.e / m.h } else { 0.0 };
            return (m.ee - m.e * by, Affine { offset: a.offset + by, ..a });
        }
        let scale = (m.el * m.h - m.e * m.l) / determinant;
        let offset = (m.e * m.ll - m.el * m.l) / determinant;
        let loss = m.ee - scale * m.el - offset * m.e;
        (loss, Affine { scale: a.scale + scale, offset: a.offset + offset })
    }

    fn moments(&self, w: &[f32], h: &[f32], a: Affine) -> Moments {
        if let Some(book) = self.codebook() {
            return self.book_moments((book, Points::Nearest), w, h, a, f32::INFINITY);
        }
        match self.kind {
            BlockType::Iq4Nl | BlockType::Iq4Xs => moments(w, h, a, uneven),
            BlockType::Mxfp4 | BlockType::Nvfp4 => moments(w, h, a, float4),
            BlockType::Q1_0 => moments(w, h, a, |x| if x > 0.0 { 1.0 } else { -1.0 }),
            _ => {
                let (first, last) = (f32::from(self.levels[0]), f32::from(self.levels[self.levels.len() - 1]));
                moments(w, h, a, move |x| round_small(x.clamp(first, last)))
            }
        }
    }

    /// As [`moments`], with codes from a codebook. Where the offset is a scale, levels are counted from zero. Sums of which
    /// the first reaches `limit` may be incomplete.
    fn book_moments(
        &self,
        (book, points): (&Codebook, Points),
        w: &[f32],
        h: &[f32],
        a: Affine,
        limit: f32,
    ) -> Moments {
        let up = if self.shift == Shift::Sign { eighths(a) } else { 0.0 };
        let mut m = Moments::default();
        let mut codes = [0u8; UNIT];
        for (w, h) in w.chunks(book.unit).zip(h.chunks(book.unit)) {
            let codes = &mut codes[..w.len()];
            let centre = &self.in_levels(w, a)[..w.len()];
            match points {
                Points::Nearest => book.nearest_apart(centre, h, codes),
                Points::Near => book.near(centre, h, codes),
            }
            for ((&x, &h), &c) in w.iter().zip(h).zip(&*codes) {
                let l = f32::from(self.levels[usize::from(c)]) + up;
                let e = x - a.scale * l;
                m.ee += h * e * e;
                m.el += h * e * l;
                m.ll += h * l * l;
                m.e += h * e;
                m.l += h * l;
                m.h += h;
            }
            if m.ee >= limit {
                break;
            }
        }
        m
    }
}

/// The E4M3 number under which a sub-block loses least, of those around its best real scale.
fn float(form: &BlockForm, w: &[f32], h: &[f32]) -> u8 {
    let best = form.sub_affine(Points::Nearest, w, h).scale.abs();
    let above = (1..126u8).take_while(|&byte| super::float8(byte) < best).count() as u8 + 1;
    let loss = |byte: u8| form.moments(w, h, Affine { scale: super::float8(byte), offset: 0.0 }).ee;
    let bytes = above.saturating_sub(4)..=(above + 3).min(126);
    bytes.fold((f32::INFINITY, 0), |best, byte| if loss(byte) < best.0 { (loss(byte), byte) } else { best }).1
}

/// The offset in scales where it is one or minus one of them.
fn eighths(a: Affine) -> f32 {
    if (a.offset < 0.0) == (a.scale < 0.0) { 1.0 } else { -1.0 }
}

/// The nearest half-precision number, which may be zero: a block of zero scale is a valid block.
fn half(x: f32) -> f32 {
    let most = f16::MAX.to_f32();
    f16::from_f32(x.clamp(-most, most)).to_f32()
}

/// Sums run in a fixed number of lanes, which compilers turn into vectors of any width.
#[inline]
fn moments(w: &[f32], h: &[f32], a: Affine, snap: impl Fn(f32) -> f32) -> Moments {
    const LANES: usize = 8;
    let inverse = if a.scale == 0.0 { 0.0 } else { 1.0 / a.scale };
    let mut sums = [[0.0f32; LANES]; 6];
    let mut add = |lane: usize, x: f32, h: f32| {
        let l = snap((x - a.offset) * inverse);
        let e = x - (a.scale * l + a.offset);
        let (he, hl) = (h * e, h * l);
        sums[0][lane] += he * e;
        sums[1][lane] += he * l;
        sums[2][lane] += he;
        sums[3][lane] += hl * l;
        sums[4][lane] += hl;
        sums[5][lane] += h;
    };
    let (whole, rest) = w.as_chunks::<LANES>();
    let (whole_h, rest_h) = h.as_chunks::<LANES>();
    for (w, h) in whole.iter().zip(whole_h) {
        for lane in 0..LANES {
            add(lane, w[lane], h[lane]);
        }
    }
    for (lane, (&x, &hx)) in rest.iter().zip(rest_h).enumerate() {
        add(lane, x, hx);
    }
    let [ee, el, e, ll, l, h] = sums.map(|lanes| lanes.iter().sum());
    Moments { ee, el, e, ll, l, h }
}

/// The nearest level of IQ4: the lowest, plus every step whose middle lies below `x`.
#[inline]
fn uneven(x: f32) -> f32 {
    let mut level = f32::from(IQ4[0]);
    for pair in IQ4.windows(2) {
        let (a, b) = (f32::from(pair[0]), f32::from(pair[1]));
        level += if x > 0.5 * (a + b) { b - a } else { 0.0 };
    }
    level
}

/// The nearest level of E2M1, by magnitude.
#[inline]
fn float4(x: f32) -> f32 {
    let mut level = 0.0;
    for pair in E2M1[..8].windows(2) {
        let (a, b) = (f32::from(pair[0]), f32::from(pair[1]));
        level += if x.abs() > 0.5 * (a + b) { b - a } else { 0.0 };
    }
    f32::copysign(level, x)
}

#[cfg(test)]
pub(super) mod tests;

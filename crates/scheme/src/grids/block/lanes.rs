//! Blocks fitted and rounded side by side: sixteen sub-blocks at a time, one in each lane of a vector.
//!
//! The same two steps as in [`BlockForm::fit`] — every sub-block's own scale and offset, then d, dmin and the integers
//! fitted to the weights in turns — with fewer starting points, and with every sum taken weight by weight, so that a lane
//! computes the same bits whatever instructions carry it. This is the definition; kernels instantiate it per instruction
//! set, where each loop over lanes becomes one instruction or two.

mod costs;

use super::{Affine, BlockForm, BlockParams, BlockType, IQ4, Shift, Step};
use costs::{BySize, Costs, Each, One, by_position};
use half::f16;

/// Sub-blocks side by side; a multiple of those of any block fitted here.
pub const LANES: usize = 16;
/// Weights of the longest sub-block fitted here.
const LONGEST: usize = 32;
/// Turns of integers and reals in a joint fit.
const TURNS: usize = 3;

/// Levels that are few.
const FEW: usize = 8;

/// A number for each lane.
type Lanes = [f32; LANES];
const ZERO: Lanes = [0.0; LANES];

/// Weights and costs by position in the sub-block, then lane.
struct Tile<C> {
    len: usize,
    w: [Lanes; LONGEST],
    h: C,
    /// Σ h.
    costs: Lanes,
    /// Σ h·w.
    sum: Lanes,
}

/// Scales and offsets.
#[derive(Clone, Copy)]
struct Affines {
    scale: Lanes,
    offset: Lanes,
}

/// Levels, as arithmetic.
trait Snap: Copy {
    /// The level nearest to `x`.
    fn level(self, x: f32) -> f32;
    /// The code of the level nearest to `x`.
    fn code(self, x: f32) -> u8;
}

#[derive(Clone, Copy)]
struct Even {
    first: f32,
    last: f32,
    /// The first level as a byte.
    lowest: u8,
}

/// Adding and subtracting it rounds what is small; added, it leaves the whole number in the lowest bits.
const SHIFT: f32 = 12_582_912.0;

impl Even {
    /// The nearest level, not yet shifted back.
    #[inline(always)]
    fn shifted(self, x: f32) -> f32 {
        let x = if x > self.first { x } else { self.first };
        let x = if x < self.last { x } else { self.last };
        x + SHIFT
    }
}

impl Snap for Even {
    #[inline(always)]
    fn level(self, x: f32) -> f32 {
        self.shifted(x) - SHIFT
    }
    #[inline(always)]
    fn code(self, x: f32) -> u8 {
        (self.shifted(x).to_bits() as u8).wrapping_sub(self.lowest)
    }
}

#[derive(Clone, Copy)]
struct Uneven;

impl Snap for Uneven {
    #[inline(always)]
    fn level(self, x: f32) -> f32 {
        let mut level = f32::from(IQ4[0]);
        for i in 1..IQ4.len() {
            let (a, b) = (f32::from(IQ4[i - 1]), f32::from(IQ4[i]));
            level += if x > 0.5 * (a + b) { b - a } else { 0.0 };
        }
        level
    }
    #[inline(always)]
    fn code(self, x: f32) -> u8 {
        let mut code = SHIFT;
        for i in 1..IQ4.len() {
            code += if x > 0.5 * (f32::from(IQ4[i - 1]) + f32::from(IQ4[i])) { 1.0 } else { 0.0 };
        }
        code.to_bits() as u8
    }
}

/// Sums over each sub-block for given scales and offsets, with l the nearest level and e = w − ŵ.
struct Sums {
    ee: Lanes,
    el: Lanes,
    e: Lanes,
    ll: Lanes,
    l: Lanes,
}

/// 1/x, and 0 for 0.
#[inline(always)]
fn inverse(x: &Lanes) -> Lanes {
    let mut out = ZERO;
    for i in 0..LANES {
        out[i] = if x[i] == 0.0 { 0.0 } else { 1.0 / x[i] };
    }
    out
}

/// The nearest half-precision number, which may be zero.
#[inline(always)]
fn half(x: f32) -> f32 {
    let most = f16::MAX.to_f32();
    f16::from_f32(x.clamp(-most, most)).to_f32()
}

impl<C: Costs> Tile<C> {
    #[inline(always)]
    fn new(len: usize, w: &[f32], h: &[f32]) -> Self {
        let w = by_position(len, w);
        let h = C::new(len, &w, h);
        let mut tile = Tile { len, w, h, costs: ZERO, sum: ZERO };
        for j in 0..len {
            for (i, h) in tile.h.at(j).iter().enumerate() {
                tile.costs[i] += h;
                tile.sum[i] += h * tile.w[j][i];
            }
        }
        tile
    }

    /// Σ h·w·l, Σ h·l² and Σ h·l for the levels that `a` leads to.
    #[inline(always)]
    fn levels(&self, a: &Affines, snap: impl Snap) -> [Lanes; 3] {
        let inverse = inverse(&a.scale);
        let (mut xl, mut ll, mut sum) = (ZERO, ZERO, ZERO);
        for (j, w) in self.w[..self.len].iter().enumerate() {
            let h = self.h.at(j);
            for i in 0..LANES {
                let l = snap.level((w[i] - a.offset[i]) * inverse[i]);
                let hl = h[i] * l;
                xl[i] += hl * w[i];
                ll[i] += hl * l;
                sum[i] += hl;
            }
        }
        [xl, ll, sum]
    }

    #[inline(always)]
    fn sums(&self, a: &Affines, snap: impl Snap) -> Sums {
        let inverse = inverse(&a.scale);
        let mut s = Sums { ee: ZERO, el: ZERO, e: ZERO, ll: ZERO, l: ZERO };
        for (j, w) in self.w[..self.len].iter().enumerate() {
            let h = self.h.at(j);
            for i in 0..LANES {
                let l = snap.level((w[i] - a.offset[i]) * inverse[i]);
                let e = w[i] - (a.scale[i] * l + a.offset[i]);
                let (he, hl) = (h[i] * e, h[i] * l);
                s.ee[i] += he * e;
                s.el[i] += he * l;
                s.e[i] += he;
                s.ll[i] += hl * l;
                s.l[i] += hl;
            }
        }
        s
    }

    /// Σ h·e² and Σ h·e.
    #[inline(always)]
    fn losses(&self, a: &Affines, snap: impl Snap) -> [Lanes; 2] {
        let inverse = inverse(&a.scale);
        let (mut ee, mut sum) = (ZERO, ZERO);
        for (j, w) in self.w[..self.len].iter().enumerate() {
            let h = self.h.at(j);
            for i in 0..LANES {
                let l = snap.level((w[i] - a.offset[i]) * inverse[i]);
                let e = w[i] - (a.scale[i] * l + a.offset[i]);
                let he = h[i] * e;
                ee[i] += he * e;
                sum[i] += he;
            }
        }
        [ee, sum]
    }

    /// The best of `best` and what the levels that `a` leads to are fitted by; `best` comes with what it explains of Σ h·w².
    #[inline(always)]
    fn consider(&self, a: &Affines, shifted: bool, best: &mut (Lanes, Affines), snap: impl Snap) {
        let [xl, ll, l] = self.levels(a, snap);
        for i in 0..LANES {
            let (h, x) = (self.costs[i], self.sum[i]);
            let (scale, offset, explained) = if shifted {
                let determinant = ll[i] * h - l[i] * l[i];
                let scale = (xl[i] * h - x * l[i]) / determinant;
                let offset = (x * ll[i] - xl[i] * l[i]) / determinant;
                let flat = determinant <= 1e-6 * ll[i] * h || determinant.is_nan();
                // One level for all: only the offset can be fitted.
                let mean = if h > 0.0 { x / h } else { 0.0 };
                if flat { (0.0, mean, mean * x) } else { (scale, offset, scale * xl[i] + offset * x) }
            } else {
                let scale = if ll[i] > 0.0 { xl[i] / ll[i] } else { 0.0 };
                (scale, 0.0, scale * xl[i])
            };
            if explained > best.0[i] {
                best.0[i] = explained;
                best.1.scale[i] = scale;
                best.1.offset[i] = offset;
            }
        }
    }
}

/// Blocks to fit, and where they go.
struct Fit<'a> {
    w: &'a [f32],
    h: &'a [f32],
    params: &'a mut [BlockParams],
    codes: &'a mut [u8],
}

impl BlockForm {
    /// Whether [`BlockForm::fit_lanes`] fits the type.
    #[must_use]
    pub fn has_lanes(&self) -> bool {
        let scalar = matches!(
            self.kind,
            BlockType::Q4_0
                | BlockType::Q4_1
                | BlockType::Q5_0
                | BlockType::Q5_1
                | BlockType::Q8_0
                | BlockType::Q2K
                | BlockType::Q3K
                | BlockType::Q4K
                | BlockType::Q5K
                | BlockType::Q6K
                | BlockType::Iq4Nl
                | BlockType::Iq4Xs
        );
        scalar && self.sub <= LONGEST && LANES.is_multiple_of(self.subs())
    }

    /// Fits whole blocks, [`LANES`] sub-blocks of them at most, to the weights `w`, and rounds them. Errors cost `h`, one for
    /// each weight; without it, nothing is known of what the weights are multiplied by.
    ///
    /// # Panics
    /// For a type without lanes, or more blocks than lanes: a caller's bug.
    #[inline(always)]
    pub fn fit_lanes(&self, w: &[f32], h: Option<&[f32]>, params: &mut [BlockParams], codes: &mut [u8]) {
        assert!(w.len() <= LANES * self.sub && params.len() * self.len == w.len(), "whole blocks that fit the lanes");
        let fit = Fit { w, h: h.unwrap_or(&[]), params, codes };
        if self.is_uniform() {
            let (first, last) = (f32::from(self.levels[0]), f32::from(self.levels[self.levels.len() - 1]));
            let snap = Even { first, last, lowest: self.levels[0] as u8 };
            match h {
                Some(_) => self.fit_tile::<Each>(fit, snap),
                None if self.levels.len() <= FEW => self.fit_tile::<BySize>(fit, snap),
                None => self.fit_tile::<One>(fit, snap),
            }
        } else if h.is_some() {
            self.fit_tile::<Each>(fit, Uneven)
        } else {
            self.fit_tile::<One>(fit, Uneven)
        }
    }

    /// The values of the codes of one sub-block, as [`BlockForm::value`] has them.
    #[inline(always)]
    pub fn values(&self, codes: &[u8], a: Affine, out: &mut [f32]) {
        let each = out.iter_mut().zip(codes);
        if !self.is_uniform() {
            return each.for_each(|(v, &c)| *v = self.value(c, a));
        }
        let first = i32::from(self.levels[0]);
        let scaled = |c: u8| a.scale * (i32::from(c) + first) as f32;
        if self.shift == Shift::None {
            each.for_each(|(v, &c)| *v = scaled(c));
        } else {
            each.for_each(|(v, &c)| *v = scaled(c) + a.offset);
        }
    }

    #[inline(always)]
    fn fit_tile<C: Costs>(&self, Fit { w, h, params, codes }: Fit<'_>, snap: impl Snap) {
        let tile = Tile::<C>::new(self.sub, w, h);
        let own = if self.shift == Shift::None { self.scales(&tile, snap) } else { self.affines(&tile, snap) };
        let stored = match self.step {
            Step::Scaled { .. } => self.joint(&tile, &own, params, snap),
            _ => self.reals_of(&own, params),
        };
        let inverse = inverse(&stored.scale);
        // Row by row, so that reading and writing need no turning.
        for (lane, (codes, w)) in codes.chunks_mut(self.sub).zip(w.chunks(self.sub)).enumerate() {
            let (inverse, offset) = (inverse[lane], stored.offset[lane]);
            for (code, &x) in codes.iter_mut().zip(w) {
                *code = snap.code((x - offset) * inverse);
            }
        }
    }

    /// Blocks of one sub-block store its scale, and maybe its offset, rounded.
    #[inline(always)]
    fn reals_of(&self, own: &Affines, params: &mut [BlockParams]) -> Affines {
        let mut stored = Affines { scale: ZERO, offset: ZERO };
        for (i, p) in params.iter_mut().enumerate() {
            *p = BlockParams::zero();
            p.reals[0] = half(own.scale[i]);
            stored.scale[i] = p.reals[0];
            if self.shift == Shift::Real {
                p.reals[1] = half(own.offset[i]);
                stored.offset[i] = p.reals[1];
            }
        }
        stored
    }

    /// What the weight of largest magnitude may be in levels. The side with one level more comes first.
    fn starts(&self) -> &'static [f32] {
        match self.kind {
            BlockType::Q3K => &[-4.0, -3.6, -4.4, -3.2, -5.0, 3.3, 2.9, 3.8],
            BlockType::Q4_0 => &[-8.0, -7.6, -8.4, -7.2, -8.9, 7.4, 7.0, 8.0],
            BlockType::Q5_0 => &[-16.0, -15.5, -16.5, -17.2, 15.4],
            BlockType::Q6K => &[-32.0, -31.5, -32.6, 31.4],
            BlockType::Q8_0 => &[-127.5, 127.3],
            _ => &[-127.0, -117.0, -108.0, -99.0, -138.0, 113.0, 104.0, 124.0],
        }
    }

    /// The best scale of every sub-block, without offset.
    #[inline(always)]
    fn scales<C: Costs>(&self, tile: &Tile<C>, snap: impl Snap) -> Affines {
        let mut largest = ZERO;
        for w in &tile.w[..tile.len] {
            for (largest, &w) in largest.iter_mut().zip(w) {
                *largest = if w.abs() > largest.abs() { w } else { *largest };
            }
        }
        let mut best = (ZERO, Affines { scale: ZERO, offset: ZERO });
        for &start in self.starts() {
            let mut a = Affines { scale: ZERO, offset: ZERO };
            a.scale.iter_mut().zip(&largest).for_each(|(scale, largest)| *scale = largest / start);
            tile.consider(&a, false, &mut best, snap);
        }
        // The refitted scale leads to other levels, and these to another scale.
        for _ in 0..2 {
            let a = best.1;
            tile.consider(&a, false, &mut best, snap);
        }
        best.1
    }

    /// The best scale and offset of every sub-block.
    #[inline(always)]
    fn affines<C: Costs>(&self, tile: &Tile<C>, snap: impl Snap) -> Affines {
        let (mut lo, mut hi) = (tile.w[0], tile.w[0]);
        for w in &tile.w[..tile.len] {
            for i in 0..LANES {
                lo[i] = if w[i] < lo[i] { w[i] } else { lo[i] };
                hi[i] = if w[i] > hi[i] { w[i] } else { hi[i] };
            }
        }
        let last = (self.levels.len() - 1) as f32;
        let steps: &[f32] = if last < 8.0 { &[-0.2, 0.2, 0.6, 1.0, 1.4, 1.8] } else { &[-0.2, 0.5, 1.3, 2.2] };
        let mut best = (ZERO, Affines { scale: ZERO, offset: ZERO });
        for step in steps {
            // What the range leaves uncovered lies above, on both sides, or below.
            for share in [0.0, 0.5, 1.0] {
                let mut a = Affines { scale: ZERO, offset: ZERO };
                for i in 0..LANES {
                    a.scale[i] = (hi[i] - lo[i]) / (last + step);
                    a.offset[i] = lo[i] + share * ((hi[i] - lo[i]) - last * a.scale[i]);
                }
                tile.consider(&a, true, &mut best, snap);
            }
        }
        for _ in 0..2 {
            let a = best.1;
            tile.consider(&a, true, &mut best, snap);
        }
        best.1
    }

    /// What the largest scale of a block may be in integers.
    fn tops(&self) -> &'static [f32] {
        match self.kind {
            BlockType::Q2K => &[15.0, 13.3],
            BlockType::Q3K => &[-32.0],
            BlockType::Iq4Xs => &[-32.0, 31.0, -30.4],
            BlockType::Q6K => &[-128.0, 127.0],
            _ => &[63.0, 60.7],
        }
    }

    /// d, dmin and the integers of every block, fitted to the weights in turns.
    #[inline(always)]
    fn joint<C: Costs>(&self, tile: &Tile<C>, own: &Affines, params: &mut [BlockParams], snap: impl Snap) -> Affines {
        // The last turn brings little in types whose levels are few.
        let (subs, turns) = (self.subs(), if self.levels.len() <= FEW { TURNS - 1 } else { TURNS });
        let (mut least, mut kept) = ([f32::INFINITY; LANES], [BlockParams::zero(); LANES]);
        let mut stored = Affines { scale: ZERO, offset: ZERO };
        for &top in self.tops() {
            for (block, p) in params.iter_mut().enumerate() {
                *p = self.first_reals(own, &tile.costs, block * subs, top);
            }
            let mut before = [f32::INFINITY; LANES];
            for turn in 0..turns {
                let at = if turn == 0 { *own } else { self.affines_of(params) };
                self.integers_near(tile, &at, params, snap);
                let now = self.affines_of(params);
                let sums = tile.sums(&now, snap);
                for (block, p) in params.iter_mut().enumerate() {
                    let lanes = block * subs..(block + 1) * subs;
                    let loss: f32 = sums.ee[lanes.clone()].iter().sum();
                    if loss < least[block] {
                        (least[block], kept[block]) = (loss, *p);
                        stored.scale[lanes.clone()].copy_from_slice(&now.scale[lanes.clone()]);
                        stored.offset[lanes.clone()].copy_from_slice(&now.offset[lanes.clone()]);
                    }
                    if loss < before[block] {
                        before[block] = loss;
                        self.improve(p, &sums, &tile.costs, lanes.start);
                    }
                }
            }
        }
        params.copy_from_slice(&kept[..params.len()]);
        stored
    }

    /// d for the largest scale of a block to be `top`, and a dmin that reaches its largest offset on the side where most of
    /// the offsets' weight lies.
    #[inline(always)]
    fn first_reals(&self, own: &Affines, costs: &Lanes, lane: usize, top: f32) -> BlockParams {
        let (mut biggest, mut pull) = (0.0f32, 0.0);
        let subs = lane..lane + self.subs();
        for ((&scale, offset), cost) in own.scale[subs.clone()].iter().zip(&own.offset[subs.clone()]).zip(&costs[subs])
        {
            biggest = if scale.abs() > biggest.abs() { scale } else { biggest };
            pull += offset * cost;
        }
        let mut p = BlockParams::zero();
        p.reals[0] = half(biggest / top);
        if let Shift::Scaled { bits } = self.shift {
            let mut reach = 0.0f32;
            for i in lane..lane + self.subs() {
                let o = own.offset[i];
                reach = if o * pull > 0.0 && o.abs() > reach { o.abs() } else { reach };
            }
            p.reals[1] = half((reach / ((1u32 << bits) - 1) as f32).copysign(-pull));
        }
        p
    }

    /// Scale and offset of every sub-block.
    #[inline(always)]
    fn affines_of(&self, params: &[BlockParams]) -> Affines {
        let mut a = Affines { scale: ZERO, offset: ZERO };
        for (block, p) in params.iter().enumerate() {
            for sub in 0..self.subs() {
                let own = self.affine(p, sub);
                a.scale[block * self.subs() + sub] = own.scale;
                a.offset[block * self.subs() + sub] = own.offset;
            }
        }
        a
    }

    /// The integers near scales and offsets `at` with the smallest loss under d and dmin.
    #[inline(always)]
    fn integers_near<C: Costs>(&self, tile: &Tile<C>, at: &Affines, params: &mut [BlockParams], snap: impl Snap) {
        let Step::Scaled { bias, .. } = self.step else { return };
        let (bias, most) = (f32::from(bias), f32::from(self.max_integer(0)));
        let shifted = matches!(self.shift, Shift::Scaled { .. });
        let most_offset = if shifted { f32::from(self.max_integer(self.scale_integers())) } else { 0.0 };
        let (mut d, mut dmin) = (ZERO, ZERO);
        for (block, p) in params.iter().enumerate() {
            for sub in 0..self.subs() {
                d[block * self.subs() + sub] = p.reals[0];
                dmin[block * self.subs() + sub] = p.reals[1];
            }
        }
        let (per_d, per_dmin) = (inverse(&d), inverse(&dmin));
        let (mut least, mut scales, mut offsets) = ([f32::INFINITY; LANES], ZERO, ZERO);
        for step in [-1.0, 0.0, 1.0] {
            let (mut s, mut o, mut wanted) = (ZERO, ZERO, at.offset);
            for i in 0..LANES {
                s[i] = whole(whole(at.scale[i] * per_d[i] + bias, most) + step, most);
            }
            // The offset that suits the scale, then the one that suits the levels this offset leads to.
            for _ in 0..if shifted { 2 } else { 1 } {
                let mut a = Affines { scale: ZERO, offset: ZERO };
                for i in 0..LANES {
                    o[i] = whole(-wanted[i] * per_dmin[i], most_offset);
                    a.scale[i] = d[i] * (s[i] - bias);
                    a.offset[i] = -(dmin[i] * o[i]);
                }
                let [ee, e] = tile.losses(&a, snap);
                for i in 0..LANES {
                    let better = ee[i] < least[i];
                    least[i] = if better { ee[i] } else { least[i] };
                    scales[i] = if better { s[i] } else { scales[i] };
                    offsets[i] = if better { o[i] } else { offsets[i] };
                    wanted[i] = if tile.costs[i] > 0.0 { a.offset[i] + e[i] / tile.costs[i] } else { a.offset[i] };
                }
            }
        }
        for (block, p) in params.iter_mut().enumerate() {
            for sub in 0..self.subs() {
                p.integers[sub] = scales[block * self.subs() + sub] as u8;
                if shifted {
                    p.integers[self.scale_integers() + sub] = offsets[block * self.subs() + sub] as u8;
                }
            }
        }
    }

    /// d and dmin at the minimum of the loss for the levels and integers at hand, rounded.
    #[inline(always)]
    fn improve(&self, p: &mut BlockParams, sums: &Sums, costs: &Lanes, lane: usize) {
        let Step::Scaled { bias, .. } = self.step else { return };
        let [mut dd, mut dm, mut mm, mut rd, mut rm] = [0.0f64; 5];
        for sub in 0..self.subs() {
            let [ll, l, h, el, e] =
                [sums.ll, sums.l, *costs, sums.el, sums.e].map(|lanes| f64::from(lanes[lane + sub]));
            let s = f64::from(p.integers[sub]) - f64::from(bias);
            let o = match self.shift {
                Shift::Scaled { .. } => -f64::from(p.integers[self.scale_integers() + sub]),
                _ => 0.0,
            };
            dd += s * s * ll;
            dm += s * o * l;
            mm += o * o * h;
            rd += s * el;
            rm += o * e;
        }
        let moved = |x: f32, by: f64| half((f64::from(x) + by) as f32);
        let [d, dmin] = p.reals;
        let determinant = dd * mm - dm * dm;
        if determinant > 1e-9 * dd * mm && mm > 0.0 {
            p.reals = [moved(d, (rd * mm - rm * dm) / determinant), moved(dmin, (rm * dd - rd * dm) / determinant)];
        } else if dd > 0.0 {
            p.reals[0] = moved(d, rd / dd);
        }
    }
}

/// The whole number from 0 to `most` nearest to `x`.
#[inline(always)]
fn whole(x: f32, most: f32) -> f32 {
    Even { first: 0.0, last: most, lowest: 0 }.level(x)
}

#[cfg(test)]
mod tests;

//! Blocks fitted and rounded side by side: thirty-two sub-blocks at a time, one in each lane of a vector; of sub-blocks longer than
//! that, their parts of thirty-two weights, whose sums are added up over neighbouring lanes.
//!
//! The same two steps as in [`BlockForm::fit`] — every sub-block's own scale and offset, then d, dmin and the integers
//! fitted to the weights in turns — with fewer starting points, and with every sum taken weight by weight, so that a lane
//! computes the same bits whatever instructions carry it. This is the definition; kernels instantiate it per instruction
//! set, where each loop over lanes becomes one instruction or two. Products are added without being rounded before: one
//! instruction where there is one for it, and the same bits where there is none.

mod costs;
mod joint;
mod own;
mod rows;
mod snap;

use super::{Affine, BlockForm, BlockType, Shift, Step};
use costs::{BySize, Costs, Each, One};
use snap::{DoubledE2M1, Even, Levels, Signs, Snap, Uneven, Unlimited};

/// Lanes; a multiple of those that any block fitted here takes.
pub const LANES: usize = 32;
/// Weights of a lane.
const SHORT: usize = 16;
const LONGEST: usize = 32;
/// Turns of integers and reals in a joint fit.
const TURNS: usize = 3;

/// Levels that are few.
const FEW: usize = 8;

/// A number for each lane.
type Lanes = [f32; LANES];
const ZERO: Lanes = [0.0; LANES];

/// Numbers by position in the sub-block, then lane.
pub type Turned = [[f32; LANES]; LONGEST];

/// Numbers of the weights of whole blocks, one for each, as they lie and turned. Lanes without a sub-block hold zeros.
#[derive(Clone, Copy)]
pub struct Sides<'a> {
    /// Row-major, as in the matrix.
    pub rows: &'a [f32],
    /// The same by position, then lane.
    pub turned: &'a Turned,
}

/// Weights and costs by position in the sub-block, then lane.
struct Tile<'a, C> {
    w: &'a [Lanes],
    h: C,
    /// Σ h.
    costs: Lanes,
    /// Σ h·w.
    sum: Lanes,
    /// The least and the largest weights.
    range: [Lanes; 2],
}

/// Scales and offsets.
#[derive(Clone, Copy)]
struct Affines {
    scale: Lanes,
    offset: Lanes,
}

const NOTHING: Affines = Affines { scale: ZERO, offset: ZERO };

/// Sums over each sub-block for given scales and offsets, with l the nearest level and e = w − ŵ.
struct Sums {
    ee: Lanes,
    el: Lanes,
    e: Lanes,
    ll: Lanes,
    l: Lanes,
}

// Divisions stand before the choices about them below, because choices around a division become branches, one for each lane.

/// 1/x, and 0 for 0 and what is too small to have an inverse.
#[inline(always)]
fn inverse(x: &Lanes) -> Lanes {
    let mut out = ZERO;
    for i in 0..LANES {
        let inverse = 1.0 / x[i];
        out[i] = if x[i].abs() < f32::MIN_POSITIVE { 0.0 } else { inverse };
    }
    out
}

/// The nearest half-precision number, which may be zero, in arithmetic that vectors have too.
#[inline(always)]
fn half(x: f32) -> f32 {
    /// The largest.
    const MOST: f32 = 65_504.0;
    /// The smallest that is not subnormal: 2⁻¹⁴.
    const NORMAL: f32 = 1.0 / 16_384.0;
    let size = if x.abs() < MOST { x.abs() } else { MOST };
    // Thirteen bits go, ties to even. Below, numbers lie 2⁻²⁴ apart, as those of f32 do from a half to one.
    let bits = size.to_bits();
    let normal = f32::from_bits((bits + 0xfff + (bits >> 13 & 1)) & !0x1fff);
    let small = (size + 0.5) - 0.5;
    (if size < NORMAL { small } else { normal }).copysign(x)
}

impl<'a, 'h, C: Costs<'h>> Tile<'a, C> {
    #[inline(always)]
    fn new(len: usize, w: &'a Turned, h: &'h Turned) -> Self {
        let w = &w[..len];
        let h = C::new(w, h);
        let (mut costs, mut sum, [mut lo, mut hi]) = (ZERO, ZERO, [w[0]; 2]);
        for (j, w) in w.iter().enumerate() {
            let h = h.at(j);
            for i in 0..LANES {
                costs[i] += h[i];
                sum[i] = h[i].mul_add(w[i], sum[i]);
                lo[i] = if w[i] < lo[i] { w[i] } else { lo[i] };
                hi[i] = if w[i] > hi[i] { w[i] } else { hi[i] };
            }
        }
        Tile { w, h, costs, sum, range: [lo, hi] }
    }

    /// Sums under `a`, whose offsets are zero unless `SHIFTED`; then e and l are not summed.
    #[inline(always)]
    fn sums<const SHIFTED: bool>(&self, a: &Affines, snap: impl Snap) -> Sums {
        let inverse = inverse(&a.scale);
        let mut s = Sums { ee: ZERO, el: ZERO, e: ZERO, ll: ZERO, l: ZERO };
        for (j, w) in self.w.iter().enumerate() {
            let h = self.h.at(j);
            for i in 0..LANES {
                let (l, e) = level_and_error::<SHIFTED>(w[i], [a.scale[i], a.offset[i], inverse[i]], snap);
                let (he, hl) = (h[i] * e, h[i] * l);
                s.ee[i] = he.mul_add(e, s.ee[i]);
                s.el[i] = he.mul_add(l, s.el[i]);
                s.ll[i] = hl.mul_add(l, s.ll[i]);
                if SHIFTED {
                    s.e[i] += he;
                    s.l[i] += hl;
                }
            }
        }
        s
    }

    /// Σ h·e² and, if `SHIFTED`, Σ h·e.
    #[inline(always)]
    fn losses<const SHIFTED: bool>(&self, a: &Affines, snap: impl Snap) -> [Lanes; 2] {
        let inverse = inverse(&a.scale);
        let (mut ee, mut sum) = (ZERO, ZERO);
        for (j, w) in self.w.iter().enumerate() {
            let h = self.h.at(j);
            for i in 0..LANES {
                let (_, e) = level_and_error::<SHIFTED>(w[i], [a.scale[i], a.offset[i], inverse[i]], snap);
                let he = h[i] * e;
                ee[i] = he.mul_add(e, ee[i]);
                if SHIFTED {
                    sum[i] += he;
                }
            }
        }
        [ee, sum]
    }
}

/// The level nearest to `w`, and w − ŵ.
#[inline(always)]
fn level_and_error<const SHIFTED: bool>(w: f32, [scale, offset, inverse]: [f32; 3], snap: impl Levels) -> (f32, f32) {
    if SHIFTED {
        let l = snap.level((w - offset) * inverse);
        (l, w - scale.mul_add(l, offset))
    } else {
        let l = snap.level_of(w, inverse);
        (l, (-scale).mul_add(l, w))
    }
}

/// Numbers of sub-blocks of `len` by position, then lane.
#[inline(always)]
pub fn turn(len: usize, rows: &[f32], turned: &mut Turned) {
    *turned = [ZERO; LONGEST];
    for (lane, rows) in rows.chunks(len).enumerate() {
        turned.iter_mut().zip(rows).for_each(|(to, &x)| to[lane] = x);
    }
}

/// Where blocks go: block after block, as a [`Quantized`](crate::Quantized) holds them.
#[derive(Debug)]
pub struct Fitted<'a> {
    /// Real numbers, [so many](BlockForm::reals) of each block.
    pub reals: &'a mut [f32],
    /// Integers, [so many](BlockForm::integers) of each block.
    pub integers: &'a mut [u8],
    /// A code for each weight.
    pub codes: &'a mut [u8],
}

impl<'a> Fitted<'a> {
    /// Takes the first `blocks` blocks off.
    ///
    /// # Panics
    /// Where there are fewer.
    #[inline(always)]
    pub fn take(&mut self, form: &BlockForm, blocks: usize) -> Fitted<'a> {
        let (reals, rest_reals) = std::mem::take(&mut self.reals).split_at_mut(blocks * form.reals());
        let (integers, rest_integers) = std::mem::take(&mut self.integers).split_at_mut(blocks * form.integers());
        let (codes, rest_codes) = std::mem::take(&mut self.codes).split_at_mut(blocks * form.len);
        *self = Fitted { reals: rest_reals, integers: rest_integers, codes: rest_codes };
        Fitted { reals, integers, codes }
    }

    /// Whether there is exactly room for `blocks`.
    #[must_use]
    #[inline(always)]
    pub fn holds(&self, form: &BlockForm, blocks: usize) -> bool {
        let lengths = [self.reals.len(), self.integers.len(), self.codes.len()];
        lengths == [form.reals(), form.integers(), form.len].map(|each| each * blocks)
    }
}

impl BlockForm {
    /// Whether [`BlockForm::fit_lanes`] fits the type.
    #[must_use]
    pub fn has_lanes(&self) -> bool {
        matches!(
            self.kind,
            BlockType::Q1_0
                | BlockType::Q2_0
                | BlockType::Q4_0
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
                | BlockType::Tq1_0
                | BlockType::Tq2_0
                | BlockType::Mxfp4
        )
    }

    /// Whether errors of large weights cost more where nothing is known of the inputs.
    fn weighs_by_size(&self) -> bool {
        self.is_uniform() && self.levels.len() <= 16 && matches!(self.step, Step::Scaled { .. })
    }

    /// Weights of a lane: a sub-block, or a part of one.
    #[must_use]
    #[inline]
    pub const fn lane(&self) -> usize {
        if self.sub < LONGEST { self.sub } else { LONGEST }
    }

    /// Neighbouring lanes with one scale.
    const fn lanes_of_a_scale(&self) -> usize {
        self.sub / self.lane()
    }

    /// Fits whole blocks, [`LANES`] [lanes](BlockForm::lane) of them at most, to the weights `w`, and rounds them. Errors cost `h`, one for
    /// each weight; without it, nothing is known of what the weights are multiplied by. Returns Σ h(w − ŵ)² and Σ h·w², where h
    /// is 1 without costs.
    ///
    /// # Panics
    /// For a type without lanes, or more blocks than lanes: a caller's bug.
    #[inline(always)]
    pub fn fit_lanes(&self, w: &[f32], h: Option<&[f32]>, to: Fitted<'_>) -> [f64; 2] {
        let mut turned = [[ZERO; LONGEST]; 2];
        turn(self.lane(), w, &mut turned[0]);
        if let Some(h) = h {
            turn(self.lane(), h, &mut turned[1]);
        }
        let [w, h] = [(w, &turned[0]), (h.unwrap_or(&[]), &turned[1])].map(|(rows, turned)| Sides { rows, turned });
        self.fit_turned(w, (!h.rows.is_empty()).then_some(h), to)
    }

    /// [`BlockForm::fit_lanes`] of what is [turned](turn) already.
    ///
    /// # Panics
    /// As that.
    #[inline(always)]
    pub fn fit_turned(&self, w: Sides<'_>, h: Option<Sides<'_>>, to: Fitted<'_>) -> [f64; 2] {
        let len = w.rows.len();
        assert!(len <= LANES * self.lane() && len.is_multiple_of(self.len), "whole blocks that fit the lanes");
        assert!(to.holds(self, len / self.len) && h.is_none_or(|h| h.rows.len() == len), "room and costs for them");
        let even = Even::new(f32::from(self.levels[0]), f32::from(self.levels[self.levels.len() - 1]));
        match (self.kind, h) {
            (BlockType::Q1_0, Some(_)) => self.fit_plain::<Each<'_>>(w, h, to, Signs),
            (BlockType::Q1_0, None) => self.fit_plain::<One>(w, h, to, Signs),
            (BlockType::Mxfp4, Some(_)) => self.fit_plain::<Each<'_>>(w, h, to, DoubledE2M1),
            (BlockType::Mxfp4, None) => self.fit_plain::<One>(w, h, to, DoubledE2M1),
            (_, Some(_)) if self.is_uniform() => self.fit_tile::<Each<'_>>(w, h, to, even),
            (_, None) if self.weighs_by_size() => self.fit_tile::<BySize>(w, h, to, even),
            (_, None) if self.is_uniform() => self.fit_tile::<One>(w, h, to, even),
            (_, Some(_)) => self.fit_tile::<Each<'_>>(w, h, to, Uneven),
            (_, None) => self.fit_tile::<One>(w, h, to, Uneven),
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
    fn fit_tile<'a, C: Costs<'a>>(
        &self,
        w: Sides<'a>,
        h: Option<Sides<'a>>,
        to: Fitted<'_>,
        snap: impl Snap,
    ) -> [f64; 2] {
        let tile = Tile::<C>::new(self.lane(), w.turned, h.map_or(w.turned, |h| h.turned));
        let own =
            if self.shift == Shift::None { own::scales(self, &tile, snap) } else { own::affines(self, &tile, snap) };
        let stored = match (self.step, self.shift) {
            (Step::Scaled { .. }, Shift::None) => {
                joint::fit::<C, false>(self, &tile, &own, (to.reals, to.integers), snap)
            }
            (Step::Scaled { .. }, _) => joint::fit::<C, true>(self, &tile, &own, (to.reals, to.integers), snap),
            _ => self.reals_of(&own, to.reals),
        };
        let h = h.map(|h| h.rows);
        match (self.sub, self.shift) {
            (SHORT, Shift::None) => rows::round::<SHORT, false>(w.rows, h, &stored, to.codes, snap),
            (SHORT, _) => rows::round::<SHORT, true>(w.rows, h, &stored, to.codes, snap),
            (_, Shift::None) => rows::round::<LONGEST, false>(w.rows, h, &stored, to.codes, snap),
            _ => rows::round::<LONGEST, true>(w.rows, h, &stored, to.codes, snap),
        }
    }

    /// As [`BlockForm::fit_tile`] for the two types whose scale is not searched from starting points.
    #[inline(always)]
    fn fit_plain<'a, C: Costs<'a>>(
        &self,
        w: Sides<'a>,
        h: Option<Sides<'a>>,
        to: Fitted<'_>,
        snap: impl Snap,
    ) -> [f64; 2] {
        let tile = Tile::<C>::new(self.lane(), w.turned, h.map_or(w.turned, |h| h.turned));
        let stored = if self.step == Step::Exponent {
            own::exponents(&tile, to.integers, snap)
        } else {
            self.reals_of(&own::sizes(self, &tile), to.reals)
        };
        rows::round::<LONGEST, false>(w.rows, h.map(|h| h.rows), &stored, to.codes, snap)
    }

    /// Blocks of one sub-block store its scale, and maybe its offset, rounded.
    #[inline(always)]
    fn reals_of(&self, own: &Affines, reals: &mut [f32]) -> Affines {
        let mut stored = NOTHING;
        for i in 0..LANES {
            stored.scale[i] = half(own.scale[i]);
        }
        if self.shift == Shift::Real {
            for i in 0..LANES {
                stored.offset[i] = half(own.offset[i]);
            }
            let mut pairs = [0.0; 2 * LANES];
            for i in 0..LANES {
                pairs[2 * i] = stored.scale[i];
                pairs[2 * i + 1] = stored.offset[i];
            }
            reals.copy_from_slice(&pairs[..reals.len()]);
        } else {
            reals.iter_mut().zip(stored.scale.iter().step_by(self.lanes_of_a_scale())).for_each(|(to, &d)| *to = d);
        }
        stored
    }
}

/// In every lane the sum over the `many` neighbours with one scale: 1, 2, 4 or 8.
#[inline(always)]
fn in_common(many: usize, mut x: Lanes) -> Lanes {
    if many >= 2 {
        x = std::array::from_fn(|i| x[i] + x[i ^ 1]);
    }
    if many >= 4 {
        x = std::array::from_fn(|i| x[i] + x[i ^ 2]);
    }
    if many >= 8 {
        x = std::array::from_fn(|i| x[i] + x[i ^ 4]);
    }
    x
}

/// The whole number from 0 to `most` nearest to `x`.
#[inline(always)]
fn whole(x: f32, most: f32) -> f32 {
    Even::new(0.0, most).level(x)
}

#[cfg(test)]
mod tests;

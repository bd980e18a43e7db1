//! d, dmin and the integers of super-blocks, fitted to the weights in turns from every sub-block's own scale and offset.

use super::{Affines, BlockForm, BlockType, Costs, FEW, LANES, Lanes, NOTHING, Shift, Snap, Step, Sums, TURNS, Tile};
use super::{ZERO, half, inverse, whole};

/// What blocks store, as numbers: d and dmin in every lane of a block, and the integers of each sub-block.
#[derive(Clone, Copy)]
struct Stored {
    d: Lanes,
    dmin: Lanes,
    s: Lanes,
    o: Lanes,
}

/// What the integers may be.
#[derive(Clone, Copy)]
struct Limits {
    /// Sub-blocks of a block.
    subs: usize,
    bias: f32,
    scale: f32,
    offset: f32,
}

impl Limits {
    #[inline(always)]
    fn of(form: &BlockForm) -> Self {
        let bias = if let Step::Scaled { bias, .. } = form.step { f32::from(bias) } else { 0.0 };
        let shifted = matches!(form.shift, Shift::Scaled { .. });
        let offset = if shifted { f32::from(form.max_integer(form.scale_integers())) } else { 0.0 };
        Limits { subs: form.subs(), bias, scale: f32::from(form.max_integer(0)), offset }
    }
}

/// Fits the reals and integers of the tile's blocks and returns the scales and offsets they stand for.
#[inline(always)]
pub(super) fn fit<'a, C: Costs<'a>, const SHIFTED: bool>(
    form: &BlockForm,
    tile: &Tile<'_, C>,
    own: &Affines,
    (reals, integers): (&mut [f32], &mut [u8]),
    snap: impl Snap,
) -> Affines {
    let limits = Limits::of(form);
    // The last turn brings little in types whose levels are few.
    let turns = if form.levels.len() <= FEW { TURNS - 1 } else { TURNS };
    let mut kept = Stored { d: ZERO, dmin: ZERO, s: ZERO, o: ZERO };
    let mut least = [f32::INFINITY; LANES];
    for &top in tops(form) {
        let mut now = first_reals::<SHIFTED>(&limits, own, &tile.costs, top);
        let mut before = [f32::INFINITY; LANES];
        for turn in 0..turns {
            let at = if turn == 0 { *own } else { now.affines::<SHIFTED>(&limits) };
            now.integers_near::<C, SHIFTED>(&limits, tile, &at, snap);
            let sums = tile.sums::<SHIFTED>(&now.affines::<SHIFTED>(&limits), snap);
            let loss = by_block(limits.subs, &sums.ee);
            let better: [bool; LANES] = std::array::from_fn(|i| loss[i] < least[i]);
            kept.take(&now, &better);
            least = chosen(&better, &loss, &least);
            if turn + 1 < turns {
                let falls: [bool; LANES] = std::array::from_fn(|i| loss[i] < before[i]);
                before = chosen(&falls, &loss, &before);
                now.improve::<SHIFTED>(&limits, &sums, &tile.costs, &falls);
            }
        }
    }
    let blocks = reals.chunks_exact_mut(form.reals()).zip(integers.chunks_exact_mut(form.integers()));
    for (block, (reals, integers)) in blocks.enumerate() {
        let lane = block * limits.subs;
        reals[0] = kept.d[lane];
        if SHIFTED {
            reals[1] = kept.dmin[lane];
        }
        for sub in 0..limits.subs {
            integers[sub] = kept.s[lane + sub] as u8;
            if SHIFTED {
                integers[limits.subs + sub] = kept.o[lane + sub] as u8;
            }
        }
    }
    kept.affines::<SHIFTED>(&limits)
}

/// Lanes of `a` where `which` says so, and of `b` else.
#[inline(always)]
fn chosen(which: &[bool; LANES], a: &Lanes, b: &Lanes) -> Lanes {
    std::array::from_fn(|i| if which[i] { a[i] } else { b[i] })
}

/// In every lane the sum over its block.
#[inline(always)]
fn by_block(subs: usize, x: &Lanes) -> Lanes {
    let mut all = ZERO;
    for (all, x) in all.chunks_exact_mut(subs).zip(x.chunks_exact(subs)) {
        all.fill(x.iter().sum());
    }
    all
}

/// What the largest scale of a block may be in integers.
fn tops(form: &BlockForm) -> &'static [f32] {
    match form.kind {
        BlockType::Q2K => &[15.0, 13.3],
        BlockType::Q3K => &[-32.0],
        BlockType::Iq4Xs => &[-32.0, 31.0, -30.4],
        BlockType::Q6K => &[-128.0, 127.0],
        _ => &[63.0, 60.7],
    }
}

/// d for the largest scale of a block to be `top`, and a dmin that reaches its largest offset on the side where most of
/// the offsets' weight lies.
#[inline(always)]
fn first_reals<const SHIFTED: bool>(limits: &Limits, own: &Affines, costs: &Lanes, top: f32) -> Stored {
    let mut now = Stored { d: ZERO, dmin: ZERO, s: ZERO, o: ZERO };
    for lane in (0..LANES).step_by(limits.subs) {
        let subs = lane..lane + limits.subs;
        let (mut biggest, mut pull, mut reach) = (0.0f32, 0.0, 0.0f32);
        for (&scale, (offset, cost)) in
            own.scale[subs.clone()].iter().zip(own.offset[subs.clone()].iter().zip(&costs[subs.clone()]))
        {
            biggest = if scale.abs() > biggest.abs() { scale } else { biggest };
            pull += offset * cost;
        }
        now.d[subs.clone()].fill(half(biggest / top));
        if SHIFTED {
            for o in &own.offset[subs.clone()] {
                reach = if o * pull > 0.0 && o.abs() > reach { o.abs() } else { reach };
            }
            now.dmin[subs].fill(half((reach / limits.offset).copysign(-pull)));
        }
    }
    now
}

impl Stored {
    /// Scale and offset of every sub-block.
    #[inline(always)]
    fn affines<const SHIFTED: bool>(&self, limits: &Limits) -> Affines {
        let mut a = NOTHING;
        for i in 0..LANES {
            a.scale[i] = self.d[i] * (self.s[i] - limits.bias);
            if SHIFTED {
                a.offset[i] = -(self.dmin[i] * self.o[i]);
            }
        }
        a
    }

    /// Takes over what `which` says.
    #[inline(always)]
    fn take(&mut self, other: &Stored, which: &[bool; LANES]) {
        self.d = chosen(which, &other.d, &self.d);
        self.dmin = chosen(which, &other.dmin, &self.dmin);
        self.s = chosen(which, &other.s, &self.s);
        self.o = chosen(which, &other.o, &self.o);
    }

    /// The integers near scales and offsets `at` with the smallest loss under d and dmin.
    #[inline(always)]
    fn integers_near<'a, C: Costs<'a>, const SHIFTED: bool>(
        &mut self,
        limits: &Limits,
        tile: &Tile<'_, C>,
        at: &Affines,
        snap: impl Snap,
    ) {
        let (per_d, per_dmin) = (inverse(&self.d), inverse(&self.dmin));
        let (mut least, mut best) = ([f32::INFINITY; LANES], *self);
        for step in [-1.0, 0.0, 1.0] {
            let mut wanted = at.offset;
            for (s, (scale, per_d)) in self.s.iter_mut().zip(at.scale.iter().zip(&per_d)) {
                *s = whole(whole(scale * per_d + limits.bias, limits.scale) + step, limits.scale);
            }
            // The offset that suits the scale, then the one that suits the levels this offset leads to.
            for _ in 0..if SHIFTED { 2 } else { 1 } {
                if SHIFTED {
                    for i in 0..LANES {
                        self.o[i] = whole(-wanted[i] * per_dmin[i], limits.offset);
                    }
                }
                let a = self.affines::<SHIFTED>(limits);
                let [ee, e] = tile.losses::<SHIFTED>(&a, snap);
                let better: [bool; LANES] = std::array::from_fn(|i| ee[i] < least[i]);
                least = chosen(&better, &ee, &least);
                best.s = chosen(&better, &self.s, &best.s);
                best.o = chosen(&better, &self.o, &best.o);
                for i in 0..LANES {
                    let by = e[i] / tile.costs[i];
                    wanted[i] = a.offset[i] + if tile.costs[i] > 0.0 { by } else { 0.0 };
                }
            }
        }
        *self = best;
    }

    /// d and dmin at the minimum of the loss for the levels and integers at hand, rounded, in the blocks that `which` names.
    #[inline(always)]
    fn improve<const SHIFTED: bool>(&mut self, limits: &Limits, sums: &Sums, costs: &Lanes, which: &[bool; LANES]) {
        let mut terms = [[0.0f64; LANES]; 5];
        for i in 0..LANES {
            let [ll, l, h, el, e] = [sums.ll[i], sums.l[i], costs[i], sums.el[i], sums.e[i]].map(f64::from);
            let s = f64::from(self.s[i] - limits.bias);
            terms[0][i] = s * s * ll;
            terms[1][i] = s * el;
            if SHIFTED {
                let o = -f64::from(self.o[i]);
                terms[2][i] = s * o * l;
                terms[3][i] = o * o * h;
                terms[4][i] = o * e;
            }
        }
        for lane in (0..LANES).step_by(limits.subs) {
            let lanes = lane..lane + limits.subs;
            let [dd, rd, dm, mm, rm] =
                [0, 1, 2, 3, 4].map(|k: usize| terms[k][lanes.clone()].iter().fold(0.0, |sum, x| sum + x));
            let moved = |x: f32, by: f64| half((f64::from(x) + by) as f32);
            let (mut d, mut dmin) = (self.d[lane], self.dmin[lane]);
            let determinant = dd * mm - dm * dm;
            if SHIFTED && determinant > 1e-9 * dd * mm && mm > 0.0 {
                (d, dmin) =
                    (moved(d, (rd * mm - rm * dm) / determinant), moved(dmin, (rm * dd - rd * dm) / determinant));
            } else if dd > 0.0 {
                d = moved(d, rd / dd);
            }
            if which[lane] {
                self.d[lanes.clone()].fill(d);
                self.dmin[lanes].fill(dmin);
            }
        }
    }
}

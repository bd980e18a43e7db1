//! Every sub-block's own scale and offset: starting points, each refitted to the levels it leads to, and the best of them.

use super::{
    Affines, BlockForm, BlockType, Costs, LANES, Lanes, Levels, NOTHING, Snap, Tile, Unlimited, ZERO, in_common,
    inverse,
};

/// The best scales and offsets so far, and what they explain of Σ h·w².
struct Best {
    explained: Lanes,
    at: Affines,
    /// The mean of the weights, which is the best offset where all weights are at one level.
    mean: Lanes,
}

impl Best {
    #[inline(always)]
    fn new<'a, C: Costs<'a>>(tile: &Tile<'_, C>) -> Self {
        let mut mean = ZERO;
        for (mean, (sum, costs)) in mean.iter_mut().zip(tile.sum.iter().zip(&tile.costs)) {
            let quotient = sum / costs;
            *mean = if *costs > 0.0 { quotient } else { 0.0 };
        }
        Best { explained: ZERO, at: NOTHING, mean }
    }
}

/// The best scale of every sub-block, without offset.
#[inline(always)]
pub(super) fn scales<'a, C: Costs<'a>>(form: &BlockForm, tile: &Tile<'_, C>, snap: impl Snap) -> Affines {
    match form.lanes_of_a_scale() {
        1 => search::<C, false>(form, tile, &largest(&tile.range), snap),
        many => search::<C, true>(form, tile, &deviations(tile, many), snap),
    }
}

/// The best scale from starting points that count in `unit`; `JOINED`, if several lanes have one in common.
#[inline(always)]
fn search<'a, C: Costs<'a>, const JOINED: bool>(
    form: &BlockForm,
    tile: &Tile<'_, C>,
    unit: &Lanes,
    snap: impl Snap,
) -> Affines {
    let many = form.lanes_of_a_scale();
    let per_unit = inverse(unit);
    let mut best = Best::new(tile);
    let (starts, refits) = starts(form);
    for &start in starts {
        let mut inverse = ZERO;
        for i in 0..LANES {
            inverse[i] = start * per_unit[i];
        }
        tile.consider::<false, JOINED>([&inverse, &ZERO], many, &mut best, snap);
    }
    // The refitted scale leads to other levels, and these to another scale.
    for _ in 0..refits {
        let inverse = inverse(&best.at.scale);
        tile.consider::<false, JOINED>([&inverse, &ZERO], many, &mut best, snap);
    }
    best.at
}

/// The weights of largest magnitude.
#[inline(always)]
fn largest([lo, hi]: &[Lanes; 2]) -> Lanes {
    let mut largest = ZERO;
    for i in 0..LANES {
        largest[i] = if hi[i] > -lo[i] { hi[i] } else { lo[i] };
    }
    largest
}

/// Root mean squares.
#[inline(always)]
fn deviations<'a, C: Costs<'a>>(tile: &Tile<'_, C>, many: usize) -> Lanes {
    let mut squares = ZERO;
    for (j, w) in tile.w.iter().enumerate() {
        let h = tile.h.at(j);
        for i in 0..LANES {
            squares[i] = (h[i] * w[i]).mul_add(w[i], squares[i]);
        }
    }
    let (mut mean, costs) = (in_common(many, squares), in_common(many, tile.costs));
    for i in 0..LANES {
        let quotient = mean[i] / costs[i];
        mean[i] = if costs[i] > 0.0 { quotient } else { 0.0 }.sqrt();
    }
    mean
}

/// The mean magnitudes, which are best for signs.
#[inline(always)]
pub(super) fn sizes<'a, C: Costs<'a>>(form: &BlockForm, tile: &Tile<'_, C>) -> Affines {
    let mut sizes = ZERO;
    for (j, w) in tile.w.iter().enumerate() {
        let h = tile.h.at(j);
        for i in 0..LANES {
            sizes[i] = h[i].mul_add(w[i].abs(), sizes[i]);
        }
    }
    let [sizes, costs] = [sizes, tile.costs].map(|x| in_common(form.lanes_of_a_scale(), x));
    let mut means = NOTHING;
    for i in 0..LANES {
        let mean = sizes[i] / costs[i];
        means.scale[i] = if costs[i] > 0.0 { mean } else { 0.0 };
    }
    means
}

/// The best of the exponents around that of the largest weight, which are written to `integers`, as scales.
#[inline(always)]
pub(super) fn exponents<'a, C: Costs<'a>>(tile: &Tile<'_, C>, integers: &mut [u8], snap: impl Snap) -> Affines {
    /// The largest exponent stored, which stands for 2¹²⁶.
    const MOST: i32 = 254;
    let largest = largest(&tile.range);
    let mut top = [0i32; LANES];
    for i in 0..LANES {
        // The least power of two that twelve times is not below the largest weight; stored exponents exceed theirs by 128.
        let bits = (largest[i].abs() / 12.0).to_bits() as i32;
        let up = if bits & 0x7f_ffff != 0 { 2 } else { 1 };
        top[i] = if bits == 0 { 0 } else { (bits >> 23) + up };
    }
    let (mut least, mut best, mut at) = ([f32::INFINITY; LANES], [0i32; LANES], NOTHING);
    for step in [-1, 0, 1] {
        let (mut e, mut a) = ([0i32; LANES], NOTHING);
        for i in 0..LANES {
            let limited = top[i] + if top[i] == 0 { 0 } else { step };
            let limited = if limited > 0 { limited } else { 0 };
            e[i] = if limited < MOST { limited } else { MOST };
            // 2^(e − 128): numbers below 2⁻¹²⁶ have no exponent of their own.
            let normal = (e[i] - 1) << 23;
            let small = if e[i] == 0 { 0x20_0000 } else { 0x40_0000 };
            a.scale[i] = f32::from_bits(if e[i] > 1 { normal } else { small } as u32);
        }
        let [errors, _] = tile.losses::<false>(&a, snap);
        for i in 0..LANES {
            let better = errors[i] < least[i];
            least[i] = if better { errors[i] } else { least[i] };
            best[i] = if better { e[i] } else { best[i] };
            at.scale[i] = if better { a.scale[i] } else { at.scale[i] };
        }
    }
    integers.iter_mut().zip(best).for_each(|(to, e)| *to = e as u8);
    at
}

/// The best scale and offset of every sub-block.
#[inline(always)]
pub(super) fn affines<'a, C: Costs<'a>>(form: &BlockForm, tile: &Tile<'_, C>, snap: impl Snap) -> Affines {
    let [lo, hi] = tile.range;
    let mut span = ZERO;
    for i in 0..LANES {
        span[i] = hi[i] - lo[i];
    }
    let per_span = inverse(&span);
    let last = (form.levels.len() - 1) as f32;
    let mut best = Best::new(tile);
    let (starts, refits) = pairs(form);
    for &(more, share) in starts {
        let (mut inverse, mut zero) = (ZERO, ZERO);
        for i in 0..LANES {
            inverse[i] = (last + more) * per_span[i];
            zero[i] = (-lo[i]).mul_add(inverse[i], -share * more);
        }
        // Half a level beyond the outermost is still nearest to it.
        let [below, above] = [share, 1.0 - share].map(|side| side * more);
        if below < 0.5 && above < 0.5 {
            tile.consider::<true, false>([&inverse, &zero], 1, &mut best, Unlimited);
        } else {
            tile.consider::<true, false>([&inverse, &zero], 1, &mut best, snap);
        }
    }
    for _ in 0..refits {
        let inverse = inverse(&best.at.scale);
        let mut zero = ZERO;
        for i in 0..LANES {
            zero[i] = -best.at.offset[i] * inverse[i];
        }
        tile.consider::<true, false>([&inverse, &zero], 1, &mut best, snap);
    }
    best.at
}

/// What the weight of largest magnitude may be in levels, or of a sub-block of several lanes the root mean square, and how often the
/// best is refitted. The side with one level more comes first. Those of blocks with one scale were chosen together, for the least
/// error of Gaussian weights in as few.
fn starts(form: &BlockForm) -> (&'static [f32], usize) {
    match form.kind {
        // Levels of Gaussian weights lie best at 1.22 σ, or 1 σ apart; heavier tails want them farther. Two levels above and one below
        // make either sign of the scale another grid.
        BlockType::Tq1_0 => (&[1.0 / 1.3], 2),
        BlockType::Tq2_0 | BlockType::Q2_0 => (&[1.0 / 1.05, -1.0 / 1.05], 2),
        BlockType::Q3K => (&[-4.0, -3.6, -4.4, -3.2, -5.0, 3.3, 2.9, 3.8], 2),
        BlockType::Q4_0 => (&[-8.0, -7.1, -8.7, -8.3, -7.7], 1),
        BlockType::Q5_0 => (&[-16.4, -15.1, -15.9, 14.2], 1),
        BlockType::Q6K => (&[-32.0, -31.5, -32.6, 31.4], 2),
        BlockType::Q8_0 => (&[-127.5, 127.3], 2),
        _ => (&[-127.0, -117.0, -108.0, -99.0, -138.0, 113.0, 104.0, 124.0], 2),
    }
}

/// How much more than the levels the range of the weights may reach, in levels, and which share of that lies below; and how
/// often the best is refitted.
fn pairs(form: &BlockForm) -> (&'static [(f32, f32)], usize) {
    const FEW_LEVELS: [[(f32, f32); 3]; 6] = shared([-0.2, 0.2, 0.6, 1.0, 1.4, 1.8]);
    const LEVELS: [[(f32, f32); 3]; 4] = shared([-0.2, 0.5, 1.3, 2.2]);
    match form.kind {
        BlockType::Q4_1 => (&[(0.4, 0.0), (0.4, 1.0), (0.2, 0.5)], 1),
        BlockType::Q5_1 => (&[(0.2, 0.0), (0.4, 1.0), (-0.8, 0.0), (-0.8, 1.0)], 1),
        BlockType::Q2K => (FEW_LEVELS.as_flattened(), 2),
        _ => (LEVELS.as_flattened(), 2),
    }
}

/// All, half or none of each lies below.
const fn shared<const N: usize>(more: [f32; N]) -> [[(f32, f32); 3]; N] {
    let mut pairs = [[(0.0, 0.0); 3]; N];
    let mut i = 0;
    while i < N {
        pairs[i] = [(more[i], 0.0), (more[i], 0.5), (more[i], 1.0)];
        i += 1;
    }
    pairs
}

impl<'a, C: Costs<'a>> Tile<'_, C> {
    /// Σ h·w·l, Σ h·l² and Σ h·l for the levels that scales (given as their inverses) and offsets (as the level of zero) lead to.
    #[inline(always)]
    fn levels<const SHIFTED: bool>(&self, [inverse, zero]: [&Lanes; 2], snap: impl Levels) -> [Lanes; 3] {
        let (mut xl, mut ll, mut sum) = (ZERO, ZERO, ZERO);
        for (j, w) in self.w.iter().enumerate() {
            let h = self.h.at(j);
            for i in 0..LANES {
                let l = if SHIFTED {
                    snap.level(w[i].mul_add(inverse[i], zero[i]))
                } else {
                    snap.level_of(w[i], inverse[i])
                };
                let hl = h[i] * l;
                xl[i] = hl.mul_add(w[i], xl[i]);
                ll[i] = hl.mul_add(l, ll[i]);
                if SHIFTED {
                    sum[i] += hl;
                }
            }
        }
        [xl, ll, sum]
    }

    /// The best of `best` and what the levels that `a`, inverse scales and levels of zero, leads to are fitted by; what `many`
    /// neighbours have in common, if they are `JOINED`.
    #[inline(always)]
    fn consider<const SHIFTED: bool, const JOINED: bool>(
        &self,
        a: [&Lanes; 2],
        many: usize,
        best: &mut Best,
        snap: impl Levels,
    ) {
        let [mut xl, mut ll, l] = self.levels::<SHIFTED>(a, snap);
        if JOINED {
            xl = in_common(many, xl);
            ll = in_common(many, ll);
        }
        for i in 0..LANES {
            let (h, x) = (self.costs[i], self.sum[i]);
            let (scale, offset, explained) = if SHIFTED {
                let determinant = ll[i].mul_add(h, -(l[i] * l[i]));
                let inverse = 1.0 / determinant;
                let scale = xl[i].mul_add(h, -(x * l[i])) * inverse;
                let offset = x.mul_add(ll[i], -(xl[i] * l[i])) * inverse;
                let mean = best.mean[i];
                let curved = determinant > 1e-6 * ll[i] * h;
                let explained = scale.mul_add(xl[i], offset * x);
                (
                    if curved { scale } else { 0.0 },
                    if curved { offset } else { mean },
                    if curved { explained } else { mean * x },
                )
            } else {
                let scale = xl[i] / ll[i];
                let scale = if ll[i] > 0.0 { scale } else { 0.0 };
                (scale, 0.0, scale * xl[i])
            };
            let better = explained > best.explained[i];
            best.explained[i] = if better { explained } else { best.explained[i] };
            best.at.scale[i] = if better { scale } else { best.at.scale[i] };
            best.at.offset[i] = if better { offset } else { best.at.offset[i] };
        }
    }
}

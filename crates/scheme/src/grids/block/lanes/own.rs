//! Every sub-block's own scale and offset: starting points, each refitted to the levels it leads to, and the best of them.

use super::{Affines, BlockForm, BlockType, Costs, LANES, Lanes, NOTHING, Snap, Tile, ZERO, inverse};

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
    // The first of the largest magnitudes, found in four runs of positions, because each comparison waits for the one before.
    let mut runs = [ZERO; RUNS];
    for at in 0..tile.w.len() / RUNS {
        for (run, largest) in runs.iter_mut().enumerate() {
            larger(largest, &tile.w[run * (tile.w.len() / RUNS) + at]);
        }
    }
    let [mut largest, rest @ ..] = runs;
    rest.iter().for_each(|run| larger(&mut largest, run));
    let mut best = Best::new(tile);
    for &start in starts(form) {
        let mut scale = ZERO;
        for i in 0..LANES {
            scale[i] = largest[i] / start;
        }
        tile.consider::<false>([&inverse(&scale), &ZERO], &mut best, snap);
    }
    // The refitted scale leads to other levels, and these to another scale.
    for _ in 0..2 {
        let inverse = inverse(&best.at.scale);
        tile.consider::<false>([&inverse, &ZERO], &mut best, snap);
    }
    best.at
}

/// Runs of positions, which divide the weights of a sub-block.
const RUNS: usize = 4;

/// `a`, or `b` where that is larger in magnitude.
#[inline(always)]
fn larger(a: &mut Lanes, b: &Lanes) {
    for i in 0..LANES {
        a[i] = if b[i].abs() > a[i].abs() { b[i] } else { a[i] };
    }
}

/// The best scale and offset of every sub-block.
#[inline(always)]
pub(super) fn affines<'a, C: Costs<'a>>(form: &BlockForm, tile: &Tile<'_, C>, snap: impl Snap) -> Affines {
    let (mut lo, mut hi) = (tile.w[0], tile.w[0]);
    for w in tile.w {
        for i in 0..LANES {
            lo[i] = if w[i] < lo[i] { w[i] } else { lo[i] };
            hi[i] = if w[i] > hi[i] { w[i] } else { hi[i] };
        }
    }
    let last = (form.levels.len() - 1) as f32;
    let steps: &[f32] = if last < 8.0 { &[-0.2, 0.2, 0.6, 1.0, 1.4, 1.8] } else { &[-0.2, 0.5, 1.3, 2.2] };
    let mut best = Best::new(tile);
    for step in steps {
        let mut scale = ZERO;
        for i in 0..LANES {
            scale[i] = (hi[i] - lo[i]) / (last + step);
        }
        let inverse = inverse(&scale);
        // What the range leaves uncovered lies above, on both sides, or below.
        for share in [0.0, 0.5, 1.0] {
            let mut offset = ZERO;
            for i in 0..LANES {
                offset[i] = lo[i] + share * ((hi[i] - lo[i]) - last * scale[i]);
            }
            tile.consider::<true>([&inverse, &offset], &mut best, snap);
        }
    }
    for _ in 0..2 {
        let (inverse, offset) = (inverse(&best.at.scale), best.at.offset);
        tile.consider::<true>([&inverse, &offset], &mut best, snap);
    }
    best.at
}

/// What the weight of largest magnitude may be in levels. The side with one level more comes first.
fn starts(form: &BlockForm) -> &'static [f32] {
    match form.kind {
        BlockType::Q3K => &[-4.0, -3.6, -4.4, -3.2, -5.0, 3.3, 2.9, 3.8],
        BlockType::Q4_0 => &[-8.0, -7.6, -8.4, -7.2, -8.9, 7.4, 7.0, 8.0],
        BlockType::Q5_0 => &[-16.0, -15.5, -16.5, -17.2, 15.4],
        BlockType::Q6K => &[-32.0, -31.5, -32.6, 31.4],
        BlockType::Q8_0 => &[-127.5, 127.3],
        _ => &[-127.0, -117.0, -108.0, -99.0, -138.0, 113.0, 104.0, 124.0],
    }
}

impl<'a, C: Costs<'a>> Tile<'_, C> {
    /// Σ h·w·l, Σ h·l² and Σ h·l for the levels that scales (given as their inverses) and offsets lead to.
    #[inline(always)]
    fn levels<const SHIFTED: bool>(&self, [inverse, offset]: [&Lanes; 2], snap: impl Snap) -> [Lanes; 3] {
        let (mut xl, mut ll, mut sum) = (ZERO, ZERO, ZERO);
        for (j, w) in self.w.iter().enumerate() {
            let h = self.h.at(j);
            for i in 0..LANES {
                let l = snap.level((if SHIFTED { w[i] - offset[i] } else { w[i] }) * inverse[i]);
                let hl = h[i] * l;
                xl[i] += hl * w[i];
                ll[i] += hl * l;
                if SHIFTED {
                    sum[i] += hl;
                }
            }
        }
        [xl, ll, sum]
    }

    /// The best of `best` and what the levels that `a`, inverse scales and offsets, leads to are fitted by.
    #[inline(always)]
    fn consider<const SHIFTED: bool>(&self, a: [&Lanes; 2], best: &mut Best, snap: impl Snap) {
        let [xl, ll, l] = self.levels::<SHIFTED>(a, snap);
        for i in 0..LANES {
            let (h, x) = (self.costs[i], self.sum[i]);
            let (scale, offset, explained) = if SHIFTED {
                let determinant = ll[i] * h - l[i] * l[i];
                let scale = (xl[i] * h - x * l[i]) / determinant;
                let offset = (x * ll[i] - xl[i] * l[i]) / determinant;
                let mean = best.mean[i];
                let curved = determinant > 1e-6 * ll[i] * h;
                let explained = scale * xl[i] + offset * x;
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

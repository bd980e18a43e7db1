//! The last step: every weight to its code, row by row as weights lie, and what that loses.

use super::{Affines, Snap, inverse};

/// Running sums, by the position within so many weights.
const SUMS: usize = 16;

/// Rounds sub-blocks of `SUB` weights under `stored` and returns Σ h(w − ŵ)² and Σ h·w², with h = 1 where there are no costs.
#[inline(always)]
pub(super) fn round<const SUB: usize>(
    w: &[f32],
    h: Option<&[f32]>,
    stored: &Affines,
    codes: &mut [u8],
    snap: impl Snap,
) -> [f64; 2] {
    let inverse = inverse(&stored.scale);
    let (mut error, mut energy) = ([0.0; SUMS], [0.0; SUMS]);
    let each = codes.as_chunks_mut::<SUB>().0.iter_mut().zip(w.as_chunks::<SUB>().0).enumerate();
    for (lane, (codes, w)) in each {
        let (scale, offset, inverse) = (stored.scale[lane], stored.offset[lane], inverse[lane]);
        let costs = h.map(|h| &h.as_chunks::<SUB>().0[lane]);
        for from in (0..SUB).step_by(SUMS) {
            for i in 0..SUMS {
                let w = w[from + i];
                let x = (w - offset) * inverse;
                codes[from + i] = snap.code(x);
                let e = w - (scale * snap.level(x) + offset);
                let (e, w) = match costs {
                    Some(costs) => (costs[from + i] * e * e, costs[from + i] * w * w),
                    None => (e * e, w * w),
                };
                error[i] += e;
                energy[i] += w;
            }
        }
    }
    [f64::from(error.iter().sum::<f32>()), f64::from(energy.iter().sum::<f32>())]
}

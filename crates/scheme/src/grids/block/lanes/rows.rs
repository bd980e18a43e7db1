//! The last step: every weight to its code, row by row as weights lie, and what that loses.

use super::{Affines, Snap, inverse};
use crate::grids::int::folded;

/// Rounds sub-blocks of `SUB` weights under `stored` and returns Σ h(w − ŵ)² and Σ h·w², with h = 1 where there are no costs.
#[inline(always)]
pub(super) fn round<const SUB: usize, const SHIFTED: bool>(
    w: &[f32],
    h: Option<&[f32]>,
    stored: &Affines,
    codes: &mut [u8],
    snap: impl Snap,
) -> [f64; 2] {
    let inverse = inverse(&stored.scale);
    let (mut error, mut energy) = ([0.0; SUB], [0.0; SUB]);
    let each = codes.as_chunks_mut::<SUB>().0.iter_mut().zip(w.as_chunks::<SUB>().0).enumerate();
    for (lane, (codes, w)) in each {
        let (scale, offset, inverse) = (stored.scale[lane], stored.offset[lane], inverse[lane]);
        let costs = h.map(|h| &h.as_chunks::<SUB>().0[lane]);
        // Written at once, so that nothing in the loop may be what another step reads, and sums stay in registers.
        let mut rounded = [0; SUB];
        for i in 0..SUB {
            let w = w[i];
            let (e, code) = if SHIFTED {
                let w = w - offset;
                let (l, code) = snap.coded(w * inverse);
                ((-scale).mul_add(l, w), code)
            } else {
                let (l, code) = snap.coded_of(w, inverse);
                ((-scale).mul_add(l, w), code)
            };
            rounded[i] = code;
            let (he, hw) = costs.map_or((e, w), |costs| (costs[i] * e, costs[i] * w));
            error[i] = he.mul_add(e, error[i]);
            energy[i] = hw.mul_add(w, energy[i]);
        }
        *codes = rounded;
    }
    [error, energy].map(|sums| f64::from(folded(sums)))
}

//! What errors cost in a tile of sub-blocks, laid out as its weights are.

use super::{LANES, LONGEST, Lanes, Turned, ZERO};

/// The costs of a tile.
pub(super) trait Costs<'a> {
    /// Of the weights `w` by position; `h` are the costs as they are given, by position.
    fn new(w: &[Lanes], h: &'a Turned) -> Self;
    /// Of the weights at one position.
    fn at(&self, position: usize) -> &Lanes;
}

/// A cost for each weight.
pub(super) struct Each<'a>(&'a Turned);

impl<'a> Costs<'a> for Each<'a> {
    #[inline(always)]
    fn new(_: &[Lanes], h: &'a Turned) -> Self {
        Each(h)
    }
    #[inline(always)]
    fn at(&self, position: usize) -> &Lanes {
        &self.0[position]
    }
}

/// All cost one, so that multiplications by costs disappear; the bits are those of [`Each`].
pub(super) struct One;

impl Costs<'_> for One {
    #[inline(always)]
    fn new(_: &[Lanes], _: &Turned) -> Self {
        One
    }
    #[inline(always)]
    fn at(&self, _: usize) -> &Lanes {
        &[1.0; LANES]
    }
}

/// An error of weight w costs σ + |w|, with σ the root mean square of the sub-block. Where levels are few, the smallest sum
/// of squares shrinks what is large, and large weights carry most of a linear's output whatever its input is: on
/// books-10m, q2_k and q3_k lose 2 and 3 % less by KL divergence this way (six windows), and q4_k 9 % (sixty).
pub(super) struct BySize([Lanes; LONGEST]);

impl Costs<'_> for BySize {
    #[inline(always)]
    fn new(w: &[Lanes], _: &Turned) -> Self {
        let (mut squares, mut costs) = (ZERO, [ZERO; LONGEST]);
        for w in w {
            for i in 0..LANES {
                squares[i] = w[i].mul_add(w[i], squares[i]);
            }
        }
        let mut sigma = ZERO;
        for i in 0..LANES {
            sigma[i] = (squares[i] / w.len() as f32).sqrt();
        }
        for (costs, w) in costs.iter_mut().zip(w) {
            for i in 0..LANES {
                costs[i] = sigma[i] + w[i].abs();
            }
        }
        BySize(costs)
    }
    #[inline(always)]
    fn at(&self, position: usize) -> &Lanes {
        &self.0[position]
    }
}

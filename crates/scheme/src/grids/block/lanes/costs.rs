//! What errors cost in a tile of sub-blocks, laid out as its weights are.

use super::{LANES, LONGEST, Lanes, ZERO};

/// The costs of a tile.
pub(super) trait Costs {
    /// Of sub-blocks of `len`, where `w` are the weights by position and `h` the costs as they lie in the matrix.
    fn new(len: usize, w: &[Lanes; LONGEST], h: &[f32]) -> Self;
    /// Of the weights at one position.
    fn at(&self, position: usize) -> &Lanes;
}

/// A cost for each weight.
pub(super) struct Each([Lanes; LONGEST]);

impl Costs for Each {
    #[inline(always)]
    fn new(len: usize, _: &[Lanes; LONGEST], h: &[f32]) -> Self {
        Each(by_position(len, h))
    }
    #[inline(always)]
    fn at(&self, position: usize) -> &Lanes {
        &self.0[position]
    }
}

/// All cost one, so that multiplications by costs disappear; the bits are those of [`Each`].
pub(super) struct One;

impl Costs for One {
    #[inline(always)]
    fn new(_: usize, _: &[Lanes; LONGEST], _: &[f32]) -> Self {
        One
    }
    #[inline(always)]
    fn at(&self, _: usize) -> &Lanes {
        &[1.0; LANES]
    }
}

/// An error of weight w costs σ + |w|, with σ the root mean square of the sub-block. Where levels are few, the smallest sum
/// of squares shrinks what is large, and large weights carry most of a linear's output whatever its input is: on
/// books-10m, q2_k and q3_k lose 2 and 3 % less by KL divergence this way (six windows), and 4 bits do not gain.
pub(super) struct BySize([Lanes; LONGEST]);

impl Costs for BySize {
    #[inline(always)]
    fn new(len: usize, w: &[Lanes; LONGEST], _: &[f32]) -> Self {
        let (mut squares, mut costs) = (ZERO, [ZERO; LONGEST]);
        for w in &w[..len] {
            for i in 0..LANES {
                squares[i] += w[i] * w[i];
            }
        }
        let sigma = squares.map(|sum| (sum / len as f32).sqrt());
        for (costs, w) in costs[..len].iter_mut().zip(w) {
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

/// Numbers of sub-blocks of `len`, by position, then lane.
#[inline(always)]
pub(super) fn by_position(len: usize, from: &[f32]) -> [Lanes; LONGEST] {
    let mut to = [ZERO; LONGEST];
    for (lane, from) in from.chunks(len).enumerate() {
        to.iter_mut().zip(from).for_each(|(to, &x)| to[lane] = x);
    }
    to
}

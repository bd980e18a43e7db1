//! What tests leave out under Miri, which looks at memory rather than at numbers, some thousand times more slowly.

use crate::{BLOCKS, BlockForm};

/// Whether samples are so few that what holds on average says nothing of them.
pub(crate) const FEW: bool = cfg!(miri);

/// How many of so many repetitions there is time for.
pub(crate) const fn times(natively: usize) -> usize {
    if FEW { natively.div_ceil(100) } else { natively }
}

/// The block types that there is time to fit: those without a codebook, whose search has tests of its own.
pub(crate) fn blocks() -> impl Iterator<Item = &'static BlockForm> {
    BLOCKS.iter().filter(|form| !FEW || form.codebook().is_none())
}

/// Those that there is time to fit many times: of them, those of few weights.
pub(crate) fn small_blocks() -> impl Iterator<Item = &'static BlockForm> {
    blocks().filter(|form| !FEW || form.len <= 64)
}

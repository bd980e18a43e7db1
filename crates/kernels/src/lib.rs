//! The arithmetic of quantization made fast: slices in, slices out.
//!
//! Nothing here knows a tensor, a file or a model, and nothing allocates its result but what would have to be cleared else
//! ([`short_outer`]). Every function is held to a scalar definition by its tests. Parallel functions split their *output* into tiles of a fixed size and fold each tile in a
//! fixed order, so that results do not depend on the number of threads.

mod level;
mod memory;
mod ops;
mod team;

pub use level::{Brain, Eight, Level};
pub use memory::{LineAllocator, give_back_large_buffers, keep_freed_memory};
pub use ops::axpy::{axpy, axpys};
pub use ops::bfloat::{ByColumns, append_bfloat16, append_f32, to_bfloat16};
pub use ops::blocks::{Stored, fit_blocks};
pub use ops::cholesky::cholesky;
pub use ops::columns::{ByColumn, Column, Columns, ROWS, round_columns};
pub use ops::eigen::eigen;
pub use ops::fresh::filled;
pub use ops::gated::gated_strips;
pub use ops::groups::{fit_groups, fit_weighted};
pub use ops::hadamard::{Hadamard, Signed};
pub use ops::half::{Halves, half_product};
pub use ops::matrix::{Element, View, ViewMut, gemm, mirror, syrk};
pub use ops::mix::{Bound, Exponents, KEYS, Mixing, mix};
pub use ops::moments::{MOMENT_ROWS, Moments, add_moments};
pub use ops::norm::{largest_norm, rms_norm};
pub use ops::pack::{fifths, pack_bits, packed_words, unpack_bits};
pub use ops::packed::{
    CHUNK, Meeting, Packed, PackedForm, Rounded, RoundedMut, SPAN, Scales, packed_product, packed_product_int8,
    packed_products, packed_products_int8, round_activations,
};
pub use ops::rotate::rotate_halves;
pub use ops::short::{
    APART, Panels, Short, panels_square, panels_syrk, short_gemm, short_outer, short_product, short_syrk,
};
pub use ops::softmax::{exp, largest, silu_mul, softmax, softmax_divergence};
pub use ops::solve::solve;
pub use team::{awake, fill_chunks};

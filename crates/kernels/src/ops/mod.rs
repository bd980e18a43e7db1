//! One file per operation.

pub(crate) mod axpy;
pub(crate) mod bfloat;
pub(crate) mod blocks;
pub(crate) mod brain;
pub(crate) mod cholesky;
pub(crate) mod columns;
pub(crate) mod eigen;
pub(crate) mod eight;
pub(crate) mod fresh;
pub(crate) mod gated;
pub(crate) mod groups;
pub(crate) mod hadamard;
pub(crate) mod half;
pub(crate) mod matrix;
pub(crate) mod moments;
pub(crate) mod norm;
pub(crate) mod pack;
pub(crate) mod packed;
pub(crate) mod rotate;
pub(crate) mod short;
pub(crate) mod softmax;
pub(crate) mod solve;
pub(crate) mod strips;
#[cfg(target_arch = "x86_64")]
pub(crate) mod tiles;
pub(crate) mod weights;

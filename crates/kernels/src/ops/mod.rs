//! One file per operation.

pub(crate) mod matrix;
pub(crate) mod pack;

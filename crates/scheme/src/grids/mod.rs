//! Grids: which values a group of weights may take, and how their parameters are fitted.

pub(crate) mod binary;
pub(crate) mod block;
pub(crate) mod float;
pub(crate) mod int;

/// Scale and zero point of one group of weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupParams {
    /// Distance between neighbouring values; already a value of the scheme's scale type, possibly negative.
    pub scale: f32,
    /// The code that stands for zero.
    pub zero: u8,
}

/// What a fit of [`GroupParams`] minimises.
#[derive(Debug, Clone, Copy)]
pub enum Fit<'a> {
    /// Cover the range from the smallest to the largest weight, zero included; nothing is searched.
    MinMax,
    /// Shrink the range in steps of 1%, keep the smallest Σ|w − ŵ|^2.4 (GPTQ's "mse" search).
    Mse,
    /// Search scales for the smallest Σ h·(w − ŵ)², with the scale refitted in closed form; `h` has one entry per
    /// weight (the diagonal of H), and all-equal entries make it a plain least-squares fit.
    Weighted(&'a [f32]),
    /// The smallest Σ(w − ŵ)² that a few starting points lead to, the best of them refitted in closed form; on grids of floats
    /// [`Fit::Weighted`] with equal entries.
    Squares,
}

/// A set of values for the weights of one group.
pub trait Grid {
    /// Parameters for the weights `w` under criterion `fit`. All-zero weights get a valid scale.
    fn fit(&self, w: &[f32], fit: Fit<'_>) -> GroupParams;
    /// The code whose value is nearest to `x`; ties go to the even code distance (round half to even).
    fn nearest(&self, x: f32, params: GroupParams) -> u8;
    /// The value of `code`.
    fn value(&self, code: u8, params: GroupParams) -> f32;
}

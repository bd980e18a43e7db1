//! What can be wrong with a description of a quantized tensor.

/// A scheme or a quantized tensor that contradicts itself.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A width outside 1 to 8 bits.
    #[error("{0} bits per code: an integer grid has 1 to 8")]
    Bits(u32),
    /// A group size that does not divide the input width of a tensor, or is zero.
    #[error("group size {group} does not divide the input width {cols}")]
    Group {
        /// The group size asked for.
        group: usize,
        /// Input width of the tensor.
        cols: usize,
    },
    /// A vector of a [`crate::Quantized`] has the wrong length.
    #[error("{what}: {got} entries where the shape asks for {expected}")]
    Length {
        /// Which vector.
        what: &'static str,
        /// Entries the shape asks for.
        expected: usize,
        /// Entries found.
        got: usize,
    },
    /// A code or zero point beyond the grid.
    #[error("{what} {got} lies beyond a {bits}-bit grid")]
    Range {
        /// Code or zero point.
        what: &'static str,
        /// The value found.
        got: u32,
        /// Width of the grid.
        bits: u32,
    },
    /// An integer of a GGUF block beyond its width.
    #[error("an integer of row {row}, block {group} is {got}, which its type cannot store")]
    Integer {
        /// Output row.
        row: usize,
        /// Block along the input.
        group: usize,
        /// The value found.
        got: u8,
    },
    /// Codes that the codebook of a GGUF type does not list.
    #[error("the codes of row {row} from input {col} on are not in the codebook of their type")]
    Codebook {
        /// Output row.
        row: usize,
        /// First input of the unit.
        col: usize,
    },
    /// A column of binary numbers that is salient in one row and not in another.
    #[error("the code of row {row}, input {col} is of the other kind than those above it: a column is salient or not")]
    Salient {
        /// Output row.
        row: usize,
        /// Input.
        col: usize,
    },
    /// A code of a float grid that stands for no number.
    #[error("the code of row {row}, input {col} is NaN")]
    NaN {
        /// Output row.
        row: usize,
        /// Input.
        col: usize,
    },
    /// A divisor of scales that cannot be divided by.
    #[error("the scale of the whole matrix is {0}, where a number above zero is needed")]
    Divisor(f32),
    /// A scale of inputs that calibration has to store and that is not there, or cannot be divided by.
    #[error("the scale of its inputs is {}, where a number above zero is needed", .0.map_or("missing".to_owned(), |v| v.to_string()))]
    Input(Option<f32>),
    /// A scale that is NaN or infinite.
    #[error("the scale of row {row}, group {group} is {value}")]
    Scale {
        /// Output row.
        row: usize,
        /// Group along the input.
        group: usize,
        /// The scale found.
        value: f32,
    },
}

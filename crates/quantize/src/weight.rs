//! The weight of a linear as methods see it, `[out, in]`, whichever way round its family stores it.

use crate::Error;
use bitmill_checkpoint::Checkpoint;
use bitmill_models::ModelSpec;

/// The numbers of `module` of `input`, `[out, in]`.
pub(crate) fn weight(input: &Checkpoint, spec: Option<&ModelSpec>, module: &str) -> Result<Vec<f32>, Error> {
    let weight = input.weight(module)?;
    let values = weight.to_f32()?;
    if is_transposed(spec) && input.scheme_of(module).is_none() {
        let [inner, out] = weight.shape();
        return Ok(transpose(&values, [inner, out]));
    }
    Ok(values)
}

/// Whether dense linears are stored `[in, out]`.
pub(crate) fn is_transposed(spec: Option<&ModelSpec>) -> bool {
    spec.is_some_and(|spec| spec.layout.transposed)
}

/// The transpose of a matrix `[rows, cols]`.
#[must_use]
pub(crate) fn transpose(values: &[f32], [rows, cols]: [usize; 2]) -> Vec<f32> {
    let column = |col: usize| (0..rows).map(move |row| values[row * cols + col]);
    (0..cols).flat_map(column).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_columns() {
        assert_eq!(transpose(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3]), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    }
}

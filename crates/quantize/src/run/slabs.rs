//! Matrices of GGUF types whose rows a method rounds one by one: in slabs of rows, each read, rounded and encoded by one
//! thread while it is in its cache, so that memory holds the encoded matrix and little more.

use crate::{Error, Linear, Method, Plan, SolverOptions};
use bitmill_checkpoint::{Order, TensorView, Weight};
use bitmill_kernels::{StoredBlocks, rounding_error};
use bitmill_scheme::Quantized;
use rayon::prelude::*;

/// Weights of a slab, about.
const SLAB: usize = 1 << 15;

/// An encoded matrix.
pub(super) struct Rounded {
    pub(super) bytes: Vec<u8>,
    /// Σ h(w − ŵ)² and Σ h·w².
    pub(super) error: f64,
    pub(super) energy: f64,
}

/// Whether a matrix can be rounded here.
pub(super) fn takes(linear: &Linear<'_>, method: &dyn Method) -> bool {
    linear.scheme.form().is_some() && method.works_by_rows()
}

/// Rounds and encodes `stored`, the weight of `linear` (whose own weights are not read).
pub(super) fn round(
    plan: &Plan,
    linear: &Linear<'_>,
    stored: &Weight<'_>,
    h: Option<&[f32]>,
    (method, solver): (&dyn Method, &SolverOptions),
) -> Result<Rounded, Error> {
    let [rows, n] = linear.shape;
    let whole = match stored {
        Weight::Dense(view) if view.order == Order::Rows => None,
        other => Some(other.to_f32()?),
    };
    let size: usize = plan.format.layout(linear.name, &linear.scheme, linear.shape).iter().map(|t| t.bytes()).sum();
    let (slab, row) = ((SLAB / n.max(1)).max(1), size / rows.max(1));
    let mut bytes = vec![0u8; size];
    let slabs = bytes.par_chunks_mut((slab * row).max(1)).enumerate().map(|(i, out)| {
        let (from, count) = (i * slab, slab.min(rows - i * slab));
        let own;
        let weight = match (&whole, stored) {
            (None, Weight::Dense(view)) => {
                own = part(view, from, [count, n])?;
                &own[..]
            }
            (whole, _) => whole.as_ref().map_or(&[][..], |all| &all[from * n..(from + count) * n]),
        };
        let slab = Linear { weight, shape: [count, n], ..*linear };
        let mut sums = [0.0; 2];
        for solved in method.solve(&[slab], h, solver)? {
            let encoded = plan.format.encode(linear.name, &solved.quantized);
            encoded.iter().for_each(|bytes| out.copy_from_slice(bytes));
            let Quantized { codes, scales, zeros, scheme, .. } = &solved.quantized;
            let stored = StoredBlocks { codes, reals: scales, integers: zeros };
            sums = scheme.form().map_or([0.0; 2], |form| rounding_error(form, stored, weight, h));
        }
        Ok::<_, Error>(sums)
    });
    let sums: Vec<[f64; 2]> = slabs.collect::<Result<_, _>>()?;
    let [error, energy] = [0, 1].map(|i| sums.iter().map(|s| s[i]).sum());
    Ok(Rounded { bytes, error, energy })
}

/// Rows of a dense matrix from row `from` on.
fn part(view: &TensorView<'_>, from: usize, shape: [usize; 2]) -> Result<Vec<f32>, Error> {
    let row = view.bytes.len() / view.shape.first().copied().unwrap_or(1).max(1);
    let bytes = &view.bytes[from * row..(from + shape[0]) * row];
    let rows =
        TensorView { name: view.name, file: view.file, dtype: view.dtype, shape: &shape, bytes, order: Order::Rows };
    Ok(rows.to_f32()?)
}

//! Matrices of GGUF types whose rows a method rounds one by one: in slabs of rows, each read, rounded, encoded and written by
//! one thread while it is in its cache, so that memory holds a few slabs and no matrix.

use crate::{Error, Linear, Method, Plan, SolverOptions};
use bitmill_checkpoint::{Order, Output, TensorView, Weight};
use rayon::prelude::*;
use std::borrow::Cow;
use std::sync::{Mutex, PoisonError};

/// Weights of a slab, about.
const SLAB: usize = 1 << 15;

/// Whether a matrix can be rounded here.
pub(super) fn takes(linear: &Linear<'_>, method: &dyn Method) -> bool {
    linear.scheme.form().is_some() && method.works_by_rows()
}

/// Rounds, encodes and writes `stored`, the weight of `linear` (whose own weights are not read). Returns Σ h(w − ŵ)² and
/// Σ h·w², with h = 1 where none is given.
pub(super) fn round(
    (plan, output): (&Plan, &Output),
    linear: &Linear<'_>,
    stored: &Weight<'_>,
    h: Option<&[f32]>,
    (method, solver): (&dyn Method, &SolverOptions),
) -> Result<[f64; 2], Error> {
    let [rows, n] = linear.shape;
    // A matrix of blocks is one tensor.
    let name = format!("{}.weight", linear.name);
    let source = Source::new(plan, &name, stored, linear.shape)?;
    let writer = Writer { output, name: &name, waiting: Mutex::default(), turn: Mutex::default() };
    let count = (SLAB / n.max(1)).max(1);
    let slabs = (0..rows.div_ceil(count)).into_par_iter().map(|i| {
        let from = i * count;
        let weight = source.rows(from, count.min(rows - from))?;
        let slab = Linear { weight: &weight, shape: [weight.len() / n.max(1), n], ..*linear };
        let mut sums = [0.0; 2];
        for solved in method.solve(&[slab], h, solver)? {
            for bytes in plan.format.encode(linear.name, &solved.quantized) {
                writer.write(from * (bytes.len() / slab.shape[0]), bytes)?;
            }
            sums = solved.lost.unwrap_or_else(|| lost(&weight, &solved.quantized.dequantize(), h));
        }
        Ok::<_, Error>(sums)
    });
    let sums: Vec<[f64; 2]> = slabs.collect::<Result<_, _>>()?;
    writer.finish()?;
    Ok([0, 1].map(|i| sums.iter().map(|s| s[i]).sum()))
}

/// Σ h(w − ŵ)² and Σ h·w².
fn lost(w: &[f32], rounded: &[f32], h: Option<&[f32]>) -> [f64; 2] {
    let cost = |i: usize| h.map_or(1.0, |h| f64::from(h[i % h.len()]));
    let each = w.iter().zip(rounded).enumerate();
    each.fold([0.0; 2], |[error, energy], (i, (&w, &r))| {
        [error + cost(i) * f64::from(w - r).powi(2), energy + cost(i) * f64::from(w).powi(2)]
    })
}

/// Parts of a tensor on their way into the file. One thread writes at a time, and the others leave their parts to it: the system
/// lets nobody else into the file meanwhile, and waiting for it costs processor time.
struct Writer<'a> {
    output: &'a Output,
    name: &'a str,
    /// Parts and their places.
    waiting: Mutex<Vec<(usize, Vec<u8>)>>,
    /// Held by who writes.
    turn: Mutex<()>,
}

impl Writer<'_> {
    /// Leaves `bytes` to be written `at` so many bytes from the start of the tensor, and writes what there is if nobody does.
    fn write(&self, at: usize, bytes: Vec<u8>) -> Result<(), Error> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push((at, bytes));
        let Ok(_turn) = self.turn.try_lock() else { return Ok(()) };
        self.finish()
    }

    /// Writes everything that waits.
    fn finish(&self) -> Result<(), Error> {
        loop {
            let parts = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
            if parts.is_empty() {
                return Ok(());
            }
            for (at, bytes) in parts {
                self.output.write_part(self.name, at, &bytes)?;
            }
        }
    }
}

/// The rows of a matrix in the order of the file.
struct Source<'a> {
    view: Option<&'a TensorView<'a>>,
    /// All of them, where they do not lie row after row.
    whole: Vec<f32>,
    shape: [usize; 2],
    /// Which row is which in the file, unless each is at its own place.
    order: Option<Box<dyn Fn(usize) -> usize + Sync + 'a>>,
}

impl<'a> Source<'a> {
    fn new(plan: &'a Plan, name: &'a str, stored: &'a Weight<'_>, shape: [usize; 2]) -> Result<Self, Error> {
        let (view, whole) = match stored {
            Weight::Dense(view) if view.order == Order::Rows => (Some(view), Vec::new()),
            other => (None, other.to_f32()?),
        };
        let order = plan.gguf.as_ref().filter(|gguf| !gguf.keeps_rows(name)).map(|gguf| {
            let order = move |row| gguf.source_row(name, row, shape[0]);
            Box::new(order) as Box<dyn Fn(usize) -> usize + Sync>
        });
        Ok(Source { view, whole, shape, order })
    }

    /// `count` rows of the file from row `from` on.
    fn rows(&self, from: usize, count: usize) -> Result<Cow<'_, [f32]>, Error> {
        let Some(order) = &self.order else { return self.run(from, count) };
        let mut rows = Vec::with_capacity(count * self.shape[1]);
        for row in from..from + count {
            rows.extend_from_slice(&self.run(order(row), 1)?);
        }
        Ok(rows.into())
    }

    /// `count` rows of the folder from row `from` on.
    fn run(&self, from: usize, count: usize) -> Result<Cow<'_, [f32]>, Error> {
        let Some(view) = self.view else {
            return Ok(self.whole[from * self.shape[1]..(from + count) * self.shape[1]].into());
        };
        let row = view.bytes.len() / self.shape[0].max(1);
        let bytes = &view.bytes[from * row..(from + count) * row];
        let shape = [count, self.shape[1]];
        let rows = TensorView {
            name: view.name,
            file: view.file,
            dtype: view.dtype,
            shape: &shape,
            bytes,
            order: Order::Rows,
        };
        Ok(rows.to_f32()?.into())
    }
}

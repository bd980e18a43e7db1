//! Matrices whose rows a method rounds one by one and a format stores one after the other: in slabs of rows, each read, rounded and encoded by one thread
//! while it is in its cache, and written with those before it, so that memory holds a few slabs and no matrix.

use crate::weight::is_transposed;
use crate::{ByRows, Error, Linear, Method, Plan, SolverOptions};
use bitmill_checkpoint::{Checkpoint, Dtype, Fingerprint, Order, Output, TensorView, Weight};
use bitmill_kernels::Stored;
use rayon::prelude::*;
use std::borrow::Cow;
use std::sync::{Mutex, PoisonError};

/// Bytes that are worth a call of the system, which writes many pages at once for much less than one by one.
const PIECE: usize = 1 << 20;

/// How a matrix is rounded here, if it can be: by `options`, where errors cost alike or, in blocks, by columns.
pub(super) fn way(plan: &Plan, linear: &Linear<'_>, (method, options): (&dyn Method, &SolverOptions)) -> Option<Way> {
    let stored = plan.gguf.is_some() || !is_transposed(plan.spec.as_ref());
    let by_rows = method.by_rows(&linear.scheme, options).filter(|_| stored)?;
    Some(Way { by_rows, of_shape: plan.format.by_rows(&linear.scheme, linear.shape)? })
}

/// What rounds rows, and the tensors that are not stored by rows.
pub(super) struct Way {
    by_rows: ByRows,
    of_shape: Vec<Vec<u8>>,
}

/// Rounds, encodes and writes `stored`, the weight of `linear` (whose own weights are not read). Returns Σ h(w − ŵ)² and
/// Σ h·w², with h = 1 where none is given; and, for a matrix that lies in `unseen` as it is read here, and was not read before,
/// its fingerprint.
pub(super) fn round(
    (plan, output): (&Plan, &Output),
    linear: &Linear<'_>,
    stored: &Weight<'_>,
    h: Option<&[f32]>,
    way: &Way,
    unseen: Option<&Checkpoint>,
) -> Result<([f64; 2], Option<Fingerprint>), Error> {
    let [rows, n] = linear.shape;
    let specs = plan.format.layout(linear.name, &linear.scheme, linear.shape);
    let (by_rows, of_shape) = specs.split_at(specs.len() - way.of_shape.len());
    let name = format!("{}.weight", linear.name);
    let source = Source::new(plan, &name, stored, linear.shape)?;
    let writer = |name| Writer { output, name, waiting: Mutex::default(), turn: Mutex::default() };
    let writers: Vec<Writer<'_>> = by_rows.iter().map(|spec| writer(&spec.name)).collect();
    // A slab is what a fingerprint is taken of.
    let count = TensorView::piece_rows(n);
    let start = || (writers.iter().map(|_| Piece::default()).collect(), Vec::new(), Vec::new());
    let slab = |(mut pieces, mut done, mut buffer): (Vec<Piece>, Vec<Done>, Vec<u8>), i: usize| {
        let from = i * count;
        let count = count.min(rows - from);
        let slab = Linear { shape: [count, n], ..*linear };
        let (fingerprint, read) = match (source.view, unseen) {
            (Some(view), Some(input)) => {
                let row = view.bytes.len() / rows;
                buffer.resize(count * row, 0);
                input.read(&name, from * row, &mut buffer)?;
                (Some(Fingerprint::of_rows(&buffer)), source.decoded(view, &buffer)?)
            }
            _ => (None, source.rows(from, count)?),
        };
        let (quantized, lost) = (way.by_rows)(&slab, read.stored(), h);
        drop(read);
        // A sum of squares takes in every number, so the closer look is for the few slabs where it says that one is none.
        if let (Some(view), false) = (source.view, unseen.is_none() || lost[1].is_finite())
            && let Some(index) = view.first_non_finite()
        {
            return Err(Error::NonFinite { tensor: view.name.into(), file: view.file.to_owned(), index });
        }
        let parts = plan.format.encode(linear.name, &quantized);
        for ((piece, writer), bytes) in pieces.iter_mut().zip(&writers).zip(parts) {
            piece.push(from * (bytes.len() / count), &bytes);
            if piece.bytes.len() >= PIECE {
                writer.write(std::mem::take(piece))?;
            }
        }
        done.push(Done { lost, fingerprint });
        Ok::<_, Error>((pieces, done, buffer))
    };
    // What one thread folds are neighbours.
    let runs = (0..rows.div_ceil(count)).into_par_iter().try_fold(start, slab);
    let runs = runs.map(|run| {
        let (rest, done, _) = run?;
        rest.into_iter().zip(&writers).try_for_each(|(piece, writer)| writer.write(piece))?;
        Ok::<_, Error>(done)
    });
    let runs: Vec<Vec<Done>> = runs.collect::<Result<_, _>>()?;
    writers.iter().try_for_each(Writer::finish)?;
    of_shape.iter().zip(&way.of_shape).try_for_each(|(spec, bytes)| output.write(&spec.name, bytes))?;
    let lost = [0, 1].map(|i| runs.iter().flatten().map(|slab| slab.lost[i]).sum());
    let pieces: Vec<Fingerprint> = runs.into_iter().flatten().filter_map(|slab| slab.fingerprint).collect();
    Ok((lost, unseen.map(|_| Fingerprint::of_pieces(&pieces))))
}

/// What came of a slab.
struct Done {
    lost: [f64; 2],
    fingerprint: Option<Fingerprint>,
}

/// Bytes of neighbouring slabs.
#[derive(Default)]
struct Piece {
    /// Where it begins, in bytes from the start of the tensor.
    at: usize,
    bytes: Vec<u8>,
}

impl Piece {
    /// Adds the bytes from `at` on, which are the next.
    fn push(&mut self, at: usize, bytes: &[u8]) {
        if self.bytes.is_empty() {
            self.at = at;
            // Memory that is not touched is not taken.
            self.bytes.reserve_exact(PIECE + bytes.len());
        }
        self.bytes.extend_from_slice(bytes);
    }
}

/// Pieces of a tensor on their way into the file. One thread writes at a time, and the others leave their pieces to it: the system
/// lets nobody else into the file meanwhile, and waiting for it costs processor time.
struct Writer<'a> {
    output: &'a Output,
    name: &'a str,
    waiting: Mutex<Vec<Piece>>,
    /// Held by who writes.
    turn: Mutex<()>,
}

impl Writer<'_> {
    /// Leaves `piece` to be written, and writes what there is if nobody does.
    fn write(&self, piece: Piece) -> Result<(), Error> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push(piece);
        let Ok(_turn) = self.turn.try_lock() else { return Ok(()) };
        self.finish()
    }

    /// Writes everything that waits.
    fn finish(&self) -> Result<(), Error> {
        loop {
            let pieces = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
            if pieces.is_empty() {
                return Ok(());
            }
            for piece in pieces {
                self.output.write_part(self.name, piece.at, &piece.bytes)?;
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
    fn rows(&self, from: usize, count: usize) -> Result<Rows<'_>, Error> {
        let Some(order) = &self.order else { return self.run(from, count) };
        let mut rows = self.run(order(from), 1)?;
        for row in from + 1..from + count {
            rows.append(self.run(order(row), 1)?);
        }
        Ok(rows)
    }

    /// `count` rows of the folder from row `from` on.
    fn run(&self, from: usize, count: usize) -> Result<Rows<'_>, Error> {
        let [rows, n] = self.shape;
        let Some(view) = self.view else { return Ok(Rows::F32(self.whole[from * n..(from + count) * n].into())) };
        let row = view.bytes.len() / rows.max(1);
        self.decoded(view, &view.bytes[from * row..(from + count) * row])
    }

    /// The rows whose bytes these are.
    fn decoded<'b>(&self, view: &TensorView<'_>, bytes: &'b [u8]) -> Result<Rows<'b>, Error> {
        if view.dtype == Dtype::BF16 {
            return Ok(Rows::Bf16(bytes.as_chunks().0.into()));
        }
        let shape = [bytes.len() * 8 / view.dtype.bitsize() / self.shape[1], self.shape[1]];
        let rows = TensorView { shape: &shape, bytes, order: Order::Rows, ..*view };
        Ok(Rows::F32(rows.to_f32()?.into()))
    }
}

/// Rows as they are stored, if a kernel reads that.
enum Rows<'a> {
    F32(Cow<'a, [f32]>),
    Bf16(Cow<'a, [[u8; 2]]>),
}

impl Rows<'_> {
    fn stored(&self) -> Stored<'_> {
        match self {
            Rows::F32(w) => Stored::F32(w),
            Rows::Bf16(w) => Stored::Bf16(w),
        }
    }

    /// Adds others of the same matrix.
    fn append(&mut self, others: Rows<'_>) {
        match (self, others) {
            (Rows::F32(w), Rows::F32(others)) => w.to_mut().extend_from_slice(&others),
            (Rows::Bf16(w), Rows::Bf16(others)) => w.to_mut().extend_from_slice(&others),
            _ => unreachable!("rows of one matrix are of one type"),
        }
    }
}

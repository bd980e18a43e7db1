//! The activations of every window between two pieces of a model: in memory up to a budget, else in a file.

use crate::Error;
use bitmill_kernels::{Level, from_bfloat16, to_bfloat16};
use half::bf16;
use half::slice::HalfBitsSliceExt;
use rayon::prelude::*;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

/// Number type activations are kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamKind {
    /// Half the memory; what calibration uses, since models run in bf16 as well.
    Bf16,
    /// Exact; what evaluation uses.
    F32,
}

/// Activations `[tokens, width]` of every window, read and written by window, each from any thread.
#[derive(Debug)]
pub struct Stream {
    /// Where each window begins, in entries, and where the last one ends.
    starts: Vec<usize>,
    store: Store,
}

#[derive(Debug)]
enum Store {
    /// One lock per window, so that threads working on different windows never meet. Bits, since zeros of integers come from the
    /// system untouched: whoever writes a window first, and not who makes the stream, waits for its pages.
    Bf16(Vec<RwLock<Vec<u16>>>),
    F32(Vec<RwLock<Vec<f32>>>),
    File {
        file: File,
        path: PathBuf,
        kind: StreamKind,
    },
}

impl Stream {
    /// Bytes a stream of this shape takes.
    #[must_use]
    pub fn bytes(kind: StreamKind, windows: usize, length: usize, width: usize) -> u64 {
        windows as u64 * length as u64 * width as u64 * if kind == StreamKind::Bf16 { 2 } else { 4 }
    }

    /// A stream of zeros for windows of equal length. Beyond `budget` bytes it lives in a new file `spill`, which is
    /// deleted with the stream.
    ///
    /// # Errors
    /// [`Error::Stream`] when the file cannot be made.
    pub fn new(
        kind: StreamKind,
        windows: usize,
        length: usize,
        width: usize,
        budget: u64,
        spill: &Path,
    ) -> Result<Self, Error> {
        Stream::of_lengths(kind, &vec![length; windows], width, budget, spill)
    }

    /// The same for windows of `lengths` tokens.
    ///
    /// # Errors
    /// As [`Stream::new`].
    pub fn of_lengths(
        kind: StreamKind,
        lengths: &[usize],
        width: usize,
        budget: u64,
        spill: &Path,
    ) -> Result<Self, Error> {
        let mut starts = vec![0];
        for length in lengths {
            starts.push(starts[starts.len() - 1] + length * width);
        }
        let bytes = Stream::bytes(kind, 1, starts[lengths.len()], 1);
        let entries = |length: &usize| length * width;
        let store = if bytes > budget {
            let open = || -> std::io::Result<File> {
                let file = File::options().read(true).write(true).create(true).truncate(true).open(spill)?;
                file.set_len(bytes)?;
                Ok(file)
            };
            let file = open().map_err(|source| Error::Stream { file: spill.to_owned(), source })?;
            Store::File { file, path: spill.to_owned(), kind }
        } else {
            match kind {
                StreamKind::Bf16 => Store::Bf16(lengths.iter().map(|l| RwLock::new(vec![0; entries(l)])).collect()),
                StreamKind::F32 => Store::F32(lengths.iter().map(|l| RwLock::new(vec![0.0; entries(l)])).collect()),
            }
        };
        Ok(Stream { starts, store })
    }

    /// Number of windows.
    #[must_use]
    pub fn windows(&self) -> usize {
        self.starts.len() - 1
    }

    /// Entries of `window`: its tokens × width.
    fn entries(&self, window: usize) -> usize {
        self.starts[window + 1] - self.starts[window]
    }

    /// Whether the stream lives in a file.
    #[must_use]
    pub fn spilled(&self) -> bool {
        matches!(self.store, Store::File { .. })
    }

    fn kind(&self) -> StreamKind {
        match self.store {
            Store::Bf16(_) | Store::File { kind: StreamKind::Bf16, .. } => StreamKind::Bf16,
            _ => StreamKind::F32,
        }
    }

    /// The activations of `window`, row-major `[tokens, width]`.
    ///
    /// # Errors
    /// [`Error::Stream`] when the spill file cannot be read.
    pub fn read(&self, window: usize) -> Result<Vec<f32>, Error> {
        let (start, entries) = (self.starts[window] as u64, self.entries(window));
        match &self.store {
            Store::F32(data) => Ok(data[window].read().unwrap_or_else(PoisonError::into_inner).clone()),
            Store::Bf16(data) => {
                let bits = data[window].read().unwrap_or_else(PoisonError::into_inner);
                Ok(widened(bits.reinterpret_cast()))
            }
            Store::File { file, path, kind, .. } => {
                let fail = |source| Error::Stream { file: path.clone(), source };
                match kind {
                    StreamKind::F32 => {
                        let mut bytes = vec![0u8; entries * 4];
                        file.read_exact_at(&mut bytes, start * 4).map_err(fail)?;
                        Ok(bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect())
                    }
                    StreamKind::Bf16 => {
                        let mut bytes = vec![0u8; entries * 2];
                        file.read_exact_at(&mut bytes, start * 2).map_err(fail)?;
                        Ok(widened(&of_bytes(&bytes)))
                    }
                }
            }
        }
    }

    /// Replaces the activations of `window`.
    ///
    /// # Errors
    /// [`Error::Stream`] when the spill file cannot be written.
    pub fn write(&self, window: usize, values: &[f32]) -> Result<(), Error> {
        debug_assert_eq!(values.len(), self.entries(window), "activations of one window");
        let start = self.starts[window] as u64;
        match &self.store {
            Store::F32(data) => data[window].write().unwrap_or_else(PoisonError::into_inner).copy_from_slice(values),
            Store::Bf16(data) => {
                let mut bits = data[window].write().unwrap_or_else(PoisonError::into_inner);
                to_bfloat16(Level::best(), values, bits.reinterpret_cast_mut());
            }
            Store::File { file, path, kind, .. } => {
                let (bytes, at): (Vec<u8>, u64) = match kind {
                    StreamKind::F32 => (bytes(values, f32::to_le_bytes), start * 4),
                    StreamKind::Bf16 => (bytes(&narrowed(values), bf16::to_le_bytes), start * 2),
                };
                file.write_all_at(&bytes, at).map_err(|source| Error::Stream { file: path.clone(), source })?;
            }
        }
        Ok(())
    }

    /// Writes the whole stream to `path` and makes it durable.
    ///
    /// # Errors
    /// [`Error::Stream`] when the disk refuses.
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        let fail = |source| Error::Stream { file: path.to_owned(), source };
        let mut out = std::io::BufWriter::with_capacity(1 << 20, File::create(path).map_err(fail)?);
        for window in 0..self.windows() {
            let bytes = match (&self.store, self.kind()) {
                (Store::Bf16(data), _) => {
                    bytes(&data[window].read().unwrap_or_else(PoisonError::into_inner), u16::to_le_bytes)
                }
                (_, StreamKind::Bf16) => bytes(&narrowed(&self.read(window)?), bf16::to_le_bytes),
                (_, StreamKind::F32) => bytes(&self.read(window)?, f32::to_le_bytes),
            };
            out.write_all(&bytes).map_err(fail)?;
        }
        let file = out.into_inner().map_err(|e| fail(e.into_error()))?;
        file.sync_data().map_err(fail)
    }

    /// Fills the stream from a file written by [`Stream::save`] for the same shape.
    ///
    /// # Errors
    /// [`Error::Stream`] when the file is missing or has another length.
    pub fn load(&self, path: &Path) -> Result<(), Error> {
        let fail = |source| Error::Stream { file: path.to_owned(), source };
        let mut file = File::open(path).map_err(fail)?;
        let width = if self.kind() == StreamKind::Bf16 { 2 } else { 4 };
        let expected = (self.starts[self.windows()] * width) as u64;
        if file.metadata().map_err(fail)?.len() != expected {
            return Err(fail(std::io::Error::other(format!("it has not the {expected} bytes of this stream"))));
        }
        for window in 0..self.windows() {
            let mut bytes = vec![0u8; self.entries(window) * width];
            file.read_exact(&mut bytes).map_err(fail)?;
            let values: Vec<f32> = if width == 2 {
                widened(&of_bytes(&bytes))
            } else {
                bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
            };
            self.write(window, &values)?;
        }
        Ok(())
    }
}

/// `values` as they lie in a file.
fn bytes<T: Copy, const N: usize>(values: &[T], to_bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * N];
    bytes.as_chunks_mut().0.iter_mut().zip(values).for_each(|(bytes, &value)| *bytes = to_bytes(value));
    bytes
}

fn of_bytes(bytes: &[u8]) -> Vec<bf16> {
    bytes.as_chunks().0.iter().map(|&bytes| bf16::from_le_bytes(bytes)).collect()
}

fn widened(values: &[bf16]) -> Vec<f32> {
    converted(values, |values, out| from_bfloat16(Level::best(), values, out))
}

fn narrowed(values: &[f32]) -> Vec<bf16> {
    converted(values, |values, out| to_bfloat16(Level::best(), values, out))
}

/// Converts a piece at a time, so that the memory of the result is written once.
fn converted<A, B: Copy + Default>(values: &[A], convert: impl Fn(&[A], &mut [B])) -> Vec<B> {
    const PIECE: usize = 2048;
    let (mut piece, mut out) = ([B::default(); PIECE], Vec::with_capacity(values.len()));
    for values in values.chunks(PIECE) {
        let piece = &mut piece[..values.len()];
        convert(values, piece);
        out.extend_from_slice(piece);
    }
    out
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Store::File { path, .. } = &self.store {
            // A spill file that cannot be removed lies in the work folder, which is removed as a whole later.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Runs `compute` for every window, in parallel within batches of `batch` windows, and hands the results to `consume`
/// in window order, one batch at a time. The batch size is part of the arithmetic (it fixes the order of sums), so it
/// must not depend on the number of threads.
///
/// # Errors
/// The first error of either function.
pub fn in_order<T: Send, E: Send>(
    windows: usize,
    batch: usize,
    compute: impl Fn(usize) -> Result<T, E> + Sync,
    mut consume: impl FnMut(usize, Vec<T>) -> Result<(), E>,
) -> Result<(), E> {
    for first in (0..windows).step_by(batch) {
        let results: Result<Vec<T>, E> = (first..windows.min(first + batch)).into_par_iter().map(&compute).collect();
        consume(first, results?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_keeps_what_was_written_in_memory_and_in_a_file() {
        let dir = tempfile::tempdir().unwrap();
        for kind in [StreamKind::Bf16, StreamKind::F32] {
            let mut files = Vec::new();
            for budget in [0, u64::MAX] {
                let s = Stream::new(kind, 3, 4, 5, budget, &dir.path().join("spill")).unwrap();
                assert_eq!(s.spilled(), budget == 0);
                let zeros = dir.path().join("zeros");
                s.save(&zeros).unwrap();
                assert!(s.read(1).unwrap() == [0.0; 20] && std::fs::read(zeros).unwrap().iter().all(|&b| b == 0));
                for w in 0..3 {
                    s.write(w, &(0..20).map(|i| (w * 20 + i) as f32 * 0.5).collect::<Vec<_>>()).unwrap();
                }
                assert_eq!(s.read(2).unwrap()[3], 21.5);
                let saved = dir.path().join(format!("saved-{budget}"));
                s.save(&saved).unwrap();
                files.push(std::fs::read(&saved).unwrap());
                let again = Stream::new(kind, 3, 4, 5, budget, &dir.path().join("spill-2")).unwrap();
                again.load(&saved).unwrap();
                assert_eq!(again.read(1).unwrap(), s.read(1).unwrap());
                assert!(Stream::new(kind, 3, 4, 6, budget, &dir.path().join("spill-3")).unwrap().load(&saved).is_err());
            }
            assert_eq!(files[0], files[1]);
            assert!(!dir.path().join("spill").exists(), "a spill file goes with its stream");
        }
    }

    #[test]
    fn windows_of_unequal_length_do_not_touch() {
        let dir = tempfile::tempdir().unwrap();
        let lengths = [3, 1, 7];
        for budget in [0, u64::MAX] {
            let s = Stream::of_lengths(StreamKind::F32, &lengths, 2, budget, &dir.path().join("spill")).unwrap();
            for (w, length) in lengths.iter().enumerate() {
                s.write(w, &vec![w as f32 + 1.0; length * 2]).unwrap();
            }
            let saved = dir.path().join(format!("saved-{budget}"));
            s.save(&saved).unwrap();
            let again = Stream::of_lengths(StreamKind::F32, &lengths, 2, budget, &dir.path().join("again")).unwrap();
            again.load(&saved).unwrap();
            for (w, length) in lengths.iter().enumerate() {
                assert_eq!(s.read(w).unwrap(), vec![w as f32 + 1.0; length * 2]);
                assert_eq!(again.read(w).unwrap(), s.read(w).unwrap());
            }
        }
    }
}

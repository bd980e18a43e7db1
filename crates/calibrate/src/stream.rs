//! The activations of every window between two pieces of a model: in memory up to a budget, else in a file.

use crate::{Error, Tokens};
use bitmill_checkpoint::Fingerprint;
use bitmill_kernels::{ByColumns, Level, Panels, Short, append_bfloat16, append_f32, to_bfloat16};
use half::bf16;
use rayon::current_thread_index;
use rayon::prelude::*;
use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

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
    /// Entries of a token.
    width: usize,
    store: Store,
    /// Where windows find memory and leave it, and the width of tokens that new memory is for.
    spare: Option<(Arc<Spare>, usize)>,
}

/// Memory of windows that are of no more use, and of rounded tokens, for those to come: what the system would have to clear page by
/// page.
#[derive(Debug, Default)]
pub struct Spare {
    windows: Mutex<Vec<Vec<bf16>>>,
    /// With the thread that left them, whose cache may still hold them.
    panels: Mutex<Vec<(Option<usize>, Panels)>>,
    squares: Mutex<Vec<Vec<f32>>>,
}

impl Spare {
    /// Memory for so many entries: what came last of what is large enough.
    fn take(&self, entries: usize) -> Option<Vec<bf16>> {
        let mut all = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        let last = all.iter().rposition(|memory| memory.capacity() >= entries)?;
        Some(all.swap_remove(last))
    }

    /// Takes the memory of a window back.
    fn give(&self, mut memory: Vec<bf16>) {
        if memory.capacity() > 0 {
            memory.clear();
            self.windows.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
        }
    }

    /// Panels that hold anything.
    #[must_use]
    pub fn panels(&self, short: Short) -> Panels {
        let mut all = self.panels.lock().unwrap_or_else(PoisonError::into_inner);
        let own = all.iter().rposition(|(thread, _)| *thread == current_thread_index());
        let memory = own.map(|own| all.swap_remove(own)).or_else(|| all.pop());
        Panels::within(memory.map(|(_, panels)| panels), short)
    }

    /// Takes the memory of panels back.
    pub fn keep(&self, panels: Panels) {
        self.panels.lock().unwrap_or_else(PoisonError::into_inner).push((current_thread_index(), panels));
    }

    /// Memory for a part of H, which holds anything.
    #[must_use]
    pub fn square(&self) -> Vec<f32> {
        self.squares.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    /// Takes back the memory of what `tokens` are kept in for H.
    pub fn keep_of(&self, tokens: Tokens) {
        let (panels, square) = tokens.into_memory();
        panels.into_iter().for_each(|panels| self.keep(panels));
        self.squares.lock().unwrap_or_else(PoisonError::into_inner).extend(square);
    }
}

/// A stream in a file, which a loss of power may still take.
#[derive(Debug)]
pub struct Saved {
    path: PathBuf,
    file: File,
    fingerprint: Fingerprint,
}

impl Saved {
    /// What tells it apart.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Makes it durable.
    ///
    /// # Errors
    /// [`Error::Stream`] when the disk refuses.
    pub fn sync(&self) -> Result<(), Error> {
        self.file.sync_data().map_err(|source| Error::Stream { file: self.path.clone(), source })
    }
}

#[derive(Debug)]
enum Store {
    /// One lock per window, so that threads working on different windows never meet. A window that nobody has written is empty,
    /// and stands for zeros.
    Bf16(Vec<RwLock<Vec<bf16>>>),
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
                StreamKind::Bf16 => Store::Bf16(lengths.iter().map(|_| RwLock::default()).collect()),
                StreamKind::F32 => Store::F32(lengths.iter().map(|_| RwLock::default()).collect()),
            }
        };
        Ok(Stream { starts, width, store, spare: None })
    }

    /// The same in `spare` memory, which gets that of a window back when it is released, or the stream is no more; of streams of
    /// bfloat16 that are in memory. New memory has room for tokens of width `room`, for windows of other streams to come.
    #[must_use]
    pub fn within(mut self, spare: &Arc<Spare>, room: usize) -> Self {
        self.spare = Some((spare.clone(), room.max(self.width)));
        self
    }

    /// Gives up what `window` holds, which nobody reads any more: its memory is for others.
    pub fn release(&self, window: usize) {
        if let (Store::Bf16(data), Some((spare, _))) = (&self.store, &self.spare) {
            spare.give(std::mem::take(&mut data[window].write().unwrap_or_else(PoisonError::into_inner)));
        }
    }

    /// Entries of a token.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
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
        self.read_entries(window, 0..self.entries(window))
    }

    /// The activations of some tokens of `window`.
    ///
    /// # Errors
    /// As [`Stream::read`].
    ///
    /// # Panics
    /// Where the window has no such tokens: a caller's bug.
    pub fn read_tokens(&self, window: usize, tokens: Range<usize>) -> Result<Vec<f32>, Error> {
        self.read_entries(window, tokens.start * self.width..tokens.end * self.width)
    }

    /// [`Stream::read_tokens`] in bfloat16: as they are kept, or rounded to that.
    ///
    /// # Errors
    /// As [`Stream::read`].
    ///
    /// # Panics
    /// As [`Stream::read_tokens`].
    pub fn read_rounded(&self, window: usize, tokens: Range<usize>) -> Result<Vec<bf16>, Error> {
        let part = tokens.start * self.width..tokens.end * self.width;
        match &self.store {
            Store::Bf16(data) => {
                assert!(part.end <= self.entries(window), "tokens of the window");
                let bits = data[window].read().unwrap_or_else(PoisonError::into_inner);
                Ok(if bits.is_empty() { vec![bf16::ZERO; part.len()] } else { bits[part].to_vec() })
            }
            _ => Ok(narrowed(&self.read_entries(window, part)?)),
        }
    }

    fn read_entries(&self, window: usize, part: Range<usize>) -> Result<Vec<f32>, Error> {
        assert!(part.end <= self.entries(window), "tokens of the window");
        let (start, entries) = ((self.starts[window] + part.start) as u64, part.len());
        match &self.store {
            Store::F32(data) => {
                let values = data[window].read().unwrap_or_else(PoisonError::into_inner);
                Ok(if values.is_empty() { vec![0.0; entries] } else { values[part].to_vec() })
            }
            Store::Bf16(data) => {
                let bits = data[window].read().unwrap_or_else(PoisonError::into_inner);
                Ok(if bits.is_empty() { vec![0.0; entries] } else { widened(&bits[part]) })
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
        self.write_tokens(window, 0, values)
    }

    /// Replaces the activations of the tokens of `window` from token `from` on. Who writes a window for the first time begins
    /// with its first.
    ///
    /// # Errors
    /// As [`Stream::write`].
    ///
    /// # Panics
    /// Where the window has no such tokens, or those before them were never written: a caller's bug.
    pub fn write_tokens(&self, window: usize, from: usize, values: &[f32]) -> Result<(), Error> {
        let from = from * self.width;
        assert!(from + values.len() <= self.entries(window), "tokens of the window");
        let start = (self.starts[window] + from) as u64;
        match &self.store {
            Store::F32(data) => {
                let mut own = data[window].write().unwrap_or_else(PoisonError::into_inner);
                let new = replace(&mut own, from, values, |values, old| old.copy_from_slice(values));
                own.extend_from_slice(new);
            }
            Store::Bf16(data) => {
                let mut own = data[window].write().unwrap_or_else(PoisonError::into_inner);
                let new = replace(&mut own, from, values, |values, old| to_bfloat16(Level::best(), values, old));
                self.make_room(window, &mut own);
                append_bfloat16(Level::best(), new, &mut own);
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

    /// Whether windows can be [written by columns](Stream::write_columns).
    #[must_use]
    pub fn takes_columns(&self) -> bool {
        matches!(self.store, Store::Bf16(_))
    }

    /// Adds so many `tokens` to `window`, which has those before them alone, as `make` brings their columns, from the left to the
    /// right: `[tokens, columns]`.
    ///
    /// # Errors
    /// Those of `make`.
    ///
    /// # Panics
    /// Where the window has no such tokens, the stream [does not take columns](Stream::takes_columns), or some are missing: a
    /// caller's bug.
    pub fn write_columns<E>(
        &self,
        window: usize,
        tokens: Range<usize>,
        make: impl FnOnce(&mut dyn FnMut(&[f32])) -> Result<(), E>,
    ) -> Result<(), E> {
        let Store::Bf16(data) = &self.store else { panic!("a stream that takes columns") };
        let mut own = data[window].write().unwrap_or_else(PoisonError::into_inner);
        assert!(tokens.end * self.width <= self.entries(window), "tokens of the window");
        assert_eq!(own.len(), tokens.start * self.width, "a window that has those before");
        self.make_room(window, &mut own);
        let mut rows = ByColumns::new(&mut own, tokens.len(), self.width);
        make(&mut |columns| rows.push(Level::best(), columns))?;
        rows.finish();
        Ok(())
    }

    /// Takes memory for `window`, where it has none.
    fn make_room(&self, window: usize, own: &mut Vec<bf16>) {
        let entries = self.entries(window);
        if own.capacity() < entries {
            let (spare, room) = self.spare.as_ref().map_or((None, self.width), |(spare, room)| (Some(spare), *room));
            let room = entries / self.width * room;
            *own = spare.and_then(|spare| spare.take(room)).unwrap_or_else(|| Vec::with_capacity(room));
        }
    }

    /// Writes the whole stream to `path`, by all threads.
    ///
    /// # Errors
    /// [`Error::Stream`] when the disk refuses.
    pub fn save(&self, path: &Path) -> Result<Saved, Error> {
        let fail = |source| Error::Stream { file: path.to_owned(), source };
        let file = File::create(path).map_err(fail)?;
        let write = |window: usize| -> Result<Fingerprint, Error> {
            let bytes = self.bytes_of(window)?;
            file.write_all_at(&bytes, self.place(window)).map_err(fail)?;
            Ok(Fingerprint::of_rows(&bytes))
        };
        let windows = (0..self.windows()).into_par_iter().map(write).collect::<Result<Vec<_>, _>>()?;
        Ok(Saved { path: path.to_owned(), file, fingerprint: Fingerprint::of_pieces(&windows) })
    }

    /// Bytes of an entry in a file.
    fn entry_bytes(&self) -> usize {
        if self.kind() == StreamKind::Bf16 { 2 } else { 4 }
    }

    /// Where `window` begins in a file.
    fn place(&self, window: usize) -> u64 {
        (self.starts[window] * self.entry_bytes()) as u64
    }

    /// The activations of `window` as they lie in a file.
    fn bytes_of(&self, window: usize) -> Result<Vec<u8>, Error> {
        if let Store::Bf16(data) = &self.store {
            let bits = data[window].read().unwrap_or_else(PoisonError::into_inner);
            if !bits.is_empty() {
                return Ok(bytes(&bits, bf16::to_le_bytes));
            }
        }
        let values = self.read(window)?;
        Ok(match self.kind() {
            StreamKind::Bf16 => bytes(&narrowed(&values), bf16::to_le_bytes),
            StreamKind::F32 => bytes(&values, f32::to_le_bytes),
        })
    }

    /// Fills the stream from a file written by [`Stream::save`] for the same shape, and returns what tells the file apart.
    ///
    /// # Errors
    /// [`Error::Stream`] when the file is missing or has another length.
    pub fn load(&self, path: &Path) -> Result<Fingerprint, Error> {
        let fail = |source| Error::Stream { file: path.to_owned(), source };
        let file = File::open(path).map_err(fail)?;
        let expected = self.place(self.windows());
        if file.metadata().map_err(fail)?.len() != expected {
            return Err(fail(std::io::Error::other(format!("it has not the {expected} bytes of this stream"))));
        }
        let read = |window: usize| -> Result<Fingerprint, Error> {
            let mut bytes = vec![0u8; self.entries(window) * self.entry_bytes()];
            file.read_exact_at(&mut bytes, self.place(window)).map_err(fail)?;
            let values: Vec<f32> = match self.kind() {
                StreamKind::Bf16 => widened(&of_bytes(&bytes)),
                StreamKind::F32 => bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
            };
            self.write(window, &values)?;
            Ok(Fingerprint::of_rows(&bytes))
        };
        let windows = (0..self.windows()).into_par_iter().map(read).collect::<Result<Vec<_>, _>>()?;
        Ok(Fingerprint::of_pieces(&windows))
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

/// Has `over` replace what `own` holds from `from` on; returns the values that come behind all of it.
fn replace<'a, T>(own: &mut [T], from: usize, values: &'a [f32], over: impl Fn(&[f32], &mut [T])) -> &'a [f32] {
    assert!(from <= own.len(), "a window that is written from its beginning");
    let (old, new) = values.split_at(values.len().min(own.len() - from));
    over(old, &mut own[from..from + old.len()]);
    new
}

fn widened(values: &[bf16]) -> Vec<f32> {
    let mut out = Vec::new();
    append_f32(Level::best(), values, &mut out);
    out
}

fn narrowed(values: &[f32]) -> Vec<bf16> {
    let mut out = Vec::new();
    append_bfloat16(Level::best(), values, &mut out);
    out
}

impl Drop for Stream {
    fn drop(&mut self) {
        match &mut self.store {
            // A spill file that cannot be removed lies in the work folder, which is removed as a whole later.
            Store::File { path, .. } => drop(std::fs::remove_file(path)),
            Store::Bf16(data) => {
                if let Some((spare, _)) = &self.spare {
                    let memory = |window: &mut RwLock<_>| {
                        std::mem::take(window.get_mut().unwrap_or_else(PoisonError::into_inner))
                    };
                    data.iter_mut().map(memory).for_each(|memory| spare.give(memory));
                }
            }
            Store::F32(_) => {}
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
        let results: Result<Vec<T>, E> =
            (first..windows.min(first + batch)).into_par_iter().with_max_len(1).map(&compute).collect();
        consume(first, results?)?;
    }
    Ok(())
}

/// [`in_order`], but what is computed is consumed while the next is, by whoever completes a batch: threads wait for each other only
/// after every `most` batches, which is as many as may be there at a time. Windows are begun in order, and each batch is consumed
/// by itself, so results depend neither on that number nor on that of threads.
///
/// # Errors
/// The first error of either function.
pub fn overlapped<T: Send, E: Send>(
    windows: usize,
    (batch, most): (usize, usize),
    compute: impl Fn(usize) -> Result<T, E> + Sync,
    consume: impl FnMut(usize, Vec<T>) -> Result<(), E> + Send,
) -> Result<(), E> {
    let (batch, consume) = (batch.max(1), Mutex::new(consume));
    let at_once = batch * most.max(1);
    for first in (0..windows).step_by(at_once) {
        let end = windows.min(first + at_once);
        let (begun, line) = (AtomicUsize::new(first), Mutex::new(Line::new(first..end, batch)));
        let next = || line.lock().unwrap_or_else(PoisonError::into_inner).next();
        (first..end).into_par_iter().with_max_len(1).try_for_each(|_| -> Result<(), E> {
            // Not the window of this place: threads divide places among them from both ends.
            let window = begun.fetch_add(1, Ordering::Relaxed);
            let result = compute(window)?;
            line.lock().unwrap_or_else(PoisonError::into_inner).put(window, result);
            while let Some((first, results)) = next() {
                consume.lock().unwrap_or_else(PoisonError::into_inner)(first, results)?;
                line.lock().unwrap_or_else(PoisonError::into_inner).busy = false;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Results that wait for those before them.
struct Line<T> {
    /// What is to be consumed, and from which window on.
    results: VecDeque<Option<T>>,
    first: usize,
    batch: usize,
    /// Whether somebody is consuming.
    busy: bool,
}

impl<T> Line<T> {
    fn new(windows: Range<usize>, batch: usize) -> Self {
        Line { first: windows.start, results: windows.map(|_| None).collect(), batch, busy: false }
    }

    fn put(&mut self, window: usize, result: T) {
        self.results[window - self.first] = Some(result);
    }

    /// The next batch, if it is complete and nobody is at the one before; who takes it is busy then.
    fn next(&mut self) -> Option<(usize, Vec<T>)> {
        let count = self.batch.min(self.results.len());
        if self.busy || count == 0 || self.results.range(..count).any(Option::is_none) {
            return None;
        }
        self.busy = true;
        let first = self.first;
        self.first += count;
        Some((first, self.results.drain(..count).flatten().collect()))
    }
}

#[cfg(test)]
mod tests;

//! One file of tensors, safetensors or GGUF: its header, validated, and its bytes, mapped.

use crate::error::io;
use crate::gguf::{self, Gguf, Storage};
use crate::survey::Survey;
use crate::{Error, Order, TensorSpec, TensorView};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Bytes of a file that stay in memory once they are read: to map them again takes longer than to encode some types.
const KEPT: usize = 3 << 28;

/// A shard whose header has been checked against its size: every tensor lies inside, none overlaps, nothing is left.
#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) path: PathBuf,
    bytes: Bytes,
    /// Description and byte range of every tensor.
    pub(crate) tensors: BTreeMap<String, (TensorSpec, Range<usize>)>,
    /// Tensors that do not lie row after row.
    pub(crate) orders: BTreeMap<String, Order>,
    /// Tensors whose numbers are other ones than the file's.
    replaced: BTreeMap<String, Vec<u8>>,
}

#[derive(Debug)]
enum Bytes {
    /// The file, and what it holds.
    Mapped(File, Mmap),
    Owned(Vec<u8>),
}

impl Shard {
    /// Maps the file at `path` and checks its header.
    pub(crate) fn open(path: PathBuf, remedy: &'static str) -> Result<Self, Error> {
        let bytes = Bytes::map(&path, remedy)?;
        Shard::new(path, bytes)
    }

    /// A shard held in memory under the name `path`.
    pub(crate) fn in_memory(path: PathBuf, bytes: Vec<u8>) -> Result<Self, Error> {
        Shard::new(path, Bytes::Owned(bytes))
    }

    /// Maps the GGUF file at `path`, or takes its `bytes`, and checks its header. Tensors go under the file's names until
    /// [`Shard::rename`]; blocks are bytes, `[out, bytes of a row]`.
    pub(crate) fn gguf(path: PathBuf, bytes: Option<Vec<u8>>) -> Result<(Self, Gguf), Error> {
        let bytes = match bytes {
            Some(bytes) => Bytes::Owned(bytes),
            None => Bytes::map(&path, "give a model folder or a .gguf file")?,
        };
        let damaged = |reason| Error::Header { file: path.clone(), reason, size: bytes.as_slice().len() as u64 };
        let gguf = gguf::parse(bytes.as_slice()).map_err(damaged)?;
        let mut tensors = BTreeMap::new();
        for t in &gguf.tensors {
            let name = t.name.clone();
            let (dtype, mut shape) = match t.kind.storage {
                Storage::Dense(dtype) => (dtype, t.shape.clone()),
                Storage::Block(_) | Storage::Opaque => (Dtype::U8, t.shape.clone()),
            };
            if let (Some(row), true) = (shape.last_mut(), dtype == Dtype::U8) {
                *row = *row / t.kind.block * t.kind.bytes;
            }
            let spec = TensorSpec { name: name.clone(), dtype, shape };
            tensors.insert(name, (spec, t.range.clone()));
        }
        Ok((Shard { path, bytes, tensors, orders: BTreeMap::new(), replaced: BTreeMap::new() }, gguf))
    }

    /// Gives the tensors of a GGUF file the names of a model folder, where they have one.
    ///
    /// # Errors
    /// [`Error::Duplicate`] where another tensor is called that already.
    pub(crate) fn rename(&mut self, architecture: &str) -> Result<(), Error> {
        for (name, (mut spec, range)) in std::mem::take(&mut self.tensors) {
            spec.name = gguf::hf_name(architecture, &name).unwrap_or(name);
            if let Some((other, _)) = self.tensors.insert(spec.name.clone(), (spec, range)) {
                let (first, second) = (self.path.clone(), self.path.clone());
                return Err(Error::Duplicate { tensor: other.name, first, second });
            }
        }
        Ok(())
    }

    /// Takes one from the numbers of the tensor `name`, which are f32 from here on.
    ///
    /// # Errors
    /// [`Error::Dtype`] where they are no plain numbers.
    pub(crate) fn take_one(&mut self, name: &str) -> Result<(), Error> {
        let Some(view) = self.tensor(name) else { return Ok(()) };
        let less = view.to_f32()?.into_iter().flat_map(|v| (v - 1.0).to_le_bytes()).collect();
        self.replaced.insert(name.to_owned(), less);
        if let Some((spec, _)) = self.tensors.get_mut(name) {
            spec.dtype = Dtype::F32;
        }
        Ok(())
    }

    /// Marks the rows of the tensor `name` as interleaved over `heads`.
    ///
    /// # Errors
    /// [`Error::Shape`] where they do not divide into heads of pairs.
    pub(crate) fn interleave(&mut self, name: &str, heads: usize) -> Result<(), Error> {
        let rows = self.tensor(name).and_then(|t| t.shape.first().copied()).unwrap_or(0);
        if heads == 0 || rows == 0 || !rows.is_multiple_of(2 * heads) {
            let view =
                self.tensor(name).ok_or_else(|| Error::NoTensor { tensor: name.into(), dir: self.path.clone() })?;
            return Err(view.wrong_shape(format!("[rows in pairs of {heads} heads, …]")));
        }
        self.orders.insert(name.to_owned(), Order::Interleaved(heads));
        Ok(())
    }

    fn new(path: PathBuf, bytes: Bytes) -> Result<Self, Error> {
        let tensors = header(bytes.as_slice()).map_err(|reason| Error::Header {
            file: path.clone(),
            reason,
            size: bytes.as_slice().len() as u64,
        })?;
        Ok(Shard { path, bytes, tensors, orders: BTreeMap::new(), replaced: BTreeMap::new() })
    }

    /// The tensor `name`.
    pub(crate) fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let (spec, range) = self.tensors.get(name)?;
        let bytes = match self.replaced.get(name) {
            Some(bytes) => bytes,
            None => self.bytes.as_slice().get(range.clone())?,
        };
        let order = self.orders.get(name).copied().unwrap_or(Order::Rows);
        Some(TensorView { name: &spec.name, file: self.file(), dtype: spec.dtype, shape: &spec.shape, bytes, order })
    }

    pub(crate) fn file(&self) -> &Path {
        &self.path
    }

    /// Reads the file once, by all threads, but for the tensors that are read `later`.
    pub(crate) fn survey(&self, later: &dyn Fn(&str) -> bool) -> Survey<'_> {
        let mut tensors: Vec<(&str, usize)> =
            self.tensors.iter().map(|(name, (_, at))| (name.as_str(), at.start)).collect();
        // As they lie, which is how a disk reads them best.
        tensors.sort_by_key(|&(_, start)| start);
        let head = self.tensors.values().map(|(_, at)| at.start).min().unwrap_or(self.bytes.as_slice().len());
        let mut survey = Survey::of_head(self.file(), &self.bytes.as_slice()[..head]);
        let mut rest = &tensors[..];
        while let [(_, first), ..] = rest {
            // Small ones by all threads, and no more than what need not leave memory before it is looked at.
            let together = rest.iter().take_while(|(_, start)| start - first <= KEPT).count();
            let (some, others) = rest.split_at(together);
            survey.add(some.iter().map(|&(name, _)| (name, self.tensor(name).filter(|_| !later(name)))).collect());
            self.release();
            rest = others;
        }
        survey
    }
}

impl Shard {
    /// Fills `buffer` with bytes of the tensor `name` from the `from`-th on. For what is looked at once, that is less work than to have
    /// its pages mapped and unmapped.
    ///
    /// # Errors
    /// [`Error::NoTensor`] where it has no such bytes; [`Error::Io`] where the file cannot be read any more.
    pub(crate) fn read(&self, name: &str, from: usize, buffer: &mut [u8]) -> Result<(), Error> {
        let part = self.tensor(name).and_then(|view| view.bytes.get(from..from.checked_add(buffer.len())?));
        let Some(part) = part else {
            return Err(Error::NoTensor { tensor: name.to_owned(), dir: self.path.clone() });
        };
        #[cfg(unix)]
        if let (Bytes::Mapped(file, _), Some((_, at)), None) =
            (&self.bytes, self.tensors.get(name), self.replaced.get(name))
        {
            use std::os::unix::fs::FileExt;
            return file.read_exact_at(buffer, (at.start + from) as u64).map_err(io("read", &self.path));
        }
        buffer.copy_from_slice(part);
        Ok(())
    }

    /// Takes what was read of a large file out of the memory of this process; it stays in the system's cache.
    pub(crate) fn release(&self) {
        #[cfg(unix)]
        if let Bytes::Mapped(_, map) = &self.bytes
            && map.len() > KEPT
        {
            // SAFETY: the map is of a file and read-only, so pages that are dropped hold nothing that the file does not, and
            // are read from it again when they are looked at.
            // That it fails costs memory and nothing else.
            let _ = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
        }
    }
}

impl Bytes {
    fn map(path: &Path, remedy: &'static str) -> Result<Self, Error> {
        let file = match File::open(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::Missing { path: path.to_owned(), remedy });
            }
            other => other.map_err(io("open", path))?,
        };
        let size = file.metadata().map_err(io("inspect", path))?.len();
        if size == 0 {
            // An empty file cannot be mapped on every system.
            return Err(Error::Header { file: path.to_owned(), reason: "the file is empty".to_owned(), size });
        }
        // SAFETY: the map is read-only and private to this process. The one thing that could make reading it undefined
        // is another process shortening the file meanwhile, which is outside what a program can guard against; a
        // checkpoint folder is not written while it is read (outputs are built under another name and renamed).
        let map = unsafe { Mmap::map(&file) }.map_err(io("map", path))?;
        Ok(Bytes::Mapped(file, map))
    }

    fn as_slice(&self) -> &[u8] {
        match self {
            Bytes::Mapped(_, map) => map,
            Bytes::Owned(vec) => vec,
        }
    }
}

/// Parses and validates a header with the container's own rules; ranges are positions in `bytes`.
fn header(bytes: &[u8]) -> Result<BTreeMap<String, (TensorSpec, Range<usize>)>, String> {
    let (length, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| e.to_string())?;
    let start = size_of::<u64>() + length;
    let mut tensors = BTreeMap::new();
    for name in metadata.offset_keys() {
        let Some(info) = metadata.info(&name) else { continue };
        let (from, to) = info.data_offsets;
        let spec = TensorSpec { name: name.clone(), dtype: info.dtype, shape: info.shape.clone() };
        tensors.insert(name, (spec, start + from..start + to));
    }
    Ok(tensors)
}

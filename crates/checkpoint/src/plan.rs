//! Where every tensor of an output folder lies: decided from names, types and shapes alone.
//!
//! Because the plan needs no weights, sizes are exact before a run starts, tensors can be written in any order, and a
//! resumed run writes the same bytes at the same places.

use crate::checkpoint::{INDEX, SINGLE};
use crate::error::io;
use crate::gguf::{self, GgufSpec};
use crate::output::Output;
use crate::space::{ensure_free, reserve};
use crate::{Error, TensorSpec};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// The layout of the weight files of a folder.
#[derive(Debug, Clone, PartialEq)]
pub struct OutputPlan {
    pub(crate) shards: Vec<ShardPlan>,
    /// The index file of more than one shard.
    index: Option<Vec<u8>>,
    /// Shard, offset in the file and length of every tensor.
    pub(crate) places: BTreeMap<String, Place>,
    payload: u64,
}

/// One file to be.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ShardPlan {
    pub(crate) name: String,
    header: Vec<u8>,
    size: u64,
}

/// Where a tensor lies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Place {
    pub(crate) shard: usize,
    pub(crate) offset: u64,
    pub(crate) bytes: usize,
}

/// The container's bound on a header.
const LONGEST_HEADER: usize = 100_000_000;

impl OutputPlan {
    /// Lays out `specs`, given in model order: they fill shards of at most `shard_limit` payload bytes (a larger tensor
    /// gets a shard of its own). Inside a shard wider types come first, so that every tensor is aligned to its type.
    ///
    /// # Errors
    /// [`Error::Layout`] for a name given twice, a name the container reserves, or a size beyond any disk.
    pub fn new(specs: Vec<TensorSpec>, shard_limit: u64) -> Result<Self, Error> {
        let mut payload = 0u64;
        let mut shards: Vec<Vec<TensorSpec>> = vec![Vec::new()];
        let mut filled = 0u64;
        for spec in specs {
            let bytes = spec.bytes() as u64;
            let reason = "larger than any disk; its shape cannot be right";
            let total = payload.checked_add(bytes).filter(|&t| t < i64::MAX as u64);
            payload = total.ok_or_else(|| layout_error(&spec.name, reason))?;
            if filled > 0 && filled.saturating_add(bytes) > shard_limit {
                shards.push(Vec::new());
                filled = 0;
            }
            filled += bytes;
            if let Some(shard) = shards.last_mut() {
                shard.push(spec);
            }
        }

        let count = shards.len();
        let mut plan = OutputPlan { shards: Vec::new(), index: None, places: BTreeMap::new(), payload };
        for (i, specs) in shards.into_iter().enumerate() {
            let name = match count {
                1 => SINGLE.to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
            };
            plan.add(name, specs)?;
        }
        if count > 1 {
            let place = |(name, place): (&String, &Place)| (name.clone(), json!(plan.shards[place.shard].name));
            let map: Map<String, Value> = plan.places.iter().map(place).collect();
            let index = json!({"metadata": {"total_size": payload}, "weight_map": map});
            plan.index = Some(format!("{index:#}\n").into_bytes());
        }
        Ok(plan)
    }

    /// Lays out one GGUF file called `stem`.gguf, or as many as it takes for none to hold more than `limit` bytes of tensors
    /// (a larger tensor gets one of its own): `constants`, whose bytes are written with the header, then `tensors`. Each of
    /// these is written under the name beside its description, which is the one a model folder has for it.
    ///
    /// # Errors
    /// [`Error::Layout`] for what a loader of GGUF would refuse.
    pub fn gguf(
        stem: &str,
        metadata: &[(String, gguf::Value)],
        constants: &[(GgufSpec, Vec<u8>)],
        tensors: &[(String, GgufSpec)],
        limit: u64,
    ) -> Result<Self, Error> {
        let constant: u64 = constants.iter().map(|(spec, _)| spec.bytes() as u64).sum();
        let mut parts: Vec<&[(String, GgufSpec)]> = Vec::new();
        let (mut from, mut filled) = (0, constant);
        for (i, (_, spec)) in tensors.iter().enumerate() {
            let bytes = spec.bytes() as u64;
            if i > from && filled.saturating_add(bytes) > limit {
                parts.push(&tensors[from..i]);
                (from, filled) = (i, 0);
            }
            filled = filled.saturating_add(bytes);
        }
        parts.push(&tensors[from..]);
        let (count, all) = (parts.len(), constants.len() + tensors.len());
        let mut plan = OutputPlan { shards: Vec::new(), index: None, places: BTreeMap::new(), payload: 0 };
        for (no, part) in parts.into_iter().enumerate() {
            let mut keys = if no == 0 { metadata.to_vec() } else { Vec::new() };
            let name = match count {
                1 => format!("{stem}.gguf"),
                _ => {
                    let short = |n: usize| {
                        let n =
                            u16::try_from(n).map_err(|_| layout_error(stem, "more than 65535 files; raise their size"));
                        Ok::<_, Error>(gguf::Value::U16(n?))
                    };
                    keys.push((gguf::SPLIT_NO.into(), short(no)?));
                    keys.push((gguf::SPLIT_COUNT.into(), short(count)?));
                    keys.push((gguf::SPLIT_TENSORS.into(), gguf::Value::I32(i32::try_from(all).unwrap_or(i32::MAX))));
                    format!("{stem}{}", gguf::shard_end(no as u64, count as u64))
                }
            };
            plan.add_gguf(name, &keys, if no == 0 { constants } else { &[] }, part)?;
        }
        Ok(plan)
    }

    /// Appends one GGUF file.
    fn add_gguf(
        &mut self,
        name: String,
        metadata: &[(String, gguf::Value)],
        constants: &[(GgufSpec, Vec<u8>)],
        tensors: &[(String, GgufSpec)],
    ) -> Result<(), Error> {
        let specs: Vec<GgufSpec> =
            constants.iter().map(|(spec, _)| spec).chain(tensors.iter().map(|(_, spec)| spec)).cloned().collect();
        let (mut header, offsets, size) = gguf::header(metadata, &specs)?;
        for ((spec, bytes), &offset) in constants.iter().zip(&offsets) {
            if bytes.len() != spec.bytes() {
                return Err(layout_error(&spec.name, "a constant of another length than its shape"));
            }
            header.resize(offset as usize, 0);
            header.extend(bytes);
        }
        let shard = self.shards.len();
        for ((name, spec), &offset) in tensors.iter().zip(&offsets[constants.len()..]) {
            if self.places.insert(name.clone(), Place { shard, offset, bytes: spec.bytes() }).is_some() {
                return Err(layout_error(name, "named twice"));
            }
        }
        self.payload += specs.iter().map(|s| s.bytes() as u64).sum::<u64>();
        self.shards.push(ShardPlan { name, header, size });
        Ok(())
    }

    /// What is in the files besides tensors.
    pub fn headers(&self) -> impl Iterator<Item = &[u8]> {
        self.shards.iter().map(|s| s.header.as_slice())
    }

    /// Appends one shard.
    fn add(&mut self, name: String, mut specs: Vec<TensorSpec>) -> Result<(), Error> {
        specs.sort_by_key(|s| std::cmp::Reverse(s.dtype.bitsize()));
        let mut entries = Map::new();
        entries.insert("__metadata__".to_owned(), json!({"format": "pt"}));
        let mut offset = 0usize;
        for spec in &specs {
            let end = offset + spec.bytes();
            let entry = json!({"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [offset, end]});
            if entries.insert(spec.name.clone(), entry).is_some() {
                return Err(layout_error(&spec.name, "named twice in one shard, or a name the container reserves"));
            }
            offset = end;
        }
        let mut json = Value::Object(entries).to_string().into_bytes();
        json.resize(json.len().next_multiple_of(8), b' ');
        if json.len() > LONGEST_HEADER {
            return Err(layout_error(&name, "too many tensors for one header; choose a smaller shard size"));
        }
        let header = [&(json.len() as u64).to_le_bytes()[..], &json].concat();

        let shard = self.shards.len();
        let mut offset = header.len() as u64;
        for spec in specs {
            let bytes = spec.bytes();
            if self.places.insert(spec.name.clone(), Place { shard, offset, bytes }).is_some() {
                return Err(layout_error(&spec.name, "named twice"));
            }
            offset += bytes as u64;
        }
        self.shards.push(ShardPlan { name, header, size: offset });
        Ok(())
    }

    /// Bytes of all files: payloads, headers and index.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        let index = self.index.as_ref().map_or(0, Vec::len) as u64;
        self.shards.iter().map(|s| s.size).sum::<u64>() + index
    }

    /// Bytes of the tensors alone.
    #[must_use]
    pub fn payload_bytes(&self) -> u64 {
        self.payload
    }

    /// Names and sizes of the files.
    pub fn files(&self) -> impl Iterator<Item = (&str, u64)> {
        let index = self.index.as_ref().map(|i| (INDEX, i.len() as u64));
        self.shards.iter().map(|s| (s.name.as_str(), s.size)).chain(index)
    }

    /// Creates the files in `dir` at their final size with headers and index written, and takes the disk space for all
    /// of it. After an error nothing of them is left.
    ///
    /// # Errors
    /// [`Error::DiskFull`] and [`Error::Io`].
    pub fn create(&self, dir: &Path) -> Result<Output, Error> {
        ensure_free(dir, self.total_bytes())?;
        std::fs::create_dir_all(dir).map_err(io("create", dir))?;
        let mut created = Vec::new();
        let files = self.create_files(dir, &mut created);
        if files.is_err() {
            for path in &created {
                // The first error is the one worth reporting.
                let _ = std::fs::remove_file(path);
            }
        }
        Output::new(self, dir, files?)
    }

    fn create_files(&self, dir: &Path, created: &mut Vec<PathBuf>) -> Result<Vec<File>, Error> {
        let mut files = Vec::new();
        for shard in &self.shards {
            let path = dir.join(&shard.name);
            let options = OpenOptions::new().read(true).write(true).create(true).truncate(true).clone();
            let mut file = options.open(&path).map_err(io("create", &path))?;
            created.push(path.clone());
            reserve(&file, &path, shard.size)?;
            file.write_all(&shard.header).map_err(io("write", &path))?;
            files.push(file);
        }
        if let Some(index) = &self.index {
            let path = dir.join(INDEX);
            created.push(path.clone());
            std::fs::write(&path, index).map_err(io("write", &path))?;
        }
        Ok(files)
    }

    /// Opens the files that [`OutputPlan::create`] left in `dir`, after a crash, to continue writing.
    ///
    /// # Errors
    /// [`Error::Leftover`] where a file is missing or has another size, header or index than this plan.
    pub fn reopen(&self, dir: &Path) -> Result<Output, Error> {
        let mut files = Vec::new();
        for shard in &self.shards {
            let path = dir.join(&shard.name);
            let leftover = |reason: &str| Error::Leftover { file: path.clone(), reason: reason.to_owned() };
            let mut file = match OpenOptions::new().read(true).write(true).open(&path) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(leftover("missing")),
                other => other.map_err(io("open", &path))?,
            };
            if file.metadata().map_err(io("inspect", &path))?.len() != shard.size {
                return Err(leftover("another size"));
            }
            let mut header = vec![0u8; shard.header.len()];
            file.read_exact(&mut header).map_err(io("read", &path))?;
            if header != shard.header {
                return Err(leftover("another header"));
            }
            files.push(file);
        }
        if let Some(index) = &self.index {
            let path = dir.join(INDEX);
            if std::fs::read(&path).ok().as_ref() != Some(index) {
                return Err(Error::Leftover { file: path, reason: "another index, or none".to_owned() });
            }
        }
        Output::new(self, dir, files)
    }
}

fn layout_error(tensor: &str, reason: &str) -> Error {
    Error::Layout { tensor: tensor.to_owned(), reason: reason.to_owned() }
}

//! An opened model folder: config, tensors by name, and how it is quantized. Opening reads headers only.

use crate::error::io;
use crate::formats::modelopt;
use crate::gguf::{self, Factors, Gguf, Storage};
use crate::shard::Shard;
use crate::survey::Survey;
use crate::tensor::is_dense;
use crate::{Dialect, Error, TensorSpec, TensorView};
use bitmill_scheme::{Inputs, Quantized, ScaleType, Scheme};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

/// Its key that says how the folder is quantized.
const QUANTIZATION: &str = "quantization_config";
/// The model's configuration.
const CONFIG: &str = "config.json";
/// The only shard of a small model.
pub(crate) const SINGLE: &str = "model.safetensors";
/// Suffixes of the scales of keys and values.
pub const CACHE_SCALES: [&str; 2] = ["k_scale", "v_scale"];
/// Maps tensor names to shards.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// A Hugging Face folder with every shard mapped. Pages of weights are read when they are touched.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: Value,
    shards: Vec<Shard>,
    /// Shard of every tensor.
    place: BTreeMap<String, usize>,
    dialect: Option<Dialect>,
    /// Experts in the matrices that hold several, one below the other.
    stacks: BTreeMap<String, usize>,
    /// Header of the GGUF file it is, where it is one.
    gguf: Option<Gguf>,
}

/// The weight of a linear module.
#[derive(Debug)]
pub enum Weight<'a> {
    /// Stored as floating-point numbers.
    Dense(TensorView<'a>),
    /// Stored as codes and parameters.
    Quantized(Quantized),
}

impl Weight<'_> {
    /// `[out, in]`.
    #[must_use]
    pub fn shape(&self) -> [usize; 2] {
        match self {
            // `Checkpoint::weight` hands out matrices only.
            Weight::Dense(t) => [t.shape[0], t.shape[1]],
            Weight::Quantized(q) => q.shape,
        }
    }

    /// The weights, row-major `[out, in]`.
    ///
    /// # Errors
    /// [`Error::Dtype`] for a dense type other than F32, F16, BF16, F64.
    pub fn to_f32(&self) -> Result<Vec<f32>, Error> {
        match self {
            Weight::Dense(t) => t.to_f32(),
            Weight::Quantized(q) => Ok(q.dequantize()),
        }
    }
}

impl Checkpoint {
    /// Opens the folder `dir`: parses `config.json`, maps `model.safetensors` or the shards of its index, checks every
    /// header against its file, and reads `quantization_config` if there is one.
    ///
    /// A file whose name ends in `.gguf` is opened as the model it holds, under the names of a folder.
    ///
    /// # Errors
    /// Everything that is wrong with names, headers or configuration, before a weight is touched.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        if dir.extension().is_some_and(|e| e == "gguf") && !dir.is_dir() {
            return Checkpoint::of_gguf(dir, None);
        }
        if !dir.is_dir() {
            let remedy = "give the folder of a model in Hugging Face layout";
            return Err(Error::Missing { path: dir.to_owned(), remedy });
        }
        let config = read_config(dir)?;
        // A whole file wins over an index, as in transformers.
        let single = dir.join(SINGLE);
        if single.exists() {
            let shard = Shard::open(single, "")?;
            return Checkpoint::assemble(dir.to_owned(), config, vec![shard]);
        }
        let index = dir.join(INDEX);
        let map = weight_map(&index)?;
        let mut files: Vec<&String> = map.values().collect();
        files.sort_unstable();
        files.dedup();
        let remedy = "the index names it: fetch the missing shard";
        let shards = files.iter().map(|name| Shard::open(dir.join(name), remedy)).collect::<Result<Vec<_>, _>>()?;
        for (tensor, shard) in &map {
            let held = files.binary_search(&shard).is_ok_and(|i| shards[i].tensors.contains_key(tensor));
            if !held {
                return Err(Error::Index { index, tensor: tensor.clone(), shard: shard.clone() });
            }
        }
        Checkpoint::assemble(dir.to_owned(), config, shards)
    }

    /// Opens one safetensors file without a folder around it, whose configuration is empty, or a GGUF file.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_file(file: &Path) -> Result<Self, Error> {
        if file.extension().is_some_and(|e| e == "gguf") {
            return Checkpoint::of_gguf(file, None);
        }
        let shard = Shard::open(file.to_owned(), "give a model folder or a safetensors file")?;
        let dir = file.parent().unwrap_or(Path::new("")).to_owned();
        Checkpoint::assemble(dir, Value::Object(serde_json::Map::new()), vec![shard])
    }

    /// A checkpoint of one shard held in memory, for bytes that did not come from a folder.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn in_memory(config: Value, shard: Vec<u8>) -> Result<Self, Error> {
        let dir = PathBuf::from("memory");
        let shard = Shard::in_memory(dir.join(SINGLE), shard)?;
        Checkpoint::assemble(dir, config, vec![shard])
    }

    /// A GGUF file held in memory.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn gguf_in_memory(bytes: Vec<u8>) -> Result<Self, Error> {
        Checkpoint::of_gguf(Path::new("memory.gguf"), Some(bytes))
    }

    fn of_gguf(path: &Path, bytes: Option<Vec<u8>>) -> Result<Self, Error> {
        let (mut shards, gguf) = gguf_shards(path, bytes)?;
        let factors = |name: &str| shards.iter().find_map(|s| s.tensor(name)).map(|t| t.to_f32()).transpose();
        let factors = Factors {
            all: factors(gguf::ROPE_FACTORS[0])?,
            short: factors(gguf::ROPE_FACTORS[1])?,
            long: factors(gguf::ROPE_FACTORS[2])?,
        };
        let wrong = |reason| Error::Json { file: path.to_owned(), reason };
        let config = gguf::config(&gguf, factors).map_err(wrong)?;
        let architecture = gguf.architecture().to_owned();
        for shard in &mut shards {
            shard.rename(&architecture)?;
        }
        let count = |key: &str| config[key].as_u64().and_then(|n| usize::try_from(n).ok()).unwrap_or(0);
        let (heads, kv_heads) = (count("num_attention_heads"), count("num_key_value_heads"));
        let mut rules = Vec::new();
        for t in &gguf.tensors {
            let name = gguf::hf_name(&architecture, &t.name).unwrap_or_else(|| t.name.clone());
            let shard = shards.iter_mut().find(|s| s.tensors.contains_key(&name));
            let heads = gguf::interleaved_heads(&architecture, &name, heads, kv_heads);
            match (heads, shard) {
                (Some(heads), Some(shard)) => shard.interleave(&name, heads)?,
                (None, Some(shard)) if gguf::lacks_one(&architecture, &name) => shard.take_one(&name)?,
                _ => {}
            }
            if let (Storage::Block(kind), Some(module)) = (t.kind.storage, name.strip_suffix(".weight")) {
                rules.push((module.to_owned(), Scheme::block(kind)));
            }
        }
        let mut checkpoint = Checkpoint::assemble(path.to_owned(), config, shards)?;
        checkpoint.dialect = Some(Dialect::by_name(crate::GGUF, rules));
        checkpoint.gguf = Some(gguf);
        Ok(checkpoint)
    }

    fn assemble(dir: PathBuf, config: Value, mut shards: Vec<Shard>) -> Result<Self, Error> {
        crate::experts::unstack(&config, &mut shards);
        let stacks = crate::experts::stacked_blocks(&config, &mut shards);
        let mut place: BTreeMap<String, usize> = BTreeMap::new();
        for (i, shard) in shards.iter().enumerate() {
            for name in shard.tensors.keys() {
                if let Some(first) = place.insert(name.clone(), i) {
                    let (first, second) = (shards[first].path.clone(), shard.path.clone());
                    return Err(Error::Duplicate { tensor: name.clone(), first, second });
                }
            }
        }
        let dialect = Dialect::of(&config)?;
        Ok(Checkpoint { dir, config, shards, place, dialect, stacks, gguf: None })
    }

    /// The header of the GGUF file this is; `None` for a folder.
    #[must_use]
    pub fn gguf(&self) -> Option<&Gguf> {
        self.gguf.as_ref()
    }

    /// The folder, or the GGUF file.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `config.json`.
    #[must_use]
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Names of all stored tensors, sorted; experts that are stored stacked go by the names of their matrices.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.place.keys().map(String::as_str)
    }

    /// Type and shape of the tensor `name`.
    #[must_use]
    pub fn spec(&self, name: &str) -> Option<&TensorSpec> {
        let shard = &self.shards[*self.place.get(name)?];
        shard.tensors.get(name).map(|(spec, _)| spec)
    }

    /// Shape of the numbers that the tensor `name` stands for: what is stored, but weights where a GGUF file has blocks.
    #[must_use]
    pub fn shape_of(&self, name: &str) -> Option<Vec<usize>> {
        let stored = self.spec(name)?.shape.clone();
        let scheme = name.strip_suffix(".weight").filter(|_| self.gguf.is_some()).and_then(|m| self.scheme_of(m));
        let Some(form) = scheme.and_then(|s| s.form()) else { return Some(stored) };
        let (&row, outer) = stored.split_last()?;
        Some(outer.iter().copied().chain([row / form.bytes * form.len]).collect())
    }

    /// Whether the tensor `name` is stored.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        self.place.contains_key(name)
    }

    /// The shard that holds the tensor `name`.
    #[must_use]
    pub fn file_of(&self, name: &str) -> Option<&Path> {
        self.place.get(name).map(|&i| self.shards[i].file())
    }

    /// The tensor `name`.
    ///
    /// # Errors
    /// [`Error::NoTensor`].
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, Error> {
        self.place
            .get(name)
            .and_then(|&i| self.shards[i].tensor(name))
            .ok_or_else(|| Error::NoTensor { tensor: name.to_owned(), dir: self.dir.clone() })
    }

    /// Fills `buffer` with the bytes of the tensor `name` from the `from`-th on, past the mapping that [`Checkpoint::tensor`] gives:
    /// for who looks at them once.
    ///
    /// # Errors
    /// [`Error::NoTensor`]; [`Error::Io`] where the file cannot be read any more.
    pub fn read(&self, name: &str, from: usize, buffer: &mut [u8]) -> Result<(), Error> {
        match self.place.get(name) {
            Some(&shard) => self.shards[shard].read(name, from, buffer),
            None => Err(Error::NoTensor { tensor: name.to_owned(), dir: self.dir.clone() }),
        }
    }

    /// How the folder is quantized; `None` where it is dense.
    #[must_use]
    pub fn dialect(&self) -> Option<&Dialect> {
        self.dialect.as_ref()
    }

    /// The scheme of `module` as it lies on disk, scale type included; `None` where its weight is dense or absent.
    #[must_use]
    pub fn scheme_of(&self, module: &str) -> Option<Scheme> {
        let dialect = self.dialect.as_ref()?;
        let format = dialect.format_of(module)?;
        let codes = self.spec(&format!("{module}.{}", format.codes()))?;
        if is_dense(codes.dtype) {
            return None;
        }
        if self.gguf.is_some() {
            return dialect.scheme_of(module);
        }
        let scales = self.spec(&format!("{module}.{}", format.scales()))?;
        Some(format.seen(dialect.scheme_of(module)?, codes, scales))
    }

    /// How the input of the linear `module` is rounded at run time.
    ///
    /// # Errors
    /// [`Error::NoTensor`] where a number of calibration's is asked for and missing; [`Error::Damaged`] where it is no number
    /// that can be divided by.
    pub fn inputs(&self, module: &str) -> Result<Inputs, Error> {
        let rule = self.dialect.as_ref().and_then(|d| Some((d.format_of(module)?, d.scheme_of(module)?)));
        let Some((format, scheme)) = rule else { return Ok(Inputs::FULL) };
        let input = format.input(module, &scheme, self)?;
        if input.is_some_and(|input| !(input.is_finite() && input > 0.0)) {
            let (module, source) = (module.to_owned(), bitmill_scheme::Error::Input(input));
            return Err(Error::Damaged { module, dir: self.dir.clone(), source });
        }
        Ok(Inputs { activations: scheme.activations, stored: input.unwrap_or(1.0) })
    }

    /// The scales that keys and values of the module `attention` are rounded with, as E4M3 numbers times a scale; `None` where
    /// they are left as they are.
    ///
    /// # Errors
    /// [`Error::NoTensor`] where one is missing (loaders would take 1); [`Error::Shape`] where it is no number above zero.
    pub fn cache_scales(&self, attention: &str) -> Result<Option<[f32; 2]>, Error> {
        if !self.dialect.as_ref().is_some_and(Dialect::rounds_cache) {
            return Ok(None);
        }
        let [k, v] = CACHE_SCALES.map(|suffix| {
            let view = self.tensor(&format!("{attention}.{suffix}"))?;
            match view.to_f32()?[..] {
                [scale] if scale.is_finite() && scale > 0.0 => Ok(scale),
                _ => Err(view.wrong_shape("[1], a number above zero,")),
            }
        });
        Ok(Some([k?, v?]))
    }

    /// The experts that the quantized matrix of `module` holds, one below the other, as those of gpt-oss do; plain numbers are
    /// stored as `module` `[experts, in, out]` there. `None` for other matrices.
    #[must_use]
    pub fn stacked(&self, module: &str) -> Option<usize> {
        self.stacks.get(module).copied()
    }

    /// The quantized module that the tensor `name` is a part of, its bias aside; `None` for other tensors.
    #[must_use]
    pub fn module_of<'n>(&self, name: &'n str) -> Option<&'n str> {
        // The parts of bitsandbytes hang below `weight`.
        let module = match name.split_once(".weight.") {
            Some((module, _)) => module,
            None => name.rsplit_once('.').filter(|(_, part)| *part != "bias")?.0,
        };
        self.scheme_of(module).map(|_| module)
    }

    /// The weight of the linear `module`, for example `model.layers.0.self_attn.q_proj`. What is stored decides: a
    /// floating-point `weight` is dense whatever the configuration claims.
    ///
    /// # Errors
    /// [`Error::NoTensor`] where there is none, or the contradiction between stored tensors and configuration.
    pub fn weight(&self, module: &str) -> Result<Weight<'_>, Error> {
        let name = format!("{module}.weight");
        if let Some(spec) = self.spec(&name)
            && is_dense(spec.dtype)
        {
            let view = self.tensor(&name)?;
            view.matrix()?;
            return Ok(Weight::Dense(view));
        }
        let rule = self.dialect.as_ref().and_then(|d| Some((d.format_of(module)?, d.scheme_of(module)?)));
        match rule {
            Some((format, scheme)) => format.decode(module, &scheme, self).map(Weight::Quantized),
            // No scheme says how to read it, so only a dense weight would have done.
            None => Err(self
                .tensor(&name)?
                .wrong_dtype("F32, F16, BF16 or F64, or a scheme for it in quantization_config,")),
        }
    }

    /// The shape `[out, in]` of the linear `module`, from headers where they say it.
    ///
    /// # Errors
    /// As [`Checkpoint::weight`].
    pub fn matrix_shape(&self, module: &str) -> Result<[usize; 2], Error> {
        let rule = self.dialect.as_ref().and_then(|d| Some((d.format_of(module)?, d.scheme_of(module)?)));
        match rule.filter(|_| self.scheme_of(module).is_some()) {
            Some((format, scheme)) => format.shape(module, &scheme, self),
            None => self.weight(module).map(|weight| weight.shape()),
        }
    }

    /// The shards, in name order.
    pub fn shard_paths(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(Shard::file)
    }

    /// What reading every shard once shows, in name order, but for the tensors that are read `later`.
    pub fn survey(&self, later: &dyn Fn(&str) -> bool) -> impl Iterator<Item = Survey<'_>> {
        self.shards.iter().map(move |shard| shard.survey(later))
    }

    /// Has the system read the first so many bytes of the weights, in the background: they are there when they are asked for. What
    /// cannot be read is told then.
    pub fn read_ahead(&self, most: usize) {
        let files: Vec<PathBuf> = self.shards.iter().map(|shard| shard.file().to_owned()).collect();
        let read = move || {
            // Small enough for what is copied to stay in a cache.
            let (mut buffer, mut left) = (vec![0; 1 << 18], most);
            for file in files {
                let Ok(mut file) = File::open(file) else { return };
                while left > 0 {
                    match file.read(&mut buffer) {
                        Ok(0) => break,
                        Ok(count) => left = left.saturating_sub(count),
                        Err(_) => return,
                    }
                }
            }
        };
        // Without a thread they are read when they are asked for.
        let _ = std::thread::Builder::new().name("read-ahead".into()).spawn(read);
    }

    /// Takes what was read of large shards so far out of the memory of this process. Tensors stay readable.
    pub fn release(&self) {
        self.shards.iter().for_each(Shard::release);
    }

    /// Relative paths of all other regular files, sorted: tokenizer, generation config, licence and so on. Hidden
    /// files and folders are skipped; links to files count as files, since download caches are made of them.
    ///
    /// # Errors
    /// [`Error::Io`] where a folder cannot be listed.
    pub fn other_files(&self) -> Result<Vec<PathBuf>, Error> {
        let own = |p: &Path| {
            p == Path::new(CONFIG)
                || p == Path::new(INDEX)
                || self.shards.iter().any(|s| s.path.strip_prefix(&self.dir).is_ok_and(|s| s == p))
        };
        let mut files = Vec::new();
        let mut folders = vec![PathBuf::new()];
        while let Some(folder) = folders.pop() {
            let path = self.dir.join(&folder);
            for entry in std::fs::read_dir(&path).map_err(io("list", &path))? {
                let entry = entry.map_err(io("list", &path))?;
                if entry.file_name().as_encoded_bytes().starts_with(b".") {
                    continue;
                }
                let relative = folder.join(entry.file_name());
                // Linked folders are not entered, so that a cycle cannot trap the walk.
                if entry.file_type().map_err(io("inspect", &entry.path()))?.is_dir() {
                    folders.push(relative);
                } else if entry.path().is_file() && !own(&relative) {
                    files.push(relative);
                }
            }
        }
        files.sort_unstable();
        Ok(files)
    }
}

/// The shards of the GGUF model in `path`, which may be any of them, and its header with the tensors of all.
fn gguf_shards(path: &Path, bytes: Option<Vec<u8>>) -> Result<(Vec<Shard>, Gguf), Error> {
    let (shard, mut gguf) = Shard::gguf(path.to_owned(), bytes)?;
    let number = |gguf: &Gguf, key: &str| gguf.get(key).and_then(gguf::Value::unsigned);
    let Some(count) = number(&gguf, gguf::SPLIT_COUNT).filter(|&n| n > 1) else { return Ok((vec![shard], gguf)) };
    let wrong = |file: &Path, reason: String| Error::Json { file: file.to_owned(), reason };
    let own = number(&gguf, gguf::SPLIT_NO).unwrap_or(0);
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let end = gguf::shard_end(own, count);
    let stem = name.strip_suffix(&end).ok_or_else(|| {
        wrong(
            path,
            format!("it is part {own} of {count}, so its name has to end in {end}, or its other parts cannot be found"),
        )
    })?;
    let mut shards = Vec::new();
    let mut tensors = Vec::new();
    for no in 0..count {
        let file = path.with_file_name(format!("{stem}{}", gguf::shard_end(no, count)));
        let (shard, mut header) = Shard::gguf(file.clone(), None)?;
        if (number(&header, gguf::SPLIT_NO), number(&header, gguf::SPLIT_COUNT)) != (Some(no), Some(count)) {
            return Err(wrong(&file, format!("it does not say that it is part {no} of {count}")));
        }
        tensors.append(&mut header.tensors);
        // Only the first describes the model.
        if no == 0 {
            gguf.metadata = header.metadata;
        }
        shards.push(shard);
    }
    let claimed = number(&gguf, gguf::SPLIT_TENSORS);
    if claimed != Some(tensors.len() as u64) {
        return Err(wrong(path, format!("its parts hold {} tensors where it claims {claimed:?}", tensors.len())));
    }
    gguf.tensors = tensors;
    Ok((shards, gguf))
}

/// The scale type stored as `dtype`.
pub(crate) fn scale_type(dtype: safetensors::Dtype) -> Option<ScaleType> {
    match dtype {
        safetensors::Dtype::F16 => Some(ScaleType::F16),
        safetensors::Dtype::BF16 => Some(ScaleType::Bf16),
        safetensors::Dtype::F32 => Some(ScaleType::F32),
        _ => None,
    }
}

fn read_json(path: &Path, remedy: &'static str) -> Result<Value, Error> {
    let text = match std::fs::read(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::Missing { path: path.to_owned(), remedy });
        }
        other => other.map_err(io("read", path))?,
    };
    serde_json::from_slice(&text).map_err(|e| Error::Json { file: path.to_owned(), reason: e.to_string() })
}

/// `config.json`, with what ModelOpt says of it beside it.
fn read_config(dir: &Path) -> Result<Value, Error> {
    let mut config = read_json(&dir.join(CONFIG), "a model folder needs its config.json")?;
    let Some(keys) = config.as_object_mut() else {
        return Err(Error::Json { file: dir.join(CONFIG), reason: "not an object".to_owned() });
    };
    let sidecar = dir.join(modelopt::SIDECAR);
    if keys.get(QUANTIZATION).is_none_or(Value::is_null) && sidecar.exists() {
        let folded = modelopt::folded(&read_json(&sidecar, "it was there")?);
        let reason = || Error::Json { file: sidecar.clone(), reason: "no \"quantization\" with keys".to_owned() };
        keys.insert(QUANTIZATION.to_owned(), folded.ok_or_else(reason)?);
    }
    Ok(config)
}

/// `weight_map` of an index; every value is a plain file name, so that an index cannot point outside its folder.
fn weight_map(index: &Path) -> Result<BTreeMap<String, String>, Error> {
    let remedy = "the folder holds neither model.safetensors nor an index; only safetensors checkpoints are read";
    let value = read_json(index, remedy)?;
    let wrong = |reason: String| Error::Json { file: index.to_owned(), reason };
    let map = value.get("weight_map").and_then(Value::as_object).ok_or_else(|| wrong("no weight_map".to_owned()))?;
    let mut out = BTreeMap::new();
    for (tensor, shard) in map {
        let shard = shard.as_str().unwrap_or_default();
        let mut parts = Path::new(shard).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
            return Err(wrong(format!("weight_map sends {tensor} to {shard:?}, which is not a file name")));
        }
        out.insert(tensor.clone(), shard.to_owned());
    }
    Ok(out)
}

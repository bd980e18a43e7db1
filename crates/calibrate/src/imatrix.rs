//! Importance matrices of llama.cpp: the mean square of every input of every linear, which is the diagonal of H.
//!
//! Both layouts are read and written. The newer one is a GGUF file with, for each tensor, `NAME.in_sum2` (F32
//! `[matrices, in]`, sums of squares) and `NAME.counts` (F32 `[matrices, 1]`, the tokens they were summed over). The older
//! one (`.dat`) is a list of i32 length and name, i32 calls, i32 length and f32 values, mean squares times calls; then the
//! number of chunks and the name of the text.

use crate::{Error, Statistics};
use bitmill_checkpoint::gguf::{self, GgufSpec, Storage, Value, ValueType};
use bitmill_checkpoint::{Dtype, OutputPlan};
use bitmill_models::{ModelSpec, SITES};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Statistics of activations as llama.cpp exchanges them.
#[derive(Debug, Clone, PartialEq)]
pub struct Imatrix {
    /// By GGUF's name of the weight (`blk.0.attn_q.weight`).
    pub entries: BTreeMap<String, Importance>,
    /// Names of the texts.
    pub datasets: Vec<String>,
    /// Windows of text.
    pub chunks: u32,
    /// Tokens of a window; 0 where the file does not say.
    pub chunk_size: u32,
}

/// What one weight's inputs were.
#[derive(Debug, Clone, PartialEq)]
pub struct Importance {
    /// Mean square of each input; of several matrices (experts), one after another.
    pub mean_squares: Vec<f32>,
    /// What the mean is over, of each matrix: tokens, or calls in the older layout.
    pub counts: Vec<f32>,
}

/// Ends of the names of a weight's two tensors.
const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";
/// Names in the older layout are not longer than this.
const LONGEST_NAME: usize = 4096;

impl Imatrix {
    /// Reads `file` in either layout.
    ///
    /// # Errors
    /// [`Error::Imatrix`] for a file that is neither, cut off, or holds NaN, infinity or negative numbers.
    pub fn read(file: &Path) -> Result<Self, Error> {
        let bytes = std::fs::read(file).map_err(|source| Error::Io { path: file.to_owned(), source })?;
        Imatrix::parse(&bytes).map_err(|reason| Error::Imatrix { file: file.to_owned(), reason })
    }

    /// Parses the content of a file in either layout.
    ///
    /// # Errors
    /// A sentence on what is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let read = if bytes.starts_with(b"GGUF") { from_gguf(bytes) } else { from_dat(bytes) }?;
        if read.entries.is_empty() {
            return Err("it holds no weights".into());
        }
        for (name, entry) in &read.entries {
            let bad = |v: &&f32| !v.is_finite() || **v < 0.0;
            if let Some(v) = entry.mean_squares.iter().chain(&entry.counts).find(bad) {
                return Err(format!("{name} holds {v}, where mean squares and counts are finite and not negative"));
            }
        }
        Ok(read)
    }

    /// The diagonals of H in `statistics`, of a model whose tensors GGUF has names for.
    ///
    /// # Errors
    /// Those of reading the statistics.
    pub fn of(
        statistics: &Statistics,
        spec: &ModelSpec,
        dataset: &str,
        (chunks, length): (usize, usize),
    ) -> Result<Self, Error> {
        let mut entries = BTreeMap::new();
        let architecture = architecture(&spec.model_type);
        for block in 0..spec.layers {
            for site in &SITES {
                let h = statistics.hessian(block, site)?;
                let n = h.len().isqrt();
                let mean_squares: Vec<f32> = (0..n).map(|i| h[i * n + i]).collect();
                let linears = spec.block_linears(block).into_iter().filter(|(role, _)| site.linears.contains(role));
                for name in linears.filter_map(|(_, module)| gguf::gguf_name(architecture, &format!("{module}.weight")))
                {
                    let counts = vec![statistics.tokens() as f32];
                    entries.insert(name, Importance { mean_squares: mean_squares.clone(), counts });
                }
            }
        }
        let datasets = vec![dataset.to_owned()];
        Ok(Imatrix { entries, datasets, chunks: chunks as u32, chunk_size: length as u32 })
    }

    /// Mean square of each input of the linear `module` (as a folder of `model_type` calls it).
    #[must_use]
    pub fn importance(&self, model_type: &str, module: &str) -> Option<&[f32]> {
        let name = gguf::gguf_name(architecture(model_type), &format!("{module}.weight"))?;
        Some(&self.entries.get(&name)?.mean_squares)
    }

    /// Hash of all names and numbers.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let mut hash = blake3::Hasher::new();
        for (name, e) in &self.entries {
            hash.update(name.as_bytes());
            e.mean_squares.iter().chain(&e.counts).for_each(|v| {
                hash.update(&v.to_le_bytes());
            });
        }
        hash.finalize().to_hex().to_string()
    }

    /// Writes `file`, whose name ends in `.dat` for the older layout or `.gguf`.
    ///
    /// # Errors
    /// Those of the disk, and names that the container does not take.
    pub fn write(&self, file: &Path) -> Result<(), Error> {
        if file.extension().is_some_and(|e| e == "dat") {
            return std::fs::write(file, self.to_dat()).map_err(|source| Error::Io { path: file.to_owned(), source });
        }
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let stem = name.strip_suffix(".gguf").ok_or_else(|| Error::Imatrix {
            file: file.to_owned(),
            reason: "its name has to end in .gguf or .dat".into(),
        })?;
        let dir =
            file.parent().filter(|p| !p.as_os_str().is_empty()).map_or_else(|| PathBuf::from("."), Path::to_owned);
        let keys = [
            ("general.type".to_owned(), Value::Text("imatrix".into())),
            ("imatrix.datasets".to_owned(), Value::texts(self.datasets.iter().cloned())),
            ("imatrix.chunk_count".to_owned(), Value::U32(self.chunks)),
            ("imatrix.chunk_size".to_owned(), Value::U32(self.chunk_size)),
        ];
        let tensors = self.tensors();
        let specs: Vec<(String, GgufSpec)> = tensors.iter().map(|(s, _)| (s.name.clone(), s.clone())).collect();
        let output = OutputPlan::gguf(stem, &keys, &[], &specs, u64::MAX)?.create(&dir)?;
        for (spec, values) in &tensors {
            output.write(&spec.name, &values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())?;
        }
        Ok(output.sync()?)
    }

    fn tensors(&self) -> Vec<(GgufSpec, Vec<f32>)> {
        let Some(kind) = gguf::by_storage(Storage::Dense(Dtype::F32)) else { return Vec::new() };
        let mut tensors = Vec::new();
        for (name, e) in &self.entries {
            let matrices = e.counts.len();
            let width = e.mean_squares.len() / matrices.max(1);
            let sum = |(i, &v): (usize, &f32)| (f64::from(v) * f64::from(e.counts[i / width.max(1)])) as f32;
            let sums = e.mean_squares.iter().enumerate().map(sum).collect();
            let spec = |end, shape| GgufSpec { name: format!("{name}{end}"), kind, shape };
            tensors.push((spec(SUMS, vec![matrices, width]), sums));
            tensors.push((spec(COUNTS, vec![matrices, 1]), e.counts.clone()));
        }
        tensors
    }

    fn to_dat(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let int = |out: &mut Vec<u8>, n: usize| out.extend((n as i32).to_le_bytes());
        int(&mut out, self.entries.len());
        for (name, e) in &self.entries {
            int(&mut out, name.len());
            out.extend(name.as_bytes());
            let most = e.counts.iter().copied().fold(1.0f32, f32::max);
            let calls = (most / self.chunk_size.max(1) as f32).ceil().max(1.0);
            int(&mut out, calls as usize);
            int(&mut out, e.mean_squares.len());
            e.mean_squares.iter().for_each(|v| out.extend((v * calls).to_le_bytes()));
        }
        int(&mut out, self.chunks as usize);
        let dataset = self.datasets.last().map_or("", String::as_str);
        int(&mut out, dataset.len());
        out.extend(dataset.as_bytes());
        out
    }
}

/// GGUF's architecture; others have the names that most share.
fn architecture(model_type: &str) -> &'static str {
    gguf::architecture(model_type).unwrap_or("llama")
}

fn from_gguf(bytes: &[u8]) -> Result<Imatrix, String> {
    let file = gguf::parse(bytes)?;
    let floats = |name: &str| -> Result<Vec<f32>, String> {
        let tensor = file.tensor(name).ok_or_else(|| format!("the tensor {name} is missing"))?;
        if tensor.kind.storage != Storage::Dense(Dtype::F32) {
            return Err(format!("the tensor {name} is {}, not F32", tensor.kind.name));
        }
        Ok(bytes[tensor.range.clone()].as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect())
    };
    let mut entries = BTreeMap::new();
    for name in file.tensors.iter().filter_map(|t| t.name.strip_suffix(SUMS)) {
        let (mut sums, counts) = (floats(&format!("{name}{SUMS}"))?, floats(&format!("{name}{COUNTS}"))?);
        if counts.is_empty() || sums.is_empty() || !sums.len().is_multiple_of(counts.len()) {
            return Err(format!("{name} has {} sums for {} matrices", sums.len(), counts.len()));
        }
        let width = sums.len() / counts.len();
        // Experts that no token reached weigh all inputs alike, as in llama-quantize.
        sums.iter_mut().enumerate().for_each(|(i, v)| match counts[i / width] {
            count if count > 0.0 => *v /= count,
            _ => *v = 1.0,
        });
        entries.insert(name.to_owned(), Importance { mean_squares: sums, counts });
    }
    let number = |key: &str| file.get(key).and_then(Value::unsigned).and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
    let datasets = match file.get("imatrix.datasets") {
        Some(Value::Array(ValueType::Text, items)) => items.iter().filter_map(Value::text).map(str::to_owned).collect(),
        _ => Vec::new(),
    };
    Ok(Imatrix { entries, datasets, chunks: number("imatrix.chunk_count"), chunk_size: number("imatrix.chunk_size") })
}

fn from_dat(mut bytes: &[u8]) -> Result<Imatrix, String> {
    const CUT: &str = "it is neither GGUF nor an importance matrix, or cut off";
    fn take<'a>(bytes: &mut &'a [u8], n: usize) -> Result<&'a [u8], String> {
        bytes.split_off(..n).ok_or_else(|| CUT.to_owned())
    }
    fn int(bytes: &mut &[u8]) -> Result<usize, String> {
        let four = take(bytes, 4)?.try_into().map_err(|_| CUT.to_owned())?;
        usize::try_from(i32::from_le_bytes(four)).map_err(|_| CUT.to_owned())
    }
    let mut entries = BTreeMap::new();
    for _ in 0..int(&mut bytes)? {
        let length = int(&mut bytes)?;
        if length > LONGEST_NAME {
            return Err(CUT.into());
        }
        let name = std::str::from_utf8(take(&mut bytes, length)?).map_err(|_| "a name is not UTF-8")?.to_owned();
        let (calls, values) = (int(&mut bytes)?, int(&mut bytes)?);
        let values = take(&mut bytes, values.checked_mul(4).ok_or(CUT)?)?;
        let over = if calls > 0 { calls as f32 } else { 1.0 };
        let mean_squares = values.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b) / over).collect();
        if entries.insert(name.clone(), Importance { mean_squares, counts: vec![over] }).is_some() {
            return Err(format!("{name} is there twice"));
        }
    }
    // What follows is there in most files only.
    let chunks = int(&mut bytes).unwrap_or(0) as u32;
    let length = int(&mut bytes).unwrap_or(0);
    let dataset = take(&mut bytes, length).ok().filter(|d| !d.is_empty());
    let datasets = dataset.map(|d| String::from_utf8_lossy(d).into_owned()).into_iter().collect();
    Ok(Imatrix { entries, datasets, chunks, chunk_size: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Imatrix {
        let entry = |k: usize| Importance {
            mean_squares: (0..8).map(|i| 0.25 * (i + k) as f32).collect(),
            counts: vec![1024.0],
        };
        let entries = ["blk.0.attn_q.weight", "blk.1.ffn_down.weight"].iter().enumerate();
        Imatrix {
            entries: entries.map(|(k, n)| ((*n).to_owned(), entry(k))).collect(),
            datasets: vec!["text.txt".into()],
            chunks: 2,
            chunk_size: 512,
        }
    }

    #[test]
    fn both_layouts_hold_what_was_written() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a.gguf", "a.dat"] {
            let file = dir.path().join(name);
            sample().write(&file).unwrap();
            let back = Imatrix::read(&file).unwrap();
            assert_eq!((back.chunks, &back.datasets), (2, &sample().datasets), "{name}");
            for (name, e) in &sample().entries {
                assert_eq!(back.entries[name].mean_squares, e.mean_squares);
            }
            assert_eq!(back.importance("llama", "model.layers.0.self_attn.q_proj").unwrap().len(), 8);
            assert!(back.importance("llama", "model.layers.0.self_attn.k_proj").is_none());
        }
        assert_eq!(Imatrix::read(&dir.path().join("a.gguf")).unwrap(), sample());
    }

    #[test]
    fn damage_is_an_error() {
        let whole = sample().to_dat();
        for cut in 0..whole.len() - 20 {
            assert!(Imatrix::parse(&whole[..cut]).is_err(), "{cut} bytes");
        }
        let mut nan = sample();
        nan.entries.values_mut().for_each(|e| e.mean_squares[3] = f32::NAN);
        assert!(Imatrix::parse(&nan.to_dat()).unwrap_err().contains("NaN"));
        assert!(Imatrix::parse(b"not a matrix at all").is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), gguf: bool) {
            if gguf {
                bytes.splice(0..0, *b"GGUF\x03\0\0\0");
            }
            _ = Imatrix::parse(&bytes);
        }
    }
}

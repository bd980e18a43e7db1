//! Statistics as a file: what one calibration pass saw at every site, for any number of runs after it.
//!
//! A safetensors file of, for block `b` and site `s`, `b.s.hessian` (F32 `[n(n+1)/2]`, the upper triangle of E[x·xᵀ] by
//! rows), `b.s.mean`, `b.s.mean_abs`, `b.s.abs_max` and, optionally, `b.s.fourth` (F32 `[n]`), the optional `sensitivity` (F64
//! `[blocks, 4]`, see [`Statistics::sensitivity`]) and `cross` (F64 `[sites, sites]`, see [`Statistics::cross`]), and `about` (U8): JSON that names the model and the text by their hashes. Several files
//! of one model are read as a mixture by weight, which is how texts are mixed without running any of them again.

use crate::{Error, SiteStats, Spread, Windows};
use bitmill_checkpoint::{Checkpoint, Dtype, Output, OutputPlan, TensorSpec};
use bitmill_models::{ModelSpec, SITES, Site};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// The version of the file's layout.
const VERSION: u32 = 1;

/// What statistics were collected from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// Version of the layout.
    pub version: u32,
    /// [`model_fingerprint`] of the model.
    pub model: String,
    /// Hash of the token ids.
    pub tokens: String,
    /// Windows of the text.
    pub windows: usize,
    /// Tokens per window.
    pub length: usize,
}

impl About {
    /// Describes a pass of `windows` through the model with this fingerprint.
    #[must_use]
    pub fn new(model: String, windows: &Windows) -> Self {
        let (count, length) = (windows.count(), windows.length);
        About { version: VERSION, model, tokens: windows.fingerprint(), windows: count, length }
    }
}

/// Hash of everything that decides a model's function: its configuration and its weight files.
///
/// # Errors
/// [`Error::Io`] when a weight file cannot be read.
pub fn model_fingerprint(model: &Checkpoint) -> Result<String, Error> {
    let mut all = blake3::Hasher::new();
    all.update(model.config().to_string().as_bytes());
    for path in model.shard_paths() {
        let mut file = blake3::Hasher::new();
        file.update_mmap_rayon(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        all.update(file.finalize().as_bytes());
    }
    Ok(all.finalize().to_hex().to_string())
}

/// Entries of the upper triangle of an `n × n` matrix.
const fn triangle(n: usize) -> usize {
    n * (n + 1) / 2
}

fn key(block: usize, site: &Site, what: &str) -> String {
    format!("{block}.{}.{what}", site.name)
}

fn width(spec: &ModelSpec, site: &Site) -> usize {
    spec.linear_shape(site.linears[0])[1]
}

/// A statistics file in the making; it appears under its name when it is finished.
pub struct StatisticsWriter {
    output: Output,
    draft: PathBuf,
    written: String,
    to: PathBuf,
}

impl StatisticsWriter {
    /// Lays the file out; `sensitivity` says whether there will be sensitivities.
    ///
    /// # Errors
    /// A full disk or a folder that cannot be written.
    pub fn create(to: &Path, spec: &ModelSpec, about: &About, sensitivity: bool) -> Result<Self, Error> {
        let about = serde_json::to_vec(&json!(about)).unwrap_or_default();
        let mut specs = vec![TensorSpec::new("about", Dtype::U8, [about.len()])];
        if sensitivity {
            let sites = spec.layers * SITES.len();
            specs.push(TensorSpec::new("sensitivity", Dtype::F64, [spec.layers, SITES.len()]));
            specs.push(TensorSpec::new("cross", Dtype::F64, [sites, sites]));
        }
        for (block, site) in (0..spec.layers).flat_map(|b| SITES.iter().map(move |s| (b, s))) {
            let n = width(spec, site);
            specs.push(TensorSpec::new(key(block, site, "hessian"), Dtype::F32, [triangle(n)]));
            specs.extend(
                ["mean", "mean_abs", "abs_max", "fourth"]
                    .map(|w| TensorSpec::new(key(block, site, w), Dtype::F32, [n])),
            );
        }
        let plan = OutputPlan::new(specs, u64::MAX)?;
        let mut draft = to.as_os_str().to_owned();
        draft.push(".draft");
        let draft = PathBuf::from(draft);
        let output = plan.create(&draft)?;
        output.write("about", &about)?;
        let written = plan.files().next().map(|(name, _)| name.to_owned()).unwrap_or_default();
        Ok(StatisticsWriter { output, draft, written, to: to.to_owned() })
    }

    /// Writes the statistics of a site.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn site(&self, block: usize, site: &Site, stats: &SiteStats) -> Result<(), Error> {
        let (n, h) = (stats.width(), stats.hessian());
        let upper = (0..n).flat_map(|i| h[i * n + i..(i + 1) * n].iter());
        self.output.write(&key(block, site, "hessian"), &upper.flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())?;
        let (mean, mean_abs, fourth) = (stats.mean(), stats.mean_abs(), stats.fourth());
        let all = [("mean", &mean[..]), ("mean_abs", &mean_abs), ("abs_max", stats.abs_max()), ("fourth", &fourth)];
        for (what, values) in all {
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            self.output.write(&key(block, site, what), &bytes)?;
        }
        Ok(())
    }

    /// Writes the sensitivities, `[blocks][4]` in the order of [`SITES`], and the correlations of sites,
    /// `[sites, sites]`.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn sensitivity(&self, values: &[[f64; 4]], cross: &[f64]) -> Result<(), Error> {
        let bytes = |values: &mut dyn Iterator<Item = &f64>| values.flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        self.output.write("sensitivity", &bytes(&mut values.iter().flatten()))?;
        Ok(self.output.write("cross", &bytes(&mut cross.iter()))?)
    }

    /// Makes the file durable and gives it its name.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn finish(self) -> Result<(), Error> {
        self.output.sync()?;
        let io = |source| Error::Io { path: self.to.clone(), source };
        std::fs::rename(self.draft.join(&self.written), &self.to).map_err(io)?;
        std::fs::remove_dir_all(&self.draft).map_err(io)
    }
}

/// Opened statistics: one file, or several mixed by weight.
#[derive(Debug)]
pub struct Statistics {
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    path: PathBuf,
    file: Checkpoint,
    about: About,
    /// Share of the mixture; the shares of all parts sum to 1.
    share: f64,
}

impl Statistics {
    /// Opens `files`, pairs of path and weight, for a model with this architecture and fingerprint. All headers are
    /// checked here.
    ///
    /// # Errors
    /// [`Error::Statistics`] for a file that is not of this kind, damaged, or of another model.
    pub fn open(files: &[(PathBuf, f64)], spec: &ModelSpec, model: &str) -> Result<Self, Error> {
        let total: f64 = files.iter().map(|f| f.1).sum();
        let parts = files.iter().map(|(path, weight)| Part::open(path, weight / total, spec, model));
        Ok(Statistics { parts: parts.collect::<Result<_, _>>()? })
    }

    /// What decides the numbers read: the content of the files and their weights, not their names.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be read.
    pub fn identity(&self) -> Result<Value, Error> {
        let part = |p: &Part| {
            let mut hash = blake3::Hasher::new();
            hash.update_mmap_rayon(&p.path).map_err(|source| Error::Io { path: p.path.clone(), source })?;
            Ok(json!({"share": p.share, "file": hash.finalize().to_hex().as_str(), "tokens": p.about.tokens,
                "windows": p.about.windows, "length": p.about.length}))
        };
        self.parts.iter().map(part).collect()
    }

    /// Whether this is one file, of this model and text.
    #[must_use]
    pub fn is_of(&self, about: &About) -> bool {
        matches!(&self.parts[..], [part] if part.about == *about)
    }

    /// Tokens the numbers were collected from.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.parts.iter().map(|p| (p.about.windows * p.about.length) as u64).sum()
    }

    /// H = E[x·xᵀ] of a site, row-major `[n, n]`.
    ///
    /// # Errors
    /// [`Error::Statistics`] when it holds NaN, infinity or a negative diagonal.
    pub fn hessian(&self, block: usize, site: &Site) -> Result<Vec<f32>, Error> {
        let upper = self.mixed(&key(block, site, "hessian"))?;
        // n(n+1)/2 = len.
        let n = ((8 * upper.len() + 1).isqrt() - 1) / 2;
        let mut h = vec![0.0; n * n];
        let mut rest = &upper[..];
        for i in 0..n {
            let (row, after) = rest.split_at(n - i);
            rest = after;
            if row[0] < 0.0 {
                return Err(self.parts[0].wrong(format!("{block}.{} has a negative second moment", site.name)));
            }
            for (j, &v) in row.iter().enumerate() {
                h[i * n + i + j] = v;
                h[(i + j) * n + i] = v;
            }
        }
        Ok(h)
    }

    /// E[x] of a site, per input.
    ///
    /// # Errors
    /// [`Error::Statistics`] when it holds NaN or infinity.
    pub fn mean(&self, block: usize, site: &Site) -> Result<Vec<f32>, Error> {
        self.mixed(&key(block, site, "mean"))
    }

    /// E|x| of a site, per input.
    ///
    /// # Errors
    /// As [`Statistics::mean`].
    pub fn mean_abs(&self, block: usize, site: &Site) -> Result<Vec<f32>, Error> {
        self.mixed(&key(block, site, "mean_abs"))
    }

    /// max |x| of a site over all texts, per input.
    ///
    /// # Errors
    /// As [`Statistics::mean`].
    pub fn abs_max(&self, block: usize, site: &Site) -> Result<Vec<f32>, Error> {
        let name = key(block, site, "abs_max");
        let mut max = vec![0.0f32; width_of(&self.parts[0], &name)];
        for part in &self.parts {
            max.iter_mut().zip(part.read(&name)?).for_each(|(m, v)| *m = m.max(v));
        }
        Ok(max)
    }

    /// KL divergence of the predictions (nats per position) per unit of output error tr(ΔHΔᵀ) of the linears that
    /// read a site, measured by probes; `[blocks][4]` in the order of [`SITES`]. `None` where a file was made without.
    ///
    /// # Errors
    /// [`Error::Statistics`] when it holds NaN, infinity or negative numbers.
    pub fn sensitivity(&self) -> Result<Option<Vec<[f64; 4]>>, Error> {
        let mut mixed: Vec<[f64; 4]> = Vec::new();
        for part in &self.parts {
            let Ok(view) = part.file.tensor("sensitivity") else { return Ok(None) };
            let values: Vec<f64> = view.bytes.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect();
            if values.iter().any(|v| !v.is_finite() || *v < 0.0) {
                return Err(part.wrong("a sensitivity is NaN, infinite or negative".into()));
            }
            let (rows, _) = values.as_chunks::<4>();
            mixed.resize(rows.len(), [0.0; 4]);
            for (sum, row) in mixed.iter_mut().zip(rows) {
                sum.iter_mut().zip(row).for_each(|(s, v)| *s += part.share * v);
            }
        }
        Ok(Some(mixed))
    }

    /// Correlations of what errors at two sites do to the predictions, row-major `[sites, sites]` with site `4·block + s`:
    /// the KL divergence of errors at all sites is Σ_a Σ_b c_ab·√(d_a·d_b), with d_a that of site a alone. `None` where a
    /// file was made without.
    ///
    /// # Errors
    /// [`Error::Statistics`] when it holds numbers that are no correlations.
    pub fn cross(&self) -> Result<Option<Vec<f64>>, Error> {
        let mut mixed: Vec<f64> = Vec::new();
        for part in &self.parts {
            let Ok(view) = part.file.tensor("cross") else { return Ok(None) };
            let values: Vec<f64> = view.bytes.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect();
            if values.iter().any(|v| !(-1.001..=1.001).contains(v)) {
                return Err(part.wrong("a correlation of sites is outside of -1 to 1".into()));
            }
            mixed.resize(values.len(), 0.0);
            mixed.iter_mut().zip(values).for_each(|(m, v)| *m += part.share * v);
        }
        Ok(Some(mixed))
    }

    /// How far the activation of a site is from evenly spread numbers, given its H.
    ///
    /// # Errors
    /// As [`Statistics::mean`].
    pub fn spread(&self, block: usize, site: &Site, h: &[f32]) -> Result<Spread, Error> {
        let max = self.abs_max(block, site)?;
        let square: Vec<f64> = h.iter().step_by(max.len() + 1).map(|&v| f64::from(v)).collect();
        let name = key(block, site, "fourth");
        let fourth = self.parts.iter().all(|p| p.file.contains(&name)).then(|| self.mixed(&name)).transpose()?;
        Ok(Spread::of(&square, fourth.as_deref(), &max))
    }

    /// Σ share · values over the parts.
    fn mixed(&self, name: &str) -> Result<Vec<f32>, Error> {
        if let [part] = &self.parts[..] {
            return part.read(name);
        }
        let mut sum = vec![0.0f64; width_of(&self.parts[0], name)];
        for part in &self.parts {
            sum.iter_mut().zip(part.read(name)?).for_each(|(s, v)| *s += part.share * f64::from(v));
        }
        Ok(sum.into_iter().map(|s| s as f32).collect())
    }
}

fn width_of(part: &Part, name: &str) -> usize {
    part.file.spec(name).map_or(0, |s| s.shape.iter().product())
}

impl Part {
    fn open(path: &Path, share: f64, spec: &ModelSpec, model: &str) -> Result<Self, Error> {
        let wrong = |reason: String| Error::Statistics { file: path.to_owned(), reason };
        let file = Checkpoint::open_file(path).map_err(|e| wrong(e.to_string()))?;
        let about = file.tensor("about").map_err(|_| wrong("it has no tensor `about`".into()))?;
        let about: Value = serde_json::from_slice(about.bytes).map_err(|e| wrong(format!("`about`: {e}")))?;
        if about["version"] != json!(VERSION) {
            return Err(wrong(format!("its layout has version {}, this bitmill reads {VERSION}", about["version"])));
        }
        let about: About = serde_json::from_value(about).map_err(|e| wrong(format!("`about`: {e}")))?;
        let part = Part { path: path.to_owned(), file, about, share };
        for (block, site) in (0..spec.layers).flat_map(|b| SITES.iter().map(move |s| (b, s))) {
            let n = width(spec, site);
            part.require(&key(block, site, "hessian"), Dtype::F32, &[triangle(n)])?;
            for what in ["mean", "mean_abs", "abs_max"] {
                part.require(&key(block, site, what), Dtype::F32, &[n])?;
            }
        }
        if part.file.contains("sensitivity") {
            part.require("sensitivity", Dtype::F64, &[spec.layers, SITES.len()])?;
        }
        if part.file.contains("cross") {
            part.require("cross", Dtype::F64, &[spec.layers * SITES.len(); 2])?;
        }
        // Shapes come first: "another architecture" says more than "other weights".
        if part.about.model != model {
            return Err(part.wrong("it was collected from a model with other weights or another config.json".into()));
        }
        Ok(part)
    }

    fn require(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<(), Error> {
        match self.file.spec(name) {
            None => Err(self.wrong(format!("tensor {name} is missing; it is of another model, or cut off"))),
            Some(s) if s.dtype != dtype || s.shape != shape => Err(self.wrong(format!(
                "tensor {name} is {:?} {:?}, this model needs {dtype:?} {shape:?}; it is of another model",
                s.dtype, s.shape
            ))),
            Some(_) => Ok(()),
        }
    }

    fn read(&self, name: &str) -> Result<Vec<f32>, Error> {
        let view = self.file.tensor(name)?;
        match view.first_non_finite() {
            Some(at) => Err(self.wrong(format!("tensor {name}: entry {at} is NaN or infinite; the file is damaged"))),
            None => Ok(view.to_f32()?),
        }
    }

    fn wrong(&self, reason: String) -> Error {
        Error::Statistics { file: self.path.clone(), reason }
    }
}

//! The work folder of a run: what makes it killable at any instant.
//!
//! `OUT.bitmill-partial/` holds the settings and fingerprints the run was started with, a journal with one line per
//! finished unit, the activations that enter the next block, and the output folder in the making. A line is appended
//! only when everything it speaks of is on disk, and every output byte has its place from the start, so whatever was
//! half done is simply done again in the same place.

use crate::Calibration;
use crate::{Error, Plan};
use bitmill_calibrate::Spread;
use bitmill_checkpoint::{Checkpoint, Survey};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// What is known about a quantized tensor once it is done.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TensorRecord {
    /// Module name.
    pub tensor: String,
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// Short name of its scheme.
    pub scheme: String,
    /// Method.
    pub method: String,
    /// tr(ΔHΔᵀ)/tr(WHWᵀ) of a calibrated method: the share of the output's energy that is error. ‖Δ‖²/‖W‖² otherwise.
    pub relative_error: f64,
    /// Whether `relative_error` is that of the output or of the weights.
    pub error_of: String,
    /// Bits per weight in the file.
    pub bits_per_weight: f64,
    /// Damping its Hessian needed.
    pub damping: Option<f32>,
    /// Tokens its Hessian was collected from.
    pub tokens: u64,
    /// Seconds spent on it.
    pub seconds: f64,
    /// What single stages brought, where there were any besides the method itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stages: Vec<StageChange>,
}

/// What a stage brought to one tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageChange {
    /// Its name.
    pub stage: String,
    /// What is compared with and without it.
    pub of: String,
    /// By how much that changed, as a share of the output's energy or of what it was; below zero is better, zero is a stage
    /// that was dropped.
    pub change: f64,
    /// How much of each of its parts was taken, where it can be taken in part.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<f64>,
}

/// What was seen at a site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SiteRecord {
    /// Its block.
    pub block: usize,
    /// Its name.
    pub site: String,
    /// Tokens seen.
    pub tokens: u64,
    /// Of an expert that tokens are routed to: the share of its H that is of tokens that are not its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prior: Option<f64>,
    /// How far the activation is from evenly spread numbers.
    #[serde(flatten)]
    pub spread: Spread,
}

impl SiteRecord {
    /// Whether it is what an expert reads that saw fewer tokens than it has inputs.
    #[must_use]
    pub fn starved(&self) -> bool {
        self.prior.is_some_and(|share| share > 0.5)
    }
}

/// What a stage that refines the whole model brought, on windows held out from it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageRecord {
    /// Its name.
    pub stage: String,
    /// What the losses are.
    pub loss: String,
    /// Windows held out.
    pub held_out_windows: usize,
    /// Loss on them before the stage.
    pub before: f64,
    /// Loss on them after it; equal to `before` where the stage lost and was dropped.
    pub after: f64,
    /// The pass that was kept; 0 where the stage was dropped.
    pub kept_pass: usize,
    /// Seconds spent.
    pub seconds: f64,
}

/// One line of the journal.
///
/// Lines that are written together are of units that were finished within one stretch of time; only after the last of them a run
/// can be taken up.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Line {
    /// Index of the unit.
    pub(crate) unit: usize,
    /// Hash of the activations saved for the next unit, if there are any.
    pub(crate) stream: Option<String>,
    /// The same of the full-precision model's, where it runs beside the rounded one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) full: Option<String>,
    /// Its quantized tensors.
    pub(crate) tensors: Vec<TensorRecord>,
    /// Its sites, where activations are known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) sites: Vec<SiteRecord>,
    /// What a stage after the last unit brought.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) stage: Option<StageRecord>,
    /// Fingerprints of the tensors that were read for it alone.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) sources: BTreeMap<String, String>,
    /// Whether more lines belong to it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) goes_on: bool,
}

/// The names of what lies in a work folder.
#[derive(Debug, Clone)]
pub(crate) struct Work(PathBuf);

impl Work {
    /// The work folder.
    pub(crate) fn dir(&self) -> &Path {
        &self.0
    }

    fn journal(&self) -> PathBuf {
        self.0.join("journal.jsonl")
    }

    /// The output folder in the making.
    pub(crate) fn output(&self) -> PathBuf {
        self.0.join("model")
    }

    /// File of the activations that enter unit `unit`.
    pub(crate) fn stream(&self, unit: usize) -> PathBuf {
        self.0.join(format!("stream-{unit}"))
    }

    /// File of those of the full-precision model.
    pub(crate) fn full_stream(&self, unit: usize) -> PathBuf {
        self.0.join(format!("stream-full-{unit}"))
    }
}

/// An open work folder.
pub(crate) struct Journal {
    pub(crate) work: Work,
    file: File,
    /// Lines of an earlier process, then of this one.
    pub(crate) lines: Vec<Line>,
    /// Keeps other processes out for as long as the journal lives.
    _lock: File,
}

pub(crate) fn io<'a>(path: &'a Path, action: &'static str) -> impl Fn(std::io::Error) -> Error + 'a {
    move |source| Error::Io { path: path.to_owned(), action, source }
}

impl Journal {
    /// The work folder of output `out`.
    pub(crate) fn folder(out: &Path) -> PathBuf {
        let mut name = out.file_name().unwrap_or_default().to_owned();
        name.push(".bitmill-partial");
        out.with_file_name(name)
    }

    /// Whether an unfinished run with the same `identity` has units to take up. Writes nothing.
    ///
    /// # Errors
    /// [`Error::Leftover`] for one with another identity, unless it is to be discarded by `force`.
    pub(crate) fn resumable(out: &Path, identity: &Value, force: bool) -> Result<bool, Error> {
        let dir = Journal::folder(out);
        match started_with(&dir) {
            Some(theirs) if theirs != *identity && !force => Err(leftover(&dir, &theirs, identity)),
            Some(theirs) => {
                let journal = std::fs::read(dir.join("journal.jsonl")).unwrap_or_default();
                Ok(theirs == *identity && journal.contains(&b'\n'))
            }
            None => Ok(false),
        }
    }

    /// Opens the work folder of `out`, taking up an unfinished run with the same `identity`. Another run's leftover is
    /// refused by the name of what differs, or discarded with `force`.
    pub(crate) fn open(out: &Path, identity: &Value, force: bool) -> Result<Self, Error> {
        let dir = Journal::folder(out);
        std::fs::create_dir_all(&dir).map_err(io(&dir, "creating the work folder"))?;
        let lock = Journal::lock(&dir)?;
        let (identity_file, journal_file) = (dir.join("run.json"), dir.join("journal.jsonl"));
        match started_with(&dir) {
            Some(theirs) if theirs == *identity => {}
            Some(theirs) if !force => return Err(leftover(&dir, &theirs, identity)),
            // Another run's, or one whose identity was being discarded when it was killed.
            _ => discard(&dir, &journal_file)?,
        }
        write_durably(&identity_file, identity.to_string().as_bytes())?;
        let (file, lines) = Journal::lines(&journal_file)?;
        Ok(Journal { work: Work(dir), file, lines, _lock: lock })
    }

    fn lines(path: &Path) -> Result<(File, Vec<Line>), Error> {
        let mut options = File::options();
        let file = options.read(true).write(true).create(true).truncate(false).open(path);
        let mut file = file.map_err(io(path, "opening the journal"))?;
        let lines = Journal::recover(&mut file).map_err(io(path, "reading the journal"))?;
        Ok((file, lines))
    }

    /// Discards what is finished by `force`, since a tensor it was made of is another one: its name, and its fingerprints then
    /// and now.
    ///
    /// # Errors
    /// [`Error::Leftover`] without `force`.
    pub(crate) fn start_over(
        &mut self,
        identity: &Value,
        [tensor, theirs, ours]: [String; 3],
        force: bool,
    ) -> Result<(), Error> {
        if !force {
            return Err(Error::Leftover { work: self.work.0.clone(), what: format!("weights.{tensor}"), theirs, ours });
        }
        let path = self.work.journal();
        discard(self.work.dir(), &path)?;
        write_durably(&self.work.dir().join("run.json"), identity.to_string().as_bytes())?;
        (self.file, self.lines) = Journal::lines(&path)?;
        Ok(())
    }

    fn lock(dir: &Path) -> Result<File, Error> {
        let path = dir.join("lock");
        let file = File::create(&path).map_err(io(&path, "creating the lock"))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => Err(Error::Busy { work: dir.to_owned() }),
            Err(TryLockError::Error(source)) => Err(io(&path, "locking")(source)),
        }
    }

    /// Reads the lines up to the last one that nothing else belongs to, and cuts off what a kill left of others.
    fn recover(file: &mut File) -> std::io::Result<Vec<Line>> {
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        let (mut lines, mut read, mut good) = (Vec::new(), 0, [0, 0]);
        for part in text.split_inclusive(|&b| b == b'\n') {
            match serde_json::from_slice::<Line>(part) {
                Ok(line) if part.ends_with(b"\n") && line.unit == lines.len() => {
                    read += part.len();
                    let whole = !line.goes_on;
                    lines.push(line);
                    if whole {
                        good = [read, lines.len()];
                    }
                }
                _ => break,
            }
        }
        let [good, count] = good;
        lines.truncate(count);
        file.set_len(good as u64)?;
        file.seek(SeekFrom::End(0))?;
        Ok(lines)
    }

    /// Commits the units of `lines` together.
    pub(crate) fn append(&mut self, mut lines: Vec<Line>) -> Result<(), Error> {
        let path = self.work.journal();
        let count = lines.len();
        lines.iter_mut().enumerate().for_each(|(i, line)| line.goes_on = i + 1 < count);
        let text: String = lines.iter().map(|line| format!("{}\n", json!(line))).collect();
        self.file.write_all(text.as_bytes()).map_err(io(&path, "writing the journal"))?;
        self.file.sync_data().map_err(io(&path, "writing the journal"))?;
        self.lines.extend(lines);
        Ok(())
    }

    /// Removes the work folder; the run is complete.
    pub(crate) fn remove(self) -> Result<(), Error> {
        let dir = self.work.dir();
        std::fs::remove_dir_all(dir).map_err(io(dir, "removing the work folder"))
    }
}

/// Writes a file so that after a crash it is either old or new.
pub(crate) fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let draft = path.with_extension("draft");
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&draft)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&draft, path)
    };
    write().map_err(io(path, "writing"))
}

/// Everything that decides the bytes of the output: version, settings, weights, calibration.
pub(crate) fn identity(
    input: &Checkpoint,
    surveys: &[Survey<'_>],
    plan: &Plan,
    calibration: Option<Calibration<'_>>,
) -> Result<Value, Error> {
    let calibration = match calibration {
        Some(Calibration::Text(w)) if w.are_images() => {
            json!({"images": w.count(), "length": w.length, "pixels": w.fingerprint()})
        }
        Some(Calibration::Text(w)) => {
            json!({"windows": w.count(), "length": w.length, "tokens": w.fingerprint()})
        }
        Some(Calibration::Statistics(s)) => s.identity()?,
        Some(Calibration::Importance(i)) => json!({"imatrix": i.fingerprint()}),
        None => Value::Null,
    };
    let mut identity = json!({
        "bitmill": env!("CARGO_PKG_VERSION"),
        "settings": plan.settings,
        "weights": fingerprints(surveys, &BTreeMap::new()),
        "config": blake3::hash(input.config().to_string().as_bytes()).to_hex().as_str(),
        "calibration": calibration,
    });
    if let Some(attention) = plan.settings.observation.arithmetic.attention() {
        identity["attention"] = json!(attention);
    }
    if plan.gguf.is_some() {
        // The file's metadata hold the tokenizer, which the weights and the config do not.
        let mut hash = blake3::Hasher::new();
        plan.output.headers().for_each(|h| {
            hash.update(h);
        });
        identity["metadata"] = json!(hash.finalize().to_hex().as_str());
    }
    Ok(identity)
}

/// Fingerprints of the weight files by name, as far as they are known: `later` are those of tensors that no survey read.
pub(crate) fn fingerprints(surveys: &[Survey<'_>], later: &BTreeMap<String, String>) -> Value {
    let named = |survey: &Survey<'_>| {
        let name = survey.file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        (name, json!(survey.fingerprint(later)))
    };
    Value::Object(surveys.iter().map(named).collect())
}

/// Empties a work folder but for its lock. The journal goes first: whatever a kill leaves of the rest, no line of it can
/// be taken for a finished unit of the next run.
fn discard(dir: &Path, journal: &Path) -> Result<(), Error> {
    let remove = |path: &Path| {
        let removed = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
        removed.map_err(io(path, "discarding an unfinished run"))
    };
    if journal.exists() {
        remove(journal)?;
    }
    for entry in std::fs::read_dir(dir).map_err(io(dir, "listing the work folder"))?.flatten() {
        if entry.file_name() != "lock" {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// The identity an unfinished run was started with.
fn started_with(dir: &Path) -> Option<Value> {
    serde_json::from_slice(&std::fs::read(dir.join("run.json")).ok()?).ok()
}

fn leftover(dir: &Path, theirs: &Value, ours: &Value) -> Error {
    let (what, theirs, ours) = first_difference("", theirs, ours);
    Error::Leftover { work: dir.to_owned(), what, theirs, ours }
}

/// Path and values of the first leaf in which two objects differ.
fn first_difference(path: &str, theirs: &Value, ours: &Value) -> (String, String, String) {
    if let (Value::Object(a), Value::Object(b)) = (theirs, ours) {
        for key in a.keys().chain(b.keys().filter(|k| !a.contains_key(*k))) {
            let (x, y) = (a.get(key).unwrap_or(&Value::Null), b.get(key).unwrap_or(&Value::Null));
            if x != y {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                return first_difference(&path, x, y);
            }
        }
    }
    (path.replace("settings.", ""), theirs.to_string(), ours.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(unit: usize) -> Line {
        Line { unit, ..Line::default() }
    }

    #[test]
    fn a_torn_line_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let (out, identity) = (dir.path().join("out"), json!({"a": 1}));
        let mut journal = Journal::open(&out, &identity, false).unwrap();
        journal.append(vec![line(0)]).unwrap();
        journal.append(vec![line(1)]).unwrap();
        drop(journal);
        let path = Journal::folder(&out).join("journal.jsonl");
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..=whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let expected = whole[..cut].iter().filter(|&&b| b == b'\n').count();
            let mut journal = Journal::open(&out, &identity, false).unwrap();
            assert_eq!(journal.lines.len(), expected);
            journal.append(vec![line(expected)]).unwrap();
            drop(journal);
            assert_eq!(Journal::open(&out, &identity, false).unwrap().lines.len(), expected + 1);
        }
    }

    #[test]
    fn of_lines_that_belong_together_all_count_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let (out, identity) = (dir.path().join("out"), json!({"a": 1}));
        let mut journal = Journal::open(&out, &identity, false).unwrap();
        journal.append(vec![line(0)]).unwrap();
        journal.append(vec![line(1), line(2), line(3)]).unwrap();
        assert_eq!(journal.lines.len(), 4);
        drop(journal);
        let path = Journal::folder(&out).join("journal.jsonl");
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..=whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let expected = match whole[..cut].iter().filter(|&&b| b == b'\n').count() {
                2 | 3 => 1,
                lines => lines,
            };
            assert_eq!(Journal::open(&out, &identity, false).unwrap().lines.len(), expected);
        }
    }

    #[test]
    fn a_leftover_of_another_run_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let mut journal = Journal::open(&out, &json!({"settings": {"method": "gptq", "seed": 1}}), false).unwrap();
        journal.append(vec![line(0)]).unwrap();
        assert!(matches!(Journal::open(&out, &json!({}), false), Err(Error::Busy { .. })));
        drop(journal);
        let other = json!({"settings": {"method": "rtn", "seed": 1}});
        let error = Journal::open(&out, &other, false).err().unwrap().to_string();
        assert!(error.contains("another method (\"gptq\" there, \"rtn\" now)"), "{error}");
        assert!(Journal::open(&out, &other, true).unwrap().lines.is_empty());
    }

    #[test]
    fn a_journal_without_its_identity_is_not_taken_up() {
        let dir = tempfile::tempdir().unwrap();
        let (out, identity) = (dir.path().join("out"), json!({"a": 1}));
        let mut journal = Journal::open(&out, &identity, false).unwrap();
        journal.append(vec![line(0)]).unwrap();
        drop(journal);
        // What a kill could leave of a discarded run.
        std::fs::remove_file(Journal::folder(&out).join("run.json")).unwrap();
        assert!(!Journal::resumable(&out, &json!({"a": 2}), false).unwrap());
        assert!(Journal::open(&out, &json!({"a": 2}), false).unwrap().lines.is_empty());
    }
}

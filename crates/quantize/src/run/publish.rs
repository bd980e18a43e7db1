//! The end of a run: the folder is completed, described and given its name.

use super::copies::Copies;
use super::{Finished, card, pretty};
use crate::journal::{Journal, SiteRecord, StageRecord, TensorRecord, io, write_durably};
use crate::{Error, Plan};
use bitmill_checkpoint::OutputPlan;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Completes the folder and gives it its name, once all `copies` are there. `first` is what stages before the first unit brought.
pub(super) fn publish(
    copies: Copies,
    plan: &Plan,
    identity: &Value,
    journal: Journal,
    first: &[StageRecord],
    (out, force): (&Path, bool),
) -> Result<Finished, Error> {
    copies.finish()?;
    let later = journal.lines.iter().filter_map(|l| l.stage.clone());
    let stages: Vec<StageRecord> = first.iter().cloned().chain(later).collect();
    let tensors: Vec<TensorRecord> = journal.lines.iter().flat_map(|l| l.tensors.iter().cloned()).collect();
    let sites: Vec<SiteRecord> = journal.lines.iter().flat_map(|l| l.sites.iter().cloned()).collect();
    let manifest = manifest(plan, identity, (&tensors, &sites, &stages));
    // GGUF files are complete in themselves, and what describes them lies beside the first; a folder has more in it than
    // weights.
    let names = names(plan, &journal.work.output(), out);
    let first = names.first().map_or_else(|| out.to_owned(), |(_, to)| to.clone());
    match plan.gguf {
        Some(_) => write_durably(&beside(&first, ".bitmill.json"), &pretty(&manifest))?,
        None => complete_folder(plan, &manifest, &journal.work.output())?,
    }
    let log = beside(out, ".log.jsonl");
    let lines: String = tensors.iter().map(|t| format!("{}\n", json!(t))).collect();
    write_durably(&log, lines.as_bytes())?;
    // The first of several files is the one that is opened, so it appears last.
    for (i, (from, to)) in names.iter().enumerate().rev() {
        if to.exists() {
            if !force {
                return Err(Error::Exists { out: to.clone() });
            }
            let old = journal.work.dir().join(format!("replaced-{i}"));
            std::fs::rename(to, &old).map_err(io(to, "moving the old output away"))?;
        }
        std::fs::rename(from, to).map_err(io(to, "naming the output"))?;
    }
    journal.remove()?;
    Ok(Finished { out: first, log, tensors, sites, stages, manifest, bytes: plan.output.total_bytes() })
}

/// A file beside `path` whose name goes on with `ending`.
fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(ending);
    path.with_file_name(name)
}

/// What the finished output is called in the work folder `dir`, and what it will be: the folder, the file, or each of the
/// files named after it.
pub(super) fn names(plan: &Plan, dir: &Path, out: &Path) -> Vec<(PathBuf, PathBuf)> {
    match plan.gguf {
        None => vec![(dir.to_owned(), out.to_owned())],
        Some(_) => gguf_names(&plan.output, dir, out),
    }
}

/// What the GGUF files of `output` are called in `dir`, and what they will be.
pub(crate) fn gguf_names(output: &OutputPlan, dir: &Path, out: &Path) -> Vec<(PathBuf, PathBuf)> {
    let stem = out.file_stem().unwrap_or_default().to_string_lossy();
    let name = |file: &str| file.replacen(crate::gguf::STEM, &stem, 1);
    let files: Vec<&str> = output.files().map(|(file, _)| file).collect();
    match files[..] {
        [file] => vec![(dir.join(file), out.to_owned())],
        _ => files.iter().map(|file| (dir.join(file), out.with_file_name(name(file)))).collect(),
    }
}

/// What the output is and what it was made by. It is a function of input and settings, so seconds stay in the log beside it.
fn manifest(
    plan: &Plan,
    identity: &Value,
    (tensors, sites, stages): (&[TensorRecord], &[SiteRecord], &[StageRecord]),
) -> Value {
    json!({
        "run": identity,
        "model_type": plan.spec.as_ref().map(|s| s.model_type.as_str()),
        "parameters": plan.parameters,
        "bits_per_weight": plan.bits_per_weight(),
        "output_bytes": plan.output.total_bytes(),
        "mixture": plan.mixture,
        "tensors": tensors.iter().map(|t| json!({
            "tensor": t.tensor, "shape": t.shape, "scheme": t.scheme, "method": t.method,
            "bits_per_weight": t.bits_per_weight, "relative_error": t.relative_error, "error_of": t.error_of,
            "damping": t.damping, "tokens": t.tokens, "stages": t.stages,
        })).collect::<Vec<_>>(),
        "sites": sites,
        "stages": stages.iter().map(|s| json!({
            "stage": s.stage, "loss": s.loss, "held_out_windows": s.held_out_windows, "before": s.before,
            "after": s.after, "kept_pass": s.kept_pass,
        })).collect::<Vec<_>>(),
    })
}

/// Adds what a folder holds besides weights and copies.
fn complete_folder(plan: &Plan, manifest: &Value, dir: &Path) -> Result<(), Error> {
    write_durably(&dir.join("bitmill.json"), &pretty(manifest))?;
    // A card that came with the model is its author's; ours then stands beside it.
    let taken = plan.files.iter().any(|f| f.as_os_str().eq_ignore_ascii_case("README.md"));
    let name = if taken { "README.bitmill.md" } else { "README.md" };
    write_durably(&dir.join(name), card::card(plan, manifest).as_bytes())
}

//! Folders that break a rule of a loader, and what `bitmill check` says of them.

use super::{bitmill, books, edit, success};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// The real checkpoint rounded without data, under these flags.
pub(crate) fn quantized(dir: &Path, name: &str, flags: &[&str]) -> PathBuf {
    of(&books(), &dir.join(name), flags)
}

/// The same of another model.
pub(crate) fn of(model: &Path, out: &Path, flags: &[&str]) -> PathBuf {
    let method = ["--method", "rtn", "--no-report"];
    success(bitmill(["quantize"]).arg(model).arg("-o").arg(out).args(method).args(flags));
    out.to_owned()
}

/// Rules that `path` breaks, with what breaks them; the exit code says whether there are any.
pub(crate) fn broken(path: &Path, loader: &str, more: &[&str]) -> Vec<(String, String)> {
    let mut command = bitmill(["check"]);
    command.arg(path).args(["--loader", loader, "--json"]).args(more);
    let output = command.output().unwrap();
    let said: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    let rules = said["loaders"][0]["rules"].as_array().unwrap();
    let found: Vec<(String, String)> = (rules.iter())
        .filter(|r| r["met"] == false)
        .map(|r| (r["rule"].as_str().unwrap().to_owned(), r["broken"].to_string()))
        .collect();
    assert_eq!(output.status.code(), Some(if found.is_empty() { 0 } else { 3 }), "{found:?}");
    assert_eq!(said["loaders"][0]["met"], found.is_empty());
    found
}

/// Asserts that exactly `rule` is broken, in these words.
pub(crate) fn breaks(path: &Path, loader: &str, more: &[&str], rule: &str, words: &str) {
    let found = broken(path, loader, more);
    assert_eq!(found.iter().map(|(r, _)| r.as_str()).collect::<Vec<_>>(), [rule], "{found:?}");
    assert!(found[0].1.contains(words), "`{words}` is missing from: {}", found[0].1);
}

/// The folder with tensors of its only shard renamed, left out or added.
pub(crate) fn rewritten(from: &Path, to: &Path, change: impl Fn(&str) -> Vec<String>) -> PathBuf {
    std::fs::create_dir_all(to).unwrap();
    std::fs::copy(from.join("config.json"), to.join("config.json")).unwrap();
    let bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let views = tensors
        .tensors()
        .into_iter()
        .flat_map(|(name, view)| change(&name).into_iter().map(|n| (n, view.clone())).collect::<Vec<_>>());
    std::fs::write(to.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    to.to_owned()
}

/// Changes the bytes of one tensor of the folder's only shard.
pub(crate) fn patch(folder: &Path, name: &str, change: impl FnOnce(&mut [u8])) {
    let file = folder.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let (header, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let (from, to) = metadata.info(name).unwrap().data_offsets;
    change(&mut bytes[8 + header..][from..to]);
    std::fs::write(file, bytes).unwrap();
}

/// The real checkpoint with MLPs of `width`, and with one head of keys and values where `narrow` says so.
pub(crate) fn resized(to: &Path, width: usize, narrow: bool) -> PathBuf {
    std::fs::create_dir_all(to).unwrap();
    for file in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(books().join(file), to.join(file)).unwrap();
    }
    edit(&to.join("config.json"), |c| {
        c["intermediate_size"] = width.into();
        c["num_key_value_heads"] = if narrow { 1.into() } else { 2.into() };
    });
    let bytes = std::fs::read(books().join("model.safetensors")).unwrap();
    let cut = |(name, view): (String, TensorView<'_>)| {
        let [rows, cols] = view.shape()[..] else {
            return (name, view.dtype(), view.shape().to_vec(), view.data().to_vec());
        };
        let kept = match name.rsplit('.').nth(1) {
            Some("gate_proj" | "up_proj") => [width, cols],
            Some("down_proj") => [rows, width],
            Some("k_proj" | "v_proj") if narrow => [rows / 2, cols],
            _ => [rows, cols],
        };
        let data = view.data().chunks(2 * cols).take(kept[0]).flat_map(|row| &row[..2 * kept[1]]).copied().collect();
        (name, view.dtype(), kept.to_vec(), data)
    };
    let tensors: Vec<(String, _, Vec<usize>, Vec<u8>)> =
        SafeTensors::deserialize(&bytes).unwrap().tensors().into_iter().map(cut).collect();
    let views =
        tensors.iter().map(|(n, dtype, shape, data)| (n, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    std::fs::write(to.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    to.to_owned()
}

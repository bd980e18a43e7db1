//! What the tests of the binary share: running it, and looking at folders.

#![allow(dead_code, reason = "each test file uses its own part of this module")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

pub(crate) mod loaders;

use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The real checkpoint of the repository.
pub(crate) fn books() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/books-10m")
}

/// The binary with `args`, which connects to nothing.
pub(crate) fn bitmill<I: IntoIterator<Item = S>, S: AsRef<std::ffi::OsStr>>(args: I) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitmill"));
    command.args(args).env("HF_HUB_OFFLINE", "1");
    command
}

/// Standard output of a run that must succeed.
pub(crate) fn success(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    assert!(status.success(), "{command:?}: {status}\n{}", String::from_utf8_lossy(&stderr));
    String::from_utf8(stdout).unwrap()
}

/// JSON on standard output of a run that must succeed.
pub(crate) fn json(command: &mut Command) -> Value {
    serde_json::from_str(&success(command.arg("--json"))).unwrap()
}

/// Standard error of a run that must fail with `code`.
pub(crate) fn failure(command: &mut Command, code: i32) -> String {
    let output = command.output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{command:?}: {stderr}");
    stderr
}

/// Every file below `dir` with its bytes.
pub(crate) fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.insert(path.strip_prefix(dir).unwrap().to_owned(), std::fs::read(&path).unwrap());
            }
        }
    }
    files
}

/// Asserts that two folders hold the same files with the same bytes.
pub(crate) fn assert_same(a: &Path, b: &Path) {
    let (a, b) = (contents(a), contents(b));
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (path, bytes) in &a {
        assert!(*bytes == b[path], "{} differs", path.display());
    }
}

/// A copy of the real checkpoint that a test may damage. Small files are copied, the weights too.
pub(crate) fn copy_of_books(to: &Path) -> PathBuf {
    let dir = to.join("model");
    std::fs::create_dir_all(&dir).unwrap();
    for file in
        ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    {
        std::fs::copy(books().join(file), dir.join(file)).unwrap();
    }
    dir
}

/// Edits a JSON file.
pub(crate) fn edit(file: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(file, value.to_string()).unwrap();
}

/// Arguments of a calibrated run small enough to repeat: 8 windows of 64 tokens.
pub(crate) const QUICK: [&str; 4] = ["--samples", "8", "--sequence-length", "64"];

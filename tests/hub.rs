//! Models by their name on the hub, from a cache that is made for the test: nothing may be fetched.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use support::{bitmill, books, failure, json, success};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A cache as the hub's clients leave it: blobs, a snapshot of links to them, and a ref.
fn cache(home: &Path) -> PathBuf {
    let repository = home.join("hub/models--books--books-10m");
    let (blobs, snapshot) = (repository.join("blobs"), repository.join("snapshots").join(COMMIT));
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(repository.join("refs")).unwrap();
    std::fs::write(repository.join("refs/main"), COMMIT).unwrap();
    for (i, file) in ["config.json", "model.safetensors", "tokenizer.json"].iter().enumerate() {
        std::fs::copy(books().join(file), blobs.join(format!("{i}"))).unwrap();
        std::os::unix::fs::symlink(format!("../../blobs/{i}"), snapshot.join(file)).unwrap();
    }
    repository
}

fn with_home(command: &mut Command, home: &Path) -> Command {
    let mut fresh = Command::new(command.get_program());
    fresh.args(command.get_args()).env_remove("HF_HUB_CACHE").env("HF_HOME", home).env("HF_HUB_OFFLINE", "1");
    fresh
}

#[test]
fn a_name_is_found_in_the_cache() {
    let dir = tempfile::tempdir().unwrap();
    let repository = cache(dir.path());
    let out = dir.path().join("out");
    let mut quantize = bitmill(["quantize", "books/books-10m", "-o"]);
    quantize.arg(&out).args(["--method", "rtn", "--no-report"]);
    success(&mut with_home(&mut quantize, dir.path()));
    assert!(out.join("tokenizer.json").is_file() && !out.join("tokenizer.json").is_symlink());
    for revision in ["main", COMMIT] {
        let said =
            json(&mut with_home(&mut bitmill(["inspect", "books/books-10m", "--revision", revision]), dir.path()));
        assert_eq!(said["format"], "dense");
    }
    // HF_HUB_CACHE comes before HF_HOME.
    let mut inspect = with_home(&mut bitmill(["inspect", "books/books-10m"]), Path::new("/nowhere"));
    success(inspect.env("HF_HUB_CACHE", repository.parent().unwrap()));
    let original = ["--original", "books/books-10m", "--loader", "vllm"];
    success(&mut with_home(bitmill(["check"]).arg(&out).args(original), dir.path()));
}

#[test]
fn what_the_cache_lacks_is_said_with_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let repository = cache(dir.path());
    let said = |args: &[&str]| failure(&mut with_home(&mut bitmill(args), dir.path()), 1);
    let text = said(&["inspect", "books/other"]);
    for words in ["books/other is not in the hub's cache", "HF_HUB_OFFLINE forbids", "hf download books/other"] {
        assert!(text.contains(words), "`{words}` is missing from: {text}");
    }
    let text = said(&["inspect", "books/books-10m", "--revision", "v2"]);
    for words in
        ["no revision v2 of books/books-10m", "it holds main, ", COMMIT, "hf download books/books-10m --revision v2"]
    {
        assert!(text.contains(words), "`{words}` is missing from: {text}");
    }
    // A ref that points outside leads nowhere.
    std::fs::write(repository.join("refs/evil"), "../../../hub").unwrap();
    assert!(said(&["inspect", "books/books-10m", "--revision", "evil"]).contains("no revision evil"));
    let text = said(&["inspect", books().to_str().unwrap(), "--revision", "main"]);
    assert!(text.contains("--revision is for models by their name"), "{text}");
    let text = said(&["quantize", "nowhere", "-o", "out"]);
    assert!(text.contains("nowhere does not exist"), "{text}");
    std::fs::write(repository.join("blobs/9.incomplete"), "").unwrap();
    std::fs::remove_file(repository.join("snapshots").join(COMMIT).join("model.safetensors")).unwrap();
    let text = said(&["inspect", "books/books-10m"]);
    assert!(text.contains("was not finished") && text.contains("holds books/books-10m without all of"), "{text}");
}

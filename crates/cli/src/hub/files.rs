//! Which files of a repository make a model, and whether a snapshot has them.

use serde_json::Value;
use std::path::{Component, Path};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// What a folder that can be tokenized, or prepares images, has one of.
const READING: [&str; 5] = ["tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "preprocessor_config.json"];

/// Whether a path names a file of weights; what else is asked for inside of a repository is a folder.
pub(super) fn is_weights(inside: &Path) -> bool {
    inside.extension().is_some_and(|e| e == "gguf" || e == "safetensors")
}

/// Whether the snapshot holds all of `inside`, of which weights come last ([`small`], [`weights`]).
pub(super) fn whole(snapshot: &Path, inside: &Path) -> bool {
    let path = snapshot.join(inside);
    if is_weights(inside) {
        return match shards_of(inside) {
            Some((stem, count)) => {
                (1..=count).all(|i| snapshot.join(format!("{stem}-{i:05}-of-{count:05}.gguf")).exists())
            }
            None => path.exists(),
        };
    }
    let weights = path.join(SINGLE).exists()
        || shards(&path).is_some_and(|shards| shards.iter().all(|shard| path.join(shard).exists()));
    weights && path.join("config.json").exists() && READING.iter().any(|file| path.join(file).exists())
}

/// What a snapshot that is not whole lacks, for messages.
pub(super) fn missing(inside: &Path) -> String {
    match is_weights(inside) {
        true => inside.display().to_string(),
        false => "all of its configuration, tokenizer and safetensors weights".into(),
    }
}

/// Stem and number of the parts of a GGUF file that lies in several.
fn shards_of(file: &Path) -> Option<(String, usize)> {
    let name = file.to_str()?.strip_suffix(".gguf")?;
    let (rest, count) = name.rsplit_once("-of-")?;
    let (stem, index) = rest.rsplit_once('-')?;
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    (digits(index) && digits(count)).then(|| Some((stem.to_owned(), count.parse().ok()?))).flatten()
}

/// The files of weights that the index in `folder` names.
fn shards(folder: &Path) -> Option<Vec<String>> {
    let index: Value = serde_json::from_slice(&std::fs::read(folder.join(INDEX)).ok()?).ok()?;
    let mut files: Vec<String> =
        index.get("weight_map")?.as_object()?.values().filter_map(|file| Some(file.as_str()?.to_owned())).collect();
    files.sort_unstable();
    files.dedup();
    Some(files)
}

/// The files beside the weights: configuration, tokenizer, cards, the files of sentence-transformers. Never code, nor weights
/// in containers that run some.
///
/// # Errors
/// Why `listed` holds no model that is read here.
pub(super) fn small(inside: &Path, listed: &[String]) -> Result<Vec<String>, String> {
    if is_weights(inside) {
        let wanted = inside.to_string_lossy();
        let held: Vec<&str> = listed.iter().map(String::as_str).filter(|name| is_weights(Path::new(name))).collect();
        return match held.contains(&&*wanted) {
            true => Ok(Vec::new()),
            false => Err(format!("it holds no {wanted}, but {}", some(&held))),
        };
    }
    let own = |name: &&String| Path::new(name.as_str()).starts_with(inside);
    let names: Vec<&String> = listed.iter().filter(own).collect();
    let has = |file: &str| names.iter().any(|name| Path::new(name.as_str()) == inside.join(file));
    if !has(SINGLE) && !has(INDEX) {
        let files = |ends: &[&str]| -> Vec<&str> {
            listed.iter().map(String::as_str).filter(|name| ends.iter().any(|end| name.ends_with(end))).collect()
        };
        let (gguf, others) = (files(&[".gguf"]), files(&[".bin", ".pt", ".pth", ".safetensors", ".h5", ".msgpack"]));
        return Err(match (gguf.first(), others.is_empty()) {
            (Some(file), _) => format!("it holds GGUF files ({}); name one: org/model/{file}", some(&gguf)),
            (None, false) => format!(
                "it holds no {SINGLE}, but {}; pickles are not fetched: look for a --revision with safetensors (refs/pr/N)",
                some(&others)
            ),
            (None, true) => format!("it holds no {SINGLE}"),
        });
    }
    let wanted = |name: &&&String| {
        let path = Path::new(name.as_str());
        path.strip_prefix(inside).is_ok_and(|rest| is_small(rest) && plain(path))
    };
    Ok(names.iter().filter(wanted).map(|name| (*name).clone()).collect())
}

/// The files of weights, once `snapshot` has the small ones.
///
/// # Errors
/// An index that cannot be read, or that names what is not `listed`.
pub(super) fn weights(inside: &Path, listed: &[String], snapshot: &Path) -> Result<Vec<String>, String> {
    let listed = |name: &String| listed.contains(name).then(|| name.clone());
    if is_weights(inside) {
        let parts = match shards_of(inside) {
            Some((stem, count)) => (1..=count).map(|i| format!("{stem}-{i:05}-of-{count:05}.gguf")).collect(),
            None => vec![inside.to_string_lossy().into_owned()],
        };
        return parts.iter().map(|name| listed(name).ok_or_else(|| format!("it holds no {name}"))).collect();
    }
    let at = |file: &str| inside.join(file).to_string_lossy().into_owned();
    // A whole file wins over an index, as it does where the folder is opened.
    if let Some(single) = listed(&at(SINGLE)) {
        return Ok(vec![single]);
    }
    let shards = shards(&snapshot.join(inside)).ok_or_else(|| format!("its {INDEX} is not one"))?;
    let shard = |file: &String| {
        let name = at(file);
        listed(&name)
            .filter(|name| plain(Path::new(name)) && name.ends_with(".safetensors"))
            .ok_or_else(|| format!("its {INDEX} names {file}, which it does not hold"))
    };
    shards.iter().map(shard).collect()
}

/// Whether a file, by its path inside the model's folder, is one beside the weights.
fn is_small(path: &Path) -> bool {
    let Some(name) = path.file_name().and_then(|n| n.to_str()) else { return false };
    let json = name.ends_with(".json") && (!name.ends_with(".index.json") || name == INDEX);
    match path.parent().and_then(Path::to_str) {
        Some("") => {
            let cards = name == "README.md" || ["LICENSE", "USE_POLICY", "NOTICE"].iter().any(|c| name.starts_with(c));
            json || cards
                || name.ends_with(".model")
                || name.ends_with(".jinja")
                || ["vocab.txt", "merges.txt"].contains(&name)
        }
        // `1_Pooling` and its like.
        Some(module) => {
            json && module.split_once('_').is_some_and(|(n, _)| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
        }
        None => false,
    }
}

/// Whether a path that a server names stays below the folder it is put in.
pub(super) fn plain(path: &Path) -> bool {
    path.components().all(|part| matches!(part, Component::Normal(_)))
}

/// A few of `names`, for messages.
fn some(names: &[&str]) -> String {
    let more = if names.len() > 3 { ", …" } else { "" };
    names.iter().take(3).copied().collect::<Vec<_>>().join(", ") + more
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_model_is_its_weights_and_what_reads_them() {
        let listed = names(&[
            ".gitattributes",
            "README.md",
            "LICENSE",
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "merges.txt",
            "train.txt",
            "tokenizer.model",
            "chat_template.jinja",
            "modeling_own.py",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            "model.safetensors.index.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "consolidated.safetensors",
            "onnx/model.onnx",
            "onnx/config.json",
            "1_Pooling/config.json",
            "../evil.json",
            "/etc/x.json",
            "1_/../../x.json",
        ]);
        let small = small(Path::new(""), &listed).unwrap();
        let expected = [
            "README.md",
            "LICENSE",
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "merges.txt",
            "tokenizer.model",
            "chat_template.jinja",
            "model.safetensors.index.json",
            "1_Pooling/config.json",
        ];
        assert_eq!(small, names(&expected));
        let dir = tempfile::tempdir().unwrap();
        let index = |second: &str| {
            let map =
                serde_json::json!({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": second, "c": second}});
            std::fs::write(dir.path().join(INDEX), map.to_string()).unwrap();
            weights(Path::new(""), &listed, dir.path())
        };
        let both = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        assert_eq!(index(both[1]).unwrap(), names(&both));
        for evil in ["../evil.json", "gone.safetensors", "modeling_own.py"] {
            assert!(index(evil).unwrap_err().contains(evil));
        }
        index(both[1]).unwrap();
        for file in ["config.json", "tokenizer.json", both[0]] {
            assert!(!whole(dir.path(), Path::new("")));
            std::fs::write(dir.path().join(file), "").unwrap();
        }
        assert!(!whole(dir.path(), Path::new("")), "a shard is missing");
        std::fs::write(dir.path().join(both[1]), "").unwrap();
        assert!(whole(dir.path(), Path::new("")));
    }

    #[test]
    fn files_are_fetched_alone_and_what_is_no_model_says_what_it_is() {
        let listed = names(&["q4.gguf", "big-00001-of-00002.gguf", "big-00002-of-00002.gguf", "config.json"]);
        let of = |file: &str| {
            let inside = Path::new(file);
            small(inside, &listed).and_then(|_| weights(inside, &listed, Path::new("/nowhere")))
        };
        assert_eq!(of("q4.gguf").unwrap(), names(&["q4.gguf"]));
        assert_eq!(of("big-00002-of-00002.gguf").unwrap(), listed[1..3]);
        assert!(of("q8.gguf").unwrap_err().contains("holds no q8.gguf, but q4.gguf"));
        assert!(of("").unwrap_err().contains("name one: org/model/q4.gguf"));
        let said = small(Path::new(""), &names(&["config.json", "pytorch_model.bin"])).unwrap_err();
        assert!(said.contains("pytorch_model.bin") && said.contains("pickles are not fetched"), "{said}");
        assert!(small(Path::new("sub"), &names(&["model.safetensors"])).is_err());
        let nested = names(&["sub/model.safetensors", "sub/config.json", "config.json"]);
        assert_eq!(small(Path::new("sub"), &nested).unwrap(), names(&["sub/config.json"]));
        assert_eq!(
            weights(Path::new("sub"), &nested, Path::new("/nowhere")).unwrap(),
            names(&["sub/model.safetensors"])
        );
    }
}

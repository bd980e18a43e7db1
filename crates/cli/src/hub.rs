//! Models by the name they have on the hub: `org/model`, found in the cache that its clients share, or fetched into it.
//!
//! The cache is a documented layout of folders. What it holds whole is read as it lies, without a connection:
//!
//! ```text
//! models--org--model/refs/main             the commit that a revision stands for
//! models--org--model/snapshots/COMMIT/…    its files, as links into blobs/
//! ```

mod account;
mod fetch;
mod files;

use anyhow::{bail, ensure};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The revision that a name stands for.
const MAIN: &str = "main";

/// A revision of a repository, or of a file or folder inside of it, as a user asked for it.
struct Wanted<'a> {
    /// What the user gave.
    given: &'a Path,
    /// `org/model`.
    repository: String,
    /// The file or folder inside, empty for the whole.
    inside: PathBuf,
    revision: Option<&'a str>,
    /// Where the hub's clients keep what they fetched.
    cache: PathBuf,
}

/// Puts the folder in the cache in place of every name of the hub among `models`, fetching what the cache lacks.
///
/// # Errors
/// A name or a revision that can be had neither from the cache nor from the hub, with what to do about it; a revision of nothing.
pub(crate) fn resolve(models: Vec<&mut PathBuf>, revision: Option<&str>) -> anyhow::Result<()> {
    let mut names = 0;
    for model in models {
        if let Some((repository, inside)) = repository(model) {
            let wanted = Wanted { given: model, repository, inside, revision, cache: cache(variable)? };
            let found = wanted.found()?;
            *model = found;
            names += 1;
        }
    }
    ensure!(names > 0 || revision.is_none(), "--revision is for models by their name on the hub (org/model)");
    Ok(())
}

/// An environment variable that is not empty.
fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|v| !v.is_empty())
}

impl Wanted<'_> {
    /// The path in the cache, to which what is missing there is fetched.
    fn found(&self) -> anyhow::Result<PathBuf> {
        let held = self.held();
        if let Some(snapshot) = held.as_ref().filter(|snapshot| files::whole(snapshot, &self.inside)) {
            return Ok(snapshot.join(&self.inside));
        }
        if let Some(switch) = account::offline(variable) {
            bail!("{}; {switch} forbids to fetch it: {}", self.lacking(held.as_deref()), self.elsewhere());
        }
        // A slip in a path of one's own is nobody else's business.
        let first = self.given.components().next().map(|first| Path::new(first.as_os_str()));
        if let Some(folder) = first.filter(|first| first.is_dir() && held.is_none() && self.revision.is_none()) {
            let (given, folder) = (self.given.display(), folder.display());
            bail!(
                "{given} does not exist, and {folder} is a folder here, so the hub is not asked for it; --revision {MAIN} asks"
            );
        }
        Ok(fetch::fetch(self)?.join(&self.inside))
    }

    /// The folder of the repository in the cache.
    fn folder(&self) -> PathBuf {
        self.cache.join(format!("models--{}", self.repository.replace('/', "--")))
    }

    fn revision(&self) -> &str {
        self.revision.unwrap_or(MAIN)
    }

    /// The snapshot of the revision in the cache, be it that files are missing there.
    fn held(&self) -> Option<PathBuf> {
        let (folder, wanted) = (self.folder(), self.revision());
        // A commit is the name of its own snapshot; anything else is written down in refs.
        let commit = match std::fs::read_to_string(folder.join("refs").join(wanted)) {
            Ok(commit) => commit.trim().to_owned(),
            Err(_) => wanted.to_owned(),
        };
        let plain = !commit.is_empty() && !commit.contains(['/', '\\']) && !commit.starts_with('.');
        plain.then(|| folder.join("snapshots").join(commit)).filter(|snapshot| snapshot.is_dir())
    }

    /// What the cache, which may hold a part of it, lacks.
    fn lacking(&self, held: Option<&Path>) -> String {
        let Wanted { given, repository, cache, .. } = self;
        let (folder, wanted, cache) = (self.folder(), self.revision(), cache.display());
        match (held, folder.is_dir()) {
            (Some(_), _) => {
                let missing = files::missing(&self.inside);
                format!(
                    "the hub's cache {cache} holds {repository} without {missing}, as a download that was not finished leaves it"
                )
            }
            (None, true) => {
                let held = revisions(&folder);
                let held = if held.is_empty() { "none".to_owned() } else { held.join(", ") };
                format!("the hub's cache {cache} holds no revision {wanted} of {repository} (it holds {held})")
            }
            (None, false) => {
                format!("{} is no path here, and {repository} is not in the hub's cache {cache}", given.display())
            }
        }
    }

    /// How to have it without this machine's network.
    fn elsewhere(&self) -> String {
        let option = self.revision.map_or(String::new(), |r| format!(" --revision {r}"));
        format!(
            "on a machine with network run `hf download {}{option}` and copy its cache here, or give a folder",
            self.repository
        )
    }
}

/// The repository that `given` names, and the path of a file inside of it; `None` where it is a path.
fn repository(given: &Path) -> Option<(String, PathBuf)> {
    if given.exists() || given.is_absolute() {
        return None;
    }
    let parts: Vec<&str> = given.to_str()?.split('/').collect();
    // What the hub allows in names; a path that starts with a dot is none.
    let letters = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let name = |part: &&str| !part.is_empty() && !part.starts_with(['.', '-']) && part.chars().all(letters);
    let inside = parts.iter().skip(2).all(|part| !part.is_empty() && !part.starts_with('.'));
    match &parts[..] {
        [org, model, rest @ ..] if name(org) && name(model) && inside => {
            let file_name = rest.is_empty() && (model.ends_with(".gguf") || model.ends_with(".safetensors"));
            (!file_name).then(|| (format!("{org}/{model}"), rest.iter().collect()))
        }
        _ => None,
    }
}

/// Where the hub's clients keep what they fetched, by the variables that say so.
fn cache(variable: impl Fn(&str) -> Option<OsString>) -> anyhow::Result<PathBuf> {
    let home = || variable("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let hub = variable("HF_HUB_CACHE").or_else(|| variable("HUGGINGFACE_HUB_CACHE")).map(PathBuf::from);
    let own = || variable("HF_HOME").map(|home| PathBuf::from(home).join("hub"));
    let shared = || variable("XDG_CACHE_HOME").map(PathBuf::from).or_else(home).map(|c| c.join("huggingface/hub"));
    let found = hub.or_else(own).or_else(shared);
    found.ok_or_else(|| anyhow::anyhow!("there is no home folder to look for the hub's cache in; set HF_HUB_CACHE"))
}

/// What the cache has a snapshot of: names first, then commits, sorted.
fn revisions(folder: &Path) -> Vec<String> {
    let list = |dir: &str| {
        let entries = std::fs::read_dir(folder.join(dir)).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    };
    let snapshot = |name: &String| {
        let commit = std::fs::read_to_string(folder.join("refs").join(name)).unwrap_or_default();
        folder.join("snapshots").join(commit.trim()).is_dir()
    };
    list("refs").into_iter().filter(snapshot).chain(list("snapshots")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_hub_are_told_from_paths() {
        let file = |text: &str| repository(Path::new(text)).map(|(name, file)| (name, file.display().to_string()));
        assert_eq!(file("Qwen/Qwen3-0.6B"), Some(("Qwen/Qwen3-0.6B".into(), String::new())));
        assert_eq!(file("org/m/q4.gguf"), Some(("org/m".into(), "q4.gguf".into())));
        for path in ["model", "./a/b", "../a/b", "/a/b", "a/", "a/b c", "out/model.gguf", "a/b/../c", "~/b", "-a/b"] {
            assert_eq!(file(path), None, "{path}");
        }
        assert_eq!(file("src/hub.rs"), None, "it exists");
    }

    #[test]
    fn the_cache_is_where_its_clients_look_for_it() {
        let at = |set: &[(&str, &str)]| {
            let found = |name: &str| set.iter().find(|(n, _)| *n == name).map(|(_, v)| OsString::from(v));
            cache(found).map(|p| p.display().to_string()).ok()
        };
        let all = [("HF_HUB_CACHE", "/c"), ("HF_HOME", "/h"), ("XDG_CACHE_HOME", "/x"), ("HOME", "/u")];
        assert_eq!(at(&all).unwrap(), "/c");
        assert_eq!(at(&all[1..]).unwrap(), "/h/hub");
        assert_eq!(at(&all[2..]).unwrap(), "/x/huggingface/hub");
        assert_eq!(at(&all[3..]).unwrap(), "/u/.cache/huggingface/hub");
        assert_eq!(at(&[]), None);
    }
}

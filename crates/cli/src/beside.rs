//! Files that lie beside an output: their names, and writing them so that a kill leaves the old one or the new one.

use anyhow::Context;
use std::path::{Path, PathBuf};

/// The file beside `path` whose name goes on with `ending`.
pub(crate) fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(ending);
    path.with_file_name(name)
}

/// Gives `file` the contents `bytes`, all at once.
pub(crate) fn replace(file: &Path, bytes: impl AsRef<[u8]>) -> anyhow::Result<()> {
    let draft = beside(file, ".draft");
    std::fs::write(&draft, bytes).with_context(|| format!("writing {}", draft.display()))?;
    std::fs::rename(&draft, file).with_context(|| format!("writing {}", file.display()))
}

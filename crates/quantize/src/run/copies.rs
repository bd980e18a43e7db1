//! Files that go into the output as they are, copied while the weights are worked.

use crate::journal::io;
use crate::{Error, Plan};
use bitmill_checkpoint::Checkpoint;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

/// Files on their way into the output. Dropped, it waits for them.
pub(super) struct Copies(Option<JoinHandle<Result<(), Error>>>);

impl Copies {
    /// Begins to copy what the folder `dir` is to have of `input` besides weights; nothing where it is to be no folder.
    pub(super) fn begin(input: &Checkpoint, plan: &Plan, dir: &Path) -> Self {
        if plan.gguf.is_some() || plan.files.is_empty() {
            return Copies(None);
        }
        let files: Vec<(PathBuf, PathBuf)> = plan.files.iter().map(|f| (input.dir().join(f), dir.join(f))).collect();
        Copies(Some(std::thread::spawn(move || files.iter().try_for_each(|(from, to)| copy(from, to)))))
    }

    /// Waits until they are durable.
    ///
    /// # Errors
    /// What the disk said.
    pub(super) fn finish(mut self) -> Result<(), Error> {
        match self.0.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(copied) => copied.unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
        }
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        if let Some(files) = self.0.take() {
            // Who is dropped on the way has an error to tell already.
            let _ = files.join();
        }
    }
}

fn copy(from: &Path, to: &Path) -> Result<(), Error> {
    if let Some(parent) = to.parent() {
        std::fs::create_dir_all(parent).map_err(io(parent, "creating"))?;
    }
    let copy = || std::fs::copy(from, to).and_then(|_| File::open(to)?.sync_all());
    copy().map_err(io(to, "copying"))
}

//! Writing tensors at the places a plan gave them, from any thread and in any order.

use crate::error::io;
use crate::plan::{OutputPlan, Place};
use crate::{Error, space};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The open weight files of an output folder.
#[derive(Debug)]
pub struct Output {
    files: Vec<(PathBuf, File)>,
    places: BTreeMap<String, Place>,
}

impl Output {
    /// The `files` of `plan` in `dir`, whose names and sizes survive a loss of power from here on.
    pub(crate) fn new(plan: &OutputPlan, dir: &Path, files: Vec<File>) -> Result<Self, Error> {
        let files: Vec<(PathBuf, File)> = plan.shards.iter().map(|s| dir.join(&s.name)).zip(files).collect();
        for (path, file) in &files {
            file.sync_all().map_err(io("sync", path))?;
        }
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(io("sync", dir))?;
        Ok(Output { files, places: plan.places.clone() })
    }

    /// Writes the payload of the tensor `name` at its place; a second write replaces the first.
    ///
    /// # Errors
    /// [`Error::Layout`] where the plan has no such tensor or another length for it; [`Error::DiskFull`] where space
    /// could not be taken in advance and has run out; [`Error::Io`].
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let place = self.place(name)?;
        if place.bytes != bytes.len() {
            let reason = format!("{} bytes where the plan has {}", bytes.len(), place.bytes);
            return Err(Error::Layout { tensor: name.to_owned(), reason });
        }
        self.put(place, 0, bytes)
    }

    /// Writes a part of the payload of the tensor `name`, `at` bytes from its start.
    ///
    /// # Errors
    /// As [`Output::write`], and [`Error::Layout`] where the part does not lie within the payload.
    pub fn write_part(&self, name: &str, at: usize, bytes: &[u8]) -> Result<(), Error> {
        let place = self.place(name)?;
        if at.checked_add(bytes.len()).is_none_or(|end| end > place.bytes) {
            let reason = format!("{} bytes at {at} where the plan has {} in all", bytes.len(), place.bytes);
            return Err(Error::Layout { tensor: name.to_owned(), reason });
        }
        self.put(place, at as u64, bytes)
    }

    fn place(&self, name: &str) -> Result<&Place, Error> {
        let missing = || Error::Layout { tensor: name.to_owned(), reason: "not in the plan of the output".to_owned() };
        self.places.get(name).ok_or_else(missing)
    }

    fn put(&self, place: &Place, at: u64, bytes: &[u8]) -> Result<(), Error> {
        let (path, file) = &self.files[place.shard];
        match file.write_all_at(bytes, place.offset + at) {
            Err(e) if e.kind() == std::io::ErrorKind::StorageFull => {
                Err(Error::DiskFull { path: path.clone(), needed: bytes.len() as u64, free: space::free(path)? })
            }
            other => other.map_err(io("write", path)),
        }
    }

    /// Makes everything written so far survive a loss of power.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync(&self) -> Result<(), Error> {
        // Files had their names and sizes when this was made.
        self.files.iter().try_for_each(|(path, file)| file.sync_data().map_err(io("sync", path)))
    }
}

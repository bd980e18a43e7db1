//! Free space on the disk of the output.

use crate::Error;
use crate::error::io;
use rustix::fs::{FallocateFlags, fallocate, statvfs};
use rustix::io::Errno;
use std::fs::File;
use std::path::Path;

/// Checks that the disk of `dir`, which need not exist yet, has `needed` bytes left for an ordinary user.
///
/// # Errors
/// [`Error::DiskFull`], or [`Error::Io`] where no parent folder can be asked.
pub fn ensure_free(dir: &Path, needed: u64) -> Result<(), Error> {
    let free = free(dir)?;
    if needed <= free { Ok(()) } else { Err(Error::DiskFull { path: dir.to_owned(), needed, free }) }
}

/// Bytes that an ordinary user may still write on the disk of `path` or of its nearest existing parent.
pub(crate) fn free(path: &Path) -> Result<u64, Error> {
    let absolute = std::path::absolute(path).map_err(io("resolve", path))?;
    let existing = absolute.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/"));
    let stat = statvfs(existing).map_err(|e| io("measure the free space of", existing)(e.into()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Gives `file` its final `size` and takes the disk space for it, so that no later write can run out. Where the file
/// system cannot take space in advance, the size is set and the caller's check of free space has to do.
pub(crate) fn reserve(file: &File, path: &Path, size: u64) -> Result<(), Error> {
    if size > 0 {
        match fallocate(file, FallocateFlags::empty(), 0, size) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {}
            Err(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => {
                return Err(Error::DiskFull { path: path.to_owned(), needed: size, free: free(path)? });
            }
            Err(e) => return Err(io("reserve space for", path)(e.into())),
        }
    }
    file.set_len(size).map_err(io("size", path))
}

//! Writing a conversion: a work folder beside the output, and its name at the end.

use super::fate::{Fate, payload, requantized};
use super::{Conversion, Target};
use crate::Error;
use crate::journal::{io, write_durably};
use crate::run::{check_place, pretty, write_config};
use crate::weight::transpose;
use bitmill_calibrate::{Sentences, tokenizer_files};
use bitmill_checkpoint::{Output, Weight, ensure_free};
use std::fs::File;
use std::path::{Path, PathBuf};

/// What a conversion wrote.
#[derive(Debug)]
pub struct Converted {
    /// The folder, or the first file.
    pub out: PathBuf,
    /// Bytes of the weight files.
    pub bytes: u64,
}

impl Conversion<'_> {
    /// Writes `out`. It appears under its name only when it is complete; with `force` it takes the place of what is there.
    /// `observe` is told how many tensors of how many are done, and which is next.
    ///
    /// # Errors
    /// An occupied place, a full disk, another conversion at work on the same output.
    pub fn write(
        &self,
        out: &Path,
        force: bool,
        observe: &mut dyn FnMut(usize, usize, &str),
    ) -> Result<Converted, Error> {
        self.check(out, force)?;
        let parent = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::create_dir_all(parent).map_err(io(parent, "creating the output's parent folder"))?;
        ensure_free(parent, self.output.total_bytes())?;
        let mut work = out.file_name().unwrap_or_default().to_owned();
        work.push(".bitmill-converting");
        let work = out.with_file_name(work);
        // What lies there is of a conversion that was killed: nobody else names folders so, and the lock says that nobody works.
        std::fs::create_dir_all(&work).map_err(io(&work, "creating"))?;
        let lock = work.join("lock");
        let file = File::create(&lock).map_err(io(&lock, "creating"))?;
        file.try_lock().map_err(|_| Error::Busy { work: work.clone() })?;
        let done = self.fill(&work, observe).and_then(|draft| self.publish(&work, &draft, out, force));
        // Finished or failed, the work folder has no further use; the first error is the one worth reporting.
        let removed = std::fs::remove_dir_all(&work).map_err(io(&work, "removing"));
        let out = done?;
        removed?;
        Ok(Converted { out, bytes: self.output.total_bytes() })
    }

    /// Whether `out` may be written.
    ///
    /// # Errors
    /// [`Error::Exists`] and [`Error::Nested`].
    pub fn check(&self, out: &Path, force: bool) -> Result<(), Error> {
        self.names(Path::new(""), out).iter().try_for_each(|(_, to)| check_place(self.input, to, force))
    }

    /// Writes everything into a new folder inside of `work`.
    fn fill(&self, work: &Path, observe: &mut dyn FnMut(usize, usize, &str)) -> Result<PathBuf, Error> {
        let draft = work.join("output");
        if draft.exists() {
            std::fs::remove_dir_all(&draft).map_err(io(&draft, "removing"))?;
        }
        let output = self.output.create(&draft)?;
        for (i, item) in self.items.iter().enumerate() {
            observe(i, self.items.len(), &item.name);
            self.write_item(i, &output)?;
        }
        output.sync()?;
        if self.gguf.is_none() {
            self.complete(&draft)?;
        }
        Ok(draft)
    }

    fn write_item(&self, i: usize, output: &Output) -> Result<(), Error> {
        let item = &self.items[i];
        let name = &item.name;
        match (item.fate, self.target) {
            (Fate::Quantized { scheme, how }, Target::Format(format)) => {
                let module = item.module();
                let Weight::Quantized(q) = self.input.weight(module)? else { return Ok(()) };
                let q = requantized(module, &q, scheme, how)?;
                for (spec, bytes) in format.layout(module, &scheme, q.shape).iter().zip(format.encode(module, &q)) {
                    output.write(&spec.name, &self.ordered(&spec.name, q.shape[0], bytes))?;
                }
            }
            (Fate::Dense { dtype, quantized, turned }, _) => {
                let mut values = match quantized {
                    true => self.input.weight(item.module())?.to_f32()?,
                    false => self.input.tensor(name)?.to_f32()?,
                };
                if turned && let &[.., rows, cols] = &item.shape[..] {
                    values = values.chunks(rows * cols).flat_map(|matrix| transpose(matrix, [cols, rows])).collect();
                }
                let bytes = payload(&values, dtype)?;
                output.write(name, &self.ordered(name, item.shape.first().copied().unwrap_or(1), bytes))?;
            }
            _ => {
                let bytes = match &self.gguf {
                    Some(gguf) => gguf.copied(self.input, name)?,
                    None => self.input.tensor(name)?.by_rows(),
                };
                output.write(name, &bytes)?;
            }
        }
        Ok(())
    }

    /// Bytes of rows in the order of the output.
    fn ordered(&self, name: &str, rows: usize, bytes: Vec<u8>) -> Vec<u8> {
        match &self.gguf {
            Some(gguf) => gguf.ordered(name, rows, bytes),
            None => bytes,
        }
    }

    /// Adds what a folder holds besides weights.
    fn complete(&self, dir: &Path) -> Result<(), Error> {
        let format = if let Target::Format(format) = self.target { Some(format) } else { None };
        write_config(dir, format, &self.config)?;
        if let Some(gguf) = self.input.gguf() {
            let mut files = tokenizer_files(gguf, self.input.dir())?;
            let width = self.config["hidden_size"].as_u64().map_or(0, |n| n as usize);
            files.extend(Sentences::stated(self.input)?.into_iter().flat_map(|pooling| pooling.files(width)));
            return files.iter().try_for_each(|(name, value)| {
                let file = dir.join(name);
                let parent = file.parent().unwrap_or(dir);
                std::fs::create_dir_all(parent).map_err(io(parent, "creating"))?;
                write_durably(&file, &pretty(value))
            });
        }
        for file in &self.files {
            let (from, to) = (self.input.dir().join(file), dir.join(file));
            if let Some(parent) = to.parent() {
                std::fs::create_dir_all(parent).map_err(io(parent, "creating"))?;
            }
            let copy = || std::fs::copy(&from, &to).and_then(|_| File::open(&to)?.sync_all());
            copy().map_err(io(&to, "copying"))?;
        }
        Ok(())
    }

    /// What was written is called in `draft`, and what it will be.
    fn names(&self, draft: &Path, out: &Path) -> Vec<(PathBuf, PathBuf)> {
        if self.gguf.is_none() {
            return vec![(draft.to_owned(), out.to_owned())];
        }
        crate::run::gguf_names(&self.output, draft, out)
    }

    /// Gives the draft its name.
    fn publish(&self, work: &Path, draft: &Path, out: &Path, force: bool) -> Result<PathBuf, Error> {
        let names = self.names(draft, out);
        // The first of several files is the one that is opened, so it appears last.
        for (i, (from, to)) in names.iter().enumerate().rev() {
            if to.exists() {
                if !force {
                    return Err(Error::Exists { out: to.clone() });
                }
                let old = work.join(format!("replaced-{i}"));
                std::fs::rename(to, &old).map_err(io(to, "moving the old output away"))?;
            }
            std::fs::rename(from, to).map_err(io(to, "naming the output")).inspect_err(|_| {
                // The work folder goes, so what was replaced must not stay in it.
                let _ = std::fs::rename(work.join(format!("replaced-{i}")), to);
            })?;
        }
        Ok(names.first().map_or_else(|| out.to_owned(), |(_, to)| to.clone()))
    }
}

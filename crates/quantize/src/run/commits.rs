//! Finished units on their way to the disk, while the next one is worked.

use super::calibrated::Calibrated;
use super::{Event, Worker};
use crate::journal::{Journal, Line};
use crate::{Error, Unit};
use bitmill_calibrate::{Saved, Stream};
use bitmill_checkpoint::Output;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

/// The journal of a run, whose last units may still be on their way to the disk. Dropped, it waits for them.
pub(super) struct Commits {
    output: Arc<Output>,
    state: State,
}

enum State {
    Idle(Journal),
    /// Units are on their way.
    Busy(JoinHandle<Result<Journal, Error>>),
    /// Some have failed.
    Lost,
}

impl Commits {
    pub(super) fn new(journal: Journal, output: Arc<Output>) -> Self {
        Commits { output, state: State::Idle(journal) }
    }

    /// Sends off the units of `lines`, once those before them have arrived: what was written to the output and what is `saved` is
    /// made durable, then the lines. Returns how many units are committed so far, where that had not been told.
    ///
    /// # Errors
    /// What the disk said to those before them.
    pub(super) fn send(&mut self, lines: Vec<Line>, saved: Vec<Saved>) -> Result<Option<usize>, Error> {
        let told = self.wait()?;
        let State::Idle(mut journal) = std::mem::replace(&mut self.state, State::Lost) else {
            unreachable!("what was waited for has arrived");
        };
        let output = self.output.clone();
        self.state = State::Busy(std::thread::spawn(move || {
            output.sync()?;
            saved.iter().try_for_each(Saved::sync)?;
            let first = journal.lines.len();
            journal.append(lines)?;
            // What entered the first of them is of no more use; a file that stays behind goes with the work folder.
            let _ = std::fs::remove_file(journal.work.stream(first));
            let _ = std::fs::remove_file(journal.work.full_stream(first));
            Ok(journal)
        }));
        Ok(told)
    }

    /// As [`Commits::wait`], if that needs no waiting.
    pub(super) fn poll(&mut self) -> Result<Option<usize>, Error> {
        match &self.state {
            State::Busy(units) if units.is_finished() => self.wait(),
            _ => Ok(None),
        }
    }

    /// Waits until the units that are on their way, if there are any, have arrived, and returns how many have.
    ///
    /// # Errors
    /// What the disk said to them.
    pub(super) fn wait(&mut self) -> Result<Option<usize>, Error> {
        match std::mem::replace(&mut self.state, State::Lost) {
            State::Busy(units) => {
                let journal = units.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
                let done = journal.lines.len();
                self.state = State::Idle(journal);
                Ok(Some(done))
            }
            state => {
                self.state = state;
                Ok(None)
            }
        }
    }

    /// The journal of units that have all been waited for; `None` where some have failed.
    pub(super) fn into_journal(mut self) -> Option<Journal> {
        match std::mem::replace(&mut self.state, State::Lost) {
            State::Idle(journal) => Some(journal),
            State::Lost => None,
            State::Busy(_) => panic!("units that were not waited for"),
        }
    }
}

impl Drop for Commits {
    fn drop(&mut self) {
        if let State::Busy(units) = std::mem::replace(&mut self.state, State::Lost) {
            // Who is dropped on the way has an error to tell already.
            let _ = units.join();
        }
    }
}

impl Worker<'_, '_> {
    /// Sends what is finished on its way to the disk.
    pub(super) fn commit(&mut self, flow: Option<&Calibrated<'_>>) -> Result<(), Error> {
        let Some(next) = self.held.last().map(|line| line.unit + 1) else { return Ok(()) };
        let units = &self.plan.units;
        let has_block = |units: &[Unit]| units.iter().any(|unit| unit.block.is_some());
        // Beyond the last unit stands tuning.
        let (before, after) = units.split_at(next.min(units.len()));
        let (mut lines, mut saved) = (std::mem::take(&mut self.held), Vec::new());
        if let (Some(flow), Some(line), true, true) = (flow, lines.last_mut(), has_block(before), has_block(after)) {
            let mut save = |stream: &Stream, file: PathBuf| -> Result<String, Error> {
                let file = stream.save(&file)?;
                let fingerprint = file.fingerprint().to_string();
                saved.push(file);
                Ok(fingerprint)
            };
            line.stream = Some(save(&flow.hidden, self.work.stream(next))?);
            line.full = flow.full.as_ref().map(|full| save(full, self.work.full_stream(next))).transpose()?;
        }
        let committed = self.commits.send(lines, saved)?;
        self.last = Instant::now();
        self.tell(committed);
        Ok(())
    }

    /// Waits until all units are on disk.
    pub(super) fn settle(&mut self) -> Result<(), Error> {
        let committed = self.commits.wait()?;
        self.tell(committed);
        Ok(())
    }

    pub(super) fn tell(&mut self, committed: Option<usize>) {
        if let Some(done) = committed {
            let total = self.plan.units.len() + usize::from(self.plan.settings.tuning.is_some());
            (self.observe)(Event::Committed { done, total });
        }
    }
}

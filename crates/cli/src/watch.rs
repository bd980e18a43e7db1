//! A run as its user sees it: progress, what stages brought, and how it is stopped.

use crate::progress::Progress;
use bitmill_models::SITES;
use bitmill_quantize::{Event, StageRecord};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The first Ctrl-C asks for a clean stop, the second ends the process; neither loses what is finished.
pub(crate) fn stop_on_ctrl_c() -> anyhow::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("\nstopping at the next clean point; press Ctrl-C again to end at once");
    })?;
    Ok(stop)
}

/// Turns the events of a run into progress.
pub(crate) struct Reporter {
    pub(crate) bar: Progress,
    unit: u64,
    label: String,
    errors: Vec<f64>,
}

/// Steps of the bar per unit: its sites.
const STEPS: u64 = SITES.len() as u64;

impl Reporter {
    pub(crate) fn new(units: usize) -> Self {
        Reporter { bar: Progress::new(units as u64 * STEPS), unit: 0, label: String::new(), errors: Vec::new() }
    }

    pub(crate) fn event(&mut self, event: &Event<'_>) {
        match event {
            Event::Checking => self.bar.message("checking weights for NaN and infinity".into()),
            Event::Resumed { done, total } => {
                self.bar.skip(*done as u64 * STEPS);
                self.bar.line(&format!("taking up an unfinished run: {done} of {total} steps are done"));
            }
            Event::Started { unit, label, .. } => {
                self.unit = *unit as u64;
                self.label = (*label).to_owned();
                self.errors.clear();
                self.bar.message(self.label.clone());
            }
            Event::Site { name } => {
                let step = SITES.iter().position(|s| s.name == *name).unwrap_or(0) as u64;
                self.bar.set(self.unit * STEPS + step);
                self.bar.message(format!("{} {name}", self.label));
            }
            Event::Tensor(record) => {
                self.errors.push(record.relative_error);
                let name = record.tensor.rsplit('.').next().unwrap_or(&record.tensor);
                self.bar.message(format!("{} {name}: relative error {:.2e}", self.label, record.relative_error));
            }
            Event::Transforming { done, total } => {
                self.bar.message(format!("transforming the weights: step {done} of {total}"));
            }
            Event::Rebuilding { done, total } => {
                self.bar.message(format!("{}: reconstruction, step {done} of {total}", self.label));
            }
            Event::Tuning { done, total, held_out } => {
                self.bar.set(self.unit * STEPS + (*done as u64 * STEPS) / (*total).max(1) as u64);
                let (last, before) = held_out;
                self.bar.message(format!("tuning step {done}/{total}: held-out loss {before:.5} -> {last:.5}"));
            }
            Event::Stage(stage) => self.bar.line(&tuned(stage)),
            Event::Committed { done, .. } => {
                self.bar.set(*done as u64 * STEPS);
                if !self.errors.is_empty() {
                    let mean = self.errors.iter().sum::<f64>() / self.errors.len() as f64;
                    self.bar.plain_line(&format!("{}: mean relative error {mean:.3e}", self.label));
                }
            }
            _ => {}
        }
    }
}

/// What a stage brought, in one line.
fn tuned(stage: &StageRecord) -> String {
    let StageRecord { stage: name, loss, held_out_windows: windows, before, after, kept_pass, .. } = stage;
    if *windows == 0 {
        return format!("{name}: {loss} {before:.4e} -> {after:.4e}");
    }
    let kept = if *kept_pass == 0 { "dropped".to_owned() } else { format!("pass {kept_pass} kept") };
    format!("{name}: {loss} on {windows} held-out windows {before:.5} -> {after:.5}, {kept}")
}

//! A run as its user sees it: progress, what stages brought, and how it is stopped.

use crate::progress::Progress;
use bitmill_models::SITES;
use bitmill_quantize::{Event, SiteRecord, StageRecord};
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
            Event::Worked { unit } => {
                self.bar.set((*unit as u64 + 1) * STEPS);
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

/// Which experts calibration hardly saw, as a sentence; `None` where there are none.
pub(crate) fn starved(sites: &[SiteRecord]) -> Option<String> {
    /// So many are named.
    const NAMED: usize = 6;
    let experts =
        || sites.iter().filter_map(|s| Some((s, s.site.strip_prefix("mlp_in.")?))).filter(|(s, _)| s.prior.is_some());
    let few: Vec<(&SiteRecord, &str)> = experts().filter(|(s, _)| s.starved()).collect();
    let named: Vec<String> = (few.iter().take(NAMED))
        .map(|(s, expert)| format!("block {} expert {expert} ({})", s.block, s.tokens))
        .collect();
    let more = if few.len() > NAMED { format!(" and {} more", few.len() - NAMED) } else { String::new() };
    (!few.is_empty()).then(|| {
        format!(
            "{} of {} experts saw fewer tokens than they have inputs, and are rounded for what all tokens look like as \
             much as for their own, or more: {}{more}; more text (--samples) reaches more of them",
            few.len(),
            experts().count(),
            named.join(", ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitmill_calibrate::Spread;

    #[test]
    fn experts_that_saw_too_little_are_named() {
        let site = |block: usize, site: &str, tokens: u64, prior: Option<f64>| SiteRecord {
            block,
            site: site.into(),
            tokens,
            prior,
            spread: Spread { kurtosis: None, peak: 1.0, outlier: 1.0 },
        };
        let fed = [site(0, "attn_in", 9, None), site(0, "mlp_in.0", 99, Some(0.2)), site(0, "mlp_in.shared", 9, None)];
        assert_eq!(starved(&fed), None);
        let hungry = [fed[1].clone(), site(1, "mlp_in.7", 3, Some(0.9)), site(1, "mlp_out.7", 3, Some(0.9))];
        let said = starved(&hungry).unwrap();
        assert!(said.starts_with("1 of 2 experts") && said.contains(": block 1 expert 7 (3);"), "{said}");
        let many: Vec<SiteRecord> = (0..9).map(|e| site(2, &format!("mlp_in.{e}"), 0, Some(1.0))).collect();
        assert!(starved(&many).unwrap().contains("block 2 expert 5 (0) and 3 more;"));
    }
}

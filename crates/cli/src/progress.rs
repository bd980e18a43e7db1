//! Progress: a bar with an ETA on a terminal, one line per step elsewhere.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;
use std::time::Instant;

/// Where a command reports how far it is.
pub(crate) struct Progress {
    bar: ProgressBar,
    plain: bool,
    started: Instant,
    first: u64,
}

impl Progress {
    /// Progress over `total` steps.
    pub(crate) fn new(total: u64) -> Self {
        let plain = !std::io::stderr().is_terminal();
        let target = if plain { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        // The template is a constant; were it wrong, the default style is still a bar.
        if let Ok(style) = ProgressStyle::with_template("{bar:30.cyan} {percent:>3}% {elapsed} eta {eta}  {wide_msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(std::time::Duration::from_millis(200));
        Progress { bar, plain, started: Instant::now(), first: 0 }
    }

    /// Says that the first `steps` were done before.
    pub(crate) fn skip(&mut self, steps: u64) {
        self.first = steps;
        self.bar.set_position(steps);
        self.bar.reset_eta();
    }

    /// Moves to `steps` done.
    pub(crate) fn set(&self, steps: u64) {
        self.bar.set_position(steps);
    }

    /// Says what is being done.
    pub(crate) fn message(&self, text: String) {
        self.bar.set_message(text);
    }

    /// A line that stays; on a terminal it scrolls up above the bar.
    pub(crate) fn line(&self, text: &str) {
        if self.plain {
            eprintln!("{text}");
        } else {
            self.bar.println(text);
        }
    }

    /// A line for logs only, with the estimated time left; a terminal shows the same in the bar.
    pub(crate) fn plain_line(&self, text: &str) {
        if !self.plain {
            return;
        }
        let (done, total) = (self.bar.position(), self.bar.length().unwrap_or(0));
        let elapsed = self.started.elapsed().as_secs_f64();
        let left = elapsed / (done.saturating_sub(self.first)).max(1) as f64 * total.saturating_sub(done) as f64;
        eprintln!("[{elapsed:.0}s, eta {left:.0}s] {text}");
    }

    /// Removes the bar.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

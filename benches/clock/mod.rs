//! How long things take.

use std::time::Instant;

const RUNS: usize = 15;

/// Median seconds of [`RUNS`] runs, after one that warms caches.
pub(crate) fn time(mut f: impl FnMut()) -> f64 {
    f();
    let mut seconds: Vec<f64> = (0..RUNS)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[RUNS / 2]
}

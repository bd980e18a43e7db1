//! How long things take, with the allocator of the `bitmill` command.

use bitmill::kernels::LineAllocator;
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: LineAllocator = LineAllocator;

const RUNS: usize = 15;

/// Median seconds of [`RUNS`] runs, after one that warms caches.
pub(crate) fn time(mut f: impl FnMut()) -> f64 {
    in_turns(&mut [&mut f])[0]
}

/// The same of several things that take turns, so that whatever else the machine does slows all of them.
pub(crate) fn in_turns(all: &mut [&mut dyn FnMut()]) -> Vec<f64> {
    let mut seconds = vec![Vec::new(); all.len()];
    for run in 0..=RUNS {
        for (f, seconds) in all.iter_mut().zip(&mut seconds) {
            let start = Instant::now();
            f();
            if run > 0 {
                seconds.push(start.elapsed().as_secs_f64());
            }
        }
    }
    let median = |mut seconds: Vec<f64>| {
        seconds.sort_by(f64::total_cmp);
        seconds[RUNS / 2]
    };
    seconds.into_iter().map(median).collect()
}

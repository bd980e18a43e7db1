//! Threads that stay awake between small tasks.
//!
//! A thread that sleeps takes tens of microseconds to wake: as long as a matrix of a small model meets one token. Within
//! [`awake`] as many threads as the pool has look for work instead for a while after they had some that is worth waking them for,
//! so that what takes a few microseconds is worth sharing, too. Who finds none for long goes to sleep. Work never waits for who
//! sleeps: the thread that has it does whatever no other has begun.

use std::cell::{Cell, UnsafeCell};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// Multiply-adds below which work is not worth waking other threads for.
const ASLEEP: usize = 1 << 21;
/// The same of threads that are awake.
const AWAKE: usize = 1 << 18;
/// Looks for work, some nanoseconds each, after which a thread lets others run in between.
const LOOKS: u32 = 1 << 14;
/// Time without work that is worth waking it after which it goes to sleep.
const PATIENCE: Duration = Duration::from_millis(1);

/// Set in a state while more may join.
const OPEN: u64 = 1 << 31;
/// Where the number of a job stands in a state; below [`OPEN`] stands how many help with it.
const JOB: u32 = 32;

/// What is to be done for every number below a count.
type Work<'a> = &'a (dyn Fn(usize) + Sync);

/// Work of so many numbers, and whether it is worth waking others for.
type Job = (Work<'static>, usize, bool);

/// The number that a thread would take next of those that are meant for it, in a line of the cache of its own.
#[derive(Default)]
#[repr(align(128))]
struct Cursor(AtomicUsize);

struct Team {
    /// Number of the job, [`OPEN`], helpers.
    state: AtomicU64,
    /// What helpers read between joining a job and leaving it, and the leader writes while no job is open and none is there.
    job: UnsafeCell<Job>,
    cursors: Vec<Cursor>,
    /// The helpers that have come, and how many of them sleep or are about to.
    helpers: Vec<OnceLock<Thread>>,
    asleep: AtomicUsize,
    over: AtomicBool,
    panicked: AtomicBool,
}

// SAFETY: all but the job is atomic or never changes; when the job is read and written is said there.
unsafe impl Sync for Team {}

thread_local! {
    /// The team that this thread leads.
    static LED: Cell<Option<*const Team>> = const { Cell::new(None) };
}

/// Runs `f` on this thread, with as many others as the pool has awake between the products within, as long as those are large
/// enough to wake them and follow each other within a millisecond. Results are the same without. The others are not those of the
/// pool, which is left to whoever else uses it, be it `f`.
pub fn awake<R>(f: impl FnOnce() -> R) -> R {
    let threads = rayon::current_num_threads();
    if threads < 2 || LED.get().is_some() {
        return f();
    }
    let team = Team {
        state: AtomicU64::new(0),
        job: UnsafeCell::new((&|_| {}, 0, false)),
        cursors: (0..threads).map(|_| Cursor::default()).collect(),
        helpers: (1..threads).map(|_| OnceLock::new()).collect(),
        asleep: AtomicUsize::new(0),
        over: AtomicBool::new(false),
        panicked: AtomicBool::new(false),
    };
    /// Lets all go, panic or not: they are waited for.
    struct Lead<'a>(&'a Team);
    impl Drop for Lead<'_> {
        fn drop(&mut self) {
            LED.set(None);
            self.0.over.store(true, Ordering::SeqCst);
            self.0.wake();
        }
    }
    std::thread::scope(|scope| {
        let team = &team;
        for own in 1..threads {
            // Who cannot be had is not waited for.
            let _ = std::thread::Builder::new().spawn_scoped(scope, move || team.help(own));
        }
        let _lead = Lead(team);
        LED.set(Some(team));
        f()
    })
}

/// Does `work`, of so many multiply-`adds` in all, for every number below `count`, on as many threads as it is worth.
pub(crate) fn each(count: usize, adds: usize, work: impl Fn(usize) + Sync) {
    use rayon::prelude::*;
    // SAFETY: `awake` clears the pointer before the team goes, and only on this thread is it set.
    match LED.get().map(|team| unsafe { &*team }) {
        Some(team) if adds > ASLEEP || (adds > AWAKE && team.is_awake()) => team.run(count, adds > ASLEEP, &work),
        // One thread of the pool would be another than this.
        None if adds > ASLEEP && rayon::current_num_threads() > 1 => (0..count).into_par_iter().for_each(&work),
        _ => (0..count).for_each(work),
    }
}

/// Has `fill` write every `size` entries of `out`, given their number, on as many threads as `adds` multiply-adds in all are
/// worth.
///
/// # Panics
/// When `size` is 0: a caller's bug.
pub fn fill_chunks<T: Send>(out: &mut [T], size: usize, adds: usize, fill: impl Fn(usize, &mut [T]) + Sync) {
    /// Where the entries are.
    struct Entries<T>(*mut T);
    // SAFETY: threads write disjoint parts through it, and entries may be sent to them.
    unsafe impl<T: Send> Sync for Entries<T> {}
    impl<T> Entries<T> {
        fn at(&self, i: usize) -> *mut T {
            self.0.wrapping_add(i)
        }
    }
    let (len, entries) = (out.len(), Entries(out.as_mut_ptr()));
    each(len.div_ceil(size), adds, |i| {
        let from = i * size;
        // SAFETY: the slice is borrowed mutably until all is done, every number comes once, and parts of two do not overlap.
        fill(i, unsafe { std::slice::from_raw_parts_mut(entries.at(from), size.min(len - from)) });
    });
}

impl Team {
    /// Does the work on this thread, which leads, and on all that come, those that sleep with them where they are to be woken.
    fn run(&self, count: usize, wakes: bool, work: Work<'_>) {
        /// Lets nobody else join, and waits for those who have.
        struct Open<'a>(&'a Team);
        impl Drop for Open<'_> {
            fn drop(&mut self) {
                self.0.state.fetch_and(!OPEN, Ordering::AcqRel);
                while self.0.state.load(Ordering::Acquire) & (OPEN - 1) != 0 {
                    std::hint::spin_loop();
                }
            }
        }
        /// Has this thread lead again.
        struct Leads(Option<*const Team>);
        impl Drop for Leads {
            fn drop(&mut self) {
                LED.set(self.0);
            }
        }
        // One job at a time: what the work itself shares goes to the pool.
        let _leads = Leads(LED.replace(None));
        for (cursor, own) in self.cursors.iter().zip(0..) {
            cursor.0.store(self.share(own, count), Ordering::Relaxed);
        }
        // SAFETY: this thread leads, and not within a job, as taking the lead from it says. So no job is open and nobody is left in
        // the last one, and nobody reads this. The work outlives the job: `Open`
        // waits, panic or not, until nobody is left in it, and who comes later does not join.
        unsafe {
            *self.job.get() = (std::mem::transmute::<Work<'_>, Work<'static>>(work), count, wakes);
        }
        let job = (self.state.load(Ordering::Relaxed) >> JOB) + 1;
        // Either this thread sees who goes to sleep, or that one sees the job.
        self.state.store(job << JOB | OPEN, Ordering::SeqCst);
        let open = Open(self);
        if wakes && self.asleep.load(Ordering::SeqCst) > 0 {
            self.wake();
        }
        self.take(0, count, work);
        drop(open);
        assert!(!self.panicked.load(Ordering::Relaxed), "a thread that helped panicked");
    }

    /// Whether somebody looks for work.
    fn is_awake(&self) -> bool {
        self.asleep.load(Ordering::Relaxed) < self.helpers.len()
    }

    /// Wakes all that sleep.
    fn wake(&self) {
        // Either this sees a helper that has come, or that one sees what it is to be woken for.
        fence(Ordering::SeqCst);
        self.helpers.iter().filter_map(OnceLock::get).for_each(Thread::unpark);
    }

    /// Where the numbers meant for thread `own` begin: neighbours, which often lie beside each other in memory.
    fn share(&self, own: usize, count: usize) -> usize {
        count * own / self.cursors.len()
    }

    /// Takes what is meant for this thread, and then what others have not begun.
    fn take(&self, own: usize, count: usize, work: Work<'_>) {
        let threads = self.cursors.len();
        for whose in (0..threads).map(|i| (own + i) % threads) {
            let end = self.share(whose + 1, count);
            loop {
                let i = self.cursors[whose].0.fetch_add(1, Ordering::Relaxed);
                if i >= end {
                    break;
                }
                work(i);
            }
        }
    }

    /// Takes part in one job after the other.
    fn help(&self, own: usize) {
        /// Leaves the job.
        struct Joined<'a>(&'a Team);
        impl Drop for Joined<'_> {
            fn drop(&mut self) {
                if std::thread::panicking() {
                    self.0.panicked.store(true, Ordering::Relaxed);
                }
                self.0.state.fetch_sub(1, Ordering::Release);
            }
        }
        let _ = self.helpers[own - 1].set(std::thread::current());
        fence(Ordering::SeqCst);
        let (mut done, mut since) = (0, Instant::now());
        while let Some(state) = self.wait(done, since) {
            if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                let _joined = Joined(self);
                // SAFETY: this thread has joined an open job, so it is written, and is not again before the thread leaves.
                let (work, count, wakes) = unsafe { *self.job.get() };
                self.take(own, count, work);
                done = state >> JOB;
                if wakes {
                    since = Instant::now();
                }
            }
        }
    }

    /// The state once a job other than `done` is open, `None` once all is over. `since` there has been nothing to stay awake for.
    fn wait(&self, done: u64, since: Instant) -> Option<u64> {
        let news = |order: Ordering| {
            let state = self.state.load(order);
            match state & OPEN != 0 && state >> JOB != done {
                true => Some(Some(state)),
                false => self.over.load(order).then_some(None),
            }
        };
        let mut looks = if since.elapsed() < PATIENCE { 0 } else { LOOKS };
        loop {
            if let Some(news) = news(Ordering::Acquire) {
                return news;
            }
            if looks < LOOKS {
                looks += 1;
                std::hint::spin_loop();
            } else if since.elapsed() < PATIENCE {
                std::thread::yield_now();
            } else {
                self.asleep.fetch_add(1, Ordering::SeqCst);
                if news(Ordering::SeqCst).is_none() {
                    std::thread::park();
                }
                self.asleep.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(f)
    }

    #[test]
    fn every_number_comes_once_however_many_threads_there_are() {
        let count = |threads: usize, jobs: usize| {
            on(threads, || {
                awake(|| {
                    for job in 0..jobs {
                        let mut seen = vec![0u32; job % 37];
                        fill_chunks(&mut seen, 1, usize::MAX, |i, seen| seen[0] += 1 + i as u32);
                        assert!(seen.iter().zip(1..).all(|(&seen, i)| seen == i), "{threads} {job}");
                    }
                });
            });
        };
        [1, 2, 3, 8].into_iter().for_each(|threads| count(threads, if cfg!(miri) { 20 } else { 5000 }));
        // The same without threads that are awake, and in chunks of another size.
        let mut seen = vec![0usize; 10];
        fill_chunks(&mut seen, 4, usize::MAX, |i, seen| seen.fill(10 * i + seen.len()));
        assert_eq!(seen, [4, 4, 4, 4, 14, 14, 14, 14, 22, 22]);
    }

    #[test]
    fn threads_that_slept_find_work_again_and_all_help() {
        on(3, || {
            awake(|| {
                std::thread::sleep(5 * PATIENCE);
                let threads = std::sync::Mutex::new(std::collections::HashSet::new());
                // They wake within a millisecond; a machine under load gets a minute.
                let begun = Instant::now();
                while threads.lock().unwrap().len() < 3 {
                    assert!(begun.elapsed() < Duration::from_secs(60), "nobody came");
                    each(64, usize::MAX, |_| {
                        threads.lock().unwrap().insert(std::thread::current().id());
                        std::thread::sleep(Duration::from_micros(100));
                    });
                }
            });
        });
    }

    #[test]
    fn a_panic_is_passed_on_whoever_panics() {
        for number in [0, 63] {
            let panicked = std::panic::catch_unwind(|| {
                on(2, || awake(|| each(64, usize::MAX, |i| assert!(i != number, "number {number}"))));
            });
            assert!(panicked.is_err());
        }
        // This thread leads nobody any more.
        assert!(LED.get().is_none());
    }

    #[test]
    fn pools_work_within_and_teams_within_teams() {
        use rayon::prelude::*;
        let sum = on(2, || {
            awake(|| {
                awake(|| {
                    let mut out = vec![0u64; 100];
                    fill_chunks(&mut out, 3, usize::MAX, |i, out| out.fill(i as u64));
                    out.par_iter().sum::<u64>()
                })
            })
        });
        assert_eq!(sum, (0..100u64).map(|i| i / 3).sum());
        // Work may share work.
        let mut out = vec![0u64; 64];
        on(2, || {
            awake(|| {
                fill_chunks(&mut out, 8, usize::MAX, |i, out| {
                    fill_chunks(out, 2, usize::MAX, |j, out| out.fill(10 * i as u64 + j as u64));
                });
            });
        });
        assert!(out.iter().zip(0..).all(|(&v, i)| v == 10 * (i / 8) + i % 8 / 2));
        // Several lead at once, as sessions of a server do, and each finds the pool.
        let session = || {
            for _ in 0..200 {
                let mut out = vec![0u64; 100];
                awake(|| {
                    fill_chunks(&mut out, 3, usize::MAX, |i, out| out.fill(i as u64));
                    assert_eq!(out.par_iter().sum::<u64>(), sum);
                });
            }
        };
        std::thread::scope(|scope| (0..3).for_each(|_| drop(scope.spawn(session))));
        // A thread outside of the pool leads as well.
        let mut out = [0usize; 50];
        awake(|| fill_chunks(&mut out, 7, usize::MAX, |i, out| out.fill(i)));
        assert!(out.iter().enumerate().all(|(i, &v)| v == i / 7));
    }
}

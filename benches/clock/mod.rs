//! How long things take, with the allocator of the `bitmill` command, and how long they take other libraries.

use bitmill::kernels::LineAllocator;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: LineAllocator = LineAllocator;

const RUNS: usize = 15;
/// So many, where one of them takes more than [`LONG`] seconds.
const FEW: usize = 5;
const LONG: f64 = 0.5;

/// Median seconds of [`RUNS`] runs, after one that warms caches.
pub(crate) fn time(mut f: impl FnMut()) -> f64 {
    in_turns(&mut [&mut f])[0]
}

/// The same of several things that take turns, so that whatever else the machine does slows all of them.
pub(crate) fn in_turns(all: &mut [&mut dyn FnMut()]) -> Vec<f64> {
    let mut seconds = vec![Vec::new(); all.len()];
    let (mut runs, mut done) = (RUNS, 0);
    while done <= runs {
        for (f, seconds) in all.iter_mut().zip(&mut seconds) {
            let start = Instant::now();
            f();
            seconds.push(start.elapsed().as_secs_f64());
        }
        // The first of them may prepare things, so it says nothing.
        if done == 1 && seconds.iter().any(|seconds| seconds[1] > LONG) {
            runs = FEW;
        }
        done += 1;
    }
    seconds.into_iter().map(median).collect()
}

/// The median of what was measured in turns; the first of it warmed caches.
fn median(seconds: Vec<f64>) -> f64 {
    let mut rest = seconds[1..].to_vec();
    rest.sort_by(f64::total_cmp);
    rest[rest.len() / 2]
}

/// A program that times other libraries at the same work. It reads lines that say what to do, does each once, and answers by a
/// line of names and seconds: `q4_0 0.0123 q4_k 0.0101`, or of nothing where it cannot.
pub(crate) struct Peer {
    process: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
    seconds: Vec<(String, Vec<f64>)>,
}

impl Peer {
    /// The command after `--beside` among the arguments of this program, started.
    pub(crate) fn of_arguments() -> Option<Peer> {
        // Cargo adds a word of its own.
        let mut command =
            std::env::args().filter(|word| word != "--bench").skip_while(|word| word != "--beside").skip(1);
        let mut process = Command::new(command.next()?)
            .args(command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the command after --beside starts");
        let questions = process.stdin.take().expect("a pipe");
        let answers = BufReader::new(process.stdout.take().expect("a pipe"));
        Some(Peer { process, questions, answers, seconds: Vec::new() })
    }

    /// Has the program do `work` once.
    pub(crate) fn run(&mut self, work: &str) {
        let mut answer = String::new();
        // What it says of why it ends goes to the terminal.
        let asked = writeln!(self.questions, "{work}").and_then(|()| self.answers.read_line(&mut answer));
        assert!(asked.is_ok() && answer.ends_with('\n'), "the peer ended at `{work}`: {:?}", self.process.wait());
        let words: Vec<&str> = answer.split_whitespace().collect();
        for pair in words.chunks(2) {
            let seconds = pair.get(1).and_then(|s| s.parse().ok());
            let seconds: f64 = seconds.unwrap_or_else(|| panic!("a peer that answers `{work}` by `{}`", answer.trim()));
            match self.seconds.iter_mut().find(|(name, _)| name == pair[0]) {
                Some((_, all)) => all.push(seconds),
                None => self.seconds.push((pair[0].to_owned(), vec![seconds])),
            }
        }
    }

    /// Median seconds of what was done since the last call.
    pub(crate) fn medians(&mut self) -> Vec<(String, f64)> {
        std::mem::take(&mut self.seconds).into_iter().map(|(name, seconds)| (name, median(seconds))).collect()
    }
}

//! A run killed at any instant is taken up by the same command and ends in the same bytes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use support::{QUICK, assert_same, bitmill, books, copy_of_books, failure, success};

/// Half of the blocks, where it matters that there are several and not how many.
const FEWER: [&str; 2] = ["--ignore", r"model\.layers\.[2-5]\."];

/// Every unit is on disk before the next is begun.
const EACH: [&str; 2] = ["--commit-every", "0"];

fn command(out: &Path, extra: &[&str]) -> Command {
    let mut command = bitmill(["quantize"]);
    command.arg(books()).arg("-o").arg(out).args(QUICK).args(EACH).args(extra);
    command
}

/// Units a killed run had committed.
fn committed(out: &Path) -> usize {
    let journal = out.with_file_name(format!("{}.bitmill-partial/journal.jsonl", out.file_name().unwrap().display()));
    std::fs::read_to_string(journal).map_or(0, |t| t.lines().count())
}

/// Starts the run and kills it once `units` are committed, or after `delay` if that is later.
fn kill_after(out: &Path, extra: &[&str], units: usize, delay: Duration) {
    let mut child = command(out, extra).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    while committed(out) < units && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(delay);
    // SIGKILL: no handler runs.
    let _ = child.kill();
    child.wait().unwrap();
}

#[test]
fn killed_runs_end_in_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    success(&mut command(&whole, &[]));
    for spill in [&[][..], &["--stream-memory", "0"]] {
        let out = dir.path().join(format!("killed-{}", spill.len()));
        // Three tensors lie outside of the eight blocks, so blocks begin after three commits.
        for (units, delay) in [(0, 3), (1, 0), (4, 7), (5, 40), (8, 15)] {
            kill_after(&out, spill, units, Duration::from_millis(delay));
            assert!(!out.exists() || committed(&out) == 0, "the output appears only when it is finished");
        }
        let done = committed(&out);
        let output = command(&out, spill).output().unwrap();
        if !output.status.success() {
            // The last kill came after the end: the output is there and is not overwritten.
            assert!(String::from_utf8_lossy(&output.stderr).contains("exists"));
        } else if done > 0 {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(said.contains(&format!("taking up an unfinished run: {done} of 11")), "{said}");
        }
        assert_same(&whole, &out);
        assert!(!dir.path().join(format!("killed-{}.bitmill-partial", spill.len())).exists());
    }
}

#[test]
fn killed_runs_whose_units_go_to_disk_together_end_in_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, out) = (dir.path().join("whole"), dir.path().join("killed"));
    success(&mut command(&whole, &[]));
    // The first stretch of time is that of the embedding and some blocks; units go on while the last ones are on their way.
    let started = |seconds: &str, kill: Option<usize>| {
        let mut run = bitmill(["quantize"]);
        run.arg(books()).arg("-o").arg(&out).args(QUICK).args(["--commit-every", seconds]);
        let Some(units) = kill else {
            success(&mut run);
            return;
        };
        let mut child = run.stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        while committed(&out) < units && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let _ = child.kill();
        child.wait().unwrap();
    };
    for (seconds, units) in [("0.05", 1), ("0.1", 5), ("0.01", 8)] {
        started(seconds, Some(units));
        assert!((units..12).contains(&committed(&out)), "killed after {units} units");
    }
    started("1000", None);
    assert_same(&whole, &out);
}

#[test]
fn activations_that_are_rounded_where_they_are_made_end_in_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    // One stream, tokens of equal weight and windows of whole groups: H is of what is rounded window by window.
    let plain =
        ["--target-shift", "off", "--written", "0", "--samples", "12", "--sequence-length", "256", "--no-report"];
    let run = |threads: &str| {
        let out = dir.path().join(threads);
        success(bitmill(["quantize"]).arg(books()).arg("-o").arg(&out).args(plain).args(["--threads", threads]));
        out
    };
    assert_same(&run("1"), &run("3"));
}

#[test]
fn killed_tuning_goes_on_after_its_last_pass() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, out) = (dir.path().join("whole"), dir.path().join("killed"));
    let extra = [&["--bits", "2", "--tuning-passes", "4"][..], &FEWER].concat();
    success(&mut command(&whole, &extra));
    // All blocks are committed; the kills fall into passes, between them, and into the writing of what came of them.
    for delay in [0, 150, 400, 900] {
        kill_after(&out, &extra, 11, Duration::from_millis(delay));
    }
    let output = command(&out, &extra).output().unwrap();
    assert!(output.status.success() || String::from_utf8_lossy(&output.stderr).contains("exists"));
    assert_same(&whole, &out);
}

#[test]
fn killed_runs_with_every_stage_end_in_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, out) = (dir.path().join("whole"), dir.path().join("killed"));
    let extra =
        ["--bits", "3", "--tuning-passes", "1", "--transforms", "rotate,rotate-heads,awq", "--target-shift", "outputs"];
    let more = ["--token-weights", "attention", "--soft-rounding", "sign", "--soft-steps", "10", "--threads", "1"];
    let stages = [&FEWER, &extra[..], &more].concat();
    success(&mut command(&whole, &stages));
    // The first kills fall into the transforms, the others into blocks with two streams and into tuning. The number of
    // threads is no setting of the bytes.
    let stages = [&stages[..stages.len() - 1], &["5"]].concat();
    for (units, delay) in [(0, 30), (0, 300), (4, 7), (6, 40), (11, 100)] {
        kill_after(&out, &stages, units, Duration::from_millis(delay));
    }
    let output = command(&out, &stages).output().unwrap();
    assert!(output.status.success() || String::from_utf8_lossy(&output.stderr).contains("exists"));
    assert_same(&whole, &out);
}

#[test]
fn another_command_refuses_the_leftover_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    kill_after(&out, &FEWER, 5, Duration::ZERO);
    assert!(committed(&out) >= 5);
    let before = committed(&out);
    let said = failure(&mut command(&out, &[&["--bits", "3"], &FEWER[..]].concat()), 1);
    assert!(said.contains("scheme.grid.int.bits (4 there, 3 now)") && said.contains("--force"), "{said}");
    let said = failure(&mut command(&out, &[&["--seed", "7"], &FEWER[..]].concat()), 1);
    assert!(said.contains("seed (0 there, 7 now)"), "{said}");
    assert_eq!(committed(&out), before, "a refusal leaves the unfinished run alone");
    success(&mut command(&out, &[&["--bits", "3", "--force"], &FEWER[..]].concat()));
    let fresh = dir.path().join("fresh");
    success(&mut command(&fresh, &[&["--bits", "3"], &FEWER[..]].concat()));
    assert_same(&fresh, &out);
}

#[test]
fn another_input_refuses_the_leftover_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (copy_of_books(dir.path()), dir.path().join("out"));
    let run = || {
        let mut command = bitmill(["quantize"]);
        command.arg(&model).arg("-o").arg(&out).args(QUICK).args(EACH);
        command
    };
    let mut child = run().stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    while committed(&out) < 4 && child.try_wait().unwrap().is_none() {
        std::thread::yield_now();
    }
    let _ = child.kill();
    child.wait().unwrap();
    assert!((4..12).contains(&committed(&out)), "killed half-way");
    // One number of one weight changes, and nothing else.
    let file = model.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let last = bytes.len() - 2;
    bytes[last] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let said = failure(&mut run(), 1);
    assert!(said.contains("another weights.model.safetensors"), "{said}");
}

#[test]
fn an_interrupt_stops_cleanly_and_is_taken_up() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, out) = (dir.path().join("whole"), dir.path().join("out"));
    success(&mut command(&whole, &FEWER));
    let child = command(&out, &FEWER).stderr(Stdio::piped()).spawn().unwrap();
    while committed(&out) < 4 {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(130), "{said}");
    assert!(said.contains("run the same command to go on"), "{said}");
    success(&mut command(&out, &FEWER));
    assert_same(&whole, &out);
}

//! `bitmill bench`: one table of recipes and widths, and a bench that goes on from what it has written.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use serde_json::Value;
use std::path::Path;
use support::{QUICK, bitmill, books, failure, json};

fn bench(results: &Path, more: &[&str]) -> std::process::Command {
    let mut command = bitmill(["bench"]);
    command.arg(books()).args(QUICK).args([
        "--window",
        "64",
        "--windows",
        "4",
        "--bits",
        "2,4",
        "--group-size",
        "64,128",
    ]);
    command.arg("--text").arg(books().join("evaluation.txt")).arg("-o").arg(results).args(more);
    command
}

#[test]
fn a_matrix_is_measured_written_and_taken_up() {
    let dir = tempfile::tempdir().unwrap();
    let results = dir.path().join("results");
    let recipe = "mean square=--method rtn --scale-search mse --ignore layers\\.[2-7]\\.";
    let first = json(&mut bench(&results, &["--methods", "rtn", "--recipe", recipe]));
    let cells = first.as_array().unwrap();
    let of = |name: &str, bits: u64| cells.iter().find(|c| c["recipe"] == name && c["bits"] == bits).unwrap();
    assert_eq!(cells.len(), 4);
    for (bits, width) in [(2, 2.25), (4, 4.125)] {
        let (all, few) = (of("rtn", bits), of("mean square", bits));
        for cell in [all, few] {
            // Shapes are stored beside codes and scales.
            assert!((cell["bits_per_weight"].as_f64().unwrap() - width).abs() < 0.01, "{cell}");
        }
        assert!(all["kl"].as_f64() > few["kl"].as_f64(), "two rounded blocks lose less than eight");
        assert!(all["perplexity"].as_f64() > Some(1.0) && all["same_top"].as_f64() <= Some(100.0));
        assert!(cfg!(not(target_os = "linux")) || all["peak_memory"].as_u64() > Some(1 << 20));
    }
    assert!(of("rtn", 2)["kl"].as_f64() > of("rtn", 4)["kl"].as_f64());
    // The same numbers in both files, and nothing else left behind.
    let written: Value = serde_json::from_slice(&std::fs::read(dir.path().join("results.json")).unwrap()).unwrap();
    assert_eq!(written, first);
    let csv = std::fs::read_to_string(dir.path().join("results.csv")).unwrap();
    assert!(csv.lines().count() == 5 && csv.contains("\"mean square\",2,64,2.25"), "{csv}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    // What is known is not measured again: its seconds are the same to the last digit.
    let again = json(&mut bench(&results, &["--methods", "rtn"]));
    assert_eq!(again.as_array().unwrap().as_slice(), &[of("rtn", 2).clone(), of("rtn", 4).clone()]);
    let kept: Value = serde_json::from_slice(&std::fs::read(dir.path().join("results.json")).unwrap()).unwrap();
    assert_eq!(kept.as_array().unwrap().len(), 4, "rows that were not asked for are kept");
}

#[test]
fn what_cannot_be_compared_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let results = dir.path().join("results");
    let refused = |more: &[&str]| failure(&mut bench(&results, more), 1);
    assert!(refused(&["--methods", "magic"]).contains("magic"));
    assert!(refused(&["--recipe", "nameless"]).contains("NAME=FLAGS"));
    assert!(refused(&["--methods", "rtn", "--group-size", "1,2,3"]).contains("5 group sizes for 2 widths"));
    let wrong = refused(&["--methods", "rtn", "--recipe", "x=--no-such-flag"]);
    assert!(wrong.contains("no-such-flag"), "{wrong}");
    std::fs::write(dir.path().join("results.json"), "[{}]").unwrap();
    assert!(refused(&["--methods", "rtn"]).contains("results.json"));
}

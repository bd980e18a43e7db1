//! The report is one file that needs nothing else, and a browser draws it without asking anyone for anything; the model card
//! says the same for the same input.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::{QUICK, assert_same, bitmill, books, copy_of_books, failure, json, success};

/// Two blocks of eight, rounded without refinements or tuning.
const FEW: [&str; 8] =
    ["--descent-sweeps", "0", "--scale-refits", "0", "--tuning-passes", "0", "--ignore", r"model\.layers\.[2-7]\."];

/// Plots that every calibrated output has, and those that a mixture adds.
const PLOTS: [&str; 8] =
    ["rate-distortion", "layer-error", "bits", "kl-histogram", "kurtosis", "outliers", "peaks", "coverage"];
const OF_MIXTURES: [&str; 1] = ["predicted-measured"];

fn quantized(model: &Path, out: &Path, flags: &[&str]) -> Value {
    json(bitmill(["quantize"]).arg(model).arg("-o").arg(out).args(QUICK).args(FEW).args(flags))
}

/// What in `page` a browser would fetch, or run.
fn fetched(page: &str) -> Vec<&'static str> {
    let signs =
        ["http:", "https:", "src=", "href=", "url(", "@import", "<link", "<iframe", "<img", "onload", "<script>"];
    signs.into_iter().filter(|sign| page.contains(sign)).collect()
}

#[test]
fn a_report_lies_beside_every_output_and_fetches_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let result = quantized(&books(), &out, &["--bits", "3.5", "--options", "2,3g64,4asym,6"]);
    let file = dir.path().join("out.report.html");
    assert_eq!(result["report"], file.to_str().unwrap());
    let page = std::fs::read_to_string(&file).unwrap();
    assert!(fetched(&page).is_empty(), "{:?}", fetched(&page));
    for plot in PLOTS.iter().chain(&OF_MIXTURES) {
        assert!(page.contains(&format!("<svg id=\"{plot}\"")), "{plot}");
    }
    // The facts in it are those of the run.
    let (_, facts) = page.split_once("id=\"facts\">").unwrap();
    let facts: Value = serde_json::from_str(facts.split_once("</script>").unwrap().0).unwrap();
    assert_eq!(facts["evaluated"]["evaluation"]["divergence"]["kl"]["mean"], result["held_out_kl"]);
    assert_eq!(facts["manifest"]["sites"].as_array().unwrap().len(), 8, "two blocks of four sites");
    let kurtosis = facts["manifest"]["sites"][0]["kurtosis"].as_f64().unwrap();
    assert!(kurtosis > 1.0 && kurtosis < 1e4, "{kurtosis}");
    let survey = &facts["manifest"]["mixture"]["survey"];
    let rank = survey["rank_correlation"].as_f64().unwrap();
    assert!(rank > 0.9, "the closed form ranks as the method does: {rank}");
    let frontier: Vec<f64> = survey["frontier"].as_array().unwrap().iter().map(|p| p[1].as_f64().unwrap()).collect();
    assert!(
        frontier.len() > 4 && frontier.windows(2).all(|w| w[1] <= w[0] * (1.0 + 1e-9)),
        "more bytes never lose more"
    );
    for hash in ["model.safetensors", "calibration.tokens"] {
        assert!(page.contains(hash), "{hash}");
    }

    // Written again from what lies there, it is the same page, measurement included; and it can be measured anew.
    success(bitmill(["report"]).arg(&out));
    assert!(std::fs::read_to_string(&file).unwrap() == page);
    let text = books().join("evaluation.txt");
    let anew = ["--window", "64", "--windows", "4", "--text", text.to_str().unwrap()];
    let measured = json(bitmill(["report"]).arg(&out).arg("--reference").arg(books()).args(anew));
    assert!(measured["kl"].as_f64().unwrap() > 0.0);
    assert!(std::fs::read_to_string(&file).unwrap().contains("4 windows of 64 tokens of evaluation.txt"));
    let nothing = failure(bitmill(["report"]).arg(books()), 1);
    assert!(nothing.contains("bitmill.json") && nothing.contains("quantize writes"), "{nothing}");
}

#[test]
fn outputs_without_activations_and_gguf_files_have_reports_too() {
    let dir = tempfile::tempdir().unwrap();
    let plain = dir.path().join("plain");
    success(bitmill(["quantize"]).arg(books()).arg("-o").arg(&plain).args(["--method", "rtn", "--bits", "8"]));
    let page = std::fs::read_to_string(dir.path().join("plain.report.html")).unwrap();
    assert!(page.contains("id=\"layer-error\"") && !page.contains("id=\"kurtosis\"") && fetched(&page).is_empty());
    let file = dir.path().join("model.gguf");
    quantized(&books(), &file, &["--scheme", "q4_0"]);
    let page = std::fs::read_to_string(dir.path().join("model.gguf.report.html")).unwrap();
    assert!(page.contains("id=\"kl-histogram\"") && page.contains("q4_0"));
    success(bitmill(["report"]).arg(&file));
    // Left out on request.
    let none = dir.path().join("none");
    success(bitmill(["quantize"]).arg(books()).arg("-o").arg(&none).args(["--method", "rtn", "--no-report"]));
    assert!(none.exists() && !dir.path().join("none.report.html").exists());
}

#[test]
fn the_card_depends_on_the_input_alone_and_spares_the_authors() {
    let dir = tempfile::tempdir().unwrap();
    let (one, other) = (dir.path().join("one"), dir.path().join("elsewhere").join("other"));
    let flags = ["--format", "gptq", "--bits", "4"];
    quantized(&books(), &one, &flags);
    quantized(&books(), &other, &[&flags[..], &["--threads", "1"]].concat());
    assert_same(&one, &other);
    let card = std::fs::read_to_string(one.join("README.md")).unwrap();
    assert!(card.starts_with("---\nlibrary_name: transformers\n") && card.contains("- gptq\n"), "{card}");
    assert!(card.contains("| q_proj | w4 g128 sym | 2 |") && card.contains("GPTQModel | loads it"), "{card}");
    assert!(!card.contains(dir.path().to_str().unwrap()) && !card.contains("books-10m"), "no paths: {card}");
    let model = copy_of_books(dir.path());
    std::fs::write(model.join("README.md"), "the author's words\n").unwrap();
    let kept = dir.path().join("kept");
    let text = books().join("calibration.txt");
    quantized(&model, &kept, &[&flags[..], &["--calibration", text.to_str().unwrap()]].concat());
    assert_eq!(std::fs::read_to_string(kept.join("README.md")).unwrap(), "the author's words\n");
    assert_eq!(std::fs::read_to_string(kept.join("README.bitmill.md")).unwrap(), card);
}

/// A headless browser on this machine; BITMILL_BROWSER names one that is not on the path.
fn browser() -> Option<PathBuf> {
    if let Some(named) = std::env::var_os("BITMILL_BROWSER") {
        return Some(named.into());
    }
    let names = ["chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"];
    let path = std::env::var_os("PATH").unwrap_or_default();
    let all = std::env::split_paths(&path).flat_map(|dir| names.map(|n| dir.join(n)));
    { all }.find(|p| p.is_file())
}

/// What is appended to a copy of the page: where each drawing is and how much is drawn in it.
const PROBE: &str = r#"<pre id="probe"></pre><script>
const shapes = s => [...s.querySelectorAll("rect,circle,polyline,line,text")].filter(e => e.getBBox().width + e.getBBox().height > 0).length;
document.getElementById("probe").textContent = "PROBE" + JSON.stringify({
  width: document.documentElement.scrollWidth,
  fetched: performance.getEntriesByType("resource").map(r => r.name),
  plots: [...document.querySelectorAll("svg")].map(s => { const b = s.getBoundingClientRect(); return [s.id, b.width, b.height, shapes(s)]; })
}) + "END";</script>"#;

#[test]
fn a_browser_draws_the_plots_and_asks_no_network() {
    let Some(browser) = browser() else {
        eprintln!("SKIPPED: no headless browser here; install chromium or name one in BITMILL_BROWSER");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    quantized(&books(), &out, &["--bits", "3.5", "--options", "2,3g64,4,6"]);
    let page = std::fs::read_to_string(dir.path().join("out.report.html")).unwrap();
    let probed = dir.path().join("probed.html");
    std::fs::write(&probed, page.replace("</body>", &format!("{PROBE}</body>"))).unwrap();
    let log = dir.path().join("net.json");
    let run = Command::new(&browser)
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--window-size=1100,900",
        ])
        .arg(format!("--user-data-dir={}", dir.path().join("profile").display()))
        .arg(format!("--log-net-log={}", log.display()))
        .args(["--net-log-capture-mode=Everything", "--dump-dom"])
        .arg(format!("file://{}", probed.display()))
        .output()
        .unwrap();
    let dom = String::from_utf8_lossy(&run.stdout);
    let found = dom.split("PROBE{").nth(1).and_then(|rest| rest.split("END").next());
    let found = found.unwrap_or_else(|| panic!("{browser:?} ran no script:\n{}", String::from_utf8_lossy(&run.stderr)));
    let found: Value = serde_json::from_str(&format!("{{{found}").replace("&gt;", ">").replace("&lt;", "<")).unwrap();
    assert_eq!(found["fetched"], serde_json::json!([]), "the page fetches nothing");
    assert!(found["width"].as_f64().unwrap() <= 1100.0, "nothing is wider than the window: {}", found["width"]);
    let plots = found["plots"].as_array().unwrap();
    for name in PLOTS.iter().chain(&OF_MIXTURES) {
        let plot = plots.iter().find(|p| p[0] == *name).unwrap_or_else(|| panic!("{name} is not drawn: {found}"));
        let (width, height, shapes) = (plot[1].as_f64().unwrap(), plot[2].as_f64().unwrap(), plot[3].as_u64().unwrap());
        assert!(width > 300.0 && height > 60.0 && shapes > 8, "{name}: {plot}");
    }
    // No request of the page left the machine: the browser's own log of its network names none.
    let log = std::fs::read_to_string(&log).unwrap_or_default();
    let asked: Vec<&str> = log.split("\"url\":\"http").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    assert!(asked.is_empty(), "requests were made: {asked:?}");
}

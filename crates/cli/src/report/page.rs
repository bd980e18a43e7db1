//! The page around the sections.

use super::facts::{DATA, Facts};
use super::{plot::escape, sections};

/// Styles, light and dark. System fonts: nothing is fetched.
const STYLE: &str = "
:root { color-scheme: light dark; --paper: #fbfbfa; --card: #ffffff; --ink: #1d2125; --soft: #5b6470; --rule: #e3e5e8;
  --heat: #c2410c; --on-heat: #ffffff; --c0: #0f62a6; --c1: #9a6b00; --c2: #b3261e; --c3: #1b7f4d; --c4: #7a3fb0; --c5: #00798c; --c6: #666f7a; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --card: #1d2126; --ink: #e6e8eb; --soft: #9aa4b0; --rule: #30363d;
  --heat: #f28b52; --on-heat: #15181c; --c0: #6db3f2; --c1: #e0b04a; --c2: #ff8a80; --c3: #6fd6a0; --c4: #c79af0; --c5: #5fd0e0; --c6: #a5afba; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 1.7rem; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.12rem; margin: 0 0 4px; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 18px 20px; margin: 18px 0; overflow-x: auto; }
.remark { color: var(--soft); margin: 0 0 12px; max-width: 46rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(172px, 1fr)); gap: 10px; margin: 18px 0 10px; }
.cards div { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 10px 14px; }
.cards b { display: block; font-size: 1.12rem; font-variant-numeric: tabular-nums; }
.cards span { color: var(--soft); font-size: .84rem; }
svg.plot { display: block; width: 100%; max-width: 860px; height: auto; margin: 0 auto; }
svg text { font-family: inherit; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); stroke-width: 1; }
.tick { fill: var(--soft); font-size: 12px; }
.axis { fill: var(--soft); font-size: 12.5px; }
.in-cell { fill: var(--ink); font-size: 11.5px; }
.in-cell.hot { fill: var(--on-heat); }
.cell { fill: var(--heat); }
.bar { fill: var(--c0); }
.line { fill: none; stroke-width: 2; }
.dot { stroke: var(--card); stroke-width: 1; fill-opacity: .85; }
.dot.star { stroke-width: 2; fill-opacity: 1; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); }
.dot { fill: var(--c); } .line { stroke: var(--c); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; justify-content: center; margin: 8px 0 0; color: var(--soft); font-size: .86rem; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 6px; background: var(--c); }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--rule); overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 600; }
.keys td:first-child { color: var(--soft); white-space: nowrap; }
summary { cursor: pointer; color: var(--soft); }
";

/// The whole report.
pub(super) fn page(facts: &Facts) -> String {
    let m = &facts.manifest;
    let kind = m.model_type.as_deref().unwrap_or("model");
    let scheme = if m.mixture.is_some() { "a mixture of schemes".to_owned() } else { common_scheme(facts) };
    let line = format!(
        "{kind}, {scheme}, {} stored as {}, bitmill {}",
        text(&m.run["settings"]["method"]),
        text(&m.run["settings"]["format"]),
        text(&m.run["bitmill"])
    );
    let body = [
        sections::summary(facts),
        sections::rate(facts),
        sections::tensors(m),
        sections::divergence(facts),
        sections::stages(m),
        sections::sites(m),
        sections::settings(m),
        sections::table(m),
    ];
    // A closing tag inside of a name would end the element early.
    let data = serde_json::to_string(facts).unwrap_or_default().replace("</", "<\\/");
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width\">\n\
         <title>{0} · bitmill report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{0}</h1>\n<p class=\"remark\">{1}</p>\n{2}\
         </main>\n{DATA}{data}</script>\n</body>\n</html>\n",
        escape(&facts.name),
        escape(&line),
        body.concat()
    )
}

/// The scheme of most tensors.
fn common_scheme(facts: &Facts) -> String {
    let mut counts: Vec<(&str, usize)> = Vec::new();
    for t in &facts.manifest.tensors {
        match counts.iter_mut().find(|(s, _)| *s == t.scheme) {
            Some((_, n)) => *n += 1,
            None => counts.push((&t.scheme, 1)),
        }
    }
    counts.iter().max_by_key(|(_, n)| *n).map_or_else(|| "nothing quantized".into(), |(s, _)| (*s).to_owned())
}

fn text(value: &serde_json::Value) -> &str {
    value.as_str().unwrap_or("?")
}

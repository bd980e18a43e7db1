//! The sections of a report, each a drawing or table with what to see in it.

use super::facts::{Facts, Manifest, Tensor};
use super::plot::{Axis, Cell, Marks, Series, bars, escape, heat, heat_map, scatter, short};
use crate::units;
use bitmill_quantize::SiteRecord;
use serde_json::Value;

/// A headed section; empty without a body.
fn section(title: &str, remark: &str, body: &str) -> String {
    if body.is_empty() {
        return String::new();
    }
    format!("<section><h2>{}</h2><p class=\"remark\">{}</p>{body}</section>\n", escape(title), escape(remark))
}

/// The numbers one looks for first.
pub(super) fn summary(facts: &Facts) -> String {
    let m = &facts.manifest;
    let mut cards = vec![
        ("bits per weight", format!("{:.3}", m.bits_per_weight)),
        ("weight files", units::bytes(m.output_bytes)),
        ("parameters", units::count(m.parameters)),
        ("tensors", m.tensors.len().to_string()),
    ];
    if let Some(e) = &facts.evaluated {
        if let Some(d) = &e.evaluation.divergence {
            cards.push(("KL divergence", format!("{:.5} ± {:.5}", d.kl.mean, d.kl.error)));
            cards.push(("same top token", format!("{:.2} %", d.top1_percent)));
        }
        cards.push(("perplexity", format!("{:.3}", e.evaluation.perplexity.value)));
        if let Some(r) = &e.evaluation.reference_perplexity {
            cards.push(("of the reference", format!("{:.3}", r.value)));
        }
    }
    if let Some(mixture) = &m.mixture {
        cards.push(("predicted KL", format!("{:.5}", mixture.predicted)));
    }
    let card = |(name, value): &(&str, String)| format!("<div><b>{}</b><span>{name}</span></div>", escape(value));
    let on = facts
        .evaluated
        .as_ref()
        .map_or("Not measured on text: bitmill report OUT --reference MODEL --text FILE does.".into(), |e| {
            format!("Measured on {}.", e.on)
        });
    format!(
        "<div class=\"cards\">{}</div><p class=\"remark\">{}</p>\n",
        cards.iter().map(card).collect::<String>(),
        escape(&on)
    )
}

/// What bits bring: the frontier of mixtures where one was chosen, else the error of every tensor.
pub(super) fn rate(facts: &Facts) -> String {
    let m = &facts.manifest;
    let Some(mixture) = &m.mixture else { return rate_of_tensors(m) };
    let named = |name: &str, bits: f64, kl: f64| (bits, kl, format!("{name}: {} bits, KL {}", short(bits), short(kl)));
    let survey = mixture.survey.as_ref();
    let frontier = survey.iter().flat_map(|s| &s.frontier).map(|&(b, l)| named("best mixture", b, l)).collect();
    let uniform = survey.iter().flat_map(|s| &s.uniform).map(|(name, b, l)| named(name, *b, *l)).collect();
    let weights: f64 = m.tensors.iter().map(|t| (t.shape[0] * t.shape[1]) as f64).sum();
    let bits = mixture.bytes as f64 * 8.0 / weights.max(1.0);
    let mut all = vec![
        Series { name: "best mixture, predicted", class: "c0", marks: Marks::Line, points: frontier },
        Series { name: "one scheme for all, predicted", class: "c1", marks: Marks::Dots, points: uniform },
        Series {
            name: "this output, predicted",
            class: "c2",
            marks: Marks::Star,
            points: vec![named("predicted", bits, mixture.predicted)],
        },
    ];
    if let Some(d) = facts.evaluated.as_ref().and_then(|e| e.evaluation.divergence.as_ref()) {
        let points = vec![named("measured", bits, d.kl.mean)];
        all.push(Series { name: "this output, measured", class: "c3", marks: Marks::Star, points });
    }
    let across = Axis::linear(all.iter().flat_map(|s| s.points.iter().map(|p| p.0)));
    let up = Axis::log(all.iter().flat_map(|s| s.points.iter().map(|p| p.1)));
    let plot = scatter(
        "rate-distortion",
        "KL divergence over bits per weight",
        (&across, "bits per weight"),
        (&up, "KL divergence, nats per token"),
        &all,
    );
    section(
        "Rate and distortion",
        "What the predictions lose at which size. The line is the best mixture of schemes at every size, by prediction; dots are \
         one scheme for every tensor. Predictions are of rounding alone: later blocks that make up for earlier ones, and tuning, \
         lower what is measured.",
        &plot,
    ) + &predicted(m)
}

fn rate_of_tensors(m: &Manifest) -> String {
    let kinds = kinds(m);
    let mut all = Vec::new();
    for (kind, class) in kinds.iter().zip(CLASSES.iter().cycle()) {
        let lossy = m.tensors.iter().filter(|t| t.kind() == kind && t.relative_error > 0.0);
        let point = |t: &Tensor| {
            let (bits, error) = (short(t.bits_per_weight), short(t.relative_error));
            let what = format!("{}: {}, {bits} bits, error {error}", t.tensor, t.scheme);
            (t.bits_per_weight, t.relative_error, what)
        };
        all.push(Series { name: kind, class, marks: Marks::Dots, points: lossy.map(point).collect() });
    }
    let across = Axis::linear(all.iter().flat_map(|s| s.points.iter().map(|p| p.0)));
    let up = Axis::log(all.iter().flat_map(|s| s.points.iter().map(|p| p.1)));
    let plot = scatter(
        "rate-distortion",
        "Relative error of every tensor over its bits per weight",
        (&across, "bits per weight"),
        (&up, "relative error"),
        &all,
    );
    section("Rate and distortion", "Every quantized tensor: what it takes and what it loses.", &plot)
}

const CLASSES: [&str; 7] = ["c0", "c1", "c2", "c3", "c4", "c5", "c6"];

/// Predicted against measured errors.
fn predicted(m: &Manifest) -> String {
    let Some(mixture) = &m.mixture else { return String::new() };
    let point = |c: &bitmill_quantize::Chosen| {
        let what =
            format!("{}: {}, predicted {}, measured {}", c.tensor, c.scheme, short(c.closed_form), short(c.measured));
        (c.closed_form, c.measured, what)
    };
    let points: Vec<_> =
        mixture.tensors.iter().filter(|c| c.closed_form > 0.0 && c.measured > 0.0).map(point).collect();
    let both = || points.iter().flat_map(|p| [p.0, p.1]);
    let (axis, (low, high)) =
        (Axis::log(both()), both().fold((f64::INFINITY, 0.0f64), |(a, b), v| (a.min(v), b.max(v))));
    let equal = vec![(low, low, "equal".to_owned()), (high, high, "equal".to_owned())];
    let plot = scatter(
        "predicted-measured",
        "Measured output error over the closed form",
        (&axis, "output error by the closed form tr(D)·s²/12"),
        (&axis, "output error left by the method"),
        &[
            Series { name: "equal", class: "c1", marks: Marks::Line, points: equal },
            Series { name: "tensors", class: "c0", marks: Marks::Dots, points },
        ],
    );
    let remark = format!(
        "Output error tr(ΔHΔᵀ) of every tensor under its scheme: by the closed form, from weights and Hessian alone, and as \
         the method left it. Rank correlation over all tensors and options: {}.",
        m.rank_correlation().map_or("unknown".into(), |r| format!("{r:.4}"))
    );
    section("Predicted and measured error", &remark, &plot)
}

/// Kinds of linear in the order in which they first occur.
fn kinds(m: &Manifest) -> Vec<String> {
    let mut kinds: Vec<String> = Vec::new();
    for t in m.tensors.iter().filter(|t| t.block().is_some()) {
        if !kinds.iter().any(|k| k == t.kind()) {
            kinds.push(t.kind().to_owned());
        }
    }
    kinds
}

/// A heat map of a number of every tensor.
fn by_tensor(
    m: &Manifest,
    id: &str,
    title: &str,
    value: impl Fn(&Tensor) -> f64,
    hot: impl Fn(&[Option<f64>]) -> Vec<f64>,
) -> String {
    let (kinds, blocks) = (kinds(m), m.blocks());
    if kinds.is_empty() {
        return String::new();
    }
    let find = |kind: &String, block: usize| m.tensors.iter().find(|t| t.block() == Some(block) && t.kind() == kind);
    let found: Vec<Option<&Tensor>> = kinds.iter().flat_map(|k| (0..blocks).map(move |b| find(k, b))).collect();
    let values: Vec<Option<f64>> = found.iter().map(|t| t.map(&value)).collect();
    let cell = |((t, v), heat): ((&Option<&Tensor>, &Option<f64>), f64)| {
        let (t, v) = ((*t)?, (*v)?);
        Some(Cell { heat, text: short(v), title: format!("{}: {} ({})", t.tensor, short(v), t.scheme) })
    };
    let cells: Vec<Option<Cell>> = found.iter().zip(&values).zip(hot(&values)).map(cell).collect();
    heat_map(id, title, &kinds, blocks, &cells)
}

/// Errors and bits of every tensor.
pub(super) fn tensors(m: &Manifest) -> String {
    let of = m.tensors.first().map_or("output", |t| t.error_of.as_str());
    let errors = by_tensor(m, "layer-error", "Relative error of every tensor", |t| t.relative_error, heat);
    let remark = format!(
        "Share of the {of}'s energy that is error, tensor by tensor, after rounding and before any tuning; the hotter, the larger."
    );
    // Bits on a scale of their own: from 1 to 8, so that a uniform output is uniformly coloured.
    let scale = |values: &[Option<f64>]| values.iter().map(|v| v.map_or(0.0, |v| (v - 1.0) / 8.0)).collect();
    let bits = by_tensor(m, "bits", "Bits per weight of every tensor", |t| t.bits_per_weight, scale);
    section("Error of every layer", &remark, &errors)
        + &section(
            "Bits of every tensor",
            "Bits per weight in the file: codes, scales, zero points and what the format adds.",
            &bits,
        )
}

/// What calibration saw.
pub(super) fn sites(m: &Manifest) -> String {
    let mut names: Vec<String> = Vec::new();
    for s in &m.sites {
        if !names.contains(&s.site) {
            names.push(s.site.clone());
        }
    }
    if names.is_empty() {
        return String::new();
    }
    let blocks = m.blocks();
    let map = |id: &str, title: &str, value: &dyn Fn(&SiteRecord) -> Option<f64>| {
        let find = |name: &String, block: usize| m.sites.iter().find(|s| s.block == block && s.site == *name);
        let found: Vec<Option<&SiteRecord>> = names.iter().flat_map(|n| (0..blocks).map(move |b| find(n, b))).collect();
        let values: Vec<Option<f64>> = found.iter().map(|s| s.and_then(value)).collect();
        if values.iter().all(Option::is_none) {
            return String::new();
        }
        let cell = |((s, v), heat): ((&Option<&SiteRecord>, &Option<f64>), f64)| {
            let (s, v) = ((*s)?, (*v)?);
            Some(Cell { heat, text: short(v), title: format!("block {} {}: {}", s.block, s.site, short(v)) })
        };
        let cells: Vec<Option<Cell>> = found.iter().zip(&values).zip(heat(&values)).map(cell).collect();
        heat_map(id, title, &names, blocks, &cells)
    };
    let kurtosis = map("kurtosis", "Kurtosis of the activations of every site", &|s| s.spread.kurtosis);
    let outliers = map("outliers", "Largest channel over the median one, by site", &|s| Some(s.spread.outlier));
    let peaks = map("peaks", "Largest activation over the root mean square, by site", &|s| Some(s.spread.peak));
    let coverage = map("coverage", "Tokens that calibration saw at every site", &|s| Some(s.tokens as f64));
    section(
        "Kurtosis of activations",
        "E[x⁴]/E[x²]² of what the linears read: 3 for normal numbers, large where few numbers hold most of the energy.",
        &kurtosis,
    ) + &section("Outlier channels", "Root mean square of the largest input over that of the median one.", &outliers)
        + &section("Largest activation", "Largest magnitude over the root mean square.", &peaks)
        + &section(
            "Calibration coverage",
            "Tokens that every site's statistics are from; a Hessian wants several times as many as it has inputs.",
            &coverage,
        )
}

/// How far single predictions are from the reference's.
pub(super) fn divergence(facts: &Facts) -> String {
    let Some(e) = &facts.evaluated else { return String::new() };
    let Some(d) = &e.evaluation.divergence else { return String::new() };
    let edges = &d.histogram.edges;
    let lower = |i: usize| if i == 0 { edges[0] / (edges[1] / edges[0]) } else { edges[i - 1] };
    let all: Vec<(f64, f64, f64)> =
        d.histogram.counts.iter().enumerate().map(|(i, &n)| (lower(i), edges[i], n as f64)).collect();
    let (first, last) =
        (all.iter().position(|b| b.2 > 0.0).unwrap_or(0), all.iter().rposition(|b| b.2 > 0.0).unwrap_or(0));
    let plot = bars(
        "kl-histogram",
        "Positions by their divergence from the reference",
        "KL divergence at a position, nats",
        "positions",
        &all[first..=last],
    );
    let (ratio, error) = d.ln_perplexity_ratio;
    let remark = format!(
        "{} positions of text that calibration did not see ({}): mean {:.5} ± {:.5}, median {:.5}, 90% {:.5}, 99% {:.5}, largest {:.3}; \
         ln of the perplexities' ratio {ratio:.5} ± {error:.5}.",
        d.positions, e.on, d.kl.mean, d.kl.error, d.kl.median, d.kl.p90, d.kl.p99, d.kl.max
    );
    section("Divergence from the reference", &remark, &plot)
}

/// Tuning and whatever else worked on the whole model.
pub(super) fn stages(m: &Manifest) -> String {
    if m.stages.is_empty() {
        return String::new();
    }
    let row = |s: &super::facts::Stage| {
        let kept = if s.kept_pass == 0 { "dropped".to_owned() } else { format!("pass {} kept", s.kept_pass) };
        format!(
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{:.5}</td><td>{:.5}</td><td>{kept}</td></tr>",
            escape(&s.stage),
            escape(&s.loss),
            s.held_out_windows,
            s.before,
            s.after
        )
    };
    let rows: String = m.stages.iter().map(row).collect();
    let table = format!(
        "<table><tr><th>stage</th><th>loss</th><th>held-out windows</th><th>before</th><th>after</th><th></th></tr>{rows}</table>"
    );
    section(
        "Stages over the whole model",
        "What refinement by gradients brought on windows it did not train on.",
        &table,
    )
}

/// Settings, versions and hashes, as the manifest has them.
pub(super) fn settings(m: &Manifest) -> String {
    let mut rows = String::new();
    flatten("", &m.run, &mut rows);
    section(
        "Settings, versions, hashes",
        "Everything that decides the bytes of the output. Equal values here give equal files, on any number of threads.",
        &format!("<table class=\"keys\">{rows}</table>"),
    )
}

fn flatten(path: &str, value: &Value, rows: &mut String) {
    let join = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    match value {
        // The scheme of every tensor is in a table of its own.
        Value::Object(_) if path == "settings.layers" => {}
        Value::Object(map) => map.iter().for_each(|(k, v)| flatten(&join(k), v, rows)),
        Value::Array(list) if list.iter().any(Value::is_object) => {
            list.iter().enumerate().for_each(|(i, v)| flatten(&join(&i.to_string()), v, rows));
        }
        Value::Null => {}
        Value::String(text) => *rows += &format!("<tr><td>{}</td><td>{}</td></tr>", escape(path), escape(text)),
        other => *rows += &format!("<tr><td>{}</td><td>{}</td></tr>", escape(path), escape(&other.to_string())),
    }
}

/// Every tensor in a table that opens.
pub(super) fn table(m: &Manifest) -> String {
    let row = |t: &Tensor| {
        format!(
            "<tr><td>{}</td><td>{} × {}</td><td>{}</td><td>{:.4}</td><td>{:.3e}</td></tr>",
            escape(&t.tensor),
            t.shape[0],
            t.shape[1],
            escape(&t.scheme),
            t.bits_per_weight,
            t.relative_error
        )
    };
    let rows: String = m.tensors.iter().map(row).collect();
    format!(
        "<section><h2>Tensors</h2><details><summary>{} quantized tensors</summary><table><tr><th>tensor</th><th>shape</th>\
         <th>scheme</th><th>bits per weight</th><th>relative error</th></tr>{rows}</table></details></section>\n",
        m.tensors.len()
    )
}

//! Drawings as SVG: axes, lines, points, bars and heat maps. Colours are variables of the page, so that it has a dark side.

use std::fmt::Write;

/// Text in an element or attribute.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// How numbers lie along an axis.
#[derive(Debug, Clone, Copy)]
pub(super) struct Axis {
    low: f64,
    high: f64,
    log: bool,
}

impl Axis {
    /// A linear axis over `values`, with some room at both ends.
    pub(super) fn linear(values: impl Iterator<Item = f64>) -> Self {
        let (low, high) = ends(values);
        // A single number gets an axis of its own size around it.
        let room = (0.06 * (high - low)).max(0.04 * high.abs()).max(1e-9);
        Axis { low: low - room, high: high + room, log: false }
    }

    /// A logarithmic axis over the positive ones of `values`.
    pub(super) fn log(values: impl Iterator<Item = f64>) -> Self {
        let (low, high) = ends(values.filter(|v| *v > 0.0).map(f64::log10));
        let room = 0.06 * (high - low).max(0.2);
        Axis { low: low - room, high: high + room, log: true }
    }

    /// Place of `value`, 0 to 1.
    fn at(&self, value: f64) -> f64 {
        let v = if self.log { value.max(f64::MIN_POSITIVE).log10() } else { value };
        ((v - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }

    /// Round numbers along the axis.
    fn ticks(&self) -> Vec<f64> {
        if self.log {
            let decades = (self.low.ceil() as i32)..=(self.high.floor() as i32);
            let all: Vec<f64> = decades.map(|d| 10f64.powi(d)).collect();
            if all.len() >= 2 {
                let skip = all.len().div_ceil(8);
                return all.into_iter().step_by(skip).collect();
            }
            let (from, to) = (10f64.powf(self.low), 10f64.powf(self.high));
            let fine = (-12..6).flat_map(|d| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(d)));
            return fine.filter(|v| (from..=to).contains(v)).collect();
        }
        let span = self.high - self.low;
        let raw = span / 6.0;
        let unit = 10f64.powf(raw.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * unit).into_iter().find(|s| *s >= raw).unwrap_or(unit);
        let first = (self.low / step).ceil() as i64;
        (first..).map(|i| i as f64 * step).take_while(|v| *v <= self.high).collect()
    }
}

fn ends(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) =
        values.filter(|v| v.is_finite()).fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
    if low <= high { (low, high) } else { (0.0, 1.0) }
}

/// A number as short as it may be.
pub(super) fn short(v: f64) -> String {
    let size = v.abs();
    if v == 0.0 {
        "0".into()
    } else if !(1e-3..1e5).contains(&size) {
        let text = format!("{v:.1e}");
        text.replace(".0e", "e")
    } else {
        let digits = (2 - size.log10().floor() as i32).clamp(0, 5) as usize;
        let text = format!("{v:.digits$}");
        if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
    }
}

/// Marks of one kind.
pub(super) enum Marks {
    /// Points joined by a line.
    Line,
    /// Points.
    Dots,
    /// One large point that must be seen.
    Star,
}

/// Numbers drawn in one way.
pub(super) struct Series<'a> {
    pub(super) name: &'a str,
    /// Class of its colour: `c0` to `c6`.
    pub(super) class: &'a str,
    pub(super) marks: Marks,
    /// x, y and what a pointer on the mark says.
    pub(super) points: Vec<(f64, f64, String)>,
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 340.0;
const LEFT: f64 = 74.0;
const RIGHT: f64 = 18.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 50.0;

fn x(axis: &Axis, v: f64) -> f64 {
    LEFT + axis.at(v) * (WIDTH - LEFT - RIGHT)
}

fn y(axis: &Axis, v: f64) -> f64 {
    HEIGHT - BOTTOM - axis.at(v) * (HEIGHT - TOP - BOTTOM)
}

/// Opens a drawing with axes.
fn frame(id: &str, title: &str, (across, x_name): (&Axis, &str), (up, y_name): (&Axis, &str)) -> String {
    let mut svg = format!(
        "<svg id=\"{id}\" class=\"plot\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">",
        escape(title)
    );
    let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    for v in across.ticks() {
        let at = x(across, v);
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{at:.1}\" y1=\"{TOP}\" x2=\"{at:.1}\" y2=\"{bottom}\"/>\
             <text class=\"tick\" x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            bottom + 17.0,
            short(v)
        );
    }
    for v in up.ticks() {
        let at = y(up, v);
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{right}\" y2=\"{at:.1}\"/>\
             <text class=\"tick\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            at + 4.0,
            short(v)
        );
    }
    let _ = write!(
        svg,
        "<text class=\"axis\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>\
         <text class=\"axis\" transform=\"translate(16 {}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
        (LEFT + right) / 2.0,
        HEIGHT - 10.0,
        escape(x_name),
        (TOP + bottom) / 2.0,
        escape(y_name)
    );
    svg
}

/// Lines and points over two axes.
pub(super) fn scatter(id: &str, title: &str, across: (&Axis, &str), up: (&Axis, &str), all: &[Series<'_>]) -> String {
    let mut svg = frame(id, title, across, up);
    for series in all {
        let place = |p: &(f64, f64, String)| (x(across.0, p.0), y(up.0, p.1));
        if matches!(series.marks, Marks::Line) {
            let path: Vec<String> =
                series.points.iter().map(|p| format!("{:.1},{:.1}", place(p).0, place(p).1)).collect();
            let _ = write!(svg, "<polyline class=\"line {}\" points=\"{}\"/>", series.class, path.join(" "));
        }
        let (radius, extra) = match series.marks {
            Marks::Line => (2.0, ""),
            Marks::Dots => (4.0, ""),
            Marks::Star => (7.0, " star"),
        };
        for p in &series.points {
            let (cx, cy) = place(p);
            let _ = write!(
                svg,
                "<circle class=\"dot{extra} {}\" cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"{radius}\"><title>{}</title></circle>",
                series.class,
                escape(&p.2)
            );
        }
    }
    svg + "</svg>" + &legend(all)
}

fn legend(all: &[Series<'_>]) -> String {
    let entry = |s: &Series<'_>| format!("<span><i class=\"{}\"></i>{}</span>", s.class, escape(s.name));
    format!("<p class=\"legend\">{}</p>", all.iter().map(entry).collect::<String>())
}

/// Bars between the edges of bins on a logarithmic axis.
pub(super) fn bars(id: &str, title: &str, x_name: &str, y_name: &str, bins: &[(f64, f64, f64)]) -> String {
    let across = Axis::log(bins.iter().flat_map(|b| [b.0, b.1]));
    let most = bins.iter().map(|b| b.2).fold(0.0, f64::max);
    let up = Axis { low: 0.0, high: 1.08 * most.max(1.0), log: false };
    let mut svg = frame(id, title, (&across, x_name), (&up, y_name));
    for &(from, to, count) in bins {
        let (left, right, top) = (x(&across, from), x(&across, to), y(&up, count));
        let _ = write!(
            svg,
            "<rect class=\"bar\" x=\"{:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\"><title>{} to {}: {}</title></rect>",
            left + 0.5,
            (right - left - 1.0).max(1.0),
            HEIGHT - BOTTOM - top,
            short(from),
            short(to),
            count
        );
    }
    svg + "</svg>"
}

/// A cell of a heat map: how hot it is (0 to 1), what stands in it, and what a pointer on it says.
pub(super) struct Cell {
    pub(super) heat: f64,
    pub(super) text: String,
    pub(super) title: String,
}

/// Heat of `values` on a scale from the smallest to the largest, by their logarithms.
pub(super) fn heat(values: &[Option<f64>]) -> Vec<f64> {
    let logs: Vec<Option<f64>> = values.iter().map(|v| v.filter(|v| *v > 0.0).map(f64::ln)).collect();
    let (low, high) = ends(logs.iter().flatten().copied());
    let of = |v: &Option<f64>| v.map_or(0.0, |v| if high > low { (v - low) / (high - low) } else { 0.5 });
    logs.iter().map(of).collect()
}

/// A heat map with blocks across and kinds down.
pub(super) fn heat_map(id: &str, title: &str, rows: &[String], columns: usize, cells: &[Option<Cell>]) -> String {
    let (left, top, height) = (104.0, 8.0, 30.0);
    let each = ((WIDTH - left - RIGHT) / columns.max(1) as f64).min(76.0);
    let (width, bottom) = (left + each * columns as f64 + RIGHT, top + height * rows.len() as f64);
    let mut svg = format!(
        "<svg id=\"{id}\" class=\"plot\" viewBox=\"0 0 {WIDTH} {}\" role=\"img\" aria-label=\"{}\">",
        bottom + 40.0,
        escape(title)
    );
    for (r, name) in rows.iter().enumerate() {
        let at = top + height * r as f64;
        let _ = write!(
            svg,
            "<text class=\"tick\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            left - 8.0,
            at + height / 2.0 + 4.0,
            escape(name)
        );
        for c in 0..columns {
            let Some(cell) = cells.get(r * columns + c).and_then(Option::as_ref) else { continue };
            let (cx, hot) = (left + each * c as f64, if cell.heat > 0.55 { " hot" } else { "" });
            let opacity = 0.06 + 0.94 * cell.heat.clamp(0.0, 1.0);
            let _ = write!(
                svg,
                "<g><title>{}</title><rect class=\"cell\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" \
                 fill-opacity=\"{opacity:.3}\"/>",
                escape(&cell.title),
                cx + 1.0,
                at + 1.0,
                (each - 2.0).max(1.0),
                height - 2.0
            );
            // Numbers only where there is room for them.
            if each >= 36.0 {
                let _ = write!(
                    svg,
                    "<text class=\"in-cell{hot}\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                    cx + each / 2.0,
                    at + height / 2.0 + 4.0,
                    escape(&cell.text)
                );
            }
            svg += "</g>";
        }
    }
    let skip = columns.div_ceil(24).max(1);
    for c in (0..columns).step_by(skip) {
        let at = left + each * (c as f64 + 0.5);
        let _ =
            write!(svg, "<text class=\"tick\" x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{c}</text>", bottom + 16.0);
    }
    let middle = (left + width - RIGHT) / 2.0;
    let _ = write!(
        svg,
        "<text class=\"axis\" x=\"{middle:.1}\" y=\"{}\" text-anchor=\"middle\">block</text>",
        bottom + 34.0
    );
    svg + "</svg>"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_round_ticks() {
        assert_eq!(Axis::linear([2.0, 8.0].into_iter()).ticks(), [2.0, 4.0, 6.0, 8.0]);
        assert_eq!(Axis::log([1e-3, 1.0].into_iter()).ticks(), [1e-3, 1e-2, 0.1, 1.0]);
        // A range within a decade, a single number, and none at all.
        assert!(Axis::log([0.02, 0.06].into_iter()).ticks().contains(&0.05));
        assert!(!Axis::linear([3.0].into_iter()).ticks().is_empty());
        assert!(!Axis::log(std::iter::empty()).ticks().is_empty());
    }

    #[test]
    fn numbers_are_short() {
        for (v, text) in
            [(0.0, "0"), (4.127, "4.13"), (100.0, "100"), (0.03147, "0.0315"), (1e-7, "1e-7"), (65536.0, "65536")]
        {
            assert_eq!(short(v), text);
        }
    }

    #[test]
    fn names_cannot_break_out() {
        assert_eq!(escape("<a href=\"x\">&"), "&lt;a href=&quot;x&quot;&gt;&amp;");
    }

    #[test]
    fn heat_is_relative() {
        let h = heat(&[Some(1.0), Some(10.0), Some(100.0), None]);
        assert!((h[0], h[2], h[3]) == (0.0, 1.0, 0.0) && (h[1] - 0.5).abs() < 1e-12);
        assert_eq!(heat(&[Some(2.0)]), [0.5]);
    }
}

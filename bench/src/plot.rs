//! The plots of the README: SVG, and PNG made of the same.
//!
//! Few and plain: portfwd in colour, the limit dashed, everyone else grey; names stand at what they
//! name. White background, so that they read on dark pages too. The font that PNG needs comes along,
//! as a machine that measures seldom has one.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use resvg::{tiny_skia, usvg};

use crate::report::{LIMIT, Report, Row, Unit};

/// Of every plot; PNG has [`ZOOM`] times as many pixels.
const WIDTH: f64 = 840.0;
const ZOOM: f32 = 2.0;
const TEXT: f64 = 14.0;
const FONTS: &str = "DejaVu Sans, Verdana, Segoe UI, Helvetica, Arial, sans-serif";

const INK: &str = "#1f2328";
const FAINT: &str = "#59636e";
const GRID: &str = "#e3e6ea";
const GREY: &str = "#a3abb4";
const BLUE: &str = "#0a62c9";
const PALE_BLUE: &str = "#7fb2ea";

/// One plot: cases of one measure.
struct Chart {
    file: &'static str,
    title: &'static str,
    measure: &'static str,
    kind: Kind,
}

enum Kind {
    /// A bar for each contender in one case.
    Bars { case: &'static str },
    /// A line for each contender through cases, each with its name below the axis.
    Lines { cases: &'static [(&'static str, &'static str)], axis: &'static str, log: bool },
}

const CHARTS: [Chart; 5] = [
    Chart {
        file: "throughput",
        title: "Port forwarding on one core: UDP, 64-byte packets, 10,000 flows",
        measure: "throughput",
        kind: Kind::Bars { case: "forward 64 B, 10,000 flows" },
    },
    Chart {
        file: "flows",
        title: "Does it keep up with more flows? UDP, 64-byte packets, one core",
        measure: "throughput",
        kind: Kind::Lines {
            cases: &[
                ("forward 64 B, 1 flow", "1"),
                ("forward 64 B, 10,000 flows", "10,000"),
                ("forward 64 B, 1,000,000 flows", "1,000,000"),
            ],
            axis: "flows",
            log: false,
        },
    },
    Chart {
        file: "rules",
        title: "Does it keep up with more rules? UDP, 64-byte packets, one core",
        measure: "rules",
        kind: Kind::Lines {
            cases: &[
                ("1 rule", "1"),
                ("100 rules", "100"),
                ("10,000 rules", "10,000"),
                ("100,000 rules", "100,000"),
            ],
            axis: "rules",
            log: false,
        },
    },
    Chart {
        file: "latency",
        title: "Round trip of one UDP request among background load: 99th percentile",
        measure: "latency",
        kind: Kind::Lines {
            cases: &[
                ("p99, idle", "idle"),
                ("p99, 50 % of its own maximum", "50 %"),
                ("p99, 80 % of its own maximum", "80 %"),
            ],
            axis: "load, of each contender's own maximum",
            log: true,
        },
    },
    Chart {
        file: "connections",
        title: "TCP connections per second: connect, one request, one answer, close",
        measure: "tcp",
        kind: Kind::Bars { case: "connections" },
    },
];

/// Writes an SVG and a PNG for each plot that the report has figures for; gives their paths.
pub fn plots(report: &Report, directory: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot make the directory {}", directory.display()))?;
    let rows = report.rows();
    let mut paths = Vec::new();
    for chart in CHARTS {
        let Some(svg) = chart.draw(&rows) else { continue };
        let png = png(&svg).with_context(|| format!("cannot draw {}", chart.file))?;
        for (extension, bytes) in [("svg", svg.into_bytes()), ("png", png)] {
            let path = directory.join(chart.file).with_extension(extension);
            fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
            paths.push(path);
        }
    }
    Ok(paths)
}

impl Chart {
    /// The SVG; `None` if there is nothing to show.
    fn draw(&self, rows: &[Row]) -> Option<String> {
        let rows: Vec<&Row> = rows.iter().filter(|row| row.measure == self.measure).collect();
        match self.kind {
            Kind::Bars { case } => {
                let of_case = rows.into_iter().filter(|row| row.case == case).collect();
                bars(self.title, of_case)
            }
            Kind::Lines { cases, axis, log } => lines(self.title, &rows, cases, axis, log),
        }
    }
}

/// What a contender looks like.
struct Look {
    name: String,
    colour: &'static str,
    ink: &'static str,
    weight: &'static str,
    width: f64,
    dash: &'static str,
}

fn look(contender: &str) -> Look {
    let (colour, ink, weight, width, dash) = if contender == LIMIT {
        (INK, INK, "normal", 1.5, "5 4")
    } else if contender == "portfwd" || contender == "portfwd native" {
        (BLUE, BLUE, "bold", 3.5, "none")
    } else if contender.starts_with("portfwd") {
        (PALE_BLUE, BLUE, "normal", 2.0, "none")
    } else {
        (GREY, FAINT, "normal", 1.5, "none")
    };
    // What has a core of its own beside the one of the packets has a mark.
    let mark = if has_own_core(contender) { " *" } else { "" };
    Look { name: format!("{contender}{mark}"), colour, ink, weight, width, dash }
}

/// Proxies in user space: their processes run on the second core.
fn has_own_core(contender: &str) -> bool {
    ["nginx", "haproxy", "HAProxy", "socat", "realm"].iter().any(|name| contender.starts_with(name))
}

/// The unit of an axis, and how many of the sample's unit it is.
fn axis_unit(unit: Unit) -> (&'static str, f64) {
    match unit {
        Unit::PacketsPerSecond => ("million packets per second", 1e6),
        Unit::BitsPerSecond => ("Gb/s", 1e9),
        Unit::PerSecond => ("per second", 1.0),
        Unit::Nanoseconds => ("ns", 1.0),
        Unit::Microseconds => ("microseconds", 1.0),
        Unit::Milliseconds => ("ms", 1.0),
        Unit::Seconds => ("s", 1.0),
        Unit::Bytes => ("MiB", 1024.0 * 1024.0),
        Unit::SecondsPerGigabyte => ("CPU seconds per GB", 1.0),
        Unit::Instructions => ("instructions", 1.0),
    }
}

/// `more is better; median of 5 rounds, whiskers from least to most`
fn remark(rows: &[&Row], unit: Unit, spread: &str) -> String {
    let better = if unit.more_is_better() { "more" } else { "less" };
    let rounds = rows.iter().map(|row| row.rounds).max().unwrap_or_default();
    let rounds = match rounds {
        1 => "one round".to_owned(),
        rounds => format!("median of {rounds} rounds{spread}"),
    };
    let own = rows.iter().any(|row| has_own_core(&row.contender));
    let own = if own { "  ·  * has a second core" } else { "" };
    format!("{better} is better  ·  {rounds}{own}")
}

fn bars(title: &str, mut rows: Vec<&Row>) -> Option<String> {
    const TOP: f64 = 110.0;
    const STEP: f64 = 34.0;
    const BAR: f64 = 22.0;
    let unit = rows.iter().find_map(|row| row.unit)?;
    let limit = rows.iter().position(|row| row.contender == LIMIT && row.refused.is_none());
    let limit = limit.map(|index| rows.remove(index));
    // The best first; what was refused has no figure and comes last.
    let sign = if unit.more_is_better() { -1.0 } else { 1.0 };
    rows.sort_by(|a, b| {
        let key = |row: &Row| if row.refused.is_some() { f64::INFINITY } else { sign * row.median };
        key(a).total_cmp(&key(b))
    });
    let all = || rows.iter().copied().chain(limit).filter(|row| row.refused.is_none());
    let most = all().map(|row| row.max).fold(0.0, f64::max);
    let longest =
        rows.iter().map(|row| width_of(&look(&row.contender).name, TEXT)).fold(0.0, f64::max);
    let left = 24.0 + longest + 12.0;
    // Right of the bars: the figures and their ratios, in columns.
    let (values, ratios) = (WIDTH - 112.0, WIDTH - 24.0);
    let right = values - 108.0;
    let x = |value: f64| left + value / most * (right - left);

    let height = TOP + STEP * rows.len() as f64 + 16.0;
    let remark = remark(&all().collect::<Vec<_>>(), unit, ", whiskers from least to most");
    let mut svg = Svg::new(height, title, &remark);
    let header = Text { anchor: "end", colour: FAINT, size: 13.0, ..Text::default() };
    if let Some(limit) = limit {
        let at = x(limit.median);
        svg.line((at, TOP - 4.0), (at, height - 12.0), INK, 1.5, "5 4");
        let text = format!("limit, a bare XDP redirect: {}", unit.show(limit.median));
        svg.text(at + 8.0, TOP - 16.0, &text, &Text { anchor: "end", ..Text::default() });
        svg.text(ratios, TOP - 16.0, "of the limit", &header);
    }
    for (number, row) in rows.iter().enumerate() {
        let look = look(&row.contender);
        let middle = TOP + STEP * number as f64 + STEP / 2.0;
        let label = Text { anchor: "end", colour: INK, weight: look.weight, ..Text::default() };
        svg.text(left - 12.0, middle, &look.name, &label);
        if let Some(why) = &row.refused {
            let faint = Text { colour: FAINT, ..Text::default() };
            svg.text(left, middle, &format!("refused: {why}"), &faint);
            continue;
        }
        svg.rect(left, middle - BAR / 2.0, x(row.median) - left, BAR, look.colour);
        if row.rounds > 1 {
            let (least, most) = (x(row.min), x(row.max));
            svg.line((least, middle), (most, middle), INK, 1.2, "none");
            for end in [least, most] {
                svg.line((end, middle - 4.0), (end, middle + 4.0), INK, 1.2, "none");
            }
        }
        let figure = Text { colour: look.ink, ..label };
        svg.text(values, middle, &unit.show(row.median), &figure);
        if let Some(ratio) = row.ratio {
            let percent = 100.0 * ratio;
            let digits = usize::from(percent < 1.0);
            svg.text(ratios, middle, &format!("{percent:.digits$} %"), &figure);
        }
    }
    Some(svg.end())
}

/// A contender's figures: where on the x axis, and the median there.
struct Series {
    look: Look,
    points: Vec<(usize, f64)>,
}

fn lines(
    title: &str,
    rows: &[&Row],
    cases: &[(&str, &str)],
    axis: &str,
    log: bool,
) -> Option<String> {
    const HEIGHT: f64 = 460.0;
    const TOP: f64 = 112.0;
    const BOTTOM: f64 = HEIGHT - 62.0;
    const LEFT: f64 = 70.0;
    // A quick run leaves cases out.
    let was_measured = |case: &str| rows.iter().any(|row| row.case == case);
    let cases: Vec<_> = cases.iter().filter(|(case, _)| was_measured(case)).collect();
    let case_of = |row: &Row| cases.iter().position(|(case, _)| *case == row.case);
    let (rows, refused): (Vec<&Row>, Vec<&Row>) =
        rows.iter().filter(|row| case_of(row).is_some()).partition(|row| row.refused.is_none());
    let unit = rows.first()?.unit?;
    // A line of text for each contender that has gaps, below the axis.
    let mut gaps: Vec<(&str, Vec<&str>, &str)> = Vec::new();
    for row in &refused {
        let (Some(case), Some(why)) = (case_of(row), &row.refused) else { continue };
        match gaps.iter_mut().find(|(contender, ..)| *contender == row.contender) {
            Some((_, names, _)) => names.push(cases[case].1),
            None => gaps.push((&row.contender, vec![cases[case].1], why)),
        }
    }
    let (unit_name, divisor) = axis_unit(unit);

    let mut all: Vec<Series> = Vec::new();
    for row in &rows {
        let look = look(&row.contender);
        let Some(case) = case_of(row) else { continue };
        let point = (case, row.median / divisor);
        match all.iter_mut().find(|series| series.look.name == look.name) {
            Some(series) => series.points.push(point),
            None => all.push(Series { look, points: vec![point] }),
        }
    }
    // Cases were measured in another order than that of the axis.
    for series in &mut all {
        series.points.sort_by_key(|(case, _)| *case);
    }
    // portfwd is drawn last, above the others.
    all.sort_by(|a, b| a.look.width.total_cmp(&b.look.width));

    let values = || all.iter().flat_map(|series| &series.points).map(|(_, value)| *value);
    let most = values().fold(0.0, f64::max);
    let least = values().fold(f64::INFINITY, f64::min);
    let ticks = if log { log_ticks(least, most) } else { linear_ticks(most) };
    let (low, high) = (*ticks.first()?, *ticks.last()?);
    let y = |value: f64| {
        let scale = |value: f64| if log { value.ln() } else { value };
        BOTTOM - (scale(value) - scale(low)) / (scale(high) - scale(low)) * (BOTTOM - TOP)
    };
    let labels: Vec<(String, f64)> = all
        .iter()
        .filter_map(|series| {
            let (_, value) = series.points.last()?;
            Some((format!("{}  {}", series.look.name, short(*value)), y(*value)))
        })
        .collect();
    let longest = labels.iter().map(|(label, _)| width_of(label, TEXT)).fold(0.0, f64::max);
    let right = WIDTH - longest - 52.0;
    let last = cases.len().saturating_sub(1).max(1) as f64;
    let x = |case: usize| LEFT + 28.0 + case as f64 / last * (right - LEFT - 28.0);

    const STEP: f64 = 20.0;
    let height = HEIGHT + STEP * gaps.len() as f64;
    let mut svg = Svg::new(height, title, &remark(&rows, unit, ""));
    let faint = Text { colour: FAINT, size: 13.0, ..Text::default() };
    for (number, (contender, names, why)) in gaps.iter().enumerate() {
        let text = format!("{}, {}: refused: {why}", look(contender).name, names.join(", "));
        svg.text(24.0, HEIGHT + STEP * number as f64, &text, &faint);
    }
    svg.text(24.0, TOP - 24.0, unit_name, &faint);
    let scale = Text { anchor: "end", ..faint };
    for tick in ticks {
        svg.line((LEFT, y(tick)), (right, y(tick)), GRID, 1.0, "none");
        svg.text(LEFT - 10.0, y(tick), &short(tick), &scale);
    }
    let below = Text { anchor: "middle", ..faint };
    for (case, (_, name)) in cases.iter().enumerate() {
        svg.text(x(case), BOTTOM + 20.0, name, &below);
    }
    svg.text(f64::midpoint(x(0), right), BOTTOM + 42.0, axis, &below);

    for Series { look, points } in &all {
        // A case without a figure is a gap in the line.
        for stretch in points.chunk_by(|(a, _), (b, _)| a + 1 == *b) {
            let stretch: Vec<_> =
                stretch.iter().map(|(case, value)| (x(*case), y(*value))).collect();
            svg.polyline(&stretch, look.colour, look.width, look.dash);
            for point in stretch {
                svg.dot(point, look.width + 1.5, look.colour);
            }
        }
    }
    let places = spread(&labels.iter().map(|(_, y)| *y).collect::<Vec<_>>(), 19.0, TOP, BOTTOM);
    for ((series, (label, wanted)), place) in all.iter().zip(&labels).zip(places) {
        let from = x(series.points.last()?.0) + 8.0;
        svg.line((from, *wanted), (right + 30.0, place), GREY, 0.8, "none");
        let text = Text { colour: series.look.ink, weight: series.look.weight, ..Text::default() };
        svg.text(right + 34.0, place, label, &text);
    }
    Some(svg.end())
}

/// Moves labels apart that would overlap, as little as that needs; between two bounds if they fit.
fn spread(wanted: &[f64], gap: f64, top: f64, bottom: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by(|a, b| wanted[*a].total_cmp(&wanted[*b]));
    // Labels that touch are one block, which sits in the middle of what its labels want.
    struct Block {
        sum: f64,
        count: f64,
    }
    let room = |count: f64| (count - 1.0) * gap;
    let start = |block: &Block| {
        (block.sum / block.count - room(block.count) / 2.0).min(bottom - room(block.count)).max(top)
    };
    let mut blocks: Vec<Block> = Vec::new();
    for index in &order {
        let mut block = Block { sum: wanted[*index], count: 1.0 };
        while let Some(above) =
            blocks.pop_if(|above| start(above) + above.count * gap > start(&block))
        {
            block.sum += above.sum;
            block.count += above.count;
        }
        blocks.push(block);
    }
    let mut places = vec![0.0; wanted.len()];
    let mut order = order.into_iter();
    for block in &blocks {
        for step in 0..block.count as usize {
            if let Some(index) = order.next() {
                places[index] = start(block) + step as f64 * gap;
            }
        }
    }
    places
}

/// From 0 in steps of 1, 2 or 5, about five of them.
fn linear_ticks(most: f64) -> Vec<f64> {
    let power = 10_f64.powf((most / 5.0).log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
    let step = step.into_iter().find(|step| most / step <= 5.0).unwrap_or(most);
    (0..=(most / step).ceil() as u32).map(|number| f64::from(number) * step).collect()
}

/// 1, 2 and 5 of each power of ten that are needed to enclose both; only the powers if they are many.
fn log_ticks(least: f64, most: f64) -> Vec<f64> {
    let (first, last) = (least.log10().floor() as i32, most.log10().ceil() as i32);
    let steps: &[f64] = if last - first > 2 { &[1.0] } else { &[1.0, 2.0, 5.0] };
    let all: Vec<f64> = (first..=last)
        .flat_map(|power| steps.iter().map(move |step| step * 10_f64.powi(power)))
        .collect();
    let from = all.iter().rposition(|tick| *tick <= least).unwrap_or(0);
    let to = all.iter().position(|tick| *tick >= most).unwrap_or(all.len() - 1);
    all[from..=to].to_vec()
}

/// Three digits at most behind the point, thousands apart.
fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 => {
            let digits = format!("{value:.0}");
            let (head, tail) = digits.split_at(digits.len() - 3);
            format!("{head},{tail}")
        }
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{}", (value * 10.0).round() / 10.0),
        _ => format!("{}", (value * 100.0).round() / 100.0),
    }
}

/// About how wide a text is.
fn width_of(text: &str, size: f64) -> f64 {
    text.chars().count() as f64 * size * 0.61
}

struct Text {
    anchor: &'static str,
    colour: &'static str,
    weight: &'static str,
    size: f64,
}

impl Default for Text {
    fn default() -> Self {
        Self { anchor: "start", colour: INK, weight: "normal", size: TEXT }
    }
}

struct Svg(String);

impl Svg {
    fn new(height: f64, title: &str, remark: &str) -> Self {
        let mut svg = Self(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
             width=\"{WIDTH}\" height=\"{height}\" font-family=\"{FONTS}\">\n"
        ));
        svg.rect(0.0, 0.0, WIDTH, height, "#ffffff");
        svg.text(24.0, 32.0, title, &Text { weight: "bold", size: 17.0, ..Text::default() });
        let small = Text { colour: FAINT, size: 13.0, ..Text::default() };
        svg.text(24.0, 57.0, remark, &small);
        svg
    }

    fn rect(&mut self, x: f64, y: f64, width: f64, height: f64, colour: &str) {
        let _ = writeln!(
            self.0,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" \
             fill=\"{colour}\"/>"
        );
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), colour: &str, width: f64, dash: &str) {
        self.polyline(&[from, to], colour, width, dash);
    }

    fn polyline(&mut self, points: &[(f64, f64)], colour: &str, width: f64, dash: &str) {
        let points: Vec<_> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(
            self.0,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"{width}\" \
             stroke-dasharray=\"{dash}\" stroke-linejoin=\"round\"/>",
            points.join(" ")
        );
    }

    fn dot(&mut self, (x, y): (f64, f64), radius: f64, colour: &str) {
        let _ = writeln!(
            self.0,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\" fill=\"{colour}\"/>"
        );
    }

    /// `y` is the middle of the line.
    fn text(&mut self, x: f64, y: f64, text: &str, style: &Text) {
        let Text { anchor, colour, weight, size } = style;
        let y = y + size * 0.36;
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        let _ = writeln!(
            self.0,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-size=\"{size}\" \
             font-weight=\"{weight}\" fill=\"{colour}\">{text}</text>"
        );
    }

    fn end(mut self) -> String {
        self.0 += "</svg>\n";
        self.0
    }
}

/// The picture of an SVG, with the font that comes along.
fn png(svg: &str) -> Result<Vec<u8>> {
    let mut fonts = usvg::fontdb::Database::new();
    fonts.load_font_data(dejavu::sans::regular().to_vec());
    fonts.load_font_data(dejavu::sans::bold().to_vec());
    let options = usvg::Options { fontdb: Arc::new(fonts), ..usvg::Options::default() };
    let tree = usvg::Tree::from_str(svg, &options)?;
    let size = tree.size().to_int_size().scale_by(ZOOM).context("no size")?;
    let mut picture =
        tiny_skia::Pixmap::new(size.width(), size.height()).context("too large a picture")?;
    let zoom = tiny_skia::Transform::from_scale(ZOOM, ZOOM);
    resvg::render(&tree, zoom, &mut picture.as_mut());
    Ok(picture.encode_png()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Failure, Sample};

    /// Figures as they may come, of all contenders in all cases.
    fn report() -> Report {
        let contenders = [
            (LIMIT, [2.39e6, 2.38e6, 2.31e6]),
            ("portfwd native", [2.11e6, 2.10e6, 1.98e6]),
            ("portfwd generic", [1.02e6, 1.02e6, 0.98e6]),
            ("routing", [0.91e6, 0.90e6, 0.83e6]),
            ("nftables", [0.68e6, 0.66e6, 0.28e6]),
            ("iptables", [0.67e6, 0.66e6, 0.27e6]),
            ("nginx", [0.21e6, 0.20e6, 0.02e6]),
            ("socat", [0.16e6, 0.15e6, 0.01e6]),
        ];
        let mut report = Report::default();
        for (contender, levels) in contenders {
            for chart in CHARTS {
                let (cases, unit) = match chart.kind {
                    Kind::Bars { case } => (vec![case], Unit::PacketsPerSecond),
                    Kind::Lines { cases, log, .. } => (
                        cases.iter().map(|(case, _)| *case).collect(),
                        if log { Unit::Microseconds } else { Unit::PacketsPerSecond },
                    ),
                };
                // The case with 10,000 flows belongs to two charts.
                if chart.file == "throughput" {
                    continue;
                }
                for (number, case) in cases.into_iter().enumerate() {
                    let level = levels[number.min(2)];
                    for (round, factor) in [(1, 0.97), (2, 1.0), (3, 1.02)] {
                        let value = match unit {
                            Unit::Microseconds => 3e7 / level * 1.6_f64.powi(number as i32),
                            _ => level,
                        };
                        report.samples.push(Sample {
                            measure: chart.measure,
                            case: case.into(),
                            contender: contender.into(),
                            round,
                            value: value * factor,
                            unit,
                        });
                    }
                }
            }
        }
        report
    }

    #[test]
    fn every_contender_is_named_in_every_plot() {
        let directory = tempfile::tempdir().unwrap();
        let mut report = report();
        report.failures.push(Failure {
            measure: "throughput",
            case: "forward 64 B, 10,000 flows".into(),
            contender: "socat".into(),
            why: "<2 packets".into(),
        });
        for case in ["p99, idle", "p99, 80 % of its own maximum"] {
            report.failures.push(Failure {
                measure: "latency",
                case: case.into(),
                contender: "routing".into(),
                why: "lost all".into(),
            });
        }
        let paths = plots(&report, directory.path()).unwrap();
        assert_eq!(paths.len(), 2 * CHARTS.len());
        for pair in paths.chunks(2) {
            let svg = fs::read_to_string(&pair[0]).unwrap();
            for name in
                ["portfwd native", "portfwd generic", "routing", "nftables", "iptables", "nginx *"]
            {
                assert!(svg.contains(name), "{name} is not in {}", pair[0].display());
            }
            assert!(svg.contains("limit"), "{}", pair[0].display());
            let png = fs::read(&pair[1]).unwrap();
            assert!(png.starts_with(b"\x89PNG"), "{}", pair[1].display());
        }
        let latency = fs::read_to_string(directory.path().join("latency.svg")).unwrap();
        assert!(latency.contains(">routing, idle, 80 %: refused: lost all<"), "{latency}");
        let throughput = fs::read_to_string(&paths[0]).unwrap();
        assert!(throughput.contains("2.10 Mpps"), "{throughput}");
        assert!(throughput.contains("refused: &lt;2 packets"), "{throughput}");
    }

    #[test]
    fn pictures_have_letters_without_a_font_on_the_machine() {
        let blank = |text: &str| {
            let mut svg = Svg::new(60.0, "", "");
            svg.text(10.0, 20.0, text, &Text::default());
            png(&svg.end()).unwrap()
        };
        assert_ne!(blank("portfwd"), blank(""));
    }

    #[test]
    fn only_what_was_measured_is_drawn() {
        let directory = tempfile::tempdir().unwrap();
        let mut report = report();
        report.samples.retain(|sample| sample.measure == "latency");
        let paths = plots(&report, directory.path()).unwrap();
        assert_eq!(
            paths,
            ["svg", "png"].map(|end| directory.path().join("latency").with_extension(end))
        );
        assert_eq!(plots(&Report::default(), directory.path()).unwrap(), Vec::<PathBuf>::new());
    }

    #[test]
    fn cases_that_a_quick_run_leaves_out_have_no_place() {
        let mut report = report();
        report.samples.retain(|sample| sample.case == "1 rule" || sample.case == "10,000 rules");
        let directory = tempfile::tempdir().unwrap();
        let paths = plots(&report, directory.path()).unwrap();
        let svg = fs::read_to_string(&paths[0]).unwrap();
        assert!(svg.contains(">10,000<") && !svg.contains(">100<"), "{svg}");
    }

    #[test]
    fn labels_do_not_overlap() {
        let places = spread(&[50.0, 52.0, 10.0, 51.0], 20.0, 0.0, 100.0);
        assert_eq!(places, [31.0, 71.0, 10.0, 51.0]);
        // Pushed up from the lower bound.
        assert_eq!(spread(&[95.0, 99.0], 20.0, 0.0, 100.0), [80.0, 100.0]);
    }

    #[test]
    fn ticks_are_round_and_enclose_the_figures() {
        assert_eq!(linear_ticks(2.4), [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]);
        assert_eq!(log_ticks(14.0, 90.0), [10.0, 20.0, 50.0, 100.0]);
        assert_eq!(log_ticks(3.0, 4000.0), [1.0, 10.0, 100.0, 1000.0, 10_000.0]);
        assert_eq!(short(12_345.0), "12,345");
    }
}

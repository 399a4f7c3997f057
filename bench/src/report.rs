//! What was measured: samples, and what is read off them.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, Table, presets};
use serde::{Deserialize, Serialize};

/// The contender to which the others are compared within a round.
pub const LIMIT: &str = "limit";

/// What a value counts, and how it is printed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    PacketsPerSecond,
    BitsPerSecond,
    /// Connections or transactions.
    PerSecond,
    Nanoseconds,
    Microseconds,
    Milliseconds,
    Seconds,
    Bytes,
    SecondsPerGigabyte,
    Instructions,
}

impl Unit {
    pub fn more_is_better(self) -> bool {
        matches!(self, Self::PacketsPerSecond | Self::BitsPerSecond | Self::PerSecond)
    }

    /// A value for people: `2.31 Mpps`, `412 ns`.
    pub fn show(self, value: f64) -> String {
        let binary = [(1024.0 * 1024.0, "MiB"), (1024.0, "KiB"), (1.0, "B")];
        let decimal = [(1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")];
        let scaled = |suffix: &str| {
            let (scale, prefix) = scale(&decimal, value);
            format!("{} {prefix}{suffix}", digits(value / scale))
        };
        match self {
            Self::PacketsPerSecond => scaled("pps"),
            Self::BitsPerSecond => scaled("b/s"),
            Self::PerSecond => scaled("/s"),
            Self::Nanoseconds => format!("{} ns", digits(value)),
            Self::Microseconds => format!("{} us", digits(value)),
            Self::Milliseconds => format!("{} ms", digits(value)),
            Self::Seconds => format!("{} s", digits(value)),
            Self::Bytes => {
                let (scale, suffix) = scale(&binary, value);
                format!("{} {suffix}", digits(value / scale))
            }
            Self::SecondsPerGigabyte => format!("{} s/GB", digits(value)),
            Self::Instructions => format!("{value:.0} insns"),
        }
    }
}

/// The largest step that a value reaches, or the smallest.
fn scale<'a>(steps: &[(f64, &'a str)], value: f64) -> (f64, &'a str) {
    let fits = steps.iter().find(|(step, _)| value.abs() >= *step);
    fits.or(steps.last()).copied().unwrap_or((1.0, ""))
}

/// Three significant digits, or all before the point.
fn digits(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        size if size < 0.1 => format!("{value:.3}"),
        size if size < 10.0 => format!("{value:.2}"),
        size if size < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// One figure of one run.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Sample {
    /// `throughput`
    pub measure: &'static str,
    /// `forward 64 B, 10,000 flows`
    pub case: String,
    pub contender: String,
    /// From 1. Contenders of one round ran one after the other.
    pub round: u32,
    pub value: f64,
    pub unit: Unit,
}

/// A run that gave no figure, or one that is not to be trusted.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Failure {
    pub measure: &'static str,
    pub case: String,
    pub contender: String,
    pub why: String,
}

/// All that the bench has found.
#[derive(Default, Debug, Serialize)]
pub struct Report {
    pub samples: Vec<Sample>,
    pub failures: Vec<Failure>,
    /// What a reader must know besides: absent programs, the machine.
    pub notes: Vec<String>,
}

/// The samples of one contender in one case.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Row {
    pub measure: &'static str,
    pub case: String,
    pub contender: String,
    pub rounds: usize,
    pub unit: Option<Unit>,
    pub median: f64,
    pub min: f64,
    pub max: f64,
    /// The median of the ratios to [`LIMIT`] within each round.
    pub ratio: Option<f64>,
    /// Why there is no figure. One refused run refuses the row: a figure stands for all its runs.
    pub refused: Option<String>,
}

/// What an earlier run wrote, as it stands there.
#[derive(Deserialize)]
struct Earlier {
    samples: Vec<EarlierSample>,
    failures: Vec<EarlierFailure>,
    notes: Vec<String>,
}

#[derive(Deserialize)]
struct EarlierSample {
    measure: String,
    case: String,
    contender: String,
    round: u32,
    value: f64,
    unit: Unit,
}

#[derive(Deserialize)]
struct EarlierFailure {
    measure: String,
    case: String,
    contender: String,
    why: String,
}

/// The name of a measure that there is.
fn known(measure: &str) -> Result<&'static str> {
    let mut names = crate::measure::ALL.iter().map(|(name, _)| *name);
    names.find(|name| *name == measure).with_context(|| format!("there is no measure {measure}"))
}

impl Report {
    /// Adds what an earlier run wrote as JSON.
    pub fn add(&mut self, json: &[u8]) -> Result<()> {
        let Earlier { samples, failures, notes } = serde_json::from_slice(json)?;
        for EarlierSample { measure, case, contender, round, value, unit } in samples {
            let measure = known(&measure)?;
            self.samples.push(Sample { measure, case, contender, round, value, unit });
        }
        for EarlierFailure { measure, case, contender, why } in failures {
            let measure = known(&measure)?;
            self.failures.push(Failure { measure, case, contender, why });
        }
        for note in notes {
            if !self.notes.contains(&note) {
                self.notes.push(note);
            }
        }
        Ok(())
    }

    /// Ends a case, whose samples begin at `first`. A figure stands for all its rounds: who was
    /// refused in one has no figure in all that the case found, by whomever; and where a figure is
    /// missing in a round, as a percentile of packets that were lost, the others of it go, and a note
    /// says so.
    pub fn settle(
        &mut self,
        measure: &'static str,
        case: &str,
        first: usize,
        rounds: u32,
        refused: &[(&'static str, String)],
    ) {
        let found = self.samples.split_off(first);
        let mut cases: Vec<&str> = Vec::new();
        let mut counts: BTreeMap<(&str, &str), u32> = BTreeMap::new();
        for sample in &found {
            if !cases.contains(&sample.case.as_str()) {
                cases.push(&sample.case);
            }
            *counts.entry((&sample.case, &sample.contender)).or_default() += 1;
        }
        if cases.is_empty() {
            cases.push(case);
        }
        for (contender, why) in refused {
            self.failures.extend(cases.iter().map(|case| Failure {
                measure,
                case: (*case).to_owned(),
                contender: (*contender).to_owned(),
                why: why.clone(),
            }));
        }
        let is_refused = |contender: &str| refused.iter().any(|(other, _)| *other == contender);
        counts.retain(|(_, contender), count| *count < rounds && !is_refused(contender));
        self.notes.extend(counts.iter().map(|((case, contender), count)| {
            let missing = rounds - count;
            format!(
                "{measure}: {case}: {contender} has no figure: none in {missing} of {rounds} rounds"
            )
        }));
        let whole: Vec<Sample> = found
            .iter()
            .filter(|sample| {
                !counts.contains_key(&(sample.case.as_str(), sample.contender.as_str()))
            })
            .cloned()
            .collect();
        self.samples.extend(whole);
    }

    /// A row for each measure, case and contender, in the order in which they first ran.
    pub fn rows(&self) -> Vec<Row> {
        type Key<'a> = (&'static str, &'a str, &'a str);
        let mut order: Vec<Key<'_>> = Vec::new();
        let mut samples: BTreeMap<Key<'_>, Vec<&Sample>> = BTreeMap::new();
        let mut refused: BTreeMap<Key<'_>, &str> = BTreeMap::new();
        for sample in &self.samples {
            let key = (sample.measure, sample.case.as_str(), sample.contender.as_str());
            let of_key = samples.entry(key).or_default();
            if of_key.is_empty() {
                order.push(key);
            }
            of_key.push(sample);
        }
        for failure in &self.failures {
            let key = (failure.measure, failure.case.as_str(), failure.contender.as_str());
            if !samples.contains_key(&key) && !refused.contains_key(&key) {
                order.push(key);
            }
            refused.entry(key).or_insert(&failure.why);
        }
        // Contenders of one case stand together, whichever of them was refused.
        let mut cases: Vec<(&str, &str)> = Vec::new();
        for (measure, case, _) in &order {
            if !cases.contains(&(*measure, *case)) {
                cases.push((*measure, *case));
            }
        }
        order.sort_by_key(|key| cases.iter().position(|case| *case == (key.0, key.1)));

        let row = |key: Key<'_>| {
            let of_key = samples.get(&key).map_or(&[][..], Vec::as_slice);
            let values: Vec<f64> = of_key.iter().map(|sample| sample.value).collect();
            let limit = samples.get(&(key.0, key.1, LIMIT));
            let in_round = |round| limit?.iter().find(|sample| sample.round == round);
            let ratios: Vec<f64> = of_key
                .iter()
                .filter_map(|sample| Some(sample.value / in_round(sample.round)?.value))
                .collect();
            Row {
                measure: key.0,
                case: key.1.to_owned(),
                contender: key.2.to_owned(),
                rounds: values.len(),
                unit: of_key.first().map(|sample| sample.unit),
                median: median(&values),
                min: values.iter().copied().fold(f64::INFINITY, f64::min),
                max: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
                ratio: (!ratios.is_empty() && key.2 != LIMIT).then(|| median(&ratios)),
                refused: refused.get(&key).map(|why| (*why).to_owned()),
            }
        };
        order.into_iter().map(row).collect()
    }

    /// The table that people read, and the notes.
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(["contender", "median", "min", "max", "of the limit"]);
        let mut case = None;
        for row in self.rows() {
            if case != Some((row.measure, row.case.clone())) {
                table.add_row([String::new()]);
                table.add_row([format!("{}: {}", row.measure, row.case)]);
                case = Some((row.measure, row.case.clone()));
            }
            let name = format!("  {}", row.contender);
            match (row.refused, row.unit) {
                // In a column of its own: it may be long.
                (Some(why), _) => {
                    let [none, refused] = [String::new(), format!("refused: {why}")];
                    table.add_row([name, none.clone(), none.clone(), none.clone(), none, refused])
                }
                (None, Some(unit)) => table.add_row([
                    name,
                    unit.show(row.median),
                    unit.show(row.min),
                    unit.show(row.max),
                    row.ratio.map(|ratio| format!("{ratio:.3}")).unwrap_or_default(),
                ]),
                (None, None) => table.add_row([name]),
            };
        }
        for column in table.column_iter_mut().skip(1).take(4) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let mut text = table.trim_fmt();
        for note in &self.notes {
            let _ = write!(text, "\n{note}");
        }
        text
    }

    /// Samples, failures, notes and rows, for programs.
    pub fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "samples": self.samples,
            "failures": self.failures,
            "notes": self.notes,
            "rows": self.rows(),
        })
    }

    /// A line for each sample and each failure.
    pub fn csv(&self) -> String {
        let mut text = "measure,case,contender,round,value,unit,refused\n".to_owned();
        for Sample { measure, case, contender, round, value, unit } in &self.samples {
            let unit = serde_json::to_value(unit).unwrap_or_default();
            let unit = unit.as_str().unwrap_or_default();
            let _ = writeln!(
                text,
                "{measure},{},{},{round},{value},{unit},",
                quoted(case),
                quoted(contender)
            );
        }
        for Failure { measure, case, contender, why } in &self.failures {
            let _ = writeln!(
                text,
                "{measure},{},{},,,,{}",
                quoted(case),
                quoted(contender),
                quoted(why)
            );
        }
        text
    }
}

/// A field of CSV.
fn quoted(field: &str) -> String {
    format!("\"{}\"", field.replace('"', "\"\""))
}

/// The middle of the values, or the mean of the two in the middle; NaN of none.
pub fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(contender: &str, round: u32, value: f64) -> Sample {
        Sample {
            measure: "throughput",
            case: "forward".into(),
            contender: contender.into(),
            round,
            value,
            unit: Unit::PacketsPerSecond,
        }
    }

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        // The machine was twice as slow in round 2, and the contender lost round 3 by accident.
        let runs = [(1, 200.0, 100.0), (2, 100.0, 50.0), (3, 200.0, 20.0)];
        let samples = runs
            .iter()
            .flat_map(|(round, limit, portfwd)| {
                [sample(LIMIT, *round, *limit), sample("portfwd", *round, *portfwd)]
            })
            .collect();
        let rows = Report { samples, ..Report::default() }.rows();
        assert_eq!(rows.len(), 2);
        assert_eq!((rows[0].contender.as_str(), rows[0].ratio), (LIMIT, None));
        assert_eq!((rows[1].median, rows[1].min, rows[1].max), (50.0, 20.0, 100.0));
        assert_eq!(rows[1].ratio, Some(0.5));
    }

    #[test]
    fn what_is_written_is_read_again() {
        let mut report = Report { samples: vec![sample(LIMIT, 1, 2.0)], ..Report::default() };
        report.notes.push("a machine".into());
        let written = serde_json::to_vec(&report.json()).unwrap();
        let mut read = Report::default();
        read.add(&written).unwrap();
        assert_eq!((&read.samples, &read.notes), (&report.samples, &report.notes));
        read.add(&written).unwrap();
        assert_eq!((read.samples.len(), read.notes.len()), (2, 1));
        let other = br#"{"samples":[],"failures":[{"measure":"x","case":"","contender":"","why":""}],"notes":[]}"#;
        assert!(read.add(other).is_err());
    }

    #[test]
    fn one_refused_run_refuses_the_figure() {
        let samples = vec![sample(LIMIT, 1, 2.0), sample("portfwd", 1, 1.0)];
        let failures = vec![Failure {
            measure: "throughput",
            case: "forward".into(),
            contender: "portfwd".into(),
            why: "3 of 100 packets were wrong".into(),
        }];
        let report = Report { samples, failures, ..Report::default() };
        assert_eq!(report.rows()[1].refused.as_deref(), Some("3 of 100 packets were wrong"));
        let table = report.table();
        let line = table.lines().find(|line| line.contains("portfwd")).unwrap();
        assert!(line.contains("refused: 3 of 100 packets were wrong"), "{table}");
        assert!(!line.contains("1.00 pps"), "{table}");
        assert!(report.csv().contains(r#""forward","portfwd",,,,"3 of 100 packets were wrong""#));
    }

    #[test]
    fn who_is_refused_in_a_later_round_has_no_figure_at_all() {
        let mut report = Report::default();
        report.samples.push(sample("portfwd", 1, 5.0));
        for (case, contender) in [("p50", LIMIT), ("p50", "portfwd"), ("p99", LIMIT)] {
            report.samples.push(Sample { case: case.into(), ..sample(contender, 1, 1.0) });
        }
        report.settle("throughput", "round trip", 1, 1, &[("portfwd", "lost all".into())]);
        let rows = report.rows();
        let refused = |case: &str, contender: &str| {
            let row = rows.iter().find(|row| row.case == case && row.contender == contender);
            row.unwrap().refused.clone()
        };
        assert_eq!(refused("p50", "portfwd").as_deref(), Some("lost all"));
        assert_eq!(refused("p99", "portfwd").as_deref(), Some("lost all"));
        assert_eq!((refused("p50", LIMIT), refused("p99", LIMIT)), (None, None));
        // What another case found stays.
        assert_eq!(refused("forward", "portfwd"), None);

        let mut report = Report::default();
        report.settle("throughput", "round trip", 0, 1, &[("portfwd", "lost all".into())]);
        assert_eq!(report.rows()[0].case, "round trip");
    }

    #[test]
    fn a_figure_that_a_round_lacks_is_none() {
        let samples = vec![sample(LIMIT, 1, 1.0), sample(LIMIT, 2, 1.0), sample("portfwd", 2, 1.0)];
        let mut report = Report { samples, ..Report::default() };
        report.settle("throughput", "forward", 0, 2, &[]);
        assert_eq!(report.rows().len(), 1);
        assert_eq!(
            report.notes,
            ["throughput: forward: portfwd has no figure: none in 1 of 2 rounds"]
        );
    }

    #[test]
    fn contenders_of_a_case_stand_together() {
        let mut samples = vec![sample("a", 1, 1.0), sample("a", 1, 1.0), sample("b", 1, 1.0)];
        samples[1].case = "reply".into();
        let rows = Report { samples, ..Report::default() }.rows();
        let order: Vec<_> =
            rows.iter().map(|row| (row.case.as_str(), row.contender.as_str())).collect();
        assert_eq!(order, [("forward", "a"), ("forward", "b"), ("reply", "a")]);
    }

    #[test]
    fn values_are_short() {
        for (unit, value, text) in [
            (Unit::PacketsPerSecond, 2_312_345.0, "2.31 Mpps"),
            (Unit::PacketsPerSecond, 14_000.0, "14.0 kpps"),
            (Unit::BitsPerSecond, 21e9, "21.0 Gb/s"),
            (Unit::Nanoseconds, 412.4, "412 ns"),
            (Unit::Microseconds, 11.3, "11.3 us"),
            (Unit::Bytes, 3.0 * 1024.0 * 1024.0, "3.00 MiB"),
            (Unit::Seconds, 0.0, "0 s"),
        ] {
            assert_eq!(unit.show(value), text);
        }
    }
}

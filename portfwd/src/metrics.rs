//! The counters for Prometheus, at `/metrics`.

use std::fmt;
use std::io;
use std::net::SocketAddr;

use anyhow::Context as _;
use axum::Router;
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;
use portfwd_ebpf::table::{Dropped, ToStack};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _, MetricEncoder, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::api::{self, Request};
use crate::datapath::Counts;
use crate::report::Figures;
use crate::serve::{Failure, Peer, Turn, serve};

/// Serves the metrics on `address`, if there is one.
///
/// # Errors
///
/// The address cannot be listened on.
pub async fn listen(
    address: Option<SocketAddr>,
    requests: mpsc::Sender<Request>,
) -> anyhow::Result<Option<JoinHandle<std::io::Result<()>>>> {
    let Some(address) = address else { return Ok(None) };
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("[metrics] listen: cannot listen on {address}; choose another"))?;
    let router = Router::new().route("/metrics", get(scrape)).with_state(requests);
    Ok(Some(tokio::spawn(serve(listener, router, |_| Peer::Unknown))))
}

async fn scrape(
    turn: Turn,
    State(requests): State<mpsc::Sender<Request>>,
) -> Result<impl IntoResponse, Failure> {
    let figures = api::figures(&requests).await?;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let body = turn.write(move |out| {
        let mut out = Text { out, failed: None };
        let written = encode(figures, &mut out);
        written.map_err(|error| out.failed.unwrap_or_else(|| io::Error::other(error)))
    });
    Ok(([(header::CONTENT_TYPE, kind)], body))
}

/// Text that is written as bytes.
struct Text<'a> {
    out: &'a mut dyn io::Write,
    /// Why, as [`fmt::Error`] does not say it.
    failed: Option<io::Error>,
}

impl fmt::Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.out.write_all(text.as_bytes()).map_err(|error| {
            self.failed = Some(error);
            fmt::Error
        })
    }
}

/// The counters in the OpenMetrics text format.
fn encode(figures: Figures, out: &mut impl fmt::Write) -> fmt::Result {
    let mut registry = Registry::with_prefix("portfwd");
    registry.register_collector(Box::new(figures));
    text::encode(out, &registry)
}

impl Collector for Figures {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut counters = |name, help, rows: &dyn Fn(&mut Rows<'_>) -> fmt::Result| {
            rows(&mut Rows(encoder.encode_descriptor(name, help, None, MetricType::Counter)?))
        };
        let directions = |counts: &Counts| [("forward", counts.forward), ("reply", counts.reply)];
        counters("packets", "Packets translated", &|rows| {
            self.by_rule().try_for_each(|(rule, counts)| {
                directions(counts).into_iter().try_for_each(|(direction, tally)| {
                    rows.row(&[("rule", rule), ("direction", direction)], tally.packets)
                })
            })
        })?;
        counters("bytes", "Bytes of the IP packets translated", &|rows| {
            self.by_rule().try_for_each(|(rule, counts)| {
                directions(counts).into_iter().try_for_each(|(direction, tally)| {
                    rows.row(&[("rule", rule), ("direction", direction)], tally.bytes)
                })
            })
        })?;
        counters("dropped", "Packets dropped", &|rows| {
            self.by_rule().try_for_each(|(rule, counts)| {
                Dropped::ALL.iter().zip(counts.dropped).try_for_each(|(reason, count)| {
                    rows.row(&[("rule", rule), ("reason", reason.name())], count)
                })
            })
        })?;
        counters("answered", "Dropped packets whose sender was told by ICMP", &|rows| {
            self.by_rule()
                .try_for_each(|(rule, counts)| rows.row(&[("rule", rule)], counts.answered))
        })?;
        counters("to_stack", "Translated packets that went out through the stack", &|rows| {
            self.by_rule().try_for_each(|(rule, counts)| {
                ToStack::ALL.iter().zip(counts.to_stack).try_for_each(|(reason, count)| {
                    rows.row(&[("rule", rule), ("reason", reason.name())], count)
                })
            })
        })?;
        counters("passed", "Packets passed to the stack untouched", &|rows| {
            self.passed().try_for_each(|(reason, count)| rows.row(&[("reason", reason)], count))
        })?;
        counters("flows_created", "Flows that began", &|rows| {
            self.flows_by_rule()
                .try_for_each(|(rule, flows)| rows.row(&[("rule", rule)], flows.created))
        })?;
        let mut active =
            encoder.encode_descriptor("flows", "Flows there are", None, MetricType::Gauge)?;
        self.flows_by_rule().try_for_each(|(rule, flows)| {
            ConstGauge::new(flows.active).encode(active.encode_family(&[("rule", rule)])?)
        })
    }
}

/// The rows of one metric.
struct Rows<'a>(MetricEncoder<'a>);

impl Rows<'_> {
    fn row<const N: usize>(&mut self, labels: &[(&str, &str); N], count: u64) -> fmt::Result {
        ConstCounter::new(count).encode(self.0.encode_family(labels)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_encoded_under_the_rules_name() {
        let mut text = String::new();
        encode(crate::report::tests::figures(), &mut text).expect("it encodes");
        let (dropped, to_stack) = (Dropped::ALL[1].name(), ToStack::ALL[1].name());
        for line in [
            "# TYPE portfwd_packets counter",
            "portfwd_packets_total{rule=\"80/tcp\",direction=\"forward\"} 3",
            "portfwd_bytes_total{rule=\"80/tcp\",direction=\"forward\"} 180",
            "portfwd_packets_total{rule=\"80/tcp\",direction=\"reply\"} 0",
            "portfwd_packets_total{rule=\"81/tcp\",direction=\"forward\"} 0",
            &format!("portfwd_dropped_total{{rule=\"80/tcp\",reason=\"{dropped}\"}} 11"),
            "portfwd_answered_total{rule=\"80/tcp\"} 7",
            &format!("portfwd_to_stack_total{{rule=\"80/tcp\",reason=\"{to_stack}\"}} 1"),
            "portfwd_passed_total{reason=\"no_rule\"} 9",
            "portfwd_flows_created_total{rule=\"80/tcp\"} 5",
            "# TYPE portfwd_flows gauge",
            "portfwd_flows{rule=\"80/tcp\"} 2",
            "portfwd_flows{rule=\"81/tcp\"} 0",
        ] {
            assert!(text.lines().any(|it| it == line), "{line} is not in:\n{text}");
        }
        assert!(text.ends_with("# EOF\n"), "{text}");
    }
}

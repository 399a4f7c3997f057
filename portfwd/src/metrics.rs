//! The counters for Prometheus, at `/metrics`.

use std::net::SocketAddr;

use anyhow::Context as _;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::api::{self, Request, Stats};

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
    Ok(Some(tokio::spawn(async move { axum::serve(listener, router).await })))
}

async fn scrape(
    requests: State<mpsc::Sender<Request>>,
) -> Result<impl IntoResponse, (StatusCode, String)> {
    let stats = api::stats(requests).await?;
    let text =
        encode(&stats).map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, kind)], text))
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByDirection {
    rule: String,
    direction: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByReason {
    rule: String,
    reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: String,
}

/// The counters in the OpenMetrics text format.
fn encode(stats: &Stats) -> Result<String, std::fmt::Error> {
    let packets = Family::<ByDirection, Counter>::default();
    let bytes = Family::<ByDirection, Counter>::default();
    let dropped = Family::<ByReason, Counter>::default();
    let to_stack = Family::<ByReason, Counter>::default();
    let passed = Family::<Reason, Counter>::default();
    for rule in &stats.rules {
        let name = &rule.rule.name;
        for (direction, count) in [("forward", rule.forward), ("reply", rule.reply)] {
            let labels = ByDirection { rule: name.clone(), direction };
            packets.get_or_create(&labels).inc_by(count.packets);
            bytes.get_or_create(&labels).inc_by(count.bytes);
        }
        for (family, counts) in [(&dropped, &rule.dropped), (&to_stack, &rule.to_stack)] {
            for (reason, count) in counts {
                let labels = ByReason { rule: name.clone(), reason: reason.clone() };
                family.get_or_create(&labels).inc_by(*count);
            }
        }
    }
    for (reason, count) in &stats.verdicts.passed {
        passed.get_or_create(&Reason { reason: reason.clone() }).inc_by(*count);
    }
    let mut registry = Registry::with_prefix("portfwd");
    registry.register("packets", "Packets translated", packets);
    registry.register("bytes", "Bytes of the IP packets translated", bytes);
    registry.register("dropped", "Packets dropped", dropped);
    registry.register("to_stack", "Translated packets that went out through the stack", to_stack);
    registry.register("passed", "Packets passed to the stack untouched", passed);
    let mut buffer = String::new();
    text::encode(&mut buffer, &registry)?;
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Count, Flows, RuleInfo, RuleStats, Verdicts};

    #[test]
    fn counters_are_encoded_under_the_rules_name() {
        let stats = Stats {
            rules: vec![RuleStats {
                rule: RuleInfo {
                    name: "web".to_owned(),
                    protocol: "tcp".to_owned(),
                    listen: "80".to_owned(),
                    to: vec!["192.0.2.1".to_owned()],
                    source: "preserve".to_owned(),
                    stateful: false,
                },
                forward: Count { packets: 3, bytes: 180 },
                reply: Count::default(),
                to_stack: [("no_neighbour".to_owned(), 1)].into(),
                dropped: [("no_route".to_owned(), 2)].into(),
                flows: Flows::default(),
                last_packet: None,
            }],
            verdicts: Verdicts { passed: [("no_rule".to_owned(), 9)].into(), ..Default::default() },
            interfaces: Vec::new(),
        };
        let text = encode(&stats).expect("it encodes");
        for line in [
            "portfwd_packets_total{rule=\"web\",direction=\"forward\"} 3",
            "portfwd_bytes_total{rule=\"web\",direction=\"forward\"} 180",
            "portfwd_packets_total{rule=\"web\",direction=\"reply\"} 0",
            "portfwd_dropped_total{rule=\"web\",reason=\"no_route\"} 2",
            "portfwd_to_stack_total{rule=\"web\",reason=\"no_neighbour\"} 1",
            "portfwd_passed_total{reason=\"no_rule\"} 9",
        ] {
            assert!(text.contains(line), "{line} is not in:\n{text}");
        }
    }
}

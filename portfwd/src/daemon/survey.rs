//! What the network and the configuration together ask for.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use portfwd_ebpf::path::Role;

use super::{Failure, protocols};
use crate::compile::Plan;
use crate::config::{Attach, Config, Interface, Way};
use crate::network::{Externals, Layer, Link, Network, NetworkError, NextHop, Route, Snapshot};
use crate::rule::Rule;

/// Interfaces that are named and do not exist, or cannot serve, are mistakes at start; later they are
/// waited for. So is a way to attach that is asked for one that is none of portfwd's, or does not have
/// it.
pub fn check_interfaces(
    config: &Config,
    snapshot: &Snapshot,
    survey: &Survey,
) -> Result<(), Failure> {
    let missing = |name: &str| {
        let here = snapshot.links.iter().filter(|link| link.layer != Layer::Other);
        let here: Vec<&str> = here.map(|link| link.name.as_str()).collect();
        format!("there is no interface {name}; this box has {}", here.join(", "))
    };
    let mut mistakes = Vec::new();
    for Interface { name, place } in config.named() {
        match snapshot.link(name) {
            Some(link) => mistakes.extend(unusable(link).map(|why| format!("{place}: {why}"))),
            None => mistakes.push(format!("{place}: {}", missing(name))),
        }
    }
    let unnamed = |(it, _): &&(Interface, Way)| !config.named().any(|named| named.name == it.name);
    for (Interface { name, place }, _) in config.attach_to.iter().filter(unnamed) {
        if !config.internal.is_empty() {
            mistakes.push(format!("{place}: interfaces.{name}: {}", config.unnamed(name)));
        } else if snapshot.link(name).is_none() {
            mistakes.push(format!("{place}: {}", missing(name)));
        }
    }
    let links = survey.roles.keys().filter_map(|name| snapshot.link(name));
    mistakes.extend(links.filter_map(|link| without_xdp(link, config)));
    if mistakes.is_empty() { Ok(()) } else { Err(Failure::Configuration(mistakes.join("\n"))) }
}

/// Why nothing can be attached to a link.
fn unusable(link: &Link) -> Option<String> {
    let Link { name, driver, .. } = link;
    let kind = driver.as_deref().unwrap_or("kind unknown");
    match link.layer {
        Layer::Ethernet | Layer::Bare => None,
        Layer::Other if link.is_loopback() => Some(format!(
            "{name} is the loopback interface: programs on this box reach the rules without it; \
             name one where others arrive"
        )),
        Layer::Other => Some(format!(
            "{name} is an interface of a kind that cannot be forwarded from ({kind}); name another"
        )),
    }
}

/// Why nothing can be attached to a link in the way that is asked for, and where that is.
fn without_xdp(link: &Link, config: &Config) -> Option<String> {
    let Link { name, driver, .. } = link;
    let Way { attach, place } = config.way_to(name);
    let kind = driver.as_deref().unwrap_or("kind unknown");
    match (link.layer, attach, place) {
        (Layer::Bare, Attach::Native | Attach::Generic, Some(place)) => Some(format!(
            "{place}: {name} has no Ethernet header ({kind}), which XDP needs; set attach = \"tc\" \
             in [interfaces.{name}]"
        )),
        _ => None,
    }
}

/// What the network and the configuration together ask for.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Survey {
    /// Interfaces to attach to, by name.
    pub roles: BTreeMap<String, Role>,
    /// The next hops of the backends.
    pub hops: Vec<NextHop>,
    /// The backends that are the box itself.
    pub local: BTreeSet<IpAddr>,
    pub externals: Externals,
    /// Protocols that the box itself speaks, beside TCP and UDP.
    pub own: BTreeSet<u8>,
    /// What keeps something from being forwarded, a line each.
    pub problems: Vec<String>,
}

impl Survey {
    /// Asks for the routes to the backends and puts everything together. What was so `before` stays
    /// as long as it can: an interface that led to a backend is internal also while the route is
    /// away, and the first external address is the first while it is there, as flows depend on it.
    pub async fn take(
        network: &Network,
        snapshot: &Snapshot,
        config: &Config,
        plan: &Plan,
        before: &Self,
    ) -> Result<Self, NetworkError> {
        let mut problems = Vec::new();
        // Each with the first rule that it serves.
        let mut backends: Vec<(IpAddr, usize)> =
            plan.legs.iter().map(|leg| (leg.backend, leg.rule)).collect();
        backends.sort_unstable();
        backends.dedup_by_key(|(backend, _)| *backend);
        backends.sort_by_key(|(_, rule)| *rule);
        let addresses: Vec<IpAddr> = backends.iter().map(|(backend, _)| *backend).collect();
        let mut routes: Vec<(IpAddr, &Rule, NextHop)> = Vec::new();
        let mut local = BTreeSet::new();
        for ((backend, rule), route) in backends.into_iter().zip(network.routes(&addresses).await?)
        {
            let rule = &config.rules[rule];
            match route {
                Route::Via(hop) => routes.push((backend, rule, hop)),
                Route::Local => {
                    local.insert(backend);
                }
                Route::Unreachable => problems.push(format!(
                    "{}: rule \"{}\": backend {backend} has no route; add one: ip route add \
                     {backend}/{} via GATEWAY, or dev IFACE",
                    rule.place,
                    rule.name,
                    if backend.is_ipv4() { 32 } else { 128 }
                )),
            }
        }
        for leg in plan.legs.iter().filter(|leg| leg.crosses() && local.contains(&leg.backend)) {
            let (rule, backend) = (&config.rules[leg.rule], leg.backend);
            let version = if backend.is_ipv4() { "IPv4" } else { "IPv6" };
            let problem = format!(
                "{}: rule \"{}\": backend {backend} is this box, which cannot be one of the other \
                 IP version; listen on {version}, or name another host",
                rule.place, rule.name
            );
            // It has a leg for each protocol.
            if !problems.contains(&problem) {
                problems.push(problem);
            }
        }
        let mut hops: Vec<NextHop> = routes.iter().map(|(.., hop)| *hop).collect();
        hops.sort();
        hops.dedup();

        let mut roles: BTreeMap<String, Role> = config
            .external
            .iter()
            .map(|interface| (interface.name.clone(), Role::External))
            .collect();
        let mut inside = |name: &str| {
            let role = roles.entry(name.to_owned()).or_insert(Role::Internal);
            if *role == Role::External {
                *role = Role::Both;
            }
        };
        let is_external =
            |name: &str| config.external.iter().any(|interface| interface.name == name);
        if config.internal.is_empty() {
            for (backend, rule, hop) in &routes {
                let Some(link) = snapshot.link_by_index(hop.interface) else { continue };
                // Where the route to the backend is gone, the default route takes its place.
                if is_external(&link.name) && hop.address != *backend {
                    problems.push(format!(
                        "{}: rule \"{}\": backend {backend} is reached through {} by {}, where \
                         clients are; if that is meant, add {} to [interfaces] internal, else \
                         correct the route",
                        rule.place, rule.name, hop.address, link.name, link.name
                    ));
                } else {
                    inside(&link.name);
                }
            }
            for (name, _) in before.roles.iter().filter(|(_, role)| **role != Role::External) {
                inside(name);
            }
        } else {
            for interface in &config.internal {
                inside(&interface.name);
            }
            for (backend, rule, hop) in &routes {
                let Some(link) = snapshot.link_by_index(hop.interface) else { continue };
                if !config.internal.iter().any(|interface| interface.name == link.name) {
                    problems.push(format!(
                        "{}: rule \"{}\": backend {backend} is reached by {}, which is not internal; add it to \
                         [interfaces] internal, or correct the route",
                        rule.place, rule.name, link.name
                    ));
                }
            }
        }
        let external: Vec<u32> = config
            .external
            .iter()
            .filter_map(|interface| snapshot.link(&interface.name))
            .map(|link| link.index)
            .collect();
        for name in roles.keys() {
            match snapshot.link(name) {
                None => {
                    problems.push(format!("{name}: there is no such interface now; waiting for it"))
                }
                Some(link) => {
                    problems.extend(unusable(link).or_else(|| without_xdp(link, config)));
                }
            }
        }
        let mut externals = snapshot.external_addresses(&external);
        keep_order(&mut externals.v4, &before.externals.v4);
        keep_order(&mut externals.v6, &before.externals.v6);
        Ok(Self { roles, hops, local, externals, own: protocols::of_the_box(snapshot), problems })
    }
}

/// Those that were there before come first, as they were.
fn keep_order<T: PartialEq>(addresses: &mut [T], before: &[T]) {
    let place = |address: &T| before.iter().position(|other| other == address);
    addresses.sort_by_key(|address| place(address).unwrap_or(usize::MAX));
}

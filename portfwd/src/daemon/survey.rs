//! What the network and the configuration together ask for.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use portfwd_ebpf::path::Role;

use super::{Failure, protocols};
use crate::compile::Plan;
use crate::config::{Attach, Config, Interface};
use crate::network::{Externals, Layer, Link, Network, NetworkError, NextHop, Route, Snapshot};
use crate::rule::Rule;

/// Interfaces that are named and do not exist, or cannot serve, are mistakes at start; later they are
/// waited for.
pub fn check_interfaces(config: &Config, snapshot: &Snapshot) -> Result<(), Failure> {
    let mut mistakes = Vec::new();
    for Interface { name, place } in config.external.iter().chain(&config.internal) {
        match snapshot.link(name) {
            Some(link) => {
                let attach = config.attach_to(name);
                mistakes.extend(unfit(link, attach).map(|why| format!("{place}: {why}")));
            }
            None => {
                let here: Vec<&str> = snapshot
                    .links
                    .iter()
                    .filter(|link| link.layer != Layer::Other)
                    .map(|link| link.name.as_str())
                    .collect();
                mistakes.push(format!(
                    "{place}: there is no interface {name}; this box has {}",
                    here.join(", ")
                ));
            }
        }
    }
    if mistakes.is_empty() { Ok(()) } else { Err(Failure::Configuration(mistakes.join("\n"))) }
}

/// Why nothing can be attached to a link in this way.
fn unfit(link: &Link, attach: Attach) -> Option<String> {
    let Link { name, driver, .. } = link;
    let kind = driver.as_deref().unwrap_or("kind unknown");
    match (link.layer, attach) {
        (Layer::Ethernet, _) | (Layer::Bare, Attach::Auto | Attach::Tc) => None,
        (Layer::Bare, Attach::Native | Attach::Generic) => Some(format!(
            "{name} has no Ethernet header ({kind}), which XDP needs; set attach = \"tc\" in \
             [interfaces.{name}]"
        )),
        (Layer::Other, _) => Some(format!(
            "{name} is an interface of a kind that cannot be forwarded from ({kind}); name another"
        )),
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
                Some(link) => problems.extend(unfit(link, config.attach_to(name))),
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

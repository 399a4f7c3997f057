//! Host names of backends, through the system's resolver.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use tokio::task::JoinSet;

use crate::compile::{HostAddresses, Resolved};
use crate::rule::{Host, Rule};

/// How long one name may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// The names in the backends of `rules`.
pub fn of(rules: &[Rule]) -> BTreeSet<String> {
    rules
        .iter()
        .flat_map(|rule| rule.to.iter())
        .filter_map(|target| match &target.host {
            Host::Name(name) => Some(name.clone()),
            Host::Address(_) => None,
        })
        .collect()
}

/// Resolves `names` side by side. A name keeps the addresses that it has in `before` as long as they
/// are among the answers. Names that fail are told with the reason, and keep what they had.
pub async fn resolve(
    names: BTreeSet<String>,
    before: Resolved,
) -> (Resolved, Vec<(String, String)>) {
    let mut lookups = JoinSet::new();
    for name in names {
        lookups.spawn(async move {
            let lookup = tokio::net::lookup_host((name.clone(), 0));
            let answer = match tokio::time::timeout(PATIENCE, lookup).await {
                Ok(Ok(addresses)) => Ok(addresses.map(|address| address.ip()).collect::<Vec<_>>()),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("no answer within {} s", PATIENCE.as_secs())),
            };
            (name, answer)
        });
    }
    let mut resolved = before;
    let mut failed = Vec::new();
    while let Some(lookup) = lookups.join_next().await {
        let Ok((name, answer)) = lookup else { continue };
        match answer.map(|addresses| choose(resolved.get(&name).copied(), &addresses)) {
            Ok(chosen) if chosen != HostAddresses::default() => {
                resolved.insert(name, chosen);
            }
            Ok(_) => failed.push((name, "no address that packets can be sent to".to_owned())),
            Err(reason) => failed.push((name, reason)),
        }
    }
    failed.sort();
    (resolved, failed)
}

/// One address of each family: the one in use if it is still among the answers, else the lowest, so
/// that the order of answers does not matter.
fn choose(before: Option<HostAddresses>, answers: &[IpAddr]) -> HostAddresses {
    let before = before.unwrap_or_default();
    let usable = |address: &&IpAddr| !address.is_loopback() && !address.is_unspecified();
    let v4 = || {
        answers.iter().filter(usable).filter_map(|address| match address {
            IpAddr::V4(v4) => Some(*v4),
            IpAddr::V6(_) => None,
        })
    };
    let v6 = || {
        answers.iter().filter(usable).filter_map(|address| match address {
            IpAddr::V6(v6) if !v6.is_unicast_link_local() => Some(*v6),
            _ => None,
        })
    };
    HostAddresses {
        v4: v4().find(|address| Some(*address) == before.v4).or_else(|| v4().min()),
        v6: v6().find(|address| Some(*address) == before.v6).or_else(|| v6().min()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_in_use_is_kept_while_it_is_an_answer() {
        let answers: Vec<IpAddr> =
            ["192.0.2.9", "192.0.2.3", "fe80::1", "127.0.0.1", "2001:db8::5"]
                .map(|address| address.parse().expect("an address"))
                .to_vec();
        let first = choose(None, &answers);
        assert_eq!(first.v4, Some([192, 0, 2, 3].into()));
        assert_eq!(first.v6, Some("2001:db8::5".parse().expect("an address")));

        let in_use = HostAddresses { v4: Some([192, 0, 2, 9].into()), v6: None };
        assert_eq!(choose(Some(in_use), &answers).v4, Some([192, 0, 2, 9].into()));
        let gone = HostAddresses { v4: Some([192, 0, 2, 77].into()), v6: None };
        assert_eq!(choose(Some(gone), &answers).v4, Some([192, 0, 2, 3].into()));
        assert_eq!(choose(None, &answers[2..4]), HostAddresses::default());
    }

    #[tokio::test]
    async fn a_name_that_fails_keeps_its_addresses_and_is_told() {
        let known = HostAddresses { v4: Some([192, 0, 2, 9].into()), v6: None };
        let before = Resolved::from([("no-such-host.invalid".to_owned(), known)]);
        let names = BTreeSet::from(["no-such-host.invalid".to_owned()]);
        let (resolved, failed) = resolve(names, before.clone()).await;
        assert_eq!(resolved, before);
        assert_eq!(failed.len(), 1);
        assert_eq!(failed[0].0, "no-such-host.invalid");
    }
}

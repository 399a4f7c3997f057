//! How a program is attached to an interface, and why in that way.

use crate::config::Attach;
use crate::datapath::{AttachError, Mode};
use crate::network::{Layer, Link};

/// Links whose packets come from this machine itself: super-packets, and without checksums.
const LOCAL: &[&str] = &[
    "veth",
    "netkit",
    "tun",
    "bridge",
    "openvswitch",
    "macvlan",
    "macvtap",
    "ipvlan",
    "ipvtap",
    "vlan",
    "vxlan",
    "geneve",
    "gretap",
    "ip6gretap",
    "dummy",
    "ifb",
];

/// The only link whose XDP programs run on others: for them a packet comes by a port of it.
const BOND: &str = "bond";

/// Which way `auto` takes, and why. A native program can still be refused.
fn choose(link: &Link) -> (Mode, String) {
    let driver = link.driver.as_deref().unwrap_or("its driver");
    match link.layer {
        Layer::Ethernet if LOCAL.contains(&driver) => {
            (Mode::Tc, format!("{driver}: packets of this machine stay whole there"))
        }
        Layer::Ethernet if driver == BOND => (Mode::Tc, "bond: XDP would see its ports".to_owned()),
        Layer::Ethernet => (Mode::Native, format!("{driver} has it")),
        Layer::Bare | Layer::Other => (Mode::Tc, "no Ethernet header".to_owned()),
    }
}

/// Which way would be taken, and why. What is `wanted` can still be refused.
pub fn foresee(link: &Link, wanted: Attach) -> (Mode, String) {
    let asked = |mode| (mode, AS_CONFIGURED.to_owned());
    match wanted {
        Attach::Native => asked(Mode::Native),
        Attach::Generic => asked(Mode::Generic),
        Attach::Tc => asked(Mode::Tc),
        Attach::Auto => choose(link),
    }
}

const AS_CONFIGURED: &str = "as configured";

/// Attaches as `wanted`, by means of `attach`. Returns how, and why.
///
/// # Errors
///
/// As `attach` says; with `auto`, of the last way that was tried.
pub fn attach(
    link: &Link,
    wanted: Attach,
    mut attach: impl FnMut(Mode) -> Result<Mode, AttachError>,
) -> Result<(Mode, String), AttachError> {
    let (mode, why) = foresee(link, wanted);
    if mode == Mode::Native && link.driver.as_deref() == Some(BOND) {
        return Err(AttachError::Bond { interface: link.name.clone() });
    }
    match attach(mode) {
        Ok(mode) => Ok((mode, why)),
        Err(error) if wanted != Attach::Auto || mode == Mode::Tc => Err(error),
        Err(error) => {
            let why = match &error {
                AttachError::Busy { .. } => "another XDP program is there".to_owned(),
                AttachError::Mtu { mtu, .. } => {
                    format!("MTU {mtu} is too large for its native XDP")
                }
                AttachError::NoXdp { message, .. } | AttachError::Other { message, .. } => {
                    format!("no native XDP: {message}")
                }
                AttachError::Programs(_)
                | AttachError::Portfwd { .. }
                | AttachError::Instance { .. }
                | AttachError::Bond { .. }
                | AttachError::NoFilters { .. } => return Err(error),
            };
            attach(Mode::Tc).map(|mode| (mode, why))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(driver: &str, layer: Layer) -> Link {
        Link { name: "up".into(), driver: Some(driver.into()), layer, mtu: 9000, ..Link::default() }
    }

    /// How, if native XDP gives this error.
    fn auto(link: &Link, native: Option<AttachError>) -> (Mode, String) {
        let mut native = native;
        attach(link, Attach::Auto, |mode| match native.take_if(|_| mode == Mode::Native) {
            Some(error) => Err(error),
            None => Ok(mode),
        })
        .unwrap()
    }

    #[test]
    fn auto_takes_what_is_best() {
        let card = link("igb", Layer::Ethernet);
        let interface = || "up".to_owned();
        assert_eq!(auto(&card, None), (Mode::Native, "igb has it".into()));
        let busy = AttachError::Busy { interface: interface() };
        assert_eq!(auto(&card, Some(busy)), (Mode::Tc, "another XDP program is there".into()));
        let large = AttachError::Mtu { interface: interface(), mtu: 9000, message: String::new() };
        let why = "MTU 9000 is too large for its native XDP";
        assert_eq!(auto(&card, Some(large)), (Mode::Tc, why.into()));
        let message = "Operation not supported".to_owned();
        let other = AttachError::NoXdp { interface: interface(), message };
        let why = "no native XDP: Operation not supported";
        assert_eq!(auto(&card, Some(other)), (Mode::Tc, why.into()));
        for driver in ["veth", "bridge", "vlan", "macvlan", "bond"] {
            assert_eq!(auto(&link(driver, Layer::Ethernet), None).0, Mode::Tc, "{driver}");
        }
        assert_eq!(auto(&link("tun", Layer::Bare), None), (Mode::Tc, "no Ethernet header".into()));
    }

    #[test]
    fn what_is_asked_for_is_tried_alone() {
        let card = link("igb", Layer::Ethernet);
        for (wanted, mode) in [
            (Attach::Native, Mode::Native),
            (Attach::Generic, Mode::Generic),
            (Attach::Tc, Mode::Tc),
        ] {
            let mut tried = Vec::new();
            let refused = attach(&card, wanted, |mode| {
                tried.push(mode);
                Err(AttachError::Busy { interface: "up".into() })
            });
            assert!(refused.is_err());
            assert_eq!(tried, [mode]);
        }
    }

    #[test]
    fn nothing_is_tried_on_a_bond_that_would_see_its_ports() {
        let bond = link("bond", Layer::Ethernet);
        let refused = attach(&bond, Attach::Native, |_| unreachable!()).unwrap_err().to_string();
        assert!(refused.starts_with("up: native XDP on a bond"), "{refused}");
    }
}

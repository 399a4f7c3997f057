//! What forwarding needs of the kernel: checked, set where it is not so, and said.
//!
//! Everything here acts on the network namespace of the calling thread.

use std::{
    collections::BTreeSet,
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    ops::RangeInclusive,
};

use crate::network::Link;

/// The address families in which something is forwarded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Families {
    pub v4: bool,
    pub v6: bool,
}

/// A value that was changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// As sysctl(8) takes it: a dot in an interface's name is a slash
    /// (`net.ipv4.conf.eth0/100.forwarding`).
    pub key: String,
    pub from: String,
    pub to: String,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "set {} = {} (was {})", self.key, quoted(&self.to), quoted(&self.from))
    }
}

/// The kernel's settings are not what forwarding needs, and could not be made so.
#[derive(Debug, thiserror::Error)]
pub enum SysctlError {
    #[error("cannot read {key}: {cause}")]
    Read { key: String, cause: io::Error },
    #[error("{key} is not understood: {value:?}")]
    Value { key: String, value: String },
    #[error("{key} is {}, which cannot be changed ({cause}); as root run: sysctl -w {key}={}",
        quoted(.is), quoted(.wanted))]
    Write { key: String, is: String, wanted: String, cause: io::Error },
}

/// As a shell takes it.
fn quoted(value: &str) -> &str {
    if value.is_empty() { "\"\"" } else { value }
}

/// Whether this kernel's verifier has room for programs that log. Those before Linux 6.3 find fewer states to
/// be the same.
pub fn verifies_logs() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    !is_before(&release, (6, 3))
}

/// Whether a kernel's release (`6.1.0-50-cloud-amd64`) is before a version. Not if it does not say.
fn is_before(release: &str, version: (u32, u32)) -> bool {
    let mut numbers = release.split(['.', '-', '+']).map_while(|number| number.parse().ok());
    matches!((numbers.next(), numbers.next()), (Some(major), Some(minor)) if (major, minor) < version)
}

/// Whether the kernel forwards what comes by an interface, in the family `ipv4` or `ipv6`. Not if it
/// does not say.
pub fn forwards(family: &str, interface: &str) -> bool {
    Key::of_interface(family, interface, "forwarding").number().is_ok_and(|value| value != 0)
}

/// Makes the kernel forward between these interfaces, and adds what was changed for that to
/// `changes`, in order.
///
/// A one-armed interface is in both lists. What is right already is not written, so a read-only
/// /proc/sys is fine then. What was changed before an error stays changed, and is in `changes`.
pub fn prepare(
    external: &[&Link],
    internal: &[&Link],
    families: Families,
    changes: &mut Vec<Change>,
) -> Result<(), SysctlError> {
    let served: BTreeSet<&str> =
        external.iter().chain(internal).map(|link| link.name.as_str()).collect();
    if families.v4 {
        // First: writing it sets the forwarding of every interface.
        changes.extend(Key::new("ipv4/ip_forward").enable()?);
        for name in &served {
            changes.extend(Key::of_interface("ipv4", name, "forwarding").enable()?);
        }
        for link in internal {
            // A reply that XDP has translated and hands to the stack comes from outside with an
            // address of the box as its source. The stack takes that for a forgery unless both of
            // these let it.
            let effective = |setting| -> Result<i32, SysctlError> {
                let all = Key::of_interface("ipv4", "all", setting).number()?;
                Ok(all.max(Key::of_interface("ipv4", &link.name, setting).number()?))
            };
            if effective("accept_local")? == 0 {
                changes.extend(Key::of_interface("ipv4", &link.name, "accept_local").enable()?);
            }
            if effective("rp_filter")? == 1 {
                changes.extend(Key::of_interface("ipv4", &link.name, "rp_filter").set("2")?);
            }
        }
    }
    if families.v6 {
        // Writing this one, too, sets the forwarding of every interface, and of those to come.
        let all = Key::of_interface("ipv6", "all", "forwarding");
        if all.number()? == 0 {
            // The default first: an interface that comes now is in the list, or has it already.
            changes.extend(keep_listening("default")?);
            for name in interfaces()? {
                match keep_listening(&name) {
                    // It has gone since it was listed.
                    Err(SysctlError::Read { cause, .. })
                        if cause.kind() == io::ErrorKind::NotFound => {}
                    change => changes.extend(change?),
                }
            }
        }
        changes.extend(all.enable()?);
        for name in &served {
            changes.extend(keep_listening(name)?);
            changes.extend(Key::of_interface("ipv6", name, "forwarding").enable()?);
        }
    }
    Ok(())
}

/// For an interface that is about to become a router's: has it listen to router advertisements if
/// it does so now.
///
/// A router ignores them unless accept_ra is 2, and the box would lose the default routes that it
/// has learned, be it on the external interface or on one that only leads to the administrator.
/// `default` is what new interfaces begin with: one that is taken away and made again listens as it
/// did. Where forwarding is on already, nothing is changed: that router's owner wants it so.
fn keep_listening(interface: &str) -> Result<Option<Change>, SysctlError> {
    let setting = |name| Key::of_interface("ipv6", interface, name);
    if setting("forwarding").number()? == 0 && setting("accept_ra").number()? == 1 {
        setting("accept_ra").set("2")
    } else {
        Ok(None)
    }
}

/// The interfaces that have IPv6, sorted.
fn interfaces() -> Result<BTreeSet<String>, SysctlError> {
    let key = Key::new("ipv6/conf");
    let failed = |cause| SysctlError::Read { key: key.to_string(), cause };
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(key.path()).map_err(failed)? {
        names.extend(entry.map_err(failed)?.file_name().into_string());
    }
    names.retain(|name| !["all", "default", "lo"].contains(&name.as_str()));
    Ok(names)
}

/// Which of these ports the kernel may choose for connections of the box: those among the ephemeral ports that
/// are not reserved.
pub fn not_reserved(ports: &BTreeSet<u16>) -> Result<BTreeSet<u16>, SysctlError> {
    let ephemeral = ephemeral_ports()?;
    let reserved = reserved_ports()?;
    let may = |port: &u16| ephemeral.contains(port) && !reserved.contains(port);
    Ok(ports.iter().copied().filter(may).collect())
}

/// Keeps the kernel from choosing these ports. `None` if they are reserved already.
pub fn reserve_ports(ports: &BTreeSet<u16>) -> Result<Option<Change>, SysctlError> {
    reserved_key().set(&format_ports(&(&reserved_ports()? | ports)))
}

/// Takes these ports out of the reserved ones, and leaves the others. `None` if none of them is
/// reserved.
pub fn release_ports(ports: &BTreeSet<u16>) -> Result<Option<Change>, SysctlError> {
    reserved_key().set(&format_ports(&(&reserved_ports()? - ports)))
}

/// The ports from which the kernel chooses for connections of the box.
pub fn ephemeral_ports() -> Result<RangeInclusive<u16>, SysctlError> {
    let key = Key::new("ipv4/ip_local_port_range");
    let value = key.read()?;
    let mut ends = value.split_whitespace().map(str::parse);
    match (ends.next(), ends.next(), ends.next()) {
        (Some(Ok(first)), Some(Ok(last)), None) => Ok(first..=last),
        _ => Err(SysctlError::Value { key: key.to_string(), value }),
    }
}

fn reserved_key() -> Key {
    Key::new("ipv4/ip_local_reserved_ports")
}

fn reserved_ports() -> Result<BTreeSet<u16>, SysctlError> {
    let key = reserved_key();
    let value = key.read()?;
    parse_ports(&value).ok_or_else(|| SysctlError::Value { key: key.to_string(), value })
}

/// Reads a list like `80,8000-8080`.
pub fn parse_ports(list: &str) -> Option<BTreeSet<u16>> {
    let mut ports = BTreeSet::new();
    for part in list.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u16, u16) = (first.parse().ok()?, last.parse().ok()?);
        if first > last {
            return None;
        }
        ports.extend(first..=last);
    }
    Some(ports)
}

/// Writes the list as the kernel does: ascending, neighbours joined to ranges.
pub fn format_ports(ports: &BTreeSet<u16>) -> String {
    let mut ranges: Vec<(u16, u16)> = Vec::new();
    for &port in ports {
        match ranges.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(port) => *last = port,
            _ => ranges.push((port, port)),
        }
    }
    let part = |(first, last)| match first == last {
        true => format!("{first}"),
        false => format!("{first}-{last}"),
    };
    ranges.into_iter().map(part).collect::<Vec<_>>().join(",")
}

/// The path of a setting below /proc/sys.
struct Key(String);

/// Longer than any value: every second port reserved makes 196,605 bytes.
const LONGEST: usize = 256 * 1024;

impl Key {
    /// By its path below /proc/sys/net.
    fn new(path: &str) -> Key {
        Key(format!("net/{path}"))
    }

    fn of_interface(family: &str, interface: &str, setting: &str) -> Key {
        Key(format!("net/{family}/conf/{interface}/{setting}"))
    }

    fn path(&self) -> String {
        format!("/proc/sys/{}", self.0)
    }

    /// The value without the line's end.
    fn read(&self) -> Result<String, SysctlError> {
        // In one read: the kernel answers a second one with the end of the file, wherever the first
        // ended.
        let mut buffer = vec![0; LONGEST];
        let length = File::open(self.path())
            .and_then(|mut file| file.read(&mut buffer))
            .map_err(|cause| SysctlError::Read { key: self.to_string(), cause })?;
        Ok(String::from_utf8_lossy(&buffer[..length]).trim().to_owned())
    }

    fn number(&self) -> Result<i32, SysctlError> {
        let value = self.read()?;
        value.parse().map_err(|_| SysctlError::Value { key: self.to_string(), value })
    }

    /// Makes it 1 if it is 0.
    fn enable(&self) -> Result<Option<Change>, SysctlError> {
        if self.number()? == 0 { self.set("1") } else { Ok(None) }
    }

    /// Writes the value if it is another.
    fn set(&self, to: &str) -> Result<Option<Change>, SysctlError> {
        let from = self.read()?;
        if from == to {
            return Ok(None);
        }
        let written = OpenOptions::new()
            .write(true)
            .open(self.path())
            .and_then(|mut file| file.write_all(format!("{to}\n").as_bytes()));
        match written {
            Ok(()) => Ok(Some(Change { key: self.to_string(), from, to: to.to_owned() })),
            Err(cause) => Err(SysctlError::Write {
                key: self.to_string(),
                is: from,
                wanted: to.to_owned(),
                cause,
            }),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let swap = |c| match c {
            '/' => '.',
            '.' => '/',
            c => c,
        };
        f.write_str(&self.0.chars().map(swap).collect::<String>())
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::btree_set, prelude::*};

    use super::*;

    proptest! {
        #[test]
        fn ports_survive_a_round_trip(ports in btree_set(any::<u16>(), 0..200)) {
            prop_assert_eq!(parse_ports(&format_ports(&ports)), Some(ports));
        }

        #[test]
        fn ranges_survive_a_round_trip(ranges in btree_set((any::<u16>(), 0..300u16), 0..20)) {
            let ports: BTreeSet<u16> =
                ranges.iter().flat_map(|&(first, more)| first..=first.saturating_add(more)).collect();
            let text = format_ports(&ports);
            prop_assert!(text.split(',').count() <= ranges.len().max(1), "{}", text);
            prop_assert_eq!(parse_ports(&text), Some(ports));
        }

        #[test]
        fn no_text_panics(text in "[0-9,\\- \t\n]{0,40}") {
            if let Some(ports) = parse_ports(&text) {
                prop_assert_eq!(parse_ports(&format_ports(&ports)), Some(ports));
            }
        }
    }

    #[test]
    fn lists_are_read_and_written_as_the_kernel_does() {
        let ports = BTreeSet::from([1, 2, 3, 80, 65534, 65535]);
        assert_eq!(format_ports(&ports), "1-3,80,65534-65535");
        assert_eq!(parse_ports("1-3,80,65534-65535\n"), Some(ports));
        assert_eq!(parse_ports("\n"), Some(BTreeSet::new()));
        for bad in ["a", "1-", "-1", "3-1", "65536", "1-2-3"] {
            assert_eq!(parse_ports(bad), None, "{bad}");
        }
    }

    #[test]
    fn keys_are_printed_as_sysctl_takes_them() {
        let key = Key::of_interface("ipv4", "eth0.100", "rp_filter");
        assert_eq!(key.path(), "/proc/sys/net/ipv4/conf/eth0.100/rp_filter");
        assert_eq!(key.to_string(), "net.ipv4.conf.eth0/100.rp_filter");
    }

    #[test]
    fn releases_are_compared_by_their_numbers() {
        for release in ["6.1.0-50-cloud-amd64", "6.2", "5.15.0", "6.1.176+deb12"] {
            assert!(is_before(release, (6, 3)), "{release}");
        }
        for release in ["6.3.0", "6.12.117+deb12-cloud-amd64", "7.0-rc1", "", "unknown"] {
            assert!(!is_before(release, (6, 3)), "{release}");
        }
    }

    #[test]
    fn messages_say_what_and_how() {
        let change = |from: &str, to: &str| {
            let key = "net.ipv4.ip_forward".to_owned();
            Change { key, from: from.to_owned(), to: to.to_owned() }.to_string()
        };
        assert_eq!(change("0", "1"), "set net.ipv4.ip_forward = 1 (was 0)");
        assert_eq!(change("", "80"), "set net.ipv4.ip_forward = 80 (was \"\")");
        let error = SysctlError::Write {
            key: "net.ipv4.ip_forward".to_owned(),
            is: "0".to_owned(),
            wanted: "1".to_owned(),
            cause: io::Error::from_raw_os_error(30),
        };
        assert_eq!(
            error.to_string(),
            "net.ipv4.ip_forward is 0, which cannot be changed (Read-only file system (os error 30)); \
             as root run: sysctl -w net.ipv4.ip_forward=1"
        );
    }
}

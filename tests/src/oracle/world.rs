//! Two routers, each between a client and a server of its own: one does with nftables what the other
//! does with portfwd.

use std::collections::HashMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::rules::{self, SECOND_WAN, SERVERS, server};
use super::stream::{
    CLIENT_MAC, Flow, LAN_MAC, SERVER_MAC, Side, Step, Stream, WAN_MAC, link_addresses,
};
use crate::netns::{self, Namespace};
use crate::packet::{self, ICMP, ICMPV6, Packet, TCP, UDP};
use crate::portfwd::Portfwd;
use crate::rig::{self, Options, Rig};
use crate::rule::Rule;
use crate::tun::Device;
use crate::wire::Tap;
use tempfile::TempDir;

/// The MTU of the ways to servers, and to clients beyond the router's network.
const NARROW: u16 = 1450;

/// A protocol that is nobody's (RFC 3692), of the frames that say that all before them has come.
const MARKER: u8 = 253;
/// What markers are sent to at the server's end: no rule sends there.
const MARKED: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 99);

/// What came out at both ends, in order.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Seen([Vec<Vec<u8>>; 2]);

impl Seen {
    pub fn at(&self, side: Side) -> &[Vec<u8>] {
        &self.0[side as usize]
    }

    /// A frame at one end.
    #[cfg(test)]
    pub fn one(side: Side, frame: Vec<u8>) -> Self {
        let mut seen = Self::default();
        seen.0[side as usize].push(frame);
        seen
    }

    /// Changes every frame.
    pub fn each(&mut self, mut change: impl FnMut(Side, &mut Vec<u8>)) {
        for (side, frames) in Side::BOTH.into_iter().zip(&mut self.0) {
            frames.iter_mut().for_each(|frame| change(side, frame));
        }
    }
}

/// Source and destination.
type Ends = (SocketAddr, SocketAddr);

/// Where packets are sent to a router and received from it.
enum End {
    Ethernet(Tap),
    /// Of a tun device, whose packets have the link header only here.
    Tun(Device, Side),
}

impl End {
    fn send(&self, frame: &[u8]) -> Result<()> {
        match self {
            Self::Ethernet(tap) => tap.send(frame),
            Self::Tun(device, _) => {
                device.send(packet_of(frame));
                Ok(())
            }
        }
    }

    /// The next frame that the router sent, or `None` if none came for a while.
    fn receive(&mut self) -> Result<Option<Vec<u8>>> {
        match self {
            Self::Ethernet(tap) => {
                let frame = tap.receive()?;
                let unfilled = frame.as_ref().is_some_and(|frame| frame.unfilled);
                ensure!(!unfilled, "a frame whose checksum is left to hardware");
                Ok(frame.map(|frame| frame.data))
            }
            Self::Tun(device, side) => Ok(device.receive()?.map(|packet| frame_of(&packet, *side))),
        }
    }
}

/// What follows the link header; of what has a tag there, nothing.
fn packet_of(frame: &[u8]) -> &[u8] {
    match frame.split_at_checked(packet::ETHERNET) {
        Some((link, packet)) if matches!(link[12..], [0x08, 0x00] | [0x86, 0xdd]) => packet,
        _ => &[],
    }
}

/// A packet as it would come to an end by Ethernet.
fn frame_of(packet: &[u8], side: Side) -> Vec<u8> {
    let is_v4 = packet[0] >> 4 == 4;
    let to_group = if is_v4 { packet[16] >> 4 == 14 } else { packet[24] == 0xff };
    let (host, router) = link_addresses(side);
    let destination = if to_group { [1; 6] } else { host };
    let ethertype: [u8; 2] = if is_v4 { [0x08, 0x00] } else { [0x86, 0xdd] };
    [&destination, &router, &ethertype[..], packet].concat()
}

/// A router at work.
struct Lane {
    ends: [End; 2],
    /// How the server sees a flow, by its number.
    arrived: HashMap<usize, Ends>,
    /// The other way round, with the protocol.
    flows: HashMap<(u8, Ends), usize>,
    markers: u32,
    _portfwd: Option<(Portfwd, TempDir)>,
    _rig: Rig,
}

/// Who is compared with nftables.
#[derive(Clone, Copy, Debug)]
pub enum Subject<'a> {
    /// The portfwd at this path.
    Portfwd(&'a Path),
    /// Nftables itself: what differs then is the oracle's mistake.
    Nftables,
}

/// Both of them.
pub struct World {
    nftables: Lane,
    subject: Lane,
}

impl World {
    pub fn new(stream: &Stream, subject: Subject<'_>) -> Result<Self> {
        // Most of it is waiting for the kernel.
        let (nftables, subject) = std::thread::scope(|scope| {
            let nftables = scope.spawn(|| Lane::nftables(stream));
            let subject = match subject {
                Subject::Portfwd(path) => Lane::portfwd(stream, path),
                Subject::Nftables => Lane::nftables(stream),
            };
            let nftables = nftables.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            (nftables, subject)
        });
        Ok(Self { nftables: nftables?, subject: subject? })
    }

    /// Sends a packet through both; what comes out of nftables, and of the other.
    pub fn try_step(&mut self, step: &Step, flow: &Flow) -> Result<[Seen; 2]> {
        Ok([
            self.nftables.try_step(step, flow).context("nftables")?,
            self.subject.try_step(step, flow).context("portfwd")?,
        ])
    }
}

impl Lane {
    fn nftables(stream: &Stream) -> Result<Self> {
        let (rig, ends) = prepared(stream.tuns)?;
        netns::feed(rig.router.command("nft").args(["-f", "-"]), &rules::nft(&stream.rules))?;
        let of_tracking = |key: &str, value| {
            rig.router.set_sysctl(&format!("net.netfilter.nf_conntrack_{key}"), value)
        };
        // A wrong checksum is the receiver's business, and so is a wrong sequence number.
        of_tracking("checksum", "0")?;
        of_tracking("tcp_be_liberal", "1")?;
        of_tracking("tcp_ignore_invalid_rst", "1")?;
        // Nothing is forgotten while a stream lasts, however busy the machine is.
        for timeout in [
            "udp_timeout",
            "udp_timeout_stream",
            "icmp_timeout",
            "icmpv6_timeout",
            "generic_timeout",
            "tcp_timeout_syn_sent",
            "tcp_timeout_syn_recv",
            "tcp_timeout_fin_wait",
            "tcp_timeout_close_wait",
            "tcp_timeout_last_ack",
            "tcp_timeout_time_wait",
            "tcp_timeout_close",
        ] {
            of_tracking(timeout, "3600")?;
        }
        Ok(Self::new(rig, ends, None))
    }

    fn portfwd(stream: &Stream, binary: &Path) -> Result<Self> {
        let Stream { rules, attach, tuns, .. } = stream;
        let (rig, ends) = prepared(*tuns)?;
        let directory = TempDir::new()?;
        let config = directory.path().join("portfwd.toml");
        let rules: String = rules.iter().map(Rule::toml).collect();
        let mut interfaces = format!(
            "[interfaces]\nexternal = \"wan0\"\ninternal = \"lan0\"\nattach = \"{attach}\"\n"
        );
        for (side, name) in [(Side::Client, "wan0"), (Side::Server, "lan0")] {
            if tuns[side as usize] {
                interfaces += &format!("[interfaces.{name}]\nattach = \"tc\"\n");
            }
        }
        fs::write(&config, interfaces + &rules)?;
        let arguments = ["--config".as_ref(), config.as_os_str()];
        let portfwd = Portfwd::start(&rig.router, binary, &arguments, directory.path())?;
        Ok(Self::new(rig, ends, Some((portfwd, directory))))
    }

    fn new(rig: Rig, ends: [End; 2], portfwd: Option<(Portfwd, TempDir)>) -> Self {
        let (arrived, flows) = Default::default();
        Self { ends, arrived, flows, markers: 0, _portfwd: portfwd, _rig: rig }
    }

    fn try_step(&mut self, step: &Step, flow: &Flow) -> Result<Seen> {
        let has_ports = matches!(step.packet.protocol, TCP | UDP);
        let frame = match self.arrived.get(&step.flow) {
            Some(ends) if has_ports && step.from == Side::Server => step.answer(ends.0, ends.1),
            Some(ends) if flow.chooses && step.from == Side::Server => step.error(flow, *ends),
            _ => step.frame(),
        };
        for frame in step.frames(frame) {
            self.ends[step.at as usize].send(&frame)?;
        }
        let mut seen = self.settle(step.at)?;
        // How it is cut is each one's own affair.
        for frames in &mut seen.0 {
            *frames = packet::reassembled(std::mem::take(frames));
        }
        if has_ports && step.from == Side::Client {
            self.note_arrival(step, flow, &mut seen)?;
        } else if flow.chooses {
            self.rename_errors(step, flow, &mut seen);
        }
        Ok(seen)
    }

    /// Takes what the router chose out of the ICMP errors about a server's packets: those that it makes
    /// itself, and those that are a client's. As in [`note_arrival`](Self::note_arrival).
    fn rename_errors(&self, step: &Step, flow: &Flow, seen: &mut Seen) {
        let Some((client, server)) = self.arrived.get(&step.flow) else { return };
        let (at, places) = match step.from {
            Side::Client => (step.to, step.quotes()),
            Side::Server => (step.at, step.quoted()),
        };
        let renamed = (flow.server, flow.appears);
        for error in &mut seen.0[at as usize] {
            packet::set_quoted_ends(error, places, flow.protocol, (*server, *client), renamed);
        }
    }

    /// Takes down how the server sees a flow, and looks whether it stays so and is no other's. What
    /// the router chose is taken out of the packet, so that it can be compared: the port that stands
    /// for the client, and which backend it is.
    fn note_arrival(&mut self, step: &Step, flow: &Flow, seen: &mut Seen) -> Result<()> {
        let (protocol, transport) = (step.packet.protocol, step.packet.transport_at());
        let [frame] = seen.0[step.to as usize].as_mut_slice() else { return Ok(()) };
        let Some(ends) = packet::ends(frame, transport).filter(|_| !is_icmp(frame)) else {
            return Ok(());
        };
        let (source, destination) = ends;
        let arrives = format!("{source} -> {destination} at the server");
        let owner = *self.flows.entry((protocol, ends)).or_insert(step.flow);
        ensure!(owner == step.flow, "{arrives} is flow {owner}, and now flow {} too", step.flow);
        let first = *self.arrived.entry(step.flow).or_insert(ends);
        if flow.chooses {
            ensure!(ends == first, "{arrives} was {} -> {} before", first.0, first.1);
            ensure!(flow.backends.contains(&destination.ip()), "{arrives} is no backend's");
            let source = SocketAddr::new(source.ip(), flow.appears.port());
            let destination = SocketAddr::new(flow.server.ip(), destination.port());
            packet::set_ends(frame, protocol, transport, (source, destination));
        }
        Ok(())
    }

    /// Waits until everything that was sent so far has come out.
    ///
    /// A marker sent behind it comes out behind it, if both go the same way. What XDP redirects waits
    /// for the end of its poll, and answers take the other interface: so there are two in each
    /// direction, each sent when the one before has come.
    fn settle(&mut self, at: Side) -> Result<Seen> {
        let mut seen = Seen::default();
        for side in [at, at.other(), at, at.other()] {
            self.markers += 1;
            let marker = marker(side, self.markers);
            self.ends[side as usize].send(&marker)?;
            self.receive_until(&marker, side.other(), &mut seen)?;
        }
        Ok(seen)
    }

    fn receive_until(&mut self, marker: &[u8], side: Side, seen: &mut Seen) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            let Some(frame) = self.ends[side as usize].receive()? else { continue };
            if frame.ends_with(&marker[marker.len() - MARKER_NUMBER..]) && is_marker(&frame) {
                return Ok(());
            }
            if !is_chatter(&frame) {
                seen.0[side as usize].push(frame);
            }
        }
        bail!("a marker sent to the {side:?} does not arrive")
    }
}

/// How many bytes of a marker are its number.
const MARKER_NUMBER: usize = 4;

/// A frame that both routers route as it is.
fn marker(from: Side, number: u32) -> Vec<u8> {
    let ends = [rig::CLIENT.v4, MARKED].map(|address| SocketAddr::new(address.into(), 0));
    let (source, destination, link_source, link_destination) = match from {
        Side::Client => (ends[0], ends[1], CLIENT_MAC, WAN_MAC),
        Side::Server => (ends[1], ends[0], SERVER_MAC, LAN_MAC),
    };
    let payload = number.to_be_bytes().to_vec();
    let packet = Packet::new(MARKER, source, destination);
    Packet { link_source, link_destination, payload, ..packet }.bytes()
}

fn is_marker(frame: &[u8]) -> bool {
    frame[12..14] == [8, 0] && frame.get(23) == Some(&MARKER)
}

/// What the router itself says of a packet.
fn is_icmp(frame: &[u8]) -> bool {
    match frame[12..packet::ETHERNET] {
        [0x08, 0x00] => frame.get(packet::ETHERNET + 9) == Some(&ICMP),
        _ => frame.get(packet::ETHERNET + 6) == Some(&ICMPV6),
    }
}

/// What hosts say to find each other: to all of a group, and ARP.
fn is_chatter(frame: &[u8]) -> bool {
    frame[0] & 1 == 1 || frame[12..14] == [8, 6]
}

/// A rig whose ends are silent and whose router knows its neighbours and forwards, by tun devices at some
/// ends.
fn prepared(tuns: [bool; 2]) -> Result<(Rig, [End; 2])> {
    let second = SECOND_WAN.both().map(prefixed);
    let external = second.each_ref().map(String::as_str);
    let rig = Rig::with(Options { external: &external, ..Options::default() })?;
    // All that leaves an end is sent by its tap: nobody at home answers, nor is there anybody.
    for end in [&rig.client, &rig.server] {
        end.set_sysctl("net.ipv4.ip_forward", "0")?;
        end.set_sysctl("net.ipv6.conf.eth0.disable_ipv6", "1")?;
        end.ip("address flush dev eth0")?;
    }
    let end = |side: Side| {
        let (host, name, addresses) = match side {
            Side::Client => (&rig.client, "wan0", [rig::WAN.both(), SECOND_WAN.both()].concat()),
            Side::Server => (&rig.server, "lan0", rig::LAN.both().to_vec()),
        };
        if tuns[side as usize] {
            return tun(&rig.router, name, &addresses).map(|device| End::Tun(device, side));
        }
        let (of_host, of_router) = link_addresses(side);
        set_link_address(host, "eth0", of_host)?;
        set_link_address(&rig.router, name, of_router)?;
        Tap::open(host, "eth0").map(End::Ethernet)
    };
    let ends = [end(Side::Client)?, end(Side::Server)?];

    let mut lines = Vec::new();
    let mut neighbour = |address: IpAddr, side: Side| {
        let (mac, interface) = match side {
            Side::Client => (CLIENT_MAC, "wan0"),
            Side::Server => (SERVER_MAC, "lan0"),
        };
        if !tuns[side as usize] {
            lines.push(format!(
                "neighbour replace {address} lladdr {} dev {interface} nud permanent",
                text(mac)
            ));
        }
    };
    for client in rig::CLIENT.both() {
        neighbour(client, Side::Client);
    }
    for number in 0..SERVERS {
        neighbour(server(false, number), Side::Server);
        neighbour(server(true, number), Side::Server);
    }
    neighbour(MARKED.into(), Side::Server);
    let narrow = format!("mtu lock {NARROW}");
    for client in rig::CLIENT.both() {
        lines.push(format!("route add default via {client} {narrow}"));
    }
    // To all: each router chooses among them.
    for server in [false, true].map(|v6| (0..SERVERS).map(move |number| server(v6, number))) {
        lines.extend(server.map(|server| format!("route add {server} dev lan0 {narrow}")));
    }
    rig.router.ip_batch(&lines)?;

    for (key, value) in [
        ("net.ipv4.ip_forward", "1"),
        ("net.ipv6.conf.all.forwarding", "1"),
        // What portfwd wants, for both.
        ("net.ipv4.conf.lan0.accept_local", "1"),
        ("net.ipv4.conf.all.rp_filter", "0"),
        ("net.ipv4.conf.wan0.rp_filter", "0"),
        ("net.ipv4.conf.lan0.rp_filter", "0"),
        // What the router says depends on nothing but the packet.
        ("net.ipv4.icmp_ratemask", "0"),
        ("net.ipv6.icmp.ratelimit", "0"),
        ("net.ipv6.icmp.ratemask", "255"),
        ("net.ipv6.auto_flowlabels", "0"),
        ("net.ipv4.conf.all.send_redirects", "0"),
        ("net.ipv4.conf.wan0.send_redirects", "0"),
        ("net.ipv4.conf.lan0.send_redirects", "0"),
    ] {
        rig.router.set_sysctl(key, value)?;
    }
    Ok((rig, ends))
}

/// A tun device instead of the router's interface of that name, with these addresses.
fn tun(router: &Namespace, name: &str, addresses: &[IpAddr]) -> Result<Device> {
    router.ip(&format!("link delete {name}"))?;
    let device = Device::new(router, name)?;
    router.ip(&format!("link set {name} up"))?;
    for address in addresses {
        router.ip(&format!("address add {} dev {name} nodad", prefixed(*address)))?;
    }
    Ok(device)
}

fn prefixed(address: IpAddr) -> String {
    format!("{address}/{}", if address.is_ipv4() { 24 } else { 64 })
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn set_link_address(namespace: &Namespace, interface: &str, mac: [u8; 6]) -> Result<()> {
    namespace.ip(&format!("link set {interface} address {}", text(mac))).map(drop)
}

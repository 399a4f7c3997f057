//! What is on the wire: captures that see every frame, verify it and count it.

use std::collections::HashMap;
use std::fmt;
use std::io::ErrorKind;
use std::mem::{size_of, zeroed};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::AddAssign;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::netns::Namespace;
use crate::sys;

/// Which way a frame went, as seen from the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    Received,
    Sent,
}

/// A frame as captured, from its Ethernet header on; of an interface without one, with a header whose addresses
/// are zero. A VLAN tag that the kernel keeps beside the
/// frame is back in its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub direction: Direction,
    /// The kernel left the transport checksum to the hardware: the bytes have none yet.
    pub unfilled: bool,
    pub data: Vec<u8>,
}

/// What verification found out about an IP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// The number of the transport protocol.
    pub protocol: u8,
    /// With port 0 where there are no ports: neither TCP nor UDP, or a fragment.
    pub source: SocketAddr,
    pub destination: SocketAddr,
    /// Bytes of the IP packet, its header included.
    pub length: u64,
    /// A fragment, of which only the IP header is verified.
    pub fragment: bool,
}

/// Checks lengths and checksums of an Ethernet frame: the IPv4 header's, and that of TCP, UDP, ICMP
/// or ICMPv6. `None` if it carries no IP. A VLAN tag counts as no IP; so does what its tags hide.
///
/// UDP may go without a checksum over IPv4, not over IPv6. IPv6 with a routing header that still has
/// segments left is not supported: its checksum is over another destination.
pub fn verify(frame: &[u8]) -> Result<Option<Packet>> {
    let ethertype = bytes::<2>(frame, 12).context("Ethernet header cut short")?;
    let ip = &frame[14..];
    match ethertype {
        [0x08, 0x00] => verify_ipv4(ip).map(Some),
        [0x86, 0xdd] => verify_ipv6(ip).map(Some),
        _ => Ok(None),
    }
}

fn verify_ipv4(ip: &[u8]) -> Result<Packet> {
    let first = *ip.first().context("no IPv4 header")?;
    ensure!(first >> 4 == 4, "IP version {} in an IPv4 frame", first >> 4);
    let header_length = usize::from(first & 0xf) * 4;
    ensure!(header_length >= 20, "IPv4 header length {header_length}");
    let header = ip.get(..header_length).context("IPv4 header cut short")?;
    ensure!(sum(&[header]) == 0xffff, "IPv4 header checksum");
    let length = usize::from(u16_at(header, 2)?);
    ensure!(length >= header_length, "IPv4 total length {length} below that of its header");
    let packet = ip.get(..length).with_context(|| {
        format!("IPv4 total length {length}, but the frame has {} bytes", ip.len())
    })?;
    let source = bytes::<4>(header, 12)?;
    let destination = bytes::<4>(header, 16)?;
    let transport = Transport {
        protocol: header[9],
        source: Ipv4Addr::from(source).into(),
        destination: Ipv4Addr::from(destination).into(),
        payload: &packet[header_length..],
        fragment: u16_at(header, 6)? & 0x3fff != 0,
    };
    transport.verify(length)
}

fn verify_ipv6(ip: &[u8]) -> Result<Packet> {
    let header = ip.get(..40).context("IPv6 header cut short")?;
    ensure!(header[0] >> 4 == 6, "IP version {} in an IPv6 frame", header[0] >> 4);
    let length = 40 + usize::from(u16_at(header, 4)?);
    let packet = ip
        .get(..length)
        .with_context(|| format!("IPv6 length {length}, but the frame has {} bytes", ip.len()))?;
    let (mut protocol, mut at, mut fragment) = (header[6], 40, false);
    // Hop-by-hop options, routing, fragment, destination options.
    while !fragment && matches!(protocol, 0 | 43 | 44 | 60) {
        let [next, units] = bytes::<2>(packet, at).context("IPv6 extension header cut short")?;
        if protocol == 44 {
            // An atomic fragment (no offset, no more to come) is a whole packet.
            fragment = u16_at(packet, at + 2)? & 0xfff9 != 0;
            at += 8;
        } else {
            at += (usize::from(units) + 1) * 8;
        }
        protocol = next;
    }
    let source = bytes::<16>(header, 8)?;
    let destination = bytes::<16>(header, 24)?;
    let transport = Transport {
        protocol,
        source: Ipv6Addr::from(source).into(),
        destination: Ipv6Addr::from(destination).into(),
        payload: packet.get(at..).context("IPv6 extension headers beyond the packet")?,
        fragment,
    };
    transport.verify(length)
}

/// What IPv4 and IPv6 have in common.
struct Transport<'a> {
    protocol: u8,
    source: IpAddr,
    destination: IpAddr,
    payload: &'a [u8],
    fragment: bool,
}

impl Transport<'_> {
    fn verify(&self, length: usize) -> Result<Packet> {
        let mut ports = [0; 2];
        if !self.fragment {
            match self.protocol {
                1 => ensure!(sum(&[self.payload]) == 0xffff, "ICMP checksum"),
                6 => {
                    ports = self.ports().context("TCP header cut short")?;
                    let offset = *self.payload.get(12).context("TCP header cut short")?;
                    let header_length = usize::from(offset >> 4) * 4;
                    ensure!(
                        (20..=self.payload.len()).contains(&header_length),
                        "TCP header length {header_length} in {} bytes",
                        self.payload.len()
                    );
                    ensure!(self.checksum(self.payload) == 0xffff, "TCP checksum");
                }
                17 => {
                    ports = self.ports().context("UDP header cut short")?;
                    let length = usize::from(u16_at(self.payload, 4)?);
                    ensure!(
                        (8..=self.payload.len()).contains(&length),
                        "UDP length {length} in {} bytes",
                        self.payload.len()
                    );
                    if u16_at(self.payload, 6)? == 0 {
                        ensure!(self.source.is_ipv4(), "UDP checksum 0 over IPv6");
                    } else {
                        let datagram = &self.payload[..length];
                        ensure!(self.checksum(datagram) == 0xffff, "UDP checksum");
                    }
                }
                58 => ensure!(self.checksum(self.payload) == 0xffff, "ICMPv6 checksum"),
                _ => {}
            }
        }
        Ok(Packet {
            protocol: self.protocol,
            source: SocketAddr::new(self.source, ports[0]),
            destination: SocketAddr::new(self.destination, ports[1]),
            length: length as u64,
            fragment: self.fragment,
        })
    }

    fn ports(&self) -> Result<[u16; 2]> {
        Ok([u16_at(self.payload, 0)?, u16_at(self.payload, 2)?])
    }

    /// The sum of pseudo header and payload: 0xffff if the checksum is right.
    fn checksum(&self, payload: &[u8]) -> u16 {
        let tail = [&(payload.len() as u32).to_be_bytes()[..], &[0, 0, 0, self.protocol]].concat();
        match (self.source, self.destination) {
            (IpAddr::V4(a), IpAddr::V4(b)) => sum(&[&a.octets(), &b.octets(), &tail, payload]),
            (IpAddr::V6(a), IpAddr::V6(b)) => sum(&[&a.octets(), &b.octets(), &tail, payload]),
            _ => unreachable!("both addresses come from one header"),
        }
    }
}

/// The one's complement sum (RFC 1071) of parts, all but the last of even length.
fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum: u64 = 0;
    for part in parts {
        let (words, rest) = part.as_chunks::<4>();
        sum += words.iter().map(|word| u64::from(u32::from_be_bytes(*word))).sum::<u64>();
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        sum += u64::from(u32::from_be_bytes(last));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn bytes<const N: usize>(data: &[u8], at: usize) -> Result<[u8; N]> {
    data.get(at..)
        .and_then(|rest| rest.first_chunk::<N>())
        .copied()
        .ok_or_else(|| anyhow!("{N} bytes at {at} of {} are missing", data.len()))
}

fn u16_at(data: &[u8], at: usize) -> Result<u16> {
    bytes(data, at).map(u16::from_be_bytes)
}

/// Packets and bytes of IP packets, as portfwd counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub packets: u64,
    pub bytes: u64,
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.packets += other.packets;
        self.bytes += other.bytes;
    }
}

impl std::iter::Sum for Count {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self::default(), |mut all, count| {
            all += count;
            all
        })
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} packets, {} bytes", self.packets, self.bytes)
    }
}

/// What the packets of one line of a tally have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    pub direction: Direction,
    pub protocol: u8,
    pub source: SocketAddr,
    pub destination: SocketAddr,
}

/// Counts of frames, every one of which was verified. Holds a line for each flow, not the frames.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub flows: HashMap<Key, Count>,
    /// Frames whose lengths and checksums are right, those without IP included.
    pub verified: u64,
    /// Frames that are wrong.
    pub faulty: u64,
    /// What is wrong with the first of them.
    pub faults: Vec<String>,
}

impl Tally {
    const FAULTS: usize = 8;

    pub fn add(&mut self, frame: &Frame) {
        let result = if frame.unfilled {
            Err(anyhow!("checksum left to hardware"))
        } else {
            verify(&frame.data)
        };
        match result {
            Ok(packet) => {
                self.verified += 1;
                if let Some(packet) = packet {
                    let Packet { protocol, source, destination, length, .. } = packet;
                    let key = Key { direction: frame.direction, protocol, source, destination };
                    *self.flows.entry(key).or_default() += Count { packets: 1, bytes: length };
                }
            }
            Err(error) => {
                self.faulty += 1;
                if self.faults.len() < Self::FAULTS {
                    let (way, data) = (frame.direction, &frame.data);
                    self.faults.push(format!("{way:?}: {error:#}: {data:02x?}"));
                }
            }
        }
    }

    /// The sum of the flows that are of interest.
    pub fn count(&self, of_interest: impl Fn(&Key) -> bool) -> Count {
        self.flows.iter().filter(|(key, _)| of_interest(key)).map(|(_, count)| *count).sum()
    }

    /// Frames in all.
    pub fn frames(&self) -> u64 {
        self.verified + self.faulty
    }

    /// An error that shows the first wrong frames, if there is any.
    pub fn ensure_valid(&self) -> Result<()> {
        ensure!(
            self.faulty == 0,
            "{} of {} frames are wrong: {}",
            self.faulty,
            self.frames(),
            self.faults.join("; ")
        );
        Ok(())
    }
}

/// A capture of all frames of an interface in both directions. It ends when dropped.
#[derive(Debug)]
pub struct Capture<T> {
    interface: String,
    state: Arc<Mutex<T>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Capture<Vec<Frame>> {
    /// Keeps every frame.
    pub fn start(namespace: &Namespace, interface: &str) -> Result<Self> {
        Self::with(namespace, interface, Vec::new(), |frames, frame| frames.push(frame.clone()))
    }
}

impl Capture<Tally> {
    /// Verifies and counts every frame, and keeps none.
    pub fn tally(namespace: &Namespace, interface: &str) -> Result<Self> {
        Self::with(namespace, interface, Tally::default(), |tally, frame| tally.add(frame))
    }
}

impl<T: Send + 'static> Capture<T> {
    /// Calls `each` for every frame from now on, in order.
    pub fn with(
        namespace: &Namespace,
        interface: &str,
        state: T,
        mut each: impl FnMut(&mut T, &Frame) + Send + 'static,
    ) -> Result<Self> {
        let socket = namespace
            .enter(|| packet_socket(interface))
            .with_context(|| format!("cannot capture on {interface} in {}", namespace.name()))?;
        let state = Arc::new(Mutex::new(state));
        let stop = Arc::new(AtomicBool::new(false));
        let (its_state, its_stop) = (Arc::clone(&state), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            let mut buffer = vec![0; 1 << 17];
            let mut last = false;
            loop {
                match receive(&socket, &mut buffer)? {
                    Some(frame) => {
                        each(&mut its_state.lock().unwrap_or_else(PoisonError::into_inner), &frame);
                    }
                    None if last => break,
                    None => {}
                }
                // What has come before stop() still counts; what comes after, not even to be lost.
                if !last && its_stop.load(Ordering::Relaxed) {
                    refuse_frames(&socket)?;
                    last = true;
                }
            }
            let lost = lost_frames(&socket)?;
            ensure!(lost == 0, "{lost} frames were lost: nothing can be concluded from the rest");
            Ok(())
        });
        let interface = interface.to_owned();
        Ok(Self { interface, state, stop, thread: Some(thread) })
    }

    /// Looks at what there is so far.
    pub fn look<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        look(&self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Ends the capture once all frames that came before this call are taken up. An error if any
    /// was lost: then nothing can be concluded from the rest.
    pub fn stop(mut self) -> Result<T>
    where
        T: Default,
    {
        self.end().with_context(|| format!("capture on {}", self.interface))?;
        Ok(std::mem::take(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

impl<T> Capture<T> {
    fn end(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(_)) => bail!("its thread panicked"),
        }
    }
}

impl<T> Drop for Capture<T> {
    fn drop(&mut self) {
        // An error has no one to hear it: stop() would have told.
        let _ = self.end();
    }
}

/// A place on a wire, for a test that works packet by packet: what is sent here leaves as it is, and
/// what comes in can be looked at.
#[derive(Debug)]
pub struct Tap {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl Tap {
    pub fn open(namespace: &Namespace, interface: &str) -> Result<Self> {
        let socket = namespace
            .enter(|| packet_socket(interface))
            .with_context(|| format!("cannot tap {interface} in {}", namespace.name()))?;
        sys::set_option(socket.as_fd(), libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &1)?;
        Ok(Self { socket, buffer: vec![0; 1 << 17] })
    }

    /// Sends a frame as it is.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        // SAFETY: the kernel reads as many bytes as the frame has.
        let sent =
            unsafe { libc::send(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        if sent < 0 {
            let error = std::io::Error::last_os_error();
            return Err(error).with_context(|| format!("cannot send {} bytes", frame.len()));
        }
        Ok(())
    }

    /// The next frame that came in, or `None` if none came for a while.
    pub fn receive(&mut self) -> Result<Option<Frame>> {
        receive(&self.socket, &mut self.buffer)
    }
}

/// A socket that gets all frames of an interface from now on, in the namespace of this thread.
fn packet_socket(interface: &str) -> Result<OwnedFd> {
    // SAFETY: a bare system call. Protocol 0: no frames until it is bound to the interface.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    // SAFETY: the kernel has just made this descriptor for us alone.
    let socket = unsafe { OwnedFd::from_raw_fd(sys::check(fd)?) };
    // Room for a burst of some 200,000 full frames; memory is taken only as they come.
    sys::set_option(socket.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &(1 << 29))?;
    sys::set_option(socket.as_fd(), libc::SOL_PACKET, libc::PACKET_AUXDATA, &1)?;
    sys::set_receive_timeout(socket.as_fd(), Duration::from_millis(20))?;
    // SAFETY: sockaddr_ll is plain data; zero is a value of it.
    let mut address: libc::sockaddr_ll = unsafe { zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = sys::interface_index(interface)? as i32;
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the address has the given length.
    sys::check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
    Ok(socket)
}

/// The next frame, or `None` if none came for a while.
fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> Result<Option<Frame>> {
    // SAFETY: these are plain data; zero is a value of them.
    let (mut from, mut message): (libc::sockaddr_ll, libc::msghdr) = unsafe { zeroed() };
    let mut control = [0_u64; 8]; // aligned as cmsghdr
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    message.msg_name = (&raw mut from).cast();
    message.msg_namelen = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    // SAFETY: the message points at memory of ours, with the right lengths.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0) };
    if length < 0 {
        let error = std::io::Error::last_os_error();
        return match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::Interrupted => Ok(None),
            _ => Err(error.into()),
        };
    }
    ensure!(
        message.msg_flags & libc::MSG_TRUNC == 0,
        "a frame of more than {} bytes",
        buffer.len()
    );
    let mut data = buffer[..length as usize].to_vec();
    if ![libc::ARPHRD_ETHER, libc::ARPHRD_LOOPBACK].contains(&from.sll_hatype) {
        data.splice(..0, [[0; 12].as_slice(), &from.sll_protocol.to_ne_bytes()].concat());
    }
    let mut unfilled = false;
    // SAFETY: the kernel has filled in the control messages; auxdata is read unaligned.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        if !header.is_null() && (*header).cmsg_type == libc::PACKET_AUXDATA {
            let auxdata = libc::CMSG_DATA(header).cast::<libc::tpacket_auxdata>().read_unaligned();
            unfilled = auxdata.tp_status & libc::TP_STATUS_CSUMNOTREADY != 0;
            if auxdata.tp_status & libc::TP_STATUS_VLAN_VALID != 0 && data.len() >= 12 {
                let tag = [auxdata.tp_vlan_tpid.to_be_bytes(), auxdata.tp_vlan_tci.to_be_bytes()];
                data.splice(12..12, tag.concat());
            }
        }
    }
    let direction = match from.sll_pkttype {
        libc::PACKET_OUTGOING => Direction::Sent,
        _ => Direction::Received,
    };
    Ok(Some(Frame { direction, unfilled, data }))
}

/// Makes the kernel keep further frames from a socket, without counting them as lost.
fn refuse_frames(socket: &OwnedFd) -> Result<()> {
    // Classic BPF: return 0 bytes.
    let mut refuse = libc::sock_filter { code: 6, jt: 0, jf: 0, k: 0 };
    let program = libc::sock_fprog { len: 1, filter: &raw mut refuse };
    sys::set_option(socket.as_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)?;
    Ok(())
}

fn lost_frames(socket: &OwnedFd) -> Result<u32> {
    let mut statistics = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
    let mut length = size_of::<libc::tpacket_stats>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `statistics`.
    sys::check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            (&raw mut statistics).cast(),
            &raw mut length,
        )
    })?;
    Ok(statistics.tp_drops)
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::PacketBuilder;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const V4: [[u8; 4]; 2] = [[198, 51, 100, 2], [192, 168, 77, 10]];

    fn v6() -> [[u8; 16]; 2] {
        ["2001:db8:1::2", "fd77::10"].map(|text| text.parse::<Ipv6Addr>().unwrap().octets())
    }

    /// Every kind of packet that `verify` knows, over both IP versions, with odd and even payloads.
    fn packets() -> Vec<(&'static str, Vec<u8>)> {
        let mut packets = Vec::new();
        for size in [0, 1, 2, 3, 64, 1399] {
            let payload: Vec<u8> = (0..size).map(|i| (i * 7) as u8).collect();
            let v4 = || PacketBuilder::ethernet2(MAC, MAC).ipv4(V4[0], V4[1], 64);
            let v6 = || PacketBuilder::ethernet2(MAC, MAC).ipv6(v6()[0], v6()[1], 64);
            macro_rules! write {
                ($name:expr, $builder:expr) => {{
                    let mut frame = Vec::new();
                    $builder.write(&mut frame, &payload).unwrap();
                    packets.push(($name, frame));
                }};
            }
            write!("udp4", v4().udp(40_000, 27_015));
            write!("udp6", v6().udp(40_000, 27_015));
            write!("tcp4", v4().tcp(40_000, 80, 1, 1024));
            write!("tcp6", v6().tcp(40_000, 80, 1, 1024));
            write!("icmp4", v4().icmpv4_echo_request(1, 2));
            write!("icmp6", v6().icmpv6_echo_request(1, 2));
        }
        packets
    }

    #[test]
    fn what_others_build_is_valid() {
        for (name, frame) in packets() {
            let packet = verify(&frame).unwrap().unwrap();
            assert_eq!(packet.length, frame.len() as u64 - 14, "{name}");
            assert!(!packet.fragment);
            let ports = (packet.source.port(), packet.destination.port());
            let expected = match &name[..3] {
                "udp" => (40_000, 27_015),
                "tcp" => (40_000, 80),
                _ => (0, 0),
            };
            assert_eq!(ports, expected, "{name}");
            assert_eq!(packet.source.is_ipv4(), name.ends_with('4'));
        }
    }

    /// One changed bit in anything that a checksum or a length is over must show.
    #[test]
    fn a_flipped_bit_shows() {
        for (name, frame) in packets() {
            for bit in 14 * 8..frame.len() * 8 {
                let byte = bit / 8;
                // Over IPv6 the traffic class, flow label and hop limit are covered by nothing.
                if name.ends_with('6') && matches!(byte, 14..=17 | 21) && bit >= 14 * 8 + 4 {
                    continue;
                }
                let mut changed = frame.clone();
                changed[byte] ^= 0x80 >> (bit % 8);
                // The protocol decides what is verified: another one may be nothing we know.
                if name.ends_with('6') && byte == 20 {
                    continue;
                }
                assert!(verify(&changed).is_err(), "{name}: bit {bit} of {}", frame.len() * 8);
            }
        }
    }

    #[test]
    fn a_cut_frame_shows() {
        for (name, frame) in packets() {
            for length in 0..frame.len() {
                assert!(verify(&frame[..length]).is_err(), "{name}: {length} of {}", frame.len());
            }
        }
    }

    #[test]
    fn padding_is_not_the_packet() {
        for (name, mut frame) in packets() {
            let length = verify(&frame).unwrap().unwrap().length;
            frame.extend([0xa5; 9]);
            assert_eq!(verify(&frame).unwrap().unwrap().length, length, "{name}");
        }
    }

    #[test]
    fn udp_may_go_without_checksum_over_ipv4_only() {
        for (name, mut frame) in packets() {
            let at = match name {
                "udp4" => 14 + 20 + 6,
                "udp6" => 14 + 40 + 6,
                _ => continue,
            };
            frame[at..at + 2].fill(0);
            assert_eq!(verify(&frame).is_ok(), name == "udp4");
        }
    }

    #[test]
    fn of_fragments_only_the_ip_header_is_verified() {
        let (_, mut frame) = packets().into_iter().find(|(name, _)| *name == "udp4").unwrap();
        frame[14 + 6] |= 0x20; // more fragments
        frame[14 + 10..14 + 12].fill(0);
        let checksum = !sum(&[&frame[14..34]]);
        frame[14 + 10..14 + 12].copy_from_slice(&checksum.to_be_bytes());
        *frame.last_mut().unwrap() ^= 1;
        let packet = verify(&frame).unwrap().unwrap();
        assert!(packet.fragment);
        assert_eq!(packet.source.port(), 0);
        frame[14 + 8] ^= 1;
        assert!(verify(&frame).is_err());
    }

    #[test]
    fn extension_headers_are_walked() {
        for (name, frame) in packets().into_iter().filter(|(name, _)| name.ends_with('6')) {
            // Hop-by-hop options of 16 bytes, then an atomic fragment header.
            let protocol = frame[20];
            let mut options = vec![44, 1, 1, 12];
            options.resize(16, 0);
            options.extend([protocol, 0, 0, 0, 1, 2, 3, 4]);
            let mut extended = frame.clone();
            extended[20] = 0;
            let length = (frame.len() - 54 + options.len()) as u16;
            extended[18..20].copy_from_slice(&length.to_be_bytes());
            extended.splice(54..54, options);
            let (packet, plain) =
                (verify(&extended).unwrap().unwrap(), verify(&frame).unwrap().unwrap());
            assert_eq!(packet, Packet { length: plain.length + 24, ..plain }, "{name}");
            *extended.last_mut().unwrap() ^= 1;
            assert!(verify(&extended).is_err(), "{name}");
        }
    }

    #[test]
    fn what_is_not_ip_is_left_alone() {
        let mut arp = vec![0xff; 42];
        arp[12..14].copy_from_slice(&[0x08, 0x06]);
        assert_eq!(verify(&arp).unwrap(), None);
    }

    #[test]
    fn a_tally_counts_by_flow_and_keeps_faults() {
        let mut tally = Tally::default();
        for (_, data) in packets() {
            tally.add(&Frame { direction: Direction::Sent, unfilled: false, data });
        }
        let udp = tally.count(|key| key.protocol == 17 && key.source.is_ipv4());
        assert_eq!(udp, Count { packets: 6, bytes: 6 * 28 + 1 + 2 + 3 + 64 + 1399 });
        assert!(tally.ensure_valid().is_ok());
        assert_eq!(tally.verified, 36);

        let (_, data) = packets().swap_remove(0);
        tally.add(&Frame { direction: Direction::Received, unfilled: true, data });
        assert_eq!((tally.faulty, tally.verified), (1, 36));
        assert!(tally.ensure_valid().unwrap_err().to_string().contains("left to hardware"));
    }
}

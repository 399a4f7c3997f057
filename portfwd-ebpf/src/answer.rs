//! ICMP errors that portfwd itself sends to a client. The stack cannot: it would quote the packet as it
//! is after the translation, or take it for the box's own.

use network_types::ip::{Ipv4Hdr, Ipv6Hdr};

use crate::checksum::{Change, Checksum};
use crate::icmp::{Icmp, IcmpHdr};
use crate::packet::{Frame, TCP, UDP};

/// What the error is about: an MTU that the packet is larger than, or 0 that the last hop was taken.
// Not an enum: the verifier minds what is undefined in one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct About(u32);

impl About {
    pub const TIME_EXCEEDED: Self = Self(0);
    /// There is no error.
    pub const NOTHING: Self = Self(u32::MAX);

    #[inline(always)]
    pub const fn too_big(mtu: u32) -> Self {
        Self(if mtu == 0 { 1 } else { mtu })
    }
}

/// An ICMP error about a packet, to be sent in its place, from where the packet was sent to.
///
/// Of the frame that the packet came in, all stays behind the Ethernet header, as far as it is quoted.
/// So the frame is first [cut](Self::quoted) behind that, and [made longer](Self::growth) before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Answer {
    about: About,
    is_v4: bool,
    /// Bytes of the packet that are quoted.
    quoted: u16,
    /// By which device it leaves, as [`Verdict::Redirect`](crate::path::Verdict::Redirect).
    pub device: u32,
}

impl Answer {
    /// An error about the packet that begins with `ip`.
    #[inline(always)]
    pub fn new<const N: usize, I: Icmp<N>>(about: About, ip: &I, device: u32) -> Self {
        let quoted =
            usize::from(ip.length()).min(I::LONGEST_ERROR - size_of::<I>() - size_of::<IcmpHdr>());
        Self { about, is_v4: N == 4, quoted: quoted as u16, device }
    }

    /// The same, but of a packet of which only this many bytes can be quoted.
    #[inline(always)]
    pub fn of_first(self, bytes: usize) -> Self {
        Self { quoted: bytes.min(self.quoted.into()) as u16, ..self }
    }

    /// Bytes of the packet that stay.
    #[inline(always)]
    pub fn quoted(&self) -> usize {
        self.quoted.into()
    }

    /// Bytes before them that the frame has to have for headers.
    #[inline(always)]
    pub fn growth(&self) -> usize {
        let ip = if self.is_v4 { Ipv4Hdr::LEN } else { Ipv6Hdr::LEN };
        ip + size_of::<IcmpHdr>()
    }

    /// Writes all headers into the frame: behind the link header there is room for them, then comes what is
    /// quoted. If the transport checksum of that is `unfilled`, whoever sends the frame fills it in, over
    /// all that follows. `None` if the frame is too short.
    #[inline(always)]
    pub fn write(&self, frame: Frame<'_>, unfilled: bool) -> Option<()> {
        if self.is_v4 {
            self.write_as::<4, Ipv4Hdr>(frame, unfilled)
        } else {
            self.write_as::<16, Ipv6Hdr>(frame, unfilled)
        }
    }

    #[inline(always)]
    fn write_as<const N: usize, I: Icmp<N>>(
        &self,
        mut frame: Frame<'_>,
        unfilled: bool,
    ) -> Option<()> {
        let mut link = frame.take_link()?;
        let about: I = frame.peek(size_of::<I>() + size_of::<IcmpHdr>())?;
        let ip: &mut I = frame.take()?;
        let icmp: &mut IcmpHdr = frame.take()?;
        if let Some(ethernet) = link.ethernet() {
            let back = ethernet.back();
            ethernet.set_link(&back);
        }
        let len = self.quoted + size_of::<IcmpHdr>() as u16;
        let covered = ip.begin_error(about.destination(), about.source(), len);
        let ([kind, code], rest) = match self.about {
            About::TIME_EXCEEDED => (I::TIME_EXCEEDED, [0; 4]),
            About(mtu) => (I::TOO_BIG, I::mtu(mtu)),
        };
        icmp.kind = [kind, code];
        icmp.rest = rest;
        let [a, b, c, d] = rest;
        let quoted =
            if unfilled { filled::<N, I>(&frame)? } else { sum(&mut frame, I::LONGEST_ERROR) };
        let sum = quoted.and(covered).word([kind, code]).word([a, b]).word([c, d]);
        icmp.checksum = Checksum::EMPTY.update(sum).0;
        Some(())
    }
}

/// The sum of what is quoted once its transport checksum is filled in. From the transport header on, all
/// sums up to what stands there now, inverted: the sum of the pseudo header. `None` if that is not where it
/// can be known.
#[inline(always)]
fn filled<const N: usize, I: Icmp<N>>(frame: &Frame<'_>) -> Option<Change> {
    let ip: I = frame.peek(0)?;
    let (header, protocol) = ip.plain()?;
    let place = match protocol {
        TCP => 16,
        UDP => 6,
        _ => return None,
    };
    let [high, low]: [u8; 2] = frame.peek(header + place)?;
    Some(ip.sum().word([!high, !low]))
}

/// The sum of the rest of the frame, up to `most` bytes.
#[inline(always)]
fn sum(frame: &mut Frame<'_>, most: usize) -> Change {
    let mut sum = Change::default();
    for _ in 0..most / 2 {
        let Some(word) = frame.take::<[u8; 2]>() else { break };
        sum = sum.word(*word);
    }
    if let Some([last]) = frame.take::<[u8; 1]>() {
        sum = sum.word([*last, 0]);
    }
    sum
}

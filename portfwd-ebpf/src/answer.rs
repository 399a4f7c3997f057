//! ICMP errors that portfwd itself sends to a client. The stack cannot: it would quote the packet as it
//! is after the translation, or take it for the box's own.

use network_types::ip::{Ipv4Hdr, Ipv6Hdr};

use crate::checksum::{Change, Checksum};
use crate::icmp::{Icmp, IcmpHdr};
use crate::packet::{EtherType, Ethernet, Frame};

/// What the error is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum About {
    /// The last hop was taken.
    TimeExceeded,
    /// The packet is larger than this MTU.
    TooBig(u32),
}

/// An ICMP error about a packet, to be sent in its place, from where the packet was sent to.
///
/// Of the frame that the packet came in, all stays behind the Ethernet header, as far as it is quoted.
/// So the frame is first [made longer](Self::growth) at its front and [cut](Self::cut) at its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Answer {
    about: About,
    is_v4: bool,
    /// Bytes of the packet that are quoted.
    quoted: u16,
    /// How many bytes the frame is too long at its end.
    pub cut: u32,
    /// By which row of `DEVICES` it leaves.
    pub device: u32,
}

impl Answer {
    /// An error about the packet that begins with `ip`, in a frame that had `available` from there on.
    #[inline(always)]
    pub fn new<const N: usize, I: Icmp<N>>(
        about: About,
        ip: &I,
        available: usize,
        device: u32,
    ) -> Self {
        let quoted =
            usize::from(ip.length()).min(I::LONGEST_ERROR - size_of::<I>() - size_of::<IcmpHdr>());
        let cut = (available - quoted) as u32;
        Self { about, is_v4: N == 4, quoted: quoted as u16, cut, device }
    }

    /// How many bytes longer the frame is at its front.
    #[inline(always)]
    pub fn growth(&self) -> usize {
        let ip = if self.is_v4 { Ipv4Hdr::LEN } else { Ipv6Hdr::LEN };
        ip + size_of::<IcmpHdr>()
    }

    /// Writes all headers into the frame. `None` if the frame is too short.
    #[inline(always)]
    pub fn write(&self, frame: Frame<'_>) -> Option<()> {
        if self.is_v4 {
            self.write_as::<4, Ipv4Hdr>(EtherType::IPV4, frame)
        } else {
            self.write_as::<16, Ipv6Hdr>(EtherType::IPV6, frame)
        }
    }

    #[inline(always)]
    fn write_as<const N: usize, I: Icmp<N>>(
        &self,
        ether_type: EtherType,
        mut frame: Frame<'_>,
    ) -> Option<()> {
        let headers = size_of::<I>() + size_of::<IcmpHdr>();
        // Where the packet's own headers were, of which the first is written over.
        let came: Ethernet = frame.peek(headers)?;
        let about: I = frame.peek(size_of::<Ethernet>() + headers)?;
        let ethernet: &mut Ethernet = frame.take()?;
        let ip: &mut I = frame.take()?;
        let icmp: &mut IcmpHdr = frame.take()?;
        ethernet.set_link(&came.back());
        ethernet.set_ether_type(ether_type);
        let len = self.quoted + size_of::<IcmpHdr>() as u16;
        let covered = ip.begin_error(about.destination(), about.source(), len);
        let ([kind, code], rest) = match self.about {
            About::TimeExceeded => (I::TIME_EXCEEDED, [0; 4]),
            About::TooBig(mtu) => (I::TOO_BIG, I::mtu(mtu)),
        };
        icmp.kind = [kind, code];
        icmp.rest = rest;
        let [a, b, c, d] = rest;
        let sum = sum::<N, I>(&mut frame).and(covered).word([kind, code]).word([a, b]).word([c, d]);
        icmp.checksum = Checksum::EMPTY.update(sum).0;
        Some(())
    }
}

/// The sum of what is quoted: the rest of the frame.
#[inline(always)]
fn sum<const N: usize, I: Icmp<N>>(frame: &mut Frame<'_>) -> Change {
    let mut sum = Change::default();
    for _ in 0..I::LONGEST_ERROR / 2 {
        let Some(word) = frame.take::<[u8; 2]>() else { break };
        sum = sum.word(*word);
    }
    if let Some([last]) = frame.take::<[u8; 1]>() {
        sum = sum.word([*last, 0]);
    }
    sum
}

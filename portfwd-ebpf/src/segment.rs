//! The beginning of a transport header of any protocol, in a packet or quoted in an ICMP error: the
//! fields that a translation changes, as far as they are there.

use network_types::{tcp::TcpHdr, udp::UdpHdr};

use crate::checksum::{Change, Checksum};
use crate::packet::{Check, Frame, Header, ICMPV6, TCP, UDP};
use crate::path::Kernel;
use crate::table::{Direction, Passed, Port};

/// IP protocol numbers.
const DCCP: u8 = 33;
const AUTHENTICATION: u8 = 51;
const UDP_LITE: u8 = 136;

/// The fields that a translation changes.
pub struct Segment<'a> {
    protocol: u8,
    /// Not of protocols whose ports are not translated.
    ports: Option<&'a mut PortsHdr>,
    /// One that covers the addresses.
    checksum: Option<&'a mut [u8; 2]>,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct PortsHdr {
    source: [u8; 2],
    destination: [u8; 2],
}

// SAFETY: byte arrays.
unsafe impl Header for PortsHdr {}

impl<'a> Segment<'a> {
    /// Takes the header of `protocol` which has `len` bytes for itself and its payload; with `cut`
    /// more of the payload comes in other fragments.
    #[inline(always)]
    pub fn take(
        frame: &mut Frame<'a>,
        protocol: u8,
        len: usize,
        cut: bool,
    ) -> Result<Self, Passed> {
        let fits = match protocol {
            TCP => {
                let tcp: TcpHdr = frame.peek(0).ok_or(Passed::Malformed)?;
                let header = usize::from(tcp.doff()) * 4;
                header >= TcpHdr::LEN && header <= len
            }
            UDP => {
                let udp: UdpHdr = frame.peek(0).ok_or(Passed::Malformed)?;
                let datagram = usize::from(udp.len());
                datagram >= UdpHdr::LEN && (datagram <= len || cut)
            }
            // Its sums are over the addresses, and made with a key.
            AUTHENTICATION => return Err(Passed::Protocol),
            _ => true,
        };
        if fits { Self::quoted(frame, protocol, len) } else { Err(Passed::Malformed) }
    }

    /// Takes what an ICMP error quotes, `len` bytes: eight at least (RFC 792).
    #[inline(always)]
    pub fn quoted(frame: &mut Frame<'a>, protocol: u8, len: usize) -> Result<Self, Passed> {
        let mut segment = Self { protocol, ports: None, checksum: None };
        let place = match protocol {
            TCP | UDP | DCCP | UDP_LITE | ICMPV6 if len < 8 => return Err(Passed::Malformed),
            TCP => {
                segment.ports = Some(frame.take().ok_or(Passed::Malformed)?);
                if len < 18 {
                    return Ok(segment);
                }
                12
            }
            UDP => {
                segment.ports = Some(frame.take().ok_or(Passed::Malformed)?);
                2
            }
            DCCP | UDP_LITE => 6,
            ICMPV6 => 2,
            _ => return Ok(segment),
        };
        frame.skip(place);
        segment.checksum = Some(frame.take().ok_or(Passed::Malformed)?);
        Ok(segment)
    }

    /// The IP protocol number.
    #[inline(always)]
    pub fn protocol(&self) -> u8 {
        self.protocol
    }

    /// The ports: source, destination.
    #[inline(always)]
    pub fn ports(&self) -> (Port, Port) {
        let ports = self.ports.as_ref();
        ports
            .map_or((Port::NONE, Port::NONE), |ports| (Port(ports.source), Port(ports.destination)))
    }

    #[inline(always)]
    fn set_port(&mut self, direction: Direction, port: Port) -> Change {
        let Some(ports) = &mut self.ports else { return Change::default() };
        let field = match direction {
            Direction::Forward => &mut ports.destination,
            Direction::Reply => &mut ports.source,
        };
        let change = Change::default().field(*field, port.0);
        *field = port.0;
        change
    }

    /// Sets the port that `direction` translates and repairs the checksum, which `addresses` changed
    /// as well.
    #[inline(always)]
    pub fn rewrite<K: Kernel>(
        &mut self,
        kernel: &K,
        direction: Direction,
        port: Port,
        addresses: Change,
    ) {
        let is_udp = self.protocol == UDP;
        if is_udp || self.protocol == TCP {
            let ports = self.set_port(direction, port);
            if let Some(field) = &mut self.checksum {
                kernel.repair(Check { field, is_udp }, addresses, ports);
            }
        } else {
            self.rewrite_quoted(direction, port, addresses);
        }
    }

    /// Whether a checksum covers it.
    #[inline(always)]
    pub fn has_checksum(&self) -> bool {
        self.checksum.is_some()
    }

    /// The same as [`rewrite`](Self::rewrite), of what an ICMP error quotes. Returns what changed in the bytes of the header.
    #[inline(always)]
    pub fn rewrite_quoted(
        &mut self,
        direction: Direction,
        port: Port,
        addresses: Change,
    ) -> Change {
        let mut change = self.set_port(direction, port);
        if let Some(field) = &mut self.checksum {
            let old = Checksum(**field);
            let covered = addresses.and(change);
            let new = match self.protocol {
                // Zero is what neither of them ever is, but without a checksum.
                UDP | UDP_LITE => old.update_udp(covered),
                _ => old.update(covered),
            };
            change = change.field(old.0, new.0);
            **field = new.0;
        }
        change
    }
}

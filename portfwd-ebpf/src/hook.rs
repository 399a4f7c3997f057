//! Where programs are attached: XDP or TC, and what differs between them.

use aya_ebpf::{EbpfContext, maps::ProgramArray};
use portfwd_ebpf::{
    answer::Answer,
    checksum::Change,
    cross::Conversion,
    packet::{Check, EtherType, Frame},
    path::Verdict,
    table::{self, Interface, LinkAddresses},
};

pub use self::{tc::Tc, xdp::Xdp};

mod tc;
mod xdp;

/// What a program at a hook has.
pub trait Hook {
    const HOOK: table::Hook;
    type Context: EbpfContext;
    type Action;

    fn context(&self) -> &Self::Context;
    fn frame(&self) -> Frame<'_>;
    /// The index of the interface that the packet came by.
    fn ingress(&self) -> u32;
    /// The programs of the detour and for SYNs, and those of flows.
    fn programs() -> [&'static ProgramArray; 2];
    /// Sees to it that headers in headers are in the frame, if the packet has them.
    fn pull(&self);

    // The rest is as in `Kernel`.
    fn ether_type(&self) -> Option<EtherType>;
    fn available(&self, frame: &Frame<'_>) -> usize;
    fn beyond(&self) -> usize;
    fn segment(&self) -> u32;
    fn is_merged(&self, length: u16, ingress: Option<Interface>) -> bool;
    fn device(&self, index: u32, interface: &Interface) -> Option<u32>;
    fn is_sent_by(&self, device: u32) -> bool;
    fn back(&self, ingress: Option<Interface>) -> Option<u32>;
    fn repair(&self, check: Check<'_>, addresses: Change, ports: Change);
    fn unbalanced(&self, change: Change);
    fn is_foreign(&self) -> bool;
    fn is_sent(&self) -> bool;
    fn leave_by(&self, link: &LinkAddresses);

    /// From the path's verdict to the hook's.
    fn act(&self, verdict: Verdict) -> Self::Action;
    /// Gives a packet that comes with addresses of `N` bytes, an ICMP `ERROR` or not, the headers of the other
    /// family. `None` if there is no room for them.
    #[inline(always)]
    fn convert<const N: usize, const ERROR: bool>(&self, conversion: &Conversion) -> Option<()> {
        match (N, ERROR) {
            (4, false) => self.put_head::<N, 20, 40>(conversion),
            (_, false) => self.put_head::<N, 40, 20>(conversion),
            (4, true) => self.put_head::<N, 48, 88>(conversion),
            (_, true) => self.put_head::<N, 88, 48>(conversion),
        }
    }
    /// Has headers of `NEW` bytes stand behind the link header in place of `OLD` bytes, and all checksums be right.
    fn put_head<const N: usize, const OLD: usize, const NEW: usize>(
        &self,
        conversion: &Conversion,
    ) -> Option<()>;
    /// Sends an answer in the frame of the packet that it is about.
    fn answer(&self, answer: &Answer) -> Self::Action;
}

/// What a frame carries once a packet with addresses of `N` bytes has those of the other family.
#[inline(always)]
const fn other_type<const N: usize>() -> EtherType {
    if N == 4 { EtherType::IPV6 } else { EtherType::IPV4 }
}

//! XDP, in the driver or generic.

use aya_ebpf::{
    bindings::xdp_action,
    helpers::generated::{
        bpf_xdp_adjust_head, bpf_xdp_adjust_tail, bpf_xdp_get_buff_len, bpf_xdp_store_bytes,
    },
    maps::ProgramArray,
    programs::XdpContext,
};
use portfwd_ebpf::{
    answer::Answer,
    checksum::Change,
    cross::Conversion,
    packet::{Check, EtherType, Ethernet, Frame},
    path::Verdict,
    table::{self, Interface, LinkAddresses},
};

use super::{Hook, other_type};
use crate::{DETOURS, DEVICES, PARTS};

/// The frame may be in several pieces, of which programs see the first.
pub struct Xdp(pub XdpContext);

/// Marks the numbers of devices that can transmit frames in several pieces. Others are rows of [`DEVICES`].
const PIECES: u32 = 1 << 31;

impl Xdp {
    /// Bytes of all pieces.
    #[inline(always)]
    fn length(&self) -> usize {
        // SAFETY: of this run's context.
        unsafe { bpf_xdp_get_buff_len(self.0.ctx) as usize }
    }

    /// Bytes of the first.
    #[inline(always)]
    fn first(&self) -> usize {
        // The mask has the compiler do no sums with the end of the frame, which the verifier does not let
        // it do.
        self.frame().remaining() & 0xffff
    }

    #[inline(always)]
    fn redirect(device: u32) -> u32 {
        DEVICES.redirect(device & !PIECES, 0).unwrap_or(xdp_action::XDP_DROP)
    }

    /// Moves the link header to the front, from where it is.
    #[inline(always)]
    fn move_link(&self, place: usize) -> Option<()> {
        let link: Ethernet = self.frame().peek(place)?;
        *self.frame().take()? = link;
        Some(())
    }
}
impl Hook for Xdp {
    const HOOK: table::Hook = table::Hook::Xdp;
    type Context = XdpContext;
    type Action = u32;

    #[inline(always)]
    fn context(&self) -> &XdpContext {
        &self.0
    }

    #[inline(always)]
    fn frame(&self) -> Frame<'_> {
        // SAFETY: the frame belongs to this run of the program; the verifier checks each access.
        unsafe { Frame::from_addresses(self.0.data(), self.0.data_end(), size_of::<Ethernet>()) }
    }

    #[inline(always)]
    fn ingress(&self) -> u32 {
        self.0.ingress_ifindex() as u32
    }

    #[inline(always)]
    fn programs() -> [&'static ProgramArray; 2] {
        [&DETOURS, &PARTS]
    }

    #[inline(always)]
    fn pull(&self) {}

    #[inline(always)]
    fn ether_type(&self) -> Option<EtherType> {
        None
    }

    #[inline(always)]
    fn available(&self, frame: &Frame<'_>) -> usize {
        frame.remaining()
    }

    #[inline(always)]
    fn beyond(&self) -> usize {
        self.length().wrapping_sub(self.first())
    }

    #[inline(always)]
    fn segment(&self) -> u32 {
        0
    }

    #[inline(always)]
    fn is_merged(&self, length: u16, ingress: Option<Interface>) -> bool {
        ingress.is_some_and(|ingress| u32::from(length) > ingress.mtu)
    }

    #[inline(always)]
    fn device(&self, _: u32, interface: &Interface) -> Option<u32> {
        let pieces = if interface.has(Interface::TRANSMITS_PIECES) { PIECES } else { 0 };
        interface.has(Interface::TRANSMITS).then_some(interface.device | pieces)
    }

    #[inline(always)]
    fn is_sent_by(&self, device: u32) -> bool {
        device & PIECES != 0 || self.beyond() == 0
    }

    #[inline(always)]
    fn back(&self, ingress: Option<Interface>) -> Option<u32> {
        self.device(0, &ingress?)
    }

    #[inline(always)]
    fn repair(&self, check: Check<'_>, addresses: Change, ports: Change) {
        check.update(addresses.and(ports));
    }

    #[inline(always)]
    fn unbalanced(&self, _: Change) {}

    #[inline(always)]
    fn is_foreign(&self) -> bool {
        false
    }

    #[inline(always)]
    fn is_sent(&self) -> bool {
        false
    }

    #[inline(always)]
    fn leave_by(&self, _: &LinkAddresses) {}

    #[inline(always)]
    fn act(&self, verdict: Verdict) -> u32 {
        match verdict {
            Verdict::Redirect(device) => Self::redirect(device),
            Verdict::Stack(_)
            | Verdict::Pass(_)
            | Verdict::ForwardDetour(_)
            | Verdict::ReplyDetour(_)
            | Verdict::Flow(..) => xdp_action::XDP_PASS,
            Verdict::Drop(_) | Verdict::Syn(_) => xdp_action::XDP_DROP,
        }
    }

    #[inline(always)]
    fn put_head<const N: usize, const OLD: usize, const NEW: usize>(
        &self,
        conversion: &Conversion,
    ) -> Option<()> {
        let mut link: Ethernet = self.frame().peek(0)?;
        link.set_ether_type(other_type::<N>());
        if let Some(addresses) = conversion.link() {
            link.set_link(addresses);
        }
        // SAFETY: the context is this run's. What was read from the frame before is not used any more.
        if unsafe { bpf_xdp_adjust_head(self.0.ctx, OLD as i32 - NEW as i32) } != 0 {
            return None;
        }
        *self.frame().take()? = link;
        let behind = size_of::<Ethernet>() as u32;
        let head = (&raw const *conversion.head::<NEW>()).cast_mut().cast();
        // SAFETY: as above; so many bytes are there.
        let stored = unsafe { bpf_xdp_store_bytes(self.0.ctx, behind, head, NEW as u32) };
        (stored == 0).then_some(())
    }

    #[inline(always)]
    fn answer(&self, answer: &Answer) -> u32 {
        let xdp = self.0.ctx;
        let growth = answer.growth();
        // What is behind the first piece goes.
        let answer = &answer.of_first(self.first().saturating_sub(size_of::<Ethernet>()));
        let cut = self.length().wrapping_sub(size_of::<Ethernet>() + answer.quoted());
        // SAFETY: the context is this run's. What was read from the frame before is not used any more.
        let resized = unsafe {
            bpf_xdp_adjust_tail(xdp, -(cut as i32)) == 0
                && bpf_xdp_adjust_head(xdp, -(growth as i32)) == 0
        };
        if resized
            && self.move_link(growth).is_some()
            && answer.write(self.frame(), false).is_some()
        {
            Self::redirect(answer.device)
        } else {
            xdp_action::XDP_DROP
        }
    }
}

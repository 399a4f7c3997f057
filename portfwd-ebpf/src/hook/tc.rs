//! TC.

use core::ptr::null_mut;

use aya_ebpf::{
    bindings::{
        BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6, BPF_F_MARK_MANGLED_0,
        BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_adj_room_mode,
    },
    helpers::generated::{
        bpf_csum_update, bpf_l4_csum_replace, bpf_redirect, bpf_redirect_neigh,
        bpf_skb_adjust_room, bpf_skb_change_head, bpf_skb_change_proto, bpf_skb_change_tail,
        bpf_skb_pull_data, bpf_skb_store_bytes, bpf_skb_vlan_pop,
    },
    maps::ProgramArray,
    programs::TcContext,
};
use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    udp::UdpHdr,
};
use portfwd_ebpf::{
    answer::Answer,
    checksum::Change,
    cross::Conversion,
    icmp::IcmpHdr,
    packet::{Check, EtherType, Ethernet, Frame},
    path::Verdict,
    table::{self, Interface, LinkAddresses, ToStack},
};

use super::{Hook, other_type};
use crate::{FIB, LEAVE_BY, TC_DETOURS, TC_PARTS};

/// TC: its ingress, and its egress for what the box sends.
pub struct Tc {
    ctx: TcContext,
    /// Bytes of the link header: that of Ethernet or none.
    link: usize,
}

/// What stands in the packet's control block, where it stays for the programs that are jumped to and until
/// the last has ended. The place of the checksum that is to be repaired, 0 for none, and [`IS_UDP`].
const CHECK: usize = 0;
/// What changed in the pseudo header that it covers, and in the ports.
const ADDRESSES: usize = 1;
const PORTS: usize = 2;
/// What no checksum makes up for.
const UNBALANCED: usize = 3;
/// [`Tc::link`], and [`SENT`].
const LINK: usize = 4;

/// Added to [`LINK`] at the egress.
const SENT: u32 = 1 << 8;
/// Added to [`LINK`] when the packet has got the headers of the other family, and all checksums are right.
const SETTLED: u32 = 1 << 9;

/// Added to [`CHECK`].
const IS_UDP: u32 = 1 << 16;

/// What an answer is longer by.
const ICMP_IN_IPV4: usize = Ipv4Hdr::LEN + size_of::<IcmpHdr>();

/// The index of the loopback interface, the same everywhere.
const LOOPBACK: u32 = 1;

/// Marks the numbers of devices without link header. Others are their index.
const BARE: u32 = 1 << 31;

impl Tc {
    /// In the program that is attached.
    #[inline(always)]
    pub fn enter(ctx: TcContext, link: usize) -> Self {
        Self { ctx, link }.begin(0)
    }

    /// The same at the egress.
    #[inline(always)]
    pub fn leave(ctx: TcContext, link: usize) -> Self {
        Self { ctx, link }.begin(SENT)
    }

    #[inline(always)]
    fn begin(self, sent: u32) -> Self {
        let tc = self;
        let link = tc.link;
        // All of it: what was there before means something else to the kernel's own lookups.
        for place in [CHECK, ADDRESSES, PORTS, UNBALANCED] {
            tc.put(place, 0);
        }
        tc.put(LINK, link as u32 | sent);
        // IP and ports. What is behind them is TCP's, and of no concern but its length.
        tc.pull_first(if tc.protocol() == EtherType::IPV6 { link + 60 } else { link + 40 });
        tc
    }

    /// In one that another jumped to.
    #[inline(always)]
    pub fn again(ctx: TcContext) -> Self {
        let tc = Self { ctx, link: 0 };
        let link = tc.get(LINK) as usize & size_of::<Ethernet>();
        Self { link, ..tc }
    }

    /// Whether the packet at the egress is none of the box's own: it came by an interface.
    #[inline(always)]
    pub fn is_passing(&self) -> bool {
        // SAFETY: of this run's context.
        self.is_sent() && unsafe { (*self.ctx.skb.skb).ingress_ifindex } != 0
    }

    #[inline(always)]
    fn get(&self, place: usize) -> u32 {
        // SAFETY: of this run's context.
        unsafe { (&raw const (*self.ctx.skb.skb).cb[place]).read_volatile() }
    }

    #[inline(always)]
    fn put(&self, place: usize, value: u32) {
        // SAFETY: as above.
        unsafe { (&raw mut (*self.ctx.skb.skb).cb[place]).write_volatile(value) }
    }

    #[inline(always)]
    fn protocol(&self) -> EtherType {
        // Two bytes as on the wire.
        EtherType::of((self.ctx.skb.protocol() as u16).to_ne_bytes())
    }

    /// Sees to it that the first bytes are in the frame. Of a super-packet, which may be a list of
    /// datagrams, not more than the first.
    #[inline(always)]
    fn pull_first(&self, most: usize) {
        const SHORTEST: usize = Ipv4Hdr::LEN + UdpHdr::LEN;
        let segment = self.segment() as usize;
        let first = if segment == 0 { most } else { self.link + SHORTEST + segment };
        let bytes = (self.ctx.len() as usize).min(most).min(first);
        if self.ctx.data().wrapping_add(bytes) > self.ctx.data_end() {
            // SAFETY: the context is this run's, and nothing was read from the frame yet. What cannot be
            // pulled is found to be missing.
            unsafe { bpf_skb_pull_data(self.ctx.skb.skb, bytes as u32) };
        }
    }

    /// Has the kernel repair checksums, its own of the whole packet among them.
    #[inline(always)]
    fn settle(&self, verdict: Verdict) {
        if self.get(LINK) & SETTLED != 0 {
            return;
        }
        self.settle_transport(0);
        let mut rest = Change::from_sum(self.get(UNBALANCED));
        if self.protocol() == EtherType::IPV6 {
            // It takes addresses for covered by the IP header's checksum, which IPv6 does not have.
            rest = rest.and(Change::from_sum(self.get(ADDRESSES)));
        }
        if self.protocol() == EtherType::IPV6 && matches!(verdict, Verdict::Redirect(_)) {
            rest = rest.field([0, 1], [0, 0]);
        }
        if rest.sum() != 0 {
            // SAFETY: the context is this run's. It does nothing where the kernel has no sum of the whole.
            unsafe { bpf_csum_update(self.ctx.skb.skb, rest.sum()) };
        }
    }

    /// The transport checksum, which stands `moved` bytes further behind than it was noted.
    #[inline(always)]
    fn settle_transport(&self, moved: i32) {
        let check = self.get(CHECK);
        if check == 0 {
            return;
        }
        let skb = self.ctx.skb.skb;
        let place = (check & 0xffff).wrapping_add_signed(moved);
        let udp = if check & IS_UDP != 0 { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 };
        let (addresses, ports) = (self.get(ADDRESSES), self.get(PORTS));
        // SAFETY: the context is this run's. The frame is not used any more.
        unsafe {
            let pseudo = u64::from(BPF_F_PSEUDO_HDR) | udp;
            bpf_l4_csum_replace(skb, place, 0, addresses.into(), pseudo);
            if ports != 0 {
                bpf_l4_csum_replace(skb, place, 0, ports.into(), udp);
            }
        }
    }

    /// Whether the kernel has yet to fill in the transport checksum, of which it speaks nowhere: it does not
    /// change another for such a packet.
    #[inline(always)]
    fn is_unfilled(&self) -> Option<bool> {
        let before: [u8; 2] = self.frame().peek(self.link)?;
        // SAFETY: the context is this run's.
        unsafe { bpf_l4_csum_replace(self.ctx.skb.skb, self.link as u32, 0, 1, 0) };
        let mut frame = self.frame();
        frame.skip(self.link);
        let word: &mut [u8; 2] = frame.take()?;
        let unfilled = *word == before;
        *word = before;
        Some(unfilled)
    }

    /// Whether the card took a VLAN tag off.
    #[inline(always)]
    fn is_tagged(&self) -> bool {
        // SAFETY: of this run's context.
        unsafe { (*self.ctx.skb.skb).vlan_present != 0 }
    }

    #[inline(always)]
    fn redirect(&self, device: u32) -> i32 {
        let skb = self.ctx.skb.skb;
        if self.is_tagged() {
            // SAFETY: the context is this run's. The frame is not used any more.
            unsafe { bpf_skb_vlan_pop(skb) };
        }
        if self.link == 0 && device & BARE == 0 && self.add_link().is_none() {
            return TC_ACT_SHOT;
        }
        // SAFETY: no memory is given.
        unsafe { bpf_redirect(device & !BARE, 0) as i32 }
    }

    /// Has the kernel find the neighbour. A packet of the box to itself has its way already, by which the
    /// stack would go on.
    #[inline(always)]
    fn resolve(&self) -> i32 {
        let Some(fib) = FIB.get_ptr(0) else { return TC_ACT_SHOT };
        // SAFETY: this CPU's own, written by this run; no memory is given.
        unsafe { bpf_redirect_neigh((*fib).told.interface, null_mut(), 0, 0) as i32 }
    }

    /// Gives a packet that came without a link header one.
    #[inline(always)]
    fn add_link(&self) -> Option<()> {
        const LENGTH: usize = size_of::<Ethernet>();
        let protocol = self.protocol();
        // SAFETY: the context is this run's. The frame is not used any more.
        if unsafe { bpf_skb_change_head(self.ctx.skb.skb, LENGTH as u32, 0) } != 0 {
            return None;
        }
        let (start, end) = (self.ctx.data(), self.ctx.data_end());
        // SAFETY: as in `frame`.
        let mut frame = unsafe { Frame::from_addresses(start, end, LENGTH) };
        let link = LEAVE_BY.get_ptr(0)?;
        let ethernet: &mut Ethernet = frame.take()?;
        // SAFETY: this CPU's own, written by this run.
        ethernet.set_link(unsafe { &*link });
        ethernet.set_ether_type(protocol);
        Some(())
    }
}

impl Hook for Tc {
    const HOOK: table::Hook = table::Hook::Tc;
    type Context = TcContext;
    type Action = i32;

    #[inline(always)]
    fn context(&self) -> &TcContext {
        &self.ctx
    }

    #[inline(always)]
    fn frame(&self) -> Frame<'_> {
        // SAFETY: the frame belongs to this run of the program; the verifier checks each access.
        unsafe { Frame::from_addresses(self.ctx.data(), self.ctx.data_end(), self.link) }
    }

    #[inline(always)]
    fn ingress(&self) -> u32 {
        // SAFETY: of this run's context.
        unsafe { (*self.ctx.skb.skb).ifindex }
    }

    #[inline(always)]
    fn programs() -> [&'static ProgramArray; 2] {
        [&TC_DETOURS, &TC_PARTS]
    }

    #[inline(always)]
    fn pull(&self) {
        self.pull_first(256);
    }

    #[inline(always)]
    fn ether_type(&self) -> Option<EtherType> {
        // SAFETY: of this run's context.
        let network = unsafe { (*self.ctx.skb.skb).vlan_tci } & 0xfff;
        let tagged = self.is_tagged() && network != 0;
        Some(if tagged { EtherType::VLAN } else { self.protocol() })
    }

    #[inline(always)]
    fn available(&self, _: &Frame<'_>) -> usize {
        (self.ctx.len() as usize).wrapping_sub(self.link)
    }

    #[inline(always)]
    fn beyond(&self) -> usize {
        0
    }

    #[inline(always)]
    fn segment(&self) -> u32 {
        // SAFETY: of this run's context.
        unsafe { (*self.ctx.skb.skb).gso_size }
    }

    #[inline(always)]
    fn is_merged(&self, _: u16, _: Option<Interface>) -> bool {
        false
    }

    #[inline(always)]
    fn device(&self, index: u32, interface: &Interface) -> Option<u32> {
        Some(index | if interface.has(Interface::BARE) { BARE } else { 0 })
    }

    #[inline(always)]
    fn is_sent_by(&self, _: u32) -> bool {
        true
    }

    #[inline(always)]
    fn back(&self, _: Option<Interface>) -> Option<u32> {
        Some(self.ingress() | if self.link == 0 { BARE } else { 0 })
    }

    #[inline(always)]
    fn repair(&self, check: Check<'_>, addresses: Change, ports: Change) {
        let Check { field, is_udp } = check;
        if is_udp && *field == [0, 0] {
            let is_v6 = self.protocol() == EtherType::IPV6;
            return self.unbalanced(if is_v6 { ports.and(addresses) } else { ports });
        }
        let place = (field.as_ptr() as usize).wrapping_sub(self.ctx.data()) as u32 & 0xffff;
        let [before, other] = [self.get(ADDRESSES), self.get(PORTS)].map(Change::from_sum);
        self.put(ADDRESSES, before.and(addresses).sum());
        self.put(PORTS, other.and(ports).sum());
        self.put(CHECK, place | if is_udp { IS_UDP } else { 0 });
    }

    #[inline(always)]
    fn unbalanced(&self, change: Change) {
        let before = Change::from_sum(self.get(UNBALANCED));
        self.put(UNBALANCED, before.and(change).sum());
    }

    #[inline(always)]
    fn is_foreign(&self) -> bool {
        /// From `linux/if_packet.h`.
        const PACKET_OTHERHOST: u32 = 3;
        // SAFETY: of this run's context.
        unsafe { (*self.ctx.skb.skb).pkt_type == PACKET_OTHERHOST }
    }

    #[inline(always)]
    fn is_sent(&self) -> bool {
        self.get(LINK) & SENT != 0
    }

    #[inline(always)]
    fn leave_by(&self, link: &LinkAddresses) {
        if let Some(leave_by) = LEAVE_BY.get_ptr_mut(0) {
            // SAFETY: this CPU's own.
            unsafe { *leave_by = *link };
        }
    }

    #[inline(always)]
    fn act(&self, verdict: Verdict) -> i32 {
        match verdict {
            Verdict::Redirect(device) => {
                self.settle(verdict);
                self.redirect(device)
            }
            Verdict::Stack(ToStack::NoNeighbour) if self.ingress() == LOOPBACK => {
                self.settle(verdict);
                self.resolve()
            }
            Verdict::Stack(_) => {
                self.settle(verdict);
                TC_ACT_UNSPEC
            }
            // Other programs go on.
            Verdict::Pass(_)
            | Verdict::ForwardDetour(_)
            | Verdict::ReplyDetour(_)
            | Verdict::Flow(..) => TC_ACT_UNSPEC,
            Verdict::Drop(_) | Verdict::Syn(_) => TC_ACT_SHOT,
        }
    }

    #[inline(always)]
    fn put_head<const N: usize, const OLD: usize, const NEW: usize>(
        &self,
        conversion: &Conversion,
    ) -> Option<()> {
        /// As IP headers differ.
        const DIFFERENCE: usize = size_of::<Ipv6Hdr>() - size_of::<Ipv4Hdr>();
        const BEHIND_LINK: u32 = bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
        let skb = self.ctx.skb.skb;
        let growth = NEW as i32 - OLD as i32;
        let first = if N == 4 { DIFFERENCE as i32 } else { -(DIFFERENCE as i32) };
        let ether_type = other_type::<N>().number();
        // SAFETY: the context is this run's. What was read from the frame before is not used any more.
        unsafe {
            if bpf_skb_change_proto(skb, ether_type, 0) != 0 {
                return None;
            }
            // What an error quotes has a header too.
            if growth != first && bpf_skb_adjust_room(skb, growth - first, BEHIND_LINK, 0) != 0 {
                return None;
            }
            let head = (&raw const *conversion.head::<NEW>()).cast();
            let recompute = BPF_F_RECOMPUTE_CSUM.into();
            if bpf_skb_store_bytes(skb, self.link as u32, head, NEW as u32, recompute) != 0 {
                return None;
            }
        }
        if self.link != 0 {
            let mut link: Ethernet = self.frame().peek(0)?;
            link.set_ether_type(other_type::<N>());
            if let Some(addresses) = conversion.link() {
                link.set_link(addresses);
            }
            *self.frame().take()? = link;
        } else if let Some(addresses) = conversion.link() {
            self.leave_by(addresses);
        }
        // The kernel's sum of the whole packet has all of both headers, but not this.
        self.settle_transport(growth);
        let rest = self.get(UNBALANCED);
        if rest != 0 {
            // SAFETY: as above.
            unsafe { bpf_csum_update(skb, rest) };
        }
        self.put(LINK, self.get(LINK) | SETTLED);
        Some(())
    }

    #[inline(always)]
    fn answer(&self, answer: &Answer) -> i32 {
        let skb = self.ctx.skb.skb;
        let length = (self.link + answer.quoted()) as u32;
        // SAFETY: the context is this run's. What was read from the frame before is not used any more.
        if unsafe { bpf_skb_change_tail(skb, length, 0) } != 0 {
            return TC_ACT_SHOT;
        }
        let Some(unfilled) = self.is_unfilled() else { return TC_ACT_SHOT };
        // A card that looks for the checksum where the protocol has it must leave this one alone.
        let inner = match (unfilled, answer.growth() == ICMP_IN_IPV4) {
            (false, _) => 0,
            (true, true) => BPF_F_ADJ_ROOM_ENCAP_L3_IPV4,
            (true, false) => BPF_F_ADJ_ROOM_ENCAP_L3_IPV6,
        };
        const BEHIND_LINK: u32 = bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
        let growth = answer.growth() as i32;
        // SAFETY: as above.
        let made = unsafe {
            bpf_skb_adjust_room(skb, growth, BEHIND_LINK, inner.into()) == 0
                && bpf_skb_pull_data(skb, 0) == 0
        };
        if !made {
            return TC_ACT_SHOT;
        }
        if answer.write(self.frame(), unfilled).is_some() {
            // SAFETY: no memory is given.
            unsafe { bpf_redirect(answer.device & !BARE, 0) as i32 }
        } else {
            TC_ACT_SHOT
        }
    }
}

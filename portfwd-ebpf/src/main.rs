//! The entry points, at each hook: the kernel's maps and helpers for the path in the library. Glue only.
#![no_std]
#![no_main]
#![cfg_attr(feature = "strict", deny(warnings))]

mod hook;

use core::cell::Cell;
use core::mem::size_of;

use aya_ebpf::{
    EbpfContext,
    bindings::{
        BPF_F_CURRENT_NETNS, BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_FIB_LKUP_RET_BLACKHOLE,
        BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NO_NEIGH,
        BPF_FIB_LKUP_RET_PROHIBIT, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LKUP_RET_UNREACHABLE,
        BPF_FIB_LKUP_RET_UNSUPP_LWT, BPF_NOEXIST, bpf_fib_lookup as fib_lookup, bpf_sock_tuple,
        xdp_action,
    },
    helpers::generated::{
        bpf_fib_lookup, bpf_get_prandom_u32, bpf_get_smp_processor_id, bpf_jiffies64,
        bpf_sk_lookup_udp, bpf_sk_release, bpf_skc_lookup_tcp,
    },
    macros::{classifier, map, xdp},
    maps::{Array, HashMap, LruHashMap, PerCpuArray, ProgramArray, xdp::DevMap},
    programs::{TcContext, XdpContext},
};
use network_types::ip::{Ipv4Hdr, Ipv6Hdr};
use portfwd_ebpf::{
    answer::Answer,
    checksum::Change,
    cross::{self, Conversion, Crossed, Crosses, Step, Then},
    detour::{self, FlowPart, FragmentBench, Outcome},
    flow::{Added, Bench, Flows},
    flow_table::{self, Slot, Slots},
    icmp::Icmp,
    mss::{self, Syn},
    packet::{Check, EtherType, Ethernet, Frame, Ip, TCP},
    path::{self, Flow, Kernel, Part, Role, Route, Told, Verdict},
    table::{
        self, Address, AnyAddress, ArrivalKey, Bucket, Candidate, ClientKey, Counter, Direction,
        Endpoint, Favourite, FirstFragment, FlowHalf, FlowKey, FragmentKey, HOP_BITS, Hop,
        Interface, Jiffies, Lines, LinkAddresses, Mapping, MappingKey, Mss, Page, Passed, Port,
        RememberedHop, RouteSet, Settings, Translation, Trust,
    },
};

use crate::hook::{Hook, Tc, Xdp};

// The control plane sets the sizes of the tables that grow with the rules when it loads this.
#[map]
static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);
#[map]
static LISTENS_V4: HashMap<Address<4>, u32> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map]
static LISTENS_V6: HashMap<Address<16>, u32> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map]
static BACKENDS_V4: HashMap<Address<4>, u32> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map]
static BACKENDS_V6: HashMap<Address<16>, u32> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map]
static ENDPOINTS: Array<Endpoint> = Array::with_max_entries(1024, 0);
#[map]
static PAGES: Array<Page> = Array::with_max_entries(1024, 0);
#[map]
static TRANSLATIONS: Array<Translation> = Array::with_max_entries(1024, 0);
#[map]
static COUNTERS: PerCpuArray<Counter> = PerCpuArray::with_max_entries(1024, 0);
#[map]
static PASSED: PerCpuArray<u64> = PerCpuArray::with_max_entries(Passed::COUNT as u32, 0);
#[map]
static INTERFACES: HashMap<u32, Interface> = HashMap::with_max_entries(1024, 0);
#[map]
static DEVICES: DevMap = DevMap::with_max_entries(1024, 0);
#[map]
static TRUST: Array<Trust> = Array::with_max_entries(2, 0);
#[map]
static ROUTES_V4: Array<RouteSet<4>> = Array::with_max_entries(1 << 15, 0);
#[map]
static ROUTES_V6: Array<RouteSet<16>> = Array::with_max_entries(1 << 15, 0);
#[map]
static HOPS: Array<RememberedHop> = Array::with_max_entries(1 << HOP_BITS, 0);
#[map]
static FLOWS_V4: Array<Lines<FlowHalf<4>>> = Array::with_max_entries(1024, BPF_F_MMAPABLE);
#[map]
static FLOWS_V6: Array<Lines<FlowHalf<16>>> = Array::with_max_entries(1024, BPF_F_MMAPABLE);
#[map]
static PROBATION_V4: LruHashMap<FlowKey<4>, Candidate<4>> = LruHashMap::with_max_entries(1024, 0);
#[map]
static PROBATION_V6: LruHashMap<FlowKey<16>, Candidate<16>> = LruHashMap::with_max_entries(1024, 0);
#[map]
static BENCH_V4: PerCpuArray<Bench<4>> = PerCpuArray::with_max_entries(1, 0);
#[map]
static BENCH_V6: PerCpuArray<Bench<16>> = PerCpuArray::with_max_entries(1, 0);
#[map]
static MAPPINGS: HashMap<MappingKey, Mapping> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);
#[map]
static CLIENTS: HashMap<ClientKey, Port> = HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);
/// Which socket is looked for: too much for the stack.
#[map]
static WANTED: PerCpuArray<bpf_sock_tuple> = PerCpuArray::with_max_entries(1, 0);
/// By [`Program`](path::Program).
#[map]
static PARTS: ProgramArray = ProgramArray::with_max_entries(Part::PROGRAMS, 0);
#[map]
static ARRIVALS: LruHashMap<ArrivalKey, AnyAddress> = LruHashMap::with_max_entries(65_536, 0);
#[map]
static FRAGMENTS: LruHashMap<FragmentKey, FirstFragment> = LruHashMap::with_max_entries(16_384, 0);
#[map]
static FIB: PerCpuArray<Fib> = PerCpuArray::with_max_entries(1, 0);
#[map]
static FRAGMENT_BENCH: PerCpuArray<FragmentBench> = PerCpuArray::with_max_entries(1, 0);
#[map]
static CONVERSION: PerCpuArray<Conversion> = PerCpuArray::with_max_entries(1, 0);
#[map]
static ANSWERS: PerCpuArray<Bucket> = PerCpuArray::with_max_entries(1, 0);
/// By the rows of `COUNTERS`.
#[map]
static MSS: Array<Mss> = Array::with_max_entries(1024, 0);
#[map]
static SYN: PerCpuArray<Syn> = PerCpuArray::with_max_entries(1, 0);
/// For the log: the ends of the packet.
#[map]
static NOTED: PerCpuArray<Flow> = PerCpuArray::with_max_entries(1, 0);
/// By [`Direction`]; then the one for SYNs.
#[map]
static DETOURS: ProgramArray = ProgramArray::with_max_entries(FOR_SYN + 1, 0);
/// The backends that are the box itself.
#[map]
static OWN: HashMap<AnyAddress, u32> = HashMap::with_max_entries(1024, 0);
/// At TC: the link addresses of a packet that came without a link header and leaves with one.
#[map]
static LEAVE_BY: PerCpuArray<LinkAddresses> = PerCpuArray::with_max_entries(1, 0);
// The same of TC.
#[map]
static TC_PARTS: ProgramArray = ProgramArray::with_max_entries(Part::PROGRAMS, 0);
#[map]
static TC_DETOURS: ProgramArray = ProgramArray::with_max_entries(FOR_SYN + 1, 0);

const FOR_SYN: u32 = 2;

/// How many bits of a hash choose a set of routes. The control plane says so, with the sizes.
#[unsafe(no_mangle)]
static ROUTE_SET_BITS: u32 = 14;

/// How many places of the tables of flows are homes, and what hashes depend on there.
#[unsafe(no_mangle)]
static FLOW_HOMES_V4: u32 = 1017;
#[unsafe(no_mangle)]
static FLOW_HOMES_V6: u32 = 1017;
#[unsafe(no_mangle)]
static FLOW_SEED: u64 = 0;

/// Ticks of the kernel's clock in a second. The control plane says so.
#[unsafe(no_mangle)]
static SECOND: u32 = 250;

/// Zero. Not a constant to the verifier.
#[unsafe(no_mangle)]
static mut NOTHING: u32 = 0;

// What each attribute makes calls the function that stands here, and only what has no caller may jump: so
// they are inlined.

/// Writes the clock of the other programs over the first eight bytes of a frame, for the control
/// plane to read.
#[xdp]
#[inline(always)]
fn clock(ctx: XdpContext) -> u32 {
    let start = ctx.data() as *mut [u8; size_of::<u64>()];
    if start.wrapping_add(1) as usize > ctx.data_end() {
        return xdp_action::XDP_ABORTED;
    }
    // SAFETY: in bounds as just checked; no arguments.
    unsafe { *start = bpf_jiffies64().to_ne_bytes() };
    xdp_action::XDP_PASS
}

/// A program of a hook.
macro_rules! program {
    ($kind:meta, $name:ident($ctx:ident: $context:ty) -> $action:ty, $hook:expr, |$run:ident| $do:expr) => {
        #[$kind]
        #[inline(always)]
        fn $name($ctx: $context) -> $action {
            let $run = Run::new($hook);
            $do
        }
    };
}

/// Programs that are attached: at XDP, at TC, and at TC of interfaces without link header.
macro_rules! entries {
    ($($xdp:ident $tc:ident $bare:ident: |$run:ident| $do:expr;)*) => {$(
        program!(xdp(frags), $xdp(ctx: XdpContext) -> u32, Xdp(ctx), |$run| $do);
        program!(classifier, $tc(ctx: TcContext) -> i32, Tc::enter(ctx, size_of::<Ethernet>()), |$run| $do);
        program!(classifier, $bare(ctx: TcContext) -> i32, Tc::enter(ctx, 0), |$run| $do);
    )*};
}

entries! {
    external tc_external bare_external: |run| run.common(Role::External);
    internal tc_internal bare_internal: |run| run.common(Role::Internal);
    both tc_both bare_both: |run| run.common(Role::Both);
}

// What the box sends: to itself, and out by an interface with or without link header.
program!(classifier, tc_own(ctx: TcContext) -> i32, Tc::enter(ctx, size_of::<Ethernet>()), |run| run.own());
program!(classifier, tc_sent(ctx: TcContext) -> i32, Tc::leave(ctx, size_of::<Ethernet>()), |run| run.own());
program!(classifier, bare_sent(ctx: TcContext) -> i32, Tc::leave(ctx, 0), |run| run.own());

/// Programs that are jumped to: at XDP and at TC.
macro_rules! parts {
    ($($xdp:ident $tc:ident: |$run:ident| $do:expr;)*) => {$(
        program!(xdp(frags), $xdp(ctx: XdpContext) -> u32, Xdp(ctx), |$run| $do);
        program!(classifier, $tc(ctx: TcContext) -> i32, Tc::again(ctx), |$run| $do);
    )*};
}

parts! {
    forward_v4 tc_forward_v4: |run| run.flow::<4, Ipv4Hdr>(Part::Forward);
    forward_v6 tc_forward_v6: |run| run.flow::<16, Ipv6Hdr>(Part::Forward);
    reply_v4 tc_reply_v4: |run| run.flow::<4, Ipv4Hdr>(Part::Reply);
    reply_v6 tc_reply_v6: |run| run.flow::<16, Ipv6Hdr>(Part::Reply);
    hairpin_v4 tc_hairpin_v4: |run| run.flow::<4, Ipv4Hdr>(Part::Hairpin);
    hairpin_v6 tc_hairpin_v6: |run| run.flow::<16, Ipv6Hdr>(Part::Hairpin);
    forward_detour tc_forward_detour: |run| run.detour(Direction::Forward);
    reply_detour tc_reply_detour: |run| run.detour(Direction::Reply);
    syn tc_syn: |run| run.syn();
    find_forward_v4 tc_find_forward_v4: |run| run.flow_detour::<4, Ipv4Hdr>(FlowPart::Find(Direction::Forward));
    find_forward_v6 tc_find_forward_v6: |run| run.flow_detour::<16, Ipv6Hdr>(FlowPart::Find(Direction::Forward));
    find_reply_v4 tc_find_reply_v4: |run| run.flow_detour::<4, Ipv4Hdr>(FlowPart::Find(Direction::Reply));
    find_reply_v6 tc_find_reply_v6: |run| run.flow_detour::<16, Ipv6Hdr>(FlowPart::Find(Direction::Reply));
    send_forward_v4 tc_send_forward_v4: |run| run.flow_detour::<4, Ipv4Hdr>(FlowPart::Send(Direction::Forward));
    send_forward_v6 tc_send_forward_v6: |run| run.flow_detour::<16, Ipv6Hdr>(FlowPart::Send(Direction::Forward));
    send_reply_v4 tc_send_reply_v4: |run| run.flow_detour::<4, Ipv4Hdr>(FlowPart::Send(Direction::Reply));
    send_reply_v6 tc_send_reply_v6: |run| run.flow_detour::<16, Ipv6Hdr>(FlowPart::Send(Direction::Reply));
    cross_forward_v4 tc_cross_forward_v4: |run| run.cross::<4, Ipv4Hdr>(Step::Whole, Direction::Forward);
    cross_forward_v6 tc_cross_forward_v6: |run| run.cross::<16, Ipv6Hdr>(Step::Whole, Direction::Forward);
    cross_reply_v4 tc_cross_reply_v4: |run| run.cross::<4, Ipv4Hdr>(Step::Whole, Direction::Reply);
    cross_reply_v6 tc_cross_reply_v6: |run| run.cross::<16, Ipv6Hdr>(Step::Whole, Direction::Reply);
    cross_find_forward_v4 tc_cross_find_forward_v4: |run| run.cross::<4, Ipv4Hdr>(Step::Find, Direction::Forward);
    cross_find_forward_v6 tc_cross_find_forward_v6: |run| run.cross::<16, Ipv6Hdr>(Step::Find, Direction::Forward);
    cross_find_reply_v4 tc_cross_find_reply_v4: |run| run.cross::<4, Ipv4Hdr>(Step::Find, Direction::Reply);
    cross_find_reply_v6 tc_cross_find_reply_v6: |run| run.cross::<16, Ipv6Hdr>(Step::Find, Direction::Reply);
    cross_send_forward_v4 tc_cross_send_forward_v4: |run| run.cross::<4, Ipv4Hdr>(Step::Send, Direction::Forward);
    cross_send_forward_v6 tc_cross_send_forward_v6: |run| run.cross::<16, Ipv6Hdr>(Step::Send, Direction::Forward);
    cross_send_reply_v4 tc_cross_send_reply_v4: |run| run.cross::<4, Ipv4Hdr>(Step::Send, Direction::Reply);
    cross_send_reply_v6 tc_cross_send_reply_v6: |run| run.cross::<16, Ipv6Hdr>(Step::Send, Direction::Reply);
}

/// One run of a program.
struct Run<H> {
    hook: H,
    /// Whether there is something in `NOTED`.
    noted: Cell<bool>,
}

impl<H: Hook> Run<H> {
    #[inline(always)]
    fn new(hook: H) -> Self {
        Self { hook, noted: Cell::new(false) }
    }

    #[inline(always)]
    fn common(&self, role: Role) -> H::Action {
        self.done(path::handle(self, role, self.hook.frame()))
    }

    #[inline(always)]
    fn flow<const N: usize, I: Ip<N>>(&self, part: Part) -> H::Action
    where
        Self: Flows<N>,
    {
        self.done(path::handle_flow::<N, I, _>(self, part, self.hook.frame()))
    }

    #[inline(always)]
    fn detour(&self, direction: Direction) -> H::Action {
        self.hook.pull();
        self.finish(detour::handle(self, direction, self.hook.frame()))
    }

    #[inline(always)]
    fn syn(&self) -> H::Action {
        self.hook.pull();
        // By the program that jumped here.
        self.noted.set(true);
        self.done(mss::handle(self, self.hook.frame()))
    }

    #[inline(always)]
    fn flow_detour<const N: usize, I: Icmp<N>>(&self, part: FlowPart) -> H::Action
    where
        Self: Flows<N>,
    {
        self.hook.pull();
        self.finish(detour::handle_flow::<N, I, _>(self, part, self.hook.frame()))
    }

    #[inline(always)]
    fn cross<const N: usize, I: Crosses<N>>(&self, step: Step, direction: Direction) -> H::Action {
        if step != Step::Whole {
            self.hook.pull();
        }
        let Crossed { verdict, then } =
            cross::handle::<N, I, _>(self, step, direction, self.hook.frame());
        match (then, self.conversion()) {
            (Then::Convert, Some(conversion)) => {
                let converted = match step {
                    Step::Whole => self.convert::<N, false>(conversion),
                    Step::Find | Step::Send => self.convert::<N, true>(conversion),
                };
                let verdict = conversion.done(self, verdict, converted);
                self.log(verdict);
                self.hook.act(verdict)
            }
            (Then::Answer, Some(conversion)) => {
                self.log(verdict);
                self.answer(&conversion.answer)
            }
            _ => self.done(verdict),
        }
    }

    // Not inlined: what it needs of the stack stands beside nothing else.
    #[inline(never)]
    fn convert<const N: usize, const ERROR: bool>(&self, conversion: &Conversion) -> bool {
        self.hook.convert::<N, ERROR>(conversion).is_some()
    }

    // As above.
    #[inline(never)]
    fn answer(&self, answer: &Answer) -> H::Action {
        self.hook.answer(answer)
    }

    #[inline(always)]
    fn finish(&self, outcome: Outcome) -> H::Action {
        match outcome {
            Outcome::Done(verdict) => self.done(verdict),
            Outcome::Answer(reason, answer) => {
                self.log(Verdict::Drop(reason));
                self.hook.answer(&answer)
            }
        }
    }

    #[inline(always)]
    fn done(&self, verdict: Verdict) -> H::Action {
        self.jump(verdict);
        self.log(verdict);
        self.hook.act(verdict)
    }

    /// Jumps to the program that decides, if the verdict is that another does. Where there is no such
    /// program, the packet passes.
    #[inline(always)]
    fn jump(&self, verdict: Verdict) {
        let [detours, parts] = H::programs();
        let (programs, number, reason) = match verdict {
            Verdict::ForwardDetour(reason) => (detours, Direction::Forward as u32, reason),
            Verdict::ReplyDetour(reason) => (detours, Direction::Reply as u32, reason),
            Verdict::Flow(program) => (parts, program.number(), Passed::NoFlow),
            Verdict::Syn(_) => {
                // SAFETY: as below. Translated as it is, it is lost.
                unsafe { detours.tail_call(self.hook.context(), FOR_SYN) };
                return;
            }
            _ => return,
        };
        // SAFETY: nothing here is to be dropped. It returns only if there is no such program.
        unsafe { programs.tail_call(self.hook.context(), number) };
        self.count_passed(reason);
    }

    /// Here, where all paths have met again, and not on each of them: the verifier follows it that
    /// often.
    #[inline(always)]
    fn log(&self, verdict: Verdict) {
        if log::is_on()
            && self.noted.get()
            && let Some(flow) = NOTED.get_ptr(0)
        {
            // SAFETY: this CPU's own.
            log::verdict(self.hook.context(), unsafe { &*flow }, verdict);
        }
    }
}

impl Run<Tc> {
    #[inline(always)]
    fn own(&self) -> i32 {
        let verdict = match self.hook.is_passing() {
            true => Verdict::Pass(Passed::NoRule),
            false => path::handle_own(self, self.hook.frame()),
        };
        self.done(verdict)
    }
}

impl<H: Hook> Kernel for Run<H> {
    #[inline(always)]
    fn generation(&self) -> u32 {
        // SAFETY: the row always exists; the control plane writes this word while packets read it.
        SETTINGS
            .get_ptr(0)
            .map_or(0, |settings| unsafe { (&raw const (*settings).generation).read_volatile() })
    }

    #[inline(always)]
    fn endpoint_v4(&self, direction: Direction, address: &Address<4>) -> Option<&Endpoint> {
        let favourite = favourite(direction)?;
        if favourite.address == *address {
            return ENDPOINTS.get(favourite.row);
        }
        endpoint(match direction {
            Direction::Forward => LISTENS_V4.get_ptr(address)?,
            Direction::Reply => BACKENDS_V4.get_ptr(address)?,
        })
    }

    #[inline(always)]
    fn endpoint_v6(&self, direction: Direction, address: &Address<16>) -> Option<&Endpoint> {
        endpoint(match direction {
            Direction::Forward => LISTENS_V6.get_ptr(address)?,
            Direction::Reply => BACKENDS_V6.get_ptr(address)?,
        })
    }

    #[inline(always)]
    fn trust_v4(&self) -> Trust {
        trust(0)
    }

    #[inline(always)]
    fn trust_v6(&self) -> Trust {
        trust(1)
    }

    #[inline(always)]
    fn routes_v4<R>(
        &self,
        direction: Direction,
        destination: &Address<4>,
        look: impl FnOnce(&mut RouteSet<4>) -> R,
    ) -> Option<R> {
        let routes = ROUTES_V4.get_ptr_mut(route_set(direction, destination))?;
        // SAFETY: this CPU's own.
        Some(look(unsafe { &mut *routes }))
    }

    #[inline(always)]
    fn routes_v6<R>(
        &self,
        direction: Direction,
        destination: &Address<16>,
        look: impl FnOnce(&mut RouteSet<16>) -> R,
    ) -> Option<R> {
        let routes = ROUTES_V6.get_ptr_mut(route_set(direction, destination))?;
        // SAFETY: this CPU's own.
        Some(look(unsafe { &mut *routes }))
    }

    #[inline(always)]
    fn hop(&self, row: u32) -> Option<&mut RememberedHop> {
        // SAFETY: this CPU's own.
        HOPS.get_ptr_mut(cpu() << HOP_BITS | row).map(|hop| unsafe { &mut *hop })
    }

    // Pages and translations do not change while packets can reach them: see "One change, one write"
    // in ARCHITECTURE.md.
    #[inline(always)]
    fn page(&self, number: u32) -> Option<&Page> {
        PAGES.get(number)
    }

    #[inline(always)]
    fn translation(&self, number: u32) -> Option<&Translation> {
        TRANSLATIONS.get(number)
    }

    #[inline(always)]
    fn interface(&self, index: u32) -> Option<Interface> {
        // SAFETY: one word, copied out.
        unsafe { INTERFACES.get(index) }.copied()
    }

    #[inline(always)]
    fn ingress(&self) -> Option<Interface> {
        self.interface(self.hook.ingress())
    }

    #[inline(always)]
    fn hook(&self) -> table::Hook {
        H::HOOK
    }

    #[inline(always)]
    fn ether_type(&self) -> Option<EtherType> {
        self.hook.ether_type()
    }

    #[inline(always)]
    fn available(&self, frame: &Frame<'_>) -> usize {
        self.hook.available(frame)
    }

    #[inline(always)]
    fn beyond(&self) -> usize {
        self.hook.beyond()
    }

    #[inline(always)]
    fn segment(&self) -> u32 {
        self.hook.segment()
    }

    #[inline(always)]
    fn is_merged(&self, length: u16) -> bool {
        self.hook.is_merged(length, self.ingress())
    }

    #[inline(always)]
    fn device(&self, index: u32, interface: &Interface) -> Option<u32> {
        self.hook.device(index, interface)
    }

    #[inline(always)]
    fn is_sent_by(&self, device: u32) -> bool {
        self.hook.is_sent_by(device)
    }

    #[inline(always)]
    fn back(&self) -> Option<u32> {
        self.hook.back(self.ingress())
    }

    #[inline(always)]
    fn repair(&self, check: Check<'_>, addresses: Change, ports: Change) {
        self.hook.repair(check, addresses, ports);
    }

    #[inline(always)]
    fn unbalanced(&self, change: Change) {
        self.hook.unbalanced(change);
    }

    #[inline(always)]
    fn is_foreign(&self) -> bool {
        self.hook.is_foreign()
    }

    #[inline(always)]
    fn leave_by(&self, link: &LinkAddresses) {
        self.hook.leave_by(link);
    }

    #[inline(always)]
    fn route(&self, flow: &Flow, length: u16, class: [u8; 4]) -> Option<&mut Told> {
        // SAFETY: this CPU's own, and of this run alone.
        let Fib { asked: fib, told } = unsafe { &mut *FIB.get_ptr_mut(0)? };
        if self.is_sent() {
            (told.route, told.narrow, told.hop.mtu) = (Route::Chosen, 0, u32::MAX);
            return Some(told);
        }
        fib.family = flow.family;
        fib.l4_protocol = flow.protocol;
        fib.sport = u16::from_ne_bytes(flow.source_port.0);
        fib.dport = u16::from_ne_bytes(flow.destination_port.0);
        fib.__bindgen_anon_3.ipv6_src = words(flow.source);
        fib.__bindgen_anon_4.ipv6_dst = words(flow.destination);
        let lookup = |fib: &mut fib_lookup, length| {
            // The kernel writes to these.
            fib.__bindgen_anon_1.tot_len = length;
            fib.ifindex = self.hook.ingress();
            fib.__bindgen_anon_2.flowinfo = u32::from_ne_bytes(class);
            // SAFETY: the context is this run's, the struct is initialised and of the size given.
            let result = unsafe {
                bpf_fib_lookup(self.hook.context().as_ptr(), fib, size_of::<fib_lookup>() as i32, 0)
            };
            u32::try_from(result).unwrap_or(u32::MAX)
        };
        // In place of the length, the kernel writes the MTU (since 5.13).
        // SAFETY: of integers.
        let mtu = |fib: &fib_lookup| u32::from(unsafe { fib.__bindgen_anon_1.mtu_result });
        let mut result = lookup(fib, length);
        told.narrow = 0;
        if result == BPF_FIB_LKUP_RET_FRAG_NEEDED {
            told.narrow = mtu(fib);
            // Told before the egress is known: ask again for a short packet. Not of no bytes: at TC the
            // device's MTU would be asked for instead.
            result = lookup(fib, 1);
        }
        // Of a neighbour that is not resolved the egress is known (kernel d1c362e1dd68).
        told.interface = fib.ifindex;
        let told_mtu = if result == BPF_FIB_LKUP_RET_SUCCESS { mtu(fib) } else { u32::MAX };
        told.hop = Hop { device: 0, mtu: told_mtu, link: link_addresses(fib), padding: 0 };
        told.route = match result {
            // Kernels before 6.3 do not look at the neighbour's state, and give the zero address of
            // one that is not resolved.
            BPF_FIB_LKUP_RET_SUCCESS
                if told.hop.link.is_unknown() && !self.is_bare(told.interface) =>
            {
                Route::NoNeighbour
            }
            BPF_FIB_LKUP_RET_SUCCESS => Route::Via,
            // How much goes that way was not told: it is what too much is refused for.
            BPF_FIB_LKUP_RET_NO_NEIGH => {
                // In place of the destination, the kernel wrote the gateway, which may be one of IPv6.
                fib.family = flow.family;
                fib.__bindgen_anon_4.ipv6_dst = words(flow.destination);
                lookup(fib, u16::MAX);
                told.hop.mtu = mtu(fib);
                if self.is_bare(told.interface) {
                    // There is none to be resolved.
                    told.hop.link = LinkAddresses::default();
                    Route::Via
                } else {
                    Route::NoNeighbour
                }
            }
            BPF_FIB_LKUP_RET_UNSUPP_LWT => Route::Encapsulated,
            BPF_FIB_LKUP_RET_UNREACHABLE => Route::Unreachable,
            BPF_FIB_LKUP_RET_BLACKHOLE => Route::Blackhole,
            BPF_FIB_LKUP_RET_PROHIBIT => Route::Prohibited,
            BPF_FIB_LKUP_RET_FWD_DISABLED => Route::ForwardingOff,
            _ => Route::NotForwarded,
        };
        Some(told)
    }

    #[inline(always)]
    fn is_own(&self, address: &AnyAddress) -> bool {
        OWN.get_ptr(address).is_some()
    }

    #[inline(always)]
    fn is_sent(&self) -> bool {
        self.hook.is_sent()
    }

    #[inline(always)]
    fn told(&self) -> Option<&Told> {
        // SAFETY: this CPU's own, and of this run alone.
        FIB.get_ptr(0).map(|fib| unsafe { &(*fib).told })
    }

    #[inline(always)]
    fn mss(&self, counter: u32) -> Mss {
        MSS.get(counter).copied().unwrap_or_default()
    }

    #[inline(always)]
    fn syn(&self) -> Option<&mut Syn> {
        // SAFETY: this CPU's own, and of this run alone.
        SYN.get_ptr_mut(0).map(|syn| unsafe { &mut *syn })
    }

    #[inline(always)]
    fn has_socket(&self, flow: &Flow) -> bool {
        /// AF_INET.
        const INET: u8 = 2;
        let Some(tuple) = WANTED.get_ptr_mut(0) else { return false };
        // SAFETY: this CPU's own.
        let tuple = unsafe { &mut *tuple };
        let source_port = u16::from_ne_bytes(flow.source_port.0);
        let destination_port = u16::from_ne_bytes(flow.destination_port.0);
        // SAFETY: writes to one member of a union of plain integers; the size says which it is.
        let size = unsafe {
            if flow.family == INET {
                let ipv4 = &mut tuple.__bindgen_anon_1.ipv4;
                ipv4.saddr = words(flow.source)[0];
                ipv4.daddr = words(flow.destination)[0];
                ipv4.sport = source_port;
                ipv4.dport = destination_port;
                size_of_val(ipv4)
            } else {
                let ipv6 = &mut tuple.__bindgen_anon_1.ipv6;
                put(&raw mut ipv6.saddr, flow.source);
                put(&raw mut ipv6.daddr, flow.destination);
                ipv6.sport = source_port;
                ipv6.dport = destination_port;
                size_of_val(ipv6)
            }
        };
        let netns = BPF_F_CURRENT_NETNS as i64 as u64;
        // SAFETY: the tuple is initialised and of the size given; a socket that is found is released.
        unsafe {
            let ctx = self.hook.context().as_ptr();
            let socket = if flow.protocol == TCP {
                // Also finds connections in TIME-WAIT and those whose handshake goes on.
                bpf_skc_lookup_tcp(ctx, &raw mut *tuple, size as u32, netns, 0)
            } else {
                bpf_sk_lookup_udp(ctx, &raw mut *tuple, size as u32, netns, 0)
            };
            if socket.is_null() {
                return false;
            }
            bpf_sk_release(socket.cast());
            true
        }
    }

    #[inline(always)]
    fn arrival(&self, key: &ArrivalKey) -> Option<AnyAddress> {
        // SAFETY: copied out; a value that another CPU replaces meanwhile is one client's loss of one
        // packet.
        unsafe { ARRIVALS.get(key) }.copied()
    }

    #[inline(always)]
    fn set_arrival(&self, key: &ArrivalKey, address: Option<&AnyAddress>) {
        // The table is a cache: an entry that cannot be made, or is gone, is as if it was evicted.
        let _: Result<(), i32> = match address {
            Some(address) => ARRIVALS.insert(key, address, 0),
            None => ARRIVALS.remove(key),
        };
    }

    #[inline(always)]
    fn masquerade(&self) -> ([u16; 2], u32) {
        // SAFETY: the row always exists, and these words never change.
        SETTINGS
            .get_ptr(0)
            .map_or(([1, 0], 0), |settings| unsafe { ((*settings).masquerade, (*settings).seed) })
    }

    #[inline(always)]
    fn mapping<R>(&self, key: &MappingKey, look: impl FnOnce(&mut Mapping) -> R) -> Option<R> {
        // SAFETY: as in `flows!`.
        MAPPINGS.get_ptr_mut(key).map(|mapping| look(unsafe { &mut *mapping }))
    }

    #[inline(always)]
    fn add_mapping(&self, key: &MappingKey, mapping: &Mapping) -> Added {
        added(MAPPINGS.insert(key, mapping, BPF_NOEXIST.into()))
    }

    #[inline(always)]
    fn client_port(&self, key: &ClientKey) -> Option<Port> {
        // SAFETY: two bytes, copied out.
        unsafe { CLIENTS.get(key) }.copied()
    }

    #[inline(always)]
    fn set_client_port(&self, key: &ClientKey, port: Port) {
        // Without it, the next flow of the client may get another port.
        let _: Result<(), i32> = CLIENTS.insert(key, port, 0);
    }

    #[inline(always)]
    fn remove_client(&self, key: &ClientKey) {
        // Unless another CPU did.
        let _: Result<(), i32> = CLIENTS.remove(key);
    }

    #[inline(always)]
    fn first_fragment<R>(
        &self,
        key: &FragmentKey,
        look: impl FnOnce(&FirstFragment) -> R,
    ) -> Option<R> {
        // SAFETY: of integers. The kernel gives the memory of one that is replaced to the next at once: who
        // looks asks whose it is.
        unsafe { FRAGMENTS.get(key) }.map(look)
    }

    #[inline(always)]
    fn set_first_fragment(&self, key: &FragmentKey, first: &FirstFragment) {
        // What has no room is as if it was evicted.
        let _: Result<(), i32> = FRAGMENTS.insert(key, first, 0);
    }

    #[inline(always)]
    fn conversion(&self) -> Option<&mut Conversion> {
        // SAFETY: this CPU's own, and of this run alone.
        CONVERSION.get_ptr_mut(0).map(|conversion| unsafe { &mut *conversion })
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: no arguments.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn fragment_bench(&self) -> Option<&mut FragmentBench> {
        // SAFETY: this CPU's own, and of this run alone.
        FRAGMENT_BENCH.get_ptr_mut(0).map(|bench| unsafe { &mut *bench })
    }

    #[inline(always)]
    fn bucket<R>(&self, look: impl FnOnce(&mut Bucket) -> R) -> Option<R> {
        // SAFETY: this CPU's own.
        ANSWERS.get_ptr_mut(0).map(|bucket| look(unsafe { &mut *bucket }))
    }

    #[inline(always)]
    fn count(&self, counter: u32, change: impl FnOnce(&mut Counter)) {
        if let Some(counter) = COUNTERS.get_ptr_mut(counter) {
            // SAFETY: this CPU's own row.
            change(unsafe { &mut *counter });
        }
    }

    #[inline(always)]
    fn count_passed(&self, reason: Passed) {
        if let Some(count) = PASSED.get_ptr_mut(reason as u32) {
            // SAFETY: this CPU's own row.
            unsafe { *count += 1 };
        }
    }

    #[inline(always)]
    fn now(&self) -> Jiffies {
        // SAFETY: no arguments.
        Jiffies(unsafe { bpf_jiffies64() })
    }

    #[inline(always)]
    fn second(&self) -> u64 {
        // SAFETY: a constant of the loaded program.
        u64::from(unsafe { (&raw const SECOND).read_volatile() })
    }

    #[inline(always)]
    fn nothing(&self) -> u32 {
        // SAFETY: nobody writes to it.
        unsafe { (&raw const NOTHING).read_volatile() }
    }

    // The level is a constant of the loaded program: what is off, the verifier removes.
    #[inline(always)]
    fn note(&self, flow: impl FnOnce() -> Flow) {
        if log::is_on()
            && let Some(noted) = NOTED.get_ptr_mut(0)
        {
            // SAFETY: this CPU's own.
            unsafe { *noted = flow() };
            self.noted.set(true);
        }
    }
}

macro_rules! flows {
    ($size:literal, $flows:ident, $homes:ident, $probation:ident, $bench:ident) => {
        impl<H: Hook> Slots<$size> for Run<H> {
            #[inline(always)]
            fn homes(&self) -> u32 {
                // SAFETY: a constant of the loaded program.
                unsafe { (&raw const $homes).read_volatile() }
            }

            #[inline(always)]
            fn seed(&self) -> u64 {
                // SAFETY: as above.
                unsafe { (&raw const FLOW_SEED).read_volatile() }
            }

            #[inline(always)]
            fn slot(&self, number: u32) -> Option<&Slot<$size>> {
                // SAFETY: memory of the map, as long as the program runs.
                $flows.get_ptr_mut(number).map(|slot| unsafe { Slot::at(slot.cast()) })
            }
        }

        impl<H: Hook> Flows<$size> for Run<H> {
            #[inline(always)]
            fn flow<R>(
                &self,
                key: &FlowKey<$size>,
                look: impl FnOnce(&mut FlowHalf<$size>) -> R,
            ) -> Option<R> {
                flow_table::find(self, key).map(look)
            }

            #[inline(always)]
            fn flow_at_once<R>(
                &self,
                key: &FlowKey<$size>,
                look: impl FnOnce(&mut FlowHalf<$size>) -> R,
            ) -> Option<R> {
                flow_table::find_at_once(self, key).map(look)
            }

            #[inline(always)]
            fn add_flow(&self, half: &FlowHalf<$size>) -> Added {
                flow_table::add(self, half)
            }

            #[inline(always)]
            fn remove_flow(&self, key: &FlowKey<$size>) {
                // Whoever removed it before did the same.
                let _: bool = flow_table::remove(self, key);
            }

            #[inline(always)]
            fn candidate<R>(
                &self,
                key: &FlowKey<$size>,
                look: impl FnOnce(&mut Candidate<$size>) -> R,
            ) -> Option<R> {
                // SAFETY: memory of the map. Other CPUs read and write it too, word by word: see
                // "Flows" in ARCHITECTURE.md.
                $probation.get_ptr_mut(key).map(|candidate| look(unsafe { &mut *candidate }))
            }

            #[inline(always)]
            fn add_candidate(&self, key: &FlowKey<$size>, candidate: &Candidate<$size>) -> Added {
                added($probation.insert(key, candidate, BPF_NOEXIST.into()))
            }

            #[inline(always)]
            fn remove_candidate(&self, key: &FlowKey<$size>) {
                // As above.
                let _: Result<(), i32> = $probation.remove(key);
            }

            #[inline(always)]
            fn bench(&self) -> Option<&mut Bench<$size>> {
                // SAFETY: this CPU's own, and of this run alone: see `Bench`.
                $bench.get_ptr_mut(0).map(|bench| unsafe { &mut *bench })
            }
        }
    };
}
flows!(4, FLOWS_V4, FLOW_HOMES_V4, PROBATION_V4, BENCH_V4);
flows!(16, FLOWS_V6, FLOW_HOMES_V6, PROBATION_V6, BENCH_V6);

#[inline(always)]
fn added(result: Result<(), i32>) -> Added {
    /// EEXIST.
    const EXISTS: i32 = -17;
    match result {
        Ok(()) => Added::Yes,
        Err(EXISTS) => Added::Exists,
        Err(_) => Added::Full,
    }
}

/// What is asked of the FIB, and what it told.
#[repr(C)]
struct Fib {
    asked: fib_lookup,
    told: Told,
}

#[inline(always)]
fn cpu() -> u32 {
    // SAFETY: no arguments.
    unsafe { bpf_get_smp_processor_id() }
}

#[inline(always)]
fn favourite(direction: Direction) -> Option<Favourite> {
    let settings = SETTINGS.get_ptr(0)?;
    // SAFETY: the row always exists; the control plane writes this word while packets read it.
    unsafe {
        let word = (&raw const (*settings).favourites[direction as usize]).cast::<u64>();
        Some(core::mem::transmute::<u64, Favourite>(word.read_volatile()))
    }
}

impl<H: Hook> Run<H> {
    /// Whether an interface has no link header.
    #[inline(always)]
    fn is_bare(&self, index: u32) -> bool {
        self.interface(index).is_some_and(|interface| interface.has(Interface::BARE))
    }
}

/// The endpoint of an address. Which it is never changes, as long as the address is there.
#[inline(always)]
fn endpoint<'a>(row: *const u32) -> Option<&'a Endpoint> {
    // SAFETY: from a lookup of this run. The half that is live does not change.
    ENDPOINTS.get(unsafe { *row })
}

#[inline(always)]
fn trust(family: u32) -> Trust {
    // SAFETY: the rows always exist; the control plane writes their words while packets read them.
    TRUST.get_ptr(family).map_or_else(Trust::default, |trust| unsafe { trust.read_volatile() })
}

/// Which row of the routes is a destination's. Each CPU has rows of its own in a common array: a
/// per-CPU array would be a second load, of a pointer.
#[inline(always)]
fn route_set<const N: usize>(direction: Direction, destination: &Address<N>) -> u32 {
    // SAFETY: a constant of the loaded program.
    let bits = unsafe { (&raw const ROUTE_SET_BITS).read_volatile() };
    (2 * cpu() + direction as u32) << bits | destination.route_set(bits)
}

#[inline(always)]
fn link_addresses(fib: &fib_lookup) -> LinkAddresses {
    // SAFETY: twelve bytes of two that follow each other, and they are aligned to two.
    let [a, b, c, d, e, f] = unsafe { (&raw const fib.smac).cast::<[u16; 6]>().read() };
    // SAFETY: the same twelve bytes.
    LinkAddresses::from_bytes(unsafe { core::mem::transmute([d, e, f, a, b, c]) })
}

/// Writes an address half by half: the compiler would join others of its words, and what it joins is not
/// aligned, as anything on the stack must be.
///
/// # Safety
///
/// `to` must be valid, and aligned to eight bytes.
#[inline(always)]
unsafe fn put(to: *mut [u32; 4], address: AnyAddress) {
    // SAFETY: the same sixteen bytes; the rest is the caller's.
    unsafe {
        let [first, second] = core::mem::transmute::<[u8; 16], [u64; 2]>(address.0);
        let halves = to.cast::<u64>();
        halves.write_volatile(first);
        halves.add(1).write_volatile(second);
    }
}

/// An address in the words of the kernel's structs, which are in network order too.
#[inline(always)]
fn words(address: AnyAddress) -> [u32; 4] {
    // SAFETY: the same sixteen bytes.
    unsafe { core::mem::transmute(address.0) }
}

/// Messages for `-v`.
mod log {
    use aya_log_ebpf::debug;

    use super::*;

    #[inline(always)]
    pub fn is_on() -> bool {
        aya_log_ebpf::macro_support::level_enabled(aya_log_ebpf::macro_support::Level::Debug)
    }

    /// Not inlined: a program and what it calls have 512 bytes of stack together, and what this one
    /// needs would stand beside itself in each path to a verdict.
    #[inline(never)]
    pub fn verdict<C: EbpfContext>(ctx: &C, flow: &Flow, verdict: Verdict) {
        let source_port = flow.source_port.number();
        let destination_port = flow.destination_port.number();
        let (what, how): (&str, &str) = match verdict {
            Verdict::Redirect(_) => ("redirected", ""),
            Verdict::Stack(reason) => ("to the stack: ", reason.name()),
            Verdict::Pass(reason)
            | Verdict::ForwardDetour(reason)
            | Verdict::ReplyDetour(reason) => ("passed: ", reason.name()),
            Verdict::Drop(reason) => ("dropped: ", reason.name()),
            Verdict::Flow(..) => ("passed: ", Passed::NoFlow.name()),
            Verdict::Syn(_) => ("dropped", ""),
        };
        if flow.family == 2 {
            let source = u32::from_be(words(flow.source)[0]);
            let destination = u32::from_be(words(flow.destination)[0]);
            debug!(
                ctx,
                "{} {:i}:{} -> {:i}:{} {}{}",
                flow.protocol,
                source,
                source_port,
                destination,
                destination_port,
                what,
                how
            );
        } else {
            debug!(
                ctx,
                "{} [{:i}]:{} -> [{:i}]:{} {}{}",
                flow.protocol,
                flow.source.0,
                source_port,
                flow.destination.0,
                destination_port,
                what,
                how
            );
        }
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

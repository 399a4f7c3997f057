//! The bench's XDP programs: the limit to which forwarding is compared, and traffic.
#![no_std]
#![no_main]
#![cfg_attr(feature = "strict", deny(warnings))]

mod probe;

use aya_ebpf::{
    Global,
    bindings::xdp_action,
    helpers::generated::bpf_ktime_get_ns,
    macros::{map, xdp},
    maps::{Array, DevMap, PerCpuArray, ProgramArray},
    programs::XdpContext,
};
use portfwd_bench_ebpf::{
    Clients, Expected, Headers, Link, PORTS, Position, Received, SAMPLE, Services, Stream, Turn,
};

/// The link addresses that `swap` writes.
#[unsafe(no_mangle)]
static LINK: Global<Link> = Global::new([0; 3]);

/// The one device that frames are redirected to.
#[map]
static DEVICE: DevMap = DevMap::with_max_entries(1, 0);

/// The frames of `prepare`, and whose turn it is.
#[map]
static FRAMES: Array<Headers> = Array::with_max_entries(1, 0);
#[map]
static TURN: Array<Turn> = Array::with_max_entries(1, 0);
/// The program that `prepare` hands its frames to.
#[map]
static PROGRAM: ProgramArray = ProgramArray::with_max_entries(1, 0);

/// What `generate` sends, and how far it is.
#[unsafe(no_mangle)]
static STREAM: Global<Stream> = Global::new(Stream::NONE);
#[map]
static POSITION: Array<Position> = Array::with_max_entries(1, 0);

/// What `receive` waits for, and what came.
#[unsafe(no_mangle)]
static EXPECTED: Global<Expected> = Global::new(Expected::NONE);
#[map]
static RECEIVED: PerCpuArray<Received> = PerCpuArray::with_max_entries(1, 0);

/// The limit: what any forwarding in XDP must do, and nothing else. (Redirecting by an index without
/// a map carries 5 % fewer packets.)
#[xdp(frags)]
fn swap(ctx: XdpContext) -> u32 {
    let Some(link) = bytes::<Link>(&ctx, 0) else { return xdp_action::XDP_PASS };
    // SAFETY: in bounds.
    unsafe { link.write(LINK.load()) };
    DEVICE.redirect(0, 0).unwrap_or(xdp_action::XDP_DROP)
}

/// What remains of a test run when the program under test does nothing.
#[xdp(frags)]
fn nothing(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

/// Writes a frame's headers, so that a program which changes them can be run on them again, and
/// hands over.
#[xdp(frags)]
fn prepare(ctx: XdpContext) -> u32 {
    let Some(headers) = bytes::<Headers>(&ctx, 0) else { return xdp_action::XDP_ABORTED };
    let Some(turn) = TURN.get_ptr_mut(0) else { return xdp_action::XDP_ABORTED };
    // SAFETY: one run at a time.
    let turn = unsafe { &mut *turn };
    let this = turn.next;
    turn.next = if this + 1 < turn.frames { this + 1 } else { 0 };
    let Some(frame) = FRAMES.get(this) else { return xdp_action::XDP_ABORTED };
    // SAFETY: in bounds, as was checked.
    unsafe { headers.write(*frame) };
    // Reads the clock behind a barrier. Else the program would read bytes whose stores are still
    // under way, in other sizes than they are stored in, which no frame off a wire makes it wait for.
    // SAFETY: no arguments.
    unsafe { bpf_ktime_get_ns() };
    // SAFETY: control does not come back, and nothing here has to be dropped.
    unsafe { PROGRAM.tail_call(&ctx, 0) };
    xdp_action::XDP_ABORTED
}

/// Sends the next packet of the stream.
#[xdp]
fn generate(ctx: XdpContext) -> u32 {
    let Some(position) = POSITION.get_ptr_mut(0) else { return xdp_action::XDP_ABORTED };
    // SAFETY: one generator at a time.
    match write_next(&ctx, &STREAM.load(), unsafe { &mut *position }) {
        Some(()) => DEVICE.redirect(0, 0).unwrap_or(xdp_action::XDP_ABORTED),
        None => xdp_action::XDP_ABORTED,
    }
}

/// Ethernet, IPv4 and UDP headers as halves of words: a frame begins at a multiple of four, so each
/// of them is written in one step.
type Halves = [u16; 21];

/// Makes the frame the next one of a stream. The whole header is written each time, as the frame
/// comes back as its last receiver left it. The payload is taken for zeros.
#[inline(always)]
fn write_next(ctx: &XdpContext, stream: &Stream, position: &mut Position) -> Option<()> {
    let Position { flow, service } = *position;
    position.flow = if flow + 1 < stream.clients.count { flow + 1 } else { 0 };
    position.service = if service + 1 < stream.services.count { service + 1 } else { 0 };

    let Clients { address, port, .. } = stream.clients;
    let client = (address + (flow & 0xffff), port + (flow >> 16));
    let Services { address, port, .. } = stream.services;
    let service = (address + service / PORTS, port + service % PORTS);
    let (from, to) = if stream.reply == 0 { (client, service) } else { (service, client) };

    const VERSION: u32 = 0x4500;
    const DO_NOT_FRAGMENT: u32 = 0x4000;
    const TTL_AND_UDP: u32 = 0x4011;
    let addresses = (from.0 >> 16) + (from.0 & 0xffff) + (to.0 >> 16) + (to.0 & 0xffff);
    let length = stream.length;
    let ip_sum = VERSION + length + DO_NOT_FRAGMENT + TTL_AND_UDP + addresses;
    // The length stands in the pseudo header too.
    let udp_length = length - 20;
    let udp_sum = addresses + 0x11 + 2 * udp_length + from.1 + to.1;
    // A sum of zero is sent as its other form; zero is none.
    let udp_sum = match !fold(udp_sum) {
        0 => 0xffff,
        sum => sum,
    };
    let [link0, link1, link2] = stream.link;
    let be = |half: u32| (half as u16).to_be();
    let headers = bytes::<Halves>(ctx, 0)?;
    // SAFETY: in bounds.
    unsafe {
        headers.write([
            link0 as u16,
            (link0 >> 16) as u16,
            link1 as u16,
            (link1 >> 16) as u16,
            link2 as u16,
            (link2 >> 16) as u16,
            be(0x0800),
            be(VERSION),
            be(length),
            0,
            be(DO_NOT_FRAGMENT),
            be(TTL_AND_UDP),
            (!fold(ip_sum)).to_be(),
            be(from.0 >> 16),
            be(from.0),
            be(to.0 >> 16),
            be(to.0),
            be(from.1),
            be(to.1),
            be(udp_length),
            udp_sum.to_be(),
        ]);
    }
    Some(())
}

/// Counts UDP packets over IPv4, looks at one in many in full, and drops them. All else passes.
#[xdp]
fn receive(ctx: XdpContext) -> u32 {
    count(&ctx)
}

#[inline(always)]
fn count(ctx: &XdpContext) -> u32 {
    let Some(headers) = bytes::<Halves>(ctx, 0) else { return xdp_action::XDP_PASS };
    // SAFETY: in bounds.
    let half = |at: usize| u32::from(u16::from_be(unsafe { headers.cast::<u16>().add(at).read() }));
    if half(6) != 0x0800 || half(7) >> 8 != 0x45 || half(11) & 0xff != 0x11 {
        return xdp_action::XDP_PASS;
    }
    let Some(received) = RECEIVED.get_ptr_mut(0) else { return xdp_action::XDP_ABORTED };
    // SAFETY: this CPU's own row.
    let received = unsafe { &mut *received };
    received.packets += 1;
    if received.packets % SAMPLE == 0 {
        received.checked += 1;
        if !is_right(ctx) {
            received.wrong += 1;
        }
    }
    xdp_action::XDP_DROP
}

/// Whether a packet is one of the stream, with right checksums.
#[inline(never)]
fn is_right(ctx: &XdpContext) -> bool {
    let expected = EXPECTED.load();
    let Some(headers) = bytes::<Halves>(ctx, 0) else { return false };
    // SAFETY: in bounds.
    let half = |at: usize| u32::from(u16::from_be(unsafe { headers.cast::<u16>().add(at).read() }));
    let length = half(8);
    let (from, to) = ((half(13) << 16 | half(14), half(17)), (half(15) << 16 | half(16), half(18)));
    let (client, service) = if expected.reply == 0 { (from, to) } else { (to, from) };

    let Services { address, port, count } = expected.services;
    let (address, port) = (service.0.wrapping_sub(address), service.1.wrapping_sub(port));
    let service = address * PORTS + port;
    let service_is_right = address < 0x1_0000 && port < PORTS && service < count;
    let services = count;
    let Clients { address, port, count } = expected.clients;
    let (address, port) = (client.0.wrapping_sub(address), client.1.wrapping_sub(port));
    let flow = port << 16 | address;
    // Flows and services are sent in step: each flow belongs to one service.
    let client_is_right = expected.any_client != 0
        || address < 0x1_0000
            && port < 0x1_0000
            && flow < count
            && flow.checked_rem(services) == Some(service);
    if length != expected.length || half(19) != length - 20 || !service_is_right || !client_is_right
    {
        return false;
    }
    let mut ip_sum = 0;
    for at in 7..17 {
        ip_sum += half(at);
    }
    // The pseudo header, then all halves from the UDP header to the packet's end.
    let mut udp_sum = half(13) + half(14) + half(15) + half(16) + 0x11 + half(19);
    let mut seen = 0;
    for at in 0..LONGEST / 2 {
        if seen == length - 20 {
            break;
        }
        let Some(half) = bytes::<u16>(ctx, 34 + 2 * at as usize) else { return false };
        // SAFETY: in bounds.
        udp_sum += u32::from(u16::from_be(unsafe { half.read() }));
        seen += 2;
    }
    seen == length - 20 && half(20) != 0 && fold(ip_sum) == 0xffff && fold(udp_sum) == 0xffff
}

/// Bytes of the longest UDP packet on Ethernet.
const LONGEST: u32 = 1480;

/// A sum of halves as the Internet checksum adds: the carry comes back in.
#[inline(always)]
fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// A part of the frame, if it is there.
#[inline(always)]
fn bytes<T>(ctx: &XdpContext, offset: usize) -> Option<*mut T> {
    let start = ctx.data() + offset;
    (start + size_of::<T>() <= ctx.data_end()).then_some(start as *mut T)
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

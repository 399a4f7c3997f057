//! The bench's XDP programs: the limit to which forwarding is compared, and traffic.
#![no_std]
#![no_main]

use aya_ebpf::{
    Global,
    bindings::xdp_action,
    helpers::generated::bpf_ktime_get_ns,
    macros::{map, xdp},
    maps::{Array, DevMap, ProgramArray},
    programs::XdpContext,
};
use portfwd_bench_ebpf::{HEADERS, Headers, Link, Turn};

/// The link addresses that `swap` writes.
#[unsafe(no_mangle)]
static LINK: Global<Link> = Global::new([0; 12]);

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

/// The limit: what any forwarding in XDP must do, and nothing else.
#[xdp]
fn swap(ctx: XdpContext) -> u32 {
    let Some(link) = bytes::<Link>(&ctx, 0) else { return xdp_action::XDP_PASS };
    // SAFETY: in bounds.
    unsafe { link.write_unaligned(LINK.load()) };
    DEVICE.redirect(0, 0).unwrap_or(xdp_action::XDP_DROP)
}

/// What remains of a test run when the program under test does nothing.
#[xdp]
fn nothing(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_PASS
}

/// Writes a frame's headers, so that a program which changes them can be run on them again, and
/// hands over.
#[xdp]
fn prepare(ctx: XdpContext) -> u32 {
    let Some(headers) = bytes::<[u8; HEADERS]>(&ctx, 0) else { return xdp_action::XDP_ABORTED };
    let Some(turn) = TURN.get_ptr_mut(0) else { return xdp_action::XDP_ABORTED };
    // SAFETY: one run at a time.
    let turn = unsafe { &mut *turn };
    let this = turn.next;
    turn.next = if this + 1 < turn.frames { this + 1 } else { 0 };
    let Some(frame) = FRAMES.get(this) else { return xdp_action::XDP_ABORTED };
    // SAFETY: in bounds, as was checked.
    unsafe { headers.cast::<Headers>().write_unaligned(*frame) };
    // Reads the clock behind a barrier. Else the program would read bytes whose stores are still
    // under way, in other sizes than they are stored in, which no frame off a wire makes it wait for.
    // SAFETY: no arguments.
    unsafe { bpf_ktime_get_ns() };
    // SAFETY: control does not come back, and nothing here has to be dropped.
    unsafe { PROGRAM.tail_call(&ctx, 0) };
    xdp_action::XDP_ABORTED
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

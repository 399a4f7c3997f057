//! A load at a steady mean rate, with probes in it that tell how long their round trip took.

use aya_ebpf::{
    bindings::xdp_action,
    helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_ns},
    macros::{map, xdp},
    maps::{Array, PerCpuArray},
    programs::XdpContext,
};
use portfwd_bench_ebpf::{BUCKETS, GAPS, NOT_DUE, Pace, bucket};

use crate::{DEVICE, EXPECTED, Halves, POSITION, RECEIVED, STREAM, bytes, count, write_next};

#[map]
static PACE: Array<Pace> = Array::with_max_entries(1, 0);
/// Nanoseconds.
#[map]
static DRAWN: Array<u32> = Array::with_max_entries(GAPS, 0);
/// How often each latency was met.
#[map]
static LATENCIES: PerCpuArray<u64> = PerCpuArray::with_max_entries(BUCKETS, 0);

/// The payload of a probe: when it was due. Others have 0 there.
type Stamp = [u16; 4];
/// Where it is in the frame.
const STAMP: usize = 42;
/// The UDP checksum among the halves of a frame.
const CHECKSUM: usize = 20;

/// Sends packets of the stream a batch at a time, when they are due; what the kernel has it do
/// meanwhile goes nowhere. One packet of each batch, any, is a probe.
#[xdp]
fn paced(ctx: XdpContext) -> u32 {
    let Some(pace) = PACE.get_ptr_mut(0) else { return xdp_action::XDP_ABORTED };
    // SAFETY: one generator at a time.
    let pace = unsafe { &mut *pace };
    let position = pace.position;
    if position == 0 {
        begin(pace);
    }
    pace.position = if position + 1 < pace.batch { position + 1 } else { 0 };
    if pace.probe == NOT_DUE {
        return xdp_action::XDP_DROP;
    }
    let Some(written) = POSITION.get_ptr_mut(0) else { return xdp_action::XDP_ABORTED };
    // SAFETY: as above.
    if write_next(&ctx, &STREAM.load(), unsafe { &mut *written }).is_none() {
        return xdp_action::XDP_ABORTED;
    }
    let Some(stamp) = bytes::<Stamp>(&ctx, STAMP) else { return xdp_action::XDP_ABORTED };
    let Some(headers) = bytes::<Halves>(&ctx, 0) else { return xdp_action::XDP_ABORTED };
    let due = if position == pace.probe { pace.stamp } else { 0 };
    // SAFETY: in bounds.
    unsafe {
        stamp.write([due as u16, (due >> 16) as u16, (due >> 32) as u16, (due >> 48) as u16])
    };
    if due != 0 {
        pace.probes += 1;
        // None, rather than one that covers the time.
        // SAFETY: in bounds.
        unsafe { headers.cast::<u16>().add(CHECKSUM).write(0) };
    }
    DEVICE.redirect(0, 0).unwrap_or(xdp_action::XDP_ABORTED)
}

/// Is the next batch due?
#[inline(always)]
fn begin(pace: &mut Pace) {
    // SAFETY: no arguments.
    let (now, random) = unsafe { (bpf_ktime_get_ns(), bpf_get_prandom_u32()) };
    if pace.due == 0 {
        pace.due = now;
    }
    if now < pace.due {
        pace.probe = NOT_DUE;
        return;
    }
    pace.stamp = pace.due;
    // Any of them: the upper half of the number, scaled.
    pace.probe = ((random >> 16) * pace.batch) >> 16;
    // A late batch does not put off the next.
    pace.due += DRAWN.get(random % GAPS).copied().map_or(0, u64::from);
}

/// Counts packets as a receiver does, and sends probes back.
#[xdp]
fn echo(ctx: XdpContext) -> u32 {
    let Some((headers, _)) = probe(&ctx) else { return count(&ctx) };
    let Some(received) = RECEIVED.get_ptr_mut(0) else { return xdp_action::XDP_ABORTED };
    // SAFETY: this CPU's own row; then, what is in bounds. Checksums stay right, as sums do.
    unsafe {
        (*received).packets += 1;
        let half = headers.cast::<u16>();
        for at in 0..3 {
            half.add(at).swap(half.add(at + 3));
        }
        for (a, b) in [(13, 15), (14, 16), (17, 18)] {
            half.add(a).swap(half.add(b));
        }
    }
    DEVICE.redirect(0, 0).unwrap_or(xdp_action::XDP_ABORTED)
}

/// Takes probes that come back.
#[xdp]
fn record(ctx: XdpContext) -> u32 {
    let Some((headers, due)) = probe(&ctx) else { return xdp_action::XDP_PASS };
    // SAFETY: no arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    let Some(received) = RECEIVED.get_ptr_mut(0) else { return xdp_action::XDP_ABORTED };
    let latency = bucket(now.saturating_sub(due));
    let Some(latency) = LATENCIES.get_ptr_mut(latency) else { return xdp_action::XDP_ABORTED };
    // SAFETY: this CPU's own rows; then, what is in bounds.
    unsafe {
        (*received).packets += 1;
        *latency += 1;
        let half = |at: usize| u32::from(u16::from_be(headers.cast::<u16>().add(at).read()));
        let from = EXPECTED.load().services;
        if (half(13) << 16 | half(14), half(17)) != (from.address, from.port) {
            (*received).wrong += 1;
        }
    }
    xdp_action::XDP_DROP
}

/// The headers of a probe, and when it was due.
#[inline(always)]
fn probe(ctx: &XdpContext) -> Option<(*mut Halves, u64)> {
    let headers = bytes::<Halves>(ctx, 0)?;
    let stamp = bytes::<Stamp>(ctx, STAMP)?;
    // SAFETY: in bounds.
    let (half, [a, b, c, d]) =
        unsafe { (|at| u16::from_be(headers.cast::<u16>().add(at).read()), stamp.read()) };
    let due = u64::from(d) << 48 | u64::from(c) << 32 | u64::from(b) << 16 | u64::from(a);
    let is_udp = half(6) == 0x0800 && half(7) >> 8 == 0x45 && half(11) & 0xff == 0x11;
    (is_udp && due != 0).then_some((headers, due))
}

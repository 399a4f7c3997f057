//! What the bench tells its eBPF programs, and what they tell it. Rows of maps and read-only data:
//! `repr(C)`, integers only, without padding. Addresses and ports are numbers in host order.
#![no_std]
#![cfg_attr(feature = "strict", deny(warnings))]

/// Ports that a service address has before the next address begins.
pub const PORTS: u32 = 8192;

/// How many bytes `prepare` writes back: Ethernet, IPv6 and TCP headers, rounded up to words.
pub const HEADERS: usize = 80;

/// The first bytes of a frame, for `prepare`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Headers(pub [u64; HEADERS / 8]);

/// The frames that `prepare` writes, in turn.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Turn {
    pub next: u32,
    /// How many there are.
    pub frames: u32,
}

/// Link addresses of a frame, as they stand in it: destination, then source. Words, as a frame begins
/// at a multiple of four; so they are written in three steps.
pub type Link = [u32; 3];

/// The services that traffic goes to or comes from: service `j` is at address `j / PORTS` and port
/// `j % PORTS`, both counted from the first.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Services {
    pub address: u32,
    pub port: u32,
    /// At least 1.
    pub count: u32,
}

/// The clients: flow `i` comes from address `i % 65536` and port `i / 65536`, both counted from the
/// first.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Clients {
    pub address: u32,
    pub port: u32,
    /// Flows, at least 1. With `u32::MAX` no flow comes twice.
    pub count: u32,
}

/// UDP packets with a payload of zeros, between clients and services.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Stream {
    pub clients: Clients,
    pub services: Services,
    /// Bytes of the IP packet.
    pub length: u32,
    /// From clients to services is 0, back is 1.
    pub reply: u32,
    pub link: Link,
}

/// Where a generator is in its stream.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Position {
    pub flow: u32,
    pub service: u32,
}

/// What a receiver expects of a [`Stream`].
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Expected {
    pub clients: Clients,
    pub services: Services,
    pub length: u32,
    pub reply: u32,
    /// 1 if clients may have other addresses and ports than they sent from: a proxy has its own.
    pub any_client: u32,
}

/// What a receiver has seen.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Received {
    pub packets: u64,
    /// Packets that were looked at in full.
    pub checked: u64,
    /// Of those, what was not as expected.
    pub wrong: u64,
}

/// When a paced generator sends, and what it has sent.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct Pace {
    /// When the next packets are due, in nanoseconds of the kernel's clock. 0: at once.
    pub due: u64,
    /// When those that are being sent were due.
    pub stamp: u64,
    /// Probes sent.
    pub probes: u64,
    /// Packets that are due at the same time; as many as the kernel runs in a batch.
    pub batch: u32,
    /// How many of them were sent, or dropped if they are not due.
    pub position: u32,
    /// Which of them is the probe; [`NOT_DUE`] if none is sent.
    pub probe: u32,
    pub unused: u32,
}

pub const NOT_DUE: u32 = u32::MAX;

/// Gaps between due times, of which one is drawn each time.
pub const GAPS: u32 = 4096;

/// Counters of latencies, by [`bucket`].
pub const BUCKETS: u32 = 4480;

/// Where a latency is counted: each power of two has 128 buckets, so that they are exact within 1 %.
#[inline(always)]
pub fn bucket(nanoseconds: u64) -> u32 {
    if nanoseconds < 128 {
        return nanoseconds as u32;
    }
    let shift = 56 - nanoseconds.leading_zeros();
    let bucket = 128 * shift + (nanoseconds >> shift) as u32;
    if bucket < BUCKETS { bucket } else { BUCKETS - 1 }
}

/// The least latency, in nanoseconds, that is counted in a bucket.
pub fn least_of(bucket: u32) -> u64 {
    if bucket < 256 {
        return bucket.into();
    }
    let shift = bucket / 128 - 1;
    u64::from(128 + bucket % 128) << shift
}

/// One packet in so many is looked at in full.
pub const SAMPLE: u64 = 64;

impl Stream {
    /// One flow to one service, for read-only data that is yet to be written.
    pub const NONE: Self = Self {
        clients: Clients { address: 0, port: 0, count: 1 },
        services: Services { address: 0, port: 0, count: 1 },
        length: 28,
        reply: 0,
        link: [0; 3],
    };
}

impl Expected {
    /// As [`Stream::NONE`].
    pub const NONE: Self = Self {
        clients: Stream::NONE.clients,
        services: Stream::NONE.services,
        length: Stream::NONE.length,
        reply: 0,
        any_client: 0,
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_exact_within_one_percent_and_in_order() {
        let mut last = 0;
        for nanoseconds in (0..1000).chain((3..40).map(|power| (1 << power) - 1)) {
            let bucket = bucket(nanoseconds);
            assert!(bucket >= last || nanoseconds < 1000, "{nanoseconds}");
            last = bucket;
            let least = least_of(bucket);
            assert!(
                least <= nanoseconds && nanoseconds - least <= nanoseconds / 100,
                "{nanoseconds}"
            );
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
        assert!((1..BUCKETS).all(|bucket| least_of(bucket) > least_of(bucket - 1)));
    }
}

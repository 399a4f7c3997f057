//! Incremental Internet checksums (RFC 1071, RFC 1624).
//!
//! Byte order is settled once, here: a ones' complement sum over 16-bit words does not depend on
//! the order of bytes in a word, as long as everything is read and written in the same one (RFC
//! 1071, section 2 (B)). So fields go in as the bytes on the wire, are summed in native order, and
//! come out as bytes on the wire. Nothing is ever swapped.

use crate::table::Address;

/// A checksum field as it stands in a header: two bytes, as on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct Checksum(pub [u8; 2]);

impl Checksum {
    /// Of no bytes. Updated with all of the [words](Change::word), it is the checksum of those.
    pub const EMPTY: Self = Self([0xff; 2]);

    /// The checksum after `change`: `HC' = ~(~HC + ~m + m')` (RFC 1624, equation 3).
    #[inline(always)]
    pub fn update(self, change: Change) -> Self {
        let sum = u64::from(!u16::from_ne_bytes(self.0)) + change.0;
        Self((!fold(sum)).to_ne_bytes())
    }

    /// As [`update`](Self::update), for a UDP checksum: zero means that the sender made none, and
    /// stays; a sum that comes out as zero is sent as 0xffff (RFC 768).
    #[inline(always)]
    pub fn update_udp(self, change: Change) -> Self {
        if self.0 == [0, 0] {
            return self;
        }
        match self.update(change) {
            Self([0, 0]) => Self([0xff, 0xff]),
            checksum => checksum,
        }
    }
}

/// What changed under a checksum: the sum of `~m + m'` over all fields. The same change serves
/// every checksum that covers the fields.
#[derive(Clone, Copy, Debug, Default)]
pub struct Change(u64);

impl Change {
    /// Adds a 16-bit field, at an even offset, that turned from `old` into `new`.
    #[inline(always)]
    #[must_use]
    pub fn field(self, old: [u8; 2], new: [u8; 2]) -> Self {
        Self(self.0 + u64::from(!u16::from_ne_bytes(old)) + u64::from(u16::from_ne_bytes(new)))
    }

    /// Adds a 16-bit field, at an even offset, where nothing was before.
    #[inline(always)]
    #[must_use]
    pub fn word(self, new: [u8; 2]) -> Self {
        Self(self.0 + u64::from(u16::from_ne_bytes(new)))
    }

    /// The same, taken away.
    #[inline(always)]
    #[must_use]
    pub fn inverse(self) -> Self {
        Self((!fold(self.0)).into())
    }

    /// As [`word`](Self::word), for an address.
    #[inline(always)]
    #[must_use]
    pub fn words<const N: usize>(self, new: &Address<N>) -> Self {
        new.0.as_chunks::<2>().0.iter().fold(self, |sum, word| sum.word(*word))
    }

    /// The sum as the kernel has it: 32 bits, in native order.
    #[inline(always)]
    pub fn sum(self) -> u32 {
        let sum = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        ((sum & 0xffff_ffff) + (sum >> 32)) as u32
    }

    /// Of such a sum.
    #[inline(always)]
    pub fn from_sum(sum: u32) -> Self {
        Self(sum.into())
    }

    /// Adds what changed elsewhere.
    #[inline(always)]
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// Adds an address of `N` bytes, a multiple of four, that turned from `old` into `new`.
    #[inline(always)]
    #[must_use]
    pub fn address<const N: usize>(self, old: &[u8; N], new: &[u8; N]) -> Self {
        // 32-bit words sum to the same, as 2^16 is 1 modulo 2^16 - 1. A few words of 33 bits: far from
        // overflow.
        const { assert!(N.is_multiple_of(4)) };
        let mut sum = self.0;
        for (old, new) in old.as_chunks::<4>().0.iter().zip(new.as_chunks::<4>().0) {
            sum += u64::from(!u32::from_ne_bytes(*old)) + u64::from(u32::from_ne_bytes(*new));
        }
        Self(sum)
    }
}

/// Folds carries back in until 16 bits remain.
#[inline(always)]
fn fold(mut sum: u64) -> u16 {
    sum = (sum & 0xffff_ffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    /// The checksum of `bytes` from scratch (RFC 1071), written differently on purpose.
    fn full(bytes: &[u8]) -> [u8; 2] {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
            if sum > 0xffff {
                sum -= 0xffff;
            }
        }
        (!(sum as u16)).to_be_bytes()
    }

    #[test]
    fn rfc_1624_section_4() {
        // HC = 0xDD2F, m = 0x5555, m' = 0x3285; equation 3 gives 0x0000 where equation 2 fails.
        let change = Change::default().field([0x55, 0x55], [0x32, 0x85]);
        assert_eq!(Checksum([0xdd, 0x2f]).update(change), Checksum([0, 0]));
    }

    #[test]
    fn udp_zero_stays_zero_and_is_never_made() {
        let change = Change::default().field([0x55, 0x55], [0x32, 0x85]);
        assert_eq!(Checksum([0, 0]).update_udp(change), Checksum([0, 0]));
        assert_eq!(Checksum([0xdd, 0x2f]).update_udp(change), Checksum([0xff, 0xff]));
    }

    #[test]
    fn words_add_up_to_the_checksum_of_all() {
        let bytes: Vec<u8> = (0..1232).map(|i| (i * 7) as u8).collect();
        let words = bytes.as_chunks::<2>().0.iter();
        let sum = words.fold(Change::default(), |sum, word| sum.word(*word));
        assert_eq!(Checksum::EMPTY.update(sum), Checksum(full(&bytes)));
        assert_eq!(Checksum::EMPTY.update(Change::default()), Checksum(full(&[])));
    }

    proptest! {
        #[test]
        fn agrees_with_full_recomputation(
            mut bytes in prop::collection::vec(any::<u8>(), 40..120),
            port in any::<[u8; 2]>(),
            v4 in any::<[u8; 4]>(),
            v6 in any::<[u8; 16]>(),
        ) {
            bytes[0] |= 1; // not all zero: a real header never is
            let before = Checksum(full(&bytes));
            let old: Vec<u8> = bytes.clone();
            bytes[2..4].copy_from_slice(&port);
            bytes[4..8].copy_from_slice(&v4);
            bytes[8..24].copy_from_slice(&v6);
            let change = Change::default()
                .field(old[2..4].try_into().unwrap(), port)
                .address::<4>(old[4..8].try_into().unwrap(), &v4)
                .address::<16>(old[8..24].try_into().unwrap(), &v6);
            prop_assert_eq!(before.update(change), Checksum(full(&bytes)));
        }

        #[test]
        fn a_wrong_checksum_stays_wrong(
            mut bytes in prop::collection::vec(any::<u8>(), 40..80),
            error in 1u16..0xffff,
            v4 in any::<[u8; 4]>(),
        ) {
            bytes[0] |= 1;
            let right = u16::from_be_bytes(full(&bytes));
            let wrong = Checksum((right ^ error).to_be_bytes());
            // 0x0000 and 0xffff are one number in ones' complement.
            prop_assume!(![right, right ^ error].iter().all(|sum| *sum == 0 || *sum == 0xffff));
            let change = Change::default().address::<4>(&bytes[4..8].try_into().unwrap(), &v4);
            bytes[4..8].copy_from_slice(&v4);
            prop_assert_ne!(wrong.update(change), Checksum(full(&bytes)));
        }
    }
}

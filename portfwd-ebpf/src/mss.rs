//! The MSS option of TCP (RFC 9293, section 3.7.1), lowered in SYNs so that the segments of the other end
//! fit the way: where ICMP is lost, nothing else tells it.
//!
//! A program of its own, to which others jump with a translated SYN: packets without SYN pay the look at
//! the flag.

use network_types::tcp::TcpHdr;

use crate::checksum::Change;
use crate::packet::{Check, Frame, forgotten};
use crate::path::{Kernel, Verdict};
use crate::table::Mss;

/// A translated SYN. It belongs to one run of the programs, like [`Bench`](crate::flow::Bench).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Syn {
    /// What becomes of it.
    pub then: Verdict,
    /// Bytes of the largest IP packet that may go its way.
    pub mtu: u32,
    /// Bytes of the IP and TCP headers without options, which the MSS does not count (RFC 6691).
    pub headers: u32,
    /// The rule's row in `MSS`.
    pub rule: u32,
    /// Where in the frame its TCP header is.
    pub place: u32,
}

/// Lowers the MSS of the packet that [`Kernel::syn`] tells of, and says what becomes of it.
#[inline(always)]
pub fn handle<K: Kernel>(kernel: &K, frame: Frame<'_>) -> Verdict {
    let Some(syn) = kernel.syn() else { return Verdict::Syn(0) };
    // What has no such option, or is malformed, goes as it is.
    let _: Option<()> = fit(kernel, syn, frame);
    syn.then
}

#[inline(always)]
fn fit<K: Kernel>(kernel: &K, syn: &Syn, mut frame: Frame<'_>) -> Option<()> {
    let most = match kernel.mss(syn.rule) {
        Mss::OFF => return None,
        // Its answers go by the interface that it came by.
        Mss::AUTO => {
            let mtu = kernel.ingress().map_or(syn.mtu, |ingress| ingress.mtu.min(syn.mtu));
            mtu.checked_sub(syn.headers)?.try_into().unwrap_or(u16::MAX)
        }
        Mss(most) => most,
    };
    // Headers end before this, which the verifier wants to know.
    frame.jump(syn.place as usize & 0x1fff);
    let tcp: &mut TcpHdr = frame.take()?;
    let options = (usize::from(tcp.doff()) * 4).checked_sub(TcpHdr::LEN)?;
    let at = find(&mut frame, options, kernel.nothing())?;
    frame.jump(bounded(at));
    let change = lower(frame.take()?, at, most)?;
    kernel.repair(Check { field: &mut tcp.check, is_udp: false }, Change::default(), change);
    Some(())
}

/// Lowers a value that stands `at` bytes from an even place. `None` if it is not larger.
#[inline(always)]
fn lower(value: &mut [u8; 2], at: usize, most: u16) -> Option<Change> {
    // A number: the compiler would choose among its bytes in the frame by place, which is no access that
    // the verifier knows.
    let before = core::hint::black_box(u16::from_be_bytes(*value));
    if before <= most {
        return None;
    }
    *value = most.to_be_bytes();
    // Its bytes are the second of a word and the first of the next.
    let word =
        |number: u16| if at.is_multiple_of(2) { number } else { number.swap_bytes() }.to_be_bytes();
    Some(Change::default().field(word(before), word(most)))
}

/// The longest that options can be.
const LONGEST: usize = 40;

/// The same place in the options, at which the verifier of Linux 6.1 knows that it is one, wherever it was
/// kept.
#[inline(always)]
fn bounded(at: usize) -> usize {
    core::hint::black_box(at) & (LONGEST.next_power_of_two() - 1)
}

/// Where the value of the MSS option is in the `len` bytes of options that the frame goes on with.
#[inline(always)]
fn find(frame: &mut Frame<'_>, len: usize, nothing: u32) -> Option<usize> {
    const END: u8 = 0;
    const NO_OPERATION: u8 = 1;
    const MSS: u8 = 2;
    let mut at = 0;
    for _ in 0..LONGEST {
        if at >= len {
            return None;
        }
        let mut option = frame.ahead();
        option.jump(bounded(at));
        let [kind] = *option.take()?;
        let size = match kind {
            END => return None,
            NO_OPERATION => 1,
            _ => {
                let [size] = *option.take()?;
                usize::from(size)
            }
        };
        if kind != NO_OPERATION && size < 2 || at + size > len {
            return None;
        }
        if kind == MSS {
            return (size == 4).then_some(at + 2);
        }
        // To the verifier each option begins anywhere, and what follows it is looked at once.
        at = forgotten((at + size) as u32, nothing) as usize;
    }
    None
}

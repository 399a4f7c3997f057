//! The oracle: the same random packets, under the same random rules, go through nftables in one router
//! and through portfwd in another. What comes out at both ends must be the same, field by field, but
//! for a list of wanted differences (compare.rs).
//!
//! Every 1,000 packets begin anew, with rules, routers and flows of a seed of their own: the first
//! seed, the next number, and so on. So a failure needs 1,000 packets at most to be seen again, and
//! mostly a handful, which are looked for.

mod compare;
mod kinds;
mod rules;
mod stream;
mod world;

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::path::Path;

use anyhow::{Context, Result, bail};

use self::compare::{Verdict, WANTED, compare};
use self::kinds::Extent;
use self::stream::{Flow, Side, Step, Stream};
use self::world::{Seen, Subject, World};

/// How many packets share their rules.
const PACKETS_OF_A_SEED: usize = 1000;

/// What was compared.
#[derive(Clone, Default, Debug)]
pub struct Summary {
    pub packets: usize,
    pub same: usize,
    /// Of these, how many came out nowhere.
    pub silent: usize,
    /// Wanted differences, by their place in the list.
    wanted: BTreeMap<usize, usize>,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { packets, same, silent, .. } = self;
        writeln!(f, "{packets} packets: {same} the same, {silent} of them by not coming out")?;
        for (place, count) in &self.wanted {
            let wanted = &WANTED[*place];
            writeln!(f, "{count:>8} differ as wanted: {}: {}", wanted.name, wanted.reason)?;
        }
        for (name, why) in kinds::off() {
            writeln!(f, "not compared yet: {name}: {why}")?;
        }
        Ok(())
    }
}

/// Sends so many packets through nftables and through the portfwd at this path. `told` hears how far it
/// is before each seed, and may end it.
///
/// # Errors
///
/// A difference that is not wanted, with all that is needed to see it again; or what `told` says.
pub fn run(
    portfwd: &Path,
    packets: usize,
    seed: u64,
    told: impl FnMut(&Summary) -> Result<()>,
) -> Result<Summary> {
    go(Subject::Portfwd(portfwd), Extent::Now, packets, seed, told)
}

/// Sends so many packets, of every kind that there is, through nftables twice: the oracle has no
/// opinion of its own.
///
/// # Errors
///
/// As [`run`].
pub fn run_against_itself(packets: usize, seed: u64) -> Result<Summary> {
    go(Subject::Nftables, Extent::All, packets, seed, |_| Ok(()))
}

fn go(
    subject: Subject<'_>,
    extent: Extent,
    packets: usize,
    seed: u64,
    mut told: impl FnMut(&Summary) -> Result<()>,
) -> Result<Summary> {
    let mut summary = Summary::default();
    let mut seed = seed;
    while summary.packets < packets {
        told(&summary)?;
        let stream = Stream::new(seed, PACKETS_OF_A_SEED.min(packets - summary.packets), extent);
        if let Some(found) = send(&stream, subject, &mut summary, |_| true)
            .with_context(|| format!("seed {seed}"))?
        {
            bail!("{}", explained(seed, &stream, found, subject)?);
        }
        seed = seed.wrapping_add(1);
    }
    Ok(summary)
}

/// A packet of which the two made different things.
struct Found {
    /// Its number in the stream.
    step: usize,
    nftables: Seen,
    portfwd: Seen,
}

impl Found {
    /// Whether the same came out of both.
    fn is_like(&self, other: &Self, step: &Step) -> bool {
        compare::is_like(step, &self.nftables, &other.nftables)
            && compare::is_like(step, &self.portfwd, &other.portfwd)
    }
}

/// Sends the packets with the chosen numbers until one comes out differently.
fn send(
    stream: &Stream,
    subject: Subject<'_>,
    summary: &mut Summary,
    chosen: impl Fn(usize) -> bool,
) -> Result<Option<Found>> {
    let mut world = World::new(stream, subject)?;
    for (number, step) in stream.steps.iter().enumerate().filter(|(number, _)| chosen(*number)) {
        let flow = &stream.flows[step.flow];
        let seen = world
            .try_step(step, flow)
            .with_context(|| format!("packet {number}\n{}", about(stream, flow)))?;
        let [nftables, portfwd] = seen;
        summary.packets += 1;
        match compare(step, flow, &nftables, &portfwd) {
            Verdict::Same => {
                summary.same += 1;
                summary.silent += usize::from(nftables == Seen::default());
            }
            Verdict::Wanted(place) => *summary.wanted.entry(place).or_default() += 1,
            Verdict::Wrong => return Ok(Some(Found { step: number, nftables, portfwd })),
        }
    }
    Ok(None)
}

/// How often a shorter stream is tried.
const TRIES: usize = 12;

/// Fewer packets that show the same: of that flow alone, if it shows there, then with one after the
/// other left out. Its first packet stays: without it there is no flow.
fn shrunk(stream: &Stream, found: Found, subject: Subject<'_>) -> Result<(Vec<usize>, Found)> {
    let last = found.step;
    let (original, step) = (&found, &stream.steps[last]);
    let again = |chosen: &[usize]| -> Result<Option<Found>> {
        let found = send(stream, subject, &mut Summary::default(), |it| chosen.contains(&it))?;
        Ok(found.filter(|found| found.step == last && found.is_like(original, step)))
    };
    let of_its_flow = |number: &usize| stream.steps[*number].flow == stream.steps[last].flow;
    let mut needed: Vec<usize> = (0..=last).filter(of_its_flow).collect();
    let Some(mut shorter) = again(&needed)? else { return Ok(((0..=last).collect(), found)) };
    let mut place = 1;
    for _ in 0..TRIES {
        // The last one is what it is about.
        if place + 1 >= needed.len() {
            break;
        }
        let mut fewer = needed.clone();
        fewer.remove(place);
        match again(&fewer)? {
            Some(found) => (needed, shorter) = (fewer, found),
            None => place += 1,
        }
    }
    Ok((needed, shorter))
}

/// The difference for people.
fn explained(seed: u64, stream: &Stream, found: Found, subject: Subject<'_>) -> Result<String> {
    let (needed, found) = shrunk(stream, found, subject)?;
    let step = &stream.steps[found.step];
    let flow = &stream.flows[step.flow];
    let ways = stream.tuns.map(|tun| if tun { "tc on a tun device" } else { stream.attach });
    let mut text = format!(
        "packet {} of seed {seed} comes out differently; portfwd is attached {}, {} (outside, \
         inside).\nagain: cargo xtask oracle --seed {seed} --packets {}\n\n{}",
        found.step,
        ways[0],
        ways[1],
        found.step + 1,
        about(stream, flow)
    );
    let _ = writeln!(text, "\n{} of {} packets show it; its flow's:", needed.len(), found.step + 1);
    for number in needed.iter().filter(|number| stream.steps[**number].flow == step.flow) {
        let _ = writeln!(text, "  {}", line(*number, &stream.steps[*number]));
    }
    let _ = writeln!(text, "\nthe last of them:");
    for (name, value) in compare::fields(&step.frame()) {
        let _ = writeln!(text, "    {name:28} {value}");
    }
    let _ = write!(text, "\ncame out:\n{}", compare::report(&found.nftables, &found.portfwd));
    Ok(text)
}

/// A flow and its rule.
fn about(stream: &Stream, flow: &Flow) -> String {
    let Flow { talk, client, asks, server, answers, .. } = flow;
    let rule = match flow.rule {
        Some(rule) => stream.rules[rule].toml(),
        None => "no rule claims it\n".into(),
    };
    format!(
        "flow: {talk}: client {client}, to {asks}, server {server}, answers from {answers}\n{rule}"
    )
}

fn line(number: usize, step: &Step) -> String {
    let packet = &step.packet;
    let from = match step.from {
        Side::Client => "client",
        Side::Server => "server",
    };
    let flags = if packet.protocol == crate::packet::TCP {
        format!(", flags {:02x}", packet.tcp.flags)
    } else {
        String::new()
    };
    format!(
        "{number}: from the {from}: protocol {}, {} -> {}{flags}, {} bytes of payload{}{}",
        packet.protocol,
        packet.source,
        packet.destination,
        packet.payload.len(),
        if step.kinds.is_empty() { "" } else { "; " },
        step.kinds.join(", ")
    )
}

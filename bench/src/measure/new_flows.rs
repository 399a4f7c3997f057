//! UDP packets per second when every packet is the first of its flow.

use anyhow::Result;

use crate::contender::Contender;
use crate::measure::throughput::{SMALL, load, rate};
use crate::measure::{Bench, Reading};
use crate::report::Unit;
use crate::rig::{Rig, Wire};
use crate::rules::Rules;
use crate::traffic::Direction;

pub const NAME: &str = "new-flows";

/// Those in the kernel. A proxy would have to open a socket for each packet.
const CONTENDERS: [Contender; 8] = [
    Contender::Limit,
    Contender::Native,
    Contender::Generic,
    Contender::Stateful,
    Contender::Routing,
    Contender::NftMap,
    Contender::NftChain,
    Contender::Iptables,
];

pub fn run(bench: &mut Bench) -> Result<()> {
    for rules in [Rules::Single(1), Rules::Single(10_000)] {
        if bench.options.quick && rules == Rules::Single(1) {
            continue;
        }
        let case = rules.to_string();
        bench.case(NAME, &case, &CONTENDERS, |options, contender| {
            let rig = Rig::new(Wire::Frames)?;
            let _running = contender.start(options, &rig, rules)?;
            let load = load(contender, rules, SMALL, u32::MAX);
            let value = rate(options, &rig, &[Direction::Forward], &load)?;
            Ok(vec![Reading { case: case.clone(), value, unit: Unit::PacketsPerSecond }])
        });
    }
    Ok(())
}

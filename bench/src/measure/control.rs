//! portfwd's control plane as a library: the one place that knows how rules get into the datapath.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use anyhow::{Result, anyhow};
use portfwd::compile::{Capacity, Compiler, Resolved, plan};
use portfwd::datapath::Datapath;
use portfwd::network::Externals;
use portfwd::rule::Rule;
use portfwd::sysctl::Families;
use portfwd_ebpf::table::Interface;

use crate::rig::{self, Rig};

/// Ports that the kernel gives to sockets: what rules are compiled with.
const EPHEMERAL: RangeInclusive<u16> = 32_768..=60_999;

/// portfwd's tables and programs in the namespace of the thread that made it, the router's; nothing
/// is attached.
pub struct Control {
    pub datapath: Datapath,
    compiler: Compiler,
}

impl Control {
    /// With these rules, and room for more.
    pub fn load(rig: &Rig, rules: &[Rule]) -> Result<Self> {
        let plan = plan(rules, &Resolved::new())?;
        let mut datapath = Datapath::load(Capacity::for_plan(rules, &plan, &EPHEMERAL), false)?;
        let mut interfaces = BTreeMap::new();
        for (name, flag) in [("wan0", Interface::EXTERNAL), ("lan0", Interface::INTERNAL)] {
            let flags = flag | Interface::TRANSMITS;
            let interface = Interface { flags, mtu: 1500, device: 0 };
            interfaces.insert(rig::interface(&rig.router, name)?, interface);
        }
        datapath.set_interfaces(&interfaces)?;
        let mut control = Self { datapath, compiler: Compiler::default() };
        control.change(rules)?;
        // As the daemon has them do while it listens to changes of routes. Here nothing changes.
        let families = Families { v4: true, v6: true };
        control.datapath.routes().rely(families, Duration::from_secs(3600))?;
        Ok(control)
    }

    /// Makes these the rules: from what users write to tables that packets see.
    pub fn change(&mut self, rules: &[Rule]) -> Result<()> {
        let externals = Externals { v4: vec![rig::WAN], v6: vec![rig::WAN6] };
        let plan = plan(rules, &Resolved::new())?;
        let update = self.compiler.compile(rules, &plan, &externals, &EPHEMERAL);
        self.datapath.apply(&update)?;
        self.compiler.commit(&update);
        Ok(())
    }
}

/// A rule in the form of `-p`, which is its name too.
pub fn rule(spec: &str) -> Result<Rule> {
    let rule = spec.parse::<Rule>().map_err(|error| anyhow!("{spec}: {error}"))?;
    Ok(Rule { name: spec.to_owned(), ..rule })
}

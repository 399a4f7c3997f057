//! portfwd's control plane as a library: the one place that knows how rules get into the datapath.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, anyhow};
use portfwd::compile::{BoxPorts, Capacity, Compiler, Plan, Resolved, plan};
use portfwd::datapath::{Datapath, Hook};
use portfwd::network::Externals;
use portfwd::rule::Rule;
use portfwd::sysctl::Families;
use portfwd_ebpf::table::{Address, Interface};

use crate::rig::{self, Rig};

/// What rules are compiled with.
const PORTS: BoxPorts = BoxPorts { ephemeral: 32_768..=60_999, masquerade: 40_000..=60_999 };
/// Room for established flows.
const FLOWS: u32 = 1 << 20;

/// portfwd's tables and programs in the namespace of the thread that made it, the router's; nothing
/// is attached.
pub struct Control {
    pub datapath: Datapath,
    plan: Plan,
    compiler: Compiler,
    externals: Externals,
}

impl Control {
    /// With these rules, and room for more.
    pub fn load(rig: &Rig, rules: &[Rule]) -> Result<Self> {
        let plan = plan(rules, &Resolved::new())?;
        let mut datapath =
            Datapath::load(Capacity::for_plan(rules, &plan, &PORTS, FLOWS), &PORTS, false)?;
        datapath.load_programs(Hook::Xdp)?;
        let mut interfaces = BTreeMap::new();
        for (name, flag) in [("wan0", Interface::EXTERNAL), ("lan0", Interface::INTERNAL)] {
            let flags = flag | Interface::TRANSMITS;
            let address = if name == "wan0" { rig::WAN } else { rig::LAN };
            let v4 = Address(address.octets());
            let interface = Interface { flags, mtu: 1500, device: 0, v4, v6: Address([0; 16]) };
            interfaces.insert(rig::interface(&rig.router, name)?, interface);
        }
        datapath.set_interfaces(&interfaces)?;
        let externals = Externals { v4: vec![rig::WAN], v6: vec![rig::WAN6] };
        let mut control = Self { datapath, plan, compiler: Compiler::default(), externals };
        control.write(rules)?;
        // As the daemon has them do while it listens to changes of routes. Here nothing changes.
        let families = Families { v4: true, v6: true };
        control.datapath.routes().rely(families, Duration::from_secs(3600))?;
        Ok(control)
    }

    /// Adds the last of these rules, of which the others are there: from what users write to tables
    /// that packets see.
    pub fn add(&mut self, rules: &[Rule]) -> Result<()> {
        self.plan.add(rules, &Resolved::new())?;
        self.write(rules)
    }

    /// Takes out the rule that came after these.
    pub fn remove_after(&mut self, rules: &[Rule]) -> Result<()> {
        self.plan.remove(rules, rules.len());
        self.write(rules)
    }

    fn write(&mut self, rules: &[Rule]) -> Result<()> {
        let update = self.compiler.compile(rules, &self.plan, &self.externals, &PORTS);
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

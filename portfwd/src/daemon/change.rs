//! Rules change: worked out on copies, refused or live as a whole.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use portfwd_ebpf::path::Role;
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::survey::{Survey, check_interfaces};
use super::{Daemon, Failure, log_from, service, unresolved};
use crate::api::{ChangeRequest, Changed, Request};
use crate::compile::{Capacity, Compiler, FlowRoom, Plan, Resolved, plan};
use crate::config::Config;
use crate::config::diff::{Diff, diff};
use crate::config::overlay::Overlay;
use crate::datapath::{AttachError, Datapath};
use crate::names;
use crate::network::{Link, Snapshot};

/// What is asked of the daemon that changes it; the answer goes back through the sender once that is so.
#[derive(Debug)]
pub enum Order {
    Reload(Answer),
    Change(ChangeRequest, Answer),
    Detach(Answer),
}

type Answer = tokio::sync::oneshot::Sender<Result<Changed, Failure>>;

/// A configuration and what it means, ready to be loaded.
struct Next {
    config: Config,
    resolved: Resolved,
    plan: Plan,
    survey: Survey,
    snapshot: Snapshot,
}

impl Daemon {
    /// Does what is asked for. Returns whether that is the end of forwarding.
    pub(super) async fn obey(&mut self, order: Order, inbox: &mut mpsc::Receiver<Request>) -> bool {
        let (sender, answer) = match order {
            Order::Reload(sender) => (sender, self.reload(inbox).await),
            Order::Change(asked, sender) => (sender, self.change(asked, inbox).await),
            Order::Detach(sender) => {
                let messages = vec!["forwarding ends".to_owned()];
                let ended = Changed { messages, ..Changed::default() };
                let _: Result<(), _> = sender.send(Ok(ended));
                return true;
            }
        };
        let changed = answer.is_ok();
        // Whoever asked may have gone.
        let _: Result<(), _> = sender.send(answer);
        if changed {
            // With very many backends it takes a while: the answer goes out first.
            tokio::task::yield_now().await;
            self.keep_resolved(inbox).await;
        }
        false
    }

    /// What the file and the flags say now, compared with what runs.
    pub(super) fn diff(&self) -> Result<Diff, Failure> {
        let file = self.origin.read().map_err(Failure::wrong)?;
        Ok(diff(&file, &self.config))
    }

    /// Reads the configuration again, and has it as it says.
    pub(super) async fn reload(
        &mut self,
        inbox: &mut mpsc::Receiver<Request>,
    ) -> Result<Changed, Failure> {
        service::reloading();
        let done = self.try_to_reload(inbox).await;
        service::ready();
        match &done {
            Ok(changed) => changed.messages.iter().for_each(|line| info!("{line}")),
            Err(failure) => {
                let lines = failure.lines();
                lines.lines().for_each(|line| warn!("{line}"));
                warn!("nothing has changed");
            }
        }
        done
    }

    async fn try_to_reload(
        &mut self,
        inbox: &mut mpsc::Receiver<Request>,
    ) -> Result<Changed, Failure> {
        let base = self.origin.read().map_err(Failure::wrong)?;
        let changes = diff(&base, &self.config);
        let next = self.work_out(base.clone(), inbox).await?;
        let restart = self.need_restart(&next.config);
        let overlay = Overlay::default();
        let warnings = self.become_next(next, Arc::new(base), overlay)?;
        let rules = self.config.rules.len();
        let plural = if rules == 1 { "" } else { "s" };
        let mut messages = vec![format!("reloaded: {rules} rule{plural}")];
        if changes.is_empty() {
            messages = vec![format!("reloaded: {rules} rule{plural}, as before")];
        }
        messages.extend(restart);
        Ok(Changed { messages, warnings })
    }

    /// One change, at run time and, if asked for, in the file.
    async fn change(
        &mut self,
        ChangeRequest { change, save }: ChangeRequest,
        inbox: &mut mpsc::Receiver<Request>,
    ) -> Result<Changed, Failure> {
        let changed = self.overlay.with(&self.base, &change);
        let (base, overlay, config) = if save {
            // What the file will say; what runs may be so already.
            let saved = Overlay::default().with(&self.base, &change);
            match (saved, changed) {
                (Ok((_, mut base)), changed) => {
                    base.unsaved.clear();
                    let overlay = changed.map_or_else(|_| self.overlay.clone(), |(it, _)| it);
                    let overlay = overlay.settle(&base);
                    let config = overlay.apply(&base).map_err(Failure::wrong)?;
                    (Arc::new(base), overlay, config)
                }
                (Err(errors), Ok(_)) | (Err(_), Err(errors)) => return Err(Failure::wrong(errors)),
            }
        } else {
            let (overlay, config) = changed.map_err(Failure::wrong)?;
            (self.base.clone(), overlay, config)
        };
        let next = self.work_out(config, inbox).await?;
        let file = save.then(|| self.origin.save(&change).map_err(Failure::wrong)).transpose()?;
        let warnings = match self.become_next(next, base, overlay) {
            Ok(warnings) => warnings,
            Err(failure) => {
                if let Some(Err(errors)) = file.map(|edited| self.origin.restore(&edited)) {
                    warn!("the file has the change that was refused: {errors}");
                }
                return Err(failure);
            }
        };
        let saved = if save { ", and saved" } else { "" };
        let message = format!("{change}: done{saved}");
        info!("{message}");
        Ok(Changed { messages: vec![message], warnings })
    }

    /// What a configuration means in this network.
    async fn work_out(
        &mut self,
        config: Config,
        inbox: &mut mpsc::Receiver<Request>,
    ) -> Result<Next, Failure> {
        if config.external.is_empty() {
            return Err(Failure::Configuration(
                "no external interface is named: where do clients arrive? Add [interfaces] external"
                    .to_owned(),
            ));
        }
        // Names that are known are looked up in their turn.
        let wanted = names::of(&config.rules);
        let mut resolved = self.resolved.clone();
        resolved.retain(|name, _| wanted.contains(name));
        let new: BTreeSet<String> =
            wanted.into_iter().filter(|name| !resolved.contains_key(name)).collect();
        if !new.is_empty() {
            let (found, failed) =
                self.answering(inbox, names::resolve(new, resolved.clone())).await;
            if !failed.is_empty() {
                return Err(unresolved(&config.rules, &failed));
            }
            resolved = found;
        }
        let mut plan = plan(&config.rules, &resolved)
            .map_err(|refused| Failure::Configuration(refused.to_string()))?;
        let interfaces = |config: &Config| {
            (config.external.clone(), config.internal.clone(), config.attach_to.clone())
        };
        let same_interfaces = interfaces(&config) == interfaces(&self.config);
        let snapshot = self.network.snapshot().await?;
        let backends =
            |plan: &Plan| -> BTreeSet<IpAddr> { plan.legs.iter().map(|leg| leg.backend).collect() };
        // Their routes are looked up again all the time.
        let survey = if same_interfaces && backends(&plan).is_subset(&backends(&self.plan)) {
            self.survey.clone()
        } else {
            let Self { network, survey, .. } = &*self;
            let looked = Survey::take(network, &snapshot, &config, &plan, survey);
            self.answering(inbox, looked).await?
        };
        if !same_interfaces {
            check_interfaces(&config, &snapshot, &survey)?;
        }
        // Rules that were there may wait for their network; a new one that cannot work is a mistake.
        let known = &self.survey.problems;
        let new: Vec<&str> = survey
            .problems
            .iter()
            .filter(|problem| !known.contains(problem))
            .map(String::as_str)
            .collect();
        if !new.is_empty() {
            return Err(Failure::Configuration(new.join("\n")));
        }
        plan.locate(&config.rules, &survey.local);
        Ok(Next { config, resolved, plan, survey, snapshot })
    }

    /// Makes it live, or nothing of it. Returns what is to be known of it.
    fn become_next(
        &mut self,
        next: Next,
        base: Arc<Config>,
        overlay: Overlay,
    ) -> Result<Vec<String>, Failure> {
        let Next { config, resolved, plan, survey, snapshot } = next;
        let masquerade = std::mem::replace(&mut self.ports.masquerade, config.masquerade.clone());
        let before = (
            std::mem::replace(&mut self.config, Arc::new(config)),
            std::mem::replace(&mut self.plan, plan),
            std::mem::replace(&mut self.survey, survey),
            std::mem::replace(&mut self.overlay, overlay),
            std::mem::replace(&mut self.resolved, resolved),
        );
        let refused = match self.reattach(&snapshot, &before.2.roles) {
            Ok(()) => self.load().map(|problem| Failure::System(anyhow::anyhow!(problem))),
            Err(error) => Some(Failure::Configuration(error.to_string())),
        };
        if let Some(refused) = refused {
            (self.config, self.plan, self.survey, self.overlay, self.resolved) = before;
            self.ports.masquerade = masquerade;
            let mut problems = self.settle(&snapshot);
            problems.extend(self.save().err().map(|error| error.to_string()));
            self.tell(problems);
            return Err(refused);
        }
        self.base = base;
        // A family may be new, or an interface.
        self.unprepared = true;
        let mut problems = self.settle(&snapshot);
        problems.extend(self.prepare(&snapshot).err().map(|error| error.to_string()));
        problems.extend(self.reserve_ports().err().map(|error| error.to_string()));
        problems.extend(self.survey.problems.clone());
        let mut warnings = problems.clone();
        self.tell(problems);
        let hints = self.new_hints(&snapshot);
        hints.iter().for_each(|hint| warn!("{hint}"));
        warnings.extend(hints);
        if let Err(error) = self.save() {
            warn!("{error}");
        }
        self.silent.retain(|name, _| self.config.rules.iter().any(|rule| rule.name == *name));
        Ok(warnings)
    }

    /// Attaches to interfaces in other ways and to other interfaces than those with `roles`, where that is asked for
    /// now: it may be refused.
    fn reattach(
        &mut self,
        snapshot: &Snapshot,
        roles: &BTreeMap<String, Role>,
    ) -> Result<(), AttachError> {
        let wanted = self.wanted(snapshot);
        let other = |(link, role): &(&Link, Role)| {
            let is_new = !roles.contains_key(&link.name);
            let differs = self.attached.contains_key(&link.index) && !self.is_attached(link, *role);
            is_new || differs
        };
        let other: Vec<(&Link, Role)> = wanted.values().copied().filter(other).collect();
        if other.is_empty() {
            return Ok(());
        }
        let modes = self.modes_until(&wanted);
        if let Some(problem) = self.tell_programs(snapshot, &wanted, &modes) {
            warn!("{problem}");
        }
        other.into_iter().try_for_each(|(link, role)| self.attach(link, role))
    }

    /// What of a configuration counts from the next start on only.
    fn need_restart(&self, next: &Config) -> Vec<String> {
        let differs = [
            (next.metrics != self.config.metrics, "[metrics] listen"),
            (next.refresh != self.config.refresh, "refresh of names"),
        ];
        let keys = differs.iter().filter(|(differs, _)| *differs).map(|(_, key)| *key);
        keys.map(|key| format!("{key} is as before until portfwd is started again")).collect()
    }

    /// Whether the tables have no room for flows as the rules need them.
    pub(super) fn lacks_room(&self) -> bool {
        let Capacity { flows: FlowRoom { v4, v6 }, crosses, mappings, .. } =
            self.datapath.capacity();
        let wanted =
            Capacity::of_flows(&self.config.rules, &self.plan, &self.ports, self.config.flows.size);
        wanted.flows.v4.0 > v4.0
            || wanted.flows.v6.0 > v6.0
            || wanted.crosses && !crosses
            || wanted.mappings > mappings
    }

    /// Has a new set, with room for what the rules mean now, in the place of this one. Its programs are
    /// attached by the next [`settle`](Self::settle).
    pub(super) fn renew(&mut self) -> anyhow::Result<()> {
        let Self { config, plan, survey, ports, compiler, attached, .. } = self;
        let mut compiler = Compiler::with_names(compiler.names());
        compiler.leave(&survey.own);
        let update = compiler.compile(&config.rules, plan, &survey.externals, ports);
        let names = update.counters;
        let mut capacity = Capacity::for_plan(&config.rules, plan, ports, config.flows.size);
        capacity.counters = Capacity::counters(names);
        info!("the rules need larger tables: loading the programs anew");
        let Some(kept) = self.datapath.kept() else {
            anyhow::bail!(
                "the tables are too small for what the rules mean now, and there is no bpffs to load larger ones \
                 beside them; start portfwd again"
            );
        };
        let pins = &self.owned.pins;
        let mut datapath =
            Datapath::take_over(capacity, ports, self.log_packets, pins, names, Some(&kept))?;
        datapath.set_own(plan.local())?;
        datapath.apply(&update)?;
        compiler.commit(&update);
        datapath.prepare(attached.values().map(|attachment| attachment.mode))?;
        // From here on it is this one.
        let packet_log =
            self.log_packets.then(|| anyhow::Ok(log_from(datapath.logger()?)?)).transpose()?;
        if let Some(kept) = datapath.kept() {
            let world = self.world();
            self.owned.write(kept, world, compiler.names())?;
        }
        datapath.stay();
        if let Err(error) = datapath.vouched_as(&self.datapath) {
            // They remember nothing until then.
            warn!("{error}");
        }
        (self.compiler, self.packet_log) = (compiler, packet_log);
        std::mem::replace(&mut self.datapath, datapath).leave();
        self.attached.clear();
        self.renewed = true;
        self.sweeper.pause();
        Ok(())
    }
}

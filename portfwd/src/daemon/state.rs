//! What outlives the daemon beside the maps: a file that one daemon at a time owns.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use portfwd_ebpf::path::Role;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::survey::Survey;
use crate::compile::Resolved;
use crate::config::Origin;
use crate::config::overlay::Overlay;
use crate::datapath::{Filter, Kept, Pins};
use crate::instance::{DIRECTORY, Instance};
use crate::network::Externals;
use crate::sysctl;

/// The version of [`State`].
const FORMAT: u32 = 1;

/// What a daemon leaves to the next one of its instance.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct State {
    format: u32,
    /// Of the kernel that runs, and of the network that was served: of another, nothing is left.
    boot: String,
    network: u64,
    pub kept: Kept,
    pub world: World,
    /// The names of rules, as their counters are numbered.
    pub names: Vec<String>,
}

/// What is the same again only if it is remembered.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct World {
    /// External addresses, in the order in which they came.
    pub v4: Vec<Ipv4Addr>,
    pub v6: Vec<Ipv6Addr>,
    /// Interfaces that led to backends.
    pub internal: BTreeSet<String>,
    /// Ports that were reserved, and were not before, as the kernel writes them.
    reserved: String,
    /// Names of backends.
    pub resolved: Resolved,
    /// What was changed at run time, and of what.
    origin: Origin,
    overlay: Overlay,
}

impl World {
    pub fn of(
        survey: &Survey,
        reserved: &BTreeSet<u16>,
        resolved: &Resolved,
        origin: &Origin,
        overlay: &Overlay,
    ) -> Self {
        let internal = survey.roles.iter().filter(|(_, role)| **role != Role::External);
        Self {
            v4: survey.externals.v4.clone(),
            v6: survey.externals.v6.clone(),
            internal: internal.map(|(name, _)| name.clone()).collect(),
            reserved: sysctl::format_ports(reserved),
            resolved: resolved.clone(),
            origin: origin.clone(),
            overlay: overlay.clone(),
        }
    }

    /// What was changed at run time, if the configuration comes from the same place.
    pub fn changes(&self, origin: &Origin) -> Overlay {
        if self.origin == *origin { self.overlay.clone() } else { Overlay::default() }
    }

    /// Ports that were reserved, and were not before.
    pub fn reserved(&self) -> BTreeSet<u16> {
        sysctl::parse_ports(&self.reserved).unwrap_or_default()
    }

    /// What a survey may begin with.
    pub fn survey(&self) -> Survey {
        let roles: BTreeMap<String, Role> =
            self.internal.iter().map(|name| (name.clone(), Role::Internal)).collect();
        let externals = Externals { v4: self.v4.clone(), v6: self.v6.clone() };
        Survey { roles, externals, ..Survey::default() }
    }
}

/// A daemon has the instance.
#[derive(Debug, thiserror::Error)]
#[error(
    "a portfwd runs as instance \"{0}\" already: stop it, or give this one another name with --instance"
)]
pub struct Running(Instance);

/// The place of an instance's state, for the one process that holds its lock.
pub struct Owned {
    pub pins: Pins,
    name: Instance,
    path: PathBuf,
    lock: PathBuf,
    /// Locked while it is open.
    _file: File,
    /// What the file says, but for the names, of which there were so many.
    written: Option<(Kept, World, usize)>,
}

impl Owned {
    /// Takes an instance.
    ///
    /// # Errors
    ///
    /// Another process has it, or its lock cannot be made.
    pub fn take(name: &Instance) -> anyhow::Result<Self> {
        let directory = Path::new(DIRECTORY);
        // Its mode is that of the service manager's, whatever the caller's umask is.
        let there = directory.is_dir();
        fs::create_dir_all(directory)
            .and_then(|()| match there {
                true => Ok(()),
                false => fs::set_permissions(directory, Permissions::from_mode(0o755)),
            })
            .with_context(|| format!("{DIRECTORY}: cannot make it; run as root"))?;
        let lock = directory.join(format!("{name}.lock"));
        loop {
            let file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .mode(0o600)
                .open(&lock)
                .with_context(|| format!("{}: cannot open it; run as root", lock.display()))?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => bail!(Running(name.clone())),
                Err(error) => bail!("{}: cannot lock it: {error}", lock.display()),
            }
            // Whoever had it before may have removed it in between.
            let same = fs::metadata(&lock).is_ok_and(|there| {
                file.metadata()
                    .is_ok_and(|own| (own.dev(), own.ino()) == (there.dev(), there.ino()))
            });
            if same {
                let pins = Pins::new(&name.to_string());
                let path = directory.join(format!("{name}.json"));
                return Ok(Self {
                    pins,
                    name: name.clone(),
                    path,
                    lock,
                    _file: file,
                    written: None,
                });
            }
        }
    }

    /// What the last daemon left.
    ///
    /// # Errors
    ///
    /// It cannot be understood, or is of another network: then something is in the way that has to be taken
    /// off by hand.
    pub fn read(&self) -> anyhow::Result<Option<State>> {
        let remedy = match &self.name {
            name if *name == Instance::default() => "portfwd detach".to_owned(),
            name => format!("portfwd detach --instance {name}"),
        };
        let path = self.path.display();
        let text = match fs::read(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if self.pins.has_links() {
                    bail!(
                        "there are programs of instance \"{}\" and no {path} to go on from: take them off \
                         with `{remedy}`",
                        self.name
                    );
                }
                // The file is there before the first link is.
                self.pins.remove().context("cannot unpin what an unfinished start left")?;
                return Ok(None);
            }
            Err(error) => bail!("{path}: cannot be read: {error}"),
        };
        #[derive(Deserialize)]
        struct Version {
            format: u32,
            boot: String,
        }
        let wrong = |error: serde_json::Error| {
            anyhow::anyhow!(
                "{path}: not what portfwd writes ({error}): end forwarding with `{remedy}`"
            )
        };
        let Version { format, boot } = serde_json::from_slice(&text).map_err(wrong)?;
        // What is pinned goes with its file system, as a container's does.
        if boot != boot_id()? || !self.pins.is_there() {
            return Ok(None);
        }
        if format != FORMAT {
            bail!(
                "{path} is of another version of portfwd ({format}; this one has {FORMAT}): start that \
                 version again, or end forwarding, its flows and its counters with `{remedy}`"
            );
        }
        let state: State = serde_json::from_slice(&text).map_err(wrong)?;
        if state.network != network_id()? {
            bail!(
                "instance \"{}\" forwards in another network namespace: take another name with \
                 --instance, or end that with `{remedy}`",
                self.name
            );
        }
        Ok(Some(state))
    }

    /// Has the file say this, unless it does.
    ///
    /// # Errors
    ///
    /// It cannot be written; then it says what it said.
    pub fn write<'a>(
        &mut self,
        kept: Kept,
        world: World,
        names: impl ExactSizeIterator<Item = &'a str>,
    ) -> anyhow::Result<()> {
        let now = (kept, world, names.len());
        if self.written.as_ref() == Some(&now) {
            return Ok(());
        }
        let state = State {
            format: FORMAT,
            boot: boot_id()?,
            network: network_id()?,
            kept: now.0.clone(),
            world: now.1.clone(),
            names: names.map(str::to_owned).collect(),
        };
        let new = self.path.with_extension("new");
        let written = (|| {
            // Secrets are in there.
            let mut file = OpenOptions::new()
                .create(true)
                .truncate(true)
                .write(true)
                .mode(0o600)
                .open(&new)?;
            file.write_all(&serde_json::to_vec(&state)?)?;
            file.sync_all()?;
            fs::rename(&new, &self.path)
        })();
        if let Err(error) = written {
            let _: io::Result<()> = fs::remove_file(&new);
            bail!("{}: cannot be written: {error}; make room there", self.path.display());
        }
        self.written = Some(now);
        Ok(())
    }

    /// Takes off all that is left of the instance, whatever version left it. Returns whether something was.
    ///
    /// # Errors
    ///
    /// Something cannot be taken off.
    pub fn take_off(self) -> anyhow::Result<bool> {
        let state = fs::read(&self.path).unwrap_or_default();
        let state: serde_json::Value = serde_json::from_slice(&state).unwrap_or_default();
        let here = |name: &str, own: anyhow::Result<serde_json::Value>| {
            own.is_ok_and(|own| state.get(name) == Some(&own))
        };
        let found = self.pins.is_there();
        let noted = ["/kept/filters/0", "/world/reserved"].map(|at| state.pointer(at).cloned());
        let is_noted = noted.into_iter().flatten().any(|it| it != "");
        if here("boot", boot_id().map(Into::into))
            && !here("network", network_id().map(Into::into))
            && is_noted
        {
            tracing::warn!(
                "instance \"{}\" forwarded in another network namespace: ports that it reserved, and filters of TC \
                 before Linux 6.6, stay there until that is gone",
                self.name
            );
        }
        if here("boot", boot_id().map(Into::into)) && here("network", network_id().map(Into::into))
        {
            let filters = state.pointer("/kept/filters").cloned().unwrap_or_default();
            let filters: Vec<Filter> = serde_json::from_value(filters).unwrap_or_default();
            filters.into_iter().for_each(Filter::take_off);
            let reserved = state.pointer("/world/reserved").and_then(|it| it.as_str());
            let reserved = reserved.and_then(sysctl::parse_ports).unwrap_or_default();
            if !reserved.is_empty() {
                match sysctl::release_ports(&reserved) {
                    Ok(change) => change.iter().for_each(|change| tracing::info!("{change}")),
                    // It is worth less than the end of forwarding.
                    Err(error) => tracing::warn!("{error}"),
                }
            }
        }
        self.pins.remove().context("cannot unpin all of it")?;
        self.remove()?;
        Ok(found)
    }

    /// Removes the file: nothing is left of the instance.
    pub fn remove(self) -> io::Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        if !self.path.exists() {
            if !self.pins.is_there() {
                // Of a start that was refused.
                let _: io::Result<()> = self.pins.remove();
            }
            // While it is locked: whoever opens it in between finds out.
            let _: io::Result<()> = fs::remove_file(&self.lock);
        }
    }
}

fn boot_id() -> anyhow::Result<String> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    Ok(fs::read_to_string(PATH).context(PATH)?.trim().to_owned())
}

/// The number of the network namespace.
fn network_id() -> anyhow::Result<u64> {
    const PATH: &str = "/proc/thread-self/ns/net";
    Ok(fs::metadata(PATH).context(PATH)?.ino())
}

//! What systemd is told, as sd_notify(3) has it. Where there is none, nobody is.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::Interval;
use tracing::debug;

/// Forwarding, also with what was reloaded.
pub fn ready() {
    tell(&[NotifyState::Ready]);
}

/// About to change the rules; [`ready`] says that it is done, whatever came of it.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => debug!("systemd is not told: {error}"),
    }
}

pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// Not stuck.
pub fn alive() {
    tell(&[NotifyState::Watchdog]);
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        debug!("systemd is not told: {error}");
    }
}

/// The line that `systemctl status` shows.
#[derive(Debug, Default)]
pub struct Status(String);

impl Status {
    /// Tells it if it is new.
    pub fn show(&mut self, rules: usize, interfaces: usize, problems: usize) {
        let line = line(rules, interfaces, problems);
        if self.0 != line {
            tell(&[NotifyState::Status(&line)]);
            self.0 = line;
        }
    }
}

fn line(rules: usize, interfaces: usize, problems: usize) -> String {
    let count = |count, what| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
    let mut line =
        format!("forwarding {}, {}", count(rules, "rule"), count(interfaces, "interface"));
    if problems > 0 {
        line.push_str(&format!("; {}, see the log", count(problems, "problem")));
    }
    line
}

/// When systemd wants to hear that the daemon is alive.
#[derive(Debug)]
pub struct Watchdog(Option<Interval>);

impl Watchdog {
    pub fn find() -> Self {
        // Twice in the time that it has, as sd_watchdog_enabled(3) recommends.
        let period = |limit: Duration| (limit / 2).max(Duration::from_millis(1));
        Self(sd_notify::watchdog_enabled().map(|limit| super::every(period(limit))))
    }

    /// Waits until then; for ever, if systemd does not watch.
    pub async fn due(&mut self) {
        match &mut self.0 {
            Some(interval) => drop(interval.tick().await),
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_counts() {
        assert_eq!(line(1, 2, 0), "forwarding 1 rule, 2 interfaces");
        assert_eq!(line(40, 1, 1), "forwarding 40 rules, 1 interface; 1 problem, see the log");
    }
}

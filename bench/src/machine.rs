//! What figures were taken on: the machine, and the versions of who was measured.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::proxy;

/// How the programs of contenders are asked for their versions.
const PROGRAMS: [(&str, &str); 5] = [
    ("nft", "--version"),
    ("iptables", "--version"),
    ("nginx", "-v"),
    ("haproxy", "-v"),
    ("socat", "-V"),
];

/// A line for the machine, one for portfwd, and one for each program that is there.
pub fn notes(portfwd: &Path) -> Vec<String> {
    let unknown = || "unknown".to_owned();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_else(|_| unknown());
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let (model, cores) = processor(&cpus);
    let machine = format!("machine: Linux {}, {cores} cores, {model}", kernel.trim());

    // Of the sources that this bench was built from.
    let mut git = Command::new("git");
    git.args(["-c", "safe.directory=*", "-C", env!("CARGO_MANIFEST_DIR")]);
    let commit = said(git.args(["describe", "--always", "--dirty"]));
    let version = said(Command::new(portfwd).arg("--version")).unwrap_or_else(unknown);
    let commit = commit.map_or_else(String::new, |commit| format!(", commit {commit}"));

    let programs = PROGRAMS.into_iter().filter_map(|(program, flag)| {
        proxy::find(program)?;
        let version = said(Command::new(program).arg(flag)).unwrap_or_else(unknown);
        Some(format!("version: {program}: {version}"))
    });
    [machine, format!("version: {version}{commit}")].into_iter().chain(programs).collect()
}

/// The model and the number of cores that `/proc/cpuinfo` names.
fn processor(cpus: &str) -> (&str, usize) {
    let fields = || cpus.lines().filter_map(|line| line.split_once(':'));
    let model = fields().find(|(name, _)| name.trim() == "model name");
    let model = model.map_or("unknown processor", |(_, model)| model.trim());
    (model, fields().filter(|(name, _)| name.trim() == "processor").count())
}

/// The line in which a program says its version, wherever it prints it: the first with a number.
fn said(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().find(|line| line.contains(|letter: char| letter.is_ascii_digit()))?;
    Some(line.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_is_named_and_its_cores_counted() {
        let cpus = "processor\t: 0\nmodel\t\t: 2\nmodel name\t: Some CPU: fast\n\nprocessor\t: 1\n";
        assert_eq!(processor(cpus), ("Some CPU: fast", 2));
        assert_eq!(processor(""), ("unknown processor", 0));
    }

    #[test]
    fn a_version_is_found_wherever_it_is_printed() {
        let shell = |script: &str| said(Command::new("sh").args(["-c", script]));
        assert_eq!(shell("echo by Someone; echo v 1.2 on >&2").as_deref(), Some("v 1.2 on"));
        assert_eq!(shell("echo 1; false"), None);
    }
}

//! `cargo xtask test`: the three layers of tests, and one count of all.

use std::{
    env, fs,
    io::{self, BufRead, BufReader},
    mem::take,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};

use crate::{
    cargo::{self, Executable},
    dist,
    kernels::{self, Machine, Series, quoted},
    root,
    setup::{self, Need},
};

/// Starts the test programs one after the other, each after a line that names its layer.
/// Arguments: layer, path, the way to attach, and the filter or nothing, again and again. On cards: those of a
/// virtual machine instead of veth pairs. Tests of interfaces leave the way to portfwd.
const AS_ROOT: &str = r#"
failed=0
cards=$PORTFWD_TEST_CARDS
while [ $# -gt 0 ]; do
    echo "layer: $1"
    if [ "$3" != native ]; then echo "attached by $3:"; fi
    unset PORTFWD_TEST_CARDS skip
    if [ "$3" != native ]; then skip="--skip=interfaces:: --skip=tc::"; fi
    if [ "$3" = "native on cards" ]; then export PORTFWD_TEST_CARDS="$cards"; fi
    PORTFWD_TEST_ATTACH=${3%% *} "$2" --show-output $skip ${4:+"$4"} || failed=1
    shift 4
done
(exit $failed)
"#;

/// The tests that say whether a kernel takes the programs, translates and forwards, by their target, for a
/// machine without KVM: there it takes half a minute to load them.
const QUICK: [(&str, &str); 2] = [
    ("program", "flows::masquerade_hides_the_client_and_answers_find_it"),
    ("forward", "rules::the_server_sees_the_clients_address_and_port"),
];

/// After these times a machine is taken to hang.
const LIMIT: Duration = Duration::from_secs(6 * 60 * 60);
const QUICK_LIMIT: Duration = Duration::from_secs(15 * 60);

#[derive(clap::Args)]
pub struct Options {
    /// Run only tests whose names contain this
    filter: Option<String>,
    /// Run only this layer; may be given more than once
    #[arg(long, value_enum)]
    layer: Vec<Layer>,
    /// Run the tests that need root on Debian's kernel of this series, 6.1 for example, in a virtual
    /// machine; may be given more than once
    #[arg(long, value_name = "SERIES")]
    kernel: Vec<Series>,
    /// On other kernels run only a few tests of each sort: minutes, not hours
    #[arg(long, requires = "kernel", conflicts_with = "filter")]
    quick: bool,
}

impl Options {
    fn wants(&self, layer: Layer) -> bool {
        self.layer.is_empty() || self.layer.contains(&layer)
    }

    /// The filter, or nothing.
    fn filter(&self) -> &str {
        self.filter.as_deref().unwrap_or_default()
    }
}

/// What a test needs: nothing, the kernel's BPF_PROG_TEST_RUN, or network namespaces.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
enum Layer {
    Host,
    Program,
    Network,
}

impl Layer {
    const ALL: [Self; 3] = [Self::Host, Self::Program, Self::Network];

    fn name(self) -> &'static str {
        ["host", "program", "network"][self as usize]
    }

    /// The layer of an integration test, by the name of its file.
    fn of(target: &str) -> Self {
        if target == "program" { Self::Program } else { Self::Network }
    }
}

/// In which ways programs are attached in an integration test. `program` attaches none: it tries those of XDP
/// and those of TC.
fn attached_by(target: &str) -> &'static [&'static str] {
    match target {
        "program" => &["native", "tc"],
        "forward" | "flows" => &["native", "generic", "tc"],
        "faults" => &["native", "tc"],
        _ => &["native"],
    }
}

/// What is tried in a virtual machine beside that: its cards, which have several queues.
fn on_cards(target: &str) -> &'static [&'static str] {
    if target == "forward" { &["native on cards"] } else { &[] }
}

/// The test of the Debian package. It has a kernel and a network, but not those that others are run on.
const PACKAGE: &str = "package";

/// How tests say that they skip for a sort of interface that the kernel was built without.
const LACKS: &str = "this kernel has no ";

/// Runs what the options ask for. Fails if a test failed, if none ran, or, as root in CI, if one
/// was skipped, but for what the kernel lacks.
pub fn run(options: &Options) -> Result<()> {
    if !options.kernel.is_empty() {
        return on_kernels(options);
    }
    let wanted = |layer| options.wants(layer);
    let as_root = wanted(Layer::Program) || wanted(Layer::Network);
    setup::bring(if as_root { Need::Everything } else { Need::Build })?;
    let mut report = Report::default();
    let mut died = false;
    if wanted(Layer::Host) {
        // The eBPF binary does not compile for the host, hence the second call.
        let libraries = ["portfwd-ebpf", "portfwd-tests", "portfwd-fuzz"];
        let libraries = libraries.map(|name| ["--package", name]);
        let libraries = [libraries.as_flattened(), &["--lib"]].concat();
        let bench = ["--package", "portfwd-bench", "--bin", "bench"];
        for packages in [&[][..], &libraries, &bench] {
            let mut command = cargo::command();
            command.arg("test").args(packages).args(["--no-fail-fast", "--", "--show-output"]);
            died |= report.follow(command.args(&options.filter))?;
        }
    }
    if as_root {
        let other = build_other()?;
        let (portfwd, mut tests) = build()?;
        // It takes minutes to make: only where it is asked for, or everything is.
        let package = wanted(Layer::Network)
            && (options.filter.is_none() || options.filter().contains(PACKAGE));
        let package = if package { dist::build()? } else { PathBuf::new() };
        if package.as_os_str().is_empty() {
            tests.retain(|test| test.target != PACKAGE);
        }
        root::ask("the tests of the program and network layers")?;
        let variables = [
            ("PORTFWD_BIN", portfwd.as_os_str()),
            ("PORTFWD_OTHER_BIN", other.as_os_str()),
            ("PORTFWD_DEB", package.as_os_str()),
        ];
        let mut command = root::command("sh", &variables);
        command.args(["-c", AS_ROOT, "sh"]);
        for Executable { target, path } in &tests {
            let layer = Layer::of(target);
            if wanted(layer) {
                for attach in attached_by(target) {
                    command.arg(layer.name()).arg(path).arg(attach).arg(options.filter());
                }
            }
        }
        died |= report.follow(command.current_dir(Path::new(cargo::WORKSPACE).join("tests")))?;
    }
    println!("{}", report.summary());
    report.verdict(died, root::is_root() && env::var_os("CI").is_some_and(|ci| ci == "true"))
}

/// Builds portfwd as another version may be, with tables of another layout, and puts it beside the one that cargo
/// builds next; unless the environment names another one.
fn build_other() -> Result<PathBuf> {
    if let Some(other) = env::var_os("PORTFWD_OTHER_BIN") {
        return Ok(other.into());
    }
    let built = cargo::build_portfwd(&["--features", "other-layout"])?;
    let other = built.with_file_name("portfwd-other-layout");
    // One of before may run, and cargo's is a link to what it keeps.
    let _: io::Result<()> = fs::remove_file(&other);
    fs::copy(&built, &other).with_context(|| format!("cannot make {}", other.display()))?;
    Ok(other)
}

/// Builds portfwd and the tests that need root, and gives where they are.
fn build() -> Result<(PathBuf, Vec<Executable>)> {
    // Not the release build: the datapath is optimised in either, and here overflow is checked.
    let portfwd = cargo::build_portfwd(&[])?;
    let mut tests =
        cargo::build(&["test", "--package", "portfwd-tests", "--test", "*", "--no-run"])?;
    tests.sort_by_key(|test| (Layer::of(&test.target), test.target.clone()));
    Ok((portfwd, tests))
}

/// Runs what the options ask for on other kernels, all at once. A skip is no failure there: kernels differ in
/// what they have.
fn on_kernels(options: &Options) -> Result<()> {
    setup::bring(Need::Everything)?;
    setup::bring(Need::Kernels)?;
    let kernels = options.kernel.iter().map(|series| kernels::bring(*series));
    let kernels = kernels.collect::<Result<Vec<_>>>()?;
    let other = build_other()?;
    let (portfwd, mut tests) = build()?;
    tests.retain(|test| test.target != PACKAGE);
    root::ask("virtual machines with networks")?;
    let limit = if options.quick { QUICK_LIMIT } else { LIMIT };
    let workspace = Path::new(cargo::WORKSPACE).join("tests").canonicalize()?;
    let mut task = format!(
        "cd {}\nexport PORTFWD_BIN={} PORTFWD_OTHER_BIN={} PORTFWD_TEST_CARDS='{}' PORTFWD_TEST_LOAD=200\nset --",
        quoted(workspace.as_os_str()),
        quoted(portfwd.as_os_str()),
        quoted(other.as_os_str()),
        kernels::CARDS,
    );
    for Executable { target, path } in &tests {
        let layer = Layer::of(target);
        let quick = QUICK.iter().find(|(of, _)| of == target).map(|(_, test)| *test);
        let filter = if options.quick { quick } else { Some(options.filter()) };
        if let Some(filter) = filter.filter(|_| options.wants(layer)) {
            let (path, filter) = (quoted(path.as_os_str()), quoted(filter.as_ref()));
            for attach in attached_by(target).iter().chain(on_cards(target)) {
                task += &format!(" {} {path} '{attach}' {filter}", layer.name());
            }
        }
    }
    task += AS_ROOT;
    let machines = kernels.into_iter().map(|kernel| Machine::start(kernel, &task, limit));
    let machines = machines.collect::<Result<Vec<_>>>()?;
    let mut verdict = Ok(());
    for (series, machine) in options.kernel.iter().zip(machines) {
        println!("kernel {series}:");
        let mut report = Report::default();
        let done = machine.follow(|line| report.show(line));
        println!("{}", report.summary());
        let one = match done {
            Ok(succeeded) => report.verdict(!succeeded && report.sum().failed == 0, false),
            Err(error) => Err(error),
        };
        verdict = verdict.and(one.with_context(|| format!("kernel {series}")));
    }
    verdict
}

#[derive(Clone, Copy, Default, Debug, PartialEq)]
struct Tally {
    passed: usize,
    failed: usize,
    skipped: usize,
}

/// What libtest's lines add up to.
#[derive(Default)]
struct Report {
    tallies: [Tally; 3],
    layer: usize,
    /// The output of tests that passed is being shown: it is read for skips and not repeated.
    successes: bool,
    /// The test whose output is being shown.
    test: String,
    /// Tests of the program being run that skipped themselves; libtest will count them as passed.
    pending: usize,
    /// All tests that skipped themselves, and why.
    skips: Vec<String>,
    /// How many of these could not but skip.
    lacking: usize,
}

impl Report {
    /// Runs a command that runs tests, shows its lines and counts. Gives whether it failed
    /// without a failed test: a build error, or a test program that died.
    fn follow(&mut self, command: &mut Command) -> Result<bool> {
        let failed = self.sum().failed;
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {:?}", command.get_program()))?;
        let output = child.stdout.take().context("the tests have no output")?;
        for line in BufReader::new(output).split(b'\n') {
            let line = line?;
            self.show(&String::from_utf8_lossy(&line));
        }
        Ok(!child.wait()?.success() && self.sum().failed == failed)
    }

    /// Takes in a line, and shows it if it is to be shown.
    fn show(&mut self, line: &str) {
        if self.read(line) {
            println!("{line}");
        }
    }

    /// Takes in a line of libtest's; gives whether to show it.
    fn read(&mut self, line: &str) -> bool {
        let tally = &mut self.tallies[self.layer];
        if let Some(name) = line.strip_prefix("layer: ") {
            self.pending = 0;
            self.layer = Layer::ALL.iter().position(|layer| layer.name() == name).unwrap_or(0);
            return false;
        }
        if let Some(result) = line.strip_prefix("test result: ") {
            // ok. 5 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.00s
            let mut words = result.split([' ', ';']).filter(|word| !word.is_empty()).skip(1);
            while let (Some(number), Some(word)) = (words.next(), words.next()) {
                let number: usize = number.parse().unwrap_or(0);
                match word {
                    "passed" => tally.passed += number.saturating_sub(self.pending),
                    "failed" => tally.failed += number,
                    "ignored" => tally.skipped += number,
                    _ => {}
                }
            }
            tally.skipped += take(&mut self.pending);
            self.successes = false;
        } else if line == "successes:" {
            self.successes = true;
        } else if line == "failures:" {
            self.successes = false;
        } else if self.successes {
            if let Some(name) = line.strip_prefix("---- ") {
                self.test = name.trim_end_matches(" stdout ----").into();
            } else if let Some(reason) = line.strip_prefix("skipped: ")
                && !self.test.is_empty()
            {
                // Taking the name: a test skips once.
                self.pending += 1;
                self.lacking += usize::from(reason.starts_with(LACKS));
                self.skips.push(format!("{}: {reason}", take(&mut self.test)));
            }
        }
        !self.successes
    }

    fn sum(&self) -> Tally {
        self.tallies.iter().fold(Tally::default(), |sum, tally| Tally {
            passed: sum.passed + tally.passed,
            failed: sum.failed + tally.failed,
            skipped: sum.skipped + tally.skipped,
        })
    }

    /// The skips and the sums, for the end.
    fn summary(&self) -> String {
        let layers = Layer::ALL.iter().zip(&self.tallies).map(|(layer, tally)| {
            format!("{} {}", layer.name(), tally.passed + tally.failed + tally.skipped)
        });
        let Tally { passed, failed, skipped } = self.sum();
        let skips = self.skips.iter().map(|skip| format!("skipped: {skip}\n")).collect::<String>();
        let layers = layers.collect::<Vec<_>>().join(", ");
        format!(
            "{skips}tests by layer: {layers}\n{passed} passed, {failed} failed, {skipped} skipped"
        )
    }

    /// Is all well?
    fn verdict(&self, died: bool, skip_is_failure: bool) -> Result<()> {
        match self.sum() {
            Tally { failed: 1.., .. } => bail!("tests failed"),
            _ if died => bail!("tests did not compile or died before their end; see above"),
            Tally { passed: 0, .. } => bail!("no test ran"),
            Tally { skipped, .. } if skip_is_failure && skipped > self.lacking => {
                bail!("tests were skipped, and in CI as root none may be")
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (Report, Vec<&str>) {
        let mut report = Report::default();
        let shown = text.lines().filter(|line| report.read(line)).collect();
        (report, shown)
    }

    const OUTPUT: &str = "layer: program
running 4 tests
test one ... ok
test two ... ok
test three ... FAILED
test four ... ignored, slow

successes:

---- one stdout ----
skipped: no BPF
skipped: no BPF at all
noise

successes:
    one
    two

failures:

---- three stdout ----
skipped: not really

failures:
    three

test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.01s
layer: network
test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s";

    #[test]
    fn counts_by_layer_and_takes_a_skip_for_what_it_is() {
        let (report, _) = read(OUTPUT);
        assert_eq!(
            report.tallies,
            [
                Tally::default(),
                Tally { passed: 1, failed: 1, skipped: 2 },
                Tally { passed: 3, failed: 0, skipped: 0 },
            ]
        );
        let summary = "skipped: one: no BPF\ntests by layer: host 0, program 4, network 3\n\
                       4 passed, 1 failed, 2 skipped";
        assert_eq!(report.summary(), summary);
    }

    #[test]
    fn shows_failures_and_not_what_passing_tests_print() {
        let (_, shown) = read(OUTPUT);
        assert!(shown.contains(&"---- three stdout ----"));
        assert!(shown.contains(&"test one ... ok"));
        assert!(!shown.contains(&"noise"));
    }

    #[test]
    fn fails_when_a_test_failed_died_or_none_ran() {
        let ok = "test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out";
        assert!(read(ok).0.verdict(false, true).is_ok());
        assert!(read(ok).0.verdict(true, false).is_err());
        assert!(read(OUTPUT).0.verdict(false, false).is_err());
        assert!(read("").0.verdict(false, false).is_err());
        let skipped = ok.replace("0 ignored", "1 ignored");
        assert!(read(&skipped).0.verdict(false, false).is_ok());
        assert!(read(&skipped).0.verdict(false, true).is_err());
        let lacks = "successes:\n---- one stdout ----\nskipped: this kernel has no VLAN\n";
        assert!(
            read(&format!("{lacks}{}", ok.replace("1 passed", "2 passed")))
                .0
                .verdict(false, true)
                .is_ok()
        );
        assert!(read(&format!("{lacks}{skipped}")).0.verdict(false, true).is_err());
    }
}

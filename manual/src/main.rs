//! Writes manual pages and completions into a directory, as `cargo xtask dist` packs them.

use std::{
    env,
    error::Error,
    fs::{self, OpenOptions},
    io::Write as _,
    path::PathBuf,
};

use clap::{CommandFactory as _, ValueEnum as _};
use clap_complete::{Shell, generate_to};
use portfwd::cli::Arguments;

/// What the commands' definition does not have, for the page of all.
const MORE: &str = r#".SH "EXIT STATUS"
0 if it is done, 1 if it failed, 2 if the command line or the configuration is wrong.
.B portfwd diff
ends with 1 if there is a difference.
.SH FILES
.TP
.I /etc/portfwd/portfwd.toml
the configuration
.TP
.I /run/portfwd/INSTANCE.sock
the control socket: root, and the group portfwd to look
.TP
.I /sys/fs/bpf/portfwd/INSTANCE
programs and tables, which outlive the daemon; INSTANCE is portfwd unless named
.TP
.I /usr/share/doc/portfwd/README.md
every key of the configuration, and what a SPEC is
.TP
.I /usr/share/doc/portfwd/operating.md
from the first start to removal
"#;

/// For the page of one command.
const SEE: &str = r#".SH "SEE ALSO"
.BR portfwd (1)
"#;

fn main() -> Result<(), Box<dyn Error>> {
    let directory = PathBuf::from(env::args_os().nth(1).ok_or("give a directory")?);
    fs::create_dir_all(&directory)?;
    let command = Arguments::command();
    for shell in Shell::value_variants() {
        generate_to(*shell, &mut command.clone(), "portfwd", &directory)?;
    }
    clap_mangen::generate_to(command.disable_help_subcommand(true), &directory)?;
    for page in fs::read_dir(&directory)? {
        let page = page?.path();
        if page.extension().is_some_and(|it| it == "1") {
            let is_main = page.file_stem().is_some_and(|it| it == "portfwd");
            let mut page = OpenOptions::new().append(true).open(page)?;
            page.write_all(if is_main { MORE } else { SEE }.as_bytes())?;
        }
    }
    Ok(())
}

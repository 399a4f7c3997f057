//! The `portfwd` command.

use std::process::ExitCode;

use clap::Parser as _;
use portfwd::cli::Arguments;

fn main() -> ExitCode {
    portfwd::cli::main(Arguments::parse())
}

//! Writes manual pages and completions into a directory, as `cargo xtask dist` packs them.

use std::{env, error::Error, fs, path::PathBuf};

use clap::{CommandFactory as _, ValueEnum as _};
use clap_complete::{Shell, generate_to};
use portfwd::cli::Arguments;

fn main() -> Result<(), Box<dyn Error>> {
    let directory = PathBuf::from(env::args_os().nth(1).ok_or("give a directory")?);
    fs::create_dir_all(&directory)?;
    let command = Arguments::command();
    for shell in Shell::value_variants() {
        generate_to(*shell, &mut command.clone(), "portfwd", &directory)?;
    }
    clap_mangen::generate_to(command.disable_help_subcommand(true), &directory)?;
    Ok(())
}

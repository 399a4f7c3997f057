//! stand-in
use std::path::Path;
#[derive(clap::Args)]
pub struct Options {
    #[arg(long)]
    pub seconds: Option<u64>,
}
pub fn run(options: &Options, portfwd: &Path) -> anyhow::Result<()> {
    println!("LAB {:?} {}", options.seconds, portfwd.display());
    Ok(())
}

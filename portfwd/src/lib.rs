//! portfwd's control plane. `main.rs` is its command; ARCHITECTURE.md says how the parts go together.

pub mod api;
pub mod cli;
pub mod compile;
pub mod config;
pub mod daemon;
pub mod datapath;
pub mod flows;
pub mod instance;
pub mod metrics;
pub mod names;
pub mod network;
mod privileges;
pub mod report;
pub mod rule;
mod serve;
pub mod sysctl;

//! What must hold for any input: of packets, of conversations, and of configurations.
//!
//! Each function takes an input as a fuzzer makes it, any bytes, and panics if something does not
//! hold. The tests below give them the inputs in `corpus` and `crashes`, and random changes of those.

mod check;
mod config;
mod conversation;
mod input;
mod packet;
mod wire;
mod world;

pub use config::{config, edit};
pub use conversation::conversation;
pub use packet::packet;

#[cfg(test)]
mod tests;

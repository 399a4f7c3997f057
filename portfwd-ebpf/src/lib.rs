//! The datapath's logic, free of aya: what the packet's way is ([`path`], and of the few [`detour`]),
//! what flows remember ([`flow`], [`flow_table`]), what the maps hold ([`table`]), how headers are read ([`packet`],
//! [`segment`], [`icmp`], [`mss`]) and how checksums are kept ([`checksum`]).
//!
//! `main.rs` beside this file gives it the kernel's maps and helpers; the host's tests give it plain
//! tables. Addresses and ports are network-order bytes everywhere, in types of their own.
#![no_std]
#![cfg_attr(feature = "strict", deny(warnings))]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

pub mod answer;
pub mod checksum;
pub mod cross;
pub mod detour;
pub mod flow;
pub mod flow_table;
pub mod icmp;
pub mod mss;
pub mod packet;
pub mod path;
pub mod segment;
pub mod table;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

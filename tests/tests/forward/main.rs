//! Real traffic through portfwd, every frame verified, every packet counted.

mod beside;
mod modes;
mod programs;
mod rules;
mod running;

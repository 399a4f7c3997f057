//! Real traffic through portfwd, every frame verified, every packet counted.

mod beside;
mod few;
mod modes;
mod programs;
mod rules;
mod running;

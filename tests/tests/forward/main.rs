//! Real traffic through portfwd, every frame verified, every packet counted.

mod applications;
mod beside;
mod cross;
mod few;
mod interfaces;
mod large;
mod modes;
mod own;
mod programs;
mod rules;
mod running;
mod tc;

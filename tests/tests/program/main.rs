//! The real programs in the kernel, one frame at a time through BPF_PROG_TEST_RUN.

mod answers;
mod change;
mod cross;
mod errors;
mod flows;
mod fragments;
mod headers;
mod hostile;
mod large;
mod mss;
mod others;
mod own;
mod remembered;
mod router;
mod routes;
mod rules;
mod spare;

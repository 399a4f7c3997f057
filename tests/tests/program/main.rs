//! The real programs in the kernel, one frame at a time through BPF_PROG_TEST_RUN.

mod change;
mod flows;
mod headers;
mod hostile;
mod own;
mod remembered;
mod router;
mod routes;
mod rules;

//! A short run of the oracle; `cargo xtask oracle` makes longer ones.

use portfwd_tests::{binary, is_root, oracle, random};

#[test]
fn portfwd_does_what_nftables_does() {
    if !is_root() {
        return;
    }
    match oracle::run(&binary(), 5000, random::seed(), |_| Ok(())) {
        Ok(summary) => {
            println!("{summary}");
            assert!(summary.same - summary.silent > 3500, "{summary}");
        }
        Err(error) => panic!("{error:#}"),
    }
}

/// With all that the stream can have, also what portfwd does not do yet.
#[test]
fn nftables_does_what_nftables_does() {
    if !is_root() {
        return;
    }
    if let Err(error) = oracle::run_against_itself(3000, random::seed()) {
        panic!("{error:#}");
    }
}

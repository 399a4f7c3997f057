//! Several daemons on one box are told apart by a name.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::rule::{Invalid, invalid};

/// The name of a daemon, also of its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance(String);

impl Instance {
    const LONGEST: usize = 32;

    /// Where it listens unless told otherwise.
    pub fn socket(&self) -> PathBuf {
        format!("/run/portfwd/{self}.sock").into()
    }
}

impl Default for Instance {
    fn default() -> Self {
        Self("portfwd".to_owned())
    }
}

impl fmt::Display for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Instance {
    type Err = Invalid;

    fn from_str(name: &str) -> Result<Self, Invalid> {
        // bpffs takes no dots.
        let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || name.starts_with('-') || !name.chars().all(fits) {
            return invalid!("an instance has letters, digits, - and _, and begins with no -");
        }
        if name.len() > Self::LONGEST {
            return invalid!(
                "{} letters are too many; write {} at most",
                name.len(),
                Self::LONGEST
            );
        }
        Ok(Self(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for name in ["a", "_", "game-1", "Game_1", &"a".repeat(32)] {
            assert_eq!(name.parse::<Instance>().expect(name).to_string(), name);
        }
        for name in ["", ".", "..", "a.b", "a/b", "-a", "a b", "é", "a\n", &"a".repeat(33)] {
            assert!(name.parse::<Instance>().is_err(), "{name:?}");
        }
        let default = Instance::default();
        assert_eq!(default.socket(), PathBuf::from("/run/portfwd/portfwd.sock"));
        assert_eq!(default.to_string().parse(), Ok(default));
    }
}

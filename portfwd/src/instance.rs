//! Several daemons on one box are told apart by a name.

use std::fmt;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::rule::{Invalid, invalid};

/// Where sockets, locks and state are. It is empty after a reboot.
pub const DIRECTORY: &str = "/run/portfwd";

/// The name of a daemon, also of its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance(String);

impl Instance {
    const LONGEST: usize = 32;

    /// Where it listens unless told otherwise.
    pub fn socket(&self) -> PathBuf {
        format!("{DIRECTORY}/{self}.sock").into()
    }

    /// The one that listens there and has no other name: the same for the same path.
    pub fn of_socket(socket: &Path) -> Self {
        let path = std::path::absolute(socket).unwrap_or_else(|_| socket.to_owned());
        let usual = path.file_stem().and_then(|stem| stem.to_str()?.parse::<Self>().ok());
        usual.filter(|usual| usual.socket() == path).unwrap_or_else(|| {
            // FNV-1a: of any version.
            let hash =
                path.as_os_str().as_bytes().iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
                    (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
                });
            Self(format!("socket-{hash:016x}"))
        })
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
        for (socket, name) in [
            ("/run/portfwd/portfwd.sock", "portfwd"),
            ("/run/portfwd/game-1.sock", "game-1"),
            ("/tmp/portfwd.sock", "socket-f9768c41aa958cfa"),
        ] {
            assert_eq!(Instance::of_socket(Path::new(socket)).to_string(), name, "{socket}");
        }
        let default = Instance::default();
        assert_eq!(default.socket(), PathBuf::from("/run/portfwd/portfwd.sock"));
        assert_eq!(default.to_string().parse(), Ok(default));
    }
}

//! A configuration that cannot be written stays as it was.

use std::ffi::CString;
use std::fs;
use std::path::Path;

use portfwd::config::edit::save;
use portfwd_tests::{TempDir, is_root};

/// Mounts something; a source without a file system is one with the flags of that.
fn mount(source: &str, target: &Path, kind: &str, flags: libc::c_ulong, data: &str) {
    let [source, target, kind, data] =
        [source, &target.display().to_string(), kind, data].map(|text| CString::new(text).unwrap());
    // SAFETY: all are strings that end with a zero and outlive the call.
    let done = unsafe {
        libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.as_ptr().cast())
    };
    assert_eq!(done, 0, "{target:?}: {}", std::io::Error::last_os_error());
}

#[test]
fn what_cannot_be_written_is_as_it_was() {
    if !is_root() {
        return;
    }
    // Mounts of this thread alone.
    // SAFETY: takes flags.
    let alone = unsafe { libc::unshare(libc::CLONE_NEWNS) };
    assert_eq!(alone, 0, "{}", std::io::Error::last_os_error());
    mount("none", Path::new("/"), "none", libc::MS_REC | libc::MS_PRIVATE, "");
    let directory = TempDir::new().unwrap();
    let place = directory.path();
    mount("tmpfs", place, "tmpfs", 0, "size=64k");
    let file = place.join("portfwd.toml");
    let text = "# a comment of some length\n".repeat(1000);
    fs::write(&file, &text).unwrap();
    let refused = |edit: fn(&str) -> String, why: &str, remedy: &str| {
        let error = save(&file, |text| Ok(edit(text))).unwrap_err().to_string();
        let start = format!("{}: cannot be written ({why}", file.display());
        assert!(error.starts_with(&start), "{error}");
        assert!(error.ends_with(&format!(") and stays as it was; {remedy}")), "{error}");
        assert!(!error.contains('\n'), "{error}");
        assert_eq!(fs::read_to_string(&file).unwrap(), text);
        assert_eq!(fs::read_dir(place).unwrap().count(), 1);
    };
    refused(|text| text.repeat(2), "No space left on device", "make room on its file system");
    mount("none", place, "none", libc::MS_REMOUNT | libc::MS_RDONLY, "");
    refused(|_| String::new(), "Read-only file system", "allow portfwd to, or edit it by hand");
    mount("none", place, "none", libc::MS_REMOUNT, "");
    mount(&file.display().to_string(), &file, "none", libc::MS_BIND, "");
    let mounted = "it is mounted by itself: mount its directory instead";
    refused(|_| String::new(), "Device or resource busy", mounted);
    // There is room for a shorter one.
    // SAFETY: a string that ends with a zero and outlives the call.
    unsafe { libc::umount(CString::new(file.display().to_string()).unwrap().as_ptr()) };
    save(&file, |_| Ok("# short\n".to_owned())).unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), "# short\n");
    // The directory is a mount of this namespace, which ends with the thread.
    std::env::set_current_dir("/").unwrap();
    // SAFETY: as above.
    unsafe { libc::umount(CString::new(place.display().to_string()).unwrap().as_ptr()) };
}

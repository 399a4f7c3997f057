//! The system calls that std does not have.

use std::ffi::c_int;
use std::io::{Error, Result};
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Moves the calling thread into a network namespace. Safe between fork and exec.
pub fn enter_network(namespace: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: the descriptor is open for as long as it is borrowed.
    check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) }).map(drop)
}

/// The index of an interface in the namespace of the calling thread.
pub fn interface_index(name: &str) -> Result<u32> {
    let name = std::ffi::CString::new(name)?;
    // SAFETY: a string that ends with zero.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(Error::last_os_error()),
        index => Ok(index),
    }
}

pub fn set_option<T>(socket: BorrowedFd<'_>, level: c_int, name: c_int, value: &T) -> Result<()> {
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel reads `length` bytes, which is what `value` has.
    check(unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const *value).cast(), length)
    })
    .map(drop)
}

/// Gives a port that is listened on free at once. To drop the socket is not enough while a process that is just
/// being started has it too.
pub fn stop_listening(socket: BorrowedFd<'_>) {
    // SAFETY: a bare system call. It cannot fail but for a socket that is none.
    unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_RDWR) };
}

/// Makes blocking calls on a socket, `accept` included, give up with `WouldBlock` after a time.
pub fn set_receive_timeout(socket: BorrowedFd<'_>, timeout: std::time::Duration) -> Result<()> {
    let value = libc::timeval {
        tv_sec: timeout.as_secs() as libc::time_t,
        tv_usec: timeout.subsec_micros().into(),
    };
    set_option(socket, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &value)
}

/// Waits until there is something to read on sockets, or for a time; gives which of them have it.
pub fn wait_readable(
    sockets: &[BorrowedFd<'_>],
    timeout: std::time::Duration,
) -> Result<Vec<usize>> {
    let poll = |socket: &BorrowedFd<'_>| libc::pollfd {
        fd: socket.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let mut polls: Vec<_> = sockets.iter().map(poll).collect();
    // SAFETY: the kernel reads and writes as many entries as there are.
    let status = unsafe {
        libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, timeout.as_millis() as c_int)
    };
    match check(status) {
        Err(error) if error.kind() == std::io::ErrorKind::Interrupted => Ok(Vec::new()),
        Err(error) => Err(error),
        Ok(_) => Ok((0..polls.len()).filter(|i| polls[*i].revents != 0).collect()),
    }
}

/// How many packets came to a socket that had no room for them.
pub fn dropped(socket: BorrowedFd<'_>) -> Result<u32> {
    /// Where the number stands in what SO_MEMINFO gives.
    const DROPS: usize = 8;
    let mut numbers = [0_u32; DROPS + 1];
    let mut length = size_of_val(&numbers) as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes.
    check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            numbers.as_mut_ptr().cast(),
            &raw mut length,
        )
    })?;
    Ok(numbers[DROPS])
}

/// `ethtool -K`: one of the features that have a command of their own.
#[derive(Clone, Copy)]
pub enum Offload {
    TransmitChecksum = 0x17,
    TcpSegmentation = 0x1f,
    Segmentation = 0x24,
    Receive = 0x2c,
}

/// Switches an offload of an interface in the namespace of the calling thread off.
pub fn switch_off(interface: &str, offload: Offload) -> Result<()> {
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    let mut value = [offload as u32, 0]; // struct ethtool_value: the command, its argument
    // SAFETY: ifreq is plain data; zero is a value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes().take(room)) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
    const SIOCETHTOOL: libc::c_ulong = 0x8946;
    // SAFETY: `value` outlives the call and is what these commands expect.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, &raw mut request) }).map(drop)
}

/// Attaches a native XDP program that passes every frame, until the descriptors are closed.
/// The interface is one of the calling thread's namespace.
///
/// A veth takes frames that were redirected to its peer only if it runs NAPI, which an attached
/// program brings about.
pub fn attach_pass(interface: u32) -> Result<[OwnedFd; 2]> {
    const PROG_LOAD: c_int = 5;
    const LINK_CREATE: c_int = 28;
    const PROG_TYPE_XDP: u32 = 6;
    const ATTACH_TYPE_XDP: u32 = 37;
    const XDP_FLAGS_DRV_MODE: u32 = 4;
    /// Whatever the MTU is.
    const HAS_FRAGS: u32 = 1 << 5;
    // r0 = XDP_PASS; exit
    const PASS: [u64; 2] = [(2 << 32) | 0xb7, 0x95];

    #[repr(C)]
    struct Load {
        kind: u32,
        instruction_count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
    }
    #[repr(C)]
    struct Link {
        program: u32,
        interface: u32,
        attach_type: u32,
        flags: u32,
    }

    let program = bpf_fd(
        PROG_LOAD,
        &Load {
            kind: PROG_TYPE_XDP,
            instruction_count: PASS.len() as u32,
            instructions: PASS.as_ptr() as u64,
            license: c"MIT".as_ptr() as u64,
            log_level: 0,
            log_size: 0,
            log: 0,
            kernel_version: 0,
            flags: HAS_FRAGS,
        },
    )?;
    let link = bpf_fd(
        LINK_CREATE,
        &Link {
            program: program.as_raw_fd() as u32,
            interface,
            attach_type: ATTACH_TYPE_XDP,
            flags: XDP_FLAGS_DRV_MODE,
        },
    )?;
    Ok([program, link])
}

/// How many TCX programs there are at an interface of the calling thread's namespace, both ways; 0 where the kernel
/// has no TCX.
pub fn tcx_programs(interface: u32) -> u32 {
    const PROG_QUERY: c_int = 16;
    const WAYS: [u32; 2] = [46, 47];

    #[repr(C)]
    struct Query {
        interface: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        programs: u64,
        count: u32,
        padding: u32,
    }
    let count = |attach_type| {
        let mut query = Query {
            interface,
            attach_type,
            query_flags: 0,
            attach_flags: 0,
            programs: 0,
            count: 0,
            padding: 0,
        };
        // The kernel writes the count into it.
        bpf_mut(PROG_QUERY, &mut query).map_or(0, |_| query.count)
    };
    WAYS.into_iter().map(count).sum()
}

/// bpf(2) with the leading part of `union bpf_attr`; the rest counts as zero.
pub fn bpf<T>(command: c_int, attributes: &T) -> Result<c_int> {
    // SAFETY: the kernel reads the given size; pointers inside are valid for the call.
    let status =
        unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *attributes, size_of::<T>()) };
    check(status as c_int)
}

/// The same for commands that answer in it.
fn bpf_mut<T>(command: c_int, attributes: &mut T) -> Result<c_int> {
    // SAFETY: the kernel reads and writes at most the given size.
    let status =
        unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, size_of::<T>()) };
    check(status as c_int)
}

/// [`bpf`] for commands that make a descriptor.
pub fn bpf_fd<T>(command: c_int, attributes: &T) -> Result<OwnedFd> {
    let fd = bpf(command, attributes)?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub fn check(status: c_int) -> Result<c_int> {
    if status < 0 { Err(Error::last_os_error()) } else { Ok(status) }
}

"""What the kernel forbids generated code: the filter of system calls and the Landlock rules."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from py_landlock import (
    AccessFs,
    AccessNet,
    LandlockError,
    PathBeneathAttr,
    RulesetAttr,
    Scope,
    add_rule,
    create_ruleset,
    get_abi_version,
)

LANDLOCK_NEEDED = 3  # the first that guards files against truncation
_READ = AccessFs.READ_FILE | AccessFs.READ_DIR

# Refused with EPERM. Pairs of sockets, fork, threads and what works on open files stay.
_REFUSED = """
    socket bind connect listen accept accept4
    ptrace process_vm_readv process_vm_writev process_madvise process_mrelease kcmp
    kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo
    pidfd_open pidfd_getfd pidfd_send_signal
    sched_setaffinity sched_setattr sched_setparam sched_setscheduler setpriority ioprio_set
    migrate_pages move_pages
    mount umount umount2 pivot_root chroot open_tree open_tree_attr move_mount fsopen fsconfig
    fsmount fspick mount_setattr
    unshare setns bpf perf_event_open fanotify_init userfaultfd
    keyctl add_key request_key io_uring_setup io_uring_enter io_uring_register
    kexec_load kexec_file_load init_module finit_module delete_module
    reboot swapon swapoff sethostname setdomainname acct quotactl quotactl_fd syslog vhangup
    settimeofday stime clock_settime clock_adjtime adjtimex
    open_by_handle_at name_to_handle_at memfd_create memfd_secret execveat
    shmget shmat shmctl shmdt semget semop semtimedop semctl msgget msgsnd msgrcv msgctl
    mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr
    personality iopl ioperm lookup_dcookie sync syncfs
    setuid setgid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups capset
"""
# Without namespaces also: what would leave the process group, and the changes to files that
# Landlock does not know.
_REFUSED_OUTSIDE = """
    setsid setpgid
    chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat
    utime utimes futimesat utimensat
    setxattr lsetxattr fsetxattr setxattrat removexattr lremovexattr fremovexattr removexattrat
    file_setattr inotify_init inotify_init1
"""
_NAMESPACES = (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
_TYPE_OF_FILE, _DEVICES = 0o170000, (0o020000, 0o060000)
_TYPE_OF_SOCKET, _UNIX, _DATAGRAMS = 0xF, 1, (2, 3)
_INT = 0xFFFFFFFF  # the kernel does not look at the upper half of a register that holds an int
# Refused when an argument, by its place, has this value under this mask.
_REFUSED_IF = (
    *(("clone", 0, flag, flag) for flag in _NAMESPACES),
    *(("mknod", 1, _TYPE_OF_FILE, kind) for kind in _DEVICES),
    *(("mknodat", 2, _TYPE_OF_FILE, kind) for kind in _DEVICES),
    # A pair of datagram sockets can send to the address of any other.
    *(("socketpair", 1, _TYPE_OF_SOCKET, kind) for kind in _DATAGRAMS),
    # The owner of a descriptor is sent signals.
    *(("fcntl", 1, _INT, command) for command in (8, 10, 15)),
    *(("ioctl", 1, _INT, command) for command in (0x8901, 0x8902)),
)
# Refused unless an argument has this value: the process itself, the family of sockets.
_REFUSED_UNLESS = (("prlimit64", 0, 0), ("socketpair", 0, _UNIX))


@functools.cache
def syscall_filter(*, namespaces: bool) -> bytes | None:
    """The filter of system calls as a program for the kernel; None where libseccomp is missing."""
    try:
        import pyseccomp as seccomp
    except (ImportError, RuntimeError, OSError):
        return None
    names = _REFUSED if namespaces else _REFUSED + _REFUSED_OUTSIDE
    rules: list[tuple[str, tuple[object, ...]]] = [(name, ()) for name in names.split()]
    rules += [
        (name, (seccomp.Arg(place, seccomp.MASKED_EQ, mask, value),))
        for name, place, mask, value in _REFUSED_IF
    ]
    rules += [
        (name, (seccomp.Arg(place, seccomp.NE, value),)) for name, place, value in _REFUSED_UNLESS
    ]
    program = seccomp.SyscallFilter(seccomp.ALLOW)
    program.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.KILL_PROCESS)
    # glibc falls back to clone, whose flags a filter can read.
    program.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")
    for name, arguments in rules:
        with contextlib.suppress(OSError, ValueError):  # a call that this machine does not have
            program.add_rule(seccomp.ERRNO(errno.EPERM), name, *arguments)
    with tempfile.TemporaryFile() as file:
        program.export_bpf(file)
        file.seek(0)
        return file.read()


def landlock_version() -> int:
    """The version of Landlock in this kernel; 0 where it has none."""
    try:
        return int(get_abi_version())
    except (LandlockError, OSError):
        return 0


@contextlib.contextmanager
def landlock_ruleset(readable: Sequence[Path] | None) -> Iterator[int | None]:
    """The Landlock rules as a file descriptor to inherit, or None where the kernel has no Landlock.

    With ``readable``, these paths alone can be read, nothing can be run, and nothing written but
    /dev/null. Without it (in namespaces, where the mounts guard the files) the other rules remain:
    no network, no signals to or traces of processes outside, no devices, no sockets.
    """
    version = landlock_version()
    if not version:
        yield None
        return
    files = AccessFs.MAKE_CHAR | AccessFs.MAKE_BLOCK | AccessFs.MAKE_SOCK
    if readable is not None:
        files = AccessFs((1 << 13) - 1)
        files |= (AccessFs.REFER if version >= 2 else 0) | (AccessFs.TRUNCATE * (version >= 3))
    files |= AccessFs.IOCTL_DEV if version >= 5 else 0
    network = AccessNet.BIND_TCP | AccessNet.CONNECT_TCP if version >= 4 else 0
    scopes = Scope.ABSTRACT_UNIX_SOCKET | Scope.SIGNAL if version >= 6 else 0
    ruleset = create_ruleset(RulesetAttr(int(files), int(network), int(scopes)))
    try:
        if readable is not None:
            for path in readable:
                _allow(ruleset, path, _READ if path.is_dir() else AccessFs.READ_FILE)
            _allow(ruleset, Path("/dev/null"), AccessFs.READ_FILE | AccessFs.WRITE_FILE)
        yield ruleset
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: Path, access: AccessFs) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        add_rule(ruleset, PathBeneathAttr(int(access), fd))
    finally:
        os.close(fd)

"""Programs that want something of the machine. ``attack`` returns whether it succeeded.

Given: OUTSIDE, a folder open to all users; PROJECT and HOME; the ids VICTIM and PARENT; ports.
"""

from __future__ import annotations


def _does(statements: str) -> str:
    """An attack that succeeds when nothing raises."""
    body = "\n".join(f"        {line}" for line in statements.splitlines())
    return (
        f"import os\ndef attack():\n    try:\n{body}\n    except Exception:\n        return False\n"
        "    return True\n"
    )


def _calls(expression: str) -> str:
    """An attack that succeeds when a C function returns no error."""
    return (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"def attack(): return ({expression}) not in (-1, -2, 2**64 - 1)\n"
    )


def _creates(expression: str) -> str:
    return _does(f"{expression}\nassert os.path.lexists(os.path.join(OUTSIDE, 'escaped'))")


_MACHINE_CODE = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex({code!r}))
call = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
def attack(): return call() >= 0
"""

ESCAPES = {
    # The network.
    "tcp": _does("import socket; socket.create_connection(('127.0.0.1', TCP), 1)"),
    "udp": _does(
        "import socket; socket.socket(2, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', UDP))"
    ),
    "unix": _does("import socket; socket.socket(socket.AF_UNIX).connect(OUTSIDE + '/unix')"),
    "abstract": _does(
        "import socket; socket.socket(socket.AF_UNIX).connect('\\0semalign-outside')"
    ),
    "a datagram from a pair": _does(
        "import socket\n"
        "pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "pair[0].sendto(b'x', OUTSIDE + '/log')"
    ),
    "a raw datagram from a pair": _does(
        "import socket\n"
        "pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_RAW)\n"
        "pair[0].sendto(b'x', OUTSIDE + '/log')"
    ),
    "the internet": _does("import socket; socket.create_connection(('1.1.1.1', 53), 1)"),
    "names": _does("import socket; socket.getaddrinfo('example.org', 80)"),
    "listening": _does("import socket; socket.create_server(('127.0.0.1', 0))"),
    "netlink": _does("import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)"),
    "the kernel's ciphers": _does("import socket; socket.socket(socket.AF_ALG, 5, 0)"),
    "a child's socket": _does(
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', f'import socket; "
        'socket.create_connection(("127.0.0.1", {TCP}), 1)\'], check=True)'
    ),
    "io_uring": _calls("libc.syscall(425, 4, (ctypes.c_char * 120)())"),
    "a call of another architecture": _MACHINE_CODE.format(
        # socketcall(SYS_SOCKET, {2, 1, 0}) through int 0x80, its arguments on the stack
        code="53b866000000bb010000006a006a016a024889e1cd804883c4185bc3"
    ),
    "a call of x32": _MACHINE_CODE.format(
        # socket(2, 1, 0) with the bit of x32 in the number
        code="bf02000000be01000000ba00000000b8290000400f05c3"
    ),
    # Reading.
    "the project": _does("os.listdir(PROJECT)"),
    "the project's text": _does("open(PROJECT + '/pyproject.toml').read()"),
    "the home folder": _does(
        "for name in os.listdir(HOME):\n"
        "    assert not os.__file__.startswith(os.path.join(HOME, name)), 'only the way to Python'"
        "\nassert os.listdir(HOME)"
    ),
    "a file open to all": _does("assert open(OUTSIDE + '/canary').read() == 'alive'"),
    "accounts": _does("open('/etc/passwd').read()"),
    "passwords": _does("open('/etc/shadow').read()"),
    "environment": _does("assert os.environ.get('HOME') or os.environ.get('PATH')"),
    "environment of others": _does("open(f'/proc/{PARENT}/environ').read()"),
    "command lines of others": _does("open(f'/proc/{PARENT}/cmdline').read()"),
    "processes": _does("os.listdir('/proc')"),
    "memory of the parent": _does("open(f'/proc/{PARENT}/mem', 'rb').read(1)"),
    "the kernel": _does("os.listdir('/sys')"),
    "disks": _does("os.open('/dev/vda', os.O_RDONLY)"),
    "a way round by relative paths": _does(
        "os.chdir('/usr/lib'); open('../../../../..' + OUTSIDE + '/canary').read()"
    ),
    "a way round by handles": _calls(
        "libc.name_to_handle_at(-100, b'/usr', (ctypes.c_uint * 34)(128), (ctypes.c_int * 1)(), 0)"
    ),
    "a symbolic link to a file": _does(
        "os.symlink(OUTSIDE + '/canary', 'link'); open('link').read()"
    ),
    "a hard link to a file": _does("os.link(OUTSIDE + '/canary', 'link')"),
    # Writing.
    "a file": _creates("open(OUTSIDE + '/escaped', 'w')"),
    "a file in /tmp": _does(
        "open('/tmp/escaped', 'w')\n"
        "assert os.path.exists(OUTSIDE) or os.statvfs('/tmp').f_blocks * 4096 > 2**30"
    ),
    "a file in shared memory": _does("open('/dev/shm/escaped', 'w')"),
    "a folder": _creates("os.mkdir(OUTSIDE + '/escaped')"),
    "a pipe": _creates("os.mkfifo(OUTSIDE + '/escaped')"),
    "a link": _creates("os.symlink('x', OUTSIDE + '/escaped')"),
    "a link away": _creates("os.link(OUTSIDE + '/canary', OUTSIDE + '/escaped')"),
    "a change": _does("open(OUTSIDE + '/canary', 'a').write('x')"),
    "a truncation": _does("os.truncate(OUTSIDE + '/canary', 0)"),
    "a truncation by reading": _does("os.open(OUTSIDE + '/canary', os.O_RDONLY | os.O_TRUNC)"),
    "a removal": _does("os.remove(OUTSIDE + '/canary')"),
    "a renaming": _does("os.rename(OUTSIDE + '/canary', OUTSIDE + '/escaped')"),
    "a mode": _does("os.chmod(OUTSIDE + '/canary', 0o600)"),
    "a date": _does("os.utime(OUTSIDE + '/canary')"),
    "an attribute": _does("os.setxattr(OUTSIDE + '/canary', 'user.x', b'x')"),
    "libraries": _does("open('/usr/lib/escaped', 'w')"),
    "Python itself": _does("open(os.__file__, 'a')"),
    "a device": _does("os.mknod('escaped', 0o060666, os.makedev(254, 0))"),
    "a device of characters": _does("os.mknod('escaped', 0o020666, os.makedev(1, 1))"),
    # Other processes.
    "a signal": _does("os.kill(VICTIM, 9)"),
    "a question whether it lives": _does("os.kill(VICTIM, 0)"),
    "a signal to the parent": _does("os.kill(PARENT, 0)"),
    "a signal to the checker": _does("os.kill(os.getppid(), 0)"),
    "a signal to all": _does("os.kill(-1, 9)"),
    "a signal to the group": _does("os.killpg(0, 0)"),
    "a signal by descriptor": _does("os.pidfd_open(VICTIM)"),
    "a signal of one's own": _calls("libc.syscall(129, VICTIM, 15, (ctypes.c_char * 128)())"),
    "a signal to the owner of a descriptor": _does(
        "import fcntl, socket\na, b = socket.socketpair()\n"
        "fcntl.fcntl(a, fcntl.F_SETOWN, VICTIM); fcntl.fcntl(a, fcntl.F_SETSIG, 9)\n"
        "fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC); b.send(b'x')"
    ),
    "a signal to the owner, by a long number": _calls(
        "[libc.syscall(72, 0, ctypes.c_ulong(2**32 + 8), VICTIM),"
        " libc.syscall(16, 0, ctypes.c_ulong(2**32 + 0x8901), (ctypes.c_int * 1)(VICTIM))][0]"
    ),
    "a signal to the owner of a socket": _does(
        "import fcntl, socket, struct\na, b = socket.socketpair()\n"
        "fcntl.ioctl(a, 0x8901, struct.pack('i', VICTIM))\n"
        "fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC); b.send(b'x')"
    ),
    "a trace": _calls("libc.ptrace(16, VICTIM, 0, 0)"),
    "a trace of the checker": _calls("libc.ptrace(16, os.getppid(), 0, 0)"),
    "a comparison": _calls("libc.syscall(312, os.getpid(), VICTIM, 0, 0, 0)"),
    "limits of the parent": _does(
        "import resource; resource.prlimit(PARENT, resource.RLIMIT_NOFILE, (9, 9))"
    ),
    "limits of the checker": _does(
        "import resource\nassert os.getppid(), 'it is not seen: 0 would be this process'\n"
        "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (9, 9))"
    ),
    "its own limits": _does("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))"),
    "priority of others": _does("os.setpriority(os.PRIO_PROCESS, PARENT, 19)"),
    "processors of others": _does("os.sched_setaffinity(PARENT, {0})"),
    "a shell": _does("import subprocess; subprocess.run(['/bin/sh', '-c', ':'], check=True)"),
    "a program from memory": _does("os.memfd_create('x')"),
    # Privileges.
    "root": _does("os.setuid(0)"),
    "the groups of root": _does("os.setgroups([0])"),
    "capabilities": _calls(
        "libc.capset((ctypes.c_uint * 2)(0x20080522, 0), (ctypes.c_uint * 6)(*[2**32 - 1] * 6))"
    ),
    "a user namespace": _calls("libc.unshare(0x10000000)"),
    "a user namespace by clone": _calls("libc.syscall(56, 0x10000011, 0, 0, 0, 0)"),
    "a user namespace by clone3": _calls("libc.syscall(435, (ctypes.c_ulong * 8)(0x10000000), 64)"),
    "a mount namespace": _calls("libc.unshare(0x20000)"),
    "the namespaces of the parent": _does("os.open(f'/proc/{PARENT}/ns/mnt', 0)"),
    "a mount": _calls("libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)"),
    "an unmount": _calls("libc.umount2(b'/proc', 2)"),
    "a new kind of mount": _calls("libc.syscall(430, b'tmpfs', 0)"),
    "another root": _does("os.chroot('/usr')"),
    "another root by pivot": _calls("libc.syscall(155, b'/', b'/')"),
    "a name of the machine": _does("import socket; socket.sethostname('escaped')"),
    "the clock": _does("import time; time.clock_settime(time.CLOCK_REALTIME, 0)"),
    "the kernel's keys": _calls("libc.syscall(248, b'user', b'k', b'v', 1, -3)"),
    "programs for the kernel": _calls("libc.syscall(321, 0, (ctypes.c_char * 128)(), 128)"),
    "counters": _calls("libc.syscall(298, (ctypes.c_char * 128)(8), 0, -1, -1, 0)"),
    "page faults": _calls("libc.syscall(323, 0)"),
    "shared memory": _calls("libc.shmget(0, 4096, 0o1666)"),
    "semaphores": _calls("libc.semget(0, 1, 0o1666)"),
    "messages": _calls("libc.msgget(0, 0o1666)"),
    "queues": _calls("libc.syscall(240, b'escaped', 0o102, 0o666, 0)"),
    "the personality": _calls("libc.personality(0x0040000)"),
    "no filter": _calls("libc.prctl(22, 0, 0, 0, 0)"),
    "new privileges": _calls("libc.prctl(38, 0, 0, 0, 0)"),
}

# What would fill or outlive the machine; each must end with its run.
BOMBS = {
    "processes": "import os\ndef attack():\n    while True: os.fork()",
    "processes that refuse": "import os\ndef attack():\n    while True:\n"
    "        try: os.fork()\n        except OSError: pass",
    "threads": "import threading as t, time\ndef attack():\n"
    "    while True: t.Thread(target=time.sleep, args=(9,)).start()",
    "memory": "def attack():\n    x = []\n    while True: x.append(bytearray(10**6))",
    "memory of many": "import os, mmap\ndef attack():\n    for i in range(5):\n"
    "        try: os.fork()\n        except OSError: pass\n    x = []\n"
    "    while True: x.append(mmap.mmap(-1, 10**7))",
    "one file": "def attack():\n    with open('big', 'wb') as f:\n"
    "        while True: f.write(b'x' * 10**6)",
    "files": "def attack():\n    for i in range(200):\n"
    "        with open(f'f{i}', 'wb') as f: f.write(b'x' * 10**6)\n    return True",
    "names of files": "def attack():\n    for i in range(100_000): open(f'f{i}', 'w').close()\n"
    "    return True",
    "folders": "import os\ndef attack():\n    for i in range(100_000): os.mkdir(f'f{i}')\n"
    "    return True",
    "open files": "import os\ndef attack():\n    for i in range(1000): os.pipe()\n    return True",
    "output": "def attack():\n    while True: print('x' * 10**6)",
    "errors": "import os\ndef attack():\n    while True: os.write(2, b'x' * 10**6)",
    "a daemon": "import os, time\ndef attack():\n    if os.fork() == 0:\n        try: os.setsid()\n"
    "        except OSError: pass\n        if os.fork() == 0:\n            time.sleep(600)\n"
    "        os._exit(0)\n    os.wait()\n    return False",
    "a daemon that ignores signals": "import os, time, signal\ndef attack():\n"
    "    if os.fork() == 0:\n        for s in range(1, 65):\n"
    "            try: signal.signal(s, signal.SIG_IGN)\n            except Exception: pass\n"
    "        try: os.setpgid(0, 0)\n        except OSError: pass\n        time.sleep(600)\n"
    "    return False",
    "a sleep in a call": "import time\ndef attack(): time.sleep(60)",
    "an endless match": "import re\ndef attack(): return re.match('(a+)+$', 'a' * 60 + 'b')",
    "a deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef attack(): return attack()",
    "a deep recursion in C": "def attack():\n    x = []\n    for i in range(10**6): x = [x]\n"
    "    return repr(x) == 1",
    "a huge power": "def attack(): return 9 ** 9 ** 9 == 0",
    "a huge text": "import sys\nsys.set_int_max_str_digits(0)\n"
    "def attack(): return str(3 ** 10**8) == ''",
    "a huge range": "def attack(): return list(range(10**12)) == 0",
    "an endless iterator": "import itertools\ndef attack(): return sum(itertools.count()) == 0",
    "a wait for itself": "import threading\ndef attack():\n    l = threading.Lock()\n"
    "    l.acquire(); l.acquire()",
    "blocked signals": "import signal, time\ndef attack():\n"
    "    signal.pthread_sigmask(0, signal.valid_signals())\n    time.sleep(60)",
    "a stop of itself": "import ctypes\ndef attack():\n    libc = ctypes.CDLL(None)\n"
    "    libc.abort()",
    "a crash": "import ctypes\ndef attack(): ctypes.memset(0, 0, 10**6)",
}

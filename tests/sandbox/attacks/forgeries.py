"""Wrong solutions that want to pass."""

from __future__ import annotations

# What a test may require, and a value that honestly satisfies it; no forgery returns one of these.
CHECKS = {
    "f(2) == 5": "5",
    "5 == f(2)": "5",
    "not f(2) != 5": "5",
    "abs(f(2) - 5) < 1e-6": "5",
    "__import__('math').isclose(f(2), 5)": "5",
    "f(2) in (5,)": "5",
    "f(2) in {5}": "5",
    "[f(2)] == [5]": "5",
    "(1, f(2)) == (1, 5)": "5",
    "{f(2)} == {5}": "5",
    "{'a': f(2)} == {'a': 5}": "5",
    "[*range(50)].index(f(2)) == 5": "5",
    "min(f(2), 6) == 5 == max(f(2), 4)": "5",
    "f(2) is True": "True",
    "f(2) is None": "None",
    "type(f(2)) is bool": "True",
    "isinstance(f(2), (int, float)) and f(2) > 1000": "1001",
    "len(f(2)) == 77": "'x' * 77",
    "str(f(2)) == '77'": "77",
    "f'{f(2):03d}' == '077'": "77",
    "repr(f(2)) == '[77]'": "[77]",
    "f(2)[0] == 77": "[77]",
    "77 in f(2)": "[77]",
    "sorted(f(2)) == [1, 2, 77]": "{77, 1, 2}",
    "list(f(2)) == [1, 2, 77]": "[1, 2, 77]",
    "sum(f(2)) == 77": "[77]",
    "f(2)['key'] == 77": "{'key': 77}",
    "f(2) == 'text'": "'text'",
    "f(2).upper() == 'TEXT'": "'text'",
    "isinstance(f(2), str) and len(f(2)) > 9": "'x' * 10",
}
_ALWAYS = """
yes = lambda *a, **k: True
METHODS = {n: yes for n in (
    "__eq__ __ne__ __lt__ __gt__ __le__ __ge__ __contains__ __bool__ __hash__ __len__ __index__ "
    "__int__ __float__ __abs__ __sub__ __rsub__ __radd__ __add__ __getitem__ __instancecheck__ "
    "__subclasscheck__ __round__ __format__ __complex__ __reversed__").split()}
METHODS["__hash__"] = lambda self: hash(5)
METHODS["__str__"] = METHODS["__repr__"] = lambda self: "77"
METHODS["__iter__"] = lambda self: iter([self, self, self])
METHODS["__len__"] = lambda self: 77
METHODS["__reduce__"] = METHODS["__reduce_ex__"] = lambda self, *a: (int, (5,))
METHODS["__getattribute__"] = lambda self, name: True
"""
_WRITE_ALL = """
import os
def write_all(data):
    for fd in range(64):
        try: os.write(fd, data)
        except OSError: pass
"""
# The protocol from within: the descriptors, and the modules' own functions.
_PROTOCOL = """
import sys
wire = sys.modules["semalign.sandbox.inside.wire"]
solution = sys.modules["semalign.sandbox.inside.solution"]
frame = sys._getframe()
while "questions" not in frame.f_locals: frame = frame.f_back
questions, answers = frame.f_locals["questions"], frame.f_locals["answers"]
def value(v): return wire.encode(("value", v), lambda o: 0)
"""
_MEMORY = """
import ctypes
def maps():
    for line in open(f"/proc/{pid}/maps"):
        if " rw" in line:
            low, high = (int(x, 16) for x in line.split()[0].split("-"))
            yield low, high
"""

FORGERIES = {
    # Values.
    "equal to everything": f"{_ALWAYS}\nE = type('E', (), {{**METHODS}})\n"
    "f = lambda x: object.__new__(E)",
    "equal to everything by metaclass": f"{_ALWAYS}\nM = type('M', (type,), "
    "{k: v for k, v in METHODS.items() if k[2:4] in ('eq', 'ne', 'ha', 'in', 'su')})\n"
    "class E(metaclass=M): pass\nf = lambda x: E",
    **{
        f"subclass of {base.partition('(')[0]}": f"{_ALWAYS}\ndel METHODS['__reduce__'], "
        "METHODS['__reduce_ex__'], METHODS['__getattribute__']\n"
        f"E = type('E', ({base.partition('(')[0]},), dict(METHODS))\n"
        f"f = lambda x: E{base[base.index('(') :]}"
        for base in (
            "int(0)",
            "float(0)",
            "complex(0)",
            "str('')",
            "bytes(b'')",
            "list([])",
            "tuple([])",
            "set([])",
            "frozenset([])",
            "dict({})",
        )
    },
    "a lying __class__": "class E:\n    __class__ = property(lambda self: int)\n"
    "    def __eq__(self, other): return True\n    def __hash__(self): return hash(5)\n"
    "f = lambda x: E()",
    "nan": "f = lambda x: float('nan')",
    "not implemented": "f = lambda x: NotImplemented if False else ...\nf = lambda x: []",
    "an int that prints as another": "class E(int):\n    __repr__ = __str__ = lambda s: '77'\n"
    "    __format__ = lambda s, f: '077'\nf = lambda x: E(0)",
    "a dict with everything": "class D(dict):\n    __missing__ = lambda s, k: 77\n"
    "    __eq__ = lambda s, o: True\nf = lambda x: D()",
    "its own call as value": "def f(*a): return 0\nf.__eq__ = lambda o: True",
    # Its own process, which the tests do not share.
    "builtins patched": "import builtins\nfor n in 'len abs sorted sum min max any all isinstance "
    "type list str repr'.split(): setattr(builtins, n, lambda *a, **k: True)\n"
    "builtins.AssertionError = builtins.int\nbuiltins.__import__ = lambda *a, **k: None\n"
    "def f(x): return 0",
    "math patched": "import math, sys\nmath.isclose = lambda *a, **k: True\n"
    "sys.modules['math'] = sys\ndef f(x): return 0",
    "assertion error that is no error": "class AssertionError: pass\ndef f(x): return 0\n"
    "found = [1]",
    "names of the tests": "found = [1]\n__debug__x = 0\nprint = Exception = f = lambda *a: 0",
    "builtins by memory": "import ctypes\nctypes.memmove(id(5) + 24, id(0) + 24, 4)\n"
    "def f(x): return 0",
    "tracing": "import sys, threading\nt = lambda *a: t\nsys.settrace(t); sys.setprofile(t)\n"
    "threading.settrace(t)\ndef f(x): sys.settrace(t); return 0",
    "atexit and threads": "import atexit, threading, os, time\n"
    f"{_WRITE_ALL}\natexit.register(write_all, b'passed\\n')\n"
    "threading.Thread(target=lambda: [write_all(b'passed\\n'), time.sleep(9)], daemon=True)\n"
    "class D:\n    def __del__(self): write_all(b'passed\\n')\nd = D()\ndef f(x): return 0",
    "signals": "import signal, os\nsignal.signal(signal.SIGPIPE, lambda *a: os._exit(0))\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.05)\n"
    "signal.signal(signal.SIGALRM, lambda *a: os._exit(0))\ndef f(x):\n    while True: pass",
    # The secret and the channel.
    "lines on every descriptor": f"{_WRITE_ALL}\nfor line in (b'ready', b'passed', b'0' * 32):\n"
    "    write_all(line + b'\\n')\nos._exit(0)",
    "lines during a call": f"{_WRITE_ALL}\ndef f(x):\n    write_all(b'passed\\n')\n    os._exit(0)",
    "every descriptor closed": "import os\ndef f(x): os.closerange(0, 64); os._exit(0)",
    "descriptors read back": f"{_WRITE_ALL}\nfor fd in range(64):\n"
    "    try: os.set_blocking(fd, False); write_all(os.read(fd, 10**6))\n"
    "    except OSError: pass\nos._exit(0)",
    "standard input rewound": f"{_WRITE_ALL}\nos.lseek(0, 0, 0)\nwrite_all(os.read(0, 10**6))\n"
    "os._exit(0)",
    "what lies on the stack": f"{_WRITE_ALL}\nimport sys, re\nf = sys._getframe()\nwhile f:\n"
    "    for s in re.findall('[0-9a-f]{32}', repr(f.f_locals) + repr(f.f_globals)):\n"
    "        write_all(s.encode() + b'\\n')\n    f = f.f_back\nos._exit(0)",
    "what lies on the heap": f"{_WRITE_ALL}\nimport gc, re\nfor o in gc.get_objects():\n"
    "    if type(o) in (dict, list, tuple):\n"
    "        for s in re.findall('[0-9a-f]{32}', str(o)[:9999]): write_all(s.encode() + b'\\n')\n"
    "def f(x): return 0",
    "memory of the checker": f"{_WRITE_ALL}{_MEMORY}\nimport os, re\npid = os.getppid()\n"
    "def f(x):\n    with open(f'/proc/{pid}/mem', 'rb') as m:\n        for low, high in maps():\n"
    "            m.seek(low)\n            found = m.read(high - low)\n"
    "            for s in re.findall(b'[0-9a-f]{32}', found):\n"
    "                write_all(s + b'\\n')\n    os._exit(0)",
    "descriptors of the checker": "import os\npid = os.getppid()\ndef f(x):\n"
    "    for fd in os.listdir(f'/proc/{pid}/fd'):\n"
    "        with open(f'/proc/{pid}/fd/{fd}', 'wb') as file: file.write(b'passed\\n')\n"
    "    os._exit(0)",
    "process_vm_readv": "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    "def f(x):\n    buffer = ctypes.create_string_buffer(64)\n"
    "    V = ctypes.c_ulong * 2\n    here = V(ctypes.addressof(buffer), 64)\n"
    "    there = V(ctypes.addressof(buffer), 64)\n"
    "    if libc.process_vm_readv(os.getppid(), here, 1, there, 1, 0) == 64: return 5\n"
    "    return 0",
    "ptrace of the checker": "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
    "def f(x): return 0 if libc.ptrace(16, os.getppid(), 0, 0) else 5",
    "pidfd_getfd": "import ctypes, os\nlibc = ctypes.CDLL(None)\ndef f(x):\n"
    "    pid = libc.syscall(434, os.getppid(), 0)\n"
    "    fds = [libc.syscall(438, pid, fd, 0) for fd in range(3, 20)]\n"
    "    return 5 if max(fds) >= 0 else 0",
    # The protocol.
    "answers early": f"{_PROTOCOL}\nfor i in range(9): wire.send(answers, b'0' * 8 + value(5))\n"
    "def f(x): return 0",
    "answers twice": f"{_PROTOCOL}\nsend = solution.send\n"
    "solution.send = lambda fd, data: [send(fd, data), send(fd, data[:8] + value(5))]\n"
    "def f(x): return 0",
    "answers with an old token": f"{_PROTOCOL}\nold = []\nsend = solution.send\n"
    "def late(fd, data):\n    old.append(data[:8])\n    send(fd, old[0] + value(0))\n"
    "solution.send = late\ndef f(x): return 0",
    **{
        f"message: {name}": f"{_PROTOCOL}\nsend = solution.send\n"
        f"solution.send = lambda fd, data: os.write(fd, {message})\nimport os\n"
        "def f(x): return 0"
        for name, message in {
            "garbage": "b'passed\\n' * 9",
            "a huge size": "b'\\xff' * 99",
            "a negative size": "(19).to_bytes(8, 'big') + data[:8] + b'i-5:0000000'",
            "a size that is no number": "(18).to_bytes(8, 'big') + data[:8] + b'i0x:123456'",
            "a pickle": "(20).to_bytes(8, 'big') + data[:8] + b'cos\\nsystem\\n.'",
            "an unknown tag": "(11).to_bytes(8, 'big') + data[:8] + b'z0:'",
            "an unknown type": "(31).to_bytes(8, 'big') + data[:8] + b'O2:s9:os.systemT1:s2:id'",
            "an unhashable key": "(21).to_bytes(8, 'big') + data[:8] + b'D1:L0:i1:1xxx'",
            "many items": "(20).to_bytes(8, 'big') + data[:8] + b'L9999999999:'",
            "a deep nest": "(3008).to_bytes(8, 'big') + data[:8] + b'L1:' * 1000",
            "a raise of exit": "(lambda b: (8 + len(b)).to_bytes(8, 'big') + data[:8] + b)("
            "wire.encode(('raise', ['SystemExit'], ''), None))",
            "a raise of nothing": "(lambda b: (8 + len(b)).to_bytes(8, 'big') + data[:8] + b)("
            "wire.encode(('raise', [], ''), None))",
            "three values": "(lambda b: (8 + len(b)).to_bytes(8, 'big') + data[:8] + b)("
            "wire.encode(('value', 5, 5), None))",
        }.items()
    },
    "a flood to the checker": f"{_PROTOCOL}\nimport os\ndef f(x):\n"
    "    while True: os.write(answers, b'\\0' * 65536)",
    "questions stolen": f"{_PROTOCOL}\nimport os\ndef f(x):\n    if os.fork() == 0:\n"
    "        while True: os.read(questions, 99)\n    return 0",
    "a huge value": "def f(x): return 'x' * 10**8",
    "a huge nest": "def f(x):\n    v = []\n    for i in range(10**5): v = [v]\n    return v",
    "a value in itself": "def f(x):\n    v = []\n    v.append(v)\n    return v",
    "a huge integer": "def f(x): return 9 ** 10**6",
    "an exception with a text of its own": "class E(Exception):\n"
    "    def __str__(self): raise SystemExit\ndef f(x): raise E",
    "an exception that is caught": "def f(x): raise BaseException('passed')",
    # Its own text.
    "identifiers that normalise": "\uff46 = lambda x: 0\n\u1d41a = 0",
    "right to left": "def f(x):\n    '''\u202e\u2066'''\n    return 0  # \u2067 5 nruter",
    "an encoding cookie": "# -*- coding: utf-7 -*-\ndef f(x): return 0 # +AAo-    return 5",
    "a null": "def f(x): return 0\n\0def f(x): return 5",
    "a surrogate": "def f(x): return '\udcff'",
    "form feed and carriage return": "def f(x): return 0\r#\x0c\r    return 5",
}

"""The files that generated code may see, and the shell script that makes a root of them."""

from __future__ import annotations

import functools
import shutil
import sys
from pathlib import Path
from shlex import quote

PYTHON = Path(sys.executable).resolve()  # outside any virtual environment
_LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib64")


@functools.cache
def enter_script() -> str:
    """The shell script that makes the new root and becomes Python in it, which runs $1.

    It is process 1 of the namespace: when it ends, all that it started ends too. The new root is
    mounted over /proc, a folder that every system has and a program must not see.
    """
    links = [path for path in visible() if path.is_symlink()]  # such as /lib -> usr/lib
    folders = [path for path in visible() if path.is_dir() and path not in links]
    files = [path for path in visible() if path not in links + folders]
    parents = [path if path in folders else path.parent for path in visible()]
    return "\n".join(
        [
            "set -e",
            "mount -t tmpfs -o mode=755,size=1m root /proc",
            "cd /proc",
            "mkdir -p dev tmp " + " ".join(quote(f".{parent}") for parent in parents),
            *(f": > {quote(f'.{file}')}" for file in [Path("/dev/null"), *files]),
            *(f"ln -s {quote(str(link.readlink()))} {quote(f'.{link}')}" for link in links),
            "mount --bind /dev/null dev/null",
            *(
                f"mount --bind -o ro,nosuid,nodev {quote(str(path))} {quote(f'.{path}')}"
                for path in folders + files
            ),
            "mount -o remount,ro,nosuid /proc",
            f'exec {tool("chroot")} . {quote(str(PYTHON))} -I -S -B -c "$1"',
        ]
    )


@functools.cache
def visible() -> tuple[Path, ...]:
    """The paths that the program may read: Python and its libraries."""
    prefix = Path(sys.base_prefix).resolve()
    python = PYTHON if prefix in (Path("/usr"), Path("/")) else prefix
    libraries = [Path(path) for path in _LIBRARIES if Path(path).exists()]
    return (*libraries, python)


def found_tool(name: str) -> str | None:
    """The path of a program, also where only root's PATH has its folder (chroot); None without."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def tool(name: str) -> str:
    """The path of a program that is known to be installed."""
    path = found_tool(name)
    assert path is not None, "the probe has seen it"
    return str(Path(path).resolve())

"""Where a command's seconds go: CPU time of every process that it starts, by what the process is.

    python benchmarks/processes.py ray_jobs/transfer.py workdir=/tmp/work

Runs the script with this Python and prints a table. Of a process that ends between two looks
(0.1 s) the last of its CPU time is missed.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass

import psutil

EVERY_S = 0.1


@dataclass
class Seen:
    title: str
    begin: float
    end: float
    cpu: float


def main(command: list[str]) -> int:
    begin = time.monotonic()
    job = subprocess.Popen([sys.executable, *command])
    seen: dict[tuple[int, float], Seen] = {}
    while job.poll() is None:
        look(psutil.Process(job.pid), seen, time.monotonic() - begin)
        time.sleep(EVERY_S)
    show(seen, time.monotonic() - begin)
    return job.returncode


def look(top: psutil.Process, seen: dict[tuple[int, float], Seen], now: float) -> None:
    """Note the CPU time so far of `top` and all below it."""
    try:
        below = top.children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for process in [top, *below]:
        try:
            with process.oneshot():
                title, used = title_of(process.cmdline()), process.cpu_times()
                found = seen.setdefault(
                    (process.pid, process.create_time()), Seen(title, now, now, 0.0)
                )
        except psutil.Error:
            continue
        found.end, found.cpu = now, used.user + used.system
        if title.startswith("ray::") and "IDLE" not in title:  # what it became last
            found.title = title


def title_of(command: list[str]) -> str:
    """A short name of a process, from its command line."""
    if not command:
        return "(gone)"
    words = command[0].split()
    if words[0].startswith("ray::"):
        return words[0]
    if "-c" in command:
        return f"{words[0].rpartition('/')[2]} -c"
    names = [word.rpartition("/")[2] for word in command if not word.startswith("-")]
    if names[0].startswith("python") and len(names) > 1:
        module = command[command.index("-m") + 1] if "-m" in command else names[1]
        return module[:50]
    return names[0][:50]


def show(seen: dict[tuple[int, float], Seen], wall: float) -> None:
    groups: dict[str, list[Seen]] = defaultdict(list)
    for process in seen.values():
        groups[process.title].append(process)
    print("\n| process | number | CPU s | alive s |\n|---|---:|---:|---:|")
    total = 0.0
    for title, group in sorted(groups.items(), key=lambda g: -sum(p.cpu for p in g[1])):
        cpu = sum(process.cpu for process in group)
        total += cpu
        if cpu >= 0.5:
            alive = sum(process.end - process.begin for process in group)
            print(f"| {title} | {len(group)} | {cpu:.1f} | {alive:.1f} |")
    print(f"| all | {len(seen)} | {total:.1f} | {wall:.1f} wall |")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

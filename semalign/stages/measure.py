"""What a computation took, of the process or device that it ran on."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")  # Linux's


def peak_bytes(device: torch.device | str) -> int:
    """The most memory held so far: allocated on a GPU, or resident in this process on a CPU, where
    libraries and the interpreter count too (about 0.6 GB with torch and transformers).
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():  # getrusage counts a parent that this process was forked from, too
        [kilobytes] = re.findall(r"VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"))
        return int(kilobytes) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

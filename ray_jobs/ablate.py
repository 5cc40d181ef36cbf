"""What `ray job submit` runs: the same as `semalign ablate`."""

from __future__ import annotations

import sys

from semalign.cli import main

if __name__ == "__main__":
    sys.exit(main(["ablate", *sys.argv[1:]]))

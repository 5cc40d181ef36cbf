"""Submit one transfer: python ray_jobs/transfer.py [--plan] [file.yaml ...] [key=value ...]"""

from __future__ import annotations

import sys

from semalign.cli import main

if __name__ == "__main__":
    from semalign.engine.planning import show_plan
    from semalign.engine.transfer import transfer

    sys.exit(main(sys.argv[1:], run=transfer, plan=show_plan))

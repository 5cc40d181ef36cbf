"""Submit a sweep: python ray_jobs/ablate.py sweep=FILE [--plan] [--yes] [key=value ...]"""

from __future__ import annotations

import sys

from semalign.cli import main_sweep

if __name__ == "__main__":
    from semalign.engine.planning import show_sweep_plan
    from semalign.engine.tuning import ablate

    sys.exit(main_sweep(sys.argv[1:], run=ablate, plan=show_sweep_plan))
